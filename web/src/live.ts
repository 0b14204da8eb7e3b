// What this tab knows beyond one page: what has happened since it was opened, and what is to be
// said aloud. Pages subscribe; nothing here draws.

import { useEffect, useState } from "preact/hooks";
import * as api from "./api";

const KEPT = 2000;

/** A value that pages can wait for changes of. */
class Told<T> {
  private listeners = new Set<() => void>();
  constructor(public value: T) {}
  set(value: T) {
    this.value = value;
    for (const listener of [...this.listeners]) listener();
  }
  subscribe(listener: () => void) {
    this.listeners.add(listener);
    return () => void this.listeners.delete(listener);
  }
}

export function useTold<T>(told: Told<T>): T {
  const [, again] = useState({});
  useEffect(() => told.subscribe(() => again({})), [told]);
  return told.value;
}

// ---- Events -----------------------------------------------------------------------------

/** Newest first; `fresh` are those that were added last. */
export const happened = new Told<{ all: api.LifeEvent[]; fresh: api.LifeEvent[] }>({ all: [], fresh: [] });
export const connected = new Told(false);

function add(fresh: api.LifeEvent[]) {
  // Only the latest word on how far something is means anything.
  const what = (event: api.LifeEvent) =>
    event.event === "progress" ? `${event.session} ${String(event.operation)}` : event.id;
  const all = new Map<string, api.LifeEvent>();
  for (const event of [...fresh.toReversed(), ...happened.value.all]) {
    if (!all.has(what(event))) all.set(what(event), event);
  }
  happened.set({ all: [...all.values()].slice(0, KEPT), fresh });
}

/** Listens until told to stop; begins again when the daemon was away. */
export function listen(): () => void {
  const end = new AbortController();
  void (async () => {
    let pause = 500;
    while (!end.signal.aborted && api.key()) {
      try {
        const opened = () => {
          connected.set(true);
          pause = 500;
        };
        for await (const fresh of api.events(end.signal, opened)) add(fresh);
      } catch {
        // Shown as not connected; a refused key signs out by itself.
      }
      connected.set(false);
      await new Promise((resolve) => setTimeout(resolve, pause));
      pause = Math.min(pause * 2, 15_000);
    }
  })();
  return () => end.abort();
}

// ---- Notices ----------------------------------------------------------------------------

export interface Notice {
  text: string;
  bad: boolean;
}
export const notice = new Told<Notice | null>(null);

export const say = (text: string) => notice.set({ text, bad: false });
export const complain = (error: unknown) => {
  if (error instanceof api.Problem && error.status === 401) return;
  notice.set({ text: error instanceof Error ? error.message : String(error), bad: true });
};

/** Does something that the user asked for, and says how that went. */
export async function perform(work: () => Promise<unknown>, done?: string): Promise<boolean> {
  try {
    await work();
    if (done) say(done);
    return true;
  } catch (error) {
    complain(error);
    return false;
  }
}

// ---- Asking -----------------------------------------------------------------------------

/** What is loaded, again when `every` (milliseconds) or a new event of the session says so. */
export function useLoaded<T>(
  load: () => Promise<T>,
  on: unknown[],
  again: { every?: number; events?: (event: api.LifeEvent) => boolean } = {},
): { value?: T; error?: string; reload: () => Promise<void> } {
  const [state, setState] = useState<{ value?: T; error?: string }>({});
  const [latest] = useState({ asked: 0 });
  const reload = async () => {
    const mine = ++latest.asked;
    try {
      const value = await load();
      // What was asked for before may be answered after.
      if (mine === latest.asked) setState({ value });
    } catch (error) {
      if (mine === latest.asked) {
        setState((old) => ({ value: old.value, error: error instanceof Error ? error.message : "" }));
      }
    }
  };
  useEffect(() => {
    setState({});
    void reload();
    const timer = again.every && setInterval(() => !document.hidden && void reload(), again.every);
    let soon: ReturnType<typeof setTimeout> | undefined;
    const stop = happened.subscribe(() => {
      const wanted = (event: api.LifeEvent) => event.event !== "progress" && again.events?.(event);
      if (!happened.value.fresh.some(wanted)) return;
      clearTimeout(soon);
      soon = setTimeout(() => void reload(), 100);
    });
    return () => {
      latest.asked++;
      if (timer) clearInterval(timer);
      clearTimeout(soon);
      stop();
    };
  }, on);
  return { ...state, reload };
}
