//! E2B's control plane: who is let in to which sandbox, what ends one and what outlives a daemon.
//! That the SDKs work with it, is tested by these themselves (`cargo xtask e2b`).
#![allow(clippy::unwrap_used)]

mod common;

use std::time::Duration;

use common::tcp::{Answer, Daemon};
use common::{User, until};
use serde_json::{Value, json};

/// A client of E2B.
struct Client<'d> {
    daemon: &'d Daemon,
    key: String,
}

impl<'d> Client<'d> {
    fn new(daemon: &'d Daemon, scope: &[&str]) -> Self {
        Self { daemon, key: daemon.key(scope).1 }
    }

    fn ask(&self, line: &str, body: &Value) -> Answer {
        let body = if body.is_null() { String::new() } else { body.to_string() };
        self.daemon.ask_with(line, &[("x-api-key", &self.key)], &body)
    }

    fn create(&self, more: Value) -> Sandbox<'d> {
        let mut body = json!({ "templateID": "base", "timeout": 300 });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let made = self.ask("POST /v2/sandboxes", &body);
        assert_eq!(made.status, 201, "{}", made.body);
        Sandbox::of(self.daemon, &made.json())
    }

    fn listed(&self, query: &str) -> Vec<String> {
        let all = self.ask(&format!("GET /v2/sandboxes?{query}"), &Value::Null).json();
        let ids = all.as_array().unwrap().iter().map(|it| it["sandboxID"].as_str().unwrap());
        ids.map(str::to_owned).collect()
    }
}

struct Sandbox<'d> {
    daemon: &'d Daemon,
    id: String,
    token: String,
    traffic: Option<String>,
}

impl<'d> Sandbox<'d> {
    fn of(daemon: &'d Daemon, told: &Value) -> Self {
        let text = |name: &str| told[name].as_str().map(str::to_owned);
        Self {
            daemon,
            id: text("sandboxID").unwrap(),
            token: text("envdAccessToken").unwrap(),
            traffic: text("trafficAccessToken"),
        }
    }

    /// Asks envd in it, with a token if there is one.
    fn envd(&self, line: &str, token: Option<&str>) -> Answer {
        let mut headers = vec![("e2b-sandbox-id", self.id.as_str()), ("e2b-sandbox-port", "49983")];
        headers.extend(token.map(|token| ("x-access-token", token)));
        self.daemon.ask_with(line, &headers, "")
    }

    fn is_running(&self) -> bool {
        self.envd("GET /health", Some(&self.token)).status == 204
    }

    /// Runs a line in it, by the daemon's own way.
    fn exec(&self, line: &str) -> std::process::Output {
        self.daemon.user.exec(&self.id, line)
    }

    /// Has a line run that goes on.
    fn begin(&self, line: &str) {
        let run = ["exec", "--detach", &self.id, "--", "sh", "-c", line];
        assert!(self.daemon.user.run(&run).status.success());
    }

    fn port(&self, port: u16, headers: &[(&str, &str)]) -> Answer {
        let host = format!("{port}-{}.e2b.app", self.id);
        self.daemon.ask_with("GET /", &[&[("host", host.as_str())], headers].concat(), "")
    }
}

fn sandboxes() -> Daemon {
    Daemon::with(User::new(), &["--isolation", "sandbox"])
}

#[test]
fn a_sandbox_is_there_until_it_is_killed_and_then_it_is_gone() {
    let daemon = sandboxes();
    let client = Client::new(&daemon, &[]);
    let sandbox = client.create(json!({ "metadata": { "a": "b c" } }));
    assert!(sandbox.is_running());
    assert_eq!(client.listed("metadata=a%3Db%252520c"), [sandbox.id.as_str()]);
    assert_eq!(client.listed("metadata=a%3Dother"), <[&str; 0]>::default());
    let told = client.ask(&format!("GET /sandboxes/{}", sandbox.id), &Value::Null).json();
    assert_eq!((&told["state"], &told["templateID"]), (&json!("running"), &json!("base")));
    let kill = format!("DELETE /sandboxes/{}", sandbox.id);
    assert_eq!(client.ask(&kill, &Value::Null).status, 204);
    let again = client.ask(&kill, &Value::Null);
    assert_eq!((again.status, &again.json()["code"]), (404, &json!(404)));
    // Its token is worth nothing, and what its client is told is not that.
    let gone = sandbox.envd("GET /health", Some(&sandbox.token));
    assert_eq!(gone.status, 502);
    assert_eq!(gone.json()["message"], "The sandbox was not found");
    assert_eq!(sandbox.port(80, &[]).json()["message"], "The sandbox was not found");
    assert!(!daemon.user.run(&["inspect", &sandbox.id]).status.success());
}

#[test]
fn who_has_no_key_or_another_ones_gets_nowhere() {
    let daemon = sandboxes();
    let all = Client::new(&daemon, &[]);
    let sandbox = all.create(json!({}));
    let other = all.create(json!({}));
    let limited = Client::new(&daemon, &["--sessions", "team-"]);
    for line in ["POST /v2/sandboxes", "GET /v2/sandboxes", "DELETE /sandboxes/x", "GET /templates"]
    {
        let refused = daemon.ask_with(line, &[], "");
        assert_eq!((refused.status, &refused.json()["code"]), (401, &json!(401)), "{line}");
    }
    // Tokens are for one sandbox, and for nothing beside it.
    for token in [None, Some("dt_AAAA"), Some(other.token.as_str())] {
        for line in ["GET /envs", "GET /files?path=/etc/hostname", "POST /process.Process/List"] {
            let refused = sandbox.envd(line, token);
            assert!([401, 403].contains(&refused.status), "{line}: {}", refused.body);
        }
    }
    let by_token = [("x-api-key", sandbox.token.as_str())];
    let seen = daemon.ask_with("GET /v2/sandboxes", &by_token, "").json();
    // It would be told one that lives longer.
    assert_eq!(seen.as_array().unwrap().len(), 0, "{seen}");
    for (line, body) in [
        (format!("DELETE /sandboxes/{}", other.id), ""),
        ("POST /v2/sandboxes".to_owned(), r#"{"templateID":"base"}"#),
    ] {
        let refused = daemon.ask_with(&line, &by_token, body);
        assert!([403, 404].contains(&refused.status), "{line}: {}", refused.body);
    }
    // A key for some sessions makes such, and sees no others.
    let theirs = limited.create(json!({}));
    assert_eq!(limited.listed(""), [theirs.id.as_str()]);
    for line in ["GET /sandboxes/{}", "DELETE /sandboxes/{}", "POST /sandboxes/{}/pause"] {
        let refused = limited.ask(&line.replace("{}", &sandbox.id), &Value::Null);
        assert_eq!(refused.status, 404, "{line}: {}", refused.body);
    }
    assert!(sandbox.is_running() && other.is_running());
    let read = Client::new(&daemon, &["--scope", "read"]);
    assert_eq!(read.listed("").len(), 3);
    // That would tell a token.
    let token = read.ask(&format!("GET /sandboxes/{}", sandbox.id), &Value::Null);
    assert_eq!(token.status, 403);
}

#[test]
fn ports_are_open_to_all_or_to_who_has_the_token_and_nothing_else_is() {
    let daemon = sandboxes();
    let client = Client::new(&daemon, &[]);
    let open = client.create(json!({}));
    let closed = client.create(json!({ "network": { "allowPublicTraffic": false } }));
    // What it is asked is what it answers.
    let serve = "python3 -c 'import http.server as h
class H(h.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.send_header(\"set-cookie\", \"a=b\"); self.end_headers()
        self.wfile.write(repr(dict(self.headers)).encode())
h.HTTPServer((\"\", 8000), H).serve_forever()'";
    for sandbox in [&open, &closed] {
        sandbox.begin(serve);
        let token = sandbox.traffic.clone().unwrap_or_default();
        let headers = [("e2b-traffic-access-token", token.as_str())];
        until("the port is open", || sandbox.port(8000, &headers).status == 200);
    }
    let mine = [("cookie", "mine=1"), ("authorization", "Bearer of-the-app")];
    let answer = open.port(8000, &mine);
    assert_eq!(answer.status, 200);
    assert!(
        answer.body.contains("mine=1") && answer.body.contains("of-the-app"),
        "{}",
        answer.body
    );
    assert_eq!(answer.header("set-cookie"), Some("a=b"));
    // What is ours stays ours.
    let key = [("x-api-key", client.key.as_str())];
    assert!(!open.port(8000, &key).body.contains(&client.key));
    let by_header = |port| {
        let headers = [("e2b-sandbox-id", open.id.as_str()), ("e2b-sandbox-port", port)];
        daemon.ask_with("GET /a", &headers, "")
    };
    assert_eq!(by_header("8000").status, 200);
    assert!(!by_header("8000").body.to_lowercase().contains("e2b-"));
    let not_there = by_header("8001");
    assert_eq!(not_there.status, 502);
    assert_eq!(not_there.json()["message"], "The sandbox is running but port is not open");
    assert_eq!(not_there.json()["port"], 8001);

    assert_eq!(closed.port(8000, &[]).status, 403);
    let wrong = [("e2b-traffic-access-token", "0123")];
    assert_eq!(closed.port(8000, &wrong).status, 403);
    let other = [("e2b-traffic-access-token", open.token.as_str())];
    assert_eq!(closed.port(8000, &other).status, 403);
    // The daemon's own path is none of E2B's ways.
    let path = format!("GET /v1/sessions/{}/ports/8000/", open.id);
    assert_eq!(daemon.ask_with(&path, &[], "").status, 401);
    let host = [("host", "8000-demo.e2b.app")];
    assert_eq!(daemon.ask_with("GET /", &host, "").status, 421);
}

#[test]
fn a_sandbox_ends_in_time_or_sleeps_and_is_woken_by_who_may() {
    let daemon = sandboxes();
    let client = Client::new(&daemon, &[]);
    let killed = client.create(json!({ "timeout": 0 }));
    until("its time is over", || client.listed("") == <[&str; 0]>::default());
    assert!(!killed.is_running());

    let paused = client.create(json!({ "timeout": 300, "autoPause": true }));
    let waker = client.create(json!({ "autoPause": true, "autoResume": { "enabled": true } }));
    let count = "i=0; while true; do i=$((i+1)); echo $i >/home/user/n; sleep 0.02; done";
    for sandbox in [&paused, &waker] {
        sandbox.begin(count);
        let end = format!("POST /sandboxes/{}/timeout", sandbox.id);
        assert_eq!(client.ask(&end, &json!({ "timeout": 0 })).status, 204);
    }
    until("both sleep", || client.listed("state=paused").len() == 2);
    assert!(!paused.is_running());
    let end = format!("POST /sandboxes/{}/timeout", paused.id);
    assert_eq!(client.ask(&end, &json!({ "timeout": 9 })).status, 409);
    let pause = format!("POST /sandboxes/{}/pause", paused.id);
    assert_eq!(client.ask(&pause, &Value::Null).status, 409);
    // A request is enough for the one, and it stays awake then.
    assert!(waker.is_running());
    assert_eq!(client.listed("state=running"), [waker.id.as_str()]);
    let connect = format!("POST /v2/sandboxes/{}/connect", paused.id);
    assert_eq!(client.ask(&connect, &json!({ "timeout": 60 })).status, 201);
    assert_eq!(client.ask(&connect, &json!({ "timeout": 60 })).status, 200);
    for sandbox in [&paused, &waker] {
        let number = |sandbox: &Sandbox<'_>| common::text(&sandbox.exec("cat /home/user/n").stdout);
        let before = number(sandbox);
        until("what ran goes on", || number(sandbox) != before);
    }
}

#[test]
fn sandboxes_outlive_their_daemon_and_deadlines_hold() {
    let daemon = sandboxes();
    let client = Client::new(&daemon, &[]);
    let key = client.key.clone();
    let kept = client.create(json!({ "metadata": { "a": "b" }, "envVars": { "A": "b" } }));
    let sleeps = client.create(json!({}));
    let over = client.create(json!({ "timeout": 1 }));
    assert!(kept.exec("echo here > /home/user/file").status.success());
    assert_eq!(
        client.ask(&format!("POST /sandboxes/{}/pause", sleeps.id), &Value::Null).status,
        204
    );
    let ids = [kept, sleeps, over].map(|it| (it.id, it.token));
    let user = daemon.killed();
    // As long as the third may live.
    std::thread::sleep(Duration::from_secs(1));
    let daemon = Daemon::with(user, &["--isolation", "sandbox"]);
    let client = Client { daemon: &daemon, key };
    let [kept, sleeps, over] =
        ids.map(|(id, token)| Sandbox { daemon: &daemon, id, token, traffic: None });
    until("its time is over", || !client.listed("").contains(&over.id));
    assert_eq!(client.listed("metadata=a%3Db"), [kept.id.as_str()]);
    assert_eq!(client.listed("state=paused"), [sleeps.id.as_str()]);
    assert!(kept.is_running() && !sleeps.is_running());
    let file = kept.envd("GET /files?path=file", Some(&kept.token));
    assert_eq!(file.body, "here\n");
    let envs = kept.envd("GET /envs", Some(&kept.token));
    assert!(envs.status == 200, "{}", envs.body);
    let connect = format!("POST /v2/sandboxes/{}/connect", sleeps.id);
    assert_eq!(client.ask(&connect, &json!({})).status, 201);
    assert!(sleeps.is_running());
}

#[test]
fn what_is_not_had_is_refused_by_its_name() {
    let daemon = sandboxes();
    let client = Client::new(&daemon, &[]);
    for (more, what) in [
        (json!({ "iam": { "tokens": { "a": {} } } }), "iam"),
        (json!({ "network": { "httpsPorts": [1] } }), "httpsPorts"),
        (json!({ "network": { "egressProxy": { "host": "a" } } }), "egressProxy"),
        (json!({ "network": { "rules": { "a.example": [] } } }), "rules"),
    ] {
        let mut body = json!({ "templateID": "base" });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let refused = client.ask("POST /v2/sandboxes", &body);
        let told = refused.json();
        assert_eq!((refused.status, &told["code"]), (501, &json!(501)), "{told}");
        assert!(told["message"].as_str().unwrap().contains(what), "{told}");
    }
    let unknown = client.ask("POST /v2/sandboxes", &json!({ "templateID": "nothing" }));
    assert_eq!((unknown.status, &unknown.json()["code"]), (404, &json!(404)));
    for line in ["GET /secrets", "DELETE /secrets/x"] {
        assert_eq!(client.ask(line, &Value::Null).status, 501, "{line}");
    }
    let bad = client.ask("POST /v2/sandboxes", &json!({ "timeout": 1 }));
    assert_eq!((bad.status, &bad.json()["code"]), (400, &json!(400)));
    assert!(client.listed("").is_empty());
    let sessions = daemon.user.json(&["ls"]);
    assert_eq!(sessions.as_array().map(Vec::len), Some(0), "{sessions}");
}
