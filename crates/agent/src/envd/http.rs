//! The part of the protocol that is plain HTTP: content of files, and how the instance is.
//!
//! Own additions, which clients of envd do not ask for: `mode` sets a file's permission bits,
//! and `format=tar` moves a whole folder ([`denizen_envd::folder`]).

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use axum::body::Body;
use axum::extract::{DefaultBodyLimit, FromRequest, Multipart, Query, Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use bytes::Bytes;
use connectrpc::{ConnectError, ErrorCode};
use denizen_envd::{MODE, folder};
use futures::{Stream, TryStreamExt};
use serde::{Deserialize, Serialize};
use tokio_util::io::ReaderStream;

use super::{Hold, Instance, Instances, blocking, refused};
use crate::files::upload::{self, Failed};

/// The most that is read of what a new sandbox is sent, in bytes.
const INIT: usize = 1 << 20;

pub(super) fn router<I: Instances>(instances: Arc<I>) -> Router {
    Router::new()
        .route("/health", get(|| async { StatusCode::NO_CONTENT }))
        .route("/files", get(download::<I>).post(upload::<I>))
        .route("/envs", get(envs::<I>))
        .route("/metrics", get(metrics::<I>))
        .route("/init", post(init::<I>).layer(DefaultBodyLimit::max(INIT)))
        // Files are as large as they are.
        .layer(DefaultBodyLimit::disable())
        .with_state(instances)
}

/// A [`ConnectError`] as plain HTTP has it: `{"code": 404, "message": "…"}`.
struct Refused(ConnectError);

impl From<ConnectError> for Refused {
    fn from(error: ConnectError) -> Self {
        Self(error)
    }
}

impl IntoResponse for Refused {
    fn into_response(self) -> Response {
        let Self(error) = self;
        let status = match error.code {
            ErrorCode::NotFound => StatusCode::NOT_FOUND,
            ErrorCode::InvalidArgument | ErrorCode::AlreadyExists => StatusCode::BAD_REQUEST,
            ErrorCode::PermissionDenied => StatusCode::FORBIDDEN,
            ErrorCode::FailedPrecondition => StatusCode::CONFLICT,
            ErrorCode::ResourceExhausted => StatusCode::INSUFFICIENT_STORAGE,
            ErrorCode::Aborted | ErrorCode::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
            _ => StatusCode::INTERNAL_SERVER_ERROR,
        };
        let message = error.message.unwrap_or_default();
        let body = serde_json::json!({ "code": status.as_u16(), "message": message });
        (status, Json(body)).into_response()
    }
}

type Answer<T> = Result<T, Refused>;

#[derive(Deserialize)]
struct FileQuery {
    path: Option<String>,
    mode: Option<u32>,
    format: Option<Format>,
}

#[derive(Clone, Copy, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
enum Format {
    Tar,
}

impl FileQuery {
    fn path(&self, instance: &Instance) -> Result<PathBuf, ConnectError> {
        let path = self.path.as_deref().filter(|path| !path.is_empty());
        let missing = || ConnectError::invalid_argument("which file? set the parameter path");
        Ok(instance.resolve(path.ok_or_else(missing)?))
    }
}

async fn download<I: Instances>(
    State(instances): State<Arc<I>>,
    Query(query): Query<FileQuery>,
    headers: HeaderMap,
) -> Answer<Response> {
    let instance = instances.instance(&headers).await?;
    let path = query.path(&instance)?;
    if query.format == Some(Format::Tar) {
        return Ok(download_folder(instance, path).await?.into_response());
    }
    let (file, metadata) = blocking(move || open(&path)).await?;
    let headers = [
        (header::CONTENT_TYPE.as_str(), "application/octet-stream".to_owned()),
        (header::CONTENT_LENGTH.as_str(), metadata.len().to_string()),
        (MODE, (metadata.permissions().mode() & 0o7777).to_string()),
    ];
    // No more than was promised, though the file may grow.
    let file = tokio::io::AsyncReadExt::take(tokio::fs::File::from_std(file), metadata.len());
    // The instance stays in use until the last byte is out.
    let body = Hold::new(instance.lease, instance.over).keep(ReaderStream::new(file));
    Ok((headers, Body::from_stream(body)).into_response())
}

fn open(path: &Path) -> Result<(File, std::fs::Metadata), ConnectError> {
    // Not waiting for a writer of a fifo, which is refused below.
    let nonblock = i32::try_from(rustix::fs::OFlags::NONBLOCK.bits()).unwrap_or(0);
    let file = OpenOptions::new().read(true).custom_flags(nonblock).open(path);
    let file = file.map_err(|error| refused(path, &error))?;
    let metadata = file.metadata().map_err(|error| refused(path, &error))?;
    if metadata.is_file() {
        return Ok((file, metadata));
    }
    let what = if metadata.is_dir() { "a folder" } else { "not a regular file" };
    Err(ConnectError::invalid_argument(format!("{} is {what}", path.display())))
}

async fn download_folder(instance: Instance, path: PathBuf) -> Result<Body, ConnectError> {
    let root = path.clone();
    let is_folder = blocking(move || {
        std::fs::metadata(&root).map(|it| it.is_dir()).map_err(|error| refused(&root, &error))
    });
    if !is_folder.await? {
        let text = format!("{} is not a folder", path.display());
        return Err(ConnectError::invalid_argument(text));
    }
    let hold = Hold::new(instance.lease, instance.over);
    Ok(Body::from_stream(hold.keep(folder::send(path))))
}

#[derive(Serialize)]
struct Uploaded {
    name: String,
    r#type: &'static str,
    path: String,
}

async fn upload<I: Instances>(
    State(instances): State<Arc<I>>,
    Query(query): Query<FileQuery>,
    request: Request,
) -> Answer<Response> {
    let instance = instances.instance(request.headers()).await?;
    let over = instance.over.clone();
    let received = over.run_until_cancelled_owned(take_in(instance, query, request)).await;
    received.unwrap_or_else(|| Err(ConnectError::aborted("the session is being stopped").into()))
}

async fn take_in(instance: Instance, query: FileQuery, request: Request) -> Answer<Response> {
    let broken = |error: &dyn std::fmt::Display| {
        ConnectError::invalid_argument(format!("the upload broke off: {error}"))
    };
    let content_type = request.headers().get(header::CONTENT_TYPE);
    let multipart = content_type
        .and_then(|value| value.to_str().ok())
        .is_some_and(|value| value.starts_with("multipart/form-data"));
    let mut done = Vec::new();
    if query.format == Some(Format::Tar) {
        let path = query.path(&instance)?;
        let body = request.into_body().into_data_stream().map_err(io::Error::other);
        let received = folder::receive(body, path.clone()).await;
        received.map_err(|error| refused(&path, &error))?;
        done.push(uploaded(&path, "dir"));
    } else if multipart {
        let parts = Multipart::from_request(request, &()).await;
        let mut parts = parts.map_err(|error| broken(&error))?;
        while let Some(part) = parts.next_field().await.map_err(|error| broken(&error))? {
            let Some(name) = part.file_name().map(str::to_owned) else { continue };
            let path = if query.path.as_deref().is_some_and(|path| !path.is_empty()) {
                query.path(&instance)?
            } else {
                instance.resolve(&name)
            };
            receive(part.map_err(io::Error::other), &path, query.mode).await?;
            done.push(uploaded(&path, "file"));
        }
    } else {
        let path = query.path(&instance)?;
        let body = request.into_body().into_data_stream().map_err(io::Error::other);
        receive(body, &path, query.mode).await?;
        done.push(uploaded(&path, "file"));
    }
    Ok(Json(done).into_response())
}

fn uploaded(path: &Path, kind: &'static str) -> Uploaded {
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    Uploaded { name, r#type: kind, path: path.to_string_lossy().into_owned() }
}

async fn receive(
    body: impl Stream<Item = io::Result<Bytes>> + Send + Unpin,
    path: &Path,
    mode: Option<u32>,
) -> Result<(), ConnectError> {
    match upload::receive(body, path, mode).await {
        Ok(_) => Ok(()),
        Err(Failed::Content(error)) => Err(refused(path, &error)),
        Err(Failed::File(path, error)) => Err(refused(&path, &error)),
    }
}

async fn envs<I: Instances>(
    State(instances): State<Arc<I>>,
    headers: HeaderMap,
) -> Answer<Response> {
    Ok(Json(instances.instance(&headers).await?.env).into_response())
}

/// What envd's clients send to a new sandbox. Times and variables are the daemon's business
/// here: a request that would change them is refused, not forgotten.
async fn init<I: Instances>(
    State(instances): State<Arc<I>>,
    headers: HeaderMap,
    body: Bytes,
) -> Answer<StatusCode> {
    instances.instance(&headers).await?;
    let body: &[u8] = if body.is_empty() { b"null" } else { &body };
    let asked: serde_json::Value = serde_json::from_slice(body)
        .map_err(|error| ConnectError::invalid_argument(error.to_string()))?;
    let variables = asked.get("envVars").and_then(|vars| vars.as_object());
    if variables.is_some_and(|vars| !vars.is_empty()) {
        let text = "variables are set in the pool's configuration or with each command";
        return Err(ConnectError::invalid_argument(text).into());
    }
    Ok(StatusCode::NO_CONTENT)
}

/// Memory and disk as the instance sees them.
async fn metrics<I: Instances>(
    State(instances): State<Arc<I>>,
    headers: HeaderMap,
) -> Answer<Response> {
    let instance = instances.instance(&headers).await?;
    let body = blocking(move || {
        let disk = rustix::fs::statvfs(&instance.workdir)
            .map_err(|error| refused(&instance.workdir, &error.into()))?;
        let memory = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let kib = |name: &str| {
            let line = memory.lines().find_map(|line| line.strip_prefix(name));
            line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0)
        };
        let total = kib("MemTotal:") * 1024;
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        Ok(serde_json::json!({
            "ts": now.unwrap_or_default().as_secs(),
            "cpu_count": std::thread::available_parallelism().map_or(1, usize::from),
            "mem_total": total,
            "mem_used": total.saturating_sub(kib("MemAvailable:") * 1024),
            "disk_total": disk.f_blocks * disk.f_frsize,
            "disk_used": disk.f_blocks.saturating_sub(disk.f_bfree) * disk.f_frsize,
        }))
    });
    Ok(Json(body.await?).into_response())
}
