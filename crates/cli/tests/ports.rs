//! What listens in a session, as HTTP and as WebSockets, by path and by name: a real server in a
//! sandbox, behind the real daemon.
#![allow(clippy::unwrap_used)]

mod common;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::{Child, Stdio};
use std::time::Duration;

use common::{User, text, until};
use serde_json::{Value, json};

/// Tells what it was asked, in upper case as it comes, and echoes WebSockets (RFC 6455).
const SERVER: &str = r#"
import base64, hashlib, json, socket, threading
def serve(c):
    f = c.makefile('rwb')
    method, path, _ = f.readline().decode('latin-1').split()
    headers = []
    while line := f.readline().decode('latin-1').rstrip('\r\n'):
        name, value = line.split(': ', 1)
        headers.append([name.lower(), value])
    d = dict(headers)
    def say(head):
        f.write((head + '\r\n\r\n').encode()); f.flush()
    if d.get('upgrade') == 'websocket':
        key = d['sec-websocket-key'] + '258EAFA5-E914-47DA-95CA-C5AB0DC85B11'
        accept = base64.b64encode(hashlib.sha1(key.encode()).digest()).decode()
        say('HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n'
            'Connection: Upgrade\r\nSec-WebSocket-Accept: ' + accept)
        while len(two := f.read(2)) == 2:
            length, mask = two[1] & 127, f.read(4)
            data = bytes(b ^ mask[i % 4] for i, b in enumerate(f.read(length)))
            f.write(bytes([two[0], length]) + data); f.flush()
            if two[0] & 15 == 8: break
    elif path == '/upper':
        say('HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked')
        while length := int(f.readline(), 16):
            piece = f.read(length + 2)[:-2].upper()
            f.write(b'%x\r\n%s\r\n' % (len(piece), piece)); f.flush()
        f.readline()
        f.write(b'0\r\n\r\n'); f.flush()
    elif path == '/endless':
        say('HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked')
        while True:
            f.write(b'10000\r\n' + b'x' * 65536 + b'\r\n')
    elif path == '/garbage':
        f.write(b'this is no HTTP\r\n\r\n'); f.flush()
    else:
        body = f.read(int(d.get('content-length', 0))).decode()
        told = json.dumps({'method': method, 'path': path, 'headers': headers, 'body': body})
        say('HTTP/1.1 203 Fine\r\nSet-Cookie: a=b\r\nClear-Site-Data: "*"\r\nX-Own: 1\r\n'
            'Service-Worker-Allowed: /\r\nContent-Security-Policy: default-src \'self\'\r\n'
            'Connection: close, X-Hop\r\nX-Hop: 1\r\nContent-Length: %d' % len(told))
        if method != 'HEAD': f.write(told.encode())
        f.flush()
    c.close()
def safe(c):
    try: serve(c)
    except OSError: c.close()
s = socket.create_server(('127.0.0.1', 8000))
print('ready', flush=True)
while True: threading.Thread(target=safe, args=s.accept()[:1], daemon=True).start()
"#;

/// A daemon that is reached by TCP, a key, and a session `a` with the server in it.
struct Daemon {
    user: User,
    child: Child,
    address: SocketAddr,
    key: String,
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

    fn all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a str> + 'a {
        self.head.lines().filter_map(move |line| {
            let (header, value) = line.split_once(": ")?;
            header.eq_ignore_ascii_case(name).then_some(value)
        })
    }

    /// What the server was sent.
    fn told(&self, name: &str) -> Option<String> {
        let headers = self.json()["headers"].as_array().unwrap().clone();
        let found = headers.iter().find(|it| it[0] == name)?;
        Some(found[1].as_str().unwrap().to_owned())
    }
}

impl Daemon {
    fn start() -> Self {
        let user = User::new();
        let listen = ["--listen", "127.0.0.1:0", "--domain", "box.example.org", "serve"];
        let mut child = user.denizen(&listen).stderr(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let address = loop {
            let line = lines.next().unwrap().unwrap();
            if let Some(address) = line.strip_prefix("denizen listens on 127.") {
                break format!("127.{address}").parse().unwrap();
            }
        };
        std::thread::spawn(move || lines.for_each(drop));
        let key = user.json(&["key", "create", "test"])["key"].as_str().unwrap().to_owned();
        let started = user.run(&["exec", "--detach", "a", "--", "python3", "-c", SERVER]);
        assert!(started.status.success(), "{started:?}");
        let daemon = Self { user, child, address, key };
        until("it listens", || {
            daemon.ask("GET", "/v1/sessions/a/ports/8000/", &[], "").status != 502
        });
        daemon
    }

    fn open(&self, method: &str, path: &str, headers: &[&str]) -> TcpStream {
        let mut stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let mut head = format!("{method} {path} HTTP/1.1\r\n");
        if !headers.iter().any(|line| line.starts_with("host: ")) {
            head.push_str(&format!("host: {}\r\n", self.address));
        }
        head.push_str(&format!("authorization: Bearer {}\r\n", self.key));
        for line in headers {
            head.push_str(line);
            head.push_str("\r\n");
        }
        stream.write_all(format!("{head}\r\n").as_bytes()).unwrap();
        stream
    }

    fn ask(&self, method: &str, path: &str, headers: &[&str], body: &str) -> Answer {
        let length = format!("content-length: {}", body.len());
        let more = ["connection: close", length.as_str()];
        let mut stream = self.open(method, path, &[headers, &more].concat());
        let _ = stream.write_all(body.as_bytes());
        let mut whole = Vec::new();
        stream.read_to_end(&mut whole).unwrap();
        let whole = text(&whole);
        let (head, body) = whole.split_once("\r\n\r\n").unwrap();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        Answer { status, head: head.to_owned(), body: body.to_owned() }
    }

    fn is_in_use(&self) -> bool {
        self.user.json(&["inspect", "a"])["in_use"].as_bool().unwrap()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.user.run(&["shutdown"]);
        let _ = self.child.wait();
    }
}

#[test]
fn a_server_within_is_asked_by_path_and_by_name() {
    let daemon = Daemon::start();
    let path = "/v1/sessions/a/ports/8000/one%2Ftwo/?a=%20&b";
    let sent = [
        "cookie: theirs=1",
        "x-api-key: k",
        "x-access-token: t",
        "x-forwarded-for: 192.0.2.1",
        "forwarded: for=192.0.2.1",
        "x-kept: yes",
        "connection: x-dropped",
        "x-dropped: 1",
    ];
    for method in ["GET", "POST", "DELETE", "PROPFIND"] {
        let answer = daemon.ask(method, path, &sent, "hello");
        assert_eq!(answer.status, 203, "{}{}", answer.head, answer.body);
        let asked = answer.json();
        assert_eq!(
            (&asked["method"], &asked["path"], &asked["body"]),
            (&json!(method), &json!("/one%2Ftwo/?a=%20&b"), &json!("hello"))
        );
        for name in ["authorization", "cookie", "x-api-key", "x-access-token", "x-dropped"] {
            assert_eq!(answer.told(name), None, "{name}");
        }
        let host = daemon.address.to_string();
        assert_eq!(answer.told("x-kept").as_deref(), Some("yes"));
        assert_eq!(answer.told("host"), Some(host.clone()));
        assert_eq!(answer.told("x-forwarded-host"), Some(host.clone()));
        assert_eq!(answer.told("x-forwarded-for").as_deref(), Some("127.0.0.1"));
        assert_eq!(answer.told("x-forwarded-proto").as_deref(), Some("http"));
        let prefix = answer.told("x-forwarded-prefix");
        assert_eq!(prefix.as_deref(), Some("/v1/sessions/a/ports/8000"));
        let forwarded = format!("for=127.0.0.1;host=\"{host}\";proto=http");
        assert_eq!(answer.told("forwarded"), Some(forwarded));
        // It shares our origin by this path: its pages are given none.
        assert_eq!(answer.all("x-own").collect::<Vec<_>>(), ["1"]);
        for name in ["set-cookie", "clear-site-data", "service-worker-allowed", "x-hop"] {
            assert_eq!(answer.all(name).next(), None, "{name}");
        }
        assert_eq!(
            answer.all("content-security-policy").collect::<Vec<_>>(),
            ["default-src 'self'", "sandbox allow-scripts allow-forms"]
        );
    }
    let named = ["host: 8000-a.box.example.org"];
    let answer = daemon.ask("GET", "/x", &named, "");
    assert_eq!((answer.status, &answer.json()["path"]), (203, &json!("/x")));
    assert_eq!(answer.told("host").as_deref(), Some("8000-a.box.example.org"));
    assert_eq!(answer.told("x-forwarded-prefix"), None);
    assert_eq!(answer.told("authorization"), None);
    let policy: Vec<_> = answer.all("content-security-policy").collect();
    assert_eq!(policy, ["default-src 'self'"]);
    assert_eq!(daemon.ask("GET", "/", &named, "").json()["path"], "/");
    assert_eq!(daemon.ask("HEAD", "/", &named, "").status, 203);

    let code = |answer: &Answer| (answer.status, answer.json()["code"].clone());
    let ask = |path: &str| daemon.ask("GET", path, &[], "");
    assert_eq!(code(&ask("/v1/sessions/a/ports/8001/")), (502, json!("port")));
    assert_eq!(code(&ask("/v1/sessions/a/ports/8000/garbage")), (502, json!("port")));
    assert_eq!(code(&ask("/v1/sessions/a/ports/8000")), (426, json!("upgrade")));
    assert_eq!(code(&ask("/v1/sessions/a/ports/none/")), (400, json!("bad_request")));
    assert_eq!(code(&ask("/v1/sessions/none/ports/8000/")), (404, json!("unknown_session")));
    let nobody = format!("/v1/sessions/{}/ports/8000/", uuid::Uuid::new_v4());
    assert_eq!(code(&ask(&nobody)), (404, json!("unknown_session")));
    until("nobody uses it", || !daemon.is_in_use());
}

/// A frame with a mask (RFC 6455, 5.2).
fn frame(kind: u8, data: &[u8]) -> Vec<u8> {
    let mask = [1, 2, 3, 4];
    let length = u8::try_from(data.len()).unwrap();
    let masked = data.iter().zip(mask.iter().cycle()).map(|(byte, mask)| byte ^ mask);
    [0x80 | kind, 0x80 | length].into_iter().chain(mask).chain(masked).collect()
}

#[test]
fn websockets_pass_both_ways_and_are_a_use() {
    let daemon = Daemon::start();
    let upgrade = [
        "connection: keep-alive, Upgrade",
        "upgrade: websocket",
        "sec-websocket-version: 13",
        "sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==",
    ];
    let open = |path, host: &[&str]| {
        let mut socket = daemon.open("GET", path, &[&upgrade[..], host].concat());
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            socket.read_exact(&mut byte).unwrap();
            head.push(byte[0]);
        }
        let head = text(&head).to_lowercase();
        assert!(head.starts_with("http/1.1 101 "), "{head}");
        (socket, head)
    };
    for (path, host) in [
        ("/v1/sessions/a/ports/8000/ws", vec![]),
        ("/ws", vec!["host: 8000-a.box.example.org", "origin: http://8000-a.box.example.org"]),
    ] {
        let (mut socket, head) = open(path, &host);
        // The accept of the standard's own example (1.3).
        assert!(head.contains("sec-websocket-accept: s3pplmbitxaq9kygzzhzrbk+xoo=\r\n"), "{head}");
        assert!(head.contains("upgrade: websocket\r\n"), "{head}");
        for data in [&b"hello"[..], b"", b"again"] {
            socket.write_all(&frame(1, data)).unwrap();
            let mut echo = vec![0; 2 + data.len()];
            socket.read_exact(&mut echo).unwrap();
            let length = u8::try_from(data.len()).unwrap();
            assert_eq!(echo, [&[0x81, length], data].concat());
        }
        assert!(daemon.is_in_use());
        socket.write_all(&frame(8, &[])).unwrap();
        let mut end = Vec::new();
        socket.read_to_end(&mut end).unwrap();
        assert_eq!(end, [0x88, 0]);
        drop(socket);
        until("nobody uses it", || !daemon.is_in_use());
    }
    // One that is only held does not keep its session from being stopped.
    let (mut socket, _) = open("/v1/sessions/a/ports/8000/ws", &[]);
    assert!(daemon.user.run(&["stop", "--force", "a"]).status.success());
    assert_eq!(daemon.user.json(&["inspect", "a"])["state"], "stopped");
    let _ = socket.read_to_end(&mut Vec::new());
}

#[test]
fn bodies_stream_both_ways() {
    let daemon = Daemon::start();
    let path = "/v1/sessions/a/ports/8000/upper";
    let mut stream = daemon.open("POST", path, &["transfer-encoding: chunked"]);
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    // Each is answered before the next is sent.
    for word in ["one", "two"] {
        write!(stream, "3\r\n{word}\r\n").unwrap();
        loop {
            let mut line = String::new();
            assert!(reader.read_line(&mut line).unwrap() > 0);
            if line.trim_end() == word.to_uppercase() {
                break;
            }
        }
    }
    assert!(daemon.is_in_use());
    stream.write_all(b"0\r\n\r\n").unwrap();
    let mut line = String::new();
    while line != "0\r\n" {
        line.clear();
        assert!(reader.read_line(&mut line).unwrap() > 0);
    }
}

#[test]
fn who_reads_slowly_costs_little_memory_and_what_is_gone_is_let_go() {
    let daemon = Daemon::start();
    let memory = || {
        let status =
            std::fs::read_to_string(format!("/proc/{}/status", daemon.child.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap()
    };
    let before = memory();
    let path = "/v1/sessions/a/ports/8000/endless";
    let mut readers: Vec<_> = (0..8).map(|_| daemon.open("GET", path, &[])).collect();
    for reader in &mut readers {
        // Enough that all buffers on the way are full.
        reader.read_exact(&mut vec![0; 16 << 20]).unwrap();
    }
    let grown = memory().saturating_sub(before);
    assert!(grown < 32 * 1024, "{grown} KiB more");
    assert!(daemon.is_in_use());
    drop(readers);
    until("nobody uses it", || !daemon.is_in_use());
}
