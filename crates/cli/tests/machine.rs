//! Sessions that have a guest kernel, as a user of the program has them: by an image, with files,
//! through daemons that leave and daemons that are killed.
#![cfg(target_arch = "x86_64")]
#![allow(clippy::unwrap_used)]

mod common;

use std::path::Path;
use std::process::Output;

use common::{User, saved_image, text, until};
use rustix::process::{Pid, Signal};

/// `cargo xtask test` fetches it.
const GUEST: &str = concat!(env!("CARGO_TARGET_TMPDIR"), "/../guest");

fn run(user: &User, args: &[&str]) -> Output {
    assert!(Path::new(GUEST).join("vmlinuz").exists(), "no kernel: `cargo xtask test` fetches one");
    let (kernel, modules) = (format!("{GUEST}/vmlinuz"), format!("{GUEST}/modules"));
    let settings = ["--isolation", "microvm", "--kernel", &kernel, "--kernel-modules", &modules];
    let limits = "{ memory_bytes = 268435456, disk_bytes = 1073741824 }";
    let others = ["--limits", limits, "--background-is-use", "false"];
    // It may have to boot, on a machine that is busy with other tests.
    let patient = ["--acquire-timeout-seconds", "200"];
    user.run(&[&settings[..], &others, &patient, args].concat())
}

fn said(user: &User, args: &[&str]) -> String {
    let output = run(user, args);
    assert!(output.status.success(), "{args:?}: {output:?}");
    text(&output.stdout)
}

/// Sends the daemon a signal, and waits until it has ended.
fn end(user: &User, signal: Signal) {
    let pid = user.daemon_pid().unwrap();
    rustix::process::kill_process(Pid::from_raw(pid).unwrap(), signal).unwrap();
    let line = format!("/proc/{pid}/cmdline");
    until("the daemon ends", || std::fs::read(&line).unwrap_or_default().is_empty());
    // Its descriptors go after its memory.
    until("nobody listens", || user.daemon_pid().is_none());
}

/// Which boot of the guest it is.
fn boot(user: &User) -> String {
    said(user, &["exec", "demo", "--", "cat", "/proc/sys/kernel/random/boot_id"])
}

#[test]
fn a_machine_is_used_like_any_session() {
    let user = User::new();
    let folder = tempfile::tempdir().unwrap();
    saved_image(folder.path());
    let image = folder.path().join("image.tar");
    said(&user, &["image", "import", image.to_str().unwrap()]);
    said(&user, &["create", "demo", "demo/busybox:1"]);
    let line = "cat /proc/version /etc/motd; echo $FROM_IMAGE; id -u; pwd; echo mine > /etc/mine";
    let told = said(&user, &["exec", "demo", "--", "sh", "-c", line]);
    assert!(told.contains("Linux version 6.1") && told.contains("from-the-image"), "{told}");
    assert!(told.ends_with("yes\n0\n/volume\n"), "{told}");
    let sent = folder.path().join("sent");
    std::fs::write(&sent, "there and back").unwrap();
    said(&user, &["cp", sent.to_str().unwrap(), "demo:/volume/file"]);
    let back = folder.path().join("back");
    said(&user, &["cp", "demo:/volume/file", back.to_str().unwrap()]);
    assert_eq!(std::fs::read_to_string(back).unwrap(), "there and back");
    let failed = run(&user, &["exec", "demo", "--", "sh", "-c", "echo no >&2; exit 7"]);
    assert_eq!((failed.status.code(), text(&failed.stderr)), (Some(7), "no\n".to_owned()));
    // A daemon that leaves puts it to disk; the next one goes on with it.
    let before = boot(&user);
    end(&user, Signal::TERM);
    let memory = "find pool -maxdepth 2 -name memory -size +1M | grep .";
    let mut left = std::process::Command::new("sh");
    let left = left.args(["-c", memory]).current_dir(user.state.path()).status().unwrap();
    assert!(left.success(), "no memory is on the disk");
    assert_eq!(boot(&user), before, "it has booted");
    // One that is killed takes it along; what commands have written is on its disk.
    said(&user, &["exec", "demo", "--", "sh", "-c", "echo kept > kept"]);
    end(&user, Signal::KILL);
    let told = said(&user, &["exec", "demo", "--", "cat", "kept", "/etc/mine", "file"]);
    assert_eq!(told, "kept\nmine\nthere and back");
    // Its disk is nothing that a sandbox could have as files.
    end(&user, Signal::TERM);
    let output = user.run(&["--isolation", "sandbox", "exec", "demo", "--", "true"]);
    assert_eq!(output.status.code(), Some(125));
    assert!(text(&output.stderr).contains("set isolation to `microvm`"), "{output:?}");
}

#[test]
fn the_doctor_tells_what_machines_need() {
    let user = User::new();
    let without = user.run(&["--isolation", "microvm", "--kernel", "/no/kernel", "doctor"]);
    assert_eq!(without.status.code(), Some(1), "{without:?}");
    let told = text(&without.stdout);
    assert!(told.contains("ok    machine parts") && told.contains("/no/kernel"), "{told}");
    // An image that is another pool's cannot be tried; what runs guests is found out all the same.
    let output = run(&user, &["--image", "some:image", "doctor"]);
    let told = text(&output.stdout);
    let machine = told.lines().find(|line| line.contains("machine  ")).unwrap_or_default();
    assert!(machine.contains("QEMU") && machine.contains("KVM"), "{told}");
    let none = run(&user, &["exec", "demo", "--", "true"]);
    assert_eq!(none.status.code(), Some(125), "{none:?}");
    assert!(text(&none.stderr).contains("needs an image as its root"), "{none:?}");
}
