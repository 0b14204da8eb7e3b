"""A sandbox's life: made, found, listed, given time, put to sleep, woken, ended."""

import asyncio
import datetime
import os
import uuid

import httpx
import pytest
from e2b import (
    InvalidArgumentException,
    SandboxException,
    SandboxNotFoundException,
    SandboxQuery,
    SandboxState,
)

from cases import covers, differs, patient


async def ids(sdk, **query):
    paginator = await sdk.Sandbox.list(query=SandboxQuery(**query))
    return [info.sandbox_id for info in await sdk.all_of(paginator)]


def api(url):
    return httpx.AsyncClient(headers={"X-API-KEY": os.environ["E2B_API_KEY"]}, base_url=url)


@covers("Sandbox.create", "Sandbox.is_running", "Sandbox.kill", "Sandbox.get_info")
async def test_a_sandbox_is_made_and_ended(sdk):
    sandbox = await sdk.Sandbox.create("base", timeout=60)
    assert sandbox.sandbox_id
    assert await sandbox.is_running() is True
    info = await sandbox.get_info()
    assert info.sandbox_id == sandbox.sandbox_id
    assert info.template_id == "base"
    assert info.name == "base"
    assert info.state == SandboxState.RUNNING
    assert info.cpu_count >= 1
    assert info.memory_mb >= 128
    assert info.envd_version
    assert 50 < (info.end_at - info.started_at).total_seconds() <= 61
    assert await sandbox.kill() is True
    assert await sandbox.kill() is False
    assert await sandbox.is_running() is False
    with pytest.raises(SandboxNotFoundException):
        await sandbox.get_info()


async def test_a_sandbox_that_is_left_in_a_block_is_gone(sdk):
    async with await sdk.Sandbox.create("base", timeout=60) as sandbox:
        assert await sandbox.is_running()
    assert not await sandbox.is_running()


async def test_without_a_name_it_is_made_of_the_base(sdk):
    async with await sdk.PlainSandbox.create() as sandbox:
        info = await sandbox.get_info()
        assert info.template_id == "base"
        left = (info.end_at - datetime.datetime.now(datetime.timezone.utc)).total_seconds()
        assert 250 < left <= 301


async def test_a_template_that_is_not_there_is_said(sdk):
    with pytest.raises(SandboxException, match="no-such-template"):
        await sdk.Sandbox.create("no-such-template")


async def test_a_key_that_is_not_good_is_refused(sdk):
    from e2b import AuthenticationException

    with pytest.raises(AuthenticationException):
        await sdk.Sandbox.create("base", api_key="e2b_" + "0" * 40)


async def test_variables_of_a_sandbox_are_those_of_its_commands(sdk):
    async with await sdk.Sandbox.create("base", envs={"COLOUR": "blue"}, timeout=60) as sandbox:
        assert (await sandbox.commands.run("echo $COLOUR")).stdout == "blue\n"
        told = await sandbox.commands.run("echo $COLOUR", envs={"COLOUR": "red"})
        assert told.stdout == "red\n"
        assert (await sandbox.commands.run("echo $COLOUR")).stdout == "blue\n"


@covers("Sandbox.list", "SandboxPaginator.next_items")
async def test_sandboxes_are_listed_by_what_they_are(sdk, name):
    both = {"of": name}
    one = await sdk.Sandbox.create("base", metadata=both | {"n": "1"}, timeout=60)
    two = await sdk.Sandbox.create("base", metadata=both | {"n": "2", "w": "a b&c=ü"}, timeout=60)
    try:
        assert await ids(sdk, metadata=both) == [two.sandbox_id, one.sandbox_id]
        assert await ids(sdk, metadata=both | {"n": "1"}) == [one.sandbox_id]
        assert await ids(sdk, metadata={"w": "a b&c=ü", "of": name}) == [two.sandbox_id]
        assert await ids(sdk, metadata={"of": "another"}) == []
        paginator = await sdk.Sandbox.list(query=SandboxQuery(metadata=both), limit=1)
        assert paginator.has_next
        first = await paginator.next_items()
        assert [info.sandbox_id for info in first] == [two.sandbox_id]
        assert first[0].metadata == both | {"n": "2", "w": "a b&c=ü"}
        assert paginator.has_next and paginator.next_token
        again = await sdk.Sandbox.list(
            query=SandboxQuery(metadata=both), limit=1, next_token=paginator.next_token
        )
        assert [info.sandbox_id for info in await again.next_items()] == [one.sandbox_id]
        second = await paginator.next_items()
        assert [info.sandbox_id for info in second] == [one.sandbox_id]
        assert not paginator.has_next
        oldest = await sdk.Sandbox.list(query=SandboxQuery(metadata=both), order="asc")
        told = [info.sandbox_id for info in await oldest.next_items()]
        assert told == [one.sandbox_id, two.sandbox_id]
        await one.pause()
        assert await ids(sdk, metadata=both, state=[SandboxState.PAUSED]) == [one.sandbox_id]
        assert await ids(sdk, metadata=both, state=[SandboxState.RUNNING]) == [two.sandbox_id]
        every = [SandboxState.RUNNING, SandboxState.PAUSED]
        assert len(await ids(sdk, metadata=both, state=every)) == 2
        # Without a state, both.
        assert len(await ids(sdk, metadata=both)) == 2
    finally:
        await one.kill()
        await two.kill()
    assert await ids(sdk, metadata=both) == []


@covers("Sandbox.connect")
async def test_another_client_finds_a_sandbox_by_its_id(sdk, sandbox):
    await sandbox.files.write("/home/user/note", "left here")
    other = await sdk.Sandbox.connect(sandbox.sandbox_id, timeout=90)
    assert other.sandbox_id == sandbox.sandbox_id
    assert await other.files.read("/home/user/note") == "left here"
    assert await other.is_running()
    assert await sandbox.is_running()
    with pytest.raises(SandboxNotFoundException):
        await sdk.Sandbox.connect(uuid.uuid4().hex)


async def test_to_connect_never_takes_time_away(sdk):
    async with await sdk.Sandbox.create("base", timeout=100) as sandbox:
        before = (await sandbox.get_info()).end_at
        await sdk.Sandbox.connect(sandbox.sandbox_id, timeout=10)
        assert (await sandbox.get_info()).end_at == before
        await sdk.Sandbox.connect(sandbox.sandbox_id, timeout=1000)
        assert (await sandbox.get_info()).end_at > before


@differs("there is no longest time, unless the daemon is given one", "Sandbox.set_timeout")
async def test_its_time_is_shortened_and_lengthened(sdk):
    async with await sdk.Sandbox.create("base", timeout=60) as sandbox:
        await sandbox.set_timeout(600)
        info = await sandbox.get_info()
        left = info.end_at - datetime.datetime.now(datetime.timezone.utc)
        assert 590 < left.total_seconds() <= 600
        await sandbox.set_timeout(5)
        info = await sandbox.get_info()
        left = info.end_at - datetime.datetime.now(datetime.timezone.utc)
        assert left.total_seconds() <= 5
        # More than a day.
        await sandbox.set_timeout(100 * 3600)
        info = await sandbox.get_info()
        left = info.end_at - datetime.datetime.now(datetime.timezone.utc)
        assert left.total_seconds() > 99 * 3600
        await sdk.Sandbox.set_timeout(sandbox.sandbox_id, 60)
        info = await sandbox.get_info()
        left = info.end_at - datetime.datetime.now(datetime.timezone.utc)
        assert left.total_seconds() <= 60
    with pytest.raises(SandboxException):
        await sandbox.set_timeout(60)


async def gone(sandbox, seconds=20):
    async def look():
        while await sandbox.is_running():
            await asyncio.sleep(0.1)

    await asyncio.wait_for(look(), seconds)


async def test_when_its_time_is_over_it_is_ended(sdk):
    sandbox = await sdk.Sandbox.create("base", timeout=2)
    await gone(sandbox)
    with pytest.raises(SandboxNotFoundException):
        await sdk.Sandbox.connect(sandbox.sandbox_id)
    assert await sandbox.kill() is False


async def test_when_its_time_is_over_it_is_put_to_sleep_if_that_is_wanted(sdk):
    lifecycle = {"on_timeout": "pause"}
    sandbox = await sdk.Sandbox.create("base", timeout=2, lifecycle=lifecycle)
    try:
        await sandbox.files.write("kept", "kept")
        await gone(sandbox)
        # It is not to be used any more as soon as it begins to be put to sleep.
        while (info := await sandbox.get_info()).state != SandboxState.PAUSED:
            await asyncio.sleep(0.02)
        assert await sandbox.is_running() is False
        assert info.lifecycle["on_timeout"].value == "pause"
        assert info.lifecycle["auto_resume"] is False
        await sandbox.connect(timeout=60)
        assert await sandbox.is_running()
        assert await sandbox.files.read("kept") == "kept"
    finally:
        await sandbox.kill()


async def test_a_request_wakes_it_if_that_is_wanted(sdk):
    lifecycle = {"on_timeout": "pause", "auto_resume": True}
    sandbox = await sdk.Sandbox.create("base", timeout=60, lifecycle=lifecycle)
    try:
        await sandbox.files.write("kept", "kept")
        assert await sandbox.pause() is True
        assert (await sandbox.get_info()).state == SandboxState.PAUSED
        assert await sandbox.files.read("kept") == "kept"
        assert (await sandbox.get_info()).state == SandboxState.RUNNING
        await sandbox.pause()
        assert (await sandbox.commands.run("cat kept")).stdout == "kept"
    finally:
        await sandbox.kill()


async def test_nothing_else_wakes_it(sdk, sandbox):
    await sandbox.pause()
    assert await sandbox.is_running() is False
    with pytest.raises(Exception) as raised:
        await sandbox.files.read("anything")
    assert "SandboxNotRunning" in type(raised.value).__name__
    with pytest.raises(Exception):
        await sandbox.commands.run("true")
    assert (await sandbox.get_info()).state == SandboxState.PAUSED


COUNTER = "i=0; while :; do i=$((i+1)); echo $i > /home/user/count; sleep 0.02; done"


@patient(170)
@differs(
    "in sandbox isolation, what runs is kept for as long as the daemon runs; files always",
    "Sandbox.pause",
)
@covers("Sandbox.beta_pause")
async def test_twenty_sleeps_lose_nothing(sdk, sandbox):
    running = await sandbox.commands.run(COUNTER, background=True, timeout=0)
    pid = running.pid
    await sandbox.files.write("files/0", "0")

    async def count():
        while True:
            # It may be between being emptied and being written.
            if text := (await sandbox.files.read("/home/user/count")).strip():
                return int(text)

    while not await sandbox.files.exists("/home/user/count"):
        await asyncio.sleep(0.02)
    last = 0
    for turn in range(1, 21):
        pause = sandbox.beta_pause if turn == 20 else sandbox.pause
        assert await pause() is True
        assert await sandbox.is_running() is False
        await sandbox.connect(timeout=120)
        await sandbox.files.write(f"files/{turn}", str(turn))
        now = await count()
        # It has gone on and not begun anew.
        assert now >= last
        last = now
    for turn in range(21):
        assert await sandbox.files.read(f"files/{turn}") == str(turn)
    found = [process.pid for process in await sandbox.commands.list()]
    assert pid in found
    while await count() <= last:
        await asyncio.sleep(0.02)
    assert await sandbox.commands.kill(pid) is True


async def test_who_waits_for_a_pause_has_it_too(sdk, sandbox, url):
    async with api(url) as client:
        path = f"/sandboxes/{sandbox.sandbox_id}/pause"
        # Nobody is told that it sleeps before it does; who comes after that is late.
        told = []
        for answer in asyncio.as_completed([client.post(path) for _ in range(5)]):
            told.append((await answer).status_code)
        assert told[0] == 204 and set(told) <= {204, 409}
        assert (await client.post(path)).status_code == 409


async def test_a_second_pause_says_that_it_sleeps(sdk, sandbox):
    assert await sandbox.pause() is True
    assert await sandbox.pause() is False
    assert await sdk.Sandbox.pause(sandbox.sandbox_id) is False
    with pytest.raises(SandboxNotFoundException):
        await sdk.Sandbox.pause(uuid.uuid4().hex)


async def test_its_time_begins_again_when_it_wakes(sdk):
    sandbox = await sdk.Sandbox.create("base", timeout=60)
    try:
        await sandbox.pause()
        woken = await sdk.Sandbox.connect(sandbox.sandbox_id, timeout=300)
        info = await woken.get_info()
        left = info.end_at - datetime.datetime.now(datetime.timezone.utc)
        assert 280 < left.total_seconds() <= 300
        assert info.state == SandboxState.RUNNING
    finally:
        await sandbox.kill()


async def test_a_pause_without_memory_ends_what_runs_and_keeps_files(sdk, sandbox):
    running = await sandbox.commands.run("sleep 1000", background=True, timeout=0)
    await sandbox.files.write("kept", "kept")
    assert await sandbox.pause(mode="filesystem") is True
    await sandbox.connect()
    assert await sandbox.files.read("kept") == "kept"
    assert running.pid not in [it.pid for it in await sandbox.commands.list()]


async def test_one_that_is_asleep_can_be_ended(sdk):
    sandbox = await sdk.Sandbox.create("base", timeout=60)
    await sandbox.pause()
    assert await sandbox.kill() is True
    with pytest.raises(SandboxNotFoundException):
        await sandbox.connect()


async def test_methods_of_the_class_take_an_id(sdk, sandbox):
    info = await sdk.Sandbox.get_info(sandbox.sandbox_id)
    assert info.sandbox_id == sandbox.sandbox_id
    assert await sdk.Sandbox.kill(sandbox.sandbox_id) is True
    assert await sdk.Sandbox.kill(sandbox.sandbox_id) is False
    with pytest.raises(SandboxNotFoundException):
        await sdk.Sandbox.get_info(sandbox.sandbox_id)


@differs("what the kernel keeps of files is not counted apart: mem_cache is 0", "Sandbox.get_metrics")
async def test_what_it_uses_is_measured(sdk, sandbox):
    (first, *_) = await sandbox.get_metrics()
    assert first.cpu_count >= 1
    assert 0 <= first.cpu_used_pct <= 100 * first.cpu_count
    assert 0 < first.mem_used < first.mem_total
    assert 0 <= first.disk_used < first.disk_total
    assert isinstance(first.timestamp, datetime.datetime)
    hour = datetime.timedelta(hours=1)
    assert await sandbox.get_metrics(start=first.timestamp + hour) == []
    assert await sandbox.get_metrics(end=first.timestamp - hour) == []
    within = {"start": first.timestamp - hour, "end": first.timestamp + hour}
    assert len(await sandbox.get_metrics(**within)) >= 1
    assert len(await sdk.Sandbox.get_metrics(sandbox.sandbox_id)) >= 1


async def test_its_log_says_what_has_happened(sdk, sandbox, url):
    import os

    await sandbox.pause()
    await sandbox.connect()
    headers = {"X-API-KEY": os.environ["E2B_API_KEY"]}
    async with httpx.AsyncClient(headers=headers) as client:
        answer = await client.get(f"{url}/v2/sandboxes/{sandbox.sandbox_id}/logs")
        assert answer.status_code == 200
        lines = answer.json()["logs"]
        messages = [line["message"] for line in lines]
        assert "paused" in messages and "resumed" in messages
        assert messages.index("paused") < messages.index("resumed")
        assert {line["level"] for line in lines} <= {"debug", "info", "warn", "error"}
        old = await client.get(f"{url}/sandboxes/{sandbox.sandbox_id}/logs")
        assert any(line["line"] == "paused" for line in old.json()["logs"])
        none = await client.get(f"{url}/v2/sandboxes/{uuid.uuid4().hex}/logs")
        assert none.status_code == 404
        assert none.json()["code"] == 404 and none.json()["message"]


async def test_how_many_run_is_told_and_lists_are_written_in_two_ways(sdk, name, url):
    made = [await sdk.Sandbox.create("base", timeout=60, metadata={"of": name}) for _ in range(3)]
    all_of_it = {"metadata": f"of={name}"}
    try:
        async with api(url) as client:
            part = await client.get("/v2/sandboxes", params=all_of_it | {"limit": "1"})
            assert len(part.json()) == 1 and part.headers["x-total-running"] == "3"
            after = all_of_it | {"limit": "1", "nextToken": part.headers["x-next-token"]}
            part = await client.get("/v2/sandboxes", params=after)
            assert part.headers["x-total-running"] == "3"
            await made[0].pause()
            both = [*all_of_it.items(), ("state", "running"), ("state", "paused")]
            told = await client.get("/v2/sandboxes", params=both)
            assert len(told.json()) == 3 and told.headers["x-total-running"] == "2"
            asleep = await client.get("/v2/sandboxes", params=all_of_it | {"state": "paused"})
            assert len(asleep.json()) == 1 and "x-total-running" not in asleep.headers
            some = [("sandbox_ids", it.sandbox_id) for it in made[1:]]
            for sandbox in made[1:]:
                await sandbox.get_metrics()
            measured = await client.get("/sandboxes/metrics", params=some)
            assert set(measured.json()["sandboxes"]) == {it.sandbox_id for it in made[1:]}
            twice = [("limit", "1"), ("limit", "2")]
            assert (await client.get("/v2/sandboxes", params=twice)).status_code == 400
    finally:
        for sandbox in made:
            await sandbox.kill()


async def test_one_whose_time_is_over_is_not_there_any_more(sdk, name, url):
    sandbox = await sdk.Sandbox.create("base", timeout=60, metadata={"of": name})
    async with api(url) as client:
        path = f"/sandboxes/{sandbox.sandbox_id}"
        assert (await client.post(f"{path}/timeout", json={"timeout": 0})).status_code == 204
        assert (await client.get(path)).status_code == 404
        assert await ids(sdk, metadata={"of": name}) == []
    sandbox = await sdk.Sandbox.create("base", timeout=60, metadata={"of": name})
    async with api(url) as client:
        path = f"/sandboxes/{sandbox.sandbox_id}"
        # It is being ended when it is asked for.
        killed, told = await asyncio.gather(client.delete(path), later(client, path))
        assert (killed.status_code, told.status_code) == (204, 404)


async def later(client, path):
    await asyncio.sleep(0)
    while (told := await client.get(path)).status_code == 200:
        pass
    return told


async def test_what_makes_no_sense_is_said(sdk, sandbox, url):
    async with api(url) as client:
        new = {"templateID": "base"}
        for more, what in [
            ({"timeout": -1}, "not negative"),
            ({"timeout": "x"}, "timeout"),
            ({"autoPauseMemory": False}, "autoPauseMemory"),
        ]:
            refused = await client.post("/sandboxes", json=new | more)
            assert refused.status_code == 400 and what in refused.json()["message"], more
        path = f"/sandboxes/{sandbox.sandbox_id}/timeout"
        end = (await sandbox.get_info()).end_at
        shorter = await client.post(path, json={"timeout": 5, "extendOnly": True})
        assert shorter.status_code == 204 and (await sandbox.get_info()).end_at == end
        refused = await client.post(path, json={"timeout": -1})
        assert refused.status_code == 400 and "not negative" in refused.json()["message"]
        refused = await client.post(f"/sandboxes/{uuid.uuid4().hex}/resume", json={})
        nothing = {"code": 404, "message": "Sandbox can't be resumed, no snapshot found"}
        assert refused.json() == nothing


async def test_what_the_api_has_not_is_not_there(sdk, sandbox, url):
    async with api(url) as client:
        for path in (
            f"/sandboxes/{sandbox.sandbox_id}/nothing",
            "/templates/a/b/c/d",
            "/teams",
            "/teams/a/metrics",
            "/v2/nothing",
            "/v3/sandboxes",
        ):
            refused = await client.get(path)
            assert refused.status_code == 404 and refused.json()["code"] == 404, path
        refused = await client.patch(f"/sandboxes/{sandbox.sandbox_id}", json={})
        assert (refused.status_code, refused.json()["code"]) == (405, 405)
    async with httpx.AsyncClient(base_url=url) as nobody:
        assert (await nobody.get("/teams")).status_code == 401


async def test_a_repeated_creation_is_done_once(sdk):
    key = str(uuid.uuid4())
    one = await sdk.Sandbox.create("base", timeout=60, idempotency_key=key)
    two = await sdk.Sandbox.create("base", timeout=60, idempotency_key=key)
    try:
        assert one.sandbox_id == two.sandbox_id
        three = await sdk.Sandbox.create("base", timeout=60, idempotency_key=str(uuid.uuid4()))
        assert three.sandbox_id != one.sandbox_id
        await three.kill()
    finally:
        await one.kill()
    with pytest.raises(InvalidArgumentException):
        await sdk.Sandbox.create("base", idempotency_key="not a uuid")


async def test_thirty_at_once_are_all_made(sdk, name):
    made = await asyncio.gather(
        *(sdk.Sandbox.create("base", timeout=60, metadata={"of": name}) for _ in range(30))
    )
    assert len({sandbox.sandbox_id for sandbox in made}) == 30
    outputs = await asyncio.gather(*(it.commands.run(f"echo {i}") for i, it in enumerate(made)))
    assert [told.stdout for told in outputs] == [f"{i}\n" for i in range(30)]
    assert set(await ids(sdk, metadata={"of": name})) == {it.sandbox_id for it in made}
    assert all(await asyncio.gather(*(sandbox.kill() for sandbox in made)))


async def test_a_client_has_settings_of_its_own(sdk, monkeypatch):
    import os

    settings = {
        "api_key": os.environ["E2B_API_KEY"],
        "api_url": os.environ["E2B_API_URL"],
        "sandbox_url": os.environ["E2B_SANDBOX_URL"],
    }
    for variable in ("E2B_API_KEY", "E2B_API_URL", "E2B_SANDBOX_URL"):
        monkeypatch.delenv(variable)
    client = sdk.client(**settings)
    sandbox = await client["Sandbox"].create("base", timeout=60)
    assert (await sandbox.commands.run("echo here")).stdout == "here\n"
    assert await client["Template"].exists("base") is True
    assert await sandbox.kill() is True
