//! Files as resources: `denizen://SESSION/PATH`, where the path is from the session's root, or
//! begins with `~/` where commands start. Each part is escaped as a URI has it.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use denizen_client::Error;
use denizen_client::api::{Code, escape};
use percent_encoding::percent_decode_str;
use rmcp::ErrorData;
use rmcp::model::{Resource, ResourceContents, ResourceTemplate};

use crate::call::Call;
use crate::failure::is;
use crate::files::{ENTRIES, WHOLE, fetch};

const SCHEME: &str = "denizen://";

/// The one template that there is.
pub(crate) const TEMPLATE: &str = "denizen://{session}/{+path}";

pub(crate) fn template() -> ResourceTemplate {
    ResourceTemplate::new(TEMPLATE, "session-file")
        .with_title("A file of a session")
        .with_description(
            "A file, by the session's name and its path: from the session's root, or from its \
             working directory if it begins with ~/. At most 1 MiB.",
        )
}

fn failed(error: &impl ToString) -> ErrorData {
    ErrorData::internal_error(error.to_string(), None)
}

/// The files in the working directory of the session that a call is about. None is started or
/// made for that.
pub(crate) async fn list(call: &Call<'_>) -> Result<Vec<Resource>, ErrorData> {
    let session = call.place(None).await.map_err(|failure| failed(&failure))?.session;
    match call.client().session(&session).await {
        Ok(known) if known.state == "active" => {}
        Ok(_) => return Ok(Vec::new()),
        Err(error) if is(&error, Code::UnknownSession) => return Ok(Vec::new()),
        Err(error) => return Err(failed(&error)),
    }
    let all = call.client().list(&session, "~/").await.map_err(|error| failed(&error))?;
    let files = all.into_iter().filter(|entry| entry.kind == "file").take(ENTRIES);
    let listed = files.map(|entry| {
        let uri = format!("{SCHEME}{}{}", escape(&session), entry.escaped);
        let resource = Resource::new(uri, &entry.name).with_size(entry.size);
        resource.with_mime_type(kind(&entry.name))
    });
    Ok(listed.collect())
}

/// Reads one.
pub(crate) async fn read(call: &Call<'_>, uri: &str) -> Result<ResourceContents, ErrorData> {
    let unknown = |why: &str| {
        let data = serde_json::json!({ "uri": uri });
        ErrorData::resource_not_found(format!("{uri}: {why}"), Some(data))
    };
    let Some((session, path)) = split(uri) else {
        return Err(unknown(&format!("a resource is called {TEMPLATE}")));
    };
    let read = fetch(call.client(), &session, &path, |bytes| bytes.len() > WHOLE).await;
    let content = read.map_err(|error| match error {
        Error::Refused(problem) => match problem.code {
            Code::UnknownSession | Code::NoFile | Code::Forbidden | Code::IsFolder => {
                unknown(&problem.detail)
            }
            _ => failed(&problem.detail),
        },
        error => failed(&error),
    })?;
    if content.bytes.len() > WHOLE {
        let why = format!(
            "{uri} has {} bytes, and a resource {WHOLE} at most: the tool read_file reads parts",
            content.size
        );
        return Err(ErrorData::invalid_params(why, None));
    }
    let kind = kind(&path);
    let contents = match String::from_utf8(content.bytes) {
        Ok(text) if !text.contains('\0') => {
            let kind = if kind == UNKNOWN { "text/plain" } else { kind };
            return Ok(ResourceContents::text(text, uri).with_mime_type(kind));
        }
        Ok(text) => ResourceContents::blob(STANDARD.encode(text), uri),
        Err(error) => ResourceContents::blob(STANDARD.encode(error.as_bytes()), uri),
    };
    Ok(contents.with_mime_type(kind))
}

/// The session and the path that a URI names.
fn split(uri: &str) -> Option<(String, String)> {
    let (session, path) = uri.strip_prefix(SCHEME)?.split_once('/')?;
    let decoded = |text: &str| Some(percent_decode_str(text).decode_utf8().ok()?.into_owned());
    let (session, path) = (decoded(session)?, decoded(path)?);
    let path = if path.starts_with("~/") { path } else { format!("/{path}") };
    (!session.is_empty()).then_some((session, path))
}

/// What a file is, by its name.
fn kind(name: &str) -> &'static str {
    let ending = name.rsplit_once('.').map(|(_, ending)| ending.to_ascii_lowercase());
    match ending.as_deref().unwrap_or_default() {
        "txt" | "log" | "rs" | "py" | "c" | "h" | "go" | "sh" | "toml" | "ts" | "cfg" | "ini" => {
            "text/plain"
        }
        "md" => "text/markdown",
        "html" | "htm" => "text/html",
        "css" => "text/css",
        "csv" => "text/csv",
        "js" | "mjs" => "text/javascript",
        "json" => "application/json",
        "yaml" | "yml" => "application/yaml",
        "xml" => "application/xml",
        "pdf" => "application/pdf",
        "png" => "image/png",
        "jpg" | "jpeg" => "image/jpeg",
        "gif" => "image/gif",
        "webp" => "image/webp",
        "svg" => "image/svg+xml",
        _ => UNKNOWN,
    }
}

/// What a name tells nothing of.
const UNKNOWN: &str = "application/octet-stream";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uri_names_a_session_and_a_path() {
        let of = |session: &str, path: &str| Some((session.to_owned(), path.to_owned()));
        assert_eq!(split("denizen://demo/volume/a%20b"), of("demo", "/volume/a b"));
        assert_eq!(split("denizen://a%2Fb/~/c"), of("a/b", "~/c"));
        for wrong in ["denizen://demo", "denizen:///x", "file:///x", "denizen://a/%ff", ""] {
            assert_eq!(split(wrong), None, "{wrong}");
        }
    }
}
