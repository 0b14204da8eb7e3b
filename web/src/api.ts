// What the daemon is asked, and in which words: the one module that knows the wire. `/v1` is
// denizen's own API; files are spoken of in envd's protocol (Connect, as JSON).
// It must never keep the key anywhere but in this tab's session storage.

export type Scope = "read" | "operate" | "admin";

export interface Me {
  id?: string | null;
  name: string;
  scope: Scope;
  sessions?: string | null;
  expires_at?: string | null;
}

/** Times are seconds since 1970, sizes bytes. */
export interface Session {
  id: string;
  name?: string | null;
  isolation: string;
  image?: string | null;
  state: string;
  operation?: string | null;
  in_use: boolean;
  waiting: number;
  created_at: number;
  last_used: number;
  unsaved: boolean;
  unsaved_since?: number | null;
  backup?: string | null;
  backup_taken_at?: number | null;
  backup_due_at?: number | null;
  backup_failure?: string | null;
  backup_failed_at?: number | null;
  last_failure?: string | null;
  retry_at?: number | null;
  disk_used?: number | null;
  disk_limit?: number | null;
  /** While it runs. */
  usage?: {
    memory_bytes?: number | null;
    cpu_microseconds?: number | null;
    processes?: number | null;
  } | null;
}

export interface Backup {
  name: string;
  taken_at: string | number;
  format: string;
  bytes?: number | null;
  size?: number | null;
}

export interface Snapshot {
  name: string;
  taken_at: number;
}

export interface LifeEvent {
  id: string;
  at: number;
  session: string;
  name?: string;
  event: string;
  [detail: string]: unknown;
}

export interface Key {
  id: string;
  name: string;
  scope: Scope;
  sessions?: string | null;
  created_at: string;
  expires_at?: string | null;
  last_used_at?: string | null;
}

export interface Entry {
  name: string;
  kind: "file" | "folder" | "link";
  size: number;
  permissions: string;
  modifiedAt?: string;
  target?: string;
}

export interface Ended {
  code: number;
  signal?: number;
  reason?: string;
}

export interface Process {
  pid: number;
  tag?: string | null;
  command: string[];
  terminal: boolean;
  foreground: boolean;
  started_at: number;
  ended?: Ended | null;
}

/** `after` is how many bytes were printed with it. */
export type Output =
  | { kind: "output"; bytes: Uint8Array; after: number }
  | { kind: "gap"; after: number }
  | { kind: "exit"; ended: Ended };

/** An answer that says no. */
export class Problem extends Error {
  constructor(
    readonly status: number,
    readonly code: string,
    message: string,
  ) {
    super(message);
  }
}

// ---- The key ----------------------------------------------------------------------------

const KEY = "denizen.key";
let refused: (why: string) => void = () => {};

export const key = () => sessionStorage.getItem(KEY);
export const setKey = (value: string) => sessionStorage.setItem(KEY, value);
export const forgetKey = () => sessionStorage.removeItem(KEY);
/** Is told when the daemon no longer takes the key. */
export const onRefusedKey = (listener: (why: string) => void) => {
  refused = listener;
};

// ---- Requests ---------------------------------------------------------------------------

function headers(more: Record<string, string> = {}): Record<string, string> {
  const secret = key();
  return secret ? { authorization: `Bearer ${secret}`, ...more } : more;
}

async function problem(status: number, body: string): Promise<Problem> {
  let told: { code?: string; detail?: string; title?: string; message?: string } = {};
  try {
    told = JSON.parse(body);
  } catch {
    // Not everything on the way to a daemon speaks JSON.
  }
  const text = told.detail ?? told.message ?? told.title ?? `the daemon answered ${status}`;
  if (status === 401 && key()) {
    forgetKey();
    refused(text);
  }
  return new Problem(status, told.code ?? String(status), text);
}

async function ask(path: string, init: RequestInit = {}): Promise<Response> {
  let response: Response;
  try {
    response = await fetch(path, {
      cache: "no-store",
      ...init,
      headers: headers(init.headers as Record<string, string>),
    });
  } catch (error) {
    if (init.signal?.aborted) throw error;
    throw new Problem(0, "unreachable", "the daemon cannot be reached");
  }
  if (!response.ok) throw await problem(response.status, await response.text());
  return response;
}

async function json<T>(method: string, path: string, body?: unknown): Promise<T> {
  const init: RequestInit = { method };
  if (body !== undefined) {
    init.body = JSON.stringify(body);
    init.headers = { "content-type": "application/json" };
  }
  const text = await (await ask(path, init)).text();
  return (text ? JSON.parse(text) : undefined) as T;
}

const of = (session: string) => `/v1/sessions/${encodeURIComponent(session)}`;

function query(values: Record<string, string | number | boolean | undefined>): string {
  const given = Object.entries(values).filter(([, value]) => value !== undefined && value !== "");
  const text = new URLSearchParams(given.map(([name, value]) => [name, String(value)])).toString();
  return text && `?${text}`;
}

export const whoami = () => json<Me>("GET", "/v1/whoami");

// ---- Sessions ---------------------------------------------------------------------------

export async function sessions(): Promise<Session[]> {
  const all: Session[] = [];
  let after: string | undefined;
  do {
    type Page = { sessions: Session[]; next?: string };
    const page: Page = await json<Page>("GET", `/v1/sessions${query({ after })}`);
    all.push(...page.sessions);
    after = page.next;
  } while (after);
  // In order, a session without a name comes by its UUID.
  const called = (session: Session) => session.name ?? session.id;
  return all.sort((a, b) => called(a).localeCompare(called(b)));
}

export const inspect = (session: string) => json<Session>("GET", of(session));
export const create = (name: string, image?: string) =>
  json<Session>("POST", "/v1/sessions", { name, image });
export const start = (session: string) => json<Session>("POST", `${of(session)}/start`);
export const stop = (session: string, force: boolean) =>
  json<void>("POST", `${of(session)}/stop${query({ force })}`);
export const remove = (session: string, force: boolean) =>
  json<void>("DELETE", `${of(session)}${query({ force })}`);
export const fork = (session: string, snapshot?: string) =>
  json<Session>("POST", `${of(session)}/fork${query({ snapshot })}`);

// ---- Backups and snapshots --------------------------------------------------------------

export const backups = (session: string) => json<Backup[]>("GET", `${of(session)}/backups`);
export const backup = (session: string) => json<Session>("POST", `${of(session)}/backup`);
export const restore = (session: string, from: { backup?: string; snapshot?: string }) =>
  json<Session>("POST", `${of(session)}/restore${query(from)}`);
export const snapshots = (session: string) => json<Snapshot[]>("GET", `${of(session)}/snapshots`);
const ofSnapshot = (session: string, name: string) =>
  `${of(session)}/snapshots/${encodeURIComponent(name)}`;
export const takeSnapshot = (session: string, name: string) =>
  json<void>("PUT", ofSnapshot(session, name));
export const removeSnapshot = (session: string, name: string) =>
  json<void>("DELETE", ofSnapshot(session, name));

// ---- Keys -------------------------------------------------------------------------------

export const keys = async () => (await json<{ keys: Key[] }>("GET", "/v1/keys")).keys;
export const createKey = (asked: {
  name: string;
  scope: Scope;
  sessions?: string;
  expires_in_seconds?: number;
}) => json<Key & { key: string }>("POST", "/v1/keys", asked);
export const revokeKey = (id: string) => json<void>("DELETE", `/v1/keys/${encodeURIComponent(id)}`);

// ---- The pool ---------------------------------------------------------------------------

export interface Metric {
  name: string;
  labels: string;
  value: number;
  help: string;
}

/** Whether the daemon can do its work, and why not; null if it does not tell. */
export async function ready(): Promise<{ ok: boolean; detail: string } | null> {
  const response = await fetch("/readyz", { cache: "no-store" });
  if (response.status === 404 || response.status === 401) return null;
  return { ok: response.ok, detail: await response.text() };
}

/** The daemon's metrics, without the buckets of histograms. */
export async function metrics(): Promise<Metric[]> {
  const text = await (await ask("/v1/metrics")).text();
  const help = new Map<string, string>();
  const all: Metric[] = [];
  for (const line of text.split("\n")) {
    const described = /^# HELP (\S+) (.*)$/.exec(line);
    if (described) help.set(described[1], described[2]);
    const sample = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)$/.exec(line);
    if (!sample || sample[1].endsWith("_bucket")) continue;
    const [, name, labels = "", value] = sample;
    const of = help.get(name) ?? help.get(name.replace(/_(sum|count)$/, "")) ?? "";
    all.push({ name, labels, value: Number(value), help: of });
  }
  return all;
}

// ---- Events -----------------------------------------------------------------------------

/** The id of the event that was seen last; one that no daemon has given asks for all it keeps. */
let lastSeen = "none";

/** What has happened and happens, some at a time. Ends when the daemon does; the next call goes
 * on from there. */
export async function* events(signal: AbortSignal, opened: () => void): AsyncGenerator<LifeEvent[]> {
  // Not by EventSource, which cannot send a key.
  const headers = { accept: "text/event-stream", "last-event-id": lastSeen };
  const response = await ask("/v1/events", { signal, headers });
  opened();
  for await (const messages of told(response)) {
    const some: LifeEvent[] = [];
    for (const { id, data } of messages) {
      // What has no id says that others were lost.
      if (!id) continue;
      some.push({ ...(JSON.parse(data) as LifeEvent), id });
      lastSeen = id;
    }
    if (some.length) yield some;
  }
}

/** Whoever signs in next is told from the beginning. */
export const forgetEvents = () => {
  lastSeen = "none";
};

interface Message {
  id?: string;
  event?: string;
  data: string;
}

/** Server-sent events, as many at a time as have come. Ours have one line of data. */
async function* told(response: Response): AsyncGenerator<Message[]> {
  const reader = response.body?.getReader();
  if (!reader) return;
  const decoder = new TextDecoder();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const blocks = (rest + decoder.decode(value, { stream: true })).split("\n\n");
      rest = blocks.pop() ?? "";
      const messages = blocks.map((block) => {
        const field = (name: string) => new RegExp(`^${name}: ?(.*)$`, "m").exec(block)?.[1];
        return { id: field("id"), event: field("event"), data: field("data") ?? "" };
      });
      // Without data it only keeps the line open.
      yield messages.filter((message) => message.data);
    }
  } finally {
    // Whoever no longer listens ends the request.
    await reader.cancel().catch(() => {});
  }
}

// ---- Commands ---------------------------------------------------------------------------

export const processes = async (session: string) =>
  (await json<{ processes: Process[] }>("GET", `${of(session)}/processes`)).processes;

const ofProcess = (session: string, pid: number) => `${of(session)}/processes/${pid}`;

export const signal = (session: string, pid: number, number: number) =>
  json<void>("POST", `${ofProcess(session, pid)}/signal`, { signal: number });

export interface Size {
  columns: number;
  rows: number;
}

/** The shell of that tag in a terminal, which goes on without us; it is started if none runs. */
export async function shell(session: string, tag: string, size: Size): Promise<number> {
  // The oldest, so that all who look find the same one.
  const running = async () =>
    (await processes(session)).find((it) => it.tag === tag && !it.ended)?.pid;
  const there = await running();
  if (there !== undefined) return there;
  // The pool's shell, whichever that is, as an interactive one.
  const asked = { shell: 'exec "$0" -i', tag, terminal: size, stdin: true, detach: true };
  const { pid } = await json<{ pid: number }>("POST", `${of(session)}/processes`, asked);
  // Another page may have looked at the same time: then its shell, or ours, is one too many.
  const first = (await running()) ?? pid;
  if (first !== pid) await signal(session, pid, 9);
  return first;
}

/** What a command prints and has printed, as far as that is kept, after so many bytes. */
export async function* output(
  session: string,
  pid: number,
  from: number,
  signal: AbortSignal,
): AsyncGenerator<Output> {
  const response = await ask(`${ofProcess(session, pid)}/output${query({ from })}`, { signal });
  for await (const messages of told(response)) {
    for (const { id, event, data } of messages) {
      const value = JSON.parse(data);
      const after = Number(id);
      if (event === "output") yield { kind: "output", bytes: fromBase64(value.bytes), after };
      if (event === "gap") yield { kind: "gap", after };
      if (event === "exit") return yield { kind: "exit", ended: value };
      if (event === "lost") throw new Problem(0, value.code, value.detail);
    }
  }
  throw new Problem(0, "broken_off", "the connection broke off");
}

function fromBase64(text: string): Uint8Array {
  return Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
}

export const type = (session: string, pid: number, bytes: Blob) =>
  ask(`${ofProcess(session, pid)}/input`, {
    method: "POST",
    headers: { "content-type": "application/octet-stream" },
    body: bytes,
  });

export const resize = (session: string, pid: number, size: Size) =>
  json<void>("PUT", `${ofProcess(session, pid)}/size`, size);

// ---- Files ------------------------------------------------------------------------------
// Paths are relative to the volume, or absolute within the session.

const inside = (session: string, more: Record<string, string> = {}) => ({
  "denizen-session": session,
  ...more,
});

async function call<T>(session: string, method: string, message: unknown): Promise<T> {
  const response = await ask(`/${method}`, {
    method: "POST",
    headers: inside(session, { "content-type": "application/json" }),
    body: JSON.stringify(message),
  });
  return (await response.json()) as T;
}

export async function list(session: string, path: string): Promise<Entry[]> {
  type Told = {
    name: string;
    type: string;
    size?: string;
    permissions?: string;
    modifiedTime?: string;
    symlinkTarget?: string;
  };
  const message = { path: path || ".", depth: 1 };
  const told = await call<{ entries?: Told[] }>(session, "filesystem.Filesystem/ListDir", message);
  const entries = (told.entries ?? []).map((entry): Entry => {
    const kinds: Record<string, Entry["kind"]> = {
      FILE_TYPE_DIRECTORY: "folder",
      FILE_TYPE_SYMLINK: "link",
    };
    return {
      name: entry.name,
      kind: kinds[entry.type] ?? "file",
      size: Number(entry.size ?? 0),
      permissions: entry.permissions ?? "",
      modifiedAt: entry.modifiedTime,
      target: entry.symlinkTarget,
    };
  });
  const rank = (entry: Entry) => (entry.kind === "folder" ? 0 : 1);
  return entries.sort((a, b) => rank(a) - rank(b) || a.name.localeCompare(b.name));
}

export const makeFolder = (session: string, path: string) =>
  call(session, "filesystem.Filesystem/MakeDir", { path });
export const removePath = (session: string, path: string) =>
  call(session, "filesystem.Filesystem/Remove", { path });

/** A file's bytes, or a folder's as a tar archive: never of a type that a page would run. */
export async function download(session: string, path: string, folder: boolean): Promise<Blob> {
  const address = `/files${query({ path, format: folder ? "tar" : undefined })}`;
  const response = await ask(address, { headers: inside(session) });
  return new Blob([await response.arrayBuffer()], { type: "application/octet-stream" });
}

/** Writes a file; what has gone out of how much is told while it lasts. */
export function upload(
  session: string,
  path: string,
  content: Blob,
  progress: (part: number) => void,
): Promise<void> {
  // `fetch` does not tell how far an upload is.
  const request = new XMLHttpRequest();
  request.open("POST", `/files${query({ path })}`);
  const all = headers(inside(session, { "content-type": "application/octet-stream" }));
  for (const [name, value] of Object.entries(all)) request.setRequestHeader(name, value);
  request.upload.onprogress = (event) => progress(event.total ? event.loaded / event.total : 0);
  return new Promise((resolve, reject) => {
    request.onload = async () => {
      if (request.status < 300) resolve();
      else reject(await problem(request.status, request.responseText));
    };
    request.onerror = () => reject(new Problem(0, "unreachable", "the upload broke off"));
    request.send(content);
  });
}
