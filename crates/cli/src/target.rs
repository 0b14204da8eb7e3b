//! Where the daemon is, and how a connection to it is made: a Unix socket of this machine, or a
//! URL with a key. A key must never be where other users see it, so it is no flag and in no file
//! that the program prints.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use connectrpc::client::{ClientConfig, Http2Connection, SharedHttp2Connection};
use hyper::Uri;
use hyper::header::HeaderValue;
use hyper::http::request::Builder;
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::TlsConnector;

use crate::config::Settings;
use crate::{Failure, Result};

/// A connection to the daemon, whatever it is made of.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<S: AsyncRead + AsyncWrite + Send + Unpin> Stream for S {}

/// Where the daemon is.
#[derive(Clone)]
pub enum Target {
    /// On this machine, as this user.
    Socket(PathBuf),
    /// Anywhere.
    Url(Arc<Remote>),
}

/// A daemon that is reached by TCP.
pub struct Remote {
    /// Scheme and authority only.
    url: Uri,
    host: String,
    port: u16,
    tls: Option<rustls::ClientConfig>,
    /// `Bearer` and the key.
    authorization: Option<HeaderValue>,
}

impl Target {
    /// Where the settings say, and the variable `DENIZEN_API_KEY`.
    pub fn of(settings: &Settings) -> Result<Self> {
        match &settings.url {
            None => Ok(Self::Socket(settings.socket.clone())),
            Some(url) => Ok(Self::Url(Arc::new(Remote::new(url)?))),
        }
    }

    /// The socket, if it is one.
    pub fn socket(&self) -> Option<&Path> {
        match self {
            Self::Socket(path) => Some(path),
            Self::Url(_) => None,
        }
    }

    /// Connects; what is spoken on it is HTTP/1.1. Cancel-safe.
    pub async fn connect(&self) -> std::io::Result<Box<dyn Stream>> {
        match self {
            Self::Socket(path) => Ok(Box::new(UnixStream::connect(path).await?)),
            Self::Url(remote) => remote.connect(b"http/1.1").await,
        }
    }

    /// A request with what lets it in.
    pub fn request(&self, method: &str, path: &str) -> Builder {
        let request = hyper::Request::builder().method(method).uri(path);
        match self {
            Self::Socket(_) => request.header("host", "denizen"),
            Self::Url(remote) => {
                let host = remote.url.authority().map_or("", |it| it.as_str());
                let request = request.header("host", host);
                match &remote.authorization {
                    Some(key) => request.header("authorization", key),
                    None => request,
                }
            }
        }
    }

    /// The same for what is spoken by HTTP/2.
    pub fn envd(&self) -> (SharedHttp2Connection, ClientConfig) {
        let remote = match self {
            Self::Socket(path) => {
                let url = Uri::from_static("http://denizen");
                let connection = Http2Connection::lazy_unix(path, url.clone()).shared(16);
                return (connection, ClientConfig::new(url));
            }
            Self::Url(remote) => remote,
        };
        let dialled = remote.clone();
        let connector = tower::service_fn(move |_: Uri| {
            let remote = dialled.clone();
            async move { remote.connect(b"h2").await.map(TokioIo::new) }
        });
        let connection = Http2Connection::lazy_with_connector(connector, remote.url.clone());
        let config = ClientConfig::new(remote.url.clone());
        let config = match &remote.authorization {
            Some(key) => config.with_default_header("authorization", key.clone()),
            None => config,
        };
        (connection.shared(16), config)
    }
}

impl std::fmt::Display for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Socket(path) => path.display().fmt(f),
            Self::Url(remote) => remote.url.fmt(f),
        }
    }
}

impl Remote {
    fn new(url: &str) -> Result<Self> {
        let bad = |why: &dyn std::fmt::Display| {
            Failure::new(format!("the daemon's address {url:?}: {why}; https://HOST:PORT is one"))
        };
        let parsed: Uri = url.parse().map_err(|error| bad(&error))?;
        let with_tls = match parsed.scheme_str() {
            Some("https") => true,
            Some("http") => false,
            _ => return Err(bad(&"neither https nor http")),
        };
        let authority = parsed.authority().ok_or_else(|| bad(&"no host"))?;
        if !matches!(parsed.path(), "" | "/") || parsed.query().is_some() {
            return Err(bad(&"there is more than a host and a port"));
        }
        if authority.as_str().contains('@') {
            return Err(bad(&"a key goes into DENIZEN_API_KEY"));
        }
        let host = authority.host().trim_start_matches('[').trim_end_matches(']').to_owned();
        let port = authority.port_u16().unwrap_or(if with_tls { 443 } else { 80 });
        let key = std::env::var("DENIZEN_API_KEY").ok().filter(|key| !key.is_empty());
        let authorization = key.map(|key| {
            let value = HeaderValue::try_from(format!("Bearer {}", key.trim()));
            value.map(|mut value| {
                value.set_sensitive(true);
                value
            })
        });
        let authorization = authorization
            .transpose()
            .map_err(|_| Failure::new("DENIZEN_API_KEY is no key: it begins with dk_"))?;
        let tls = with_tls.then(tls).transpose().map_err(|error| bad(&error))?;
        Ok(Self { url: parsed, host, port, tls, authorization })
    }

    async fn connect(&self, protocol: &[u8]) -> std::io::Result<Box<dyn Stream>> {
        let stream = TcpStream::connect((self.host.as_str(), self.port)).await?;
        stream.set_nodelay(true)?;
        let Some(tls) = &self.tls else { return Ok(Box::new(stream)) };
        let mut tls = tls.clone();
        tls.alpn_protocols = vec![protocol.to_vec()];
        let name = ServerName::try_from(self.host.clone()).map_err(std::io::Error::other)?;
        Ok(Box::new(TlsConnector::from(Arc::new(tls)).connect(name, stream).await?))
    }
}

/// TLS with whoever this machine trusts; SSL_CERT_FILE names others.
fn tls() -> std::result::Result<rustls::ClientConfig, rustls::Error> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier = rustls_platform_verifier::Verifier::new(provider.clone())?;
    Ok(rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_no_client_auth())
}
