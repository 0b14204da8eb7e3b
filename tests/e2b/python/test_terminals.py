"""Terminals."""

import pytest
from e2b import CommandExitException, PtySize

from cases import covers


@covers("Pty.create", "Pty.send_stdin")
async def test_a_shell_in_a_terminal(sdk, sandbox):
    terminal = await sdk.terminal(sandbox, rows=30, cols=100, envs={"ABC": "123"})
    assert terminal.pid > 0
    await sandbox.pty.send_stdin(terminal.pid, b"echo $ABC-$TERM; tty; stty size; pwd; whoami\n")
    await terminal.until(lambda it: b"/home/user" in it.bytes and b"30 100" in it.bytes)
    assert b"123-xterm" in terminal.bytes
    assert b"/dev/pts/" in terminal.bytes
    await sandbox.pty.send_stdin(terminal.pid, b"exit\n")
    assert (await terminal.wait()).exit_code == 0


@covers("Pty.resize")
async def test_a_terminal_is_given_another_size(sdk, sandbox):
    terminal = await sdk.terminal(sandbox, rows=24, cols=80)
    await sandbox.pty.send_stdin(terminal.pid, b"stty size; tput cols\n")
    await terminal.until(lambda it: b"24 80" in it.bytes)
    await sandbox.pty.resize(terminal.pid, PtySize(rows=33, cols=144))
    await sandbox.pty.send_stdin(terminal.pid, b"stty size\n")
    await terminal.until(lambda it: b"33 144" in it.bytes)
    assert b"33 144" in terminal.bytes
    await sandbox.pty.send_stdin(terminal.pid, b"exit 4\n")
    with pytest.raises(CommandExitException) as raised:
        await terminal.wait()
    assert raised.value.exit_code == 4


@covers("Pty.connect", "Pty.kill", "CommandHandle.disconnect")
async def test_a_terminal_is_found_again(sdk, sandbox):
    first = await sdk.terminal(sandbox, cwd="/tmp", user="root", timeout=0)
    await sandbox.pty.send_stdin(first.pid, b"export KEPT=yes; pwd; whoami\n")
    await first.until(lambda it: b"/tmp" in it.bytes and b"root" in it.bytes)
    # One that does not listen any more changes nothing.
    listens = {"on_data": lambda _: None} if sdk.flavour == "async" else {}
    await (await sandbox.pty.connect(first.pid, **listens)).disconnect()
    other = await sdk.Sandbox.connect(sandbox.sandbox_id)
    again = await sdk.attach_terminal(other, first.pid, timeout=0)
    assert again.pid == first.pid
    await other.pty.send_stdin(first.pid, b"echo it is $KEPT\n")
    await again.until(lambda it: b"it is yes" in it.bytes)
    assert await other.pty.kill(first.pid) is True
    with pytest.raises(CommandExitException):
        await again.wait()
    assert await other.pty.kill(first.pid) is False


@covers("Pty.stream_input")
async def test_keys_are_streamed(sdk, sandbox):
    terminal = await sdk.terminal(sandbox, timeout=0)
    if sdk.flavour == "sync":
        await sandbox.pty.stream_input(terminal.pid, [b"echo a$((1", b"+1))b\n"])
    else:
        stream = await sandbox.pty.stream_input(terminal.pid)
        await stream.send(b"echo a$((1")
        await stream.send(b"+1))b\n")
        await stream.close()
    await terminal.until(lambda it: b"a2b" in it.bytes)
    # Ctrl-C reaches what is in front.
    line = b"sh -c 'echo be$((1))gun; exec sleep 1000'\n"
    await sandbox.pty.send_stdin(terminal.pid, line)
    await terminal.until(lambda it: b"be1gun" in it.bytes)
    await sandbox.pty.send_stdin(terminal.pid, b"\x03")
    await sandbox.pty.send_stdin(terminal.pid, b"echo c$((2+2))d\n")
    await terminal.until(lambda it: b"c4d" in it.bytes)
    assert await terminal.handle.kill() is True
