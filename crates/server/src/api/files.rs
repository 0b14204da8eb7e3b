//! Files of sessions. What is asked is answered within the session, by an agent that has the
//! rights of its user there (`denizen_agent::files`), and passed on; under `host`, where a session
//! has no paths of its own, by that same code here.

use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::Uri;
use axum::http::uri::PathAndQuery;
use axum::response::Response;
use connectrpc::{ConnectError, ErrorCode};
use denizen::Isolation;
use denizen_agent::files;
use denizen_api::{Code, Entry, Folder, Upload};

use super::Api;
use super::extract::session;
use super::refusal::{Answer, Refused};
use super::wire::{Binary, ServerSent};
use crate::files::{pass, secure};

/// Read a file, or look at what is at a path.
///
/// Without `as`, its content, of which `Range` asks for a part (`If-Range`, `If-None-Match` and
/// `HEAD` as in RFC 9110). With `as`: `stat` is what there is at the path; `list` what is in a
/// folder; `tar` a folder as an archive; `watch` what changes in a folder from now on, as
/// server-sent events `change` (of a `Change`), and `lost` where some are missing; `upload` how far an upload in
/// parts is. The path is the session's; below `~/` it begins in its volume.
#[utoipa::path(get, path = "/v1/sessions/{session}/files/{*path}", tag = "files",
    params(("session" = String, Path, description = "Name or UUID"),
        ("path" = String, Path, description = "Absolute, without the slash it begins with. Slashes may be written as they are; any byte but zero may be escaped"),
        ("as" = Option<View>, Query, description = "What of it; its content, if nothing is said"),
        ("limit" = Option<u64>, Query, description = "Of a list: at most so many, from 1 to 1000"),
        ("after" = Option<String>, Query, description = "Of a list: those that come after this name"),
        ("recursive" = Option<bool>, Query, description = "Of a watch: in folders below, too"),
        ("upload" = Option<String>, Query, description = "Of an upload: its name"),
        ("Range" = Option<String>, Header, description = "`bytes=FIRST-LAST`, `bytes=FIRST-` or `bytes=-LENGTH`"),
        ("If-Range" = Option<String>, Header, description = "The tag of what the range is to be of"),
        ("If-None-Match" = Option<String>, Header, description = "The tag of what is known already")),
    responses(
        (status = 200, description = "All of it", content(
            (Binary = "application/octet-stream"),
            (Described = "application/json"),
            (Binary = "application/x-tar"),
            (ServerSent = "text/event-stream"))),
        (status = 206, description = "The part", content_type = "application/octet-stream", body = Binary),
        (status = 304, description = "It is as it was"),
        Refused))]
pub(crate) async fn read(State(api): State<Api>, request: Request) -> Answer<Response> {
    serve(&api, request).await
}

/// What of a file is read.
#[derive(utoipa::ToSchema)]
#[schema(rename_all = "lowercase")]
#[allow(dead_code, reason = "it is only described here: the agent reads it")]
pub(crate) enum View {
    Content,
    Stat,
    List,
    Tar,
    Watch,
    Upload,
}

/// What is said of a file in JSON: by `stat`, `list` and `upload`.
#[derive(utoipa::ToSchema)]
#[schema(as = FileAnswer)]
#[serde(untagged)]
#[allow(dead_code, reason = "it is only described here: the agent writes it")]
pub(crate) enum Described {
    Stat(Entry),
    List(Folder),
    Upload(Upload),
}

/// Write a file, make a folder, or unpack an archive into one. Folders above are made.
///
/// A file is written beside what is there, and takes its place when all of it has come. With
/// `upload`, a name of the client's choice, and `Content-Range: bytes FIRST-LAST/TOTAL` it comes in
/// parts (202, but for the last): after one that broke off, `as=upload` tells where to go on; a
/// part that begins further on is refused with that number in `Upload-Offset`, one that begins
/// before it replaces what came after.
#[utoipa::path(put, path = "/v1/sessions/{session}/files/{*path}", tag = "files",
    params(("session" = String, Path, description = "Name or UUID"),
        ("path" = String, Path, description = "Absolute, without the slash it begins with"),
        ("as" = Option<WriteAs>, Query, description = "What it is to be; a file, if nothing is said"),
        ("mode" = Option<String>, Query, description = "Permissions of a file, in octal digits"),
        ("upload" = Option<String>, Query, description = "The name of an upload in parts: 1 to 64 letters, digits, `-` and `_`, as no other upload to that folder has"),
        ("Content-Range" = Option<String>, Header, description = "Which part of an upload this is")),
    request_body(description = "The content, or an archive", content(
        (Binary = "application/octet-stream"), (Binary = "application/x-tar"))),
    responses((status = 200, description = "It was there, and is this now", body = Entry),
        (status = 201, description = "It is new", body = Entry),
        (status = 202, description = "There is more to come", body = Upload), Refused))]
pub(crate) async fn write(State(api): State<Api>, request: Request) -> Answer<Response> {
    serve(&api, request).await
}

/// What is written.
#[derive(utoipa::ToSchema)]
#[schema(rename_all = "lowercase")]
#[allow(dead_code, reason = "it is only described here: the agent reads it")]
pub(crate) enum WriteAs {
    Folder,
    Tar,
}

/// Move a file or folder to another path on the same file system. Folders above are made.
#[utoipa::path(post, path = "/v1/sessions/{session}/files/{*path}", tag = "files",
    params(("session" = String, Path, description = "Name or UUID"),
        ("path" = String, Path, description = "Absolute, without the slash it begins with"),
        ("to" = String, Query, description = "Where to: from the session's root, or `~/` and a path in its volume"),
        ("replace" = Option<bool>, Query, description = "Instead of what is there; else that is refused")),
    responses((status = 200, description = "It is there now", body = Entry), Refused))]
pub(crate) async fn rename(State(api): State<Api>, request: Request) -> Answer<Response> {
    serve(&api, request).await
}

/// Remove a file or folder, or give up an upload in parts. No link is followed.
#[utoipa::path(delete, path = "/v1/sessions/{session}/files/{*path}", tag = "files",
    params(("session" = String, Path, description = "Name or UUID"),
        ("path" = String, Path, description = "Absolute, without the slash it begins with"),
        ("recursive" = Option<bool>, Query, description = "With all that is in a folder; else one that is not empty is refused"),
        ("upload" = Option<String>, Query, description = "Only what has come of this upload")),
    responses((status = 204, description = "It is gone"), Refused))]
pub(crate) async fn remove(State(api): State<Api>, request: Request) -> Answer<Response> {
    serve(&api, request).await
}

async fn serve(api: &Api, mut request: Request) -> Answer<Response> {
    let uri = std::mem::take(request.uri_mut());
    let gone = || Refused::new(Code::NotFound, "this is no path of a file");
    let (session, rest) = session(uri.path()).ok_or_else(gone)?;
    let rest = rest.strip_prefix("/files").ok_or_else(gone)?;
    let query = uri.query().map(|query| format!("?{query}")).unwrap_or_default();
    let uri = |prefix: &str| -> Answer<Uri> {
        let path = format!("{prefix}{rest}{query}").parse::<PathAndQuery>();
        path.map(Uri::from).map_err(|_| gone())
    };
    let lease = api.take_known(&session).await?;
    let response = if api.pool.isolation()? == Isolation::Host {
        *request.uri_mut() = uri("")?;
        let response = tokio::select! {
            response = files::answer(lease.guard.workdir(), request) => response,
            () = lease.ended() => return Err(Refused::stopped()),
        };
        response.map(|body| Body::new(lease.hold(body)))
    } else {
        *request.uri_mut() = uri(files::PREFIX)?;
        pass(lease, request).await.map_err(refused)?
    };
    Ok(secure(response))
}

fn refused(error: ConnectError) -> Refused {
    let code = match error.code {
        ErrorCode::InvalidArgument => Code::BadRequest,
        ErrorCode::DeadlineExceeded => Code::NoAnswer,
        ErrorCode::ResourceExhausted => Code::OverLimit,
        ErrorCode::Aborted => return Refused::stopped(),
        _ => Code::NoAgent,
    };
    Refused::new(code, error.message.unwrap_or_default())
}
