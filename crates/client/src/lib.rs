//! A client of the denizen daemon: sessions, their commands, files, ports and backups, on this
//! machine or another one. What is said is in the crate `denizen-api`; the program `denizen` uses
//! this crate for all that it does.
//!
//! ```no_run
//! # async fn example() -> Result<(), denizen_client::Error> {
//! use denizen_client::{Client, NewProcess, RunEvent, Target, api};
//!
//! let client = Client::new(Target::url("https://box.example.org:7878", Some("dk_…"))?);
//! let session = client.ensure("demo", None).await?;
//! let mut run = client.run("demo", &NewProcess::shell("make test")).await?;
//! while let Some(event) = run.next().await? {
//!     if let RunEvent::Exit(ended) = event {
//!         println!("{} ended with {}", session.id, ended.code);
//!     }
//! }
//! # Ok(()) }
//! ```
//!
//! Each request has a connection of its own, so that one that takes long holds up no other. It
//! never repeats a request by itself.

mod files;
mod stream;
mod target;

use std::time::Duration;

use bytes::Bytes;
use connectrpc::client::SharedHttp2Connection;
use denizen_envd::filesystem::FilesystemClient;
use denizen_envd::process::ProcessClient;
use futures::StreamExt;
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full};
use hyper::Response;
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, copy_bidirectional};
use tokio::net::TcpListener;
use tokio::task::JoinSet;

pub use denizen_api as api;
pub use denizen_api::{NewProcess, escape};
pub use files::Changes;
pub use stream::{Events, Lines, Piece, Run, RunEvent, Told};
pub use target::{Stream, Target};

use api::{
    Backup, BackupReport, Difference, Forget, Health, Image, Keys, MadeKey, NewKey, NewSession,
    NewToken, Problem, Process, Processes as ProcessList, Session, Sessions, Size, Snapshot,
    Started, Token, Whoami,
};

/// The envd side of the daemon.
pub type Processes = ProcessClient<SharedHttp2Connection>;

/// What did not work.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The address or the key cannot be right.
    #[error("{0}")]
    Address(String),
    /// The daemon does not answer, or not to the end.
    #[error("the daemon on {target} is gone: {source}")]
    Gone {
        /// Where it was to be.
        target: String,
        /// What the connection said.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The daemon refuses. Its code says why.
    #[error("{}", .0.detail)]
    Refused(Box<Problem>),
    /// The answer is none that this client understands.
    #[error("the daemon's answer is not understood: {0}")]
    Answer(String),
    /// What is read cannot be written where it was to go.
    #[error("cannot write what the daemon sends: {0}")]
    Write(std::io::Error),
}

/// What a request gives.
pub type Result<T> = std::result::Result<T, Error>;

/// A way to a daemon.
#[derive(Clone)]
pub struct Client {
    target: Target,
}

impl Client {
    /// A client of the daemon there; nothing is asked yet.
    pub fn new(target: Target) -> Self {
        Self { target }
    }

    /// Where the daemon is.
    pub fn target(&self) -> &Target {
        &self.target
    }

    /// Whether the daemon is there. Cancel-safe, as all that only asks.
    ///
    /// # Errors
    /// [`Error`], as of all requests.
    pub async fn health(&self) -> Result<Health> {
        self.get("/v1/health").await
    }

    /// Has the daemon end, with what runs in its sessions.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn shutdown(&self) -> Result<()> {
        self.json("POST", "/v1/shutdown").await.map(drop)
    }

    // ---- Sessions -----------------------------------------------------------------------

    /// All sessions, by their names; those without come last. Cancel-safe.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn sessions(&self) -> Result<Vec<Session>> {
        let mut all = Vec::new();
        let mut after = None;
        loop {
            let query = query("after", after.map(|id: uuid::Uuid| id.to_string()));
            let part: Sessions = self.get(&format!("/v1/sessions{query}")).await?;
            all.extend(part.sessions);
            after = part.next;
            if after.is_none() {
                break;
            }
        }
        all.sort_by_cached_key(|session| (session.name.is_none(), session.name.clone()));
        Ok(all)
    }

    /// A session, by name or UUID. Cancel-safe.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn session(&self, session: &str) -> Result<Session> {
        self.get(&path(session, "")).await
    }

    /// Makes a session. With a key (any text that no other request has) it may be asked again: no
    /// second one is made. Dropped, it may be made or not.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn create(&self, new: &NewSession, key: Option<&str>) -> Result<Session> {
        let header = key.map(|key| (api::IDEMPOTENCY_KEY, key));
        self.send("POST", "/v1/sessions", header, new).await
    }

    /// Starts a session, which is made (of the image, if one is named) if it is not there. May be
    /// asked again.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn ensure(&self, session: &str, image: Option<&str>) -> Result<Session> {
        let query = query("image", image.map(str::to_owned));
        typed(self.json("PUT", &(path(session, "") + &query)).await?)
    }

    /// Puts a session to sleep as it stands, until it is next used.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn pause(&self, session: &str) -> Result<()> {
        self.json("POST", &path(session, "/pause")).await.map(drop)
    }

    /// Stops a session; with force, also if something runs in it.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn stop(&self, session: &str, force: bool) -> Result<()> {
        self.json("POST", &path(session, &format!("/stop?force={force}"))).await.map(drop)
    }

    /// Removes a session; with force, also if something runs in it. Its backups stay.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn remove(&self, session: &str, force: bool) -> Result<()> {
        self.json("DELETE", &path(session, &format!("?force={force}"))).await.map(drop)
    }

    /// Keeps a session's files as they are now under a name, on the same disk.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn snapshot(&self, session: &str, name: &str) -> Result<()> {
        let path = path(session, &format!("/snapshots/{}", escape(name)));
        self.json("PUT", &path).await.map(drop)
    }

    /// A session's snapshots. Cancel-safe.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn snapshots(&self, session: &str) -> Result<Vec<Snapshot>> {
        self.get(&path(session, "/snapshots")).await
    }

    /// Removes a snapshot.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn remove_snapshot(&self, session: &str, name: &str) -> Result<()> {
        let path = path(session, &format!("/snapshots/{}", escape(name)));
        self.json("DELETE", &path).await.map(drop)
    }

    /// What differs between two states, each a session's as it is or as a snapshot of it has it.
    /// Cancel-safe.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn diff(
        &self,
        (session, snapshot): (&str, Option<&str>),
        (other, other_snapshot): (&str, Option<&str>),
    ) -> Result<Vec<Difference>> {
        let mut query = format!("/diff?other={}", escape(other));
        for (name, snapshot) in [("snapshot", snapshot), ("other_snapshot", other_snapshot)] {
            if let Some(snapshot) = snapshot {
                query.push_str(&format!("&{name}={}", escape(snapshot)));
            }
        }
        self.get(&path(session, &query)).await
    }

    // ---- Backups ------------------------------------------------------------------------

    /// Backs a session up now. Dropped, the daemon gives the backup up.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn backup(&self, session: &str) -> Result<Session> {
        typed(self.json("POST", &path(session, "/backup")).await?)
    }

    /// The backups of a session, newest first; of all, if none is named. Cancel-safe.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn backups(&self, session: Option<&str>) -> Result<Vec<Backup>> {
        match session {
            Some(session) => self.get(&path(session, "/backups")).await,
            None => self.get("/v1/backups").await,
        }
    }

    /// Checks all backups; with `read_data` every byte of them. Cancel-safe.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn verify_backups(&self, read_data: bool) -> Result<BackupReport> {
        typed(self.json("POST", &format!("/v1/backups/verify?read_data={read_data}")).await?)
    }

    /// Deletes the backups that no rule keeps, or tells which they are.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn forget_backups(&self, forget: &Forget) -> Result<Vec<Backup>> {
        self.send("POST", "/v1/backups/forget", None, forget).await
    }

    /// Deletes a backup, by its name or the beginning of it, and gives it.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn delete_backup(&self, name: &str) -> Result<Backup> {
        typed(self.json("DELETE", &format!("/v1/backups/{}", escape(name))).await?)
    }

    /// Makes sessions known of which there are only backups.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn recover(&self) -> Result<Vec<Session>> {
        typed(self.json("POST", "/v1/recover").await?)
    }

    // ---- Images -------------------------------------------------------------------------

    /// The images that there are. Cancel-safe.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn images(&self) -> Result<Vec<Image>> {
        self.get("/v1/images").await
    }

    /// Removes an image.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn remove_image(&self, name: &str) -> Result<()> {
        let path = format!("/v1/images{}", query("name", Some(name.to_owned())));
        self.json("DELETE", &path).await.map(drop)
    }

    // ---- Access -------------------------------------------------------------------------

    /// Who this client is to the daemon. Cancel-safe.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn whoami(&self) -> Result<Whoami> {
        self.get("/v1/whoami").await
    }

    /// The keys that there are. Cancel-safe.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn keys(&self) -> Result<Keys> {
        self.get("/v1/keys").await
    }

    /// Makes a key. Dropped, it may be made or not.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn create_key(&self, new: &NewKey) -> Result<MadeKey> {
        self.send("POST", "/v1/keys", None, new).await
    }

    /// Revokes a key, by its id: what is being done with it ends.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn revoke_key(&self, id: &str) -> Result<()> {
        self.json("DELETE", &format!("/v1/keys/{}", escape(id))).await.map(drop)
    }

    /// Makes a token for one session.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn create_token(&self, session: &str, new: NewToken) -> Result<Token> {
        self.send("POST", &path(session, "/tokens"), None, &new).await
    }

    /// Voids all tokens of a session.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn void_tokens(&self, session: &str) -> Result<()> {
        self.json("DELETE", &path(session, "/tokens")).await.map(drop)
    }

    // ---- Commands -----------------------------------------------------------------------

    /// Runs a command in a session, which is made if it is not there. The command is killed with
    /// all that it has started when what is returned is dropped.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn run(&self, session: &str, new: &NewProcess) -> Result<Run> {
        let new = NewProcess { detach: false, ..new.clone() };
        let body = json_body(&new)?;
        let header = Some(("content-type", "application/json"));
        let response = self.request("POST", &path(session, "/processes"), header, body).await?;
        Ok(Run::new(self.target.to_string(), response))
    }

    /// Starts a command that goes on by itself.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn start(&self, session: &str, new: &NewProcess) -> Result<Started> {
        let new = NewProcess { detach: true, ..new.clone() };
        self.send("POST", &path(session, "/processes"), None, &new).await
    }

    /// The commands of a session that were started through the daemon. Cancel-safe.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn list_processes(&self, session: &str) -> Result<Vec<Process>> {
        let list: ProcessList = self.get(&path(session, "/processes")).await?;
        Ok(list.processes)
    }

    /// What a command in the background prints, and has printed from so many bytes on; by its
    /// number or tag. Cancel-safe.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn output(&self, session: &str, process: &str, from: u64) -> Result<Run> {
        let path = path(session, &format!("/processes/{}/output?from={from}", escape(process)));
        let response = self.request("GET", &path, None, empty()).await?;
        Ok(Run::new(self.target.to_string(), response))
    }

    /// Writes to a command's standard input or terminal, at most 1 MiB; with `last` nothing more
    /// will come. Dropped, a part may be written.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn input(
        &self,
        session: &str,
        process: &str,
        bytes: impl Into<Bytes>,
        last: bool,
    ) -> Result<()> {
        let path = path(session, &format!("/processes/{}/input?eof={last}", escape(process)));
        let body = Full::new(bytes.into()).map_err(|never| match never {}).boxed();
        self.request("POST", &path, None, body).await.map(drop)
    }

    /// Sends a signal to a command and its group; 9 to all that it has started.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn signal(&self, session: &str, process: &str, signal: i32) -> Result<()> {
        let path = path(session, &format!("/processes/{}/signal", escape(process)));
        self.send::<serde_json::Value>("POST", &path, None, &api::Signal { signal }).await.map(drop)
    }

    /// Sets the size of a command's terminal.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn resize(&self, session: &str, process: &str, size: Size) -> Result<()> {
        let path = path(session, &format!("/processes/{}/size", escape(process)));
        self.send::<serde_json::Value>("PUT", &path, None, &size).await.map(drop)
    }

    // ---- Streams ------------------------------------------------------------------------

    /// What happens to all sessions, or to one; after the event of that id, if one is given.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn events(&self, session: Option<&str>, last: Option<&str>) -> Result<Events> {
        let path = format!("/v1/events{}", query("session", session.map(str::to_owned)));
        let mut request = self.target.request("GET", &path).header("accept", "text/event-stream");
        if let Some(last) = last {
            request = request.header("last-event-id", last);
        }
        let response = self.exchange(request, empty()).await?;
        Ok(Events::new(self.target.to_string(), response))
    }

    /// A connection to a port that something in the session listens on.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn port(
        &self,
        session: &str,
        port: u16,
    ) -> Result<impl AsyncRead + AsyncWrite + Send + Unpin + use<>> {
        let request = self
            .target
            .request("GET", &path(session, &format!("/ports/{port}")))
            .header("connection", "upgrade")
            .header("upgrade", "tcp");
        let response = self.exchange(request, empty()).await?;
        let upgraded = hyper::upgrade::on(response).await.map_err(|error| self.gone(error))?;
        Ok(TokioIo::new(upgraded))
    }

    /// Has connections to a port of this machine lead to one of a session, for ever; `failed` is
    /// told of connections that lead nowhere. Whoever can reach the listener is let in. Cancel-safe:
    /// dropped, all that it has joined is cut.
    pub async fn forward(
        &self,
        listener: TcpListener,
        session: &str,
        port: u16,
        failed: impl Fn(Error) + Clone + Send + 'static,
    ) {
        let mut joined = JoinSet::new();
        loop {
            tokio::select! {
                accepted = listener.accept() => {
                    let Ok((mut ours, _)) = accepted else {
                        // One that has left already, or no descriptor is free: that passes.
                        tokio::time::sleep(Duration::from_millis(50)).await;
                        continue;
                    };
                    let (client, session, failed) = (self.clone(), session.to_owned(), failed.clone());
                    joined.spawn(async move {
                        match client.port(&session, port).await {
                            // Either side may end it at any time.
                            Ok(mut theirs) => {
                                let _ = copy_bidirectional(&mut ours, &mut theirs).await;
                            }
                            Err(error) => failed(error),
                        }
                    });
                }
                Some(_) = joined.join_next() => {}
            }
        }
    }

    /// Copies what the daemon answers to `into`: a log, an archive. Not cancel-safe: a part may
    /// be written.
    ///
    /// # Errors
    /// [`Error`]; [`Error::Write`] if it is `into` that takes no more.
    pub async fn download(&self, path: &str, into: &mut (impl AsyncWrite + Unpin)) -> Result<()> {
        let response = self.request("GET", path, None, empty()).await?;
        let mut body = response.into_body().into_data_stream();
        while let Some(bytes) = body.next().await {
            let bytes = bytes.map_err(|error| self.gone(error))?;
            into.write_all(&bytes).await.map_err(Error::Write)?;
        }
        into.flush().await.map_err(Error::Write)
    }

    /// A client of sessions' processes by envd's protocol.
    pub fn processes(&self) -> Processes {
        let (connection, config) = self.target.envd();
        ProcessClient::new(connection, config)
    }

    /// A client of sessions' files by envd's protocol.
    pub fn files(&self) -> FilesystemClient<SharedHttp2Connection> {
        let (connection, config) = self.target.envd();
        FilesystemClient::new(connection, config)
    }

    // ---- Whatever else there is -----------------------------------------------------------

    /// Asks for anything, with one more header: the content's type, or for what is envd's the
    /// session.
    ///
    /// # Errors
    /// [`Error`], for whatever is not answered with success.
    pub async fn request(
        &self,
        method: &str,
        path: &str,
        header: Option<(&str, &str)>,
        body: BoxBody<Bytes, std::io::Error>,
    ) -> Result<Response<Incoming>> {
        let mut request = self.target.request(method, path);
        if let Some((name, value)) = header {
            request = request.header(name, value);
        }
        self.exchange(request, body).await
    }

    /// Asks for JSON; nothing is null.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn json(&self, method: &str, path: &str) -> Result<serde_json::Value> {
        Self::body(self.request(method, path, None, empty()).await?).await
    }

    /// Asks for JSON with some.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn json_with(
        &self,
        method: &str,
        path: &str,
        content: &impl Serialize,
    ) -> Result<serde_json::Value> {
        self.send(method, path, None, content).await
    }

    /// The JSON of an answer; nothing is null.
    ///
    /// # Errors
    /// [`Error::Answer`].
    pub async fn body(response: Response<Incoming>) -> Result<serde_json::Value> {
        let body = response.into_body().collect().await;
        let body = body.map_err(|error| Error::Answer(error.to_string()))?.to_bytes();
        if body.is_empty() {
            return Ok(serde_json::Value::Null);
        }
        serde_json::from_slice(&body).map_err(|error| Error::Answer(error.to_string()))
    }

    /// Asks for a stream of lines.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn lines(&self, path: &str) -> Result<Lines> {
        Ok(Lines::new(self.request("GET", path, None, empty()).await?))
    }

    async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T> {
        typed(self.json("GET", path).await?)
    }

    async fn send<T: DeserializeOwned>(
        &self,
        method: &str,
        path: &str,
        header: Option<(&str, &str)>,
        body: &impl Serialize,
    ) -> Result<T> {
        let mut request =
            self.target.request(method, path).header("content-type", "application/json");
        if let Some((name, value)) = header {
            request = request.header(name, value);
        }
        typed(Self::body(self.exchange(request, json_body(body)?).await?).await?)
    }

    async fn exchange(
        &self,
        request: hyper::http::request::Builder,
        body: BoxBody<Bytes, std::io::Error>,
    ) -> Result<Response<Incoming>> {
        let request = request.body(body).map_err(|error| Error::Address(error.to_string()))?;
        let stream = self.target.connect().await.map_err(|error| self.gone(error))?;
        let handshake = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await;
        let (mut sender, connection) = handshake.map_err(|error| self.gone(error))?;
        tokio::spawn(connection.with_upgrades());
        let response = sender.send_request(request).await.map_err(|error| self.gone(error))?;
        let status = response.status();
        if status.is_success() || status == hyper::StatusCode::SWITCHING_PROTOCOLS {
            return Ok(response);
        }
        Err(refusal(response).await)
    }

    fn gone(&self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
        Error::Gone { target: self.target.to_string(), source: source.into() }
    }
}

fn typed<T: DeserializeOwned>(value: serde_json::Value) -> Result<T> {
    serde_json::from_value(value).map_err(|error| Error::Answer(error.to_string()))
}

fn json_body(value: &impl Serialize) -> Result<BoxBody<Bytes, std::io::Error>> {
    let body = serde_json::to_vec(value).map_err(|error| Error::Answer(error.to_string()))?;
    Ok(Full::new(Bytes::from(body)).map_err(|never| match never {}).boxed())
}

/// What the daemon says of what it does not do.
async fn refusal(response: Response<Incoming>) -> Error {
    let status = response.status();
    let body = match response.into_body().collect().await {
        Ok(body) => body.to_bytes(),
        Err(error) => return Error::Answer(error.to_string()),
    };
    if let Ok(problem) = serde_json::from_slice::<Problem>(&body) {
        return Error::Refused(Box::new(problem));
    }
    // envd's way.
    let told = serde_json::from_slice::<serde_json::Value>(&body).ok();
    let told = told.and_then(|body| Some(body.get("message")?.as_str()?.to_owned()));
    let detail = told.unwrap_or_else(|| format!("{status}: {}", String::from_utf8_lossy(&body)));
    let problem = Problem { status: status.as_u16(), ..Problem::new(api::Code::Unknown, detail) };
    Error::Refused(Box::new(problem))
}

/// No content.
pub fn empty() -> BoxBody<Bytes, std::io::Error> {
    Full::new(Bytes::new()).map_err(|never| match never {}).boxed()
}

/// The query of a URI, if there is something to ask for.
pub fn query(name: &str, value: Option<String>) -> String {
    value.map_or_else(String::new, |value| format!("?{name}={}", escape(&value)))
}

/// Where the API has a session, and what belongs to it.
pub fn path(session: &str, rest: &str) -> String {
    format!("/v1/sessions/{}{rest}", escape(session))
}
