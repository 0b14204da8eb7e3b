"""What is allowed is reached, and nothing else: in a network of the daemon's own, beside which is
another one with two addresses that look public."""

import os

import pytest
from e2b import ALL_TRAFFIC, CommandExitException

from cases import patient
from daemon import Daemon

# The other network is a child's, which ends with the daemon.
NETWORK = """
ip link set lo up
mkfifo "$DENIZEN_STATE.ready"
unshare --net sh -c '
    ip link set lo up
    echo > "$DENIZEN_STATE.ready"
    until ip link show there >/dev/null 2>&1; do sleep 0.05; done
    ip addr add 11.0.0.2/24 dev there && ip addr add 11.0.0.3/24 dev there
    ip link set there up
    exec setpriv --pdeathsig KILL python3 -m http.server 80 --directory /usr
' >/dev/null 2>&1 3>&- &
read -r _ < "$DENIZEN_STATE.ready"
ip link add here type veth peer name there netns $!
ip addr add 11.0.0.1/24 dev here
ip link set here up
ip route add default via 11.0.0.2
"""


@pytest.fixture
def networks(tmp_path):
    with Daemon(tmp_path / "daemon", "--network", "full", before=NETWORK) as daemon:
        yield daemon


async def reaches(sandbox, address):
    line = f"curl -s -o /dev/null --max-time 5 http://{address}/"
    try:
        await sandbox.commands.run(line)
        return True
    except CommandExitException:
        return False


@pytest.mark.skipif(os.geteuid() != 0, reason="a network of its own needs root")
@patient(120)
async def test_what_is_allowed_is_reached(sdk, networks):
    opts = networks.opts | {"timeout": 100}
    async with await sdk.Sandbox.create("base", **opts) as sandbox:
        until = "until curl -s -o /dev/null http://11.0.0.2/; do sleep 0.1; done"
        await sandbox.commands.run(until, timeout=20)
        assert await reaches(sandbox, "11.0.0.3")
        # Of the host nothing is reached, whatever is allowed.
        assert not await reaches(sandbox, "11.0.0.1")
        await sandbox.update_network({"deny_out": ["11.0.0.3"]})
        assert await reaches(sandbox, "11.0.0.2")
        assert not await reaches(sandbox, "11.0.0.3")
        await sandbox.update_network({"deny_out": [ALL_TRAFFIC], "allow_out": ["11.0.0.3"]})
        assert not await reaches(sandbox, "11.0.0.2")
        assert await reaches(sandbox, "11.0.0.3")
        await sandbox.update_network({"deny_out": ["11.0.0.0/24"], "allow_out": ["11.0.0.2/32"]})
        assert await reaches(sandbox, "11.0.0.2")
        assert not await reaches(sandbox, "11.0.0.3")
        (fork,) = await sandbox.fork()
        assert await reaches(fork, "11.0.0.2")
        assert not await reaches(fork, "11.0.0.3")
        await sandbox.pause()
        await sandbox.connect()
        assert not await reaches(sandbox, "11.0.0.3")
        await sandbox.update_network({})
        assert await reaches(sandbox, "11.0.0.3")
    network = {"deny_out": lambda context: [context.all_traffic], "allow_out": ["11.0.0.2"]}
    async with await sdk.Sandbox.create("base", network=network, **opts) as sandbox:
        assert await reaches(sandbox, "11.0.0.2")
        assert not await reaches(sandbox, "11.0.0.3")
