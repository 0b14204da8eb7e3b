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

impl Certificate {
    /// Until when it is good, if the daemon can use it.
    ///
    /// # Errors
    /// Which file is why it cannot.
    pub fn expires(&self) -> Result<jiff::Timestamp, String> {
        read(self)?;
        let bad = |why: &dyn std::fmt::Display| format!("{}: {why}", self.certificate.display());
        let own = CertificateDer::from_pem_file(&self.certificate).map_err(|error| bad(&error))?;
        not_after(&own).ok_or_else(|| bad(&"it does not say until when it is good"))
    }
}

/// The end of a certificate's time (RFC 5280, 4.1).
fn not_after(certificate: &[u8]) -> Option<jiff::Timestamp> {
    const SEQUENCE: u8 = 0x30;
    const VERSION: u8 = 0xa0;
    let (SEQUENCE, whole, _) = element(certificate)? else { return None };
    let (SEQUENCE, mut rest, _) = element(whole)? else { return None };
    if let (VERSION, _, after) = element(rest)? {
        rest = after;
    }
    // Its number, how it is signed, and by whom.
    for _ in 0..3 {
        rest = element(rest)?.2;
    }
    let (SEQUENCE, validity, _) = element(rest)? else { return None };
    let (kind, text, _) = element(element(validity)?.2)?;
    let text = std::str::from_utf8(text).ok()?;
    // Of a year in two digits, those from 50 on are of the last century.
    let text = match (kind, text.get(..2)?.parse::<u8>().ok()?) {
        (0x17, ..50) => format!("20{text}"),
        (0x17, _) => format!("19{text}"),
        (0x18, _) => text.to_owned(),
        _ => return None,
    };
    let time = jiff::civil::DateTime::strptime("%Y%m%d%H%M%SZ", text).ok()?;
    time.to_zoned(jiff::tz::TimeZone::UTC).ok().map(|time| time.timestamp())
}

/// The first element of DER: its tag, its content, and what comes after it.
fn element(bytes: &[u8]) -> Option<(u8, &[u8], &[u8])> {
    let (&[tag, first], mut rest) = bytes.split_first_chunk()?;
    let mut length = usize::from(first);
    if first >= 0x80 {
        let (digits, after) = rest.split_at_checked(usize::from(first & 0x7f))?;
        rest = after;
        let more = |length: usize, digit: &u8| Some(length.checked_mul(256)? + usize::from(*digit));
        length = digits.iter().try_fold(0, more)?;
    }
    let (content, after) = rest.split_at_checked(length)?;
    Some((tag, content, after))
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::process::Command;

    use super::*;

    #[test]
    fn a_certificate_says_until_when_it_is_good() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let files = Certificate { certificate: path("cert.pem"), key: path("key.pem") };
        // Years after 2049 are written in another way.
        for days in [1_i64, 20_000] {
            let mut make = Command::new("openssl");
            make.args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]);
            make.args(["-nodes", "-subj", "/CN=test", "-days", &days.to_string()]);
            make.arg("-keyout").arg(&files.key).arg("-out").arg(&files.certificate);
            assert!(make.output().unwrap().status.success());
            let end = files.expires().unwrap();
            let left = end.duration_since(jiff::Timestamp::now()).as_secs();
            assert!((days * 86400 - left).abs() < 120, "{end}");
        }
        let text = std::fs::read(&files.certificate).unwrap();
        let der = CertificateDer::from_pem_slice(&text).unwrap();
        // Nothing in it makes us read beyond it.
        for length in 0..der.len() {
            assert_eq!(not_after(&der[..length]), None);
        }
        std::fs::write(&files.certificate, "").unwrap();
        assert!(files.expires().unwrap_err().contains("cert.pem"));
    }
}
