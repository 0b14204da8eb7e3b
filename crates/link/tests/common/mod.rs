//! An owner, a guest in a thread with the real `denizen-init`, and the cable between them.
#![allow(clippy::unwrap_used, clippy::expect_used, dead_code)]

use std::collections::VecDeque;
use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use denizen_link::Link;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};

/// Longer than anything honest takes.
pub const DEADLINE: Timespec = Timespec { tv_sec: 20, tv_nsec: 0 };
pub const PATIENCE: Duration = Duration::from_secs(10);

/// A guest: the relay on a runtime of its own, and its init.
pub struct Guest {
    thread: Option<JoinHandle<std::io::Result<()>>>,
    init: Child,
    /// The end of its port that a hypervisor has.
    pub port: UnixStream,
    folder: tempfile::TempDir,
}

/// An init, and its owner's end.
fn launch(folder: &std::path::Path) -> (OwnedFd, Child) {
    let path = folder.join("denizen-init");
    std::fs::write(&path, denizen_init::PROGRAM).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o700)).unwrap();
    let (owner, theirs) =
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
    let mut command = Command::new(&path);
    let command = command.arg("7").env_clear().stdin(theirs).stdout(Stdio::null());
    // Another test of this program may be about to fork while the file is being written.
    let init = loop {
        match command.spawn() {
            Err(error) if error.raw_os_error() == Some(26) => std::thread::yield_now(),
            spawned => break spawned.unwrap(),
        }
    };
    (owner, init)
}

/// An owner of an init without relays.
pub fn direct() -> (Owner, Child) {
    let folder = tempfile::tempdir().unwrap();
    let (owner, init) = launch(folder.path());
    (Owner::new(owner), init)
}

impl Guest {
    pub fn new() -> Self {
        // Nothing there can go to rest, whoever runs this.
        Self::with("/proc")
    }

    pub fn with(path: &str) -> Self {
        let path = std::path::PathBuf::from(path);
        let folder = tempfile::tempdir().unwrap();
        let (owner, init) = launch(folder.path());
        let (port, guests) = UnixStream::pair().unwrap();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.unwrap().block_on(denizen_link::guest::serve(guests.into(), owner, &path))
        });
        Self { thread: Some(thread), init, port, folder }
    }

    /// Waits until it and its init have ended.
    pub fn ended(&mut self) -> std::io::Result<()> {
        let begin = Instant::now();
        let thread = self.thread.take().unwrap();
        while !thread.is_finished() || self.init.try_wait().unwrap().is_none() {
            assert!(begin.elapsed() < Duration::from_secs(20), "it does not end");
            std::thread::sleep(Duration::from_millis(1));
        }
        thread.join().unwrap()
    }

    pub fn init(&self) -> u32 {
        self.init.id()
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.init.kill();
        let _ = self.init.wait();
    }
}

/// An owner's end.
pub struct Owner {
    socket: OwnedFd,
    others: VecDeque<(Vec<u8>, Option<OwnedFd>)>,
    pub last: u32,
}

/// What a command is started with, seen from its owner.
pub struct Running {
    pub id: u32,
    pub stdin: Option<std::io::PipeWriter>,
    pub stdout: std::io::PipeReader,
    pub stderr: std::io::PipeReader,
}

impl Owner {
    pub fn new(socket: OwnedFd) -> Self {
        Self { socket, others: VecDeque::new(), last: 0 }
    }

    pub fn next_id(&mut self) -> u32 {
        self.last += 1;
        self.last
    }

    pub fn send(&self, packet: &[u8], descriptors: &[BorrowedFd<'_>]) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() {
            control.push(SendAncillaryMessage::ScmRights(descriptors));
        }
        sendmsg(&self.socket, &[IoSlice::new(packet)], &mut control, SendFlags::NOSIGNAL).unwrap();
    }

    /// The next event; none at the end.
    pub fn receive(&self) -> Option<(Vec<u8>, Option<OwnedFd>)> {
        let mut ready = [PollFd::new(&self.socket, PollFlags::IN)];
        assert!(poll(&mut ready, Some(&DEADLINE)).unwrap() > 0, "it says nothing");
        let mut buffer = vec![0; 1 << 16];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let parts = &mut [IoSliceMut::new(&mut buffer)];
        let received = recvmsg(&self.socket, parts, &mut control, RecvFlags::CMSG_CLOEXEC);
        let count = received.map_or(0, |received| received.bytes);
        let fd = control.drain().find_map(|part| match part {
            RecvAncillaryMessage::ScmRights(mut rights) => rights.next(),
            _ => None,
        });
        buffer.truncate(count);
        (count > 0).then_some((buffer, fd))
    }

    /// The event of one of these kinds and this id.
    pub fn event(&mut self, kinds: &[u8], id: u32) -> (Vec<u8>, Option<OwnedFd>) {
        let wanted = |event: &[u8]| kinds.contains(&event[0]) && event[4..8] == id.to_le_bytes();
        if let Some(at) = self.others.iter().position(|(event, _)| wanted(event)) {
            return self.others.remove(at).unwrap();
        }
        loop {
            let (event, fd) = self.receive().expect("it has ended");
            if wanted(&event) {
                return (event, fd);
            }
            self.others.push_back((event, fd));
        }
    }

    /// Asks for a command without waiting.
    pub fn ask(&mut self, argv: &[&str], fds: [BorrowedFd<'_>; 3], terminal: bool) -> u32 {
        let id = self.next_id();
        let mut strings = vec!["/"];
        strings.extend(argv);
        strings.push("PATH=/usr/bin:/bin");
        let strings: Vec<u8> =
            strings.iter().flat_map(|string| [string.as_bytes(), &[0]].concat()).collect();
        let mut packet = packet(1, u8::from(terminal), id, &[]);
        packet.extend(u32::try_from(argv.len()).unwrap().to_le_bytes());
        packet.extend(1u32.to_le_bytes());
        let mut all = fds.to_vec();
        let file;
        if strings.len() > 16 * 1024 {
            let fd = rustix::fs::memfd_create("x", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
            let mut strings_file = std::fs::File::from(fd);
            strings_file.write_all(&strings).unwrap();
            packet[1] |= 2;
            file = strings_file;
            all.push(file.as_fd());
        } else {
            packet.extend(strings);
        }
        self.send(&packet, &all);
        id
    }

    /// Asks for a command with three pipes.
    pub fn begin(&mut self, argv: &[&str]) -> Running {
        let (their_stdin, stdin) = std::io::pipe().unwrap();
        let (stdout, their_stdout) = std::io::pipe().unwrap();
        let (stderr, their_stderr) = std::io::pipe().unwrap();
        let fds = [their_stdin.as_fd(), their_stdout.as_fd(), their_stderr.as_fd()];
        let id = self.ask(argv, fds, false);
        Running { id, stdin: Some(stdin), stdout, stderr }
    }

    pub fn spawn(&mut self, argv: &[&str]) -> Running {
        let running = self.begin(argv);
        self.started(running.id);
        running
    }

    pub fn sh(&mut self, script: &str) -> Running {
        self.spawn(&["sh", "-c", script])
    }

    pub fn started(&mut self, id: u32) {
        let (event, _) = self.event(&[1, 2], id);
        assert_eq!(event[0], 1, "not started: {event:?}");
    }

    /// How it ended: flags and number.
    pub fn exit(&mut self, id: u32) -> (u8, u32) {
        let (event, _) = self.event(&[3], id);
        (event[1], u32::from_le_bytes(event[8..12].try_into().unwrap()))
    }

    /// A terminal's master.
    pub fn terminal(&mut self) -> OwnedFd {
        let id = self.next_id();
        self.send(&packet(8, 0, id, &[]), &[]);
        let (event, fd) = self.event(&[9], id);
        assert_eq!(event[8..12], [0; 4]);
        fd.unwrap()
    }

    /// Starts a command on a terminal as crates/agent does; gives its id and the master.
    pub fn on_terminal(&mut self, argv: &[&str], columns: u16, rows: u16) -> (u32, std::fs::File) {
        use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, unlockpt};
        let master = self.terminal();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let slave = ioctl_tiocgptpeer(&master, flags).unwrap();
        let size =
            rustix::termios::Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        rustix::termios::tcsetwinsize(&master, size).unwrap();
        let id = self.ask(argv, [slave.as_fd(); 3], true);
        drop(slave);
        self.started(id);
        (id, master.into())
    }
}

pub fn packet(kind: u8, flags: u8, id: u32, rest: &[u8]) -> Vec<u8> {
    [&[kind, flags, 0, 0][..], &id.to_le_bytes(), rest].concat()
}

/// Reads a terminal until `text` was seen; gives all of it.
pub fn read_until(master: &mut std::fs::File, text: &str) -> String {
    let mut seen = Vec::new();
    while !String::from_utf8_lossy(&seen).contains(text) {
        let mut ready = [PollFd::new(&*master, PollFlags::IN)];
        assert!(poll(&mut ready, Some(&DEADLINE)).unwrap() > 0, "{text:?} does not come: {seen:?}");
        let mut buffer = [0; 1024];
        let count = master.read(&mut buffer).unwrap();
        seen.extend_from_slice(&buffer[..count]);
    }
    String::from_utf8(seen).unwrap()
}

/// What a hypervisor does: it copies between the guest's port and a transport of the host, until
/// about so many bytes have passed either way. Some of those are lost then.
pub async fn carry(
    port: &tokio::net::UnixStream,
    transport: UnixStream,
    limit: usize,
    choice: &mut Choice,
) {
    let transport = stream(transport);
    let mut passed = 0;
    let mut buffer = vec![0; 1 + choice.below(50_000)];
    while passed < limit {
        let (from, to) = tokio::select! {
            _ = port.readable() => (port, &transport),
            _ = transport.readable() => (&transport, port),
        };
        let count = match from.try_read(&mut buffer) {
            Ok(0) => return,
            Ok(count) => count,
            Err(_) => continue,
        };
        passed += count;
        let count = if passed < limit { count } else { choice.below(count + 1) };
        let mut rest = &buffer[..count];
        while !rest.is_empty() {
            to.writable().await.unwrap();
            match to.try_write(rest) {
                Ok(count) => rest = &rest[count..],
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(_) => return,
            }
        }
    }
}

/// A link that is connected to a guest without anything in between.
pub async fn pair() -> (Link, Owner, Guest) {
    let guest = Guest::new();
    let (link, owner) = Link::new().unwrap();
    link.connect(stream(guest.port.try_clone().unwrap()), PATIENCE).await.unwrap();
    (link, Owner::new(owner), guest)
}

pub fn stream(socket: UnixStream) -> tokio::net::UnixStream {
    socket.set_nonblocking(true).unwrap();
    tokio::net::UnixStream::from_std(socket).unwrap()
}

/// SplitMix64 (Steele, Lea and Flood).
pub struct Choice(pub u64);

impl Choice {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    pub fn byte(&mut self) -> u8 {
        self.next().to_le_bytes()[0]
    }

    pub fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.next() % u64::try_from(limit).unwrap()).unwrap()
    }

    pub fn bytes(&mut self, count: usize) -> Vec<u8> {
        let mut bytes: Vec<u8> =
            (0..count.div_ceil(8)).flat_map(|_| self.next().to_le_bytes()).collect();
        bytes.truncate(count);
        bytes
    }
}
