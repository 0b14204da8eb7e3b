//! The part of the protocol that is plain HTTP: content of files, and how the instance is.
//!
//! Own additions, which clients of envd do not ask for: `mode` sets a file's permission bits,
//! and `format=tar` moves a whole folder ([`denizen_envd::folder`]).

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{DefaultBodyLimit, FromRequest, Multipart, Query, Request, State};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use bytes::Bytes;
use connectrpc::{ConnectError, ErrorCode};
use denizen_envd::{MODE, folder};
use futures::{Stream, StreamExt, TryStreamExt};
use serde::{Deserialize, Serialize};
use tempfile::TempPath;
use tokio::io::AsyncWriteExt;

use super::user::Place;
use super::{Hold, Instance, Instances, blocking, gzip, kind, metadata, refused};
use crate::files::content;
use crate::files::upload::{self, Failed};

/// Permissions of a file that is new.
const FILE: u32 = 0o644;
/// The most that is read of what a new sandbox is sent, in bytes.
const INIT: usize = 1 << 20;
/// What a page may do that is a file.
const NOTHING: HeaderValue = HeaderValue::from_static("sandbox; default-src 'none'");

pub(super) fn router<I: Instances>(instances: Arc<I>) -> Router {
    Router::new()
        .route("/health", get(|| async { StatusCode::NO_CONTENT }))
        .route("/files", get(download::<I>).post(upload::<I>))
        .route("/metrics", get(metrics::<I>))
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
            ErrorCode::Unauthenticated => StatusCode::UNAUTHORIZED,
            ErrorCode::PermissionDenied => StatusCode::FORBIDDEN,
            ErrorCode::FailedPrecondition => StatusCode::CONFLICT,
            ErrorCode::ResourceExhausted => StatusCode::INSUFFICIENT_STORAGE,
            ErrorCode::Aborted | ErrorCode::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
            _ => StatusCode::INTERNAL_SERVER_ERROR,
        };
        said(status, &error.message.unwrap_or_default())
    }
}

fn said(status: StatusCode, message: &str) -> Response {
    let body = serde_json::json!({ "code": status.as_u16(), "message": message });
    (status, Json(body)).into_response()
}

type Answer<T> = Result<T, Refused>;

#[derive(Deserialize)]
struct FileQuery {
    path: Option<String>,
    username: Option<String>,
    mode: Option<u32>,
    format: Option<Format>,
}

#[derive(Clone, Copy, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
enum Format {
    Tar,
}

impl FileQuery {
    /// Where the paths of this request begin.
    async fn place(&self, instance: &Instance, headers: &HeaderMap) -> Result<Place, ConnectError> {
        let user = self.username.clone().filter(|user| !user.is_empty());
        Place::of(instance, user.or_else(|| instance.user(headers))).await
    }

    fn path(&self, place: &Place) -> Result<PathBuf, ConnectError> {
        let path = self.path.as_deref().filter(|path| !path.is_empty());
        let missing = || ConnectError::invalid_argument("which file? set the parameter path");
        place.resolve(path.ok_or_else(missing)?)
    }
}

async fn download<I: Instances>(
    State(instances): State<Arc<I>>,
    Query(query): Query<FileQuery>,
    method: Method,
    headers: HeaderMap,
) -> Answer<Response> {
    let mut answer = look_up(instances, query, &method, &headers).await?;
    // Should a browser show it, it has the origin of nobody, and runs nothing.
    answer.headers_mut().insert(header::CONTENT_SECURITY_POLICY, NOTHING);
    Ok(answer)
}

async fn look_up<I: Instances>(
    instances: Arc<I>,
    query: FileQuery,
    method: &Method,
    headers: &HeaderMap,
) -> Answer<Response> {
    let instance = instances.instance(headers).await?;
    let place = query.place(&instance, headers).await?;
    let path = query.path(&place)?;
    if query.format == Some(Format::Tar) {
        return Ok(download_folder(instance, path).await?.into_response());
    }
    let (kind, disposition) = (kind::of(&path), kind::disposition(&path));
    let (file, metadata) = blocking(move || open(&path)).await?;
    let Some(packed) = gzip::is_wanted(headers) else {
        let text = "no acceptable encoding: there are gzip and identity";
        return Ok(said(StatusCode::NOT_ACCEPTABLE, text));
    };
    let mode = metadata.permissions().mode() & 0o7777;
    let mut response = match content::part_of(file, &metadata, headers).await {
        Ok(response) => response,
        Err(refused) => return Ok(refused.into_response()),
    };
    // A part of what is packed would be no part of the file; and how long it will be is not known
    // before, which is what HEAD is asked for.
    let length = response.headers().get(header::CONTENT_LENGTH);
    let whole = response.status() == StatusCode::OK && length.is_none_or(|it| it != "0");
    let packed = packed && whole && method != Method::HEAD;
    let told = response.headers_mut();
    told.insert(MODE, mode.into());
    told.insert(header::VARY, HeaderValue::from_static("accept-encoding"));
    told.insert(header::CONTENT_TYPE, kind);
    told.insert(header::CONTENT_DISPOSITION, disposition);
    let modified = metadata.modified().ok().map(httpdate::fmt_http_date);
    if let Some(modified) = modified.and_then(|it| HeaderValue::try_from(it).ok()) {
        told.insert(header::LAST_MODIFIED, modified);
    }
    if packed {
        told.insert(header::CONTENT_ENCODING, HeaderValue::from_static("gzip"));
        told.remove(header::CONTENT_LENGTH);
        told.remove(header::ACCEPT_RANGES);
        told.remove(header::ETAG);
    }
    let (parts, body) = response.into_parts();
    let content = body.into_data_stream().map_err(io::Error::other);
    // The instance stays in use until the last byte is out.
    let hold = Hold::new(instance.lease, instance.over);
    let body = if packed {
        Body::from_stream(hold.keep(gzip::pack(content)))
    } else {
        Body::from_stream(hold.keep(content))
    };
    Ok(Response::from_parts(parts, body))
}

fn open(path: &Path) -> Result<(File, std::fs::Metadata), ConnectError> {
    // Not waiting for a writer of a fifo, which is refused below.
    let nonblock = i32::try_from(rustix::fs::OFlags::NONBLOCK.bits()).unwrap_or(0);
    let file = OpenOptions::new().read(true).custom_flags(nonblock).open(path);
    let file = file.map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => {
            ConnectError::not_found(format!("path '{}' does not exist", path.display()))
        }
        _ => refused(path, &error),
    })?;
    let metadata = file.metadata().map_err(|error| refused(path, &error))?;
    if metadata.is_file() {
        return Ok((file, metadata));
    }
    let what = if metadata.is_dir() { "a directory" } else { "not a regular file" };
    Err(ConnectError::invalid_argument(format!("path '{}' is {what}", path.display())))
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
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    metadata: BTreeMap<String, String>,
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
    let headers = request.headers();
    let place = query.place(&instance, headers).await?;
    let metadata = metadata::asked(headers)?;
    let kind = headers.get(header::CONTENT_TYPE).map(|kind| kind.to_str().unwrap_or_default());
    let kind = kind.map(|kind| kind.trim().to_ascii_lowercase());
    let is = |wanted: &str| kind.as_deref().is_some_and(|kind| kind.starts_with(wanted));
    let multipart = is("multipart/form-data");
    let is_known = multipart || is("application/octet-stream");
    if let Some(kind) = kind.as_deref().filter(|_| !is_known && query.format.is_none()) {
        let known = "use multipart/form-data or application/octet-stream";
        let text = format!("unsupported content type {kind:?}: {known}");
        return Err(ConnectError::invalid_argument(text).into());
    }
    let packed = gzip::is_packed(headers)?;
    let (head, body) = request.into_parts();
    let body = body.into_data_stream().map_err(io::Error::other);
    let body = if packed { gzip::unpack(body).boxed() } else { body.boxed() };
    let mut done: Vec<Uploaded> = Vec::new();
    let new = New { mode: query.mode, metadata };
    if query.format == Some(Format::Tar) {
        let path = query.path(&place)?;
        let received = folder::receive(body, path.clone()).await;
        received.map_err(|error| refused(&path, &error))?;
        done.push(uploaded(&path, "dir", BTreeMap::new()));
    } else if multipart {
        let request = Request::from_parts(head, Body::from_stream(body));
        let parts = Multipart::from_request(request, &()).await;
        let mut parts = parts.map_err(|error| broken(&error))?;
        while let Some(part) = parts.next_field().await.map_err(|error| broken(&error))? {
            // A field of a form need not say what its file is called, where the request says it.
            let name = part.file_name().map(str::to_owned);
            if name.is_none() && part.name() != Some("file") {
                continue;
            }
            let path = match name {
                Some(name) if query.path.as_deref().is_none_or(str::is_empty) => {
                    place.resolve(&name)?
                }
                _ => query.path(&place)?,
            };
            if done.iter().any(|before| Path::new(&before.path) == path) {
                let text = format!("{}: two files of one upload have this path", path.display());
                return Err(ConnectError::invalid_argument(text).into());
            }
            receive(part.map_err(io::Error::other), &place, &path, &new).await?;
            done.push(uploaded(&path, "file", new.metadata.clone()));
        }
    } else {
        let path = query.path(&place)?;
        receive(body, &place, &path, &new).await?;
        done.push(uploaded(&path, "file", new.metadata.clone()));
    }
    Ok(Json(done).into_response())
}

/// What files are to have that arrive.
struct New {
    mode: Option<u32>,
    metadata: BTreeMap<String, String>,
}

fn uploaded(path: &Path, kind: &'static str, metadata: BTreeMap<String, String>) -> Uploaded {
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    Uploaded { name, r#type: kind, path: path.to_string_lossy().into_owned(), metadata }
}

async fn receive(
    body: impl Stream<Item = io::Result<Bytes>> + Send + Unpin,
    place: &Place,
    path: &Path,
    new: &New,
) -> Result<(), ConnectError> {
    let received = if place.is_of_a_user() {
        write(body, place, path, new).await
    } else {
        upload::receive(body, path, new.mode).await.map(drop)
    };
    received.map_err(|failed| match failed {
        Failed::Content(error) => {
            ConnectError::invalid_argument(format!("the upload broke off: {error}"))
        }
        Failed::File(path, error) if error.kind() == io::ErrorKind::IsADirectory => {
            ConnectError::invalid_argument(format!("path is a directory: {}", path.display()))
        }
        Failed::File(path, error) => refused(&path, &error),
    })?;
    if !place.is_of_a_user() && !new.metadata.is_empty() {
        let (path, pairs) = (path.to_owned(), new.metadata.clone());
        let noted = move || {
            let file = File::open(&path).and_then(|file| metadata::write(&file, &pairs));
            file.map_err(|error| refused(&path, &error))
        };
        blocking(noted).await?;
    }
    Ok(())
}

/// Writes a user's file where it is, as their own programs would: whoever watches it sees a file
/// made, given to the user and written, and one that was there stays the same file.
async fn write(
    mut body: impl Stream<Item = io::Result<Bytes>> + Send + Unpin,
    place: &Place,
    path: &Path,
    new: &New,
) -> Result<(), Failed> {
    let failed = |error| Failed::File(path.to_owned(), error);
    let (place, target, mode) = (place.clone(), path.to_owned(), new.mode);
    let pairs = new.metadata.clone();
    let begun = tokio::task::spawn_blocking(move || begin(&place, &target, mode, &pairs)).await;
    let (file, new) = begun.map_err(|error| failed(io::Error::other(error)))??;
    let mut file = tokio::fs::File::from_std(file);
    while let Some(piece) = body.try_next().await.map_err(Failed::Content)? {
        file.write_all(&piece).await.map_err(failed)?;
    }
    file.flush().await.map_err(failed)?;
    match new.map(TempPath::keep) {
        Some(Err(error)) => Err(failed(error.error)),
        Some(Ok(_)) | None => Ok(()),
    }
}

/// Opens a user's file to be written anew. One that was not there is gone again when what says so
/// is dropped: half of it is of no use, and may be what fills the disk.
fn begin(
    place: &Place,
    path: &Path,
    mode: Option<u32>,
    pairs: &BTreeMap<String, String>,
) -> Result<(File, Option<TempPath>), Failed> {
    let failed = |error: io::Error| Failed::File(path.to_owned(), error);
    if path.as_os_str().as_encoded_bytes().ends_with(b"/") {
        return Err(failed(io::ErrorKind::IsADirectory.into()));
    }
    if let Some(parent) = path.parent() {
        place.make_folders(parent).map_err(|(path, error)| Failed::File(path, error))?;
    }
    let nonblock = i32::try_from(rustix::fs::OFlags::NONBLOCK.bits()).unwrap_or(0);
    let mut options = OpenOptions::new();
    options.write(true).mode(FILE).custom_flags(nonblock);
    let (file, is_new) = match options.clone().create_new(true).open(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            (options.create(true).truncate(false).open(path), false)
        }
        opened => (opened, true),
    };
    let file = file.map_err(failed)?;
    let new = is_new.then(|| TempPath::try_from_path(path)).transpose().map_err(failed)?;
    let there = file.metadata().map_err(failed)?;
    if !there.is_file() {
        return Err(failed(io::ErrorKind::InvalidInput.into()));
    }
    // Of one that is theirs already, only what is written is a change.
    if is_new || !place.owns(&there) {
        place.give(&file).map_err(failed)?;
    }
    let is = there.permissions().mode() & 0o7777;
    let wanted = mode.unwrap_or(if is_new { FILE } else { is }) & 0o7777;
    if wanted != is {
        file.set_permissions(PermissionsExt::from_mode(wanted)).map_err(failed)?;
    }
    if there.len() > 0 {
        file.set_len(0).map_err(failed)?;
    }
    metadata::write(&file, pairs).map_err(failed)?;
    Ok((file, new))
}

/// What the commands of an instance begin with; the same wherever its files are served.
pub(super) fn variables<I: Instances>(instances: Arc<I>) -> Router {
    Router::new()
        .route("/envs", get(envs::<I>))
        .route("/init", post(init::<I>).layer(DefaultBodyLimit::max(INIT)))
        .with_state(instances)
}

async fn envs<I: Instances>(
    State(instances): State<Arc<I>>,
    headers: HeaderMap,
) -> Answer<Response> {
    let instance = instances.instance(&headers).await?;
    let mut env = instance.env;
    env.extend(instance.jobs.variables.lock().clone());
    Ok(Json(env).into_response())
}

/// What a new sandbox is told, as far as it is not the daemon's own business.
#[derive(Default, Deserialize)]
struct Init {
    #[serde(default, rename = "envVars")]
    variables: Option<BTreeMap<String, String>>,
}

/// Sets variables for all commands to come; time, tokens and users are the daemon's business.
async fn init<I: Instances>(
    State(instances): State<Arc<I>>,
    headers: HeaderMap,
    body: Bytes,
) -> Answer<StatusCode> {
    let instance = instances.instance(&headers).await?;
    let asked = if body.is_empty() { Ok(Init::default()) } else { serde_json::from_slice(&body) };
    let Init { variables } =
        asked.map_err(|error| ConnectError::invalid_argument(error.to_string()))?;
    let variables = variables.unwrap_or_default();
    for (name, value) in &variables {
        if name.is_empty() || name.contains(['=', '\0']) || value.contains('\0') {
            let text = format!("{name:?} cannot be a variable, or its value cannot be one's");
            return Err(ConnectError::invalid_argument(text).into());
        }
    }
    let mut set = instance.jobs.variables.lock();
    let all = variables.iter().chain(set.iter().filter(|(name, _)| !variables.contains_key(*name)));
    let size: usize = all.map(|(name, value)| name.len() + value.len()).sum();
    if size > INIT {
        let text = format!("the variables have more than {INIT} bytes in all");
        return Err(ConnectError::invalid_argument(text).into());
    }
    set.extend(variables);
    Ok(StatusCode::NO_CONTENT)
}

/// How long processors are looked at to tell how busy they are.
const LOOK: Duration = Duration::from_millis(100);

/// What the processes that this one sees use, of what it sees.
async fn metrics<I: Instances>(
    State(instances): State<Arc<I>>,
    headers: HeaderMap,
) -> Answer<Response> {
    let instance = instances.instance(&headers).await?;
    let begun = std::time::Instant::now();
    let (before, _) = blocking(|| Ok(processes())).await?;
    tokio::time::sleep(LOOK).await;
    let body = blocking(move || {
        let (ticks, pages) = processes();
        let seconds = begun.elapsed().as_secs_f64();
        let hertz = rustix::param::clock_ticks_per_second();
        // Less than 2^52 of both.
        #[allow(clippy::cast_precision_loss)]
        let busy = ticks.saturating_sub(before) as f64 / hertz as f64 / seconds;
        let disk = rustix::fs::statvfs(&instance.workdir)
            .map_err(|error| refused(&instance.workdir, &error.into()))?;
        let memory = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let kib = |name: &str| {
            let line = memory.lines().find_map(|line| line.strip_prefix(name));
            line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0)
        };
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        Ok(serde_json::json!({
            "ts": now.unwrap_or_default().as_secs(),
            "cpu_count": std::thread::available_parallelism().map_or(1, usize::from),
            "cpu_used_pct": (busy * 10_000.0).round() / 100.0,
            "mem_total": kib("MemTotal:") * 1024,
            "mem_used": pages * rustix::param::page_size() as u64,
            "mem_cache": kib("Cached:") * 1024,
            "disk_total": disk.f_blocks * disk.f_frsize,
            "disk_used": disk.f_blocks.saturating_sub(disk.f_bfree) * disk.f_frsize,
        }))
    });
    Ok(Json(body.await?).into_response())
}

/// The clock ticks that all processes have had together, and the pages that they have in memory.
fn processes() -> (u64, u64) {
    let mut sum = (0, 0);
    for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let stat = std::fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        // After the name, which may hold anything (proc_pid_stat(5)).
        let Some((_, rest)) = stat.rsplit_once(')') else { continue };
        let fields: Vec<u64> =
            rest.split_whitespace().map(|field| field.parse().unwrap_or(0)).collect();
        let field = |number: usize| fields.get(number - 3).copied().unwrap_or(0);
        sum.0 += field(14) + field(15);
        sum.1 += field(24);
    }
    sum
}
