//! A persistent, isolated computer for every agent session.
//!
//! A program that runs AI agents gives each of them a *session*: a place to run commands that
//! is still there next time. A [`MicroVmManager`] keeps a pool of them under one folder. It
//! makes a session when it is first asked for, stops it when it is idle, backs it up, deletes
//! its local files, and brings it back on the next call as if nothing had happened.
//!
//! ```
//! use denizen::{MicroVmManager, VmPoolConfig, VmPoolRuntimeConfig};
//! use uuid::Uuid;
//!
//! # #[tokio::main]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let folder = tempfile::tempdir()?;
//! # let volume_root = folder.path().join("pool");
//! let config = VmPoolConfig { enabled: true, volume_root, ..VmPoolConfig::default() };
//! config.validate()?;
//! let pool = MicroVmManager::new(VmPoolRuntimeConfig::from(&config))?;
//!
//! let session = Uuid::new_v4();
//! {
//!     let guard = pool.acquire(session).await?;
//!     guard.command("echo hello >> notes").output().await?;
//! } // Dropping the guard gives the session back.
//! let guard = pool.acquire(session).await?;
//! let output = guard.command("cat notes").output().await?;
//! assert_eq!(output.stdout, b"hello\n");
//! # drop(guard);
//! # pool.shutdown().await?;
//! # Ok(())
//! # }
//! ```
//!
//! Everything about *when* something may happen to a session is decided in one place, a pure
//! state machine; see `ARCHITECTURE.md` in the repository for the map.

mod backup;
mod bootstrap;
mod command;
mod config;
mod disk;
mod error;
mod event;
mod isolation;
mod lifecycle;
mod manager;
mod name;
mod part;
mod pool;
mod registry;
mod share;
mod snapshot;
mod time;
mod usage;
mod volume;

pub use backup::{Backup, BackupFormat, Retention};
pub use command::{Command, Execution, Exit, Limit, LimitWatch, Output};
pub use config::{VmPoolConfig, VmPoolRuntimeConfig};
pub use denizen_agent::{Agent, Chunk, Stream};
pub use denizen_image::{Credentials, ImportOptions, Progress, PullOptions, Stage, Transport};
pub use denizen_network::{EgressRules, InvalidRule, Rule, Rules};
pub use denizen_repository::{Finding as BackupFinding, Report as BackupReport};
pub use error::{ArchiveError, Error, RegistryError, Result};
pub use event::{Event, EventKind, Events};
pub use isolation::{ImageInfo, Isolation, Limits, Network};
pub use lifecycle::Sleep;
pub use manager::{Builder, MicroVmManager, VmExecutionGuard};
pub use name::{SessionName, SnapshotName};
pub use pool::{Export, Figures, Histogram, SessionInfo};
pub use share::{Mount, Share, ShareEntry, ShareEntryKind, ShareOwner, SharedFile, SharedFiles};
pub use snapshot::{Aspect, Difference, Node, Snapshot, Version};
pub use time::{Clock, SystemClock};
pub use usage::Usage;
