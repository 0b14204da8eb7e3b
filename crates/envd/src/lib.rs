//! The protocol that is spoken inside a session, from the program through the daemon to the
//! agent: processes and files over Connect. It is envd's, so existing clients know it.
//!
//! Only what travels is defined here, generated from `proto/`; what it does is the agent's.

pub mod folder;

#[allow(missing_docs, clippy::all, clippy::pedantic, clippy::unwrap_used, clippy::expect_used)]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/envd.rs"));
}

pub use generated::{filesystem, process};

/// Request header: when this response stream is dropped, the command and all it started is
/// killed.
pub const FOREGROUND: &str = "denizen-foreground";
/// Request header: the command outlives the stream, and its output is kept in a log.
pub const DETACH: &str = "denizen-detach";
/// Response header of `/files`: the file's permission bits, as a decimal number.
pub const MODE: &str = "denizen-mode";
