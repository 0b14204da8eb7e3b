// What people do with the dashboard, from signing in to being signed out.

import assert from "node:assert/strict";
import { readFile } from "node:fs/promises";
import { createRequire } from "node:module";
import { join } from "node:path";
import { after, afterEach, before, test } from "node:test";
import { launch, startDaemon } from "./daemon.mjs";

const axe = await readFile(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");
const PATIENCE = 20_000;

let daemon;
let browser;
before(async () => {
  daemon = await startDaemon();
  browser = await launch();
});
after(async () => {
  await browser?.close();
  await daemon?.stop();
});

/** The pages of the test that runs. */
let pages = [];
afterEach(async (context) => {
  for (const page of context.passed === false ? pages : []) {
    const seen = await page.evaluate(() => [
      location.hash,
      document.activeElement?.outerHTML.slice(0, 200),
      document.body.innerText,
    ]);
    console.log(`as the page was: ${seen.join("\n")}\nthe daemon: ${daemon.said.join("\n")}`);
  }
  pages = [];
});

/** A page, and all that the browser had to complain of. */
async function open(options = {}) {
  const context = await browser.newContext({ acceptDownloads: true, ...options });
  const page = await context.newPage();
  page.setDefaultTimeout(PATIENCE);
  pages.push(page);
  const complaints = [];
  page.on("pageerror", (error) => complaints.push(String(error)));
  page.on("console", (message) => {
    // An answer that says no is logged as an error by itself.
    const refused = message.text().startsWith("Failed to load resource");
    if (message.type() === "error" && !refused) complaints.push(message.text());
  });
  await page.goto(daemon.address);
  return { page, complaints };
}

async function signIn(page, key) {
  await page.getByLabel("API key").fill(key);
  await page.getByRole("button", { name: "Sign in" }).click();
  await page.getByRole("heading", { name: "Sessions" }).waitFor();
}

async function create(page, name) {
  await page.getByRole("button", { name: "New session" }).click();
  await page.getByRole("dialog").getByLabel("Name", { exact: true }).fill(name);
  await page.getByRole("dialog").getByRole("button", { name: "Create" }).click();
  await page.getByRole("heading", { name, exact: true }).waitFor();
}

const tab = (page, name) =>
  page.getByRole("navigation", { name: "Session" }).getByRole("link", { name }).click();
const said = (page, text) => page.getByRole("status").filter({ hasText: text }).waitFor();
const shown = (page, text) => page.locator(".xterm-rows").filter({ hasText: text }).waitFor();

async function terminal(page) {
  await tab(page, "Terminal");
  await said(page, /^connected$/);
}

async function typeLine(page, line) {
  await page.locator(".xterm-helper-textarea").focus();
  await page.keyboard.type(`${line}\n`);
}

test("the page is allowed to do little, and is the same for all", async () => {
  const page = await fetch(daemon.address);
  assert.equal(page.status, 200);
  const policy = page.headers.get("content-security-policy");
  assert.match(policy, /default-src 'none'; script-src 'self';/);
  assert.match(policy, /frame-ancestors 'none'/);
  assert.equal(page.headers.get("cache-control"), "no-cache");
  const text = await page.text();
  assert.doesNotMatch(text, /<script(?![^>]*\ssrc=)|\son\w+=|https?:/);
  const assets = [...text.matchAll(/"(\/assets\/[^"]+)"/g)].map((found) => found[1]);
  assert.equal(assets.length, 3);
  const types = { js: "text/javascript; charset=utf-8", css: "text/css; charset=utf-8", svg: "image/svg+xml" };
  for (const path of assets) {
    const asset = await fetch(new URL(path, daemon.address));
    assert.equal(asset.headers.get("content-type"), types[path.split(".").pop()]);
    assert.match(asset.headers.get("cache-control"), /immutable/);
    assert.equal(asset.headers.get("x-content-type-options"), "nosniff");
  }
  for (const path of ["/assets/no.js", "/assets/..%2findex.html", "/assets/%2e%2e/index.html"]) {
    assert.notEqual((await fetch(new URL(path, daemon.address))).status, 200, path);
  }
});

test("a life with a session", async (t) => {
  const { key } = await daemon.createKey("life", "admin");
  const { page, complaints } = await open();

  await t.test("a wrong key is refused, and said to be", async () => {
    await page.getByLabel("API key").fill("dk_no_no");
    await page.getByRole("button", { name: "Sign in" }).click();
    await page.getByRole("alert").filter({ hasText: "signed out" }).waitFor();
  });
  await t.test("sign in and create", async () => {
    await signIn(page, key);
    await create(page, "demo");
    await page.getByText("active", { exact: true }).waitFor();
  });
  await t.test("the terminal goes on when the page is loaded again", async () => {
    await terminal(page);
    // What is typed before the shell hands the terminal over is not echoed, here as anywhere.
    await typeLine(page, "printf 'is %s\\n' ready; cat > hold");
    await shown(page, "is ready");
    await typeLine(page, "some text");
    await shown(page, "some text");
    await page.reload();
    await said(page, /^connected$/);
    await shown(page, "some text");
    // The same cat reads this.
    await typeLine(page, "after");
    await page.keyboard.press("Control+d");
    await typeLine(page, "echo lines=$(wc -l < hold)");
    await shown(page, "lines=2");
  });
  await t.test("files go up, down and away", async () => {
    await tab(page, "Files");
    await page.getByRole("row", { name: /^hold/ }).waitFor();
    const file = { name: "up & down.txt", mimeType: "text/plain", buffer: Buffer.from("one") };
    await page.getByLabel("Files to upload").setInputFiles(file);
    await said(page, "up & down.txt was uploaded");
    assert.equal(await daemon.denizen("exec", "demo", "--", "cat", "up & down.txt"), "one");
    const coming = page.waitForEvent("download");
    await page.getByRole("button", { name: "Download up & down.txt" }).click();
    assert.equal(await readFile(await (await coming).path(), "utf8"), "one");

    await page.getByRole("button", { name: "New folder" }).click();
    await page.getByRole("dialog").getByLabel("Name", { exact: true }).fill("in here");
    await page.keyboard.press("Enter");
    await page.getByRole("link", { name: "in here/" }).click();
    await page.getByText("The folder is empty").waitFor();
    // Dropped.
    await page.locator("section.drop").evaluate((target) => {
      const dataTransfer = new DataTransfer();
      dataTransfer.items.add(new File(["two"], "dropped"));
      target.dispatchEvent(new DragEvent("drop", { dataTransfer, bubbles: true, cancelable: true }));
    });
    await said(page, "dropped was uploaded");
    assert.equal(await daemon.denizen("exec", "demo", "--", "cat", "in here/dropped"), "two");
    await page.getByRole("button", { name: "Delete dropped" }).click();
    await page.getByRole("dialog").getByRole("button", { name: "Delete" }).click();
    await page.getByText("The folder is empty").waitFor();
  });
  await t.test("processes are shown and ended", async () => {
    await tab(page, "Processes");
    const row = page.getByRole("row", { name: /dashboard/ });
    await row.getByRole("button", { name: /Kill/ }).click();
    await page.getByRole("row", { name: /dashboard.*ended: 137/ }).waitFor();
    await terminal(page);
  });
  await t.test("back up, change, restore", async () => {
    await tab(page, "Backups");
    await page.getByRole("button", { name: "Back up now" }).click();
    await page.getByRole("button", { name: "End it and back up" }).click();
    await page.getByRole("region", { name: "Backups" }).getByRole("button", { name: /Restore/ }).waitFor();
    await daemon.denizen("exec", "demo", "--", "sh", "-c", "echo changed > 'up & down.txt'");
    await page.getByRole("region", { name: "Backups" }).getByRole("button", { name: /Restore/ }).click();
    await page.getByLabel("end what runs in it first").check();
    await page.getByRole("dialog").getByRole("button", { name: "Restore" }).click();
    await said(page, "demo was restored");
    assert.equal(await daemon.denizen("exec", "demo", "--", "cat", "up & down.txt"), "one");
  });
  await t.test("the timeline has it all", async () => {
    await tab(page, "Overview");
    for (const what of ["created", "backed up", "restored"]) {
      await page.getByRole("listitem").filter({ hasText: what }).first().waitFor();
    }
  });
  await t.test("snapshot, fork, remove", async () => {
    await tab(page, "Backups");
    await page.getByRole("button", { name: "Take a snapshot" }).click();
    await page.getByRole("dialog").getByLabel("Name", { exact: true }).fill("first");
    await page.keyboard.press("Enter");
    await page.getByRole("button", { name: "Fork first" }).click();
    await page.getByRole("heading", { name: /^[0-9a-f-]{36}$/ }).waitFor();
    await page.getByRole("button", { name: /^Remove/ }).click();
    await page.keyboard.press("Escape");
    await page.getByRole("button", { name: /^Remove/ }).click();
    await page.getByRole("dialog").getByRole("button", { name: "Remove" }).click();
    await page.getByRole("heading", { name: "Sessions" }).waitFor();
    assert.equal(JSON.parse(await daemon.denizen("--json", "ls")).length, 1);
  });
  await t.test("the list is filtered", async () => {
    await page.getByRole("row", { name: /demo/ }).waitFor();
    await page.getByRole("searchbox", { name: "Name" }).fill("other");
    await page.getByText("No session is like that.").waitFor();
  });
  assert.deepEqual(complaints, []);
});

test("a key that is revoked signs its user out at once", async () => {
  const admin = await daemon.createKey("revoker", "admin");
  const victim = await daemon.createKey("victim", "operate");
  const [by, of] = [await open(), await open()];
  await signIn(by.page, admin.key);
  await signIn(of.page, victim.key);
  assert.equal(await of.page.getByRole("link", { name: "Keys" }).count(), 0);
  await by.page.getByRole("link", { name: "Keys" }).click();
  await by.page.getByRole("button", { name: "New key" }).click();
  await by.page.getByRole("dialog").getByLabel("Name", { exact: true }).fill("made here");
  await by.page.getByRole("dialog").getByRole("button", { name: "Create" }).click();
  const secret = await by.page.locator(".secret").textContent();
  const who = await fetch(new URL("/v1/whoami", daemon.address), {
    headers: { authorization: `Bearer ${secret}` },
  });
  assert.equal((await who.json()).name, "made here");
  await by.page.getByRole("button", { name: "Revoke victim" }).click();
  await by.page.getByRole("dialog").getByRole("button", { name: "Revoke" }).click();
  await said(by.page, "victim was revoked");
  await of.page.getByRole("alert").filter({ hasText: "You were signed out" }).waitFor();
  assert.equal(await of.page.evaluate(() => sessionStorage.length), 0);
  // Oneself, too.
  await by.page.getByRole("button", { name: "Revoke revoker" }).click();
  await by.page.getByRole("dialog").getByRole("button", { name: "Revoke" }).click();
  await by.page.getByRole("alert").filter({ hasText: "You were signed out" }).waitFor();
});

test("all is done by keyboard alone", async () => {
  const { key } = await daemon.createKey("keyboard", "admin");
  const { page } = await open();
  await page.keyboard.type(key);
  await page.keyboard.press("Enter");
  await page.getByRole("heading", { name: "Sessions" }).waitFor();
  const focused = () => page.evaluate(() => document.activeElement?.textContent);
  assert.equal(await focused(), "Sessions");
  await page.keyboard.press("Tab");
  assert.equal(await focused(), "New session");
  await page.keyboard.press("Enter");
  await page.getByRole("dialog").waitFor();
  await page.keyboard.press("Escape");
  // By its element: one that is closed has no role, and is there until the page has heard of it.
  await page.locator("dialog").waitFor({ state: "detached" });
  assert.equal(await focused(), "New session");
  await page.keyboard.press("Enter");
  // What is typed before the dialog is there is for the button below it.
  await page.getByRole("dialog").getByLabel("Name", { exact: true }).and(page.locator(":focus")).waitFor();
  await page.keyboard.type("by-keys");
  await page.keyboard.press("Enter");
  await page.getByRole("heading", { name: "by-keys", exact: true }).waitFor();
  await terminal(page);
  await page.keyboard.press("Control+Shift+ArrowUp");
  assert.equal(await focused(), "End shell");
});

test("two pages that come at once have one shell", async () => {
  const { key } = await daemon.createKey("two", "admin");
  await daemon.denizen("create", "two");
  const pages = await Promise.all([open(), open()]);
  for (const { page } of pages) {
    await signIn(page, key);
    await page.getByRole("link", { name: "two", exact: true }).click();
    await page.getByRole("heading", { name: "two", exact: true }).waitFor();
  }
  await Promise.all(pages.map(({ page }) => terminal(page)));
  const shells = async () => {
    const headers = { authorization: `Bearer ${key}` };
    const answer = await fetch(new URL("/v1/sessions/two/processes", daemon.address), { headers });
    return (await answer.json()).processes.filter((it) => !it.ended).length;
  };
  // One that is ended may be on its way out.
  const begin = Date.now();
  while ((await shells()) !== 1) assert.ok(Date.now() - begin < PATIENCE, "there are more");
});

for (const colorScheme of ["light", "dark"]) {
  test(`nothing is hard to use or overflows: ${colorScheme}`, async (t) => {
    const { key } = await daemon.createKey(`axe-${colorScheme}`, "admin");
    const { page, complaints } = await open({ colorScheme, viewport: { width: 1200, height: 800 } });
    const look = async (what) => {
      // What a browser checks is not what the page may load: this is run past its policy.
      await page.evaluate(axe);
      const { violations } = await page.evaluate(() => globalThis.axe.run(document));
      const serious = violations.filter((it) => ["serious", "critical"].includes(it.impact));
      const found = serious.map((it) => `${it.id}: ${it.nodes.map((node) => node.html).join(" ")}`);
      assert.deepEqual(found, [], what);
      for (const width of [375, 1200]) {
        await page.setViewportSize({ width, height: 800 });
        const wide = await page.evaluate(() => document.documentElement.scrollWidth);
        assert.ok(wide <= width, `${what} is ${wide} wide at ${width}`);
        if (process.env.SCREENSHOTS) {
          const name = `${what.replaceAll(" ", "-")}-${colorScheme}-${width}.png`;
          await page.screenshot({ path: join(process.env.SCREENSHOTS, name) });
        }
      }
    };
    await t.test("sign in", () => look("sign in"));
    await signIn(page, key);
    const name = `axe-${colorScheme}`;
    await create(page, name);
    await t.test("overview", () => look("overview"));
    await terminal(page);
    await typeLine(page, "ls --color /");
    await shown(page, "usr");
    await t.test("terminal", () => look("terminal"));
    await tab(page, "Files");
    await daemon.denizen("exec", name, "--", "sh", "-c", "mkdir folder; echo text > file; ln -s file link");
    await page.reload();
    await page.getByRole("row", { name: /file/ }).first().waitFor();
    await t.test("files", () => look("files"));
    await page.getByRole("button", { name: "Delete folder" }).click();
    await t.test("dialog", () => look("dialog"));
    await page.keyboard.press("Escape");
    await tab(page, "Processes");
    await page.getByRole("row", { name: /dashboard/ }).waitFor();
    await t.test("processes", () => look("processes"));
    await tab(page, "Backups");
    await page.getByRole("button", { name: "Back up now" }).click();
    await page.getByRole("button", { name: "End it and back up" }).click();
    await page.getByRole("region", { name: "Backups" }).getByRole("button", { name: /Restore/ }).waitFor();
    await t.test("backups", () => look("backups"));
    const go = (to) => page.getByRole("navigation", { name: "Pages" }).getByRole("link", { name: to }).click();
    await go("Events");
    await page.getByRole("listitem").first().waitFor();
    await t.test("events", () => look("events"));
    await go("Pool");
    await page.getByRole("region", { name: "Figures" }).waitFor();
    await t.test("pool", () => look("pool"));
    await go("Keys");
    await page.getByRole("button", { name: "New key" }).click();
    await t.test("new key", () => look("new key"));
    await page.getByRole("dialog").getByLabel("Name", { exact: true }).fill(`made-${colorScheme}`);
    await page.keyboard.press("Enter");
    await page.locator(".secret").waitFor();
    await t.test("keys", () => look("keys"));
    await go("Sessions");
    await page.getByRole("row", { name: new RegExp(name) }).waitFor();
    await t.test("sessions", () => look("sessions"));
    assert.deepEqual(complaints, []);
  });
}
