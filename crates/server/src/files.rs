//! Files of sessions that have a root of their own: served by an agent within, which this
//! module starts when it is first needed and hands requests to. It must never look at a
//! session's files itself: paths mean something only within, and links there could lead it
//! anywhere. Nor may it trust the agent, which the session's own programs may have replaced:
//! what it answers is passed on, bounded in size, and waited for only so long.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::header::CONTENT_SECURITY_POLICY;
use axum::http::response::Parts;
use axum::http::{HeaderMap, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use connectrpc::ConnectError;
use denizen_agent::envd::{USER, named, no_such_user};
use denizen_agent::init::Spawned;
use denizen_api::UPLOAD_OFFSET;
use denizen_envd::MODE;
use futures::StreamExt;
use hyper::body::{Body as _, Incoming};
use hyper::client::conn::http2::{self, SendRequest};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use parking_lot::Mutex;
use tokio::net::UnixStream;
use tokio::time::Instant;

use crate::lease::{Lease, Resolver};

/// The most that an agent's headers may have, in bytes.
const HEADERS: u32 = 16 * 1024;
/// What of an answer is held when its reader is slow, and of all answers of a session: as many of
/// these as that has are held without being in the way of another one.
const WINDOW: u32 = 256 * 1024;
const WINDOWS: u32 = 16 * 1024 * 1024;
/// How long an agent may take to begin its answer, or to take a part of a request. Deleting a
/// large tree takes a while.
const PATIENCE: Duration = Duration::from_mins(5);
/// How often an agent that has requests open is asked for a sign of life, and how long it may
/// take to give one.
const SIGN_OF_LIFE: [Duration; 2] = [Duration::from_secs(20), Duration::from_mins(1)];

/// The request after which an agent has something to remember.
const WATCHES: &str = "/filesystem.Filesystem/CreateWatcher";

/// A session's agent within, if it has been needed.
#[derive(Default)]
pub(crate) struct Within {
    serving: tokio::sync::Mutex<Option<Serving>>,
    /// Whether it watches something for a client who will ask.
    watches: AtomicBool,
}

struct Serving {
    requests: SendRequest<Body>,
    /// Dropping it ends the agent.
    _program: Spawned,
}

impl Within {
    /// A way to the agent of the session; starts it if none answers.
    async fn requests(&self, lease: &Lease) -> Result<SendRequest<Body>, ConnectError> {
        let failed = |error: &dyn std::fmt::Display| {
            ConnectError::internal(format!("the session's files cannot be served: {error}"))
        };
        let mut serving = self.serving.lock().await;
        if let Some(serving) = serving.as_ref().filter(|serving| !serving.requests.is_closed()) {
            return Ok(serving.requests.clone());
        }
        let guard = &lease.guard;
        let mut command = guard.agent_command().ok_or_else(|| failed(&"no agent is there"))?;
        command.push("agent".into());
        let (ours, theirs) = UnixStream::pair().map_err(|error| failed(&error))?;
        let theirs = theirs.into_std().map_err(|error| failed(&error))?;
        let env = guard.base_environment().into_iter();
        let env = env.map(|(name, value)| (name.into(), value.into())).collect();
        let agent = guard.agent().map_err(|error| failed(&error))?;
        let program =
            agent.spawn_service(command, env, guard.workdir().to_owned(), OwnedFd::from(theirs));
        let program = program.await.map_err(|error| failed(&error))?;
        let requests = speak_to(ours).await.map_err(|error| failed(&error))?;
        *serving = Some(Serving { requests: requests.clone(), _program: program });
        self.watches.store(false, Ordering::Relaxed);
        Ok(requests)
    }

    /// Ends the agent: the next request starts another.
    async fn give_up(&self) {
        *self.serving.lock().await = None;
    }

    /// Whether it has to be there when nobody uses the session: its clients ask later for what it
    /// has seen meanwhile.
    pub(crate) fn is_watching(&self) -> bool {
        let answers = || {
            let serving = self.serving.try_lock();
            serving.map_or(true, |it| it.as_ref().is_some_and(|it| !it.requests.is_closed()))
        };
        self.watches.load(Ordering::Relaxed) && answers()
    }
}

/// Begins to speak to an agent.
async fn speak_to(agent: UnixStream) -> hyper::Result<SendRequest<Body>> {
    let [every, within] = SIGN_OF_LIFE;
    let (requests, connection) = http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .max_header_list_size(HEADERS)
        .initial_stream_window_size(WINDOW)
        .initial_connection_window_size(WINDOWS)
        .keep_alive_interval(every)
        .keep_alive_timeout(within)
        .handshake(TokioIo::new(agent))
        .await?;
    tokio::spawn(connection);
    Ok(requests)
}

/// Asks an agent, and waits until its answer begins.
async fn ask(
    requests: &mut SendRequest<Body>,
    request: Request,
    patience: Duration,
) -> Result<Response<Incoming>, ConnectError> {
    // Since when the agent is the one that has to do something: it is not its fault when a
    // client takes its time to send.
    let owing = Arc::new(Mutex::new(Some(Instant::now())));
    let (parts, body) = request.into_parts();
    let body = if body.is_end_stream() {
        body
    } else {
        let (owing, mut body) = (owing.clone(), body.into_data_stream());
        Body::from_stream(futures::stream::poll_fn(move |context| {
            *owing.lock() = None;
            let piece = body.poll_next_unpin(context);
            if piece.is_ready() {
                *owing.lock() = Some(Instant::now());
            }
            piece
        }))
    };
    let silence = async {
        loop {
            let since = owing.lock().unwrap_or_else(Instant::now);
            if since.elapsed() >= patience {
                return;
            }
            tokio::time::sleep_until(since + patience).await;
        }
    };
    tokio::select! {
        answer = requests.send_request(Request::from_parts(parts, body)) => {
            answer.map_err(|error| {
                ConnectError::unavailable(format!("the session's agent is gone: {error}"))
            })
        }
        () = silence => Err(ConnectError::deadline_exceeded(format!(
            "the session's agent has not answered for {} seconds: it is ended",
            patience.as_secs()
        ))),
    }
}

/// Should a browser show it, it is nothing of ours: it has the origin of nobody, and runs nothing.
pub(crate) fn secure(mut response: Response) -> Response {
    let nothing = HeaderValue::from_static("sandbox; default-src 'none'");
    response.headers_mut().insert(CONTENT_SECURITY_POLICY, nothing);
    response
}

/// Hands a request to the agent within the session that it is for.
pub(crate) async fn forward(State(resolver): State<Arc<Resolver>>, request: Request) -> Response {
    match hand_over(&resolver, request).await {
        Ok(response) => secure(response),
        Err(error) => {
            let status = match error.code {
                connectrpc::ErrorCode::InvalidArgument => StatusCode::BAD_REQUEST,
                connectrpc::ErrorCode::Unauthenticated => StatusCode::UNAUTHORIZED,
                connectrpc::ErrorCode::DeadlineExceeded => StatusCode::GATEWAY_TIMEOUT,
                connectrpc::ErrorCode::Unimplemented => StatusCode::BAD_GATEWAY,
                connectrpc::ErrorCode::ResourceExhausted => StatusCode::INSUFFICIENT_STORAGE,
                connectrpc::ErrorCode::FailedPrecondition => StatusCode::CONFLICT,
                connectrpc::ErrorCode::Aborted | connectrpc::ErrorCode::Unavailable => {
                    StatusCode::SERVICE_UNAVAILABLE
                }
                _ => StatusCode::INTERNAL_SERVER_ERROR,
            };
            // Both as Connect tells an error and as `/files` does.
            let body = serde_json::json!({
                "code": error.code.as_str(),
                "message": error.message.unwrap_or_default(),
            });
            (status, axum::Json(body)).into_response()
        }
    }
}

async fn hand_over(resolver: &Resolver, request: Request) -> Result<Response, ConnectError> {
    pass(resolver.lease(request.headers()).await?, request).await
}

/// Passes a request to the session's agent, and its answer back.
pub(crate) async fn pass(lease: Arc<Lease>, request: Request) -> Result<Response, ConnectError> {
    let limits = lease.guard.limit_watch();
    let mut requests = lease.within.requests(&lease).await?;
    if request.uri().path() == WATCHES {
        lease.within.watches.store(true, Ordering::Relaxed);
    }
    let request = for_the_agent(request, lease.defaults.user.as_deref())?;
    let answer = tokio::select! {
        answer = ask(&mut requests, request, PATIENCE) => answer,
        () = lease.ended() => Err(ConnectError::aborted("the session is being stopped")),
    };
    let response = match answer {
        Err(error) if error.code == connectrpc::ErrorCode::DeadlineExceeded => {
            lease.within.give_up().await;
            return Err(error);
        }
        Err(error) if error.code == connectrpc::ErrorCode::Unavailable => {
            // Perhaps it was ended with all else that ran there.
            let limit = limits.reached(denizen_agent::Exit::Signal(9));
            let refused = limit.map(|limit| ConnectError::resource_exhausted(limit.to_string()));
            return Err(refused.unwrap_or(error));
        }
        answer => answer?,
    };
    let (mut parts, body) = response.into_parts();
    from_the_agent(&mut parts)?;
    let body = lease.hold(body).of(&parts.headers);
    Ok(Response::from_parts(parts, Body::new(body)))
}

/// The headers of an agent's answer that are passed on. Whatever else it says would count for all
/// of our origin, and it may be whoever runs within.
const PASSED: [&str; 14] = [
    "accept-ranges",
    "cache-control",
    "connect-accept-encoding",
    "connect-content-encoding",
    "content-disposition",
    "content-encoding",
    "content-length",
    "content-range",
    "content-type",
    "etag",
    "last-modified",
    UPLOAD_OFFSET,
    "vary",
    MODE,
];

/// An agent's answer as a client gets it. It leads nowhere else: a client could follow it with
/// what lets it in here.
fn from_the_agent(parts: &mut Parts) -> Result<(), ConnectError> {
    let status = parts.status;
    let leads_away = status.is_redirection() && status != StatusCode::NOT_MODIFIED;
    if status.is_informational() || leads_away {
        return Err(ConnectError::unimplemented(format!("the session's agent answers {status}")));
    }
    let mut passed = HeaderMap::new();
    for name in PASSED {
        if let Some(value) = parts.headers.get(name) {
            passed.insert(name, value.clone());
        }
    }
    parts.headers = passed;
    Ok(())
}

/// A request as the agent within gets it: for whom is said in a header that only the daemon sets.
fn for_the_agent(request: Request, default_user: Option<&str>) -> Result<Request, ConnectError> {
    let (mut parts, body) = request.into_parts();
    let user = named(&parts.headers).or_else(|| default_user.map(str::to_owned));
    let uri = format!("http://within{}", parts.uri.path_and_query().map_or("/", |it| it.as_str()));
    parts.uri = uri.parse().map_err(|error: axum::http::uri::InvalidUri| {
        ConnectError::invalid_argument(error.to_string())
    })?;
    parts.version = axum::http::Version::HTTP_2;
    drop_hop_by_hop(&mut parts.headers);
    drop_credentials(&mut parts.headers);
    parts.headers.remove(USER);
    if let Some(user) = user {
        let value = user.parse().map_err(|_| no_such_user(&user))?;
        parts.headers.insert(USER, value);
    }
    // Which has no place in HTTP/2.
    parts.headers.remove("host");
    Ok(Request::from_parts(parts, body))
}

/// What lets a client in here is nothing for what runs within.
pub(crate) fn drop_credentials(headers: &mut HeaderMap) {
    for name in ["authorization", "cookie", "proxy-authorization", "x-api-key", "x-access-token"] {
        headers.remove(name);
    }
}

/// What is about one connection only (RFC 9110, 7.6.1).
pub(crate) fn drop_hop_by_hop(headers: &mut HeaderMap) {
    let named: Vec<_> = headers
        .get_all("connection")
        .iter()
        .filter_map(|names| names.to_str().ok())
        .flat_map(|names| names.split(','))
        .map(|name| name.trim().to_owned())
        .collect();
    let always =
        ["connection", "keep-alive", "proxy-connection", "te", "transfer-encoding", "upgrade"];
    for name in always.into_iter().chain(named.iter().map(String::as_str)) {
        headers.remove(name);
    }
}

#[cfg(test)]
mod tests;
