// The frame: who is signed in, which page is shown, what is said aloud. A page is named by the
// part of the address behind #, so that the server needs to know of one page only.

import { useEffect, useLayoutEffect, useRef, useState } from "preact/hooks";
import * as api from "./api";
import { EventsPage } from "./events";
import { KeysPage } from "./keys";
import { connected, happened, listen, notice, useTold } from "./live";
import { PoolPage } from "./pool";
import { SessionPage } from "./session";
import { SessionsPage } from "./sessions";
import { Field, Trouble } from "./ui";

function useRoute(): string[] {
  const read = () => location.hash.replace(/^#\/?/, "").split("/").map(decode);
  const [route, setRoute] = useState(read);
  useEffect(() => {
    const changed = () => setRoute(read());
    addEventListener("hashchange", changed);
    return () => removeEventListener("hashchange", changed);
  }, []);
  return route;
}

function decode(part: string): string {
  try {
    return decodeURIComponent(part);
  } catch {
    return part;
  }
}

export function App() {
  const [me, setMe] = useState<api.Me | null>(null);
  const [message, setMessage] = useState("");
  const [known, setKnown] = useState(!api.key());

  const signOut = (why: string) => {
    api.forgetKey();
    api.forgetEvents();
    happened.set({ all: [], fresh: [] });
    notice.set(null);
    setMe(null);
    setMessage(why);
  };
  const signIn = async () => {
    try {
      setMe(await api.whoami());
      setMessage("");
    } catch (error) {
      // The daemon may only be away: the key is kept for when it is back.
      const away = error instanceof api.Problem && error.status !== 401;
      if (away) setMessage(error.message);
    }
    setKnown(true);
  };
  useEffect(() => {
    api.onRefusedKey((why) => signOut(`You were signed out: ${why}.`));
    if (api.key()) void signIn();
  }, []);

  if (!known) return <p class="empty">Signing in…</p>;
  if (!me) return <SignIn message={message} signIn={signIn} />;
  return <Frame me={me} signOut={() => signOut("You are signed out.")} />;
}

function SignIn({ message, signIn }: { message: string; signIn: () => Promise<void> }) {
  const input = useRef<HTMLInputElement>(null);
  // At once: what is typed first is the key.
  useLayoutEffect(() => {
    document.title = "Sign in · denizen";
    input.current?.focus();
  }, []);
  return (
    <main class="sign-in">
      <h1>denizen</h1>
      <form
        onSubmit={(event) => {
          event.preventDefault();
          const value = input.current?.value.trim();
          if (!value) return;
          api.setKey(value);
          void signIn();
        }}
      >
        <Trouble text={message} />
        <Field
          label="API key"
          hint="denizen key create NAME --scope admin makes one. It is kept in this tab only."
        >
          <input ref={input} type="password" name="key" autocomplete="off" required />
        </Field>
        <button type="submit" class="primary">
          Sign in
        </button>
      </form>
    </main>
  );
}

function Frame({ me, signOut }: { me: api.Me; signOut: () => void }) {
  const route = useRoute();
  const said = useTold(notice);
  const online = useTold(connected);
  const [page = "", ...rest] = route;
  useEffect(listen, []);
  useEffect(() => {
    const heading = document.querySelector<HTMLElement>("main h1");
    document.title = `${heading?.textContent ?? "denizen"} · denizen`;
    heading?.focus();
  }, [page, rest[0]]);
  useEffect(() => {
    // What went well need not be closed.
    if (!said || said.bad) return;
    const timer = setTimeout(() => notice.set(null), 6000);
    return () => clearTimeout(timer);
  }, [said]);

  const link = (to: string, text: string) => (
    <a href={`#/${to}`} aria-current={page === to ? "page" : undefined}>
      {text}
    </a>
  );
  const sessionsHere = page === "" || page === "sessions";
  return (
    <>
      <a
        class="skip"
        href="#main"
        onClick={(event) => {
          // The part behind # names the page here.
          event.preventDefault();
          document.querySelector<HTMLElement>("main h1")?.focus();
        }}
      >
        Skip to content
      </a>
      <header>
        <span class="brand">denizen</span>
        <nav aria-label="Pages">
          <a href="#/" aria-current={sessionsHere ? "page" : undefined}>
            Sessions
          </a>
          {link("events", "Events")}
          {link("pool", "Pool")}
          {me.scope === "admin" && !me.sessions && link("keys", "Keys")}
        </nav>
        <span class={online ? "live on" : "live"}>{online ? "live" : "not connected"}</span>
        <span class="who" title={`scope ${me.scope}`}>
          {me.name} ({me.scope})
        </span>
        <button type="button" onClick={signOut}>
          Sign out
        </button>
      </header>
      <main id="main">
        {sessionsHere && !rest[0] && <SessionsPage me={me} />}
        {page === "sessions" && rest[0] && (
          <SessionPage key={rest[0]} me={me} name={rest[0]} tab={rest[1] ?? ""} rest={rest.slice(2)} />
        )}
        {page === "events" && <EventsPage />}
        {page === "pool" && <PoolPage me={me} />}
        {page === "keys" && <KeysPage />}
        {!sessionsHere && !["events", "pool", "keys"].includes(page) && (
          <h1 tabIndex={-1}>There is no such page</h1>
        )}
      </main>
      <div class="notices">
        <div role="status">{said && !said.bad && <p class="notice">{said.text}</p>}</div>
        <div role="alert">
          {said?.bad && (
            <p class="notice bad">
              {said.text}{" "}
              <button type="button" onClick={() => notice.set(null)}>
                Close
              </button>
            </p>
          )}
        </div>
      </div>
    </>
  );
}
