"""Measures 100 sandboxes that the SDK makes at once, beside a plain loop that makes as many with
bwrap. `cargo xtask bench` runs it; a line has a row's name, our nanoseconds and the peer's.

It needs DENIZEN_PROGRAM, and E2B_FOLDER for what it leaves. One sandbox that is not made is a
failure.
"""

import asyncio
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "python"))
from daemon import Daemon  # noqa: E402
from e2b import AsyncSandbox  # noqa: E402

COUNT, ROUNDS = 100, 5
BWRAP = "bwrap --unshare-all --ro-bind / / --proc /proc --dev /dev --tmpfs /tmp /bin/true".split()


async def ours(daemon):
    """How long all took together, and each by itself."""

    async def one():
        begin = time.perf_counter_ns()
        sandbox = await AsyncSandbox.create("base", timeout=300, **daemon.opts)
        return sandbox, time.perf_counter_ns() - begin

    begin = time.perf_counter_ns()
    made = await asyncio.gather(*(one() for _ in range(COUNT)))
    whole = time.perf_counter_ns() - begin
    running = await asyncio.gather(*(sandbox.is_running() for sandbox, _ in made))
    if not all(running) or len({sandbox.sandbox_id for sandbox, _ in made}) != COUNT:
        raise RuntimeError("not all sandboxes were made")
    await asyncio.gather(*(sandbox.kill() for sandbox, _ in made))
    return whole, [each for _, each in made]


def peers():
    begin = time.perf_counter_ns()
    for _ in range(COUNT):
        subprocess.run(BWRAP, check=True)
    return time.perf_counter_ns() - begin


async def main():
    folder = Path(os.environ["E2B_FOLDER"])
    shutil.rmtree(folder, ignore_errors=True)
    wholes, each, beside = [], [], []
    with Daemon(folder / "daemon", "--network", "full") as daemon:
        # The first is not what is measured: connections are made, programs are read.
        await ours(daemon)
        for _ in range(ROUNDS):
            whole, of_each = await ours(daemon)
            wholes.append(whole)
            each += of_each
            beside.append(peers())
    each.sort()
    row = "100 SDK sandboxes made at once"
    print(f"{row}, all of them\t{statistics.median(wholes)}\t{statistics.median(beside)}")
    print(f"{row}, p50 of each\t{each[len(each) // 2]}")
    print(f"{row}, p99 of each\t{each[len(each) * 99 // 100]}")


asyncio.run(main())
