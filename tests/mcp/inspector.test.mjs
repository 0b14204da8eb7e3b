// Every tool that is listed, called by the inspector's command line: by HTTP, and the first ones on
// standard input and output too. A tool that is not called here fails the test.

import assert from "node:assert/strict";
import { after, before, test } from "node:test";
import { program, run, startDaemon } from "./daemon.mjs";

const inspector = "node_modules/@modelcontextprotocol/inspector-cli/build/index.js";

let daemon;
before(async () => (daemon = await startDaemon()));
after(() => daemon?.stop());

async function ask(target, ...args) {
  const done = await run([inspector, ...target, ...args], { env: daemon.env });
  assert.equal(done.code, 0, done.stdout + done.stderr);
  return JSON.parse(done.stdout);
}

async function call(target, tool, args) {
  const pairs = Object.entries(args).map(([name, value]) => `${name}=${value}`);
  const named = pairs.length ? ["--tool-arg", ...pairs] : [];
  const told = await ask(target, "--method", "tools/call", "--tool-name", tool, ...named);
  const text = told.content?.[0]?.text;
  assert.ok(text, `${tool}: ${JSON.stringify(told)}`);
  return { text, is: told.isError ?? false, data: told.structuredContent };
}

test("every tool is listed and called", async () => {
  const target = [daemon.url, "--transport", "http"];
  const { tools } = await ask(target, "--method", "tools/list");
  const called = new Set();
  const works = async (tool, args = {}) => {
    called.add(tool);
    const { text, is, data } = await call(target, tool, args);
    assert.ok(!is, `${tool}: ${text}`);
    assert.equal(typeof data, "object", tool);
    return data;
  };
  const session = "inspected";
  assert.equal((await works("start_session", { session })).state, "active");
  assert.equal((await works("run_command", { session, command: "echo hello" })).output, "hello\n");
  const cat = await works("run_command", { session, command: "cat", background: true, stdin: true });
  const { command_id } = cat;
  assert.equal((await works("write_stdin", { session, command_id, text: "line\n" })).bytes, 5);
  const read = await works("read_output", { session, command_id, wait_seconds: 20 });
  assert.equal(read.output, "line\n");
  const { processes } = await works("list_processes", { session });
  assert.deepEqual(processes.map((it) => it.command_id), [command_id]);
  assert.equal((await works("kill_process", { session, command_id })).signal, 9);
  const killed = await works("read_output", { session, command_id, offset: 5, wait_seconds: 20 });
  assert.deepEqual([killed.at_end, killed.exit_code], [true, 137]);

  const path = "folder/file.txt";
  assert.equal((await works("write_file", { session, path, content: "one\ntwo\n" })).size, 8);
  assert.equal((await works("edit_file", { session, path, old_text: "two", new_text: "2" })).replaced, 1);
  assert.equal((await works("read_file", { session, path })).content, "one\n2\n");
  const { matches } = await works("search_files", { session, pattern: "^o" });
  assert.deepEqual(matches, [{ path, line: 1, text: "one" }]);
  await works("make_folder", { session, path: "other" });
  await works("move_file", { session, from: path, to: "other/file.txt" });
  const { files } = await works("list_files", { session, path: "other" });
  assert.deepEqual(files.map((it) => it.name), ["file.txt"]);

  await works("snapshot_session", { session, name: "before" });
  await works("remove_file", { session, path: "other", recursive: true });
  const { snapshots } = await works("list_snapshots", { session });
  assert.deepEqual(snapshots.map((it) => it.name), ["before"]);
  await works("restore_session", { session, snapshot: "before", force: true });
  const back = await works("read_file", { session, path: "other/file.txt" });
  assert.equal(back.content, "one\n2\n");
  const fork = await works("fork_session", { session, snapshot: "before" });
  const { url, listening } = await works("expose_port", { session, port: 8000 });
  assert.ok(url.endsWith(`/v1/sessions/${session}/ports/8000/`) && !listening, url);
  assert.equal((await works("stop_session", { session, force: true })).state, "stopped");
  await works("remove_session", { session: fork.session, force: true });
  const all = await works("list_sessions");
  assert.deepEqual(all.sessions.map((it) => it.session), [session]);

  const listed = tools.map((tool) => tool.name);
  assert.deepEqual(listed.filter((name) => !called.has(name)), [], "listed, and not called");
  assert.deepEqual([...called].filter((name) => !listed.includes(name)), [], "called, and not listed");
});

test("resources are listed and read, on standard input and output", async () => {
  const target = [program, "mcp", "--session", "inspected-too"];
  const { data } = await call(target, "write_file", { path: "note.md", content: "text" });
  assert.equal(data.path, "/volume/note.md");
  const { resources } = await ask(target, "--method", "resources/list");
  assert.deepEqual(resources.map((it) => it.name), ["note.md"]);
  const { contents } = await ask(target, "--method", "resources/read", "--uri", resources[0].uri);
  assert.deepEqual([contents[0].text, contents[0].mimeType], ["text", "text/markdown"]);
  const { resourceTemplates } = await ask(target, "--method", "resources/templates/list");
  assert.equal(resourceTemplates[0].uriTemplate, "denizen://{session}/{+path}");
});
