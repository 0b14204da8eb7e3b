//! What a tool has at hand while it works: the daemon, as whoever asks, and the session that it
//! is about. The session is the one that an argument names; else the one that is set for all calls
//! (`--session`, a header); else one that belongs to this client of this caller alone.

use std::sync::Arc;

use denizen_client::api::{Code, Session, Whoami};
use denizen_client::{Client, Error};
use rmcp::RoleServer;
use rmcp::service::RequestContext;
use tokio::sync::OnceCell;

use crate::failure::{Failure, Result, is};
use crate::forward::Forwards;
use crate::output::Outputs;

/// How a request reaches the daemon, and as whom.
#[derive(Clone)]
pub struct Door {
    /// The daemon, with the caller's own rights.
    pub client: Client,
    /// What tells callers apart: what one has left here, no other sees.
    pub identity: String,
    /// The session for all calls that name none.
    pub session: Option<String>,
    /// Where ports of sessions are reached by the daemon's proxy, if the client is to use that.
    pub ports: Option<Ports>,
}

/// Where ports of sessions are reached.
#[derive(Clone, Debug)]
pub struct Ports {
    /// The daemon: scheme, host and port.
    pub url: String,
    /// They have names of their own below this.
    pub domain: Option<String>,
}

impl Ports {
    /// Where a port of a session is.
    pub(crate) fn of(&self, session: &str, port: u16) -> String {
        // What a host may be made of; it is read without regard to case.
        let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
        if let Some(domain) = &self.domain
            && session.bytes().all(plain)
            && session.len() < 58
        {
            let (scheme, rest) = self.url.split_once("://").unwrap_or(("http", &self.url));
            let authority = rest.rsplit_once(':').filter(|(_, at)| at.parse::<u16>().is_ok());
            let at = authority.map(|(_, at)| format!(":{at}")).unwrap_or_default();
            return format!("{scheme}://{port}-{session}.{domain}{at}/");
        }
        let session = denizen_client::escape(session);
        format!("{}/v1/sessions/{session}/ports/{port}/", self.url)
    }
}

/// A request that is being answered.
pub(crate) struct Call<'a> {
    pub(crate) door: Door,
    pub(crate) context: &'a RequestContext<RoleServer>,
    pub(crate) outputs: &'a Outputs,
    /// For a client of this machine, ports here.
    pub(crate) forwards: Option<&'a Forwards>,
    pub(crate) whoami: &'a OnceCell<Arc<Whoami>>,
}

/// The session that a call is about.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    pub(crate) session: String,
    /// It was named by the model, so it has to be there.
    named: bool,
}

impl Call<'_> {
    pub(crate) fn client(&self) -> &Client {
        &self.door.client
    }

    /// The session that a call is about, by its argument.
    pub(crate) async fn place(&self, argument: Option<&str>) -> Result<Place> {
        if let Some(session) = argument {
            let place = Place { session: session.to_owned(), named: true };
            return if session.is_empty() {
                Err(Failure::new("`session` is empty"))
            } else {
                Ok(place)
            };
        }
        let session = if let Some(session) = &self.door.session {
            session.clone()
        } else {
            let who = async { self.client().whoami().await.map(Arc::new) };
            let who = self.whoami.get_or_try_init(|| who).await?;
            let client = self.context.client_info().map(|info| info.name);
            own(client.as_deref().unwrap_or_default(), who)
        };
        Ok(Place { session, named: false })
    }

    /// That a session that was named is there: one that is not is a slip, and none is made for it.
    pub(crate) async fn known(&self, place: &Place) -> Result<()> {
        if place.named {
            // The least that tells; to look at the session itself is to measure it.
            self.client().list_processes(&place.session).await?;
        }
        Ok(())
    }

    /// Has something done in a session; one that nobody has named is made first if need be.
    pub(crate) async fn within<T, F>(&self, place: &Place, act: impl Fn() -> F) -> Result<T>
    where
        F: Future<Output = std::result::Result<T, Error>>,
    {
        match act().await {
            Err(error) if !place.named && is(&error, Code::UnknownSession) => {
                self.client().ensure(&place.session, None).await?;
                Ok(act().await?)
            }
            done => Ok(done?),
        }
    }
}

/// The session's name, or its UUID if it has none.
pub(crate) fn name(session: &Session) -> String {
    session.name.clone().unwrap_or_else(|| session.id.to_string())
}

/// The session of a client that has named none. A token has one session only; a key has its own
/// for each client, and within what it is limited to.
fn own(client: &str, who: &Whoami) -> String {
    if let Some(session) = who.session {
        return session.to_string();
    }
    let mut name = String::new();
    for letter in client.chars().take(64) {
        match letter.to_ascii_lowercase() {
            letter if letter.is_ascii_alphanumeric() => name.push(letter),
            _ if name.is_empty() || name.ends_with('-') => {}
            _ => name.push('-'),
        }
    }
    let name = name.trim_end_matches('-');
    let name = if name.is_empty() { "client" } else { name };
    let name = &name[..name.len().min(32)];
    let prefix = who.sessions.as_deref().unwrap_or_default();
    match &who.id {
        Some(key) => format!("{prefix}mcp-{name}-{key}"),
        None => format!("{prefix}mcp-{name}"),
    }
}

#[cfg(test)]
mod tests {
    use denizen_client::api::Scope;

    use super::*;

    fn who(id: Option<&str>, sessions: Option<&str>) -> Whoami {
        Whoami {
            id: id.map(str::to_owned),
            name: "x".to_owned(),
            scope: Scope::Operate,
            sessions: sessions.map(str::to_owned),
            session: None,
            expires_at: None,
        }
    }

    #[test]
    fn a_client_has_a_session_of_its_own() {
        let local = who(None, None);
        assert_eq!(own("claude-code", &local), "mcp-claude-code");
        assert_eq!(own("Visual Studio  Code (1.2)", &local), "mcp-visual-studio-code-1-2");
        assert_eq!(own("../€", &local), "mcp-client");
        assert_eq!(own(&"x".repeat(999), &local), format!("mcp-{}", "x".repeat(32)));
        assert_eq!(own("c", &who(Some("k1"), None)), "mcp-c-k1");
        assert_eq!(own("c", &who(Some("k1"), Some("a-"))), "a-mcp-c-k1");
        let session = uuid();
        let token = Whoami { session: Some(session), ..local };
        assert_eq!(own("c", &token), session.to_string());
    }

    fn uuid() -> uuid::Uuid {
        uuid::Uuid::from_u128(7)
    }

    #[test]
    fn a_port_has_a_name_where_there_can_be_one() {
        let url = "https://box.example.org:7878".to_owned();
        let plain = Ports { url: url.clone(), domain: None };
        assert_eq!(plain.of("a b", 80), format!("{url}/v1/sessions/a%20b/ports/80/"));
        let ports = Ports { url: url.clone(), domain: Some("example.org".to_owned()) };
        assert_eq!(ports.of("a-b", 80), "https://80-a-b.example.org:7878/");
        assert_eq!(ports.of("A.b", 80), format!("{url}/v1/sessions/A.b/ports/80/"));
        let ports = Ports { url: "https://[::1]".to_owned(), ..ports };
        assert_eq!(ports.of("a", 80), "https://80-a.example.org/");
    }
}
