//! The seam for what runs a guest: QEMU today. It runs one guest on hardware that is described to
//! it, within walls that somebody else has put up, stops it, saves its memory and brings it back
//! from that. It must never decide when, and knows nothing of sessions.

use std::io::{self, Read, Write};
use std::path::Path;
use std::sync::Arc;

use denizen_agent::Agent;
use tokio::net::UnixStream;
use tokio::sync::watch;

/// Where a guest's files are, as what runs it sees them.
pub(super) const KERNEL: &str = "/run/machine/kernel";
pub(super) const INITRAMFS: &str = "/run/machine/initramfs";
pub(super) const ROOT: &str = "/run/machine/root";
pub(super) const TOOLS: &str = "/run/machine/tools";
pub(super) const DISK: &str = "/volume/.denizen-disk";

/// What a guest has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Hardware {
    /// Bytes of memory.
    pub(super) memory: u64,
    pub(super) processors: u32,
    /// Whether it has a network card, whose packets go where those of the program around go.
    pub(super) network: bool,
    /// What its kernel is told.
    pub(super) command_line: String,
}

/// Where the program that runs a guest is started.
#[derive(Clone, Copy, Debug)]
pub(super) struct Walls<'a> {
    pub(super) agent: &'a Agent,
    /// Where its `/tmp` is, seen from here.
    pub(super) tmp: &'a Path,
}

/// Runs guests. What it does blocks, and is called where that is allowed.
pub(super) trait Hypervisor: Send + Sync {
    /// What it is and how it runs guests, for people.
    fn name(&self) -> String;

    /// Changes whenever a memory that was saved before cannot be brought back any more.
    fn identity(&self) -> &str;

    /// Starts a guest.
    fn boot(&self, walls: Walls<'_>, hardware: &Hardware) -> io::Result<Arc<dyn Guest>>;

    /// Brings a guest back from its memory; it stands still.
    fn restore(
        &self,
        walls: Walls<'_>,
        hardware: &Hardware,
        memory: &mut (dyn Read + Send),
    ) -> io::Result<Arc<dyn Guest>>;
}

/// A guest that runs or stands still. What it does blocks, and is called where that is allowed.
pub(super) trait Guest: Send + Sync {
    /// The other end of the port by which the guest is spoken to; once.
    fn port(&self) -> io::Result<UnixStream>;

    /// Has it stand still.
    fn pause(&self) -> io::Result<()>;

    /// Has it go on.
    fn go_on(&self) -> io::Result<()>;

    /// Writes its memory, and all else that is to be brought back, while it stands still. After a
    /// failure it can go on.
    fn save(&self, into: &mut (dyn Write + Send)) -> io::Result<()>;

    /// Ends it at once; does nothing if it has ended.
    fn kill(&self);

    /// Turns true when it has ended.
    fn ended(&self) -> watch::Receiver<bool>;

    /// The end of what it and what runs it have said, for people.
    fn last_words(&self) -> String;
}
