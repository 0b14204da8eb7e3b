"""The SDK's git, which runs the sandbox's."""

import pytest

from cases import covers, differs


@covers(
    "Git.init",
    "Git.configure_user",
    "Git.add",
    "Git.commit",
    "Git.status",
    "Git.branches",
    "Git.create_branch",
    "Git.checkout_branch",
    "Git.delete_branch",
    "Git.set_config",
    "Git.get_config",
)
async def test_a_repository_of_its_own(sdk, sandbox):
    git = sandbox.git
    await git.configure_user("Some Body", "body@example.com")
    assert await git.get_config("user.name") == "Some Body"
    await git.init("repo", initial_branch="main")
    await git.set_config("core.filemode", "false", scope="local", path="repo")
    assert await git.get_config("core.filemode", scope="local", path="repo") == "false"
    assert await git.get_config("no.such", scope="local", path="repo") is None
    await sandbox.files.write("repo/file", "one")
    status = await git.status("repo")
    assert status.current_branch == "main"
    assert [it.name for it in status.file_status] == ["file"]
    assert status.has_untracked and not status.has_staged and not status.is_clean
    await git.add("repo")
    assert (await git.status("repo")).has_staged
    await git.commit("repo", "The first", author_name="A", author_email="a@example.com")
    assert (await git.status("repo")).is_clean
    log = await sandbox.commands.run("git -C repo log --format='%s by %an'")
    assert log.stdout == "The first by A\n"
    await git.create_branch("repo", "side")
    branches = await git.branches("repo")
    assert set(branches.branches) == {"main", "side"}
    assert branches.current_branch == "side"
    await git.checkout_branch("repo", "main")
    assert (await git.branches("repo")).current_branch == "main"
    await git.delete_branch("repo", "side")
    assert (await git.branches("repo")).branches == ["main"]


@covers("Git.reset", "Git.restore")
async def test_changes_are_taken_back(sdk, sandbox):
    git = sandbox.git
    await git.init("repo", initial_branch="main")
    await git.configure_user("A", "a@example.com")
    await sandbox.files.write("repo/file", "one")
    await git.add("repo")
    await git.commit("repo", "One")
    await sandbox.files.write("repo/file", "two")
    await git.add("repo", files=["file"])
    assert (await git.status("repo")).staged_count == 1
    await git.reset("repo", paths=["file"])
    assert (await git.status("repo")).staged_count == 0
    await git.restore("repo", ["file"])
    assert await sandbox.files.read("repo/file") == "one"
    await sandbox.files.write("repo/file", "three")
    await git.reset("repo", mode="hard", target="HEAD")
    assert await sandbox.files.read("repo/file") == "one"


@covers("Git.clone", "Git.remote_add", "Git.remote_get", "Git.push", "Git.pull")
async def test_two_repositories(sdk, sandbox):
    git = sandbox.git
    await git.init("/home/user/there.git", bare=True, initial_branch="main")
    await git.configure_user("A", "a@example.com")
    await git.init("here", initial_branch="main")
    await sandbox.files.write("here/file", "one")
    await git.add("here")
    await git.commit("here", "One")
    assert await git.remote_get("here", "origin") is None
    await git.remote_add("here", "origin", "/home/user/there.git")
    assert await git.remote_get("here", "origin") == "/home/user/there.git"
    await git.push("here", remote="origin", branch="main")
    await git.clone("/home/user/there.git", "copy")
    assert await sandbox.files.read("copy/file") == "one"
    await sandbox.files.write("here/file", "two")
    await git.add("here")
    await git.commit("here", "Two")
    assert (await git.status("here")).ahead == 1
    await git.push("here")
    await git.pull("copy")
    assert await sandbox.files.read("copy/file") == "two"
    with pytest.raises(Exception):
        await git.clone("/home/user/none.git", "none")


@differs("the credentials are kept in the sandbox's files, as the name says", "Git.dangerously_authenticate")
async def test_credentials(sdk, sandbox):
    await sandbox.git.dangerously_authenticate("someone", "secret", host="git.example")
    line = "printf 'protocol=https\\nhost=git.example\\n\\n' | git credential fill"
    told = await sandbox.commands.run(line)
    assert "username=someone" in told.stdout and "password=secret" in told.stdout
