//! What ties a request to what was done for it: its id in answers and logs, and its trace, from who
//! asks through the daemon into the command. Spans are sent to a collector that is a real server,
//! and reads them as one does.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::process::Child;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{User, until};
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::trace::v1::Span;
use parking_lot::Mutex;
use prost::Message;

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const CALLER: &str = "00f067aa0ba902b7";
/// What must be in no log and no span.
const SECRET: &str = "not-for-others-7391";

/// A collector of spans, as OTLP over HTTP has it.
struct Collector {
    endpoint: String,
    got: Arc<Mutex<Vec<ExportTraceServiceRequest>>>,
}

impl Collector {
    fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let got = Arc::new(Mutex::new(Vec::new()));
        let all = got.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let all = all.clone();
                std::thread::spawn(move || take(&stream.unwrap(), &all));
            }
        });
        Self { endpoint, got }
    }

    fn spans(&self) -> Vec<Span> {
        let got = self.got.lock();
        let resources = got.iter().flat_map(|request| &request.resource_spans);
        let scopes = resources.flat_map(|resource| &resource.scope_spans);
        scopes.flat_map(|scope| scope.spans.clone()).collect()
    }

    /// Waits for a span of that name in the trace.
    fn span(&self, name: &str) -> Span {
        let begin = Instant::now();
        loop {
            let mut all = self.spans();
            all.retain(|it| hex(&it.trace_id) == TRACE);
            if let Some(found) = all.iter().find(|it| it.name == name) {
                return found.clone();
            }
            let names: Vec<_> = all.iter().map(|it| &it.name).collect();
            assert!(begin.elapsed() < Duration::from_secs(20), "no {name} among {names:?}");
            std::thread::yield_now();
        }
    }
}

/// Takes the spans of a connection.
fn take(stream: &TcpStream, all: &Mutex<Vec<ExportTraceServiceRequest>>) {
    let mut lines = BufReader::new(stream);
    loop {
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            if lines.read_line(&mut head).unwrap_or(0) == 0 {
                return;
            }
        }
        assert!(head.starts_with("POST /v1/traces "), "{head}");
        let head = head.to_ascii_lowercase();
        assert!(head.contains("content-type: application/x-protobuf"), "{head}");
        let length = head.split_once("content-length: ").unwrap().1.lines().next().unwrap();
        let mut body = vec![0; length.parse().unwrap()];
        lines.read_exact(&mut body).unwrap();
        all.lock().push(ExportTraceServiceRequest::decode(body.as_slice()).unwrap());
        let mut stream = stream;
        stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").unwrap();
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn attribute(span: &Span, name: &str) -> Option<Value> {
    let found = span.attributes.iter().find(|it| it.key == name)?;
    found.value.as_ref()?.value.clone()
}

/// A daemon in the foreground, its log in a file.
struct Daemon {
    user: User,
    child: Child,
}

impl Daemon {
    fn new(settings: &[&str], env: &[(&str, &str)]) -> Self {
        let user = User::new();
        let log = File::create(user.state.path().join("log")).unwrap();
        let mut serve = user.denizen(&["--isolation", "host", "serve"]);
        serve.args(settings).env_remove("TRACEPARENT").stderr(log);
        serve.envs(env.iter().copied());
        let child = serve.spawn().unwrap();
        let socket = user.state.path().join("denizen.sock");
        until("it serves", || UnixStream::connect(&socket).is_ok());
        Self { user, child }
    }

    /// The head of an answer; all of the answer is read.
    fn ask(&self, path: &str, headers: &str, body: &[u8]) -> String {
        let socket = self.user.state.path().join("denizen.sock");
        let mut stream = UnixStream::connect(socket).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let length = body.len();
        write!(
            stream,
            "POST {path} HTTP/1.1\r\nhost: it\r\nconnection: close\r\ncontent-length: {length}\r\n\
             authorization: Bearer {SECRET}\r\n{headers}\r\n"
        )
        .unwrap();
        stream.write_all(body).unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        let answer = common::text(&answer).to_ascii_lowercase();
        assert!(answer.starts_with("http/1.1 200 "), "{answer}");
        answer.split_once("\r\n\r\n").unwrap().0.to_owned()
    }

    /// Runs a line of shell in the session `a`, by the API.
    fn run(&self, headers: &str, line: &str, env: &serde_json::Value) -> String {
        let body = serde_json::json!({ "command": ["sh", "-c", line], "env": env });
        let headers = format!("content-type: application/json\r\n{headers}");
        self.ask("/v1/sessions/a/processes", &headers, body.to_string().as_bytes())
    }

    /// What a command of the session `a` has left in a file.
    fn told(&self, file: &str) -> String {
        common::text(&self.user.exec("a", &format!("cat {file}")).stdout).trim().to_owned()
    }

    /// Its log, once it has ended.
    fn end(mut self) -> (User, String) {
        assert!(self.user.run(&["shutdown"]).status.success());
        assert!(self.child.wait().unwrap().success());
        let log = std::fs::read_to_string(self.user.state.path().join("log")).unwrap();
        (self.user, log)
    }
}

fn caller() -> String {
    format!(
        "traceparent: 00-{TRACE}-{CALLER}-01\r\ntracestate: vendor=1\r\nx-request-id: mine-1\r\n"
    )
}

#[test]
fn a_trace_goes_from_who_asks_into_the_command() {
    let collector = Collector::new();
    let env = [
        ("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint.as_str()),
        ("OTEL_BSP_SCHEDULE_DELAY", "50"),
        ("DENIZEN_LOG", "debug"),
    ];
    let daemon = Daemon::new(&["--log-format", "json"], &env);
    let line = format!("echo $TRACEPARENT $TRACESTATE > told; : {SECRET}; exit 3");
    let head = daemon.run(&caller(), &line, &serde_json::json!({ "TOKEN": SECRET }));
    assert!(head.contains("x-request-id: mine-1"), "{head}");

    // From the command up to who asked.
    let command = collector.span("command");
    let told = daemon.told("told");
    assert_eq!(told, format!("00-{TRACE}-{}-01 vendor=1", hex(&command.span_id)));
    assert_eq!(attribute(&command, "exit_code"), Some(Value::IntValue(3)));
    let request = collector.span("POST /v1/sessions/{session}/processes");
    assert_eq!(command.parent_span_id, request.span_id);
    assert_eq!(hex(&request.parent_span_id), CALLER);
    assert_eq!(attribute(&request, "session"), Some(Value::StringValue("a".to_owned())));
    assert_eq!(attribute(&request, "http.response.status_code"), Some(Value::IntValue(200)));
    // And what was done on the way.
    let acquire = collector.span("acquire");
    assert_eq!(acquire.parent_span_id, request.span_id);
    assert_eq!(collector.span("create").parent_span_id, acquire.span_id);

    // By envd's protocol it is the same.
    let body = serde_json::json!({
        "process": { "cmd": "sh", "args": ["-c", "echo $TRACEPARENT > told-envd"] },
    });
    let body = body.to_string();
    let mut framed = vec![0];
    framed.extend(u32::try_from(body.len()).unwrap().to_be_bytes());
    framed.extend(body.as_bytes());
    let headers = format!(
        "content-type: application/connect+json\r\nconnect-protocol-version: 1\r\n\
         denizen-session: a\r\n{}",
        caller()
    );
    daemon.ask("/process.Process/Start", &headers, &framed);
    let envd = collector.span("POST /process.Process/Start");
    assert_eq!(hex(&envd.parent_span_id), CALLER);
    let told = daemon.told("told-envd");
    assert!(told.starts_with(&format!("00-{TRACE}-")) && told.ends_with("-01"), "{told}");
    assert!(!told.contains(CALLER), "{told}");

    // What its caller says itself is left alone.
    daemon.run(&caller(), "echo $TRACEPARENT > own", &serde_json::json!({ "TRACEPARENT": "own" }));
    assert_eq!(daemon.told("own"), "own");

    // What takes long has its own, too.
    daemon.ask("/v1/sessions/a/backup", &caller(), b"");
    let of = collector.span("POST /v1/sessions/{session}/backup");
    assert_eq!(collector.span("backup").parent_span_id, of.span_id);

    let resource = collector.got.lock()[0].resource_spans[0].resource.clone().unwrap();
    let service = resource.attributes.iter().find(|it| it.key == "service.name").unwrap();
    let named = Some(Value::StringValue("denizen".to_owned()));
    assert_eq!(service.value.as_ref().unwrap().value, named);

    // The log says the same, in lines that a machine reads.
    let (user, log) = daemon.end();
    let lines: Vec<serde_json::Value> = log
        .lines()
        .filter(|line| !line.starts_with("denizen listens"))
        .map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{line}: {error}")))
        .collect();
    let answered = lines
        .iter()
        .find(|line| line["message"] == "answered" && line["spans"][0]["request_id"] == "mine-1");
    let answered = answered.unwrap_or_else(|| panic!("{log}"));
    assert_eq!(answered["spans"][0]["session"], "a");
    assert_eq!(answered["spans"][0]["trace_id"], TRACE);
    assert_eq!(answered["status"], 200);
    assert!(answered["level"].is_string() && answered["timestamp"].is_string(), "{answered}");
    let audit = std::fs::read_to_string(user.state.path().join("audit.log")).unwrap();
    assert!(audit.lines().any(|line| line.contains("\"request\":\"mine-1\"")), "{audit}");
    let spans = format!("{:?}", collector.got.lock());
    for (what, text) in [("log", &log), ("audit log", &audit), ("spans", &spans)] {
        assert!(!text.contains(SECRET), "in the {what}");
    }
}

#[test]
fn without_a_collector_what_was_sent_is_handed_on() {
    let collector = Collector::new();
    // Switched off, it is as if there was none.
    let env = [
        ("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint.as_str()),
        ("OTEL_SDK_DISABLED", "true"),
        ("OTEL_BSP_SCHEDULE_DELAY", "1"),
    ];
    let daemon = Daemon::new(&[], &env);
    let head =
        daemon.run(&caller(), "echo $TRACEPARENT $TRACESTATE > told", &serde_json::json!({}));
    assert!(head.contains("x-request-id: mine-1"), "{head}");
    assert_eq!(daemon.told("told"), format!("00-{TRACE}-{CALLER}-01 vendor=1"));
    // Without a trace there is none, and a request without an id gets one.
    let head = daemon.run("", "echo \"<$TRACEPARENT>\" > none", &serde_json::json!({}));
    assert_eq!(daemon.told("none"), "<>");
    let id = head.split_once("x-request-id: ").unwrap().1.lines().next().unwrap();
    assert!(uuid::Uuid::try_parse(id).is_ok(), "{id}");
    let (_, log) = daemon.end();
    assert!(log.lines().any(|line| line.contains(" INFO denizen")), "{log}");
    assert!(collector.got.lock().is_empty());
}
