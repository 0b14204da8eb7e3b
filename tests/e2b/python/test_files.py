"""Files and folders."""

import asyncio
import datetime
import email.utils
import io
import os

import httpx
import pytest
from e2b import (
    FileNotFoundException,
    FileType,
    InvalidArgumentException,
    NotFoundException,
    SandboxException,
    TimeoutException,
)

from cases import covers, difference, only


@covers("Filesystem.write", "Filesystem.read", "Filesystem.exists")
async def test_text_is_written_and_read(sdk, sandbox):
    written = await sandbox.files.write("note.txt", "Grüße\n")
    assert written.name == "note.txt"
    assert written.path == "/home/user/note.txt"
    assert written.type == FileType.FILE
    assert await sandbox.files.read("note.txt") == "Grüße\n"
    assert await sandbox.files.exists("note.txt") is True
    assert await sandbox.files.exists("no-note.txt") is False
    await sandbox.files.write("note.txt", "shorter")
    assert await sandbox.files.read("/home/user/note.txt") == "shorter"
    await sandbox.files.write("empty", "")
    assert await sandbox.files.read("empty") == ""
    assert (await sandbox.commands.run("stat -c '%a %U %G' note.txt")).stdout == "644 user user\n"


async def test_bytes_are_written_and_read(sdk, sandbox):
    bytes_of_all_kinds = bytes(range(256)) * 10
    await sandbox.files.write("bytes", bytes_of_all_kinds)
    assert await sandbox.files.read("bytes", format="bytes") == bytes_of_all_kinds
    await sandbox.files.write("from-file", io.BytesIO(bytes_of_all_kinds))
    assert await sandbox.files.read("from-file", format="bytes") == bytes_of_all_kinds
    await sandbox.files.write("from-text-file", io.StringIO("text ü"))
    assert await sandbox.files.read("from-text-file") == "text ü"


async def test_a_stream_is_written_and_read(sdk, sandbox):
    pieces = [bytes([n]) * 100_000 for n in range(20)]
    await sandbox.files.write("stream", sdk.pieces(pieces))
    stream = await sandbox.files.read("stream", format="stream")
    got = await sdk.drain(stream)
    assert b"".join(got) == b"".join(pieces)
    assert len(got) > 1


@pytest.mark.parametrize("octets", [False, True])
async def test_each_way_of_sending_has_the_same_effect(sdk, sandbox, octets):
    path = f"deep/er/{octets}/ a name.txt"
    written = await sandbox.files.write(path, b"sent", use_octet_stream=octets)
    assert written.path == f"/home/user/{path}"
    assert await sandbox.files.read(path) == "sent"
    packed = await sandbox.files.write(
        "packed", b"packed " * 1000, gzip=True, use_octet_stream=octets or None
    )
    assert packed.name == "packed"
    assert await sandbox.files.read("packed") == "packed " * 1000
    assert (await sandbox.commands.run("stat -c %s packed")).stdout == "7000\n"
    assert await sandbox.files.read("packed", gzip=True) == "packed " * 1000
    assert await sandbox.files.read("packed", format="bytes", gzip=True) == b"packed " * 1000


async def test_a_big_file_goes_there_and_back(sdk, sandbox):
    block = os.urandom(1 << 20)
    await sandbox.files.write("big", sdk.pieces([block] * 50))
    assert (await sandbox.commands.run("stat -c %s big")).stdout == f"{50 << 20}\n"
    stream = await sandbox.files.read("big", format="stream")
    got = b"".join(await sdk.drain(stream))
    assert len(got) == 50 << 20
    assert difference(got, block * 50) is None


async def test_what_the_kernel_makes_as_it_is_read_is_read(sdk, sandbox):
    version = (await sandbox.commands.run("cat /proc/version")).stdout
    assert await sandbox.files.read("/proc/version") == version
    assert await sandbox.files.read("/proc/version", gzip=True) == version
    stream = await sandbox.files.read("/proc/version", format="stream")
    assert b"".join(await sdk.drain(stream)).decode() == version
    mtu = (await sandbox.commands.run("cat /sys/class/net/lo/mtu 2>/dev/null; true")).stdout
    if mtu:
        assert await sandbox.files.read("/sys/class/net/lo/mtu") == mtu


async def test_a_link_to_a_file_says_what_it_is(sdk, sandbox):
    await sandbox.files.write("a page.html", "<b>a page</b>" * 100)
    link = await sandbox.download_url("a page.html")
    headers = {"E2b-Sandbox-Id": sandbox.sandbox_id, "accept-encoding": "identity"}
    async with httpx.AsyncClient(headers=headers) as client:
        told = await client.get(link)
        assert told.text == "<b>a page</b>" * 100
        assert told.headers["content-type"] == "text/html; charset=utf-8"
        assert told.headers["content-disposition"] == 'inline; filename="a page.html"'
        assert told.headers["content-length"] == "1300"
        assert email.utils.parsedate_to_datetime(told.headers["last-modified"])
        # Nor can it do anything where it is served.
        assert told.headers["x-content-type-options"] == "nosniff"
        assert "sandbox" in told.headers["content-security-policy"]
        told = await client.head(link, headers={"accept-encoding": "gzip"})
        assert (told.status_code, told.headers["content-length"]) == (200, "1300")
        for accepts, encoding in [
            ("gzip;q=0.5, identity;q=1", None),
            ("*, identity;q=0", "gzip"),
            ("br, gzip", "gzip"),
        ]:
            told = await client.get(link, headers={"accept-encoding": accepts})
            assert told.headers.get("content-encoding") == encoding
            assert told.text == "<b>a page</b>" * 100
        told = await client.get(link, headers={"accept-encoding": "br, identity;q=0"})
        assert told.status_code == 406


@covers("Filesystem.write_files")
async def test_several_files_are_written_at_once(sdk, sandbox):
    files = [{"path": f"many/{n}.txt", "data": f"{n}"} for n in range(5)]
    files.append({"path": "/tmp/bytes", "data": b"\x00\xff"})
    files.append({"path": "many/file", "data": io.BytesIO(b"of a file")})
    written = await sandbox.files.write_files(files)
    assert [it.path for it in written] == [
        *(f"/home/user/many/{n}.txt" for n in range(5)),
        "/tmp/bytes",
        "/home/user/many/file",
    ]
    assert all(it.type == FileType.FILE for it in written)
    for n in range(5):
        assert await sandbox.files.read(f"many/{n}.txt") == str(n)
    assert await sandbox.files.read("/tmp/bytes", format="bytes") == b"\x00\xff"
    assert await sandbox.files.read("many/file") == "of a file"
    assert await sandbox.files.write_files([]) == []


async def test_what_is_said_of_a_file_stays_with_it(sdk, sandbox):
    said = {"author": "somebody", "stage": "draft-1"}
    written = await sandbox.files.write("said", "x", metadata=said)
    assert written.metadata == said
    assert (await sandbox.files.get_info("said")).metadata == said
    (entry,) = [it for it in await sandbox.files.list(".") if it.name == "said"]
    assert entry.metadata == said
    moved = await sandbox.files.rename("said", "said-elsewhere")
    assert moved.metadata == said
    await sandbox.files.write("plain", "x")
    assert not (await sandbox.files.get_info("plain")).metadata


async def test_what_cannot_be_read_is_said(sdk, sandbox):
    with pytest.raises(FileNotFoundException, match="path '/home/user/none' does not exist"):
        await sandbox.files.read("none")
    with pytest.raises(NotFoundException):
        await sandbox.files.read("none", format="stream")
    await sandbox.files.make_dir("folder")
    with pytest.raises((InvalidArgumentException, SandboxException)):
        await sandbox.files.read("folder")
    with pytest.raises((InvalidArgumentException, SandboxException)):
        await sandbox.files.write("folder", "x")
    await sandbox.files.write("file", "x")
    with pytest.raises((InvalidArgumentException, SandboxException)):
        await sandbox.files.write("file/below", "x")


async def test_files_of_another_user(sdk, sandbox):
    await sandbox.files.write("of-root", "x", user="root")
    assert (await sandbox.commands.run("stat -c %U /root/of-root", user="root")).stdout == "root\n"
    info = await sandbox.files.get_info("of-root", user="root")
    assert (info.path, info.owner, info.group) == ("/root/of-root", "root", "root")
    await sandbox.files.write("~/new/er/file", "x")
    told = await sandbox.commands.run("stat -c %U new new/er new/er/file")
    assert told.stdout == "user\n" * 3
    assert await sandbox.files.read("~/new/er/file") == "x"
    with pytest.raises(Exception):
        await sandbox.files.write("x", "x", user="nobody-of-that-name")


@covers("Filesystem.get_info")
async def test_what_is_known_of_a_file(sdk, sandbox):
    before = datetime.datetime.now(datetime.timezone.utc) - datetime.timedelta(seconds=5)
    await sandbox.files.write("file", "12345")
    await sandbox.commands.run("chmod 750 file; ln -s file link; mkdir folder; mkfifo fifo")
    info = await sandbox.files.get_info("file")
    assert (info.name, info.path, info.type) == ("file", "/home/user/file", FileType.FILE)
    assert (info.size, info.mode & 0o7777) == (5, 0o750)
    assert info.permissions == "-rwxr-x---"
    assert (info.owner, info.group) == ("user", "user")
    assert info.symlink_target is None
    assert before < info.modified_time < before + datetime.timedelta(minutes=1)
    link = await sandbox.files.get_info("link")
    assert link.name == "link"
    assert link.symlink_target == "/home/user/file"
    assert link.permissions == "Lrwxrwxrwx"
    assert (await sandbox.files.get_info("fifo")).permissions == "prw-r--r--"
    assert (await sandbox.files.get_info("/tmp")).permissions == "dtrwxrwxrwx"
    folder = await sandbox.files.get_info("folder")
    assert folder.type == FileType.DIR
    assert folder.permissions.startswith("d")
    assert (await sandbox.files.get_info("/")).type == FileType.DIR
    with pytest.raises(FileNotFoundException):
        await sandbox.files.get_info("none")


@covers("Filesystem.list")
async def test_a_folder_is_listed_as_deep_as_is_wanted(sdk, sandbox):
    await sandbox.commands.run("mkdir -p l/b/c/d l/a; touch l/file l/b/in-b l/b/c/in-c; ln -s file l/link")
    one = await sandbox.files.list("l")
    assert [it.name for it in one] == ["a", "b", "file", "link"]
    assert [it.type for it in one[:3]] == [FileType.DIR, FileType.DIR, FileType.FILE]
    assert one[0].path == "/home/user/l/a"
    assert one[3].symlink_target == "/home/user/l/file"
    assert one[2].owner == "user" and one[2].size == 0
    two = [it.path for it in await sandbox.files.list("l", depth=2)]
    assert "/home/user/l/b/c" in two and "/home/user/l/b/in-b" in two
    assert "/home/user/l/b/c/in-c" not in two
    assert len(two) == 6
    every = await sandbox.files.list("/home/user/l", depth=10)
    assert len(every) == 8
    assert await sandbox.files.list("l/a") == []
    with pytest.raises(InvalidArgumentException):
        await sandbox.files.list("l", depth=0)
    with pytest.raises(FileNotFoundException):
        await sandbox.files.list("none")
    with pytest.raises(SandboxException):
        await sandbox.files.list("l/file")
    await sandbox.commands.run("ln -s round l/round")
    with pytest.raises(SandboxException, match="cyclic symlink"):
        await sandbox.files.list("l/round")


@covers("Filesystem.make_dir")
async def test_folders_are_made(sdk, sandbox):
    assert await sandbox.files.make_dir("one/two/three") is True
    assert await sandbox.files.make_dir("one/two/three") is False
    assert await sandbox.files.make_dir("/tmp/made") is True
    told = await sandbox.commands.run("stat -c '%U %a %F' one one/two one/two/three")
    assert told.stdout == "user 755 directory\n" * 3
    await sandbox.files.write("file", "x")
    with pytest.raises(SandboxException):
        await sandbox.files.make_dir("file")


@covers("Filesystem.rename")
async def test_files_are_moved(sdk, sandbox):
    await sandbox.files.write("old", "content")
    moved = await sandbox.files.rename("old", "new")
    assert (moved.name, moved.path) == ("new", "/home/user/new")
    assert await sandbox.files.exists("old") is False
    assert await sandbox.files.read("new") == "content"
    await sandbox.files.write("other", "other")
    await sandbox.files.rename("new", "other")
    assert await sandbox.files.read("other") == "content"
    await sandbox.files.make_dir("folder/in")
    folder = await sandbox.files.rename("folder", "/tmp/folder")
    assert folder.type == FileType.DIR
    assert await sandbox.files.exists("/tmp/folder/in") is True
    with pytest.raises(FileNotFoundException, match="source file not found"):
        await sandbox.files.rename("none", "any")


@covers("Filesystem.remove")
async def test_files_are_removed(sdk, sandbox):
    await sandbox.files.write("file", "x")
    await sandbox.files.remove("file")
    assert await sandbox.files.exists("file") is False
    await sandbox.files.write("tree/a/b", "x")
    await sandbox.files.remove("tree")
    assert await sandbox.files.exists("tree") is False
    # That it was not there is no fault.
    await sandbox.files.remove("none")


@covers("Filesystem.watch_dir", "WatchHandle.stop")
async def test_what_happens_in_a_folder_is_told(sdk, sandbox):
    await sandbox.files.make_dir("w/sub")
    watched = await sdk.watch(sandbox, "w")
    await sandbox.files.write("w/file", "one")
    made = await watched.until(lambda it: it.type.value == "create")
    assert made.name == "file"
    written = await watched.until(lambda it: it.type.value == "write")
    assert written.name == "file"
    await sandbox.commands.run("chmod 600 w/file")
    assert (await watched.until(lambda it: it.type.value == "chmod")).name == "file"
    await sandbox.files.rename("w/file", "w/other")
    assert (await watched.until(lambda it: it.type.value == "rename")).name == "file"
    assert await watched.until(lambda it: it.type.value == "create" and it.name == "other")
    await sandbox.files.remove("w/other")
    assert (await watched.until(lambda it: it.type.value == "remove")).name == "other"
    # What is below is not looked at.
    await sandbox.files.write("w/sub/file", "x")
    await sandbox.files.write("w/last", "x")
    await watched.until(lambda it: it.name == "last")
    assert not [it for it in watched.events if "/" in it.name]
    await watched.stop()


async def test_what_happens_below_is_told_too_if_that_is_wanted(sdk, sandbox):
    await sandbox.files.make_dir("w/sub")
    watched = await sdk.watch(sandbox, "w", recursive=True)
    await sandbox.files.write("w/sub/file", "x")
    told = await watched.until(lambda it: it.type.value == "write")
    assert told.name == "sub/file"
    # A folder that is new is looked at from the first moment.
    await sandbox.files.make_dir("w/new/er")
    await sandbox.files.write("w/new/er/file", "x")
    assert await watched.until(lambda it: it.name == "new/er/file")
    await watched.stop()


async def test_an_event_has_what_it_is_about_if_that_is_wanted(sdk, sandbox):
    await sandbox.files.make_dir("w")
    watched = await sdk.watch(sandbox, "w", include_entry=True)
    await sandbox.files.write("w/file", "12345")
    told = await watched.until(lambda it: it.type.value == "write")
    assert told.entry.path == "/home/user/w/file"
    assert told.entry.type == FileType.FILE
    assert told.entry.size == 5
    await watched.stop()


@pytest.mark.only("sync")
@covers("WatchHandle.get_new_events")
async def test_events_are_asked_for(sdk, sandbox):
    await sandbox.files.make_dir("w")
    handle = await sandbox.files.watch_dir("w")
    assert await handle.get_new_events() == []
    await sandbox.files.write("w/file", "x")
    events = await handle.get_new_events()
    assert {it.name for it in events} == {"file"}
    assert "create" in [it.type.value for it in events]
    assert await handle.get_new_events() == []
    await handle.stop()
    with pytest.raises(SandboxException):
        await handle.get_new_events()


async def test_one_sandbox_does_not_disturb_the_events_of_another(sdk, sandbox):
    await sandbox.files.make_dir("w")
    watched = await sdk.watch(sandbox, "w")
    async with await sdk.Sandbox.create("base", timeout=60) as other:
        await other.files.write("file", "x")
        await sandbox.files.write("w/file", "x")
        assert (await other.commands.run("cat file")).stdout == "x"
        assert (await watched.until(lambda it: it.type.value == "write")).name == "file"
    await watched.stop()


@only("async")
async def test_a_watch_ends_when_its_time_is_over_or_its_sandbox(sdk, sandbox):
    async def end(**opts):
        ended = asyncio.get_running_loop().create_future()
        await sandbox.files.watch_dir(".", on_event=print, on_exit=ended.set_result, **opts)
        return ended

    assert isinstance(await asyncio.wait_for(await end(timeout=1), 20), TimeoutException)
    ended = await end(timeout=0)
    await sandbox.kill()
    raised = await asyncio.wait_for(ended, 20)
    assert isinstance(raised, SandboxException)
    assert "being ended" in str(raised) and "reached its end of life" in str(raised)


async def test_what_cannot_be_watched_is_said(sdk, sandbox):
    with pytest.raises(NotFoundException):
        await sdk.watch(sandbox, "none")
    await sandbox.files.write("file", "x")
    with pytest.raises(SandboxException):
        await sdk.watch(sandbox, "file")


async def test_ten_writers_at_once(sdk, sandbox):
    names = [f"at-once/{n}" for n in range(10)]
    await asyncio.gather(*(sandbox.files.write(name, name) for name in names))
    told = await asyncio.gather(*(sandbox.files.read(name) for name in names))
    assert told == names
