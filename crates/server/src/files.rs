//! Files of sessions that have a root of their own: served by an agent within, which this
//! module starts when it is first needed and hands requests to. It must never look at a
//! session's files itself: paths mean something only within, and links there could lead it
//! anywhere.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use connectrpc::ConnectError;
use denizen_agent::init::Spawned;
use hyper::client::conn::http2::SendRequest;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::UnixStream;

use crate::lease::{Lease, Resolver};

/// A session's agent within, if it has been needed.
#[derive(Default)]
pub(crate) struct Within(tokio::sync::Mutex<Option<Serving>>);

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
        let mut serving = self.0.lock().await;
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
        let (requests, connection) =
            hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(ours))
                .await
                .map_err(|error| failed(&error))?;
        tokio::spawn(connection);
        *serving = Some(Serving { requests: requests.clone(), _program: program });
        Ok(requests)
    }
}

/// Hands a request to the agent within the session that it is for.
pub(crate) async fn forward(State(resolver): State<Arc<Resolver>>, request: Request) -> Response {
    match hand_over(&resolver, request).await {
        Ok(response) => response,
        Err(error) => {
            let status = match error.code {
                connectrpc::ErrorCode::InvalidArgument => StatusCode::BAD_REQUEST,
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
    let lease = resolver.lease(request.headers()).await?;
    let mut requests = lease.within.requests(&lease).await?;
    let (mut parts, body) = request.into_parts();
    let uri = format!("http://within{}", parts.uri.path_and_query().map_or("/", |it| it.as_str()));
    parts.uri = uri.parse().map_err(|error: axum::http::uri::InvalidUri| {
        ConnectError::invalid_argument(error.to_string())
    })?;
    parts.version = axum::http::Version::HTTP_2;
    drop_hop_by_hop(&mut parts.headers);
    let response = requests.send_request(Request::from_parts(parts, body)).await;
    let response = response.map_err(|error| {
        ConnectError::unavailable(format!("the session's agent is gone: {error}"))
    })?;
    // The session stays in use until the last byte is out.
    let (parts, body) = response.into_parts();
    let body = axum::body::Body::new(body).into_data_stream();
    let body = futures::StreamExt::map(body, move |piece| {
        let _ = &lease;
        piece
    });
    Ok(Response::from_parts(parts, Body::from_stream(body)))
}

/// What is about one connection only (RFC 9110, 7.6.1), and has no place in HTTP/2.
fn drop_hop_by_hop(headers: &mut HeaderMap) {
    for name in ["connection", "host", "keep-alive", "te", "transfer-encoding", "upgrade"] {
        headers.remove(name);
    }
}
