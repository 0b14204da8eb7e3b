//! Where the init program is executed from: one sealed memory file that all inits of this
//! owner share, or a file on disk where memory files may not be executed. It must never
//! execute anything but the bytes that came with this library.

use std::fs::{File, Permissions};
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use denizen_init::PROGRAM;
use parking_lot::Mutex;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use rustix::io::Errno;

/// Held for the life of this process: inits share its memory.
static MEMORY: Mutex<Option<OwnedFd>> = Mutex::new(None);

/// A path of the program in memory, for execution by a child of this process.
pub(crate) fn in_memory() -> io::Result<PathBuf> {
    let mut memory = MEMORY.lock();
    let fd = match &mut *memory {
        Some(fd) => fd,
        empty => {
            let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
            // Kernels before 6.3 do not know the flag, and need none.
            let fd = match memfd_create("denizen-init", flags | MemfdFlags::EXEC) {
                Err(Errno::INVAL) => memfd_create("denizen-init", flags),
                other => other,
            }?;
            let mut file = File::from(fd);
            file.write_all(PROGRAM)?;
            let seals = SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL;
            fcntl_add_seals(&file, seals)?;
            empty.insert(file.into())
        }
    };
    Ok(format!("/proc/self/fd/{}", fd.as_raw_fd()).into())
}

/// Writes the program to a file that only its owner can use, unless it is there already.
pub(crate) fn to_file(path: &Path) -> io::Result<()> {
    if std::fs::read(path).is_ok_and(|bytes| bytes == PROGRAM) {
        return Ok(());
    }
    // Under a name of its own first: somebody may be executing an older one.
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{}", std::process::id()));
    let temporary = PathBuf::from(name);
    let written = (|| {
        std::fs::write(&temporary, PROGRAM)?;
        std::fs::set_permissions(&temporary, Permissions::from_mode(0o700))?;
        std::fs::rename(&temporary, path)
    })();
    if written.is_err() {
        let _ = std::fs::remove_file(&temporary);
    }
    written
}

/// A memory file with these bytes, to be sent to init.
pub(crate) fn memory_file(bytes: &[u8]) -> io::Result<OwnedFd> {
    let flags = MemfdFlags::CLOEXEC;
    let fd = match memfd_create("denizen-arguments", flags | MemfdFlags::NOEXEC_SEAL) {
        Err(Errno::INVAL) => memfd_create("denizen-arguments", flags),
        other => other,
    }?;
    let mut file = File::from(fd);
    file.write_all(bytes)?;
    Ok(file.into())
}
