//! Commands in sessions.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use connectrpc::{ConnectError, ErrorCode};
use denizen_agent::envd::{Job, JobInfo, Jobs, Piece, start_detached, start_foreground};
use denizen_agent::{Chunk, Exit, Stream as Source};
use denizen_api::{
    Code, Command, Ended, NewProcess, Output, OutputStream, Process, Processes, Signal, Size,
    Started,
};
use denizen_envd::process as wire;
use denizen_envd::process::__buffa::oneof;
use futures::{Stream, StreamExt, stream};
use serde::{Deserialize, Serialize};
use tokio_util::io::ReaderStream;
use utoipa::IntoParams;

use super::Api;
use super::extract::{Bytes, Json, Path, Query};
use super::refusal::{Answer, Refused};
use super::wire::{Binary, ServerSent};
use crate::lease::Lease;

impl From<ConnectError> for Refused {
    fn from(error: ConnectError) -> Self {
        let code = match error.code {
            ErrorCode::NotFound => Code::NoProgram,
            ErrorCode::InvalidArgument => Code::BadRequest,
            ErrorCode::PermissionDenied => Code::NotExecutable,
            ErrorCode::FailedPrecondition => Code::BadState,
            ErrorCode::ResourceExhausted => Code::TooLarge,
            ErrorCode::Aborted => Code::AtCapacity,
            ErrorCode::Unavailable => Code::ShuttingDown,
            _ => Code::Failed,
        };
        Self::new(code, error.message.unwrap_or_default())
    }
}

fn told(job: JobInfo) -> Process {
    let started_at = job.started_at.duration_since(UNIX_EPOCH).unwrap_or_default();
    Process {
        pid: job.pid,
        tag: job.tag,
        command: job.command,
        cwd: job.cwd,
        terminal: job.terminal,
        foreground: job.foreground,
        started_at: started_at.as_secs_f64(),
        ended: job.ended.map(|(exit, why)| ended(exit, why)),
    }
}

fn ended(exit: Exit, reason: Option<String>) -> Ended {
    let signal = match exit {
        Exit::Code(_) => None,
        Exit::Signal(signal) => Some(signal),
    };
    Ended { code: exit.code(), signal, reason }
}

/// A command that was started in a session through the daemon.
fn find(api: &Api, session: &str, process: &str) -> Answer<Arc<Job>> {
    let id = api.leases.find(session)?;
    api.pool.inspect(id)?;
    api.leases.touch();
    let found = api.leases.jobs(id).and_then(|jobs| jobs.find(process));
    found.ok_or_else(|| {
        let detail = format!("no process {process} was started in session {session}");
        Refused::new(Code::UnknownProcess, detail)
    })
}

/// A command that something is to be done to, and what keeps its session awake for that: one that
/// is frozen would not see it.
async fn reach(api: &Api, session: &str, process: &str) -> Answer<(Arc<Job>, Option<Arc<Lease>>)> {
    let job = find(api, session, process)?;
    if job.info().ended.is_some() {
        // No reason to start a session.
        return Ok((job, None));
    }
    let lease = api.leases.take(api.leases.find(session)?, None).await?;
    Ok((job, Some(lease)))
}

/// List the commands of a session that were started through the daemon.
///
/// Those that have ended in the background are told of for a while.
#[utoipa::path(get, path = "/v1/sessions/{session}/processes", tag = "processes",
    params(("session" = String, Path, description = "Name or UUID")),
    responses((status = 200, body = Processes), Refused))]
pub(crate) async fn list(
    State(api): State<Api>,
    Path(session): Path<String>,
) -> Answer<axum::Json<Processes>> {
    let id = api.leases.find(&session)?;
    api.pool.inspect(id)?;
    let all = api.leases.jobs(id).map(|jobs| jobs.list()).unwrap_or_default();
    Ok(axum::Json(Processes { processes: all.into_iter().map(told).collect() }))
}

/// Run a command in a session, which is made if it is not there.
///
/// With `detach` the answer says that it runs (201). Otherwise it is a stream of server-sent
/// events: `started` (of a `Started`), `output` (of an `Output`), and at last `exit` (of an `Ended`)
/// or `lost` (of a `Problem`); when its reader goes, the command is
/// killed with all that it has started.
#[utoipa::path(post, path = "/v1/sessions/{session}/processes", tag = "processes",
    params(("session" = String, Path, description = "Name or UUID")),
    request_body = NewProcess,
    responses((status = 200, content_type = "text/event-stream", body = ServerSent),
        (status = 201, body = Started), Refused))]
pub(crate) async fn start(
    State(api): State<Api>,
    Path(session): Path<String>,
    headers: HeaderMap,
    Json(new): Json<NewProcess>,
) -> Answer<Response> {
    let id = api.leases.find_or_name(&session).await?;
    let lease = api.leases.take(id, None).await?;
    let (cmd, args) = match new.what {
        Command::Command(words) => {
            let mut words = words.into_iter();
            (words.next().unwrap_or_default(), words.collect())
        }
        Command::Shell(line) => {
            let mut args = lease.guard.shell_args().to_vec();
            args.push(line);
            (lease.guard.shell_path().to_string_lossy().into_owned(), args)
        }
    };
    let config = wire::ProcessConfig {
        cmd,
        args,
        envs: new.env.into_iter().collect(),
        cwd: new.cwd,
        ..Default::default()
    };
    let pty = new.terminal.map(|Size { columns, rows }| {
        let (cols, rows) = (columns.into(), rows.into());
        let size = wire::pty::Size { cols, rows, ..Default::default() };
        wire::PTY { size: size.into(), ..Default::default() }
    });
    let request = wire::StartRequest {
        process: config.into(),
        pty: pty.map(Into::into).unwrap_or_default(),
        tag: new.tag,
        stdin: Some(new.stdin),
        ..Default::default()
    };
    let timeout = new.timeout_seconds.map(Duration::from_secs);
    let instance = lease.instance(&headers)?;
    if new.detach {
        let job = start_detached(&instance, request, timeout).await?.info();
        let started = Started { pid: job.pid, tag: job.tag };
        return Ok((StatusCode::CREATED, axum::Json(started)).into_response());
    }
    let events = start_foreground(&instance, request, timeout).await?;
    let mut offset = 0;
    let events = events.filter_map(move |event| {
        let event = match event {
            Ok(event) => foreground(event, &mut offset),
            Err(error) => Some(sse("lost", &Refused::from(error).0)),
        };
        std::future::ready(event)
    });
    Ok(streamed(events))
}

/// An event of envd's in the words of the API.
fn foreground(event: wire::ProcessEvent, offset: &mut u64) -> Option<Event> {
    use oneof::process_event::Event as Kind;
    use oneof::process_event::data_event::Output as Printed;
    Some(match event.event? {
        Kind::Start(start) => sse("started", &Started { pid: start.pid, tag: None }),
        Kind::Data(data) => {
            let (stream, bytes) = match data.output? {
                Printed::Stdout(bytes) => (OutputStream::Stdout, bytes),
                Printed::Stderr(bytes) => (OutputStream::Stderr, bytes),
                Printed::Pty(bytes) => (OutputStream::Terminal, bytes),
            };
            let at = *offset;
            *offset += bytes.len() as u64;
            sse("output", &Output { stream, offset: at, bytes: STANDARD.encode(bytes) })
        }
        Kind::End(end) => {
            let signal = (!end.exited).then(|| end.exit_code - 128);
            sse("exit", &Ended { code: end.exit_code, signal, reason: end.error })
        }
        // The stream has its own.
        Kind::Keepalive(_) => return None,
    })
}

fn sse(kind: &str, data: &impl Serialize) -> Event {
    // Strings and numbers: this cannot fail.
    let data = serde_json::to_string(data).unwrap_or_default();
    Event::default().event(kind).data(data)
}

fn streamed(events: impl Stream<Item = Event> + Send + 'static) -> Response {
    let events = events.map(Ok::<_, Infallible>);
    Sse::new(events).keep_alive(KeepAlive::default()).into_response()
}

/// From where on.
#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct Place {
    /// Skip so many bytes of what it has printed.
    #[serde(default)]
    from: u64,
}

#[derive(Serialize)]
struct Gap {
    from: u64,
    to: u64,
}

/// Read what a command in the background prints, and has printed, as far back as that is kept.
///
/// Server-sent events: `output` (of an `Output`), each with an id by which a later request goes on
/// (`Last-Event-ID`); `gap`, where something is not kept any more; at last `exit` or `lost`. What
/// reads slowly misses some, and does not slow the command down.
#[utoipa::path(get, path = "/v1/sessions/{session}/processes/{process}/output", tag = "processes",
    params(("session" = String, Path, description = "Name or UUID"),
        ("process" = String, Path, description = "Its number or its tag"), Place,
        ("Last-Event-ID" = Option<String>, Header, description = "The last one that was seen")),
    responses((status = 200, content_type = "text/event-stream", body = ServerSent), Refused))]
pub(crate) async fn output(
    State(api): State<Api>,
    Path((session, process)): Path<(String, String)>,
    Query(Place { from }): Query<Place>,
    headers: HeaderMap,
) -> Answer<Response> {
    let job = find(&api, &session, &process)?;
    let last = headers.get("last-event-id").and_then(|id| id.to_str().ok()?.parse().ok());
    let pieces = job.read(last.unwrap_or(from)).ok_or_else(|| {
        let detail = "only the request that started a command in the foreground reads its output";
        Refused::new(Code::BadState, detail)
    })?;
    Ok(streamed(pieces.map(|piece| match piece {
        Piece::Gap { from, to } => sse("gap", &Gap { from, to }).id(to.to_string()),
        Piece::Output { offset, chunk: Chunk { stream, bytes } } => {
            let stream = match stream {
                Source::Stdout => OutputStream::Stdout,
                Source::Stderr => OutputStream::Stderr,
                Source::Pty => OutputStream::Terminal,
            };
            let after = offset + bytes.len() as u64;
            let output = Output { stream, offset, bytes: STANDARD.encode(bytes) };
            sse("output", &output).id(after.to_string())
        }
        Piece::End(exit, why) => sse("exit", &ended(exit, why)),
        Piece::Lost(why) => sse("lost", &denizen_api::Problem::new(Code::Failed, why)),
    })))
}

/// Whether it is the end.
#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct Last {
    /// Nothing more will come.
    #[serde(default)]
    eof: bool,
}

/// Write to a command's standard input or terminal.
#[utoipa::path(post, path = "/v1/sessions/{session}/processes/{process}/input", tag = "processes",
    params(("session" = String, Path, description = "Name or UUID"),
        ("process" = String, Path, description = "Its number or its tag"), Last),
    request_body(content = Binary, content_type = "application/octet-stream"),
    responses((status = 204, description = "It is written"), Refused))]
pub(crate) async fn input(
    State(api): State<Api>,
    Path((session, process)): Path<(String, String)>,
    Query(Last { eof }): Query<Last>,
    Bytes(bytes): Bytes,
) -> Answer<StatusCode> {
    let (job, lease) = reach(&api, &session, &process).await?;
    if !bytes.is_empty() {
        let stopped = async {
            match &lease {
                Some(lease) => lease.ended().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            written = job.write(&bytes) => written?,
            () = stopped => return Err(Refused::stopped()),
        }
    }
    if eof {
        job.close_stdin().await?;
    }
    Ok(StatusCode::NO_CONTENT)
}

/// Send a signal to a command and its group; 9 to all that it has started.
#[utoipa::path(post, path = "/v1/sessions/{session}/processes/{process}/signal", tag = "processes",
    params(("session" = String, Path, description = "Name or UUID"),
        ("process" = String, Path, description = "Its number or its tag")),
    request_body = Signal, responses((status = 204, description = "It is sent"), Refused))]
pub(crate) async fn signal(
    State(api): State<Api>,
    Path((session, process)): Path<(String, String)>,
    Json(Signal { signal }): Json<Signal>,
) -> Answer<StatusCode> {
    if !(1..=64).contains(&signal) {
        return Err(Refused::new(Code::BadRequest, "signals are from 1 to 64 (signal(7))"));
    }
    let (job, _lease) = reach(&api, &session, &process).await?;
    job.signal(signal).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Set the size of a command's terminal.
#[utoipa::path(put, path = "/v1/sessions/{session}/processes/{process}/size", tag = "processes",
    params(("session" = String, Path, description = "Name or UUID"),
        ("process" = String, Path, description = "Its number or its tag")),
    request_body = Size, responses((status = 204, description = "It is set"), Refused))]
pub(crate) async fn resize(
    State(api): State<Api>,
    Path((session, process)): Path<(String, String)>,
    Json(Size { columns, rows }): Json<Size>,
) -> Answer<StatusCode> {
    if columns == 0 || rows == 0 {
        return Err(Refused::new(Code::BadRequest, "a terminal has a column and a row at least"));
    }
    let (job, _lease) = reach(&api, &session, &process).await?;
    job.resize(columns, rows)?;
    Ok(StatusCode::NO_CONTENT)
}

/// Read what a detached command has printed, as far as its bounded log goes back.
#[utoipa::path(get, path = "/v1/sessions/{session}/logs/{job}", tag = "processes",
    params(("session" = String, Path, description = "Name or UUID"),
        ("job" = String, Path, description = "Its number or its tag")),
    responses((status = 200, content_type = "application/octet-stream", body = Binary), Refused))]
pub(crate) async fn log(
    State(api): State<Api>,
    Path((session, job)): Path<(String, String)>,
) -> Answer<Response> {
    let id = api.leases.find(&session)?;
    let logs = api.pool.session_folder(id)?.join("logs");
    let files = Jobs::log(&logs, &job);
    if files.is_empty() {
        let detail = format!("session {session} has no log of a detached command {job}");
        return Err(Refused::new(Code::NoLog, detail));
    }
    let pieces = stream::iter(files).then(tokio::fs::File::open).flat_map(|file| match file {
        Ok(file) => ReaderStream::new(file).left_stream(),
        Err(error) => stream::iter([Err(error)]).right_stream(),
    });
    Ok(Body::from_stream(pieces).into_response())
}
