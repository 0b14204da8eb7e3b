//! envd's protocol as its clients speak it to the daemon: users of a session, and their files.
#![allow(clippy::unwrap_used)]

mod common;

use common::wire::{Answer, Api};
use common::{saved_image, text};
use serde_json::{Value, json};

/// Makes the user whom the clients name, where there is nothing but a shell.
const MAKE_USER: &str = "echo user:x:1234:1234::/home/user:/bin/sh >> /etc/passwd; \
    echo user:x:1234: >> /etc/group; echo more:x:4321:other,user >> /etc/group; \
    mkdir -p /home/user && chown 1234:1234 /home/user";

fn basic(user: &str) -> String {
    let pair = match user {
        "user" => "dXNlcjo=",
        "stranger" => "c3RyYW5nZXI6",
        other => panic!("no header is at hand for {other}"),
    };
    format!("authorization: Basic {pair}")
}

/// Sends a request for the session `a`, as a user if one is named.
fn ask(api: &Api, user: Option<&str>, method: &str, path: &str, kind: &str, body: &[u8]) -> Answer {
    let kind = format!("content-type: {kind}");
    let basic = user.map(basic);
    let mut headers = vec!["denizen-session: a", &kind];
    headers.extend(basic.as_deref());
    api.ask(method, path, &headers, body)
}

fn call(api: &Api, user: Option<&str>, method: &str, request: &Value) -> (u16, Value) {
    let body = request.to_string();
    let answer = ask(api, user, "POST", method, "application/json", body.as_bytes());
    (answer.status, serde_json::from_slice(&answer.body()).unwrap())
}

/// What a command has printed, and its end: the last event, or the error.
fn run(api: &Api, user: Option<&str>, line: &str, more: &Value) -> (String, Value) {
    let mut process = json!({ "cmd": "/bin/sh", "args": ["-c", line] });
    process.as_object_mut().unwrap().extend(more.as_object().cloned().unwrap_or_default());
    let request = json!({ "process": process, "stdin": false }).to_string();
    let mut body = vec![0];
    body.extend(u32::try_from(request.len()).unwrap().to_be_bytes());
    body.extend(request.as_bytes());
    let kind = "application/connect+json";
    let answer = ask(api, user, "POST", "/process.Process/Start", kind, &body).body();
    let (mut rest, mut printed, mut end) = (answer.as_slice(), Vec::new(), Value::Null);
    while let [_, a, b, c, d, after @ ..] = rest {
        let length = usize::try_from(u32::from_be_bytes([*a, *b, *c, *d])).unwrap();
        let message: Value = serde_json::from_slice(&after[..length]).unwrap();
        rest = &after[length..];
        let event = &message["event"];
        for stream in ["stdout", "stderr"] {
            if let Some(bytes) = event["data"][stream].as_str() {
                printed.extend(common::wire::decode(bytes));
            }
        }
        if !event["end"].is_null() {
            end = event["end"].clone();
        } else if !message["error"].is_null() {
            end = message["error"].clone();
        }
    }
    (text(&printed), end)
}

fn users_have_their_own(api: &Api) {
    let none = json!({});
    let made = run(api, None, MAKE_USER, &none);
    assert_eq!(made.1["exitCode"].as_i64().unwrap_or(0), 0, "{made:?}");
    // Nobody named: all is as ever.
    assert_eq!(run(api, None, "id -u; pwd", &none).0, "0\n/volume\n");
    let user = Some("user");
    let line = "id -u; id -g; id -G; pwd; echo $HOME $USER $LOGNAME $SHELL";
    let (told, _) = run(api, user, line, &none);
    let own = "1234\n1234\n1234 4321\n/home/user\n/home/user user user /bin/sh\n";
    assert_eq!(told, own);
    let (told, _) =
        run(api, user, "echo $HOME; pwd", &json!({ "cwd": "/", "envs": { "HOME": "/x" } }));
    assert_eq!(told, "/x\n/\n");
    // They have no rights but their own.
    let (told, end) = run(api, user, "grep CapEff /proc/self/status; echo > /etc/x", &none);
    assert!(told.contains("0000000000000000") && end["exitCode"] != 0, "{told} {end}");
    assert_eq!(run(api, user, "echo again > /dev/stdout", &none).0, "again\n");
    let (_, end) = run(api, user, "true", &json!({ "cwd": "none" }));
    assert_eq!(end["code"], "invalid_argument", "{end}");
    let (_, end) = run(api, Some("stranger"), "true", &none);
    assert_eq!(end["code"], "unauthenticated", "{end}");
    assert_eq!(end["message"], "invalid username: 'stranger'");
    // A tree of theirs ends with its command, whatever has become of it.
    let line = "(setsid sleep 1000 &) ; sleep 1000";
    let request = json!({ "process": { "cmd": "/bin/sh", "args": ["-c", line] } }).to_string();
    let mut body = vec![0];
    body.extend(u32::try_from(request.len()).unwrap().to_be_bytes());
    body.extend(request.as_bytes());
    let (kind, soon) = ("content-type: application/connect+json", "connect-timeout-ms: 1000");
    let basic = basic("user");
    let headers = ["denizen-session: a", kind, soon, &basic];
    let ended = api.ask("POST", "/process.Process/Start", &headers, &body);
    assert!(text(&ended.body()).contains("deadline_exceeded"), "{}", text(&ended.body()));
    let left = "cat /proc/[0-9]*/cmdline | tr '\\0' ' ' | grep -c 'sleep[ ]1000'";
    assert_eq!(run(api, None, left, &none).0, "0\n");

    // Files: where they begin, and whose they are.
    let octets = "application/octet-stream";
    let made = ask(api, user, "POST", "/files?path=new/file", octets, b"content");
    assert_eq!(made.status, 200, "{}", text(&made.body()));
    let stat = "stat -c '%U %G %a' /home/user/new /home/user/new/file";
    assert_eq!(run(api, None, stat, &none).0, "user user 755\nuser user 644\n");
    let (_, told) = call(api, user, "/filesystem.Filesystem/Stat", &json!({ "path": "new/file" }));
    let entry = &told["entry"];
    assert_eq!((&entry["owner"], &entry["path"]), (&json!("user"), &json!("/home/user/new/file")));
    let read = |path: &str| ask(api, None, "GET", path, octets, &[]);
    assert_eq!(read("/files?username=user&path=new/file").body(), b"content");
    assert_eq!(read("/files?path=new/file").status, 404);
    assert_eq!(read("/files?username=stranger&path=new/file").status, 401);
    let (status, told) = call(api, Some("stranger"), "/filesystem.Filesystem/Stat", &json!({}));
    assert_eq!((status, &told["code"]), (401, &json!("unauthenticated")));
    // For whom a request is, is the daemon's to say.
    let headers = ["denizen-session: a", "denizen-user: user"];
    assert_eq!(api.ask("GET", "/files?path=new/file", &headers, &[]).status, 404);

    // Variables that all commands have.
    let set = json!({ "envVars": { "SET": "once" } });
    let answer = ask(api, None, "POST", "/init", "application/json", set.to_string().as_bytes());
    assert_eq!(answer.status, 204);
    assert_eq!(read("/envs").json()["SET"], "once");
    assert_eq!(run(api, user, "echo $SET", &none).0, "once\n");
}

#[test]
fn users_of_a_sandbox_have_their_own() {
    if !rustix::process::geteuid().is_root() {
        // There may be no other users then.
        return;
    }
    let api = Api::with(&["--isolation", "sandbox"]);
    assert_eq!(api.ask("PUT", "/v1/sessions/a", &[], &[]).status, 201);
    users_have_their_own(&api);
}

#[cfg(target_arch = "x86_64")]
#[test]
fn users_of_a_machine_have_their_own() {
    let guest = concat!(env!("CARGO_TARGET_TMPDIR"), "/../guest");
    let (kernel, modules) = (format!("{guest}/vmlinuz"), format!("{guest}/modules"));
    assert!(std::path::Path::new(&kernel).exists(), "no kernel: `cargo xtask test` fetches one");
    let limits = "{ memory_bytes = 268435456, disk_bytes = 1073741824 }";
    let api = Api::with(&[
        "--isolation",
        "microvm",
        "--kernel",
        &kernel,
        "--kernel-modules",
        &modules,
        "--limits",
        limits,
        "--acquire-timeout-seconds",
        "200",
    ]);
    let folder = tempfile::tempdir().unwrap();
    saved_image(folder.path());
    let image = folder.path().join("image.tar");
    api.0.denizen(&["image", "import", image.to_str().unwrap()]).status().unwrap();
    assert!(api.0.denizen(&["create", "a", "demo/busybox:1"]).status().unwrap().success());
    users_have_their_own(&api);
}
