//! denizen's part inside an instance: it starts processes, follows them and ends them.
//!
//! Under `host` isolation it runs in the embedding program and drives one small process,
//! `denizen-init`, which is the parent of everything the session runs ([`init`]). A
//! [`Child`] is one command with its standard streams ([`child`]), read through
//! [`Output`] or plain [`Reader`]s ([`output`]).
//!
//! What this crate must never do: wait for a process that it did not start itself, leave
//! a process behind when it is dropped, or kill one that is not the session's.
//!
//! ```no_run
//! # async fn example() -> Result<(), denizen_agent::Error> {
//! use denizen_agent::{Agent, Spec};
//!
//! let agent = Agent::new();
//! let mut spec = Spec::new("sh", "/tmp");
//! spec.args = vec!["-c".into(), "echo hello".into()];
//! let mut child = agent.spawn(spec).await?;
//! if let Some(mut output) = child.take_output() {
//!     while let Some(chunk) = output.next().await? {
//!         println!("{:?}: {:?}", chunk.stream, chunk.bytes);
//!     }
//! }
//! println!("{:?}", child.wait().await?);
//! # Ok(())
//! # }
//! ```

mod agent;
pub mod child;
#[cfg(feature = "envd")]
pub mod envd;
mod error;
#[cfg(feature = "envd")]
pub mod files;
pub mod init;
mod message;
pub mod output;
mod program;
mod sudo;
mod sweep;
mod tree;
#[cfg(feature = "envd")]
mod watch;

pub use agent::Agent;
pub use child::{Child, Exit, Scope, Spec, Stdin, Stdio};
pub use error::Error;
pub use init::{Door, Enter, Launch, Linger, Machine, MachineStarted, Process, Spawn, Spawned};
pub use output::{Chunk, Output, Reader, Stream};
pub use sudo::Sudo;
pub use sweep::{recorded, sweep};
pub use tree::descendants;

/// The result of everything in this crate that can fail.
pub type Result<T, E = Error> = std::result::Result<T, E>;
