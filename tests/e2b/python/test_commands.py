"""Commands: in the foreground and the background, their input, output, time and end."""

import asyncio
import time

import pytest
from e2b import (
    AuthenticationException,
    CommandExitException,
    InvalidArgumentException,
    NotFoundException,
    SandboxException,
    TimeoutException,
)

from cases import covers, only


@covers("Commands.run")
async def test_a_command_is_run_to_its_end(sdk, sandbox):
    told = await sandbox.commands.run("echo out; echo err >&2")
    assert (told.stdout, told.stderr, told.exit_code) == ("out\n", "err\n", 0)
    assert told.error is None
    assert (await sandbox.commands.run("")).exit_code == 0
    assert (await sandbox.commands.run("echo 'a b' \"$((1+2))\" | tr a-z A-Z")).stdout == "A B 3\n"
    lines = (await sandbox.commands.run("printf 'a\\nb\\n\\n'")).stdout
    assert lines == "a\nb\n\n"
    assert (await sandbox.commands.run("echo 'grüße 🦀'")).stdout == "grüße 🦀\n"


async def test_a_command_that_fails_is_raised(sdk, sandbox):
    with pytest.raises(CommandExitException) as raised:
        await sandbox.commands.run("echo so far; echo no >&2; exit 7")
    failed = raised.value
    assert (failed.exit_code, failed.stdout, failed.stderr) == (7, "so far\n", "no\n")
    with pytest.raises(CommandExitException) as raised:
        await sandbox.commands.run("no-such-program-here")
    assert raised.value.exit_code == 127
    with pytest.raises(CommandExitException) as raised:
        await sandbox.commands.run("kill -9 $$")
    assert raised.value.exit_code != 0
    assert raised.value.error == "signal: killed"


async def test_users_and_folders_of_commands(sdk, sandbox):
    assert (await sandbox.commands.run("whoami; pwd; echo $HOME")).stdout == (
        "user\n/home/user\n/home/user\n"
    )
    as_root = await sandbox.commands.run("whoami; echo $HOME", user="root")
    assert as_root.stdout == "root\n/root\n"
    assert (await sandbox.commands.run("pwd", cwd="/tmp")).stdout == "/tmp\n"
    assert (await sandbox.commands.run("pwd", cwd="/", user="root")).stdout == "/\n"
    # A user has no way to what is root's.
    with pytest.raises(CommandExitException):
        await sandbox.commands.run("touch /root/file")
    with pytest.raises((AuthenticationException, InvalidArgumentException, SandboxException)):
        await sandbox.commands.run("true", user="nobody-of-that-name")
    with pytest.raises(InvalidArgumentException, match="cwd '/no/such/folder' does not exist"):
        await sandbox.commands.run("true", cwd="/no/such/folder")


async def test_variables_of_one_command(sdk, sandbox):
    told = await sandbox.commands.run("echo $A-$B", envs={"A": "1", "B": "x y"})
    assert told.stdout == "1-x y\n"
    assert (await sandbox.commands.run("echo $A-")).stdout == "-\n"


async def test_output_is_told_as_it_comes(sdk, sandbox):
    seen = []
    told = await sandbox.commands.run(
        "for i in 1 2 3; do echo $i; sleep 0.2; done; echo end >&2",
        on_stdout=lambda text: seen.append(("out", text)),
        on_stderr=lambda text: seen.append(("err", text)),
    )
    assert "".join(text for kind, text in seen if kind == "out") == "1\n2\n3\n"
    assert ("err", "end\n") in seen
    assert len(seen) == 4
    assert told.stdout == "1\n2\n3\n"


async def test_much_output_is_whole(sdk, sandbox):
    told = await sandbox.commands.run("seq 1 200000")
    assert told.stdout.count("\n") == 200000
    assert told.stdout.endswith("200000\n")
    got = 0

    def count(text):
        nonlocal got
        got += len(text)

    bare = await sandbox.commands.run(
        "head -c 20000000 /dev/zero | tr '\\0' x", on_stdout=count, retain_output=False
    )
    assert got == 20_000_000
    assert not bare.stdout


async def test_characters_are_not_cut_and_bytes_are_not_lost(sdk, sandbox):
    told = await sandbox.commands.run("printf '\\342\\202'; sleep 0.2; printf '\\254'")
    assert told.stdout == "€"
    told = await sandbox.commands.run("printf 'a\\377b'")
    assert told.stdout == "a\ufffdb"


async def alive(sandbox, mark):
    """How many processes have a mark in their command line."""
    line = f"grep -lz '{mark[0]}[{mark[1]}]{mark[2:]}' /proc/[0-9]*/cmdline 2>/dev/null | wc -l"
    return int((await sandbox.commands.run(line, user="root")).stdout)


async def all_end(sandbox, mark, seconds=10):
    async def look():
        while await alive(sandbox, mark):
            await asyncio.sleep(0.05)

    await asyncio.wait_for(look(), seconds)


TREE = "sh -c 'setsid sh -c \"exec sleep {0}\" & sh -c \"sleep {0} & wait\"'"


async def test_a_timeout_ends_the_whole_tree(sdk, sandbox):
    began = time.monotonic()
    with pytest.raises(TimeoutException):
        await sandbox.commands.run(TREE.format("71717"), timeout=1)
    assert time.monotonic() - began < 10
    await all_end(sandbox, "71717")
    assert await alive(sandbox, "71717") == 0
    assert (await sandbox.commands.run("echo still here")).stdout == "still here\n"


async def test_a_kill_ends_the_whole_tree(sdk, sandbox):
    running = await sdk.start(sandbox, TREE.format("72727"), timeout=0)

    async def begun():
        while await alive(sandbox, "72727") < 2:
            await asyncio.sleep(0.05)

    await asyncio.wait_for(begun(), 10)
    assert await running.handle.kill() is True
    with pytest.raises(CommandExitException) as raised:
        await running.wait()
    assert raised.value.exit_code != 0
    await all_end(sandbox, "72727")
    assert await running.handle.kill() is False


@covers("CommandHandle.wait", "CommandHandle.kill", "Commands.kill", "Commands.list")
async def test_a_command_in_the_background(sdk, sandbox):
    running = await sdk.start(sandbox, "echo one; sleep 1000", timeout=0)
    assert running.pid > 0
    await running.until(lambda it: it.out == "one\n")
    (found,) = [it for it in await sandbox.commands.list() if it.pid == running.pid]
    assert found.cmd == "/bin/bash"
    assert found.args == ["-l", "-c", "echo one; sleep 1000"]
    assert await sandbox.commands.kill(running.pid) is True
    with pytest.raises(CommandExitException):
        await running.wait()
    assert running.pid not in [it.pid for it in await sandbox.commands.list()]
    assert await sandbox.commands.kill(running.pid) is False
    assert await sandbox.commands.kill(999_999) is False
    ended = await sdk.start(sandbox, "echo out; echo err >&2")
    told = await ended.wait()
    assert (told.stdout, told.stderr, told.exit_code) == ("out\n", "err\n", 0)
    # The end is still known when it is asked for.
    assert (await ended.wait()).exit_code == 0
    again = await sandbox.commands.run("sleep 1000", background=True, timeout=0)
    assert await again.kill() is True


async def test_what_a_list_says_of_a_command(sdk, sandbox):
    running = await sdk.start(
        sandbox, "sleep 1000", envs={"A": "1"}, cwd="/tmp", timeout=0
    )
    (found,) = [it for it in await sandbox.commands.list() if it.pid == running.pid]
    assert found.envs["A"] == "1"
    assert found.cwd == "/tmp"
    assert await running.handle.kill() is True


@covers("Commands.connect", "CommandHandle.disconnect")
async def test_a_command_is_found_again_by_its_pid(sdk, sandbox):
    line = "while read -r line; do echo got $line; done; echo over"
    first = await sandbox.commands.run(line, background=True, stdin=True, timeout=0)
    await first.disconnect()
    # It goes on: another client finds it.
    other = await sdk.Sandbox.connect(sandbox.sandbox_id)
    assert first.pid in [it.pid for it in await other.commands.list()]
    again = await sdk.attach(other, first.pid, timeout=0)
    assert again.pid == first.pid
    await other.commands.send_stdin(first.pid, "a\n")
    await again.until(lambda it: it.out == "got a\n")
    third = await sdk.attach(sandbox, first.pid, timeout=0)
    await sandbox.commands.send_stdin(first.pid, "b\n")
    await again.until(lambda it: it.out == "got a\ngot b\n")
    await third.until(lambda it: it.out.endswith("got b\n"))
    await sandbox.commands.close_stdin(first.pid)
    assert (await again.wait()).exit_code == 0
    assert again.out.endswith("over\n")
    assert (await third.wait()).exit_code == 0
    for pid in (999_999, first.pid):
        with pytest.raises(NotFoundException):
            await sdk.attach(sandbox, pid)


@covers(
    "Commands.send_stdin",
    "Commands.close_stdin",
    "CommandHandle.send_stdin",
    "CommandHandle.close_stdin",
)
async def test_what_a_command_reads(sdk, sandbox):
    running = await sdk.start(sandbox, "cat", stdin=True, timeout=0)
    await sandbox.commands.send_stdin(running.pid, "by pid\n")
    await running.until(lambda it: it.out == "by pid\n")
    await running.handle.send_stdin("by handle\n")
    await running.handle.send_stdin(b"bytes \xc3\xa4\n")
    await running.until(lambda it: it.out.endswith("bytes ä\n"))
    await sandbox.commands.send_stdin(running.pid, "")
    await running.handle.close_stdin()
    told = await running.wait()
    assert told.stdout == "by pid\nby handle\nbytes ä\n"
    second = await sdk.start(sandbox, "wc -c", stdin=True, timeout=0)
    await sandbox.commands.send_stdin(second.pid, "x" * 300_000)
    await sandbox.commands.close_stdin(second.pid)
    assert (await second.wait()).stdout.strip() == "300000"
    deaf = await sdk.start(sandbox, "sleep 1000", stdin=False, timeout=0)
    with pytest.raises(SandboxException):
        await sandbox.commands.send_stdin(deaf.pid, "nobody reads this\n")
    assert await deaf.handle.kill() is True
    with pytest.raises(NotFoundException):
        await sandbox.commands.send_stdin(999_999, "x")


@only("sync")
@covers("Commands.stream_input")
async def test_input_is_streamed(sdk, sandbox):
    running = await sdk.start(sandbox, "cat", stdin=True, timeout=0)
    await sandbox.commands.stream_input(running.pid, ["one ", b"two ", "three\n"])
    await running.until(lambda it: it.out == "one two three\n")
    await running.handle.close_stdin()
    assert (await running.wait()).exit_code == 0


@only("async")
@covers("Commands.stream_input", "CommandInputHandle.send", "CommandInputHandle.close")
async def test_input_is_streamed_by_a_handle(sdk, sandbox):
    running = await sdk.start(sandbox, "cat", stdin=True, timeout=0)
    stream = await sandbox.commands.stream_input(running.pid)
    await stream.send("one ")
    await stream.send(b"two\n")
    await running.until(lambda it: it.out == "one two\n")
    await stream.send("three\n")
    await stream.close()
    await running.until(lambda it: it.out == "one two\nthree\n")
    await running.handle.close_stdin()
    assert (await running.wait()).exit_code == 0


async def test_a_command_without_input_does_not_wait_for_any(sdk, sandbox):
    told = await sandbox.commands.run("cat; echo end", timeout=20)
    assert told.stdout == "end\n"


async def test_when_its_sandbox_is_ended_a_command_ends_at_once(sdk):
    sandbox = await sdk.Sandbox.create("base", timeout=60)
    front = asyncio.ensure_future(sandbox.commands.run("echo begun > /tmp/begun; sleep 1000", timeout=0))
    back = await sdk.start(sandbox, "sleep 1000", timeout=0)
    while not await sandbox.files.exists("/tmp/begun"):
        await asyncio.sleep(0.02)
    began = time.monotonic()
    assert await sandbox.kill() is True
    for call in (front, back.end):
        with pytest.raises(SandboxException, match="killed or reached its end of life") as raised:
            await asyncio.wait_for(call, 10)
        assert "the sandbox is being ended" in str(raised.value)
    assert time.monotonic() - began < 10


async def test_when_the_time_of_its_sandbox_is_over_a_command_ends_at_once(sdk):
    sandbox = await sdk.Sandbox.create("base", timeout=2)
    back = await sdk.start(sandbox, "sleep 1000", timeout=0)
    with pytest.raises(SandboxException, match="killed or reached its end of life"):
        await asyncio.wait_for(back.end, 20)


async def test_when_its_sandbox_sleeps_a_command_does_not_hang(sdk, sandbox):
    back = await sdk.start(sandbox, "sleep 1000", timeout=0)
    await sandbox.pause()
    with pytest.raises(Exception) as raised:
        await asyncio.wait_for(back.end, 10)
    assert not isinstance(raised.value, asyncio.TimeoutError)
    await sandbox.connect()
    # It was not ended: only who waited was told.
    assert back.pid in [it.pid for it in await sandbox.commands.list()]


async def test_signals_reach_a_command(sdk, sandbox):
    line = "trap 'echo told; exit 3' TERM; echo $$ > pid; echo ready; while :; do sleep 0.05; done"
    running = await sdk.start(sandbox, line, timeout=0)
    await running.until(lambda it: it.out == "ready\n")
    await sandbox.commands.run("kill -TERM $(cat pid)")
    with pytest.raises(CommandExitException) as raised:
        await running.wait()
    assert raised.value.exit_code == 3
    assert running.out == "ready\ntold\n"


async def test_twenty_commands_at_once(sdk, sandbox):
    told = await asyncio.gather(*(sandbox.commands.run(f"sleep 0.1; echo {i}") for i in range(20)))
    assert [it.stdout for it in told] == [f"{i}\n" for i in range(20)]


@only("async")
async def test_a_handle_knows_what_has_come_so_far(sdk, sandbox):
    running = await sdk.start(sandbox, "echo a; echo b >&2; sleep 1000", timeout=0)
    await running.until(lambda it: it.out and it.err)
    assert running.handle.stdout == "a\n"
    assert running.handle.stderr == "b\n"
    assert running.handle.exit_code is None
    assert await running.handle.kill() is True
    with pytest.raises(CommandExitException):
        await running.wait()
    assert running.handle.exit_code not in (None, 0)
