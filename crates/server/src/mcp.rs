//! `/mcp`: sessions for clients of MCP. What such a client asks for is asked for once more by the
//! daemon itself, at `/v1` and with the same key, so that each thing that is done passes the guard
//! as if it had been asked for there. Nothing here may touch a session in any other way.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::HeaderMap;
use axum::http::header::HOST;
use axum::http::uri::Authority;
use axum::response::{IntoResponse, Response};
use axum::routing::any;
use axum::{Extension, Router};
use denizen_api::Code;
use denizen_client::{Client, Target};
use denizen_mcp::{Door, Http, Ports};

use crate::SESSION;
use crate::access::guard::secrets;
use crate::access::{Access, Caller, Peer};
use crate::api::Refused;
use crate::connections::{self, Connections};

/// What answers.
#[derive(Clone)]
struct Mcp {
    http: Http,
    /// All other routes, with their guard.
    app: Router,
    access: Arc<Access>,
    connections: Connections,
}

/// The one route.
pub(crate) fn router(app: Router, access: Arc<Access>, connections: Connections) -> Router {
    let mcp = Mcp { http: Http::default(), app, access, connections };
    Router::new().route("/mcp", any(answer)).with_state(mcp)
}

async fn answer(
    State(mcp): State<Mcp>,
    Extension(peer): Extension<Peer>,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Response {
    let headers = request.headers();
    let ports = mcp.ports(&peer, &request);
    let (app, all) = (mcp.app, mcp.connections);
    let connect = move || -> Box<dyn denizen_client::Stream> {
        Box::new(connections::within(peer.clone(), app.clone(), &all))
    };
    let target = match Target::within(connect, secrets(headers).next()) {
        Ok(target) => target,
        Err(error) => return Refused::new(Code::BadRequest, error.to_string()).into_response(),
    };
    let door = Door {
        client: Client::new(target),
        identity: caller.identity(),
        session: session(headers),
        ports,
    };
    mcp.http.answer(door, request).await.map(Body::new)
}

/// The session for all calls that name none.
fn session(headers: &HeaderMap) -> Option<String> {
    headers.get(SESSION)?.to_str().ok().map(str::to_owned)
}

impl Mcp {
    /// Where ports of sessions are reached by whoever has asked here by TCP: by the name that he
    /// has asked by, which is one of ours.
    fn ports(&self, peer: &Peer, request: &Request) -> Option<Ports> {
        let Peer::Tcp { tls, .. } = peer else { return None };
        let host = request.uri().authority().map(Authority::as_str);
        let host = host.or_else(|| request.headers().get(HOST)?.to_str().ok())?;
        let scheme = if *tls { "https" } else { "http" };
        let domain = self.access.front().domain.clone();
        Some(Ports { url: format!("{scheme}://{host}"), domain })
    }
}
