//! What an attempt has to be told, because it is known outside only.
//!
//! A fact is `--name VALUE`, or `ESCAPE_NAME=VALUE` in the environment with `_` for `-`;
//! some may be given more than once. `denizen-escape stage` makes and prints all of them.
//!
//! | fact | value |
//! |---|---|
//! | secret | a word that the host's files, queues and keys hold |
//! | host-file | a file outside that holds the secret |
//! | host-handle | that file's handle, `TYPE:HEX` |
//! | other-volume | another session's volume, with the secret in some file of it |
//! | volume-root | the pool's volume root on the host |
//! | tmp-file, shm-file, run-file, home-file | files that hold the secret, in the host's `/tmp`, `/dev/shm`, `/run` and a home folder |
//! | marker (many) | a file outside; a test looks afterwards whether it was changed |
//! | marker-dev (many) | the device number of each marker's file system on the host |
//! | shadow-print (many) | fingerprints of the host's `/etc/shadow`, `/etc/gshadow` and what they were before |
//! | host-pid | a process outside |
//! | host-comm | its name, to tell it from one inside that has the same number |
//! | host-ns (many) | a namespace of the host as a link in `/proc/self/ns` shows it |
//! | host-mounts | the number of the host's mount namespace, for `listmount` |
//! | host-port, host-port6, host-udp | ports on the host's 127.0.0.1, ::1 and 127.0.0.1 |
//! | abstract | an abstract Unix socket of the host |
//! | host-socket | a Unix socket of the host, by path |
//! | host-fifo | a FIFO of the host that somebody reads |
//! | control-socket | a path or abstract name (`@NAME`) of denizen's own control channel |
//! | tty, tty-dev | a terminal of the host, and the device number of its file system |
//! | sysv-key | key of a shared memory segment, a message queue and a semaphore set |
//! | mq | name of a POSIX message queue |
//! | key-id, key-name | a key of the host's user keyring |
//! | host-keyring | the number of the session keyring on the host |
//! | allow-env, allow-cap (many) | what a session may have beside the usual: the name of a variable, the number of a capability |

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::attempt::No;

/// The facts given.
pub struct Facts {
    given: BTreeMap<String, Vec<String>>,
    /// Descriptors above 2 that were open at the start.
    pub inherited: Vec<i32>,
}

impl Facts {
    /// From the environment and from arguments, which count more.
    pub fn new(arguments: &[String], inherited: Vec<i32>) -> Result<Self, String> {
        let mut given: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for (name, value) in std::env::vars_os() {
            let (Some(name), Some(value)) = (name.to_str(), value.to_str()) else { continue };
            if let Some(name) = name.strip_prefix("ESCAPE_") {
                let name = name.to_ascii_lowercase().replace('_', "-");
                given.insert(name, vec![value.to_owned()]);
            }
        }
        let mut told: BTreeMap<String, Vec<String>> = BTreeMap::new();
        let mut rest = arguments.iter();
        while let Some(word) = rest.next() {
            let name = word.strip_prefix("--").ok_or_else(|| format!("`{word}` is no fact"))?;
            let value = rest.next().ok_or_else(|| format!("`{word}` needs a value"))?;
            told.entry(name.to_owned()).or_default().push(value.clone());
        }
        given.extend(told);
        Ok(Self { given, inherited })
    }

    /// A fact that may be missing.
    pub fn find(&self, name: &str) -> Option<&str> {
        self.all(name).next()
    }

    /// All values of a fact.
    pub fn all<'a>(&'a self, name: &str) -> impl Iterator<Item = &'a str> {
        self.given.get(name).into_iter().flatten().map(String::as_str)
    }

    /// A fact without which there is no attempt.
    pub fn text(&self, name: &str) -> Result<&str, No> {
        self.find(name).ok_or_else(|| No::Impossible(format!("needs --{name}")))
    }

    /// The same as a path.
    pub fn path(&self, name: &str) -> Result<PathBuf, No> {
        Ok(Path::new(self.text(name)?).to_owned())
    }

    /// The same as a number.
    pub fn number<N: std::str::FromStr>(&self, name: &str) -> Result<N, No> {
        let text = self.text(name)?;
        text.parse().map_err(|_| No::Impossible(format!("--{name} {text} is not a number")))
    }

    /// The word to look for.
    pub fn secret(&self) -> &str {
        self.find("secret").unwrap_or("a-secret-of-the-host")
    }

    /// Whether our own namespace of this kind is the host's.
    pub fn is_in_hosts(&self, kind: &str) -> Result<bool, No> {
        let mine = own_namespace(kind)?;
        self.text("host-ns")?;
        Ok(self.all("host-ns").any(|theirs| theirs == mine))
    }
}

/// Our namespace of a kind, as `uts:[4026531838]`.
pub fn own_namespace(kind: &str) -> Result<String, No> {
    let path = format!("/proc/self/ns/{kind}");
    match std::fs::read_link(&path) {
        Ok(link) => Ok(link.to_string_lossy().into_owned()),
        Err(error) => Err(No::Impossible(format!("{path}: {error}"))),
    }
}
