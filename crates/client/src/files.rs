//! Files of a session. A path is absolute in the session, or begins with `~/` in its volume.

use std::io::SeekFrom;
use std::path::Path;
use std::time::Duration;

use api::{Change, Entry, Folder, Upload, UploadPlace};
use bytes::Bytes;
use denizen_api as api;
use futures::{Stream, TryStreamExt};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::{Response, StatusCode};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncSeek, AsyncSeekExt, AsyncWrite, AsyncWriteExt};
use tokio_util::io::ReaderStream;

use crate::stream::Sent;
use crate::{Client, Error, Result, empty, path, typed};

/// How much of a file one request of an upload has: what is sent again, at most, after one that
/// broke off before the daemon had any of it.
const PART: u64 = 64 << 20;
/// How often an upload or download goes on after it broke off without having come any further.
const TRIES: u32 = 5;

/// How long it waits first, before it goes on.
const PAUSE: Duration = Duration::from_millis(50);

/// Where the API has a file of a session.
fn file(session: &str, file: &Path, query: &str) -> String {
    let file = file.as_os_str().as_encoded_bytes();
    // In the volume it begins with what the API has for that, which is nothing to escape.
    let slash = if file.starts_with(b"/") { "" } else { "/" };
    path(session, &format!("/files{slash}{}{query}", api::escape_path(file)))
}

impl Client {
    /// What there is at a path. Cancel-safe.
    ///
    /// # Errors
    /// [`Error`]; `no_file` if there is nothing.
    pub async fn stat(&self, session: &str, at: impl AsRef<Path>) -> Result<Entry> {
        self.get(&file(session, at.as_ref(), "?as=stat")).await
    }

    /// All that is in a folder. Cancel-safe.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn list(&self, session: &str, folder: impl AsRef<Path>) -> Result<Vec<Entry>> {
        let mut all = Vec::new();
        let mut query = "?as=list".to_owned();
        loop {
            let part: Folder = self.get(&file(session, folder.as_ref(), &query)).await?;
            all.extend(part.entries);
            match part.next {
                // It is escaped as a query has it.
                Some(next) => query = format!("?as=list&after={next}"),
                None => return Ok(all),
            }
        }
    }

    /// Makes a folder, and those above it; one that is there already is fine.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn make_folder(&self, session: &str, folder: impl AsRef<Path>) -> Result<Entry> {
        let path = file(session, folder.as_ref(), "?as=folder");
        typed(self.json("PUT", &path).await?)
    }

    /// Moves a file or folder; with `replace` to the place of another.
    ///
    /// # Errors
    /// [`Error`]; `other_disk` if that is on another file system.
    pub async fn move_file(
        &self,
        session: &str,
        from: impl AsRef<Path>,
        to: impl AsRef<Path>,
        replace: bool,
    ) -> Result<Entry> {
        let to = api::escape_path(to.as_ref().as_os_str().as_encoded_bytes());
        let query = format!("?to={to}&replace={replace}");
        typed(self.json("POST", &file(session, from.as_ref(), &query)).await?)
    }

    /// Removes a file or an empty folder; with `recursive` all that is in it, too.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn remove_file(
        &self,
        session: &str,
        at: impl AsRef<Path>,
        recursive: bool,
    ) -> Result<()> {
        let query = format!("?recursive={recursive}");
        self.json("DELETE", &file(session, at.as_ref(), &query)).await.map(drop)
    }

    /// Copies a file's content to `into`, from byte `from` on; says how many bytes that were. A
    /// download that breaks off goes on by itself where it was, as long as the file is the same.
    /// Not cancel-safe: a part may be written.
    ///
    /// # Errors
    /// [`Error`]; also that it cannot be written.
    pub async fn download_file(
        &self,
        session: &str,
        at: impl AsRef<Path>,
        from: u64,
        into: &mut (impl AsyncWrite + Unpin),
    ) -> Result<u64> {
        let path = file(session, at.as_ref(), "");
        let (mut copied, mut tag, mut tries) = (0, None, 0);
        loop {
            let first = from + copied;
            let answer = self.content(&path, first, tag.as_deref()).await;
            let broken = match answer {
                // What is left of nothing is no range.
                Err(Error::Refused(problem)) if problem.code == api::Code::BadRange => {
                    return Ok(copied);
                }
                Err(error @ (Error::Gone { .. } | Error::Answer(_))) if tag.is_some() => error,
                Err(error) => return Err(error),
                Ok(answer) => {
                    if first > 0 && answer.status() != StatusCode::PARTIAL_CONTENT {
                        let why = "the file was changed while it was downloaded".to_owned();
                        return Err(Error::Answer(why));
                    }
                    let header = answer.headers().get("etag").and_then(|tag| tag.to_str().ok());
                    tag = tag.or(header.map(str::to_owned));
                    let before = copied;
                    match self.copy(answer, into, &mut copied).await? {
                        None => return Ok(copied),
                        Some(error) => {
                            if copied > before {
                                tries = 0;
                            }
                            error
                        }
                    }
                }
            };
            tries += 1;
            if tries > TRIES {
                return Err(broken);
            }
        }
    }

    async fn content(
        &self,
        path: &str,
        first: u64,
        tag: Option<&str>,
    ) -> Result<Response<Incoming>> {
        let mut request = self.target.request("GET", path);
        if first > 0 {
            request = request.header("range", format!("bytes={first}-"));
        }
        if let Some(tag) = tag {
            request = request.header("if-range", tag);
        }
        self.exchange(request, empty()).await
    }

    /// Copies an answer as far as it comes; says what broke it off.
    async fn copy(
        &self,
        answer: Response<Incoming>,
        into: &mut (impl AsyncWrite + Unpin),
        copied: &mut u64,
    ) -> Result<Option<Error>> {
        let mut body = answer.into_body().into_data_stream();
        loop {
            match body.try_next().await {
                Err(error) => return Ok(Some(self.gone(error))),
                Ok(None) => break,
                Ok(Some(piece)) => {
                    into.write_all(&piece).await.map_err(Error::Write)?;
                    *copied += piece.len() as u64;
                }
            }
        }
        into.flush().await.map_err(Error::Write)?;
        Ok(None)
    }

    /// Writes a file whose content is as long as it is. It takes the place of what is there when
    /// all has come. Dropped, what was there stays.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn write_file(
        &self,
        session: &str,
        at: impl AsRef<Path>,
        content: impl AsyncRead + Send + Sync + 'static,
    ) -> Result<Entry> {
        let body = streamed(ReaderStream::new(content));
        let path = file(session, at.as_ref(), "");
        let header = Some(("content-type", "application/octet-stream"));
        typed(Self::body(self.request("PUT", &path, header, body).await?).await?)
    }

    /// Writes a file in parts: one that breaks off is sent on from where the daemon has it. Asked
    /// again under the same name, the upload goes on where an earlier one was, also of another
    /// program; the name is one that no other upload has (letters, digits, `-` and `_`).
    /// Dropped, what was there stays.
    ///
    /// # Errors
    /// [`Error`]; also that the content cannot be read.
    pub async fn upload_file(
        &self,
        session: &str,
        at: impl AsRef<Path>,
        upload: &str,
        mut content: impl AsyncRead + AsyncSeek + Send + Unpin,
    ) -> Result<Entry> {
        let at = at.as_ref();
        let unread = |error: std::io::Error| Error::Answer(format!("the content: {error}"));
        let total = content.seek(SeekFrom::End(0)).await.map_err(unread)?;
        if total == 0 {
            return self.write_file(session, at, tokio::io::empty()).await;
        }
        let query = format!("?as=upload&upload={upload}");
        let so_far = file(session, at, &query);
        let path = file(session, at, &format!("?upload={upload}"));
        let (mut first, mut tries) = (self.received(&so_far).await?, 0);
        loop {
            // One that has come to its end, and was not told.
            first = first.min(total - 1);
            let length = PART.min(total - first);
            content.seek(SeekFrom::Start(first)).await.map_err(unread)?;
            let place = UploadPlace { first, last: first + length - 1, total };
            match self.part(&path, place, &mut content).await {
                Ok(answer) if answer.status() == StatusCode::ACCEPTED => {
                    (first, tries) = (place.last + 1, 0);
                }
                Ok(answer) => return typed(Self::body(answer).await?),
                Err(error) => {
                    let goes_on = match &error {
                        Error::Gone { .. } | Error::Answer(_) => true,
                        Error::Refused(problem) => matches!(
                            problem.code,
                            api::Code::BadOffset | api::Code::BrokenOff | api::Code::Uploading
                        ),
                        Error::Address(_) | Error::Write(_) => false,
                    };
                    tries += 1;
                    if !goes_on || tries > TRIES {
                        return Err(error);
                    }
                    // Who was cut off may not have let go of it yet.
                    tokio::time::sleep(PAUSE * tries).await;
                    let received = self.received(&so_far).await?;
                    if received > first {
                        tries = 0;
                    }
                    first = received;
                }
            }
        }
    }

    /// How much of an upload has come.
    async fn received(&self, path: &str) -> Result<u64> {
        match self.get::<Upload>(path).await {
            Ok(upload) => Ok(upload.received),
            Err(Error::Refused(problem)) if problem.code == api::Code::NoFile => Ok(0),
            Err(error) => Err(error),
        }
    }

    /// Sends a part, which the content stands at.
    async fn part(
        &self,
        path: &str,
        place: UploadPlace,
        content: &mut (impl AsyncRead + Send + Unpin),
    ) -> Result<Response<Incoming>> {
        let (reader, mut writer) = tokio::io::duplex(1 << 18);
        let length = place.last - place.first + 1;
        let request = self
            .target
            .request("PUT", path)
            .header("content-type", "application/octet-stream")
            .header("content-length", length)
            .header("content-range", place.to_string());
        let mut content = content.take(length);
        let copied = async move {
            // Whoever reads it says what went wrong there.
            let _ = tokio::io::copy(&mut content, &mut writer).await;
        };
        let answer = self.exchange(request, streamed(ReaderStream::new(reader)));
        let ((), answer) = tokio::join!(copied, answer);
        answer
    }

    /// Copies a folder as a tar archive to `into`. Not cancel-safe: a part may be written.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn download_folder(
        &self,
        session: &str,
        folder: impl AsRef<Path>,
        into: &mut (impl AsyncWrite + Unpin),
    ) -> Result<()> {
        self.download(&file(session, folder.as_ref(), "?as=tar"), into).await
    }

    /// Unpacks a tar archive into a folder, which is made if it is not there. Dropped, a part may
    /// be unpacked.
    ///
    /// # Errors
    /// [`Error`]; `bad_archive` if that leads out of the folder, or is none.
    pub async fn upload_folder(
        &self,
        session: &str,
        folder: impl AsRef<Path>,
        archive: impl AsyncRead + Send + Sync + 'static,
    ) -> Result<Entry> {
        let path = file(session, folder.as_ref(), "?as=tar");
        let header = Some(("content-type", "application/x-tar"));
        let body = streamed(ReaderStream::new(archive));
        typed(Self::body(self.request("PUT", &path, header, body).await?).await?)
    }

    /// What changes in a folder from now on; with `recursive`, in those below it, too.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn watch(
        &self,
        session: &str,
        folder: impl AsRef<Path>,
        recursive: bool,
    ) -> Result<Changes> {
        let path = file(session, folder.as_ref(), &format!("?as=watch&recursive={recursive}"));
        let response = self.request("GET", &path, None, empty()).await?;
        Ok(Changes(Sent::new(self.target.to_string(), response)))
    }
}

fn streamed(
    content: impl Stream<Item = std::io::Result<Bytes>> + Send + Sync + 'static,
) -> BoxBody<Bytes, std::io::Error> {
    StreamBody::new(content.map_ok(Frame::data)).boxed()
}

/// What changes in a folder. Dropping it ends the watch.
pub struct Changes(Sent);

impl Changes {
    /// The next change; none in its place if some are lost. Cancel-safe.
    ///
    /// # Errors
    /// [`Error::Gone`] if the daemon or the session has ended.
    pub async fn next(&mut self) -> Result<Option<Change>> {
        match self.0.next().await? {
            Some((kind, _)) if kind == "lost" => Ok(None),
            Some((_, data)) => typed(data).map(Some),
            None => Err(self.0.broken_off()),
        }
    }
}
