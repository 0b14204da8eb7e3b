use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;

use rustic_core::{ErrorKind, RusticError, RusticResult};

/// Why a repository could not be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The text names no place that backups can go to.
    #[error("{text:?} is no backup destination: {problem}")]
    Destination {
        /// The text.
        text: String,
        /// What is wrong with it.
        problem: String,
    },
    /// The destination could not be read or written.
    #[error("cannot {action} the backup repository {place}: {problem}")]
    Engine {
        /// What was being done.
        action: &'static str,
        /// Which repository.
        place: String,
        /// What the engine said.
        problem: String,
    },
    /// The repository was made with another key.
    #[error(
        "the key does not open the backup repository {place}: use the key that it was made with, \
         or another destination"
    )]
    WrongKey {
        /// Which repository.
        place: String,
    },
    /// There is no such backup.
    #[error("the backup repository {place} has no backup {backup}")]
    NoBackup {
        /// Which repository.
        place: String,
        /// The backup asked for.
        backup: String,
    },
    /// A backup has no such file or folder.
    #[error("the backup {backup} in {place} has no {}", path.display())]
    NoPath {
        /// Which repository.
        place: String,
        /// The backup.
        backup: String,
        /// What was asked for.
        path: PathBuf,
    },
    /// A backup does not say what was written.
    #[error("the backup {backup} in {place} is damaged: {problem}; use another one")]
    Damaged {
        /// Which repository.
        place: String,
        /// The backup.
        backup: String,
        /// What is wrong with it.
        problem: String,
    },
    /// What backups need is not known, as one of them cannot be read.
    #[error(
        "the backup repository {place} cannot be compacted: a folder of the backup {backup} cannot be \
         read ({problem}), so that what it needs is not known; back up that session again, which \
         writes what is lost anew, or remove that backup (`restic forget`)"
    )]
    InTheWay {
        /// Which repository.
        place: String,
        /// The backup.
        backup: String,
        /// What is wrong with it.
        problem: String,
    },
    /// What was just written could not be read back as it was written: it is no backup.
    #[error("a backup to {place} could not be read back as it was written: {problem}")]
    Unverified {
        /// Which repository.
        place: String,
        /// What differs.
        problem: String,
    },
    /// The files of the session, or the place they are restored to.
    #[error(transparent)]
    Tree(#[from] denizen_archive::Error),
    /// Something beside the repository could not be read.
    #[error("cannot read {}: {source}", path.display())]
    Io {
        /// What.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
}

pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What the engine says, in one line.
pub fn told(error: &rustic_core::RusticError) -> String {
    let text = error.display_log();
    let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
    text.strip_prefix("Error: ").unwrap_or(&text).to_owned()
}

/// The engine panics where it does not expect what comes, in threads of its own too.
pub fn guarded<T>(run: impl FnOnce() -> RusticResult<T>) -> RusticResult<T> {
    // Whatever a panic leaves half-done is dropped with it: nothing of ours is shared with it but
    // what stays whole.
    catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("it panicked");
        Err(RusticError::new(ErrorKind::Internal, text.to_owned()))
    })
}
