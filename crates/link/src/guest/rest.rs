//! What a guest does before it is put to disk and when it goes on: the only place that touches
//! the machine itself. No step's failure stops the others.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::Path;

use parking_lot::Mutex;
use rustix::io::Errno;
use rustix::time::{ClockId, Timespec, clock_settime};

use crate::message::{Fresh, Steps, Wake};
use crate::sys;

fn step(steps: &mut Steps, name: &str, done: io::Result<()>) {
    if let Err(error) = done {
        steps.failed.push((name.to_owned(), error.to_string()));
    }
}

/// Writes down all that the file system has.
pub(super) fn sync(path: &Path) -> Steps {
    let mut steps = Steps::default();
    step(&mut steps, "sync", File::open(path).and_then(|it| Ok(rustix::fs::syncfs(it)?)));
    steps
}

/// Held while the machine is put to rest or wakes: one that gave up waiting must not have the
/// other one done last.
static STATE: Mutex<()> = Mutex::new(());

/// Writes down all that the file system has, lets nobody write to it, and forgets what is on
/// disk: it need not be in the image of the memory.
pub(super) fn rest(path: &Path) -> Steps {
    let _state = STATE.lock();
    let mut steps = sync(path);
    step(&mut steps, "freeze", File::open(path).and_then(|it| Ok(sys::freeze(it)?)));
    // That only makes the image bigger.
    let _ = std::fs::write("/proc/sys/vm/drop_caches", "1\n");
    steps
}

/// Goes on.
pub(super) fn wake(path: &Path, wake: &Wake) -> Steps {
    let _state = STATE.lock();
    let mut steps = Steps::default();
    let thawed = File::open(path).and_then(|it| match sys::thaw(it) {
        // It was not frozen.
        Err(Errno::INVAL) => Ok(()),
        thawed => Ok(thawed?),
    });
    step(&mut steps, "thaw", thawed);
    let clock = Timespec { tv_sec: wake.clock.seconds, tv_nsec: wake.clock.nanoseconds.into() };
    step(&mut steps, "clock", clock_settime(ClockId::Realtime, clock).map_err(io::Error::from));
    step(&mut steps, "entropy", entropy(&wake.entropy));
    if let Some(Fresh { hostname, machine_id }) = &wake.fresh {
        let named = rustix::system::sethostname(hostname.as_bytes());
        step(&mut steps, "hostname", named.map_err(io::Error::from));
        step(&mut steps, "machine-id", put("/etc/machine-id", &format!("{machine_id}\n")));
    }
    steps
}

/// Puts a file in the place of whatever is there: the session may have made that.
fn put(path: &str, content: &str) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    File::create_new(path)?.write_all(content.as_bytes())
}

fn entropy(digits: &str) -> io::Result<()> {
    let bytes = bytes(digits).ok_or(io::ErrorKind::InvalidInput)?;
    let random = OpenOptions::new().write(true).open("/dev/urandom")?;
    Ok(sys::add_entropy(random, bytes)?)
}

fn bytes(digits: &str) -> Option<[u8; 64]> {
    let mut bytes = [0; 64];
    let (pairs, rest) = digits.as_bytes().as_chunks::<2>();
    if pairs.len() != bytes.len() || !rest.is_empty() {
        return None;
    }
    for (byte, pair) in bytes.iter_mut().zip(pairs) {
        *byte = u8::from_str_radix(str::from_utf8(pair).ok()?, 16).ok()?;
    }
    Some(bytes)
}
