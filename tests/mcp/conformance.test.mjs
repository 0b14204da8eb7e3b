// The protocol's own suite for servers. What a server is to do whatever it is for is asked of the
// daemon's `/mcp`. Other scenarios call tools, resources and prompts of fixed names, which no real
// server has: the whole suite is put to an example server that has them, and answers by the same
// code (`crates/mcp/examples/conformance.rs`).

import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { once } from "node:events";
import { mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";
import { createInterface } from "node:readline";
import { after, before, test } from "node:test";
import { program, run, startDaemon } from "./daemon.mjs";

const suite = join(import.meta.dirname, "node_modules/@modelcontextprotocol/conformance/dist/index.js");
const fixtures = process.env.CONFORMANCE_SERVER ?? join(dirname(program), "examples/conformance");

const wanted = [
  "server-initialize",
  "ping",
  "logging-set-level",
  "completion-complete",
  "tools-list",
  "resources-list",
  "server-sse-multiple-streams",
  "dns-rebinding-protection",
];

// The suite writes down what it finds.
let results;
before(async () => (results = await mkdtemp(join(tmpdir(), "denizen-mcp-results-"))));
after(() => rm(results, { recursive: true, force: true }));

async function passes(url, ...args) {
  const shim = new URL("conformance.mjs", import.meta.url).href;
  const all = ["--import", shim, suite, "server", "--url", url, ...args];
  const done = await run(all, { cwd: results });
  assert.equal(done.code, 0, done.stdout + done.stderr);
  return done.stdout;
}

test("the daemon does what every server does", async (t) => {
  const daemon = await startDaemon();
  t.after(() => daemon.stop());
  for (const scenario of wanted) await t.test(scenario, () => passes(daemon.url, "--scenario", scenario));
});

test("a server with the suite's fixtures passes all of it", async (t) => {
  const server = spawn(fixtures, { stdio: ["ignore", "pipe", "inherit"] });
  t.after(() => server.kill());
  const [url] = await once(createInterface({ input: server.stdout }), "line");
  const told = await passes(url, "--suite", "all");
  assert.match(told, /Total: \d+ passed, 0 failed/, told);
});
