//! Finds the program that a command's name means, and what was wrong when it did not
//! start. It looks only; nothing here starts or changes anything.

use std::ffi::{CStr, CString, OsStr};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use crate::sys;

const DEFAULT_PATH: &[u8] = b"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Why a command was not started: the stage (see the table of messages) and the errno.
pub type Failure = (u8, i32);

/// A path as a command sees it that starts in `cwd`.
fn seen_from(cwd: &CStr, path: &[u8]) -> Result<CString, Failure> {
    let full = match path.first() {
        Some(b'/') => path.to_vec(),
        _ => [cwd.to_bytes(), b"/", path].concat(),
    };
    CString::new(full).map_err(|_| (0, sys::EINVAL))
}

/// The path to execute for a program's name, as execvp(3) finds it: a name with a slash
/// is a path; any other is looked for in `PATH`, where a file that may not be executed is
/// passed over but remembered.
pub fn look_up(name: &CStr, cwd: &CStr, env: &[&CStr]) -> Result<CString, Failure> {
    if name.to_bytes().contains(&b'/') {
        return Ok(name.to_owned());
    }
    if name.is_empty() {
        return Err((2, sys::ENOENT));
    }
    let path = env
        .iter()
        .find_map(|variable| variable.to_bytes().strip_prefix(b"PATH="))
        .unwrap_or(DEFAULT_PATH);
    let mut answer = sys::ENOENT;
    for folder in path.split(|byte| *byte == b':') {
        let candidate = seen_from(cwd, &[folder, b"/", name.to_bytes()].concat());
        // An empty entry is the working directory.
        let candidate = match folder {
            [] => seen_from(cwd, name.to_bytes())?,
            _ => candidate?,
        };
        match check(&candidate) {
            0 => return Ok(candidate),
            sys::EACCES => answer = sys::EACCES,
            _ => {}
        }
    }
    // Without its directory, a relative PATH finds nothing.
    match sys::may_enter(cwd) {
        0 => Err((2, answer)),
        error => Err((1, error)),
    }
}

/// The errno that stands in the way of executing this file; 0 if none can be seen.
fn check(path: &CStr) -> i32 {
    match std::fs::metadata(Path::new(OsStr::from_bytes(path.to_bytes()))) {
        Ok(meta) if meta.is_dir() => sys::EISDIR,
        Ok(_) => sys::may_execute(path),
        Err(error) => match error.raw_os_error() {
            // A part of the path that is a file means that there is no such program.
            Some(sys::ENOTDIR) | None => sys::ENOENT,
            Some(error) => error,
        },
    }
}

/// What a failed start was about: `posix_spawn(3)` gives one errno for all of its steps, so
/// what could have failed is looked at, in their order.
pub fn explain(error: i32, program: &CStr, cwd: &CStr) -> Failure {
    let cwd_error = sys::may_enter(cwd);
    if cwd_error != 0 {
        return (1, cwd_error);
    }
    let Ok(full) = seen_from(cwd, program.to_bytes()) else {
        return (0, error);
    };
    match (check(&full), error) {
        (seen @ (sys::ENOENT | sys::EACCES | sys::EISDIR), _) => (2, seen),
        // The program is there, so what is missing is what it needs to run.
        (0, sys::ENOENT) => (3, error),
        (_, sys::EACCES) => (2, error),
        _ => (0, error),
    }
}
