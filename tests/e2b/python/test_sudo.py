"""`sudo`, as templates of E2B have it for their user: without a password; and `pip`."""

import io
import zipfile

import pytest
from e2b import CommandExitException, TimeoutException


async def out(sandbox, line, **opts):
    return (await sandbox.commands.run(line, **opts)).stdout


async def fails(sandbox, line, **opts):
    with pytest.raises(CommandExitException) as raised:
        await sandbox.commands.run(line, **opts)
    return raised.value


async def is_gone(sandbox, name):
    """Waits until no process of that name runs."""
    while (await out(sandbox, f"pgrep -x {name} || echo none")) != "none\n":
        pass


async def test_the_user_may_do_as_root_does(sdk, sandbox):
    assert "27(sudo)" in await out(sandbox, "id")
    assert await out(sandbox, "sudo id") == "uid=0(root) gid=0(root) groups=0(root)\n"
    assert await out(sandbox, "sudo -u nobody id -un") == "nobody\n"
    assert await out(sandbox, "sudo -n true && sudo -v && sudo -l") == "(ALL) NOPASSWD: ALL\n"
    await sandbox.commands.run("sudo sh -c 'echo made > /etc/made' && sudo chmod 600 /etc/made")
    assert "Permission denied" in (await fails(sandbox, "cat /etc/made")).stderr
    assert await out(sandbox, "sudo cat /etc/made") == "made\n"
    assert await out(sandbox, "sudo id -un", user="root") == "root\n"
    assert await out(sandbox, "sudo mkdir -p /opt/tool && sudo chown user /opt/tool && touch /opt/tool/x && echo $?") == "0\n"


async def test_what_it_runs_is_as_the_caller_has_it(sdk, sandbox):
    assert await out(sandbox, "cd /tmp && echo in | sudo sh -c 'pwd; cat; echo err >&2' 2>&1") == "/tmp\nin\nerr\n"
    assert await out(sandbox, "sudo printf '%s.' 'a b' '' \"c'd\"") == "a b..c'd."
    assert await out(sandbox, "seq 1 90000 | xargs -n 30000 sudo echo | wc -w") == "90000\n"
    line = "mkdir -m 700 /tmp/own && cd /tmp/own && sudo -u nobody pwd; sudo pwd"
    assert await out(sandbox, line) == "/\n/tmp/own\n"
    assert "cannot enter" in (await fails(sandbox, "sudo -u nobody -D /tmp/own pwd")).stderr
    told = await out(sandbox, "A=a sudo env; echo; A=a sudo -E env; echo; sudo A=b env", envs={"C": "c"})
    plain, kept, given = (dict(it.split("=", 1) for it in part.splitlines()) for part in told.split("\n\n"))
    assert "A" not in plain and "C" not in plain
    assert (plain["HOME"], plain["USER"], plain["SUDO_USER"]) == ("/root", "root", "user")
    assert plain["PATH"].startswith("/usr/local/sbin:")
    assert (kept["A"], kept["C"], given["A"]) == ("a", "c", "b")
    assert await out(sandbox, "sudo -EH sh -c 'echo $HOME'; sudo -E sh -c 'echo $HOME'") == "/root\n/home/user\n"
    assert await out(sandbox, "DENIZEN_LISTEN=wrong sudo id -un") == "root\n"
    assert await out(sandbox, "sudo -i pwd; sudo -s -- id -un; sudo -D /srv pwd") == "/root\nroot\n/srv\n"


async def test_how_it_ends_is_told(sdk, sandbox):
    for line, code, said in (
        ("sudo sh -c 'exit 7'", 7, ""),
        ("sudo sh -c 'kill -9 $$'", 137, ""),
        ("sudo nosuch", 1, "sudo: nosuch: command not found\n"),
        ("sudo -u nosuch true", 1, "sudo: unknown user nosuch\n"),
    ):
        error = await fails(sandbox, line)
        assert (error.exit_code, error.stderr) == (code, said), line
    assert "usage: sudo" in (await fails(sandbox, "sudo")).stderr


async def test_it_ends_with_its_command(sdk, sandbox):
    await sandbox.commands.run("sudo cp /bin/sleep /usr/local/bin/lasting")
    with pytest.raises(TimeoutException):
        await sandbox.commands.run("sudo setsid --wait lasting 1000", timeout=1)
    await is_gone(sandbox, "lasting")
    running = await sdk.start(sandbox, "sudo sh -c 'echo begun; exec lasting 1000'", timeout=0)
    await running.until(lambda it: it.out == "begun\n")
    assert await sandbox.commands.kill(running.pid) is True
    await is_gone(sandbox, "lasting")
    # Also where who has connected leaves the asking to a process that nothing else knows of.
    asks = r"""
import array, os, socket, struct
it = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
it.connect("\0denizen-sudo")
begun, begins = os.pipe()
if os.fork():
    os.read(begun, 1)
    os._exit(0)
os.setsid()
words = (b"root", b"/", b"/usr/local/bin/lasting", b"1000")
packet = struct.pack("<BBHIII", 1, 4, 0, 0, 2, 0) + b"".join(word + b"\0" for word in words)
it.sendmsg([packet], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", (0, 1, 2)))])
told = it.recv(100)[0]
os.write(begins, b"x")
print(told, flush=True)
it.recv(100)
"""
    await sandbox.files.write("/tmp/leaves.py", asks)
    running = await sdk.start(sandbox, "python3 /tmp/leaves.py; sleep 1000", timeout=0)
    await running.until(lambda it: it.out == "1\n")
    assert await out(sandbox, "pgrep -cx lasting") == "1\n"
    assert await sandbox.commands.kill(running.pid) is True
    await is_gone(sandbox, "lasting")
    # A signal for the one is for the other.
    line = "trap 'echo told; exit 3' TERM; echo begun; while :; do lasting 0.05; done"
    running = await sdk.start(sandbox, f'exec sudo sh -c "{line}"', timeout=0)
    await running.until(lambda it: it.out == "begun\n")
    await sandbox.commands.run(f"kill -TERM {running.pid}")
    with pytest.raises(CommandExitException) as raised:
        await running.wait()
    assert raised.value.exit_code == 3 and running.out == "begun\ntold\n"


async def test_others_may_not(sdk, sandbox):
    await sandbox.commands.run("sudo useradd -m other")
    for line in ("sudo id", "sudo -u user id", "sudo -v", "sudo -l"):
        error = await fails(sandbox, line, user="other")
        assert error.exit_code == 1, line
        assert "only members of the group sudo" in error.stderr, line
    # Nor by asking for it in another way; and nothing that is said there harms who listens.
    asks = r"""
import array, os, random, socket, struct
def ask(packet, files=()):
    it = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    it.connect("\0denizen-sudo")
    try:
        it.sendmsg([packet], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", files))] if files else [])
    except BrokenPipeError:
        pass  # refused by now
    it.settimeout(0.2)
    while True:
        try:
            return it.recv(100) or None
        except TimeoutError:
            return None
        except ConnectionResetError:
            pass  # told once, before what was sent
def start(flags, *words, argc=1):
    return struct.pack("<BBHIII", 1, flags, 0, 0, argc, 0) + b"".join(word + b"\0" for word in words)
may = ask(start(4, b"root", b"/", b"true"), (0, 1, 2))
assert may[:2] == (b"\1\0" if os.environ["MAY"] else b"\2\4"), may
pipe, more = os.pipe()
for packet, files in (
    (b"\1", ()), (start(0), ()), (start(0, b"/", b"true"), ()), (start(0, b"/", b"true", argc=1 << 31), (0, 1, 2)),
    (start(2, b""), (0, 1, 2, pipe)), (start(2, b""), (0, 1, 2)), (start(4, b"/"), (0, 1, 2)), (b"x" * 60000, (0,)),
):
    told = ask(packet, files)
    assert told is None or told[0] == 2, (packet, told)
chance = random.Random(1)
for _ in range(500):
    it = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    it.connect("\0denizen-sudo")
    kind = bytes([chance.choice([1, 2, 3, 5, 7, chance.randrange(256)])])
    try:
        it.send(kind + chance.randbytes(chance.randrange(60)))
        it.send(kind + chance.randbytes(chance.randrange(60)))
    except BrokenPipeError:
        pass
    it.close()
print("asked")
"""
    await sandbox.files.write("/tmp/asks.py", asks)
    for user, may in (("other", ""), ("user", "1")):
        assert await out(sandbox, "python3 /tmp/asks.py", user=user, envs={"MAY": may}) == "asked\n"
    # Nor does one hold it up whose descriptor takes long to be closed (SO_LINGER, socket(7)).
    slow = r"""
import array, socket, struct
listener = socket.create_server(("127.0.0.1", 0))
for packet in (b"\1", b"\1" * 50, b""):
    it = socket.create_connection(listener.getsockname())
    it.setblocking(False)
    try:
        while True:
            it.send(b"x" * 65536)
    except BlockingIOError:
        pass
    it.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 1000))
    asks = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    asks.connect("\0denizen-sudo")
    try:
        asks.sendmsg([packet], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [it.fileno()]))])
    except BrokenPipeError:
        pass
    it.detach(), asks.detach()
"""
    await sandbox.files.write("/tmp/slow.py", slow)
    for user in ("other", "user"):
        await sandbox.commands.run("python3 /tmp/slow.py", user=user, timeout=10)
        assert await out(sandbox, "sudo id -un", timeout=10) == "root\n"
    # Many that ask for nothing keep nobody out.
    crowd = (
        "import socket, time\n"
        "all = [socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(300)]\n"
        "for one in all: one.connect('\\0denizen-sudo')\n"
        "print('there', flush=True)\n"
        "time.sleep(1000)"
    )
    await sandbox.files.write("/tmp/crowd.py", crowd)
    running = await sdk.start(sandbox, "python3 /tmp/crowd.py", user="other", timeout=0)
    await running.until(lambda it: it.out == "there\n")
    assert await out(sandbox, "sudo id -un") == "root\n"
    assert await sandbox.commands.kill(running.pid) is True


async def test_in_a_terminal_it_has_one(sdk, sandbox):
    terminal = await sdk.terminal(sandbox, rows=30, cols=100, timeout=0)

    async def type(text, seen):
        await sandbox.pty.send_stdin(terminal.pid, text.encode())
        await terminal.until(lambda it: seen in it.bytes.decode(errors="replace"))

    # What is asked for is not what is typed.
    await type("sudo bash --norc\n", "# ")
    await type("echo $((40 + 2))-$(id -un)-$(tty)-$(stty size)\n", "42-root-/dev/pts/1-30 100")
    await type("sleep 1000 &\n", "[1]")
    await type("fg; echo $((1 + 1))-ended\n", "\rsleep 1000\r\n")
    await sandbox.commands.run("until ps -o stat= -C sleep | grep -q +; do :; done")
    await type("\x03", "^C")
    await type("echo $((2 + 2))-goes-on\n", "4-goes-on")
    await sandbox.pty.send_stdin(terminal.pid, b"exit 5\n")
    await terminal.until(lambda it: b"$ " in it.bytes.partition(b"\rexit\r\n")[2])
    await type("echo $?-$(id -un)-$(tty)\n", "5-user-/dev/pts/0")
    # Lines are edited and shown as before.
    await type("stty -a | grep -o ' echo \\| icanon ' | wc -l\n", "\r2\r\n")
    # In a pipeline it has the user's; what is typed to end it is for all that it runs.
    await type("sudo sh -c 'tty; sleep 1000; echo $((3 + 3))-not-ended' | cat\n", "\r/dev/pts/0")
    # What a shell is just about to start would miss it, and the shell waits for that.
    await sandbox.commands.run("until pgrep -x sleep; do :; done")
    await type("\x03", "^C")
    await type("echo $((3 + 4))-$(pgrep -cx sleep)\n", "7-0")
    assert b"6-not-ended" not in terminal.bytes
    await sandbox.pty.send_stdin(terminal.pid, b"exit\n")
    assert (await terminal.wait()).exit_code == 0


def wheel(name):
    """A package for pip, as small as one can be."""
    info = f"{name}-1.0.dist-info"
    files = {
        f"{name}.py": "there = True\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{file},,\n" for file in (*files, f"{info}/RECORD"))
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for file, content in (*files.items(), (f"{info}/RECORD", record)):
            archive.writestr(file, content)
    return data.getvalue()


async def test_pip_installs_for_the_user_and_for_all(sdk, sandbox):
    pip = "/usr/bin/python3 -m pip"
    if "pip" not in await out(sandbox, f"{pip} --version || true"):
        pytest.skip("this machine has no pip of its own")
    for name, line in (("mine", pip), ("ours", f"sudo {pip}")):
        file = f"{name}-1.0-py3-none-any.whl"
        await sandbox.files.write(file, wheel(name))
        await sandbox.commands.run(f"{line} install --no-index --no-deps ./{file}")
    assert await out(sandbox, "/usr/bin/python3 -c 'import mine, ours; print(mine.there)'") == "True\n"
    assert await out(sandbox, "/usr/bin/python3 -c 'import ours'", user="root") == ""
    await fails(sandbox, "/usr/bin/python3 -c 'import mine'", user="root")
