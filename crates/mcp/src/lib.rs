//! An MCP server over a denizen daemon: sessions' commands and files, and sessions themselves, as
//! tools for a model; files as resources too. One handler ([`Server`]) serves both standard input
//! ([`stdio`]) and HTTP ([`Http`]), and does all of its work through a client of the daemon
//! ([`Door`]), so that it can do nothing that whoever asks could not do by `/v1`.
//!
//! It must never act with other rights than those of the request it answers, nor let one caller
//! see what belongs to another, and whatever a command prints, an answer has a bound.

mod call;
mod commands;
mod failure;
mod files;
mod forward;
mod http;
mod output;
mod resources;
mod server;
mod sessions;
mod tools;

pub use call::{Door, Ports};
pub use http::Http;
pub use output::Outputs;
pub use server::{Server, StdioError, Wake, stdio};
pub use tools::list as tools;
