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
use uuid::Uuid;

use super::limits::network;
use super::rules::{self, Need, On};
use super::{Access, Caller, Front, Peer};
use crate::SESSION;
use crate::api::{Refused, extract};
use crate::e2b::{self, Sandboxes, Visit};
use crate::stream::Messages;
use crate::trace::{self, RequestId};

/// The port at which clients of E2B reach envd in a sandbox.
pub(crate) const ENVD_PORT: u16 = 49983;
/// How clients of E2B name a sandbox, and its port.
pub(crate) const SANDBOX: &str = "e2b-sandbox-id";
const SANDBOX_PORT: &str = "e2b-sandbox-port";
/// How long a client may send nothing of a body that it has begun.
const STANDSTILL: Duration = Duration::from_mins(1);
/// What a page of a listed origin may read of an answer besides its body.
const EXPOSED: HeaderValue = HeaderValue::from_static(
    "content-range, etag, last-modified, location, mcp-session-id, retry-after, x-request-id",
);

/// That a request was asked by the name of a session's port: what answers it has an origin of its
/// own.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ByName;

/// The sandbox whose name a request for envd was asked by.
#[derive(Clone, Copy, Debug)]
pub(crate) struct OfSandbox(pub(crate) Uuid);

/// The session that a request for envd names.
pub(crate) fn named(headers: &HeaderMap) -> Option<&str> {
    if let Some(session) = headers.get(SESSION) {
        return session.to_str().ok();
    }
    let sandbox = headers.get(SANDBOX)?.to_str().ok()?;
    // Who made it may stand behind an id.
    let id = e2b::id(sandbox).and_then(|_| sandbox.split('-').next());
    Some(id.unwrap_or(sandbox))
}

/// Rewrites a request for `<port>-<session>.<domain>` to the path that means the same, before it
/// is routed: so what is asked by such a name is never a route of the daemon's own.
pub(crate) fn by_path<B>(front: &Front, request: &mut axum::http::Request<B>) {
    let host = hosts(request.uri(), request.headers()).next().flatten();
    let by_host = host.and_then(|host| of_session(front, &host));
    let is_by_host = by_host.is_some();
    let Some((port, session)) = by_host.or_else(|| by_header(request.headers())) else { return };
    let sandbox = e2b::id(&session);
    let session = sandbox.map_or(session, |id| id.simple().to_string());
    if port == ENVD_PORT && rules::of_envd(request.uri().path()).is_some() {
        // A part of a host is one of a header.
        if let (true, Ok(session)) = (is_by_host, HeaderValue::from_str(&session)) {
            request.headers_mut().insert(SESSION, session);
            if let Some(sandbox) = sandbox {
                request.extensions_mut().insert(OfSandbox(sandbox));
            }
        }
        return;
    }
    let rest = request.uri().path_and_query().map_or("/", PathAndQuery::as_str);
    // A query may stand alone.
    let slash = if rest.starts_with('/') { "" } else { "/" };
    let session = denizen_api::escape(&session);
    let path = format!("/v1/sessions/{session}/ports/{port}{slash}{rest}");
    // Both parts of it were parts of a URI.
    if let Ok(path) = path.parse::<PathAndQuery>() {
        let mut parts = std::mem::take(request.uri_mut()).into_parts();
        parts.path_and_query = Some(path);
        *request.uri_mut() = Uri::from_parts(parts).unwrap_or_default();
        if is_by_host {
            request.extensions_mut().insert(ByName);
        }
        if let Some(sandbox) = sandbox {
            request.extensions_mut().insert(Visit { sandbox, port });
        }
    }
}

/// The port and sandbox that clients of E2B name in headers, where they do not ask by a name.
fn by_header(headers: &HeaderMap) -> Option<(u16, String)> {
    let sandbox = headers.get(SANDBOX)?.to_str().ok().filter(|id| e2b::id(id).is_some())?;
    Some((sandbox_port(headers)?, sandbox.to_owned()))
}

fn sandbox_port(headers: &HeaderMap) -> Option<u16> {
    let port = headers.get(SANDBOX_PORT)?.to_str().ok()?;
    port.parse().ok().filter(|port| *port != 0)
}

/// Whether a client of E2B names a port in headers that is none.
fn names_no_port(parts: &Parts) -> bool {
    let by_headers = [SANDBOX, SANDBOX_PORT].iter().all(|name| parts.headers.contains_key(*name));
    by_headers && !is_named_otherwise(parts) && sandbox_port(&parts.headers).is_none()
}

/// Whether what names a sandbox in headers means nothing, as the session is named in another way.
fn is_named_otherwise(parts: &Parts) -> bool {
    parts.extensions.get::<ByName>().is_some() || parts.headers.contains_key(SESSION)
}

/// What a client of E2B names in headers as a sandbox, if no sandbox here can have such an id.
fn no_sandbox(parts: &Parts) -> Option<&str> {
    if is_named_otherwise(parts) {
        return None;
    }
    sandbox_port(&parts.headers)?;
    let name = parts.headers.get(SANDBOX)?.to_str().ok()?;
    e2b::id(name).is_none().then_some(name)
}

/// Whether a request asks how E2B's API is, and not how a sandbox is.
pub(crate) fn is_of_api(parts: &Parts) -> bool {
    let names_none = || [SESSION, SANDBOX].iter().all(|name| !parts.headers.contains_key(*name));
    let is_read = [Method::GET, Method::HEAD].contains(&parts.method);
    is_read && parts.uri.path() == "/health" && names_none()
}

/// Whether a request is for envd in what it names, which may be a session then.
fn is_for_envd(parts: &Parts) -> bool {
    sandbox_port(&parts.headers) == Some(ENVD_PORT) && rules::of_envd(parts.uri.path()).is_some()
}

/// What a host that is none of ours names as a sandbox, if it does as clients of E2B would.
fn no_sandbox_of_ours(parts: &Parts) -> Option<String> {
    let host = hosts(&parts.uri, &parts.headers).next().flatten()?;
    let (label, _) = host.host().split_once('.')?;
    let (port, sandbox) = label.split_once('-')?;
    port.parse::<u16>().ok().filter(|port| *port != 0)?;
    e2b::looks_like_one(sandbox).then(|| sandbox.to_owned())
}

/// The port and session of a host `<port>-<session>.<domain>`. A sandbox's id is enough by itself,
/// whatever it is below: clients of E2B have a domain of their own if they are told none, and a page
/// of another origin that knows the id learns nothing from a name that it could not ask for.
fn of_session(front: &Front, host: &Authority) -> Option<(u16, String)> {
    let name = host.host().to_ascii_lowercase();
    let (label, domain) = name.split_once('.')?;
    let (port, session) = label.split_once('-')?;
    let port = port.parse().ok().filter(|port| *port != 0)?;
    let is_ours = front.domain.as_deref().is_some_and(|ours| domain.eq_ignore_ascii_case(ours));
    let is_any = !session.is_empty() && is_ours || e2b::id(session).is_some();
    is_any.then(|| (port, session.to_owned()))
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
        || front.domain.as_deref().is_some_and(|domain| is_api(name, domain))
}

/// Whether a name is the one by which clients of E2B ask for its control plane.
fn is_api(name: &str, domain: &str) -> bool {
    let below = name.get(name.len().saturating_sub(domain.len())..);
    below.is_some_and(|end| end.eq_ignore_ascii_case(domain))
        && name[..name.len() - domain.len()].eq_ignore_ascii_case("api.")
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

/// The keys or tokens that a request carries. Clients of E2B send theirs in headers of their own,
/// and for envd an `Authorization: Basic` that names a user; with a request for a sandbox's port,
/// there may be one that is the port's.
pub(crate) fn secrets(headers: &HeaderMap) -> impl Iterator<Item = &str> {
    let bearers = headers.get_all(AUTHORIZATION).iter().filter_map(|value| {
        let (scheme, secret) = value.to_str().ok()?.split_once(' ')?;
        scheme.eq_ignore_ascii_case("bearer").then(|| secret.trim())
    });
    let plain = ["x-api-key", "x-access-token"].into_iter();
    bearers.chain(plain.filter_map(|name| headers.get(name)?.to_str().ok()))
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
    let (parts, body) = request.into_parts();
    let mut record = Record::begin(access.clone(), &parts);
    let (answer, origin) = match from_where(&access.front(), &parts) {
        Err(refused) => {
            let is_other = refused.0.code == Code::BadHost;
            // Whatever name leads here: nothing is told of who is here.
            let nobody = is_other.then(|| no_sandbox_of_ours(&parts)).flatten();
            // It counts as a refusal all the same.
            let refused = refuse(refused.into(), &mut record);
            let gone = nobody.map(|sandbox| e2b::gone(&sandbox));
            let gone = gone.filter(|_| refused.status() != StatusCode::TOO_MANY_REQUESTS);
            (gone.unwrap_or(refused), None)
        }
        Ok(Some(origin)) if is_preflight(&parts) => (preflight(&parts), Some(origin)),
        Ok(origin) => (answer(access, parts, body, next, &mut record).await, origin),
    };
    record.status = Some(answer.status());
    record.made = made(&answer);
    match origin {
        Some(origin) => allow(answer, &origin),
        None => answer,
    }
}

/// Has a request answered that is asked by a name of ours, if who asks may ask that.
async fn answer(
    access: Arc<Access>,
    mut parts: Parts,
    body: Body,
    next: Next,
    record: &mut Record,
) -> Response {
    if let Some(sandbox) = no_sandbox(&parts).filter(|_| !is_for_envd(&parts)) {
        return e2b::gone(sandbox);
    }
    if names_no_port(&parts) {
        return Refused::new(Code::BadRequest, "Invalid sandbox port").into_response();
    }
    let no = match admit(&access, &mut parts, record) {
        Ok(caller) => {
            return match access.sandboxes.arrive(&parts).await {
                Ok(()) => pass(access, caller, Request::from_parts(parts, body), next).await,
                Err(gone) => gone,
            };
        }
        Err(no) => no,
    };
    let asked = e2b::asked(&parts.uri, &parts.headers, &parts.extensions);
    // It counts as a refusal all the same.
    let refused = refuse(no, record);
    // Its token is no good any more, and that is not what its client wants to know.
    let gone = access.sandboxes.if_gone(asked).or_else(|| no_sandbox(&parts).map(e2b::gone));
    gone.filter(|_| refused.status() != StatusCode::TOO_MANY_REQUESTS).unwrap_or(refused)
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
    if rule == "/v1/metrics" && access.front().metrics_public || is_of_api(parts) {
        need = Need::Nothing;
    }
    let is_known = rules::rule(&parts.method, rule).is_some();
    // Whoever may ask anything of E2B's API is told what it has not.
    let nothing = (!is_known && e2b::wire::is_ours(parts.uri.path())).then(|| {
        need = Need::Scope(Scope::Read, On::Some);
        let code = if route.is_empty() { Code::NotFound } else { Code::BadMethod };
        let asked = format!("{} {}", parts.method, parts.uri.path());
        Refused::new(code, format!("{asked}: there is no such request"))
    });
    record.need = Some(need);
    // What is asked of envd is in the last part of its path.
    record.route = match route.strip_suffix("{method}") {
        Some(_) => shortened(parts.uri.path()),
        None => route,
    };
    record.session.clone_from(&session);
    trace::note(parts.method.as_str(), &record.route, session.as_deref());
    let caller = match parts.extensions.get::<Peer>() {
        Some(Peer::Local { uid }) => Caller::local(*uid),
        _ if need == Need::Nothing => Caller::nobody(),
        _ if need == Need::Volume => holder(access, parts)?,
        _ => {
            let known = secrets(&parts.headers).find_map(|secret| access.who(secret));
            known.map_or_else(|| visitor(access, parts), Ok)?
        }
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
        On::All | On::Session | On::Some => {
            nothing.map_or(Ok(caller), |nothing| Err(nothing.into()))
        }
    }
}

/// Who has a volume's token.
fn holder(access: &Access, parts: &Parts) -> Result<Caller, Refused> {
    // That of a session is read as well, and is for no volume.
    let token = secrets(&parts.headers).find_map(|secret| access.keys.read_token(secret));
    token.map(Caller::holder).ok_or_else(|| {
        let why = "a volume's files need its token, which `GET /volumes/ID` tells";
        Refused::new(Code::Unauthenticated, why)
    })
}

/// Who asks without a good key or token, if that is let in.
fn visitor(access: &Access, parts: &mut Parts) -> Result<Caller, Refused> {
    let let_in = access.sandboxes.lets_in(parts)?;
    if let Some(entrance) = let_in {
        if let Some(token) = entrance.signed_with {
            // A signature is good for as long as what it was made with.
            access.who(&token).ok_or_else(|| {
                Refused::new(Code::Unauthenticated, "the token that this was signed with is void")
            })?;
            // And for the user that was signed.
            parts.headers.remove(AUTHORIZATION);
        }
        return Ok(Caller::visitor(entrance.sandbox));
    }
    let shown = secrets(&parts.headers).next().is_some();
    let what = if shown { "this key or token is not good" } else { "no key" };
    let why = format!("{what}: `denizen key create` makes one");
    Err(Refused::new(Code::Unauthenticated, why))
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
    if parts.extensions.get::<ByName>().is_some() && parts.extensions.get::<Visit>().is_some() {
        // Which pages may ask is what is served there to say: nothing of ours is at stake.
        return Ok(None);
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
    let sandboxes = access.sandboxes.clone();
    let asked = e2b::asked(request.uri(), request.headers(), request.extensions());
    // It has the caller, and with that its place.
    let mut over = Box::pin(access.over(caller));
    let (request, broke_off) = patient(request);
    let mut answer = tokio::select! {
        answer = next.run(request) => answer,
        () = &mut over => {
            if let Some(gone) = sandboxes.if_gone(asked) {
                return gone;
            }
            let why = "the key or token was revoked, or has expired".to_owned();
            return Refused::new(Code::Unauthenticated, why).into_response();
        }
    };
    // What became of it while its sandbox was being ended or put to sleep says nothing to who asked.
    if !answer.status().is_success()
        && let Some(gone) = sandboxes.if_gone(asked)
    {
        answer = gone;
    } else if answer.status().is_server_error() && broke_off.load(Ordering::Relaxed) {
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
    let of = asked.filter(|sandbox| sandboxes.find(*sandbox).is_some());
    let of = of.map(|sandbox| (sandboxes, sandbox));
    let messages = Messages::of(answer.headers());
    answer.map(|body| Body::new(Held { body, over, of, messages, is_over: false }))
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

/// A body that ends when its reader may no longer read it. One of a sandbox that is being ended
/// breaks off, whatever would be said last: clients of E2B ask then what became of it. A stream of
/// messages says so in its last one.
struct Held<F> {
    body: Body,
    over: Pin<Box<F>>,
    of: Option<(Arc<Sandboxes>, Uuid)>,
    messages: Option<Messages>,
    is_over: bool,
}

impl<F: Future<Output = ()>> hyper::body::Body for Held<F> {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        if self.is_over {
            return Poll::Ready(None);
        }
        if self.over.as_mut().poll(context).is_ready() {
            self.is_over = true;
            let why = std::io::Error::other("the key or token is no longer good");
            return Poll::Ready(Some(Err(axum::Error::new(why))));
        }
        let frame = Pin::new(&mut self.body).poll_frame(context);
        let leaves = |(all, id): &(Arc<Sandboxes>, Uuid)| all.is_leaving(*id);
        let has_ended = self.messages.as_ref().is_some_and(Messages::are_over);
        if frame.is_ready() && !has_ended && self.of.as_ref().is_some_and(leaves) {
            self.is_over = true;
            let why = "the sandbox is being ended or put to sleep";
            let end = Messages::cut(self.messages.as_ref(), why);
            return Poll::Ready(Some(end.map_err(axum::Error::new)));
        }
        Messages::follow(&mut self.messages, &frame);
        frame
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
        // Whoever visits a page that a sandbox serves; and whoever asks for one that there is not.
        let visits = self.caller.as_ref().is_some_and(Caller::is_visitor);
        let port = self.route.contains("/ports/");
        match self.status.map(|status| status.as_u16()) {
            _ if visits && port => false,
            Some(502) if self.caller.is_none() => false,
            // Were they written down, whoever floods us would have the rest put aside.
            Some(429) => false,
            Some(401 | 403 | 421) => !self.is_one_of_many,
            _ => {
                let changes = match self.need {
                    Some(Need::Scope(scope, _)) => scope != Scope::Read,
                    Some(Need::Volume) => !matches!(self.method, Method::GET | Method::HEAD),
                    Some(Need::Nothing) | None => false,
                };
                changes && !rules::goes_on(&self.route)
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
        // A query alone is only had with a host before it.
        let uri =
            if path.starts_with('/') { path.to_owned() } else { format!("http://{host}{path}") };
        let request = axum::http::Request::get(uri).header(HOST, host);
        let mut request = request.header(SESSION, "theirs").body(()).unwrap();
        by_path(&front, &mut request);
        let path = request.uri().path_and_query().unwrap().to_string();
        (path, named(request.headers()).map(str::to_owned))
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
            ("80-a.box.example.org", "?x", "/v1/sessions/a/ports/80/?x"),
            (
                "8000-0123456789abcdef0123456789abcdef.e2b.app",
                "/x",
                "/v1/sessions/0123456789abcdef0123456789abcdef/ports/8000/x",
            ),
            ("8000-01234567-89ab-cdef-0123-456789abcdef.e2b.app", "/x", "/x"),
            // Who made it may stand behind the id, and what only looks like one is none.
            (
                "8000-0123456789abcdef0123456789abcdef-denizen.e2b.app",
                "/x",
                "/v1/sessions/0123456789abcdef0123456789abcdef/ports/8000/x",
            ),
            ("8000-im9r2ycjiy2534qsdy1oo.e2b.app", "/x", "/x"),
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
