//! Commands: run in the foreground, where a cancelled call kills the whole of what it has
//! started, or in the background, where they go on in the session by themselves.

use std::collections::BTreeMap;
use std::time::Duration;

use denizen_client::api::{Code, Ended, Process};
use denizen_client::{NewProcess, Run, RunEvent};
use rmcp::model::{ProgressNotificationParam, ProgressToken};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio::io::AsyncWrite;
use tokio::time::{Instant, timeout};

use crate::call::{Call, Place};
use crate::failure::{Failure, Result, is};
use crate::output::{Kept, Printed, whole_characters};
use crate::tools::Done;

/// Seconds that a command in the foreground has, if nothing is said.
const TIME: u64 = 120;
/// Bytes of output that are given at once, if nothing is said; and at most.
const SHOWN: usize = 16 * 1024;
const MOST: usize = 256 * 1024;
/// How often progress is told.
const PROGRESS: Duration = Duration::from_secs(1);
/// How long a command in the background may print nothing until what was read is all there is.
const QUIET: Duration = Duration::from_millis(100);
/// What the daemon's line in a log begins with.
const NOTE: &[u8] = b"[denizen: ";
/// How long output may be waited for.
const LONGEST_WAIT: u64 = 600;

/// See the tool.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct RunCommand {
    /// A line for the session's shell.
    command: String,
    /// The session's name; the one of this client, if none is named.
    session: Option<String>,
    /// The folder to run in: absolute, or relative to the session's working directory, which it
    /// is if none is named.
    cwd: Option<String>,
    /// Variables that are added to the environment.
    #[serde(default)]
    env: BTreeMap<String, String>,
    /// Seconds after which it is killed with all that it has started. 120 if nothing is said; in
    /// the background there is no limit then.
    #[schemars(range(min = 1))]
    timeout_seconds: Option<u64>,
    /// It goes on by itself: the answer has its command_id, and does not wait for its end.
    #[serde(default)]
    background: bool,
    /// In the background, whether it gets a standard input for write_stdin.
    #[serde(default)]
    stdin: bool,
    /// How many bytes of its output are given, 16384 if nothing is said: half of them of the
    /// beginning, half of the end.
    #[schemars(range(min = 256, max = 262_144))]
    max_output_bytes: Option<usize>,
}

/// What became of a command.
#[derive(Serialize, JsonSchema)]
pub(crate) struct Ran {
    /// The session that it ran in.
    session: String,
    /// For read_output; in the background also for kill_process and write_stdin.
    command_id: String,
    /// Its exit code, 128 and the signal's number if a signal ended it; none while it runs.
    exit_code: Option<i32>,
    /// What it has printed, or the beginning and the end of that.
    output: String,
    /// How many bytes it has printed.
    output_bytes: u64,
    /// How many of them are left out.
    omitted_bytes: u64,
    /// How long it took.
    seconds: f64,
}

pub(crate) async fn run_command(call: &Call<'_>, input: RunCommand) -> Result<Done<Ran>> {
    if input.command.trim().is_empty() {
        return Err(Failure::new("`command` is empty: it is a line of shell, as `ls -l`"));
    }
    if input.timeout_seconds == Some(0) {
        return Err(Failure::new("`timeout_seconds` is 1 at least"));
    }
    if input.stdin && !input.background {
        let text = "`stdin` is for commands in the background: set `background` too, or give the \
                    input with a pipe or a here-document";
        return Err(Failure::new(text));
    }
    let place = call.place(input.session.as_deref()).await?;
    call.known(&place).await?;
    let new = NewProcess {
        env: input.env,
        cwd: input.cwd,
        stdin: input.stdin,
        timeout_seconds: input.timeout_seconds.or((!input.background).then_some(TIME)),
        ..NewProcess::shell(input.command)
    };
    let shown = input.max_output_bytes.unwrap_or(SHOWN).clamp(256, MOST);
    if input.background {
        return start(call, &place, &new).await;
    }
    run(call, &place, &new, shown).await
}

async fn start(call: &Call<'_>, place: &Place, new: &NewProcess) -> Result<Done<Ran>> {
    let session = place.session.clone();
    let command_id = call.client().start(&session, new).await?.pid.to_string();
    let text = format!(
        "It runs in the background of session {session} with command_id {command_id:?}: \
         read_output reads what it prints, kill_process ends it."
    );
    let data = Ran {
        session,
        command_id,
        exit_code: None,
        output: String::new(),
        output_bytes: 0,
        omitted_bytes: 0,
        seconds: 0.0,
    };
    Ok(Done::new(text, data))
}

async fn run(call: &Call<'_>, place: &Place, new: &NewProcess, shown: usize) -> Result<Done<Ran>> {
    let session = place.session.clone();
    let begun = Instant::now();
    // Dropped, it has the daemon kill all that the command has started.
    let mut run = call.client().run(&session, new).await?;
    let mut progress = Progress::begin(call, begun);
    let mut printed = Printed::default();
    let ended = loop {
        let event = tokio::select! {
            event = run.next() => event,
            () = progress.due() => {
                progress.tell(&printed).await;
                continue;
            }
        };
        match event {
            Ok(Some(RunEvent::Started(_))) => progress.tell(&printed).await,
            Ok(Some(RunEvent::Output(piece))) => printed.add(&piece.bytes),
            Ok(Some(RunEvent::Exit(ended))) => break Ok(ended),
            Ok(Some(_)) => {}
            Ok(None) => break Err(Failure::new("the command's output broke off")),
            Err(error) => break Err(Failure::from(error)),
        }
    };
    let command_id = format!("run-{}", &uuid::Uuid::new_v4().simple().to_string()[..12]);
    let (output, omitted_bytes) = printed.shown(shown, &command_id);
    let output_bytes = printed.total();
    let exit_code = ended.as_ref().ok().map(|ended| ended.code);
    if omitted_bytes > 0 {
        let kept = Kept { printed, exit_code };
        call.outputs.keep(&call.door.identity, &session, &command_id, kept);
    }
    let seconds = begun.elapsed().as_secs_f64();
    let end = match &ended {
        Ok(ended) => how(ended),
        Err(failure) => failure.0.clone(),
    };
    let gap = if output.is_empty() || output.ends_with('\n') { "" } else { "\n" };
    let text = format!("{output}{gap}[{end}, after {seconds:.1} s]");
    let failed = ended.is_err();
    let data = Ran { session, command_id, exit_code, output, output_bytes, omitted_bytes, seconds };
    Ok(Done { text, data, failed })
}

fn how(ended: &Ended) -> String {
    let reason = ended.reason.as_ref().map(|why| format!(": {why}")).unwrap_or_default();
    match ended.signal {
        Some(signal) => format!("ended by signal {signal}{reason}"),
        None => format!("exit code {}{reason}", ended.code),
    }
}

/// What is told of a command while it runs, to who wants to know.
struct Progress<'a> {
    call: &'a Call<'a>,
    token: Option<ProgressToken>,
    begun: Instant,
    told: f64,
    next: Instant,
}

impl<'a> Progress<'a> {
    fn begin(call: &'a Call<'a>, begun: Instant) -> Self {
        let token = call.context.meta.get_progress_token();
        Self { call, token, begun, told: 0.0, next: begun + PROGRESS }
    }

    /// Ends when there is something to tell. Cancel-safe.
    async fn due(&self) {
        match self.token {
            Some(_) => tokio::time::sleep_until(self.next).await,
            None => std::future::pending().await,
        }
    }

    async fn tell(&mut self, printed: &Printed) {
        let Some(token) = &self.token else { return };
        let seconds = self.begun.elapsed().as_secs_f64();
        self.next = Instant::now() + PROGRESS;
        // It has to grow.
        self.told = seconds.max(self.told + 0.001);
        let message = match printed.last_line(200) {
            Some(line) => format!("{seconds:.0} s: {line}"),
            None => format!("{seconds:.0} s"),
        };
        let progress = ProgressNotificationParam::new(token.clone(), self.told);
        // A client that does not take it does not have the command end.
        let _ = self.call.context.peer.notify_progress(progress.with_message(message)).await;
    }
}

/// See the tool.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct ReadOutput {
    /// What run_command gave, or a command_id of list_processes.
    command_id: String,
    /// The session that the command was run in; the one of this client, if none is named.
    session: Option<String>,
    /// From which byte on.
    #[serde(default)]
    offset: u64,
    /// At most so many bytes, 16384 if nothing is said.
    #[schemars(range(min = 1, max = 262_144))]
    max_bytes: Option<usize>,
    /// Wait so many seconds for a command in the background to print something or to end, if
    /// there is nothing yet.
    #[serde(default)]
    #[schemars(range(max = 600))]
    wait_seconds: u64,
}

/// A part of what a command has printed.
#[derive(Serialize, JsonSchema)]
pub(crate) struct OutputRead {
    /// It.
    output: String,
    /// Where it begins. Not where it was asked for, if that is not kept any more.
    offset: u64,
    /// Where to read on.
    next_offset: u64,
    /// Whether that is all, now and later.
    at_end: bool,
    /// The exit code, if the command has ended and nothing more is to be read.
    exit_code: Option<i32>,
}

pub(crate) async fn read_output(call: &Call<'_>, input: ReadOutput) -> Result<Done<OutputRead>> {
    let place = call.place(input.session.as_deref()).await?;
    let most = input.max_bytes.unwrap_or(SHOWN).clamp(1, MOST);
    let wait = Duration::from_secs(input.wait_seconds.min(LONGEST_WAIT));
    let key = (call.door.identity.as_str(), place.session.as_str(), input.command_id.as_str());
    let kept = call.outputs.look(key, |kept| {
        let part = kept.printed.part(input.offset, most);
        (part, kept.printed.total(), kept.exit_code)
    });
    if let Some((part, total, exit_code)) = kept {
        let at_end = part.offset + part.bytes.len() as u64 >= total;
        return Ok(read(input.offset, part.offset, part.bytes, at_end, exit_code));
    }
    if input.command_id.starts_with("run-") {
        let text = format!(
            "nothing is kept of {}: run_command shows all of short output, and what is long is \
             kept for a while only. Run it again with its output to a file, and read that.",
            input.command_id
        );
        return Err(Failure(text));
    }
    let following = call.client().output(&place.session, &input.command_id, input.offset).await;
    let run = match following {
        Ok(run) => run,
        Err(error) if is(&error, Code::UnknownProcess) => {
            // It ended long ago, or under an earlier daemon. Its log may be there.
            let logged = log(call, &place, &input.command_id, input.offset, most).await;
            let Some((bytes, at_end)) = logged else { return Err(error.into()) };
            return Ok(read(input.offset, input.offset, bytes, at_end, None));
        }
        Err(error) => return Err(error.into()),
    };
    let mut seen = follow(run, input.offset, most, wait).await?;
    if seen.offset > input.offset {
        // Its log goes further back: if it is whole, what follows there is what was seen here.
        let of = |from, most| log(call, &place, &input.command_id, from, most);
        let gap = usize::try_from(seen.offset - input.offset).unwrap_or(usize::MAX);
        let same = match of(seen.offset, seen.bytes.len().min(SHOWN)).await {
            Some((bytes, _)) => seen.bytes.starts_with(&bytes),
            None => false,
        };
        if same && let Some((bytes, _)) = of(input.offset, most.min(gap)).await {
            seen = Seen { offset: input.offset, bytes, ended: None };
        }
    }
    let exit_code = seen.ended.as_ref().map(|ended| ended.code);
    let at_end = seen.ended.is_some();
    Ok(read(input.offset, seen.offset, seen.bytes, at_end, exit_code))
}

fn read(
    asked: u64,
    offset: u64,
    mut bytes: Vec<u8>,
    at_end: bool,
    exit_code: Option<i32>,
) -> Done<OutputRead> {
    // The rest of a character comes with the next part.
    let whole = whole_characters(&bytes);
    if !at_end && whole > 0 {
        bytes.truncate(whole);
    }
    let next_offset = offset + bytes.len() as u64;
    let output = String::from_utf8_lossy(&bytes).into_owned();
    let gone = match offset.checked_sub(asked) {
        Some(gone @ 1..) => format!("[{gone} bytes from {asked} on are not kept any more]\n"),
        _ => String::new(),
    };
    let end = match (at_end, exit_code) {
        (true, Some(code)) => format!("[that is all; exit code {code}]"),
        (true, None) => "[that is all]".to_owned(),
        (false, _) => format!("[read on with offset {next_offset}]"),
    };
    let gap = if output.is_empty() || output.ends_with('\n') { "" } else { "\n" };
    let text = format!("{gone}{output}{gap}{end}");
    let exit_code = exit_code.filter(|_| at_end);
    Done::new(text, OutputRead { output, offset, next_offset, at_end, exit_code })
}

/// What was read of a command in the background.
struct Seen {
    offset: u64,
    bytes: Vec<u8>,
    /// Nothing more is to be read, and this is how it ended.
    ended: Option<Ended>,
}

async fn follow(mut run: Run, offset: u64, most: usize, wait: Duration) -> Result<Seen> {
    let mut seen = Seen { offset, bytes: Vec::new(), ended: None };
    loop {
        let patience = if seen.bytes.is_empty() { wait.max(QUIET) } else { QUIET };
        let Ok(event) = timeout(patience, run.next()).await else { return Ok(seen) };
        match event? {
            Some(RunEvent::Output(piece)) => {
                if seen.bytes.is_empty() {
                    seen.offset = piece.offset;
                }
                let room = most - seen.bytes.len();
                if piece.bytes.len() > room {
                    seen.bytes.extend_from_slice(&piece.bytes[..room]);
                    return Ok(seen);
                }
                seen.bytes.extend_from_slice(&piece.bytes);
            }
            // What comes before a gap is a part of its own.
            Some(RunEvent::Gap { .. }) if !seen.bytes.is_empty() => return Ok(seen),
            Some(RunEvent::Gap { to, .. }) => seen.offset = to,
            Some(RunEvent::Exit(ended)) => {
                seen.ended = Some(ended);
                return Ok(seen);
            }
            Some(_) => {}
            None => return Ok(seen),
        }
    }
}

/// A part of the log of a command that has ended, and whether that is all of it.
async fn log(
    call: &Call<'_>,
    place: &Place,
    command: &str,
    offset: u64,
    most: usize,
) -> Option<(Vec<u8>, bool)> {
    let command = denizen_client::escape(command);
    let path = denizen_client::path(&place.session, &format!("/logs/{command}"));
    let mut window = Window { skip: offset, most, bytes: Vec::new(), is_full: false };
    let done = call.client().download(&path, &mut window).await;
    let Window { mut bytes, is_full, .. } = window;
    // The daemon has written below it how it ended.
    if !is_full && let Some(at) = bytes.windows(NOTE.len()).rposition(|part| part == NOTE) {
        bytes.truncate(at);
    }
    (done.is_ok() || is_full).then_some((bytes, !is_full))
}

/// Takes what is from one place to another of what it is given, and no more then.
struct Window {
    skip: u64,
    most: usize,
    bytes: Vec<u8>,
    is_full: bool,
}

impl AsyncWrite for Window {
    fn poll_write(
        mut self: std::pin::Pin<&mut Self>,
        _: &mut std::task::Context<'_>,
        bytes: &[u8],
    ) -> std::task::Poll<std::io::Result<usize>> {
        let skipped = usize::try_from(self.skip).unwrap_or(usize::MAX).min(bytes.len());
        self.skip -= skipped as u64;
        let room = self.most - self.bytes.len();
        let rest = &bytes[skipped..];
        self.bytes.extend_from_slice(&rest[..rest.len().min(room)]);
        if rest.len() > room {
            self.is_full = true;
            return std::task::Poll::Ready(Err(std::io::ErrorKind::StorageFull.into()));
        }
        std::task::Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(
        self: std::pin::Pin<&mut Self>,
        _: &mut std::task::Context<'_>,
    ) -> std::task::Poll<std::io::Result<()>> {
        std::task::Poll::Ready(Ok(()))
    }

    fn poll_shutdown(
        self: std::pin::Pin<&mut Self>,
        _: &mut std::task::Context<'_>,
    ) -> std::task::Poll<std::io::Result<()>> {
        std::task::Poll::Ready(Ok(()))
    }
}

/// See the tool.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct ListProcesses {
    /// The session's name; the one of this client, if none is named.
    session: Option<String>,
}

/// The commands of a session.
#[derive(Serialize, JsonSchema)]
pub(crate) struct Processes {
    session: String,
    processes: Vec<OneProcess>,
}

/// A command.
#[derive(Serialize, JsonSchema)]
pub(crate) struct OneProcess {
    /// What it is named by in other tools.
    command_id: String,
    /// The program and its arguments.
    command: Vec<String>,
    /// Whether it goes on by itself.
    background: bool,
    /// Its exit code, if it has ended.
    exit_code: Option<i32>,
    /// When it was started, in seconds since 1970.
    started_at: f64,
}

impl From<Process> for OneProcess {
    fn from(process: Process) -> Self {
        Self {
            command_id: process.pid.to_string(),
            command: process.command,
            background: !process.foreground,
            exit_code: process.ended.map(|ended| ended.code),
            started_at: process.started_at,
        }
    }
}

pub(crate) async fn list_processes(
    call: &Call<'_>,
    input: ListProcesses,
) -> Result<Done<Processes>> {
    let place = call.place(input.session.as_deref()).await?;
    let all = call.within(&place, || call.client().list_processes(&place.session)).await?;
    let processes: Vec<OneProcess> = all.into_iter().map(OneProcess::from).collect();
    let mut text = String::new();
    for process in &processes {
        let state = match (process.exit_code, process.background) {
            (Some(code), _) => format!("ended with {code}"),
            (None, true) => "runs in the background".to_owned(),
            (None, false) => "runs".to_owned(),
        };
        text.push_str(&format!("{}\t{state}\t{}\n", process.command_id, process.command.join(" ")));
    }
    if text.is_empty() {
        text = format!("Nothing runs in session {}.", place.session);
    }
    Ok(Done::new(text, Processes { session: place.session, processes }))
}

/// See the tool.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct KillProcess {
    /// What run_command or list_processes gave.
    command_id: String,
    /// The session's name; the one of this client, if none is named.
    session: Option<String>,
    /// The number of the signal or its name, as `SIGTERM`: 9 (SIGKILL) if none is named, which goes
    /// to all that the command has started; any other goes to its process group.
    // Described as one type, which is all that some clients know; a number is read as well.
    #[schemars(with = "Option<String>")]
    signal: Option<Signal>,
}

/// A signal, as one may call it.
#[derive(Deserialize)]
#[serde(untagged)]
enum Signal {
    Number(i32),
    Name(String),
}

/// Those that commands are sent by name (`signal(7)`, as they are numbered on x86 and ARM).
const SIGNALS: [(&str, i32); 13] = [
    ("HUP", 1),
    ("INT", 2),
    ("QUIT", 3),
    ("ABRT", 6),
    ("KILL", 9),
    ("USR1", 10),
    ("USR2", 12),
    ("ALRM", 14),
    ("TERM", 15),
    ("CONT", 18),
    ("STOP", 19),
    ("TSTP", 20),
    ("WINCH", 28),
];

impl Signal {
    fn number(&self) -> Result<i32> {
        let name = match self {
            Self::Number(number) => return Ok(*number),
            Self::Name(name) => name.to_ascii_uppercase(),
        };
        let plain = name.strip_prefix("SIG").unwrap_or(&name);
        let known = SIGNALS.iter().find(|(known, _)| *known == plain).map(|(_, number)| *number);
        known.or_else(|| plain.parse().ok()).ok_or_else(|| {
            Failure::new(format!("{name:?} is no signal that is known here: give its number"))
        })
    }
}

/// That a signal was sent.
#[derive(Serialize, JsonSchema)]
pub(crate) struct Killed {
    command_id: String,
    signal: i32,
}

pub(crate) async fn kill_process(call: &Call<'_>, input: KillProcess) -> Result<Done<Killed>> {
    let place = call.place(input.session.as_deref()).await?;
    let signal = input.signal.as_ref().map_or(Ok(9), Signal::number)?;
    let all = call.within(&place, || call.client().list_processes(&place.session)).await?;
    let ended = all
        .into_iter()
        .map(OneProcess::from)
        .find(|process| process.command_id == input.command_id)
        .and_then(|process| process.exit_code);
    if let Some(code) = ended {
        let text = format!("{} has ended already, with exit code {code}", input.command_id);
        return Err(Failure(text));
    }
    call.client().signal(&place.session, &input.command_id, signal).await?;
    let text = format!("Signal {signal} was sent to {}.", input.command_id);
    Ok(Done::new(text, Killed { command_id: input.command_id, signal }))
}

/// See the tool.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct WriteStdin {
    /// What run_command gave.
    command_id: String,
    /// The text; a line has to have its end.
    text: String,
    /// Nothing more will come: the command sees the end of its input.
    #[serde(default)]
    eof: bool,
    /// The session's name; the one of this client, if none is named.
    session: Option<String>,
}

/// That something was written.
#[derive(Serialize, JsonSchema)]
pub(crate) struct Written {
    command_id: String,
    bytes: usize,
}

pub(crate) async fn write_stdin(call: &Call<'_>, input: WriteStdin) -> Result<Done<Written>> {
    let place = call.place(input.session.as_deref()).await?;
    let bytes = input.text.len();
    call.client().input(&place.session, &input.command_id, input.text, input.eof).await?;
    let text = format!("{bytes} bytes were written; read_output reads what it answers.");
    Ok(Done::new(text, Written { command_id: input.command_id, bytes }))
}
