// A shell in the session. It belongs to the session, not to this page: a reload, or another
// tab, finds it as it was left.

import { FitAddon } from "@xterm/addon-fit";
import { Terminal } from "@xterm/xterm";
import { useEffect, useRef, useState } from "preact/hooks";
import * as api from "./api";
import { complain, perform } from "./live";

/** What the command is found by. */
const TAG = "dashboard";

const COLOURS = {
  light: { background: "#ffffff", foreground: "#1b1f24", cursor: "#1b1f24", selectionBackground: "#b6d7ff" },
  dark: { background: "#0f1419", foreground: "#dde3ea", cursor: "#dde3ea", selectionBackground: "#2f4b6b" },
};

export function TerminalTab({ session }: { session: string }) {
  const place = useRef<HTMLDivElement>(null);
  const leave = useRef<HTMLButtonElement>(null);
  const [status, setStatus] = useState("connecting");
  const [round, setRound] = useState(0);

  useEffect(() => {
    const dark = matchMedia("(prefers-color-scheme: dark)");
    const colours = () => (dark.matches ? COLOURS.dark : COLOURS.light);
    const terminal = new Terminal({
      theme: colours(),
      fontSize: 13,
      scrollback: 5000,
      screenReaderMode: true,
      minimumContrastRatio: 4.5,
    });
    const fit = new FitAddon();
    terminal.loadAddon(fit);
    if (place.current) terminal.open(place.current);
    fit.fit();
    terminal.focus();
    // Tab is the shell's: there is another way out for who has no mouse.
    terminal.attachCustomKeyEventHandler((event) => {
      if (!(event.ctrlKey && event.shiftKey && event.key === "ArrowUp")) return true;
      leave.current?.focus();
      event.preventDefault();
      return false;
    });

    const end = new AbortController();
    // One request at a time, so that what was typed arrives in order.
    let waiting: Uint8Array[] = [];
    let sending = false;
    let connected = false;
    const send = async () => {
      if (sending || !connected) return;
      sending = true;
      try {
        while (waiting.length) {
          const all = new Blob(waiting as BlobPart[]);
          waiting = [];
          await api.type(session, TAG, new Uint8Array(await all.arrayBuffer()));
        }
      } catch (error) {
        waiting = [];
        if (!end.signal.aborted) complain(error);
      }
      sending = false;
    };
    // While old output is drawn again, what the terminal answers to it is not for the shell.
    let replaying = false;
    const typed = (bytes: Uint8Array) => {
      if (replaying) return;
      waiting.push(bytes);
      void send();
    };
    terminal.onData((text) => typed(new TextEncoder().encode(text)));
    terminal.onBinary((text) => typed(Uint8Array.from(text, (letter) => letter.charCodeAt(0))));

    const size = () => ({ columns: terminal.cols, rows: terminal.rows });
    terminal.onResize(() => void api.resize(session, TAG, size()).catch(() => {}));
    const watch = new ResizeObserver(() => fit.fit());
    if (place.current) watch.observe(place.current);
    const recolour = () => (terminal.options.theme = colours());
    dark.addEventListener("change", recolour);

    const write = (bytes: Uint8Array) => new Promise<void>((done) => terminal.write(bytes, done));
    void (async () => {
      let pause = 500;
      while (!end.signal.aborted) {
        try {
          for await (const output of api.terminal(session, TAG, size(), end.signal)) {
            if (output.kind === "start") {
              terminal.reset();
              replaying = true;
              await write(output.before);
              replaying = false;
              connected = true;
              pause = 500;
              void api.resize(session, TAG, size()).catch(() => {});
              setStatus("connected");
              void send();
            } else if (output.kind === "data") {
              // The next piece is asked for when this one is drawn.
              await write(output.bytes);
            } else {
              setStatus(`ended: ${output.status}`);
              return;
            }
          }
        } catch (error) {
          if (end.signal.aborted) return;
          connected = false;
          setStatus(`not connected: ${error instanceof Error ? error.message : "?"}`);
        }
        await new Promise((resolve) => setTimeout(resolve, pause));
        pause = Math.min(pause * 2, 10_000);
      }
    })();
    return () => {
      end.abort();
      watch.disconnect();
      dark.removeEventListener("change", recolour);
      terminal.dispose();
    };
  }, [session, round]);

  const finish = async () => {
    const running = await api.processes(session);
    const shell = running.find((process) => process.tag === TAG);
    if (shell) await api.signal(session, shell.pid, "KILL");
  };
  const ended = status.startsWith("ended");
  return (
    <section aria-label="Terminal" class="terminal-tab">
      <div class="bar">
        <span role="status">{status}</span>
        <small>Ctrl+Shift+↑ leaves the terminal. The shell goes on when this page is closed.</small>
        <button
          ref={leave}
          type="button"
          onClick={() => (ended ? setRound(round + 1) : void perform(finish))}
        >
          {ended ? "New shell" : "End shell"}
        </button>
      </div>
      <div ref={place} class="terminal" />
    </section>
  );
}
