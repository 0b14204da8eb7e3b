//! The envd protocol over whatever instances there are: `process.Process`,
//! `filesystem.Filesystem`, and plain HTTP for content (`/files`) and state (`/health`,
//! `/metrics`, `/envs`, `/init`).
//!
//! It translates, it decides nothing. Which instance a request is for is the business of an
//! [`Instances`]; nothing here knows of sessions.

mod filesystem;
mod gzip;
mod hold;
mod http;
mod kind;
mod metadata;
mod process;
mod tail;
mod user;

use std::any::Any;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use axum::extract::Request;
use axum::http::HeaderMap;
use axum::routing::any;
use connectrpc::{CompressionPolicy, CompressionRegistry, ConnectError, ConnectRpcService};
use denizen_envd::filesystem::FilesystemExt;
use denizen_envd::process::ProcessExt;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::UnixStream;
use tokio_util::sync::CancellationToken;

pub use filesystem::{FilesystemService, Watchers};
pub use hold::Hold;
pub use process::{Job, JobInfo, Jobs, KeptLogs, ProcessService, start_detached, start_foreground};
pub use tail::Piece;
pub use user::{USER, named, no_such_user};

use crate::{Agent, Exit};

/// Silence after which a stream says that it is still there, unless the client asks otherwise.
const KEEPALIVE: Duration = Duration::from_secs(90);

/// Why a command ended, beyond its status, if there is more to say. Asked once.
pub type Explain = Arc<dyn Fn(Exit) -> Option<String> + Send + Sync>;

/// Told how long the start of a command took.
pub type Started = Arc<dyn Fn(std::time::Duration) + Send + Sync>;

/// Gives the span that a command has which begins now, in which its number and exit code are
/// recorded as `pid` and `exit_code`, and what its environment is told of that unless its caller
/// has said something else.
pub type Trace = Arc<dyn Fn() -> (tracing::Span, Vec<(String, String)>) + Send + Sync>;

/// An instance as a request sees it.
#[derive(Clone)]
pub struct Instance {
    /// Starts its commands.
    pub agent: Agent,
    /// Where commands start, and relative paths.
    pub workdir: PathBuf,
    /// What every command's environment begins with.
    pub env: BTreeMap<String, String>,
    /// Who its requests are for that name nobody: whose commands run, whose files are written,
    /// and from whose home paths begin. None: whoever serves it, and the volume.
    pub default_user: Option<String>,
    /// The commands that run in it.
    pub jobs: Arc<Jobs>,
    /// Who waits for changes of its files.
    pub watchers: Arc<Watchers>,
    /// Says more of how a command ended that is started now, where its status is not all.
    pub explain: Explain,
    /// Told how long the start of each of its commands took.
    pub started: Started,
    /// Asked as each of its commands begins.
    pub trace: Trace,
    /// Kept as long as the request, its response or a command in the foreground lasts.
    pub lease: Arc<dyn Any + Send + Sync>,
    /// Cancelled when it is to be given up at once: what is being done in it for requests ends
    /// then, whether or not their clients read or send.
    pub over: CancellationToken,
}

impl Instance {
    /// Whom a request is for that has these headers.
    fn user(&self, headers: &HeaderMap) -> Option<String> {
        named(headers).or_else(|| self.default_user.clone())
    }
}

/// Finds the instance that a request is for.
pub trait Instances: Send + Sync + 'static {
    /// The instance, ready to run commands.
    fn instance(
        &self,
        headers: &HeaderMap,
    ) -> impl Future<Output = Result<Instance, ConnectError>> + Send;
}

impl<I: Instances> Instances for Arc<I> {
    fn instance(
        &self,
        headers: &HeaderMap,
    ) -> impl Future<Output = Result<Instance, ConnectError>> + Send {
        (**self).instance(headers)
    }
}

/// Everything of the protocol under its own paths.
pub fn router<I: Instances>(instances: Arc<I>) -> axum::Router {
    let rpc = ProcessService::new(instances.clone()).register(connectrpc::Router::new());
    let rpc = FilesystemService::new(instances.clone()).register(rpc);
    let variables = http::variables(instances.clone());
    http::router(instances).merge(variables).fallback_service(service(rpc))
}

/// The part that is about processes, under its own paths.
pub fn processes<I: Instances>(instances: Arc<I>) -> axum::Router {
    let rpc = ProcessService::new(instances.clone()).register(connectrpc::Router::new());
    http::variables(instances).route_service("/process.Process/{method}", service(rpc))
}

/// The part that is about files, under its own paths.
fn files<I: Instances>(instances: Arc<I>) -> axum::Router {
    let rpc = FilesystemService::new(instances.clone()).register(connectrpc::Router::new());
    http::router(instances).fallback_service(service(rpc))
}

/// The services as axum has them. What clients send may be packed; answers are not, as most of
/// what a command prints is too little for that, and all of it is wanted at once.
fn service(rpc: connectrpc::Router) -> ConnectRpcService {
    rpc.into_axum_service()
        .with_compression(CompressionRegistry::new().register(gzip::Messages))
        .with_compression_policy(CompressionPolicy::disabled())
}

/// What [`crate::files`] serves, below [`crate::files::PREFIX`].
fn own(workdir: PathBuf) -> axum::Router {
    let answer = move |mut request: Request| {
        let workdir = workdir.clone();
        async move {
            let all = request.uri().path_and_query().map_or("/", |it| it.as_str());
            let rest = all.strip_prefix(crate::files::PREFIX).unwrap_or(all);
            // A part of a URI that begins with a slash, as the route says, is one.
            *request.uri_mut() = rest.parse().unwrap_or_default();
            crate::files::answer(&workdir, request).await
        }
    };
    let prefix = crate::files::PREFIX;
    axum::Router::new()
        .route(&format!("{prefix}/"), any(answer.clone()))
        .route(&format!("{prefix}/{{*path}}"), any(answer))
}

/// Serves files from within an instance, over HTTP/2 on a connected socket, until that is
/// closed: the files that this process sees, with the rights that it has.
///
/// # Errors
/// What ended the connection, if it was not closed.
pub async fn serve_files(socket: UnixStream, workdir: PathBuf) -> std::io::Result<()> {
    /// The one instance that there is here.
    struct Within(Instance);
    impl Instances for Within {
        async fn instance(&self, headers: &HeaderMap) -> Result<Instance, ConnectError> {
            let default_user = user::told(headers);
            Ok(Instance { default_user, ..self.0.clone() })
        }
    }
    let instance = Instance {
        agent: Agent::new(),
        env: std::env::vars().collect(),
        default_user: None,
        jobs: Arc::new(Jobs::new(workdir.join("."), KeptLogs::default())),
        watchers: Arc::default(),
        explain: Arc::new(|_| None),
        started: Arc::new(|_| {}),
        trace: Arc::new(|| (tracing::Span::none(), Vec::new())),
        lease: Arc::new(()),
        over: CancellationToken::new(),
        workdir: workdir.clone(),
    };
    let router = files(Arc::new(Within(instance))).merge(own(workdir));
    let service = hyper_util::service::TowerToHyperService::new(router);
    hyper::server::conn::http2::Builder::new(TokioExecutor::new())
        // The daemon is the one who asks, and it lets its clients ask for no more than they may.
        .max_concurrent_streams(None)
        .serve_connection(TokioIo::new(socket), service)
        .await
        .map_err(std::io::Error::other)
}

fn keepalive(headers: &HeaderMap) -> Duration {
    let seconds = headers
        .get("keepalive-ping-interval")
        .and_then(|value| value.to_str().ok()?.parse().ok())
        .filter(|seconds| *seconds > 0);
    seconds.map_or(KEEPALIVE, Duration::from_secs)
}

/// What a stream ends with when its instance is given up.
fn stopped() -> ConnectError {
    ConnectError::unavailable("the session is being stopped")
}

/// Waits until then; for ever, if that is never.
async fn until(deadline: Option<tokio::time::Instant>) {
    match deadline {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

/// Runs what blocks on a thread that may.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ConnectError> + Send + 'static,
) -> Result<T, ConnectError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|error| Err(ConnectError::internal(error.to_string())))
}

/// An error of the file system in the words of Connect.
fn refused(path: &Path, error: &std::io::Error) -> ConnectError {
    use std::io::ErrorKind;
    let text = format!("{}: {error}", path.display());
    match error.kind() {
        ErrorKind::NotFound => ConnectError::not_found(text),
        ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem => {
            ConnectError::permission_denied(text)
        }
        ErrorKind::AlreadyExists => ConnectError::already_exists(text),
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::FileTooLarge => {
            ConnectError::resource_exhausted(text)
        }
        ErrorKind::NotADirectory
        | ErrorKind::IsADirectory
        | ErrorKind::DirectoryNotEmpty
        | ErrorKind::InvalidInput
        | ErrorKind::InvalidFilename
        | ErrorKind::CrossesDevices => ConnectError::invalid_argument(text),
        _ if error.raw_os_error() == Some(rustix::io::Errno::LOOP.raw_os_error()) => {
            let text = format!("{}: cyclic symlink, or too long a chain of them", path.display());
            ConnectError::failed_precondition(text)
        }
        _ => ConnectError::internal(text),
    }
}
