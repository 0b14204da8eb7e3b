//! Who gets in by TCP, to what, and what those get who should not: a real daemon, and clients
//! that write their bytes themselves.
#![allow(clippy::unwrap_used)]

mod common;

use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::tcp::{Daemon, answer};
use common::{User, running, text, until};
use serde_json::{Value, json};

#[test]
fn a_key_lets_in_and_nothing_else_does() {
    let daemon = Daemon::start(&[]);
    let (id, key) = daemon.key(&["--scope", "read", "--expires", "1 hour"]);
    let who = daemon.ask(&key, "GET /v1/whoami").json();
    assert_eq!((&who["id"], &who["scope"]), (&json!(id), &json!("read")));
    assert!(who["expires_at"].is_string(), "{who}");
    let with = |header: (&str, &str)| daemon.ask_with("GET /v1/whoami", &[header], "").status;
    assert_eq!(with(("x-api-key", &key)), 200);
    assert_eq!(with(("x-access-token", &key)), 200);
    assert_eq!(with(("authorization", &format!("bearer {key}"))), 200);
    // Names a user of envd; the key is elsewhere.
    let both = [("authorization", "Basic dXNlcjo="), ("x-api-key", key.as_str())];
    assert_eq!(daemon.ask_with("GET /v1/whoami", &both, "").status, 200);
    let other = format!("{}0", &key[..key.len() - 1]);
    let other = if other == key { format!("{}1", &key[..key.len() - 1]) } else { other };
    for wrong in [
        "",
        "dk_",
        "dk__",
        "dk_x_y",
        "dt_",
        "dt_AAAA",
        &key[1..],
        &key[..key.len() - 1],
        &other,
        &format!("{key}0"),
        &format!("{key} "),
        &key.to_uppercase(),
        &format!("dk_{id}_"),
    ] {
        let refused = daemon.ask_with("GET /v1/whoami", &[("x-api-key", wrong)], "");
        if wrong.trim() == key {
            continue;
        }
        assert_eq!(refused.code(), (401, "unauthenticated".to_owned()), "{wrong:?}");
        assert_eq!(refused.header("www-authenticate"), Some("Bearer"));
    }
    assert_eq!(daemon.ask_with("GET /v1/whoami", &[], "").status, 401);
    assert_eq!(daemon.ask_with("GET /v1/metrics", &[], "").status, 401);
    assert_eq!(daemon.ask_with("GET /v1/sessions?key=dk_a_b", &[], "").status, 401);
    // It is told once, and kept nowhere.
    let all = daemon.user.json(&["key", "ls"]);
    assert_eq!(all["keys"][0]["id"], json!(id));
    assert!(all["keys"][0]["last_used_at"].is_string(), "{all}");
    let secret = key.rsplit('_').next().unwrap();
    for file in ["keys.json", "keys.lock"] {
        let path = daemon.user.state.path().join(file);
        let mode = std::os::unix::fs::MetadataExt::mode(&path.metadata().unwrap());
        assert_eq!(mode & 0o777, 0o600, "{file}");
        assert!(!std::fs::read_to_string(path).unwrap().contains(secret), "{file}");
    }
    assert!(daemon.user.run(&["key", "revoke", &id]).status.success());
    assert_eq!(daemon.ask(&key, "GET /v1/whoami").status, 401);
    assert!(!daemon.user.run(&["key", "revoke", &id]).status.success());
}

#[test]
fn the_page_needs_no_key_and_may_do_little() {
    let daemon = Daemon::start(&[]);
    // Whether it was built or not: then it says how.
    let page = daemon.ask_with("GET /", &[], "");
    assert_eq!(page.status, 200, "{}", page.head);
    assert_eq!(page.header("content-type"), Some("text/html; charset=utf-8"));
    assert_eq!(page.header("cache-control"), Some("no-cache"));
    let policy = page.header("content-security-policy").unwrap();
    assert!(policy.starts_with("default-src 'none'; script-src 'self';"), "{policy}");
    let built = page.body.contains("<script type=\"module\"");
    assert!(built || page.body.contains("cargo xtask web"), "{}", page.body);
    for path in ["/assets/none.js", "/assets/../index.html", "/assets/%2e%2e/index.html"] {
        let refused = daemon.ask_with(&format!("GET {path}"), &[], "");
        assert_eq!(refused.status, 404, "{path}");
    }
    assert_eq!(daemon.ask_with("GET /", &[("host", "evil.example")], "").status, 421);
    assert_eq!(daemon.ask_with("POST /", &[], "").status, 401);
}

#[test]
fn scopes_and_prefixes_hold() {
    let daemon = Daemon::start(&[]);
    for session in ["ci-a", "ci-b", "other"] {
        assert!(daemon.user.run(&["start", session]).status.success());
    }
    let id = |session| daemon.user.json(&["inspect", session])["id"].as_str().unwrap().to_owned();
    let (ours, theirs) = (id("ci-a"), id("other"));
    let (_, read) = daemon.key(&["--scope", "read"]);
    let (_, all) = daemon.key(&["--scope", "operate"]);
    let (_, ci) = daemon.key(&["--scope", "admin", "--sessions", "ci-"]);
    let forbidden = (403, "forbidden".to_owned());

    assert_eq!(
        daemon.ask(&read, "GET /v1/sessions").json()["sessions"].as_array().unwrap().len(),
        3
    );
    assert_eq!(daemon.ask(&read, "POST /v1/sessions/ci-a/stop").code(), forbidden);
    for rest in ["export", "processes", "processes/1/output", "logs/1"] {
        let line = format!("GET /v1/sessions/ci-a/{rest}");
        assert_eq!(daemon.ask(&read, &line).code(), forbidden, "{line}");
    }
    assert_eq!(daemon.ask(&read, "HEAD /v1/sessions").status, 200);
    assert_eq!(daemon.ask(&all, "POST /v1/sessions/ci-a/stop").status, 204);
    for line in ["GET /v1/keys", "POST /v1/shutdown", "GET /v1/nowhere", "PATCH /v1/sessions"] {
        assert_eq!(daemon.ask(&all, line).code(), forbidden, "{line}");
    }

    let seen = daemon.ask(&ci, "GET /v1/sessions").json();
    let seen = seen["sessions"].as_array().unwrap().iter();
    let mut seen: Vec<_> = seen.map(|it| it["name"].as_str()).collect();
    seen.sort_unstable();
    assert_eq!(seen, [Some("ci-a"), Some("ci-b")]);
    assert_eq!(daemon.ask(&ci, &format!("GET /v1/sessions/{ours}")).status, 200);
    assert_eq!(daemon.ask(&ci, "PUT /v1/sessions/ci-new").status, 201);
    let simple = theirs.replace('-', "");
    let random = uuid::Uuid::new_v4().to_string();
    for session in [
        "other",
        "%6fther",
        "Ci-a",
        "ci",
        "",
        "ci-a%2f..%2fother",
        "..%2fother",
        "./other",
        "ci-a/../other",
        "%2e%2e",
        "%00ci-a",
        &theirs,
        &simple,
        &theirs.to_uppercase(),
        &random,
        &format!("urn:uuid:{theirs}"),
        &format!("%7b{theirs}%7d"),
    ] {
        for line in ["GET /v1/sessions/{}", "POST /v1/sessions/{}/start", "DELETE /v1/sessions/{}"]
        {
            let refused = daemon.ask(&ci, &line.replace("{}", session));
            assert!(matches!(refused.status, 400 | 403), "{line} {session}: {}", refused.head);
        }
    }
    // Where a session is named elsewhere.
    let denied = |line: &str| assert_eq!(daemon.ask(&ci, line).code(), forbidden, "{line}");
    denied("GET /v1/sessions/ci-a/diff?other=other");
    denied(&format!("GET /v1/sessions/ci-a/diff?other={theirs}"));
    denied("POST /v1/sessions/ci-a/fork");
    denied("GET /v1/keys");
    denied("GET /v1/backups");
    denied("GET /v1/metrics");
    let bearer = format!("Bearer {ci}");
    let list = |headers: &[(&str, &str)]| {
        let headers = [&[("authorization", bearer.as_str())], headers].concat();
        daemon.ask_with("POST /process.Process/List", &headers, "{}").status
    };
    assert_eq!(list(&[("denizen-session", "ci-a")]), 200);
    assert_eq!(list(&[("e2b-sandbox-id", &ours)]), 200);
    assert_eq!(list(&[]), 403);
    assert_eq!(list(&[("denizen-session", "other")]), 403);
    assert_eq!(list(&[("e2b-sandbox-id", "ci-a"), ("denizen-session", "other")]), 403);
    assert_eq!(list(&[("denizen-session", "other"), ("denizen-session", "ci-a")]), 403);
    assert_eq!(list(&[("denizen-session", &theirs)]), 403);
    assert!(daemon.user.run(&["inspect", "other"]).status.success());
}

#[test]
fn where_others_get_there_must_be_a_key_and_tls() {
    let user = User::new();
    let refused = |settings: &[&str]| {
        let open = ["--listen", "127.0.0.1:0,0.0.0.0:0"];
        let output = user.run(&[&open, settings, &["serve"]].concat());
        assert_eq!(output.status.code(), Some(125), "{output:?}");
        text(&output.stderr)
    };
    let why = refused(&[]);
    assert!(why.contains("no key that is good") && why.contains("denizen key create"), "{why}");
    // One that has expired is none. There is no daemon to ask for them.
    let short = user.run(&["key", "create", "short", "--expires", "1 second"]);
    assert!(short.status.success(), "{short:?}");
    until("it is not good any more", || refused(&[]).contains("no key that is good"));
    let made = user.run(&["key", "create", "first"]);
    assert!(text(&made.stdout).starts_with("dk_"), "{made:?}");
    let why = refused(&[]);
    assert!(why.contains("no TLS") && why.contains("insecure_listen"), "{why}");
    let why = refused(&["--tls-certificate", "nothing.pem"]);
    assert!(why.contains("both"), "{why}");
    let why = refused(&["--tls-certificate", "nothing.pem", "--tls-key", "nothing.pem"]);
    assert!(why.contains("nothing.pem"), "{why}");
    // Told so in so many words, it does; a key is asked for all the same.
    let daemon = Daemon::of(user, &["--listen", "127.0.0.1:0,0.0.0.0:0", "--insecure-listen"]);
    assert_eq!(daemon.ask("", "GET /v1/sessions").status, 401);
    let key = text(&made.stdout);
    assert_eq!(daemon.ask(key.trim(), "GET /v1/sessions").status, 200);
}

#[test]
fn no_page_drives_a_daemon() {
    let settings = ["--origins", "https://ui.example.org", "--domain", "box.example.org"];
    let hosts = ["--hosts", "Denizen.example.org", "--metrics-public", "true"];
    let daemon = Daemon::start(&[&settings[..], &hosts].concat());
    let (_, key) = daemon.key(&["--scope", "admin"]);
    let bearer = format!("Bearer {key}");
    let ask = |line: &str, headers: &[(&str, &str)]| {
        let headers = [&[("authorization", bearer.as_str())], headers].concat();
        daemon.ask_with(line, &headers, "")
    };
    assert_eq!(daemon.ask_with("GET /v1/metrics", &[], "").status, 200);
    let port = daemon.address.port();
    let by = |host: &str| ask("GET /v1/whoami", &[("host", host)]);
    for ours in [
        "localhost",
        "LOCALHOST:1",
        "localhost.",
        "127.0.0.1",
        "127.9.9.9:80",
        "[::1]:7878",
        "denizen.example.org",
        "denizen.example.org:443",
        "box.example.org",
    ] {
        assert_eq!(by(ours).status, 200, "{ours}");
    }
    for other in [
        "evil.example",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "192.0.2.1",
        "[2001:db8::1]",
        "evil.denizen.example.org",
        "3000.box.example.org",
        "3000-.box.example.org",
        "0-a.box.example.org",
        "x-a.box.example.org",
        "3000-a.b.box.example.org",
        "3000-abox.example.org",
        "localhost@evil.example",
        "user@localhost",
        "",
        "local host",
        "localhost, evil.example",
    ] {
        assert!(matches!(by(other).status, 400 | 421), "{other}: {}", by(other).head);
    }
    // Two names, of which one is ours.
    for hosts in ["host: localhost\r\nhost: evil.example", "host: evil.example\r\nhost: localhost"]
    {
        let request = format!("GET /healthz HTTP/1.1\r\n{hosts}\r\nconnection: close\r\n\r\n");
        assert!(matches!(answer(&daemon.raw(request.as_bytes())).status, 400 | 421), "{hosts}");
    }
    let request =
        "GET http://evil.example/healthz HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n";
    assert_eq!(answer(&daemon.raw(request.as_bytes())).status, 421);
    let request = "GET /healthz HTTP/1.0\r\n\r\n";
    assert_eq!(answer(&daemon.raw(request.as_bytes())).status, 421);

    assert!(daemon.user.run(&["start", "a"]).status.success());
    let host = format!("localhost:{port}");
    let from =
        |origin: &str| ask("POST /v1/sessions/a/stop", &[("host", &host), ("origin", origin)]);
    let listed = from("https://ui.example.org");
    assert_eq!(listed.status, 204, "{}", listed.head);
    assert_eq!(listed.header("access-control-allow-origin"), Some("https://ui.example.org"));
    let own = from(&format!("http://localhost:{port}"));
    assert_eq!((own.status, own.header("access-control-allow-origin")), (204, None));
    for other in [
        "https://evil.example",
        "null",
        "http://localhost",
        "http://localhost:1",
        "",
        "http://ui.example.org",
        "https://ui.example.org.evil.example",
        "https://ui.example.org:444",
        &format!("https://localhost:{port}"),
        &format!("http://127.0.0.1:{port}"),
    ] {
        let refused = from(other);
        assert!(matches!(refused.status, 403 | 429), "{other}: {}", refused.head);
        assert_eq!(refused.header("access-control-allow-origin"), None);
    }
    // What a browser asks first has no key.
    let preflight = |origin| {
        let asks = ("access-control-request-method", "DELETE");
        let headers =
            [("origin", origin), asks, ("access-control-request-headers", "authorization")];
        daemon.ask_with("OPTIONS /v1/sessions/a", &headers, "")
    };
    let allowed = preflight("https://ui.example.org");
    assert_eq!(allowed.status, 204, "{}", allowed.head);
    assert_eq!(allowed.header("access-control-allow-methods"), Some("DELETE"));
    assert_eq!(allowed.header("access-control-allow-headers"), Some("authorization"));
    assert!(matches!(preflight("https://evil.example").status, 403 | 429));
    // A port's own name never leads to a route of the daemon's.
    let named = ask("POST /v1/shutdown", &[("host", "3000-a.box.example.org")]);
    assert!(named.status >= 400, "{}", named.head);
    assert_eq!(by("localhost").status, 200);
}

#[test]
fn a_key_that_is_revoked_ends_what_is_done_with_it() {
    let daemon = Daemon::start(&[]);
    assert!(daemon.user.run(&["start", "a"]).status.success());
    let (id, key) = daemon.key(&[]);
    let (_, other) = daemon.key(&[]);
    let follow = |key: &str| {
        let mut stream = daemon.connect();
        let host = daemon.address;
        let head = format!("host: {host}\r\nauthorization: Bearer {key}\r\n\r\n");
        write!(stream, "GET /v1/events HTTP/1.1\r\n{head}").unwrap();
        let mut lines = BufReader::new(stream);
        let mut status = String::new();
        lines.read_line(&mut status).unwrap();
        assert_eq!(status, "HTTP/1.1 200 OK\r\n");
        lines
    };
    let (mut events, mut others) = (follow(&key), follow(&other));
    let run = ["exec", "a", "--", "sh", "-c", "echo ready; exec sleep 83740"];
    let mut exec = daemon.with_key(&key, &run).stdout(Stdio::piped()).spawn().unwrap();
    let mut ready = String::new();
    BufReader::new(exec.stdout.take().unwrap()).read_line(&mut ready).unwrap();
    assert_eq!(ready, "ready\n");
    // A connection that has become one to a port.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let inside = listener.local_addr().unwrap().port();
    let mut port = daemon.connect();
    let head = format!("host: {}\r\nauthorization: Bearer {key}\r\n", daemon.address);
    let line = format!("GET /v1/sessions/a/ports/{inside} HTTP/1.1\r\n{head}");
    write!(port, "{line}connection: upgrade\r\nupgrade: tcp\r\n\r\n").unwrap();
    let (mut server, _) = listener.accept().unwrap();
    server.write_all(b"hello").unwrap();
    let mut greeted = Vec::new();
    while !greeted.ends_with(b"hello") {
        let mut piece = [0; 512];
        let count = port.read(&mut piece).unwrap();
        assert_ne!(count, 0, "{}", text(&greeted));
        greeted.extend(&piece[..count]);
    }
    // A handler that is not done, as its client has not sent all.
    let mut sending = daemon.connect();
    let head = format!("host: {}\r\nauthorization: Bearer {key}\r\n", daemon.address);
    let line = format!("POST /v1/sessions/new/import HTTP/1.1\r\n{head}");
    write!(sending, "{line}expect: 100-continue\r\ncontent-length: 9\r\n\r\n").unwrap();
    let mut going_on = [0; 25];
    sending.read_exact(&mut going_on).unwrap();
    assert_eq!(&going_on, b"HTTP/1.1 100 Continue\r\n\r\n");
    assert!(daemon.user.run(&["key", "revoke", &id]).status.success());
    let mut answer = [0; 12];
    sending.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"HTTP/1.1 401");
    // All of them end, and none waits for its client to notice.
    let mut rest = Vec::new();
    let _ = events.read_to_end(&mut rest);
    let _ = port.read_to_end(&mut rest);
    assert_eq!(exec.wait().unwrap().code(), Some(125));
    until("its command has ended", || running("sleep 83740").is_empty());
    // And nobody else's does.
    assert!(daemon.user.run(&["stop", "a", "--force"]).status.success());
    let mut line = String::new();
    while !line.contains("stopped") {
        line.clear();
        assert_ne!(others.read_line(&mut line).unwrap(), 0);
    }
    // Time does the same.
    let (_, short) = daemon.key(&["--expires", "2 seconds"]);
    let mut events = follow(&short);
    let begin = Instant::now();
    let _ = events.read_to_end(&mut rest);
    assert!(begin.elapsed() < Duration::from_secs(10));
    assert_eq!(daemon.ask(&short, "GET /v1/events").status, 401);
}

#[test]
fn a_token_is_for_one_session() {
    let daemon = Daemon::start(&[]);
    for session in ["a", "b"] {
        assert!(daemon.user.run(&["start", session]).status.success());
    }
    let (id, key) = daemon.key(&["--scope", "operate", "--expires", "1 hour"]);
    let bearer = format!("Bearer {key}");
    let make = |session: &str, body: &str| {
        let line = format!("POST /v1/sessions/{session}/tokens");
        daemon.ask_with(&line, &[("authorization", &bearer)], body)
    };
    let made = make("a", "").json();
    let token = made["token"].as_str().unwrap().to_owned();
    assert!(token.starts_with("dt_"));
    assert_eq!(make("a", r#"{"expires_in_seconds":0}"#).status, 400);
    assert_eq!(make("a", r#"{"expires_in_seconds":2592001}"#).status, 400);
    assert_eq!(make("nobody", "").status, 404);
    // No longer than the key.
    let long = make("a", r#"{"expires_in_seconds":86400}"#).json();
    let keys = daemon.user.json(&["key", "ls"]);
    assert_eq!(long["expires_at"], keys["keys"][0]["expires_at"]);
    let status = |token: &str, line: &str| daemon.ask(token, line).status;
    let uuid = made["session"].as_str().unwrap();
    assert_eq!(status(&token, "GET /v1/sessions/a"), 200);
    assert_eq!(status(&token, &format!("GET /v1/sessions/{uuid}")), 200);
    for line in [
        "GET /v1/sessions/b",
        "GET /v1/keys",
        "POST /v1/shutdown",
        "POST /v1/sessions/a/fork",
        "GET /v1/sessions/a/diff?other=b",
        "GET /v1/metrics",
        "POST /v1/sessions/c/start",
    ] {
        assert_eq!(status(&token, line), 403, "{line}");
    }
    assert_eq!(
        daemon.ask(&token, "GET /v1/sessions").json()["sessions"].as_array().unwrap().len(),
        1
    );
    let list = |token: &str, session: &str| {
        let headers = [("x-access-token", token), ("e2b-sandbox-id", session)];
        daemon.ask_with("POST /process.Process/List", &headers, "{}").status
    };
    assert_eq!((list(&token, uuid), list(&token, "b")), (200, 403));
    let changed = format!("{}x", &token[..token.len() - 1]);
    assert_eq!(list(&changed, uuid), 401);
    // On demand; what is made then is good.
    assert_eq!(status(&key, "DELETE /v1/sessions/a/tokens"), 204);
    assert_eq!(list(&token, uuid), 401);
    let fresh = make("a", "").json()["token"].as_str().unwrap().to_owned();
    assert_eq!(list(&fresh, uuid), 200);
    // With the session: one of the same id is another one.
    assert!(daemon.user.run(&["rm", "a", "--force"]).status.success());
    assert_eq!(list(&fresh, uuid), 401);
    assert!(daemon.user.run(&["start", uuid]).status.success());
    assert_eq!(list(&fresh, uuid), 401);
    // With the key it was made with.
    let of_b = make("b", "").json()["token"].as_str().unwrap().to_owned();
    assert_eq!(list(&of_b, "b"), 200);
    assert!(daemon.user.run(&["key", "revoke", &id]).status.success());
    assert_eq!(list(&of_b, "b"), 401);
}

#[test]
fn with_a_key_the_program_works_from_elsewhere() {
    let daemon = Daemon::start(&[]);
    let (_, key) = daemon.key(&[]);
    let run = |args: &[&str]| daemon.with_key(&key, args).output().unwrap();
    let output = run(&["exec", "demo", "--", "sh", "-c", "echo out; echo err >&2; exit 7"]);
    assert_eq!(output.status.code(), Some(7), "{output:?}");
    assert_eq!((output.stdout, output.stderr), (b"out\n".to_vec(), b"err\n".to_vec()));
    let file = daemon.user.state.path().join("file");
    std::fs::write(&file, vec![7; 3 << 20]).unwrap();
    let copied = run(&["cp", file.to_str().unwrap(), "demo:there"]);
    assert!(copied.status.success(), "{copied:?}");
    let size = run(&["exec", "demo", "--", "stat", "-c", "%s", "there"]);
    assert_eq!(text(&size.stdout), format!("{}\n", 3 << 20));
    let refused = run(&["shutdown"]);
    assert_eq!(refused.status.code(), Some(125));
    assert!(text(&refused.stderr).contains("scope admin"), "{refused:?}");
    // Nothing is started here for a daemon elsewhere.
    let mut nobody = daemon.with_key("", &["ls"]);
    let nobody = nobody.output().unwrap();
    assert!(text(&nobody.stderr).contains("no key"), "{nobody:?}");
    for wrong in ["ftp://a", "a:1", "http://dk_a@localhost", "http://localhost/sub", "http://"] {
        let mut command = daemon.with_key(&key, &["ls"]);
        let output = command.env("DENIZEN_URL", wrong).output().unwrap();
        assert_eq!(output.status.code(), Some(125), "{wrong}: {output:?}");
    }
}

/// A certificate of its own for 127.0.0.1, and the numbers that it is told from others by.
fn certificate(folder: &Path, name: &str) -> [String; 2] {
    let [key, certificate] =
        ["key", "pem"].map(|kind| format!("{}/{name}.{kind}", folder.display()));
    let settings = format!("{}/openssl", folder.display());
    std::fs::write(&settings, "[req]\ndistinguished_name=name\n[name]\n").unwrap();
    let made = Command::new("openssl")
        .args(["req", "-config", &settings, "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"])
        .args(["-subj", &format!("/CN={name}"), "-addext", "subjectAltName=IP:127.0.0.1"])
        .args(["-addext", "basicConstraints=critical,CA:FALSE"])
        .args(["-keyout", &key, "-out", &certificate])
        .output()
        .unwrap();
    assert!(made.status.success(), "{}", text(&made.stderr));
    [certificate, key]
}

#[test]
fn a_new_certificate_counts_for_the_next_connection() {
    let folder = tempfile::tempdir().unwrap();
    let [certificate_file, key_file] = certificate(folder.path(), "first");
    let [second, second_key] = certificate(folder.path(), "second");
    let first = std::fs::read(&certificate_file).unwrap();
    let trusted = folder.path().join("trusted.pem");
    std::fs::write(&trusted, &first).unwrap();
    let tls = ["--tls-certificate", &certificate_file, "--tls-key", &key_file];
    let daemon = Daemon::start(&tls);
    let (_, key) = daemon.key(&[]);
    let with_tls = |args: &[&str]| {
        let mut command = daemon.with_key(&key, args);
        command.env("DENIZEN_URL", format!("https://{}", daemon.address));
        command.env("SSL_CERT_FILE", &trusted);
        command
    };
    let mut long = with_tls(&["exec", "a", "--", "cat"]);
    let mut long = long.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let (mut into, mut from) =
        (long.stdin.take().unwrap(), BufReader::new(long.stdout.take().unwrap()));
    let mut echo = |line: &str| {
        into.write_all(line.as_bytes()).unwrap();
        let mut back = String::new();
        from.read_line(&mut back).unwrap();
        assert_eq!(back, line);
    };
    echo("before\n");
    // Half a change is none.
    std::fs::copy(&second, &certificate_file).unwrap();
    until("the change is seen", || {
        let _ = with_tls(&["ls"]).output().unwrap();
        daemon.log.lock().unwrap().contains("the old one stays")
    });
    assert!(with_tls(&["ls"]).output().unwrap().status.success());
    std::fs::copy(&second_key, &key_file).unwrap();
    until("there is another certificate", || !with_tls(&["ls"]).output().unwrap().status.success());
    std::fs::copy(&second, &trusted).unwrap();
    let output = with_tls(&["ls"]).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    echo("after\n");
    drop(into);
    assert!(long.wait().unwrap().success());
    // Without TLS there is nothing.
    assert!(!daemon.raw(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n").contains("HTTP/1.1"));
}

#[test]
fn who_is_refused_often_waits_and_nobody_else() {
    let daemon = Daemon::start(&[]);
    let (_, key) = daemon.key(&[]);
    let mut told = Vec::new();
    for _ in 0..500 {
        told.push(daemon.ask("dk_000000000000_0", "GET /v1/sessions"));
    }
    let waits: Vec<_> = told.iter().filter(|it| it.status == 429).collect();
    assert!(waits.len() > 100, "{}", waits.len());
    assert!(told[..90].iter().all(|it| it.status == 401));
    assert!(waits[0].header("retry-after").unwrap().parse::<u64>().unwrap() >= 1);
    assert_eq!(waits[0].code().1, "rate_limited");
    assert_eq!(daemon.ask(&key, "GET /v1/sessions").status, 200);
    // Nor do they fill the audit log.
    assert!(daemon.audit().len() < 300, "{}", daemon.audit().len());
}

#[test]
fn what_is_too_large_is_refused() {
    let daemon = Daemon::start(&[]);
    let (_, key) = daemon.key(&["--scope", "admin"]);
    let bearer = format!("Bearer {key}");
    let name = "n".repeat(1 << 20);
    let body = format!(r#"{{"name":"{name}","scope":"read"}}"#);
    let authorized = [("authorization", bearer.as_str())];
    assert_eq!(daemon.ask_with("POST /v1/keys", &authorized, &body).status, 413);
    let long = "x".repeat(40_000);
    let headers = [("authorization", bearer.as_str()), ("x-long", &long)];
    assert_eq!(daemon.ask_with("GET /v1/whoami", &headers, "").status, 431);
    assert!(matches!(daemon.ask(&key, &format!("GET /v1/{long}")).status, 414 | 431));
    let fits = "x".repeat(20_000);
    let headers = [("authorization", bearer.as_str()), ("x-long", &fits)];
    assert_eq!(daemon.ask_with("GET /v1/whoami", &headers, "").status, 200);
}

#[test]
fn nobody_forges_a_line_of_the_audit_log() {
    let daemon = Daemon::start(&[]);
    let (id, key) = daemon.key(&["--scope", "admin"]);
    let name = "x%0A%7B%22who%22:1%7D%1B%5B2J%C2%9B";
    daemon.ask(&key, &format!("PUT /v1/sessions/{name}"));
    daemon.ask(&key, "GET /v1/sessions");
    daemon.ask(&key, "PUT /v1/sessions/good");
    daemon.ask("dk_wrong", "PUT /v1/sessions/good");
    let lines = daemon.audit();
    let routes: Vec<_> = lines
        .iter()
        .map(|line| (line["route"].as_str().unwrap(), line["status"].as_u64().unwrap()))
        .collect();
    let start = "/v1/sessions/{session}";
    assert_eq!(routes, [("/v1/keys", 201), (start, 400), (start, 201), (start, 401)]);
    assert!(lines[0]["who"]["uid"].is_u64() && lines[0]["peer"] == "socket", "{}", lines[0]);
    assert_eq!(lines[1]["session"], "x\n{\"who\":1}\u{1b}[2J\u{9b}");
    assert_eq!(lines[2]["who"], json!({ "key": id, "name": "test" }));
    assert_eq!((&lines[2]["session"], &lines[2]["method"]), (&json!("good"), &json!("PUT")));
    assert!(lines[2]["peer"].as_str().unwrap().starts_with("127.0.0.1:"));
    assert!(lines[2]["milliseconds"].is_u64());
    assert_eq!(lines[3]["who"], json!(null));
    // A header is no session of a route that has none; the one that was made is told.
    let key_and_header = [("x-api-key", key.as_str()), ("denizen-session", "good")];
    let body = r#"{"name": "new"}"#;
    let made = daemon.ask_with("POST /v1/sessions", &key_and_header, body).json();
    let fork = daemon.ask(&key, "POST /v1/sessions/new/fork").json();
    let lines = daemon.audit();
    let told = |line: &Value| (line["session"].clone(), line["made"].clone());
    assert_eq!(told(&lines[4]), (json!(null), made["id"].clone()));
    assert_eq!(told(&lines[5]), (json!("new"), fork["id"].clone()));
    assert_eq!(told(&lines[2]), (json!("good"), json!(null)));
    let text = std::fs::read_to_string(daemon.user.state.path().join("audit.log")).unwrap();
    assert!(!text.contains(key.rsplit('_').next().unwrap()));
    assert!(text.chars().all(|c| c == '\n' || (' '..='~').contains(&c)), "{text}");
}

/// Numbers that look random, the same ones each time.
fn random(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

#[test]
fn malformed_requests_are_refused_and_leave_nothing() {
    let daemon = Daemon::start(&[]);
    let (_, key) = daemon.key(&[]);
    let good = format!(
        "POST /process.Process/List HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {key}\r\n\
         denizen-session: a\r\ncontent-type: application/json\r\ncontent-length: 2\r\nconnection: close\r\n\r\n{{}}"
    );
    assert_eq!(answer(&daemon.raw(good.as_bytes())).status, 200);
    let odd: [&[u8]; 16] = [
        b"\0",
        b"\r\n",
        b"\n",
        b" ",
        b"\xff\xfe",
        b"%00",
        b"../",
        b"\x16\x03\x01",
        b"{",
        b"content-length: -1\r\n",
        b"transfer-encoding: chunked\r\n",
        b"content-length: 99999999999999999999\r\n",
        b"HTTP/9.9",
        b"\t",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"expect: 100-continue\r\n",
    ];
    let mut state = 0x5EED_u64;
    let mut statuses = std::collections::BTreeMap::<u16, usize>::new();
    let mut before = 0;
    for round in 0..10_000 {
        if round == 2_000 {
            before = daemon.memory();
        }
        let mut bytes = good.clone().into_bytes();
        for _ in 0..=random(&mut state) % 4 {
            let at = usize::try_from(random(&mut state)).unwrap() % bytes.len();
            match random(&mut state) % 4 {
                0 => bytes[at] = random(&mut state).to_le_bytes()[0],
                1 => drop(bytes.drain(at..(at + 9).min(bytes.len() - 1))),
                2 => bytes.truncate(at.max(1)),
                _ => {
                    let piece = odd[usize::try_from(random(&mut state)).unwrap() % odd.len()];
                    bytes.splice(at..at, piece.iter().copied());
                }
            }
        }
        let mut stream = daemon.connect();
        let _ = stream.write_all(&bytes);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let mut told = Vec::new();
        let _ = stream.read_to_end(&mut told);
        let status = answer(&text(&told)).status;
        *statuses.entry(status).or_default() += 1;
        assert!(status < 500 || matches!(status, 501 | 505), "{status}: {:?}", text(&bytes));
    }
    let grown = daemon.memory().saturating_sub(before);
    assert!(grown < 16 * 1024, "{grown} KiB more");
    assert!(statuses.len() > 3, "{statuses:?}");
    assert_eq!(answer(&daemon.raw(good.as_bytes())).status, 200);
    assert_eq!(daemon.user.json(&["inspect", "a"])["in_use"], false);
}

#[test]
fn slow_and_silent_clients_are_sent_away() {
    let daemon = Daemon::start(&[]);
    let (_, key) = daemon.key(&[]);
    let beginnings: [&[u8]; 6] = [
        b"",
        b"G",
        b"GET /v1/events HTTP/1.1\r\nhost: localhost\r\nx-a: ",
        b"PRI * HT",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x16\x03\x01\x02\0",
    ];
    // One that has asked what needs no key, by HTTP/2: GET /healthz of 127.0.0.1.
    let head = b"\x82\x86\x04\x08/healthz\x01\x09127.0.0.1";
    let mut asked = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0".to_vec();
    asked.extend([0, 0, u8::try_from(head.len()).unwrap(), 1, 5, 0, 0, 0, 1]);
    asked.extend(head);
    let beginnings = beginnings.into_iter().chain([&asked[..]]);
    let clients = (0..100).flat_map(|_| beginnings.clone()).map(|bytes| {
        let mut stream = daemon.connect();
        stream.write_all(bytes).unwrap();
        (stream, bytes == asked)
    });
    let clients: Vec<_> = clients.collect();
    let begin = Instant::now();
    // They are in nobody's way.
    assert_eq!(daemon.ask(&key, "GET /v1/sessions").status, 200);
    for (mut client, asked) in clients {
        let mut rest = Vec::new();
        if let Err(error) = client.read_to_end(&mut rest) {
            assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset, "{error}");
        }
        assert_eq!(rest.windows(3).any(|it| it == b"ok\n"), asked, "{rest:?}");
    }
    assert!(begin.elapsed() < Duration::from_secs(25), "{:?}", begin.elapsed());
}

#[test]
fn what_one_key_has_made_is_not_given_to_another() {
    let daemon = Daemon::start(&[]);
    let make = |headers: &[(&str, &str)]| {
        let headers = [headers, &[("idempotency-key", "1")]].concat();
        let made = daemon.ask_with("POST /v1/sessions", &headers, "{}");
        assert_eq!(made.status, 201, "{}", made.body);
        made.json()["id"].clone()
    };
    let ((_, one), (_, other)) = (daemon.key(&[]), daemon.key(&[]));
    let bearer = format!("Bearer {one}");
    let first = make(&[("x-access-token", &one)]);
    assert_ne!(make(&[("x-access-token", &other)]), first);
    // However a key is sent, it is the same one.
    assert_eq!(make(&[("authorization", &bearer)]), first);
    assert_eq!(make(&[("x-api-key", &one)]), first);
}

#[test]
fn what_is_refused_leaves_nothing_behind() {
    let daemon = Daemon::start(&[]);
    let (_, key) = daemon.key(&[]);
    let random = uuid::Uuid::new_v4();
    let keys = daemon.user.state.path().join("keys.json");
    let before = std::fs::read_to_string(&keys).unwrap();
    let tokens = daemon.ask(&key, &format!("DELETE /v1/sessions/{random}/tokens"));
    assert_eq!(tokens.code(), (404, "unknown_session".to_owned()));
    assert_eq!(std::fs::read_to_string(&keys).unwrap(), before);
    let made = daemon.ask(&key, "PUT /v1/sessions/ci-1?image=nothere");
    assert!(made.status >= 400, "{}", made.body);
    // A name that was given is one that is unknown in another way.
    let known = |name: &str| daemon.ask(&key, &format!("POST /v1/sessions/{name}/start")).json();
    let detail = |name: &str| known(name)["detail"].as_str().unwrap().replace(name, "");
    assert_eq!(detail("ci-1"), detail("ci-2"));
}
