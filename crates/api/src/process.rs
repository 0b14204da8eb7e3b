//! Commands in sessions.

use serde::{Deserialize, Serialize};
#[cfg(feature = "openapi")]
use utoipa::ToSchema;

use crate::Environment;

/// What is to be run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
#[serde(rename_all = "snake_case")]
pub enum Command {
    /// A program and its arguments.
    Command(Vec<String>),
    /// A line for the session's shell.
    Shell(String),
}

/// A command to be started.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
pub struct NewProcess {
    /// `command` or `shell`.
    #[serde(flatten)]
    pub what: Command,
    /// Added to the session's environment.
    #[serde(default, skip_serializing_if = "Environment::is_empty")]
    pub env: Environment,
    /// Where it starts; relative to the session's volume, which it is if none is named.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cwd: Option<String>,
    /// A name to find it by.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tag: Option<String>,
    /// A terminal of this size instead of pipes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub terminal: Option<Size>,
    /// Whether it gets a standard input that can be written to.
    #[serde(default)]
    pub stdin: bool,
    /// Killed with all it started after so many seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_seconds: Option<u64>,
    /// It goes on by itself, with its output logged; the answer only says that it runs.
    #[serde(default)]
    pub detach: bool,
}

/// A terminal's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
pub struct Size {
    /// Characters in a line.
    #[cfg_attr(feature = "openapi", schema(minimum = 1))]
    pub columns: u16,
    /// Lines.
    #[cfg_attr(feature = "openapi", schema(minimum = 1))]
    pub rows: u16,
}

/// That a command runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
pub struct Started {
    /// Its number, within the session.
    pub pid: u32,
    /// The name it was given.
    pub tag: Option<String>,
}

/// A command that was started through the daemon.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
pub struct Process {
    /// Its number, within the session.
    pub pid: u32,
    /// The name it was given.
    pub tag: Option<String>,
    /// The program and its arguments.
    pub command: Vec<String>,
    /// Where it was started, if that was said.
    pub cwd: Option<String>,
    /// Whether it has a terminal.
    pub terminal: bool,
    /// Whether it ends with the request that started it.
    pub foreground: bool,
    /// When it was started.
    pub started_at: f64,
    /// How it ended, if it has. Such are told of for a while.
    pub ended: Option<Ended>,
}

/// The commands of a session.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
pub struct Processes {
    /// By their numbers.
    pub processes: Vec<Process>,
}

/// How a command ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
pub struct Ended {
    /// Its exit code; 128 and the signal's number if a signal ended it.
    pub code: i32,
    /// The signal that ended it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signal: Option<i32>,
    /// Why, if there is more to say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// A piece of what a command has printed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
pub struct Output {
    /// Where to.
    pub stream: OutputStream,
    /// How many bytes it had printed before, on all of them.
    pub offset: u64,
    /// In base64 (RFC 4648).
    pub bytes: String,
}

/// Where something was printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
#[serde(rename_all = "snake_case")]
pub enum OutputStream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
    /// A terminal.
    Terminal,
}

/// A signal to be sent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
#[serde(deny_unknown_fields)]
pub struct Signal {
    /// Its number (signal(7)). 9 always goes to all that the command has started.
    #[cfg_attr(feature = "openapi", schema(minimum = 1, maximum = 64))]
    pub signal: i32,
}
