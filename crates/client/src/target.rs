//! Where the daemon is, and how a connection to it is made: a Unix socket of this machine, a URL
//! with a key, or no way at all for what is in the daemon's own process. A key is never shown
//! again, nor sent to another place than it is for.

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

use crate::{Error, Result};

/// A connection, whatever it is made of.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<S: AsyncRead + AsyncWrite + Send + Unpin> Stream for S {}

/// Where the daemon is.
#[derive(Clone)]
pub struct Target(Kind);

#[derive(Clone)]
enum Kind {
    Socket(PathBuf),
    Url(Arc<Remote>),
    Within(Within),
}

/// A daemon that we are a part of.
#[derive(Clone)]
struct Within {
    connect: Arc<dyn Fn() -> Box<dyn Stream> + Send + Sync>,
    authorization: Option<HeaderValue>,
}

/// A daemon that is reached by TCP.
struct Remote {
    /// Scheme and authority only.
    url: Uri,
    host: String,
    port: u16,
    tls: Option<rustls::ClientConfig>,
    /// `Bearer` and the key.
    authorization: Option<HeaderValue>,
}

impl Target {
    /// A daemon of this machine and user.
    pub fn socket(path: impl Into<PathBuf>) -> Self {
        Self(Kind::Socket(path.into()))
    }

    /// The daemon at `https://HOST:PORT`, or `http`, with a key if there is one.
    ///
    /// # Errors
    /// [`Error::Address`].
    pub fn url(url: &str, key: Option<&str>) -> Result<Self> {
        Ok(Self(Kind::Url(Arc::new(Remote::new(url, key)?))))
    }

    /// The daemon that this program is, by connections that it makes to itself; with a key, if
    /// that is what the daemon shall let them in by.
    ///
    /// # Errors
    /// [`Error::Address`].
    pub fn within(
        connect: impl Fn() -> Box<dyn Stream> + Send + Sync + 'static,
        key: Option<&str>,
    ) -> Result<Self> {
        let authorization = authorization(key)?;
        Ok(Self(Kind::Within(Within { connect: Arc::new(connect), authorization })))
    }

    /// The socket, if it is one.
    pub fn path(&self) -> Option<&Path> {
        match &self.0 {
            Kind::Socket(path) => Some(path),
            Kind::Url(_) | Kind::Within(_) => None,
        }
    }

    /// Connects; what is spoken on it is HTTP/1.1. Cancel-safe.
    pub async fn connect(&self) -> std::io::Result<Box<dyn Stream>> {
        match &self.0 {
            Kind::Socket(path) => Ok(Box::new(UnixStream::connect(path).await?)),
            Kind::Url(remote) => remote.connect(b"http/1.1").await,
            Kind::Within(within) => Ok((within.connect)()),
        }
    }

    /// A request with what lets it in.
    pub(crate) fn request(&self, method: &str, path: &str) -> Builder {
        let request = hyper::Request::builder().method(method).uri(path);
        let (request, authorization) = match &self.0 {
            Kind::Socket(_) => return request.header("host", "denizen"),
            Kind::Url(remote) => {
                let host = remote.url.authority().map_or("", |it| it.as_str());
                (request.header("host", host), &remote.authorization)
            }
            Kind::Within(within) => (request.header("host", "localhost"), &within.authorization),
        };
        match authorization {
            Some(key) => request.header("authorization", key),
            None => request,
        }
    }

    /// The same for what is spoken by HTTP/2.
    pub(crate) fn envd(&self) -> (SharedHttp2Connection, ClientConfig) {
        let remote = match &self.0 {
            Kind::Socket(path) => {
                let url = Uri::from_static("http://denizen");
                let connection = Http2Connection::lazy_unix(path, url.clone()).shared(16);
                return (connection, ClientConfig::new(url));
            }
            Kind::Within(within) => {
                let url = Uri::from_static("http://localhost");
                let connect = within.connect.clone();
                let connector = tower::service_fn(move |_: Uri| {
                    std::future::ready(Ok::<_, std::io::Error>(TokioIo::new(connect())))
                });
                let connection = Http2Connection::lazy_with_connector(connector, url.clone());
                let config = with_key(ClientConfig::new(url), within.authorization.as_ref());
                return (connection.shared(16), config);
            }
            Kind::Url(remote) => remote,
        };
        let dialled = remote.clone();
        let connector = tower::service_fn(move |_: Uri| {
            let remote = dialled.clone();
            async move { remote.connect(b"h2").await.map(TokioIo::new) }
        });
        let connection = Http2Connection::lazy_with_connector(connector, remote.url.clone());
        let config = ClientConfig::new(remote.url.clone());
        (connection.shared(16), with_key(config, remote.authorization.as_ref()))
    }
}

fn with_key(config: ClientConfig, authorization: Option<&HeaderValue>) -> ClientConfig {
    match authorization {
        Some(key) => config.with_default_header("authorization", key.clone()),
        None => config,
    }
}

/// The header that a key is sent in.
fn authorization(key: Option<&str>) -> Result<Option<HeaderValue>> {
    let Some(key) = key else { return Ok(None) };
    let mut value = HeaderValue::try_from(format!("Bearer {}", key.trim()))
        .map_err(|_| Error::Address("this is no key: it begins with dk_".to_owned()))?;
    value.set_sensitive(true);
    Ok(Some(value))
}

impl std::fmt::Display for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.0 {
            Kind::Socket(path) => path.display().fmt(f),
            Kind::Url(remote) => remote.url.fmt(f),
            Kind::Within(_) => f.write_str("this process"),
        }
    }
}

impl Remote {
    fn new(url: &str, key: Option<&str>) -> Result<Self> {
        let bad = |why: &dyn std::fmt::Display| {
            Error::Address(format!("the daemon's address {url:?}: {why}; https://HOST:PORT is one"))
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
            return Err(bad(&"a key has a place of its own (DENIZEN_API_KEY)"));
        }
        let host = authority.host().trim_start_matches('[').trim_end_matches(']').to_owned();
        let port = authority.port_u16().unwrap_or(if with_tls { 443 } else { 80 });
        let authorization = authorization(key)?;
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
