"""Runs the suites of E2B's SDKs against a real daemon, and makes the table of methods of them; with
them, the agent that is an example, and the tests of the code interpreter's program.

    python run.py [--write] [--only sync|async|js|example|interpreter]

It is run by the Python that has the SDK (`cargo xtask e2b` makes one). What it needs else is in
the environment: DENIZEN_PROGRAM, DENIZEN_GUEST (a kernel and its modules), E2B_FOLDER (which it
empties), E2B_MODULES (the folder with `node_modules`). A suite that fails, a method that no case
covers, and a table in docs/e2b.md that is not what the cases say are failures.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent.parent / "docs/e2b.md"
BEGIN, END = "<!-- the table: `cargo xtask e2b --write` -->", "<!-- its end -->"
# How long all suites may take together, in seconds.
PATIENCE = 600

sys.path.insert(0, str(HERE / "python"))
from daemon import Daemon, clean  # noqa: E402

# What JavaScript calls otherwise than by other capitals.
NAMES = {
    "Template.to_json": "Template.toJSON",
    "Template.from_aws_registry": "Template.fromAWSRegistry",
    "Template.from_gcp_registry": "Template.fromGCPRegistry",
}


def suites(folder, daemon):
    """The suites, each with the command that runs it and where it is run."""
    env = clean() | daemon.variables
    env |= {name: os.environ[name] for name in ("DENIZEN_PROGRAM", "DENIZEN_GUEST", "E2B_CACHE")}
    python = HERE / "python"
    for flavour in ("sync", "async"):
        run = [sys.executable, "-B", "-m", "pytest", f"--flavour={flavour}", "--durations=8"]
        run += [f"--basetemp={folder / f'tmp-{flavour}'}", f"--outcomes={folder / flavour}.json"]
        yield flavour, run, python, env
    js = HERE / "js"
    run = ["node", "--test", "--test-reporter", "spec", "--test-timeout", "120000"]
    run += [str(file) for file in sorted(js.glob("*.test.mjs"))]
    js_env = env | {"E2B_OUTCOMES": str(folder / "js"), "E2B_MODULES": os.environ["E2B_MODULES"]}
    yield "js", run, js, js_env
    root = HERE.parent.parent
    yield "example", ["sh", "examples/test.sh"], root, env | {"PYTHON": sys.executable}
    # With the kernels that sandboxes have, too.
    test = root / "crates/server/src/e2b/interpreter_test.py"
    yield "interpreter", ["/usr/bin/python3", "-B", str(test)], root, clean()


def run_all(folder, daemon, only):
    """Runs all suites at once, and gives those that have failed."""
    running = []
    for name, run, where, env in suites(folder, daemon):
        if only in (None, name):
            log = open(folder / f"{name}.log", "w")
            child = subprocess.Popen(run, cwd=where, env=env, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
            running.append((name, child))
    failed = []
    until = time.monotonic() + PATIENCE
    for name, child in running:
        try:
            code = child.wait(max(1, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            # A Python says then what each of its threads does.
            child.send_signal(signal.SIGABRT)
            try:
                child.wait(10)
            except subprocess.TimeoutExpired:
                child.kill()
            code = "it took too long"
        text = (folder / f"{name}.log").read_text(errors="replace")
        if code != 0:
            failed.append(f"{name}: {code}")
            print(text)
        else:
            print(f"{name}: {text.strip().splitlines()[-1]}")
    return failed


def outcomes(folder):
    """What each suite says: which methods there are, and how those that it covers fare."""
    told = {}
    for name in ("sync", "async"):
        told[name] = json.loads((folder / f"{name}.json").read_text())
    js = {"assertions": 0, "outcomes": [], "methods": []}
    # Each file of its tests is a process.
    for file in sorted((folder / "js").glob("*.json")):
        part = json.loads(file.read_text())
        js["assertions"] += part["assertions"]
        js["outcomes"] += part["outcomes"]
        js["methods"] = part["methods"]
    told["js"] = js
    return told


def camel(method):
    return NAMES.get(method) or re.sub(r"_(\w)", lambda it: it[1].upper(), method)


def table(told):
    """The table, and what is wrong: methods that no case covers."""
    python = set(told["sync"]["methods"]) | set(told["async"]["methods"])
    rows = {(method, camel(method)) for method in python}
    known = {js for _, js in rows}
    rows |= {(None, method) for method in told["js"]["methods"] if method not in known}
    by = {
        name: {
            method: [it for it in suite["outcomes"] if it["method"] == method]
            for method in suite["methods"]
        }
        for name, suite in told.items()
    }
    lines = ["| Python | async | JavaScript | |", "|---|---|---|---|"]
    uncovered = []
    for method, js in sorted(rows, key=lambda row: row[1].lower()):
        cells, fares = [], []
        for name, called in (("sync", method), ("async", method), ("js", js)):
            if called not in by[name]:
                cells.append("–")
                continue
            cells.append(f"`{called}`" if name != "async" else "the same")
            if not by[name][called]:
                uncovered.append(f"{name}: {called}")
            fares += by[name][called]
        if cells[1] == "the same" and cells[0] == "–":
            cells[1] = f"`{method}`"
        lines.append(f"| {' | '.join(cells)} | {fare(fares)} |")
    return "\n".join(lines), uncovered


def fare(outcomes):
    """How a method fares, in words: what is worst, and why."""
    for result in ("refused", "differs"):
        whys = [it["how"] for it in outcomes if it.get("result") == result]
        if whys:
            return f"{result}: {'; '.join(dict.fromkeys(whys))}"
    return "works"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--only", choices=["sync", "async", "js", "example", "interpreter"])
    options = parser.parse_args()
    folder = Path(os.environ["E2B_FOLDER"])
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "js").mkdir(parents=True)
    os.environ["E2B_CACHE"] = str(folder / "cache")
    began = time.monotonic()
    with Daemon(folder / "daemon", "--network", "full") as daemon:
        failed = run_all(folder, daemon, options.only)
    if failed:
        print("the daemon's last words:", (folder / "daemon/log").read_text(errors="replace")[-8000:])
    if options.only:
        return failed
    if failed:
        return failed
    told = outcomes(folder)
    for name, suite in told.items():
        print(f"{name}: {suite['assertions']} assertions")
    print(f"all in {time.monotonic() - began:.0f} s")
    rows, uncovered = table(told)
    failed += [f"no case covers {method}" for method in uncovered]
    page = PAGE.read_text()
    before, rest = page.split(BEGIN)
    after = rest.split(END)[1]
    new = f"{before}{BEGIN}\n\n{rows}\n\n{END}{after}"
    if options.write:
        PAGE.write_text(new)
    elif new != page:
        failed.append("the table in docs/e2b.md is not what the cases say: cargo xtask e2b --write")
    return failed


if __name__ == "__main__":
    problems = main()
    for problem in problems:
        print(problem, file=sys.stderr)
    sys.exit(1 if problems else 0)
