//! HTTP as programs speak it, byte by byte.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use serde_json::{Value, json};

use super::{User, text};

/// What the daemon answers.
pub struct Answer {
    pub status: u16,
    pub head: String,
    /// As it came: see [`Answer::body`].
    pub body: Vec<u8>,
}

impl Answer {
    /// The body, whole if it came in chunks (RFC 9112, 7.1).
    pub fn body(&self) -> Vec<u8> {
        if self.header("transfer-encoding") != Some("chunked") {
            return self.body.clone();
        }
        let (mut rest, mut whole) = (self.body.as_slice(), Vec::new());
        loop {
            let end = rest.windows(2).position(|two| two == b"\r\n").unwrap();
            let length = usize::from_str_radix(&text(&rest[..end]), 16).unwrap();
            if length == 0 {
                return whole;
            }
            whole.extend_from_slice(&rest[end + 2..end + 2 + length]);
            rest = &rest[end + 4 + length..];
        }
    }

    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|_| panic!("{}", text(&self.body)))
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().find_map(|line| {
            let (found, value) = line.split_once(": ")?;
            found.eq_ignore_ascii_case(name).then_some(value)
        })
    }

    /// Refused as RFC 9457 has it.
    pub fn refused(&self, status: u16, code: &str) -> String {
        let problem = self.json();
        assert_eq!(self.status, status, "{problem}");
        assert_eq!(self.header("content-type"), Some("application/problem+json"));
        assert_eq!((&problem["status"], &problem["code"]), (&json!(status), &json!(code)));
        assert_eq!(problem["type"], json!(format!("urn:denizen:problem:{code}")));
        problem["detail"].as_str().unwrap().to_owned()
    }
}

/// A daemon that runs for one user.
pub struct Api(pub User);

impl Api {
    pub fn new() -> Self {
        Self::with(&[])
    }

    /// With settings of the daemon's.
    pub fn with(settings: &[&str]) -> Self {
        let user = User::new();
        user.json(&[settings, &["ls"]].concat());
        Self(user)
    }

    pub fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(self.0.state.path().join("denizen.sock")).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream
    }

    pub fn send(&self, method: &str, path: &str, headers: &[&str], body: &[u8]) -> UnixStream {
        let mut stream = self.connect();
        let headers: String = headers.iter().map(|line| format!("{line}\r\n")).collect();
        let length = body.len();
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\
             content-length: {length}\r\n{headers}\r\n"
        )
        .unwrap();
        // It may be refused before all of it was sent.
        let _ = stream.write_all(body);
        stream
    }

    pub fn ask(&self, method: &str, path: &str, headers: &[&str], body: &[u8]) -> Answer {
        let mut whole = Vec::new();
        self.send(method, path, headers, body).read_to_end(&mut whole).unwrap();
        let end = whole.windows(4).position(|four| four == b"\r\n\r\n").unwrap();
        let head = text(&whole[..end]);
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        Answer { status, head, body: whole[end + 4..].to_vec() }
    }

    pub fn get(&self, path: &str) -> Answer {
        self.ask("GET", path, &[], &[])
    }

    pub fn post(&self, path: &str, body: &Value) -> Answer {
        self.ask("POST", path, &["content-type: application/json"], body.to_string().as_bytes())
    }

    /// Follows server-sent events.
    pub fn follow(&self, method: &str, path: &str, headers: &[&str], body: &Value) -> Followed {
        let mut all = vec!["accept: text/event-stream", "content-type: application/json"];
        all.extend(headers);
        let body = if body.is_null() { String::new() } else { body.to_string() };
        let mut lines = BufReader::new(self.send(method, path, &all, body.as_bytes())).lines();
        let status = lines.next().unwrap().unwrap();
        assert!(status.contains(" 200 "), "{status}");
        Followed(Box::new(lines.map(Result::unwrap)))
    }
}

/// Server-sent events, one by one.
pub struct Followed(Box<dyn Iterator<Item = String>>);

/// Kind, id and data.
pub type Sent = (String, String, Value);

impl Iterator for Followed {
    type Item = Sent;

    fn next(&mut self) -> Option<Sent> {
        let mut event = Sent::default();
        loop {
            let line = self.0.next()?;
            if let Some(kind) = line.strip_prefix("event: ") {
                event.0 = kind.to_owned();
            } else if let Some(id) = line.strip_prefix("id: ") {
                event.1 = id.to_owned();
            } else if let Some(data) = line.strip_prefix("data: ") {
                event.2 = serde_json::from_str(data).unwrap();
            } else if line.is_empty() && !event.0.is_empty() {
                return Some(event);
            }
        }
    }
}

impl Followed {
    /// The next of a kind.
    pub fn find_kind(&mut self, kind: &str) -> Sent {
        self.find(|event| event.0 == kind).unwrap_or_else(|| panic!("no {kind}"))
    }

    /// All that is printed until the end, and the end.
    pub fn printed(self) -> (String, Sent) {
        let mut printed = Vec::new();
        for event in self {
            if event.0 == "output" {
                printed.extend(decode(event.2["bytes"].as_str().unwrap()));
            } else if event.0 == "exit" {
                return (text(&printed), event);
            }
        }
        panic!("it has no end: {}", text(&printed));
    }
}

/// RFC 4648, 4.
pub fn decode(base64: &str) -> Vec<u8> {
    const DIGITS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let digits = base64.bytes().filter(|byte| *byte != b'=');
    let (mut bits, mut count, mut bytes) = (0u32, 0, Vec::new());
    for digit in digits {
        let value = DIGITS.iter().position(|known| *known == digit).unwrap();
        bits = bits << 6 | u32::try_from(value).unwrap();
        count += 6;
        if count >= 8 {
            count -= 8;
            bytes.push((bits >> count).to_le_bytes()[0]);
        }
    }
    bytes
}
