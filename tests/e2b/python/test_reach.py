"""Who reaches what: signed links, tokens, ports."""

import os
import uuid
from urllib.parse import parse_qs, urlparse

import httpx
from e2b import get_signature

from cases import covers, differs


def headers(sandbox, port=49983, **more):
    return {"E2b-Sandbox-Id": sandbox.sandbox_id, "E2b-Sandbox-Port": str(port), **more}


@differs(
    "with E2B_SANDBOX_URL, who uses a link also sends the header E2b-Sandbox-Id",
    "Sandbox.download_url",
    "Sandbox.upload_url",
)
async def test_links_are_good_for_what_they_are_for(sdk, sandbox):
    await sandbox.files.write("file", "content")
    async with httpx.AsyncClient() as client:
        link = await sandbox.download_url("file")
        assert parse_qs(urlparse(link).query)["signature"]
        read = await client.get(link, headers=headers(sandbox))
        assert (read.status_code, read.text) == (200, "content")
        # Not to write, of no other file, by no other sandbox.
        wrong = await client.post(link, headers=headers(sandbox), files={"file": b"x"})
        assert wrong.status_code == 401
        forged = link.replace("path=file", "path=other")
        assert forged != link
        assert (await client.get(forged, headers=headers(sandbox))).status_code == 401
        bare = link.split("&signature")[0].replace("signature=", "ignored=")
        assert (await client.get(bare, headers=headers(sandbox))).status_code == 401
        async with await sdk.Sandbox.create("base", timeout=60) as other:
            await other.files.write("file", "of the other")
            answer = await client.get(link, headers=headers(other))
            assert answer.status_code == 401
        up = await sandbox.upload_url("sent")
        sent = await client.post(up, headers=headers(sandbox), files={"file": ("sent", b"by link")})
        assert sent.status_code == 200
        assert sent.json()[0]["path"] == "/home/user/sent"
        assert await sandbox.files.read("sent") == "by link"
        as_root = await sandbox.download_url("/root/mine", user="root")
        await sandbox.files.write("/root/mine", "of root", user="root")
        assert (await client.get(as_root, headers=headers(sandbox))).text == "of root"


async def test_links_are_good_for_as_long_as_they_say(sdk, sandbox):
    await sandbox.files.write("file", "content")
    async with httpx.AsyncClient() as client:
        link = await sandbox.download_url("file", use_signature_expiration=60)
        assert "signature_expiration=" in link
        assert (await client.get(link, headers=headers(sandbox))).text == "content"
        old = await sandbox.download_url("file", use_signature_expiration=-60)
        late = await client.get(old, headers=headers(sandbox))
        assert late.status_code == 401
        assert "expired" in late.json()["message"]
        until = parse_qs(urlparse(old).query)["signature_expiration"][0]
        stretched = old.replace(until, str(int(until) + 3600))
        assert (await client.get(stretched, headers=headers(sandbox))).status_code == 401
        up = await sandbox.upload_url("up", use_signature_expiration=60)
        sent = await client.post(up, headers=headers(sandbox), files={"file": ("up", b"in time")})
        assert sent.status_code == 200
        up = await sandbox.upload_url("up", use_signature_expiration=-60)
        sent = await client.post(up, headers=headers(sandbox), files={"file": ("up", b"late")})
        assert sent.status_code == 401
        assert await sandbox.files.read("up") == "in time"


async def test_a_signature_is_made_by_whoever_has_the_token(sdk, sandbox):
    token = sandbox._envd_access_token
    assert token
    await sandbox.files.write("/home/user/file", "content")
    made = get_signature("/home/user/file", "read", "user", token)
    query = {"path": "/home/user/file", "username": "user", "signature": made["signature"]}
    url = f"{os.environ['E2B_SANDBOX_URL']}/files"
    async with httpx.AsyncClient() as client:
        answer = await client.get(url, params=query, headers=headers(sandbox))
        assert answer.text == "content"
        other = get_signature("/home/user/file", "read", "user", "not the token")
        query["signature"] = other["signature"]
        answer = await client.get(url, params=query, headers=headers(sandbox))
        assert answer.status_code == 401


async def test_a_secured_sandbox_lets_nobody_else_in(sdk):
    one = await sdk.Sandbox.create("base", secure=True, timeout=60)
    two = await sdk.Sandbox.create("base", secure=True, timeout=60)
    url = os.environ["E2B_SANDBOX_URL"]
    try:
        await one.files.write("file", "of one")
        tokens = {"right": one._envd_access_token, "another's": two._envd_access_token}
        assert tokens["right"] != tokens["another's"]
        tokens |= {"wrong": "0" * 64, "none": None}
        list_all = f"{url}/process.Process/List"
        async with httpx.AsyncClient() as client:
            for whose, token in tokens.items():
                shown = {"X-Access-Token": token} if token else {}
                read = await client.get(
                    f"{url}/files",
                    params={"path": "/home/user/file", "username": "user"},
                    headers=headers(one, **shown),
                )
                asked = await client.post(list_all, json={}, headers=headers(one, **shown))
                good = whose == "right"
                assert (read.status_code == 200) is good, whose
                assert (asked.status_code == 200) is good, whose
                if not good:
                    assert read.status_code in (401, 403)
                    assert "of one" not in read.text
            # The key of the API is shown in the API only.
            key = {"X-API-KEY": os.environ["E2B_API_KEY"]}
            health = await client.get(f"{url}/health", headers=headers(one))
            assert health.status_code == 204
            none = await client.get(f"{url}/sandboxes")
            assert none.status_code == 401
            assert none.json()["message"]
            bad = await client.get(f"{url}/sandboxes", headers={"X-API-KEY": "e2b_" + "1" * 40})
            assert bad.status_code == 401
            good = await client.get(f"{url}/sandboxes", headers=key)
            assert good.status_code == 200
        again = await sdk.Sandbox.connect(one.sandbox_id)
        assert await again.files.read("file") == "of one"
    finally:
        await one.kill()
        await two.kill()


SERVER = """
import http.server
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        body = (self.path + " " + self.headers["Host"]).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def do_POST(self):
        size = int(self.headers["Content-Length"])
        body = self.rfile.read(size)[::-1]
        self.send_response(201)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *args): pass
http.server.ThreadingHTTPServer(("", 8000), Handler).serve_forever()
"""


async def serve(sandbox):
    await sandbox.files.write("/tmp/server.py", SERVER)
    await sandbox.commands.run("python3 /tmp/server.py", background=True, timeout=0)
    until = "until (echo > /dev/tcp/127.0.0.1/8000) 2>/dev/null; do sleep 0.05; done"
    await sandbox.commands.run(until, timeout=20)


@covers("Sandbox.get_host")
async def test_a_port_is_reached_by_headers(sdk, sandbox):
    await serve(sandbox)
    url = os.environ["E2B_SANDBOX_URL"]
    host = await sandbox.get_host(8000)
    assert sandbox.sandbox_id in host and host.startswith("8000-")
    async with httpx.AsyncClient() as client:
        got = await client.get(f"{url}/a/path?q=1", headers=headers(sandbox, 8000))
        assert got.status_code == 200
        assert got.text.startswith("/a/path?q=1 ")
        sent = await client.post(f"{url}/", content=b"abc" * 1000, headers=headers(sandbox, 8000))
        assert (sent.status_code, sent.content) == (201, b"cba" * 1000)
        closed = await client.get(f"{url}/", headers=headers(sandbox, 8001))
        assert closed.status_code == 502
        assert closed.headers["content-type"] == "application/json; charset=utf-8"
        told = closed.json()
        assert told["sandboxId"] == sandbox.sandbox_id
        assert told["port"] == 8001
        assert told["message"] == "The sandbox is running but port is not open"
        nobody = {"E2b-Sandbox-Id": uuid.uuid4().hex, "E2b-Sandbox-Port": "8000"}
        gone = await client.get(f"{url}/", headers=nobody)
        assert gone.status_code == 502
        assert gone.json()["message"] == "The sandbox was not found"
        await sandbox.pause()
        asleep = await client.get(f"{url}/", headers=headers(sandbox, 8000))
        assert asleep.status_code == 502


async def test_a_port_is_sent_headers_as_they_are_spelt_elsewhere(sdk, sandbox):
    # Some servers are scripts that look for them letter by letter.
    script = (
        "import socket\ns = socket.create_server(('', 8000))\nwhile True:\n"
        "    c = s.accept()[0]\n    head = c.recv(65536)\n"
        "    c.sendall(b'HTTP/1.1 200 OK\\r\\nConnection: close\\r\\n\\r\\n' + head)\n    c.close()\n"
    )
    await sandbox.files.write("/tmp/server.py", script)
    await sandbox.commands.run("python3 /tmp/server.py", background=True, timeout=0)
    until = "until (echo > /dev/tcp/127.0.0.1/8000) 2>/dev/null; do sleep 0.05; done"
    await sandbox.commands.run(until, timeout=20)
    async with httpx.AsyncClient() as client:
        more = {"x-of-the-client": "a"}
        url = os.environ["E2B_SANDBOX_URL"]
        got = await client.get(f"{url}/", headers=headers(sandbox, 8000, **more))
        assert "\r\nHost: " in got.text and "\r\nX-Of-The-Client: a" in got.text, got.text


BROWSER = {"User-Agent": "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 Chrome/58.0"}


async def test_a_browser_is_told_on_a_page(sdk, sandbox):
    url = os.environ["E2B_SANDBOX_URL"]
    nobody = uuid.uuid4().hex
    strange = "i<b>\"'&" + "0" * 15
    async with httpx.AsyncClient() as client:
        for id, port, text in [
            (sandbox.sandbox_id, "8001", "no service running on port"),
            (nobody, "8001", "Sandbox Not Found"),
            (strange, "8001", "Sandbox Not Found"),
        ]:
            asked = {"E2b-Sandbox-Id": id, "E2b-Sandbox-Port": port}
            got = await client.get(f"{url}/", headers=asked | BROWSER)
            assert got.status_code == 502
            assert got.headers["content-type"] == "text/html; charset=utf-8"
            assert "default-src 'none'" in got.headers["content-security-policy"]
            assert got.text.startswith("<html") and got.text.endswith("</html>")
            assert text in got.text and "<b>" not in got.text
            assert id == strange or id in got.text
            script = BROWSER | {"Sec-Fetch-Mode": "cors"}
            got = await client.get(f"{url}/", headers=asked | script)
            assert got.headers["content-type"] == "application/json; charset=utf-8"
            assert got.json()["sandboxId"] == id


async def test_what_is_no_id_of_a_sandbox_is_no_sandbox(sdk, sandbox):
    url = os.environ["E2B_SANDBOX_URL"]
    other = "i" + uuid.uuid4().hex[:19]
    token = {"X-Access-Token": sandbox._envd_access_token}
    async with httpx.AsyncClient(base_url=url) as client:
        for line, more in [
            ("/", {"E2b-Sandbox-Id": other, "E2b-Sandbox-Port": "3210"}),
            ("/sandboxes", {"E2b-Sandbox-Id": other, "E2b-Sandbox-Port": "3210"}),
            ("/health", {"E2b-Sandbox-Id": other, "E2b-Sandbox-Port": "49983"}),
            ("/envs", {"E2b-Sandbox-Id": other, "E2b-Sandbox-Port": "49983"} | token),
            ("/", {"Host": f"3210-{other}.e2b.app"}),
            ("/healthz", {"Host": f"3210-{other}-client.e2b.app:3002"}),
        ]:
            got = await client.get(line, headers=more)
            assert got.status_code == 502, (line, more, got.text)
            assert got.json()["message"] == "The sandbox was not found"
            assert got.json()["sandboxId"].startswith(other)
        asked = headers(sandbox, 99999)
        got = await client.get("/", headers=asked)
        assert (got.status_code, got.json()["message"]) == (400, "Invalid sandbox port")
        for host in ("evil.example", f"{other}.example", "3210-demo.example", f"x-{other}.example"):
            assert (await client.get("/healthz", headers={"Host": host})).status_code == 421, host


async def test_an_id_may_have_its_client_behind_it(sdk, sandbox):
    await serve(sandbox)
    url = os.environ["E2B_API_URL"]
    id = f"{sandbox.sandbox_id}-denizen"
    async with httpx.AsyncClient(base_url=url) as client:
        asked = {"E2b-Sandbox-Id": id, "E2b-Sandbox-Port": "8000"}
        assert (await client.get("/x", headers=asked)).text.startswith("/x ")
        asked = {"Host": f"8000-{id}.e2b.app"}
        assert (await client.get("/x", headers=asked)).text.startswith("/x ")
        asked = {"E2b-Sandbox-Id": id, "E2b-Sandbox-Port": "49983"}
        assert (await client.get("/health", headers=asked)).status_code == 204
        asked["X-Access-Token"] = sandbox._envd_access_token
        assert (await client.get("/envs", headers=asked)).status_code == 200
        key = {"X-API-KEY": os.environ["E2B_API_KEY"]}
        told = await client.get(f"/sandboxes/{id}", headers=key)
        assert told.json()["sandboxID"] == sandbox.sandbox_id
        longer = await client.post(f"/sandboxes/{id}/timeout", json={"timeout": 99}, headers=key)
        assert longer.status_code == 204
        other = await client.get(f"/sandboxes/{sandbox.sandbox_id}-other", headers=key)
        assert other.status_code == 404


async def test_envd_has_its_own_paths_and_no_others(sdk, sandbox):
    url = os.environ["E2B_SANDBOX_URL"]
    async with httpx.AsyncClient() as client:
        shown = headers(sandbox, **{"X-Access-Token": sandbox._envd_access_token})
        assert (await client.get(f"{url}/", headers=shown)).status_code == 404
        assert (await client.get(f"{url}/nothing/here", headers=shown)).status_code == 404


async def test_the_api_is_well(sdk, sandbox):
    url = os.environ["E2B_API_URL"]
    async with httpx.AsyncClient() as client:
        got = await client.get(f"{url}/health")
        assert (got.status_code, got.text) == (200, "Health check successful")
        # Of a sandbox that is something else.
        got = await client.get(f"{url}/health", headers=headers(sandbox))
        assert got.status_code == 204
        got = await client.get(f"{url}/health", headers={"denizen-session": "none"})
        assert got.status_code == 401


async def test_a_port_answers_after_a_sleep(sdk):
    lifecycle = {"on_timeout": "pause", "auto_resume": True}
    async with await sdk.Sandbox.create("base", timeout=60, lifecycle=lifecycle) as sandbox:
        await serve(sandbox)
        await sandbox.pause()
        url = os.environ["E2B_SANDBOX_URL"]
        async with httpx.AsyncClient() as client:
            got = await client.get(f"{url}/woken", headers=headers(sandbox, 8000), timeout=20)
            assert got.status_code == 200 and got.text.startswith("/woken ")
        assert await sandbox.is_running()


async def test_ports_without_public_traffic_need_a_token(sdk):
    network = {"allow_public_traffic": False}
    async with await sdk.Sandbox.create("base", network=network, timeout=60) as sandbox:
        token = sandbox.traffic_access_token
        assert token
        await serve(sandbox)
        url = os.environ["E2B_SANDBOX_URL"]
        async with httpx.AsyncClient() as client:
            for shown, status, why in [
                (None, 403, "Token header 'e2b-traffic-access-token' is missing"),
                ("wrong", 403, "Provided token in header 'e2b-traffic-access-token' is invalid"),
                (token, 200, None),
            ]:
                more = {"e2b-traffic-access-token": shown} if shown else {}
                got = await client.get(f"{url}/", headers=headers(sandbox, 8000, **more))
                assert got.status_code == status, shown
                if why:
                    secured = "Sandbox is secured with traffic access token. "
                    assert got.json()["message"] == secured + why
            # What envd has not is nobody's secret.
            shown = headers(sandbox, **{"X-Access-Token": sandbox._envd_access_token})
            assert (await client.get(f"{url}/", headers=shown)).status_code == 404
        again = await sdk.Sandbox.connect(sandbox.sandbox_id)
        assert again.traffic_access_token == token
        async with await sdk.Sandbox.create("base", timeout=60) as public:
            assert public.traffic_access_token is None


async def test_a_port_is_told_another_host_if_that_is_wanted(sdk):
    network = {"mask_request_host": "masked.example:${PORT}"}
    async with await sdk.Sandbox.create("base", network=network, timeout=60) as sandbox:
        await serve(sandbox)
        url = os.environ["E2B_SANDBOX_URL"]
        async with httpx.AsyncClient() as client:
            got = await client.get(f"{url}/x", headers=headers(sandbox, 8000))
            assert got.text == "/x masked.example:8000"


async def test_what_a_sandbox_says_of_itself(sdk, sandbox):
    url = os.environ["E2B_SANDBOX_URL"]
    shown = headers(sandbox, **{"X-Access-Token": sandbox._envd_access_token})
    async with httpx.AsyncClient() as client:
        measured = await client.get(f"{url}/metrics", headers=shown)
        assert measured.status_code == 200
        told = measured.json()
        for field in ("ts", "cpu_count", "mem_total", "mem_used", "disk_total", "disk_used"):
            assert told[field] > 0, field
        assert "cpu_used_pct" in told
        envs = await client.get(f"{url}/envs", headers=shown)
        assert envs.status_code == 200
        assert isinstance(envs.json(), dict)
