"""What of the network is open to a sandbox. There is none in a test but what it makes: what is
allowed is reached in `test_networks.py`."""

import time

import pytest
from e2b import ALL_TRAFFIC, CommandExitException, SandboxException

from cases import covers

CONNECT = "python3 - <<'E'\nimport socket\nsocket.create_connection(('{0}', 80), 10)\nE"


async def is_refused(sandbox, address):
    """Whether it is refused, and not that nobody answers."""
    began = time.monotonic()
    with pytest.raises(CommandExitException) as raised:
        await sandbox.commands.run(CONNECT.format(address), timeout=20)
    assert time.monotonic() - began < 5
    return "refused" in raised.value.stderr or "unreachable" in raised.value.stderr


async def test_all_is_denied(sdk):
    network = {"deny_out": [ALL_TRAFFIC]}
    async with await sdk.Sandbox.create("base", network=network, timeout=60) as sandbox:
        assert await is_refused(sandbox, "8.8.8.8")
        assert await is_refused(sandbox, "1.1.1.1")
        info = await sandbox.get_info()
        assert info.network["deny_out"] == [ALL_TRAFFIC]


async def test_without_internet(sdk):
    async with await sdk.Sandbox.create(
        "base", allow_internet_access=False, timeout=60
    ) as sandbox:
        assert await is_refused(sandbox, "8.8.8.8")
        info = await sandbox.get_info()
        assert info.allow_internet_access is False
        # It has itself all the same.
        line = "python3 -m http.server 8000 & sleep 1; curl -s http://127.0.0.1:8000/ | head -1"
        assert "HTML" in (await sandbox.commands.run(line)).stdout


@covers("Sandbox.update_network")
async def test_rules_are_changed_while_it_runs(sdk, sandbox):
    await sandbox.update_network({"deny_out": ["8.8.8.8"]})
    assert await is_refused(sandbox, "8.8.8.8")
    info = await sandbox.get_info()
    assert info.network["deny_out"] == ["8.8.8.8"]
    await sdk.Sandbox.update_network(sandbox.sandbox_id, {"allow_out": ["9.9.9.9"], "deny_out": [ALL_TRAFFIC]})
    info = await sandbox.get_info()
    assert info.network["allow_out"] == ["9.9.9.9"]
    assert await is_refused(sandbox, "1.1.1.1")
    await sandbox.update_network({})
    info = await sandbox.get_info()
    assert not info.network.get("deny_out")
    await sandbox.update_network({"allow_internet_access": False})
    assert await is_refused(sandbox, "1.1.1.1")


async def test_what_is_denied_is_said_in_the_log(sdk, url):
    import os

    import httpx

    network = {"deny_out": [ALL_TRAFFIC]}
    async with await sdk.Sandbox.create("base", network=network, timeout=60) as sandbox:
        assert await is_refused(sandbox, "8.8.4.4")
        headers = {"X-API-KEY": os.environ["E2B_API_KEY"]}
        async with httpx.AsyncClient(headers=headers) as client:
            answer = await client.get(f"{url}/v2/sandboxes/{sandbox.sandbox_id}/logs")
            assert any("8.8.4.4" in line["message"] for line in answer.json()["logs"])


@pytest.mark.parametrize("deny", [None, ["10.0.0.0/8"]])
async def test_a_name_is_allowed_only_where_all_else_is_denied(sdk, sandbox, deny):
    network = {"allow_out": ["*.example.org"]} | ({"deny_out": deny} if deny else {})
    with pytest.raises(SandboxException, match="ALL_TRAFFIC"):
        await sdk.Sandbox.create("base", network=network)
    with pytest.raises(SandboxException, match="ALL_TRAFFIC"):
        await sandbox.update_network(network)
    for more in ({"deny_out": [ALL_TRAFFIC]}, {"allow_internet_access": False}):
        await sandbox.update_network({"allow_out": ["*.example.org"]} | more)
        assert await is_refused(sandbox, "8.8.8.8")


async def test_what_of_a_network_is_not_known_is_refused_by_its_name(sdk, sandbox, url):
    import os

    import httpx

    headers = {"X-API-KEY": os.environ["E2B_API_KEY"]}
    async with httpx.AsyncClient(headers=headers, base_url=url) as client:
        path = f"/sandboxes/{sandbox.sandbox_id}/network"
        for name in ("denyIn", "allowIn", "allowPublicTraffic"):
            refused = await client.put(path, json={name: ["0.0.0.0/0"]})
            assert refused.status_code == 501 and name in refused.json()["message"]
        new = {"templateID": "base", "network": {"denyIn": ["0.0.0.0/0"]}}
        refused = await client.post("/sandboxes", json=new)
        assert refused.status_code == 501 and "denyIn" in refused.json()["message"]
        assert (await client.put(path, json={"denyIn": [], "allowIn": None})).status_code == 204


@pytest.mark.parametrize("host", ["-https://abcd", "a b", "a@b", ""])
async def test_what_is_no_host_is_not_told_to_a_port(sdk, host):
    with pytest.raises(SandboxException, match="mask request host"):
        await sdk.Sandbox.create("base", network={"mask_request_host": host})


@pytest.mark.parametrize("rule", ["not an address", "300.1.1.1", "10.0.0.0/33"])
async def test_rules_that_are_none_are_refused(sdk, rule):
    with pytest.raises(SandboxException):
        await sdk.Sandbox.create("base", network={"deny_out": [rule]})


async def test_a_denied_name_is_refused(sdk):
    # Only what is allowed can be a name.
    with pytest.raises(SandboxException):
        await sdk.Sandbox.create("base", network={"deny_out": ["example.com"]})


NEED = {
    "egress_proxy": ({"egress_proxy": {"address": "proxy.example:1080"}}, "egressProxy"),
    "rules": ({"rules": {"a.example": [{"transform": {"headers": {"A": "b"}}}]}}, "rules"),
    "https_ports": ({"https_ports": [8443]}, "httpsPorts"),
    "dns_servers": ({"dns_servers": ["9.9.9.9"]}, "dnsServers"),
}


@pytest.mark.parametrize("what", NEED)
async def test_what_is_not_had_is_refused_by_its_name(sdk, what):
    network, named = NEED[what]
    with pytest.raises(SandboxException, match=named):
        await sdk.Sandbox.create("base", network=network)
