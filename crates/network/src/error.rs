//! What can go wrong here, apart from denials: those are answers, not errors.

use std::io;

/// A text that is no rule.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is no rule: {problem}")]
pub struct InvalidRule {
    /// The text.
    pub text: String,
    /// What is wrong with it, as a plain sentence.
    pub problem: &'static str,
}

/// Why serving ended other than by being told to.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The listener broke.
    #[error("cannot accept the sandbox's connections: {0}")]
    Accept(#[source] io::Error),
    /// The TUN device broke, or is none.
    #[error("cannot use the sandbox's TUN device: {0}")]
    Tun(#[source] io::Error),
}

/// A result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;
