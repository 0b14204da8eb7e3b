//! What is told to one who asks for a sandbox and gets no answer from it: in JSON, or on a page to
//! one who looks at it in a browser. What was sent by a client is never more than text there.

use axum::http::header::{
    ACCEPT, CONTENT_SECURITY_POLICY, CONTENT_TYPE, USER_AGENT, X_CONTENT_TYPE_OPTIONS,
};
use axum::http::{HeaderMap, HeaderName, StatusCode};
use axum::response::{IntoResponse, Response};
use denizen_api::{Code, Problem};

use super::Visit;

/// The texts that clients know by heart.
pub(super) const NO_TOKEN: &str = "Sandbox is secured with traffic access token. Token header \
                                   'e2b-traffic-access-token' is missing";
pub(super) const BAD_TOKEN: &str = "Sandbox is secured with traffic access token. Provided token in \
                                    header 'e2b-traffic-access-token' is invalid";
const CLOSED: &str = "The sandbox is running but port is not open";
const GONE: &str = "The sandbox was not found";

/// A page of these needs nothing and may do nothing.
const POLICY: &str =
    "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";
/// What browsers call themselves, in lower case.
const BROWSERS: [&str; 7] = ["mozilla", "chrome", "safari", "firefox", "edge", "opera", "msie"];

/// What is told.
#[derive(Clone, Debug)]
pub(super) struct Told {
    status: StatusCode,
    sandbox: String,
    port: Option<u16>,
    message: String,
    title: &'static str,
    /// The message, on a page.
    said: String,
}

impl Told {
    /// That there is no such sandbox, or that it sleeps.
    pub(super) fn gone(sandbox: &str) -> Self {
        Self {
            status: StatusCode::BAD_GATEWAY,
            sandbox: sandbox.to_owned(),
            port: None,
            message: GONE.to_owned(),
            title: "Sandbox Not Found",
            said: format!("There is no sandbox {sandbox}, or it sleeps."),
        }
    }

    /// Why a port was not asked.
    pub(super) fn refused(Visit { sandbox, port }: Visit, problem: &Problem) -> Self {
        let sandbox = sandbox.simple().to_string();
        let (title, message) = match problem.detail.as_str() {
            _ if problem.code == Code::Port => ("Closed Port", CLOSED),
            NO_TOKEN => ("Missing Traffic Access Token", NO_TOKEN),
            BAD_TOKEN => ("Invalid Traffic Access Token", BAD_TOKEN),
            other => (problem.code.title(), other),
        };
        let said = if problem.code == Code::Port {
            format!(
                "The sandbox {sandbox} is running, but there is no service running on port {port}."
            )
        } else {
            format!("Port {port} of sandbox {sandbox}: {message}.")
        };
        let status = StatusCode::from_u16(problem.status);
        Self {
            status: status.unwrap_or(StatusCode::INTERNAL_SERVER_ERROR),
            port: Some(port),
            message: message.to_owned(),
            sandbox,
            title,
            said,
        }
    }

    /// For one who reads pages.
    pub(super) fn page(&self) -> Response {
        let (title, said) = (escaped(self.title), escaped(&self.said));
        let page = format!(
            "<html lang=\"en\"><head><meta charset=\"utf-8\"><title>{title}</title></head>\
             <body><h1>{title}</h1><p>{said}</p></body></html>"
        );
        let headers = [
            (CONTENT_TYPE, "text/html; charset=utf-8"),
            (CONTENT_SECURITY_POLICY, POLICY),
            (X_CONTENT_TYPE_OPTIONS, "nosniff"),
        ];
        (self.status, headers, page).into_response()
    }
}

/// In JSON, and as it is for who words it in another way.
impl IntoResponse for Told {
    fn into_response(self) -> Response {
        let mut told = serde_json::json!({
            "sandboxId": self.sandbox,
            "message": self.message,
            "code": self.status.as_u16(),
        });
        if let Some(port) = self.port {
            told["port"] = port.into();
        }
        let kind = [(CONTENT_TYPE, "application/json; charset=utf-8")];
        let mut answer = (self.status, kind, told.to_string()).into_response();
        answer.extensions_mut().insert(self);
        answer
    }
}

/// Whether somebody reads this in a browser, and no script of a page does.
pub(super) fn reads_pages(headers: &HeaderMap) -> bool {
    let value = |name: HeaderName| {
        let value = headers.get(name).and_then(|value| value.to_str().ok());
        value.unwrap_or_default().to_ascii_lowercase()
    };
    let client = value(USER_AGENT);
    if !BROWSERS.iter().any(|name| client.contains(name)) {
        return false;
    }
    // A script cannot set this one, and one that is old enough has none.
    match value(HeaderName::from_static("sec-fetch-mode")).as_str() {
        "" => {
            let accept = value(ACCEPT);
            let is_script = headers.contains_key("x-requested-with");
            !is_script && (accept.contains("html") || !accept.contains("json"))
        }
        mode => mode == "navigate",
    }
}

fn escaped(text: &str) -> String {
    let escaped = |character: char| match character {
        '&' => "&amp;".to_owned(),
        '<' => "&lt;".to_owned(),
        '>' => "&gt;".to_owned(),
        '"' => "&quot;".to_owned(),
        '\'' => "&#39;".to_owned(),
        other => other.to_string(),
    };
    text.chars().map(escaped).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use uuid::Uuid;

    use super::*;

    async fn text(answer: Response) -> String {
        let body = axum::body::to_bytes(answer.into_body(), 1 << 16).await.unwrap();
        String::from_utf8(body.to_vec()).unwrap()
    }

    #[tokio::test]
    async fn a_page_says_what_is_said_in_json_and_shows_names_as_text() {
        let visit = Visit { sandbox: Uuid::from_u128(7), port: 8001 };
        let told = Told::refused(visit, &Problem::new(Code::Port, "refused"));
        let page = told.page();
        assert_eq!(page.headers()[CONTENT_TYPE], "text/html; charset=utf-8");
        let page = text(page).await;
        assert!(page.starts_with("<html") && page.ends_with("</html>"), "{page}");
        assert!(page.contains("no service running on port 8001"), "{page}");
        assert!(page.contains(&visit.sandbox.simple().to_string()), "{page}");
        let answer = told.into_response();
        assert_eq!(answer.headers()[CONTENT_TYPE], "application/json; charset=utf-8");
        let told: serde_json::Value = serde_json::from_str(&text(answer).await).unwrap();
        assert_eq!((&told["message"], &told["port"]), (&CLOSED.into(), &8001.into()));

        let page = text(Told::gone("<script>\"&'").page()).await;
        assert!(page.contains("Sandbox Not Found") && !page.contains("<script"), "{page}");
        assert!(page.contains("&lt;script&gt;&quot;&amp;&#39;"), "{page}");
        for (detail, title) in [
            (NO_TOKEN, "Missing Traffic Access Token"),
            (BAD_TOKEN, "Invalid Traffic Access Token"),
        ] {
            let told = Told::refused(visit, &Problem::new(Code::Forbidden, detail));
            assert!(text(told.page()).await.contains(title));
        }
    }

    #[test]
    fn pages_are_for_browsers_and_not_for_their_scripts() {
        let browser = ("user-agent", "Mozilla/5.0 (X11; Linux x86_64) Chrome/58.0");
        for (headers, wanted) in [
            (&[][..], false),
            (&[("user-agent", "curl/8.5")], false),
            (&[browser], true),
            (&[browser, ("accept", "*/*")], true),
            (&[browser, ("accept", "text/html,application/json")], true),
            (&[browser, ("accept", "application/json")], false),
            (&[browser, ("x-requested-with", "XMLHttpRequest")], false),
            (&[browser, ("sec-fetch-mode", "navigate"), ("x-requested-with", "a")], true),
            (&[browser, ("sec-fetch-mode", "cors"), ("accept", "*/*")], false),
            (&[browser, ("sec-fetch-mode", "websocket")], false),
        ] {
            let all = headers
                .iter()
                .map(|(name, value)| (HeaderName::from_static(name), value.parse().unwrap()));
            assert_eq!(reads_pages(&all.collect()), wanted, "{headers:?}");
        }
    }
}
