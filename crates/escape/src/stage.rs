//! The host's side of the suite: makes what the attempts go for, tells the facts, and sees
//! what was touched.
//!
//! `denizen-escape stage DIR [--system]` prints one line, `{"args": […], "env": {…}}`: the
//! facts as arguments for `run`, and variables to put into the environment of whatever
//! makes the session. For every line on its standard input it prints `{"traces": […]}`:
//! what has been touched since. When its input ends it removes all it made. It is the
//! process of the host that attempts go for (`host-pid`), so it must hold no privilege of
//! its own and survive being looked at. With `--system` there are markers in the host's
//! `/etc` and `/usr` too.

use std::fs::File;
use std::io::{BufRead, Error, ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, TcpListener, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::{SocketAddr, UnixListener};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FileType, Mode};
use serde_json::{Map, Value, json};

use crate::attempt::{open, read_text};
use crate::files::{SHADOWS, fingerprint, handle_of};
use crate::kernel::{add_user_key, session_keyring};
use crate::namespaces::KINDS;
use crate::sys::{self, Arg};

/// What the process is called.
const NAME: &std::ffi::CStr = c"escape-stage";
/// What a marker holds until somebody changes it.
const MARK: &[u8] = b"as it was\n";
/// Asks for the number of a mount namespace.
const NS_GET_MNTNS_ID: i64 = 0x8008_b705;

/// What is to be undone, and what is watched.
#[derive(Default)]
struct Stage {
    facts: Vec<(&'static str, String)>,
    remove: Vec<PathBuf>,
    markers: Vec<PathBuf>,
    listeners: Vec<(&'static str, Listener)>,
    terminal: Option<OwnedFd>,
    fifo: Option<File>,
    queue: Option<(std::ffi::CString, OwnedFd)>,
    segments: Vec<(i64, i64)>,
    key: Option<i64>,
    /// Kept open, so that they can be found in /proc.
    held: Vec<File>,
    /// Settings of the whole system, as they were.
    settings: Vec<(&'static str, Vec<u8>)>,
    other_volume: PathBuf,
}

enum Listener {
    Tcp(TcpListener),
    Udp(UdpSocket),
    Unix(UnixListener),
}

/// Sets the stage up in a folder, tells, and takes it down when the input ends.
pub fn run(folder: &Path, system: bool) -> Result<(), Error> {
    rustix::thread::set_name(NAME)?;
    let mut stage = Stage::default();
    let told = stage.set_up(folder, system).and_then(|()| stage.talk());
    stage.take_down();
    told
}

impl Stage {
    fn fact(&mut self, name: &'static str, value: impl std::fmt::Display) {
        self.facts.push((name, value.to_string()));
    }

    fn path_fact(&mut self, name: &'static str, path: &Path) {
        self.fact(name, path.display());
    }

    fn set_up(&mut self, folder: &Path, system: bool) -> Result<(), Error> {
        std::fs::create_dir_all(folder)?;
        let folder = folder.canonicalize()?;
        let pid = std::process::id();
        let secret = secret(pid);
        self.fact("secret", &secret);
        self.fact("host-pid", pid);
        self.fact("host-comm", NAME.to_string_lossy());
        self.files(&folder, &secret)?;
        self.elsewhere(pid, &secret);
        self.all_markers(&folder, pid, system)?;
        self.sockets(&folder, pid)?;
        self.channels(&folder, pid, &secret)?;
        for kind in KINDS {
            let link = std::fs::read_link(format!("/proc/self/ns/{kind}"))?;
            self.path_fact("host-ns", &link);
        }
        let mut number = [0; 8];
        let namespace = open(Path::new("/proc/self/ns/mnt"))?;
        let fd = Arg::Num(i64::from(namespace.as_raw_fd()));
        let ask = &mut [fd, Arg::Num(NS_GET_MNTNS_ID), Arg::Out(&mut number)];
        if sys::call(libc::SYS_ioctl, ask).is_ok() {
            self.fact("host-mounts", u64::from_ne_bytes(number));
        } else {
            // A kernel without it has no listmount(2) for others either.
            self.fact("host-mounts", 0);
        }
        for path in ["/proc/sys/kernel/core_pattern", "/proc/sys/kernel/hostname"] {
            self.settings.push((path, std::fs::read(path).unwrap_or_default()));
        }
        Ok(())
    }

    /// Files in the folder: the secret and another session's volume. Everybody may read
    /// them, so that nothing but the isolation keeps them.
    fn files(&mut self, folder: &Path, secret: &str) -> Result<(), Error> {
        let file = folder.join("secret");
        self.make_file(&file, format!("{secret}\n").as_bytes())?;
        self.held.push(open(&file)?);
        self.held.push(open(folder)?);
        self.path_fact("host-file", &file);
        if let Ok((kind, bytes)) = handle_of(&file) {
            let hex = bytes.iter().fold(String::new(), |text, byte| text + &format!("{byte:02x}"));
            self.fact("host-handle", format!("{kind}:{hex}"));
        }
        let root = folder.join("pool");
        let volume = root.join("00000000-0000-4000-8000-00000000e5ca").join("volume");
        std::fs::create_dir_all(&volume)?;
        std::fs::set_permissions(&volume, std::fs::Permissions::from_mode(0o777))?;
        self.remove.push(root.clone());
        self.make_file(&volume.join("notes"), format!("{secret}\n").as_bytes())?;
        self.path_fact("volume-root", &root);
        self.path_fact("other-volume", &volume);
        self.other_volume = volume;
        // The secret in memory only.
        let memory = rustix::fs::memfd_create("secret", rustix::fs::MemfdFlags::CLOEXEC)?;
        let mut memory = File::from(memory);
        memory.write_all(secret.as_bytes())?;
        self.held.push(memory);
        Ok(())
    }

    /// Files in places of the host that a session has its own of. Where one cannot be made,
    /// its fact is left out.
    fn elsewhere(&mut self, pid: u32, secret: &str) {
        let name = format!("denizen-escape-stage-{pid}");
        let home = std::env::var_os("HOME").map(PathBuf::from).unwrap_or_default();
        let places = [
            ("tmp-file", PathBuf::from("/tmp")),
            ("shm-file", PathBuf::from("/dev/shm")),
            ("run-file", PathBuf::from("/run")),
            ("home-file", home),
        ];
        for (fact, place) in places {
            let path = place.join(&name);
            if place.is_absolute() && self.make_file(&path, secret.as_bytes()).is_ok() {
                self.path_fact(fact, &path);
            }
        }
        for path in SHADOWS {
            match std::fs::read(path) {
                Ok(bytes) if !bytes.is_empty() => self.fact("shadow-print", fingerprint(&bytes)),
                _ => {}
            }
        }
    }

    fn all_markers(&mut self, folder: &Path, pid: u32, system: bool) -> Result<(), Error> {
        let mut paths = vec![folder.join("marker")];
        if system {
            for place in ["/etc", "/usr", "/usr/bin"] {
                paths.push(Path::new(place).join(format!("denizen-escape-marker-{pid}")));
            }
        }
        for path in paths {
            self.make_file(&path, MARK)?;
            // Whoever gets there may write.
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o666))?;
            self.path_fact("marker", &path);
            self.fact("marker-dev", std::fs::metadata(&path)?.dev());
            self.markers.push(path);
        }
        Ok(())
    }

    fn sockets(&mut self, folder: &Path, pid: u32) -> Result<(), Error> {
        let tcp = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        self.fact("host-port", tcp.local_addr()?.port());
        self.listen("a TCP connection", Listener::Tcp(tcp))?;
        if let Ok(tcp) = TcpListener::bind((Ipv6Addr::LOCALHOST, 0)) {
            self.fact("host-port6", tcp.local_addr()?.port());
            self.listen("a TCP connection to ::1", Listener::Tcp(tcp))?;
        }
        let udp = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
        self.fact("host-udp", udp.local_addr()?.port());
        self.listen("a UDP packet", Listener::Udp(udp))?;
        let name = format!("denizen-escape-{pid}");
        let address = SocketAddr::from_abstract_name(&name)?;
        let listener = UnixListener::bind_addr(&address)?;
        self.fact("abstract", &name);
        self.listen("a connection to the abstract socket", Listener::Unix(listener))?;
        let path = folder.join("socket");
        self.bind(&path, "host-socket", "a connection to the Unix socket")?;
        let path = folder.join("control");
        self.bind(&path, "control-socket", "a connection to the control channel")
    }

    fn bind(&mut self, path: &Path, fact: &'static str, what: &'static str) -> Result<(), Error> {
        let listener = UnixListener::bind(path)?;
        self.remove.push(path.to_owned());
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o777))?;
        self.path_fact(fact, path);
        self.listen(what, Listener::Unix(listener))
    }

    fn listen(&mut self, what: &'static str, listener: Listener) -> Result<(), Error> {
        match &listener {
            Listener::Tcp(socket) => socket.set_nonblocking(true)?,
            Listener::Udp(socket) => socket.set_nonblocking(true)?,
            Listener::Unix(socket) => socket.set_nonblocking(true)?,
        }
        self.listeners.push((what, listener));
        Ok(())
    }

    /// A FIFO, a terminal, and what the kernel keeps by a key or a name.
    fn channels(&mut self, folder: &Path, pid: u32, secret: &str) -> Result<(), Error> {
        let path = folder.join("fifo");
        rustix::fs::mknodat(CWD, &path, FileType::Fifo, Mode::from_raw_mode(0o622), 0)?;
        self.remove.push(path.clone());
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o666))?;
        self.fifo = Some(open(&path)?);
        self.path_fact("host-fifo", &path);

        let flags = rustix::pty::OpenptFlags::RDWR | rustix::pty::OpenptFlags::NOCTTY;
        let terminal = rustix::pty::openpt(flags)?;
        rustix::pty::grantpt(&terminal)?;
        rustix::pty::unlockpt(&terminal)?;
        let name = rustix::pty::ptsname(&terminal, Vec::new())?;
        let name = PathBuf::from(name.to_string_lossy().into_owned());
        rustix::io::ioctl_fionbio(&terminal, true)?;
        // Held open at this end too, or whatever is typed is lost with its last user.
        self.held.push(open(&name)?);
        self.path_fact("tty", &name);
        self.fact("tty-dev", std::fs::metadata(&name)?.dev());
        self.terminal = Some(terminal);

        let key = i64::from(pid) | 0x0e5c_0000_i64;
        let key = i32::try_from(key & 0x7fff_ffff).unwrap_or(1);
        self.fact("sysv-key", key);
        let mode = i64::from(libc::IPC_CREAT | libc::IPC_EXCL | 0o666);
        let key_number = i64::from(key);
        self.segments
            .push((libc::SYS_shmctl, i64::from(sys::make_shared(key, secret.as_bytes())?)));
        let queue = sys::call(libc::SYS_msgget, &mut [Arg::Num(key_number), Arg::Num(mode)])?;
        self.segments.push((libc::SYS_msgctl, queue));
        let create = &mut [Arg::Num(key_number), Arg::Num(1), Arg::Num(mode)];
        let set = sys::call(libc::SYS_semget, create)?;
        self.segments.push((libc::SYS_semctl, set));

        let name = std::ffi::CString::new(format!("denizen-escape-{pid}"))?;
        let flags = i64::from(libc::O_RDWR | libc::O_CREAT | libc::O_NONBLOCK | libc::O_CLOEXEC);
        let create = &mut [Arg::Text(&name), Arg::Num(flags), Arg::Num(0o666), Arg::Num(0)];
        let queue = sys::owned(sys::call(libc::SYS_mq_open, create))?;
        self.fact("mq", name.to_string_lossy());
        self.queue = Some((name.clone(), queue));

        if let Ok(id) = session_keyring() {
            self.fact("host-keyring", id);
        }
        const USER_KEYRING: i64 = -4;
        const SET_PERMISSIONS: i64 = 5;
        if let Ok(id) = add_user_key(name.as_bytes(), secret.as_bytes(), USER_KEYRING) {
            // All rights for whoever is this user, possessing it or not.
            let all = &mut [Arg::Num(SET_PERMISSIONS), Arg::Num(id), Arg::Num(0x3f3f_0000)];
            sys::call(libc::SYS_keyctl, all)?;
            self.fact("key-id", id);
            self.fact("key-name", name.to_string_lossy());
            self.key = Some(id);
        }
        Ok(())
    }

    fn make_file(&mut self, path: &Path, bytes: &[u8]) -> Result<(), Error> {
        let mut file = File::create_new(path)?;
        self.remove.push(path.to_owned());
        file.write_all(bytes)?;
        file.set_permissions(std::fs::Permissions::from_mode(0o644))
    }

    fn talk(&mut self) -> Result<(), Error> {
        let arguments: Vec<String> = self
            .facts
            .iter()
            .flat_map(|(name, value)| [format!("--{name}"), value.clone()])
            .collect();
        let mut environment = Map::new();
        let secret = secret(std::process::id());
        environment.insert("DENIZEN_API_KEY".into(), Value::String(secret.clone()));
        environment.insert("HOST_SETTING".into(), Value::String(secret));
        say(&json!({ "args": arguments, "env": environment }))?;
        for line in std::io::stdin().lock().lines() {
            line?;
            say(&json!({ "traces": self.traces() }))?;
        }
        Ok(())
    }

    /// What was touched since this was last asked; markers are put back as they were.
    fn traces(&mut self) -> Vec<String> {
        let mut traces = Vec::new();
        for (what, listener) in &self.listeners {
            while listener.has_more() {
                traces.push((*what).to_owned());
            }
        }
        for marker in &self.markers {
            let bytes = std::fs::read(marker).unwrap_or_default();
            let mode = std::fs::metadata(marker).map(|meta| meta.mode() & 0o7777);
            if bytes != MARK || mode.as_ref().ok() != Some(&0o666) {
                let text = String::from_utf8_lossy(&bytes);
                traces.push(format!("{} changed: {}", marker.display(), text.trim()));
                let _ = std::fs::write(marker, MARK);
                let mode = std::fs::Permissions::from_mode(0o666);
                let _ = std::fs::set_permissions(marker, mode);
            }
        }
        let names = std::fs::read_dir(&self.other_volume).into_iter().flatten().flatten();
        for entry in names.filter(|entry| entry.file_name() != "notes") {
            traces.push(format!("{} was made", entry.path().display()));
            let _ = std::fs::remove_file(entry.path());
        }
        let mut buffer = [0; 256];
        if let Some(fifo) = &mut self.fifo
            && matches!(fifo.read(&mut buffer), Ok(1..))
        {
            traces.push("the FIFO was written to".into());
        }
        if let Some(terminal) = &self.terminal
            && matches!(rustix::io::read(terminal.as_fd(), &mut buffer), Ok(1..))
        {
            traces.push("the terminal was used".into());
        }
        for (path, before) in &self.settings {
            if std::fs::read(path).is_ok_and(|now| now != *before) {
                traces.push(format!("{path} changed"));
            }
        }
        if read_text("/proc/self/status").is_ok_and(|text| !text.contains("TracerPid:\t0\n")) {
            traces.push("the stage is traced".into());
        }
        traces
    }

    fn take_down(&mut self) {
        for (call, id) in &self.segments {
            let remove = i64::from(libc::IPC_RMID);
            // semctl(2) has the number of a semaphore before the command.
            let mut arguments = match *call {
                libc::SYS_semctl => vec![Arg::Num(*id), Arg::Num(0), Arg::Num(remove)],
                _ => vec![Arg::Num(*id), Arg::Num(remove)],
            };
            let _ = sys::call(*call, &mut arguments);
        }
        if let Some((name, _)) = &self.queue {
            let _ = sys::call(libc::SYS_mq_unlink, &mut [Arg::Text(name)]);
        }
        if let Some(id) = self.key {
            const UNLINK: i64 = 9;
            let arguments = &mut [Arg::Num(UNLINK), Arg::Num(id), Arg::Num(-4)];
            let _ = sys::call(libc::SYS_keyctl, arguments);
        }
        for path in self.remove.iter().rev() {
            // Only the pool is a folder, and all in it is ours.
            let _ = match std::fs::remove_file(path) {
                Err(error) if error.kind() == ErrorKind::IsADirectory => {
                    std::fs::remove_dir_all(path)
                }
                other => other,
            };
        }
    }
}

impl Listener {
    /// Takes one connection or packet.
    fn has_more(&self) -> bool {
        match self {
            Self::Tcp(socket) => socket.accept().is_ok(),
            Self::Udp(socket) => socket.recv(&mut [0; 64]).is_ok(),
            Self::Unix(socket) => socket.accept().is_ok(),
        }
    }
}

/// A word that is in no other file of this machine.
fn secret(pid: u32) -> String {
    format!("secret-of-the-host-{pid}")
}

fn say(value: &Value) -> Result<(), Error> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{value}")?;
    out.flush()
}
