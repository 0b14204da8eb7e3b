//! `process.Process`: requests become [`crate::Agent`] calls, output becomes events. A stream
//! that is read slowly slows its command down, it never fills memory; one that is not read at all
//! holds up only a command in the foreground, and that only for as long as it may run.

use std::any::Any;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime};

use connectrpc::{
    ConnectError, InboundStream, RequestContext, Response, ServiceRequest, ServiceResult,
    ServiceStream,
};
use denizen_envd::process as wire;
use denizen_envd::process::__buffa::oneof;
use futures::{Stream, StreamExt, stream};
use parking_lot::Mutex;
use tokio::io::AsyncWriteExt;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, DropGuard};
use tracing::Instrument;

use super::tail::{Piece, Tail};
use super::{Explain, Hold, Instance, Instances, keepalive, named, stopped, until};
use crate::{Child, Chunk, Error, Exit, Scope, Spec, Stdin, Stdio};

/// Chunks (of at most 64 KiB) that wait for a slow reader.
const BACKLOG: usize = 4;
/// Bytes of a detached command's log before it is rotated; one older file is kept.
const LOG_BYTES: u64 = 8 * 1024 * 1024;

/// How much of what detached commands have printed is kept for a session. The logs that were
/// written last stay; those of commands that run always do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct KeptLogs {
    /// Of so many commands.
    pub commands: usize,
    /// So many bytes.
    pub bytes: u64,
}

impl Default for KeptLogs {
    fn default() -> Self {
        Self { commands: 100, bytes: 64 * 1024 * 1024 }
    }
}

/// How many commands that have ended in the background are told of, and for how long.
const ENDED: usize = 8;
const ENDED_FOR: Duration = Duration::from_mins(10);

/// How long a command in the background waits for a reader that has no room.
const STANDSTILL: Duration = Duration::from_secs(10);

/// The commands of one instance.
#[derive(Debug)]
pub struct Jobs {
    running: Mutex<HashMap<u32, Arc<Job>>>,
    /// Of those in the background, oldest first.
    ended: Mutex<VecDeque<(Instant, Arc<Job>)>>,
    logs: PathBuf,
    kept: KeptLogs,
    /// Names of the logs that are being written, each as often as it is.
    logging: Mutex<Vec<String>>,
    /// What every command's environment has beside the instance's.
    pub(super) variables: Mutex<BTreeMap<String, String>>,
}

/// A command.
#[derive(Debug)]
pub struct Job {
    config: wire::ProcessConfig,
    tag: Option<String>,
    child: Child,
    /// Ends with the request that started it.
    foreground: bool,
    /// Its output is logged.
    detached: bool,
    terminal: bool,
    started_at: SystemTime,
    stdin: tokio::sync::Mutex<Option<Stdin>>,
    readers: Mutex<Vec<mpsc::Sender<Chunk>>>,
    /// How it ended, and why if there is more to say; or why that is not known.
    end: OnceLock<Result<(Exit, Option<String>), String>>,
    /// Cancelled when it is to be killed: nobody is waited for any more who reads it.
    over: CancellationToken,
    timed_out: AtomicBool,
    /// It was ended with all else in the instance.
    shut_down: AtomicBool,
    /// What it has printed last, if it may go on without anybody who reads it.
    tail: Option<Arc<Tail>>,
}

/// What is known of a command.
#[derive(Clone, Debug)]
pub struct JobInfo {
    /// Its number.
    pub pid: u32,
    /// The name it was given.
    pub tag: Option<String>,
    /// The program and its arguments.
    pub command: Vec<String>,
    /// Where it was started, if that was said.
    pub cwd: Option<String>,
    /// Whether it has a terminal.
    pub terminal: bool,
    /// Whether it ends with the request that started it.
    pub foreground: bool,
    /// When it was started.
    pub started_at: SystemTime,
    /// How it ended, and why if there is more to say.
    pub ended: Option<(Exit, Option<String>)>,
}

impl Jobs {
    /// No commands yet. Detached ones will be logged in the folder, which is made when the
    /// first of them starts, and of which so much is kept.
    pub fn new(logs: impl Into<PathBuf>, kept: KeptLogs) -> Self {
        let (running, ended, logging, variables) = Default::default();
        Self { running, ended, logs: logs.into(), kept, logging, variables }
    }

    /// Whether nothing runs.
    pub fn is_empty(&self) -> bool {
        self.running.lock().is_empty()
    }

    /// Whether anything runs whose end somebody waits for.
    pub fn have_foreground(&self) -> bool {
        self.running.lock().values().any(|job| job.foreground)
    }

    /// Whether any is told of that has ended.
    pub fn have_ended(&self) -> bool {
        let mut ended = self.ended.lock();
        ended.retain(|(at, _)| at.elapsed() < ENDED_FOR);
        !ended.is_empty()
    }

    /// Whether clients have set variables for the commands to come.
    pub fn have_variables(&self) -> bool {
        !self.variables.lock().is_empty()
    }

    /// The commands that run, and those that have ended in the background not long ago.
    pub fn list(&self) -> Vec<JobInfo> {
        let mut all: Vec<_> = self.running.lock().values().map(|job| job.info()).collect();
        if self.have_ended() {
            all.extend(self.ended.lock().iter().map(|(_, job)| job.info()));
        }
        all.sort_by_key(|job| (job.started_at, job.pid));
        all
    }

    /// The command of that number or tag: one that runs, or the last that has ended.
    pub fn find(&self, name: &str) -> Option<Arc<Job>> {
        let pid = name.parse().ok();
        let is = |job: &&Arc<Job>| Some(job.child.pid()) == pid || job.tag.as_deref() == Some(name);
        let found = self.running.lock().values().find(is).cloned();
        found.or_else(|| self.ended.lock().iter().rev().map(|(_, job)| job).find(is).cloned())
    }

    /// The log of a detached command, oldest part first; its tag or process id names it.
    pub fn log(logs: &Path, job: &str) -> Vec<PathBuf> {
        // A tag may be any string: only a plain file name leads to a log.
        if job.is_empty() || job.contains(['/', '\0']) {
            return Vec::new();
        }
        log_files(logs, job).into_iter().filter(|file| file.exists()).collect()
    }

    /// Deletes the oldest logs beyond what is kept.
    fn tidy_logs(&self) {
        if let Err(error) = self.try_tidy_logs() {
            tracing::warn!(folder = %self.logs.display(), %error, "old logs stay");
        }
    }

    fn try_tidy_logs(&self) -> std::io::Result<()> {
        let mut all: HashMap<String, OldLog> = HashMap::new();
        for file in std::fs::read_dir(&self.logs)? {
            let file = file?;
            let Ok(name) = file.file_name().into_string() else { continue };
            let of = name.strip_suffix(".log").or_else(|| name.strip_suffix(".log.1"));
            // One that was just deleted by somebody else is none to delete.
            let (Some(of), Ok(known)) = (of, file.metadata()) else { continue };
            let log = all.entry(of.to_owned()).or_default();
            log.written = log.written.max(known.modified().ok());
            log.bytes += known.len();
        }
        let mut newest_first: Vec<_> = all.into_iter().collect();
        let running = self.logging.lock().clone();
        newest_first
            .sort_by_key(|(name, log)| (!running.contains(name), std::cmp::Reverse(log.written)));
        let mut bytes = 0;
        for (place, (name, log)) in newest_first.into_iter().enumerate() {
            bytes += log.bytes;
            let is_kept = place < self.kept.commands && bytes <= self.kept.bytes;
            if is_kept || running.contains(&name) {
                continue;
            }
            for file in log_files(&self.logs, &name) {
                match std::fs::remove_file(file) {
                    Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                        return Err(error);
                    }
                    _ => {}
                }
            }
        }
        Ok(())
    }

    fn select(&self, selector: Option<&wire::ProcessSelector>) -> Result<Arc<Job>, ConnectError> {
        use oneof::process_selector::Selector;
        let running = self.running.lock();
        let found = match selector.and_then(|selector| selector.selector.as_ref()) {
            Some(Selector::Pid(pid)) => running.get(pid).cloned(),
            Some(Selector::Tag(tag)) => {
                running.values().find(|job| job.tag.as_ref() == Some(tag)).cloned()
            }
            None => return Err(ConnectError::invalid_argument("which process? set pid or tag")),
        };
        found.ok_or_else(|| ConnectError::not_found("no such process runs in the session"))
    }
}

impl Jobs {
    /// The last that has ended, of those that are logged, that goes by that number or tag.
    fn select_ended(&self, selector: Option<&wire::ProcessSelector>) -> Option<Arc<Job>> {
        use oneof::process_selector::Selector;
        let selector = selector?.selector.as_ref()?;
        let is = |job: &&Arc<Job>| match selector {
            Selector::Pid(pid) => job.child.pid() == *pid,
            Selector::Tag(tag) => job.tag.as_ref() == Some(tag),
        };
        let ended = self.ended.lock();
        ended.iter().rev().map(|(_, job)| job).filter(|job| job.detached).find(is).cloned()
    }
}

impl Job {
    /// What is known of it.
    pub fn info(&self) -> JobInfo {
        let wire::ProcessConfig { cmd, args, cwd, .. } = &self.config;
        JobInfo {
            pid: self.child.pid(),
            tag: self.tag.clone(),
            command: [std::slice::from_ref(cmd), args].concat(),
            cwd: cwd.clone(),
            terminal: self.terminal,
            foreground: self.foreground,
            started_at: self.started_at,
            ended: self.tail.as_ref().and_then(|tail| tail.end()),
        }
    }

    /// What it prints, and has printed as far back as that is kept, from so many bytes on; then
    /// how it ended. None of one in the foreground, which only its own request reads. Whoever
    /// reads slowly misses some of it, and does not slow the command down.
    pub fn read(&self, from: u64) -> Option<impl Stream<Item = Piece> + Send + 'static> {
        Some(self.tail.clone()?.read(from))
    }

    /// Writes to its standard input or its terminal. Not cancel-safe: a part may be written.
    ///
    /// # Errors
    /// `failed_precondition` if it is closed.
    pub async fn write(&self, bytes: &[u8]) -> Result<(), ConnectError> {
        let mut stdin = self.stdin.lock().await;
        let Some(stdin) = stdin.as_mut() else {
            return Err(ConnectError::failed_precondition(
                "the command's standard input is closed",
            ));
        };
        let written = stdin.write_all(bytes).await;
        written.map_err(|error| ConnectError::failed_precondition(format!("not read: {error}")))
    }

    /// Ends its standard input. Cancel-safe.
    ///
    /// # Errors
    /// `failed_precondition` for a terminal, which has no end.
    pub async fn close_stdin(&self) -> Result<(), ConnectError> {
        if self.terminal {
            let problem = "a terminal has no end of file: send the byte 4 instead";
            return Err(ConnectError::failed_precondition(problem));
        }
        *self.stdin.lock().await = None;
        Ok(())
    }

    /// Sends a signal to the command and its group; 9 (SIGKILL) to all that it has started.
    ///
    /// # Errors
    /// `failed_precondition` if that is not possible.
    pub async fn signal(&self, signal: i32) -> Result<(), ConnectError> {
        let sent = if signal == wire::Signal::SIGNAL_SIGKILL as i32 {
            self.child.kill_tree().await
        } else {
            self.child.signal(signal, Scope::Group)
        };
        sent.map_err(|error| ConnectError::failed_precondition(error.to_string()))
    }

    /// Sets the size of its terminal.
    ///
    /// # Errors
    /// `failed_precondition` if it has none.
    pub fn resize(&self, columns: u16, rows: u16) -> Result<(), ConnectError> {
        let resized = self.child.resize(columns, rows);
        resized.map_err(|error| ConnectError::failed_precondition(error.to_string()))
    }
}

/// The service.
#[derive(Debug)]
pub struct ProcessService<I>(I);

impl<I: Instances> ProcessService<I> {
    /// A service over these instances.
    pub fn new(instances: I) -> Arc<Self> {
        Arc::new(Self(instances))
    }

    async fn job(
        &self,
        context: &RequestContext,
        selector: Option<&wire::ProcessSelector>,
    ) -> Result<Arc<Job>, ConnectError> {
        self.0.instance(context.headers()).await?.jobs.select(selector)
    }
}

/// What becomes of a command when its stream is dropped.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Mode {
    /// It is killed.
    Foreground,
    /// It goes on; of output that nobody follows only the last is kept.
    Background,
    /// It goes on, and its output is logged.
    Detached,
}

async fn start(
    instance: &Instance,
    request: wire::StartRequest,
    user: Option<String>,
    mode: Mode,
    deadline: Option<Instant>,
) -> Result<(Arc<Job>, mpsc::Receiver<Chunk>), ConnectError> {
    let config = request.process.into_option().unwrap_or_default();
    if config.cmd.is_empty() {
        return Err(ConnectError::invalid_argument("process.cmd is empty: name a program"));
    }
    let (span, traced) = (instance.trace)();
    let user = user.or_else(|| instance.default_user.clone());
    let mut env = instance.env.clone();
    if user.is_some() {
        // Theirs are known where the command runs.
        env.retain(|name, _| !["HOME", "USER", "LOGNAME", "SHELL"].contains(&name.as_str()));
    }
    env.extend(instance.jobs.variables.lock().clone());
    env.extend(traced);
    env.extend(config.envs.iter().map(|(name, value)| (name.clone(), value.clone())));
    let stdio = match request.pty.as_option().map(|pty| pty.size.as_option()) {
        Some(size) => {
            env.entry("TERM".to_owned()).or_insert_with(|| "xterm-256color".to_owned());
            let (columns, rows) = size.map_or((80, 24), cells);
            Stdio::Pty { columns, rows }
        }
        None => Stdio::Pipes { stdin: request.stdin.unwrap_or(true) },
    };
    let cwd = config.cwd.as_deref().unwrap_or_default();
    let cwd = match &user {
        // From their home, which is known where it runs.
        Some(_) if !cwd.is_empty() || instance.default_user.is_none() => cwd.into(),
        _ => instance.workdir.join(cwd),
    };
    let spec = Spec {
        program: config.cmd.clone().into(),
        args: config.args.iter().map(Into::into).collect(),
        env: env.into_iter().map(|(name, value)| (name.into(), value.into())).collect(),
        user,
        cwd,
        stdio,
    };
    let shutdowns = Shutdowns::of(&instance.agent);
    let begun = std::time::Instant::now();
    let spawned = instance.agent.spawn(spec).instrument(span.clone()).await;
    let mut child = spawned.map_err(|error| refused(&error, mode))?;
    // Signed is what traces have.
    span.record("pid", i64::from(child.pid()));
    (instance.started)(begun.elapsed());
    let pid = child.pid();
    let tag = request.tag.filter(|tag| !tag.is_empty());
    let log = (mode == Mode::Detached).then(|| {
        let name = tag.clone().unwrap_or_else(|| pid.to_string());
        Log::open(&instance.jobs, &name)
    });
    // Without its log it is not wanted: dropping it here kills it.
    let log = log.transpose().map_err(|error| {
        ConnectError::resource_exhausted(format!("cannot make the command's log: {error}"))
    })?;
    // From here on the table owns it, not this request.
    child.detach();
    if mode != Mode::Foreground
        && let Err(error) = child.outlive_owner()
    {
        tracing::warn!(pid, %error, "will end with this process");
    }
    let stdin = child.take_stdin();
    let Some(output) = child.take_output() else {
        return Err(ConnectError::internal("a new command has no output"));
    };
    let (sender, receiver) = mpsc::channel(BACKLOG);
    let job = Arc::new(Job {
        config,
        tag,
        child,
        foreground: mode == Mode::Foreground,
        detached: mode == Mode::Detached,
        terminal: matches!(stdio, Stdio::Pty { .. }),
        started_at: SystemTime::now(),
        tail: (mode != Mode::Foreground).then(Arc::default),
        stdin: tokio::sync::Mutex::new(stdin),
        readers: Mutex::new(vec![sender]),
        end: OnceLock::new(),
        // What goes on in the background is ended by whoever ends the instance.
        over: match mode {
            Mode::Foreground => instance.over.child_token(),
            Mode::Background | Mode::Detached => CancellationToken::new(),
        },
        timed_out: AtomicBool::new(false),
        shut_down: AtomicBool::new(false),
    });
    instance.jobs.running.lock().insert(pid, job.clone());
    // Only a command in the foreground keeps the session in use by itself; what goes on in
    // the background counts as processes left running.
    let lease = (mode == Mode::Foreground).then(|| instance.lease.clone());
    let explain = instance.explain.clone();
    tokio::spawn(end_in_time(job.clone(), deadline));
    let pump = pump(instance.jobs.clone(), job.clone(), output, log, lease, explain, shutdowns);
    tokio::spawn(pump.instrument(span));
    Ok((job, receiver))
}

/// Kills a command at its deadline or when it is over, whether or not anybody reads it.
async fn end_in_time(job: Arc<Job>, deadline: Option<Instant>) {
    let late = tokio::select! {
        biased;
        _ = job.child.wait() => return,
        () = job.over.cancelled() => false,
        () = until(deadline) => true,
    };
    // What it has left running in the background is nobody's here. Its reader may know of its end,
    // and be gone, before this task is told.
    if matches!(job.child.try_wait(), Ok(Some(_))) {
        return;
    }
    job.timed_out.store(late, Ordering::Relaxed);
    job.over.cancel();
    // It may have ended by itself, which is just as well.
    let _ = job.child.kill_tree().await;
}

/// So long from now; none if that is never.
fn after(timeout: Duration) -> Option<Instant> {
    Instant::now().checked_add(timeout)
}

/// A terminal's columns and rows, within what makes sense.
fn cells(size: &wire::pty::Size) -> (u16, u16) {
    let cells = |value: u32| u16::try_from(value.clamp(1, 10_000)).unwrap_or(u16::MAX);
    (cells(size.cols), cells(size.rows))
}

/// Tells whether all of an instance was ended since this was made.
struct Shutdowns {
    count: Arc<AtomicU64>,
    before: u64,
}

impl Shutdowns {
    fn of(agent: &crate::Agent) -> Self {
        let count = agent.shutdowns();
        let before = count.load(Ordering::Relaxed);
        Self { count, before }
    }

    fn was_one(&self) -> bool {
        self.count.load(Ordering::Relaxed) != self.before
    }
}

/// Moves a command's output to those who follow it, until it ends.
async fn pump(
    jobs: Arc<Jobs>,
    job: Arc<Job>,
    mut output: crate::Output,
    mut log: Option<Log>,
    lease: Option<Arc<dyn Any + Send + Sync>>,
    explain: Explain,
    shutdowns: Shutdowns,
) {
    let end = loop {
        match output.next().await {
            Ok(Some(chunk)) => {
                if let Some(file) = &mut log
                    && let Err(error) = file.write(&chunk.bytes)
                {
                    tracing::warn!(pid = job.child.pid(), %error, "log given up");
                    log = None;
                }
                if let Some(tail) = &job.tail {
                    tail.push(&chunk);
                }
                tell(&job, &chunk).await;
            }
            Ok(None) => match job.child.wait().await {
                Ok(exit) => {
                    tracing::Span::current().record("exit_code", exit.code());
                    break Ok((exit, explain(exit)));
                }
                Err(error) => break Err(error.to_string()),
            },
            Err(error) => break Err(error.to_string()),
        }
    };
    if shutdowns.was_one() {
        job.shut_down.store(true, Ordering::Relaxed);
    }
    if let (Some(file), Ok((exit, why))) = (&mut log, &end) {
        let why = why.as_ref().map(|why| format!("; {why}")).unwrap_or_default();
        // The log is whole without this line.
        let _ = file.write(format!("[denizen: {}{why}]\n", status(*exit)).as_bytes());
    }
    if let Some(tail) = &job.tail {
        tail.finish(end.clone());
        let mut ended = jobs.ended.lock();
        if ended.len() == ENDED {
            ended.pop_front();
        }
        ended.push_back((Instant::now(), job.clone()));
    }
    jobs.running.lock().remove(&job.child.pid());
    drop(lease);
    // Set once, here. Readers look for it when their channel is closed.
    let _ = job.end.set(end);
    job.readers.lock().clear();
}

/// Waits until each reader has room, so that a slow one slows the command down: for as long as
/// it may run, if it is one in the foreground; otherwise who stands still is read to no more.
async fn tell(job: &Job, chunk: &Chunk) {
    let readers = job.readers.lock().clone();
    let all = readers.iter().map(|reader| async {
        let sent = reader.send(chunk.clone());
        if job.foreground {
            return sent.await.is_ok();
        }
        matches!(tokio::time::timeout(STANDSTILL, sent).await, Ok(Ok(())))
    });
    let told = tokio::select! {
        told = futures::future::join_all(all) => told,
        () = job.over.cancelled() => return,
    };
    let lost = readers.iter().zip(told).filter(|(_, told)| !told);
    for (reader, _) in lost {
        job.readers.lock().retain(|it| !it.same_channel(reader));
    }
}

fn status(exit: Exit) -> String {
    match exit {
        Exit::Code(code) => format!("exit status {code}"),
        Exit::Signal(signal) => format!("signal: {}", signal_name(signal)),
    }
}

/// What a signal is called by envd, whose clients show that.
fn signal_name(signal: i32) -> String {
    const NAMES: [&str; 31] = [
        "hangup",
        "interrupt",
        "quit",
        "illegal instruction",
        "trace/breakpoint trap",
        "aborted",
        "bus error",
        "floating point exception",
        "killed",
        "user defined signal 1",
        "segmentation fault",
        "user defined signal 2",
        "broken pipe",
        "alarm clock",
        "terminated",
        "stack fault",
        "child exited",
        "continued",
        "stopped (signal)",
        "stopped",
        "stopped (tty input)",
        "stopped (tty output)",
        "urgent I/O condition",
        "CPU time limit exceeded",
        "file size limit exceeded",
        "virtual timer expired",
        "profiling timer expired",
        "window changed",
        "I/O possible",
        "power failure",
        "bad system call",
    ];
    let place = usize::try_from(signal).ok().and_then(|number| number.checked_sub(1));
    let name = place.and_then(|place| NAMES.get(place));
    name.map_or_else(|| format!("signal {signal}"), |name| (*name).to_owned())
}

/// How a failure to start is told: the codes let a client answer as env(1) would.
fn refused(error: &Error, mode: Mode) -> ConnectError {
    let text = match error {
        // As envd's own clients know it.
        Error::WorkingDirectory { cwd, source }
            if mode == Mode::Background && source.kind() == std::io::ErrorKind::NotFound =>
        {
            format!("cwd '{}' does not exist", cwd.display())
        }
        error => error.to_string(),
    };
    match error {
        Error::ProgramNotFound { .. } => ConnectError::not_found(text),
        Error::UnknownUser { .. } => ConnectError::unauthenticated(text),
        Error::User { .. } => ConnectError::failed_precondition(text),
        Error::TooBig { .. } => ConnectError::resource_exhausted(text),
        Error::WorkingDirectory { .. } | Error::BadString { .. } => {
            ConnectError::invalid_argument(text)
        }
        error if error.exit_code() == 126 => ConnectError::permission_denied(text),
        _ => ConnectError::internal(text),
    }
}

/// Two files at most: what is written now, and what was before.
#[derive(Debug)]
struct Log {
    jobs: Arc<Jobs>,
    name: String,
    file: File,
    written: u64,
}

impl Log {
    fn open(jobs: &Arc<Jobs>, name: &str) -> std::io::Result<Self> {
        if name.contains(['/', '\0']) {
            return Err(std::io::Error::other("a detached command's tag cannot contain /"));
        }
        std::fs::create_dir_all(&jobs.logs)?;
        let [before, now] = log_files(&jobs.logs, name);
        let file = OpenOptions::new().create(true).write(true).truncate(true).open(now)?;
        // What another command of that name has printed is not this one's.
        match std::fs::remove_file(before) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        jobs.logging.lock().push(name.to_owned());
        let log = Self { jobs: jobs.clone(), name: name.to_owned(), file, written: 0 };
        jobs.tidy_logs();
        Ok(log)
    }

    fn write(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        if self.written >= LOG_BYTES {
            let [before, now] = log_files(&self.jobs.logs, &self.name);
            std::fs::rename(&now, before)?;
            self.file = File::create(now)?;
            self.written = 0;
            self.jobs.tidy_logs();
        }
        self.file.write_all(bytes)?;
        self.written += bytes.len() as u64;
        Ok(())
    }
}

impl Drop for Log {
    fn drop(&mut self) {
        let mut logging = self.jobs.logging.lock();
        if let Some(at) = logging.iter().position(|name| *name == self.name) {
            logging.swap_remove(at);
        }
    }
}

/// The files of a log: what was before, and what is written now.
fn log_files(folder: &Path, name: &str) -> [PathBuf; 2] {
    ["log.1", "log"].map(|end| folder.join(format!("{name}.{end}")))
}

/// A log of those in the folder.
#[derive(Default)]
struct OldLog {
    written: Option<SystemTime>,
    bytes: u64,
}

struct Follow {
    job: Arc<Job>,
    chunks: mpsc::Receiver<Chunk>,
    /// Kills the command when the stream is dropped before its end.
    _kill: Option<DropGuard>,
    keepalive: Duration,
    first: bool,
    ended: bool,
    /// Keeps the instance in use while a command in the background is followed.
    hold: Option<Hold>,
    /// Cancelled when nobody may follow it any more.
    over: CancellationToken,
}

impl Follow {
    fn new(job: Arc<Job>, chunks: mpsc::Receiver<Chunk>, keepalive: Duration) -> Self {
        let kill = job.foreground.then(|| job.over.clone().drop_guard());
        Self { _kill: kill, ..Self::of_another(job, chunks, keepalive) }
    }

    /// As it was started by another request, which it goes with.
    fn of_another(job: Arc<Job>, chunks: mpsc::Receiver<Chunk>, keepalive: Duration) -> Self {
        let (hold, over) = (None, CancellationToken::new());
        Self { job, chunks, _kill: None, keepalive, first: true, ended: false, hold, over }
    }

    /// The same for a command that goes on by itself: whoever follows it uses the instance, and
    /// is not left waiting when that is given up, though the command may only sleep.
    fn using(self, instance: Instance) -> Self {
        let over = instance.over.clone();
        Self { hold: Some(Hold::new(instance.lease, instance.over)), over, ..self }
    }

    async fn next(&mut self) -> Option<Result<wire::ProcessEvent, ConnectError>> {
        if std::mem::take(&mut self.first) {
            let start =
                wire::process_event::StartEvent { pid: self.job.child.pid(), ..Default::default() };
            return Some(Ok(event(start)));
        }
        if self.ended {
            return None;
        }
        let chunk = tokio::time::timeout(self.keepalive, self.chunks.recv());
        let told = tokio::select! {
            biased;
            () = self.over.cancelled() => {
                self.ended = true;
                self.hold = None;
                return Some(Err(stopped()));
            }
            told = chunk => told,
        };
        match told {
            Err(_) => Some(Ok(event(wire::process_event::KeepAlive::default()))),
            Ok(Some(chunk)) => Some(Ok(data(&chunk))),
            Ok(None) => {
                self.ended = true;
                Some(self.end())
            }
        }
    }

    /// What there is to say when nothing more will come.
    fn end(&self) -> Result<wire::ProcessEvent, ConnectError> {
        let (exit, error) = match self.job.end.get() {
            _ if self.job.timed_out.load(Ordering::Relaxed) => {
                return Err(ConnectError::deadline_exceeded(
                    "the command ran into its timeout and was killed",
                ));
            }
            // How it ended says nothing of it then. Whoever waits for one in the foreground is who
            // may have asked for that, and is told.
            Some(_) if !self.job.foreground && self.job.shut_down.load(Ordering::Relaxed) => {
                return Err(ConnectError::unavailable("the session was stopped"));
            }
            Some(Ok(end)) => end.clone(),
            Some(Err(why)) => return Err(ConnectError::unavailable(why.clone())),
            None => {
                return Err(ConnectError::data_loss(
                    "this stream was not read, and the command did not wait for it: connect anew",
                ));
            }
        };
        // To envd's own clients, whatever does not end well ends with an error.
        let failed = (!self.job.foreground && !exit.success()).then(|| status(exit));
        Ok(event(wire::process_event::EndEvent {
            exit_code: exit.code(),
            exited: matches!(exit, Exit::Code(_)),
            status: status(exit),
            error: error.or(failed),
            ..Default::default()
        }))
    }

    fn stream(self) -> impl Stream<Item = Result<wire::ProcessEvent, ConnectError>> + Send {
        stream::unfold(
            self,
            |mut follow| async move { follow.next().await.map(|item| (item, follow)) },
        )
    }
}

/// Starts a command, for others than envd's clients. Not cancel-safe: it may run then.
///
/// # Errors
/// As `process.Process/Start` has them.
pub async fn start_detached(
    instance: &Instance,
    request: wire::StartRequest,
    timeout: Option<Duration>,
) -> Result<Arc<Job>, ConnectError> {
    let (job, _) = start(instance, request, None, Mode::Detached, timeout.and_then(after)).await?;
    Ok(job)
}

/// Starts a command that is killed when its events are dropped, or after the timeout. Not
/// cancel-safe: it may run then.
///
/// # Errors
/// As `process.Process/Start` has them.
pub async fn start_foreground(
    instance: &Instance,
    request: wire::StartRequest,
    timeout: Option<Duration>,
) -> Result<
    impl Stream<Item = Result<wire::ProcessEvent, ConnectError>> + Send + 'static,
    ConnectError,
> {
    let deadline = timeout.and_then(after);
    let (job, chunks) = start(instance, request, None, Mode::Foreground, deadline).await?;
    Ok(Follow::new(job, chunks, super::KEEPALIVE).stream())
}

fn event(event: impl Into<oneof::process_event::Event>) -> wire::ProcessEvent {
    wire::ProcessEvent { event: Some(event.into()), ..Default::default() }
}

fn data(chunk: &Chunk) -> wire::ProcessEvent {
    use oneof::process_event::data_event::Output;
    let bytes = chunk.bytes.to_vec();
    let output = match chunk.stream {
        crate::Stream::Stdout => Output::Stdout(bytes),
        crate::Stream::Stderr => Output::Stderr(bytes),
        crate::Stream::Pty => Output::Pty(bytes),
    };
    event(wire::process_event::DataEvent { output: Some(output), ..Default::default() })
}

async fn feed(job: &Job, input: Option<&wire::ProcessInput>) -> Result<(), ConnectError> {
    use oneof::process_input::Input;
    let bytes = match input.and_then(|input| input.input.as_ref()) {
        Some(Input::Stdin(bytes)) if !job.terminal => bytes,
        Some(Input::Pty(bytes)) if job.terminal => bytes,
        Some(_) => {
            let text = if job.terminal {
                "it has a terminal: send pty"
            } else {
                "it has no terminal: send stdin"
            };
            return Err(ConnectError::failed_precondition(text));
        }
        None => return Ok(()),
    };
    job.write(bytes).await
}

impl<I: Instances> wire::Process for ProcessService<I> {
    async fn list<'a>(
        &'a self,
        context: RequestContext,
        _: ServiceRequest<'_, wire::ListRequest>,
    ) -> ServiceResult<impl connectrpc::Encodable<wire::ListResponse> + Send + use<'a, I>> {
        let instance = self.0.instance(context.headers()).await?;
        let mut processes: Vec<_> = instance
            .jobs
            .running
            .lock()
            .iter()
            .map(|(pid, job)| wire::ProcessInfo {
                config: job.config.clone().into(),
                pid: *pid,
                tag: job.tag.clone(),
                ..Default::default()
            })
            .collect();
        processes.sort_by_key(|process| process.pid);
        Response::ok(wire::ListResponse { processes, ..Default::default() })
    }

    async fn connect(
        &self,
        context: RequestContext,
        request: ServiceRequest<'_, wire::ConnectRequest>,
    ) -> ServiceResult<
        ServiceStream<impl connectrpc::Encodable<wire::ConnectResponse> + Send + use<I>>,
    > {
        let selector = request.to_owned_message().process.into_option();
        let instance = self.0.instance(context.headers()).await?;
        let jobs = &instance.jobs;
        // Whoever comes back late to what goes on without anybody is told at least how it ended.
        let job = jobs.select(selector.as_ref());
        let job = job.or_else(|error| jobs.select_ended(selector.as_ref()).ok_or(error))?;
        let (sender, chunks) = mpsc::channel(BACKLOG);
        job.readers.lock().push(sender);
        // It may have ended since it was found, and nobody closes this channel then.
        if job.end.get().is_some() {
            job.readers.lock().clear();
        }
        let follow = Follow::of_another(job, chunks, keepalive(context.headers()));
        let follow = follow.using(instance);
        let items = follow.stream().map(|item| {
            item.map(|event| wire::ConnectResponse { event: event.into(), ..Default::default() })
        });
        Response::ok(Box::pin(items) as ServiceStream<wire::ConnectResponse>)
    }

    async fn start(
        &self,
        context: RequestContext,
        request: ServiceRequest<'_, wire::StartRequest>,
    ) -> ServiceResult<ServiceStream<impl connectrpc::Encodable<wire::StartResponse> + Send + use<I>>>
    {
        let deadline = context.deadline().map(tokio::time::Instant::from_std);
        let mode = if context.header(denizen_envd::FOREGROUND).is_some() {
            Mode::Foreground
        } else if context.header(denizen_envd::DETACH).is_some() {
            Mode::Detached
        } else {
            Mode::Background
        };
        let instance = self.0.instance(context.headers()).await?;
        let user = named(context.headers());
        let request = request.to_owned_message();
        let (job, chunks) = start(&instance, request, user, mode, deadline).await?;
        let follow = Follow::new(job, chunks, keepalive(context.headers()));
        let follow = if mode == Mode::Foreground { follow } else { follow.using(instance) };
        let items = follow.stream().map(|item| {
            item.map(|event| wire::StartResponse { event: event.into(), ..Default::default() })
        });
        Response::ok(Box::pin(items) as ServiceStream<wire::StartResponse>)
    }

    async fn update<'a>(
        &'a self,
        context: RequestContext,
        request: ServiceRequest<'_, wire::UpdateRequest>,
    ) -> ServiceResult<impl connectrpc::Encodable<wire::UpdateResponse> + Send + use<'a, I>> {
        let request = request.to_owned_message();
        let job = self.job(&context, request.process.as_option()).await?;
        if let Some(size) = request.pty.as_option().and_then(|pty| pty.size.as_option()) {
            let (columns, rows) = cells(size);
            job.resize(columns, rows)?;
        }
        Response::ok(wire::UpdateResponse::default())
    }

    async fn stream_input<'a>(
        &'a self,
        context: RequestContext,
        mut requests: InboundStream<wire::StreamInputRequest>,
    ) -> ServiceResult<impl connectrpc::Encodable<wire::StreamInputResponse> + Send + use<'a, I>>
    {
        use oneof::stream_input_request::Event as Piece;
        // Whoever feeds a command uses the instance, as whoever follows it does.
        let instance = self.0.instance(context.headers()).await?;
        let fed = async {
            let mut job = None;
            while let Some(request) = requests.next().await {
                match request?.to_owned_message().event {
                    Some(Piece::Start(start)) => {
                        job = Some(instance.jobs.select(start.process.as_option())?);
                    }
                    Some(Piece::Data(piece)) => match &job {
                        Some(job) => feed(job, piece.input.as_option()).await?,
                        None => return Err(ConnectError::invalid_argument("begin with start")),
                    },
                    Some(Piece::Keepalive(_)) | None => {}
                }
            }
            Ok(())
        };
        instance.over.run_until_cancelled(fed).await.unwrap_or_else(|| Err(stopped()))?;
        Response::ok(wire::StreamInputResponse::default())
    }

    async fn send_input<'a>(
        &'a self,
        context: RequestContext,
        request: ServiceRequest<'_, wire::SendInputRequest>,
    ) -> ServiceResult<impl connectrpc::Encodable<wire::SendInputResponse> + Send + use<'a, I>>
    {
        let request = request.to_owned_message();
        let job = self.job(&context, request.process.as_option()).await?;
        feed(&job, request.input.as_option()).await?;
        Response::ok(wire::SendInputResponse::default())
    }

    async fn send_signal<'a>(
        &'a self,
        context: RequestContext,
        request: ServiceRequest<'_, wire::SendSignalRequest>,
    ) -> ServiceResult<impl connectrpc::Encodable<wire::SendSignalResponse> + Send + use<'a, I>>
    {
        let request = request.to_owned_message();
        let job = self.job(&context, request.process.as_option()).await?;
        job.signal(request.signal.to_i32()).await?;
        Response::ok(wire::SendSignalResponse::default())
    }

    async fn close_stdin<'a>(
        &'a self,
        context: RequestContext,
        request: ServiceRequest<'_, wire::CloseStdinRequest>,
    ) -> ServiceResult<impl connectrpc::Encodable<wire::CloseStdinResponse> + Send + use<'a, I>>
    {
        let request = request.to_owned_message();
        let job = self.job(&context, request.process.as_option()).await?;
        job.close_stdin().await?;
        Response::ok(wire::CloseStdinResponse::default())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let all = std::fs::read_dir(folder).unwrap();
        let all = all.map(|it| it.unwrap().file_name().into_string().unwrap());
        let mut all: Vec<_> = all.collect();
        all.sort();
        all
    }

    /// Has a log been written so many seconds after 1970.
    fn write(jobs: &Arc<Jobs>, name: &str, bytes: &[u8], at: u64) -> Log {
        let mut log = Log::open(jobs, name).unwrap();
        log.write(bytes).unwrap();
        log.file.set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(at)).unwrap();
        log
    }

    #[test]
    fn the_oldest_logs_go_and_those_that_are_written_stay() {
        let folder = tempfile::tempdir().unwrap();
        let kept = KeptLogs { commands: 3, bytes: 1000 };
        let jobs = Arc::new(Jobs::new(folder.path(), kept));
        let running = write(&jobs, "running", b"x", 1);
        for (name, at) in [("a", 2), ("b.log.1", 3), ("c", 4)] {
            drop(write(&jobs, name, b"y", at));
        }
        // What is nobody's log is not touched.
        std::fs::write(folder.path().join("other"), "").unwrap();
        drop(write(&jobs, "d", b"z", 5));
        assert_eq!(names(folder.path()), ["c.log", "d.log", "other", "running.log"]);
        // Too many bytes: of a command that ended, then of one that runs.
        drop(write(&jobs, "large", &[b'x'; 999], 6));
        let last = write(&jobs, "last", &[b'x'; 2000], 7);
        jobs.tidy_logs();
        assert_eq!(names(folder.path()), ["last.log", "other", "running.log"]);
        drop((running, last));
        jobs.tidy_logs();
        assert_eq!(names(folder.path()), ["other"]);
    }

    #[test]
    fn a_log_has_two_files_at_most_and_a_new_one_of_its_name_begins_anew() {
        let folder = tempfile::tempdir().unwrap();
        let jobs = Arc::new(Jobs::new(folder.path(), KeptLogs::default()));
        let mut log = Log::open(&jobs, "a").unwrap();
        for _ in 0..3 {
            log.write(&vec![b'x'; usize::try_from(LOG_BYTES).unwrap()]).unwrap();
        }
        assert_eq!(names(folder.path()), ["a.log", "a.log.1"]);
        drop(log);
        drop(write(&jobs, "a", b"new", 1));
        let [_, now] = log_files(folder.path(), "a");
        assert_eq!(Jobs::log(folder.path(), "a"), [now]);
    }
}
