"""A part of it in microVMs, in which what runs sleeps on the disk and is copied."""

import os
from pathlib import Path

import pytest
from e2b import CommandExitException, SandboxNotFoundException, TimeoutException

from cases import difference, only, patient
from daemon import Daemon, make_root


@pytest.fixture
def machines(tmp_path):
    guest = Path(os.environ["DENIZEN_GUEST"])
    settings = ["--isolation", "microvm", "--image", str(make_root(tmp_path / "root"))]
    settings += ["--kernel", str(guest / "vmlinuz"), "--kernel-modules", str(guest / "modules")]
    settings += ["--limits", "{ memory_bytes = 268435456, disk_bytes = 1073741824 }"]
    settings += ["--acquire-timeout-seconds", "200"]
    with Daemon(tmp_path / "daemon", *settings) as daemon:
        yield daemon


# It takes half a minute without KVM: one flavour is enough.
@only("sync")
@patient(240)
async def test_a_machine_is_used_like_any_sandbox(sdk, machines):
    opts = machines.opts | {"request_timeout": 200}
    sandbox = await sdk.Sandbox.create("base", timeout=600, envs={"COLOUR": "blue"}, **opts)
    assert await sandbox.is_running()
    told = await sandbox.commands.run("cat /proc/version; echo $COLOUR; whoami; pwd; echo no >&2")
    assert told.stdout.startswith("Linux version")
    assert told.stdout.endswith("blue\nuser\n/home/user\n")
    assert told.stderr == "no\n"
    with pytest.raises(CommandExitException) as raised:
        await sandbox.commands.run("exit 7")
    assert raised.value.exit_code == 7
    with pytest.raises(TimeoutException):
        await sandbox.commands.run("sleep 1000", timeout=1)
    data = os.urandom(1 << 20)
    await sandbox.files.write("data", data)
    assert difference(await sandbox.files.read("data", format="bytes"), data) is None
    assert (await sandbox.files.get_info("data")).size == 1 << 20
    assert [it.name for it in await sandbox.files.list(".")] == ["data"]
    counter = "i=0; while :; do i=$((i+1)); echo $i > /home/user/count; sleep 0.1; done"
    running = await sandbox.commands.run(counter, background=True, timeout=0)
    boot = "cat /proc/sys/kernel/random/boot_id"
    before = (await sandbox.commands.run(boot)).stdout

    async def count():
        while True:
            if await sandbox.files.exists("count"):
                if text := (await sandbox.files.read("count")).strip():
                    return int(text)

    last = await count()
    for _ in range(2):
        assert await sandbox.pause() is True
        assert await sandbox.is_running() is False
        await sandbox.connect(timeout=600)
        assert (await sandbox.commands.run(boot)).stdout == before
        now = await count()
        assert now >= last
        last = now
    assert running.pid in [it.pid for it in await sandbox.commands.list()]
    while await count() <= last:
        pass
    assert difference(await sandbox.files.read("data", format="bytes"), data) is None
    # A fork goes on with what runs.
    (fork,) = await sandbox.fork(timeout=600)
    assert (await fork.commands.run(boot)).stdout == before
    at = int((await fork.files.read("count")).strip() or 0)
    while int((await fork.files.read("count")).strip() or 0) <= at:
        pass
    assert await fork.kill() is True
    assert await sandbox.kill() is True
    with pytest.raises(SandboxNotFoundException):
        await sandbox.connect()
