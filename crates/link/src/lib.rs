//! How the daemon reaches the processes of a guest kernel.
//!
//! A session's processes are asked for through `denizen-init`, over a socket that passes
//! descriptors along. Into a guest leads only a stream of bytes. So there is a relay at each end
//! of it: the host's ([`host::Link`]) is to the owner what its init would be, the guest's
//! ([`guest::serve`]) is to the init what its owner would be, and both stay as they are.
//! Between them is HTTP/2, a stream for each descriptor, over a wire that outlives its
//! transport, because a guest is put to disk and goes on elsewhere.
//!
//! The host must never believe the guest: what it sends is bounded in memory and cannot make
//! this process panic.

mod carry;
mod cobs;
mod fd;
pub mod guest;
pub mod host;
mod message;
#[allow(unsafe_code, reason = "ioctls without a safe wrapper; see there")]
mod sys;
mod tasks;
mod wire;

pub use host::{ConnectError, Link, RequestError};
pub use message::{Clock, Fresh, Steps, Wake};

/// Why a link is beyond repair.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// It acknowledges what it was not sent.
    #[error("the other side acknowledges {offset} bytes, of {sent} that were sent")]
    Acknowledged {
        /// What it says to have.
        offset: u64,
        /// What it can have.
        sent: u64,
    },
    /// It is an older state of what was connected before.
    #[error("the other side has lost what it had: it is at byte {offset}, was at {forgotten}")]
    Behind {
        /// Where it is.
        offset: u64,
        /// From where on there is something left for it.
        forgotten: u64,
    },
    /// Something that it sent has not arrived.
    #[error("the other side goes on at byte {offset}: what it sent after {received} is missing")]
    Missing {
        /// Where it goes on.
        offset: u64,
        /// All before this is here.
        received: u64,
    },
    /// It sends more than it was let.
    #[error("the other side sends more than there is room for")]
    Overrun,
    /// The HTTP/2 connection is over.
    #[error("the connection to the guest ended: {0}")]
    Connection(String),
    /// A packet of the session's first process that can be none.
    #[error("the guest sent a packet that is none")]
    Packet,
    /// The session's first process has ended, or its owner has left.
    #[error("the session in the guest has ended")]
    Ended,
}
