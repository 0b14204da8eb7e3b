//! TLS of what listens on TCP. The certificate is read anew when its files have changed, which is
//! looked at when somebody connects: connections that are there stay as they are. One that cannot
//! be read must never take the place of one that works.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use parking_lot::Mutex;
use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::time::Instant;
use tokio_rustls::TlsAcceptor;

/// How often the files are looked at, at most.
const EVERY: Duration = Duration::from_secs(1);

/// The files of a certificate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Certificate {
    /// The certificate, and those between it and one that clients know (PEM).
    pub certificate: PathBuf,
    /// Its key (PEM).
    pub key: PathBuf,
}

/// What tells that a file is another one.
type Stamp = [Option<(SystemTime, u64, u64)>; 2];

pub(crate) struct Tls(Mutex<State>);

struct State {
    files: Certificate,
    config: Arc<ServerConfig>,
    of: Stamp,
    looked: Instant,
}

impl Tls {
    /// Reads a certificate; the error says which file is why not.
    pub(crate) fn open(files: Certificate) -> Result<Arc<Self>, String> {
        Ok(Arc::new(Self(Mutex::new(State::read(files)?))))
    }

    /// Goes on with these files; the error says which of them is why not.
    pub(crate) fn reload(&self, files: Certificate) -> Result<(), String> {
        *self.0.lock() = State::read(files)?;
        Ok(())
    }

    /// What makes a connection one of TLS, with the certificate as it is now. Cancel-safe.
    pub(crate) async fn acceptor(self: &Arc<Self>) -> TlsAcceptor {
        let due = {
            let mut state = self.0.lock();
            let due = state.looked.elapsed() >= EVERY;
            if due {
                state.looked = Instant::now();
            }
            due
        };
        if due {
            let tls = self.clone();
            // If it panics, the certificate is the old one.
            let _ = tokio::task::spawn_blocking(move || tls.look()).await;
        }
        TlsAcceptor::from(self.0.lock().config.clone())
    }

    fn look(&self) {
        let (files, of) = {
            let state = self.0.lock();
            (state.files.clone(), state.of)
        };
        let now = stamp(&files);
        if now == of {
            return;
        }
        let new = State::read(files);
        let mut state = self.0.lock();
        match new {
            Ok(new) => {
                tracing::info!("the certificate has changed");
                *state = new;
            }
            Err(why) => {
                state.of = now;
                tracing::warn!(why, "the new certificate is no good: the old one stays");
            }
        }
    }
}

impl State {
    fn read(files: Certificate) -> Result<Self, String> {
        let of = stamp(&files);
        let config = read(&files)?;
        Ok(Self { files, config, of, looked: Instant::now() })
    }
}

fn stamp(files: &Certificate) -> Stamp {
    use std::os::unix::fs::MetadataExt;
    [&files.certificate, &files.key].map(|file| {
        let known = file.metadata().ok()?;
        Some((known.modified().ok()?, known.ino(), known.len()))
    })
}

fn read(files: &Certificate) -> Result<Arc<ServerConfig>, String> {
    let bad = |file: &Path, why: &dyn std::fmt::Display| format!("{}: {why}", file.display());
    let chain = CertificateDer::pem_file_iter(&files.certificate)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|error| bad(&files.certificate, &error))?;
    let key = PrivateKeyDer::from_pem_file(&files.key).map_err(|error| bad(&files.key, &error))?;
    // Another crate may have brought another provider along: none is the process's own.
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .map_err(|error| bad(&files.certificate, &error))?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}
