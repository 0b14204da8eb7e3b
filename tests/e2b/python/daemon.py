"""Real daemons, each with a state of its own, that cases start, end and kill."""

import os
import queue
import shutil
import signal
import socket
import subprocess
import threading
from pathlib import Path


# How long a daemon may take to begin, or to answer a verb, in seconds.
PATIENCE = 60


def program():
    return os.environ["DENIZEN_PROGRAM"]


def clean():
    """The environment without settings of whoever runs the tests."""
    ours = ("DENIZEN_", "E2B_")
    return {name: value for name, value in os.environ.items() if not name.startswith(ours)}


class Daemon:
    """A daemon at an address that stays when it is started again."""

    def __init__(self, folder, *settings, before=None):
        """`before` is a shell script that is run first, in a network of the daemon's own."""
        self.folder, self.before = Path(folder), before
        self.folder.mkdir(parents=True, exist_ok=True)
        self.settings = ["--max-vms", "300", *settings]
        self.env = clean() | {
            "DENIZEN_STATE": str(self.folder / "state"),
            # One for all: the first daemon that has none fills it, which takes seconds.
            "DENIZEN_CACHE": os.environ.get("E2B_CACHE") or str(self.folder / "cache"),
        }
        # It is given the socket, so that it can be elsewhere and its clients find it here.
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        self.key = None

    def start(self):
        handed = self.socket.fileno()
        move = "" if handed == 3 else f"exec 3<&{handed} {handed}<&-"
        line = f'{move}\nLISTEN_FDS=1 LISTEN_PID=$$ exec "$@"'
        run = ["bash", "-ec", f"{self.before or ''}\n{line}", "sh", program(), *self.settings, "serve"]
        if self.before:
            run = ["unshare", "--net", *run]
        with open(self.folder / "log", "a") as log:
            self.child = subprocess.Popen(
                run, env=self.env, pass_fds=[handed], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE,
                stdout=log, text=True,
            )
        # It is not to wait for somebody who reads what it says.
        began = queue.SimpleQueue()
        threading.Thread(target=self.drain, args=[began], daemon=True).start()
        try:
            listens = began.get(timeout=PATIENCE)
        except queue.Empty:
            listens = False
        if not listens:
            self.child.kill()
            raise RuntimeError(f"the daemon does not listen: {(self.folder / 'log').read_text()}")
        if self.key is None:
            self.key = self.denizen("key", "create", "e2b").strip()
        return self

    def drain(self, began):
        for line in self.child.stderr:
            self.note(line)
            if line.startswith("denizen listens on "):
                began.put(True)
        began.put(False)

    def note(self, line):
        with open(self.folder / "log", "a") as log:
            log.write(line)

    def denizen(self, *args):
        """What a verb prints."""
        run = [program(), *self.settings, *args]
        return subprocess.run(
            run, env=self.env, check=True, text=True, capture_output=True, timeout=PATIENCE
        ).stdout

    def end(self, how=signal.SIGTERM):
        self.child.send_signal(how)
        self.child.wait(PATIENCE)

    def __enter__(self):
        return self.start()

    def __exit__(self, *_):
        if self.child.poll() is None:
            self.end()
        self.socket.close()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    @property
    def opts(self):
        """What points one call of the SDK here."""
        return {"api_url": self.url, "sandbox_url": self.url, "api_key": self.key}

    @property
    def variables(self):
        """What points a whole program that uses the SDK here."""
        return {
            "E2B_API_URL": self.url,
            "E2B_SANDBOX_URL": self.url,
            "E2B_VOLUME_API_URL": self.url,
            "E2B_API_KEY": self.key,
            "E2B_VALIDATE_API_KEY": "false",
            # A connection for each request: what the Python SDK sends with (pyqwest 0.12.0, whose
            # hyper is older than 1.12.0) puts one in some ten thousand behind a stream on the same
            # connection, where it waits until the stream ends.
            "E2B_MAX_KEEPALIVE_CONNECTIONS": "0",
        }


def make_root(folder):
    """A root for machines: a bash, and the rest by busybox."""
    root = Path(folder)
    for part in ("bin", "lib", "lib64", "etc", "tmp", "root", "home", "proc", "sys", "dev", "usr"):
        (root / part).mkdir(parents=True, exist_ok=True)
    (root / "usr/bin").symlink_to("../bin")
    bash = shutil.which("bash")
    shutil.copy(bash, root / "bin/bash")
    for word in subprocess.run(["ldd", bash], capture_output=True, text=True).stdout.split():
        if word.startswith("/"):
            to = root / word.lstrip("/")
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(word, to)
    shutil.copy(shutil.which("busybox"), root / "bin/busybox")
    tools = "sh cat ls echo touch id env rm mkdir chown chmod sleep seq stat grep kill ps whoami"
    for tool in tools.split():
        (root / "bin" / tool).symlink_to("busybox")
    (root / "etc/passwd").write_text("root:x:0:0::/root:/bin/bash\n")
    (root / "etc/group").write_text("root:x:0:\n")
    return root
