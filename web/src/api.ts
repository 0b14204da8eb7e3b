// What the daemon is asked, and in which words: the one module that knows the wire. `/v1` is
// denizen's own API; commands and files are spoken of in envd's protocol (Connect, as JSON).
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
  /** Not told by every daemon. */
  usage?: { memory_bytes?: number; cpu_seconds?: number; processes?: number; disk_bytes?: number };
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

export interface Process {
  pid: number;
  tag?: string;
  command: string;
  cwd?: string;
}

export type Output =
  | { kind: "start"; before: Uint8Array }
  | { kind: "data"; bytes: Uint8Array }
  | { kind: "exit"; status: string };

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
  type Page = Session[] | { sessions: Session[]; next?: string | null };
  const all: Session[] = [];
  let after: string | undefined;
  do {
    const page: Page = await json<Page>("GET", `/v1/sessions${query({ after })}`);
    // A daemon without pages answers with all of them.
    if (Array.isArray(page)) return page;
    all.push(...page.sessions);
    after = page.next ?? undefined;
  } while (after);
  return all;
}

export const inspect = (session: string) => json<Session>("GET", of(session));
/** Makes the session if there is none of that name. */
export const start = (session: string, image?: string) =>
  json<Session>("POST", `${of(session)}/start${query({ image })}`);
export const stop = (session: string, force: boolean) =>
  json<void>("POST", `${of(session)}/stop${query({ force })}`);
export const remove = (session: string, force: boolean) =>
  json<void>("DELETE", `${of(session)}${query({ force })}`);
export const fork = (session: string, snapshot?: string) =>
  json<Session>("POST", `${of(session)}/fork${query({ snapshot })}`);

// ---- Backups and snapshots --------------------------------------------------------------

export async function backups(session: string): Promise<Backup[]> {
  const told = await json<Backup[] | { backups: Backup[] }>("GET", `${of(session)}/backups`);
  return Array.isArray(told) ? told : told.backups;
}
export const backup = (session: string) => json<Session>("POST", `${of(session)}/backup`);
export const restore = (session: string, from: { backup?: string; snapshot?: string }) =>
  json<Session>("POST", `${of(session)}/restore${query(from)}`);
export async function snapshots(session: string): Promise<Snapshot[]> {
  const told = await json<Snapshot[] | { snapshots: Snapshot[] }>("GET", `${of(session)}/snapshots`);
  return Array.isArray(told) ? told : told.snapshots;
}
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

/** What happens from now on. Ends when the daemon does. */
export async function* events(signal: AbortSignal, opened: () => void): AsyncGenerator<LifeEvent> {
  const response = await ask("/v1/events", { signal });
  opened();
  const decoder = new TextDecoder();
  let rest = "";
  for await (const piece of pieces(response)) {
    const lines = (rest + decoder.decode(piece, { stream: true })).split("\n");
    rest = lines.pop() ?? "";
    for (const line of lines) if (line.trim()) yield JSON.parse(line) as LifeEvent;
  }
}

async function* pieces(response: Response): AsyncGenerator<Uint8Array> {
  const reader = response.body?.getReader();
  if (!reader) return;
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      yield value;
    }
  } finally {
    // Whoever no longer listens ends the request.
    await reader.cancel().catch(() => {});
  }
}

// ---- Commands ---------------------------------------------------------------------------

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

interface ProcessEvent {
  start?: { pid: number };
  data?: { stdout?: string; stderr?: string; pty?: string };
  end?: { exitCode?: number; status?: string; error?: string };
}

/** A stream of Connect: each message behind a byte of flags and its length. */
async function* stream(
  session: string,
  method: string,
  message: unknown,
  signal: AbortSignal,
  more: Record<string, string> = {},
): AsyncGenerator<Output> {
  const text = new TextEncoder().encode(JSON.stringify(message));
  const body = new Uint8Array(5 + text.length);
  new DataView(body.buffer).setUint32(1, text.length);
  body.set(text, 5);
  const response = await ask(`/${method}`, {
    method: "POST",
    signal,
    headers: inside(session, { "content-type": "application/connect+json", ...more }),
    body,
  });
  let have = new Uint8Array(0);
  for await (const piece of pieces(response)) {
    have = joined(have, piece);
    while (have.length >= 5) {
      const length = new DataView(have.buffer, have.byteOffset).getUint32(1);
      if (have.length < 5 + length) break;
      const told = JSON.parse(new TextDecoder().decode(have.subarray(5, 5 + length)));
      const last = (have[0] & 2) !== 0;
      have = have.slice(5 + length);
      if (last) {
        const error = told.error as { code?: string; message?: string } | undefined;
        if (error) throw new Problem(0, error.code ?? "failed", error.message ?? "it broke off");
        return;
      }
      const event = (told.event ?? {}) as ProcessEvent;
      if (event.start) yield { kind: "start", before: new Uint8Array(0) };
      const data = event.data?.pty ?? event.data?.stdout ?? event.data?.stderr;
      if (data) yield { kind: "data", bytes: fromBase64(data) };
      if (event.end) yield { kind: "exit", status: event.end.error ?? event.end.status ?? "ended" };
    }
  }
  throw new Problem(0, "broken_off", "the connection broke off");
}

function joined(a: Uint8Array, b: Uint8Array): Uint8Array<ArrayBuffer> {
  const both = new Uint8Array(a.length + b.length);
  both.set(a);
  both.set(b, a.length);
  return both;
}

function fromBase64(text: string): Uint8Array {
  return Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
}

function toBase64(bytes: Uint8Array): string {
  let text = "";
  for (const byte of bytes) text += String.fromCharCode(byte);
  return btoa(text);
}

export async function processes(session: string): Promise<Process[]> {
  type Told = { config?: { cmd?: string; args?: string[]; cwd?: string }; pid: number; tag?: string };
  const told = await call<{ processes?: Told[] }>(session, "process.Process/List", {});
  return (told.processes ?? []).map(({ config, pid, tag }) => ({
    pid,
    tag,
    command: [config?.cmd ?? "", ...(config?.args ?? [])].join(" "),
    cwd: config?.cwd,
  }));
}

export const signal = (session: string, pid: number, name: "TERM" | "KILL") =>
  call(session, "process.Process/SendSignal", { process: { pid }, signal: `SIGNAL_SIG${name}` });

export interface Size {
  columns: number;
  rows: number;
}

/** Bytes of a terminal's past that are drawn again. */
const REPLAYED = 512 * 1024;

const wireSize = ({ columns, rows }: Size) => ({ size: { cols: columns, rows } });

/** Follows a terminal from its beginning, as far as that is kept; it goes on without us. */
export async function* terminal(
  session: string,
  tag: string,
  size: Size,
  signal: AbortSignal,
): AsyncGenerator<Output> {
  const running = await processes(session);
  if (!running.some((process) => process.tag === tag)) {
    const shell = "command -v bash >/dev/null && exec bash -l; exec sh -l";
    const process = { cmd: "/bin/sh", args: ["-c", shell] };
    const message = { process, pty: wireSize(size), tag };
    yield* stream(session, "process.Process/Start", message, signal, { "denizen-detach": "1" });
    return;
  }
  const live = stream(session, "process.Process/Connect", { process: { tag } }, signal);
  // From its first event on nothing is missed: what was before is in the log, which may have
  // some of what comes now as well.
  await live.next();
  const path = `${of(session)}/logs/${encodeURIComponent(tag)}`;
  const log = new Uint8Array(await (await ask(path, { signal })).arrayBuffer());
  const before = log.subarray(Math.max(0, log.length - REPLAYED));
  yield { kind: "start", before };
  let first = true;
  for await (const output of live) {
    const twice = first && output.kind === "data" ? overlap(before, output.bytes) : 0;
    if (output.kind === "data") yield { kind: "data", bytes: output.bytes.subarray(twice) };
    else yield output;
    first = false;
  }
}

/** How many of `next`'s bytes `before` ends with, if it ends with all of a piece. */
function overlap(before: Uint8Array, next: Uint8Array): number {
  const from = before.length - next.length;
  // A few bytes are an echo that may well come twice.
  const same = next.length > 16 && from >= 0 && next.every((byte, at) => byte === before[from + at]);
  return same ? next.length : 0;
}

export const type = (session: string, tag: string, bytes: Uint8Array) =>
  call(session, "process.Process/SendInput", {
    process: { tag },
    input: { pty: toBase64(bytes) },
  });

export const resize = (session: string, tag: string, size: Size) =>
  call(session, "process.Process/Update", { process: { tag }, pty: wireSize(size) });

// ---- Files ------------------------------------------------------------------------------
// Paths are relative to the volume, or absolute within the session.

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
