//! The way to the daemon: finds it, starts it if need be, asks it.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, IsTerminal, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use denizen_client::Target;
use denizen_client::api::Difference;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use tokio::net::UnixStream;

pub use denizen_client::{Client, Lines, Processes, empty, escape, path, query};

use crate::config::Settings;
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

impl From<denizen_client::Error> for Failure {
    fn from(error: denizen_client::Error) -> Self {
        match &error {
            denizen_client::Error::Refused(problem) => Self {
                code: crate::FAILED,
                message: error.to_string(),
                refusal: Some(problem.code),
            },
            _ => Self::new(error.to_string()),
        }
    }
}

/// The sessions that are called much like those that there are not, in a sentence.
pub async fn suggestion(client: &Client, wanted: &[&str]) -> Option<String> {
    let known = client.sessions().await.ok()?;
    let names: Vec<_> = known.iter().filter_map(|session| session.name.as_deref()).collect();
    let unknown = wanted.iter().filter(|name| !names.contains(name));
    let alike = unknown.filter_map(|wanted| {
        let alike = names.iter().map(|name| (strsim::jaro_winkler(wanted, name), name));
        alike.filter(|(how, _)| *how > 0.8).max_by(|one, other| one.0.total_cmp(&other.0))
    });
    let alike: Vec<_> = alike.map(|(_, name)| format!("'{name}'")).collect();
    (!alike.is_empty()).then(|| format!("did you mean {}?", alike.join(", ")))
}

/// Where the settings say, with the key in the variable `DENIZEN_API_KEY`. That is no flag, nor in
/// a file that the program prints, so that no other user sees it.
fn of(settings: &Settings) -> Result<Client> {
    let target = match &settings.url {
        None => Target::socket(&settings.socket),
        Some(url) => {
            let key = std::env::var("DENIZEN_API_KEY").ok().filter(|key| !key.is_empty());
            Target::url(url, key.as_deref())?
        }
    };
    Ok(Client::new(target))
}

/// Finds the daemon, starting one in the background if none answers on this machine.
pub async fn connect(settings: &Settings) -> Result<Client> {
    let client = of(settings)?;
    let Some(socket) = client.target().path() else { return Ok(client) };
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
pub async fn answering(settings: &Settings) -> Result<Option<Client>> {
    let client = of(settings)?;
    let gone = match client.target().path() {
        Some(socket) => UnixStream::connect(socket).await.is_err(),
        None => false,
    };
    Ok((!gone).then_some(client))
}

/// Stops the daemon, if there is one, and waits until one on this machine has ended.
pub async fn shutdown(settings: &Settings) -> Result<()> {
    let Some(client) = answering(settings).await? else { return Ok(()) };
    let process = match client.target().path() {
        Some(socket) => process(socket).await,
        None => None,
    };
    match client.shutdown().await {
        // Gone before it could answer.
        Err(_) if client.target().connect().await.is_err() => {}
        answer => answer?,
    }
    if let Some(process) = process {
        // Readable is what has ended; an error is an end too.
        let ended = move || poll(&mut [PollFd::new(&process, PollFlags::IN)], None);
        let _ = tokio::task::spawn_blocking(ended).await;
    }
    Ok(())
}

/// The process of the daemon that has made the socket; none where somebody else made it for the
/// daemon, as a manager of services does, who does not end with it.
async fn process(socket: &Path) -> Option<OwnedFd> {
    let pid = UnixStream::connect(socket).await.ok()?.peer_cred().ok()?.pid()?;
    let process = pidfd_open(Pid::from_raw(pid)?, PidfdFlags::empty()).ok()?;
    let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
    (name.trim_end() == "denizen").then_some(process)
}

/// What differs between two states, as they are named on a command line.
pub async fn diff(client: &Client, from: &str, to: Option<&str>) -> Result<Vec<Difference>> {
    let split = |state: &str| match state.split_once(':') {
        Some((session, snapshot)) => (session.to_owned(), Some(snapshot.to_owned())),
        None => (state.to_owned(), None),
    };
    let before = split(from);
    let after = to.map_or_else(|| (before.0.clone(), None), split);
    if before == after {
        let session = before.0;
        let message =
            format!("nothing can differ: name a snapshot ({session}:NAME) or another session");
        return Err(Failure::new(message));
    }
    let before = (before.0.as_str(), before.1.as_deref());
    Ok(client.diff(before, (&after.0, after.1.as_deref())).await?)
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
        if name.as_encoded_bytes().starts_with(b"DENIZEN_") {
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
