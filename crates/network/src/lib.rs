//! What stands between a sandbox and the networks of its host.
//!
//! A sandbox has a network namespace of its own with nothing in it but loopback. [`Egress`] is
//! an HTTP proxy that serves on a listener within, from the host's side, and lets through what
//! [`Rules`] open. There is no other way out, so if it is gone, everything is closed.
//!
//! [`Gateway`] is for a sandbox with a TUN device in its namespace, which then has a whole
//! network: what programs send is carried by sockets of the host, to public addresses and what
//! else rules open.
//!
//! ```
//! use denizen_network::{Host, Rule, Rules, Verdict};
//!
//! let allow = ["example.org", "*.example.net", "10.1.0.0/16:5432"];
//! let rules: Rules = allow.iter().map(|rule| rule.parse::<Rule>()).collect::<Result<_, _>>()?;
//! let (host, port) = Host::with_port("db.example.org:443").unwrap();
//! let Verdict::Refused { why, .. } = rules.permits(&host, port.unwrap(), &[]) else { panic!() };
//! assert_eq!(why.to_string(), "not in the allow-list");
//! # Ok::<(), denizen_network::InvalidRule>(())
//! ```
//!
//! What the proxy cannot see: the inside of TLS, and of tunnels to other ports than 443. A
//! server that is open there can be asked to hand things on to another, by its own `Host`
//! header, by an encrypted ClientHello or by being a proxy itself; who opens it trusts it.
//!
//! This crate never touches an interface, needs no privilege and never decides who has a
//! sandbox: it is handed sockets and says what came through them and what did not.

mod address;
#[cfg(test)]
mod chance;
mod error;
mod gate;
mod gateway;
mod hello;
mod narrow;
mod proxy;
mod rules;

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;

pub use self::address::{Class, Host, Spelling};
pub use self::error::{Error, InvalidRule, Result};
pub use self::gateway::{DNS, GATEWAY, Gateway, MTU};
pub use self::narrow::{EgressRules, Narrowed};
pub use self::proxy::{Egress, HostResolver, Limits, Looking, Resolve};
pub use self::rules::{Rule, Rules, Verdict, Why};

/// What a sandbox's owner may want to know.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Event {
    /// Something was refused.
    Denied(Denial),
    /// A connection to the outside is over.
    Closed(Transfer),
}

/// What was refused, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Denial {
    /// The host as the sandbox spelled it, cut to 255 bytes; empty if it could not be read.
    pub host: String,
    /// The port; 0 if it could not be read.
    pub port: u16,
    /// The address that was to blame, if it was one.
    pub address: Option<IpAddr>,
    /// The rule that refused it.
    pub rule: Why,
}

/// What went over one connection to the outside.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Transfer {
    /// The host in its usual spelling.
    pub host: String,
    /// The port.
    pub port: u16,
    /// The address that was connected to.
    pub address: IpAddr,
    /// Bytes that left the sandbox.
    pub sent: u64,
    /// Bytes that came for it.
    pub received: u64,
    /// How long it was open.
    pub open: Duration,
}

/// Is told each event as it happens; must not block.
pub type OnEvent = Arc<dyn Fn(Event) + Send + Sync>;
