//! The session's process service: one [`Init`] launched when it is first needed, and
//! again after it died. It must never run two of them at once.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::net::TcpStream;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rustix::fs::{Mode, OFlags};
use tokio::sync::Mutex;

use crate::child::{Child, Spec};
use crate::init::{Init, Launch, Process, Remote, Spawn, Spawned};
use crate::{Error, Result, child};

/// Starts a session's commands and knows all its processes. Clones are the same agent;
/// when the last one is dropped, everything that the session runs is killed.
#[derive(Debug, Clone, Default)]
pub struct Agent {
    inner: Arc<Inner>,
}

#[derive(Default)]
struct Inner {
    init: Arc<Mutex<Option<Init>>>,
    /// How the next init is launched, if not by default.
    launch: parking_lot::Mutex<Option<Launching>>,
    /// How often it was shut down.
    shutdowns: Arc<AtomicU64>,
}

type Launching = Arc<dyn Fn() -> std::io::Result<Launch> + Send + Sync>;

impl std::fmt::Debug for Inner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Inner").field("init", &self.init).finish_non_exhaustive()
    }
}

impl Agent {
    /// An agent that has started nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// The same, its init launched in this way.
    pub fn with(launch: Launch) -> Self {
        Self::having(None, launch)
    }

    fn having(init: Option<Init>, launch: Launch) -> Self {
        let launch: Launching = Arc::new(move || Ok(launch.clone()));
        let init = Arc::new(Mutex::new(init));
        let launch = Some(launch).into();
        Self { inner: Arc::new(Inner { init, launch, shutdowns: Arc::default() }) }
    }

    /// Should its init die, the next one is launched in this way, which is asked for only then.
    pub fn relaunch_by(
        &self,
        launch: impl Fn() -> std::io::Result<Launch> + Send + Sync + 'static,
    ) {
        *self.inner.launch.lock() = Some(Arc::new(launch));
    }

    /// Whether its init is alive. Cancel-safe.
    pub async fn is_alive(&self) -> bool {
        self.inner.init.lock().await.as_ref().is_some_and(Init::is_alive)
    }

    /// An agent whose init an earlier owner launched in this way and has left to itself; with it
    /// comes what the init's plan had for the owner. See [`Init::find`]. Blocks, not for long.
    pub fn find(launch: Launch) -> Result<(Self, Option<OwnedFd>)> {
        let (init, door) = Init::find(&launch)?;
        Ok((Self::having(Some(init), launch), door))
    }

    /// Leaves what runs to itself; see [`Init::leave`]. Cancel-safe.
    pub async fn leave(&self) {
        if let Some(init) = self.inner.init.lock().await.take() {
            init.leave();
        }
    }

    /// Starts a command; launches the session's init first if there is none alive.
    ///
    /// Cancel-safe: a command whose start was not waited for to the end is killed.
    pub async fn spawn(&self, spec: Spec) -> Result<Child> {
        child::start(&self.init().await?, spec).await
    }

    /// Starts a command with the caller's own descriptors.
    ///
    /// Cancel-safe: a command whose start was not waited for to the end is killed.
    pub async fn spawn_with(&self, spawn: Spawn) -> Result<Spawned> {
        self.init().await?.spawn(spawn).await
    }

    /// Starts a program of denizen's own that serves on a socket, its standard input; what it
    /// prints is thrown away. It is no use of the session: [`Agent::busy`] leaves it out.
    ///
    /// Cancel-safe: a program whose start was not waited for to the end is killed.
    pub async fn spawn_service(
        &self,
        argv: Vec<OsString>,
        env: BTreeMap<OsString, OsString>,
        cwd: PathBuf,
        socket: OwnedFd,
    ) -> Result<Spawned> {
        let null = || {
            let null = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty());
            null.map_err(Error::io("cannot open /dev/null"))
        };
        let (stdin, stdout, stderr) = (socket, null()?, null()?);
        let env = env.into_iter().collect();
        let (user, controlling_terminal) = (None, false);
        let spawn = Spawn { argv, env, user, cwd, stdin, stdout, stderr, controlling_terminal };
        self.init().await?.spawn_service(spawn).await
    }

    /// Connects to a port of 127.0.0.1, as what runs in the session would. The connection may
    /// still be on its way: its first use tells. Cancel-safe.
    pub async fn connect(&self, port: u16) -> Result<TcpStream> {
        Ok(self.init().await?.connect(port).await?.into())
    }

    /// The process id, here, of the process that all of the session's descend from, if it is
    /// alive and one of this kernel. Cancel-safe.
    pub async fn first_process(&self) -> Option<u32> {
        let slot = self.inner.init.lock().await;
        slot.as_ref().filter(|init| init.is_alive()).and_then(Init::pid)
    }

    /// The same without waiting: none also while it is just being launched or ended.
    pub fn first_process_now(&self) -> Option<u32> {
        let slot = self.inner.init.try_lock().ok()?;
        slot.as_ref().filter(|init| init.is_alive()).and_then(Init::pid)
    }

    /// Launches the session's init if there is none alive, which otherwise the first command
    /// does. Cancel-safe.
    pub async fn launch(&self) -> Result<()> {
        self.init().await.map(drop)
    }

    async fn init(&self) -> Result<Remote> {
        let mut slot = self.inner.init.clone().lock_owned().await;
        if let Some(init) = slot.as_ref().filter(|init| init.is_alive()) {
            return Ok(init.remote());
        }
        let launch = self.inner.launch.lock().clone();
        // A launch that nobody waits for goes on: until it has ended there must be no other.
        let launched = tokio::spawn(async move {
            // The dead one goes first, with all that it ran, so that there are never two.
            if let Some(dead) = &*slot {
                dead.end().await;
            }
            *slot = None;
            let launch = launch.map_or(Ok(Launch::default()), |launch| launch());
            let launch = launch.map_err(Error::io("cannot prepare the session's init"))?;
            let init = Init::launch(&launch).await?;
            Ok(slot.insert(init).remote())
        });
        launched.await.map_err(|_| Error::InitLost)?
    }

    /// How often it has been shut down: a command during which that grows was ended with all else.
    /// It keeps nothing alive.
    #[cfg(feature = "envd")]
    pub(crate) fn shutdowns(&self) -> Arc<AtomicU64> {
        self.inner.shutdowns.clone()
    }

    /// Every process of the session that is alive now, left-over background processes
    /// included; empty if nothing was ever started. Cancel-safe.
    pub async fn busy(&self) -> Result<Vec<Process>> {
        let remote = {
            let slot = self.inner.init.lock().await;
            match &*slot {
                Some(init) if init.is_alive() => init.remote(),
                _ => return Ok(Vec::new()),
            }
        };
        remote.list().await
    }

    /// Kills everything that runs, without asking it to end, and waits until it is gone.
    /// Commands that are started meanwhile begin after that. Does nothing if nothing was started.
    ///
    /// Cancel-safe: the killing goes on.
    pub async fn clear(&self) -> Result<()> {
        let slot = self.inner.init.lock().await;
        match &*slot {
            Some(init) if init.is_alive() => init.remote().clear().await,
            _ => Ok(()),
        }
    }

    /// Ends everything: SIGTERM to all processes, up to `grace` for them to leave, then
    /// SIGKILL; returns when the last one and the init itself are gone. The agent can be
    /// used again afterwards. Does nothing if nothing was started.
    ///
    /// Cancel-safe: if it is dropped half-way, what is left is killed at once.
    pub async fn shutdown(&self, grace: Duration) -> Result<()> {
        let init = self.inner.init.lock().await.take();
        self.inner.shutdowns.fetch_add(1, Ordering::Relaxed);
        match init {
            Some(init) => init.shutdown(grace).await,
            None => Ok(()),
        }
    }
}
