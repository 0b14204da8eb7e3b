// A real daemon in a folder of its own, and a way to its `/mcp` for clients that can send no key.

import { execFile, spawn } from "node:child_process";
import { mkdtemp, rm } from "node:fs/promises";
import { createServer, request } from "node:http";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { createInterface } from "node:readline";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";

export const program =
  process.env.DENIZEN_PROGRAM ?? fileURLToPath(new URL("../../target/debug/denizen", import.meta.url));

export async function startDaemon() {
  const folder = await mkdtemp(join(tmpdir(), "denizen-mcp-"));
  // Nothing of the tester's own settings.
  const own = Object.entries(process.env).filter(([name]) => !name.startsWith("DENIZEN_"));
  const env = { ...Object.fromEntries(own), DENIZEN_STATE: folder, DENIZEN_CACHE: join(folder, "cache") };
  const denizen = async (...args) => (await promisify(execFile)(program, args, { env })).stdout;
  const isolation = process.env.ISOLATION ?? "sandbox";
  const child = spawn(program, ["--isolation", isolation, "--listen", "127.0.0.1:0", "serve"], {
    env,
    stdio: ["ignore", "ignore", "pipe"],
  });
  const ended = new Promise((resolve) => child.once("exit", resolve));
  const said = [];
  const port = await new Promise((resolve, reject) => {
    createInterface({ input: child.stderr }).on("line", (line) => {
      said.push(line);
      const listens = /^denizen listens on 127\.0\.0\.1:(\d+)/.exec(line);
      if (listens) resolve(Number(listens[1]));
    });
    ended.then(() => reject(new Error(`the daemon ended:\n${said.join("\n")}`)));
  });
  const key = JSON.parse(await denizen("--json", "key", "create", "tests", "--scope", "operate")).key;
  const proxy = await withKey(port, key);
  const stop = async () => {
    proxy.closeAllConnections();
    proxy.close();
    child.kill("SIGINT");
    await ended;
    await rm(folder, { recursive: true, force: true });
  };
  return { url: `http://localhost:${proxy.address().port}/mcp`, env, denizen, stop, said };
}

// Hands everything on as it is, with the key.
async function withKey(port, key) {
  const proxy = createServer((incoming, answer) => {
    const headers = { ...incoming.headers, authorization: `Bearer ${key}` };
    const { method, url: path } = incoming;
    const asked = request({ host: "127.0.0.1", port, method, path, headers }, (told) => {
      answer.writeHead(told.statusCode, told.headers);
      told.pipe(answer);
    });
    asked.on("error", () => answer.destroy());
    answer.on("close", () => asked.destroy());
    incoming.pipe(asked);
  });
  await new Promise((resolve) => proxy.listen(0, "localhost", resolve));
  return proxy;
}

// Runs one of the packages here; gives its exit code and what it has printed.
export function run(args, options = {}) {
  return new Promise((resolve) => {
    const all = { timeout: 120_000, maxBuffer: 64 << 20, cwd: import.meta.dirname, ...options };
    execFile(process.execPath, args, all, (error, stdout, stderr) =>
      resolve({ code: error ? (error.code ?? 1) : 0, stdout, stderr }),
    );
  });
}
