//! Who may do what, and from where. Whoever reaches the daemon's Unix socket is its own user and
//! may do all; over TCP, a key or a session's token says what.
//!
//! Every request passes [`guard`], which asks [`rules`] what its route needs. A handler must never
//! decide by itself who may call it; where its answer depends on the caller's reach (a list, a
//! stream of events), or its session is not in the path, it asks the [`Caller`].

pub(crate) mod audit;
pub(crate) mod guard;
mod keys;
pub(crate) mod limits;
pub(crate) mod routes;
pub(crate) mod rules;
pub(crate) mod tls;
pub(crate) mod tokens;

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use denizen::MicroVmManager;
use denizen_api::{Code, Scope};
use jiff::Timestamp;
use parking_lot::RwLock;
use uuid::Uuid;

use self::audit::Audit;
pub use self::keys::{KeyInfo, Keys, KeysError};
use self::limits::{AtATime, One, Rate};
pub use self::tls::Certificate;
use self::tokens::Token;
use crate::api::Refused;
use crate::e2b::Sandboxes;
use crate::lease::Leases;

/// How the daemon is reached besides its Unix socket.
#[derive(Clone, Debug, Default)]
pub struct Front {
    /// Where it listens on TCP.
    pub listen: Vec<SocketAddr>,
    /// Whether it may do so without TLS or any key on addresses that others reach.
    pub insecure_listen: bool,
    /// What it shows there; without, it speaks no TLS.
    pub certificate: Option<Certificate>,
    /// The names that it is called by, besides those of this machine for itself.
    pub hosts: Vec<String>,
    /// Ports of sessions are reached at `<port>-<session>.` and this.
    pub domain: Option<String>,
    /// Web pages of other origins (`https://example.org`) that may use it.
    pub origins: Vec<String>,
    /// Whether anybody may read its metrics.
    pub metrics_public: bool,
}

/// Where a request came from.
#[derive(Clone, Debug)]
pub(crate) enum Peer {
    /// The Unix socket, and who is there.
    Local { uid: u32 },
    /// TCP.
    Tcp {
        from: SocketAddr,
        to: SocketAddr,
        tls: bool,
        /// Ends the connection, whatever is being done on it.
        cut: tokio_util::sync::CancellationToken,
        /// Whether it has ever come with a good key or token.
        known: Arc<AtomicBool>,
    },
}

/// What a caller is let in by.
#[derive(Clone, Debug)]
enum Credential {
    /// The Unix socket.
    Local { uid: u32 },
    /// The key of this id.
    Key(String),
    /// A session's token.
    Token(Token),
    /// A volume's token.
    Volume(Token),
    /// That a sandbox's ports are open to all, or a signature for one of its files.
    Visitor(Uuid),
    /// Nothing was needed.
    None,
}

/// The sessions that a caller sees and touches.
#[derive(Clone, Debug)]
enum Reach {
    All,
    /// Those whose names begin so.
    Prefix(String),
    One(Uuid),
}

/// Who asks. The guard adds it to each request.
#[derive(Clone, Debug)]
pub(crate) struct Caller {
    credential: Credential,
    name: String,
    scope: Scope,
    reach: Reach,
    expires: Option<Timestamp>,
    /// Its place among the requests that it may have open, until the last copy of this is gone.
    open: Option<Arc<One<String>>>,
}

impl Caller {
    fn local(uid: u32) -> Self {
        Self {
            credential: Credential::Local { uid },
            name: "local".to_owned(),
            scope: Scope::Admin,
            reach: Reach::All,
            expires: None,
            open: None,
        }
    }

    /// Whoever asks for what needs nothing.
    fn nobody() -> Self {
        Self {
            credential: Credential::None,
            name: String::new(),
            scope: Scope::Read,
            // No session has this one.
            reach: Reach::One(Uuid::nil()),
            expires: None,
            open: None,
        }
    }

    /// Whoever asks for what of a sandbox is open without a key.
    fn visitor(sandbox: Uuid) -> Self {
        Self {
            credential: Credential::Visitor(sandbox),
            name: "visitor".to_owned(),
            scope: Scope::Operate,
            reach: Reach::One(sandbox),
            expires: None,
            open: None,
        }
    }

    /// Who has a volume's token, which is good for nothing else.
    fn holder(token: Token) -> Self {
        Self {
            name: "token".to_owned(),
            scope: Scope::Operate,
            // No session has this one.
            reach: Reach::One(Uuid::nil()),
            expires: Timestamp::from_second(token.expires).ok(),
            credential: Credential::Volume(token),
            open: None,
        }
    }

    /// Whether it may use the files of this volume.
    pub(crate) fn holds(&self, volume: Uuid) -> bool {
        match &self.credential {
            Credential::Volume(token) => token.session == volume,
            Credential::Local { .. } => true,
            _ => false,
        }
    }

    /// Whether it has shown nothing of ours, so that all that it sends is for the session.
    pub(crate) fn is_visitor(&self) -> bool {
        matches!(self.credential, Credential::Visitor(_))
    }

    /// Whether it was let in by a session's token.
    pub(crate) fn is_token(&self) -> bool {
        matches!(self.credential, Credential::Token(_))
    }

    /// The key by which it is let in, or in whose name.
    pub(crate) fn key(&self) -> Option<&str> {
        match &self.credential {
            Credential::Key(id) => Some(id),
            Credential::Token(token) | Credential::Volume(token) => token.issuer.as_deref(),
            Credential::Local { .. } | Credential::Visitor(_) | Credential::None => None,
        }
    }

    /// When what it is let in by is void.
    pub(crate) fn expires(&self) -> Option<Timestamp> {
        self.expires
    }

    /// A name for a new session, if it may only use sessions with names.
    pub(crate) fn name_for_new(&self) -> Option<String> {
        match &self.reach {
            Reach::Prefix(prefix) => Some(format!("{prefix}{}", Uuid::new_v4().simple())),
            Reach::All | Reach::One(_) => None,
        }
    }

    /// What its requests are counted by.
    fn counted_as(&self) -> Option<String> {
        match &self.credential {
            Credential::Local { .. } | Credential::None => None,
            Credential::Key(id) => Some(id.clone()),
            Credential::Token(token) | Credential::Volume(token) => Some(token.session.to_string()),
            Credential::Visitor(sandbox) => Some(format!("visitors of {sandbox}")),
        }
    }

    /// What keeps its requests apart from others': whatever it is called, it is let in by this.
    pub(crate) fn identity(&self) -> String {
        match &self.credential {
            Credential::Local { uid } => format!("uid {uid}"),
            Credential::Key(id) => format!("key {id}"),
            Credential::Token(token) | Credential::Volume(token) => {
                format!("token {}", token.session)
            }
            Credential::Visitor(sandbox) => format!("visitor of {sandbox}"),
            Credential::None => String::new(),
        }
    }

    /// Who it is, for the audit log.
    fn told(&self) -> serde_json::Value {
        match &self.credential {
            Credential::Local { uid } => serde_json::json!({ "uid": uid }),
            Credential::Key(id) => serde_json::json!({ "key": id, "name": self.name }),
            Credential::Token(token) => {
                serde_json::json!({ "token_of": token.session, "key": token.issuer })
            }
            Credential::Volume(token) => {
                serde_json::json!({ "volume": token.session, "key": token.issuer })
            }
            Credential::Visitor(sandbox) => serde_json::json!({ "visitor_of": sandbox }),
            Credential::None => serde_json::Value::Null,
        }
    }

    /// Whether it is limited to some sessions.
    fn is_limited(&self) -> bool {
        !matches!(self.reach, Reach::All)
    }

    /// Whether it may know of a session.
    pub(crate) fn sees(&self, id: Uuid, name: Option<&str>) -> bool {
        match &self.reach {
            Reach::All => true,
            Reach::Prefix(prefix) => name.is_some_and(|name| name.starts_with(prefix)),
            Reach::One(session) => *session == id,
        }
    }

    /// That it may touch a session, by whichever name that is called. What it may not touch and
    /// what there is not are told alike.
    ///
    /// # Errors
    /// `forbidden`.
    pub(crate) fn touches(&self, pool: &MicroVmManager, session: &str) -> Result<(), Refused> {
        // In the same order as `Leases::find`, so that both mean the same session.
        let touches = match (&self.reach, Uuid::try_parse(session)) {
            (Reach::All, _) => true,
            (Reach::One(one), Ok(id)) => *one == id,
            (Reach::One(one), Err(_)) => {
                let name = session.parse().ok();
                name.and_then(|name| pool.find(&name).ok().flatten()) == Some(*one)
            }
            (Reach::Prefix(_), Ok(id)) => {
                pool.inspect(id).is_ok_and(|known| self.sees(id, known.name.as_deref()))
            }
            (Reach::Prefix(_), Err(_)) => self.sees(Uuid::nil(), Some(session)),
        };
        if touches { Ok(()) } else { Err(self.outside()) }
    }

    /// That it may make a session without a name.
    ///
    /// # Errors
    /// `forbidden`, if it could not use it then.
    pub(crate) fn makes_nameless(&self) -> Result<(), Refused> {
        if self.is_limited() { Err(self.outside()) } else { Ok(()) }
    }

    fn outside(&self) -> Refused {
        let message = match &self.reach {
            Reach::Prefix(prefix) => {
                format!("this key is for sessions whose names begin with {prefix:?} only")
            }
            _ => "this token is for one session only".to_owned(),
        };
        Refused::new(Code::Forbidden, message)
    }
}

/// How many requests a key may make in a second, and at once after a while of none.
const REQUESTS: [f64; 2] = [1000.0, 4000.0];
/// How many a key may have open at a time.
const OPEN: usize = 512;
/// How many requests of one address are refused in a second, and at once, before it is told to
/// wait: more than the tests of an honest client, and nothing to whoever guesses keys.
const REFUSALS: [f64; 2] = [5.0, 100.0];

/// How often it is written down when keys were last used.
const REMEMBER: Duration = Duration::from_mins(5);

/// What the guard needs.
pub(crate) struct Access {
    pub(crate) pool: Arc<MicroVmManager>,
    pub(crate) leases: Arc<Leases>,
    pub(crate) keys: Keys,
    pub(crate) sandboxes: Arc<Sandboxes>,
    front: RwLock<Arc<Front>>,
    audit: Audit,
    requests: Rate<String>,
    at_a_time: Arc<AtATime<String>>,
    refusals: Rate<IpAddr>,
}

impl Access {
    pub(crate) fn new(
        pool: Arc<MicroVmManager>,
        leases: Arc<Leases>,
        keys: Keys,
        sandboxes: Arc<Sandboxes>,
        front: Front,
        audit: Audit,
    ) -> Self {
        let [a_second, at_once] = REQUESTS;
        let [refused_a_second, refused_at_once] = REFUSALS;
        Self {
            pool,
            leases,
            keys,
            sandboxes,
            front: RwLock::new(Arc::new(front)),
            audit,
            requests: Rate::new(a_second, at_once),
            at_a_time: AtATime::new(OPEN),
            refusals: Rate::new(refused_a_second, refused_at_once),
        }
    }

    /// How the daemon is reached, as it is now.
    pub(crate) fn front(&self) -> Arc<Front> {
        self.front.read().clone()
    }

    /// Whether a request came by TLS.
    pub(crate) fn is_tls(extensions: &axum::http::Extensions) -> bool {
        matches!(extensions.get::<Peer>(), Some(Peer::Tcp { tls: true, .. }))
    }

    /// Changes how the daemon is reached, for requests from now on.
    pub(crate) fn set_front(&self, front: Front) {
        *self.front.write() = Arc::new(front);
    }

    /// Who has this key or token, if it is good.
    fn who(&self, secret: &str) -> Option<Caller> {
        if secret.starts_with("dt_") {
            let token = self.keys.read_token(secret).filter(|token| self.is_of_today(token))?;
            return Some(Caller {
                name: "token".to_owned(),
                scope: Scope::Operate,
                reach: Reach::One(token.session),
                expires: Timestamp::from_second(token.expires).ok(),
                credential: Credential::Token(token),
                open: None,
            });
        }
        let info = self.keys.key(secret)?;
        Some(Caller {
            credential: Credential::Key(info.id),
            name: info.name,
            scope: info.scope,
            reach: info.sessions.map_or(Reach::All, Reach::Prefix),
            expires: info.expires_at,
            open: None,
        })
    }

    /// Whether what a caller was let in by is still good.
    fn is_good(&self, caller: &Caller) -> bool {
        match &caller.credential {
            Credential::Local { .. } | Credential::Visitor(_) | Credential::None => true,
            Credential::Key(id) => self.keys.is_good(id),
            Credential::Token(token) => self.keys.good_token(token) && self.is_of_today(token),
            Credential::Volume(token) => self.keys.good_token(token),
        }
    }

    /// Whether a token is for the session that there is now, not for one of the same id that was
    /// removed.
    fn is_of_today(&self, token: &Token) -> bool {
        let known = self.pool.inspect(token.session);
        let made = known.ok().and_then(|known| Timestamp::try_from(known.created_at).ok());
        made.is_some_and(|made| made.as_microsecond() <= token.issued)
    }

    /// Ends when what a caller was let in by is no longer good. Cancel-safe.
    async fn over(self: Arc<Self>, caller: Caller) {
        let mut changes = self.keys.changes();
        // Looked at anew now and then, for the clock may be set.
        let most = Duration::from_mins(1);
        while self.is_good(&caller) {
            let left = caller.expires.map_or(most, |at| {
                Duration::try_from(at.duration_since(Timestamp::now())).unwrap_or_default()
            });
            // A token's issuer may expire before it: found out within that minute.
            let left = left.clamp(Duration::from_millis(1), most);
            let _ = tokio::time::timeout(left, changes.changed()).await;
        }
    }
}

/// Has it written down now and then when keys were last used, for ever. Not at each use: that
/// would be a write to disk for each request.
pub(crate) async fn remember_use(access: Arc<Access>) {
    loop {
        tokio::time::sleep(REMEMBER).await;
        let access = access.clone();
        // It tells of its failures itself.
        let _ = tokio::task::spawn_blocking(move || access.keys.remember_use()).await;
    }
}
