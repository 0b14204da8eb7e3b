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
    let pid = 0;
    // How much of what the shell has printed is drawn; and how much had been drawn when this
    // page was left, whose questions to the terminal were answered then.
    let drawn = 0;
    const seenAt = `denizen.seen.${session}`;
    const [seenPid, seen] = (sessionStorage.getItem(seenAt) ?? "").split(" ").map(Number);
    const remember = () => sessionStorage.setItem(seenAt, `${pid} ${drawn}`);
    addEventListener("pagehide", remember);
    const isReplay = () => pid === seenPid && drawn < seen;

    // One request at a time, so that what was typed arrives in order.
    let waiting: BlobPart[] = [];
    let sending = false;
    const send = async () => {
      if (sending || !pid) return;
      sending = true;
      try {
        while (waiting.length) {
          const all = new Blob(waiting);
          waiting = [];
          await api.type(session, pid, all);
        }
      } catch (error) {
        waiting = [];
        if (!end.signal.aborted) complain(error);
      }
      sending = false;
    };
    const typed = (part: BlobPart) => {
      if (isReplay()) return;
      waiting.push(part);
      void send();
    };
    terminal.onData((text) => typed(text));
    terminal.onBinary((text) => typed(Uint8Array.from(text, (letter) => letter.charCodeAt(0))));

    const size = () => ({ columns: terminal.cols, rows: terminal.rows });
    const fitted = () => void (pid && api.resize(session, pid, size()).catch(() => {}));
    terminal.onResize(fitted);
    const watch = new ResizeObserver(() => fit.fit());
    if (place.current) watch.observe(place.current);
    const recolour = () => (terminal.options.theme = colours());
    dark.addEventListener("change", recolour);

    const write = (bytes: Uint8Array) => new Promise<void>((done) => terminal.write(bytes, done));
    void (async () => {
      let pause = 500;
      while (!end.signal.aborted) {
        try {
          const found = await api.shell(session, TAG, size());
          if (found !== pid) {
            pid = found;
            drawn = 0;
            terminal.reset();
          }
          fitted();
          setStatus("connected");
          void send();
          for await (const output of api.output(session, pid, drawn, end.signal)) {
            pause = 500;
            if (output.kind === "exit") {
              pid = 0;
              setStatus(`ended: ${output.ended.reason ?? `exit code ${output.ended.code}`}`);
              return;
            }
            // The next piece is asked for when this one is drawn.
            if (output.kind === "output") await write(output.bytes);
            drawn = output.after;
          }
        } catch (error) {
          if (end.signal.aborted) return;
          setStatus(`not connected: ${error instanceof Error ? error.message : "?"}`);
        }
        await new Promise((resolve) => setTimeout(resolve, pause));
        pause = Math.min(pause * 2, 10_000);
      }
    })();
    return () => {
      end.abort();
      remember();
      removeEventListener("pagehide", remember);
      watch.disconnect();
      dark.removeEventListener("change", recolour);
      terminal.dispose();
    };
  }, [session, round]);

  const finish = async () => {
    const running = await api.processes(session);
    const shell = running.find((process) => process.tag === TAG && !process.ended);
    if (shell) await api.signal(session, shell.pid, 9);
  };
  const ended = status.startsWith("ended");
  return (
    <section aria-label="Terminal">
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
      <div ref={place} class="screen" />
    </section>
  );
}
