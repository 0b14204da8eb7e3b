//! `denizen cp`: files and folders into a session and out of it, as cp(1) names them. A file
//! is written beside its name and renamed: a copy that breaks off leaves the old one whole.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use connectrpc::ErrorCode;
use connectrpc::client::CallOptions;
use denizen_envd::filesystem::{FileType, StatRequest};
use denizen_envd::{MODE, folder};
use denizen_server::SESSION;
use futures::TryStreamExt;
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Frame;
use tempfile::TempPath;
use tokio_util::io::{ReaderStream, StreamReader};

use crate::client::{Client, empty, escape};
use crate::progress::Moved;
use crate::{Failure, Result};

/// Copies in or out: one side is SESSION:PATH.
pub async fn run(client: &Client, from: &str, to: &str) -> Result<()> {
    match (remote(from), remote(to)) {
        (None, Some((session, path))) => copy_in(client, Path::new(from), session, path).await,
        (Some((session, path)), None) => copy_out(client, session, path, Path::new(to)).await,
        _ => Err(Failure::new("one side has to be a file here, the other SESSION:PATH")),
    }
}

/// A name with a colon is a session's unless it has a slash before it, as scp(1) has it.
pub fn remote(name: &str) -> Option<(&str, &str)> {
    name.split_once(':').filter(|(session, _)| !session.contains('/'))
}

/// Says what a failure was met with.
pub fn failed<'a>(what: &'a Path) -> impl Fn(std::io::Error) -> Failure + 'a {
    move |error| Failure::new(format!("{}: {error}", what.display()))
}

/// A file to be given the name `to` once it is whole; gone if it is not.
pub fn partial_beside(to: &Path) -> Result<(std::fs::File, TempPath)> {
    let parent = to.parent().filter(|parent| !parent.as_os_str().is_empty());
    let partial = tempfile::Builder::new()
        .prefix(".denizen-")
        .tempfile_in(parent.unwrap_or(Path::new(".")))
        .map_err(failed(to))?;
    Ok(partial.into_parts())
}

/// Whether there is a folder of that name in the session; none if there is nothing.
async fn is_folder(client: &Client, session: &str, path: &str) -> Result<Option<bool>> {
    let options = CallOptions::default().with_header(SESSION, session);
    let request = StatRequest { path: path.to_owned(), ..Default::default() };
    match client.files().stat_with_options(request, options).await {
        Ok(found) => {
            let entry = found.into_owned().entry.into_option().unwrap_or_default();
            Ok(Some(entry.r#type == FileType::FILE_TYPE_DIRECTORY))
        }
        Err(error) if error.code == ErrorCode::NotFound => Ok(None),
        Err(error) => Err(Failure::new(error.message.unwrap_or_default())),
    }
}

async fn copy_in(client: &Client, from: &Path, session: &str, to: &str) -> Result<()> {
    let metadata = tokio::fs::metadata(from).await.map_err(failed(from))?;
    let name = std::path::absolute(from).map_err(failed(from))?;
    let name = name.file_name().unwrap_or_default().to_string_lossy();
    let base = if to.is_empty() { "." } else { to };
    let into_folder = to.ends_with('/') || is_folder(client, session, base).await? == Some(true);
    let target = if into_folder { format!("{base}/{name}") } else { to.to_owned() };
    let target = escape(&target);
    let (uri, body) = if metadata.is_dir() {
        let mut moved = Moved::of(None);
        let pieces = folder::send(from.to_owned()).inspect_ok(move |piece| moved.on(piece.len()));
        let pieces = pieces.map_ok(Frame::data);
        let body = BodyExt::boxed(StreamBody::new(pieces));
        (format!("/files?path={target}&format=tar"), body)
    } else if metadata.is_file() {
        let mode = metadata.permissions().mode() & 0o7777;
        let file = tokio::fs::File::open(from).await.map_err(failed(from))?;
        let mut moved = Moved::of(Some(metadata.len()));
        let pieces = ReaderStream::with_capacity(file, 256 << 10);
        let pieces = pieces.inspect_ok(move |piece| moved.on(piece.len())).map_ok(Frame::data);
        let body = BodyExt::boxed(StreamBody::new(pieces));
        (format!("/files?path={target}&mode={mode}"), body)
    } else {
        return Err(Failure::new(format!("{} is no file and no folder", from.display())));
    };
    client.request("POST", &uri, Some((SESSION, session)), body).await?;
    Ok(())
}

async fn copy_out(client: &Client, session: &str, from: &str, to: &Path) -> Result<()> {
    // Nothing can be had from a session that is not there: do not make it.
    client.session(session).await?;
    let from = if from.is_empty() { "." } else { from };
    let name = Path::new(from).file_name();
    let to = match name {
        Some(name) if to.is_dir() => to.join(name),
        _ => to.to_owned(),
    };
    let uri = format!("/files?path={}", escape(from));
    if is_folder(client, session, from).await? == Some(true) {
        let uri = format!("{uri}&format=tar");
        let response = client.request("GET", &uri, Some((SESSION, session)), empty()).await?;
        let mut moved = Moved::of(None);
        let content = response.into_body().into_data_stream().map_err(std::io::Error::other);
        let content = content.inspect_ok(move |piece| moved.on(piece.len()));
        return folder::receive(content, to.clone()).await.map_err(failed(&to));
    }
    let response = client.request("GET", &uri, Some((SESSION, session)), empty()).await?;
    let mode = response.headers().get(MODE);
    let mode = mode.and_then(|mode| mode.to_str().ok()?.parse::<u32>().ok()).unwrap_or(0o644);
    let total = response.headers().get("content-length");
    let total = total.and_then(|total| total.to_str().ok()?.parse().ok());
    let mut moved = Moved::of(total);
    let content = response.into_body().into_data_stream().map_err(std::io::Error::other);
    let content = content.inspect_ok(move |piece| moved.on(piece.len()));
    let mut content = StreamReader::new(content);
    let (file, partial) = partial_beside(&to)?;
    let mut file = tokio::fs::File::from_std(file);
    tokio::io::copy(&mut content, &mut file).await.map_err(failed(&to))?;
    // A session must not make programs here that run as whoever copied them.
    let mode = std::fs::Permissions::from_mode(mode & 0o777);
    file.set_permissions(mode).await.map_err(failed(&to))?;
    file.sync_all().await.map_err(failed(&to))?;
    partial.persist(&to).map_err(|error| failed(&to)(error.error))
}
