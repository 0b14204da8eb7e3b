//! The log of a daemon in the background, which is what it writes to standard error. It must have
//! an end, and the daemon must never go on writing to a file that nobody finds.

use std::fs::{self, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A log that is larger is put aside, in place of what was before; in bytes.
const LARGE: u64 = 8 << 20;

/// Keeps the log short, for ever. Cancel-safe.
pub async fn keep_short(path: PathBuf) {
    let mut look = tokio::time::interval(Duration::from_mins(1));
    loop {
        look.tick().await;
        let path = path.clone();
        // If it panics, the next look is in a minute.
        if let Ok(Err(error)) = tokio::task::spawn_blocking(move || shorten(&path, LARGE)).await {
            tracing::warn!(%error, "the log is not kept short");
        }
    }
}

/// Copies rather than renames: the file is standard error, and not only ours. It is open for
/// appending, so that whoever writes goes on at its new end.
fn shorten(path: &Path, large: u64) -> io::Result<()> {
    let file = OpenOptions::new().write(true).open(path)?;
    if file.metadata()?.len() <= large {
        return Ok(());
    }
    let copied = fs::copy(path, path.with_extension("log.1"));
    // Also without a copy: a disk may be full of it.
    file.set_len(0)?;
    copied.map(drop)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::io::Write;

    use super::*;

    #[test]
    fn what_is_kept_has_an_end() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("daemon.log");
        let mut log = OpenOptions::new().create(true).append(true).open(&path).unwrap();
        for round in 0..3 {
            log.write_all(format!("{round}").repeat(100).as_bytes()).unwrap();
            shorten(&path, 1000).unwrap();
            assert_eq!(fs::metadata(&path).unwrap().len(), 100, "{round}");
            shorten(&path, 99).unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap(), "");
        }
        assert_eq!(
            fs::read_to_string(folder.path().join("daemon.log.1")).unwrap(),
            "2".repeat(100)
        );
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
    }
}
