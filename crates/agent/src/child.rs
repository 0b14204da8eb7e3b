//! One command: how it is to be started ([`Spec`]), and the running thing ([`Child`])
//! with its standard streams. Dropping a child before its leader has exited kills its
//! whole tree; it must never outlive its handle unless it was detached.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::pin::Pin;
use std::task::{Context, Poll};

use rustix::fs::{Mode, OFlags};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, unlockpt};
use rustix::termios::{InputModes, OptionalActions, Winsize};
use tokio::io::AsyncWrite;

use crate::init::{Remote, Spawn, Spawned};
use crate::output::{Output, Reader, Source, Stream};
use crate::{Error, Result};

/// A command to start.
#[derive(Debug, Clone)]
pub struct Spec {
    /// A path, or a name to be looked up in the `PATH` of [`env`](Self::env) (if that has
    /// none: `/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin`). It is also
    /// `argv[0]`. A relative path starts at [`cwd`](Self::cwd).
    pub program: OsString,
    /// The arguments after `argv[0]`.
    pub args: Vec<OsString>,
    /// The complete environment; nothing is inherited. `DENIZEN_COMMAND` is added.
    pub env: BTreeMap<OsString, OsString>,
    /// The name of whom it runs as, with their groups, and `HOME`, `USER`, `LOGNAME` and `SHELL`
    /// where [`env`](Self::env) does not have them: the user of that name where the command runs.
    /// Otherwise it runs as its init does.
    pub user: Option<String>,
    /// The directory it starts in. With a user, `~` is their home, and a relative path starts
    /// there.
    pub cwd: PathBuf,
    /// What its standard streams are.
    pub stdio: Stdio,
}

impl Spec {
    /// A command without arguments and environment, with pipes for its output and
    /// nothing to read.
    pub fn new(program: impl Into<OsString>, cwd: impl Into<PathBuf>) -> Self {
        Self {
            program: program.into(),
            args: Vec::new(),
            env: BTreeMap::new(),
            user: None,
            cwd: cwd.into(),
            stdio: Stdio::Pipes { stdin: false },
        }
    }
}

/// What a command's standard streams are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stdio {
    /// A pipe each for stdout and stderr.
    Pipes {
        /// Whether stdin is a pipe too; otherwise it is `/dev/null`.
        stdin: bool,
    },
    /// One terminal for all three, the command's controlling terminal.
    Pty {
        /// Width in characters.
        columns: u16,
        /// Height in lines.
        rows: u16,
    },
}

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// It exited with this code (0 to 255).
    Code(i32),
    /// It was killed by this signal.
    Signal(i32),
}

impl Exit {
    /// Whether it exited with code 0.
    pub fn success(self) -> bool {
        self == Self::Code(0)
    }

    /// One number for both, as shells have it: 128 + the signal for a killed command.
    pub fn code(self) -> i32 {
        match self {
            Self::Code(code) => code,
            Self::Signal(signal) => 128 + signal,
        }
    }
}

/// Who gets a signal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// The command's first process only.
    Leader,
    /// The first process's process group.
    Group,
    /// Everything the command started, daemons included, once each.
    Tree,
}

/// A started command.
///
/// Dropped before its leader has exited, and not [detached](Child::detach), it is killed
/// with everything it started. Dropped after that, background processes that it left
/// stay: they are listed by [`Agent::busy`](crate::Agent::busy) and can write to their
/// standard output without anybody reading it.
#[derive(Debug)]
pub struct Child {
    spawned: Spawned,
    stdin: Option<Stdin>,
    stdout: Option<Reader>,
    stderr: Option<Reader>,
    /// The master end, for resizing only.
    terminal: Option<OwnedFd>,
}

impl Child {
    /// The process id of the command's first process, as the owner sees it.
    pub fn pid(&self) -> u32 {
        self.spawned.pid()
    }

    /// The number this session gave the command; [`Process::command`] refers to it.
    ///
    /// [`Process::command`]: crate::Process::command
    pub fn id(&self) -> u32 {
        self.spawned.id()
    }

    /// The writing end of its stdin, or of its terminal; once, and only if it has one.
    /// Dropping a pipe's end is end-of-file for the command; a terminal has no such
    /// thing (write `\x04` instead).
    pub fn take_stdin(&mut self) -> Option<Stdin> {
        self.stdin.take()
    }

    /// The reading end of its stdout, or of its terminal; once.
    pub fn take_stdout(&mut self) -> Option<Reader> {
        self.stdout.take()
    }

    /// The reading end of its stderr; once. A command on a terminal has none.
    pub fn take_stderr(&mut self) -> Option<Reader> {
        self.stderr.take()
    }

    /// Both outputs as one sequence of chunks that ends with the command; none if an
    /// output was taken before.
    pub fn take_output(&mut self) -> Option<Output> {
        let stdout = self.stdout.take()?;
        Some(Output::new(stdout, self.stderr.take(), self.spawned.exit_watch()))
    }

    /// Sets the size of its terminal; the foreground process group gets SIGWINCH.
    pub fn resize(&self, columns: u16, rows: u16) -> Result<()> {
        let terminal = self.terminal.as_ref().ok_or(Error::NotATerminal)?;
        set_size(terminal, columns, rows)?;
        self.spawned.resize(columns, rows)
    }

    /// Waits until the command's first process has exited. Its background processes may
    /// live on. Any number of callers may wait, any number of times. Cancel-safe.
    pub async fn wait(&self) -> Result<Exit> {
        self.spawned.wait().await
    }

    /// How the command ended, if it has.
    pub fn try_wait(&self) -> Result<Option<Exit>> {
        self.spawned.try_wait()
    }

    /// Sends a signal. It is on its way when this returns, not yet delivered.
    pub fn signal(&self, signal: i32, scope: Scope) -> Result<()> {
        self.spawned.signal(signal, scope)
    }

    /// Kills the command and everything it started that is still alive, and waits until
    /// all of it is gone. Works after the command's own end too.
    ///
    /// Cancel-safe: the killing goes on when nobody waits for it.
    pub async fn kill_tree(&self) -> Result<()> {
        self.spawned.kill_tree().await
    }

    /// From now on, dropping this handle kills nothing.
    pub fn detach(&mut self) {
        self.spawned.detach();
    }

    /// From now on, the command also goes on when this process dies or leaves the session to
    /// itself, where sessions go on then ([`Launch::linger`](crate::Launch::linger)): nothing
    /// reads what it prints from there on, but printing does not end it. To be called before its
    /// outputs are taken.
    pub fn outlive_owner(&self) -> Result<()> {
        let outputs = [&self.stdout, &self.stderr].into_iter().flatten();
        let outputs = outputs.filter_map(Reader::copy).collect::<io::Result<Vec<_>>>();
        self.spawned.keep(outputs.map_err(Error::io("cannot copy a descriptor"))?);
        Ok(())
    }
}

/// The writing end of a command's stdin or terminal. Writes wait while the command does
/// not read.
#[derive(Debug)]
pub struct Stdin {
    source: Source,
}

impl AsyncWrite for Stdin {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.source.poll_io(cx, true, |fd| rustix::io::write(fd, bytes))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    /// Does nothing: only dropping it closes it.
    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

/// Starts a command through `remote`. Cancel-safe: unfinished, it leaves no process.
pub(crate) async fn start(remote: &Remote, spec: Spec) -> Result<Child> {
    let Spec { program, args, env, user, cwd, stdio } = spec;
    let mut argv = Vec::with_capacity(1 + args.len());
    argv.push(program);
    argv.extend(args);
    let ends = match stdio {
        Stdio::Pipes { stdin } => pipes(remote, stdin)?,
        Stdio::Pty { columns, rows } => terminal(remote, columns, rows).await?,
    };
    let [stdin, stdout, stderr] = ends.theirs;
    let spawned = remote
        .spawn(Spawn {
            argv,
            env: env.into_iter().collect(),
            user,
            cwd,
            stdin,
            stdout,
            stderr,
            controlling_terminal: matches!(stdio, Stdio::Pty { .. }),
        })
        .await?;
    Ok(Child {
        spawned,
        stdin: ends.stdin,
        stdout: Some(ends.stdout),
        stderr: ends.stderr,
        terminal: ends.terminal,
    })
}

/// The command's three descriptors and our ends of them.
struct Ends {
    theirs: [OwnedFd; 3],
    stdin: Option<Stdin>,
    stdout: Reader,
    stderr: Option<Reader>,
    terminal: Option<OwnedFd>,
}

fn pipes(remote: &Remote, stdin: bool) -> Result<Ends> {
    // Only our ends must not block; the flag belongs to an end, not to the pipe.
    let reading = |stream| -> Result<(OwnedFd, Reader)> {
        let (ours, theirs) = pipe()?;
        let source = Source::new(ours)?;
        Ok((theirs, Reader::new(source, stream, remote.clone())))
    };
    let (their_stdin, stdin) = if stdin {
        let (theirs, ours) = pipe()?;
        let source = Source::new(ours)?;
        (theirs, Some(Stdin { source }))
    } else {
        let null = rustix::fs::open("/dev/null", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
            .map_err(Error::io("cannot open /dev/null"))?;
        (null, None)
    };
    let (their_stdout, stdout) = reading(Stream::Stdout)?;
    let (their_stderr, stderr) = reading(Stream::Stderr)?;
    Ok(Ends {
        theirs: [their_stdin, their_stdout, their_stderr],
        stdin,
        stdout,
        stderr: Some(stderr),
        terminal: None,
    })
}

/// A pipe that its command can open again by its name in `/dev`, whoever it runs as. Nobody else
/// has a name for it.
fn pipe() -> Result<(OwnedFd, OwnedFd)> {
    let what = "cannot make a pipe";
    let ends = pipe_with(PipeFlags::CLOEXEC).map_err(Error::io(what))?;
    rustix::fs::fchmod(&ends.0, Mode::from_raw_mode(0o666)).map_err(Error::io(what))?;
    Ok(ends)
}

async fn terminal(remote: &Remote, columns: u16, rows: u16) -> Result<Ends> {
    let what = "cannot make a terminal";
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let master = remote.terminal().await?;
    grantpt(&master).map_err(Error::io(what))?;
    unlockpt(&master).map_err(Error::io(what))?;
    let slave = ioctl_tiocgptpeer(&master, flags).map_err(Error::io(what))?;
    // Without it, erasing a character in a line being typed removes one byte of it.
    let mut modes = rustix::termios::tcgetattr(&slave).map_err(Error::io(what))?;
    modes.input_modes |= InputModes::IUTF8;
    rustix::termios::tcsetattr(&slave, OptionalActions::Now, &modes).map_err(Error::io(what))?;
    set_size(&master, columns, rows)?;
    let copy = |fd: &OwnedFd| fd.try_clone().map_err(Error::io(what));
    Ok(Ends {
        theirs: [copy(&slave)?, copy(&slave)?, slave],
        stdin: Some(Stdin { source: Source::new(copy(&master)?)? }),
        stdout: Reader::new(Source::new(copy(&master)?)?, Stream::Pty, remote.clone()),
        stderr: None,
        terminal: Some(master),
    })
}

fn set_size(terminal: &OwnedFd, columns: u16, rows: u16) -> Result<()> {
    let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    rustix::termios::tcsetwinsize(terminal, size).map_err(Error::io("cannot resize the terminal"))
}
