//! What an attempt is, how it ends, and what several of them need. Nothing here tries
//! anything by itself.

use std::fs::{File, OpenOptions};
use std::io::{Error, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde_json::json;

use crate::facts::Facts;

/// The most that is read of any file.
const ENOUGH: u64 = 1 << 20;

/// Ok: it escaped, with what it got.
pub type Verdict = Result<String, No>;

/// It did not escape, and why.
#[derive(Debug)]
pub enum No {
    /// Something stood in the way.
    Held(String),
    /// It could not be tried: a fact is missing, or a thing of the test itself failed.
    Impossible(String),
}

/// Without a word on what failed: for calls that are the attempt itself.
impl From<Error> for No {
    fn from(error: Error) -> Self {
        Self::Held(error.to_string())
    }
}

impl From<rustix::io::Errno> for No {
    fn from(error: rustix::io::Errno) -> Self {
        Error::from(error).into()
    }
}

/// Says what was being done when an error came.
pub trait Doing<T> {
    /// A failure means that the attempt was held.
    fn doing(self, what: &str) -> Result<T, No>;
    /// A failure means that the attempt could not be made.
    fn preparing(self, what: &str) -> Result<T, No>;
}

impl<T, E: std::fmt::Display> Doing<T> for Result<T, E> {
    fn doing(self, what: &str) -> Result<T, No> {
        self.map_err(|error| No::Held(format!("{what}: {error}")))
    }

    fn preparing(self, what: &str) -> Result<T, No> {
        self.map_err(|error| No::Impossible(format!("{what}: {error}")))
    }
}

/// It was held, and why.
pub fn held<T>(why: impl Into<String>) -> Result<T, No> {
    Err(No::Held(why.into()))
}

/// It could not be tried, and why.
pub fn impossible<T>(why: impl Into<String>) -> Result<T, No> {
    Err(No::Impossible(why.into()))
}

/// What a success would mean.
#[derive(Clone, Copy)]
enum Kind {
    /// Something of the host or of another session was reached.
    Breach,
    /// A part of the kernel that a session has no need of can be used.
    Surface,
    /// The session learns of the host what it need not know.
    Leak,
}

/// One attempt.
pub struct Attempt {
    pub name: &'static str,
    what: &'static str,
    kind: Kind,
    control: bool,
    needs: Option<&'static str>,
    pub run: fn(&Facts) -> Verdict,
}

impl Attempt {
    /// An attempt whose success reaches something outside; `what` says what it would mean.
    pub const fn new(name: &'static str, what: &'static str, run: fn(&Facts) -> Verdict) -> Self {
        Self { name, what, kind: Kind::Breach, control: false, needs: None, run }
    }

    /// It succeeds, and does no harm, when root runs it without isolation.
    pub const fn control(mut self) -> Self {
        self.control = true;
        self
    }

    /// Success alone reaches nothing outside, but opens the way to kernel bugs.
    pub const fn surface(mut self) -> Self {
        self.kind = Kind::Surface;
        self
    }

    /// Success tells, but changes nothing.
    pub const fn leak(mut self) -> Self {
        self.kind = Kind::Leak;
        self
    }

    /// What has to be there for it to succeed as a control. Where that is missing (`kernel:
    /// CONFIG_…`), a control that is held proves nothing and is no error.
    pub const fn needs(mut self, needs: &'static str) -> Self {
        self.needs = Some(needs);
        self
    }

    /// A line of the list.
    pub fn json(&self, group: &str) -> serde_json::Value {
        let kind = match self.kind {
            Kind::Breach => "breach",
            Kind::Surface => "surface",
            Kind::Leak => "leak",
        };
        json!({
            "name": self.name,
            "group": group,
            "kind": kind,
            "what": self.what,
            "control": self.control,
            "needs": self.needs,
        })
    }
}

/// For a call whose arguments cannot work: whatever the kernel says to them, other than
/// that the caller may not make this call, shows that the call got through.
pub fn got_through(call: &str, result: Result<i64, Error>) -> Verdict {
    match result {
        Ok(value) => Ok(format!("{call} gave {value}")),
        Err(error) => match error.raw_os_error() {
            Some(libc::EPERM | libc::EACCES | libc::ENOSYS) => held(format!("{call}: {error}")),
            _ => Ok(format!("{call} was looked at by the kernel: {error}")),
        },
    }
}

/// Opens for reading without ever waiting.
pub fn open(path: &Path) -> Result<File, Error> {
    let flags = libc::O_NONBLOCK | libc::O_NOCTTY | libc::O_CLOEXEC;
    OpenOptions::new().read(true).custom_flags(flags).open(path)
}

/// Opens for writing, without emptying the file and without ever waiting.
pub fn open_to_write(path: &Path) -> Result<File, Error> {
    let flags = libc::O_NONBLOCK | libc::O_NOCTTY | libc::O_CLOEXEC;
    OpenOptions::new().write(true).custom_flags(flags).open(path)
}

/// The beginning of a file.
pub fn read(path: &Path) -> Result<Vec<u8>, Error> {
    let mut bytes = Vec::new();
    open(path)?.take(ENOUGH).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// The same as text.
pub fn read_text(path: impl AsRef<Path>) -> Result<String, Error> {
    Ok(String::from_utf8_lossy(&read(path.as_ref())?).into_owned())
}

/// Whether `bytes` hold the word.
pub fn holds(bytes: &[u8], word: &str) -> bool {
    !word.is_empty() && bytes.windows(word.len()).any(|window| window == word.as_bytes())
}

/// Reads a file and looks for the host's secret in it.
pub fn read_secret(facts: &Facts, path: &Path) -> Verdict {
    let bytes = read(path).doing(&path.display().to_string())?;
    if holds(&bytes, facts.secret()) {
        return Ok(format!("read the secret from {}", path.display()));
    }
    held(format!("{} opens, but the secret is not in it", path.display()))
}

/// The first of several ways that works; else why the last ones did not.
pub fn any_of<T>(ways: impl IntoIterator<Item = T>, mut way: impl FnMut(T) -> Verdict) -> Verdict {
    let mut reasons = Vec::new();
    for one in ways {
        match way(one) {
            Ok(got) => return Ok(got),
            Err(No::Held(why) | No::Impossible(why)) => reasons.push(why),
        }
    }
    match reasons.len() {
        0 => held("there is nothing to try it on"),
        1..=4 => held(reasons.join("; ")),
        count => {
            held(format!("{count} ways, the last: {}", reasons.last().map_or("", String::as_str)))
        }
    }
}

/// The numbers of all processes that can be seen.
pub fn process_numbers() -> Vec<i32> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

/// The value of a line of /proc/PID/status.
pub fn status(process: &str, key: &str) -> Result<String, No> {
    let path = format!("/proc/{process}/status");
    let text = read_text(&path).doing(&path)?;
    let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
    line.map(|value| value.trim().to_owned())
        .ok_or_else(|| No::Impossible(format!("{path} has no line {key}")))
}

/// Where a path leads when it is started from the root of something else.
pub fn below(root: &Path, path: &Path) -> PathBuf {
    root.join(path.strip_prefix("/").unwrap_or(path))
}

/// A folder of our own that goes away again.
pub struct Scratch(PathBuf);

impl Scratch {
    /// Makes one, in the folder for temporary files or in the working directory.
    pub fn new() -> Result<Self, No> {
        Self::new_in(&[std::env::temp_dir(), std::env::current_dir().unwrap_or_default()])
    }

    /// Makes one in the first of these folders in which it can be made.
    pub fn new_in(folders: &[PathBuf]) -> Result<Self, No> {
        let name = format!("denizen-escape-{}", std::process::id());
        let mut paths = folders.iter().map(|folder| folder.join(&name));
        match paths.find(|path| std::fs::create_dir(path).is_ok()) {
            Some(path) => Ok(Self(path)),
            None => impossible("no folder to work in can be made"),
        }
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// A path in it.
    pub fn join(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// A new folder in it.
    pub fn folder(&self, name: &str) -> Result<PathBuf, No> {
        let path = self.join(name);
        std::fs::create_dir(&path).preparing("a folder to work in")?;
        Ok(path)
    }

    /// A new file in it.
    pub fn file(&self, name: &str, bytes: &[u8]) -> Result<PathBuf, No> {
        let path = self.join(name);
        std::fs::write(&path, bytes).preparing("a file to work on")?;
        Ok(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // Whoever mounted something in it did so in a mount namespace of its own, and a
        // mount there makes this fail rather than reach into it.
        let _ = remove_all(&self.0);
    }
}

/// Removes a folder two levels deep, and never goes into a mount.
fn remove_all(folder: &Path) -> Result<(), Error> {
    use std::os::unix::fs::MetadataExt;
    let device = std::fs::symlink_metadata(folder)?.dev();
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        let meta = std::fs::symlink_metadata(&path)?;
        if meta.dev() != device {
            continue;
        }
        if meta.is_dir() { remove_all(&path)? } else { std::fs::remove_file(&path)? }
    }
    std::fs::remove_dir(folder)
}
