//! The way to the daemon: finds it, starts it if need be, asks it.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, IsTerminal, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use connectrpc::client::SharedHttp2Connection;
use denizen_envd::filesystem::FilesystemClient;
use denizen_envd::process::ProcessClient;
use futures::TryStreamExt;
use http_body_util::{BodyExt, Full, combinators::BoxBody};
use hyper::Response;
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use rustix::fs::{MemfdFlags, memfd_create};
use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};

use crate::config::Settings;
use crate::target::Target;
use crate::{Failure, Result};

/// How long the daemon may take to start without a word of it.
const PATIENCE: Duration = Duration::from_millis(500);
/// Seconds after which a daemon that was started in the background leaves, if nothing runs.
const IDLE_EXIT: &str = "600";

/// How long a daemon that somebody else has started may take until it answers.
const OTHER_DAEMON: Duration = Duration::from_secs(15);

/// What a daemon in the background says of its start: that it can be reached, or that another
/// one has the volume root or the socket.
pub const READY: &str = "ready";
pub const TAKEN: &str = "taken";

/// The envd side of the daemon.
pub type Processes = ProcessClient<SharedHttp2Connection>;

/// A way to a daemon that answers.
#[derive(Clone)]
pub struct Client {
    target: Target,
}

impl Client {
    /// Finds the daemon, starting one in the background if none answers on this machine.
    pub async fn connect(settings: &Settings) -> Result<Self> {
        let client = Self { target: Target::of(settings)? };
        let Some(socket) = client.target.socket() else { return Ok(client) };
        if UnixStream::connect(socket).await.is_ok() {
            return Ok(client);
        }
        start_daemon(settings).await?;
        match UnixStream::connect(socket).await {
            Ok(_) => Ok(client),
            Err(error) => Err(Failure::new(format!(
                "no daemon answers on {}: {error}; see {}",
                socket.display(),
                crate::log_file(settings).display()
            ))),
        }
    }

    /// The daemon, if there is one on this machine, or another machine's.
    pub async fn answering(settings: &Settings) -> Result<Option<Self>> {
        let client = Self { target: Target::of(settings)? };
        let gone = match client.target.socket() {
            Some(socket) => UnixStream::connect(socket).await.is_err(),
            None => false,
        };
        Ok((!gone).then_some(client))
    }

    /// Stops the daemon, if there is one.
    pub async fn shutdown(settings: &Settings) -> Result<()> {
        let Some(client) = Self::answering(settings).await? else { return Ok(()) };
        match client.json("POST", "/v1/shutdown").await {
            // Gone before it could answer.
            Err(_) if client.target.connect().await.is_err() => Ok(()),
            answer => answer.map(drop),
        }
    }

    /// A client of sessions' processes.
    pub fn processes(&self) -> Processes {
        let (connection, config) = self.target.envd();
        ProcessClient::new(connection, config)
    }

    /// A client of sessions' files.
    pub fn files(&self) -> FilesystemClient<SharedHttp2Connection> {
        let (connection, config) = self.target.envd();
        FilesystemClient::new(connection, config)
    }

    /// Asks for anything, with one more header: the content's type, or for what is envd's
    /// the session.
    pub async fn request(
        &self,
        method: &str,
        path: &str,
        header: Option<(&str, &str)>,
        body: BoxBody<Bytes, std::io::Error>,
    ) -> Result<Response<Incoming>> {
        let failed = |error: &dyn std::fmt::Display| {
            Failure::new(format!("the daemon on {} is gone: {error}", self.target))
        };
        let stream = self.target.connect().await.map_err(|error| failed(&error))?;
        let handshake = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await;
        let (mut sender, connection) = handshake.map_err(|error| failed(&error))?;
        tokio::spawn(connection);
        let mut request = self.target.request(method, path);
        if let Some((name, value)) = header {
            request = request.header(name, value);
        }
        let request = request.body(body).map_err(|error| failed(&error))?;
        let response = sender.send_request(request).await.map_err(|error| failed(&error))?;
        if response.status().is_success() {
            return Ok(response);
        }
        Err(refusal(response).await)
    }

    /// Asks for JSON; nothing is null.
    pub async fn json(&self, method: &str, path: &str) -> Result<serde_json::Value> {
        Self::body(self.request(method, path, None, empty()).await?).await
    }

    /// The JSON of an answer; nothing is null.
    pub async fn body(response: Response<Incoming>) -> Result<serde_json::Value> {
        let body = response.into_body().collect().await;
        let body = body.map_err(|error| Failure::new(error.to_string()))?.to_bytes();
        if body.is_empty() {
            return Ok(serde_json::Value::Null);
        }
        serde_json::from_slice(&body).map_err(|error| Failure::new(error.to_string()))
    }

    /// All sessions, by their names; those without come last.
    pub async fn sessions(&self) -> Result<serde_json::Value> {
        let mut all = Vec::new();
        let mut path = "/v1/sessions".to_owned();
        loop {
            let mut part = self.json("GET", &path).await?;
            if let Some(sessions) = part["sessions"].as_array_mut() {
                all.append(sessions);
            }
            match part["next"].as_str() {
                Some(next) => path = format!("/v1/sessions?after={next}"),
                None => break,
            }
        }
        all.sort_by_key(|session| {
            let name = session["name"].as_str().map(str::to_owned);
            (name.is_none(), name)
        });
        Ok(all.into())
    }

    /// Asks for a stream of lines.
    pub async fn lines(&self, path: &str) -> Result<Lines> {
        Ok(Lines::new(self.request("GET", path, None, empty()).await?))
    }

    /// Joins a connection to a port of a session, until either ends it.
    pub async fn join_port(&self, session: &str, port: u16, mut ours: TcpStream) -> Result<()> {
        let failed = |error: &dyn std::fmt::Display| Failure::new(error.to_string());
        let stream = self.target.connect().await.map_err(|error| failed(&error))?;
        let handshake = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await;
        let (mut sender, connection) = handshake.map_err(|error| failed(&error))?;
        tokio::spawn(connection.with_upgrades());
        let request = self
            .target
            .request("GET", &path(session, &format!("/ports/{port}")))
            .header("connection", "upgrade")
            .header("upgrade", "tcp")
            .body(empty())
            .map_err(|error| failed(&error))?;
        let response = sender.send_request(request).await.map_err(|error| failed(&error))?;
        if response.status() != hyper::StatusCode::SWITCHING_PROTOCOLS {
            return Err(refusal(response).await);
        }
        let theirs = hyper::upgrade::on(response).await.map_err(|error| failed(&error))?;
        let mut theirs = TokioIo::new(theirs);
        let joined = tokio::io::copy_bidirectional(&mut ours, &mut theirs).await;
        joined.map(drop).map_err(|error| failed(&error))
    }

    /// Copies what the daemon answers to `into`.
    pub async fn download(&self, path: &str, into: &mut (impl AsyncWrite + Unpin)) -> Result<()> {
        let response = self.request("GET", path, None, empty()).await?;
        let body = response.into_body().into_data_stream().map_err(std::io::Error::other);
        let mut body = tokio_util::io::StreamReader::new(body);
        let copied = tokio::io::copy(&mut body, into).await;
        copied.map_err(|error| Failure::new(error.to_string()))?;
        into.flush().await.map_err(|error| Failure::new(error.to_string()))
    }
}

/// What the daemon says of what it does not do.
async fn refusal(response: Response<Incoming>) -> Failure {
    let status = response.status();
    let body = match response.into_body().collect().await {
        Ok(body) => body.to_bytes(),
        Err(error) => return Failure::new(error.to_string()),
    };
    let message = serde_json::from_slice::<serde_json::Value>(&body)
        .ok()
        .and_then(|body| {
            // A problem of the API's, or envd's way.
            let told = body.get("detail").or_else(|| body.get("message"))?;
            Some(told.as_str()?.to_owned())
        })
        .unwrap_or_else(|| format!("{status}: {}", String::from_utf8_lossy(&body)));
    Failure::new(message)
}

/// No content.
pub fn empty() -> BoxBody<Bytes, std::io::Error> {
    Full::new(Bytes::new()).map_err(|never| match never {}).boxed()
}

/// A stream of lines.
pub struct Lines {
    body: Incoming,
    buffer: Vec<u8>,
}

impl Lines {
    /// Those of an answer.
    pub fn new(response: Response<Incoming>) -> Self {
        Self { body: response.into_body(), buffer: Vec::new() }
    }

    /// The next line, without its end.
    pub async fn next(&mut self) -> Result<Option<String>> {
        loop {
            if let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=end).collect();
                return Ok(Some(String::from_utf8_lossy(&line[..end]).into_owned()));
            }
            match self.body.frame().await {
                None => return Ok(None),
                Some(Err(error)) => return Err(Failure::new(error.to_string())),
                Some(Ok(frame)) => {
                    if let Some(bytes) = frame.data_ref() {
                        self.buffer.extend_from_slice(bytes);
                    }
                }
            }
        }
    }
}

/// A part of a URI: all but unreserved characters (RFC 3986) are escaped.
pub fn escape(text: &str) -> String {
    text.bytes()
        .map(|byte| match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
                char::from(byte).to_string()
            }
            byte => format!("%{byte:02X}"),
        })
        .collect()
}

/// The query of a URI, if there is something to ask for.
pub fn query(name: &str, value: Option<String>) -> String {
    value.map_or_else(String::new, |value| format!("?{name}={}", escape(&value)))
}

/// Where the API has the differences between two states, as they are named on a command line.
pub fn diff(from: &str, to: Option<&str>) -> Result<String> {
    let split = |state: &str| match state.split_once(':') {
        Some((session, snapshot)) => (session.to_owned(), Some(snapshot.to_owned())),
        None => (state.to_owned(), None),
    };
    let (session, snapshot) = split(from);
    let other = to.map_or_else(|| (session.clone(), None), split);
    if other == (session.clone(), snapshot.clone()) {
        let message =
            format!("nothing can differ: name a snapshot ({session}:NAME) or another session");
        return Err(Failure::new(message));
    }
    let mut query = format!("/diff?other={}", escape(&other.0));
    for (name, snapshot) in [("snapshot", snapshot), ("other_snapshot", other.1)] {
        if let Some(snapshot) = snapshot {
            query.push_str(&format!("&{name}={}", escape(&snapshot)));
        }
    }
    Ok(path(&session, &query))
}

/// Where the API has a session, and what belongs to it.
pub fn path(session: &str, rest: &str) -> String {
    format!("/v1/sessions/{}{rest}", escape(session))
}

/// Starts a daemon that outlives this program, and waits until it can be reached, or until one
/// can that somebody else has started meanwhile.
async fn start_daemon(settings: &Settings) -> Result<()> {
    let begin = Instant::now();
    loop {
        match try_daemon(settings)? {
            Started::Ready => return Ok(()),
            // Another one is being started, or is dying.
            Started::Taken(failure) => {
                if UnixStream::connect(&settings.socket).await.is_ok() {
                    return Ok(());
                }
                if begin.elapsed() > OTHER_DAEMON {
                    return Err(failure);
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
    }
}

/// A file in memory.
fn config_file(content: &[u8]) -> std::io::Result<File> {
    let mut file = File::from(memfd_create("denizen-config", MemfdFlags::CLOEXEC)?);
    file.write_all(content)?;
    Ok(file)
}

/// Says on a terminal what takes so long, if it does; gone when dropped.
struct Notice(Option<(mpsc::Sender<()>, std::thread::JoinHandle<()>)>);

impl Notice {
    fn begin() -> Self {
        if !std::io::stderr().is_terminal() {
            return Self(None);
        }
        let (done, waiting) = mpsc::channel();
        let notice = std::thread::spawn(move || {
            if waiting.recv_timeout(PATIENCE) != Err(mpsc::RecvTimeoutError::Timeout) {
                return;
            }
            // Nothing can be done if the terminal is gone.
            let mut stderr = std::io::stderr();
            let _ = write!(stderr, "denizen: preparing; the first start takes a while …");
            let _ = stderr.flush();
            let _ = waiting.recv();
            // To the start of the line, and nothing in it.
            let _ = write!(stderr, "\r\x1b[K");
            let _ = stderr.flush();
        });
        Self(Some((done, notice)))
    }
}

impl Drop for Notice {
    fn drop(&mut self) {
        if let Some((done, notice)) = self.0.take() {
            drop(done);
            // It has nothing to fail at.
            let _ = notice.join();
        }
    }
}

enum Started {
    Ready,
    /// The volume root belongs to another daemon.
    Taken(Failure),
}

fn try_daemon(settings: &Settings) -> Result<Started> {
    let failed = |what: &str, error: &dyn std::fmt::Display| {
        Failure::new(format!("cannot start the daemon: {what}: {error}"))
    };
    std::fs::create_dir_all(&settings.state)
        .map_err(|error| failed(&settings.state.display().to_string(), &error))?;
    let log_path = crate::log_file(settings);
    let log = OpenOptions::new().create(true).append(true).mode(0o600).open(&log_path);
    let log = log.map_err(|error| failed(&log_path.display().to_string(), &error))?;
    let program = std::env::current_exe().map_err(|error| failed("this program", &error))?;
    let mut daemon = Command::new(program);
    daemon.args(["serve", "--background", "--idle-exit", IDLE_EXIT]);
    // It is told all that is in force here, and nothing else: our flags and variables are in it.
    daemon.args(["--config", "/proc/self/fd/0"]);
    for (name, _) in std::env::vars_os() {
        if name.as_encoded_bytes().starts_with(b"DENIZEN_") && name != "DENIZEN_LOG" {
            daemon.env_remove(name);
        }
    }
    // A group of its own, so that a Ctrl-C here does not reach it.
    daemon.process_group(0).current_dir("/");
    let config = settings.to_toml()?;
    // Whole before the daemon begins: if we are killed, it must not go by a part of it.
    let stdin = config_file(config.as_bytes()).map_err(|error| failed("its settings", &error))?;
    daemon.stdin(stdin).stdout(Stdio::piped()).stderr(log);
    let mut child = daemon.spawn().map_err(|error| failed("this program", &error))?;
    let mut answer = String::new();
    let notice = Notice::begin();
    if let Some(stdout) = child.stdout.take() {
        // Ends with the daemon, if it cannot start.
        let _ = BufReader::new(stdout).read_line(&mut answer);
    }
    drop(notice);
    if answer.trim() == READY {
        return Ok(Started::Ready);
    }
    let _ = child.wait();
    let text = std::fs::read_to_string(&log_path).unwrap_or_default();
    let last = text.lines().rev().find(|line| line.starts_with("denizen: ")).unwrap_or("");
    let failure = Failure::new(format!(
        "the daemon did not start: {}; its log is {}",
        last.trim_start_matches("denizen: "),
        log_path.display()
    ));
    if answer.trim() == TAKEN { Ok(Started::Taken(failure)) } else { Err(failure) }
}
