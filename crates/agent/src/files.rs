//! Files of an instance over plain HTTP: content in whole and in parts, folders as lists and as
//! archives, and what changes in them. This is what denizen's own API has under
//! `/v1/sessions/{session}/files`; paths mean here what they mean to this process.
//!
//! A request does what its user may do, and nothing here looks at a path on behalf of somebody
//! else. What is refused is refused as problem details (RFC 9457), for the daemon passes it on.

pub(crate) mod content;
mod folder;
mod refusal;
pub(crate) mod upload;

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use axum::body::Body;
use axum::extract::Request;
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode};
use axum::response::{IntoResponse, Response};
use denizen_api::Code;
use percent_encoding::percent_decode_str;
use serde::Serialize;

use self::refusal::{Answer, Refused};

/// Where an agent that serves files over HTTP has what is served here.
pub const PREFIX: &str = "/v1/files";

/// Answers a request whose path is that of a file. Below `/~/`, a path begins in `workdir`.
/// Cancel-safe as far as files are: an upload that is dropped leaves what was there before.
pub async fn answer(workdir: &Path, request: Request) -> Response {
    let is_head = request.method() == Method::HEAD;
    let answer = match serve(workdir, request).await {
        Ok(response) => response,
        Err(refused) => refused.into_response(),
    };
    if is_head { answer.map(|_| Body::empty()) } else { answer }
}

async fn serve(workdir: &Path, request: Request) -> Answer {
    let (head, body) = request.into_parts();
    let path = resolve(workdir, head.uri.path())?;
    let mut query = Query::read(head.uri.query().unwrap_or_default())?;
    let view = query.text("as")?;
    match (head.method, view.as_deref()) {
        (Method::GET | Method::HEAD, view) => read(path, view, query, &head.headers).await,
        (Method::PUT, None) => {
            let (upload, mode) = (query.text("upload")?, query.mode()?);
            query.end()?;
            upload::put(path, upload, mode, &head.headers, body).await
        }
        (Method::PUT, Some("folder")) => {
            query.end()?;
            folder::make(path).await
        }
        (Method::PUT, Some("tar")) => {
            query.end()?;
            folder::unpack(path, &head.headers, body).await
        }
        (Method::POST, None) => {
            let to = query.take("to").ok_or_else(|| Refused::bad("where to? set `to`"))?;
            let replace = query.flag("replace")?;
            query.end()?;
            folder::rename(path, absolute(workdir, to)?, replace).await
        }
        (Method::DELETE, None) => {
            let (upload, recursive) = (query.text("upload")?, query.flag("recursive")?);
            query.end()?;
            match upload {
                Some(upload) => upload::give_up(path, upload).await,
                None => folder::remove(path, workdir.to_owned(), recursive).await,
            }
        }
        (Method::PUT | Method::POST | Method::DELETE, _) => {
            Err(Refused::bad("`as` is none that this method has"))
        }
        _ => Err(Refused::new(Code::BadMethod, "files have GET, HEAD, PUT, POST and DELETE")),
    }
}

async fn read(path: PathBuf, view: Option<&str>, mut query: Query, headers: &HeaderMap) -> Answer {
    match view {
        None | Some("content") => {
            query.end()?;
            content::get(path, headers).await
        }
        Some("stat") => {
            query.end()?;
            folder::stat(path).await
        }
        Some("list") => {
            let (limit, after) = (query.text("limit")?, query.take("after"));
            query.end()?;
            folder::list(path, limit, after).await
        }
        Some("tar") => {
            query.end()?;
            folder::pack(path).await
        }
        Some("watch") => {
            let recursive = query.flag("recursive")?;
            query.end()?;
            folder::watch(path, recursive).await
        }
        Some("upload") => {
            let upload = query.text("upload")?;
            query.end()?;
            upload::look(path, upload).await
        }
        Some(_) => Err(Refused::bad("`as` is one of content, stat, list, tar, watch and upload")),
    }
}

/// The path that an escaped one is for.
fn resolve(workdir: &Path, escaped: &str) -> Result<PathBuf, Refused> {
    // Only as it is written here: a folder of the root can have that name.
    if let Some(rest) = escaped.strip_prefix("/~").filter(|it| it.is_empty() || it.starts_with('/'))
    {
        return below(workdir, percent_decode_str(rest).collect());
    }
    absolute(workdir, percent_decode_str(escaped).collect())
}

/// A path from the root, or below `~`.
fn absolute(workdir: &Path, bytes: Vec<u8>) -> Result<PathBuf, Refused> {
    if let Some(rest) = bytes.strip_prefix(b"~/") {
        return below(workdir, rest.to_vec());
    }
    if !bytes.starts_with(b"/") {
        return Err(Refused::bad("a path begins with / or with ~/"));
    }
    named(PathBuf::from(OsString::from_vec(bytes)))
}

fn below(workdir: &Path, mut bytes: Vec<u8>) -> Result<PathBuf, Refused> {
    let slashes = bytes.iter().take_while(|byte| **byte == b'/').count();
    bytes.drain(..slashes);
    named(workdir.join(OsString::from_vec(bytes)))
}

fn named(path: PathBuf) -> Result<PathBuf, Refused> {
    if path.as_os_str().as_encoded_bytes().contains(&0) {
        return Err(Refused::new(Code::BadName, "a path has no byte zero"));
    }
    Ok(path)
}

/// What a query asks for, each once, and nothing else.
struct Query(Vec<(String, Vec<u8>)>);

impl Query {
    fn read(query: &str) -> Result<Self, Refused> {
        let mut all: Vec<(String, Vec<u8>)> = Vec::new();
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            let plain =
                |text: &str| -> Vec<u8> { percent_decode_str(&text.replace('+', " ")).collect() };
            let name = String::from_utf8_lossy(&plain(name)).into_owned();
            if all.iter().any(|(there, _)| *there == name) {
                return Err(Refused::bad(format!("{name:?} is there twice")));
            }
            all.push((name, plain(value)));
        }
        Ok(Self(all))
    }

    fn take(&mut self, name: &str) -> Option<Vec<u8>> {
        let at = self.0.iter().position(|(there, _)| there == name)?;
        Some(self.0.swap_remove(at).1)
    }

    fn text(&mut self, name: &str) -> Result<Option<String>, Refused> {
        let value = self.take(name).map(String::from_utf8).transpose();
        value.map_err(|_| Refused::bad(format!("`{name}` is no text")))
    }

    fn flag(&mut self, name: &str) -> Result<bool, Refused> {
        match self.text(name)?.as_deref() {
            None | Some("false") => Ok(false),
            Some("true") => Ok(true),
            Some(_) => Err(Refused::bad(format!("`{name}` is true or false"))),
        }
    }

    fn mode(&mut self) -> Result<Option<u32>, Refused> {
        let Some(text) = self.text("mode")? else { return Ok(None) };
        let digits = (1..=4).contains(&text.len()) && text.bytes().all(|it| it.is_ascii_digit());
        let mode = u32::from_str_radix(&text, 8).ok().filter(|_| digits);
        mode.map(Some).ok_or_else(|| Refused::bad("`mode` is up to four octal digits"))
    }

    /// That nothing is left.
    fn end(&self) -> Result<(), Refused> {
        match self.0.first() {
            None => Ok(()),
            Some((name, _)) => Err(Refused::bad(format!("{name:?} means nothing here"))),
        }
    }
}

/// An answer in JSON.
fn json(status: StatusCode, value: &impl Serialize) -> Response {
    // Strings and numbers: this cannot fail.
    let body = serde_json::to_vec(value).unwrap_or_default();
    let kind = HeaderValue::from_static("application/json");
    (status, [(CONTENT_TYPE, kind)], body).into_response()
}

/// Runs what blocks on a thread that may.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Refused> + Send + 'static,
) -> Result<T, Refused> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|error| Err(Refused::new(Code::Failed, error.to_string())))
}

#[cfg(test)]
mod tests;
