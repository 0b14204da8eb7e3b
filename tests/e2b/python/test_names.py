"""Sandboxes by names, with TLS, as E2B has them: `https://8000-<id>.<domain>`.

A proxy of the test's own finds the names, so that no resolver has to know them.
"""

import asyncio
import subprocess
import uuid

import httpx
import pytest

from daemon import Daemon
from test_reach import serve

DOMAIN = "box.example"

CERTIFICATES = """
openssl req -x509 -newkey rsa:2048 -nodes -days 2 -keyout ca.key -out ca.pem -subj /CN=ca 2>/dev/null
openssl req -newkey rsa:2048 -nodes -keyout key.pem -out request.pem -subj /CN=box.example 2>/dev/null
printf 'subjectAltName=DNS:*.box.example,DNS:box.example\\nbasicConstraints=CA:FALSE\\n' > names
openssl x509 -req -in request.pem -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -out only.pem \
    -extfile names 2>/dev/null
cat only.pem ca.pem > certificate.pem
"""


@pytest.fixture
def named(tmp_path):
    subprocess.run(["sh", "-ec", CERTIFICATES], cwd=tmp_path, check=True)
    settings = ["--domain", DOMAIN, "--hosts", f"api.{DOMAIN}"]
    settings += ["--tls-certificate", str(tmp_path / "certificate.pem")]
    settings += ["--tls-key", str(tmp_path / "key.pem")]
    with Daemon(tmp_path / "daemon", *settings) as daemon:
        daemon.ca = str(tmp_path / "ca.pem")
        yield daemon


async def proxy(to):
    """A proxy for which every name is the daemon's."""

    async def pump(reader, writer):
        try:
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        finally:
            writer.close()

    async def serve_one(reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"CONNECT ")
        there, back = await asyncio.open_connection("127.0.0.1", to)
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        await asyncio.gather(pump(reader, back), pump(there, writer))

    return await asyncio.start_server(serve_one, "127.0.0.1", 0)


async def test_a_port_has_a_name(sdk, named, monkeypatch):
    import ssl

    monkeypatch.setenv("SSL_CERT_FILE", named.ca)
    monkeypatch.setenv("E2B_DOMAIN", DOMAIN)
    monkeypatch.delenv("E2B_API_URL")
    monkeypatch.delenv("E2B_SANDBOX_URL")
    server = await proxy(named.port)
    through = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    opts = {"api_key": named.key, "proxy": through}
    sandbox = await sdk.Sandbox.create("base", timeout=60, **opts)
    private = await sdk.Sandbox.create(
        "base", timeout=60, network={"allow_public_traffic": False}, **opts
    )
    try:
        assert sandbox.sandbox_domain == DOMAIN
        assert await sandbox.get_host(8000) == f"8000-{sandbox.sandbox_id}.{DOMAIN}"
        assert (await sandbox.commands.run("echo by name")).stdout == "by name\n"
        await sandbox.files.write("file", "content")
        assert await sandbox.files.read("file") == "content"
        await serve(sandbox)
        await serve(private)
        trust = ssl.create_default_context(cafile=named.ca)
        async with httpx.AsyncClient(proxy=through, verify=trust) as client:
            got = await client.get(f"https://{await sandbox.get_host(8000)}/path")
            assert got.status_code == 200
            assert got.text.startswith(f"/path 8000-{sandbox.sandbox_id}.{DOMAIN}")
            closed = await client.get(f"https://{await sandbox.get_host(8001)}/")
            assert closed.status_code == 502
            assert closed.json()["message"] == "The sandbox is running but port is not open"
            assert closed.json()["sandboxId"] == sandbox.sandbox_id
            nobody = await client.get(f"https://8000-{uuid.uuid4().hex}.{DOMAIN}/")
            assert nobody.status_code == 502
            at = f"https://{await private.get_host(8000)}/"
            assert (await client.get(at)).status_code == 403
            shown = {"e2b-traffic-access-token": private.traffic_access_token}
            assert (await client.get(at, headers=shown)).status_code == 200
            # A link needs nothing but itself here.
            link = await sandbox.download_url("file")
            assert link.startswith(f"https://49983-{sandbox.sandbox_id}.{DOMAIN}/files?")
            assert (await client.get(link)).text == "content"
            assert (await client.get(link.replace("path=file", "path=none"))).status_code == 401
            up = await sandbox.upload_url("sent")
            sent = await client.post(up, files={"file": ("sent", b"by link")})
            assert sent.status_code == 200
            assert await sandbox.files.read("sent") == "by link"
            await sandbox.kill()
            gone = await client.get(f"https://{await sandbox.get_host(8000)}/")
            assert gone.status_code == 502
    finally:
        await sandbox.kill()
        await private.kill()
        server.close()
