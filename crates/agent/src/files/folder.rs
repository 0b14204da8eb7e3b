//! Folders, and what there is at a path besides content: looked at, listed, made, moved, removed,
//! watched, and as archives. A link is never followed by what removes.

use std::collections::BinaryHeap;
use std::convert::Infallible;
use std::ffi::OsString;
use std::fs::Metadata;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use axum::body::Body;
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderMap, HeaderValue, StatusCode};
use axum::response::IntoResponse;
use axum::response::sse::{Event, KeepAlive, Sse};
use denizen_api::{Change, Code, Entry, Folder, escape_path};
use denizen_envd::folder as tar;
use futures::TryStreamExt;
use rustix::fs::{CWD, RenameFlags, renameat_with};
use serde::Serialize;

use super::refusal::{Answer, Refused};
use super::{blocking, json};
use crate::watch::{Missed, Watch};

/// Most entries of one part of a list.
const MOST: usize = 1000;

pub(super) async fn stat(path: PathBuf) -> Answer {
    let entry = blocking(move || entry(&path).map_err(|error| Refused::of(&path, &error))).await?;
    Ok(json(StatusCode::OK, &entry))
}

/// What is at a path.
pub(super) fn entry(path: &Path) -> io::Result<Entry> {
    let there = std::fs::symlink_metadata(path)?;
    let target = there.is_symlink().then(|| std::fs::read_link(path)).transpose()?;
    let (modified, nanoseconds) = (there.mtime(), there.mtime_nsec());
    // Exact for as long as anybody has clocks.
    #[allow(clippy::cast_precision_loss)]
    let modified_at = modified as f64 + nanoseconds as f64 / 1e9;
    Ok(Entry {
        name: path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
        path: path.to_string_lossy().into_owned(),
        escaped: escape_path(path.as_os_str().as_encoded_bytes()),
        kind: kind(&there).to_owned(),
        size: there.len(),
        mode: format!("{:04o}", there.mode() & 0o7777),
        user: there.uid(),
        group: there.gid(),
        modified_at,
        target: target.map(|target| target.to_string_lossy().into_owned()),
    })
}

fn kind(there: &Metadata) -> &'static str {
    let kind = there.file_type();
    match () {
        () if kind.is_dir() => "folder",
        () if kind.is_symlink() => "symlink",
        () if kind.is_fifo() => "fifo",
        () if kind.is_socket() => "socket",
        () if kind.is_file() => "file",
        () => "device",
    }
}

pub(super) async fn list(path: PathBuf, limit: Option<String>, after: Option<Vec<u8>>) -> Answer {
    let limit = match limit.map(|limit| limit.parse::<usize>()) {
        None => MOST,
        Some(Ok(limit)) if (1..=MOST).contains(&limit) => limit,
        Some(_) => return Err(Refused::bad(format!("`limit` is from 1 to {MOST}"))),
    };
    let after = after.map(OsString::from_vec);
    let part = blocking(move || {
        part(&path, limit, after.as_ref()).map_err(|error| Refused::of(&path, &error))
    });
    Ok(json(StatusCode::OK, &part.await?))
}

/// A part of a folder. All names are read for each, but no more are kept than are told.
fn part(path: &Path, limit: usize, after: Option<&OsString>) -> io::Result<Folder> {
    let mut least = BinaryHeap::new();
    for item in std::fs::read_dir(path)? {
        let name = item?.file_name();
        if after.is_none_or(|after| name > *after) {
            least.push(name);
            if least.len() > limit + 1 {
                least.pop();
            }
        }
    }
    let mut names = least.into_sorted_vec();
    let more = names.len() > limit;
    names.truncate(limit);
    let next = names.last().filter(|_| more).map(|last| escape_path(last.as_encoded_bytes()));
    let mut entries = Vec::with_capacity(names.len());
    for name in names {
        match entry(&path.join(name)) {
            Ok(entry) => entries.push(entry),
            // Removed meanwhile.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(Folder { entries, next })
}

pub(super) async fn make(path: PathBuf) -> Answer {
    let made = blocking(move || {
        let failed = |error: io::Error| Refused::of(&path, &error);
        let status = match std::fs::metadata(&path) {
            Ok(there) if there.is_dir() => StatusCode::OK,
            Ok(_) => {
                let text = format!("{}: there is something else of that name", path.display());
                return Err(Refused::new(Code::AlreadyExists, text));
            }
            Err(_) => {
                std::fs::create_dir_all(&path).map_err(failed)?;
                StatusCode::CREATED
            }
        };
        Ok((status, entry(&path).map_err(failed)?))
    });
    let (status, entry) = made.await?;
    Ok(json(status, &entry))
}

pub(super) async fn rename(from: PathBuf, to: PathBuf, replace: bool) -> Answer {
    let entry = blocking(move || {
        // So that what is said of the second is not said of the first.
        std::fs::symlink_metadata(&from).map_err(|error| Refused::of(&from, &error))?;
        if let Some(parent) = to.parent() {
            std::fs::create_dir_all(parent).map_err(|error| Refused::of(parent, &error))?;
        }
        let flags = if replace { RenameFlags::empty() } else { RenameFlags::NOREPLACE };
        let done = renameat_with(CWD, &from, CWD, &to, flags).map_err(io::Error::from);
        done.map_err(|error| Refused::of(&to, &error))?;
        entry(&to).map_err(|error| Refused::of(&to, &error))
    });
    Ok(json(StatusCode::OK, &entry.await?))
}

pub(super) async fn remove(path: PathBuf, workdir: PathBuf, recursive: bool) -> Answer {
    blocking(move || {
        let failed = |error: io::Error| Refused::of(&path, &error);
        let there = std::fs::symlink_metadata(&path).map_err(failed)?;
        if !there.is_dir() {
            return std::fs::remove_file(&path).map_err(failed);
        }
        let (real, volume) = (std::fs::canonicalize(&path), std::fs::canonicalize(&workdir));
        if volume.map_err(failed)?.starts_with(real.map_err(failed)?) {
            let text = "the session's volume is in there: remove what is in it";
            return Err(Refused::new(Code::NotPermitted, text));
        }
        let done =
            if recursive { std::fs::remove_dir_all(&path) } else { std::fs::remove_dir(&path) };
        done.map_err(failed)
    })
    .await?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

pub(super) async fn pack(path: PathBuf) -> Answer {
    let folder = is_folder(path).await?;
    let body = Body::from_stream(tar::send(folder));
    Ok(([(CONTENT_TYPE, "application/x-tar")], body).into_response())
}

pub(super) async fn unpack(path: PathBuf, headers: &HeaderMap, body: Body) -> Answer {
    let kind = headers.get(CONTENT_TYPE).map(HeaderValue::as_bytes);
    if kind != Some(b"application/x-tar") {
        return Err(Refused::new(Code::BadType, "what is unpacked is application/x-tar"));
    }
    let status = match tokio::fs::metadata(&path).await {
        Ok(_) => StatusCode::OK,
        Err(_) => StatusCode::CREATED,
    };
    let broken = |error| io::Error::new(io::ErrorKind::ConnectionAborted, error);
    let body = body.into_data_stream().map_err(broken);
    tar::receive(body, path.clone()).await.map_err(|error| match error.kind() {
        io::ErrorKind::ConnectionAborted => Refused::new(Code::BrokenOff, error.to_string()),
        // The reader of archives has no other words for what it does not understand.
        io::ErrorKind::InvalidData | io::ErrorKind::Other | io::ErrorKind::UnexpectedEof => {
            Refused::new(Code::BadArchive, error.to_string())
        }
        _ => Refused::of(&path, &error),
    })?;
    let entry = blocking(move || entry(&path).map_err(|error| Refused::of(&path, &error))).await?;
    Ok(json(status, &entry))
}

/// Server-sent events: `change`, and `lost` where some are missing.
pub(super) async fn watch(path: PathBuf, recursive: bool) -> Answer {
    let folder = is_folder(path).await?;
    let watch = blocking(move || {
        let told = |kind, path: &Path| Change {
            kind,
            path: path.to_string_lossy().into_owned(),
            escaped: escape_path(path.as_os_str().as_encoded_bytes()),
        };
        Watch::new(&folder, recursive, told).map_err(|error| {
            let text = format!("{} cannot be watched: {error}", folder.display());
            Refused::new(Code::OverLimit, text)
        })
    });
    let changes = futures::stream::unfold(watch.await?, |watch| async {
        let event = match watch.next().await {
            Ok(change) => sse("change", &change),
            Err(Missed) => sse("lost", &serde_json::Value::Null),
        };
        Some((Ok::<_, Infallible>(event), watch))
    });
    Ok(Sse::new(changes).keep_alive(KeepAlive::default()).into_response())
}

fn sse(kind: &str, data: &impl Serialize) -> Event {
    // Strings: this cannot fail.
    Event::default().event(kind).data(serde_json::to_string(data).unwrap_or_default())
}

async fn is_folder(path: PathBuf) -> Result<PathBuf, Refused> {
    blocking(move || match std::fs::metadata(&path) {
        Ok(there) if there.is_dir() => Ok(path),
        Ok(_) => Err(Refused::new(Code::NotFolder, format!("{} is no folder", path.display()))),
        Err(error) => Err(Refused::of(&path, &error)),
    })
    .await
}
