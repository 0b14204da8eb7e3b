"""Forks and snapshots of sandboxes."""

import asyncio

import pytest
from e2b import (
    InvalidArgumentException,
    SandboxException,
    SandboxNotFoundException,
    SandboxState,
)

from cases import covers, differs


@differs(
    "files are copied; what runs is only in microVMs", "Sandbox.fork"
)
async def test_a_fork_has_the_files_and_a_life_of_its_own(sdk, sandbox):
    await sandbox.files.write("/home/user/state", "before")
    (fork,) = await sandbox.fork()
    try:
        assert fork.sandbox_id != sandbox.sandbox_id
        assert await sandbox.is_running() and await fork.is_running()
        assert await fork.files.read("/home/user/state") == "before"
        await fork.files.write("/home/user/state", "after")
        assert await sandbox.files.read("/home/user/state") == "before"
        assert (await fork.commands.run("whoami")).stdout == "user\n"
    finally:
        await fork.kill()
    assert await sandbox.is_running()


async def test_several_forks_are_made_at_once(sdk, sandbox):
    await sandbox.files.write("state", "before")
    forks = await sandbox.fork(count=3, timeout=60)
    try:
        assert len({fork.sandbox_id for fork in forks} | {sandbox.sandbox_id}) == 4
        for fork in forks:
            assert await fork.files.read("state") == "before"
    finally:
        for fork in forks:
            await fork.kill()
    with pytest.raises(InvalidArgumentException):
        await sandbox.fork(count=0)


async def test_a_fork_is_made_by_id_and_of_nothing_that_is_gone(sdk, sandbox):
    (fork,) = await sdk.Sandbox.fork(sandbox.sandbox_id, timeout=60)
    assert await fork.is_running()
    assert await fork.kill() is True
    await sandbox.kill()
    with pytest.raises(SandboxNotFoundException):
        await sandbox.fork()


@differs("it has files; what ran only in microVMs", "Sandbox.create_snapshot")
@covers("Sandbox.delete_snapshot", "Sandbox.list_snapshots", "SnapshotPaginator.next_items")
async def test_a_snapshot_is_what_new_sandboxes_begin_with(sdk, sandbox):
    await sandbox.files.write("/home/user/shared", "of the snapshot")
    taken = await sandbox.create_snapshot()
    assert taken.snapshot_id
    await sandbox.files.write("/home/user/shared", "later")
    one, two = await asyncio.gather(
        *(sdk.Sandbox.create(taken.snapshot_id, timeout=60) for _ in range(2))
    )
    try:
        for new in (one, two):
            assert await new.files.read("/home/user/shared") == "of the snapshot"
        await one.files.write("/home/user/shared", "of one")
        assert await two.files.read("/home/user/shared") == "of the snapshot"
        assert await sandbox.files.read("/home/user/shared") == "later"
    finally:
        await one.kill()
        await two.kill()
    listed = await sdk.Sandbox.list_snapshots(sandbox_id=sandbox.sandbox_id)
    assert [it.snapshot_id for it in await listed.next_items()] == [taken.snapshot_id]
    assert not listed.has_next
    of_it = await sandbox.list_snapshots()
    assert [it.snapshot_id for it in await of_it.next_items()] == [taken.snapshot_id]
    assert await sdk.Sandbox.delete_snapshot(taken.snapshot_id) is True
    assert await sdk.Sandbox.delete_snapshot(taken.snapshot_id) is False
    with pytest.raises(SandboxException):
        await sdk.Sandbox.create(taken.snapshot_id)


async def test_a_snapshot_has_a_name(sdk, sandbox, name):
    taken = await sandbox.create_snapshot(name=name)
    try:
        assert any(name in it for it in taken.names)
        listed = await sdk.Sandbox.list_snapshots(name=name)
        assert [it.snapshot_id for it in await listed.next_items()] == [taken.snapshot_id]
        none = await sdk.Sandbox.list_snapshots(name=f"{name}-not")
        assert await none.next_items() == []
        async with await sdk.Sandbox.create(name, timeout=60) as new:
            assert await new.is_running()
    finally:
        assert await sdk.Sandbox.delete_snapshot(taken.snapshot_id) is True


async def test_a_snapshot_has_tags(sdk, sandbox, name, url):
    import os

    import httpx

    one = await sandbox.create_snapshot(name=f"{name}:v1")
    two = await sandbox.create_snapshot(name=f"{name}:v2")
    assert one.names == [f"{name}:v1"]
    assert two.names == [f"{name}:v2", f"{name}:v1"]
    headers = {"X-API-KEY": os.environ["E2B_API_KEY"]}
    async with httpx.AsyncClient(headers=headers, base_url=url) as client:
        told = await client.get(f"/templates/{two.snapshot_id}/tags")
        assert told.status_code == 200
        assert {it["tag"] for it in told.json()} == {"v1", "v2"}
    for snapshot in (one, two):
        assert await sdk.Sandbox.delete_snapshot(snapshot.snapshot_id) is True


async def test_one_that_sleeps_is_forked(sdk, sandbox):
    await sandbox.files.write("kept", "kept")
    await sandbox.pause()
    (fork,) = await sdk.Sandbox.fork(sandbox.sandbox_id, timeout=60)
    try:
        assert await fork.files.read("kept") == "kept"
        assert (await sandbox.get_info()).state == SandboxState.PAUSED
    finally:
        await fork.kill()


async def test_a_snapshot_outlives_its_sandbox(sdk):
    async with await sdk.Sandbox.create("base", timeout=60) as sandbox:
        await sandbox.files.write("kept", "kept")
        taken = await sdk.Sandbox.create_snapshot(sandbox.sandbox_id)
    async with await sdk.Sandbox.create(taken.snapshot_id, timeout=60) as new:
        assert await new.files.read("kept") == "kept"
    assert await sdk.Sandbox.delete_snapshot(taken.snapshot_id) is True


async def test_snapshots_are_listed_in_parts(sdk, sandbox):
    taken = [(await sandbox.create_snapshot()).snapshot_id for _ in range(3)]
    paginator = await sdk.Sandbox.list_snapshots(sandbox_id=sandbox.sandbox_id, limit=2)
    first = [it.snapshot_id for it in await paginator.next_items()]
    assert len(first) == 2 and paginator.has_next
    second = [it.snapshot_id for it in await paginator.next_items()]
    assert len(second) == 1 and not paginator.has_next
    assert sorted(first + second) == sorted(taken)
    for snapshot in taken:
        assert await sdk.Sandbox.delete_snapshot(snapshot) is True
