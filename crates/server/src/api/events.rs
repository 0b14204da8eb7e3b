//! What happens, as a stream that a client can go on with where it was.
//!
//! The newest events are kept for those who come back. Who reads slowly loses events, never
//! memory of the daemon.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::Arc;

use axum::Extension;
use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderMap, header};
use axum::response::sse::{KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use denizen::{Event, MicroVmManager};
use futures::{Stream, StreamExt, stream};
use parking_lot::Mutex;
use serde::Deserialize;
use tokio::sync::watch;
use utoipa::IntoParams;
use uuid::Uuid;

use super::Api;
use super::extract::Query;
use super::refusal::{Answer, Refused};
use crate::access::Caller;

/// How many events are kept.
const MOST: usize = 4096;

/// The newest events.
pub(crate) struct Recent {
    /// Of this daemon: numbers of another one mean nothing here.
    boot: String,
    kept: Mutex<VecDeque<Arc<Kept>>>,
    /// The number of the last one; 0 before the first. Closed when no more will come.
    last: watch::Receiver<u64>,
}

struct Kept {
    number: u64,
    event: Event,
}

impl Recent {
    /// Follows a pool until it is gone.
    pub(crate) fn of(pool: &MicroVmManager) -> denizen::Result<Arc<Self>> {
        let mut events = pool.events()?;
        let (told, last) = watch::channel(0);
        let boot = Uuid::new_v4().simple().to_string();
        let recent = Arc::new(Self { boot, kept: Mutex::default(), last });
        let weak = Arc::downgrade(&recent);
        tokio::spawn(async move {
            let mut number = 0;
            while let Some(event) = events.next().await {
                let Some(recent) = weak.upgrade() else { return };
                number += 1;
                let mut kept = recent.kept.lock();
                if kept.len() == MOST {
                    kept.pop_front();
                }
                kept.push_back(Arc::new(Kept { number, event }));
                drop(kept);
                told.send_replace(number);
            }
        });
        Ok(recent)
    }

    /// The number in an id of this daemon's.
    fn number(&self, id: &str) -> Option<u64> {
        let (boot, number) = id.split_once('-')?;
        (boot == self.boot).then(|| number.parse().ok())?
    }

    /// All after the number, and those to come; none in the place of some that are lost.
    fn after(self: Arc<Self>, number: u64) -> impl Stream<Item = Option<Arc<Kept>>> + Send {
        let told = self.last.clone();
        stream::unfold((self, told, number), |(recent, mut told, after)| async move {
            loop {
                {
                    let kept = recent.kept.lock();
                    let oldest = kept.front().map_or(after + 1, |kept| kept.number);
                    if oldest > after + 1 {
                        drop(kept);
                        return Some((None, (recent, told, oldest - 1)));
                    }
                    let at = usize::try_from(after + 1 - oldest).unwrap_or(usize::MAX);
                    if let Some(next) = kept.get(at).cloned() {
                        drop(kept);
                        return Some((Some(next), (recent, told, after + 1)));
                    }
                }
                told.wait_for(|last| *last > after).await.ok()?;
            }
        })
    }
}

/// Whose events.
#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct Whose {
    /// Those of this session, by name or UUID, and those of none.
    session: Option<String>,
}

impl Whose {
    fn takes(&self, event: &Event) -> bool {
        let Some(session) = &self.session else { return true };
        event.session.is_nil()
            || event.name.as_ref() == Some(session)
            || event.session.to_string() == *session
    }
}

/// Follow what happens, from now on or from where one was.
///
/// With `Accept: text/event-stream` as server-sent events, each with an id by which a later
/// request goes on (`Last-Event-ID`); `event: lost` says that some are not kept any more. Otherwise
/// one JSON object a line; `{"event":"lost"}` says the same there.
#[utoipa::path(get, path = "/v1/events", tag = "events",
    params(Whose, ("Last-Event-ID" = Option<String>, Header, description = "The last one that was seen")),
    responses((status = 200, content((super::wire::ServerSent = "text/event-stream"),
        (denizen_api::Event = "application/x-ndjson"))), Refused))]
pub(crate) async fn events(
    State(api): State<Api>,
    Extension(caller): Extension<Caller>,
    Query(whose): Query<Whose>,
    headers: HeaderMap,
) -> Answer<Response> {
    let recent = api.recent;
    let word = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
    let last = word("last-event-id").map(|id| recent.number(id));
    let now = *recent.last.borrow();
    let (after, lost) = match last {
        None => (now, false),
        Some(Some(number)) => (number.min(now), false),
        // Of another daemon: nobody knows what was between.
        Some(None) => (0, true),
    };
    let boot = recent.boot.clone();
    let lost = stream::iter(lost.then_some(None));
    let all = lost.chain(recent.after(after)).filter(move |kept| {
        let takes = kept.as_ref().is_none_or(|kept| {
            let event = &kept.event;
            // What is nobody's, everybody is told.
            let sees = event.session.is_nil() || caller.sees(event.session, event.name.as_deref());
            sees && whose.takes(event)
        });
        std::future::ready(takes)
    });
    if word("accept").is_some_and(|accept| accept.contains("text/event-stream")) {
        let events = all.map(move |kept| {
            let Some(kept) = kept else {
                return Ok(axum::response::sse::Event::default().event("lost").data("{}"));
            };
            let data = serde_json::to_value(&kept.event).unwrap_or_default();
            let kind = data["event"].as_str().unwrap_or_default().to_owned();
            let event = axum::response::sse::Event::default()
                .id(format!("{boot}-{}", kept.number))
                .event(kind)
                .data(data.to_string());
            Ok::<_, Infallible>(event)
        });
        return Ok(Sse::new(events).keep_alive(KeepAlive::default()).into_response());
    }
    let lines = all.map(|kept| {
        let mut line = match kept {
            // Its parts are all strings and numbers: this cannot fail.
            Some(kept) => serde_json::to_vec(&kept.event).unwrap_or_default(),
            None => br#"{"event":"lost"}"#.to_vec(),
        };
        line.push(b'\n');
        Ok::<_, Infallible>(line)
    });
    Ok(([(header::CONTENT_TYPE, "application/x-ndjson")], Body::from_stream(lines)).into_response())
}
