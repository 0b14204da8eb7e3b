//! What sessions can be restored from, and how they move to other machines.

use std::path::PathBuf;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::http::header::{CONTENT_LENGTH, CONTENT_TYPE};
use axum::response::{IntoResponse, Response};
use denizen::Error;
use denizen_api::{Backup, BackupReport, Code, Forget, Restore, Session};
use futures::{StreamExt, TryStreamExt};
use serde::Deserialize;
use tokio_util::io::{ReaderStream, StreamReader};
use utoipa::IntoParams;

use super::extract::{Json, Path, Query};
use super::refusal::{Answer, Refused};
use super::wire::Binary;
use super::{Api, wire};

/// Back a session up now.
#[utoipa::path(post, path = "/v1/sessions/{session}/backup", tag = "backups",
    params(("session" = String, Path, description = "Name or UUID")),
    responses((status = 200, body = Session), Refused))]
pub(crate) async fn backup(
    State(api): State<Api>,
    Path(session): Path<String>,
) -> Answer<axum::Json<Session>> {
    let id = api.leases.find(&session)?;
    api.pool.backup(id).await?;
    Ok(axum::Json(wire::session(api.pool.inspect(id)?)))
}

/// List the backups of all sessions, newest first.
#[utoipa::path(get, path = "/v1/backups", tag = "backups",
    responses((status = 200, body = Vec<Backup>), Refused))]
pub(crate) async fn all(State(api): State<Api>) -> Answer<axum::Json<Vec<Backup>>> {
    Ok(axum::Json(wire::backups(api.pool.all_backups().await?)))
}

/// List the backups of a session, newest first.
#[utoipa::path(get, path = "/v1/sessions/{session}/backups", tag = "backups",
    params(("session" = String, Path, description = "Name or UUID")),
    responses((status = 200, body = Vec<Backup>), Refused))]
pub(crate) async fn of_session(
    State(api): State<Api>,
    Path(session): Path<String>,
) -> Answer<axum::Json<Vec<Backup>>> {
    let id = api.leases.find(&session)?;
    Ok(axum::Json(wire::backups(api.pool.backups(id).await?)))
}

/// How much is looked at.
#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct Depth {
    /// Read every byte back.
    #[serde(default)]
    read_data: bool,
}

/// Check whether all that is at the backup destination is what was written.
#[utoipa::path(post, path = "/v1/backups/verify", tag = "backups", params(Depth),
    responses((status = 200, body = BackupReport), Refused))]
pub(crate) async fn verify(
    State(api): State<Api>,
    Query(Depth { read_data }): Query<Depth>,
) -> Answer<axum::Json<BackupReport>> {
    let _busy = api.leases.busy();
    Ok(axum::Json(wire::report(api.pool.verify_backups(read_data).await?)))
}

/// Delete backups that no rule keeps.
#[utoipa::path(post, path = "/v1/backups/forget", tag = "backups", request_body = Forget,
    responses((status = 200, description = "Those that were deleted, or would be",
        body = Vec<Backup>), Refused))]
pub(crate) async fn forget(
    State(api): State<Api>,
    Json(Forget { dry_run, retention }): Json<Forget>,
) -> Answer<axum::Json<Vec<Backup>>> {
    let _busy = api.leases.busy();
    let retention = match retention {
        Some(retention) => wire::retention(retention),
        None => api.pool.retention()?,
    };
    if retention.is_empty() {
        let detail = "nothing says which backups are kept: name it (`--keep-last 3`, \
                      `--keep-daily 7` and so on), or set `retention` in the configuration";
        return Err(Refused::new(Code::NoRetention, detail));
    }
    Ok(axum::Json(wire::backups(api.pool.forget_backups(&retention, dry_run).await?)))
}

/// Delete a backup, by its name or its first eight letters or more.
///
/// The latest of a session that is known is refused.
#[utoipa::path(delete, path = "/v1/backups/{backup}", tag = "backups",
    params(("backup" = String, Path, description = "Its name, or eight letters of it")),
    responses((status = 200, description = "What was deleted", body = Backup), Refused))]
pub(crate) async fn delete(
    State(api): State<Api>,
    Path(backup): Path<String>,
) -> Answer<axum::Json<Backup>> {
    let _busy = api.leases.busy();
    Ok(axum::Json(wire::backup(api.pool.delete_backup(&backup).await?)))
}

/// Make sessions known here of which there are only backups.
#[utoipa::path(post, path = "/v1/recover", tag = "backups",
    responses((status = 200, description = "Those that were not known", body = Vec<Session>),
        Refused))]
pub(crate) async fn recover(State(api): State<Api>) -> Answer<axum::Json<Vec<Session>>> {
    let _busy = api.leases.busy();
    let found = api.pool.recover().await?;
    Ok(axum::Json(found.into_iter().map(wire::session).collect()))
}

/// What was kept of a session.
#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct Source {
    /// This backup, or the one whose name begins so.
    backup: Option<String>,
    /// As it was at that time (RFC 3339).
    #[param(value_type = Option<String>, format = DateTime)]
    at: Option<jiff::Timestamp>,
    /// This snapshot.
    snapshot: Option<String>,
}

/// What a [`Source`] names.
#[derive(Debug)]
pub(crate) enum Kept {
    Backup(String),
    At(jiff::Timestamp),
    Snapshot(String),
}

impl Source {
    /// What is named, if anything is; it must be one thing.
    pub(crate) fn kept(self) -> Answer<Option<Kept>> {
        match (self.backup, self.at, self.snapshot) {
            (None, None, None) => Ok(None),
            (Some(backup), None, None) => Ok(Some(Kept::Backup(backup))),
            (None, Some(at), None) => Ok(Some(Kept::At(at))),
            (None, None, Some(snapshot)) => Ok(Some(Kept::Snapshot(snapshot))),
            _ => {
                let detail = "name one of a backup, a time and a snapshot, not several";
                Err(Refused::new(Code::BadRequest, detail))
            }
        }
    }
}

/// Put a session, or some of its files, back as a backup or a snapshot has it: as the newest
/// backup, if none is named.
#[utoipa::path(post, path = "/v1/sessions/{session}/restore", tag = "backups",
    params(("session" = String, Path, description = "Name or UUID"), Source),
    request_body = Option<Restore>, responses((status = 200, body = Session), Refused))]
pub(crate) async fn restore(
    State(api): State<Api>,
    Path(session): Path<String>,
    Query(source): Query<Source>,
    only: Option<Json<Restore>>,
) -> Answer<axum::Json<Session>> {
    let id = api.leases.find(&session)?;
    let paths: Option<Vec<PathBuf>> =
        only.map(|Json(Restore { paths })| paths.into_iter().map(PathBuf::from).collect());
    let backup = match source.kept()? {
        None => None,
        Some(Kept::Backup(name)) => Some(name),
        Some(Kept::At(at)) => Some(api.pool.backup_at(id, at.into()).await?.name),
        Some(Kept::Snapshot(name)) => {
            let name = name.parse()?;
            match paths {
                None => api.pool.restore_snapshot(id, &name).await?,
                Some(paths) => api.pool.restore_snapshot_paths(id, &name, &paths).await?,
            }
            return Ok(axum::Json(wire::session(api.pool.inspect(id)?)));
        }
    };
    match paths {
        None => api.pool.restore(id, backup.as_deref()).await?,
        Some(paths) => api.pool.restore_paths(id, backup.as_deref(), &paths).await?,
    }
    Ok(axum::Json(wire::session(api.pool.inspect(id)?)))
}

/// Read a session as an archive (tar.zst) that can be imported anywhere.
///
/// The number of bytes is told first, so that one that breaks off is seen to.
#[utoipa::path(get, path = "/v1/sessions/{session}/export", tag = "backups",
    params(("session" = String, Path, description = "Name or UUID")),
    responses((status = 200, content_type = "application/zstd", body = Binary), Refused))]
pub(crate) async fn export(
    State(api): State<Api>,
    Path(session): Path<String>,
) -> Answer<Response> {
    let busy = api.leases.busy();
    let id = api.leases.find(&session)?;
    let export = api.pool.export(id).await?;
    let headers = [
        (CONTENT_TYPE, "application/zstd".to_owned()),
        (CONTENT_LENGTH, export.bytes().to_string()),
    ];
    // Whoever reads it keeps the daemon from leaving.
    let pieces = ReaderStream::new(export).inspect(move |_| {
        let _ = &busy;
    });
    Ok((headers, Body::from_stream(pieces)).into_response())
}

/// Make a new session of an archive: an exported one, a backup, or any tar.zst of a folder.
#[utoipa::path(post, path = "/v1/sessions/{session}/import", tag = "backups",
    params(("session" = String, Path, description = "Name or UUID of the new session")),
    request_body(content = Binary, content_type = "application/zstd"),
    responses((status = 201, body = Session), Refused))]
pub(crate) async fn import(
    State(api): State<Api>,
    Path(session): Path<String>,
    request: Request,
) -> Answer<(StatusCode, axum::Json<Session>)> {
    let _busy = api.leases.busy();
    let id = api.leases.find_or_name(&session).await?;
    let pieces = request.into_body().into_data_stream().map_err(std::io::Error::other);
    match api.pool.import(id, StreamReader::new(pieces)).await {
        // By the name it was asked for.
        Err(Error::AlreadyExists { .. }) => Err(Error::AlreadyExists { session }.into()),
        imported => {
            imported?;
            Ok((StatusCode::CREATED, axum::Json(wire::session(api.pool.inspect(id)?))))
        }
    }
}
