//! What a machine of a session's own is started with: a kernel, and an initramfs with
//! `denizen-init` as its first process. Nothing here knows what runs the machine.

pub(crate) mod elf;
pub(crate) mod initramfs;
pub(crate) mod kernel;
pub(crate) mod modules;

#[cfg(all(test, target_arch = "x86_64"))]
mod tests;
