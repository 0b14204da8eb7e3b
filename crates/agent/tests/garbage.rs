//! A real init whose owner sends it garbage: it neither falls nor hangs, starts nothing, and
//! refuses to enter by a plan that is not one.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::io::{IoSlice, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, Shutdown, SocketAddrUnix, SocketFlags, SocketType, bind, connect, recvmsg, sendmsg,
    shutdown, socket_with, socketpair,
};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

/// Longer than anything here takes.
const DEADLINE: Timespec = Timespec { tv_sec: 20, tv_nsec: 0 };

/// Steele, Lea and Flood: SplitMix64.
struct Choice(u64);

impl Choice {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn byte(&mut self) -> u8 {
        self.next().to_le_bytes()[0]
    }

    fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.next() % u64::try_from(limit).unwrap()).unwrap()
    }

    /// Changes, adds or takes away a few bytes.
    fn mutate(&mut self, bytes: &mut Vec<u8>) {
        for _ in 0..=self.below(4) {
            let at = self.below(bytes.len() + 1);
            match self.below(4) {
                0 if at < bytes.len() => bytes[at] = self.byte(),
                1 if at < bytes.len() => bytes[at] ^= 1 << self.below(8),
                2 => bytes.insert(at, self.byte()),
                _ if at < bytes.len() => drop(bytes.remove(at)),
                _ => bytes.truncate(at),
            }
        }
    }
}

struct Garbage {
    child: Child,
    socket: OwnedFd,
}

/// The program as a file that can be executed.
fn program() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("denizen-init");
    std::fs::write(&path, denizen_init::PROGRAM).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o700)).unwrap();
    (folder, path)
}

impl Garbage {
    fn new(program: &PathBuf) -> Self {
        let (socket, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
                .unwrap();
        let mut command = Command::new(program);
        let command = command.arg("1").env_clear().stdin(theirs).stdout(Stdio::null());
        // Another test of this program may be about to fork while the file is being written.
        let child = loop {
            match command.spawn() {
                Err(error) if error.raw_os_error() == Some(26) => std::thread::yield_now(),
                spawned => break spawned.unwrap(),
            }
        };
        Self { child, socket }
    }

    /// Sends a packet; events that stand in its way are read and forgotten.
    fn send(&self, packet: &[u8], descriptors: &[BorrowedFd<'_>]) {
        loop {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            if !descriptors.is_empty() {
                control.push(SendAncillaryMessage::ScmRights(descriptors));
            }
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            match sendmsg(&self.socket, &[IoSlice::new(packet)], &mut control, flags) {
                Err(Errno::AGAIN) => {
                    let mut ready = [PollFd::new(&self.socket, PollFlags::IN | PollFlags::OUT)];
                    assert!(poll(&mut ready, Some(&DEADLINE)).unwrap() > 0, "it hangs");
                    if ready[0].revents().contains(PollFlags::IN) {
                        self.event();
                    }
                }
                sent => {
                    sent.unwrap();
                    return;
                }
            }
        }
    }

    /// The next event; none if it has ended.
    fn event(&self) -> Option<Vec<u8>> {
        let mut ready = [PollFd::new(&self.socket, PollFlags::IN)];
        assert!(poll(&mut ready, Some(&DEADLINE)).unwrap() > 0, "it says nothing");
        let mut buffer = vec![0; 1 << 16];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let parts = &mut [IoSliceMut::new(&mut buffer)];
        let received = recvmsg(&self.socket, parts, &mut control, RecvFlags::CMSG_CLOEXEC);
        // Gone with a packet of ours unread.
        let count = received.map_or(0, |received| received.bytes);
        buffer.truncate(count);
        (count > 0).then_some(buffer)
    }

    /// The next event of a kind.
    fn await_event(&self, kind: u8) -> Vec<u8> {
        loop {
            let event = self.event().expect("it has ended");
            if event[0] == kind {
                return event;
            }
        }
    }

    /// Closes the socket; gives the exit code.
    fn end(mut self) -> Option<i32> {
        drop(self.socket);
        let begin = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code();
            }
            assert!(begin.elapsed() < Duration::from_secs(20), "it does not end");
            std::thread::yield_now();
        }
    }
}

fn packet(kind: u8, flags: u8, id: u32, rest: &[u8]) -> Vec<u8> {
    [&[kind, flags, 0, 0][..], &id.to_le_bytes(), rest].concat()
}

fn file(content: &[u8]) -> OwnedFd {
    let fd = memfd_create("garbage", MemfdFlags::CLOEXEC).unwrap();
    let mut file = std::fs::File::from(fd);
    file.write_all(content).unwrap();
    file.into()
}

#[test]
fn packets_of_garbage_start_nothing() {
    let (_folder, program) = program();
    let strings = b"/\0/nowhere/at/all\0one\0PATH=/nowhere\0A=b\0";
    let counts = [2u32.to_le_bytes(), 2u32.to_le_bytes()].concat();
    let spawn = [&counts[..], strings].concat();
    let null = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(0o2_000_000)
        .open("/dev/null")
        .unwrap();
    let strings_file = file(strings);
    for seed in 0..6 {
        let mut choice = Choice(seed);
        let garbage = Garbage::new(&program);
        // Commands have been asked for: too late for a sandbox.
        garbage.send(&packet(1, 0, 1, &spawn), &[]);
        garbage.await_event(2);
        for _ in 0..2000 {
            let kind = u8::try_from(choice.below(12)).unwrap();
            let id = u32::try_from(choice.below(4)).unwrap();
            let rest = match kind {
                1 => spawn.clone(),
                2 => 9u32.to_le_bytes().to_vec(),
                _ => Vec::new(),
            };
            let flags = choice.byte();
            let mut packet = packet(kind, flags, id, &rest);
            if choice.below(3) > 0 {
                choice.mutate(&mut packet);
            }
            let fds = [null.as_fd(), null.as_fd(), null.as_fd(), strings_file.as_fd()];
            let fds = [&fds[..], &fds].concat();
            // An empty packet is the end.
            if !packet.is_empty() {
                let count = choice.below(fds.len() + 1);
                garbage.send(&packet, &fds[..count]);
            }
        }
        garbage.send(&packet(4, 0, 77, &[]), &[]);
        let listing = loop {
            let event = garbage.await_event(6);
            if event[4..8] == 77u32.to_le_bytes() {
                break event;
            }
        };
        assert_eq!(listing.len(), 8, "seed {seed}: something runs: {listing:?}");
        assert_eq!(garbage.end(), Some(0), "seed {seed}");
    }
}

#[test]
fn a_file_too_big_is_refused() {
    let (_folder, program) = program();
    let huge = memfd_create("huge", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&huge, 1 << 45).unwrap();
    let garbage = Garbage::new(&program);
    let counts = [1u32.to_le_bytes(), 0u32.to_le_bytes()].concat();
    garbage.send(&packet(1, 2, 5, &counts), &[huge.as_fd(); 4]);
    assert_eq!(garbage.await_event(2)[4..12], [5, 0, 0, 0, 7, 0, 0, 0]);
    garbage.send(&packet(7, 0, 0, &[]), &[huge.as_fd()]);
    garbage.await_event(8);
    assert_eq!(garbage.end(), Some(0));
    let garbage = Garbage::new(&program);
    garbage.send(&packet(7, 0, 0, &[]), &[huge.as_fd()]);
    garbage.await_event(8);
    assert_eq!(garbage.end(), Some(1));
}

/// The words of a plan that makes a sandbox of this user's.
fn plan(words: &[&str]) -> Vec<u8> {
    words.iter().flat_map(|word| [word.as_bytes(), &[0]].concat()).collect()
}

/// Owners come and go: none of them can do more than one that was there from the start, and none
/// that only hangs up ends anything.
#[test]
fn owners_of_garbage_come_and_go() {
    let (folder, program) = program();
    let (user, group) = (rustix::process::geteuid(), rustix::process::getegid());
    let maps = [user.as_raw(), group.as_raw()].map(|id| format!("0 {id} 1"));
    let words = ["alone", "map", &maps[0], &maps[1], "fs", "/usr", "0", "tmpfs", "1", "mode=755"];
    let more = ["dir", "/proc", "555", "fs", "/proc", "14", "proc", "0"];
    let plan = file(&plan(&[&words[..], &more].concat()));
    let name = SocketAddrUnix::new(folder.path().join("socket")).unwrap();
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = || socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
    let listener = socket();
    bind(&listener, &name).unwrap();
    let mut garbage = Garbage::new(&program);
    let time = 60_000u32.to_le_bytes();
    garbage.send(&packet(7, 0, 0, &time), &[plan.as_fd(), listener.as_fd(), listener.as_fd()]);
    garbage.await_event(7);
    drop(listener);
    let mut choice = Choice(5);
    for round in 0..60u32 {
        // Hung up in the middle of whatever.
        garbage.socket = socket();
        connect(&garbage.socket, &name).unwrap();
        let word = garbage.await_event(10);
        assert_eq!(word, packet(10, 0, 0, &1u32.to_le_bytes()), "round {round}");
        for _ in 0..choice.below(50) {
            // All but what ends everything.
            let kind = [1, 2, 4, 6, 7, 8, 9, 10, 11][choice.below(9)];
            let length = choice.below(40);
            let rest: Vec<u8> = (0..length).map(|_| choice.byte()).collect();
            let packet = packet(kind, choice.byte(), choice.below(3).try_into().unwrap(), &rest);
            let fds = [plan.as_fd(); 3];
            garbage.send(&packet, &fds[..choice.below(4)]);
        }
    }
    garbage.socket = socket();
    connect(&garbage.socket, &name).unwrap();
    garbage.await_event(10);
    garbage.send(&packet(4, 0, 77, &[]), &[]);
    assert_eq!(garbage.await_event(6).len(), 8, "something runs");
    // A word first, or one direction only: this one does not come back, and wants no other.
    shutdown(&garbage.socket, Shutdown::Write).unwrap();
    let begin = Instant::now();
    while garbage.child.try_wait().unwrap().is_none() {
        assert!(begin.elapsed() < Duration::from_secs(20), "it does not end");
        std::thread::yield_now();
    }
    assert_eq!(connect(socket(), &name), Err(Errno::CONNREFUSED));
}

/// The process outside is killed at any moment: the one inside goes with it, though its owner is
/// still there.
#[test]
fn a_sandbox_ends_with_the_process_outside() {
    let (_folder, program) = program();
    let (user, group) = (rustix::process::geteuid(), rustix::process::getegid());
    let maps = [user.as_raw(), group.as_raw()].map(|id| format!("0 {id} 1"));
    let words = ["alone", "map", &maps[0], &maps[1], "fs", "/usr", "0", "tmpfs", "1", "mode=755"];
    let more = ["dir", "/proc", "555", "fs", "/proc", "14", "proc", "0"];
    let plan = file(&plan(&[&words[..], &more].concat()));
    let mut choice = Choice(7);
    let mut seen = 0;
    for round in 0..1000 {
        let mut garbage = Garbage::new(&program);
        garbage.send(&packet(7, 0, 0, &[]), &[plan.as_fd()]);
        let outside = garbage.child.id();
        let children = format!("/proc/{outside}/task/{outside}/children");
        let begin = Instant::now();
        let inside = loop {
            let children = std::fs::read_to_string(&children).unwrap();
            if let Some(child) = children.split_whitespace().next() {
                break child.parse().unwrap();
            }
            assert!(begin.elapsed() < Duration::from_secs(20), "nothing is inside");
        };
        let inside = pidfd_open(Pid::from_raw(inside).unwrap(), PidfdFlags::empty());
        // Entering takes longer.
        let moment = Duration::from_micros(choice.next() % 600);
        let begin = Instant::now();
        while begin.elapsed() < moment {
            std::hint::spin_loop();
        }
        garbage.child.kill().unwrap();
        garbage.child.wait().unwrap();
        let Ok(inside) = inside else { continue };
        seen += 1;
        let mut ended = [PollFd::new(&inside, PollFlags::IN)];
        assert_eq!(poll(&mut ended, Some(&DEADLINE)), Ok(1), "round {round}: it goes on");
    }
    assert!(seen > 900, "{seen}");
}

#[test]
fn a_plan_that_is_none_is_refused() {
    let (folder, program) = program();
    let (user, group) = (rustix::process::geteuid(), rustix::process::getegid());
    let maps = [user.as_raw(), group.as_raw()].map(|id| format!("0 {id} 1"));
    let source = folder.path().to_str().unwrap();
    let words = [
        ["alone", "map", &maps[0], &maps[1], "fs", "/usr", "0", "tmpfs", "1", "mode=755"].to_vec(),
        ["dir", "/proc", "555", "fs", "/proc", "14", "proc", "0", "dir", "/a", "755"].to_vec(),
        ["bind", "/a", "15", source, "try", "/a", "14", "sysfs", "0", "file", "/b"].to_vec(),
        ["link", "b", "/c", "hide", "/a", "protect", "/proc/sys", "host", "x"].to_vec(),
        ["loopback", "limit", "7", "64", "root-only", "capabilities", "ff"].to_vec(),
        // Allow everything (`SECCOMP_RET_ALLOW`).
        ["calls", "7fff000000000006"].to_vec(),
    ];
    let words = words.concat();
    // Whether the sandbox was entered.
    let enter = |plan: &[u8]| {
        let garbage = Garbage::new(&program);
        let file = file(plan);
        garbage.send(&packet(7, 0, 0, &[]), &[file.as_fd()]);
        let event = garbage.event().expect("it says nothing of why");
        let code = garbage.end();
        match event[0] {
            7 => assert_eq!(code, Some(0), "{:?}", String::from_utf8_lossy(plan)),
            8 => assert_eq!(code, Some(1), "{:?}", String::from_utf8_lossy(plan)),
            other => panic!("event {other}"),
        }
        event[0] == 7
    };
    assert!(enter(&plan(&words)), "the plan itself is wrong");
    assert!(!enter(b""));
    let mut choice = Choice(3);
    let mut refused = 0;
    for _ in 0..300 {
        let mut words = words.clone();
        let at = choice.below(words.len());
        let mut bytes = match choice.below(5) {
            0 => {
                words.remove(at);
                plan(&words)
            }
            1 => {
                let other = choice.below(words.len());
                words.swap(at, other);
                plan(&words)
            }
            2 => plan(&words[..at]),
            _ => plan(&words),
        };
        if choice.below(2) == 0 {
            choice.mutate(&mut bytes);
        }
        refused += u32::from(!enter(&bytes));
    }
    assert!(refused > 100, "{refused}");
}
