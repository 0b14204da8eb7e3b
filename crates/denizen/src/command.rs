//! Commands in a session: built on a guard, run by the session's agent.
//!
//! A command's standard streams are bytes. Nothing is read ahead: a command whose output
//! nobody takes waits. A command must never outlive what stands for it here: dropping the
//! future or the [`Execution`] kills all that it started.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::{Arc, Weak};
use std::time::Duration;

use denizen_agent::{Chunk, Spec, Stdio, Stream};
use tokio::io::AsyncWriteExt;

use crate::error::{Error, Result};
use crate::manager::VmExecutionGuard;
use crate::pool::{Mark, Place, Pool};

/// Most bytes of each stream that [`Command::output`] keeps unless told otherwise.
const OUTPUT_LIMIT: usize = 16 * 1024 * 1024;

/// A command that has not been started.
#[derive(Debug)]
#[must_use = "a command does nothing until it is run"]
pub struct Command<'g> {
    guard: &'g VmExecutionGuard,
    spec: Spec,
    stdin: Option<Vec<u8>>,
    timeout: Option<Duration>,
    output_limit: usize,
}

/// How a command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// By itself, with this status.
    Code(i32),
    /// By this signal.
    Signal(i32),
    /// It ran into its timeout, and all it had started was killed.
    TimedOut,
    /// It was killed because the session's memory had run out.
    OutOfMemory,
    /// It was killed because the session was over its disk limit, or wrote a file larger than
    /// that.
    OutOfDisk,
}

impl Exit {
    /// Whether it ended by itself with status 0.
    pub fn success(self) -> bool {
        self == Self::Code(0)
    }
}

/// What a command that has ended has left.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Output {
    /// How it ended.
    pub exit: Exit,
    /// Its standard output, up to the limit.
    pub stdout: Vec<u8>,
    /// Its standard error, up to the limit.
    pub stderr: Vec<u8>,
    /// Bytes of standard output beyond the limit, which are not in `stdout`.
    pub stdout_cut: u64,
    /// Bytes of standard error beyond the limit, which are not in `stderr`.
    pub stderr_cut: u64,
}

impl<'g> Command<'g> {
    pub(crate) fn new(guard: &'g VmExecutionGuard, program: OsString, args: Vec<OsString>) -> Self {
        let env = guard.base_environment();
        let spec = Spec {
            program,
            args,
            env: env.into_iter().map(|(name, value)| (name.into(), value.into())).collect(),
            user: None,
            cwd: guard.workdir().to_owned(),
            stdio: Stdio::Pipes { stdin: false },
        };
        Self { guard, spec, stdin: None, timeout: None, output_limit: OUTPUT_LIMIT }
    }

    /// Adds an argument: of the program, or `$0`, `$1` … of a shell line.
    pub fn arg(mut self, arg: impl Into<OsString>) -> Self {
        self.spec.args.push(arg.into());
        self
    }

    /// Adds arguments.
    pub fn args(mut self, args: impl IntoIterator<Item = impl Into<OsString>>) -> Self {
        self.spec.args.extend(args.into_iter().map(Into::into));
        self
    }

    /// Sets a variable.
    pub fn env(mut self, name: impl Into<OsString>, value: impl Into<OsString>) -> Self {
        self.spec.env.insert(name.into(), value.into());
        self
    }

    /// Passes on a variable of this process, if it is set.
    pub fn inherit_env(self, name: &str) -> Self {
        match std::env::var_os(name) {
            Some(value) => self.env(name, value),
            None => self,
        }
    }

    /// Sets where it starts; relative to the volume. Default: the volume.
    pub fn current_dir(mut self, folder: impl Into<PathBuf>) -> Self {
        self.spec.cwd = self.guard.workdir().join(folder.into());
        self
    }

    /// What it can read from its standard input. Default: nothing. An [`Execution`] can be
    /// written to instead.
    pub fn stdin(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.stdin = Some(bytes.into());
        self
    }

    /// How long it may take; then everything it started is killed. Default: for ever.
    pub fn timeout(mut self, limit: Duration) -> Self {
        self.timeout = Some(limit);
        self
    }

    /// How many bytes of each stream [`Command::output`] keeps; the rest is read, counted and
    /// thrown away. Default: 16 MiB.
    pub fn output_limit(mut self, bytes: usize) -> Self {
        self.output_limit = bytes;
        self
    }

    /// Runs it to its end and collects its output. Processes that it leaves in the background
    /// go on, and are not waited for even if they hold its output open.
    ///
    /// Cancel-safe: dropped, everything it started is killed.
    ///
    /// # Errors
    /// [`Error::Agent`] if it could not be started; [`Error::VolumeMissing`] if the session's
    /// files are gone. How it ended is no error: see [`Output::exit`].
    pub async fn output(mut self) -> Result<Output> {
        let (timeout, limit) = (self.timeout.take(), self.output_limit);
        let input = self.stdin.take();
        self.spec.stdio = Stdio::Pipes { stdin: input.is_some() };
        let mut execution = self.spawn().await?;
        let mut output = Output {
            exit: Exit::TimedOut,
            stdout: Vec::new(),
            stderr: Vec::new(),
            stdout_cut: 0,
            stderr_cut: 0,
        };
        let collect = async {
            let stdin = execution.child.take_stdin();
            let feed = async {
                if let (Some(mut stdin), Some(input)) = (stdin, input) {
                    // A command that does not read all of it has broken no promise.
                    let _ = stdin.write_all(&input).await;
                }
            };
            let read = async {
                while let Some(chunk) = execution.output.next().await? {
                    output.take(&chunk, limit);
                }
                Ok::<_, Error>(())
            };
            let (mut feed, mut read) = (std::pin::pin!(feed), std::pin::pin!(read));
            let mut fed = false;
            loop {
                tokio::select! {
                    () = &mut feed, if !fed => fed = true,
                    done = &mut read => break done?,
                }
            }
            Ok::<_, Error>(execution.child.wait().await?)
        };
        let ended = match timeout {
            None => Some(collect.await?),
            Some(limit) => tokio::time::timeout(limit, collect).await.ok().transpose()?,
        };
        match ended {
            Some(exit) => output.exit = execution.limits.explain(exit),
            None => execution.child.kill_tree().await?,
        }
        Ok(output)
    }

    /// Starts it, to be followed while it runs. A timeout set on the command does not apply.
    ///
    /// Cancel-safe: dropped before it is done, nothing is left running.
    ///
    /// # Errors
    /// As [`Command::output`].
    pub async fn spawn(self) -> Result<Execution<'g>> {
        let guard = self.guard;
        let missing = |guard: &VmExecutionGuard| Error::VolumeMissing {
            session: guard.session_id(),
            path: guard.volume().to_owned(),
            backup: None,
        };
        let limits = guard.limit_watch();
        let mut child = match guard.agent()?.spawn(self.spec).await {
            Ok(child) => child,
            // Whatever it was that failed without them.
            Err(_) if !guard.volume().exists() => return Err(missing(guard)),
            Err(error) => return Err(error.into()),
        };
        let output = child.take_output();
        let output = output.ok_or_else(|| Error::Task("a new command has no output".to_owned()))?;
        Ok(Execution { child, output, limits, _guard: guard })
    }

    /// Gives it a pipe as standard input, to be written to through [`Execution::stdin`].
    pub fn piped_stdin(mut self) -> Self {
        self.spec.stdio = Stdio::Pipes { stdin: true };
        self
    }

    /// Sets all variables at once, beside those it has.
    pub fn envs(mut self, vars: BTreeMap<OsString, OsString>) -> Self {
        self.spec.env.extend(vars);
        self
    }
}

impl Output {
    fn take(&mut self, chunk: &Chunk, limit: usize) {
        let (kept, cut) = match chunk.stream {
            Stream::Stderr => (&mut self.stderr, &mut self.stderr_cut),
            Stream::Stdout | Stream::Pty => (&mut self.stdout, &mut self.stdout_cut),
        };
        let room = limit.saturating_sub(kept.len()).min(chunk.bytes.len());
        kept.extend_from_slice(&chunk.bytes[..room]);
        *cut += (chunk.bytes.len() - room) as u64;
    }
}

/// Tells of what began when this was made whether a limit of its session has ended it.
#[derive(Clone, Debug)]
pub struct LimitWatch {
    pool: Weak<Pool>,
    place: Arc<Place>,
    disk: Mark,
}

/// A limit of a session that has ended a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Limit {
    /// Of memory.
    Memory,
    /// Of the disk.
    Disk {
        /// Bytes that the session may have.
        bytes: u64,
    },
}

impl std::fmt::Display for Limit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Memory => f.write_str(
                "the session's memory ran out: let it do less at a time, or raise \
                 `limits.memory_bytes`",
            ),
            #[allow(clippy::cast_precision_loss)] // One digit is shown.
            Self::Disk { bytes } => write!(
                f,
                "the session is over its disk limit of {:.1} MiB: delete files in it, or raise \
                 `limits.disk_bytes`",
                *bytes as f64 / f64::from(1 << 20),
            ),
        }
    }
}

impl LimitWatch {
    pub(crate) fn new(pool: &Arc<Pool>, place: &Arc<Place>) -> Self {
        Self { pool: Arc::downgrade(pool), place: place.clone(), disk: place.disk_mark() }
    }

    /// The limit that has ended a command that ended like this, if it was one. To be asked once
    /// for each command.
    pub fn reached(&self, exit: denizen_agent::Exit) -> Option<Limit> {
        const SIGKILL: i32 = 9;
        const SIGXFSZ: i32 = 25;
        let pool = self.pool.upgrade()?;
        let disk = || Some(Limit::Disk { bytes: pool.disk_limit()? });
        match exit {
            denizen_agent::Exit::Signal(SIGKILL) if self.place.disk_ended_since(self.disk) => {
                disk()
            }
            denizen_agent::Exit::Signal(SIGKILL) => {
                pool.ran_out_of_memory(&self.place).then_some(Limit::Memory)
            }
            denizen_agent::Exit::Signal(SIGXFSZ) => disk(),
            _ => None,
        }
    }

    fn explain(&self, exit: denizen_agent::Exit) -> Exit {
        match (self.reached(exit), exit) {
            (Some(Limit::Memory), _) => Exit::OutOfMemory,
            (Some(Limit::Disk { .. }), _) => Exit::OutOfDisk,
            (None, denizen_agent::Exit::Code(code)) => Exit::Code(code),
            (None, denizen_agent::Exit::Signal(signal)) => Exit::Signal(signal),
        }
    }
}

/// A command that runs. Dropped before the end, it is killed with all it started.
#[derive(Debug)]
pub struct Execution<'g> {
    child: denizen_agent::Child,
    output: denizen_agent::Output,
    limits: LimitWatch,
    /// The session stays ours for as long as this lives.
    _guard: &'g VmExecutionGuard,
}

impl Execution<'_> {
    /// Its process id on the host.
    pub fn pid(&self) -> u32 {
        self.child.pid()
    }

    /// The next piece of output, in the order it was read; none at the end of the command.
    /// Cancel-safe: a dropped call loses nothing.
    ///
    /// # Errors
    /// [`Error::Agent`] if the session's init has died.
    pub async fn next(&mut self) -> Result<Option<Chunk>> {
        Ok(self.output.next().await?)
    }

    /// The writing end of its standard input, once, if it was given one.
    pub fn stdin(&mut self) -> Option<impl tokio::io::AsyncWrite + Send + Unpin + 'static> {
        self.child.take_stdin()
    }

    /// Waits for its end. Output that is not taken may keep it from ending. Cancel-safe.
    ///
    /// # Errors
    /// [`Error::Agent`] if the session's init has died.
    pub async fn wait(&self) -> Result<Exit> {
        Ok(self.limits.explain(self.child.wait().await?))
    }

    /// Sends a signal to its process group.
    ///
    /// # Errors
    /// [`Error::Agent`] if it has ended, or for a number that is no signal.
    pub fn signal(&self, signal: i32) -> Result<()> {
        Ok(self.child.signal(signal, denizen_agent::Scope::Group)?)
    }

    /// Kills it and everything it started, daemons included, and waits until all is gone.
    /// Cancel-safe: the killing goes on.
    ///
    /// # Errors
    /// [`Error::Agent`] if something of it could not be killed.
    pub async fn kill(&self) -> Result<()> {
        Ok(self.child.kill_tree().await?)
    }
}
