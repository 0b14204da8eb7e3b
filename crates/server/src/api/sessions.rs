//! Sessions: made, listed, looked at, started, stopped, copied, removed.

use std::collections::HashMap;

use axum::Extension;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use denizen::{Error, SessionInfo};
use denizen_api::{Code, NewSession, Session, Sessions};
use serde::Deserialize;
use utoipa::IntoParams;
use uuid::Uuid;

use super::backups::{Kept, Source};
use super::extract::{Json, Path, Query};
use super::refusal::{Answer, Refused};
use super::{Api, wire};
use crate::access::Caller;

/// Most sessions in one part of a list.
const MOST: usize = 1000;

/// Which sessions are listed.
#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct Filter {
    /// Those in this state.
    state: Option<String>,
    /// Those whose name begins so.
    prefix: Option<String>,
    /// Those with changes that no verified backup holds, or those without.
    unsaved: Option<bool>,
    /// At most so many.
    #[param(minimum = 1, maximum = 1000)]
    limit: Option<usize>,
    /// Those that come after this one.
    after: Option<Uuid>,
}

impl Filter {
    fn takes(&self, session: &SessionInfo) -> bool {
        let name = session.name.as_deref().unwrap_or_default();
        self.state.as_ref().is_none_or(|state| session.state == state)
            && self.prefix.as_ref().is_none_or(|prefix| name.starts_with(prefix.as_str()))
            && self.unsaved.is_none_or(|unsaved| session.unsaved == unsaved)
            && self.after.is_none_or(|after| session.id > after)
    }
}

/// List sessions.
#[utoipa::path(get, path = "/v1/sessions", tag = "sessions", params(Filter),
    responses((status = 200, body = Sessions), Refused))]
pub(crate) async fn list(
    State(api): State<Api>,
    Extension(caller): Extension<Caller>,
    Query(filter): Query<Filter>,
) -> Answer<axum::Json<Sessions>> {
    let limit = filter.limit.unwrap_or(MOST);
    if limit == 0 || limit > MOST {
        return Err(Refused::new(Code::BadRequest, format!("limit is from 1 to {MOST}")));
    }
    let mut all = api.pool.sessions()?;
    all.retain(|it| caller.sees(it.id, it.name.as_deref()) && filter.takes(it));
    all.sort_unstable_by_key(|session| session.id);
    let more = all.len() > limit;
    all.truncate(limit);
    let next = all.last().filter(|_| more).map(|last| last.id);
    let sessions = measured(&api, all).await?;
    Ok(axum::Json(Sessions { sessions, next }))
}

/// Sessions with what they use.
async fn measured(api: &Api, all: Vec<SessionInfo>) -> Answer<Vec<Session>> {
    let running = all.iter().filter(|it| matches!(it.state, "active" | "frozen"));
    let running: Vec<Uuid> = running.map(|session| session.id).collect();
    let mut used = match running.as_slice() {
        [] => HashMap::new(),
        running => api.pool.usage(running).await?,
    };
    let told = all.into_iter().map(|info| {
        let usage = used.remove(&info.id).map(wire::usage);
        Session { usage, ..wire::session(info) }
    });
    Ok(told.collect())
}

/// Make a session, and start it.
///
/// With the header `Idempotency-Key` a repetition makes no second one.
#[utoipa::path(post, path = "/v1/sessions", tag = "sessions",
    params(("Idempotency-Key" = Option<String>, Header, description = "Any text that no other request has")),
    request_body = NewSession, responses((status = 201, body = Session), Refused))]
pub(crate) async fn create(
    State(api): State<Api>,
    Extension(caller): Extension<Caller>,
    headers: HeaderMap,
    Json(new): Json<NewSession>,
) -> Answer<Response> {
    let NewSession { name, image } = new;
    match &name {
        Some(name) => caller.touches(&api.pool, name)?,
        None => caller.makes_nameless()?,
    }
    let words = ["create", name.as_deref().unwrap_or(""), image.as_deref().unwrap_or("")];
    let work = {
        let (api, name, image) = (api.clone(), name.clone(), image.clone());
        async move {
            let image = known(&api, image).await?;
            let id = match &name {
                None => Uuid::new_v4(),
                // A UUID is no name: whoever has one wants that session.
                Some(name) => {
                    let there = api.leases.find(name).and_then(|id| api.pool.inspect(id));
                    match there {
                        Err(Error::Unknown { .. }) => api.leases.find_or_name(name).await?,
                        Err(error) => return Err(error.into()),
                        Ok(_) => {
                            return Err(Error::AlreadyExists { session: name.clone() }.into());
                        }
                    }
                }
            };
            begin(&api, id, image).await
        }
    };
    made(&api, caller, &headers, &words, work).await
}

/// Answers with a session that was made, once for each idempotency key.
async fn made(
    api: &Api,
    caller: Caller,
    headers: &HeaderMap,
    request: &[&str],
    work: impl Future<Output = Answer<Session>> + Send + 'static,
) -> Answer<Response> {
    let work = async {
        // Strings and numbers: this cannot fail.
        let made = serde_json::to_value(work.await?).unwrap_or_default();
        Ok((StatusCode::CREATED, made))
    };
    let (status, made) = api.repeats.once(caller, headers, request, work).await?;
    let location = format!("/v1/sessions/{}", made["id"].as_str().unwrap_or_default());
    Ok((status, [(header::LOCATION, location)], made).into_response())
}

/// Starts a session, which is made of the image if it is not there.
async fn begin(api: &Api, id: Uuid, image: Option<String>) -> Answer<Session> {
    drop(api.leases.take(id, image.as_deref()).await?);
    Ok(wire::session(api.pool.inspect(id)?))
}

/// The whole name of an image that there is. To be asked for before a session is given a name,
/// which stays.
async fn known(api: &Api, image: Option<String>) -> Answer<Option<String>> {
    Ok(match image {
        Some(name) => Some(api.pool.image(&name).await?.name),
        None => None,
    })
}

/// Show a session.
#[utoipa::path(get, path = "/v1/sessions/{session}", tag = "sessions",
    params(("session" = String, Path, description = "Name or UUID")),
    responses((status = 200, body = Session), Refused))]
pub(crate) async fn inspect(
    State(api): State<Api>,
    Path(session): Path<String>,
) -> Answer<axum::Json<Session>> {
    let id = api.leases.find(&session)?;
    let info = api.pool.inspect(id)?;
    let told = measured(&api, vec![info]).await?.pop();
    Ok(axum::Json(told.ok_or(Error::Unknown { session })?))
}

/// What a session is to be made of, if it is not there.
#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct Image {
    /// Its root: an image's name. The daemon's setting, if none is named.
    image: Option<String>,
}

/// Start a session, and make it if it is not there.
#[utoipa::path(put, path = "/v1/sessions/{session}", tag = "sessions",
    params(("session" = String, Path, description = "Name or UUID"), Image),
    responses((status = 200, description = "It was there", body = Session),
        (status = 201, description = "It was made", body = Session), Refused))]
pub(crate) async fn ensure(
    State(api): State<Api>,
    Path(session): Path<String>,
    Query(Image { image }): Query<Image>,
) -> Answer<(StatusCode, axum::Json<Session>)> {
    let image = known(&api, image).await?;
    let id = api.leases.find_or_name(&session).await?;
    let status = match api.pool.inspect(id) {
        Ok(_) => StatusCode::OK,
        Err(_) => StatusCode::CREATED,
    };
    Ok((status, axum::Json(begin(&api, id, image).await?)))
}

/// Start a session.
#[utoipa::path(post, path = "/v1/sessions/{session}/start", tag = "sessions",
    params(("session" = String, Path, description = "Name or UUID")),
    responses((status = 200, body = Session), Refused))]
pub(crate) async fn start(
    State(api): State<Api>,
    Path(session): Path<String>,
) -> Answer<axum::Json<Session>> {
    let id = api.leases.find(&session)?;
    api.pool.inspect(id)?;
    Ok(axum::Json(begin(&api, id, None).await?))
}

/// Put a session to sleep as it stands, with what runs in it.
///
/// It sleeps until it is next used, and goes on then. Already asleep, stopped or archived is fine.
#[utoipa::path(post, path = "/v1/sessions/{session}/pause", tag = "sessions",
    params(("session" = String, Path, description = "Name or UUID")),
    responses((status = 204, description = "It sleeps"), Refused))]
pub(crate) async fn pause(
    State(api): State<Api>,
    Path(session): Path<String>,
) -> Answer<StatusCode> {
    let id = api.leases.find(&session)?;
    api.pool.pause(id).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Whether what runs is ended.
#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct Force {
    /// End commands in the foreground and background processes first.
    #[serde(default)]
    force: bool,
}

/// Stop a session: its processes end, its files stay.
#[utoipa::path(post, path = "/v1/sessions/{session}/stop", tag = "sessions",
    params(("session" = String, Path, description = "Name or UUID"), Force),
    responses((status = 204, description = "It is stopped"), Refused))]
pub(crate) async fn stop(
    State(api): State<Api>,
    Path(session): Path<String>,
    Query(Force { force }): Query<Force>,
) -> Answer<StatusCode> {
    let id = api.leases.find(&session)?;
    drop(api.leases.stop(id, force).await?);
    Ok(StatusCode::NO_CONTENT)
}

/// Remove a session, its local files and snapshots; backups stay.
#[utoipa::path(delete, path = "/v1/sessions/{session}", tag = "sessions",
    params(("session" = String, Path, description = "Name or UUID"), Force),
    responses((status = 204, description = "It is gone"), Refused))]
pub(crate) async fn remove(
    State(api): State<Api>,
    Path(session): Path<String>,
    Query(Force { force }): Query<Force>,
) -> Answer<StatusCode> {
    let id = api.leases.find(&session)?;
    if force {
        api.leases.remove(id).await?;
    } else {
        api.pool.remove(id).await?;
    }
    Ok(StatusCode::NO_CONTENT)
}

/// Make a new session that begins with a copy of another's files, also while that runs.
///
/// As they are now, if no source is named. A backup can be copied of a session too whose own files
/// are gone.
///
/// With the header `Idempotency-Key` a repetition makes no second one.
#[utoipa::path(post, path = "/v1/sessions/{session}/fork", tag = "sessions",
    params(("session" = String, Path, description = "Name or UUID"), Source,
        ("Idempotency-Key" = Option<String>, Header, description = "Any text that no other request has")),
    responses((status = 201, body = Session), Refused))]
pub(crate) async fn fork(
    State(api): State<Api>,
    Extension(caller): Extension<Caller>,
    Path(session): Path<String>,
    Query(source): Query<Source>,
    headers: HeaderMap,
) -> Answer<Response> {
    caller.makes_nameless()?;
    let id = api.leases.find(&session)?;
    let text = id.to_string();
    let kept = source.kept()?;
    let told = format!("{kept:?}");
    let words = ["fork", &text, &told];
    let work = {
        let api = api.clone();
        async move {
            let made = match kept {
                None => api.pool.fork(id).await?,
                Some(Kept::Snapshot(name)) => api.pool.fork_snapshot(id, &name.parse()?).await?,
                Some(Kept::Backup(name)) => api.pool.fork_backup(id, &name).await?,
                Some(Kept::At(at)) => {
                    let backup = api.pool.backup_at(id, at.into()).await?;
                    api.pool.fork_backup(id, &backup.name).await?
                }
            };
            Ok(wire::session(api.pool.inspect(made)?))
        }
    };
    made(&api, caller, &headers, &words, work).await
}
