//! Who has done what, in lines of JSON: all that uses or changes something, and all that was
//! refused, but nothing that was only looked at.
//!
//! What others write (names, paths) must never look like anything but a string in a line: all but
//! plain ASCII is escaped, so that neither a new line nor what a terminal obeys is in the file. No
//! secrets and no bodies are in it, so neither is what was run: a command's arguments have
//! passwords in them, and its name says nothing where it is `sh`.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use parking_lot::Mutex;
use serde::Serialize;

/// A file that is larger is put aside, in bytes.
const LARGE: u64 = 8 << 20;

/// The log.
pub(crate) struct Audit {
    path: PathBuf,
    large: u64,
    /// How many files are kept that were put aside.
    kept: u32,
    open: Mutex<Open>,
}

struct Open {
    file: File,
    size: u64,
    failed: bool,
}

impl Audit {
    /// Goes on with the log of a state folder, of which so many full files are kept.
    pub(crate) fn open(state: &Path, kept: u32) -> std::io::Result<Self> {
        Self::of(state.join("audit.log"), LARGE, kept)
    }

    fn of(path: PathBuf, large: u64, kept: u32) -> std::io::Result<Self> {
        let (file, size) = append(&path)?;
        Ok(Self { path, large, kept, open: Mutex::new(Open { file, size, failed: false }) })
    }

    /// Writes a line. That it cannot be written is told in the daemon's log, once, and holds
    /// nothing up: a full disk must not be why a session cannot be stopped.
    pub(crate) fn write(&self, entry: &impl Serialize) {
        // Strings and numbers: this cannot fail.
        let line = plain(&serde_json::to_string(entry).unwrap_or_default()) + "\n";
        let mut open = self.open.lock();
        let written = self.append(&mut open, &line);
        if let (Err(error), false) = (&written, open.failed) {
            let path = self.path.display();
            tracing::error!(%error, %path, "the audit log is not written");
        }
        open.failed = written.is_err();
    }

    fn append(&self, open: &mut Open, line: &str) -> std::io::Result<()> {
        if open.size >= self.large {
            let aside = |n: u32| self.path.with_extension(format!("log.{n}"));
            for n in (1..self.kept).rev() {
                // There need not be so many.
                let _ = std::fs::rename(aside(n), aside(n + 1));
            }
            if self.kept > 0 {
                std::fs::rename(&self.path, aside(1))?;
            } else {
                std::fs::remove_file(&self.path)?;
            }
            (open.file, open.size) = append(&self.path)?;
        }
        // In one call, so that a line is whole.
        open.file.write_all(line.as_bytes())?;
        open.size += line.len() as u64;
        Ok(())
    }
}

fn append(path: &Path) -> std::io::Result<(File, u64)> {
    let file = File::options().create(true).append(true).mode(0o600).open(path)?;
    let size = file.metadata()?.len();
    Ok((file, size))
}

/// JSON in printable ASCII: what is not, is in strings only, where it can be escaped.
fn plain(json: &str) -> String {
    let mut plain = String::with_capacity(json.len());
    for c in json.chars() {
        if c.is_ascii() && !c.is_ascii_control() {
            plain.push(c);
        } else {
            let mut units = [0; 2];
            for unit in c.encode_utf16(&mut units) {
                plain.push_str(&format!("\\u{unit:04x}"));
            }
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn no_name_makes_a_line_or_moves_a_cursor() {
        let folder = tempfile::tempdir().unwrap();
        let audit = Audit::open(folder.path(), 8).unwrap();
        let names = [
            "a\n{\"who\":\"admin\"}",
            "\r",
            "\0",
            "\u{1b}[2J",
            "\u{9b}2J",
            "\u{7f}",
            "\u{2028}",
            "\u{202e}txt",
            "\"}",
            "\\",
            "日本",
            "😀",
        ];
        for name in names {
            audit.write(&serde_json::json!({ "session": name }));
        }
        let text = std::fs::read_to_string(folder.path().join("audit.log")).unwrap();
        assert!(text.chars().all(|c| c == '\n' || (' '..='~').contains(&c)), "{text}");
        let read: Vec<_> = text
            .lines()
            .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap())
            .map(|line| line["session"].as_str().unwrap().to_owned())
            .collect();
        assert_eq!(read, names);
    }

    #[test]
    fn what_is_kept_has_an_end() {
        let line = serde_json::json!({ "n": "x".repeat(90) });
        for kept in [0, 1, 8] {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("audit.log");
            for _ in 0..3 {
                // Also over restarts.
                let audit = Audit::of(path.clone(), 1000, kept).unwrap();
                (0..100).for_each(|_| audit.write(&line));
            }
            let files = std::fs::read_dir(folder.path()).unwrap().map(|it| it.unwrap());
            let sizes: Vec<_> = files.map(|it| it.metadata().unwrap().len()).collect();
            assert_eq!(sizes.len(), kept as usize + 1);
            assert!(sizes.iter().all(|size| *size < 1200), "{sizes:?}");
        }
    }
}
