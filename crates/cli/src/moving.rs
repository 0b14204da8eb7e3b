//! `denizen export` and `import`: a session as a file. A file that is written has its name only
//! once it is whole, and none is if the archive breaks off.

use std::io::IsTerminal;
use std::path::PathBuf;

use futures::TryStreamExt;
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Frame;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio_util::io::ReaderStream;

use crate::client::{Client, empty, path};
use crate::copy::{failed, partial_beside};
use crate::progress::Moved;
use crate::{Failure, Result, show};

/// Standard input or output, by the name that other programs have for them.
const STANDARD: &str = "-";

/// Writes a session to a file, or to standard output.
pub async fn export(client: &Client, session: &str, to: Option<PathBuf>) -> Result<()> {
    let to = to.filter(|to| to.as_os_str() != STANDARD);
    if to.is_none() && std::io::stdout().is_terminal() {
        return Err(Failure::new(
            "an archive is nothing for a terminal: name a file (--output FILE), or redirect",
        ));
    }
    let Some(to) = to else { return download(client, session, &mut tokio::io::stdout()).await };
    // What is no file (a pipe, /dev/null) stays what it is.
    if std::fs::metadata(&to).is_ok_and(|metadata| !metadata.is_file()) {
        let into = tokio::fs::File::options().write(true).open(&to).await;
        return download(client, session, &mut into.map_err(failed(&to))?).await;
    }
    let (file, partial) = partial_beside(&to)?;
    let mut file = tokio::fs::File::from_std(file);
    tokio::select! {
        done = download(client, session, &mut file) => done?,
        // A part of it is of no use to anybody.
        _ = tokio::signal::ctrl_c() => return Err(Failure::with_code(130, "interrupted")),
    }
    file.sync_all().await.map_err(failed(&to))?;
    partial.persist(&to).map_err(|error| failed(&to)(error.error))
}

async fn download(
    client: &Client,
    session: &str,
    into: &mut (impl AsyncWrite + Unpin),
) -> Result<()> {
    let response = client.request("GET", &path(session, "/export"), None, empty()).await?;
    let total = response.headers().get("content-length");
    let total = total.and_then(|total| total.to_str().ok()?.parse().ok());
    let mut pieces = response.into_body().into_data_stream();
    let mut moved = Moved::of(total);
    let broken = |error: &dyn std::fmt::Display| {
        Failure::new(format!("the archive of {session} broke off, it is of no use: {error}"))
    };
    while let Some(piece) = pieces.try_next().await.map_err(|error| broken(&error))? {
        into.write_all(&piece).await.map_err(|error| broken(&error))?;
        moved.on(piece.len());
    }
    into.flush().await.map_err(|error| broken(&error))
}

/// Makes a session of a file, or of standard input.
pub async fn import(
    client: &Client,
    session: &str,
    from: Option<PathBuf>,
    json: bool,
) -> Result<()> {
    let from = from.filter(|from| from.as_os_str() != STANDARD);
    if from.is_none() && std::io::stdin().is_terminal() {
        return Err(Failure::new("which archive? name its file, or redirect standard input"));
    }
    let Some(from) = from else {
        return upload(client, session, tokio::io::stdin(), None, json).await;
    };
    let file = tokio::fs::File::open(&from).await.map_err(failed(&from))?;
    let metadata = file.metadata().await.map_err(failed(&from))?;
    if metadata.is_dir() {
        return Err(Failure::new(format!("{} is a folder, not an archive", from.display())));
    }
    upload(client, session, file, Some(metadata.len()), json).await
}

async fn upload(
    client: &Client,
    session: &str,
    from: impl AsyncRead + Send + Sync + 'static,
    total: Option<u64>,
    json: bool,
) -> Result<()> {
    let mut moved = Moved::of(total);
    let pieces = ReaderStream::with_capacity(from, 256 << 10);
    let pieces = pieces.inspect_ok(move |piece| moved.on(piece.len())).map_ok(Frame::data);
    let body = BodyExt::boxed(StreamBody::new(pieces));
    let kind = Some(("content-type", "application/zstd"));
    let response = client.request("POST", &path(session, "/import"), kind, body).await?;
    show::session(&Client::body(response).await?, json)
}
