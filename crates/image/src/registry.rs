//! Images from a registry, by the OCI distribution protocol.
//!
//! Sends credentials to the registry's own token service or back to the registry itself, and
//! over TLS only, unless the caller asked for plain HTTP or the registry is on this machine.
//! Holds no answer in memory that is larger than the limits allow. Nothing of a layer is
//! unpacked before all of it is there with the right digest.

use std::fmt;
use std::io::Write as _;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use futures::StreamExt as _;
use futures::stream;
use reqwest::header::{ACCEPT, AUTHORIZATION, HeaderMap, HeaderValue, RANGE, WWW_AUTHENTICATE};
use reqwest::{Client, Response, StatusCode, Url};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use serde::Deserialize;
use sha2::{Digest as _, Sha256};
use tokio::sync::Notify;

use crate::error::shown;
use crate::manifest::{self, Blob, Digest, MOST_INDEXES, Manifest, Parsed, Platform};
use crate::source::Told;
use crate::store::{Image, Store, Wanted};
use crate::stream::{Bounds, Budget};
use crate::work::Work;
use crate::{Error, Limits, Progress, Reference, Result, Stage};

const MANIFESTS: &str = "application/vnd.oci.image.index.v1+json, \
     application/vnd.oci.image.manifest.v1+json, \
     application/vnd.docker.distribution.manifest.list.v2+json, \
     application/vnd.docker.distribution.manifest.v2+json";
/// The most of an answer that is neither a manifest nor a layer.
const MOST_ANSWER: u64 = 256 << 10;
const MOST_DOCKER_CONFIG: u64 = 4 << 20;
const MOST_REDIRECTS: usize = 10;
const CONNECT: Duration = Duration::from_secs(20);
/// How long a registry may send nothing.
const SILENCE: Duration = Duration::from_mins(1);
/// How often a connection may break within one layer.
const ATTEMPTS: u32 = 5;
/// Layers that are worked on at once.
const AT_ONCE: usize = 3;

/// How an image is pulled.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct PullOptions {
    /// As whom.
    pub credentials: Credentials,
    /// Over what.
    pub transport: Transport,
    /// Files with certificates (PEM) to trust besides the system's.
    pub certificates: Vec<PathBuf>,
    /// The architecture, in Go's words (`amd64`); else this machine's.
    pub architecture: Option<String>,
    /// What it may cost.
    pub limits: Limits,
}

/// As whom an image is pulled.
#[derive(Clone, Default)]
pub enum Credentials {
    /// As nobody.
    #[default]
    Anonymous,
    /// As this user.
    Password {
        /// The name.
        user: String,
        /// The password or access token.
        password: String,
    },
    /// As whom a Docker configuration file has for the registry under `auths`; as nobody if
    /// it has none. Its credential helpers are not run.
    DockerConfig(PathBuf),
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Anonymous => f.write_str("Anonymous"),
            // No password in any log.
            Self::Password { user, .. } => write!(f, "Password({user:?})"),
            Self::DockerConfig(path) => write!(f, "DockerConfig({path:?})"),
        }
    }
}

/// Over what a registry is spoken to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Transport {
    /// HTTP if the registry is on this machine, else TLS.
    #[default]
    Auto,
    /// TLS.
    Tls,
    /// HTTP, which anybody on the way can read and change; digests do not protect a tag.
    Plain,
}

/// What a registry demands.
enum Challenge {
    /// A token of the service at `realm`.
    Token { realm: String, service: Option<String> },
    /// The user and the password, as the header has them.
    Password(HeaderValue),
}

impl Store {
    /// Pulls the image that `reference` names, and gives it that name, made whole. What is in
    /// the store already is not fetched again. Dropping the future ends it.
    ///
    /// # Errors
    /// Any [`Error`]; the store then has the image it had before under that name, if any.
    /// Layers that were complete stay and need not be fetched again.
    pub async fn pull(
        &self,
        reference: &str,
        options: &PullOptions,
        progress: impl Fn(Progress) + Send + Sync + 'static,
    ) -> Result<Image> {
        let reference: Reference = reference.parse()?;
        let registry = Registry::new(reference, options)?;
        let (digest, manifest) = registry.manifest(options).await?;
        let what = format!("the configuration {}", manifest.config.digest);
        let bytes = registry.small_blob(&manifest.config, &what).await?;
        let platform = Platform::wanted(options.architecture.as_deref());
        let (config, layers) = manifest::config(&bytes, &platform, manifest.layers.len(), &what)?;
        let name = registry.reference.to_string();
        let pull = Arc::new(Pull {
            store: self.clone(),
            registry,
            wanted: Wanted { name, digest, layers, config },
            blobs: manifest.layers,
            budget: Budget::new(&options.limits),
            work: blocking(&self.clone(), Self::work).await?,
            cancelled: AtomicBool::new(false),
            stopped: Notify::new(),
            progress: Box::new(progress),
        });
        // What is being unpacked when the caller gives up stops too, if a moment later.
        let stop = Stop(Arc::clone(&pull));
        let done = Pull::all(&pull).await;
        // What was unpacked in vain may take a while to remove.
        let _ = tokio::task::spawn_blocking(move || drop((stop, pull))).await;
        done
    }
}

/// Runs what blocks in a thread that may.
async fn blocking<T: Clone + Send + 'static, R: Send + 'static>(
    with: &T,
    run: impl FnOnce(&T) -> Result<R> + Send + 'static,
) -> Result<R> {
    let with = with.clone();
    tokio::task::spawn_blocking(move || run(&with))
        .await
        .unwrap_or_else(|error| Err(Error::Cancelled { what: format!("an image ({error})") }))
}

struct Pull {
    store: Store,
    registry: Registry,
    wanted: Wanted,
    blobs: Vec<Blob>,
    budget: Budget,
    work: Work,
    cancelled: AtomicBool,
    stopped: Notify,
    progress: Box<dyn Fn(Progress) + Send + Sync>,
}

struct Stop(Arc<Pull>);

impl Drop for Stop {
    fn drop(&mut self) {
        self.0.stop();
    }
}

impl Pull {
    fn stop(&self) {
        self.cancelled.store(true, Ordering::Relaxed);
        self.stopped.notify_waiters();
    }

    async fn stopped(&self) {
        loop {
            let stopped = self.stopped.notified();
            if self.cancelled.load(Ordering::Relaxed) {
                return;
            }
            stopped.await;
        }
    }

    async fn all(pull: &Arc<Self>) -> Result<Image> {
        blocking(pull, |pull| pull.store.pin(&pull.wanted.layers, &pull.work)).await?;
        Self::layers(pull).await?;
        blocking(pull, |pull| pull.store.add_image(&pull.wanted, &pull.work)).await
    }

    /// Brings all layers into the store. If one fails, waits for the others to stop: nothing
    /// goes on, and nothing lies about, when the caller hears of it.
    async fn layers(pull: &Arc<Self>) -> Result<()> {
        let indexes = stream::iter(0..pull.wanted.layers.len());
        let mut done =
            indexes.map(|index| Self::layer(Arc::clone(pull), index)).buffer_unordered(AT_ONCE);
        let mut first = Ok(());
        while let Some(result) = done.next().await {
            if result.is_err() {
                pull.stop();
                first = first.and(result);
            }
        }
        first
    }

    async fn layer(pull: Arc<Self>, index: usize) -> Result<()> {
        let layer = pull.wanted.layers[index];
        let blob = pull.blobs[index].clone();
        let (layers, total) = (pull.blobs.len(), blob.size);
        let at = move |stage, bytes| Progress { layer: index, layers, stage, bytes, total };
        if pull.store.has_layer(layer) {
            (pull.progress)(at(Stage::Done, total));
            return Ok(());
        }
        // One image may have the same blob twice, fetched at the same time.
        let file = format!("blob-{index}");
        pull.work.remove_file(&file);
        let mut to = pull.work.file(&file)?;
        let tell = |bytes| (pull.progress)(at(Stage::Fetching, bytes));
        tokio::select! {
            biased;
            () = pull.stopped() => {
                return Err(Error::Cancelled { what: format!("the layer {layer}") });
            }
            fetched = pull.registry.blob(&blob, &mut to, &pull.work, &tell) => fetched?,
        }
        blocking(&pull, move |pull| {
            let mut done = 0;
            std::io::Seek::rewind(&mut to).map_err(|e| Error::io("read", pull.work.path(), e))?;
            let told = Told {
                inner: to,
                tell: |got| {
                    done += got;
                    (pull.progress)(at(Stage::Unpacking, done));
                },
            };
            let bounds = Bounds {
                limits: &pull.registry.limits,
                budget: &pull.budget,
                cancelled: &pull.cancelled,
            };
            pull.store.add_layer(told, layer, None, &pull.work, &bounds)?;
            pull.work.remove_file(&file);
            (pull.progress)(at(Stage::Done, total));
            Ok(())
        })
        .await
    }
}

/// A connection with a registry, for one repository.
struct Registry {
    client: Client,
    reference: Reference,
    base: String,
    plain: bool,
    user: Option<(String, String)>,
    /// What a token service gave, or the user and password if the registry wants those.
    authorization: Mutex<Option<HeaderValue>>,
    limits: Limits,
}

#[derive(Deserialize)]
struct Token {
    #[serde(default)]
    token: Option<String>,
    #[serde(default)]
    access_token: Option<String>,
}

impl Registry {
    fn new(reference: Reference, options: &PullOptions) -> Result<Self> {
        let plain = match options.transport {
            Transport::Auto => reference.is_loopback(),
            Transport::Tls => false,
            Transport::Plain => true,
        };
        let user = match &options.credentials {
            Credentials::Anonymous => None,
            Credentials::Password { user, password } => Some((user.clone(), password.clone())),
            Credentials::DockerConfig(path) => docker_credentials(path, reference.registry())?,
        };
        let scheme = if plain { "http" } else { "https" };
        let base = format!("{scheme}://{}/v2/{}", reference.host(), reference.repository());
        let client = client(&reference, options)?;
        let limits = options.limits.clone();
        Ok(Self { client, reference, base, plain, user, authorization: Mutex::default(), limits })
    }

    async fn manifest(&self, options: &PullOptions) -> Result<(Digest, Manifest)> {
        let wanted = Platform::wanted(options.architecture.as_deref());
        let what = format!("the image {}", self.reference);
        let mut version = self.reference.version();
        let mut expected = self.reference.digest();
        for _ in 0..MOST_INDEXES {
            let url = format!("{}/manifests/{version}", self.base);
            let response = self.get(&url, &[(ACCEPT, MANIFESTS)]).await?;
            if response.status() == StatusCode::NOT_FOUND {
                let hint = "look at the name and the tag, and whether it takes a login";
                return Err(Error::NotFound { what, hint });
            }
            let response = self.succeeded(response).await?;
            let what = format!("the manifest {version} of {}", self.reference);
            let bytes = self.body(response, self.limits.manifest_bytes, &what).await?;
            let digest = Digest::of(&bytes);
            if let Some(expected) = expected {
                expected.check(digest, &what)?;
            }
            match manifest::parse(&bytes, &what, &self.limits)? {
                Parsed::Manifest(manifest) => return Ok((digest, manifest)),
                Parsed::Index(entries) => {
                    let digest = manifest::choose(&entries, &wanted, &what)?.digest()?;
                    version = digest.to_string();
                    expected = Some(digest);
                }
            }
        }
        Err(Error::malformed(&what, "it leads from index to index"))
    }

    /// A blob that is held in memory.
    async fn small_blob(&self, blob: &Blob, what: &str) -> Result<Vec<u8>> {
        let url = format!("{}/blobs/{}", self.base, blob.digest);
        let response = self.succeeded(self.get(&url, &[]).await?).await?;
        let bytes = self.body(response, self.limits.manifest_bytes, what).await?;
        blob.digest.check(Digest::of(&bytes), what)?;
        Ok(bytes)
    }

    /// Fetches a layer into a file. When the connection breaks, goes on where it broke.
    async fn blob(
        &self,
        blob: &Blob,
        to: &mut std::fs::File,
        work: &Work,
        tell: &(impl Fn(u64) + Sync),
    ) -> Result<()> {
        let url = format!("{}/blobs/{}", self.base, blob.digest);
        let what = format!("the layer {} of {}", blob.digest, self.reference);
        let written = |e| Error::io("write", work.path(), e);
        let (mut hasher, mut at, mut attempt) = (Sha256::new(), 0_u64, 1);
        while at < blob.size {
            let range = format!("bytes={at}-");
            let headers = [(RANGE, range.as_str())];
            let got = self.get(&url, if at > 0 { &headers } else { &[] }).await;
            let mut broken = match got {
                Ok(response) => {
                    let mut response = self.succeeded(response).await?;
                    // It may send all of it instead of the rest.
                    let mut known =
                        if response.status() == StatusCode::PARTIAL_CONTENT { 0 } else { at };
                    loop {
                        match response.chunk().await {
                            Ok(None) => break None,
                            Ok(Some(chunk)) => {
                                let skip = known.min(chunk.len() as u64);
                                known -= skip;
                                let new = &chunk[usize::try_from(skip).unwrap_or(0)..];
                                at += new.len() as u64;
                                if at > blob.size {
                                    return Err(Error::damaged(&what, "it is larger than named"));
                                }
                                hasher.update(new);
                                to.write_all(new).map_err(written)?;
                                tell(at);
                            }
                            Err(e) => break Some(self.network(e)),
                        }
                    }
                }
                Err(error @ Error::Network { .. }) => Some(error),
                Err(error) => return Err(error),
            };
            if at < blob.size {
                if attempt >= ATTEMPTS {
                    let short = || Error::damaged(&what, "it is shorter than named");
                    return Err(broken.take().unwrap_or_else(short));
                }
                tracing::debug!(%url, at, attempt, "a connection broke; going on");
                tokio::time::sleep(Duration::from_millis(200 << attempt)).await;
                attempt += 1;
            }
        }
        blob.digest.check(hasher.into(), &what)
    }

    /// Asks, and if the registry wants to know who asks, asks again with that.
    async fn get(
        &self,
        url: &str,
        headers: &[(reqwest::header::HeaderName, &str)],
    ) -> Result<Response> {
        let mut fields = HeaderMap::new();
        for (name, value) in headers {
            if let Ok(value) = HeaderValue::from_str(value) {
                fields.insert(name, value);
            }
        }
        let known = self.authorization().clone();
        let response = self.send(url, &fields, known).await?;
        if response.status() != StatusCode::UNAUTHORIZED {
            return Ok(response);
        }
        // Also when a token is too old.
        let authorization = self.authorize(&response).await?;
        *self.authorization() = Some(authorization.clone());
        let response = self.send(url, &fields, Some(authorization)).await?;
        if response.status() == StatusCode::UNAUTHORIZED {
            return Err(self.unauthorized());
        }
        Ok(response)
    }

    async fn send(
        &self,
        url: &str,
        headers: &HeaderMap,
        authorization: Option<HeaderValue>,
    ) -> Result<Response> {
        let mut request = self.client.get(url).headers(headers.clone());
        if let Some(authorization) = authorization {
            request = request.header(AUTHORIZATION, authorization);
        }
        request.send().await.map_err(|e| self.network(e))
    }

    /// What the registry asks for: a token of its service, or the user and the password.
    async fn authorize(&self, response: &Response) -> Result<HeaderValue> {
        match self.challenge(response)? {
            Challenge::Token { realm, service } => self.token(&realm, service).await,
            Challenge::Password(value) => Ok(value),
        }
    }

    /// The first of the registry's demands that can be met.
    fn challenge(&self, response: &Response) -> Result<Challenge> {
        let headers = response.headers().get_all(WWW_AUTHENTICATE).iter();
        let texts: Vec<&str> = headers.filter_map(|header| header.to_str().ok()).collect();
        let challenges = texts.iter().filter_map(|text| http_auth::parse_challenges(text).ok());
        for challenge in challenges.flatten() {
            if challenge.scheme.eq_ignore_ascii_case("bearer") {
                let parameter = |wanted: &str| {
                    let found =
                        challenge.params.iter().find(|(k, _)| k.eq_ignore_ascii_case(wanted));
                    found.map(|(_, value)| value.to_unescaped())
                };
                let realm = parameter("realm").unwrap_or_default();
                return Ok(Challenge::Token { realm, service: parameter("service") });
            }
            if challenge.scheme.eq_ignore_ascii_case("basic")
                && let Some((user, password)) = &self.user
            {
                let value = sensitive(&basic(user, password));
                return value.map(Challenge::Password).ok_or_else(|| self.unauthorized());
            }
        }
        Err(self.unauthorized())
    }

    async fn token(&self, realm: &str, service: Option<String>) -> Result<HeaderValue> {
        let what = format!("the token service of {}", self.reference.registry());
        let mut url = Url::parse(realm).map_err(|e| Error::malformed(&what, e.to_string()))?;
        match url.scheme() {
            "https" => {}
            "http" if self.plain => {}
            _ => return Err(Error::malformed(&what, "it is not reached over TLS")),
        }
        let scope = format!("repository:{}:pull", self.reference.repository());
        url.query_pairs_mut().append_pair("scope", &scope);
        if let Some(service) = service {
            url.query_pairs_mut().append_pair("service", &service);
        }
        let user = match &self.user {
            Some((user, password)) => {
                Some(sensitive(&basic(user, password)).ok_or_else(|| self.unauthorized())?)
            }
            None => None,
        };
        let response = self.send(url.as_str(), &HeaderMap::new(), user).await?;
        if matches!(response.status(), StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) {
            return Err(self.unauthorized());
        }
        let response = self.succeeded(response).await?;
        let bytes = self.body(response, MOST_ANSWER, &what).await?;
        let token: Token =
            serde_json::from_slice(&bytes).map_err(|e| Error::malformed(&what, e.to_string()))?;
        let token = token.token.or(token.access_token).unwrap_or_default();
        sensitive(&format!("Bearer {token}"))
            .ok_or_else(|| Error::malformed(&what, "its token cannot be sent"))
    }

    fn authorization(&self) -> std::sync::MutexGuard<'_, Option<HeaderValue>> {
        // Only ever replaced as a whole.
        self.authorization.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn succeeded(&self, response: Response) -> Result<Response> {
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        if matches!(status, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) {
            return Err(self.unauthorized());
        }
        let url = without_query(response.url());
        let text = self.body(response, MOST_ANSWER, "the answer").await.unwrap_or_default();
        Err(Error::Registry { url, status: status.as_u16(), detail: complaint(&text) })
    }

    async fn body(&self, mut response: Response, limit: u64, what: &str) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(|e| self.network(e))? {
            if (bytes.len() + chunk.len()) as u64 > limit {
                return Err(Error::too_large(what, limit, "bytes"));
            }
            bytes.extend_from_slice(&chunk);
        }
        Ok(bytes)
    }

    fn network(&self, error: reqwest::Error) -> Error {
        // Its address may have a signature in it.
        let source = Box::new(error.without_url());
        Error::Network { host: self.reference.host().to_owned(), source }
    }

    fn unauthorized(&self) -> Error {
        Error::Unauthorized {
            registry: self.reference.registry().to_owned(),
            repository: self.reference.repository().to_owned(),
        }
    }
}

fn client(reference: &Reference, options: &PullOptions) -> Result<Client> {
    let failed = |source: Box<dyn std::error::Error + Send + Sync>| Error::Network {
        host: reference.host().to_owned(),
        source,
    };
    let mut roots = Vec::new();
    for path in &options.certificates {
        let bad = |e: rustls::pki_types::pem::Error| Error::Credentials {
            path: path.clone(),
            detail: format!("it has no certificates in PEM form ({e})"),
        };
        for certificate in CertificateDer::pem_file_iter(path).map_err(bad)? {
            roots.push(certificate.map_err(bad)?);
        }
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier =
        rustls_platform_verifier::Verifier::new_with_extra_roots(roots, Arc::clone(&provider))
            .map_err(|e| failed(e.into()))?;
    let tls = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|e| failed(e.into()))?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_no_client_auth();
    // Never from TLS to none. The client itself takes care that no credentials go along to
    // another host.
    let redirects = reqwest::redirect::Policy::custom(|attempt| {
        let from = attempt.previous().last().map(|url| url.scheme().to_owned());
        if from.as_deref() == Some("https") && attempt.url().scheme() != "https" {
            return attempt.error("a redirect away from TLS");
        }
        if attempt.previous().len() > MOST_REDIRECTS {
            return attempt.error("too many redirects");
        }
        attempt.follow()
    });
    let builder = Client::builder()
        .tls_backend_preconfigured(tls)
        .user_agent(concat!("denizen/", env!("CARGO_PKG_VERSION")))
        .connect_timeout(CONNECT)
        .read_timeout(SILENCE)
        .redirect(redirects);
    // A proxy cannot reach what is on this machine.
    let builder = if reference.is_loopback() { builder.no_proxy() } else { builder };
    builder.build().map_err(|e| failed(e.into()))
}

fn basic(user: &str, password: &str) -> String {
    format!("Basic {}", BASE64.encode(format!("{user}:{password}")))
}

fn sensitive(text: &str) -> Option<HeaderValue> {
    let mut value = HeaderValue::from_str(text).ok()?;
    value.set_sensitive(true);
    Some(value)
}

fn without_query(url: &Url) -> String {
    let mut url = url.clone();
    url.set_query(None);
    shown(url.as_str().as_bytes())
}

/// What a registry says is wrong, in the form they have agreed on or as it is.
fn complaint(text: &[u8]) -> String {
    #[derive(Deserialize)]
    struct Errors {
        errors: Vec<One>,
    }
    #[derive(Deserialize)]
    struct One {
        #[serde(default)]
        code: String,
        #[serde(default)]
        message: String,
    }
    match serde_json::from_slice::<Errors>(text) {
        Ok(Errors { errors }) => {
            let all = errors.iter().map(|one| format!("{}: {}", one.code, one.message));
            shown(all.collect::<Vec<_>>().join("; ").as_bytes())
        }
        Err(_) => shown(text).trim().to_owned(),
    }
}

#[derive(Deserialize)]
struct DockerConfig {
    #[serde(default)]
    auths: std::collections::BTreeMap<String, DockerAuth>,
}

#[derive(Deserialize)]
struct DockerAuth {
    #[serde(default)]
    auth: Option<String>,
}

fn docker_credentials(path: &PathBuf, registry: &str) -> Result<Option<(String, String)>> {
    use std::io::Read as _;
    let bad = |detail: String| Error::Credentials { path: path.clone(), detail };
    let mut text = Vec::new();
    let file = std::fs::File::open(path).map_err(|e| bad(e.to_string()))?;
    file.take(MOST_DOCKER_CONFIG).read_to_end(&mut text).map_err(|e| bad(e.to_string()))?;
    let config: DockerConfig = serde_json::from_slice(&text).map_err(|e| bad(e.to_string()))?;
    // Keys are hosts, or addresses as they once were: https://index.docker.io/v1/.
    let host = |key: &str| {
        let key = key.strip_prefix("https://").or(key.strip_prefix("http://")).unwrap_or(key);
        match key.split('/').next().unwrap_or_default() {
            "index.docker.io" | "registry-1.docker.io" => "docker.io".to_owned(),
            host => host.to_owned(),
        }
    };
    let Some((_, found)) = config.auths.iter().find(|(key, _)| host(key) == registry) else {
        return Ok(None);
    };
    // Empty when a helper of Docker's keeps it.
    let Some(encoded) = found.auth.as_deref().filter(|auth| !auth.is_empty()) else {
        return Ok(None);
    };
    let wrong = || bad(format!("its entry for {registry} is not user:password in base64"));
    let decoded = BASE64.decode(encoded.trim()).map_err(|_| wrong())?;
    let decoded = String::from_utf8(decoded).map_err(|_| wrong())?;
    let (user, password) = decoded.split_once(':').ok_or_else(wrong)?;
    Ok(Some((user.to_owned(), password.trim_end_matches('\0').to_owned())))
}
