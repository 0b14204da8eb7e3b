//! MCP over HTTP ("streamable HTTP"). A client that begins with `initialize` has a session of the
//! protocol, which is not one of denizen's: it is known by `Mcp-Session-Id`, belongs to whoever
//! began it and to nobody else, and ends when it has not been used for a while. Later versions of
//! the protocol do without.

use std::collections::HashMap;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::{Stream, StreamExt};
use http::{HeaderMap, Method, Request, Response, StatusCode};
use http_body::Body;
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full};
use parking_lot::Mutex;
use rmcp::ServerHandler;
use rmcp::model::{ClientJsonRpcMessage, ServerJsonRpcMessage};
use rmcp::transport::common::server_side_http::{ServerSseMessage, SessionId};
use rmcp::transport::streamable_http_server::session::SessionManager;
use rmcp::transport::streamable_http_server::session::local::{
    LocalSessionManager, LocalSessionManagerError,
};
use rmcp::transport::streamable_http_server::{StreamableHttpServerConfig, StreamableHttpService};
use tokio::time::Instant;

use crate::call::Door;
use crate::output::Outputs;
use crate::server::Server;

/// How many sessions of the protocol a caller may have. One that begins more ends its oldest.
const OF_ONE: usize = 64;
/// How many there may be.
const ALL: usize = 1024;
/// How long one may not be used.
const IDLE: Duration = Duration::from_hours(1);
/// The largest message: a file's content, escaped.
const MESSAGE: usize = 8 << 20;
/// Of the protocol.
const SESSION_ID: &str = "mcp-session-id";

tokio::task_local! {
    /// Who asks, while a request is being looked at.
    static CALLER: String;
}

/// What answers requests to `/mcp`, by a handler of the protocol.
pub struct Http<S = Server> {
    service: StreamableHttpService<S, Sessions>,
    sessions: Arc<Sessions>,
}

impl<S> Clone for Http<S> {
    fn clone(&self) -> Self {
        Self { service: self.service.clone(), sessions: self.sessions.clone() }
    }
}

impl Default for Http {
    /// What serves denizen's sessions, without any session of the protocol yet.
    fn default() -> Self {
        let outputs = Arc::<Outputs>::default();
        Self::new(move || Server::by_request(outputs.clone()))
    }
}

impl<S: ServerHandler> Http<S> {
    /// One that has a handler made for each session of the protocol, or each request without.
    pub fn new(handler: impl Fn() -> S + Send + Sync + 'static) -> Self {
        let sessions = Arc::new(Sessions::new());
        let handler = move || Ok(handler());
        // Whoever serves this has looked at hosts and origins already.
        let config = StreamableHttpServerConfig::default()
            .disable_allowed_hosts()
            .disable_allowed_origins()
            .with_max_request_body_bytes(MESSAGE);
        let service = StreamableHttpService::new(handler, sessions.clone(), config);
        Self { service, sessions }
    }

    /// Answers a request of whoever has this door. Dropped, the request is not answered; what it
    /// has begun in a session of the protocol goes on there.
    pub async fn answer<B>(
        &self,
        door: Door,
        mut request: Request<B>,
    ) -> Response<BoxBody<Bytes, Infallible>>
    where
        B: Body + Send + 'static,
        B::Error: std::fmt::Display,
    {
        let named = named(request.headers());
        if let Some(session) = &named
            && !self.sessions.is_of(session, &door.identity)
        {
            // As the protocol has it for what is not there, so that its client begins anew.
            return refused(StatusCode::NOT_FOUND, "there is no such session of the protocol\n");
        }
        if named.is_none() && self.sessions.is_full(&door.identity) {
            let why = "there are too many sessions of the protocol: try again later\n";
            return refused(StatusCode::SERVICE_UNAVAILABLE, why);
        }
        let caller = door.identity.clone();
        let ends = request.method() == Method::DELETE;
        request.extensions_mut().insert(door);
        let mut response = CALLER.scope(caller, self.service.handle(request)).await;
        if ends && response.status() == StatusCode::ACCEPTED {
            // It has ended, and some clients take nothing else for that.
            *response.status_mut() = StatusCode::NO_CONTENT;
        }
        response
    }
}

fn named(headers: &HeaderMap) -> Option<SessionId> {
    // What is no text is the name of none.
    headers.get(SESSION_ID).map(|id| id.to_str().unwrap_or_default().into())
}

fn refused(status: StatusCode, why: &'static str) -> Response<BoxBody<Bytes, Infallible>> {
    let mut response = Response::new(Full::new(Bytes::from_static(why.as_bytes())).boxed());
    *response.status_mut() = status;
    response
}

/// The sessions of the protocol: whose each is, and when it was last used.
struct Sessions {
    local: Arc<LocalSessionManager>,
    known: Arc<Mutex<HashMap<SessionId, Known>>>,
}

struct Known {
    owner: String,
    used: Instant,
    /// Streams that somebody reads.
    open: usize,
}

impl Sessions {
    fn new() -> Self {
        let mut local = LocalSessionManager::default();
        // It would end one in which a command runs for long and prints nothing.
        local.session_config.keep_alive = None;
        Self { local: Arc::new(local), known: Arc::default() }
    }

    /// Whether it is this caller's; then it is in use.
    fn is_of(&self, id: &SessionId, caller: &str) -> bool {
        let mut known = self.known.lock();
        let Some(session) = known.get_mut(id).filter(|session| session.owner == caller) else {
            return false;
        };
        session.used = Instant::now();
        true
    }

    /// Whether this caller can have no further one.
    fn is_full(&self, caller: &str) -> bool {
        let known = self.known.lock();
        let own = || known.values().filter(|session| session.owner == caller);
        known.len() >= ALL || own().count() >= OF_ONE && own().all(|session| session.open > 0)
    }

    /// The one of this caller's that it has not used for longest, if it can have no further one.
    fn surplus(&self, caller: &str) -> Option<SessionId> {
        let known = self.known.lock();
        let own: Vec<_> = known.iter().filter(|(_, session)| session.owner == caller).collect();
        if own.len() < OF_ONE {
            return None;
        }
        let idle = own.into_iter().filter(|(_, session)| session.open == 0);
        idle.min_by_key(|(_, session)| session.used).map(|(id, _)| id.clone())
    }

    /// Ends a session when it has not been used for long enough.
    async fn end_idle(
        known: Arc<Mutex<HashMap<SessionId, Known>>>,
        local: Arc<LocalSessionManager>,
        id: SessionId,
    ) {
        loop {
            let idle = match known.lock().get(&id) {
                None => return,
                Some(session) if session.open > 0 => Duration::ZERO,
                Some(session) => session.used.elapsed(),
            };
            match IDLE.checked_sub(idle) {
                Some(left) if !left.is_zero() => tokio::time::sleep(left).await,
                _ => break,
            }
        }
        known.lock().remove(&id);
        // It may have ended by itself.
        let _ = local.close_session(&id).await;
    }

    /// A stream of a session, which is in use as long as somebody has that.
    fn used<S: Stream<Item = ServerSseMessage>>(
        &self,
        id: &SessionId,
        stream: S,
    ) -> impl Stream<Item = ServerSseMessage> + use<S> {
        if let Some(session) = self.known.lock().get_mut(id) {
            session.open += 1;
        }
        let open = Open { known: self.known.clone(), id: id.clone() };
        stream.map(move |message| {
            let _ = &open;
            message
        })
    }
}

/// A stream that somebody reads.
struct Open {
    known: Arc<Mutex<HashMap<SessionId, Known>>>,
    id: SessionId,
}

impl Drop for Open {
    fn drop(&mut self) {
        if let Some(session) = self.known.lock().get_mut(&self.id) {
            session.open = session.open.saturating_sub(1);
            session.used = Instant::now();
        }
    }
}

impl SessionManager for Sessions {
    type Error = LocalSessionManagerError;
    type Transport = <LocalSessionManager as SessionManager>::Transport;

    async fn create_session(&self) -> Result<(SessionId, Self::Transport), Self::Error> {
        let owner = CALLER.try_with(Clone::clone).unwrap_or_default();
        if let Some(oldest) = self.surplus(&owner) {
            self.close_session(&oldest).await?;
        }
        let (id, transport) = self.local.create_session().await?;
        let session = Known { owner, used: Instant::now(), open: 0 };
        self.known.lock().insert(id.clone(), session);
        tokio::spawn(Self::end_idle(self.known.clone(), self.local.clone(), id.clone()));
        Ok((id, transport))
    }

    async fn initialize_session(
        &self,
        id: &SessionId,
        message: ClientJsonRpcMessage,
    ) -> Result<ServerJsonRpcMessage, Self::Error> {
        self.local.initialize_session(id, message).await
    }

    async fn has_session(&self, id: &SessionId) -> Result<bool, Self::Error> {
        self.local.has_session(id).await
    }

    async fn close_session(&self, id: &SessionId) -> Result<(), Self::Error> {
        self.known.lock().remove(id);
        self.local.close_session(id).await
    }

    async fn create_stream(
        &self,
        id: &SessionId,
        message: ClientJsonRpcMessage,
    ) -> Result<impl Stream<Item = ServerSseMessage> + Send + Sync + 'static, Self::Error> {
        Ok(self.used(id, self.local.create_stream(id, message).await?))
    }

    async fn accept_message(
        &self,
        id: &SessionId,
        message: ClientJsonRpcMessage,
    ) -> Result<(), Self::Error> {
        self.local.accept_message(id, message).await
    }

    async fn create_standalone_stream(
        &self,
        id: &SessionId,
    ) -> Result<impl Stream<Item = ServerSseMessage> + Send + Sync + 'static, Self::Error> {
        Ok(self.used(id, self.local.create_standalone_stream(id).await?))
    }

    async fn resume(
        &self,
        id: &SessionId,
        last_event_id: String,
    ) -> Result<impl Stream<Item = ServerSseMessage> + Send + Sync + 'static, Self::Error> {
        Ok(self.used(id, self.local.resume(id, last_event_id).await?))
    }
}
