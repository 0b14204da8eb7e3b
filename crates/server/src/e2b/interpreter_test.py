"""Tests of `interpreter.py`, as the SDKs use it: `python3 interpreter_test.py`.

They need ipykernel, matplotlib and pandas. PIL is used where it is there.
"""

import base64
import concurrent.futures
import ctypes
import http.client
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import types
import unittest

SOURCE = pathlib.Path(__file__).with_name("interpreter.py").read_text()

# A kernel of another language than Python.
SHELL_KERNEL = """
import subprocess
from ipykernel.kernelapp import IPKernelApp
from ipykernel.kernelbase import Kernel

class Shell(Kernel):
    implementation = language = "bash"
    implementation_version = language_version = banner = "1"
    language_info = {"name": "bash", "mimetype": "text/x-sh", "file_extension": ".sh"}
    kept = ""

    def do_execute(self, code, silent, store_history=True, user_expressions=None, allow_stdin=False):
        if silent:
            Shell.kept = code if code.startswith("export") else ""
        else:
            out = subprocess.run(["sh", "-c", Shell.kept + "\\n" + code], capture_output=True, text=True)
            self.send_response(self.iopub_socket, "stream", {"name": "stdout", "text": out.stdout})
        return {"status": "ok", "execution_count": self.execution_count, "payload": [], "user_expressions": {}}

IPKernelApp.launch_instance(kernel_class=Shell)
"""


def free_port():
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]


class Program:
    """The program as the daemon starts it, in a home of its own."""

    def __init__(self, python_flags=(), shell_kernel=False, **env):
        self.files = tempfile.TemporaryDirectory()
        self.home = os.path.join(self.files.name, "home")
        os.mkdir(self.home)
        if shell_kernel:
            shell = pathlib.Path(self.files.name, "jupyter", "kernels", "bash")
            shell.mkdir(parents=True)
            (shell / "kernel.py").write_text(SHELL_KERNEL)
            argv = [sys.executable, str(shell / "kernel.py"), "-f", "{connection_file}"]
            spec = {"argv": argv, "display_name": "Shell", "language": "bash"}
            (shell / "kernel.json").write_text(json.dumps(spec))
        self.port = free_port()
        env = {
            "PATH": os.environ["PATH"],
            "HOME": self.home,
            "PORT": str(self.port),
            "JUPYTER_PATH": os.path.join(self.files.name, "jupyter"),
            "OF_THE_SANDBOX": "kept",
            **env,
        }
        self.process = subprocess.Popen([sys.executable, *python_flags, "-c", SOURCE], env=env, cwd=self.home)
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port)).close()
                return
            except ConnectionRefusedError:
                assert self.process.poll() is None, "the program ended"
                time.sleep(0.02)  # it has no other way to say that it listens

    def close(self):
        self.process.terminate()
        assert self.process.wait(20) == 0
        self.files.cleanup()

    def connect(self):
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)

    def call(self, method, path, body=None):
        connection = self.connect()
        raw = None if body is None else json.dumps(body)
        connection.request(method, path, raw, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        text = answer.read()
        connection.close()
        return answer.status, json.loads(text) if text else None

    def start(self, code, **more):
        """Begins an execution: its connection, and the answer to read lines from."""
        connection = self.connect()
        connection.request("POST", "/execute", json.dumps({"code": textwrap.dedent(code), **more}))
        answer = connection.getresponse()
        assert answer.status == 200, answer.read()
        return connection, answer

    def run(self, code, **more):
        connection, answer = self.start(code, **more)
        events = [json.loads(line) for line in answer]
        connection.close()
        return Events(events)


def children(pid, name):
    """Those of a process's that are of a program."""
    found = subprocess.run(["pgrep", "-P", str(pid), "-x", name], capture_output=True, text=True)
    return found.stdout.split()


class Events(list):
    def of(self, kind):
        return [event for event in self if event["type"] == kind]

    def text(self, kind="stdout"):
        return "".join(event["text"] for event in self.of(kind))

    @property
    def result(self):
        (main,) = [event for event in self.of("result") if event["is_main_result"]]
        return main["text"]

    @property
    def error(self):
        (error,) = self.of("error")
        return error


class Shared(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.program = Program()
        cls.run_code = cls.program.run
        cls.call = cls.program.call

    @classmethod
    def tearDownClass(cls):
        cls.program.close()


class Execution(Shared):
    def test_health(self):
        self.assertEqual(self.call("GET", "/health")[0], 200)

    def test_state_is_kept(self):
        self.run_code("x = 20")
        self.assertEqual(self.run_code("x += 1; x").result, "21")

    def test_events_of_one_execution(self):
        events = self.run_code("import sys; print('a'); print('b', file=sys.stderr); 3")
        self.assertEqual(events.text(), "a\n")
        self.assertEqual(events.text("stderr"), "b\n")
        self.assertIsInstance(events.of("stdout")[0]["timestamp"], int)
        self.assertEqual(events.result, "3")
        self.assertEqual(events[-1], {"type": "end_of_execution"})

    def test_executions_are_counted_and_ours_are_not(self):
        count = lambda events: events.of("number_of_executions")[0]["execution_count"]
        first = count(self.run_code("1"))
        self.assertEqual(count(self.run_code("1", env_vars={"A": "b"})), first + 1)
        self.assertEqual(count(self.run_code("1")), first + 2)

    def test_no_names_are_left_to_the_user(self):
        names = self.run_code("[n for n in globals() if not n.startswith('_') or 'denizen' in n]").result
        for name in ("module", "begin", "denizen", "Pace", "plain"):
            self.assertNotIn(repr(name), names)

    def test_an_error(self):
        error = self.run_code("def f():\n    return 1 / 0\nf()").error
        self.assertEqual(error["name"], "ZeroDivisionError")
        self.assertEqual(error["value"], "division by zero")
        self.assertIn("return", error["traceback"])

    def test_after_an_error_the_next_runs(self):
        self.run_code("raise ValueError")
        self.assertEqual(self.run_code("import os; os.environ['A_B']", env_vars={"A_B": "c"}).result, "c")

    def test_strings_and_indented_code(self):
        self.assertEqual(self.run_code("'it is'").result, "it is")
        self.assertEqual(self.run_code("  y = 1\n  y").result, "1")

    def test_text_of_every_kind_passes(self):
        events = self.run_code(r"print('ž→😀\ud800')")
        self.assertEqual(events.text(), "ž→😀\\ud800\n")
        self.assertEqual(self.run_code(r"raise ValueError('ž\ud800')").error["value"], "ž\\ud800")
        (result,) = self.run_code(r"display({'text/html': '\ud800'}, raw=True)").of("result")
        self.assertEqual(result["html"], "\\ud800")

    def test_code_that_ends_its_kernel_gets_another_one(self):
        self.assertEqual(self.run_code("x = 1; exit()").of("error"), [])
        self.assertEqual(self.run_code("'x' in globals()").result, "False")
        self.run_code("x = 1")
        self.assertEqual(self.run_code("import sys; sys.exit(3)").error["name"], "SystemExit")
        self.assertEqual(self.run_code("x").result, "1")

    def test_a_process_prints(self):
        self.assertIn("hi", self.run_code("!echo hi").text())

    def test_there_is_no_input(self):
        self.assertEqual(self.run_code("input()").error["name"], "StdinNotImplementedError")

    def test_the_environment_is_for_one_execution(self):
        code = "import os; [os.environ.get(n) for n in ('OF_THE_SANDBOX', 'NEW')]"
        changed = self.run_code(code, env_vars={"OF_THE_SANDBOX": "other", "NEW": "it's"})
        self.assertEqual(changed.result, "['other', \"it's\"]")
        self.assertEqual(self.run_code(code).result, "['kept', None]")

    def test_what_code_sets_itself_is_kept(self):
        self.run_code("import os; os.environ['MINE'] = 'a'")
        self.run_code("1", env_vars={"MINE": "b"})
        self.assertEqual(self.run_code("os.environ.pop('MINE')").result, "a")

    def test_the_environment_is_back_after_an_error(self):
        self.run_code("1 / 0", env_vars={"GONE": "x"})
        self.assertEqual(self.run_code("import os; os.environ.get('GONE', 'no')").result, "no")

    def test_it_begins_at_home(self):
        self.assertEqual(self.run_code("import os; os.getcwd()").result, self.program.home)

    def test_lines_come_while_the_code_runs(self):
        connection, answer = self.program.start(
            "import os\nprint('begun', flush=True)\nwhile not os.path.exists('go'): pass\nos.remove('go')"
        )
        lines = (json.loads(line) for line in answer)
        self.assertEqual(next(line for line in lines if line["type"] == "stdout")["text"], "begun\n")
        pathlib.Path(self.program.home, "go").touch()
        self.assertEqual(list(lines)[-1]["type"], "end_of_execution")
        connection.close()


class Results(Shared):
    def results(self, code):
        events = self.run_code(code)
        self.assertEqual(events.of("error"), [])
        return events.of("result")

    def test_each_format(self):
        code = """
            from IPython.display import display
            display({
                "text/plain": "t", "text/html": "<b>", "text/markdown": "*", "image/svg+xml": "<svg/>",
                "image/png": "cA==", "image/jpeg": "ag==", "application/pdf": "cGRm", "text/latex": "$x$",
                "application/json": {"a": [1]}, "application/javascript": "f()", "x/y": {"z": 1},
            }, raw=True)
        """
        self.assertEqual(
            self.results(code),
            [
                {
                    "type": "result", "is_main_result": False, "text": "t", "html": "<b>", "markdown": "*",
                    "svg": "<svg/>", "png": "cA==", "jpeg": "ag==", "pdf": "cGRm", "latex": "$x$",
                    "json": {"a": [1]}, "javascript": "f()", "extra": {"x/y": {"z": 1}},
                }
            ],
        )

    def test_only_what_there_is(self):
        (result,) = self.results("from IPython.display import Latex, display; display({'text/latex': 'l'}, raw=True)")
        self.assertEqual(result, {"type": "result", "is_main_result": False, "latex": "l"})

    def test_a_table(self):
        (result,) = self.results(
            """
            import pandas as pd
            pd.DataFrame({"a": [1, 2], "b": [0.5, None], "c": ["x", "y"], "d": pd.to_datetime(["2024-01-02", None]), 5: [True, False]})
            """
        )
        self.assertTrue(result["is_main_result"])
        self.assertIn("<table", result["html"])
        self.assertIn("a", result["text"])
        self.assertEqual(
            result["data"],
            {"a": [1, 2], "b": [0.5, None], "c": ["x", "y"], "d": ["2024-01-02T00:00:00", None], "5": [True, False]},
        )

    def test_a_huge_table_is_shown_without_data(self):
        (result,) = self.results("import pandas as pd; pd.DataFrame({'a': range(200_000)})")
        self.assertIn("200000 rows", result["text"])
        self.assertNotIn("data", result)

    def test_dicts_and_lists(self):
        told = lambda code: self.results("import datetime, numpy as np\n" + code)[0].get("json", "none")
        self.assertEqual(told("{'a': [1, 0.5, None, True, float('nan')]}"), {"a": [1, 0.5, None, True, None]})
        self.assertEqual(told("[]"), [])
        self.assertEqual(told("display([(1, 2)])"), [[1, 2]])
        self.assertEqual(
            told("{1: np.int64(3), None: np.arange(2), True: np.datetime64('2020-01-01')}"),
            {"1": "2020-01-01T00:00:00", "null": [0, 1]},
        )
        self.assertEqual(told("{datetime.date(2020, 1, 1): 1.5}"), {"2020-01-01": 1.5})
        for none in ("(1, 2)", "[{1}]", "{(1, 2): 3}", "a = []; a.append(a); a", "[0] * 200_000"):
            self.assertEqual(told(none), "none", none)

    def test_a_picture_and_a_result(self):
        first, second = self.results("import matplotlib.pyplot as plt\nplt.plot([1, 2])\nplt.show()\n7")
        self.assertTrue(base64.b64decode(first["png"]).startswith(b"\x89PNG"))
        self.assertIn("Figure", first["text"])
        self.assertFalse(first["is_main_result"])
        self.assertEqual(second["text"], "7")

    def test_pil(self):
        if self.run_code("import PIL").of("error"):
            self.skipTest("no PIL")
        code = "from PIL import Image\nimage = Image.new('RGB', (4, 4))\n"
        for last in ("image", "image.show()", "image.save('i.png')"):
            with self.subTest(last):
                (result,) = self.results(code + last)
                self.assertTrue(result["png"])
        self.assertEqual(self.results(code + "import io; image.save(io.BytesIO(), 'PNG')"), [])


class Charts(Shared):
    def chart(self, code):
        events = self.run_code("import matplotlib.pyplot as plt\n" + textwrap.dedent(code) + "\nplt.show()")
        self.assertEqual(events.of("error"), [])
        return events.of("result")[-1]["chart"]

    def test_lines(self):
        chart = self.chart(
            """
            plt.plot([0, 1, 2], [3, 4, float("nan")], label="up")
            plt.plot([0, 1], [1, 0])
            plt.xlabel("Time (s)"); plt.ylabel("Plain"); plt.title("Both")
            """
        )
        self.assertEqual((chart["type"], chart["title"]), ("line", "Both"))
        self.assertEqual(chart["elements"][0], {"label": "up", "points": [[0.0, 3.0], [1.0, 4.0], [2.0, None]]})
        self.assertEqual(chart["elements"][1]["label"], "Line 1")
        self.assertEqual([chart[k] for k in ("x_label", "x_unit", "y_label", "y_unit")], ["Time (s)", "s", "Plain", None])
        self.assertEqual((chart["x_scale"], chart["y_scale"]), ("linear", "linear"))
        for axis in "xy":
            self.assertTrue(chart[axis + "_ticks"])
            self.assertTrue(all(isinstance(tick, float) for tick in chart[axis + "_ticks"]))
            self.assertTrue(all(isinstance(text, str) for text in chart[axis + "_tick_labels"]))

    def test_scales(self):
        chart = self.chart(
            "import datetime\n"
            "plt.plot([datetime.date(2024, 1, 1), datetime.date(2024, 1, 3)], [1, 1000])\nplt.yscale('log')"
        )
        self.assertEqual((chart["x_scale"], chart["y_scale"]), ("datetime", "log"))
        self.assertEqual(chart["elements"][0]["points"][0], ["2024-01-01", 1.0])
        self.assertTrue(chart["x_ticks"][0].startswith("2024-01-01T"))
        self.assertEqual(self.chart("plt.plot([1, 2], ['A', 'B'])")["y_scale"], "categorical")

        chart = self.chart("import numpy as np\nplt.plot(np.array(['2020-01-01'], 'datetime64[D]'), [1])")
        self.assertEqual(chart["elements"][0]["points"], [["2020-01-01T00:00:00", 1.0]])

    def test_units(self):
        for label, unit in (
            ("Speed [m/s]", "m/s"),
            ("T(s)", None),
            ("Price (USD) per kg", "USD"),
            ("Empty ()", None),
        ):
            chart = self.chart(f"plt.plot([1])\nplt.ylabel({label!r})")
            self.assertEqual((chart["y_label"], chart["y_unit"]), (label, unit))

    def test_lines_across_are_no_data(self):
        chart = self.chart("plt.plot([1, 2], [3, 3], label='a')\nplt.axhline(2)\nplt.axvline(1)")
        self.assertEqual(chart["elements"], [{"label": "a", "points": [[1.0, 3.0], [2.0, 3.0]]}])
        self.assertEqual(self.chart("plt.axhline(2)\nplt.scatter([1], [2])")["type"], "scatter")

    def test_what_was_begun_and_what_is_blank(self):
        events = self.run_code(
            "import datetime, matplotlib.pyplot as plt\nplt.plot([datetime.date(2024, 1, 1)], [1, 2])"
        )
        self.assertEqual(events.error["name"], "ValueError")
        chart = events.of("result")[-1]["chart"]
        self.assertEqual(
            (chart["type"], chart["x_scale"], chart["y_scale"], chart["elements"]),
            ("line", "datetime", "linear", []),
        )
        (blank,) = self.run_code("plt.title('T')\nplt.show()").of("result")
        self.assertTrue(blank["png"])
        self.assertNotIn("chart", blank)
        half = self.chart("_, (one, _) = plt.subplots(1, 2)\none.plot([1])")
        self.assertEqual([(one["type"], len(one["elements"])) for one in half["elements"]], [("line", 1), ("line", 0)])

    def test_scatter(self):
        self.assertEqual(self.chart("plt.scatter([1], [2])")["elements"][0]["label"], "_child0")
        chart = self.chart("plt.scatter([1, 2], [3, 4], label='dots')\nplt.plot([1], [1])")
        self.assertEqual(chart["type"], "scatter")
        self.assertIsNone(chart["title"])
        self.assertEqual(chart["elements"], [{"label": "dots", "points": [[1.0, 3.0], [2.0, 4.0]]}])

    def test_bars(self):
        bars = lambda chart: [(bar["label"], bar["group"], bar["value"]) for bar in chart["elements"]]
        chart = self.chart("plt.bar(['A', 'B'], [1, 2], label='one')\nplt.xlabel('Who (id)')")
        self.assertEqual((chart["type"], chart["x_unit"]), ("bar", "id"))
        self.assertEqual(bars(chart), [("A", "one", 1.0), ("B", "one", 2.0)])
        flat = self.chart("plt.barh(['A', 'B'], [1, 2])\nplt.xlabel('Count (n)')\nplt.ylabel('Name')")
        self.assertEqual(bars(flat), [("A", "Group 0", 1.0), ("B", "Group 0", 2.0)])
        # Of flat bars the axis with the names is told first.
        self.assertEqual(
            [flat[name] for name in ("x_label", "x_unit", "y_label", "y_unit")], ["Name", None, "Count (n)", "n"]
        )
        self.assertEqual(
            bars(self.chart("plt.bar([1, 4], [1, 2])")), [("1", "Group 0", 1.0), ("4", "Group 0", 2.0)]
        )
        grouped = self.chart(
            "plt.bar([-.2, .8], [1, 2], .4, label='l')\nplt.bar([.2, 1.2], [3, 4], .4, label='r')\n"
            "plt.xticks([0, 1], ['A', 'B'])"
        )
        self.assertEqual(bars(grouped), [("A", "l", 1.0), ("B", "l", 2.0), ("A", "r", 3.0), ("B", "r", 4.0)])

    def test_pie(self):
        chart = self.chart("plt.pie([90, 10], labels=['No', 'Yes'], autopct='%d', startangle=90)\nplt.title('P')")
        self.assertEqual(
            chart,
            {
                "type": "pie",
                "title": "P",
                "elements": [
                    {"label": "No", "angle": 324.0, "radius": 1.0},
                    {"label": "Yes", "angle": 36.0, "radius": 1.0},
                ],
            },
        )

    def test_boxes(self):
        for more in ("", ", patch_artist=True"):
            chart = self.chart(
                f"plt.boxplot([[1, 2, 3, 4, 100], [5, 6, 7]]{more})\nplt.xticks([1, 2], ['A', 'B'])"
            )
            self.assertEqual(chart["type"], "box_and_whisker")
            first, second = chart["elements"]
            self.assertEqual(
                first,
                {
                    "label": "A", "min": 1.0, "first_quartile": 2.0, "median": 3.0,
                    "third_quartile": 4.0, "max": 4.0, "outliers": [100.0],
                },
            )
            self.assertEqual((second["label"], second["outliers"]), ("B", []))

    def test_several_and_unknown(self):
        chart = self.chart(
            """
            figure, (left, right) = plt.subplots(1, 2)
            figure.suptitle("Two")
            left.plot([1, 2]); left.set_title("L")
            right.add_artist(plt.Circle((0, 0), 1)); right.set_title("R")
            """
        )
        self.assertEqual((chart["type"], chart["title"]), ("superchart", "Two"))
        self.assertEqual([(one["type"], one["title"]) for one in chart["elements"]], [("line", "L"), ("unknown", "R")])
        self.assertEqual(chart["elements"][1]["elements"], [])

    def test_a_colour_bar_is_no_chart(self):
        chart = self.chart("plt.scatter([1, 2], [3, 4], c=[0, 1])\nplt.colorbar()")
        self.assertEqual(chart["type"], "scatter")


class Contexts(Shared):
    def create(self, **body):
        status, context = self.call("POST", "/contexts", body)
        self.assertEqual(status, 200, context)
        return context

    def test_life_of_a_context(self):
        made = self.create(language="python", cwd="sub/folder")
        self.assertEqual(made["cwd"], os.path.join(self.program.home, "sub/folder"))
        self.assertEqual(made["language"], "python")
        self.assertEqual(self.call("GET", "/contexts")[1][-1], made)
        id = made["id"]
        self.assertEqual(self.run_code("import os; os.getcwd()", context_id=id).result, made["cwd"])
        self.run_code("mine = 1", context_id=id)
        self.assertEqual(self.run_code("mine").error["name"], "NameError")
        self.assertEqual(self.call("POST", f"/contexts/{id}/restart", {})[0], 204)
        self.assertEqual(self.run_code("mine", context_id=id).error["name"], "NameError")
        self.assertEqual(self.run_code("os = 1; os", context_id=id).result, "1")
        self.assertEqual(self.call("DELETE", f"/contexts/{id}")[0], 204)
        self.assertNotIn(made, self.call("GET", "/contexts")[1])
        self.assertEqual(self.call("DELETE", f"/contexts/{id}")[0], 404)

    def test_defaults(self):
        made = self.create()
        self.assertEqual((made["language"], made["cwd"]), ("python", self.program.home))
        self.assertIn("python", [one["language"] for one in self.call("GET", "/contexts")[1]])

    def test_unknown_context(self):
        for method, path, body in (
            ("POST", "/execute", {"code": "1", "context_id": "none"}),
            ("POST", "/contexts/none/restart", {}),
            ("DELETE", "/contexts/none", None),
        ):
            status, answer = self.call(method, path, body)
            self.assertEqual((status, answer["message"]), (404, "context none not found"))

    def test_unknown_language(self):
        for path, body in (("/execute", {"code": "1", "language": "cobol"}), ("/contexts", {"language": "cobol"})):
            status, answer = self.call("POST", path, body)
            self.assertEqual(status, 400)
            self.assertRegex(answer["message"], "cobol.*bash.*python")

    def test_a_folder_that_cannot_be_used(self):
        closed = os.path.join(self.program.home, "closed")
        os.mkdir(closed, 0)
        pathlib.Path(self.program.home, "file").touch()
        # Nothing is closed to root.
        for cwd in ("file", "a\0b", *(["closed"] if os.geteuid() else [])):
            status, answer = self.call("POST", "/contexts", {"cwd": cwd})
            self.assertEqual(status, 400, cwd)
            self.assertIn("cwd cannot be used", answer["message"])

    def test_executions_of_one_context_are_in_line(self):
        id = self.create()["id"]
        self.run_code("seen = []", context_id=id)
        code = "import time; seen.append('<'); time.sleep(0.05); seen.append('>')"
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            for done in [pool.submit(self.run_code, code, context_id=id) for _ in range(8)]:
                self.assertEqual(done.result()[-1]["type"], "end_of_execution")
        self.assertEqual(self.run_code("''.join(seen)", context_id=id).result, "<>" * 8)

    def test_contexts_run_side_by_side(self):
        # Each waits for the file that the other makes.
        code = "import os\nopen({!r}, 'w')\nwhile not os.path.exists({!r}): pass\n'met'"
        ids = [self.create()["id"] for _ in range(2)]
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            runs = [
                pool.submit(self.run_code, code.format(*names), context_id=id)
                for id, names in zip(ids, (("one", "two"), ("two", "one")))
            ]
            self.assertEqual([run.result().result for run in runs], ["met", "met"])

    def test_a_kernel_that_dies(self):
        id = self.create()["id"]
        self.run_code("x = 1", context_id=id)
        error = self.run_code("import os; print('last', flush=True); os._exit(3)", context_id=id).error
        self.assertEqual(error["name"], "ContextRestarting")
        self.assertEqual(self.run_code("2", context_id=id).result, "2")
        self.assertEqual(self.run_code("x", context_id=id).error["name"], "NameError")
        self.assertEqual(self.call("POST", f"/contexts/{id}/restart", {})[0], 204)
        self.assertEqual(self.run_code("3", context_id=id).result, "3")

    def test_a_kernel_that_dies_between_executions_is_told_once(self):
        id = self.create()["id"]
        pid = int(self.run_code("import os; os.getpid()", context_id=id).result)
        os.kill(pid, signal.SIGKILL)
        self.assertEqual(self.run_code("1", context_id=id).error["name"], "ContextRestarting")
        self.assertEqual(self.run_code("1", context_id=id).result, "1")

    def test_restart_ends_what_runs_and_waits(self):
        id = self.create()["id"]
        loop = "print('begun', flush=True)\nwhile True:\n    try:\n        while True: pass\n    except KeyboardInterrupt: pass"
        connection, answer = self.program.start(loop, context_id=id)
        lines = (json.loads(line) for line in answer)
        self.assertTrue(any(line["type"] == "stdout" for line in lines))
        waiting, later = self.program.start("1", context_id=id)
        self.assertEqual(self.call("POST", f"/contexts/{id}/restart", {})[0], 204)
        for rest in (list(lines), [json.loads(line) for line in later]):
            self.assertEqual(rest[-1]["name"], "KernelRestarted")
        self.assertEqual(self.run_code("4", context_id=id).result, "4")
        connection.close()
        waiting.close()

    def test_removal_ends_what_runs(self):
        id = self.create()["id"]
        connection, answer = self.program.start("print('begun', flush=True)\nwhile True: pass", context_id=id)
        lines = (json.loads(line) for line in answer)
        self.assertTrue(any(line["type"] == "stdout" for line in lines))
        self.assertEqual(self.call("DELETE", f"/contexts/{id}")[0], 204)
        self.assertEqual(list(lines)[-1]["type"], "error")
        connection.close()


def another_language(test, program):
    run = lambda code, **more: program.run(code, language="bash", **more).text()
    test.assertEqual(run("echo $((1 + 2))"), "3\n")
    test.assertEqual(run("echo $A", env_vars={"A": "it's"}), "it's\n")
    test.assertEqual(run("echo ${A:-none}"), "none\n")
    languages = [one["language"] for one in program.call("GET", "/contexts")[1]]
    test.assertEqual(languages.count("bash"), 1)


class Bash(unittest.TestCase):
    """The program's own shell, which needs nothing but the standard library."""

    @classmethod
    def setUpClass(cls):
        cls.program = Program(python_flags=("-I", "-S"))

    @classmethod
    def tearDownClass(cls):
        cls.program.close()

    def run_code(self, code, **more):
        if "context_id" not in more:
            more["language"] = "bash"
        return self.program.run(code, **more)

    def test_it_is_another_language(self):
        another_language(self, self.program)

    def test_it_remembers(self):
        self.run_code("mine=1; cd /; f() {\n  echo f $1 $mine\n}\nalias g='f of'")
        events = self.run_code("f ž; g; pwd")
        self.assertEqual(events.text(), "f ž 1\nf of 1\n/\n")
        self.assertEqual(events.of("error"), [])
        self.assertEqual(events[-1], {"type": "end_of_execution"})

    def test_output_and_errors(self):
        events = self.run_code("echo out; echo err >&2; nosuch; (exit 7)")
        self.assertEqual(events.text(), "out\n")
        self.assertRegex(events.text("stderr"), "^err\n.*nosuch: command not found\n$")
        error = events.error
        self.assertEqual((error["name"], error["value"], error["traceback"]), ("", "7", ""))
        self.assertEqual(self.run_code("if x").error["value"], "2")
        self.assertEqual(self.run_code("").of("error"), [])
        self.assertEqual(self.run_code("set -x; false").text("stderr"), "++ false\n")
        self.run_code("set +x")

    def test_executions_are_counted(self):
        count = lambda events: events.of("number_of_executions")[0]["execution_count"]
        first = count(self.run_code(":"))
        self.assertEqual(count(self.run_code(":", env_vars={"A": "b"})), first + 1)
        self.assertEqual(count(self.run_code(":")), first + 2)

    def test_there_is_no_input(self):
        events = self.run_code("cat; read line; echo $?")
        self.assertEqual(events.text(), "1\n")

    def test_the_environment_is_of_the_sandbox(self):
        self.assertEqual(self.run_code("echo $OF_THE_SANDBOX ${PS1-no}").text(), "kept no\n")

    def test_bytes_that_are_no_text(self):
        for code, text in (("printf 'a\\xff'", "a\ufffd"), ("printf '\\xc5'", "\ufffd"), ("printf '\\xc5\\xbe'", "ž")):
            self.assertEqual(self.run_code(code).text(), text)

    def test_lines_come_while_the_code_runs(self):
        code = "echo begun; until [ -e go ]; do :; done; rm go"
        connection, answer = self.program.start(code, context_id=self.create()["id"])
        lines = (json.loads(line) for line in answer)
        self.assertEqual(next(line for line in lines if line["type"] == "stdout")["text"], "begun\n")
        pathlib.Path(self.program.home, "go").touch()
        self.assertEqual(list(lines)[-1]["type"], "end_of_execution")
        connection.close()

    def test_much_output_is_whole_and_after_it_all_goes_on(self):
        self.assertEqual(len(self.run_code("head -c 20000000 /dev/zero | tr '\\0' x").text()), 20_000_000)
        # Nobody waits for what its children print.
        self.run_code("yes & child=$!")
        self.assertEqual(self.run_code("kill $child; wait; echo end").text()[-4:], "end\n")

    def test_code_that_ends_it(self):
        for code, value in (("exit 3", "3"), ("set -e; false; echo on", "1"), ("kill -9 $$", "137")):
            self.run_code("mine=1")
            events = self.run_code("echo last; " + code)
            self.assertEqual((events.text(), events.error["value"]), ("last\n", value))
            self.assertEqual(self.run_code("echo ${mine-none}; pwd").text(), f"none\n{self.program.home}\n")
        self.assertEqual(self.run_code("exec echo instead").text(), "instead\n")

    def test_code_that_ends_it_before_it_is_asked_how(self):
        module = types.ModuleType("interpreter")
        exec(SOURCE, module.__dict__)
        told, tell = os.pipe()
        shell = module.Shell(self.program.home)
        shell._process.kill()
        shell._process.wait()
        shell.send("echo")
        kinds = [shell.receive(told, 60)["msg_type"] for _ in range(3)]
        self.assertEqual(kinds, ["execute_input", "error", "status"])
        shell.send("echo on")
        while (message := shell.receive(told, 60))["msg_type"] != "stream":
            pass
        self.assertEqual(message["content"]["text"], "on\n")
        shell.close()
        os.close(told)
        os.close(tell)

    def test_a_client_that_goes_away_interrupts(self):
        for code in ("sleep 600", "while :; do :; done", "while :; do sleep 0.1; done", "yes"):
            connection, answer = self.program.start("mine=2; echo begun; " + code, language="bash")
            self.assertTrue(any(b"begun" in line for line in answer))
            connection.close()
            answer.close()
            self.assertEqual(self.run_code("echo $mine").text(), "2\n")

    def create(self, **body):
        status, context = self.program.call("POST", "/contexts", {"language": "bash", **body})
        self.assertEqual(status, 200, context)
        return context

    def test_life_of_a_context(self):
        made = self.create(language="sh", cwd="sub")
        id = made["id"]
        self.assertEqual((made["language"], made["cwd"]), ("bash", os.path.join(self.program.home, "sub")))
        self.assertIn(made, self.program.call("GET", "/contexts")[1])
        events = self.run_code("mine=1; pwd; echo $$", context_id=id)
        where, pid = events.text().split()
        self.assertEqual(where, made["cwd"])
        self.assertEqual(self.program.call("POST", f"/contexts/{id}/restart", {})[0], 204)
        self.assertEqual(self.run_code("echo ${mine-none}", context_id=id).text(), "none\n")
        self.assertFalse(os.path.exists(f"/proc/{pid}"))
        connection, answer = self.program.start("echo $$; sleep 600", context_id=id)
        pid = next(line["text"] for line in map(json.loads, answer) if line["type"] == "stdout").strip()
        self.assertEqual(self.program.call("DELETE", f"/contexts/{id}")[0], 204)
        self.assertEqual(json.loads(list(answer)[-1])["type"], "error")
        self.assertFalse(os.path.exists(f"/proc/{pid}"))
        connection.close()


class KernelOfAnotherLanguage(unittest.TestCase):
    def test_it_is_preferred_to_our_own(self):
        program = Program(shell_kernel=True)
        try:
            another_language(self, program)
            # It is no shell that remembers.
            program.run("mine=1", language="bash")
            self.assertEqual(program.run("echo ${mine-none}", language="bash").text(), "none\n")
        finally:
            program.close()


class Clients(Shared):
    def test_a_client_that_goes_away_interrupts(self):
        connection, answer = self.program.start("print('begun', flush=True)\nimport time; time.sleep(600)")
        self.assertTrue(any(b"begun" in line for line in answer))
        connection.close()
        answer.close()
        self.assertEqual(self.run_code("1 + 1").result, "2")

    def test_a_client_that_goes_away_leaves_the_line(self):
        first, answer = self.program.start(
            "import os\nprint('begun', flush=True)\nwhile not os.path.exists('on'): pass"
        )
        self.assertTrue(any(b"begun" in line for line in answer))
        second, unread = self.program.start("wrong = 1")
        second.close()
        unread.close()
        # A third that waits behind it shows that the second one was passed over.
        time.sleep(1)  # the program looks at silent clients at times
        pathlib.Path(self.program.home, "on").touch()
        self.assertEqual(self.run_code("'wrong' in globals()").result, "False")
        first.close()

    def test_a_client_that_stops_reading_and_goes(self):
        connection, answer = self.program.start("while True: print('x' * 1000)")
        answer.readline()
        connection.close()
        answer.close()
        self.assertEqual(self.run_code("1").result, "1")

    def test_wrong_requests(self):
        for body, word in (
            ({}, "code"),
            ({"code": 1}, "code"),
            ({"code": "\ud800"}, "Unicode"),
            ({"code": "1", "env_vars": {"A": 1}}, "A"),
            ({"code": "1", "env_vars": {"A=B": "1"}}, "A=B"),
            ({"code": "1", "context_id": "a", "language": "python"}, "one of the two"),
        ):
            status, answer = self.call("POST", "/execute", body)
            self.assertEqual(status, 400, answer)
            self.assertIn(word, answer["message"])
        self.assertEqual(self.call("GET", "/nothing")[0], 404)
        connection = self.program.connect()
        connection.request("POST", "/execute", "{", {"Content-Type": "application/json"})
        self.assertEqual(connection.getresponse().status, 400)
        connection.close()

    def test_a_body_in_chunks_and_a_connection_used_twice(self):
        connection = self.program.connect()
        raw = json.dumps({"code": "5"}).encode()
        for _ in range(2):
            connection.request("POST", "/execute", iter([raw[:4], raw[4:]]), encode_chunked=True,
                               headers={"Transfer-Encoding": "chunked"})
            lines = [json.loads(line) for line in connection.getresponse()]
            self.assertEqual(Events(lines).result, "5")
        connection.close()

    def test_much_output_is_whole_and_not_kept(self):
        peak = lambda: int(pathlib.Path(f"/proc/{self.program.process.pid}/status").read_text()
                           .split("VmHWM:")[1].split()[0])
        self.run_code("1")
        before = peak()
        for code in (
            "for _ in range(100_000): print('x' * 999)",
            "import sys; _ = sys.stdout.write('y' * 100_000_000)",
        ):
            connection, answer = self.program.start(code)
            count = 0
            for line in answer:
                event = json.loads(line)
                if event["type"] == "stdout":
                    count += len(event["text"])
            self.assertEqual(count, 100_000_000)
            connection.close()
        self.assertLess(peak() - before, 40_000, "kB")

    def test_many_small_messages_are_all_there(self):
        code = "from IPython.display import display\nfor n in range(5000): print(n, flush=True); display(n)"
        connection, answer = self.program.start(code)
        lines = []
        for line in answer:
            if len(lines) == 10:
                # The kernel gets no further than what it may be ahead.
                threading.Event().wait(1)
            lines.append(json.loads(line))
        connection.close()
        self.assertEqual(Events(lines).text().split(), [str(n) for n in range(5000)])
        self.assertEqual([one["text"] for one in Events(lines).of("result")], [str(n) for n in range(5000)])


class Missing(unittest.TestCase):
    def test_without_the_libraries_it_says_so(self):
        # -I and -S: nothing but the standard library.
        program = Program(python_flags=("-I", "-S"))
        try:
            self.assertEqual(program.call("GET", "/health")[0], 200)
            for method, path, body in (("POST", "/execute", {"code": "1"}), ("POST", "/contexts", {}), ("GET", "/contexts", None)):
                status, answer = program.call(method, path, body)
                self.assertEqual(status, 501)
                self.assertIn("install ipykernel and jupyter_client in the image", answer["message"])
        finally:
            program.close()

    def test_nothing_is_left_when_it_ends(self):
        program = Program()
        try:
            pid = int(program.run("import os; os.getpid()").result)
        finally:
            program.close()
        self.assertFalse(os.path.exists(f"/proc/{pid}"))

    def test_it_ends_whichever_of_its_threads_is_told_so(self):
        program = Program()
        try:
            program.run("1")
            process = program.process.pid

            def is_told(thread):
                status = pathlib.Path(f"/proc/{process}/task/{thread}/status").read_text()
                blocked = int(status.split("SigBlk:")[1].split()[0], 16)
                return not blocked >> (signal.SIGTERM - 1) & 1

            others = [thread for thread in os.listdir(f"/proc/{process}/task") if is_told(thread)]
            others.remove(str(process))
            self.assertEqual(ctypes.CDLL(None).tgkill(process, int(others[-1]), signal.SIGTERM), 0)
            self.assertEqual(program.process.wait(20), 0)
        finally:
            program.process.kill()
            program.files.cleanup()

    def test_it_ends_while_a_kernel_begins(self):
        program = Program(shell_kernel=True)
        spec = pathlib.Path(program.files.name, "jupyter", "kernels", "bash", "kernel.json")
        spec.write_text(json.dumps({"argv": ["sleep", "1000"], "display_name": "Shell", "language": "bash"}))
        connection = program.connect()
        connection.request("POST", "/contexts", json.dumps({"language": "bash"}))
        while not (begun := children(program.process.pid, "sleep")):
            time.sleep(0.02)  # nothing tells of it
        program.close()
        connection.close()
        self.assertFalse(os.path.exists(f"/proc/{begun[0]}"))


if __name__ == "__main__":
    unittest.main()
