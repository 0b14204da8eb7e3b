"""Code that is run in a kernel which remembers."""

import asyncio
import base64

import pytest
from e2b import SandboxException, TimeoutException

from cases import covers
from flavours import Sdk


@pytest.fixture(scope="module")
def shared(request):
    """One sandbox for all cases: a kernel takes a while to start."""
    run = request.config.loop.run_until_complete
    sandbox = run(Sdk(request.config.getoption("flavour")).Sandbox.create(timeout=600))
    yield sandbox
    run(sandbox.kill())


@pytest.fixture
def interpreter(sdk, shared):
    """It, with what is called recorded for this case."""
    return sdk.faced(sdk.bare(shared))


@covers("Sandbox.run_code")
async def test_code_is_run_and_remembered(sdk, interpreter):
    first = await interpreter.run_code("x = 20 + 1")
    assert first.error is None and first.text is None
    second = await interpreter.run_code("x * 2")
    assert second.text == "42"
    assert second.results[0].is_main_result
    assert second.execution_count == first.execution_count + 1
    await interpreter.run_code("def double(n):\n    return n * 2")
    assert (await interpreter.run_code("double(x)")).text == "42"
    assert (await interpreter.run_code("import os; os.getcwd()")).text == "/home/user"
    # It has the sandbox's files.
    await interpreter.files.write("/home/user/given", "from outside")
    told = await interpreter.run_code("print(open('given').read())")
    assert "".join(told.logs.stdout) == "from outside\n"
    await interpreter.run_code("open('/home/user/made', 'w').write('from within')")
    assert await interpreter.files.read("/home/user/made") == "from within"


async def test_output_is_told_as_it_comes(sdk, interpreter):
    out, err, results = [], [], []
    told = await interpreter.run_code(
        "import sys, time\nfor i in range(3):\n    print(i, flush=True); time.sleep(0.2)\n"
        "print('bad', file=sys.stderr)\ndisplay(7)\n8",
        on_stdout=lambda it: out.append(it.line),
        on_stderr=lambda it: err.append(it.line),
        on_result=lambda it: results.append(it.text),
    )
    assert "".join(out) == "0\n1\n2\n" and len(out) >= 3
    assert "".join(err) == "bad\n"
    assert results == ["7", "8"]
    assert "".join(told.logs.stdout) == "0\n1\n2\n"
    assert "".join(told.logs.stderr) == "bad\n"
    assert [it.is_main_result for it in told.results] == [False, True]


async def test_an_error_is_told_with_where_it_was(sdk, interpreter):
    errors = []
    told = await interpreter.run_code("def f():\n    return 1 / 0\nf()", on_error=errors.append)
    assert told.error.name == "ZeroDivisionError"
    assert told.error.value == "division by zero"
    assert "1 / 0" in told.error.traceback or "1" in told.error.traceback
    assert [it.name for it in errors] == ["ZeroDivisionError"]
    assert (await interpreter.run_code("1 +")).error.name == "SyntaxError"
    # It goes on.
    assert (await interpreter.run_code("1 + 1")).text == "2"


async def test_charts_and_tables(sdk, interpreter):
    drawn = await interpreter.run_code(
        "import matplotlib.pyplot as plt\nplt.plot([1, 2, 3], [2, 4, 8])\n"
        "plt.title('Growth'); plt.xlabel('n'); plt.ylabel('size'); plt.show()"
    )
    assert drawn.error is None
    (picture,) = [it for it in drawn.results if it.png]
    assert base64.b64decode(picture.png)[:8] == b"\x89PNG\r\n\x1a\n"
    assert "png" in picture.formats()
    assert picture.chart is not None
    assert picture.chart.type.value == "line"
    assert picture.chart.title == "Growth"
    table = await interpreter.run_code(
        "import pandas as pd\npd.DataFrame({'a': [1, 2], 'b': ['x', 'y']})"
    )
    assert table.error is None
    assert "<table" in table.results[0].html
    assert "a" in table.results[0].text
    assert table.results[0].data
    others = await interpreter.run_code(
        "from IPython.display import display, HTML, Markdown, JSON, SVG, Latex\n"
        "display(HTML('<b>x</b>')); display(Markdown('# x')); display(JSON({'a': 1}));"
        "display(Latex('$x$')); display(SVG('<svg xmlns=\"http://www.w3.org/2000/svg\"/>'))"
    )
    formats = [it.formats() for it in others.results]
    for wanted in ("html", "markdown", "json", "latex", "svg"):
        assert any(wanted in it for it in formats), wanted


@covers(
    "Sandbox.create_code_context",
    "Sandbox.list_code_contexts",
    "Sandbox.remove_code_context",
    "Sandbox.restart_code_context",
)
async def test_contexts_know_nothing_of_each_other(sdk, interpreter):
    await interpreter.files.make_dir("/home/user/elsewhere")
    # It may be in any folder.
    roots = await interpreter.create_code_context(cwd="/root", language="python")
    assert (await interpreter.run_code("import os; os.getcwd()", context=roots)).text == "/root"
    context = await interpreter.create_code_context(cwd="/home/user/elsewhere", language="python")
    assert context.id and context.language == "python"
    assert context.cwd == "/home/user/elsewhere"
    await interpreter.run_code("x = 'default'")
    await interpreter.run_code("x = 'other'", context=context)
    assert (await interpreter.run_code("x")).text == "default"
    assert (await interpreter.run_code("x", context=context)).text == "other"
    where = await interpreter.run_code("import os; os.getcwd()", context=context)
    assert where.text == "/home/user/elsewhere"
    assert context.id in [it.id for it in await interpreter.list_code_contexts()]
    await interpreter.restart_code_context(context)
    assert (await interpreter.run_code("x", context=context)).error.name == "NameError"
    await interpreter.remove_code_context(context)
    assert context.id not in [it.id for it in await interpreter.list_code_contexts()]
    with pytest.raises(Exception):
        await interpreter.run_code("1", context=context)
    assert (await interpreter.run_code("x")).text == "default"


async def test_code_that_takes_too_long_is_stopped(sdk, interpreter):
    await interpreter.run_code("x = 1")
    with pytest.raises(TimeoutException):
        await interpreter.run_code("import time\nwhile True: time.sleep(0.1)", timeout=2)
    # What it knew it still knows.
    assert (await interpreter.run_code("x")).text == "1"


async def test_variables_of_one_run(sdk, interpreter):
    code = "import os; os.environ.get('GIVEN')"
    assert (await interpreter.run_code(code, envs={"GIVEN": "yes"})).text == "yes"
    assert (await interpreter.run_code(code)).text is None


async def test_dicts_and_lists_are_told_as_json_too(sdk, interpreter):
    told = await interpreter.run_code("{'a': [1, None]}")
    assert told.text == "{'a': [1, None]}"
    assert told.results[0].json == {"a": [1, None]}
    assert "json" not in (await interpreter.run_code("{1, 2}")).results[0].formats()


async def test_a_shell_remembers_too(sdk, interpreter):
    lines = []
    told = await interpreter.run_code(
        "cd /tmp; mine=1; echo out; echo err >&2; false",
        language="bash",
        on_stdout=lambda it: lines.append(it.line),
    )
    assert told.logs.stdout == lines == ["out\n"]
    assert told.logs.stderr == ["err\n"]
    assert (told.error.name, told.error.value) == ("", "1")
    kept = await interpreter.run_code("echo $mine; pwd", language="bash")
    assert "".join(kept.logs.stdout) == "1\n/tmp\n"
    given = await interpreter.run_code("echo $A", language="bash", envs={"A": "b"})
    assert given.logs.stdout == ["b\n"]
    assert (await interpreter.run_code("echo ${A-none}", language="bash")).logs.stdout == ["none\n"]
    with pytest.raises(TimeoutException):
        await interpreter.run_code("sleep 600", language="bash", timeout=2)
    assert (await interpreter.run_code("echo $mine", language="bash")).logs.stdout == ["1\n"]
    context = await interpreter.create_code_context(language="bash", cwd="/usr")
    assert (await interpreter.run_code("pwd; exit 3", context=context)).error.value == "3"
    again = await interpreter.run_code("pwd; echo ${mine-none}", context=context)
    assert "".join(again.logs.stdout) == "/usr\nnone\n"
    await interpreter.remove_code_context(context)


async def test_what_it_knows_outlives_a_sleep(sdk, interpreter):
    await interpreter.run_code("x = 'before the sleep'")
    await interpreter.pause()
    await interpreter.connect()
    assert (await interpreter.run_code("x")).text == "before the sleep"


async def test_a_language_that_is_not_there_is_said(sdk, interpreter):
    with pytest.raises(Exception, match="(?i)no-such-language"):
        await interpreter.run_code("1", language="no-such-language")


async def test_charts_have_what_they_were_drawn_of(sdk, interpreter):
    bars = await interpreter.run_code(
        "import matplotlib.pyplot as plt\nplt.bar(['A', 'B'], [100, 200], label='Sold')\n"
        "plt.xlabel('Who'); plt.ylabel('How many'); plt.title('Sales'); plt.show()"
    )
    chart = bars.results[0].chart
    assert chart.type.value == "bar"
    assert (chart.title, chart.x_label, chart.y_label) == ("Sales", "Who", "How many")
    assert [(it.label, it.group, it.value) for it in chart.elements] == [
        ("A", "Sold", 100),
        ("B", "Sold", 200),
    ]
    slices = await interpreter.run_code("plt.pie([90, 10], labels=['No', 'Yes']); plt.show()")
    told = [(it.label, it.angle, it.radius) for it in slices.results[0].chart.elements]
    assert told == [("No", 324, 1), ("Yes", 36, 1)]
    several = await interpreter.run_code(
        "figure, (one, two) = plt.subplots(1, 2)\none.plot([1, 2, 3])\n"
        "two.scatter([1, 2], [3, 4])\nfigure.suptitle('Both')\nplt.show()"
    )
    chart = several.results[0].chart
    assert (chart.type.value, chart.title) == ("superchart", "Both")
    assert [it.type.value for it in chart.elements] == ["line", "scatter"]
    assert len(chart.elements[0].elements[0].points) == 3


async def test_a_kernel_that_dies_is_told_and_another_one_is_there(sdk, interpreter):
    told = await interpreter.run_code("import os; os.kill(os.getpid(), 9)")
    assert told.error is not None
    assert (await interpreter.run_code("1 + 1")).text == "2"


async def test_code_in_a_sandbox_without_public_traffic(sdk):
    network = {"allow_public_traffic": False}
    sandbox = await sdk.Sandbox.create(network=network, timeout=120)
    try:
        context = await sandbox.create_code_context()
        assert (await sandbox.run_code("1 + 1", context=context)).text == "2"
    finally:
        await sandbox.kill()


async def test_when_its_sandbox_is_ended_code_ends_at_once(sdk):
    sandbox = await sdk.Sandbox.create(timeout=120)
    began = asyncio.Event()
    loop = asyncio.get_running_loop()
    running = asyncio.ensure_future(
        sandbox.run_code(
            "import time; print('begun', flush=True); time.sleep(1000)",
            on_stdout=lambda _: loop.call_soon_threadsafe(began.set),
        )
    )
    await asyncio.wait_for(began.wait(), 30)
    assert await sandbox.kill() is True
    with pytest.raises(SandboxException, match="killed while the request was in progress"):
        await asyncio.wait_for(running, 20)
