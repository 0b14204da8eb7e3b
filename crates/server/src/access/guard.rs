//! What every request passes before anything is done for it: whether the name it is asked by is
//! ours and the page it comes from may ask (over TCP), whose key it carries, what that allows. It
//! must never let through what it does not know.
//!
//! A browser lets any page send requests to this machine. It sends the page's origin along, which
//! has to be one that is listed or our own; and a page whose name was made to lead here (DNS
//! rebinding) asks by that name, which is none of ours. Neither has a key anyway.

use std::net::{IpAddr, Ipv4Addr};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use axum::body::{Body, Bytes};
use axum::extract::{MatchedPath, Request, State};
use axum::http::header::{
    ACCESS_CONTROL_ALLOW_HEADERS, ACCESS_CONTROL_ALLOW_METHODS, ACCESS_CONTROL_ALLOW_ORIGIN,
    ACCESS_CONTROL_EXPOSE_HEADERS, ACCESS_CONTROL_MAX_AGE, ACCESS_CONTROL_REQUEST_HEADERS,
    ACCESS_CONTROL_REQUEST_METHOD, AUTHORIZATION, CONTENT_TYPE, HOST, LOCATION, ORIGIN, VARY,
    X_CONTENT_TYPE_OPTIONS,
};
use axum::http::request::Parts;
use axum::http::uri::{Authority, PathAndQuery, Uri};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use denizen_api::{Code, Scope};
use futures::StreamExt;
use hyper::body::{Body as _, Frame, SizeHint};
use jiff::Timestamp;

use super::limits::network;
use super::rules::{self, Need, On};
use super::{Access, Caller, Front, Peer};
use crate::SESSION;
use crate::api::{Refused, extract};
use crate::trace::{self, RequestId};

/// The port at which clients of E2B reach envd in a sandbox.
const ENVD_PORT: u16 = 49983;
/// How long a client may send nothing of a body that it has begun.
const STANDSTILL: Duration = Duration::from_mins(1);
/// What a page of a listed origin may read of an answer besides its body.
const EXPOSED: HeaderValue = HeaderValue::from_static(
    "content-range, etag, last-modified, location, retry-after, x-request-id",
);

/// That a request was asked by the name of a session's port: what answers it has an origin of its
/// own.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ByName;

/// The session that a request for envd names.
pub(crate) fn named(headers: &HeaderMap) -> Option<&str> {
    let header = headers.get(SESSION).or_else(|| headers.get("e2b-sandbox-id"));
    header?.to_str().ok()
}

/// Rewrites a request for `<port>-<session>.<domain>` to the path that means the same, before it
/// is routed: so what is asked by such a name is never a route of the daemon's own.
pub(crate) fn by_path<B>(front: &Front, request: &mut axum::http::Request<B>) {
    let host = hosts(request.uri(), request.headers()).next().flatten();
    let Some((port, session)) = host.and_then(|host| of_session(front, &host)) else { return };
    if port == ENVD_PORT && rules::of_envd(request.uri().path()).is_some() {
        // A part of a host is one of a header.
        if let Ok(session) = HeaderValue::from_str(&session) {
            request.headers_mut().insert(SESSION, session);
        }
        return;
    }
    let rest = request.uri().path_and_query().map_or("/", PathAndQuery::as_str);
    let session = denizen_api::escape(&session);
    let path = format!("/v1/sessions/{session}/ports/{port}{rest}");
    // Both parts of it were parts of a URI.
    if let Ok(path) = path.parse::<PathAndQuery>() {
        let mut parts = std::mem::take(request.uri_mut()).into_parts();
        parts.path_and_query = Some(path);
        *request.uri_mut() = Uri::from_parts(parts).unwrap_or_default();
        request.extensions_mut().insert(ByName);
    }
}

/// The port and session of a host `<port>-<session>.<domain>`.
fn of_session(front: &Front, host: &Authority) -> Option<(u16, String)> {
    let name = host.host().to_ascii_lowercase();
    let domain = front.domain.as_deref()?.to_ascii_lowercase();
    let label = name.strip_suffix(&domain)?.strip_suffix('.')?;
    let (port, session) = label.split_once('-')?;
    let port = port.parse().ok().filter(|port| *port != 0)?;
    (!session.is_empty() && !session.contains('.')).then(|| (port, session.to_owned()))
}

/// Every name that a request is asked by: what is in its URI, and what is in its headers.
fn hosts<'a>(uri: &'a Uri, headers: &'a HeaderMap) -> impl Iterator<Item = Option<Authority>> + 'a {
    let of_headers = headers.get_all(HOST).iter().map(|host| host.to_str().ok()?.parse().ok());
    uri.authority().cloned().map(Some).into_iter().chain(of_headers)
}

/// Whether a host is one of ours.
fn is_ours(front: &Front, host: &Authority, to: IpAddr) -> bool {
    if host.as_str().contains('@') {
        return false;
    }
    let name = host.host().trim_end_matches('.');
    let address = name.trim_start_matches('[').trim_end_matches(']');
    if let Ok(address) = address.parse::<IpAddr>() {
        // An address is not a name that somebody else can have lead here.
        let plain = address.to_canonical();
        return plain.is_loopback() || plain == to.to_canonical() || listed(front, name);
    }
    name.eq_ignore_ascii_case("localhost")
        || listed(front, name)
        || of_session(front, host).is_some()
}

fn listed(front: &Front, name: &str) -> bool {
    let is = |host: &String| host.eq_ignore_ascii_case(name);
    front.hosts.iter().chain(&front.domain).any(is)
}

/// Whether the page at that origin is one that we have served ourselves.
fn is_own(origin: &HeaderValue, host: Option<&Authority>, tls: bool) -> bool {
    let scheme = if tls { "https://" } else { "http://" };
    let origin = origin.to_str().ok().and_then(|origin| origin.strip_prefix(scheme));
    origin.zip(host).is_some_and(|(origin, host)| origin.eq_ignore_ascii_case(host.as_str()))
}

/// The key or token that a request carries. Clients of E2B send theirs in headers of their own,
/// and for envd an `Authorization: Basic` that names a user.
fn secret(headers: &HeaderMap) -> Option<&str> {
    let bearer = headers.get_all(AUTHORIZATION).iter().find_map(|value| {
        let (scheme, secret) = value.to_str().ok()?.split_once(' ')?;
        scheme.eq_ignore_ascii_case("bearer").then(|| secret.trim())
    });
    let plain = |name: &str| headers.get(name)?.to_str().ok();
    bearer.or_else(|| plain("x-api-key")).or_else(|| plain("x-access-token"))
}

/// Why a request is not answered by its handler.
enum No {
    Refused(Refused),
    /// It may be made after a while.
    TooOften(Duration),
}

impl From<Refused> for No {
    fn from(refused: Refused) -> Self {
        Self::Refused(refused)
    }
}

impl IntoResponse for No {
    fn into_response(self) -> Response {
        let wait = match self {
            Self::Refused(refused) => return refused.into_response(),
            Self::TooOften(wait) => wait,
        };
        let seconds = wait.as_secs() + 1;
        let why = format!("too many requests: try again in {seconds} s");
        Refused::new(Code::RateLimited, why).after(seconds).into_response()
    }
}

/// Answers as `next` does, if the request may be made at all.
pub(crate) async fn guard(
    State(access): State<Arc<Access>>,
    request: Request,
    next: Next,
) -> Response {
    let (mut parts, body) = request.into_parts();
    let mut record = Record::begin(access.clone(), &parts);
    let (answer, origin) = match from_where(&access.front(), &parts) {
        Err(refused) => (refuse(refused.into(), &mut record), None),
        Ok(Some(origin)) if is_preflight(&parts) => (preflight(&parts), Some(origin)),
        Ok(origin) => {
            let answer = match admit(&access, &mut parts, &mut record) {
                Ok(caller) => {
                    let request = Request::from_parts(parts, body);
                    pass(access, caller, request, next).await
                }
                Err(no) => refuse(no, &mut record),
            };
            (answer, origin)
        }
    };
    record.status = Some(answer.status());
    record.made = made(&answer);
    match origin {
        Some(origin) => allow(answer, &origin),
        None => answer,
    }
}

/// A refusal as its client gets it. Who has no good key and gets many is told to wait, and
/// nobody is held up by that who has one; of neither more is written down.
fn refuse(no: No, record: &mut Record) -> Response {
    let no = match (&record.peer, no) {
        (Some(Peer::Tcp { from, .. }), No::Refused(refused)) => {
            let counted = record.access.refusals.count(network(from.ip()), Instant::now());
            record.is_one_of_many = counted.is_err();
            match counted {
                Err(wait) if record.caller.is_none() => No::TooOften(wait),
                _ => No::Refused(refused),
            }
        }
        (_, no) => no,
    };
    no.into_response()
}

/// Who asks, if they may ask for that.
fn admit(access: &Access, parts: &mut Parts, record: &mut Record) -> Result<Caller, No> {
    let route = parts.extensions.get::<MatchedPath>().map(|path| path.as_str().to_owned());
    let route = route.or_else(|| rules::of_envd(parts.uri.path()).map(str::to_owned));
    let route = route.unwrap_or_default();
    let session = session(parts, &route);
    let of_whole = route == "/metrics" && session.is_none();
    let rule = if of_whole { "/v1/metrics" } else { &route };
    let mut need = rules::need(&parts.method, rule);
    if rule == "/v1/metrics" && access.front().metrics_public {
        need = Need::Nothing;
    }
    record.need = Some(need);
    // What is asked of envd is in the last part of its path.
    record.route = match route.strip_suffix("{method}") {
        Some(_) => shortened(parts.uri.path()),
        None => route,
    };
    record.session.clone_from(&session);
    trace::note(parts.method.as_str(), &record.route, session.as_deref());
    let caller = match (parts.extensions.get::<Peer>(), secret(&parts.headers)) {
        (Some(Peer::Local { uid }), _) => Caller::local(*uid),
        (_, _) if need == Need::Nothing => Caller::nobody(),
        (_, secret) => secret.and_then(|secret| access.who(secret)).ok_or_else(|| {
            let what = if secret.is_some() { "this key or token is not good" } else { "no key" };
            let why = format!("{what}: `denizen key create` makes one");
            Refused::new(Code::Unauthenticated, why)
        })?,
    };
    record.caller = Some(caller.clone());
    if let (Some(Peer::Tcp { known, .. }), Some(_)) = (&record.peer, caller.counted_as()) {
        known.store(true, Ordering::Relaxed);
    }
    if let Some(id) = caller.counted_as() {
        access.requests.count(id, Instant::now()).map_err(No::TooOften)?;
    }
    let Need::Scope(scope, on) = need else { return Ok(caller) };
    if caller.scope < scope {
        let has = caller.scope.name();
        let why = format!("this needs a key of scope {}, and this one is {has}", scope.name());
        return Err(Refused::new(Code::Forbidden, why).into());
    }
    match on {
        On::All if caller.is_limited() => Err(caller.outside().into()),
        On::Session if caller.is_limited() => {
            let session = session.ok_or_else(|| caller.outside())?;
            caller.touches(&access.pool, &session)?;
            Ok(caller)
        }
        On::All | On::Session | On::Some => Ok(caller),
    }
}

/// The id of the session that was made, if one was without being named in the path.
fn made(answer: &Response) -> Option<String> {
    let created = answer.status() == StatusCode::CREATED;
    let place = answer.headers().get(LOCATION).filter(|_| created)?.to_str().ok()?;
    place.strip_prefix("/v1/sessions/").map(str::to_owned)
}

/// The session that a request is about, as its handler will read it: in the path, or in a header
/// if it is one for envd. What a header says elsewhere means nothing.
fn session(parts: &Parts, route: &str) -> Option<String> {
    if !route.contains("{session}") {
        rules::of_envd(parts.uri.path())?;
        return named(&parts.headers).map(str::to_owned);
    }
    extract::session(parts.uri.path()).map(|(session, _)| session.into_owned())
}

/// That a request is asked by a name of ours, and by which listed origin, if there is one.
fn from_where(front: &Front, parts: &Parts) -> Result<Option<HeaderValue>, Refused> {
    let (to, tls) = match parts.extensions.get::<Peer>() {
        // No browser gets here.
        Some(Peer::Local { .. }) => return Ok(None),
        Some(Peer::Tcp { to, tls, .. }) => (to.ip(), *tls),
        None => (Ipv4Addr::UNSPECIFIED.into(), false),
    };
    let mut all = hosts(&parts.uri, &parts.headers).peekable();
    let first = all.peek().cloned().flatten();
    if first.is_none() || !all.all(|host| host.is_some_and(|host| is_ours(front, &host, to))) {
        let why = "this is no name of this daemon's: list it in the setting `hosts`, if it is";
        return Err(Refused::new(Code::BadHost, why.to_owned()));
    }
    let mut origins = parts.headers.get_all(ORIGIN).iter();
    match (origins.next(), origins.next()) {
        (None, _) => Ok(None),
        (Some(origin), None) if is_own(origin, first.as_ref(), tls) => Ok(None),
        (Some(origin), None)
            if front.origins.iter().any(|it| it.as_bytes() == origin.as_bytes()) =>
        {
            Ok(Some(origin.clone()))
        }
        _ => {
            let why = "pages of this origin may not ask: list it in the setting `origins`";
            Err(Refused::new(Code::BadOrigin, why.to_owned()))
        }
    }
}

/// Whether a browser asks if it may ask (Fetch, 4.8).
fn is_preflight(parts: &Parts) -> bool {
    parts.method == Method::OPTIONS && parts.headers.contains_key(ACCESS_CONTROL_REQUEST_METHOD)
}

fn preflight(parts: &Parts) -> Response {
    let mut answer = StatusCode::NO_CONTENT.into_response();
    let headers = answer.headers_mut();
    for (asked, allowed) in [
        (ACCESS_CONTROL_REQUEST_METHOD, ACCESS_CONTROL_ALLOW_METHODS),
        (ACCESS_CONTROL_REQUEST_HEADERS, ACCESS_CONTROL_ALLOW_HEADERS),
    ] {
        if let Some(asked) = parts.headers.get(asked) {
            headers.insert(allowed, asked.clone());
        }
    }
    headers.insert(ACCESS_CONTROL_MAX_AGE, HeaderValue::from_static("600"));
    answer
}

fn allow(mut answer: Response, origin: &HeaderValue) -> Response {
    let headers = answer.headers_mut();
    headers.insert(ACCESS_CONTROL_ALLOW_ORIGIN, origin.clone());
    headers.insert(ACCESS_CONTROL_EXPOSE_HEADERS, EXPOSED);
    headers.append(VARY, HeaderValue::from_static("origin"));
    answer
}

/// Has a request answered. All of it ends when what its caller was let in by does: the handler,
/// the answer's body, and a connection that it has become.
async fn pass(
    access: Arc<Access>,
    mut caller: Caller,
    mut request: Request,
    next: Next,
) -> Response {
    let peer = request.extensions().get::<Peer>().cloned();
    let Some(Peer::Tcp { cut, .. }) = peer else {
        request.extensions_mut().insert(caller);
        return next.run(request).await;
    };
    if let Some(id) = caller.counted_as() {
        match access.at_a_time.begin(id) {
            Some(one) => caller.open = Some(Arc::new(one)),
            None => return No::TooOften(Duration::ZERO).into_response(),
        }
    }
    request.extensions_mut().insert(caller.clone());
    // It has the caller, and with that its place.
    let mut over = Box::pin(access.over(caller));
    let (request, broke_off) = patient(request);
    let mut answer = tokio::select! {
        answer = next.run(request) => answer,
        () = &mut over => {
            let why = "the key or token was revoked, or has expired".to_owned();
            return Refused::new(Code::Unauthenticated, why).into_response();
        }
    };
    if answer.status().is_server_error() && broke_off.load(Ordering::Relaxed) {
        let why = "the body of the request broke off".to_owned();
        answer = Refused::new(Code::BrokenOff, why).into_response();
    }
    // What a session serves is never taken for a page or a script of ours, whatever it looks like.
    let headers = answer.headers_mut();
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    if answer.status() == StatusCode::SWITCHING_PROTOCOLS {
        tokio::spawn(async move {
            tokio::select! {
                () = over => cut.cancel(),
                () = cut.cancelled() => {}
            }
        });
        return answer;
    }
    answer.map(|body| Body::new(Held { body, over }))
}

/// A request whose body does not stand still for long, and what tells whether that broke off. A
/// stream of messages may stand still: nobody types all the time.
fn patient(request: Request) -> (Request, Arc<AtomicBool>) {
    let broke_off = Arc::new(AtomicBool::new(false));
    if request.body().is_end_stream() {
        return (request, broke_off);
    }
    let kind = request.headers().get(CONTENT_TYPE).map_or(&b""[..], HeaderValue::as_bytes);
    let is_stream = [&b"application/connect+"[..], b"application/grpc"];
    let is_stream = is_stream.iter().any(|it| kind.starts_with(it));
    let told = broke_off.clone();
    let request = request.map(|body| {
        let begin = (body.into_data_stream(), told);
        Body::from_stream(futures::stream::unfold(begin, move |(mut body, told)| async move {
            let piece = if is_stream {
                body.next().await?.map_err(std::io::Error::other)
            } else {
                match tokio::time::timeout(STANDSTILL, body.next()).await {
                    Ok(piece) => piece?.map_err(std::io::Error::other),
                    Err(_) => Err(std::io::ErrorKind::TimedOut.into()),
                }
            };
            told.fetch_or(piece.is_err(), Ordering::Relaxed);
            Some((piece, (body, told)))
        }))
    });
    (request, broke_off)
}

/// A body that ends when its reader may no longer read it.
struct Held<F> {
    body: Body,
    over: Pin<Box<F>>,
}

impl<F: Future<Output = ()>> hyper::body::Body for Held<F> {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        if self.over.as_mut().poll(context).is_ready() {
            let why = std::io::Error::other("the key or token is no longer good");
            return Poll::Ready(Some(Err(axum::Error::new(why))));
        }
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// What the audit log is told of a request: when its answer begins, or when nobody waits for that
/// any more.
struct Record {
    access: Arc<Access>,
    begin: Instant,
    id: Option<RequestId>,
    method: Method,
    peer: Option<Peer>,
    caller: Option<Caller>,
    need: Option<Need>,
    route: String,
    session: Option<String>,
    made: Option<String>,
    status: Option<StatusCode>,
    /// Whether it is one of more refusals than anybody wants to read.
    is_one_of_many: bool,
}

impl Record {
    fn begin(access: Arc<Access>, parts: &Parts) -> Self {
        Self {
            access,
            begin: Instant::now(),
            id: parts.extensions.get().cloned(),
            method: parts.method.clone(),
            peer: parts.extensions.get().cloned(),
            caller: None,
            need: None,
            route: String::new(),
            session: None,
            made: None,
            status: None,
            is_one_of_many: false,
        }
    }

    fn matters(&self) -> bool {
        match self.status.map(|status| status.as_u16()) {
            // Were they written down, whoever floods us would have the rest put aside.
            Some(429) => false,
            Some(401 | 403 | 421) => !self.is_one_of_many,
            _ => {
                let scope =
                    matches!(self.need, Some(Need::Scope(Scope::Operate | Scope::Admin, _)));
                scope && !rules::goes_on(&self.route)
            }
        }
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        if !self.matters() {
            return;
        }
        let peer = match &self.peer {
            Some(Peer::Tcp { from, .. }) => from.to_string(),
            Some(Peer::Local { .. }) | None => "socket".to_owned(),
        };
        let method = self.method.as_str();
        self.access.audit.write(&serde_json::json!({
            "at": Timestamp::now(),
            "request": self.id.as_ref().map(|id| &id.0),
            "who": self.caller.as_ref().map(Caller::told),
            "peer": peer,
            "method": shortened(method),
            "route": self.route,
            "session": self.session.as_deref().map(shortened),
            "made": self.made,
            "status": self.status.map(|status| status.as_u16()),
            "milliseconds": u64::try_from(self.begin.elapsed().as_millis()).unwrap_or(u64::MAX),
        }));
    }
}

/// As much of what somebody sent as a name could be.
fn shortened(text: &str) -> String {
    text.chars().take(128).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn asked(host: &str, path: &str) -> (String, Option<String>) {
        let front = Front { domain: Some("Box.example.org".to_owned()), ..Front::default() };
        let request = axum::http::Request::get(path).header(HOST, host);
        let mut request = request.header(SESSION, "theirs").body(()).unwrap();
        by_path(&front, &mut request);
        (request.uri().to_string(), named(request.headers()).map(str::to_owned))
    }

    #[test]
    fn a_port_by_its_name_is_one_by_its_path() {
        for (host, path, wanted) in [
            ("3000-demo.box.example.org", "/", "/v1/sessions/demo/ports/3000/"),
            ("3000-Demo.BOX.example.org:443", "/a?b=c", "/v1/sessions/demo/ports/3000/a?b=c"),
            ("80-a-b_c.box.example.org", "/v1/shutdown", "/v1/sessions/a-b_c/ports/80/v1/shutdown"),
            ("80-..box.example.org", "/x", "/x"),
            ("0-a.box.example.org", "/x", "/x"),
            ("65536-a.box.example.org", "/x", "/x"),
            ("80-a.other.example.org", "/x", "/x"),
            ("80-a.b.box.example.org", "/x", "/x"),
            ("80-abox.example.org", "/x", "/x"),
            ("box.example.org", "/x", "/x"),
            // envd's port leads to its own paths, and to no other of ours.
            ("49983-a.box.example.org", "/v1/shutdown", "/v1/sessions/a/ports/49983/v1/shutdown"),
        ] {
            let (path, session) = asked(host, path);
            assert_eq!((path.as_str(), session.as_deref()), (wanted, Some("theirs")), "{host}");
        }
        for path in ["/files?path=x", "/process.Process/Start"] {
            let (uri, session) = asked("49983-ours.box.example.org", path);
            assert_eq!((uri.as_str(), session.as_deref()), (path, Some("ours")));
        }
    }

    #[test]
    fn nothing_of_a_host_leaves_its_place_in_the_path() {
        for host in
            ["80-a%2f..%2fb.box.example.org", "80-a/../b.box.example.org", "80-a?.box.example.org"]
        {
            let request = axum::http::Request::get("/x").header(HOST, host);
            let mut request = request.body(()).unwrap();
            let front = Front { domain: Some("box.example.org".to_owned()), ..Front::default() };
            by_path(&front, &mut request);
            let path = request.uri().path();
            let parts = path.split('/').collect::<Vec<_>>();
            assert!(path == "/x" || parts.len() == 7 && parts[4] == "ports", "{host}: {path}");
        }
    }
}
