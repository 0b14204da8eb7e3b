"""What a daemon that is started again knows: all that it has told."""

import asyncio
import signal

import pytest
from e2b import SandboxNotFoundException, SandboxQuery, SandboxState

from cases import differs, patient
from daemon import Daemon


@pytest.fixture
def daemon(tmp_path):
    with Daemon(tmp_path / "daemon") as daemon:
        yield daemon


async def states(sdk, daemon):
    query = SandboxQuery(state=[SandboxState.RUNNING, SandboxState.PAUSED])
    paginator = await sdk.Sandbox.list(query=query, **daemon.opts)
    return {it.sandbox_id: it.state.value for it in await sdk.all_of(paginator)}


@patient(120)
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL], ids=["ended", "killed"])
@differs("it is true after the daemon was started again, however it ended", "Sandbox.list")
async def test_the_list_is_true_after_a_restart(sdk, daemon, how):
    opts = daemon.opts
    make = lambda **more: sdk.Sandbox.create("base", **{"timeout": 300} | more, **opts)
    runs, sleeps, gone = [await make(metadata={"is": it}) for it in ("runs", "sleeps", "gone")]
    short = await make(timeout=3)
    for sandbox in (runs, sleeps):
        await sandbox.files.write("/home/user/kept", sandbox.sandbox_id)
    snapshot = await runs.create_snapshot(name="kept")
    await sleeps.pause()
    await gone.kill()
    before = await runs.get_info()
    daemon.end(how)
    await asyncio.sleep(3)
    daemon.start()

    async def short_is_gone():
        while short.sandbox_id in await states(sdk, daemon):
            await asyncio.sleep(0.1)

    await asyncio.wait_for(short_is_gone(), 20)
    wanted = {runs.sandbox_id: "running", sleeps.sandbox_id: "paused"}
    assert await states(sdk, daemon) == wanted
    after = await sdk.Sandbox.get_info(runs.sandbox_id, **opts)
    assert after.metadata == before.metadata == {"is": "runs"}
    assert (after.started_at, after.end_at) == (before.started_at, before.end_at)
    # The client of before has all that it had, its token too.
    assert await runs.files.read("/home/user/kept") == runs.sandbox_id
    assert (await runs.commands.run("echo here")).stdout == "here\n"
    assert await sleeps.is_running() is False
    await sleeps.connect()
    assert await sleeps.files.read("/home/user/kept") == sleeps.sandbox_id
    with pytest.raises(SandboxNotFoundException):
        await sdk.Sandbox.connect(gone.sandbox_id, **opts)
    async with await sdk.Sandbox.create(snapshot.snapshot_id, **opts) as new:
        assert await new.files.read("/home/user/kept") == runs.sandbox_id
    assert await runs.kill() is True
    assert await states(sdk, daemon) == {sleeps.sandbox_id: "running"}


@patient(120)
async def test_a_call_ends_with_its_daemon(sdk, daemon):
    sandbox = await sdk.Sandbox.create("base", timeout=300, **daemon.opts)
    running = await sdk.start(sandbox, "sleep 1000", timeout=0)
    daemon.end(signal.SIGKILL)
    with pytest.raises(Exception) as raised:
        await asyncio.wait_for(running.end, 20)
    assert not isinstance(raised.value, asyncio.TimeoutError)
    daemon.start()
    assert (await sandbox.commands.run("echo again")).stdout == "again\n"
