//! Sessions as they once were, on the same disk, and what differs between two states.

use axum::Extension;
use axum::extract::State;
use axum::http::StatusCode;
use denizen::{Error, Version};
use denizen_api::{Difference, Snapshot};
use serde::Deserialize;
use utoipa::IntoParams;

use super::extract::{Path, Query};
use super::refusal::{Answer, Refused};
use super::{Api, wire};
use crate::access::Caller;

/// List a session's snapshots.
#[utoipa::path(get, path = "/v1/sessions/{session}/snapshots", tag = "snapshots",
    params(("session" = String, Path, description = "Name or UUID")),
    responses((status = 200, body = Vec<Snapshot>), Refused))]
pub(crate) async fn list(
    State(api): State<Api>,
    Path(session): Path<String>,
) -> Answer<axum::Json<Vec<Snapshot>>> {
    let id = api.leases.find(&session)?;
    let all = api.pool.snapshots(id).await?;
    Ok(axum::Json(all.iter().map(wire::snapshot).collect()))
}

/// Keep a session's files as they are now under a name, on this disk.
#[utoipa::path(put, path = "/v1/sessions/{session}/snapshots/{name}", tag = "snapshots",
    params(("session" = String, Path, description = "Name or UUID"),
        ("name" = String, Path, description = "The snapshot's name")),
    responses((status = 201, description = "It was taken"), Refused))]
pub(crate) async fn take(
    State(api): State<Api>,
    Path((session, name)): Path<(String, String)>,
) -> Answer<StatusCode> {
    let id = api.leases.find(&session)?;
    api.pool.snapshot(id, &name.parse()?).await?;
    Ok(StatusCode::CREATED)
}

/// Remove a snapshot.
#[utoipa::path(delete, path = "/v1/sessions/{session}/snapshots/{name}", tag = "snapshots",
    params(("session" = String, Path, description = "Name or UUID"),
        ("name" = String, Path, description = "The snapshot's name")),
    responses((status = 204, description = "It is gone"), Refused))]
pub(crate) async fn remove(
    State(api): State<Api>,
    Path((session, name)): Path<(String, String)>,
) -> Answer<StatusCode> {
    let id = api.leases.find(&session)?;
    if api.pool.remove_snapshot(id, &name.parse()?).await? {
        return Ok(StatusCode::NO_CONTENT);
    }
    Err(Error::NoSnapshot { session: id, name }.into())
}

/// From which state to which.
#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct Between {
    /// The first is what this snapshot has.
    snapshot: Option<String>,
    /// The second is of this session; of the same one, if none is named.
    other: Option<String>,
    /// The second is what this snapshot has.
    other_snapshot: Option<String>,
}

/// List what differs between two states.
#[utoipa::path(get, path = "/v1/sessions/{session}/diff", tag = "snapshots",
    params(("session" = String, Path, description = "Name or UUID"), Between),
    responses((status = 200, body = Vec<Difference>), Refused))]
pub(crate) async fn diff(
    State(api): State<Api>,
    Extension(caller): Extension<Caller>,
    Path(session): Path<String>,
    Query(between): Query<Between>,
) -> Answer<axum::Json<Vec<Difference>>> {
    let _busy = api.leases.busy();
    caller.touches(&api.pool, between.other.as_ref().unwrap_or(&session))?;
    let version = |session: &str, snapshot: Option<String>| {
        let snapshot = snapshot.map(|name| name.parse()).transpose()?;
        Ok::<_, Error>(Version { session: api.leases.find(session)?, snapshot })
    };
    let before = version(&session, between.snapshot)?;
    let after = version(between.other.as_ref().unwrap_or(&session), between.other_snapshot)?;
    let all = api.pool.diff(before, after).await?;
    Ok(axum::Json(all.into_iter().map(wire::difference).collect()))
}
