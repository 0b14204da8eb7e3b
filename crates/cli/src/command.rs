//! `exec` and `shell`: a command in a session, joined to this program's standard streams.

use std::collections::HashMap;
use std::io::IsTerminal;
use std::os::fd::AsFd;

use buffa::MessageField;
use clap::Args;
use connectrpc::client::CallOptions;
use connectrpc::{ConnectError, ErrorCode};
use denizen_envd::process as wire;
use denizen_envd::process::__buffa::oneof;
use rustix::termios::{OptionalActions, Termios, Winsize, tcgetwinsize};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::signal::unix::{SignalKind, signal};

use crate::client::{Client, Processes};
use crate::config::Settings;
use crate::{FAILED, Failure, Result};

/// Run a command in a session.
#[derive(Args)]
pub struct Exec {
    /// Leave it running and print its number; `denizen logs` shows its output
    #[arg(short, long, conflicts_with = "tty")]
    detach: bool,
    /// Give it a terminal
    #[arg(short, long)]
    tty: bool,
    /// Set a variable of its environment
    #[arg(short, long = "env", value_name = "NAME=VALUE")]
    env: Vec<String>,
    /// Start it in this folder; relative to the session's volume
    #[arg(short, long, value_name = "FOLDER")]
    workdir: Option<String>,
    /// Kill it with all it started after this many seconds
    #[arg(long, value_name = "SECONDS")]
    timeout: Option<u64>,
    /// A name to find it by, for `denizen logs`
    #[arg(long)]
    tag: Option<String>,
    /// Name or UUID of the session
    session: String,
    /// The command and its arguments
    #[arg(trailing_var_arg = true, required = true)]
    command: Vec<String>,
}

/// Runs `denizen exec`; gives the command's exit code.
pub async fn exec(client: &Client, exec: Exec, json: bool) -> Result<i32> {
    let mut envs = HashMap::new();
    for variable in &exec.env {
        let (name, value) = variable
            .split_once('=')
            .ok_or_else(|| Failure::new(format!("--env {variable}: write it as NAME=VALUE")))?;
        envs.insert(name.to_owned(), value.to_owned());
    }
    let mut words = exec.command.into_iter();
    let config = wire::ProcessConfig {
        cmd: words.next().unwrap_or_default(),
        args: words.collect(),
        envs: envs.into_iter().collect(),
        cwd: exec.workdir,
        ..Default::default()
    };
    let request = wire::StartRequest {
        process: config.into(),
        pty: if exec.tty { pty().into() } else { MessageField::default() },
        tag: exec.tag,
        stdin: Some(!exec.detach),
        ..Default::default()
    };
    let mut options = options(&exec.session)?;
    if let Some(seconds) = exec.timeout {
        options = options.with_timeout(std::time::Duration::from_secs(seconds));
    }
    let processes = client.processes();
    if exec.detach {
        let options = options.with_header(denizen_envd::DETACH, "1");
        return detach(&processes, request, options, json).await;
    }
    let options = options.with_header(denizen_envd::FOREGROUND, "1");
    let raw = if exec.tty { RawTerminal::enter()? } else { None };
    let code = attach(&processes, &exec.session, request, options, exec.tty).await;
    drop(raw);
    code
}

/// Runs `denizen shell`.
pub async fn shell(client: &Client, settings: &Settings, session: String) -> Result<i32> {
    if !std::io::stdin().is_terminal() {
        return Err(Failure::new("standard input is not a terminal: use `denizen exec`"));
    }
    let shell = settings.pool.shell.to_string_lossy().into_owned();
    let mut envs = HashMap::new();
    if let Ok(terminal) = std::env::var("TERM") {
        envs.insert("TERM".to_owned(), terminal);
    }
    let config = wire::ProcessConfig {
        cmd: shell,
        args: vec!["-l".to_owned()],
        envs: envs.into_iter().collect(),
        ..Default::default()
    };
    let request =
        wire::StartRequest { process: config.into(), pty: pty().into(), ..Default::default() };
    let options = options(&session)?.with_header(denizen_envd::FOREGROUND, "1");
    let processes = client.processes();
    let raw = RawTerminal::enter()?;
    let code = attach(&processes, &session, request, options, true).await;
    drop(raw);
    code
}

fn options(session: &str) -> Result<CallOptions> {
    CallOptions::default()
        .try_with_header(denizen_server::SESSION, session)
        .map_err(|_| Failure::new(format!("{session:?} cannot name a session")))
}

/// Starts the command and leaves as soon as it runs.
async fn detach(
    processes: &Processes,
    request: wire::StartRequest,
    options: CallOptions,
    json: bool,
) -> Result<i32> {
    let mut events =
        processes.start_with_options(request, options).await.map_err(|error| refused(&error))?;
    let first = events.message().await.map_err(|error| refused(&error))?;
    match first.and_then(|message| message.to_owned_message().event.into_option()?.event) {
        Some(oneof::process_event::Event::Start(start)) => {
            if json {
                println!("{}", serde_json::json!({ "pid": start.pid }));
            } else {
                println!("{}", start.pid);
            }
            Ok(0)
        }
        _ => Err(Failure::new("the daemon did not say that the command runs")),
    }
}

/// Runs the command with our standard streams as its own.
async fn attach(
    processes: &Processes,
    session: &str,
    request: wire::StartRequest,
    options: CallOptions,
    tty: bool,
) -> Result<i32> {
    let mut interrupt = listen(SignalKind::interrupt())?;
    let mut terminate = listen(SignalKind::terminate())?;
    let mut hangup = listen(SignalKind::hangup())?;
    let mut quit = listen(SignalKind::quit())?;
    let mut resized = listen(SignalKind::window_change())?;
    let mut events =
        processes.start_with_options(request, options).await.map_err(|error| refused(&error))?;
    let mut stdout = tokio::io::stdout();
    let mut stderr = tokio::io::stderr();
    let mut pid = None;
    loop {
        let sent = tokio::select! {
            message = events.message() => match message.map_err(|error| refused(&error))? {
                Some(message) => {
                    let event = message.to_owned_message().event.into_option();
                    match event.and_then(|event| event.event) {
                        Some(oneof::process_event::Event::Start(start)) => {
                            pid = Some(start.pid);
                            let input = Input { session: session.to_owned(), pid: start.pid, tty };
                            tokio::spawn(input.forward(processes.clone()));
                        }
                        Some(oneof::process_event::Event::Data(data)) => {
                            use oneof::process_event::data_event::Output;
                            let written = match data.output {
                                Some(Output::Stdout(bytes) | Output::Pty(bytes)) => {
                                    write(&mut stdout, &bytes).await
                                }
                                Some(Output::Stderr(bytes)) => write(&mut stderr, &bytes).await,
                                None => Ok(()),
                            };
                            // Nobody reads us any more: as for any program in a pipe, that is
                            // the end, and leaving kills the command.
                            if written.is_err() {
                                return Ok(128 + 13);
                            }
                        }
                        Some(oneof::process_event::Event::End(end)) => {
                            if let Some(why) = end.error {
                                // A terminal is raw here: the line begins where it left off.
                                let start = if tty { "\r\n" } else { "" };
                                let end = if tty { "\r\n" } else { "\n" };
                                eprint!("{start}denizen: {why}{end}");
                            }
                            return Ok(end.exit_code);
                        }
                        Some(oneof::process_event::Event::Keepalive(_)) | None => {}
                    }
                    continue;
                }
                None => return Err(Failure::new("the daemon has gone; the command was killed")),
            },
            _ = interrupt.recv() => wire::Signal::SIGNAL_SIGINT,
            _ = terminate.recv() => wire::Signal::SIGNAL_SIGTERM,
            _ = quit.recv() => wire::Signal::SIGNAL_SIGQUIT,
            _ = hangup.recv() => wire::Signal::SIGNAL_SIGHUP,
            _ = resized.recv() => {
                if let (true, Some(pid)) = (tty, pid) {
                    let request = wire::UpdateRequest {
                        process: selector(pid).into(),
                        pty: pty().into(),
                        ..Default::default()
                    };
                    // A terminal of the wrong size is no reason to end.
                    let _ = processes.update_with_options(request, options_for(session)).await;
                }
                continue;
            }
        };
        let Some(pid) = pid else { return Ok(128 + sent as i32) };
        let request = wire::SendSignalRequest {
            process: selector(pid).into(),
            signal: sent.into(),
            ..Default::default()
        };
        // If it has just ended, its end is on its way.
        let _ = processes.send_signal_with_options(request, options_for(session)).await;
    }
}

async fn write(
    stream: &mut (impl tokio::io::AsyncWrite + Unpin),
    bytes: &[u8],
) -> std::io::Result<()> {
    stream.write_all(bytes).await?;
    stream.flush().await
}

fn listen(kind: SignalKind) -> Result<tokio::signal::unix::Signal> {
    signal(kind).map_err(|error| Failure::new(format!("cannot listen for signals: {error}")))
}

fn options_for(session: &str) -> CallOptions {
    // The name has passed as a header before.
    options(session).unwrap_or_default()
}

fn selector(pid: u32) -> wire::ProcessSelector {
    wire::ProcessSelector {
        selector: Some(oneof::process_selector::Selector::Pid(pid)),
        ..Default::default()
    }
}

/// The size of our terminal, for the command's.
fn pty() -> wire::PTY {
    let size = tcgetwinsize(std::io::stdin())
        .or_else(|_| tcgetwinsize(std::io::stdout()))
        .or_else(|_| tcgetwinsize(std::io::stderr()));
    let (cols, rows) =
        size.map_or((80, 24), |size: Winsize| (size.ws_col.max(1), size.ws_row.max(1)));
    let size = wire::pty::Size { cols: cols.into(), rows: rows.into(), ..Default::default() };
    wire::PTY { size: size.into(), ..Default::default() }
}

/// Our standard input, on its way to a command.
struct Input {
    session: String,
    pid: u32,
    tty: bool,
}

impl Input {
    async fn forward(self, processes: Processes) {
        let mut stdin = tokio::io::stdin();
        let mut buffer = vec![0; 64 * 1024];
        loop {
            let bytes = match stdin.read(&mut buffer).await {
                Ok(0) | Err(_) => break,
                Ok(count) => buffer[..count].to_vec(),
            };
            use oneof::process_input::Input as Kind;
            let input = if self.tty { Kind::Pty(bytes) } else { Kind::Stdin(bytes) };
            let request = wire::SendInputRequest {
                process: selector(self.pid).into(),
                input: wire::ProcessInput { input: Some(input), ..Default::default() }.into(),
                ..Default::default()
            };
            let sent = processes.send_input_with_options(request, options_for(&self.session));
            if sent.await.is_err() {
                // It does not read any more, or has ended.
                return;
            }
        }
        if !self.tty {
            let request = wire::CloseStdinRequest {
                process: selector(self.pid).into(),
                ..Default::default()
            };
            let _ = processes.close_stdin_with_options(request, options_for(&self.session)).await;
        }
    }
}

/// How a refusal to start is told: as env(1) would.
fn refused(error: &ConnectError) -> Failure {
    let code = match error.code {
        ErrorCode::NotFound => 127,
        ErrorCode::PermissionDenied | ErrorCode::ResourceExhausted => 126,
        // As timeout(1).
        ErrorCode::DeadlineExceeded => 124,
        _ => FAILED,
    };
    let message = error.message.clone().unwrap_or_else(|| error.to_string());
    Failure::with_code(code, message)
}

/// Our terminal without line editing, echo and signals of its own; put right when dropped.
pub struct RawTerminal(Termios);

impl RawTerminal {
    /// None if standard input is no terminal.
    pub fn enter() -> Result<Option<Self>> {
        let stdin = std::io::stdin();
        if !stdin.is_terminal() {
            return Ok(None);
        }
        let failed = |error| Failure::new(format!("cannot set the terminal up: {error}"));
        let before = rustix::termios::tcgetattr(stdin.as_fd()).map_err(failed)?;
        let mut raw = before.clone();
        raw.make_raw();
        rustix::termios::tcsetattr(stdin.as_fd(), OptionalActions::Now, &raw).map_err(failed)?;
        Ok(Some(Self(before)))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        // If this fails the terminal is gone.
        let stdin = std::io::stdin();
        let _ = rustix::termios::tcsetattr(stdin.as_fd(), OptionalActions::Now, &self.0);
    }
}
