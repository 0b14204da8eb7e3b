//! Who gets in by TCP, to what, and what those get who should not: a real daemon, and clients
//! that write their bytes themselves.
#![allow(clippy::unwrap_used)]

mod common;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::{Child, Stdio};
use std::time::Duration;

use common::{User, text};
use serde_json::{Value, json};

/// A daemon that is reached by TCP too.
struct Daemon {
    user: User,
    child: Child,
    address: SocketAddr,
    log: std::sync::Arc<std::sync::Mutex<String>>,
}

struct Answer {
    status: u16,
    head: String,
    body: String,
}

impl Answer {
    fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|_| panic!("{}{}", self.head, self.body))
    }

    fn code(&self) -> (u16, String) {
        (self.status, self.json()["code"].as_str().unwrap_or_default().to_owned())
    }

    fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().find_map(|line| {
            let (header, value) = line.split_once(": ")?;
            header.eq_ignore_ascii_case(name).then_some(value)
        })
    }
}

impl Daemon {
    fn start(settings: &[&str]) -> Self {
        Self::of(User::new(), settings)
    }

    fn of(user: User, settings: &[&str]) -> Self {
        let args = [&["--listen", "127.0.0.1:0", "--isolation", "host"], settings, &["serve"]];
        let mut child = user.denizen(&args.concat()).stderr(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let mut said = String::new();
        let address = loop {
            let line = lines.next().unwrap_or_else(|| panic!("no daemon: {said}")).unwrap();
            if let Some(address) = line.strip_prefix("denizen listens on 127.") {
                break format!("127.{address}").parse().unwrap();
            }
            said.push_str(&line);
        };
        let log = std::sync::Arc::new(std::sync::Mutex::new(said));
        let kept = log.clone();
        std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                let mut log = kept.lock().unwrap();
                log.push_str(&line);
                log.push('\n');
            }
        });
        Self { user, child, address, log }
    }

    fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        stream
    }

    /// Sends bytes, and reads what comes until the end.
    fn raw(&self, bytes: &[u8]) -> String {
        let mut stream = self.connect();
        // It may be refused before all of it was sent.
        let _ = stream.write_all(bytes);
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        text(&answer)
    }

    fn ask_with(&self, line: &str, headers: &[(&str, &str)], body: &str) -> Answer {
        let mut request = format!("{line} HTTP/1.1\r\nconnection: close\r\n");
        if !headers.iter().any(|(name, _)| *name == "host") {
            request.push_str(&format!("host: {}\r\n", self.address));
        }
        for (name, value) in headers {
            request.push_str(&format!("{name}: {value}\r\n"));
        }
        if !body.is_empty() {
            let length = body.len();
            request.push_str(&format!(
                "content-type: application/json\r\ncontent-length: {length}\r\n"
            ));
        }
        request.push_str(&format!("\r\n{body}"));
        answer(&self.raw(request.as_bytes()))
    }

    fn ask(&self, key: &str, line: &str) -> Answer {
        self.ask_with(line, &[("authorization", &format!("Bearer {key}"))], "")
    }

    fn key(&self, args: &[&str]) -> (String, String) {
        let made = self.user.json(&[&["key", "create", "test"], args].concat());
        (made["id"].as_str().unwrap().to_owned(), made["key"].as_str().unwrap().to_owned())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.user.run(&["shutdown"]);
        let _ = self.child.wait();
        let log = self.log.lock().unwrap();
        if !std::thread::panicking() {
            assert!(!log.contains("panicked"), "{log}");
        }
    }
}

fn answer(text: &str) -> Answer {
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or((text, ""));
    let status = head.split(' ').nth(1).and_then(|it| it.parse().ok()).unwrap_or(0);
    let mut body = body.to_owned();
    if head.to_lowercase().contains("transfer-encoding: chunked") {
        body = body.lines().skip(1).step_by(2).collect();
    }
    Answer { status, head: head.to_owned(), body }
}

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
    assert_eq!(daemon.ask(&read, "GET /v1/sessions/ci-a/export").code(), forbidden);
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
