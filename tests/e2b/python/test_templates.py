"""Templates: defined, built, used, tagged, and what cannot be built."""

import pytest
from e2b import (
    BuildException,
    CopyItem,
    FileUploadException,
    SandboxException,
    TemplateBuildStatus,
    wait_for_file,
    wait_for_port,
    wait_for_timeout,
)

from cases import covers, differs, refused


async def build(sdk, definition, *args, **named):
    return await sdk.Template.build(definition.inner, *args, **named)


@differs("there is no cache of steps: a build does all of them", "Template.build")
@covers(
    "Template.from_base_image",
    "Template.run_cmd",
    "Template.set_envs",
    "Template.set_workdir",
    "Template.set_user",
    "Template.make_dir",
    "Template.make_symlink",
    "Template.rename",
    "Template.remove",
    "Template.skip_cache",
)
async def test_a_template_has_what_its_steps_have_done(sdk, name):
    lines = []
    definition = (
        sdk.template()
        .from_base_image()
        .skip_cache()
        .set_envs({"COLOUR": "blue", "OTHER": "a b"})
        .run_cmd("echo $COLOUR > /home/user/colour; id -un >> /home/user/colour; echo built-line")
        .run_cmd(["echo one > /home/user/one", "echo two > /home/user/two"])
        .set_user("root")
        .run_cmd("id -un > /root/who")
        .set_workdir("/srv/app")
        .make_dir("/srv/app/data", mode=0o750)
        .run_cmd("pwd > here; echo old > old; echo drop > drop")
        .rename("/srv/app/old", "/srv/app/new")
        .make_symlink("/srv/app/new", "/srv/app/link")
        .remove("/srv/app/drop")
        .set_user("user")
    )
    built = await build(sdk, definition, name, on_build_logs=lambda line: lines.append(line.message))
    assert built.template_id and built.build_id
    assert built.name == name
    assert any("built-line" in line for line in lines)
    assert any("RUN" in line for line in lines)
    async with await sdk.Sandbox.create(name, timeout=60) as sandbox:
        info = await sandbox.get_info()
        assert (info.template_id, info.name) == (built.template_id, name)
        assert await sandbox.files.read("/home/user/colour") == "blue\nuser\n"
        assert (await sandbox.commands.run("cat one two", cwd="/home/user")).stdout == "one\ntwo\n"
        assert await sandbox.files.read("/root/who", user="root") == "root\n"
        assert await sandbox.files.read("/srv/app/here") == "/srv/app\n"
        assert await sandbox.files.read("/srv/app/link") == "old\n"
        assert await sandbox.files.exists("/srv/app/old") is False
        assert await sandbox.files.exists("/srv/app/drop") is False
        assert (await sandbox.commands.run("stat -c %a /srv/app/data")).stdout == "750\n"
        told = await sandbox.commands.run("echo $COLOUR, $OTHER; whoami; pwd")
        assert told.stdout == "blue, a b\nuser\n/srv/app\n"
    # Each is of its own.
    async with await sdk.Sandbox.create(name, timeout=60) as sandbox:
        assert (await sandbox.commands.run("cat /home/user/two")).stdout == "two\n"


@covers("Template.copy", "Template.copy_items")
async def test_files_are_copied_into_a_template(sdk, name, tmp_path):
    (tmp_path / "one.txt").write_text("one")
    (tmp_path / "two.md").write_text("two")
    (tmp_path / "folder/sub").mkdir(parents=True)
    (tmp_path / "folder/a").write_text("a")
    (tmp_path / "folder/sub/b").write_text("b")
    (tmp_path / "folder/skip.log").write_text("not sent")
    (tmp_path / "g1.csv").write_text("1")
    (tmp_path / "g2.csv").write_text("2")
    definition = (
        sdk.template(file_context_path=str(tmp_path), file_ignore_patterns=["**/*.log"])
        .from_base_image()
        .copy("one.txt", "/srv/one.txt")
        .copy("one.txt", "relative.txt")
        .copy("two.md", "/srv/docs/")
        .copy("folder", "/srv/folder")
        .copy("*.csv", "/srv/tables/")
        .copy("folder/*", "all")
        .copy("one.txt", "/srv/private", user="root", mode=0o600)
        .copy_items([CopyItem(src="g1.csv", dest="/srv/item.csv")])
    )
    await build(sdk, definition, name)
    async with await sdk.Sandbox.create(name, timeout=60) as sandbox:
        for path, content in [
            ("/srv/one.txt", "one"),
            ("/home/user/relative.txt", "one"),
            ("/srv/docs/two.md", "two"),
            ("/srv/folder/a", "a"),
            ("/srv/folder/sub/b", "b"),
            ("/srv/tables/g1.csv", "1"),
            ("/srv/tables/g2.csv", "2"),
            ("/srv/item.csv", "1"),
            ("/home/user/all/a", "a"),
            ("/home/user/all/sub/b", "b"),
        ]:
            assert await sandbox.files.read(path) == content, path
        assert await sandbox.files.exists("/srv/folder/skip.log") is False
        owner = await sandbox.commands.run("stat -c '%U %a' /srv/private; stat -c %U /srv/one.txt")
        assert owner.stdout == "root 600\nuser\n"


@covers("Template.set_start_cmd", "Template.set_ready_cmd", "Template.from_template")
async def test_a_template_runs_something_from_the_start_on(sdk, name):
    definition = (
        sdk.template()
        .from_base_image()
        .set_workdir("/srv")
        .set_start_cmd("python3 -m http.server 8000 --directory /srv", wait_for_port(8000))
    )
    await build(sdk, definition, name)
    curl = "curl -s -o /dev/null -w '%{http_code}' http://localhost:8000/"
    async with await sdk.Sandbox.create(name, timeout=60) as sandbox:
        # It is ready when its client has it.
        assert (await sandbox.commands.run(curl)).stdout == "200"
        assert any("http.server" in " ".join(it.args) for it in await sandbox.commands.list())
    again = f"{name}-more"
    definition = sdk.template().from_template(name).run_cmd("echo more > /srv/more", user="root")
    await build(sdk, definition, again)
    async with await sdk.Sandbox.create(again, timeout=60) as sandbox:
        assert await sandbox.files.read("/srv/more") == "more\n"
        assert (await sandbox.commands.run(curl)).stdout == "200"
    ready = f"{name}-ready"
    definition = (
        sdk.template()
        .from_base_image()
        .set_start_cmd("sleep 0.5; touch /tmp/ready; sleep infinity", wait_for_file("/tmp/ready"))
    )
    await build(sdk, definition, ready)
    async with await sdk.Sandbox.create(ready, timeout=60) as sandbox:
        assert await sandbox.files.exists("/tmp/ready") is True
    only = sdk.template().from_base_image().set_ready_cmd(wait_for_timeout(100))
    await build(sdk, only, f"{name}-only")


@covers("Template.exists", "Template.alias_exists")
async def test_whether_there_is_a_template(sdk, name):
    assert await sdk.Template.exists("base") is True
    assert await sdk.Template.exists(name) is False
    await build(sdk, sdk.template().from_base_image(), name)
    assert await sdk.Template.exists(name) is True
    assert await sdk.Template.alias_exists(name) is True
    assert await sdk.Template.alias_exists(f"{name}-not") is False


@covers("Template.assign_tags", "Template.remove_tags", "Template.get_tags")
async def test_builds_have_tags(sdk, name):
    of = lambda text: sdk.template().from_base_image().run_cmd(f"echo {text} > /home/user/which")
    one = await build(sdk, of("one"), f"{name}:v1", tags=["stable"])
    assert {"v1", "stable"} <= set(one.tags)
    two = await build(sdk, of("two"), f"{name}:v2")
    assert one.template_id == two.template_id and one.build_id != two.build_id

    async def which(template):
        async with await sdk.Sandbox.create(template, timeout=60) as sandbox:
            return (await sandbox.files.read("/home/user/which")).strip()

    assert await which(f"{name}:v1") == "one"
    assert await which(f"{name}:v2") == "two"
    assert await which(f"{name}:stable") == "one"
    told = await sdk.Template.assign_tags(f"{name}:v2", ["stable", "latest"])
    assert told.build_id == two.build_id
    assert set(told.tags) == {"stable", "latest"}
    assert await which(f"{name}:stable") == "two"
    tags = {it.tag: it.build_id for it in await sdk.Template.get_tags(one.template_id)}
    assert tags["v1"] == one.build_id
    assert tags["v2"] == tags["stable"] == tags["latest"] == two.build_id
    await sdk.Template.remove_tags(name, "latest")
    left = {it.tag for it in await sdk.Template.get_tags(one.template_id)}
    assert "latest" not in left and {"v1", "v2", "stable"} <= left
    with pytest.raises(SandboxException):
        await sdk.Sandbox.create(f"{name}:latest")
    assert await sdk.Template.exists(f"{name}:v1") is True
    # What a name stands for without a tag is not taken away.
    with pytest.raises(Exception, match="default"):
        await sdk.Template.remove_tags(name, "default")


async def test_what_is_always_there_has_one_tag(sdk):
    async with await sdk.Sandbox.create("base:default", timeout=60) as sandbox:
        assert await sandbox.is_running()
    for template in ("base:nonexistent-tag", "code-interpreter-v1:v2"):
        with pytest.raises(SandboxException, match="404"):
            await sdk.Sandbox.create(template)


@pytest.mark.parametrize(
    ("size", "why"),
    [
        ({"cpuCount": 0}, "CPU count must be at least 1"),
        ({"cpuCount": 3}, "CPU count must be 1 or an even number"),
        ({"cpuCount": 34}, "CPU count must be at most 32"),
        ({"memoryMB": 64}, "Memory must be at least 128 MiB"),
        ({"memoryMB": 129}, "Memory must be divisible by 2"),
        ({"memoryMB": 1 << 20}, "Memory can't be higher than"),
    ],
)
async def test_sizes_that_no_machine_has_are_refused(sdk, name, url, size, why):
    import os

    import httpx

    headers = {"X-API-KEY": os.environ["E2B_API_KEY"]}
    async with httpx.AsyncClient(headers=headers, base_url=url) as client:
        refused = await client.post("/v3/templates", json={"name": name} | size)
        assert refused.status_code == 400 and why in refused.json()["message"]
        assert await sdk.Template.exists(name) is False


@covers("Template.build_in_background", "Template.get_build_status")
async def test_a_build_is_looked_at_from_outside(sdk, name):
    import asyncio

    definition = sdk.template().from_base_image().run_cmd("echo in-the-log; sleep 0.5")
    begun = await sdk.Template.build_in_background(definition.inner, name)
    assert begun.build_id
    lines, offset = [], 0

    async def finish():
        nonlocal offset
        while True:
            status = await sdk.Template.get_build_status(begun, logs_offset=offset)
            offset += len(status.log_entries)
            assert status.logs == [line.message for line in status.log_entries]
            lines.extend(line.message for line in status.log_entries)
            if status.status not in (TemplateBuildStatus.WAITING, TemplateBuildStatus.BUILDING):
                return status
            await asyncio.sleep(0.1)

    status = await asyncio.wait_for(finish(), 60)
    assert status.status == TemplateBuildStatus.READY
    assert status.build_id == begun.build_id and status.template_id == begun.template_id
    assert sum("in-the-log" in line for line in lines if "RUN" not in line) == 1


async def test_a_step_that_fails_is_named(sdk, name):
    definition = sdk.template().from_base_image().run_cmd("true").run_cmd("echo why; exit 3")
    with pytest.raises(BuildException, match="exit status 3"):
        await build(sdk, definition, name)
    with pytest.raises(SandboxException):
        await sdk.Sandbox.create(name)
    missing = sdk.template().from_template(f"{name}-is-not-there")
    with pytest.raises(BuildException):
        await build(sdk, missing, f"{name}-2")
    never = sdk.template().from_base_image().set_start_cmd("exit 5", "test -e /tmp/never")
    with pytest.raises(BuildException):
        await build(sdk, never, f"{name}-3")
    ended = sdk.template().from_base_image().set_start_cmd("./none", wait_for_timeout(1000))
    with pytest.raises(BuildException):
        await build(sdk, ended, f"{name}-4")


async def test_a_template_that_is_always_there_is_nobodys(sdk):
    with pytest.raises(Exception, match="base"):
        await build(sdk, sdk.template().from_base_image(), "base")


@refused(
    "501 denizen does not have credentials of a registry in a build (fromImageRegistry)",
    "Template.from_aws_registry",
    "Template.from_gcp_registry",
)
async def test_registries_with_credentials_are_refused(sdk, name):
    aws = sdk.template().from_aws_registry("registry.invalid/a:1", "id", "secret", "eu-west-1")
    gcp = sdk.template().from_gcp_registry("registry.invalid/a:1", {"type": "service_account"})
    own = sdk.template().from_image("registry.invalid/a:1", username="a", password="b")
    for definition in (aws, gcp, own):
        with pytest.raises(Exception, match="fromImageRegistry"):
            await build(sdk, definition, name)


@covers("Template.to_json", "Template.to_dockerfile", "Template.from_dockerfile")
async def test_a_definition_is_written_down(sdk, name):
    import json

    dockerfile = "FROM e2bdev/base\nENV COLOUR=green\nRUN echo $COLOUR > /home/user/colour\nWORKDIR /srv\n"
    definition = sdk.template().from_dockerfile(dockerfile)
    told = json.loads(await sdk.Template.to_json(definition.inner))
    assert told["fromImage"] == "e2bdev/base"
    image = sdk.template().from_image("debian:12").run_cmd("true").set_envs({"A": "b"})
    text = await sdk.Template.to_dockerfile(image.inner)
    assert text.startswith("FROM debian:12") and "ENV A=b" in text
    await build(sdk, definition, name)
    async with await sdk.Sandbox.create(name, timeout=60) as sandbox:
        assert await sandbox.files.read("/home/user/colour") == "green\n"
        assert (await sandbox.commands.run("echo $COLOUR; pwd")).stdout == "green\n/srv\n"


# What image or command each of these stands for. Building would need the network.
@differs(
    "as a step of a build: needs the network, and programs of the image, as ever",
    "Template.apt_install",
    "Template.pip_install",
    "Template.npm_install",
    "Template.bun_install",
    "Template.git_clone",
)
@differs(
    "an image that the daemon has not is pulled from its registry, which it must be able to reach",
    "Template.from_image",
    "Template.from_python_image",
    "Template.from_node_image",
    "Template.from_bun_image",
    "Template.from_debian_image",
    "Template.from_ubuntu_image",
    "Template.from_alpine_image",
    "Template.from_fedora_image",
    "Template.from_arch_image",
)
async def test_what_stands_for_images_and_commands(sdk, name, tmp_path):
    import json

    for method, image in [
        ("from_python_image", "python:3"),
        ("from_node_image", "node:lts"),
        ("from_bun_image", "oven/bun:latest"),
        ("from_debian_image", "debian:stable"),
        ("from_ubuntu_image", "ubuntu:latest"),
        ("from_alpine_image", "alpine:"),
        ("from_fedora_image", "fedora:"),
        ("from_arch_image", "archlinux:"),
    ]:
        definition = getattr(sdk.template(), method)()
        told = json.loads(await sdk.Template.to_json(definition.inner))
        assert image in told["fromImage"], method
    steps = (
        sdk.template()
        .from_image("registry.invalid/a:1")
        .apt_install("curl")
        .pip_install("six")
        .npm_install("left-pad")
        .bun_install("left-pad")
        .git_clone("https://git.invalid/a.git", "/srv/a")
    )
    told = json.loads(await sdk.Template.to_json(steps.inner))
    assert {step["type"] for step in told["steps"]} <= {"RUN"}
    # One that cannot be brought is said, and by its name.
    with pytest.raises(BuildException, match="registry.invalid"):
        await build(sdk, steps, name)


@refused(
    "the step fails: the image has no `mcp-gateway` or `devcontainer`",
    "Template.add_mcp_server",
    "Template.beta_dev_container_prebuild",
    "Template.beta_set_dev_container_start",
)
async def test_what_needs_programs_of_e2bs_own_images(sdk, name):
    servers = sdk.template().from_template("mcp-gateway").add_mcp_server("exa")
    with pytest.raises(BuildException, match="mcp-gateway"):
        await build(sdk, servers, name)
    container = sdk.template().from_template("devcontainer").beta_dev_container_prebuild("/srv")
    with pytest.raises(BuildException, match="devcontainer"):
        await build(sdk, container, name)
    start = sdk.template().from_template("devcontainer").beta_set_dev_container_start("/srv")
    with pytest.raises(BuildException, match="devcontainer"):
        await build(sdk, start, name)


async def test_files_that_are_not_there_are_said(sdk, name, tmp_path):
    definition = sdk.template(file_context_path=str(tmp_path)).from_base_image().copy("none", "/srv/")
    with pytest.raises((FileUploadException, ValueError)):
        await build(sdk, definition, name)


async def test_templates_are_listed_and_removed(sdk, name, url):
    import os

    import httpx

    built = await build(sdk, sdk.template().from_base_image(), name)
    headers = {"X-API-KEY": os.environ["E2B_API_KEY"]}
    async with httpx.AsyncClient(headers=headers, base_url=url) as client:
        other = await build(sdk, sdk.template().from_base_image(), f"{name}-2")
        ids, after = [], {}
        while True:
            part = await client.get("/v2/templates", params={"limit": "1"} | after)
            ids += [it["templateID"] for it in part.json()]
            if not (token := part.headers.get("x-next-token")):
                break
            assert len(part.json()) == 1
            after = {"nextToken": token}
        listed = (await client.get("/templates")).json()
        # Others make and remove templates meanwhile.
        for made in (built, other):
            assert ids.count(made.template_id) == 1
            assert [it["templateID"] for it in listed].count(made.template_id) == 1
        assert (await client.get("/v2/templates", params={"limit": "0"})).status_code == 400
        (found,) = [it for it in listed if it["templateID"] == built.template_id]
        assert found["names"] == [name] and found["buildStatus"] == "ready"
        assert found["cpuCount"] >= 1 and found["memoryMB"] > 0
        one = (await client.get(f"/templates/{built.template_id}")).json()
        assert [it["buildID"] for it in one["builds"]] == [built.build_id]
        assert (await client.delete(f"/templates/{built.template_id}")).status_code == 204
        assert (await client.get(f"/templates/{built.template_id}")).status_code == 404
    with pytest.raises(SandboxException):
        await sdk.Sandbox.create(name)
