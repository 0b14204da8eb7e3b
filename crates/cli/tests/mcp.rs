//! MCP as its clients see it: `denizen mcp` on standard input and output, and `/mcp` of the daemon.
//! The messages are written here, not by a library of the protocol's.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use common::{User, running, text, until};
use serde_json::{Value, json};

const LONG: Duration = Duration::from_secs(60);

/// What a client begins with.
fn hello(client: &str) -> Value {
    json!({
        "protocolVersion": "2025-11-25",
        "capabilities": {},
        "clientInfo": { "name": client, "version": "1" },
    })
}

/// What a tool has answered: its text, and what is for programs.
#[derive(Debug)]
struct Told {
    text: String,
    data: Value,
    is_error: bool,
}

fn told(answer: &Value) -> Told {
    let result = &answer["result"];
    assert!(result.is_object(), "{answer}");
    Told {
        text: result["content"][0]["text"].as_str().unwrap().to_owned(),
        data: result["structuredContent"].clone(),
        is_error: result["isError"].as_bool().unwrap(),
    }
}

/// A client of `denizen mcp`.
struct Program {
    child: Child,
    input: Option<ChildStdin>,
    messages: Receiver<Value>,
    /// What has come and was not asked for yet.
    early: VecDeque<Value>,
    next: u64,
}

impl Program {
    fn of(mut command: Command, client: &str) -> Self {
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        let (tell, messages) = channel();
        std::thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                // Nothing but messages.
                let _ = tell.send(serde_json::from_str(&line).expect(&line));
            }
        });
        let input = child.stdin.take();
        let mut it = Self { child, input, messages, early: VecDeque::new(), next: 0 };
        let begun = it.ask("initialize", &hello(client));
        assert_eq!(begun["result"]["serverInfo"]["name"], "denizen", "{begun}");
        it.send(&json!({ "jsonrpc": "2.0", "method": "notifications/initialized" }));
        it
    }

    fn start(user: &User, args: &[&str]) -> Self {
        Self::of(user.denizen(&[&["mcp"], args].concat()), "Test Client")
    }

    fn send(&mut self, message: &Value) {
        writeln!(self.input.as_mut().unwrap(), "{message}").unwrap();
    }

    /// Asks, and does not wait for the answer, which has this id.
    fn begin(&mut self, method: &str, params: &Value) -> u64 {
        self.next += 1;
        let id = self.next;
        self.send(&json!({ "jsonrpc": "2.0", "id": id, "method": method, "params": params }));
        id
    }

    /// The next message that is one of those wanted.
    fn find(&mut self, wanted: impl Fn(&Value) -> bool) -> Value {
        if let Some(at) = self.early.iter().position(&wanted) {
            return self.early.remove(at).unwrap();
        }
        loop {
            let message = self.messages.recv_timeout(LONG).unwrap();
            if wanted(&message) {
                return message;
            }
            self.early.push_back(message);
        }
    }

    fn answer(&mut self, id: u64) -> Value {
        self.find(|message| message["id"] == id)
    }

    fn ask(&mut self, method: &str, params: &Value) -> Value {
        let id = self.begin(method, params);
        self.answer(id)
    }

    fn begin_call(&mut self, tool: &str, arguments: &Value) -> u64 {
        let meta = json!({ "progressToken": format!("of {tool}") });
        let params = json!({ "name": tool, "arguments": arguments, "_meta": meta });
        self.begin("tools/call", &params)
    }

    fn call(&mut self, tool: &str, arguments: &Value) -> Told {
        let id = self.begin_call(tool, arguments);
        told(&self.answer(id))
    }

    /// What a tool that works gives.
    fn works(&mut self, tool: &str, arguments: &Value) -> Value {
        let told = self.call(tool, arguments);
        assert!(!told.is_error, "{tool}: {told:?}");
        told.data
    }

    fn fails(&mut self, tool: &str, arguments: &Value) -> String {
        let told = self.call(tool, arguments);
        assert!(told.is_error && told.data.is_null(), "{tool}: {told:?}");
        told.text
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        drop(self.input.take());
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_command_is_run_and_told_of() {
    let user = User::new();
    let mut mcp = Program::start(&user, &[]);
    let ran = mcp.call("run_command", &json!({ "command": "echo out; echo err >&2; exit 3" }));
    assert!(!ran.is_error);
    assert_eq!((&ran.data["output"], &ran.data["exit_code"]), (&json!("out\nerr\n"), &json!(3)));
    // It has a session of its own, by the client's name, which is there from then on.
    assert_eq!(ran.data["session"], "mcp-test-client");
    assert!(ran.text.starts_with("out\nerr\n[exit code 3"), "{}", ran.text);
    let there = mcp.works("list_sessions", &json!({}));
    assert_eq!(
        (&there["own"], &there["sessions"][0]["session"]),
        (&json!("mcp-test-client"), &json!("mcp-test-client"))
    );

    let with = json!({ "command": "echo $A; pwd", "env": { "A": "b c" }, "cwd": "/tmp" });
    assert_eq!(mcp.works("run_command", &with)["output"], "b c\n/tmp\n");
    // A file stays for the next command.
    mcp.works("run_command", &json!({ "command": "echo kept > file" }));
    assert_eq!(mcp.works("run_command", &json!({ "command": "cat file" }))["output"], "kept\n");
    let killed = mcp.call("run_command", &json!({ "command": "kill -9 $$" }));
    assert!(killed.text.contains("ended by signal 9"), "{}", killed.text);

    // What cannot be done is told to the model; what is no request, to the client.
    assert!(mcp.fails("run_command", &json!({ "command": " " })).contains("empty"));
    assert!(mcp.fails("run_command", &json!({})).contains("missing field `command`"));
    let typo = mcp.fails("run_command", &json!({ "command": "id", "timeout": 1 }));
    assert!(typo.contains("unknown field `timeout`") && typo.contains("timeout_seconds"), "{typo}");
    let elsewhere = mcp.fails("run_command", &json!({ "command": "id", "session": "none" }));
    assert!(elsewhere.contains("start_session"), "{elsewhere}");
    let no_tool = mcp.ask("tools/call", &json!({ "name": "nothing", "arguments": {} }));
    assert_eq!(no_tool["error"]["code"], -32602, "{no_tool}");
    assert_eq!(mcp.ask("nothing/at-all", &json!({}))["error"]["code"], -32601);
}

#[test]
fn long_output_is_shown_by_its_ends_and_the_rest_is_read() {
    let user = User::new();
    let mut mcp = Program::start(&user, &["--session", "s"]);
    let ran = mcp.call("run_command", &json!({ "command": "seq 100000" }));
    let all: String = (1..=100_000).map(|n| format!("{n}\n")).collect();
    let (data, shown) = (&ran.data, ran.data["output"].as_str().unwrap());
    assert!(
        shown.len() < 17 * 1024 && shown.starts_with("1\n2\n") && shown.ends_with("\n100000\n")
    );
    assert_eq!(data["output_bytes"], all.len());
    let marker = shown.lines().find(|line| line.contains("left out")).unwrap();
    let id = data["command_id"].as_str().unwrap();
    assert!(marker.contains(&format!("{} bytes", data["omitted_bytes"])) && marker.contains(id));
    let from = marker.split("offset ").nth(1).unwrap().split(' ').next().unwrap();
    let from: usize = from.parse().unwrap();
    // From there on, part by part.
    let mut read = all[..from].to_owned();
    loop {
        let ask = json!({ "command_id": id, "offset": read.len(), "max_bytes": 100_000 });
        let part = mcp.works("read_output", &ask);
        assert_eq!(part["offset"], read.len());
        read.push_str(part["output"].as_str().unwrap());
        assert_eq!(part["next_offset"], read.len());
        if part["at_end"] == true {
            assert_eq!(part["exit_code"], 0);
            break;
        }
    }
    assert_eq!(read, all);
    // More than is kept: its beginning and its end are.
    let ran = mcp.works("run_command", &json!({ "command": "yes | head -c 5000000" }));
    let ask = json!({ "command_id": ran["command_id"], "offset": 2_000_000 });
    let part = mcp.call("read_output", &ask);
    assert_eq!(part.data["offset"], 5_000_000 - (1 << 20));
    assert!(part.text.contains("not kept any more"), "{}", part.text);
    let chosen = json!({ "command": "seq 1000", "max_output_bytes": 300 });
    assert!(mcp.works("run_command", &chosen)["output"].as_str().unwrap().len() < 600);
    let gone = mcp.fails("read_output", &json!({ "command_id": "run-0123" }));
    assert!(gone.contains("for a while only"), "{gone}");
}

#[test]
fn progress_is_told_before_the_end() {
    let user = User::new();
    let mut mcp = Program::start(&user, &["--session", "s"]);
    let line = "echo first; until [ -e go ]; do sleep 0.05; done; echo last";
    let id = mcp.begin_call("run_command", &json!({ "command": line }));
    let is_progress = |message: &Value| message["method"] == "notifications/progress";
    let mut before = -1.0;
    loop {
        let params = mcp.find(is_progress)["params"].clone();
        assert_eq!(params["progressToken"], "of run_command");
        let progress = params["progress"].as_f64().unwrap();
        assert!(progress > before, "{params}");
        before = progress;
        if params["message"].as_str().unwrap().ends_with("s: first") {
            break;
        }
    }
    assert!(mcp.early.iter().all(|message| message["id"] != id));
    mcp.works("write_file", &json!({ "path": "go", "content": "" }));
    assert_eq!(told(&mcp.answer(id)).data["output"], "first\nlast\n");
    // Nobody has asked for it here.
    let quiet = json!({ "name": "run_command", "arguments": { "command": "sleep 1.5" } });
    mcp.early.clear();
    mcp.ask("tools/call", &quiet);
    assert!(!mcp.early.iter().any(is_progress));
}

/// A command that nobody ends, with a child that has a session of its own.
fn endless(mark: &str) -> Value {
    json!({ "command": format!("setsid sleep {mark} & sleep {mark}; wait"), "timeout_seconds": 9999 })
}

fn runs(mark: &str, many: usize) {
    let line = format!("sleep {mark}");
    until(&format!("{many} of {line} run"), || running(&line).len() == many);
}

#[test]
fn what_is_cancelled_ends_with_its_tree() {
    let user = User::new();
    let mut mcp = Program::start(&user, &["--session", "s"]);
    let id = mcp.begin_call("run_command", &endless("86400.011"));
    runs("86400.011", 2);
    let cancelled = json!({ "requestId": id, "reason": "enough" });
    mcp.send(
        &json!({ "jsonrpc": "2.0", "method": "notifications/cancelled", "params": cancelled }),
    );
    runs("86400.011", 0);
    // A time that is over does the same, and what was printed until then is told.
    let ask = json!({ "command": "echo so far; setsid sleep 86400.012 & sleep 86400.012", "timeout_seconds": 1 });
    let over = mcp.call("run_command", &ask);
    assert!(over.is_error, "{over:?}");
    assert!(over.text.starts_with("so far\n[") && over.text.contains("timeout"), "{over:?}");
    assert_eq!(over.data["output"], "so far\n", "what there is, a program has too");
    runs("86400.012", 0);
    assert!(
        mcp.early.iter().all(|message| message["id"] != id),
        "nothing answers what is cancelled"
    );
}

#[test]
fn what_a_client_leaves_behind_ends_with_its_tree() {
    let user = User::new();
    // By the end of its input, and by force.
    let mut mcp = Program::start(&user, &["--session", "s"]);
    mcp.begin_call("run_command", &endless("86400.021"));
    runs("86400.021", 2);
    drop(mcp.input.take());
    runs("86400.021", 0);
    assert!(mcp.child.wait().unwrap().success());
    let mut mcp = Program::start(&user, &["--session", "s"]);
    mcp.begin_call("run_command", &endless("86400.022"));
    runs("86400.022", 2);
    mcp.child.kill().unwrap();
    runs("86400.022", 0);
}

#[test]
fn a_command_in_the_background_is_spoken_to() {
    let user = User::new();
    let mut mcp = Program::start(&user, &["--session", "s"]);
    let begin = json!({ "command": "while read line; do echo got $line; done; exit 4", "background": true, "stdin": true });
    let id = mcp.works("run_command", &begin)["command_id"].clone();
    let none = mcp.works("read_output", &json!({ "command_id": id }));
    assert_eq!((&none["output"], &none["at_end"]), (&json!(""), &json!(false)));
    mcp.works("write_stdin", &json!({ "command_id": id, "text": "one\n" }));
    let read = mcp.works("read_output", &json!({ "command_id": id, "wait_seconds": 60 }));
    assert_eq!((&read["output"], &read["next_offset"]), (&json!("got one\n"), &json!(8)));
    let all = mcp.works("list_processes", &json!({}));
    assert_eq!(all["processes"][0]["command_id"], id);
    assert_eq!(all["processes"][0]["background"], true);
    mcp.works("write_stdin", &json!({ "command_id": id, "text": "two\n", "eof": true }));
    let mut rest = String::new();
    let mut from = 8;
    let exit_code = loop {
        let part = json!({ "command_id": id, "offset": from, "wait_seconds": 60 });
        let read = mcp.works("read_output", &part);
        rest.push_str(read["output"].as_str().unwrap());
        from = read["next_offset"].as_u64().unwrap();
        if read["at_end"] == true {
            break read["exit_code"].clone();
        }
    };
    assert_eq!((rest.as_str(), exit_code), ("got two\n", json!(4)));

    // Of what has ended, its log has more than is told at once.
    let begin = json!({ "command": "seq 100000", "background": true });
    let id = mcp.works("run_command", &begin)["command_id"].clone();
    until("it has ended", || {
        let all = mcp.works("list_processes", &json!({}));
        all["processes"]
            .as_array()
            .unwrap()
            .iter()
            .any(|it| it["command_id"] == id && it["exit_code"] == 0)
    });
    let read = mcp.works("read_output", &json!({ "command_id": id, "max_bytes": 10 }));
    assert_eq!((&read["output"], &read["offset"]), (&json!("1\n2\n3\n4\n5\n"), &json!(0)));
    let ask = json!({ "command_id": id, "offset": 588_888, "wait_seconds": 60 });
    assert_eq!(mcp.works("read_output", &ask)["output"], "100000\n");
    let ask = json!({ "command_id": id, "offset": 588_895, "wait_seconds": 60 });
    assert_eq!(mcp.works("read_output", &ask)["exit_code"], 0);

    let begin =
        json!({ "command": "setsid sleep 86400.031 & sleep 86400.031", "background": true });
    let id = mcp.works("run_command", &begin)["command_id"].clone();
    runs("86400.031", 2);
    mcp.works("kill_process", &json!({ "command_id": id }));
    runs("86400.031", 0);
    let gone = mcp.fails("kill_process", &json!({ "command_id": "99999" }));
    assert!(gone.contains("list_processes"), "{gone}");
    let both = mcp.fails("run_command", &json!({ "command": "cat", "stdin": true }));
    assert!(both.contains("background"), "{both}");
}

#[test]
fn files_are_read_written_and_edited() {
    let user = User::new();
    let mut mcp = Program::start(&user, &["--session", "s"]);
    // The session is made for it.
    let written =
        mcp.works("write_file", &json!({ "path": "a/b.txt", "content": "one\n  two\nthree" }));
    assert_eq!(written, json!({ "path": "/volume/a/b.txt", "size": 15 }));
    let read = mcp.works("read_file", &json!({ "path": "/volume/a/b.txt" }));
    let whole = json!({ "path": "/volume/a/b.txt", "content": "one\n  two\nthree", "first_line": 1,
        "last_line": 3, "at_end": true, "size": 15 });
    assert_eq!(read, whole);
    let read = mcp.call("read_file", &json!({ "path": "a/b.txt", "offset": 2, "limit": 1 }));
    assert_eq!((&read.data["content"], &read.data["at_end"]), (&json!("  two\n"), &json!(false)));
    assert!(read.text.ends_with("[lines 2 to 2; offset 3 reads on]"), "{}", read.text);
    assert!(
        mcp.fails("read_file", &json!({ "path": "a/b.txt", "offset": 4 })).contains("lines only")
    );
    assert!(mcp.fails("read_file", &json!({ "path": "none" })).contains("list_files"));
    assert!(mcp.fails("read_file", &json!({ "path": "a" })).contains("folder"));

    // A long file, and one with a long line.
    mcp.works(
        "run_command",
        &json!({ "command": "seq 100000 > long; head -c 200000 /dev/zero | tr '\\0' x > wide" }),
    );
    let read = mcp.works("read_file", &json!({ "path": "long" }));
    assert_eq!((&read["last_line"], &read["at_end"]), (&json!(2000), &json!(false)));
    let read = mcp.works("read_file", &json!({ "path": "long", "limit": 99_999 }));
    let content = read["content"].as_str().unwrap();
    assert!(content.len() <= 64 * 1024 && content.ends_with(&format!("\n{}\n", read["last_line"])));
    let read = mcp.works("read_file", &json!({ "path": "long", "offset": 100_000 }));
    assert_eq!((&read["content"], &read["at_end"]), (&json!("100000\n"), &json!(true)));
    let read = mcp.works("read_file", &json!({ "path": "wide" }));
    assert_eq!(
        (read["content"].as_str().unwrap().len(), &read["at_end"]),
        (64 * 1024, &json!(false))
    );

    // What is no text.
    mcp.works("write_file", &json!({ "path": "raw", "content": "AAEC/w==", "base64": true }));
    assert!(mcp.fails("read_file", &json!({ "path": "raw" })).contains("base64"));
    let read = mcp.works("read_file", &json!({ "path": "raw", "base64": true }));
    assert_eq!((&read["content"], &read["size"]), (&json!("AAEC/w=="), &json!(4)));

    // An edit changes what it says and nothing else, permissions included.
    mcp.works("run_command", &json!({ "command": "chmod 751 a/b.txt" }));
    let edit = |old: &str| json!({ "path": "a/b.txt", "old_text": old, "new_text": "2" });
    assert_eq!(mcp.works("edit_file", &edit("  two"))["lines"], json!([2]));
    let state =
        mcp.works("run_command", &json!({ "command": "cat a/b.txt; stat -c ' %a' a/b.txt" }));
    assert_eq!(state["output"], "one\n2\nthree 751\n");
    assert!(mcp.fails("edit_file", &edit("e")).contains("more than once"));
    assert!(mcp.fails("edit_file", &edit("four")).contains("is not in"));

    let listed = mcp.works("list_files", &json!({}));
    let names: Vec<_> = listed["files"].as_array().unwrap().iter().map(|it| &it["name"]).collect();
    assert_eq!(names, ["a", "long", "raw", "wide"]);
    let found = mcp.works("search_files", &json!({ "pattern": "^99998|thre+$" }));
    let found: Vec<_> =
        found["matches"].as_array().unwrap().iter().map(|it| (&it["path"], &it["line"])).collect();
    assert_eq!(found.len(), 2);
    assert!(
        found.contains(&(&json!("a/b.txt"), &json!(3)))
            && found.contains(&(&json!("long"), &json!(99_998)))
    );
    let some =
        mcp.works("search_files", &json!({ "pattern": "1", "path": "long", "max_matches": 5 }));
    assert_eq!((some["matches"].as_array().unwrap().len(), &some["more"]), (5, &json!(true)));
    assert!(mcp.fails("search_files", &json!({ "pattern": "(" })).contains("search failed"));
    assert_eq!(
        mcp.works("search_files", &json!({ "pattern": "(", "literal": true }))["matches"],
        json!([])
    );
    mcp.works("move_file", &json!({ "from": "long", "to": "moved" }));
    assert!(mcp.fails("remove_file", &json!({ "path": "a" })).contains("recursive"));
    mcp.works("remove_file", &json!({ "path": "a", "recursive": true }));

    // The same as resources.
    let listed = mcp.ask("resources/list", &json!({}));
    let listed = listed["result"]["resources"].as_array().unwrap().clone();
    let names: Vec<_> = listed.iter().map(|it| &it["name"]).collect();
    assert_eq!(names, ["moved", "raw", "wide"]);
    let read = mcp.ask("resources/read", &json!({ "uri": listed[1]["uri"] }));
    assert_eq!(read["result"]["contents"][0]["blob"], "AAEC/w==");
    mcp.works("write_file", &json!({ "path": "sp ace.md", "content": "text" }));
    let read = mcp.ask("resources/read", &json!({ "uri": "denizen://s/~/sp%20ace.md" }));
    let content = &read["result"]["contents"][0];
    assert_eq!((&content["text"], &content["mimeType"]), (&json!("text"), &json!("text/markdown")));
    let none = mcp.ask("resources/read", &json!({ "uri": "denizen://s/none" }));
    assert_eq!(none["error"]["code"], -32002, "{none}");
    mcp.works("run_command", &json!({ "command": "head -c 2000000 /dev/zero > large" }));
    let large = mcp.ask("resources/read", &json!({ "uri": "denizen://s/volume/large" }));
    assert_eq!(large["error"]["code"], -32602, "{large}");
}

#[test]
fn sessions_are_kept_and_put_back() {
    let user = User::new();
    let mut mcp = Program::start(&user, &[]);
    assert_eq!(mcp.ask("resources/list", &json!({}))["result"]["resources"], json!([]));
    assert_eq!(mcp.works("list_sessions", &json!({}))["sessions"], json!([]), "asking makes none");
    mcp.works("start_session", &json!({ "session": "a" }));
    let file = json!({ "session": "a", "path": "f", "content": "before" });
    mcp.works("write_file", &file);
    mcp.works("snapshot_session", &json!({ "session": "a", "name": "s" }));
    assert!(mcp.fails("snapshot_session", &json!({ "session": "a", "name": "s" })).contains('s'));
    mcp.works("write_file", &json!({ "session": "a", "path": "f", "content": "after" }));
    let fork = mcp.works("fork_session", &json!({ "session": "a" }))["session"].clone();
    let read = |session: &Value| json!({ "session": session, "path": "f" });
    assert_eq!(mcp.works("read_file", &read(&fork))["content"], "after");
    // What runs in it is not ended without being asked to.
    mcp.works(
        "run_command",
        &json!({ "session": "a", "command": "sleep 86400.041", "background": true }),
    );
    let busy = mcp.fails("restore_session", &json!({ "session": "a", "snapshot": "s" }));
    assert!(busy.contains("in use"), "{busy}");
    mcp.works("restore_session", &json!({ "session": "a", "snapshot": "s", "force": true }));
    runs("86400.041", 0);
    assert_eq!(mcp.works("read_file", &read(&json!("a")))["content"], "before");
    assert_eq!(
        mcp.works("list_snapshots", &json!({ "session": "a" }))["snapshots"][0]["name"],
        "s"
    );
    assert!(
        mcp.fails("restore_session", &json!({ "session": "a", "snapshot": "t" }))
            .contains("list_snapshots")
    );
    let template = mcp.ask("resources/templates/list", &json!({}));
    let template = &template["result"]["resourceTemplates"][0]["uriTemplate"];
    let complete = json!({
        "ref": { "type": "ref/resource", "uri": template },
        "argument": { "name": "session", "value": "a" },
    });
    let completed = mcp.ask("completion/complete", &complete);
    assert!(completed["result"]["completion"]["values"].as_array().unwrap().contains(&json!("a")));
    assert_eq!(mcp.works("stop_session", &json!({ "session": "a" }))["state"], "stopped");
    mcp.works("remove_session", &json!({ "session": fork, "force": true }));
    assert!(mcp.fails("remove_session", &json!({})).contains("missing field `session`"));
    assert!(mcp.fails("expose_port", &json!({ "session": "a", "port": 0 })).contains("nonzero"));
    let exposed = json!({ "session": "a", "port": 8000 });
    let port = mcp.works("expose_port", &exposed);
    assert_eq!(
        (&port["command"], &port["listening"]),
        (&json!("denizen port a 8000"), &json!(false))
    );
    // From then on, and by the same port.
    let serve = "echo hello >index.html; exec python3 -u -m http.server 8000";
    let serve = json!({ "session": "a", "command": serve, "background": true });
    let server = mcp.works("run_command", &serve)["command_id"].clone();
    let served = json!({ "session": "a", "command_id": server, "wait_seconds": 60 });
    mcp.works("read_output", &served);
    let again = mcp.works("expose_port", &exposed);
    assert_eq!((&again["url"], &again["listening"]), (&port["url"], &json!(true)));
    assert_eq!(fetched(port["url"].as_str().unwrap()), "hello\n");
    let kill = json!({ "session": "a", "command_id": server, "signal": "SIGTERM" });
    assert_eq!(mcp.works("kill_process", &kill)["signal"], 15);
}

/// What is at a URL.
fn fetched(url: &str) -> String {
    let curl = std::process::Command::new("curl").args(["-sS", "--noproxy", "*", url]).output();
    String::from_utf8(curl.unwrap().stdout).unwrap()
}

#[test]
fn a_daemon_that_has_left_is_started_again() {
    let user = User::new();
    let mut mcp = Program::start(&user, &["--session", "s"]);
    mcp.works("write_file", &json!({ "path": "f", "content": "kept" }));
    assert!(user.run(&["shutdown"]).status.success());
    assert_eq!(mcp.works("read_file", &json!({ "path": "f" }))["content"], "kept");
}

#[test]
fn what_is_done_is_logged_to_who_wants_it() {
    let user = User::new();
    let mut mcp = Program::start(&user, &[]);
    let is_log = |message: &Value| message["method"] == "notifications/message";
    mcp.works("list_sessions", &json!({}));
    assert!(!mcp.early.iter().any(is_log));
    mcp.ask("logging/setLevel", &json!({ "level": "info" }));
    mcp.works("list_sessions", &json!({}));
    assert_eq!(mcp.find(is_log)["params"]["data"]["tool"], "list_sessions");
    mcp.ask("logging/setLevel", &json!({ "level": "error" }));
    mcp.works("list_sessions", &json!({}));
    assert!(!mcp.early.iter().any(is_log));
}

// ---- HTTP -------------------------------------------------------------------------------

/// A daemon that is reached by TCP too.
struct Daemon {
    user: User,
    child: Child,
    address: SocketAddr,
}

/// What is answered: its head, and what comes after.
struct Answer {
    status: u16,
    head: String,
    body: Box<dyn Iterator<Item = String>>,
}

impl Answer {
    fn header(&self, name: &str) -> Option<String> {
        self.head.lines().find_map(|line| {
            let (header, value) = line.split_once(": ")?;
            header.eq_ignore_ascii_case(name).then(|| value.to_owned())
        })
    }

    /// The next message that it has.
    fn message(&mut self) -> Option<Value> {
        self.body.find_map(|line| {
            let data =
                line.strip_prefix("data: ").or(Some(&line)).filter(|it| it.starts_with('{'))?;
            serde_json::from_str(data).ok()
        })
    }

    /// The answer to a request, and nothing else that is told before.
    fn answered(&mut self) -> Value {
        loop {
            let message = self.message().unwrap_or_else(|| panic!("no answer: {}", self.head));
            if message.get("id").is_some() {
                return message;
            }
        }
    }
}

impl Daemon {
    fn start(settings: &[&str]) -> Self {
        let user = User::new();
        let args = [&["--listen", "127.0.0.1:0"], settings, &["serve"]].concat();
        let mut child = user.denizen(&args).stderr(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines().map_while(Result::ok);
        let address =
            lines.find_map(|line| Some(line.strip_prefix("denizen listens on 127.")?.to_owned()));
        let address = format!("127.{}", address.unwrap()).parse().unwrap();
        std::thread::spawn(move || lines.for_each(drop));
        Self { user, child, address }
    }

    fn key(&self, args: &[&str]) -> (String, String) {
        let args = [&["key", "create", "test", "--scope", "operate"], args].concat();
        let made = self.user.json(&args);
        (made["id"].as_str().unwrap().to_owned(), made["key"].as_str().unwrap().to_owned())
    }

    fn request(&self, method: &str, headers: &[(&str, &str)], body: &str) -> Answer {
        let mut stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(LONG)).unwrap();
        let mut head = format!("{method} /mcp HTTP/1.1\r\nconnection: close\r\n");
        if !headers.iter().any(|(name, _)| *name == "host") {
            head.push_str(&format!("host: {}\r\n", self.address));
        }
        for (name, value) in headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        let length = body.len();
        head.push_str(&format!("content-type: application/json\r\ncontent-length: {length}\r\n"));
        head.push_str("accept: application/json, text/event-stream\r\n\r\n");
        stream.write_all((head + body).as_bytes()).unwrap();
        let mut answer = BufReader::new(stream);
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") && answer.read_line(&mut head).unwrap() > 0 {}
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        // The sizes of its chunks are lines that mean nothing here.
        Answer { status, head, body: Box::new(answer.lines().map_while(Result::ok)) }
    }

    fn client<'a>(&'a self, key: &str, name: &str) -> Client<'a> {
        let authorization = format!("Bearer {key}");
        let headers = [("authorization", authorization.as_str())];
        let message =
            json!({ "jsonrpc": "2.0", "id": 0, "method": "initialize", "params": hello(name) });
        let mut begun = self.request("POST", &headers, &message.to_string());
        assert_eq!(begun.status, 200, "{}", begun.head);
        assert_eq!(begun.answered()["result"]["serverInfo"]["name"], "denizen");
        let session = begun.header("mcp-session-id").unwrap();
        let client = Client { daemon: self, authorization, session, named: None, next: 0.into() };
        let done = client.post(&json!({ "jsonrpc": "2.0", "method": "notifications/initialized" }));
        assert_eq!(done.status, 202);
        client
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // The user's own end waits for it.
        self.user.run(&["shutdown"]);
        let _ = self.child.wait();
    }
}

/// A client of `/mcp`.
struct Client<'a> {
    daemon: &'a Daemon,
    authorization: String,
    session: String,
    named: Option<String>,
    next: std::cell::Cell<u64>,
}

impl Client<'_> {
    fn headers(&self) -> Vec<(&str, &str)> {
        let mut headers = vec![
            ("authorization", self.authorization.as_str()),
            ("mcp-session-id", self.session.as_str()),
            ("mcp-protocol-version", "2025-11-25"),
        ];
        headers.extend(self.named.as_deref().map(|session| ("denizen-session", session)));
        headers
    }

    fn post(&self, message: &Value) -> Answer {
        self.daemon.request("POST", &self.headers(), &message.to_string())
    }

    fn begin(&self, method: &str, params: &Value) -> (u64, Answer) {
        let id = self.next.get() + 1;
        self.next.set(id);
        let message = json!({ "jsonrpc": "2.0", "id": id, "method": method, "params": params });
        (id, self.post(&message))
    }

    fn call(&self, tool: &str, arguments: &Value) -> Told {
        let (_, mut answer) =
            self.begin("tools/call", &json!({ "name": tool, "arguments": arguments }));
        assert_eq!(answer.status, 200, "{}", answer.head);
        told(&answer.answered())
    }

    fn works(&self, tool: &str, arguments: &Value) -> Value {
        let told = self.call(tool, arguments);
        assert!(!told.is_error, "{tool}: {told:?}");
        told.data
    }

    fn fails(&self, tool: &str, arguments: &Value) -> String {
        let told = self.call(tool, arguments);
        assert!(told.is_error, "{tool}: {told:?}");
        told.text
    }
}

#[test]
fn over_http_each_key_has_its_own() {
    let daemon = Daemon::start(&["--domain", "box.example.org"]);
    let (one, key) = daemon.key(&[]);
    let (two, other_key) = daemon.key(&[]);
    let first = daemon.client(&key, "Agent");
    let second = daemon.client(&other_key, "Agent");
    let ran = first.works("run_command", &json!({ "command": "echo $((6*7)) > f; seq 100000" }));
    assert_eq!(ran["session"], format!("mcp-agent-{one}"));
    let read = second.call("read_file", &json!({ "path": "f" }));
    assert!(read.is_error && read.text.contains("No such file"), "{read:?}");
    assert_eq!(second.works("list_sessions", &json!({}))["own"], format!("mcp-agent-{two}"));
    // What one has been shown a part of is not the other's to read, though it may use the session.
    let of = json!({ "command_id": ran["command_id"], "session": ran["session"] });
    assert!(!first.works("read_output", &of)["output"].as_str().unwrap().is_empty());
    assert!(second.fails("read_output", &of).contains("nothing is kept"));

    // A session for all calls, by a header.
    let mut named = daemon.client(&key, "Agent");
    named.named = Some("by-header".to_owned());
    assert_eq!(named.works("run_command", &json!({ "command": "true" }))["session"], "by-header");
    let exposed = named.works("expose_port", &json!({ "port": 8000 }));
    let port = daemon.address.port();
    assert_eq!(exposed["url"], format!("http://8000-by-header.box.example.org:{port}/"));

    // A session of the protocol is of whoever began it.
    let ask = |client: &Client<'_>, session: &str| {
        let message = json!({ "jsonrpc": "2.0", "id": 9, "method": "tools/list" });
        let headers =
            [("authorization", client.authorization.as_str()), ("mcp-session-id", session)];
        ["POST", "GET", "DELETE"].map(|method| {
            let body = if method == "POST" { message.to_string() } else { String::new() };
            daemon.request(method, &headers, &body).status
        })
    };
    assert_eq!(ask(&second, &first.session), [404, 404, 404]);
    assert_eq!(ask(&second, "none"), [404, 404, 404]);
    assert_eq!(daemon.request("POST", &[("mcp-session-id", &first.session)], "{}").status, 401);
    assert_eq!(ask(&first, &first.session), [200, 200, 204]);
    assert_eq!(ask(&first, &first.session), [404, 404, 404], "it has ended");
}

#[test]
fn a_limited_key_touches_nothing_else() {
    let daemon = Daemon::start(&[]);
    daemon.user.exec("private", "echo secret > f");
    let (id, key) = daemon.key(&["--sessions", "mine-"]);
    let client = daemon.client(&key, "Agent");
    let own = format!("mine-mcp-agent-{id}");
    assert_eq!(client.works("run_command", &json!({ "command": "true" }))["session"], own);
    let private = daemon.user.json(&["inspect", "private"])["id"].clone();
    for session in [json!("private"), private] {
        let s = |mut arguments: Value| {
            arguments["session"] = session.clone();
            arguments
        };
        for (tool, arguments) in [
            ("run_command", s(json!({ "command": "cat f" }))),
            ("run_command", s(json!({ "command": "cat f", "background": true }))),
            ("read_output", s(json!({ "command_id": "1" }))),
            ("list_processes", s(json!({}))),
            ("kill_process", s(json!({ "command_id": "1" }))),
            ("write_stdin", s(json!({ "command_id": "1", "text": "x" }))),
            ("read_file", s(json!({ "path": "f" }))),
            ("read_file", s(json!({ "path": "../mine-x/f" }))),
            ("write_file", s(json!({ "path": "f", "content": "" }))),
            ("edit_file", s(json!({ "path": "f", "old_text": "s", "new_text": "" }))),
            ("list_files", s(json!({}))),
            ("search_files", s(json!({ "pattern": "s" }))),
            ("make_folder", s(json!({ "path": "g" }))),
            ("move_file", s(json!({ "from": "f", "to": "g" }))),
            ("remove_file", s(json!({ "path": "f" }))),
            ("start_session", s(json!({}))),
            ("stop_session", s(json!({ "force": true }))),
            ("fork_session", s(json!({}))),
            ("snapshot_session", s(json!({ "name": "n" }))),
            ("list_snapshots", s(json!({}))),
            ("restore_session", s(json!({ "force": true }))),
            ("remove_session", s(json!({ "force": true }))),
            ("expose_port", s(json!({ "port": 80 }))),
        ] {
            let refused = client.fails(tool, &arguments);
            assert!(refused.contains("mine-") && !refused.contains("secret"), "{tool}: {refused}");
        }
    }
    let uri = json!({ "uri": "denizen://private/volume/f" });
    assert_eq!(client.begin("resources/read", &uri).1.answered()["error"]["code"], -32002);
    let listed = client.works("list_sessions", &json!({}));
    assert_eq!(listed["sessions"].as_array().unwrap().len(), 1, "{listed}");
    assert_eq!(text(&daemon.user.exec("private", "cat f").stdout), "secret\n");
    // Nor does a header help, nor a token of another session.
    let mut named = daemon.client(&key, "Agent");
    named.named = Some("private".to_owned());
    assert!(named.fails("read_file", &json!({ "path": "f" })).contains("mine-"));
    let reads = daemon.user.json(&["key", "create", "reads", "--scope", "read"]);
    let authorization = format!("Bearer {}", reads["key"].as_str().unwrap());
    assert_eq!(daemon.request("POST", &[("authorization", &authorization)], "{}").status, 403);
}

#[test]
fn over_http_too_a_command_ends_when_it_is_cancelled_and_with_its_key() {
    let daemon = Daemon::start(&[]);
    let (id, key) = daemon.key(&[]);
    let client = daemon.client(&key, "Agent");
    let ask = |mark: &str| json!({ "name": "run_command", "arguments": endless(mark), "_meta": { "progressToken": 7 } });
    let (request, mut answer) = client.begin("tools/call", &ask("86400.051"));
    runs("86400.051", 2);
    assert_eq!(
        answer.message().unwrap()["params"]["progressToken"],
        7,
        "progress comes before the end"
    );
    let params = json!({ "requestId": request });
    let cancel = json!({ "jsonrpc": "2.0", "method": "notifications/cancelled", "params": params });
    assert_eq!(client.post(&cancel).status, 202);
    runs("86400.051", 0);
    // The end of the protocol's session is the end of what runs for it.
    let (_, _answer) = client.begin("tools/call", &ask("86400.052"));
    runs("86400.052", 2);
    assert_eq!(daemon.request("DELETE", &client.headers(), "").status, 204);
    runs("86400.052", 0);
    // A client that loses its connection comes back for the answer; one that has no key does not.
    let client = daemon.client(&key, "Agent");
    let (_, answer) = client.begin("tools/call", &ask("86400.053"));
    runs("86400.053", 2);
    drop(answer);
    assert_eq!(
        client.works("run_command", &json!({ "command": "echo still here" }))["exit_code"],
        0
    );
    assert_eq!(running("sleep 86400.053").len(), 2);
    assert!(daemon.user.run(&["key", "revoke", &id]).status.success());
    runs("86400.053", 0);
    let told = client.post(&json!({ "jsonrpc": "2.0", "id": 1, "method": "ping" }));
    assert_eq!(told.status, 401);
}

#[test]
fn a_client_without_a_session_of_the_protocol_is_served_too() {
    let daemon = Daemon::start(&[]);
    let (id, key) = daemon.key(&[]);
    let authorization = format!("Bearer {key}");
    let ask = |tool: &str, arguments: &Value| {
        let headers = [
            ("authorization", authorization.as_str()),
            ("mcp-protocol-version", "2026-07-28"),
            ("mcp-method", "tools/call"),
            ("mcp-name", tool),
        ];
        let meta = json!({
            "io.modelcontextprotocol/protocolVersion": "2026-07-28",
            "io.modelcontextprotocol/clientInfo": { "name": "New Client", "version": "1" },
            "io.modelcontextprotocol/clientCapabilities": {},
            "progressToken": "p",
        });
        let params = json!({ "name": tool, "arguments": arguments, "_meta": meta });
        let message =
            json!({ "jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": params });
        daemon.request("POST", &headers, &message.to_string())
    };
    let ran = told(&ask("run_command", &json!({ "command": "seq 100000" })).answered()).data;
    assert_eq!(ran["session"], format!("mcp-new-client-{id}"));
    // What was left out is kept from one request to the next.
    let rest = json!({ "command_id": ran["command_id"], "offset": 8192 });
    assert!(!told(&ask("read_output", &rest).answered()).is_error);
    // There is nothing to come back to: who leaves has nobody to cancel it.
    let answer = ask("run_command", &endless("86400.061"));
    runs("86400.061", 2);
    drop(answer);
    runs("86400.061", 0);
}

#[test]
fn the_daemon_is_asked_by_its_names_and_by_its_pages_only() {
    let daemon = Daemon::start(&["--hosts", "box.example.org"]);
    let (_, key) = daemon.key(&[]);
    let authorization = format!("Bearer {key}");
    let message =
        json!({ "jsonrpc": "2.0", "id": 0, "method": "initialize", "params": hello("x") });
    let ask = |host: &str, origin: Option<&str>| {
        let mut headers = vec![("authorization", authorization.as_str()), ("host", host)];
        headers.extend(origin.map(|origin| ("origin", origin)));
        daemon.request("POST", &headers, &message.to_string()).status
    };
    assert_eq!(ask("box.example.org", None), 200);
    assert_eq!(ask("localhost:1234", Some("http://localhost:1234")), 200);
    assert_eq!(ask("evil.example.org", None), 421);
    assert_eq!(ask("localhost", Some("http://evil.example.org")), 403);
}

#[test]
fn a_caller_cannot_have_sessions_of_the_protocol_without_end() {
    let daemon = Daemon::start(&["--isolation", "host"]);
    let (_, key) = daemon.key(&[]);
    let first = daemon.client(&key, "x");
    let begun: Vec<_> = (0..64).map(|_| daemon.client(&key, "x")).collect();
    let ping = |client: &Client<'_>| client.begin("ping", &json!({})).1.status;
    assert_eq!(ping(&first), 404, "the oldest has made room");
    assert_eq!(ping(&begun[0]), 200);
    assert_eq!(ping(&begun[63]), 200);
}

#[test]
fn by_the_socket_it_is_the_user_and_needs_no_key() {
    let user = User::new();
    user.json(&["ls"]);
    let socket = user.state.path().join("denizen.sock");
    let mut stream = std::os::unix::net::UnixStream::connect(socket).unwrap();
    let body = json!({ "jsonrpc": "2.0", "id": 0, "method": "initialize", "params": hello("x") });
    let body = body.to_string();
    let head = format!(
        "POST /mcp HTTP/1.1\r\nhost: denizen\r\nconnection: close\r\naccept: application/json, \
         text/event-stream\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all((head + &body).as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("serverInfo"), "{answer}");
}

/// The table of tools in the documentation, line by line.
#[test]
fn the_documentation_has_all_tools() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/mcp.md");
    let documented = std::fs::read_to_string(path).unwrap();
    let rows: Vec<&str> = documented.lines().filter(|line| line.starts_with("| `")).collect();
    let tools = denizen_mcp::tools();
    let wanted = tools.iter().map(|tool| {
        let hints = tool.annotations.as_ref().unwrap();
        let hint = match (hints.read_only_hint, hints.destructive_hint) {
            (Some(true), _) => "reads",
            (_, Some(true)) => "may destroy",
            _ => "adds",
        };
        let mut arguments: Vec<String> = Vec::new();
        let required = tool.input_schema.get("required").and_then(Value::as_array);
        let required = required.cloned().unwrap_or_default();
        let properties = tool.input_schema.get("properties").and_then(Value::as_object);
        for name in properties.into_iter().flat_map(|all| all.keys()) {
            let optional = if required.contains(&json!(name)) { "" } else { "?" };
            arguments.push(format!("`{name}{optional}`"));
        }
        let title = tool.title.as_deref().unwrap();
        format!("| `{}` | {title} | {hint} | {} |", tool.name, arguments.join(" "))
    });
    let wanted: Vec<String> = wanted.collect();
    assert_eq!(rows, wanted, "the table is to be:\n{}", wanted.join("\n"));
}
