//! What tests of the library share.
#![allow(clippy::unwrap_used, dead_code, reason = "each test program uses a part of it")]

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use denizen::{Builder, Clock, Error, MicroVmManager, RegistryError, VmExecutionGuard};
use parking_lot::Mutex;

/// A clock that stands still until it is moved.
#[derive(Debug, Default)]
pub struct Manual(Mutex<Duration>);

impl Manual {
    pub fn pass(&self, time: Duration) {
        *self.0.lock() += time;
    }
}

impl Clock for Manual {
    fn wall(&self) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000) + *self.0.lock()
    }
    fn uptime(&self) -> Duration {
        Duration::from_secs(1000) + *self.0.lock()
    }
    fn boot(&self) -> String {
        "the same".to_owned()
    }
}

/// Shared by all tests of one user, so that the host's root is copied once.
pub fn cache() -> PathBuf {
    match std::env::var_os("DENIZEN_TEST_CACHE") {
        Some(folder) => folder.into(),
        None => Path::new(env!("CARGO_TARGET_TMPDIR")).join("cache"),
    }
}

/// Opens a pool once the last task of the one before it, in this process, has let go of its lock.
pub async fn opened(builder: impl Fn() -> Builder) -> Arc<MicroVmManager> {
    loop {
        match builder().build() {
            Err(Error::Registry(RegistryError::Locked { .. })) => tokio::task::yield_now().await,
            opened => return opened.unwrap(),
        }
    }
}

/// What a command line prints, which must end well.
pub async fn text(guard: &VmExecutionGuard, line: &str) -> String {
    let output = guard.command(line).output().await.unwrap();
    assert!(output.exit.success(), "{line}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// A server that answers every request with one line.
pub fn server(address: &str) -> u16 {
    use std::io::{Read, Write};
    let listener = std::net::TcpListener::bind((address, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut seen = Vec::new();
            let mut piece = [0; 1024];
            while !seen.ends_with(b"\r\n\r\n") {
                match stream.read(&mut piece) {
                    Ok(count @ 1..) => seen.extend_from_slice(&piece[..count]),
                    _ => break,
                }
            }
            let answer =
                "HTTP/1.1 200 OK\r\nContent-Length: 8\r\nConnection: close\r\n\r\noutside\n";
            let _ = stream.write_all(answer.as_bytes());
        }
    });
    port
}
