//! What can go wrong when processes are started and followed, with what it happened to.
//! An error must never hide which program, folder or signal it is about.

use std::ffi::OsString;
use std::io;
use std::path::PathBuf;

/// A failure of the process layer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No such program: the path does not exist, or no folder of `PATH` has it.
    #[error("program {program:?} was not found; check its name and the PATH it runs with")]
    ProgramNotFound {
        /// The program as it was asked for.
        program: OsString,
    },
    /// The program is a directory.
    #[error("{program:?} is a directory, not a program")]
    ProgramIsDirectory {
        /// The program as it was asked for.
        program: OsString,
    },
    /// The program is there, but may not be executed.
    #[error("{program:?} is not executable; `chmod +x` it or check who may reach it")]
    NotExecutable {
        /// The program as it was asked for.
        program: OsString,
    },
    /// The program is there, but its `#!` interpreter or its dynamic loader is not.
    #[error("{program:?} needs an interpreter or loader that does not exist")]
    InterpreterNotFound {
        /// The program as it was asked for.
        program: OsString,
    },
    /// The working directory cannot be entered.
    #[error("cannot enter the working directory {cwd:?}: {source}")]
    WorkingDirectory {
        /// The directory.
        cwd: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// There is no user of that name where the command was to run.
    #[error("invalid username: '{user}'")]
    UnknownUser {
        /// The name.
        user: String,
    },
    /// The command cannot be run as that user.
    #[error("nothing can be run as the user {user:?} here: {source}")]
    User {
        /// The name.
        user: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// Arguments and environment are bigger than the kernel takes (`E2BIG`, execve(2)).
    #[error("the arguments and environment of {program:?} are too big: {bytes} bytes")]
    TooBig {
        /// The program as it was asked for.
        program: OsString,
        /// The size of all argument and environment strings.
        bytes: usize,
    },
    /// Nothing listens on a port of the session.
    #[error("port {port} of the session cannot be reached: {source}")]
    Port {
        /// The port.
        port: u16,
        /// What the kernel said.
        source: io::Error,
    },
    /// The sandbox could not be made.
    #[error("cannot make the sandbox: {step}: {source}")]
    Enter {
        /// What was being done.
        step: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// The kernel refused to start the program for another reason (no memory, too many
    /// processes, not a program format it knows, …).
    #[error("cannot start {program:?}: {source}")]
    Start {
        /// The program as it was asked for.
        program: OsString,
        /// What the kernel said.
        source: io::Error,
    },
    /// An argument, a variable, the program or the directory cannot be passed to a
    /// program: it holds a zero byte, or a variable's name is empty or holds `=`.
    #[error("{what} cannot be passed to a program: {value:?}")]
    BadString {
        /// Which kind of string it is.
        what: &'static str,
        /// The string.
        value: OsString,
    },
    /// Not a signal number (1 to 64).
    #[error("{0} is not a signal number; use 1 to 64")]
    BadSignal(i32),
    /// The command has already ended, so it cannot be signalled.
    #[error("the command has already ended")]
    Ended,
    /// The command was not started on a terminal, so it has no size.
    #[error("the command does not run on a terminal")]
    NotATerminal,
    /// The session's first process cannot be started.
    #[error("cannot start the session's first process (denizen-init): {source}")]
    Launch {
        /// What the kernel said.
        source: io::Error,
    },
    /// No instance that was left to itself can be found again.
    #[error("nothing of the session runs on that could be found again: {source}")]
    NotFound {
        /// What stood in the way.
        source: io::Error,
    },
    /// The session's first process died, and everything it ran was killed. The next
    /// command starts a new one.
    #[error("the session's first process (denizen-init) has died, and its commands with it")]
    InitLost,
    /// The instance is being shut down and starts nothing more.
    #[error("the instance is shutting down")]
    ShuttingDown,
    /// Processes that this user may not signal are still there.
    #[error("{count} processes belong to another user and could not be killed")]
    Survivors {
        /// How many.
        count: u32,
    },
    /// A system call on our own end failed.
    #[error("{what}: {source}")]
    Io {
        /// What was being done.
        what: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
}

impl Error {
    /// The exit code that env(1) and shells give for this failure: 127 if the program is
    /// not there, 126 if it cannot be executed, 125 for everything else.
    pub fn exit_code(&self) -> i32 {
        match self {
            Self::ProgramNotFound { .. } => 127,
            Self::ProgramIsDirectory { .. }
            | Self::NotExecutable { .. }
            | Self::InterpreterNotFound { .. }
            | Self::TooBig { .. }
            | Self::Start { .. } => 126,
            _ => 125,
        }
    }

    /// For `map_err`: adds what was being done to what the kernel said.
    pub(crate) fn io<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> Self {
        move |source| Self::Io { what, source: source.into() }
    }
}
