//! The dashboard: files that `web/` was built to, as they were when the server was built. It must
//! never answer with anything that depends on who asks: no key is needed to load a page.

use axum::Router;
use axum::extract::Path;
use axum::http::header::{
    CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, REFERRER_POLICY, X_CONTENT_TYPE_OPTIONS,
};
use axum::http::{HeaderName, StatusCode};
use axum::response::{Html, IntoResponse, Response};
use axum::routing::get;

mod built {
    include!(concat!(env!("OUT_DIR"), "/web.rs"));
}

/// Scripts and requests are ours only. Styles may be inline, for the terminal makes its own.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; \
    img-src 'self' data:; font-src 'self'; connect-src 'self'; base-uri 'none'; \
    form-action 'none'; frame-ancestors 'none'";

/// Instead of the page, where it was not built.
const NOT_BUILT: &str = "<!doctype html>
<html lang=\"en\"><meta charset=\"utf-8\"><title>denizen</title>
<h1>denizen</h1>
<p>The dashboard is not part of this build. <code>cargo xtask web</code> builds it (with npm); then
build denizen again. The API is at <code>/v1</code>.</p>
";

/// `/` and what the page loads.
pub(crate) fn router() -> Router {
    Router::new().route("/", get(page)).route("/assets/{*path}", get(asset))
}

fn built(name: &str) -> Option<&'static [u8]> {
    built::FILES.iter().find(|(path, _)| *path == name).map(|(_, bytes)| *bytes)
}

async fn page() -> Response {
    let page = match built("index.html") {
        Some(page) => Html(page).into_response(),
        None => Html(NOT_BUILT).into_response(),
    };
    // It names the files of this build, and the next one's are other ones.
    shown("no-cache", page)
}

async fn asset(Path(path): Path<String>) -> Response {
    let name = format!("assets/{path}");
    let Some(bytes) = built(&name) else {
        return shown("no-store", StatusCode::NOT_FOUND.into_response());
    };
    // The name has a hash of the content in it.
    shown(
        "public, max-age=31536000, immutable",
        ([(CONTENT_TYPE, kind(&name))], bytes).into_response(),
    )
}

fn shown(cache: &'static str, answer: Response) -> Response {
    let headers = [
        (CACHE_CONTROL, cache),
        (CONTENT_SECURITY_POLICY, POLICY),
        (REFERRER_POLICY, "no-referrer"),
        (X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (HeaderName::from_static("cross-origin-opener-policy"), "same-origin"),
        (HeaderName::from_static("cross-origin-resource-policy"), "same-origin"),
    ];
    (headers, answer).into_response()
}

fn kind(name: &str) -> &'static str {
    match name.rsplit_once('.').map(|(_, extension)| extension) {
        Some("js") => "text/javascript; charset=utf-8",
        Some("css") => "text/css; charset=utf-8",
        Some("svg") => "image/svg+xml",
        _ => "application/octet-stream",
    }
}
