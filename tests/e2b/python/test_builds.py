"""Steps of builds, as those who write definitions expect them."""

import asyncio
import time

import pytest
from e2b import BuildException

from cases import patient
from test_templates import build


@patient(120)
async def test_values_have_what_was_set_before_them(sdk, name):
    definition = (
        sdk.template()
        .from_base_image()
        .set_envs({"PATH": "/opt/it's/bin:${PATH}", "A": "1"})
        .set_envs({"B": "${A}2", "C": "${NONE:-else}", "D": r"\$A"})
        .run_cmd('[ "$A-$B-$C-$D" = "1-12-else-\\$A" ]')
        .run_cmd("case $PATH in \"/opt/it's/bin:\"*/bin*) ;; *) exit 1 ;; esac")
    )
    await build(sdk, definition, name)
    async with await sdk.Sandbox.create(name, timeout=60) as sandbox:
        shown = await sandbox.commands.run("echo $B; echo $PATH")
        b, path = shown.stdout.splitlines()
        assert b == "12"
        assert path.startswith("/opt/it's/bin:")
        assert "/usr/bin" in path


@patient(120)
async def test_users_and_folders_are_made(sdk, name):
    definition = (
        sdk.template()
        .from_base_image()
        .run_cmd("[ ! -e /etc/skel/.profile ] || [ -e ~/.profile ]")
        .set_user("appuser")
        .set_workdir("/srv/app/deep")
        .run_cmd('[ "$(whoami)" = appuser ] && touch ../here && touch here')
        .run_cmd('[ "$(stat -c %U:%G /srv/app)" = appuser:appuser ]')
    )
    await build(sdk, definition, name)
    async with await sdk.Sandbox.create(name, timeout=60) as sandbox:
        assert (await sandbox.commands.run("whoami; pwd")).stdout == "appuser\n/srv/app/deep\n"
        assert (await sandbox.commands.run("whoami", user="user")).stdout == "user\n"


async def test_what_fails_says_why(sdk, name):
    base = lambda: sdk.template().from_base_image()
    for definition, why in (
        (
            base().run_cmd("whoami", user="root123"),
            "failed to run command 'whoami': command failed: unauthenticated: "
            "invalid username: 'root123'",
        ),
        (base().set_user("; exit 1"), "invalid username"),
        (base().run_cmd("exit 7"), "exit status 7"),
        (base().run_cmd("touch /srv/file", user="root").set_workdir("/srv/file"), "file"),
    ):
        with pytest.raises(BuildException) as failed:
            await build(sdk, definition, name)
        assert why in str(failed.value)


async def test_builds_side_by_side_send_the_same_files(sdk, name, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    for number in range(20):
        (folder / f"{number}.txt").write_text("x" * 1000)
    names = [f"{name}-{number}" for number in range(3)]
    make = lambda: (
        sdk.template(file_context_path=str(tmp_path)).from_base_image().copy("folder", "/srv/folder")
    )
    built = await asyncio.gather(*(build(sdk, make(), it) for it in names), return_exceptions=True)
    assert [it for it in built if isinstance(it, Exception)] == []


async def test_what_a_template_starts_is_in_its_log(sdk, name):
    told = []
    definition = (
        sdk.template()
        .from_base_image()
        .set_start_cmd("echo from within; echo ready >/tmp/ready; sleep 600", "cat /tmp/ready")
    )
    await build(sdk, definition, name, on_build_logs=lambda entry: told.append(entry.message))
    log = "\n".join(told)
    places = [
        log.find(text)
        for text in (
            "Running start command",
            "Waiting for template to be ready: cat /tmp/ready",
            "Template is ready",
        )
    ]
    assert -1 not in places
    assert places == sorted(places)
    assert "[start] [stdout]: from within" in log


async def test_a_sandbox_is_killed_at_once(sdk):
    sandbox = await sdk.Sandbox.create("base", timeout=60)
    running = await sdk.start(sandbox, "trap '' TERM; echo there; while :; do sleep 1; done")
    await running.until(lambda it: "there" in it.out)
    await sdk.terminal(sandbox)
    began = time.monotonic()
    assert await sandbox.kill() is True
    assert time.monotonic() - began < 2
