//! What is done for a request, tied together: its id, which its answer, the logs and the audit log
//! have, and its trace (W3C Trace Context), which begins where its client says and goes on in the
//! commands that it starts. Nothing is decided by it, and nothing secret may be in a span: no key, no
//! path of a file, no command.
//!
//! Whether spans go anywhere is up to the program's subscriber. Where they do not, what a client
//! has sent is handed to its commands as it came.

use std::collections::HashMap;
use std::sync::Arc;

use axum::extract::Request;
use axum::http::{HeaderMap, HeaderName, HeaderValue};
use axum::middleware::Next;
use axum::response::Response;
use denizen_agent::envd::Trace;
use opentelemetry::trace::TraceContextExt;
use opentelemetry::{Context, global};
use opentelemetry_http::{HeaderExtractor, HeaderInjector};
use tracing::field::Empty;
use tracing::{Instrument, Span};
use tracing_opentelemetry::OpenTelemetrySpanExt;
use uuid::Uuid;

/// Header by which a request is known, in both directions.
pub(crate) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// A request's id: printable ASCII without spaces, quotes and backslashes.
#[derive(Clone, Debug)]
pub(crate) struct RequestId(pub(crate) String);

impl RequestId {
    /// The one that a client has chosen, if it is one; else a new one.
    fn of(headers: &HeaderMap) -> Self {
        let plain = |byte: u8| byte.is_ascii_graphic() && !b"\"'\\`<>".contains(&byte);
        let given = headers.get(REQUEST_ID).and_then(|id| id.to_str().ok());
        let given = given.filter(|id| (1..=128).contains(&id.len()) && id.bytes().all(plain));
        Self(given.map_or_else(|| Uuid::new_v4().to_string(), str::to_owned))
    }
}

/// Has a request answered within a span of its own.
pub(crate) async fn traced(mut request: Request, next: Next) -> Response {
    let id = RequestId::of(request.headers());
    let span = tracing::info_span!(
        "request",
        request_id = id.0,
        session = Empty,
        // By the names that OpenTelemetry has for them.
        http.request.method = request.method().as_str(),
        http.route = Empty,
        http.response.status_code = Empty,
        trace_id = Empty,
        otel.kind = "server",
        otel.status_code = Empty,
    );
    // Without a subscriber for it there is nothing to have a parent.
    let _ = span.set_parent(parent(request.headers()));
    note_trace(&span);
    request.extensions_mut().insert(id.clone());
    // Whoever handles it finds both in its headers, in whichever task that is.
    let context = span.context();
    if context.span().span_context().is_valid() {
        let mut headers = HeaderInjector(request.headers_mut());
        global::get_text_map_propagator(|it| it.inject_context(&context, &mut headers));
    }
    // It was made of a header's value, or of hexadecimal digits.
    let id = HeaderValue::try_from(id.0).ok();
    if let Some(id) = &id {
        request.headers_mut().insert(REQUEST_ID, id.clone());
    }
    let begun = std::time::Instant::now();
    let mut answer = next.run(request).instrument(span.clone()).await;
    let status = answer.status();
    span.record("http.response.status_code", i64::from(status.as_u16()));
    let milliseconds = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
    span.in_scope(|| {
        if status.is_server_error() {
            span.record("otel.status_code", "ERROR");
            tracing::warn!(status = status.as_u16(), milliseconds, "answered with a failure");
        } else {
            tracing::debug!(status = status.as_u16(), milliseconds, "answered");
        }
    });
    if let Some(id) = id {
        answer.headers_mut().insert(REQUEST_ID, id);
    }
    answer
}

/// Says what the request is, once that is known.
pub(crate) fn note(method: &str, route: &str, session: Option<&str>) {
    let span = Span::current();
    span.record("http.route", route);
    // Not by `otel.name`, which is heeded only until the span has begun.
    span.context().span().update_name(format!("{method} {route}"));
    if let Some(session) = session {
        span.record("session", session);
    }
}

/// Gives each command that a request with these headers starts in a session its span, and what its
/// environment gets of that.
///
/// It is no child of the request's span but for whoever reads traces: it may last much longer.
pub(crate) fn of_commands(session: Uuid, headers: &HeaderMap) -> Trace {
    let parent = parent(headers);
    let id = headers.get(REQUEST_ID).and_then(|id| Some(id.to_str().ok()?.to_owned()));
    Arc::new(move || {
        let span = tracing::info_span!(
            parent: None,
            "command",
            %session,
            request_id = id,
            pid = Empty,
            exit_code = Empty,
            trace_id = Empty,
        );
        let _ = span.set_parent(parent.clone());
        note_trace(&span);
        let own = span.context();
        let is_own = own.span().span_context().is_valid();
        let mut carried = HashMap::new();
        let context = if is_own { &own } else { &parent };
        global::get_text_map_propagator(|it| it.inject_context(context, &mut carried));
        let carried = carried.into_iter().filter(|(_, value)| !value.is_empty());
        let carried = carried.map(|(name, value)| (name.to_uppercase(), value)).collect();
        (span, carried)
    })
}

/// What a request is a part of.
fn parent(headers: &HeaderMap) -> Context {
    global::get_text_map_propagator(|propagator| propagator.extract(&HeaderExtractor(headers)))
}

fn note_trace(span: &Span) {
    let context = span.context();
    let context = context.span().span_context().clone();
    if context.is_valid() {
        span.record("trace_id", context.trace_id().to_string());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_taken_only_if_it_is_one() {
        let of = |given: &[u8]| {
            let mut headers = HeaderMap::new();
            headers.extend(HeaderValue::from_bytes(given).map(|it| (REQUEST_ID, it)));
            RequestId::of(&headers).0
        };
        assert_eq!(of(b"a/b:1_2-3.4"), "a/b:1_2-3.4");
        for bad in [&b""[..], b"a b", b"\"", b"\\n", b"\xff", "x".repeat(129).as_bytes()] {
            let made = of(bad);
            assert!(Uuid::try_parse(&made).is_ok(), "{bad:?}: {made}");
        }
        assert_ne!(of(b""), of(b""));
    }
}
