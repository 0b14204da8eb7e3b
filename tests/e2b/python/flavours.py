"""Both flavours of the Python SDK behind one face, so that each case is written once.

Every method is awaited, whichever flavour it is of: one of the async SDK as it is, one of the sync
SDK on a thread of its own. What is called is recorded, which is how a case is known to have used
the methods that it says it covers.
"""

import asyncio
import inspect
import threading
import time

import e2b
import e2b_code_interpreter
from e2b.sandbox_async.commands.command import Commands as AsyncCommands
from e2b.sandbox_async.commands.pty import Pty as AsyncPty
from e2b.sandbox_async.filesystem.filesystem import Filesystem as AsyncFilesystem
from e2b.sandbox_async.git import Git as AsyncGit
from e2b.sandbox_sync.commands.command import Commands
from e2b.sandbox_sync.commands.pty import Pty
from e2b.sandbox_sync.filesystem.filesystem import Filesystem
from e2b.sandbox_sync.git import Git
from e2b.template.main import TemplateBuilder, TemplateFinal

# What each class is called in the table, and its two flavours.
CLASSES = [
    ("Sandbox", e2b_code_interpreter.Sandbox, e2b_code_interpreter.AsyncSandbox),
    ("SandboxPaginator", e2b.SandboxPaginator, e2b.AsyncSandboxPaginator),
    ("SnapshotPaginator", e2b.SnapshotPaginator, e2b.AsyncSnapshotPaginator),
    ("Commands", Commands, AsyncCommands),
    ("CommandHandle", e2b.CommandHandle, e2b.AsyncCommandHandle),
    ("CommandInputHandle", None, e2b.AsyncCommandInputHandle),
    ("Pty", Pty, AsyncPty),
    ("Filesystem", Filesystem, AsyncFilesystem),
    ("WatchHandle", e2b.WatchHandle, e2b.AsyncWatchHandle),
    ("Git", Git, AsyncGit),
    ("Template", e2b.Template, e2b.AsyncTemplate),
    ("Template", TemplateBuilder, TemplateBuilder),
    ("Template", TemplateFinal, TemplateFinal),
    ("Volume", e2b.Volume, e2b.AsyncVolume),
    ("Secret", e2b.Secret, e2b.AsyncSecret),
    ("SecretPaginator", e2b.SecretPaginator, e2b.AsyncSecretPaginator),
]

# The classes whose objects are given out behind the face.
FACED = tuple(kind for _, *both in CLASSES for kind in both if kind)


def name_of(kind):
    """What a class is called in the table. One of a client's is a subclass of the exported one."""
    for name, *both in CLASSES:
        if any(known and issubclass(kind, known) for known in both):
            return name
    # The SDK's own sandbox, without a code interpreter.
    return "Sandbox" if issubclass(kind, (e2b.Sandbox, e2b.AsyncSandbox)) else kind.__name__


def methods(flavour):
    """The names of all public methods of a flavour, as the installed SDK has them."""
    found = set()
    for name, sync, aio in CLASSES:
        kind = sync if flavour == "sync" else aio
        if kind is None:
            continue
        for method in dir(kind):
            static = inspect.getattr_static(kind, method)
            plain = isinstance(static, (property, str, int)) or inspect.isclass(static)
            if not method.startswith("_") and not plain:
                found.add(f"{name}.{method}")
    return found


def on_thread(call):
    """Runs a blocking call on a thread that nobody has to wait for, should it hang."""
    loop = asyncio.get_running_loop()
    future = loop.create_future()

    def settle(how, value):
        if not future.done():
            how(value)

    def run():
        try:
            value = call()
        except BaseException as error:
            # A future does not take this one.
            error = RuntimeError("StopIteration") if isinstance(error, StopIteration) else error
            loop.call_soon_threadsafe(settle, future.set_exception, error)
        else:
            loop.call_soon_threadsafe(settle, future.set_result, value)

    threading.Thread(target=run, daemon=True).start()
    return future


class Face:
    """An object or a class of the SDK, whose methods are all awaited."""

    def __init__(self, sdk, inner):
        self._sdk, self._inner = sdk, inner

    def __getattr__(self, name):
        value = getattr(self._inner, name)
        if isinstance(value, FACED):
            return Face(self._sdk, value)
        if not callable(value) or inspect.isclass(value):
            return value
        kind = self._inner if inspect.isclass(self._inner) else type(self._inner)
        method = f"{name_of(kind)}.{name}"

        async def call(*args, **named):
            self._sdk.called.add(method)
            args = [self._sdk.bare(arg) for arg in args]
            named = {key: self._sdk.bare(arg) for key, arg in named.items()}
            began = time.monotonic()
            try:
                if self._sdk.flavour == "sync":
                    answer = await on_thread(lambda: value(*args, **named))
                else:
                    answer = value(*args, **named)
                    if inspect.isawaitable(answer):
                        answer = await answer
            finally:
                # It is shown with a case that fails.
                print(f"{time.strftime('%X')} {method}: {time.monotonic() - began:.2f} s")
            return self._sdk.faced(answer)

        return call

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        await self.kill()


class Running:
    """A command or a terminal in the background, with what it has written so far."""

    def __init__(self, handle):
        self.handle, self.out, self.err, self.bytes = handle, "", "", b""
        self.changed = asyncio.Event()
        self.end = None

    def note(self, stdout=None, stderr=None, pty=None):
        self.out += stdout or ""
        self.err += stderr or ""
        self.bytes += pty or b""
        self.changed.set()

    @property
    def pid(self):
        return self.handle.pid

    async def until(self, seen, seconds=20):
        """Waits until `seen` says so of what was written."""

        async def look():
            while not seen(self):
                self.changed.clear()
                await self.changed.wait()

        try:
            await asyncio.wait_for(look(), seconds)
        except asyncio.TimeoutError:
            written = (self.out, self.err, self.bytes)
            raise AssertionError(f"not written: there is {written!r}") from None

    async def wait(self, seconds=30):
        """Its result; or raises what it has ended with."""
        return await asyncio.wait_for(asyncio.shield(self.end), seconds)


class Watched:
    """A folder that is watched, with the events so far."""

    def __init__(self, sdk, handle):
        self.sdk, self.handle, self.events = sdk, handle, []
        self.changed = asyncio.Event()

    def note(self, event):
        self.events.append(event)
        self.changed.set()

    async def until(self, seen, seconds=20):
        """Waits until there is an event that `seen` says yes to, and gives it."""

        async def look():
            while True:
                if self.sdk.flavour == "sync":
                    self.events += await self.handle.get_new_events()
                for event in self.events:
                    if seen(event):
                        return event
                if self.sdk.flavour == "sync":
                    await asyncio.sleep(0.05)
                else:
                    self.changed.clear()
                    await self.changed.wait()

        return await asyncio.wait_for(look(), seconds)

    async def stop(self):
        await self.handle.stop()


class Sdk:
    """One flavour of the SDK."""

    def __init__(self, flavour):
        self.flavour, self.called = flavour, set()
        at = 1 if flavour == "sync" else 2
        kinds = {name: both[at - 1] for name, *both in reversed(CLASSES) if both[at - 1]}
        self.Sandbox = Face(self, kinds["Sandbox"])
        plain = e2b.Sandbox if flavour == "sync" else e2b.AsyncSandbox
        self.PlainSandbox = Face(self, plain)
        self.template_kind = e2b.Template if flavour == "sync" else e2b.AsyncTemplate
        self.Template = Face(self, self.template_kind)
        self.Volume = Face(self, kinds["Volume"])
        self.Secret = Face(self, kinds["Secret"])

    def client(self, **opts):
        """A client with its own settings, of which only this flavour is used."""
        client = e2b.E2B(**opts)
        prefix = "" if self.flavour == "sync" else "Async"
        return {
            name: Face(self, getattr(client, prefix + name))
            for name in ("Sandbox", "Template", "Volume", "Secret")
        }

    def bare(self, value):
        if isinstance(value, dict):
            return {key: self.bare(item) for key, item in value.items()}
        return value._inner if isinstance(value, Face) else value

    def faced(self, value):
        if isinstance(value, FACED) or isinstance(value, (e2b.Sandbox, e2b.AsyncSandbox)):
            return Face(self, value)
        if isinstance(value, list):
            return [self.faced(item) for item in value]
        return value

    def recorded(self, builder):
        """A builder of templates, whose methods are called as they are and recorded."""
        sdk = self

        class Recorded:
            def __init__(self, inner):
                self.inner = inner

            def __getattr__(self, name):
                method = getattr(self.inner, name)

                def call(*args, **named):
                    sdk.called.add(f"Template.{name}")
                    return Recorded(method(*args, **named))

                return call

        return Recorded(builder)

    def template(self, **opts):
        """Begins the definition of a template; `.inner` of what comes out is the SDK's."""
        return self.recorded(self.template_kind(**opts))

    async def start(self, sandbox, line, **opts):
        """Starts a command in the background and reads what it writes."""
        running = Running(None)
        return await self._follow(running, sandbox.commands.run, line, background=True, **opts)

    async def attach(self, sandbox, pid, **opts):
        """Attaches to a command that runs."""
        return await self._follow(Running(None), sandbox.commands.connect, pid, **opts)

    async def terminal(self, sandbox, rows=24, cols=80, **opts):
        """Opens a terminal and reads what it writes."""
        size = e2b.PtySize(rows=rows, cols=cols)
        return await self._follow(Running(None), sandbox.pty.create, size, terminal=True, **opts)

    async def attach_terminal(self, sandbox, pid, **opts):
        return await self._follow(Running(None), sandbox.pty.connect, pid, terminal=True, **opts)

    async def _follow(self, running, begin, *args, terminal=False, **opts):
        loop = asyncio.get_running_loop()

        def of(which):
            return lambda data: loop.call_soon_threadsafe(
                lambda: running.note(**{which: data})
            )

        pipes = {"on_stdout": of("stdout"), "on_stderr": of("stderr")}
        if self.flavour == "async":
            opts |= {"on_data": of("pty")} if terminal else pipes
        running.handle = await begin(*args, **opts)
        if self.flavour == "sync":
            wait = running.handle.wait(on_pty=of("pty"), **pipes)
        else:
            wait = running.handle.wait()
        running.end = asyncio.ensure_future(wait)
        # Nobody may ask how it ended.
        running.end.add_done_callback(lambda end: end.cancelled() or end.exception())
        return running

    async def watch(self, sandbox, path, **opts):
        watched = Watched(self, None)
        if self.flavour == "async":
            opts["on_event"] = watched.note
        watched.handle = await sandbox.files.watch_dir(path, **opts)
        return watched

    async def drain(self, stream):
        """All pieces of a stream, in either flavour."""
        if hasattr(stream, "__aiter__"):
            return [piece async for piece in stream]
        return await on_thread(lambda: list(stream))

    def pieces(self, all_of_them):
        """Pieces as either flavour takes them."""
        if self.flavour == "sync":
            return iter(all_of_them)

        async def give():
            for piece in all_of_them:
                yield piece

        return give()

    async def all_of(self, paginator):
        """All items that a paginator gives."""
        items = []
        while paginator.has_next:
            items += await paginator.next_items()
        return items
