//! The list of steps by which `denizen-init` becomes the first process of a sandbox: the
//! words of `crates/init/src/enter.rs`, put together where they can be seen and tested. It
//! writes down, it does nothing.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// What a mount forbids (`mount_setattr(2)`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Attributes(u64);

impl Attributes {
    /// No set-user-ID, no devices: all that holds a session's files.
    pub(super) const FILES: Self = Self(2 | 4);
    /// And nothing to be executed.
    pub(super) const DATA: Self = Self(2 | 4 | 8);
    /// A device node: no set-user-ID, nothing to be executed.
    pub(super) const DEVICE: Self = Self(2 | 8);
    /// A program or library of denizen's: not to be written.
    pub(super) const PROGRAM: Self = Self(1 | 2 | 4);
    /// Nothing to be written, either.
    pub(super) const READ_ONLY: Self = Self(1 | 2 | 4 | 8);
}

/// An overlay: what is written goes to `upper`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Overlay<'p> {
    pub(super) target: &'p Path,
    /// From the top.
    pub(super) lower: Vec<&'p Path>,
    pub(super) upper: &'p Path,
    pub(super) work: &'p Path,
}

/// A plan being written.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Plan(Vec<u8>);

impl Plan {
    pub(super) fn finish(self) -> Vec<u8> {
        self.0
    }

    /// Adds words. None can hold a zero byte: they are paths and numbers of ours.
    pub(super) fn step<W: AsRef<OsStr>>(&mut self, words: impl IntoIterator<Item = W>) {
        for word in words {
            self.0.extend_from_slice(word.as_ref().as_bytes());
            self.0.push(0);
        }
    }

    pub(super) fn overlay(&mut self, overlay: &Overlay<'_>) {
        let number = |number: u64| std::ffi::OsString::from(number.to_string());
        let Overlay { target, lower, upper, work } = overlay;
        self.step(["overlay".as_ref(), target.as_os_str(), &number(Attributes::FILES.0)]);
        self.step([upper.as_os_str(), work.as_os_str(), &number(lower.len() as u64)]);
        self.step(lower);
    }

    pub(super) fn bind(&mut self, source: &Path, target: &str, Attributes(flags): Attributes) {
        self.step(["bind", target, &flags.to_string()]);
        self.step([source]);
    }

    pub(super) fn fs(
        &mut self,
        kind: &str,
        target: &str,
        Attributes(flags): Attributes,
        settings: &[&str],
    ) {
        self.step(["fs", target, &flags.to_string(), kind, &settings.len().to_string()]);
        self.step(settings);
    }

    /// As [`Plan::fs`], but goes without where the kernel refuses.
    pub(super) fn try_fs(&mut self, kind: &str, target: &str, Attributes(flags): Attributes) {
        self.step(["try", target, &flags.to_string(), kind, "0"]);
    }

    pub(super) fn dir(&mut self, path: &str, mode: u32) {
        self.step(["dir", path, &format!("{mode:o}")]);
    }

    pub(super) fn limit(&mut self, what: u32, value: u64) {
        self.step(["limit", &what.to_string(), &value.to_string()]);
    }
}
