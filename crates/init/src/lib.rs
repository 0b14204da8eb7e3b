//! The program that is the first process of an instance under `host` isolation, as
//! bytes to be written to a memory file and executed. What it does and how it is spoken
//! to is described in `src/main.rs`; the owner's end is in the crate `denizen-agent`.
//! This library must never hold code that runs in the owner.
#![forbid(unsafe_code)]

/// The `denizen-init` executable (ELF) for the target this crate was built for.
pub const PROGRAM: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/denizen-init"));
