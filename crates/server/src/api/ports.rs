//! Ports that something in a session listens on: as bare connections, and as what speaks HTTP
//! there. What is served there is the session's: it is never told what lets its clients in here,
//! and never taken for a page of ours.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::header::{
    CONNECTION, CONTENT_SECURITY_POLICY, EXPECT, FORWARDED, HOST, SET_COOKIE, UPGRADE,
};
use axum::http::request::Parts;
use axum::http::uri::PathAndQuery;
use axum::http::{Extensions, HeaderMap, HeaderName, HeaderValue, StatusCode, Uri, Version};
use axum::response::{IntoResponse, Response};
use denizen_api::Code;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;

use super::Api;
use super::extract::{self, Path};
use super::refusal::{Answer, Refused};
use crate::access::guard::{ByName, ENVD_PORT};
use crate::access::{Caller, Peer};
use crate::e2b::Visit;
use crate::files::{drop_credentials, drop_hop_by_hop};
use crate::lease::Lease;

/// How long a port may take to accept a connection.
const PATIENCE: Duration = Duration::from_secs(10);
/// The most that is held of what a port says before it is understood, in bytes.
const HEAD: usize = 64 * 1024;
/// What a page of a session may do that is served under our own origin: run, and nothing that
/// needs an origin.
const SANDBOX: HeaderValue = HeaderValue::from_static("sandbox allow-scripts allow-forms");
/// What tells our own guard which port, and lets in.
const OF_E2B: [&str; 4] =
    ["e2b-sandbox-id", "e2b-sandbox-port", "e2b-traffic-access-token", "x-access-token"];
/// What an answer would say of our whole origin.
const OF_ORIGIN: [&str; 4] =
    ["alt-svc", "clear-site-data", "service-worker-allowed", "strict-transport-security"];

/// Connect to a port; the connection of the request becomes it (RFC 9110, 7.8), under the name
/// `tcp`.
#[utoipa::path(get, path = "/v1/sessions/{session}/ports/{port}", tag = "ports",
    params(("session" = String, Path, description = "Name or UUID"),
        ("port" = u16, Path, description = "The port within the session")),
    responses((status = 101, description = "It is connected"), Refused))]
pub(crate) async fn connect(
    State(api): State<Api>,
    Path((session, port)): Path<(String, u16)>,
    mut request: Request,
) -> Answer<Response> {
    if request.extensions().get::<Caller>().is_some_and(Caller::is_visitor) {
        // What is open to all is what speaks HTTP.
        return Err(Refused::new(Code::Forbidden, "a bare connection to a port needs a key"));
    }
    let upgrades = request.headers().get(UPGRADE).is_some_and(|it| it == "tcp");
    if !upgrades {
        let detail = "a port is reached by an upgrade of the connection to tcp; what speaks HTTP \
                      there, at this path with a slash at its end";
        return Err(Refused::new(Code::Upgrade, detail));
    }
    let lease = api.take_known(&session).await?;
    let inside = reach(&lease, &session, port).await?;
    let upgrade = hyper::upgrade::on(&mut request);
    tokio::spawn(join(lease, async { Ok((TokioIo::new(upgrade.await?), inside)) }));
    let headers = [("connection", "upgrade"), ("upgrade", "tcp")];
    Ok((StatusCode::SWITCHING_PROTOCOLS, headers).into_response())
}

/// A connection to the port within.
async fn reach(lease: &Lease, session: &str, port: u16) -> Answer<TcpStream> {
    let reached = async {
        let agent = lease.guard.agent().map_err(std::io::Error::other)?;
        let inside = agent.connect(port).await.map_err(std::io::Error::other)?;
        let inside = TcpStream::from_std(inside)?;
        // Whether it was refused shows when it can be written to.
        inside.writable().await?;
        inside.take_error()?.map_or(Ok(inside), Err)
    };
    let reached = tokio::select! {
        reached = tokio::time::timeout(PATIENCE, reached) => reached,
        () = lease.ended() => return Err(Refused::stopped()),
    };
    let reached = reached.unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into()));
    reached.map_err(|error| {
        let detail = format!("port {port} of session {session} cannot be reached: {error}");
        Refused::new(Code::Port, detail)
    })
}

/// Ask what speaks HTTP at a port, by whichever method; also for an upgrade, as to a WebSocket.
///
/// What lets the client in here is not passed on: `Authorization`, `Cookie`, `X-Api-Key` and
/// `X-Access-Token`; nor are cookies set. `Forwarded` and `X-Forwarded-…` tell who asks, and by
/// which name. As these paths share the dashboard's origin, answers have a `Content-Security-Policy`
/// that gives a page of theirs no origin; by a name `PORT-SESSION.DOMAIN` they have their own.
#[utoipa::path(get, path = "/v1/sessions/{session}/ports/{port}/{*rest}", tag = "ports",
    params(("session" = String, Path, description = "Name or UUID"),
        ("port" = u16, Path, description = "The port within the session"),
        ("rest" = String, Path, description = "The path to ask for there; it may be empty")),
    responses((status = "default", description = "Whatever is answered there"), Refused))]
pub(crate) async fn proxied(
    state: State<Api>,
    path: Path<Place>,
    request: Request,
) -> Answer<Response> {
    proxy(state, path, request).await
}

/// How a port is asked.
struct Asked {
    peer: Option<Peer>,
    /// By a name of its own.
    by_name: bool,
    /// By somebody who has shown nothing of ours: what looks like it is for the port.
    by_visitor: bool,
    /// What the port is told to be the host.
    host: Option<HeaderValue>,
}

impl Asked {
    fn of(extensions: &Extensions, api: &Api) -> Self {
        let visit = extensions.get::<Visit>();
        let host = visit.and_then(|visit| api.sandboxes.host_for(*visit));
        Self {
            peer: extensions.get().cloned(),
            by_name: extensions.get::<ByName>().is_some(),
            by_visitor: extensions.get::<Caller>().is_some_and(Caller::is_visitor),
            host: host.and_then(|host| host.try_into().ok()),
        }
    }
}

/// Which port of which session.
#[derive(serde::Deserialize)]
pub(crate) struct Place {
    session: String,
    port: u16,
}

/// As [`proxied`], for all methods.
pub(crate) async fn proxy(
    State(api): State<Api>,
    Path(Place { session, port }): Path<Place>,
    mut request: Request,
) -> Answer<Response> {
    let asked = Asked::of(request.extensions(), &api);
    let lease = api.take_known(&session).await?;
    let inside = reach(&lease, &session, port).await.map_err(|refused| {
        let of_envd = port == ENVD_PORT && request.extensions().get::<Visit>().is_some();
        // It is outside, and has no such path.
        let nothing = || Refused::new(Code::NotFound, "404 page not found");
        if of_envd && refused.0.code == Code::Port { nothing() } else { refused }
    })?;
    let upgrade = hyper::upgrade::on(&mut request);
    let (mut parts, body) = request.into_parts();
    let wanted = upgrade_wanted(&parts);
    prepare(&mut parts, &asked)?;
    if let Some(protocol) = &wanted {
        parts.headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
        parts.headers.insert(UPGRADE, protocol.clone());
    }
    let failed = |error: hyper::Error| {
        let detail = format!("port {port} of session {session} does not speak HTTP: {error}");
        Refused::new(Code::Port, detail)
    };
    let (mut requests, connection) = http1::Builder::new()
        .max_buf_size(HEAD)
        // Some of what listens there knows no other spelling.
        .title_case_headers(true)
        .handshake(TokioIo::new(inside))
        .await
        .map_err(failed)?;
    // It ends when neither the request nor the answer is there any more.
    tokio::spawn(connection.with_upgrades());
    let request = Request::from_parts(parts, body);
    let mut response = tokio::select! {
        response = requests.send_request(request) => response.map_err(failed)?,
        () = lease.ended() => return Err(Refused::stopped()),
    };
    let inside = hyper::upgrade::on(&mut response);
    let (mut parts, body) = response.into_parts();
    // That is of the connection within; ours has its own.
    parts.version = Version::default();
    let protocol = parts.headers.get(UPGRADE).cloned();
    drop_hop_by_hop(&mut parts.headers);
    drop_cookies(&mut parts.headers, &asked);
    if !asked.by_name {
        for name in OF_ORIGIN {
            parts.headers.remove(name);
        }
        // Beside its own: a browser obeys all of them.
        parts.headers.append(CONTENT_SECURITY_POLICY, SANDBOX);
    }
    if parts.status != StatusCode::SWITCHING_PROTOCOLS {
        return Ok(Response::from_parts(parts, Body::new(lease.hold(body))));
    }
    let (Some(_), Some(protocol)) = (wanted, protocol) else {
        let detail = format!("port {port} of session {session} switches protocols unasked");
        return Err(Refused::new(Code::Port, detail));
    };
    tokio::spawn(join(lease, async {
        let (outside, inside) = tokio::try_join!(upgrade, inside)?;
        Ok((TokioIo::new(outside), TokioIo::new(inside)))
    }));
    parts.headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
    parts.headers.insert(UPGRADE, protocol);
    Ok(Response::from_parts(parts, Body::empty()))
}

/// Which protocol a request asks to go on with.
fn upgrade_wanted(parts: &Parts) -> Option<HeaderValue> {
    let connection = parts.headers.get_all(CONNECTION).iter().filter_map(|it| it.to_str().ok());
    let mut names = connection.flat_map(|names| names.split(','));
    let asks = names.any(|name| name.trim().eq_ignore_ascii_case("upgrade"));
    parts.headers.get(UPGRADE).filter(|_| asks && parts.version == Version::HTTP_11).cloned()
}

/// Makes a request one for the port.
fn prepare(parts: &mut Parts, asked: &Asked) -> Answer<()> {
    let uri = std::mem::take(&mut parts.uri);
    let gone = || Refused::new(Code::NotFound, "this is no path of a port");
    let (_, rest) = extract::session(uri.path()).ok_or_else(gone)?;
    // `/ports/`, the port, and the path there, as it was written.
    let after = rest.strip_prefix("/ports/").ok_or_else(gone)?;
    let path = after.find('/').map(|at| &after[at..]).ok_or_else(gone)?;
    let query = uri.query().map(|query| format!("?{query}")).unwrap_or_default();
    let wanted: PathAndQuery = format!("{path}{query}").parse().map_err(|_| gone())?;
    let host = uri.authority().map(|host| host.as_str().to_owned());
    let host = host.and_then(|host| HeaderValue::try_from(host).ok());
    let host = host.or_else(|| parts.headers.get(HOST).cloned());
    let host = asked.host.clone().or(host);
    let prefix = (!asked.by_name).then(|| &uri.path()[..uri.path().len() - path.len()]);
    drop_hop_by_hop(&mut parts.headers);
    if !(asked.by_visitor && asked.by_name) {
        drop_credentials(&mut parts.headers);
    }
    drop_ours(&mut parts.headers);
    for name in OF_E2B {
        parts.headers.remove(name);
    }
    // It was said to the client already that it may go on.
    parts.headers.remove(EXPECT);
    forwarded(&mut parts.headers, asked.peer.as_ref(), host.as_ref(), prefix);
    if let Some(host) = host {
        parts.headers.insert(HOST, host);
    }
    parts.uri = Uri::from(wanted);
    parts.version = Version::HTTP_11;
    Ok(())
}

/// Drops what looks like a key or token of ours, good or not, wherever it is.
fn drop_ours(headers: &mut HeaderMap) {
    let ours = |value: &HeaderValue| {
        let text = String::from_utf8_lossy(value.as_bytes());
        text.split([' ', '=', ';', ','])
            .any(|word| word.starts_with("dk_") || word.starts_with("dt_"))
    };
    let names: Vec<HeaderName> =
        headers.iter().filter(|(_, value)| ours(value)).map(|(name, _)| name.clone()).collect();
    for name in names {
        headers.remove(name);
    }
}

/// Drops cookies, which would be for our origin. One whose name is a sandbox's own has an origin of
/// its own, where a cookie is for that alone as long as it names no domain.
fn drop_cookies(headers: &mut HeaderMap, asked: &Asked) {
    let axum::http::header::Entry::Occupied(all) = headers.entry(SET_COOKIE) else { return };
    let (_, all) = all.remove_entry_mult();
    let own = |cookie: &HeaderValue| {
        let text = String::from_utf8_lossy(cookie.as_bytes()).to_ascii_lowercase();
        !text.split(';').skip(1).any(|part| part.trim_start().starts_with("domain"))
    };
    let kept: Vec<HeaderValue> =
        all.filter(|it| asked.by_name && asked.by_visitor && own(it)).collect();
    for cookie in kept {
        headers.append(SET_COOKIE, cookie);
    }
}

/// Tells who asks, by what the daemon knows itself (RFC 7239): what a client says of that, anybody
/// can say.
fn forwarded(
    headers: &mut HeaderMap,
    peer: Option<&Peer>,
    host: Option<&HeaderValue>,
    prefix: Option<&str>,
) {
    const OTHERS: [&str; 4] =
        ["x-forwarded-for", "x-forwarded-host", "x-forwarded-proto", "x-forwarded-prefix"];
    let (from, scheme) = match peer {
        Some(Peer::Tcp { from, tls, .. }) => {
            (Some(from.ip().to_canonical()), if *tls { "https" } else { "http" })
        }
        Some(Peer::Local { .. }) | None => (None, "http"),
    };
    let node = match from {
        Some(IpAddr::V6(address)) => format!("\"[{address}]\""),
        Some(IpAddr::V4(address)) => address.to_string(),
        None => "unknown".to_owned(),
    };
    let host = host.and_then(|host| host.to_str().ok());
    let told = host.map(|host| format!(";host=\"{}\"", host.replace(['"', '\\'], "")));
    let whole = format!("for={node}{};proto={scheme}", told.unwrap_or_default());
    let address = from.map(|from| from.to_string());
    let values = [address.as_deref(), host, Some(scheme), prefix];
    headers.remove(FORWARDED);
    for (name, value) in OTHERS.into_iter().zip(values) {
        headers.remove(name);
        if let Some(value) = value.and_then(|value| HeaderValue::try_from(value).ok()) {
            headers.insert(HeaderName::from_static(name), value);
        }
    }
    if let Ok(whole) = HeaderValue::try_from(whole) {
        headers.insert(FORWARDED, whole);
    }
}

/// Copies both ways until a side ends it, or the session has to be given back.
async fn join(
    lease: Arc<Lease>,
    sides: impl Future<
        Output = hyper::Result<(
            impl AsyncRead + AsyncWrite + Unpin,
            impl AsyncRead + AsyncWrite + Unpin,
        )>,
    >,
) {
    let joined = async {
        if let Ok((mut outside, mut inside)) = sides.await {
            // Either side may end it at any time.
            let _ = tokio::io::copy_bidirectional(&mut outside, &mut inside).await;
        }
    };
    tokio::select! {
        () = joined => {}
        () = lease.ended() => {}
    }
}
