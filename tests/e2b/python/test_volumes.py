"""Volumes: files that outlive sandboxes, and that several of them have at once."""

import asyncio
import datetime
import io
import signal

import pytest
from e2b import NotFoundException, SandboxException, VolumeException

from cases import covers, difference, patient
from daemon import Daemon


@pytest.fixture
def volume(sdk, name, request):
    """A volume that is gone after the case."""
    loop = request.config.loop
    volume = loop.run_until_complete(sdk.Volume.create(name))
    yield volume
    loop.run_until_complete(sdk.Volume.destroy(volume.volume_id))


@covers("Volume.create", "Volume.list", "Volume.get_info", "Volume.connect", "Volume.destroy")
async def test_a_volume_is_made_found_and_removed(sdk, name):
    made = await sdk.Volume.create(name)
    assert made.name == name
    assert made.volume_id
    assert made.token
    info = await sdk.Volume.get_info(made.volume_id)
    assert (info.volume_id, info.name) == (made.volume_id, name)
    assert info.token
    listed = {it.volume_id: it.name for it in await sdk.Volume.list()}
    assert listed[made.volume_id] == name
    with pytest.raises(VolumeException, match="already"):
        await sdk.Volume.create(name)
    for bad in ("", "a/b", "a b", "-a"):
        with pytest.raises(VolumeException):
            await sdk.Volume.create(bad)
    again = await sdk.Volume.connect(made.volume_id)
    assert again.name == name
    await again.write_file("/note", "kept")
    assert await made.read_file("/note") == "kept"
    assert await sdk.Volume.destroy(made.volume_id) is True
    assert await sdk.Volume.destroy(made.volume_id) is False
    assert await sdk.Volume.destroy("no-volume") is False
    with pytest.raises(NotFoundException):
        await sdk.Volume.get_info(made.volume_id)
    with pytest.raises(NotFoundException):
        await sdk.Volume.connect("no-volume")
    with pytest.raises(NotFoundException):
        await made.read_file("/note")
    assert made.volume_id not in {it.volume_id for it in await sdk.Volume.list()}


@covers("Volume.write_file", "Volume.read_file", "Volume.exists")
async def test_files_are_written_and_read(sdk, volume):
    text = await volume.write_file("/note.txt", "Grüße\n")
    assert (text.name, text.path) == ("note.txt", "/note.txt")
    assert (text.type.value, text.size) == ("file", 8)
    assert text.mode == 0o644
    assert (text.uid, text.gid) == (1000, 1000)
    age = datetime.datetime.now(datetime.timezone.utc) - text.mtime
    assert abs(age.total_seconds()) < 60
    assert await volume.read_file("note.txt") == "Grüße\n"
    assert await volume.exists("/note.txt") is True
    assert await volume.exists("/none") is False
    with pytest.raises(VolumeException, match="exists"):
        await volume.write_file("/note.txt", "other")
    assert await volume.read_file("/note.txt") == "Grüße\n"
    await volume.write_file("/note.txt", "other", force=True)
    assert await volume.read_file("/note.txt") == "other"
    every = bytes(range(256))
    await volume.write_file("/bytes", every)
    assert await volume.read_file("/bytes", format="bytes") == every
    await volume.write_file("/from-file", io.BytesIO(every))
    assert await volume.read_file("/from-file", format="bytes") == every
    await volume.write_file("/from-text-file", io.StringIO("text ü"))
    assert await volume.read_file("/from-text-file") == "text ü"
    await volume.write_file("/empty", "")
    assert await volume.read_file("/empty") == ""
    big = bytes(1 << 20) * 20
    await volume.write_file("/big", io.BytesIO(big))
    got = await sdk.drain(await volume.read_file("/big", format="stream"))
    assert len(got) > 1
    assert difference(b"".join(got), big) is None
    owned = await volume.write_file("/owned", "x", uid=1234, gid=2345, mode=0o600)
    assert (owned.uid, owned.gid, owned.mode) == (1234, 2345, 0o600)
    with pytest.raises(NotFoundException):
        await volume.read_file("/none")
    with pytest.raises(NotFoundException):
        await volume.write_file("/no/folder", "x")
    with pytest.raises(VolumeException):
        await volume.write_file("/a/../b", "x")


@covers("Volume.make_dir", "Volume.update_metadata", "Volume.remove")
async def test_folders_are_made_listed_and_removed(sdk, volume):
    made = await volume.make_dir("/one")
    assert (made.type.value, made.path, made.mode) == ("directory", "/one", 0o755)
    with pytest.raises(VolumeException, match="exists"):
        await volume.make_dir("/one")
    await volume.make_dir("/one", force=True)
    with pytest.raises(NotFoundException):
        await volume.make_dir("/deep/er")
    deep = await volume.make_dir("/deep/er/still", uid=1001, gid=1002, mode=0o700, force=True)
    assert (deep.uid, deep.gid, deep.mode) == (1001, 1002, 0o700)
    await volume.write_file("/deep/er/file", "x")
    names = lambda entries: [it.path for it in entries]
    assert names(await volume.list("/")) == ["/deep", "/one"]
    assert names(await volume.list("/deep", depth=2)) == ["/deep/er", "/deep/er/file", "/deep/er/still"]
    with pytest.raises(NotFoundException):
        await volume.list("/none")
    with pytest.raises(VolumeException):
        await volume.list("/deep/er/file")
    changed = await volume.update_metadata("/deep/er/file", uid=1001, gid=1001, mode=0o755)
    assert (changed.uid, changed.gid, changed.mode) == (1001, 1001, 0o755)
    only = await volume.update_metadata("/deep/er/file", mode=0o640)
    assert (only.uid, only.gid, only.mode) == (1001, 1001, 0o640)
    info = await volume.get_info("/deep/er/file")
    assert (info.name, info.mode, info.size) == ("file", 0o640, 1)
    with pytest.raises(NotFoundException):
        await volume.update_metadata("/none", mode=0o600)
    await volume.remove("/deep/er/file")
    assert await volume.exists("/deep/er/file") is False
    await volume.remove("/deep")
    assert names(await volume.list("/")) == ["/one"]
    with pytest.raises(NotFoundException):
        await volume.remove("/deep")


async def test_a_token_is_for_one_volume(sdk, volume, name):
    other = await sdk.Volume.create(f"{name}-2")
    await other.write_file("/secret", "x")
    kind = sdk.Volume._inner
    for token in (volume.token, "dt_nothing", ""):
        thief = sdk.faced(kind(volume_id=other.volume_id, name="any", token=token))
        with pytest.raises(Exception) as refused:
            await thief.read_file("/secret")
        assert "secret" not in str(refused.value) or "not found" in str(refused.value)
    # Nor is a sandbox's good for it.
    async with await sdk.Sandbox.create("base", timeout=60) as sandbox:
        thief = sdk.faced(kind(volume_id=other.volume_id, name="any", token=token_of(sandbox)))
        with pytest.raises(Exception):
            await thief.read_file("/secret")
    assert await sdk.Volume.destroy(other.volume_id) is True


def token_of(sandbox):
    return sandbox._inner._envd_access_token


async def test_sandboxes_share_a_volume(sdk, volume):
    await volume.make_dir("/given")
    await volume.write_file("/given/file", "from outside\n")
    one, two = [
        await sdk.Sandbox.create("base", timeout=120, volume_mounts={path: volume})
        for path in ("/mnt/data", "/home/user/shared/data")
    ]
    try:
        info = await one.get_info()
        assert [(it["name"], it["path"]) if isinstance(it, dict) else (it.name, it.path)
                for it in info.volume_mounts] == [(volume.name, "/mnt/data")]
        assert await one.files.read("/mnt/data/given/file") == "from outside\n"
        assert (await one.commands.run("whoami")).stdout == "user\n"
        await one.commands.run("echo one >/mnt/data/note; stat -c %u:%g /mnt/data")
        assert await two.files.read("shared/data/note") == "one\n"
        await two.commands.run("echo two >>shared/data/note")
        assert await volume.read_file("/note") == "one\ntwo\n"
        entry = await volume.get_info("/note")
        uid = (await one.commands.run("id -u")).stdout.strip()
        assert str(entry.uid) == uid
        # What is written from outside is whose it is said to be.
        await volume.write_file("/theirs", "x", uid=int(uid))
        await one.commands.run("echo more >>/mnt/data/theirs")
        assert await volume.read_file("/theirs") == "xmore\n"
        # It stays where it is while a sandbox sleeps.
        await one.pause()
        await two.commands.run("echo three >>shared/data/note")
        await one.connect()
        assert (await one.commands.run("tail -n1 /mnt/data/note")).stdout == "three\n"
        (fork,) = await one.fork()
        async with fork:
            assert (await fork.commands.run("wc -l </mnt/data/note")).stdout.strip() == "3"
        with pytest.raises(Exception, match="kill"):
            await sdk.Volume.destroy(volume.volume_id)
        # What is a link within leads nowhere from outside.
        await one.commands.run("ln -s /etc/passwd /mnt/data/link")
        with pytest.raises(NotFoundException):
            await volume.read_file("/link")
        assert (await volume.get_info("/link")).target == "/etc/passwd"
        # A snapshot has the sandbox's own files.
        snapshot = await one.create_snapshot()
        async with await sdk.Sandbox.create(snapshot.snapshot_id, timeout=60) as copy:
            assert (await copy.commands.run("ls /mnt/data")).stdout == ""
        await sdk.Sandbox.delete_snapshot(snapshot.snapshot_id)
    finally:
        await asyncio.gather(one.kill(), two.kill())
    assert await volume.read_file("/note") == "one\ntwo\nthree\n"


async def test_what_cannot_be_mounted_is_refused(sdk, volume):
    for mounts in (
        {"/mnt/data": "no-such-volume"},
        {"relative": volume},
        {"/proc/data": volume},
        {"/a/../b": volume},
    ):
        with pytest.raises(SandboxException):
            await sdk.Sandbox.create("base", timeout=60, volume_mounts=mounts)


@patient(120)
async def test_a_daemon_that_is_killed_loses_nothing(sdk, name, tmp_path, monkeypatch):
    with Daemon(tmp_path / "daemon") as daemon:
        monkeypatch.setenv("E2B_VOLUME_API_URL", daemon.url)
        opts = daemon.opts
        volume = await sdk.Volume.create(name, **opts)
        mounts = {"/mnt/data": name}
        sandbox = await sdk.Sandbox.create("base", timeout=300, volume_mounts=mounts, **opts)
        await sandbox.commands.run("echo kept >/mnt/data/note")
        daemon.end(signal.SIGKILL)
        daemon.start()
        again = await sdk.Sandbox.connect(sandbox.sandbox_id, **opts)
        assert (await again.commands.run("cat /mnt/data/note")).stdout == "kept\n"
        volume = await sdk.Volume.connect(volume.volume_id, **opts)
        assert await volume.read_file("/note") == "kept\n"
        await again.kill()
        assert await sdk.Volume.destroy(volume.volume_id, **opts) is True
