//! What processes hold open of files that have no name any more, which no walk can find: their
//! blocks are free only when the last descriptor is closed. Nothing is opened here, and nothing
//! of a process is touched. What is only mapped, or on its way between processes, is not seen.

use std::collections::HashSet;

use rustix::fs::{AtFlags, CWD, FileType, StatxFlags};

use super::measure::LEAST;

/// Descriptors that are looked at, at most: more than honest work has.
const MOST: usize = 1 << 18;
/// `OVERLAYFS_SUPER_MAGIC`.
const OVERLAY: i64 = 0x794c_7630;

/// Bytes of files without a name that these processes hold open on the file system that
/// `device` is, or in an overlay; a little more than `enough` if there is more than that.
pub(crate) fn used(processes: &[u32], device: (u32, u32), enough: u64) -> u64 {
    let descriptors = processes.iter().filter_map(|pid| {
        let folder = format!("/proc/{pid}/fd");
        let all = std::fs::read_dir(folder).ok()?;
        Some(all.flatten().map(|entry| entry.path()))
    });
    let mut sum = 0_u64;
    let mut seen = HashSet::new();
    for path in descriptors.flatten().take(MOST) {
        // Through the link that only looks like one: to the file itself, wherever it was.
        let found = rustix::fs::statx(CWD, &path, AtFlags::empty(), StatxFlags::BASIC_STATS);
        let Ok(found) = found else { continue };
        let is_file = FileType::from_raw_mode(found.stx_mode.into()) == FileType::RegularFile;
        if found.stx_nlink > 0 || !is_file {
            continue;
        }
        let on = (found.stx_dev_major, found.stx_dev_minor);
        // Of memory, which is limited otherwise, if it is neither.
        let here =
            || on == device || rustix::fs::statfs(&path).is_ok_and(|it| it.f_type == OVERLAY);
        if here() && seen.insert((on, found.stx_ino)) {
            sum = sum.saturating_add(found.stx_blocks.saturating_mul(512).max(LEAST));
            if sum > enough {
                break;
            }
        }
    }
    sum
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::io::Write;

    use super::*;

    #[test]
    fn what_is_open_without_a_name_counts_once_and_nothing_else_does() {
        let folder = tempfile::tempdir().unwrap();
        let found =
            rustix::fs::statx(CWD, folder.path(), AtFlags::empty(), StatxFlags::BASIC_STATS);
        let found = found.unwrap();
        let device = (found.stx_dev_major, found.stx_dev_minor);
        let me = [std::process::id(), std::process::id(), u32::MAX];
        let all = || used(&me, device, u64::MAX);
        let before = all();
        let mut file = std::fs::File::create(folder.path().join("file")).unwrap();
        file.write_all(&[1; 1 << 20]).unwrap();
        assert_eq!(all(), before, "it has a name");
        std::fs::remove_file(folder.path().join("file")).unwrap();
        let full = all();
        assert!((1 << 20..1 << 21).contains(&(full - before)), "{full} {before}");
        let again = file.try_clone().unwrap();
        assert_eq!(all(), full);
        assert!(used(&me, device, 5) <= full);
        assert_eq!(used(&me, (u32::MAX, 0), u64::MAX), 0, "of another file system");
        drop((file, again));
        assert_eq!(all(), before);
    }
}
