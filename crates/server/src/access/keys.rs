//! Keys: what lets a client in over TCP. They live in one file of the daemon's state folder,
//! which must never hold a key itself, only its hash.
//!
//! A key's secret is 256 random bits, so a plain SHA-256 of it is enough: what makes passwords
//! need a slow hash is that they can be guessed. The file also has the secret that tokens are
//! made with (`tokens`), and since when a session's older tokens are void.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use denizen_api::{Key, NewKey, Scope};
use jiff::Timestamp;
use parking_lot::{Mutex, RwLock};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;
use tokio::sync::watch;
use uuid::Uuid;

use super::tokens::{self, Token};

/// The longest that a name of a key, or a prefix of sessions' names, may be, in bytes.
const LONGEST: usize = 128;
/// The most keys there may be: a program that makes one for each job is to revoke them.
const MOST: usize = 10_000;
/// The longest that a key with an expiry may live.
const LONGEST_LIFE: Duration = Duration::from_hours(24 * 366 * 100);

/// What is told of a key.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct KeyInfo {
    /// The part of it that names it.
    pub id: String,
    /// What it is for.
    pub name: String,
    /// What it allows.
    pub scope: Scope,
    /// Only for sessions whose names begin with this.
    pub sessions: Option<String>,
    /// When it was made.
    pub created_at: Timestamp,
    /// When it is void.
    pub expires_at: Option<Timestamp>,
    /// When it was last used; a daemon that was killed may have forgotten the last minutes.
    pub last_used_at: Option<Timestamp>,
}

impl KeyInfo {
    /// In the words of the API.
    pub fn told(self) -> Key {
        let Self { id, name, scope, sessions, created_at, expires_at, last_used_at } = self;
        Key {
            id,
            name,
            scope,
            sessions,
            created_at: created_at.to_string(),
            expires_at: expires_at.map(|at| at.to_string()),
            last_used_at: last_used_at.map(|at| at.to_string()),
        }
    }
}

/// Why a key cannot be made, read or revoked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KeysError {
    /// It was asked for in a way that makes no sense.
    #[error("{0}")]
    Bad(String),
    /// The file cannot be read or written.
    #[error("the keys in {}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The file is not what was written.
    #[error("the keys in {} cannot be understood: {why}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// Another daemon has them.
    #[error("the keys in {} are another daemon's: use its API, or another state folder", path.display())]
    Taken {
        /// The file.
        path: PathBuf,
    },
}

/// A key as it is kept.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Kept {
    #[serde(flatten)]
    info: KeyInfo,
    /// SHA-256 of the whole key, in hexadecimal digits.
    hash: String,
}

/// The file.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Stored {
    keys: BTreeMap<String, Kept>,
    /// What tokens are made with, in hexadecimal digits.
    token_secret: String,
    /// Sessions whose tokens from that time or before are void.
    void_tokens: BTreeMap<Uuid, Timestamp>,
}

/// All keys. One process has them at a time.
#[derive(Debug)]
pub struct Keys {
    path: PathBuf,
    /// What is on disk.
    stored: RwLock<Arc<Stored>>,
    /// Held while that is changed.
    changing: Mutex<()>,
    used: Mutex<HashMap<String, Timestamp>>,
    changed: watch::Sender<()>,
    _lock: File,
}

impl Keys {
    /// Those of a state folder; none, if it has no file of them yet.
    ///
    /// # Errors
    /// [`KeysError::Taken`] while another process has them, [`KeysError::File`],
    /// [`KeysError::Damaged`]: a file that cannot be read is never taken for one without keys.
    pub fn open(state: &Path) -> Result<Self, KeysError> {
        let path = state.join("keys.json");
        let failed = |source| KeysError::File { path: path.clone(), source };
        std::fs::create_dir_all(state).map_err(failed)?;
        // Only who can open it can hold the lock, and us up.
        let mut lock = File::options();
        let lock = lock.create(true).truncate(false).write(true).mode(0o600);
        let lock = lock.open(state.join("keys.lock")).map_err(failed)?;
        lock.try_lock().map_err(|error| match error {
            std::fs::TryLockError::WouldBlock => KeysError::Taken { path: path.clone() },
            std::fs::TryLockError::Error(source) => failed(source),
        })?;
        let stored = match std::fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes).map_err(|error| KeysError::Damaged {
                path: path.clone(),
                why: error.to_string(),
            })?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Stored {
                keys: BTreeMap::new(),
                token_secret: random::<32>().map_err(failed)?,
                void_tokens: BTreeMap::new(),
            },
            Err(error) => return Err(failed(error)),
        };
        Ok(Self {
            stored: RwLock::new(Arc::new(stored)),
            changing: Mutex::default(),
            used: Mutex::default(),
            changed: watch::Sender::new(()),
            _lock: lock,
            path,
        })
    }

    /// Makes a key. What is given back besides is the key, which cannot be told again.
    ///
    /// # Errors
    /// [`KeysError::Bad`], [`KeysError::File`].
    pub fn create(&self, new: NewKey) -> Result<(KeyInfo, String), KeysError> {
        let NewKey { name, scope, sessions, expires_in_seconds } = new;
        let good =
            |text: &str| (1..=LONGEST).contains(&text.len()) && !text.chars().any(char::is_control);
        if !good(&name) || !sessions.as_deref().is_none_or(good) {
            return Err(KeysError::Bad(format!(
                "a key's name, and the beginning of sessions' names, have 1 to {LONGEST} bytes \
                 and no control characters"
            )));
        }
        let now = Timestamp::now();
        let expires_at = expires_in_seconds.map(|seconds| {
            let life = Duration::from_secs(seconds);
            let at = (life > Duration::ZERO && life <= LONGEST_LIFE).then_some(now);
            at.and_then(|now| now.checked_add(life).ok()).ok_or_else(|| {
                KeysError::Bad("a key expires in one second to a hundred years".to_owned())
            })
        });
        let expires_at = expires_at.transpose()?;
        let failed = |source| KeysError::File { path: self.path.clone(), source };
        let id = random::<6>().map_err(failed)?;
        let key = format!("dk_{id}_{}", random::<32>().map_err(failed)?);
        let info = KeyInfo {
            id: id.clone(),
            name,
            scope,
            sessions,
            created_at: now,
            expires_at,
            last_used_at: None,
        };
        let kept = Kept { info: info.clone(), hash: hash(&key) };
        self.change(|stored| {
            if stored.keys.len() >= MOST {
                return Err(KeysError::Bad(format!("there are {MOST} keys: revoke some")));
            }
            stored.keys.insert(id, kept);
            Ok(true)
        })?;
        Ok((info, key))
    }

    /// All keys, the oldest first.
    pub fn list(&self) -> Vec<KeyInfo> {
        let used = self.used.lock();
        let stored = self.stored.read().clone();
        let mut all: Vec<_> = stored.keys.values().map(|kept| kept.info.clone()).collect();
        for info in &mut all {
            info.last_used_at = used.get(&info.id).copied().max(info.last_used_at);
        }
        all.sort_by_key(|info| info.created_at);
        all
    }

    /// Revokes a key: from now on it is void, and so are the tokens made with it. Whether there
    /// was one of that id.
    ///
    /// # Errors
    /// [`KeysError::File`]: then it is as good as before.
    pub fn revoke(&self, id: &str) -> Result<bool, KeysError> {
        self.change(|stored| Ok(stored.keys.remove(id).is_some()))
    }

    /// Makes a token for a session, in the name of a key or of the daemon's own user.
    pub(crate) fn token(&self, session: Uuid, issuer: Option<&str>, expires: Timestamp) -> String {
        let stored = self.stored.read().clone();
        // Newer than what was made void, whatever the clock says.
        let after = stored.void_tokens.get(&session).map_or(i64::MIN, |at| at.as_microsecond() + 1);
        let issued = Timestamp::now().as_microsecond().max(after);
        let issuer = issuer.map(str::to_owned);
        let token = Token { session, issuer, issued, expires: expires.as_second() };
        tokens::write(&token, &stored.token_secret)
    }

    /// Makes all of a session's tokens void.
    ///
    /// # Errors
    /// [`KeysError::File`]: then they are as good as before.
    pub(crate) fn void_tokens(&self, session: Uuid) -> Result<(), KeysError> {
        self.change(|stored| {
            let now = Timestamp::now();
            let before = stored.void_tokens.insert(session, now);
            // Newer than all that were made since the last time, whatever the clock says.
            if let Some(before) = before.filter(|before| *before >= now) {
                stored.void_tokens.insert(session, before + Duration::from_micros(1));
            }
            // What has expired by itself need not be remembered.
            stored.void_tokens.retain(|_, at| now.duration_since(*at) < tokens::LONGEST_LIFE);
            Ok(true)
        })
        .map(drop)
    }

    /// Whose key that is, if it is one, and not expired.
    pub(crate) fn key(&self, key: &str) -> Option<KeyInfo> {
        let id = key.strip_prefix("dk_")?.split_once('_')?.0;
        let stored = self.stored.read().clone();
        let kept = stored.keys.get(id)?;
        let same: bool = hash(key).as_bytes().ct_eq(kept.hash.as_bytes()).into();
        let now = Timestamp::now();
        if !same || kept.info.expires_at.is_some_and(|at| at <= now) {
            return None;
        }
        self.used.lock().insert(id.to_owned(), now);
        Some(kept.info.clone())
    }

    /// Whether there is a key of that id, and it has not expired.
    pub(crate) fn is_good(&self, id: &str) -> bool {
        let stored = self.stored.read().clone();
        let expires = stored.keys.get(id).map(|kept| kept.info.expires_at);
        expires.is_some_and(|at| at.is_none_or(|at| at > Timestamp::now()))
    }

    /// What a token says, if it is one, and neither void nor expired.
    pub(crate) fn read_token(&self, text: &str) -> Option<Token> {
        let token = tokens::read(text, &self.stored.read().token_secret)?;
        self.good_token(&token).then_some(token)
    }

    /// Whether a token is still good.
    pub(crate) fn good_token(&self, token: &Token) -> bool {
        let void = self.stored.read().void_tokens.get(&token.session).copied();
        token.expires > Timestamp::now().as_second()
            && void.is_none_or(|at| token.issued > at.as_microsecond())
            && token.issuer.as_deref().is_none_or(|id| self.is_good(id))
    }

    /// Tells whenever a key or token may have become void.
    pub(crate) fn changes(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    /// Writes down when keys were last used.
    pub(crate) fn remember_use(&self) {
        let written = self.change(|stored| {
            let fresh = self.used.lock().iter().any(|(id, at)| {
                stored.keys.get(id).is_some_and(|kept| kept.info.last_used_at < Some(*at))
            });
            Ok(fresh)
        });
        if let Err(error) = written {
            tracing::warn!(%error, "when keys were last used is not written down");
        }
    }

    /// Changes what is on disk, then what is gone by; `edit` says whether there is anything to.
    fn change(
        &self,
        edit: impl FnOnce(&mut Stored) -> Result<bool, KeysError>,
    ) -> Result<bool, KeysError> {
        let _changing = self.changing.lock();
        let mut stored = Stored::clone(&self.stored.read());
        if !edit(&mut stored)? {
            return Ok(false);
        }
        self.used.lock().retain(|id, at| match stored.keys.get_mut(id) {
            Some(kept) => {
                kept.info.last_used_at = Some(*at).max(kept.info.last_used_at);
                true
            }
            None => false,
        });
        write(&self.path, &stored)
            .map_err(|source| KeysError::File { path: self.path.clone(), source })?;
        *self.stored.write() = Arc::new(stored);
        self.changed.send_replace(());
        Ok(true)
    }
}

/// Whole or not at all, readable by its owner only.
fn write(path: &Path, stored: &Stored) -> std::io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("/"));
    // Mode 0600 from the first.
    let mut file = tempfile::NamedTempFile::new_in(folder)?;
    serde_json::to_writer_pretty(&mut file, stored)?;
    file.flush()?;
    file.as_file().sync_all()?;
    file.persist(path)?;
    File::open(folder)?.sync_all()
}

fn hash(key: &str) -> String {
    hex(&Sha256::digest(key))
}

/// So many random bytes of the kernel's, in hexadecimal digits.
fn random<const N: usize>() -> std::io::Result<String> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(std::io::Error::from)?;
    Ok(hex(&bytes))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
