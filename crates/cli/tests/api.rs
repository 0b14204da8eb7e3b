//! The HTTP API as programs see it, spoken to the real daemon byte by byte.
#![allow(clippy::unwrap_used)]

mod common;

use std::io::{BufRead, BufReader, Read};

use common::text;
use common::wire::{Api, Followed, decode};
use serde_json::{Value, json};

#[test]
fn sessions_are_made_listed_and_removed() {
    let api = Api::new();
    for name in ["web-1", "web-2", "job"] {
        let made = api.post("/v1/sessions", &json!({ "name": name }));
        assert_eq!(made.status, 201, "{}", text(&made.body));
        let id = made.json()["id"].as_str().unwrap().to_owned();
        assert_eq!(made.header("location"), Some(format!("/v1/sessions/{id}").as_str()));
        assert_eq!(made.json()["name"], name);
    }
    api.post("/v1/sessions", &json!({ "name": "job" })).refused(409, "already_exists");
    let unnamed = api.post("/v1/sessions", &json!({})).json();
    assert!(unnamed["name"].is_null());

    // Parts of a list, until the end.
    let mut path = "/v1/sessions?limit=3".to_owned();
    let mut seen = Vec::new();
    loop {
        let part = api.get(&path).json();
        let sessions = part["sessions"].as_array().unwrap();
        assert!(sessions.len() <= 3);
        seen.extend(sessions.iter().map(|session| session["id"].as_str().unwrap().to_owned()));
        let Some(next) = part["next"].as_str() else { break };
        path = format!("/v1/sessions?limit=3&after={next}");
    }
    assert_eq!(seen.len(), 4);
    assert!(seen.is_sorted(), "{seen:?}");
    let names = |path: &str| {
        let list = api.get(path).json();
        let names = list["sessions"].as_array().unwrap().iter();
        let mut names: Vec<_> = names.map(|it| it["name"].as_str().unwrap().to_owned()).collect();
        names.sort();
        names
    };
    assert_eq!(names("/v1/sessions?prefix=web-"), ["web-1", "web-2"]);
    assert_eq!(api.ask("POST", "/v1/sessions/job/stop", &[], &[]).status, 204);
    // Whatever sleeps already.
    assert_eq!(api.ask("POST", "/v1/sessions/job/pause", &[], &[]).status, 204);
    api.ask("POST", "/v1/sessions/none/pause", &[], &[]).refused(404, "unknown_session");
    assert_eq!(names("/v1/sessions?state=stopped"), ["job"]);

    // Get or create.
    assert_eq!(api.ask("PUT", "/v1/sessions/job", &[], &[]).status, 200);
    assert_eq!(api.get("/v1/sessions/job").json()["state"], "active");
    assert_eq!(api.ask("PUT", "/v1/sessions/fresh", &[], &[]).status, 201);
    assert_eq!(api.ask("DELETE", "/v1/sessions/fresh", &[], &[]).status, 204);
    api.get("/v1/sessions/fresh").refused(404, "unknown_session");
    api.ask("POST", "/v1/sessions/fresh/start", &[], &[]).refused(404, "unknown_session");
}

#[test]
fn what_is_no_request_is_refused_in_the_same_way() {
    let api = Api::new();
    let json = ["content-type: application/json"];
    api.ask("POST", "/v1/sessions", &json, b"{").refused(400, "bad_request");
    api.post("/v1/sessions", &json!({ "nmae": "a" })).refused(400, "bad_request");
    api.post("/v1/sessions", &json!({ "name": "../a" })).refused(400, "bad_name");
    api.ask("POST", "/v1/sessions", &[], b"{}").refused(415, "bad_type");
    let large = format!("{{\"name\": \"{}\"}}", "a".repeat(3 << 20));
    api.ask("POST", "/v1/sessions", &json, large.as_bytes()).refused(413, "too_large");
    api.get("/v1/sessions?limit=0").refused(400, "bad_request");
    api.get("/v1/sessions?lmiit=1").refused(400, "bad_request");
    api.get("/v1/nothing").refused(404, "not_found");
    api.ask("PATCH", "/v1/sessions", &[], &[]).refused(405, "bad_method");
    api.get("/v1/sessions/a/ports/notaport").refused(400, "bad_request");
    api.post("/v1/backups/forget", &json!({})).refused(400, "no_retention");
}

#[test]
fn a_creation_is_not_repeated() {
    let api = Api::new();
    let with = |key: &str, body: Value| {
        let key = format!("idempotency-key: {key}");
        let headers = ["content-type: application/json", &key];
        api.ask("POST", "/v1/sessions", &headers, body.to_string().as_bytes())
    };
    let first = with("one", json!({}));
    let again = with("one", json!({}));
    assert_eq!((first.status, again.status), (201, 201));
    assert_eq!(first.json()["id"], again.json()["id"]);
    assert_eq!(again.header("location"), first.header("location"));
    assert_ne!(with("two", json!({})).json()["id"], first.json()["id"]);
    with("one", json!({ "name": "other" })).refused(422, "other_request");
    // What was refused may be tried again.
    with("three", json!({ "image": "none" })).refused(404, "unknown_image");
    with("three", json!({ "image": "none" })).refused(404, "unknown_image");
    let path = format!("/v1/sessions/{}/fork", first.json()["id"].as_str().unwrap());
    let fork = || api.ask("POST", &path, &["idempotency-key: fork"], &[]).json()["id"].clone();
    assert_eq!(fork(), fork());
    assert_eq!(api.get("/v1/sessions").json()["sessions"].as_array().unwrap().len(), 3);
}

#[test]
fn events_go_on_where_they_were() {
    let api = Api::new();
    let mut events = api.follow("GET", "/v1/events", &[], &Value::Null);
    api.ask("PUT", "/v1/sessions/a", &[], &[]);
    let (_, id, created) = events.find_kind("created");
    assert_eq!(created["name"], "a");
    drop(events);
    api.ask("POST", "/v1/sessions/a/stop", &[], &[]);
    api.ask("PUT", "/v1/sessions/b", &[], &[]);
    // What came meanwhile is there.
    let last = format!("last-event-id: {id}");
    let mut rest = api.follow("GET", "/v1/events", &[&last], &Value::Null);
    assert_eq!(rest.next().unwrap().0, "started");
    assert_eq!(rest.find_kind("stopped").2["name"], "a");
    assert_eq!(rest.find_kind("created").2["name"], "b");
    let mut of_one = api.follow("GET", "/v1/events?session=b", &[&last], &Value::Null);
    assert_eq!(of_one.next().unwrap().2["name"], "b");
    // A number of another daemon's.
    let other = ["last-event-id: 00000000000000000000000000000000-7"];
    let mut lost = api.follow("GET", "/v1/events", &other, &Value::Null);
    assert_eq!(lost.next().unwrap().0, "lost");
    assert_eq!(lost.find_kind("created").2["name"], "a");
}

#[test]
fn a_command_is_streamed_and_goes_with_its_reader() {
    let api = Api::new();
    let run = |body: Value| api.follow("POST", "/v1/sessions/a/processes", &[], &body);
    let line = "echo out; echo err >&2; pwd; echo $X; exit 3";
    let (printed, end) = run(json!({ "shell": line, "env": { "X": "y" } })).printed();
    assert!(printed.contains("out\n") && printed.contains("err\n") && printed.contains("y\n"));
    assert_eq!(end.2, json!({ "code": 3 }));
    let (_, end) = run(json!({ "command": ["sh", "-c", "kill -9 $$"] })).printed();
    assert_eq!(end.2, json!({ "code": 137, "signal": 9 }));
    let never = json!({ "command": ["true"], "timeout_seconds": u64::MAX });
    assert_eq!(run(never).printed().1.2, json!({ "code": 0 }));
    let slow = json!({ "command": ["sleep", "1000"], "timeout_seconds": 1 });
    let lost = run(slow).find_kind("lost");
    assert!(lost.2["detail"].as_str().unwrap().contains("timeout"), "{}", lost.2);
    let none = api.post("/v1/sessions/a/processes", &json!({ "command": ["no-such-program"] }));
    none.refused(404, "no_program");
    api.post("/v1/sessions/a/processes", &json!({ "command": [] })).refused(400, "bad_request");

    let mark = format!("6294{}", std::process::id());
    let mut gone = run(json!({ "command": ["sleep", mark] }));
    gone.find_kind("started");
    let sleep = format!("sleep {mark}");
    assert_eq!(common::running(&sleep).len(), 1);
    drop(gone);
    common::until("it is killed", || common::running(&sleep).is_empty());
}

#[test]
fn a_terminal_is_found_again() {
    let api = Api::new();
    let terminal = json!({ "command": ["sh"], "terminal": { "columns": 80, "rows": 24 },
        "detach": true, "tag": "main", "env": { "PS1": "" } });
    let started = api.post("/v1/sessions/a/processes", &terminal);
    assert_eq!(started.status, 201, "{}", text(&started.body));
    let pid = started.json()["pid"].clone();
    let process = "/v1/sessions/a/processes/main";
    let write = |line: &str| {
        let path = format!("{process}/input");
        assert_eq!(api.ask("POST", &path, &[], line.as_bytes()).status, 204);
    };
    let until_seen = |events: &mut Followed, wanted: &str| {
        let (mut seen, mut last) = (String::new(), String::new());
        while !seen.contains(wanted) {
            let (kind, id, data) = events.next().unwrap();
            assert_eq!((kind.as_str(), &data["stream"]), ("output", &json!("terminal")));
            seen.push_str(&text(&decode(data["bytes"].as_str().unwrap())));
            last = id;
        }
        last
    };
    let mut first = api.follow("GET", &format!("{process}/output"), &[], &Value::Null);
    write("echo $((20 + 1))-first\n");
    let last = until_seen(&mut first, "21-first\r\n");
    drop(first);
    // Nobody reads; it goes on.
    write("echo $((20 + 2))-second\n");
    let last = format!("last-event-id: {last}");
    let mut again = api.follow("GET", &format!("{process}/output"), &[&last], &Value::Null);
    until_seen(&mut again, "22-second\r\n");
    let size = |size: Value| {
        let headers = ["content-type: application/json"];
        api.ask("PUT", &format!("{process}/size"), &headers, size.to_string().as_bytes())
    };
    assert_eq!(size(json!({ "columns": 132, "rows": 50 })).status, 204);
    size(json!({ "columns": 0, "rows": 50 })).refused(400, "bad_request");
    write("stty size\n");
    until_seen(&mut again, "50 132\r\n");
    // All of it, from the beginning.
    let mut whole = api.follow("GET", &format!("{process}/output?from=0"), &[], &Value::Null);
    until_seen(&mut whole, "21-first\r\n");
    let all = api.get("/v1/sessions/a/processes").json();
    assert_eq!((&all["processes"][0]["pid"], &all["processes"][0]["tag"]), (&pid, &json!("main")));
    let signal = |number: i32| api.post(&format!("{process}/signal"), &json!({ "signal": number }));
    signal(0).refused(400, "bad_request");
    assert_eq!(signal(9).status, 204);
    let (_, end) = again.printed();
    assert_eq!(end.2, json!({ "code": 137, "signal": 9 }));
    // It is told of for a while.
    let all = api.get("/v1/sessions/a/processes").json();
    assert_eq!(all["processes"][0]["ended"], json!({ "code": 137, "signal": 9 }));
    api.get("/v1/sessions/a/processes/other/output").refused(404, "unknown_process");
}

#[test]
fn the_description_has_every_path_that_is_answered() {
    let api = Api::new();
    let described = api.get("/v1/openapi.json").json();
    assert_eq!(described["openapi"], "3.1.0");
    let paths = described["paths"].as_object().unwrap();
    for (path, methods) in paths {
        for (method, operation) in methods.as_object().unwrap() {
            let responses = operation["responses"].as_object().unwrap();
            let cannot_fail = path == "/healthz";
            assert!(responses.contains_key("4XX") || cannot_fail, "{method} {path}");
            assert!(operation["operationId"].is_string(), "{method} {path}");
            // The parts of the path are told, and the daemon answers there.
            let parts: Vec<&str> = path.split('/').filter(|part| part.starts_with('{')).collect();
            let told = operation["parameters"].as_array().into_iter().flatten();
            let told = told.filter(|it| it["in"] == "path").map(|it| it["name"].as_str().unwrap());
            let told: Vec<String> = told.map(|name| format!("{{{name}}}")).collect();
            assert_eq!(told, parts, "{method} {path}");
            if path != "/v1/shutdown" {
                let path = path.replace("{session}", "nobody").replace("{port}", "1");
                // Some have no end.
                let mut answer = BufReader::new(api.send(&method.to_uppercase(), &path, &[], &[]));
                let mut line = String::new();
                answer.read_line(&mut line).unwrap();
                assert!(!line.contains(" 405 "), "{method} {path}");
                if line.contains(" 404 ") {
                    answer.read_to_string(&mut line).unwrap();
                    assert!(!line.contains("problem:not_found"), "{method} {path}: {line}");
                }
            }
        }
    }
    assert!(paths.contains_key("/v1/sessions/{session}/processes/{process}/output"));
    let problem = &described["components"]["schemas"]["Problem"];
    assert!(problem["properties"]["code"].is_object(), "{problem}");
    let codes = described["components"]["schemas"]["Code"]["enum"].as_array().unwrap();
    assert!(codes.contains(&json!("unknown_session")), "{codes:?}");
}
