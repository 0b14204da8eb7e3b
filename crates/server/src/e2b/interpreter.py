"""Runs code for the clients of E2B's code interpreter, in Jupyter kernels.

The daemon starts this program inside a session (`python3 -c <this text>`), and
the SDKs reach it as port 49999. It uses the standard library and whatever
`jupyter_client` and `ipykernel` the session's image has; without them it still
answers, runs bash, and says what is missing.

A context is one kernel with one thread. That thread alone talks to the kernel;
a request for it waits in line. What a kernel prints is never held as a whole:
a client that reads slowly slows the kernel down.

It must never write to the kernel's namespace of the user's names, and never
leave an execution running whose client went away.
"""

import codecs
import collections
import errno
import http.server
import importlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid

PORT = 49999
# The largest request. Code is text that a person or a model wrote.
MAX_BODY = 64 * 1024 * 1024
# As much output waits for its client, and no more.
MAX_WAITING = 256 * 1024
# How long a kernel may take to start.
START_SECONDS = 60
# How often a silent kernel is looked at, whether it still lives.
LOOK_SECONDS = 0.5
# How often a silent client is looked at, whether it is still there.
CLIENT_SECONDS = 0.25

# What the clients know a kernel's death as, since another one follows.
DIED = "ContextRestarting"

ALIASES = {
    "py": "python",
    "python3": "python",
    "ipython": "python",
    "js": "javascript",
    "ts": "typescript",
    "sh": "bash",
}

FORMATS = {
    "text/plain": "text",
    "text/html": "html",
    "text/markdown": "markdown",
    "image/svg+xml": "svg",
    "image/png": "png",
    "image/jpeg": "jpeg",
    "application/pdf": "pdf",
    "text/latex": "latex",
    "application/json": "json",
    "application/javascript": "javascript",
    "denizen/data": "data",
    "denizen/chart": "chart",
}

# Runs inside every Python kernel, as a module that no user name refers to.
# It adds the data of tables, charts, dicts and lists to what is displayed, shows pictures,
# sets variables of the environment for one execution, and keeps the kernel
# from printing faster than its client reads.
IN_KERNEL = r'''
import contextlib
import importlib.machinery
import itertools
import json
import math
import os
import re
import struct
import sys
import threading

from IPython import get_ipython
from IPython.core.formatters import BaseFormatter, JSONFormatter
from traitlets import ObjectName, Unicode

# What has more values than this is shown, but its data is not sent: all of it
# or nothing.
MAX_VALUES = 100_000


def plain(value):
    """The value as JSON can carry it."""
    if value is None or isinstance(value, (str, bool)):
        return value
    if type(value).__name__ == "NAType":
        return None
    if hasattr(value, "isoformat"):
        return value.isoformat() if value == value else None  # NaT equals nothing
    if type(value).__module__ == "numpy":
        if value.dtype.kind == "M":
            # As a `datetime`, which every unit but the finest of numpy can be.
            return plain(value.astype("datetime64[us]").item())
        if value.dtype.kind == "m":
            text = str(value)
            return None if text == "NaT" else text
        return plain(value.item())
    if isinstance(value, int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value)


def number(value):
    """As `plain`, but numbers are always floats."""
    value = plain(value)
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def carried(value, counted):
    """As `plain`, and dicts and lists of it; TypeError if JSON has no form for it."""
    if next(counted) > MAX_VALUES:
        raise TypeError
    if isinstance(value, dict):
        return {key(name): carried(one, counted) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [carried(one, counted) for one in value]
    if type(value).__module__ == "numpy":
        return carried(value.tolist(), counted) if value.ndim else plain(value)
    if value is None or isinstance(value, (str, int, float)) or hasattr(value, "isoformat"):
        return plain(value)
    raise TypeError


def key(name):
    """A name in a dict as JSON can carry it."""
    if isinstance(name, tuple):
        raise TypeError
    name = carried(name, itertools.count())
    return name if isinstance(name, str) else json.dumps(name)


# Tables


def table(frame):
    if frame.size > MAX_VALUES:
        return None
    return {
        str(name): [plain(value) for value in frame.iloc[:, at].tolist()]
        for at, name in enumerate(frame.columns)
    }


# Charts


def unit(label):
    """What stands in brackets in an axis' label, or in parentheses after a space."""
    found = re.search(r"\s\(([^)]*)\)|\[([^]]*)\]", label or "")
    return (found.group(1) or found.group(2) or None) if found else None


def named(artist, kind=None):
    """The artist's label; one that matplotlib counted itself is told as of its kind."""
    label = str(artist.get_label())
    return re.sub(r"^_(child|container)(?=\d+$)", f"{kind} ", label) if kind else label


def axis_labels(axes, flat=False):
    """What the axes are called; of flat bars and boxes y is told first, as x."""
    names = ("y", "x") if flat else ("x", "y")
    texts = axes.get_xlabel() or None, axes.get_ylabel() or None
    told = {f"{name}_label": text for name, text in zip(names, texts)}
    told.update((f"{name}_unit", unit(text)) for name, text in zip(names, texts))
    return told


def labels_of(axis):
    ticks = axis.get_majorticklocs()
    return ticks, [str(text) for text in axis.get_major_formatter().format_ticks(ticks)]


def scale(axis):
    from matplotlib.category import StrCategoryFormatter
    from matplotlib.dates import DateLocator

    if isinstance(axis.get_major_formatter(), StrCategoryFormatter):
        return "categorical"
    if isinstance(axis.get_major_locator(), DateLocator):
        return "datetime"
    return axis.get_scale()


def tick_values(axis, ticks):
    if scale(axis) == "datetime":
        from matplotlib.dates import num2date

        return [num2date(tick).isoformat() for tick in ticks]
    return [number(tick) for tick in ticks]


def pairs(xs, ys):
    return [[number(x), number(y)] for x, y in zip(xs, ys)]


def lines_of(axes):
    # A line across the whole axes is in other coordinates: it marks a place and is no data.
    return [
        {
            "label": named(line, "Line"),
            "points": pairs(line.get_xdata(orig=True), line.get_ydata(orig=True)),
        }
        for line in axes.lines
        if line.get_transform().contains_branch(axes.transData)
    ]


def scatters_of(axes):
    from matplotlib.collections import PathCollection

    return [
        {"label": named(dots), "points": pairs(*dots.get_offsets().T)}
        for dots in axes.collections
        if isinstance(dots, PathCollection)
    ]


def name_at(axis, place, otherwise):
    """What an axis calls a place, if somebody chose names for its places."""
    from matplotlib.ticker import FixedFormatter, FuncFormatter

    chosen = isinstance(axis.get_major_formatter(), (FixedFormatter, FuncFormatter))
    ticks, texts = labels_of(axis)
    if not len(ticks) or not (chosen or scale(axis) == "categorical"):
        return otherwise
    return texts[min(range(len(ticks)), key=lambda at: abs(ticks[at] - place))]


def is_flat(container):
    return getattr(container, "orientation", None) == "horizontal"


def bars_of(axes, containers):
    bars = []
    for container in containers:
        flat = is_flat(container)
        axis = axes.yaxis if flat else axes.xaxis
        for bar in container:
            if flat:
                middle, value = bar.get_y() + bar.get_height() / 2, bar.get_width()
            else:
                middle, value = bar.get_x() + bar.get_width() / 2, bar.get_height()
            label = name_at(axis, middle, format(float(middle), "g"))
            bars.append({"label": label, "group": named(container, "Group"), "value": number(value)})
    return bars


def boxes_of(axes):
    return [
        {
            "label": name_at(axes.yaxis if flat else axes.xaxis, at, str(box.get("label", at))),
            "min": number(box["whislo"]),
            "first_quartile": number(box["q1"]),
            "median": number(box["med"]),
            "third_quartile": number(box["q3"]),
            "max": number(box["whishi"]),
            "outliers": [number(value) for value in box.get("fliers", ())],
        }
        for at, (box, flat) in sorted(axes._denizen_boxes.items())
    ]


def wedges_of(wedges):
    # matplotlib counts in single precision; what is beyond it is noise.
    return [
        {
            "label": named(wedge),
            "angle": round(abs(float(wedge.theta2) - float(wedge.theta1)), 3),
            "radius": number(wedge.r),
        }
        for wedge in wedges
    ]


def chart_of_axes(axes):
    from matplotlib.container import BarContainer
    from matplotlib.patches import Wedge

    chart = {"type": "unknown", "title": axes.get_title() or None, "elements": []}
    wedges = [patch for patch in axes.patches if isinstance(patch, Wedge)]
    if wedges:
        chart.update(type="pie", elements=wedges_of(wedges))
        return chart

    containers = [one for one in axes.containers if isinstance(one, BarContainer)]
    boxes = getattr(axes, "_denizen_boxes", None)
    if boxes:
        chart.update(axis_labels(axes, all(flat for _, flat in boxes.values())))
        chart.update(type="box_and_whisker", elements=boxes_of(axes))
    elif containers:
        chart.update(axis_labels(axes, all(map(is_flat, containers))))
        chart.update(type="bar", elements=bars_of(axes, containers))
    else:
        lines, scatters = lines_of(axes), scatters_of(axes)
        count = lambda elements: sum(len(one["points"]) for one in elements)
        if not lines and not scatters and (axes.collections or axes.images or axes.patches):
            return chart
        # Without anything it is a line chart, as axes are before the first line.
        # Dots with a trend, or a curve with marks: the data is where more points are.
        kind = ("line", lines) if count(lines) >= count(scatters) else ("scatter", scatters)
        chart.update(axis_labels(axes), type=kind[0], elements=kind[1])
        for name, axis in (("x", axes.xaxis), ("y", axes.yaxis)):
            ticks, texts = labels_of(axis)
            chart[name + "_ticks"] = tick_values(axis, ticks)
            chart[name + "_tick_labels"] = texts
            chart[name + "_scale"] = scale(axis)
    return chart


def blank(axes):
    """Whether nothing was drawn, nor anything begun that changed a scale."""
    return not axes.has_data() and scale(axes.xaxis) == scale(axes.yaxis) == "linear"


def values_in(figure):
    total = 0
    for axes in figure.axes:
        total += sum(len(line.get_xdata(orig=True)) for line in axes.lines)
        total += sum(len(one.get_offsets()) for one in axes.collections)
        total += len(axes.patches)
    return total


def chart_of(figure):
    # A chart that cannot be read is still a picture.
    try:
        axes = [one for one in figure.axes if one.get_label() != "<colorbar>"]
        if all(blank(one) for one in axes) or values_in(figure) > MAX_VALUES:
            return None
        charts = [chart_of_axes(one) for one in axes]
        if len(charts) == 1:
            return charts[0]
        title = getattr(figure, "_suptitle", None)
        return {
            "type": "superchart",
            "title": (title.get_text() or None) if title else None,
            "elements": charts,
        }
    except Exception:
        return None


class Data(BaseFormatter):
    format_type = Unicode("denizen/data")
    print_method = ObjectName("_denizen_data_")
    _return_type = dict


class Chart(BaseFormatter):
    format_type = Unicode("denizen/chart")
    print_method = ObjectName("_denizen_chart_")
    _return_type = dict


class Json(JSONFormatter):
    def __call__(self, value):
        if isinstance(value, (dict, list)):
            try:
                return carried(value, itertools.count())
            except (TypeError, RecursionError):
                pass  # its text says what it is
        return super().__call__(value)


# Libraries are changed when the user imports them, and not loaded before.


def axes_imported(module):
    original = module.Axes.bxp

    def bxp(self, bxpstats, positions=None, *more, **named):
        # A drawn box cannot be told from other lines, so its numbers are kept.
        bxpstats = list(bxpstats)
        drawn = original(self, bxpstats, positions, *more, **named)
        places = range(1, len(bxpstats) + 1) if positions is None else positions
        flat = named.get("orientation") == "horizontal" or named.get("vert") is False
        boxes = self.__dict__.setdefault("_denizen_boxes", {})
        boxes.update((float(place), (box, flat)) for place, box in zip(places, bxpstats))
        return drawn

    bxp.__doc__ = original.__doc__
    module.Axes.bxp = bxp


def figures_imported(module):
    # A method, since the inline backend forgets what was registered for figures.
    module.Figure._denizen_chart_ = chart_of


def frames_imported(module):
    module.DataFrame._denizen_data_ = table


def images_imported(module):
    from IPython.display import display

    save = module.Image.save

    def show(self, *_, **__):
        display(self)

    def save_and_show(self, *args, **named):
        done = save(self, *args, **named)
        # Libraries save to buffers for themselves; a file is the user's.
        if args and isinstance(args[0], (str, os.PathLike)):
            display(self)
        return done

    module.Image.show = show
    module.Image.save = save_and_show


class OnImport:
    waiting = {
        "matplotlib.axes._axes": axes_imported,
        "matplotlib.figure": figures_imported,
        "PIL.Image": images_imported,
        "pandas.core.frame": frames_imported,
    }

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name not in cls.waiting:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return spec
        changed, run = cls.waiting.pop(name), spec.loader.exec_module

        def exec_module(module):
            run(module)
            try:
                changed(module)
            except Exception:
                pass  # another version of the library: it stays as it is

        spec.loader.exec_module = exec_module
        return spec


# The environment


replaced = {}


def environ(new):
    for name, value in new.items():
        replaced[name] = os.environ.get(name)
        os.environ[name] = value


def environ_back():
    while replaced:
        name, value = replaced.popitem()
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


# The pace


class Pace:
    """Lets a kernel be only so far ahead of its client.

    Jupyter's channel for output drops messages when it is full, and a message
    may be of any size. So after each STEP printed the kernel asks to be told
    that all of it has arrived, and waits.
    """

    STEP = 256 * 1024
    # What is handed on at once.
    PIECE = 64 * 1024
    # A message costs something however short it is.
    MESSAGE = 1024

    def __init__(self, kernel, told):
        self.kernel, self.told = kernel, told
        self.lock = threading.RLock()
        self.ahead = self.asked = 0
        self.owner = os.getpid()

    def went(self, size, flush=None):
        if os.getpid() != self.owner:
            return
        with self.lock:
            self.ahead += size
            if self.ahead < self.STEP:
                return
            self.ahead = 0
            if flush:
                flush()
            self.asked += 1
            self.kernel.session.send(
                self.kernel.iopub_socket, "denizen_pace", content={"number": self.asked}
            )
            heard = 0
            while heard < self.asked:
                answer = os.read(self.told, 8)
                if len(answer) < 8:
                    return  # nobody reads any more
                (heard,) = struct.unpack("<q", answer)

    def watch(self, stream):
        write, flush = stream.write, stream.flush

        def paced_write(text):
            if not isinstance(text, str):
                return write(text)  # raises what it raises
            if not text.isascii():
                # Half a character cannot be sent: it is written out.
                text = text.encode("utf-8", "backslashreplace").decode("utf-8")
            for at in range(0, len(text), self.PIECE):
                piece = text[at : at + self.PIECE]
                write(piece)
                self.went(len(piece), flush)
            return len(text)

        def paced_flush():
            flush()
            self.went(self.MESSAGE)

        stream.write, stream.flush = paced_write, paced_flush

    def displayed(self, message):
        data = message.get("content", {}).get("data", {})
        size = sum(len(value) for value in data.values() if isinstance(value, (str, bytes)))
        self.went(self.MESSAGE + size)
        return message


def whole(pack):
    """A session's `pack` for text of every kind: half a character is written out."""

    def packed(value):
        try:
            return pack(value)
        except UnicodeEncodeError:
            text = json.dumps(value, default=str, ensure_ascii=False)
            return re.sub("[\ud800-\udfff]", lambda half: f"\\\\u{ord(half[0]):x}", text).encode()

    return packed


def begin(told):
    os.set_inheritable(told, False)
    shell = get_ipython()
    shell.kernel.session.pack = whole(shell.kernel.session.pack)
    formatters = shell.display_formatter.formatters
    for kind in (Data, Chart, Json):
        formatter = kind(parent=shell.display_formatter)
        formatters[formatter.format_type] = formatter
    sys.meta_path.insert(0, OnImport)
    if hasattr(shell, "_tee"):
        # Newer versions of IPython keep all that is printed, for as long as they run.
        shell._tee = lambda channel: contextlib.nullcontext()
    pace = Pace(shell.kernel, told)
    pace.watch(sys.stdout)
    pace.watch(sys.stderr)
    shell.display_pub.register_hook(pace.displayed)
'''


class Refused(Exception):
    """A request that is answered with a status and a message."""

    def __init__(self, status, message):
        super().__init__(message)
        self.status = status
        self.message = message


class KernelLost(Exception):
    """The kernel is gone in the middle of something: it died or was ended."""

    def __init__(self, name, message):
        super().__init__(message)
        self.name = name


def jupyter():
    """The libraries, looked for each time: they may be installed while we run."""
    importlib.invalidate_caches()
    try:
        importlib.import_module("ipykernel")
        importlib.import_module("zmq")
        return importlib.import_module("jupyter_client")
    except ImportError as error:
        raise Refused(
            501,
            f"there is no Jupyter kernel in this sandbox ({error}): "
            "install ipykernel and jupyter_client in the image",
        ) from None


def kernel_for(language):
    """The language's plain name, and the name of the kernel that runs it or None for `Shell`."""
    wanted = language.lower()
    wanted = ALIASES.get(wanted, wanted)
    own = {"bash"} if shutil.which("bash") else set()
    try:
        specs = jupyter().kernelspec.KernelSpecManager().get_all_specs()
    except Refused:
        if wanted in own:
            return wanted, None
        raise
    speaks = {
        name: ALIASES.get(spec["spec"].get("language", "").lower(), spec["spec"].get("language", "").lower())
        for name, spec in specs.items()
    }
    preferred = "python3" if wanted == "python" else wanted
    fitting = sorted(name for name in speaks if name.lower() == wanted or speaks[name] == wanted)
    if preferred in fitting:
        return wanted, preferred
    if fitting:
        return wanted, fitting[0]
    if wanted in own:
        return wanted, None
    there = ", ".join(sorted({*speaks.values(), *speaks, *own})) or "none"
    raise Refused(400, f"no kernel for the language '{language}' is installed; there are: {there}")


def shell_quoted(text):
    return "'" + text.replace("'", "'\\''") + "'"


# For each language how a variable of the environment is set, and removed.
SETTERS = {
    "bash": (
        lambda name, value: f"export {name}={shell_quoted(value)}",
        lambda name: f"unset {name}",
    ),
    "javascript": (
        lambda name, value: f"process.env[{json.dumps(name)}] = {json.dumps(value)};",
        lambda name: f"delete process.env[{json.dumps(name)}];",
    ),
    "deno": (
        lambda name, value: f"Deno.env.set({json.dumps(name)}, {json.dumps(value)});",
        lambda name: f"Deno.env.delete({json.dumps(name)});",
    ),
    "r": (
        lambda name, value: f"Sys.setenv({json.dumps(name)} = {json.dumps(value)})",
        lambda name: f"Sys.unsetenv({json.dumps(name)})",
    ),
    "java": (
        lambda name, value: f"System.setProperty({json.dumps(name)}, {json.dumps(value)});",
        lambda name: f"System.clearProperty({json.dumps(name)});",
    ),
}
SETTERS["typescript"] = SETTERS["javascript"]


def environment_code(language, variables):
    """Code that sets the variables, and code that takes them back."""
    if not variables:
        return None, None
    if language == "python":
        module = "__import__('sys').modules['_denizen']"
        return f"{module}.environ({variables!r})", f"{module}.environ_back()"
    if language not in SETTERS:
        raise Refused(400, f"environment variables cannot be set for the language '{language}'")
    set_one, remove_one = SETTERS[language]
    # A kernel began with this program's environment, and goes back to it.
    return (
        "\n".join(set_one(name, value) for name, value in variables.items()),
        "\n".join(
            set_one(name, os.environ[name]) if name in os.environ else remove_one(name)
            for name in variables
        ),
    )


class Kernel:
    """One kernel's process and its channels; used by one thread only."""

    def __init__(self, language, name, cwd, unwanted):
        import zmq

        self._zmq = zmq
        self._unwanted = unwanted
        # The file with the kernel's key is kept out of the user's home.
        self._files = tempfile.mkdtemp(prefix="interpreter-")
        self._manager = jupyter().KernelManager(
            kernel_name=name, connection_file=os.path.join(self._files, "kernel.json")
        )
        self._session = self._manager.session
        self._sockets = []
        hears, self._tell = os.pipe()
        try:
            try:
                self._manager.start_kernel(cwd=cwd, pass_fds=(hears,))
            finally:
                os.close(hears)
            # Plain sockets: the library's own are for asyncio in some versions.
            self._shell = self._connect(zmq.DEALER, self._manager.shell_port)
            self._output = self._connect(zmq.SUB, self._manager.iopub_port)
            self._output.subscribe(b"")
            self._wait_until_ready()
            if language == "python":
                self._teach(hears)
        except BaseException:
            self.close()
            raise

    def _connect(self, kind, port):
        made = self._zmq.Context.instance().socket(kind)
        self._sockets.append(made)
        made.linger = 0
        made.connect(f"{self._manager.transport}://{self._manager.ip}:{port}")
        return made

    def _wait_until_ready(self):
        # Ready when it answers, and when what it publishes reaches us too.
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            sent = self._request("kernel_info_request", {})
            while self._shell.poll(LOOK_SECONDS * 1000):
                _, message = self._session.recv(self._shell)
                if message["parent_header"].get("msg_id") == sent:
                    if self._output.poll(LOOK_SECONDS * 1000):
                        return
                    break
            if not self.alive():
                raise RuntimeError("it ended at once")
            if self._unwanted():
                raise RuntimeError("nobody wants it any more")
        raise RuntimeError(f"it was not ready in {START_SECONDS} seconds")

    def _request(self, kind, content):
        return self._session.send(self._shell, kind, content)["header"]["msg_id"]

    def _teach(self, hears):
        # One expression: no name of it is left among the user's. It is evaluated after an
        # execution, as IPython puts the streams back that it finds at the beginning of one.
        expression = (
            "(lambda module: (exec(" + repr(IN_KERNEL) + ", module.__dict__), "
            "__import__('sys').modules.__setitem__('_denizen', module), "
            f"module.begin({hears})))(__import__('types').ModuleType('_denizen'))"
        )
        reply = self.reply(self.send("", silent=True, expressions={"begun": expression}))
        begun = reply.get("user_expressions", {}).get("begun", reply)
        if begun.get("status") != "ok":
            raise RuntimeError(f"it did not take its extension: {begun.get('evalue')}")

    def send(self, code, silent=False, expressions=None):
        return self._request(
            "execute_request",
            {
                "code": code,
                "silent": silent,
                "store_history": not silent,
                "user_expressions": expressions or {},
                "allow_stdin": False,
                "stop_on_error": False,
            },
        )

    def receive(self, wake, seconds):
        """The next message, or None when `wake` can be read or time is over."""
        poller = self._zmq.Poller()
        poller.register(self._output, self._zmq.POLLIN)
        poller.register(wake, self._zmq.POLLIN)
        ready = dict(poller.poll(None if seconds is None else seconds * 1000))
        if wake in ready:
            os.read(wake, 4096)
        if self._output not in ready:
            return None
        _, message = self._session.recv(self._output)
        if message and message["msg_type"] == "denizen_pace":
            # Whatever was printed before has been handed on.
            os.write(self._tell, int(message["content"]["number"]).to_bytes(8, "little"))
            return None
        return message

    def reply(self, sent):
        """The kernel's answer to a request, which ends it."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self.alive():
            if self._shell.poll(LOOK_SECONDS * 1000):
                _, message = self._session.recv(self._shell)
                if message and message["parent_header"].get("msg_id") == sent:
                    return message["content"]
        return {"status": "error", "evalue": "no answer"}

    def alive(self):
        return self._manager.is_alive()

    def interrupt(self):
        self._manager.interrupt_kernel()

    def close(self):
        for one in self._sockets:
            one.close()
        try:
            if self._manager.has_kernel:
                self._manager.shutdown_kernel(now=True)
        finally:
            os.close(self._tell)
            shutil.rmtree(self._files, ignore_errors=True)


class Shell:
    """A bash that remembers, for who has no kernel of it; used as a `Kernel` is.

    It is an interactive one, as only those go on after an interrupt. It reads
    two lines from us for each piece of code: one that runs it, and one that
    tells the number of the piece and how it ended.
    """

    # What a pipe holds: one read of so much empties it.
    PIPE = 64 * 1024
    ARGUMENTS = ("--noprofile", "--norc", "--noediting", "+o", "history", "-i")

    def __init__(self, cwd):
        self._cwd = cwd
        # The code is in a file, as a pipe is read by bytes.
        self._code = tempfile.TemporaryFile()
        self._sent = self._count = 0
        self._running = False
        self._messages = collections.deque()
        self._start()

    def _start(self):
        self._told, self._tell = os.pipe()
        errors, prints_errors = os.pipe()
        self._fds = [self._told, errors]
        try:
            self._process = subprocess.Popen(
                ["bash", *self.ARGUMENTS],
                cwd=self._cwd,
                env={**os.environ, "PS1": "", "PS2": ""},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,  # it complains of having no terminal
                pass_fds=(self._tell, prints_errors, self._code.fileno()),
                start_new_session=True,
            )
        except BaseException:
            self._close_fds()
            raise
        finally:
            os.close(self._tell)
            os.close(prints_errors)
        self._streams = {
            fd: (name, codecs.getincrementaldecoder("utf-8")("replace"))
            for fd, name in ((self._process.stdout.fileno(), "stdout"), (errors, "stderr"))
        }
        self._open = {self._told, *self._streams}
        self._line(f"exec 2>&{prints_errors} {prints_errors}>&-; unset PS1 PS2")

    def _line(self, line):
        try:
            os.write(self._process.stdin.fileno(), line.encode() + b"\n")
        except BrokenPipeError:
            pass  # it has ended, as by the line before: `_look` tells

    def _message(self, kind, **content):
        self._messages.append(
            {"msg_type": kind, "parent_header": {"msg_id": self._sent}, "content": content}
        )

    def send(self, code, silent=False):
        self._code.seek(0)
        self._code.truncate()
        self._code.write(code.encode())
        self._code.flush()
        self._sent += 1
        self._running = True
        if not silent:
            self._count += 1
            self._message("execute_input", execution_count=self._count)
        file = self._code.fileno()
        self._line(f'eval "$(</dev/fd/{file})" </dev/null {file}<&- {self._tell}>&-')
        self._ask_how_it_ended()
        return self._sent

    def _ask_how_it_ended(self):
        # First a new line, as an interrupt may have left half of one. `set -x` tells nothing of ours.
        self._line(f"\n{{ builtin echo {self._sent} $? >&{self._tell}; }} 2>/dev/null")

    def receive(self, wake, seconds):
        """The next message, or None when `wake` can be read or time is over."""
        if not self._messages:
            self._look(wake, seconds)
        return self._messages.popleft() if self._messages else None

    def _look(self, wake, seconds):
        poller = select.poll()
        for fd in (wake, *self._open):
            poller.register(fd, select.POLLIN)
        ready = {fd for fd, _ in poller.poll(None if seconds is None else seconds * 1000)}
        if wake in ready:
            os.read(wake, 4096)
        for fd in self._streams.keys() & ready:
            self._hand_on(fd, os.read(fd, self.PIPE))
        if self._told in ready:
            told = os.read(self._told, self.PIPE)
            if not told:
                self._open.discard(self._told)  # it has ended, or is another program now
            for line in told.splitlines():
                number, status = map(int, line.split())
                if number == self._sent:
                    self._finished(status)
        if self._running and self._process.poll() is not None:
            # It ended itself, by `exit` most likely: the next one knows nothing of it.
            self._finished(self._process.returncode)
            self._end()
            self._start()

    def _hand_on(self, fd, raw, final=False):
        name, decoder = self._streams[fd]
        if not raw and not final:
            self._open.discard(fd)
        text = decoder.decode(raw, final)
        if text:
            self._message("stream", name=name, text=text)

    def _finished(self, status):
        self._running = False
        for fd in self._streams:
            # What the code printed is in the pipe by now; its children may print for ever.
            printed = select.select([fd], [], [], 0)[0]
            self._hand_on(fd, os.read(fd, self.PIPE) if printed else b"", final=True)
        if status:
            value = str(status if status > 0 else 128 - status)
            self._message("error", ename="", evalue=value, traceback=[])
        self._message("status", execution_state="idle")

    def reply(self, _):
        return {}  # its last message has told all

    def alive(self):
        return self._running or self._process.poll() is None

    def interrupt(self):
        os.killpg(self._process.pid, signal.SIGINT)
        # It drops the line that it reads, and that may be the one that tells the end.
        if select.select([], [self._process.stdin], [], 0)[1]:
            self._ask_how_it_ended()

    def _end(self):
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()
        self._close_fds()

    def _close_fds(self):
        while self._fds:
            os.close(self._fds.pop())

    def close(self):
        self._end()
        self._code.close()


class Output:
    """What was made of an execution and waits for its client. Bounded."""

    def __init__(self):
        self._changed = threading.Condition()
        self._lines = []
        self._size = 0
        self._ended = False
        self.gone = False

    def put(self, event, hurried=lambda: False):
        """Adds a line; waits while there are too many, unless `hurried()`."""
        line = json.dumps(event).encode() + b"\n"
        with self._changed:
            while self._size >= MAX_WAITING and not self.gone and not hurried():
                self._changed.wait(LOOK_SECONDS)
            if not self.gone:
                self._lines.append(line)
                self._size += len(line)
                self._changed.notify_all()

    def end(self):
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def leave(self):
        """The client went away: nothing is kept for it any more."""
        with self._changed:
            self.gone = True
            self._lines.clear()
            self._changed.notify_all()

    def take(self, seconds):
        """All lines there are; b"" when there is none in time, None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._lines or self._ended, seconds)
            lines = b"".join(self._lines)
            self._lines.clear()
            self._size = 0
            self._changed.notify_all()
            return None if self._ended and not lines else lines


Job = collections.namedtuple("Job", "code before after output")


def error(name, value, traceback=""):
    return {"type": "error", "name": name, "value": value, "traceback": traceback}


def event_of(kind, content):
    """A kernel's message as the SDKs read it, or None."""
    if kind == "stream":
        return {"type": content["name"], "text": content["text"], "timestamp": time.time_ns()}
    if kind == "execute_input":
        return {"type": "number_of_executions", "execution_count": content["execution_count"]}
    if kind == "error":
        return error(content["ename"], content["evalue"], "\n".join(content["traceback"]))
    if kind in ("display_data", "execute_result"):
        result = {"type": "result", "is_main_result": kind == "execute_result"}
        extra = {}
        for mime, value in content["data"].items():
            if mime in FORMATS:
                result[FORMATS[mime]] = value
            else:
                extra[mime] = value
        if extra:
            result["extra"] = extra
        # The clients show a string as it is, not as Python writes it.
        text = result.get("text")
        if isinstance(text, str) and len(text) > 1 and text[0] == text[-1] == "'":
            result["text"] = text[1:-1]
        return result
    return None


class Context:
    """A kernel, the thread it belongs to, and the line of jobs before it."""

    def __init__(self, language, kernel_name, cwd):
        self.id = str(uuid.uuid4())
        self.language = language
        self.cwd = cwd
        self._kernel_name = kernel_name
        self._kernel = None
        self._lock = threading.Lock()
        self._jobs = collections.deque()
        # Those who wait for a new kernel: each gets None or what went wrong.
        self._restarts = []
        self._stopping = self._ended = False
        self._wake, self._waker = os.pipe()
        os.set_blocking(self._waker, False)
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def describe(self):
        return {"id": self.id, "language": self.language, "cwd": self.cwd}

    def execute(self, code, variables):
        job = Job(code, *environment_code(self.language, variables), Output())
        with self._lock:
            if self._stopping:
                raise Refused(404, f"context {self.id} not found")
            self._jobs.append(job)
        self.wake()
        return job.output

    def ready(self):
        """Waits until there is a kernel; the error of its start, if there is none."""
        return self._ask(fresh=False)

    def restart(self):
        """A new kernel, whatever the old one does; all jobs before it fail."""
        return self._ask(fresh=True)

    def _ask(self, fresh):
        answer = {"fresh": fresh, "error": None, "done": threading.Event()}
        with self._lock:
            if self._stopping:
                raise Refused(404, f"context {self.id} not found")
            self._restarts.append(answer)
        self.wake()
        answer["done"].wait()
        return answer["error"]

    def leave(self):
        """Begins to end it."""
        self._stopping = True
        self.wake()

    def stop(self):
        self.leave()
        self._thread.join()

    def wake(self):
        with self._lock:
            if self._ended:
                return
            try:
                os.write(self._waker, b"\0")
            except BlockingIOError:
                pass  # it is awake

    def _hurried(self):
        return self._stopping or any(one["fresh"] for one in self._restarts)

    def _work(self):
        try:
            self._renew()
            while not self._stopping:
                if self._restarts:
                    self._answer_restarts()
                    continue
                with self._lock:
                    job = self._jobs.popleft() if self._jobs else None
                if job:
                    self._serve(job)
                elif self._kernel:
                    # Waits; what threads print between executions is dropped.
                    self._kernel.receive(self._wake, None)
                else:
                    os.read(self._wake, 4096)
        finally:
            with self._lock:
                self._stopping = True
                left = list(self._jobs)
                for answer in self._restarts:
                    answer["error"] = "the context was removed"
                    answer["done"].set()
            for job in left:
                self._fail(job, "ContextRemoved", "the context was removed")
            self._drop()
            with self._lock:
                self._ended = True
                os.close(self._wake)
                os.close(self._waker)

    def _renew(self):
        """A new kernel; the message of what went wrong, or None."""
        self._drop()
        try:
            if self._kernel_name is None:
                self._kernel = Shell(self.cwd)
            else:
                unwanted = lambda: self._stopping
                self._kernel = Kernel(self.language, self._kernel_name, self.cwd, unwanted)
            return None
        except Exception as failed:  # kernels of others fail in their own ways
            return f"the kernel '{self._kernel_name or self.language}' did not start: {failed}"

    def _drop(self):
        kernel, self._kernel = self._kernel, None
        if kernel:
            try:
                kernel.close()
            except Exception as failed:
                print(f"kernel of {self.id}: {failed}", file=sys.stderr)

    def _answer_restarts(self):
        with self._lock:
            answers, self._restarts = self._restarts, []
            fresh = any(one["fresh"] for one in answers)
            left = []
            if fresh:
                left, self._jobs = list(self._jobs), collections.deque()
        for job in left:
            self._fail(job, "KernelRestarted", "the context was restarted before this ran")
        failed = self._renew() if fresh or not self._kernel else None
        for answer in answers:
            answer["error"] = failed
            answer["done"].set()

    def _fail(self, job, name, value):
        job.output.put(error(name, value), hurried=lambda: True)
        job.output.end()

    def _serve(self, job):
        if job.output.gone:
            return
        if not self._kernel:
            failed = self._renew()
            if failed:
                return self._fail(job, "KernelNotStarted", failed)
        if not self._kernel.alive():
            failed = self._renew()
            value = "the kernel had died before this ran: its variables are lost"
            return self._fail(job, DIED, failed or value)
        try:
            if job.before:
                self._run(job.before)
            reply = self._run(job.code, job.output)
            leaves = any(one.get("source") == "ask_exit" for one in reply.get("payload", ()))
            if job.after and not leaves:
                self._run(job.after)
            job.output.put({"type": "end_of_execution"}, self._hurried)
            if leaves:
                self._renew()  # `exit()` was called: the kernel ends in a moment
        except KernelLost as lost:
            job.output.put(error(lost.name, str(lost)), hurried=lambda: True)
            if lost.name == DIED:
                self._renew()
        except Exception as failed:  # whatever it was, the next one finds a kernel that works
            job.output.put(error("KernelFailed", str(failed)), hurried=lambda: True)
            self._renew()
        finally:
            job.output.end()

    def _run(self, code, output=None):
        """Runs a piece of code to its end, and gives the reply; without an output it is ours."""
        kernel = self._kernel
        sent = kernel.send(code, silent=output is None)
        interrupt_at = 0
        while True:
            message = kernel.receive(self._wake, LOOK_SECONDS)
            if self._hurried():
                raise KernelLost("KernelRestarted", "the context was restarted while this ran")
            # An interrupt may come before the kernel began, so once is not enough.
            if output and output.gone and time.monotonic() >= interrupt_at:
                kernel.interrupt()
                interrupt_at = time.monotonic() + 1
            if message is None:
                if not kernel.alive():
                    raise KernelLost(
                        DIED, "the kernel died while this ran: its variables are lost"
                    )
                continue
            if message["parent_header"].get("msg_id") != sent:
                continue
            kind, content = message["msg_type"], message["content"]
            if kind == "status" and content["execution_state"] == "idle":
                break
            event = event_of(kind, content) if output else None
            if event:
                output.put(event, self._hurried)
        return kernel.reply(sent)


class Interpreter:
    """All contexts. Those without a client's id are each language's default."""

    def __init__(self):
        self._lock = threading.Lock()
        self._contexts = {}
        self._defaults = {}
        # Where contexts begin that say nothing: not whoever runs this has its home there.
        self.home = os.getcwd()

    def begin(self):
        try:
            self.default("python")
        except Refused as refused:
            print(refused.message, file=sys.stderr)

    def default(self, language):
        language, kernel = kernel_for(language)
        with self._lock:
            found = self._contexts.get(self._defaults.get(language))
            if not found:
                found = Context(language, kernel, self.home)
                self._contexts[found.id] = found
                self._defaults[language] = found.id
            return found

    def create(self, language, cwd):
        language, kernel = kernel_for(language or "python")
        cwd = os.path.join(self.home, cwd or "")
        cwd = os.path.normpath(cwd)
        try:
            os.makedirs(cwd, exist_ok=True)
            if not os.access(cwd, os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), cwd)
        except (OSError, ValueError) as failed:
            raise Refused(400, f"cwd cannot be used: {failed}") from None
        made = Context(language, kernel, cwd)
        # Known before it is ready, so that it ends with all others.
        with self._lock:
            self._contexts[made.id] = made
        failed = made.ready()
        if failed:
            with self._lock:
                self._contexts.pop(made.id, None)
            made.stop()
            raise Refused(500, failed)
        return made

    def get(self, id):
        with self._lock:
            if id not in self._contexts:
                raise Refused(404, f"context {id} not found")
            return self._contexts[id]

    def list(self):
        with self._lock:
            there = [one.describe() for one in self._contexts.values()]
        if not there:
            jupyter()  # it says why there is none
        return there

    def remove(self, id):
        with self._lock:
            found = self._contexts.pop(id, None)
        if not found:
            raise Refused(404, f"context {id} not found")
        found.stop()

    def stop(self):
        with self._lock:
            contexts, self._contexts = list(self._contexts.values()), {}
        for context in contexts:
            context.leave()
        for context in contexts:
            context.stop()


def field(body, name, kind, default=None):
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, kind):
        raise Refused(400, f"'{name}' is not of the right type")
    return value


def variables_of(body):
    variables = field(body, "env_vars", dict, {})
    for name, value in variables.items():
        if not isinstance(value, str) or "\0" in value:
            raise Refused(400, f"the environment variable '{name}' is no text")
        if not name.isascii() or not name.isidentifier():
            raise Refused(400, f"'{name}' is no name of an environment variable")
    return variables


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_):
        pass

    def do_GET(self):
        self._answer("GET")

    def do_POST(self):
        self._answer("POST")

    def do_DELETE(self):
        self._answer("DELETE")

    def _answer(self, method):
        interpreter = self.server.interpreter
        parts = [part for part in self.path.split("?")[0].split("/") if part]
        try:
            body = self._body()
            if (method, parts) == ("GET", ["health"]):
                return self._send(200, {"status": "ok"})
            if (method, parts) == ("POST", ["execute"]):
                return self._execute(interpreter, body)
            if (method, parts) == ("GET", ["contexts"]):
                return self._send(200, interpreter.list())
            if (method, parts) == ("POST", ["contexts"]):
                made = interpreter.create(field(body, "language", str), field(body, "cwd", str))
                return self._send(200, made.describe())
            if method == "DELETE" and parts[:1] == ["contexts"] and len(parts) == 2:
                interpreter.remove(parts[1])
                return self._send(204)
            if method == "POST" and parts[:1] == ["contexts"] and parts[2:] == ["restart"]:
                failed = interpreter.get(parts[1]).restart()
                if failed:
                    raise Refused(500, failed)
                return self._send(204)
            raise Refused(404, f"there is no {method} {self.path}")
        except Refused as refused:
            self._send(refused.status, {"code": refused.status, "message": refused.message})
        except OSError:
            self.close_connection = True  # the client went away

    def _body(self):
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            raw = self._chunks()
        else:
            length = self.headers.get("Content-Length", "0")
            if not length.isdecimal():
                self._unreadable(400, "Content-Length is no number")
            self._fits(int(length))
            raw = self.rfile.read(int(length))
        if not raw:
            return {}
        try:
            body = json.loads(raw)
        except ValueError as failed:
            raise Refused(400, f"the body is no JSON: {failed}") from None
        if not isinstance(body, dict):
            raise Refused(400, "the body is no JSON object")
        return body

    def _chunks(self):
        raw = b""
        while True:
            line = self.rfile.readline(1024).split(b";")[0].strip()
            try:
                size = int(line, 16)
            except ValueError:
                self._unreadable(400, "the body's chunks cannot be read")
            self._fits(len(raw) + size)
            if size == 0:
                while self.rfile.readline(65536).strip():
                    pass
                return raw
            raw += self.rfile.read(size)
            self.rfile.readline(1024)

    def _fits(self, size):
        if not 0 <= size <= MAX_BODY:
            self._unreadable(413, f"a request may have {MAX_BODY} bytes")

    def _unreadable(self, status, message):
        # Where the next request begins is not known.
        self.close_connection = True
        raise Refused(status, message)

    def _send(self, status, body=None):
        raw = b"" if body is None else json.dumps(body).encode()
        self.send_response(status)
        if status != 204:
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(raw)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(raw)

    def _execute(self, interpreter, body):
        code = field(body, "code", str)
        if code is None:
            raise Refused(400, "'code' is missing")
        try:
            code.encode()
        except UnicodeEncodeError:
            raise Refused(400, "'code' is not Unicode text") from None
        id, language = field(body, "context_id", str), field(body, "language", str)
        if id and language:
            raise Refused(400, "a context has its language already: give one of the two")
        variables = variables_of(body)
        context = interpreter.get(id) if id else interpreter.default(language or "python")
        output = context.execute(code, variables)
        try:
            self.send_response(200)
            self.send_header("Content-Type", "application/x-ndjson")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            while True:
                lines = output.take(CLIENT_SECONDS)
                if lines is None:
                    break
                if lines:
                    self.wfile.write(b"%x\r\n%b\r\n" % (len(lines), lines))
                elif self._left():
                    raise ConnectionResetError
            self.wfile.write(b"0\r\n\r\n")
        finally:
            output.leave()
            context.wake()

    def _left(self):
        try:
            return not self.connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request, client_address):
        # A client that goes away is nothing to tell; the rest is a fault of ours.
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


def main():
    # Whichever thread the kernel gives a signal to, this one is told, and misses none: one that
    # comes in the moment before it would wait is there to be read.
    hears, tells = os.pipe()
    os.set_blocking(tells, False)
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.set_wakeup_fd(tells)
    with Server(("0.0.0.0", int(os.environ.get("PORT") or PORT)), Handler) as server:
        server.interpreter = Interpreter()
        server.interpreter.begin()
        # It sleeps while nobody asks.
        threading.Thread(target=server.serve_forever, args=(None,), daemon=True).start()
        try:
            os.read(hears, 1)
        finally:
            server.interpreter.stop()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        pass
