"""Runs each case in the flavour that `--flavour` names, and writes down what it has shown.

A case is an `async def` that takes `sdk`. `covers` says which methods of the SDK it is about and
how they fare: they work, they differ from E2B's, or they are refused. A case that passes without
having called them fails all the same.
"""

import asyncio
import inspect
import json
import os
import uuid

import pytest

from flavours import Sdk, methods

# How long one case may take, in seconds.
PATIENCE = 90

# Where pytest takes itself to be in CI, it looks for all differences of what is compared; as passed
# assertions are counted here, also of what is the same, and for hours if it is long.
for name in ("CI", "BUILD_NUMBER"):
    os.environ.pop(name, None)


class Tally:
    def __init__(self):
        self.assertions = 0
        self.outcomes = []


def pytest_addoption(parser):
    parser.addoption("--flavour", choices=["sync", "async"], default="sync")
    parser.addoption("--outcomes", help="the file that is written")


def pytest_configure(config):
    config.addinivalue_line("markers", "covers(methods, result, how): what a case is about")
    config.addinivalue_line("markers", "patient(seconds): a case that may take longer")
    config.tally = Tally()
    config.loop = asyncio.new_event_loop()
    asyncio.set_event_loop(config.loop)


def pytest_collection_modifyitems(config, items):
    flavour = config.getoption("flavour")
    only = lambda item: item.get_closest_marker("only")
    items[:] = [it for it in items if not only(it) or flavour in only(it).args]


def pytest_assertion_pass(item):
    item.config.tally.assertions += 1


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    names = pyfuncitem._fixtureinfo.argnames
    args = {name: pyfuncitem.funcargs[name] for name in names}
    marker = pyfuncitem.get_closest_marker("patient")
    seconds = marker.args[0] if marker else PATIENCE
    case = asyncio.wait_for(pyfuncitem.obj(**args), seconds)
    pyfuncitem.config.loop.run_until_complete(case)
    check_covered(pyfuncitem)
    return True


def check_covered(item):
    """Notes what a case that has passed shows, if it has used what it says that it covers."""
    called = item.funcargs["sdk"].called
    known = methods(item.config.getoption("flavour"))
    for marker in item.iter_markers("covers"):
        for method in marker.args:
            if method not in known:
                # The other flavour has it.
                continue
            if method not in called:
                pytest.fail(f"{method} was not called")
            outcome = {"method": method, **marker.kwargs}
            item.config.tally.outcomes.append(outcome)


def pytest_sessionfinish(session):
    config = session.config
    to = config.getoption("outcomes")
    if to:
        flavour = config.getoption("flavour")
        told = {
            "flavour": flavour,
            "assertions": config.tally.assertions,
            "methods": sorted(methods(flavour)),
            "outcomes": config.tally.outcomes,
        }
        with open(to, "w") as file:
            json.dump(told, file, indent=1)


@pytest.fixture
def sdk(request):
    return Sdk(request.config.getoption("flavour"))


def settle(request, coroutine):
    return request.config.loop.run_until_complete(asyncio.wait_for(coroutine, PATIENCE))


@pytest.fixture
def sandbox(sdk, request):
    """A sandbox that is gone after the case."""
    sandbox = settle(request, sdk.Sandbox.create("base", timeout=120))
    yield sandbox
    settle(request, sandbox.kill())


@pytest.fixture
def name():
    """A name that nobody else has."""
    return f"it-{uuid.uuid4().hex[:12]}"


@pytest.fixture
def url():
    """Where the daemon is."""
    return os.environ["E2B_API_URL"]
