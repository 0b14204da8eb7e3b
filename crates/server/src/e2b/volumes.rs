//! Volumes of E2B's clients: shared folders of the pool, which sandboxes can have at paths of
//! theirs, and whose files are read and written from outside by whoever has a volume's token.
//!
//! A volume's token is one like a session's, for an id that no session has: it opens nothing but
//! that volume's files.

use std::io::{self, ErrorKind, Write};
use std::path::PathBuf;

use axum::body::{Body, Bytes};
use axum::extract::{FromRequestParts, Path as UriPath, State};
use axum::http::StatusCode;
use axum::http::header::{CONTENT_LENGTH, CONTENT_TYPE};
use axum::http::request::Parts;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Extension, Router};
use denizen::{Mount, Share, ShareEntry, ShareEntryKind, ShareOwner, SharedFile, SharedFiles};
use denizen_api::Code;
use futures::StreamExt;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use tokio::sync::{Semaphore, mpsc};
use tokio_util::io::ReaderStream;
use uuid::Uuid;

use super::routes::{E2b, to_the_end, unsupported};
use super::wire::VolumeMount;
use crate::access::Caller;
use crate::api::extract::{Json, Path, Query};
use crate::api::{Answer, Refused};

/// How many look at files at a time, and how many write some: the threads that may block are for
/// all of the daemon.
static AT_WORK: Semaphore = Semaphore::const_new(8);
static WRITING: Semaphore = Semaphore::const_new(64);
/// How many bytes of a file are on their way at a time.
const PIECE: usize = 256 << 10;
/// How many pieces of an upload wait for the disk.
const WAITING: usize = 4;

pub(super) fn router() -> Router<E2b> {
    Router::new()
        .route("/volumes", get(list).post(create))
        .route("/volumes/{volume}", get(inspect).delete(remove))
        .route("/volumecontent/{volume}/path", get(stat).patch(change).delete(unlink))
        .route("/volumecontent/{volume}/dir", get(folder).post(make_folder))
        .route("/volumecontent/{volume}/file", get(read).put(write))
}

#[derive(Deserialize)]
struct NewVolume {
    name: String,
}

#[derive(Serialize)]
struct Volume {
    #[serde(rename = "volumeID")]
    id: Uuid,
    name: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    token: Option<String>,
}

impl E2b {
    fn volume(&self, caller: &Caller, share: Share) -> Volume {
        let token = Some(self.token(caller, share.id));
        Volume { id: share.id, name: share.name, token }
    }

    /// The files of a volume, for who has its token.
    async fn files(&self, caller: &Caller, volume: &str) -> Answer<SharedFiles> {
        let id = id(volume)?;
        // What is another's and what there is not are told alike.
        if !caller.holds(id) {
            return Err(not_found(volume));
        }
        self.all.pool.shared_files(id).await.map_err(|error| of_volume(error, volume))
    }

    /// The shared folders that a new sandbox is to have.
    pub(super) async fn mounts(
        &self,
        caller: &Caller,
        wanted: &[VolumeMount],
    ) -> Answer<Vec<Mount>> {
        if wanted.is_empty() {
            return Ok(Vec::new());
        }
        if self.all.pool.isolation()? != denizen::Isolation::Sandbox {
            let what = "volumes but in sandbox isolation (volumeMounts): a virtual machine that had \
                        one could not be put to sleep";
            return Err(unsupported(what));
        }
        // They are of all sessions, as templates are.
        caller.makes_nameless()?;
        let shares = self.all.pool.shares().await?;
        let mount = |VolumeMount { name, path }: &VolumeMount| {
            let share = shares.iter().find(|share| share.name == *name).ok_or_else(|| {
                Refused::new(Code::BadRequest, format!("there is no volume {name:?}"))
            })?;
            Ok(Mount { share: share.id, path: path.clone() })
        };
        wanted.iter().map(mount).collect()
    }

    /// Has a sandbox that was just made have these, and no others.
    pub(super) async fn mount(&self, sandbox: Uuid, mounts: Vec<Mount>) -> Answer<()> {
        let (pool, leases) = (&self.all.pool, &self.all.leases);
        if pool.mounts(sandbox)? != mounts {
            pool.set_mounts(sandbox, mounts).await?;
            // Whatever it was made with; and that it starts with these is seen now.
            drop(leases.stop(sandbox, true).await?);
            leases.take(sandbox, None).await?;
        }
        Ok(())
    }
}

fn id(volume: &str) -> Answer<Uuid> {
    volume.parse().map_err(|_| not_found(volume))
}

fn not_found(volume: &str) -> Refused {
    Refused::new(Code::NotFound, format!("Volume \"{volume}\" not found"))
}

fn of_volume(error: denizen::Error, volume: &str) -> Refused {
    match error.kind() {
        denizen::Error::UnknownShare { .. } => not_found(volume),
        denizen::Error::ShareExists { name } => {
            // As E2B has it.
            Refused::new(Code::BadRequest, format!("there is a volume {name:?} already"))
        }
        denizen::Error::ShareInUse { session, .. } => {
            let why = format!(
                "the volume is the sandbox's {}: kill that one first (or `denizen rm {session}`)",
                session.simple()
            );
            Refused::new(Code::InUse, why)
        }
        _ => error.into(),
    }
}

async fn list(State(e2b): State<E2b>) -> Answer<axum::Json<Vec<Volume>>> {
    let shares = e2b.all.pool.shares().await?.into_iter();
    let told = shares.map(|share| Volume { id: share.id, name: share.name, token: None });
    Ok(axum::Json(told.collect()))
}

async fn create(
    State(e2b): State<E2b>,
    Extension(caller): Extension<Caller>,
    Json(new): Json<NewVolume>,
) -> Answer<(StatusCode, axum::Json<Volume>)> {
    let made = e2b.all.pool.create_share(&new.name).await;
    let made = made.map_err(|error| of_volume(error, &new.name))?;
    Ok((StatusCode::CREATED, axum::Json(e2b.volume(&caller, made))))
}

async fn inspect(
    State(e2b): State<E2b>,
    Extension(caller): Extension<Caller>,
    UriPath(volume): UriPath<String>,
) -> Answer<axum::Json<Volume>> {
    let id = id(&volume)?;
    let found = e2b.all.pool.shares().await?.into_iter().find(|share| share.id == id);
    Ok(axum::Json(e2b.volume(&caller, found.ok_or_else(|| not_found(&volume))?)))
}

async fn remove(State(e2b): State<E2b>, UriPath(volume): UriPath<String>) -> Answer<StatusCode> {
    let removed = e2b.all.pool.remove_share(id(&volume)?).await;
    removed.map_err(|error| of_volume(error, &volume))?;
    Ok(StatusCode::NO_CONTENT)
}

/// What is asked of a path.
#[derive(Deserialize)]
struct At {
    path: PathBuf,
    depth: Option<u32>,
    uid: Option<u32>,
    gid: Option<u32>,
    mode: Option<u32>,
    #[serde(default)]
    force: bool,
}

impl At {
    fn owner(&self) -> ShareOwner {
        ShareOwner { user: self.uid, group: self.gid, mode: self.mode }
    }
}

/// What requests for a volume's files are about.
struct Asked {
    files: SharedFiles,
    at: At,
}

impl FromRequestParts<E2b> for Asked {
    type Rejection = Refused;

    async fn from_request_parts(parts: &mut Parts, e2b: &E2b) -> Answer<Self> {
        let Path(volume) = Path::<String>::from_request_parts(parts, e2b).await?;
        let Query(at) = Query::from_request_parts(parts, e2b).await?;
        let caller = parts.extensions.get::<Caller>();
        let unknown = || Refused::new(Code::Unauthenticated, "it is not known who asks");
        let files = e2b.files(caller.ok_or_else(unknown)?, &volume).await?;
        Ok(Self { files, at })
    }
}

#[derive(Deserialize)]
struct Metadata {
    uid: Option<u32>,
    gid: Option<u32>,
    mode: Option<u32>,
}

/// What is at a path, as clients are told.
#[derive(Serialize)]
struct Stat {
    name: String,
    #[serde(rename = "type")]
    kind: &'static str,
    path: String,
    size: u64,
    mode: u32,
    uid: u32,
    gid: u32,
    atime: Timestamp,
    mtime: Timestamp,
    ctime: Timestamp,
    #[serde(skip_serializing_if = "Option::is_none")]
    target: Option<String>,
}

impl From<ShareEntry> for Stat {
    fn from(entry: ShareEntry) -> Self {
        let time = |at| Timestamp::try_from(at).unwrap_or_default();
        // Clients take text alone: what is none is told with what it lacks.
        let text = |path: &std::path::Path| path.to_string_lossy().into_owned();
        let name = entry.path.file_name().map_or("/".into(), |name| name.to_string_lossy());
        Self {
            name: name.into_owned(),
            kind: match entry.kind {
                ShareEntryKind::File => "file",
                ShareEntryKind::Folder => "directory",
                ShareEntryKind::Link => "symlink",
                ShareEntryKind::Other => "unknown",
            },
            path: text(&entry.path),
            size: entry.size,
            mode: entry.mode,
            uid: entry.user,
            gid: entry.group,
            atime: time(entry.accessed),
            mtime: time(entry.modified),
            ctime: time(entry.changed),
            target: entry.target.as_deref().map(text),
        }
    }
}

fn refused(at: &std::path::Path, error: &io::Error) -> Refused {
    let code = match error.kind() {
        ErrorKind::NotFound => Code::NoFile,
        ErrorKind::AlreadyExists => Code::AlreadyExists,
        ErrorKind::PermissionDenied => Code::NotPermitted,
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => Code::NoSpace,
        ErrorKind::IsADirectory
        | ErrorKind::NotADirectory
        | ErrorKind::InvalidInput
        | ErrorKind::InvalidFilename => Code::BadRequest,
        _ => Code::Failed,
    };
    Refused::new(code, format!("{}: {error}", at.display()))
}

/// Does something with a volume's files, which blocks.
async fn with_files<T: Send + 'static>(
    files: SharedFiles,
    at: PathBuf,
    work: impl FnOnce(&SharedFiles, &std::path::Path) -> io::Result<T> + Send + 'static,
) -> Answer<T> {
    // Closed by nobody.
    let _place = AT_WORK.acquire().await;
    blocking(files, at, work).await
}

/// As [`with_files`], however many there are.
async fn blocking<T: Send + 'static>(
    files: SharedFiles,
    at: PathBuf,
    work: impl FnOnce(&SharedFiles, &std::path::Path) -> io::Result<T> + Send + 'static,
) -> Answer<T> {
    let done = tokio::task::spawn_blocking(move || {
        work(&files, &at).map_err(|error| refused(&at, &error))
    });
    done.await.unwrap_or_else(|error| Err(Refused::new(Code::Failed, error.to_string())))
}

async fn stat(Asked { files, at }: Asked) -> Answer<axum::Json<Stat>> {
    let entry = with_files(files, at.path, SharedFiles::inspect).await?;
    Ok(axum::Json(entry.into()))
}

async fn change(
    Asked { files, at }: Asked,
    Json(Metadata { uid, gid, mode }): Json<Metadata>,
) -> Answer<axum::Json<Stat>> {
    let owner = ShareOwner { user: uid, group: gid, mode };
    let entry = with_files(files, at.path, move |files, path| files.change(path, owner)).await?;
    Ok(axum::Json(entry.into()))
}

async fn unlink(Asked { files, at }: Asked) -> Answer<StatusCode> {
    with_files(files, at.path, SharedFiles::remove).await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn folder(Asked { files, at }: Asked) -> Answer<axum::Json<Vec<Stat>>> {
    let depth = at.depth.unwrap_or(1).max(1);
    let all = with_files(files, at.path, move |files, path| files.list(path, depth)).await?;
    Ok(axum::Json(all.into_iter().map(Stat::from).collect()))
}

async fn make_folder(Asked { files, at }: Asked) -> Answer<(StatusCode, axum::Json<Stat>)> {
    let (owner, parents) = (at.owner(), at.force);
    let make =
        move |files: &SharedFiles, path: &std::path::Path| files.make_folder(path, owner, parents);
    let made = with_files(files, at.path, make).await?;
    Ok((StatusCode::CREATED, axum::Json(made.into())))
}

async fn read(Asked { files, at }: Asked) -> Answer<Response> {
    let open = |files: &SharedFiles, path: &std::path::Path| {
        let file = files.read(path)?;
        let size = file.metadata()?.len();
        Ok((file, size))
    };
    let (file, size) = with_files(files, at.path, open).await?;
    // What it grows by meanwhile is not of it.
    let file = tokio::io::AsyncReadExt::take(tokio::fs::File::from_std(file), size);
    let headers =
        [(CONTENT_TYPE, "application/octet-stream".to_owned()), (CONTENT_LENGTH, size.to_string())];
    Ok((headers, Body::from_stream(ReaderStream::with_capacity(file, PIECE))).into_response())
}

async fn write(Asked { files, at }: Asked, body: Body) -> Answer<(StatusCode, axum::Json<Stat>)> {
    let _place = WRITING.acquire().await;
    let (owner, replace) = (at.owner(), at.force);
    let (send, mut pieces) = mpsc::channel::<Bytes>(WAITING);
    let take_in = move |files: &SharedFiles, path: &std::path::Path| {
        let mut file = files.write(path)?;
        while let Some(piece) = pieces.blocking_recv() {
            file.write_all(&piece)?;
        }
        Ok(file)
    };
    let path = at.path.clone();
    let written = tokio::spawn(blocking(files.clone(), at.path, take_in));
    let mut body = body.into_data_stream();
    let mut whole = Ok(());
    while let Some(piece) = body.next().await {
        match piece {
            // If that is not taken, its end says why.
            Ok(piece) => {
                if send.send(piece).await.is_err() {
                    break;
                }
            }
            Err(error) => {
                whole = Err(Refused::new(Code::BrokenOff, error.to_string()));
                break;
            }
        }
    }
    drop(send);
    let file: SharedFile =
        written.await.unwrap_or_else(|error| Err(Refused::new(Code::Failed, error.to_string())))?;
    whole?;
    let finish = move |_: &SharedFiles, _: &std::path::Path| file.finish(owner, replace);
    let entry = to_the_end(with_files(files, path, finish)).await?;
    Ok((StatusCode::CREATED, axum::Json(entry.into())))
}
