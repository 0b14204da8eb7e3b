//! Content that arrives: in one piece, or in parts that may break off. It is written beside the
//! file and renamed, so that what was there stays whole until the new is.
//!
//! An upload in parts is a file `.denizen-NAME.partial`, of the name that its client gave it: how
//! long that is, is how far the upload is.

use std::fs::{File, OpenOptions, Permissions, TryLockError};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use axum::body::Body;
use axum::http::header::CONTENT_RANGE;
use axum::http::{HeaderMap, HeaderName, StatusCode};
use axum::response::IntoResponse;
use bytes::Bytes;
use denizen_api::{Code, UPLOAD_OFFSET, Upload, UploadPlace};
use futures::{Stream, StreamExt, TryStreamExt};
use tempfile::NamedTempFile;
use tokio::io::AsyncWriteExt;

use super::folder::entry;
use super::refusal::{Answer, Refused};
use super::{blocking, json};

/// Permissions of a file that is new, if nothing is said.
const MODE: u32 = 0o644;
/// The longest name of an upload, in bytes.
const LONGEST: usize = 64;

/// Why content was not received.
pub(crate) enum Failed {
    /// It broke off.
    Content(io::Error),
    /// The file cannot be written.
    File(PathBuf, io::Error),
}

impl From<Failed> for Refused {
    fn from(failed: Failed) -> Self {
        match failed {
            Failed::Content(error) => {
                Self::new(Code::BrokenOff, format!("the upload broke off: {error}"))
            }
            Failed::File(path, error) => Self::of(&path, &error),
        }
    }
}

pub(super) async fn put(
    path: PathBuf,
    upload: Option<String>,
    mode: Option<u32>,
    headers: &HeaderMap,
    body: Body,
) -> Answer {
    let body = body.into_data_stream().map_err(io::Error::other);
    let created = match (headers.get(CONTENT_RANGE), upload) {
        (None, None) => receive(body, &path, mode).await?,
        (None, Some(_)) => {
            return Err(Refused::bad("an upload in parts says which with Content-Range"));
        }
        (Some(_), None) => {
            return Err(Refused::bad("an upload in parts has a name: set `upload`"));
        }
        (Some(range), Some(upload)) => {
            let place = range.to_str().ok().and_then(UploadPlace::parse);
            let place = place.ok_or_else(|| {
                Refused::bad("a part's Content-Range is `bytes FIRST-LAST/TOTAL`")
            })?;
            let partial = Partial::of(path.clone(), &upload)?;
            let Some(created) = partial.receive(body, place, mode).await? else {
                let so_far = Upload { received: place.last + 1 };
                return Ok(json(StatusCode::ACCEPTED, &so_far));
            };
            created
        }
    };
    let entry = blocking(move || entry(&path).map_err(|error| Refused::of(&path, &error))).await?;
    Ok(json(if created { StatusCode::CREATED } else { StatusCode::OK }, &entry))
}

/// How far an upload is.
pub(super) async fn look(path: PathBuf, upload: Option<String>) -> Answer {
    let upload = upload.ok_or_else(|| Refused::bad("which upload? set `upload`"))?;
    let so_far = blocking(move || {
        let Partial { path, .. } = Partial::of(path, &upload)?;
        let there = std::fs::symlink_metadata(&path).map_err(|error| Refused::of(&path, &error))?;
        Ok(Upload { received: there.len() })
    });
    Ok(json(StatusCode::OK, &so_far.await?))
}

/// Forgets what has arrived of an upload.
pub(super) async fn give_up(path: PathBuf, upload: String) -> Answer {
    blocking(move || {
        let Partial { path, .. } = Partial::of(path, &upload)?;
        std::fs::remove_file(&path).map_err(|error| Refused::of(&path, &error))
    })
    .await?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

/// Writes a file whose content arrives in one piece; says whether it is new. Not to be had by
/// halves: dropped, it leaves the old one.
pub(crate) async fn receive(
    content: impl Stream<Item = io::Result<Bytes>> + Send + Unpin,
    path: &Path,
    mode: Option<u32>,
) -> Result<bool, Failed> {
    let target = path.to_owned();
    let prepared = on_a_thread(move || {
        let target = Target::of(target)?;
        let partial = tempfile::Builder::new()
            .prefix(".denizen-")
            .suffix(".partial")
            .tempfile_in(target.folder())
            .map_err(|error| target.failed(error))?;
        Ok((partial, target))
    });
    let (partial, target): (NamedTempFile, Target) = prepared.await?;
    let (file, partial) = partial.into_parts();
    let mut file = tokio::fs::File::from_std(file);
    copy(content, &mut file, u64::MAX).await.map_err(|failed| target.told(failed))?;
    let file = file.into_std().await;
    on_a_thread(move || {
        target.finish(&file, mode)?;
        partial.persist(&target.path).map_err(|error| target.failed(error.error))?;
        Ok(target.is_new())
    })
    .await
}

/// Copies content, no more than `most` bytes of it; says how many.
async fn copy(
    mut content: impl Stream<Item = io::Result<Bytes>> + Send + Unpin,
    file: &mut tokio::fs::File,
    most: u64,
) -> Result<u64, Broken> {
    let mut copied = 0;
    while let Some(piece) = content.next().await {
        let piece = match piece {
            Ok(piece) => piece,
            Err(error) => {
                // What has arrived counts.
                file.flush().await.map_err(Broken::File)?;
                return Err(Broken::Content(error));
            }
        };
        copied += piece.len() as u64;
        if copied > most {
            return Err(Broken::Content(io::Error::other("there is more than was announced")));
        }
        file.write_all(&piece).await.map_err(Broken::File)?;
    }
    file.flush().await.map_err(Broken::File)?;
    Ok(copied)
}

enum Broken {
    Content(io::Error),
    File(io::Error),
}

/// The file that is to have the content.
struct Target {
    /// That of the file itself, if it is reached through a symlink.
    path: PathBuf,
    /// The permissions of what is there.
    mode: Option<u32>,
}

impl Target {
    /// With the folders that it is in.
    fn of(path: PathBuf) -> Result<Self, Failed> {
        let path = std::fs::canonicalize(&path).unwrap_or(path);
        let there = std::fs::metadata(&path).ok();
        let is_folder = there.as_ref().is_some_and(std::fs::Metadata::is_dir);
        if is_folder || path.as_os_str().as_encoded_bytes().ends_with(b"/") {
            return Err(Failed::File(path, io::ErrorKind::IsADirectory.into()));
        }
        let target = Self { path, mode: there.map(|there| there.permissions().mode()) };
        std::fs::create_dir_all(target.folder()).map_err(|error| target.failed(error))?;
        Ok(target)
    }

    fn folder(&self) -> &Path {
        self.path.parent().unwrap_or(&self.path)
    }

    fn is_new(&self) -> bool {
        self.mode.is_none()
    }

    fn failed(&self, error: io::Error) -> Failed {
        Failed::File(self.path.clone(), error)
    }

    fn told(&self, broken: Broken) -> Failed {
        match broken {
            Broken::Content(error) => Failed::Content(error),
            Broken::File(error) => self.failed(error),
        }
    }

    /// Makes a file one that may be renamed to this.
    fn finish(&self, file: &File, mode: Option<u32>) -> Result<(), Failed> {
        let mode = mode.or(self.mode).unwrap_or(MODE) & 0o7777;
        let done = file.set_permissions(Permissions::from_mode(mode));
        done.and_then(|()| file.sync_all()).map_err(|error| self.failed(error))
    }
}

/// An upload in parts.
struct Partial {
    path: PathBuf,
    target: PathBuf,
}

impl Partial {
    fn of(target: PathBuf, upload: &str) -> Result<Self, Refused> {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_".contains(&byte);
        if !(1..=LONGEST).contains(&upload.len()) || !upload.bytes().all(plain) {
            let text = format!("`upload` is 1 to {LONGEST} letters, digits, - and _");
            return Err(Refused::bad(text));
        }
        let target = std::fs::canonicalize(&target).unwrap_or(target);
        let folder = target.parent().unwrap_or(&target);
        Ok(Self { path: folder.join(format!(".denizen-{upload}.partial")), target })
    }

    /// Takes a part in; says whether the file is new, if that was the last one.
    async fn receive(
        self,
        content: impl Stream<Item = io::Result<Bytes>> + Send + Unpin,
        place: UploadPlace,
        mode: Option<u32>,
    ) -> Result<Option<bool>, Refused> {
        let Self { path, target } = self;
        let at = path.clone();
        let begin = blocking(move || {
            let target = Target::of(target)?;
            Ok((begin(&at, place.first)?, target))
        });
        let (file, target) = begin.await?;
        let mut file = tokio::fs::File::from_std(file);
        let length = place.last - place.first + 1;
        let copied = copy(content, &mut file, length).await.map_err(|it| target.told(it))?;
        if copied < length {
            let text = format!("{copied} bytes came of {length}: go on where the upload is");
            return Err(Refused::new(Code::BrokenOff, text));
        }
        if place.last + 1 < place.total {
            return Ok(None);
        }
        let file = file.into_std().await;
        blocking(move || {
            target.finish(&file, mode)?;
            std::fs::rename(&path, &target.path).map_err(|error| target.failed(error))?;
            Ok(Some(target.is_new()))
        })
        .await
    }
}

/// Opens an upload for whoever has it alone, to be written on from `first`.
fn begin(path: &Path, first: u64) -> Result<File, Refused> {
    let failed = |error: io::Error| Refused::of(path, &error);
    let nofollow = i32::try_from(rustix::fs::OFlags::NOFOLLOW.bits()).unwrap_or(0);
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(nofollow)
        .open(path)
        .map_err(failed)?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Err(taken()),
        Err(TryLockError::Error(error)) => return Err(failed(error)),
    }
    // Whoever had it before us may have renamed it since.
    let (ours, there) = (file.metadata().map_err(failed)?, std::fs::symlink_metadata(path));
    if !there.is_ok_and(|there| (there.dev(), there.ino()) == (ours.dev(), ours.ino())) {
        return Err(taken());
    }
    if first > ours.len() {
        let received = ours.len();
        let text = format!("{received} bytes are there: go on with the next");
        let refused = Refused::new(Code::BadOffset, text);
        return Err(refused.with(HeaderName::from_static(UPLOAD_OFFSET), received.into()));
    }
    file.set_len(first).map_err(failed)?;
    file.seek(SeekFrom::Start(first)).map_err(failed)?;
    Ok(file)
}

fn taken() -> Refused {
    Refused::new(Code::Uploading, "another request is sending a part of this upload")
}

async fn on_a_thread<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Failed> + Send + 'static,
) -> Result<T, Failed> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|error| Err(Failed::Content(io::Error::other(error))))
}
