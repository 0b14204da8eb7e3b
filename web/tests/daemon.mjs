// A real daemon in a folder of its own, with a key for it, and a real browser.

import { execFile, spawn } from "node:child_process";
import { mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { createInterface } from "node:readline";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";
import { chromium } from "playwright-core";

const program =
  process.env.DENIZEN_PROGRAM ?? fileURLToPath(new URL("../../target/debug/denizen", import.meta.url));

export async function startDaemon() {
  const folder = await mkdtemp(join(tmpdir(), "denizen-web-"));
  // Nothing of the tester's own settings.
  const own = Object.entries(process.env).filter(([name]) => !name.startsWith("DENIZEN_"));
  const env = { ...Object.fromEntries(own), DENIZEN_STATE: folder, DENIZEN_CACHE: join(folder, "cache") };
  const run = promisify(execFile);
  const denizen = async (...args) => (await run(program, args, { env })).stdout;
  const isolation = process.env.ISOLATION ?? "host";
  const child = spawn(program, ["--isolation", isolation, "--listen", "127.0.0.1:0", "serve"], {
    env,
    stdio: ["ignore", "ignore", "pipe"],
  });
  const ended = new Promise((resolve) => child.once("exit", resolve));
  const said = [];
  const address = await new Promise((resolve, reject) => {
    createInterface({ input: child.stderr }).on("line", (line) => {
      said.push(line);
      const listens = /^denizen listens on (127\.\S+)/.exec(line);
      if (listens) resolve(`http://${listens[1]}/`);
    });
    ended.then(() => reject(new Error(`the daemon ended:\n${said.join("\n")}`)));
  });
  const stop = async () => {
    child.kill("SIGTERM");
    await ended;
    await rm(folder, { recursive: true, force: true });
  };
  const createKey = async (name, scope) =>
    JSON.parse(await denizen("--json", "key", "create", name, "--scope", scope));
  return { address, denizen, createKey, stop, said };
}

export const launch = () =>
  chromium.launch({
    executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
    args: [
      "--headless",
      "--no-sandbox",
      "--disable-gpu",
      "--disable-quic",
      "--no-first-run",
      "--disable-background-networking",
      "--disable-component-update",
      "--disable-sync",
    ],
  });
