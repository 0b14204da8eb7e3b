//! What tests of the program share: a user with a state folder of their own.
#![allow(clippy::unwrap_used, dead_code, reason = "each test program uses a part of it")]

pub mod tcp;
pub mod wire;

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

/// Shared by all tests, so that the host's root is copied once.
pub const CACHE: &str = concat!(env!("CARGO_TARGET_TMPDIR"), "/cache");

pub struct User {
    pub state: TempDir,
}

impl User {
    pub fn new() -> Self {
        Self { state: tempfile::tempdir().unwrap() }
    }

    pub fn denizen(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_denizen"));
        // Nothing of the tester's own settings.
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("DENIZEN_") {
                command.env_remove(name);
            }
        }
        command.env("DENIZEN_STATE", self.state.path()).env("DENIZEN_CACHE", CACHE);
        command.args(args).stdin(Stdio::null());
        command
    }

    pub fn run(&self, args: &[&str]) -> Output {
        self.denizen(args).output().unwrap()
    }

    pub fn exec(&self, session: &str, line: &str) -> Output {
        self.run(&["exec", session, "--", "sh", "-c", line])
    }

    pub fn json(&self, args: &[&str]) -> serde_json::Value {
        let output = self.run(&[&["--json"], args].concat());
        assert!(output.status.success(), "{output:?}");
        serde_json::from_slice(&output.stdout).unwrap()
    }

    pub fn daemon_pid(&self) -> Option<i32> {
        let socket = self.state.path().join("denizen.sock");
        let stream = std::os::unix::net::UnixStream::connect(socket).ok()?;
        let peer = rustix::net::sockopt::socket_peercred(&stream).ok()?;
        Some(peer.pid.as_raw_nonzero().get())
    }
}

impl Drop for User {
    fn drop(&mut self) {
        if let Some(pid) = self.daemon_pid() {
            self.run(&["shutdown"]);
            // One that has ended and was not yet reaped has no command line.
            let line = format!("/proc/{pid}/cmdline");
            until("the daemon leaves", || std::fs::read(&line).unwrap_or_default().is_empty());
        }
    }
}

/// What other processes do has no event to wait for: looks again and again, for so long.
pub fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !condition() {
        assert!(begin.elapsed() < Duration::from_secs(20), "waited in vain until {what}");
        std::thread::yield_now();
    }
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Processes whose command line begins with the mark.
pub fn running(mark: &str) -> Vec<PathBuf> {
    let processes = std::fs::read_dir("/proc").unwrap().flatten().map(|entry| entry.path());
    processes
        .filter(|process| {
            let line = std::fs::read(process.join("cmdline")).unwrap_or_default();
            text(&line).replace('\0', " ").starts_with(mark)
        })
        .filter(|process| !process.ends_with(std::process::id().to_string()))
        .collect()
}

/// An archive as `docker save` writes it, of busybox and nothing else.
pub fn saved_image(folder: &Path) -> PathBuf {
    let script = r#"
        set -e
        mkdir -p root/bin root/etc root/tmp layer
        cp "$(command -v busybox)" root/bin/busybox
        for name in sh cat ls echo touch id env rm test sleep; do ln -s busybox root/bin/$name; done
        echo root:x:0:0::/:/bin/sh > root/etc/passwd
        echo from-the-image > root/etc/motd
        tar -C root --owner=0 --group=0 -cf layer/layer.tar .
        id=$(sha256sum layer/layer.tar | cut -d' ' -f1)
        echo '{"architecture":"amd64","os":"linux","config":{"Env":["PATH=/bin","FROM_IMAGE=yes"]},"rootfs":{"type":"layers","diff_ids":["sha256:'$id'"]}}' > config.json
        config=$(sha256sum config.json | cut -d' ' -f1)
        mv config.json $config.json
        echo '[{"Config":"'$config'.json","RepoTags":["demo/busybox:1"],"Layers":["layer/layer.tar"]}]' > manifest.json
        tar -cf image.tar manifest.json $config.json layer
    "#;
    let made = Command::new("sh").args(["-c", script]).current_dir(folder).output().unwrap();
    assert!(made.status.success(), "{made:?}");
    folder.join("image.tar")
}
