//! `/v1`: sessions as resources, in JSON.

use std::path::PathBuf;
use std::sync::Arc;

use axum::body::Body;
use axum::extract::{Path, Query, Request, State};
use axum::http::StatusCode;
use axum::http::header::{CONTENT_LENGTH, CONTENT_TYPE};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post, put};
use axum::{Extension, Json, Router};
use denizen::{
    ArchiveError, Aspect, Credentials, Difference, Error, ImportOptions, MicroVmManager, Node,
    Progress, PullOptions, Retention, Stage, Version,
};
use futures::{StreamExt, TryStreamExt, stream};
use hyper_util::rt::TokioIo;
use serde::{Deserialize, Serialize};
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio_util::io::{ReaderStream, StreamReader};
use uuid::Uuid;

use crate::access::Caller;
use crate::lease::Leases;
use crate::metrics;

#[derive(Clone)]
struct Api {
    pool: Arc<MicroVmManager>,
    leases: Arc<Leases>,
    stop: Arc<Notify>,
}

pub(crate) fn router(pool: Arc<MicroVmManager>, leases: Arc<Leases>, stop: Arc<Notify>) -> Router {
    Router::new()
        .route("/v1/metrics", get(all_metrics))
        .route("/v1/health", get(health))
        .route("/v1/shutdown", post(shutdown))
        .route("/v1/events", get(events))
        .route("/v1/images", get(images).post(bring_image).delete(remove_image))
        .route("/v1/backups", get(all_backups))
        .route("/v1/backups/verify", post(verify_backups))
        .route("/v1/backups/forget", post(forget_backups))
        .route("/v1/recover", post(recover))
        .route("/v1/sessions", get(list))
        .route("/v1/sessions/{session}", get(inspect).delete(remove))
        .route("/v1/sessions/{session}/start", post(start))
        .route("/v1/sessions/{session}/stop", post(halt))
        .route("/v1/sessions/{session}/backup", post(backup))
        .route("/v1/sessions/{session}/backups", get(backups))
        .route("/v1/sessions/{session}/restore", post(restore))
        .route("/v1/sessions/{session}/fork", post(fork))
        .route("/v1/sessions/{session}/diff", get(diff))
        .route("/v1/sessions/{session}/snapshots", get(snapshots))
        .route("/v1/sessions/{session}/snapshots/{name}", put(snapshot).delete(remove_snapshot))
        .route("/v1/sessions/{session}/export", get(export))
        .route("/v1/sessions/{session}/import", post(import))
        .route("/v1/sessions/{session}/logs/{job}", get(log))
        .route("/v1/sessions/{session}/ports/{port}", get(port))
        .with_state(Api { pool, leases, stop })
}

/// An error as the API tells it: `{"code": …, "message": …}`.
#[derive(Debug, Serialize)]
pub(crate) struct Refused {
    #[serde(skip)]
    status: StatusCode,
    code: &'static str,
    message: String,
}

impl Refused {
    pub(crate) fn new(status: StatusCode, code: &'static str, message: String) -> Self {
        Self { status, code, message }
    }
}

impl IntoResponse for Refused {
    fn into_response(self) -> Response {
        (self.status, Json(self)).into_response()
    }
}

impl From<Error> for Refused {
    fn from(error: Error) -> Self {
        let (status, code) = match error.kind() {
            Error::Unknown { .. } => (StatusCode::NOT_FOUND, "unknown_session"),
            Error::NoBackup { .. } => (StatusCode::NOT_FOUND, "no_backup"),
            Error::NoSnapshot { .. } => (StatusCode::NOT_FOUND, "no_snapshot"),
            Error::SnapshotExists { .. } => (StatusCode::CONFLICT, "snapshot_exists"),
            Error::Name { .. } => (StatusCode::BAD_REQUEST, "bad_name"),
            Error::InUse { .. } => (StatusCode::CONFLICT, "in_use"),
            Error::AlreadyExists { .. } => (StatusCode::CONFLICT, "already_exists"),
            Error::BrokenOff { .. } => (StatusCode::BAD_REQUEST, "broken_off"),
            Error::NotImported(ArchiveError::NoSpace { .. })
            | Error::Backup(ArchiveError::NoSpace { .. }) => {
                (StatusCode::INSUFFICIENT_STORAGE, "no_space")
            }
            Error::NotImported(
                ArchiveError::Damaged { .. }
                | ArchiveError::Refused { .. }
                | ArchiveError::TooLarge { .. },
            ) => (StatusCode::UNPROCESSABLE_ENTITY, "bad_archive"),
            Error::OtherImage { .. } => (StatusCode::CONFLICT, "other_image"),
            Error::NoDestination => (StatusCode::CONFLICT, "no_destination"),
            Error::VolumeMissing { .. } => (StatusCode::CONFLICT, "volume_missing"),
            Error::AtCapacity { .. } | Error::AcquireTimeout { .. } => {
                (StatusCode::SERVICE_UNAVAILABLE, "at_capacity")
            }
            Error::Image(denizen_image::Error::NotFound { .. }) => {
                (StatusCode::NOT_FOUND, "unknown_image")
            }
            Error::Isolation { .. } => (StatusCode::CONFLICT, "isolation"),
            Error::ShuttingDown => (StatusCode::SERVICE_UNAVAILABLE, "shutting_down"),
            _ => (StatusCode::INTERNAL_SERVER_ERROR, "failed"),
        };
        Self { status, code, message: error.to_string() }
    }
}

type Answer<T> = Result<T, Refused>;

async fn health() -> Json<serde_json::Value> {
    Json(serde_json::json!({
        "version": env!("CARGO_PKG_VERSION"),
        "pid": std::process::id(),
    }))
}

async fn all_metrics(State(api): State<Api>) -> Answer<Response> {
    let text = metrics::text(&api.pool.figures()?, &api.pool.sessions()?);
    Ok(([(CONTENT_TYPE, metrics::CONTENT_TYPE)], text).into_response())
}

async fn shutdown(State(api): State<Api>) -> StatusCode {
    api.stop.notify_one();
    StatusCode::ACCEPTED
}

async fn list(State(api): State<Api>, Extension(caller): Extension<Caller>) -> Answer<Response> {
    let mut sessions = api.pool.sessions()?;
    sessions.retain(|session| caller.sees(session.id, session.name.as_deref()));
    Ok(Json(sessions).into_response())
}

async fn inspect(State(api): State<Api>, Path(session): Path<String>) -> Answer<Response> {
    let id = api.leases.find(&session)?;
    Ok(Json(api.pool.inspect(id)?).into_response())
}

#[derive(Deserialize)]
struct StartQuery {
    /// What a new session is made of.
    image: Option<String>,
}

async fn start(
    State(api): State<Api>,
    Path(session): Path<String>,
    Query(query): Query<StartQuery>,
) -> Answer<Response> {
    let image = match query.image {
        Some(name) => Some(api.pool.image(&name).await?.name),
        None => None,
    };
    let id = api.leases.find_or_name(&session).await?;
    drop(api.leases.take(id, image.as_deref()).await?);
    Ok(Json(api.pool.inspect(id)?).into_response())
}

#[derive(Deserialize)]
struct StopQuery {
    #[serde(default)]
    force: bool,
}

async fn halt(
    State(api): State<Api>,
    Path(session): Path<String>,
    Query(query): Query<StopQuery>,
) -> Answer<StatusCode> {
    let id = api.leases.find(&session)?;
    stop(&api, id, query.force).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// With force, what runs in the foreground is ended first; its requests then give the guard
/// back on their own.
async fn stop(api: &Api, id: Uuid, force: bool) -> Result<(), Error> {
    loop {
        match api.pool.stop(id, force).await {
            Err(Error::InUse { .. }) if force => {
                api.leases.kill(id).await;
                api.pool.released(id).await?;
            }
            done => return done,
        }
    }
}

async fn remove(
    State(api): State<Api>,
    Path(session): Path<String>,
    Query(query): Query<StopQuery>,
) -> Answer<StatusCode> {
    let id = api.leases.find(&session)?;
    if query.force {
        api.pool.inspect(id)?;
        match stop(&api, id, true).await {
            Ok(()) | Err(Error::VolumeMissing { .. }) => {}
            Err(error) => return Err(error.into()),
        }
    }
    api.pool.remove(id).await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn backup(State(api): State<Api>, Path(session): Path<String>) -> Answer<Response> {
    let id = api.leases.find(&session)?;
    api.pool.backup(id).await?;
    Ok(Json(api.pool.inspect(id)?).into_response())
}

async fn all_backups(State(api): State<Api>) -> Answer<Response> {
    Ok(Json(api.pool.all_backups().await?).into_response())
}

#[derive(Deserialize)]
struct VerifyQuery {
    #[serde(default)]
    read_data: bool,
}

async fn verify_backups(
    State(api): State<Api>,
    Query(query): Query<VerifyQuery>,
) -> Answer<Response> {
    Ok(Json(api.pool.verify_backups(query.read_data).await?).into_response())
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Forget {
    #[serde(default)]
    dry_run: bool,
    /// The pool's own, if there is none.
    #[serde(default)]
    retention: Option<Retention>,
}

async fn forget_backups(
    State(api): State<Api>,
    Json(Forget { dry_run, retention }): Json<Forget>,
) -> Answer<Response> {
    let retention = retention.map_or_else(|| api.pool.retention(), Ok)?;
    if retention.is_empty() {
        let message = "nothing says which backups are kept: name it (`--keep-last 3`, \
                       `--keep-daily 7` and so on), or set `retention` in the configuration";
        let (status, code) = (StatusCode::BAD_REQUEST, "no_retention");
        return Err(Refused { status, code, message: message.to_owned() });
    }
    Ok(Json(api.pool.forget_backups(&retention, dry_run).await?).into_response())
}

async fn recover(State(api): State<Api>) -> Answer<Response> {
    Ok(Json(api.pool.recover().await?).into_response())
}

async fn backups(State(api): State<Api>, Path(session): Path<String>) -> Answer<Response> {
    let id = api.leases.find(&session)?;
    Ok(Json(api.pool.backups(id).await?).into_response())
}

#[derive(Deserialize)]
struct RestoreQuery {
    backup: Option<String>,
    /// As it was at that time (RFC 3339), instead of a backup.
    at: Option<jiff::Timestamp>,
    /// Instead of a backup.
    snapshot: Option<String>,
}

async fn restore(
    State(api): State<Api>,
    Path(session): Path<String>,
    Query(query): Query<RestoreQuery>,
) -> Answer<Response> {
    let id = api.leases.find(&session)?;
    match (query.backup, query.at, query.snapshot) {
        (None, None, Some(name)) => api.pool.restore_snapshot(id, &name.parse()?).await?,
        (None, Some(at), None) => {
            let backup = api.pool.backup_at(id, at.into()).await?;
            api.pool.restore(id, Some(&backup.name)).await?;
        }
        (backup, None, None) => api.pool.restore(id, backup.as_deref()).await?,
        _ => {
            let message = "either a backup, a time or a snapshot is restored".to_owned();
            return Err(Refused { status: StatusCode::BAD_REQUEST, code: "bad_request", message });
        }
    }
    Ok(Json(api.pool.inspect(id)?).into_response())
}

#[derive(Deserialize)]
struct ForkQuery {
    /// Of the session as this snapshot has it.
    snapshot: Option<String>,
}

async fn fork(
    State(api): State<Api>,
    Extension(caller): Extension<Caller>,
    Path(session): Path<String>,
    Query(query): Query<ForkQuery>,
) -> Answer<Response> {
    caller.makes_nameless()?;
    let id = api.leases.find(&session)?;
    let made = match query.snapshot {
        Some(name) => api.pool.fork_snapshot(id, &name.parse()?).await?,
        None => api.pool.fork(id).await?,
    };
    Ok((StatusCode::CREATED, Json(api.pool.inspect(made)?)).into_response())
}

async fn snapshots(State(api): State<Api>, Path(session): Path<String>) -> Answer<Response> {
    let id = api.leases.find(&session)?;
    Ok(Json(api.pool.snapshots(id).await?).into_response())
}

async fn snapshot(
    State(api): State<Api>,
    Path((session, name)): Path<(String, String)>,
) -> Answer<StatusCode> {
    let id = api.leases.find(&session)?;
    api.pool.snapshot(id, &name.parse()?).await?;
    Ok(StatusCode::CREATED)
}

async fn remove_snapshot(
    State(api): State<Api>,
    Path((session, name)): Path<(String, String)>,
) -> Answer<StatusCode> {
    let id = api.leases.find(&session)?;
    if api.pool.remove_snapshot(id, &name.parse()?).await? {
        return Ok(StatusCode::NO_CONTENT);
    }
    Err(Error::NoSnapshot { session: id, name }.into())
}

/// The archive's bytes; their number is told first, so that one that breaks off is seen to.
async fn export(State(api): State<Api>, Path(session): Path<String>) -> Answer<Response> {
    let id = api.leases.find(&session)?;
    let export = api.pool.export(id).await?;
    let headers = [
        (CONTENT_TYPE, "application/zstd".to_owned()),
        (CONTENT_LENGTH, export.bytes().to_string()),
    ];
    // Whoever reads it keeps the daemon from leaving.
    let pieces = ReaderStream::new(export).inspect(move |_| api.leases.touch());
    Ok((headers, Body::from_stream(pieces)).into_response())
}

/// The body is the archive.
async fn import(
    State(api): State<Api>,
    Path(session): Path<String>,
    request: Request,
) -> Answer<Response> {
    let id = api.leases.find_or_name(&session).await?;
    let leases = api.leases.clone();
    let pieces = request.into_body().into_data_stream().map_err(std::io::Error::other);
    let pieces = pieces.inspect(move |_| leases.touch());
    match api.pool.import(id, StreamReader::new(pieces)).await {
        // By the name it was asked for.
        Err(Error::AlreadyExists { .. }) => Err(Error::AlreadyExists { session }.into()),
        imported => {
            imported?;
            Ok((StatusCode::CREATED, Json(api.pool.inspect(id)?)).into_response())
        }
    }
}

/// From which version to which.
#[derive(Deserialize)]
struct DiffQuery {
    /// The first is what this snapshot has.
    snapshot: Option<String>,
    /// The second is of this session; of the same one, if none is named.
    other: Option<String>,
    /// The second is what this snapshot has.
    other_snapshot: Option<String>,
}

#[derive(Serialize)]
struct DifferenceInfo {
    change: &'static str,
    tree: &'static str,
    path: String,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    aspects: Vec<&'static str>,
    before: Option<NodeInfo>,
    after: Option<NodeInfo>,
}

#[derive(Serialize)]
struct NodeInfo {
    kind: &'static str,
    size: u64,
    mode: String,
    user: u64,
    group: u64,
}

impl From<Node> for NodeInfo {
    fn from(node: Node) -> Self {
        let Node { kind, size, mode, user, group } = node;
        Self { kind, size, mode: format!("{mode:04o}"), user, group }
    }
}

impl From<Difference> for DifferenceInfo {
    fn from(difference: Difference) -> Self {
        let Difference { tree, path, before, after, aspects, .. } = difference;
        Self {
            change: match (&before, &after) {
                (None, _) => "added",
                (_, None) => "removed",
                _ => "changed",
            },
            tree,
            path: path.to_string_lossy().into_owned(),
            aspects: aspects.into_iter().map(Aspect::name).collect(),
            before: before.map(NodeInfo::from),
            after: after.map(NodeInfo::from),
        }
    }
}

async fn diff(
    State(api): State<Api>,
    Extension(caller): Extension<Caller>,
    Path(session): Path<String>,
    Query(query): Query<DiffQuery>,
) -> Answer<Response> {
    caller.touches(&api.pool, query.other.as_ref().unwrap_or(&session))?;
    let version = |session: &str, snapshot: Option<String>| {
        let snapshot = snapshot.map(|name| name.parse()).transpose()?;
        Ok::<_, Error>(Version { session: api.leases.find(session)?, snapshot })
    };
    let before = version(&session, query.snapshot)?;
    let after = version(query.other.as_ref().unwrap_or(&session), query.other_snapshot)?;
    let all = api.pool.diff(before, after).await?.into_iter().map(DifferenceInfo::from);
    Ok(Json(all.collect::<Vec<_>>()).into_response())
}

/// One JSON object a line, from now on.
async fn events(State(api): State<Api>, Extension(caller): Extension<Caller>) -> Answer<Response> {
    let events = api.pool.events()?;
    let lines = stream::unfold((events, caller), |(mut events, caller)| async {
        let event = loop {
            let event = events.next().await?;
            // What was missed is nobody's, so everybody is told.
            if event.session.is_nil() || caller.sees(event.session, event.name.as_deref()) {
                break event;
            }
        };
        // Its parts are all strings and numbers: this cannot fail.
        let mut line = serde_json::to_vec(&event).unwrap_or_default();
        line.push(b'\n');
        Some((Ok::<_, std::convert::Infallible>(line), (events, caller)))
    });
    Ok(([("content-type", "application/x-ndjson")], Body::from_stream(lines)).into_response())
}

/// What a detached command has printed, as far as its bounded log goes back.
async fn log(
    State(api): State<Api>,
    Path((session, job)): Path<(String, String)>,
) -> Answer<Response> {
    let id = api.leases.find(&session)?;
    let logs = api.pool.session_folder(id)?.join("logs");
    let files = denizen_agent::envd::Jobs::log(&logs, &job);
    if files.is_empty() {
        let message = format!("session {session} has no log of a detached command {job}");
        return Err(Refused { status: StatusCode::NOT_FOUND, code: "no_log", message });
    }
    let pieces = stream::iter(files).then(tokio::fs::File::open).flat_map(|file| match file {
        Ok(file) => ReaderStream::new(file).left_stream(),
        Err(error) => stream::iter([Err(error)]).right_stream(),
    });
    Ok(Body::from_stream(pieces).into_response())
}

async fn images(State(api): State<Api>) -> Answer<Response> {
    Ok(Json(api.pool.images().await?).into_response())
}

/// Which image to bring, and from where.
#[derive(Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
enum Bring {
    /// From a registry.
    Pull {
        reference: String,
        user: Option<String>,
        password: Option<String>,
        /// Certificates to trust besides the system's.
        #[serde(default)]
        certificates: Vec<PathBuf>,
    },
    /// From a file or folder of this machine.
    Import {
        path: PathBuf,
        /// The name it gets.
        name: Option<String>,
        /// Which one, if there are several.
        image: Option<String>,
    },
}

/// One JSON object a line: steps, then the image or an error.
async fn bring_image(State(api): State<Api>, Json(bring): Json<Bring>) -> Answer<Response> {
    api.pool.images().await?;
    let (lines, told) = tokio::sync::mpsc::unbounded_channel::<serde_json::Value>();
    let progress = {
        let lines = lines.clone();
        move |step: Progress| {
            let stage = match step.stage {
                Stage::Fetching => "fetching",
                Stage::Unpacking => "unpacking",
                Stage::Done => "done",
            };
            // Whoever asked may have gone.
            let _ = lines.send(serde_json::json!({
                "stage": stage, "layer": step.layer, "layers": step.layers,
                "bytes": step.bytes, "total": step.total,
            }));
        }
    };
    let work = async move {
        let brought = match bring {
            Bring::Pull { reference, user, password, certificates } => {
                let mut options = PullOptions::default();
                options.certificates = certificates;
                options.credentials = match (user, password) {
                    (Some(user), Some(password)) => Credentials::Password { user, password },
                    _ => docker_credentials(),
                };
                api.pool.pull_image(&reference, &options, progress).await
            }
            Bring::Import { path, name, image } => {
                let mut options = ImportOptions::default();
                options.name = name;
                options.image = image;
                api.pool.import_image(path, options, progress).await
            }
        };
        let last = match brought {
            Ok(image) => serde_json::json!({ "image": image }),
            Err(error) => serde_json::json!({ "error": Refused::from(error) }),
        };
        let _ = lines.send(last);
    };
    // Ends with the response: nobody waits for it any more.
    let work = stream::once(work).filter_map(|()| async { None });
    let told = tokio_stream::wrappers::UnboundedReceiverStream::new(told);
    let lines = stream::select(work, told).map(|line| {
        let mut line = line.to_string();
        line.push('\n');
        Ok::<_, std::convert::Infallible>(line)
    });
    Ok(([("content-type", "application/x-ndjson")], Body::from_stream(lines)).into_response())
}

/// As whom Docker would ask.
fn docker_credentials() -> Credentials {
    let folder = std::env::var_os("DOCKER_CONFIG")
        .map(PathBuf::from)
        .or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".docker")));
    let file = folder.map(|folder| folder.join("config.json")).filter(|file| file.exists());
    file.map_or(Credentials::Anonymous, Credentials::DockerConfig)
}

#[derive(Deserialize)]
struct ImageQuery {
    name: String,
}

async fn remove_image(
    State(api): State<Api>,
    Query(query): Query<ImageQuery>,
) -> Answer<StatusCode> {
    if api.pool.remove_image(&query.name).await? {
        return Ok(StatusCode::NO_CONTENT);
    }
    let message = format!("there is no image {}", query.name);
    Err(Refused { status: StatusCode::NOT_FOUND, code: "unknown_image", message })
}

/// A connection to a port that something in the session listens on; the request becomes it
/// (RFC 9110, 7.8), under the name `tcp`.
async fn port(
    State(api): State<Api>,
    Path((session, port)): Path<(String, u16)>,
    mut request: Request,
) -> Answer<Response> {
    let upgrades = request.headers().get("upgrade").is_some_and(|it| it == "tcp");
    if !upgrades {
        let message = "a port is reached by an upgrade of the connection to tcp".to_owned();
        return Err(Refused { status: StatusCode::UPGRADE_REQUIRED, code: "upgrade", message });
    }
    let id = api.leases.find(&session)?;
    let lease = api.leases.take(id, None).await?;
    let unreachable = |error: &dyn std::fmt::Display| Refused {
        status: StatusCode::BAD_GATEWAY,
        code: "port",
        message: format!("port {port} of session {session} cannot be reached: {error}"),
    };
    let inside = lease.guard.agent()?.connect(port).await.map_err(Error::from)?;
    let inside = TcpStream::from_std(inside).map_err(|error| unreachable(&error))?;
    // Whether it was refused shows when it can be written to.
    inside.writable().await.map_err(|error| unreachable(&error))?;
    if let Some(error) = inside.take_error().map_err(|error| unreachable(&error))? {
        return Err(unreachable(&error));
    }
    let upgrade = hyper::upgrade::on(&mut request);
    tokio::spawn(async move {
        let Ok(outside) = upgrade.await else { return };
        let (mut outside, mut inside) = (TokioIo::new(outside), inside);
        // Either side may end it at any time.
        let _ = tokio::io::copy_bidirectional(&mut outside, &mut inside).await;
        drop(lease);
    });
    let headers = [("connection", "upgrade"), ("upgrade", "tcp")];
    Ok((StatusCode::SWITCHING_PROTOCOLS, headers).into_response())
}
