//! A daemon that is reached by TCP too, and what its clients write to it themselves.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::Value;

use super::{User, text};

/// A daemon that is reached by TCP too.
pub struct Daemon {
    pub user: User,
    pub child: Child,
    pub address: SocketAddr,
    pub log: std::sync::Arc<std::sync::Mutex<String>>,
}

pub struct Answer {
    pub status: u16,
    pub head: String,
    pub body: String,
}

impl Answer {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|_| panic!("{}{}", self.head, self.body))
    }

    pub fn code(&self) -> (u16, String) {
        (self.status, self.json()["code"].as_str().unwrap_or_default().to_owned())
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().find_map(|line| {
            let (header, value) = line.split_once(": ")?;
            header.eq_ignore_ascii_case(name).then_some(value)
        })
    }
}

impl Daemon {
    /// Of an isolation that needs nothing.
    pub fn start(settings: &[&str]) -> Self {
        Self::of(User::new(), settings)
    }

    pub fn of(user: User, settings: &[&str]) -> Self {
        Self::with(user, &[&["--isolation", "host"], settings].concat())
    }

    pub fn with(user: User, settings: &[&str]) -> Self {
        let listen = ["--listen", "127.0.0.1:0"];
        let args = [&listen, settings, &["serve"]];
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

    pub fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        stream
    }

    /// Sends bytes, and reads what comes until the end.
    pub fn raw(&self, bytes: &[u8]) -> String {
        let mut stream = self.connect();
        // It may be refused before all of it was sent.
        let _ = stream.write_all(bytes);
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        text(&answer)
    }

    pub fn ask_with(&self, line: &str, headers: &[(&str, &str)], body: &str) -> Answer {
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

    pub fn ask(&self, key: &str, line: &str) -> Answer {
        self.ask_with(line, &[("authorization", &format!("Bearer {key}"))], "")
    }

    /// The program of somebody who has nothing but a key.
    pub fn with_key(&self, key: &str, args: &[&str]) -> Command {
        let mut command = self.user.denizen(args);
        command.env("DENIZEN_STATE", "/nowhere").env("DENIZEN_API_KEY", key);
        command.env("DENIZEN_URL", format!("http://{}", self.address));
        command
    }

    pub fn audit(&self) -> Vec<Value> {
        let text = std::fs::read_to_string(self.user.state.path().join("audit.log")).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// Memory of the daemon's own, in KiB.
    pub fn memory(&self) -> u64 {
        let status = format!("/proc/{}/status", self.child.id());
        let status = std::fs::read_to_string(status).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
        line.trim().trim_end_matches(" kB").parse().unwrap()
    }

    pub fn key(&self, args: &[&str]) -> (String, String) {
        let made = self.user.json(&[&["key", "create", "test"], args].concat());
        (made["id"].as_str().unwrap().to_owned(), made["key"].as_str().unwrap().to_owned())
    }
}

impl Daemon {
    /// Kills it, and gives what it leaves to the next.
    pub fn killed(mut self) -> User {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        std::mem::replace(&mut self.user, User::new())
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

pub fn answer(text: &str) -> Answer {
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or((text, ""));
    let status = head.split(' ').nth(1).and_then(|it| it.parse().ok()).unwrap_or(0);
    let mut body = body.to_owned();
    if head.to_lowercase().contains("transfer-encoding: chunked") {
        body = body.lines().skip(1).step_by(2).collect();
    }
    Answer { status, head: head.to_owned(), body }
}
