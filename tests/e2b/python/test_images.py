"""Templates and sandboxes of an image that the daemon has."""

import hashlib
import json
import subprocess
import tarfile

from cases import differs
from daemon import Daemon, make_root


def make_image(folder, name):
    """An archive with an image, as `docker save` makes them."""
    root = make_root(folder / "root")
    (root / "etc/motd").write_text("of the image\n")
    made = folder / "image"
    made.mkdir()
    layer = ["tar", "-C", root, "--owner=0", "--group=0", "-cf", made / "layer.tar", "."]
    subprocess.run(layer, check=True)
    digest = hashlib.sha256((made / "layer.tar").read_bytes()).hexdigest()
    config = {
        "architecture": "amd64",
        "os": "linux",
        "config": {"Env": ["PATH=/bin", "FROM_IMAGE=yes"]},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}"]},
    }
    (made / "config.json").write_text(json.dumps(config))
    manifest = [{"Config": "config.json", "RepoTags": [name], "Layers": ["layer.tar"]}]
    (made / "manifest.json").write_text(json.dumps(manifest))
    with tarfile.open(folder / "image.tar", "w") as archive:
        for part in ("manifest.json", "config.json", "layer.tar"):
            archive.add(made / part, part)
    return folder / "image.tar"


@differs(
    "an image that the daemon has not is pulled from its registry, which it must be able to reach",
    "Template.from_image",
)
async def test_a_template_begins_with_an_image(sdk, tmp_path):
    with Daemon(tmp_path / "daemon") as daemon:
        daemon.denizen("image", "import", str(make_image(tmp_path, "demo/bash:1")))
        definition = (
            sdk.template()
            .from_image("demo/bash:1")
            .run_cmd("cat /etc/motd > /home/user/seen; echo $FROM_IMAGE >> /home/user/seen")
        )
        await sdk.Template.build(definition.inner, "of-an-image", **daemon.opts)
        # A sandbox may be made of the image itself, too.
        for template, seen in [("of-an-image", True), ("demo/bash:1", False)]:
            async with await sdk.Sandbox.create(template, timeout=60, **daemon.opts) as sandbox:
                assert await sandbox.files.read("/etc/motd") == "of the image\n"
                told = await sandbox.commands.run("whoami; pwd; echo $FROM_IMAGE")
                assert told.stdout == "user\n/home/user\nyes\n"
                assert await sandbox.files.exists("/home/user/seen") is seen
                if seen:
                    assert await sandbox.files.read("/home/user/seen") == "of the image\nyes\n"
