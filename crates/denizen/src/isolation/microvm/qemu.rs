//! QEMU as what runs guests. Each is a process of its own with as few devices as will do, spoken
//! to by its machine protocol (QMP) on a socket that it is born with. Nothing of it listens
//! where others could connect, and it opens no file but those that its command line names.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use denizen_agent::{Agent, Spawn};
use futures::StreamExt;
use parking_lot::Mutex;
use qapi::futures::{QapiService, QmpStreamTokio};
use qapi::qmp;
use rustix::fs::{Mode, OFlags};
use tokio::io::{AsyncRead, AsyncReadExt, ReadBuf, WriteHalf};
use tokio::net::{UnixListener, UnixStream};
use tokio::runtime::Handle;
use tokio::sync::{mpsc, watch};
use tokio::task::AbortHandle;

use super::hypervisor::{DISK, Guest, Hardware, Hypervisor, INITRAMFS, KERNEL, ROOT, TOOLS, Walls};

/// The program, as packages of distributions have it.
const PROGRAM: &str = "/usr/bin/qemu-system-x86_64";

/// How long an answer to a command may take: none of those used here waits for the guest.
const ANSWER: Duration = Duration::from_secs(20);
/// How long memory may take to be saved or brought back.
const MEMORY: Duration = Duration::from_mins(5);
/// How long until it is tried again whether there is room on the disk.
const ROOM: Duration = Duration::from_secs(3);
/// How much of what a guest prints is kept.
const WORDS: usize = 8 * 1024;
/// More than any line that QEMU says.
const LINE: usize = 1 << 20;

/// How a processor is had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Accelerator {
    /// By the host's own, and Linux's KVM.
    Kvm,
    /// By translating its instructions.
    Tcg,
}

impl Accelerator {
    fn arguments(self) -> [&'static str; 4] {
        match self {
            Self::Kvm => ["-accel", "kvm", "-cpu", "host"],
            Self::Tcg => ["-accel", "tcg", "-cpu", "max"],
        }
    }
}

/// The QEMU of this machine.
#[derive(Clone)]
pub(super) struct Qemu {
    accelerator: Accelerator,
    version: String,
    identity: String,
    runtime: Handle,
}

impl Qemu {
    /// The one that is installed, doing without KVM.
    pub(super) fn find(runtime: Handle) -> io::Result<Self> {
        let version = version().map_err(|error| {
            let mend = "apt-get install qemu-system-x86";
            io::Error::new(error.kind(), format!("{PROGRAM} cannot be run ({error}): {mend}"))
        })?;
        Ok(Self::with(version, Accelerator::Tcg, runtime))
    }

    /// The same on KVM.
    pub(super) fn on_kvm(self) -> Self {
        Self::with(self.version, Accelerator::Kvm, self.runtime)
    }

    fn with(version: String, accelerator: Accelerator, runtime: Handle) -> Self {
        let hardware =
            Hardware { memory: 0, processors: 0, network: true, command_line: String::new() };
        // Another set of devices is another machine.
        let devices = arguments(accelerator, &hardware, true).join(" ");
        let identity = format!("{version} {devices}");
        Self { accelerator, version, identity, runtime }
    }

    async fn start(
        &self,
        walls: Walls<'_>,
        hardware: &Hardware,
        incoming: bool,
    ) -> io::Result<Arc<Machine>> {
        let argv = std::iter::once(OsString::from(PROGRAM))
            .chain(arguments(self.accelerator, hardware, incoming).into_iter().map(OsString::from))
            .collect();
        let tmp = Folder::open(walls.tmp)?;
        let (control, their_control) = pair()?;
        let (port, their_port) = pair()?;
        let (words, their_words) = pair()?;
        let spawned = walls
            .agent
            .spawn_with(Spawn {
                argv,
                // Its temporary files go nowhere else.
                env: vec![("TMPDIR".into(), "/tmp".into())],
                user: None,
                cwd: "/".into(),
                stdin: their_control,
                stdout: their_port,
                stderr: their_words,
                controlling_terminal: false,
            })
            .await
            .map_err(io::Error::other)?;
        let said = Arc::new(Mutex::new(VecDeque::new()));
        let listening = tokio::spawn(listen(words, said.clone()));
        let ended = watch::Sender::new(false);
        let gone = ended.clone();
        let agent = walls.agent.clone();
        // It goes when the program does, which ends with the walls at the latest.
        tokio::spawn(async move {
            let _ = spawned.wait().await;
            drop(agent);
            gone.send_replace(true);
        });
        let lost = |said: &Mutex<VecDeque<u8>>, error: io::Error| {
            io::Error::new(error.kind(), format!("{error}: {}", last_words(said)))
        };
        let negotiated = async {
            let (read, write) = tokio::io::split(control);
            let stream = QmpStreamTokio::open_split(Lines::new(read), write).await?;
            stream.negotiate().await
        };
        let stream = match tokio::time::timeout(ANSWER, negotiated).await {
            Ok(Ok(stream)) => stream,
            Ok(Err(error)) => {
                // What it says of the reason comes with its end.
                let mut over = ended.subscribe();
                let _ = tokio::time::timeout(ANSWER, over.wait_for(|ended| *ended)).await;
                let _ = tokio::time::timeout(ANSWER, listening).await;
                return Err(lost(&said, error));
            }
            Err(_) => return Err(lost(&said, io::ErrorKind::TimedOut.into())),
        };
        let (service, mut events) = stream.into_parts();
        let (tell, told) = mpsc::channel(16);
        let (full, mut is_full) = mpsc::channel(1);
        let polling = tokio::spawn(async move {
            while let Some(event) = events.next().await {
                match event {
                    Ok(qmp::Event::MIGRATION { data, .. }) => drop(tell.send(data.status).await),
                    // It stands still then, and nothing is lost.
                    Ok(qmp::Event::BLOCK_IO_ERROR { data, .. }) if data.nospace == Some(true) => {
                        let _ = full.try_send(());
                    }
                    _ => {}
                }
            }
        });
        let machine = Arc::new(Machine {
            service,
            migration: tokio::sync::Mutex::new(told),
            port: Mutex::new(Some(port)),
            said,
            ended,
            walls: walls.agent.clone(),
            tmp,
            most: hardware.memory / 8 * 9 + (256 << 20),
            polling: polling.abort_handle(),
            runtime: self.runtime.clone(),
            paused: tokio::sync::Mutex::new(incoming),
        });
        let this = Arc::downgrade(&machine);
        tokio::spawn(async move {
            while is_full.recv().await.is_some() {
                tracing::warn!("no room for what a guest writes: it stands still until there is");
                tokio::time::sleep(ROOM).await;
                let Some(machine) = this.upgrade() else { return };
                let paused = machine.paused.lock().await;
                if !*paused {
                    // It says so again if there is still none.
                    let _ = machine.ask(qmp::cont {}).await;
                }
            }
        });
        Ok(machine)
    }
}

impl Hypervisor for Qemu {
    fn name(&self) -> String {
        let how = match self.accelerator {
            Accelerator::Kvm => "KVM",
            Accelerator::Tcg => "TCG, without KVM",
        };
        format!("QEMU {} on {how}", self.version)
    }

    fn identity(&self) -> &str {
        &self.identity
    }

    fn boot(&self, walls: Walls<'_>, hardware: &Hardware) -> io::Result<Arc<dyn Guest>> {
        Ok(self.runtime.block_on(self.start(walls, hardware, false))?)
    }

    fn restore(
        &self,
        walls: Walls<'_>,
        hardware: &Hardware,
        memory: &mut (dyn Read + Send),
    ) -> io::Result<Arc<dyn Guest>> {
        let begun = Instant::now();
        let machine = self.runtime.block_on(self.start(walls, hardware, true))?;
        tracing::debug!(took = ?begun.elapsed(), "QEMU answers");
        machine.load(memory).map_err(|error| match error.kind() {
            io::ErrorKind::TimedOut => error,
            _ => io::Error::new(io::ErrorKind::InvalidData, error),
        })?;
        Ok(machine)
    }
}

/// The version of the program, as it says.
fn version() -> io::Result<String> {
    let output = Command::new(PROGRAM).arg("--version").stdin(Stdio::null()).output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    let line = text.lines().next().unwrap_or_default();
    let version = line.rsplit_once("version ").map_or(line, |(_, version)| version);
    Ok(version.trim().to_owned())
}

/// The devices, in an order that stays: a memory that was saved knows them by their places.
fn arguments(accelerator: Accelerator, hardware: &Hardware, incoming: bool) -> Vec<String> {
    let mut all: Vec<String> = Vec::new();
    let mut add = |words: &[&str]| all.extend(words.iter().map(|word| (*word).to_owned()));
    add(&["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]);
    add(&["-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"]);
    add(&["-M", "q35,usb=off,vmport=off,smm=off,hpet=off,graphics=off,sata=off,smbus=off"]);
    add(&accelerator.arguments());
    add(&["-m", &format!("{}M", hardware.memory >> 20), "-smp", &hardware.processors.to_string()]);
    add(&["-kernel", KERNEL, "-initrd", INITRAMFS, "-append", &hardware.command_line]);
    add(&["-chardev", "socket,id=control,fd=0", "-mon", "chardev=control,mode=control"]);
    add(&["-chardev", "socket,id=console,fd=2", "-device", "isa-serial,chardev=console"]);
    for (name, file) in [("root", ROOT), ("tools", TOOLS)] {
        let file = format!("file.driver=file,file.filename={file},file.locking=off");
        add(&["-blockdev", &format!("driver=raw,node-name={name},read-only=on,{file}")]);
        add(&["-device", &format!("virtio-blk-pci-non-transitional,drive={name},serial={name}")]);
    }
    // Whatever the file says, it is all that there is.
    let disk = serde_json::json!({
        "driver": "qcow2",
        "node-name": "disk",
        "discard": "unmap",
        "backing": null,
        "file": { "driver": "file", "filename": DISK, "discard": "unmap" },
    });
    add(&["-blockdev", &disk.to_string()]);
    add(&["-device", "virtio-blk-pci-non-transitional,drive=disk,serial=disk,discard=on"]);
    add(&["-device", "virtio-serial-pci-non-transitional,max_ports=2"]);
    add(&["-chardev", "socket,id=port,fd=1"]);
    add(&["-device", "virtserialport,chardev=port,name=denizen"]);
    add(&["-device", "virtio-rng-pci-non-transitional"]);
    // What the guest has freed is freed here too.
    add(&["-device", "virtio-balloon-pci-non-transitional,free-page-reporting=on"]);
    if hardware.network {
        let net = "10.0.3.0/24,host=10.0.3.2,dns=10.0.3.3,dhcpstart=10.0.3.15";
        add(&["-netdev", &format!("user,id=net,ipv6=off,net={net}")]);
        add(&["-device", "virtio-net-pci-non-transitional,netdev=net,romfile="]);
    }
    if incoming {
        add(&["-S", "-incoming", "defer"]);
    }
    all
}

type Service = QapiService<QmpStreamTokio<WriteHalf<UnixStream>>>;

struct Machine {
    service: Service,
    /// How far memory is, saved or brought back.
    migration: tokio::sync::Mutex<mpsc::Receiver<qmp::MigrationStatus>>,
    port: Mutex<Option<UnixStream>>,
    said: Arc<Mutex<VecDeque<u8>>>,
    ended: watch::Sender<bool>,
    walls: Agent,
    tmp: Folder,
    /// More bytes than its memory and devices have when they are saved.
    most: u64,
    polling: AbortHandle,
    runtime: Handle,
    /// Whether it is to stand still.
    paused: tokio::sync::Mutex<bool>,
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.polling.abort();
    }
}

impl Machine {
    async fn ask<C: qmp::QmpCommand>(&self, command: C) -> io::Result<C::Ok> {
        let asked = self.service.execute(command);
        match tokio::time::timeout(ANSWER, asked).await {
            Ok(answer) => answer.map_err(|error| io::Error::other(error.to_string())),
            Err(_) => Err(io::Error::new(io::ErrorKind::TimedOut, "QEMU is silent")),
        }
    }

    /// Has it tell how far memory is, and not take its time.
    async fn prepare_migration(&self) -> io::Result<()> {
        // What is left of one that was given up says nothing of this one.
        let mut events = self.migration.lock().await;
        while events.try_recv().is_ok() {}
        drop(events);
        let capabilities = vec![qmp::MigrationCapabilityStatus {
            capability: qmp::MigrationCapability::events,
            state: true,
        }];
        self.ask(qmp::migrate_set_capabilities { capabilities }).await.map(drop)
    }

    /// Waits until memory is saved or brought back.
    async fn migrated(&self) -> io::Result<()> {
        let mut events = self.migration.lock().await;
        loop {
            match events.recv().await {
                Some(qmp::MigrationStatus::completed) => return Ok(()),
                Some(qmp::MigrationStatus::failed | qmp::MigrationStatus::cancelled) => {
                    let words = last_words(&self.said);
                    return Err(io::Error::other(format!("QEMU cannot do it: {words}")));
                }
                Some(_) => {}
                None => return Err(io::Error::other("QEMU has ended")),
            }
        }
    }

    fn load(&self, memory: &mut (dyn Read + Send)) -> io::Result<()> {
        let mut stream = self.runtime.block_on(async {
            self.prepare_migration().await?;
            self.ask(qmp::migrate_incoming {
                channels: None,
                exit_on_error: None,
                uri: Some("unix:/tmp/memory".to_owned()),
            })
            .await?;
            std::os::unix::net::UnixStream::connect(self.tmp.socket("memory")?.path())
        })?;
        stream.set_write_timeout(Some(ANSWER))?;
        // As much as there is.
        let copied = copy(memory, &mut stream, u64::MAX);
        drop(stream);
        copied?;
        let loaded = self.runtime.block_on(tokio::time::timeout(MEMORY, self.migrated()));
        let _ = std::fs::remove_file(self.tmp.join("memory"));
        loaded?
    }

    async fn begin_save(&self) -> io::Result<std::os::unix::net::UnixStream> {
        self.prepare_migration().await?;
        let no_limit = qmp::MigrateSetParameters {
            max_bandwidth: Some(1 << 40),
            ..qmp::MigrateSetParameters::default()
        };
        self.ask(qmp::migrate_set_parameters(no_limit)).await?;
        let path = self.tmp.join("memory");
        let _ = std::fs::remove_file(&path);
        let listener = UnixListener::bind(&path)?;
        // It has other users within its walls than here.
        let mode = std::fs::Permissions::from_mode(0o666);
        std::fs::set_permissions(self.tmp.socket("memory")?.path(), mode)?;
        let begun = async {
            let uri = Some("unix:/tmp/memory".to_owned());
            self.ask(qmp::migrate { channels: None, detach: None, resume: None, uri }).await?;
            let (stream, _) = listener.accept().await?;
            stream.into_std()
        };
        let begun = tokio::time::timeout(ANSWER, begun).await;
        let _ = std::fs::remove_file(&path);
        let stream = begun.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(Some(ANSWER))?;
        Ok(stream)
    }
}

impl Guest for Machine {
    fn port(&self) -> io::Result<UnixStream> {
        self.port.lock().take().ok_or_else(|| io::Error::other("the port has been taken"))
    }

    fn pause(&self) -> io::Result<()> {
        self.runtime.block_on(async {
            let mut paused = self.paused.lock().await;
            *paused = true;
            self.ask(qmp::stop {}).await.map(drop)
        })
    }

    fn go_on(&self) -> io::Result<()> {
        self.runtime.block_on(async {
            let mut paused = self.paused.lock().await;
            self.ask(qmp::cont {}).await?;
            *paused = false;
            Ok(())
        })
    }

    fn save(&self, into: &mut (dyn Write + Send)) -> io::Result<()> {
        let mut stream = self.runtime.block_on(self.begin_save())?;
        let copied = copy(&mut stream, into, self.most);
        drop(stream);
        let saved = self.runtime.block_on(tokio::time::timeout(MEMORY, self.migrated()));
        copied?;
        saved?
    }

    fn kill(&self) {
        let walls = self.walls.clone();
        self.runtime.spawn(async move { walls.clear().await });
    }

    fn ended(&self) -> watch::Receiver<bool> {
        self.ended.subscribe()
    }

    fn last_words(&self) -> String {
        last_words(&self.said)
    }
}

/// Copies memory, of which there is much.
fn copy(from: &mut dyn Read, into: &mut dyn Write, most: u64) -> io::Result<()> {
    let (begun, mut copied) = (Instant::now(), 0);
    let mut piece = vec![0; 1 << 20];
    loop {
        if begun.elapsed() > MEMORY || copied > most {
            return Err(io::Error::other("there is no end to the memory"));
        }
        match from.read(&mut piece) {
            Ok(0) => return into.flush(),
            Ok(count) => {
                into.write_all(piece.get(..count).unwrap_or_default())?;
                copied += count as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// A folder, or what is in it, that may be moved, and whose path may be longer than a socket's name can be (unix(7)).
struct Folder(OwnedFd);

impl Folder {
    fn open(path: &Path) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        Ok(Self(rustix::fs::open(path, flags, Mode::empty())?))
    }

    /// A socket in it. The folder is QEMU's: it may have put a link there meanwhile.
    fn socket(&self, name: &str) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let found = rustix::fs::openat(&self.0, name, flags, Mode::empty())?;
        let mode = rustix::fs::fstat(&found)?.st_mode;
        if rustix::fs::FileType::from_raw_mode(mode) != rustix::fs::FileType::Socket {
            return Err(io::Error::other("it is no socket"));
        }
        Ok(Self(found))
    }

    /// A path of it by which no link can be followed.
    fn path(&self) -> PathBuf {
        format!("/proc/self/fd/{}", self.0.as_raw_fd()).into()
    }

    /// A path by which something in it can be reached from here.
    fn join(&self, name: &str) -> PathBuf {
        format!("/proc/self/fd/{}/{name}", self.0.as_raw_fd()).into()
    }
}

/// A connection, this end of which is the runtime's.
fn pair() -> io::Result<(UnixStream, OwnedFd)> {
    let (ours, theirs) = std::os::unix::net::UnixStream::pair()?;
    ours.set_nonblocking(true)?;
    Ok((UnixStream::from_std(ours)?, theirs.into()))
}

/// Keeps the end of what is said.
async fn listen(mut from: UnixStream, said: Arc<Mutex<VecDeque<u8>>>) {
    let mut buffer = vec![0; 4096];
    while let Ok(count @ 1..) = from.read(&mut buffer).await {
        let mut said = said.lock();
        said.extend(buffer.iter().take(count));
        let too_many = said.len().saturating_sub(WORDS);
        said.drain(..too_many);
    }
}

/// The last lines, with nothing in them that a terminal would follow.
fn last_words(said: &Mutex<VecDeque<u8>>) -> String {
    let bytes: Vec<u8> = said.lock().iter().copied().collect();
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let last = lines.iter().skip(lines.len().saturating_sub(4));
    let last: Vec<String> = last
        .map(|line| line.chars().filter(|letter| !letter.is_control()).take(300).collect())
        .collect();
    last.join("; ")
}

/// Reads what QEMU says, and fails where it says lines without an end: it has the guest in it.
struct Lines<R> {
    inner: R,
    unended: usize,
}

impl<R> Lines<R> {
    fn new(inner: R) -> Self {
        Self { inner, unended: 0 }
    }
}

impl<R: AsyncRead + Unpin> AsyncRead for Lines<R> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        std::task::ready!(Pin::new(&mut self.inner).poll_read(cx, buffer))?;
        let new = buffer.filled().get(before..).unwrap_or_default();
        self.unended = match new.iter().rposition(|byte| *byte == b'\n') {
            Some(at) => new.len() - at,
            None => self.unended + new.len(),
        };
        if self.unended > LINE {
            return Poll::Ready(Err(io::ErrorKind::InvalidData.into()));
        }
        Poll::Ready(Ok(()))
    }
}
