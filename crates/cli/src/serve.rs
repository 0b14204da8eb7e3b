//! `denizen serve`: the daemon, from its settings to its end, and what signals have it do: SIGTERM
//! and SIGINT end it, SIGHUP has it read its configuration anew. A configuration that is no good
//! must never take the place of one that works.

use std::io::Write;
use std::path::Path;
use std::pin::pin;
use std::sync::{Arc, Weak};
use std::time::Duration;

use clap::Args;
use denizen::MicroVmManager;
use denizen_server::{Control, Daemon, Ending, Handed, KeysError, Place, ServeError};
use futures::stream;
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::config::{Settings, Sources};
use crate::range::Range;
use crate::{Failure, Result, client, log, notify, telemetry};

/// Run the daemon in the foreground.
#[derive(Args, Clone, Copy)]
pub struct Serve {
    /// Leave after this many seconds in which nothing ran
    #[arg(long, value_name = "SECONDS")]
    idle_exit: Option<u64>,
    /// Say on standard output when the daemon can be reached, then be silent
    #[arg(long, hide = true)]
    background: bool,
}

fn failed(error: impl std::fmt::Display) -> Failure {
    Failure::new(error.to_string())
}

impl Serve {
    /// Says a word to who has started the daemon in the background.
    fn tell(self, word: &str) {
        if self.background {
            // Whoever started it may be gone: that is no reason to end.
            let _ = writeln!(std::io::stdout(), "{word}");
        }
    }
}

/// Serves until a signal, a client or a time without work ends it.
pub async fn run(
    serve: Serve,
    sources: Sources,
    settings: Settings,
    range: Range,
    handed: Handed,
) -> Result<()> {
    let (_telemetry, filter) = telemetry::begin(settings.log_format, &settings.log)?;
    match &range {
        Range::NotNeeded => {}
        Range::Has { first, count } => {
            tracing::info!(first, count, "sandboxes have a range of user ids");
        }
        Range::Lacks(lack) => tracing::info!(
            why = lack.what(),
            "sandboxes have one user id; `denizen doctor` tells how they get more"
        ),
    }
    settings.pool.validate().map_err(failed)?;
    if serve.background {
        tokio::spawn(log::keep_short(crate::log_file(&settings)));
    }
    // From here on a signal is never lost, nor does it end the process in its own way.
    let [terminate, interrupt, hangup] =
        [SignalKind::terminate(), SignalKind::interrupt(), SignalKind::hangup()]
            .map(|kind| signal(kind).map_err(failed));
    let (terminate, interrupt, hangup) = (terminate?, interrupt?, hangup?);
    let pool = open(serve, &settings)?;
    let place = Place { socket: settings.socket.clone(), state: settings.state.clone(), handed };
    let habits = settings.habits(serve.idle_exit.map(Duration::from_secs));
    let daemon = match Daemon::bind(pool.clone(), place, settings.front()?, habits) {
        Ok(daemon) => daemon,
        Err(error) => {
            if let ServeError::Taken { .. } | ServeError::Keys(KeysError::Taken { .. }) = error {
                serve.tell(client::TAKEN);
            }
            // What it has found running is no worse for it.
            pool.leave().await.map_err(failed)?;
            return Err(failed(error));
        }
    };
    let socket = daemon.socket().unwrap_or_else(|| settings.socket.clone());
    let changes = Changes {
        sources,
        settings,
        control: daemon.control(),
        pool: Arc::downgrade(&pool),
        filter,
        is_service: !serve.background,
        status: format!("Serves on {}", socket.display()),
    };
    drop(pool);
    serve.tell(client::READY);
    // One in the background is nobody's service, whatever its caller is.
    let is_service = !serve.background;
    if is_service {
        changes.tell_where(&socket, &daemon);
        notify::ready(&changes.status);
        tokio::spawn(notify::watched(socket));
    }
    let reloads = tokio::spawn(changes.follow(hangup));
    let endings = stream::unfold((terminate, interrupt), |(mut terminate, mut interrupt)| async {
        let ending = tokio::select! {
            // What a service manager sends, also when it starts the daemon anew.
            _ = terminate.recv() => Ending::Leave,
            // Somebody at a terminal.
            _ = interrupt.recv() => Ending::Stop,
        };
        Some((ending, (terminate, interrupt)))
    });
    let endings = pin!(endings);
    let served = daemon.serve(endings, move || {
        reloads.abort();
        if is_service {
            notify::stopping();
        }
    });
    served.await.map_err(failed)
}

/// Opens the pool.
fn open(serve: Serve, settings: &Settings) -> Result<Arc<MicroVmManager>> {
    let settings = settings.clone();
    let mut builder = MicroVmManager::builder((&settings.pool).into());
    builder = builder.network(settings.network());
    if let Some(image) = settings.image {
        builder = builder.image(image);
    }
    if let Some(kernel) = settings.kernel {
        builder = builder.kernel(kernel, settings.kernel_modules);
    }
    builder
        .agent_program(std::env::current_exe().map_err(failed)?)
        .cache(settings.cache)
        .isolation(settings.isolation)
        .sleep(settings.sleep)
        .background_is_use(settings.background_is_use)
        .limits(settings.limits)
        .linger(settings.linger)
        .acquire_timeout(settings.acquire_timeout)
        .spares(settings.spares)
        .backup_format(settings.backup_format)
        .backup_key(settings.backup_key)
        .retention(settings.retention)
        .build()
        .map_err(|error| {
            use denizen::{Error, RegistryError};
            if let Error::Registry(RegistryError::Locked { .. }) = error.kind() {
                serve.tell(client::TAKEN);
            }
            failed(error)
        })
}

/// What SIGHUP changes.
struct Changes {
    sources: Sources,
    settings: Settings,
    control: Control,
    pool: Weak<MicroVmManager>,
    filter: telemetry::Filter,
    is_service: bool,
    /// What the service manager shows of the daemon.
    status: String,
}

impl Changes {
    fn tell_where(&self, socket: &Path, daemon: &Daemon) {
        eprintln!("denizen listens on {}", socket.display());
        for address in daemon.addresses() {
            eprintln!("denizen listens on {address}");
        }
        if socket != self.settings.socket {
            tracing::warn!(
                socket = %self.settings.socket.display(),
                "clients look for the daemon elsewhere: set `socket` to where it listens"
            );
        }
    }

    /// Reads the configuration anew with each signal, for ever.
    async fn follow(mut self, mut hangup: Signal) {
        while hangup.recv().await.is_some() {
            if self.is_service {
                notify::reloading();
            }
            let status = match self.reload().await {
                Ok(()) => self.status.clone(),
                Err(error) => {
                    // What is wrong with a file is shown in several lines.
                    let error = error.to_string();
                    let error = error.split_whitespace().collect::<Vec<_>>().join(" ");
                    tracing::error!(error, "the new configuration is no good: the old one stays");
                    format!("{}; the new configuration is no good: {error}", self.status)
                }
            };
            if self.is_service {
                notify::ready(&status);
            }
        }
    }

    /// Takes over what has changed: all of it, or nothing.
    async fn reload(&mut self) -> Result<()> {
        let sources = self.sources.clone();
        let load = move || {
            let new = sources.load()?;
            // As at a start, so that what would fail there fails here.
            new.pool.validate().map_err(failed)?;
            new.front()?;
            telemetry::parsed(&new.log)?;
            Ok(new)
        };
        let new: Result<Settings> = tokio::task::spawn_blocking(load).await.map_err(failed)?;
        let mut settings = self.settings.clone();
        let renewed = settings.renew(&new?)?;
        let filter = telemetry::parsed(&settings.log)?;
        // The one thing that can still be refused comes first.
        self.control.set_front(settings.front()?).map_err(failed)?;
        (self.filter)(filter).map_err(failed)?;
        if let Some(pool) = self.pool.upgrade() {
            pool.set_retention(settings.retention).map_err(failed)?;
            pool.set_acquire_timeout(Some(settings.acquire_timeout)).map_err(failed)?;
        }
        self.settings = settings;
        tracing::info!(changed = renewed.taken.join(", "), "the configuration was read");
        if !renewed.not_taken.is_empty() {
            let settings = renewed.not_taken.join(", ");
            tracing::warn!(settings, "these settings hold from the next start of the daemon on");
        }
        Ok(())
    }
}
