//! `denizen doctor`: what this machine offers, what is wrong, what that costs and how to mend
//! it. It finds out by trying wherever it can: a command is run under the configured isolation,
//! in a pool of its own on the same disk. It must never change anything but what it makes for
//! that and removes again.

mod service;

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use denizen::{Isolation, Sleep};
use rustix::fs::{Access, XattrFlags};
use serde_json::json;

use crate::config::Settings;
use crate::range::Range;
use crate::{Result, terminal};

/// How long the attempt to run a command may take.
const PATIENCE: Duration = Duration::from_mins(1);

/// What an attempt prints: that it runs, whether its calls are filtered, and whether a program
/// on the session's disk can be run.
const ATTEMPT: &str = "echo works
while read -r name value; do [ \"$name\" = Seccomp: ] && echo \"seccomp $value\"; done \
    < /proc/self/status
printf '#!/bin/sh\\necho runs\\n' > program && chmod +x program && ./program";

struct Finding {
    name: &'static str,
    grade: Grade,
    /// What was found, and what it costs.
    what: String,
    /// The one thing that mends it.
    mend: Option<String>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Grade {
    Fine,
    /// denizen works, with less than it could have.
    Note,
    /// This keeps it from working.
    Fail,
}

impl Grade {
    /// The grade of what could keep commands from running, when it is known whether they do.
    fn unless(works: bool) -> Self {
        if works { Self::Note } else { Self::Fail }
    }
}

/// What has come of the attempt to run a command.
struct Attempt {
    output: std::result::Result<String, String>,
    /// Resources that are limited for whole sessions.
    limited: Vec<&'static str>,
    /// Whether sessions could be frozen.
    freezer: bool,
    /// What has run a guest, if one was.
    machine: Option<String>,
}

impl Attempt {
    fn works(&self) -> bool {
        self.prints("works")
    }

    fn prints(&self, line: &str) -> bool {
        self.output.as_ref().is_ok_and(|output| output.lines().any(|other| other == line))
    }
}

/// Prints the findings; exit code 1 if one of them keeps denizen from working.
pub async fn run(settings: &Settings, range: &Range, as_json: bool) -> Result<i32> {
    let mut findings =
        vec![configuration(settings), shell(settings), disk(&settings.pool.volume_root)];
    let attempt = attempt(settings).await;
    let works = attempt.works();
    findings.extend([socket(&settings.socket), daemon(settings).await]);
    findings.extend(service::findings(settings).await);
    findings.extend(file_system(&settings.pool.volume_root, works));
    if settings.isolation == Isolation::Sandbox {
        findings.extend([
            kernel(works),
            user_namespaces(works),
            user_ids(range, works),
            attributes(settings, works),
            landlock(),
            limits(settings, &attempt),
            disk_limit(settings),
        ]);
        findings.extend(seccomp(&attempt));
    }
    if settings.isolation == Isolation::MicroVm {
        findings.extend([machine_parts(), machine(&attempt), limits(settings, &attempt)]);
    }
    findings.extend(freezer(settings, &attempt));
    findings.extend([container(), nested(settings.isolation)].into_iter().flatten());
    findings.extend(programs(&attempt));
    findings.push(command(settings, &attempt));
    if as_json {
        println!("{:#}", findings.iter().map(to_json).collect::<serde_json::Value>());
    } else {
        findings.iter().for_each(show);
    }
    Ok(i32::from(findings.iter().any(|finding| finding.grade == Grade::Fail)))
}

fn to_json(finding: &Finding) -> serde_json::Value {
    let grade = match finding.grade {
        Grade::Fine => "fine",
        Grade::Note => "note",
        Grade::Fail => "fail",
    };
    json!({
        "check": finding.name,
        "ok": finding.grade != Grade::Fail,
        "grade": grade,
        "what": finding.what,
        "mend": finding.mend,
    })
}

fn show(finding: &Finding) {
    let (mark, style) = match finding.grade {
        Grade::Fine => ("ok  ", terminal::WELL),
        Grade::Note => ("note", terminal::LACK),
        Grade::Fail => ("FAIL", terminal::FAIL),
    };
    let mark = terminal::styled(mark, style);
    println!("{mark}  {:<16}{}", finding.name, finding.what);
    if let Some(mend) = &finding.mend {
        println!("{:22}→ {mend}", "");
    }
}

fn fine(name: &'static str, what: impl Into<String>) -> Finding {
    Finding { name, grade: Grade::Fine, what: what.into(), mend: None }
}

fn wrong(
    name: &'static str,
    grade: Grade,
    what: impl Into<String>,
    mend: impl Into<String>,
) -> Finding {
    Finding { name, grade, what: what.into(), mend: Some(mend.into()) }
}

fn configuration(settings: &Settings) -> Finding {
    const NAME: &str = "configuration";
    match settings.pool.validate() {
        Ok(()) => fine(NAME, format!("sessions in {}", settings.pool.volume_root.display())),
        Err(error) => wrong(NAME, Grade::Fail, error.to_string(), "change that setting"),
    }
}

fn shell(settings: &Settings) -> Finding {
    let shell = settings.pool.shell.display();
    match rustix::fs::access(&settings.pool.shell, Access::EXEC_OK) {
        Ok(()) => fine("shell", shell.to_string()),
        Err(error) => wrong("shell", Grade::Fail, format!("{shell}: {error}"), "set `shell`"),
    }
}

fn disk(root: &Path) -> Finding {
    let place = root.display();
    match rustix::fs::statvfs(root) {
        Ok(stat) => {
            let free = stat.f_bavail.saturating_mul(stat.f_frsize) / (1 << 20);
            let what = format!("{free} MiB free below {place}");
            if stat.f_blocks == 0 {
                fine("disk", format!("{place} does not tell how much is free"))
            } else if free < 64 {
                wrong("disk", Grade::Fail, what, "make room there, or set another `volume_root`")
            } else {
                fine("disk", what)
            }
        }
        Err(error) => {
            wrong("disk", Grade::Fail, format!("{place}: {error}"), "set another `volume_root`")
        }
    }
}

fn socket(socket: &Path) -> Finding {
    // sun_path of unix(7) has 108 bytes, the last of them zero.
    let length = socket.as_os_str().len();
    let place = socket.display();
    if length < 108 {
        return fine("socket", place.to_string());
    }
    let what = format!("{place} is {length} bytes long, the kernel takes 107");
    wrong("socket", Grade::Fail, what, "set a shorter `socket`")
}

async fn daemon(settings: &Settings) -> Finding {
    let answers = tokio::net::UnixStream::connect(&settings.socket).await.is_ok();
    fine("daemon", if answers { "answers" } else { "does not run; the first command starts it" })
}

/// What kind of file system sessions would live on (statfs(2)).
fn file_system(root: &Path, works: bool) -> Option<Finding> {
    const NAME: &str = "file system";
    let kind = rustix::fs::statfs(root).ok()?.f_type;
    let finding = |what: &str| {
        wrong(NAME, Grade::unless(works), what, "set `volume_root` to a folder on a local disk")
    };
    Some(match kind {
        0x6969 => finding(
            "NFS: no changes of a session's root can be kept on it, and locks and deleted open \
             files behave differently",
        ),
        0x794c_7630 => finding(
            "overlayfs, as in a container: no changes of a session's root can be kept on it",
        ),
        0x0102_1994 => wrong(
            NAME,
            Grade::Note,
            "tmpfs: all sessions are gone with the next start of this machine",
            "set `volume_root` to a folder on a disk",
        ),
        0x6573_5546 => wrong(
            NAME,
            Grade::unless(works),
            "FUSE: slower, and not every kind of it can keep changes of a session's root",
            "set `volume_root` to a folder on a local disk",
        ),
        _ => return None,
    })
}

/// Numbers of a kernel's release.
fn release() -> (u32, u32) {
    let name = rustix::system::uname();
    let text = name.release().to_string_lossy().into_owned();
    let mut numbers = text.split(|c: char| !c.is_ascii_digit()).map(|part| part.parse().ok());
    let mut next = || numbers.next().flatten().unwrap_or(0);
    (next(), next())
}

fn kernel(works: bool) -> Finding {
    let (major, minor) = release();
    let what = format!("Linux {major}.{minor}");
    if (major, minor) >= (5, 12) {
        return fine("kernel", what);
    }
    let what = format!("{what} cannot make mounts the way sandboxes need (since 5.12)");
    wrong("kernel", Grade::unless(works), what, "update the kernel, or set isolation to `host`")
}

/// A setting of the kernel, if it has that one.
fn setting(name: &str) -> Option<String> {
    let path = Path::new("/proc/sys").join(name.replace('.', "/"));
    fs::read_to_string(path).ok().map(|text| text.trim().to_owned())
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

fn user_namespaces(works: bool) -> Finding {
    const NAME: &str = "user namespaces";
    let off = [
        ("user.max_user_namespaces", "0", "15000", true),
        ("kernel.unprivileged_userns_clone", "0", "1", !is_root()),
        ("kernel.apparmor_restrict_unprivileged_userns", "1", "0", !is_root()),
    ];
    let off = off
        .into_iter()
        .find(|(name, value, _, concerns)| *concerns && setting(name).as_deref() == Some(*value));
    match off {
        None => fine(NAME, "may be made"),
        // What is set there, only that denizen can set.
        Some((name, value, _, _)) if is_nested() => wrong(
            NAME,
            Grade::unless(works),
            format!("{name} is {value} in a session of another denizen: no sandbox can be made"),
            "set isolation to `host` here, or have that denizen make a session for each",
        ),
        Some((name, value, better, _)) => wrong(
            NAME,
            Grade::unless(works),
            format!("{name} is {value}: no sandbox can be made"),
            format!("sysctl -w {name}={better}, and the same in /etc/sysctl.d"),
        ),
    }
}

/// Sandboxes have users of their own if there are ids to give.
fn user_ids(range: &Range, works: bool) -> Finding {
    const NAME: &str = "user ids";
    match range {
        Range::Has { first, count } => {
            return fine(NAME, format!("sandboxes have {count}, from {first} on (/etc/subuid)"));
        }
        Range::Lacks(lack) => {
            let what = format!(
                "{}: root within is this user, and there is no other: becoming one is only \
                 pretended",
                lack.what()
            );
            return wrong(NAME, Grade::Note, what, lack.mend());
        }
        Range::NotNeeded if works => {
            return fine(NAME, "sandboxes have a range that nobody else has");
        }
        Range::NotNeeded => {}
    }
    let map = fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    if map.split_whitespace().nth(2).and_then(|count| count.parse::<u32>().ok()) >= Some(65536) {
        return fine(NAME, "there are enough");
    }
    wrong(
        NAME,
        Grade::Fail,
        "this root is in a user namespace, as in a container, and has no range of ids to give",
        "give the container 65536 ids, run denizen as an ordinary user here, or set isolation to \
         `host`",
    )
}

/// Overlays need extended attributes of users: they are tried.
fn attributes(settings: &Settings, works: bool) -> Finding {
    const NAME: &str = "attributes";
    let attempt = || -> std::io::Result<()> {
        let folder = place(&settings.pool.volume_root)?;
        let name = "user.overlay.denizen";
        Ok(rustix::fs::setxattr(folder.path(), name, b"y", XattrFlags::empty())?)
    };
    match attempt() {
        Ok(()) => fine(NAME, "extended attributes can be set"),
        Err(error) => wrong(
            NAME,
            Grade::unless(works),
            format!(
                "no extended attributes of users below the volume root ({error}): folders of \
                 the root that sessions replace or rename cannot be kept"
            ),
            "set `volume_root` to a folder on ext4, xfs or btrfs",
        ),
    }
}

/// Landlock only adds to what holds a sandbox, so that none is no failure.
fn landlock() -> Finding {
    const NAME: &str = "landlock";
    // Versions by the kernels that brought them (landlock(7)).
    let versions =
        [(6, 15, 7), (6, 12, 6), (6, 10, 5), (6, 7, 4), (6, 2, 3), (5, 19, 2), (5, 13, 1)];
    let version = versions.into_iter().find(|(major, minor, _)| release() >= (*major, *minor));
    let modules = fs::read_to_string("/sys/kernel/security/lsm").ok();
    let on = modules.as_ref().map(|all| all.trim().split(',').any(|name| name == "landlock"));
    match (version, on) {
        (Some((_, _, version)), Some(true)) => fine(NAME, format!("version {version}")),
        (Some((_, _, version)), None) => fine(
            NAME,
            format!("version {version} by this kernel's age; whether it is on cannot be seen"),
        ),
        _ => wrong(
            NAME,
            Grade::Note,
            "not there: sandboxes are held by namespaces and seccomp alone",
            "add `landlock` to the kernel's `lsm=` parameter (Linux 5.13 or newer)",
        ),
    }
}

fn limits(settings: &Settings, attempt: &Attempt) -> Finding {
    const NAME: &str = "limits";
    let limits = &settings.limits;
    let lost = [
        ("memory", limits.memory_bytes.is_some(), "memory of each process only"),
        ("pids", limits.processes.is_some(), "processes of all sessions of this user together"),
        ("cpu", limits.cpu_percent.is_some(), "no limit of processor time"),
    ];
    let lost: Vec<&str> = lost
        .into_iter()
        .filter(|(name, wanted, _)| *wanted && !attempt.limited.contains(name))
        .map(|(_, _, instead)| instead)
        .collect();
    if lost.is_empty() {
        return fine(NAME, format!("of whole sessions: {}", attempt.limited.join(", ")));
    }
    if !attempt.works() {
        return fine(NAME, "not known while no command runs");
    }
    let what = format!(
        "no control groups may be made for all of it: {}; of whole sessions: {}",
        lost.join(", "),
        if attempt.limited.is_empty() { "nothing".to_owned() } else { attempt.limited.join(", ") }
    );
    let mend = "run the daemon in a unit with `Delegate=yes`: systemd-run --user --scope -p \
                Delegate=yes denizen serve";
    wrong(NAME, Grade::Note, what, mend)
}

/// Whether idle sessions can be frozen; of interest where that is wanted, or could be.
fn freezer(settings: &Settings, attempt: &Attempt) -> Option<Finding> {
    const NAME: &str = "freezer";
    let wanted = settings.sleep == Sleep::Freeze;
    if settings.isolation == Isolation::MicroVm {
        return None;
    }
    if settings.isolation != Isolation::Sandbox {
        return wanted.then(|| {
            let what = format!("isolation {} freezes no sessions", settings.isolation.name());
            let mend = "set isolation to `sandbox`, or sleep to `stop`";
            wrong(NAME, Grade::Fail, what, mend)
        });
    }
    if attempt.freezer {
        return Some(fine(NAME, "idle sessions can be frozen"));
    }
    if attempt.output.is_err() {
        return Some(fine(NAME, "not known while no command runs"));
    }
    let what = "no control group that can be frozen may be made: idle sessions can only be stopped";
    let mend = "run the daemon in a unit with `Delegate=yes`: systemd-run --user --scope -p \
                Delegate=yes denizen serve";
    Some(if wanted {
        wrong(NAME, Grade::Fail, what, format!("{mend}; or set sleep to `stop`"))
    } else {
        wrong(NAME, Grade::Note, what, mend)
    })
}

/// What holds sessions to it: no unprivileged user can set quotas.
fn disk_limit(settings: &Settings) -> Finding {
    const NAME: &str = "disk limit";
    match settings.limits.disk_bytes.filter(|bytes| *bytes > 0) {
        None => wrong(
            NAME,
            Grade::Note,
            "none: one session can fill the disk of all",
            "set `limits.disk_bytes`",
        ),
        Some(most) => fine(
            NAME,
            format!(
                "{} for each session: of a single file by the kernel, of the whole by measuring \
                 four times a second, so that it can be overshot by what is written in that \
                 time and in a walk through the session's files (seconds for a million)",
                crate::show::bytes(most)
            ),
        ),
    }
}

fn seccomp(attempt: &Attempt) -> Option<Finding> {
    attempt.works().then(|| {
        if attempt.prints("seccomp 2") {
            fine("seccomp", "filters the calls of sessions")
        } else {
            wrong(
                "seccomp",
                Grade::Fail,
                "does not filter",
                "use a kernel with CONFIG_SECCOMP_FILTER",
            )
        }
    })
}

fn container() -> Option<Finding> {
    let mark =
        ["/.dockerenv", "/run/.containerenv"].into_iter().find(|it| Path::new(it).exists())?;
    Some(wrong(
        "container",
        Grade::Note,
        format!("this is a container ({mark}): its own limits hold for all sessions together"),
        "give it a volume for `volume_root`, so that sessions outlive it",
    ))
}

/// Whether this is a session of another denizen: in a sandbox its first process tells, under
/// `host` the environment.
fn is_nested() -> bool {
    let first = fs::read_to_string("/proc/1/comm").unwrap_or_default();
    std::env::var_os("DENIZEN_COMMAND").is_some() || first.trim() == "denizen-init"
}

fn nested(isolation: Isolation) -> Option<Finding> {
    let (what, mend) = if isolation == Isolation::Host {
        (
            "this is a session of another denizen: its network and its limits hold for all \
             sessions here together, and these are not kept from each other",
            "have that denizen make a session for each, if they are not to trust each other",
        )
    } else {
        (
            "this is a session of another denizen: there are no sandboxes within one, and nothing \
             here can have more than that one has",
            "set isolation to `host` here, or have that denizen make a session for each",
        )
    };
    is_nested().then(|| wrong("nested", Grade::Note, what, mend))
}

/// Whether programs that sessions put on their disk can be run.
fn programs(attempt: &Attempt) -> Option<Finding> {
    (attempt.works() && !attempt.prints("runs")).then(|| {
        wrong(
            "programs",
            Grade::Note,
            "no program below the volume root may be executed (noexec): nothing that sessions \
             build or install runs",
            "mount that file system with `exec`, or set another `volume_root`",
        )
    })
}

/// A new folder on the disk that sessions live on: beside the volume root, or in it if that is
/// a mount point. It is removed when dropped.
fn place(root: &Path) -> std::io::Result<tempfile::TempDir> {
    fs::create_dir_all(root)?;
    let beside = root.parent().filter(|parent| {
        let device = |path: &Path| fs::metadata(path).map(|meta| meta.dev()).ok();
        device(parent) == device(root) && rustix::fs::access(*parent, Access::WRITE_OK).is_ok()
    });
    tempfile::Builder::new().prefix(".denizen-doctor-").tempdir_in(beside.unwrap_or(root))
}

/// Runs a command the way sessions do, in a pool of its own that is removed again.
async fn attempt(settings: &Settings) -> Attempt {
    let mut attempt =
        Attempt { output: Ok(String::new()), limited: Vec::new(), freezer: false, machine: None };
    attempt.output = match place(&settings.pool.volume_root) {
        Ok(folder) => {
            let root = folder.path().join("pool");
            let running = run_command(settings, root, &mut attempt);
            match tokio::time::timeout(PATIENCE, running).await {
                Ok(output) => output.map_err(|error| error.to_string()),
                Err(_) => Err(format!("no end after {} seconds", PATIENCE.as_secs())),
            }
        }
        Err(error) => Err(format!("{}: {error}", settings.pool.volume_root.display())),
    };
    attempt
}

async fn run_command(
    settings: &Settings,
    volume_root: PathBuf,
    attempt: &mut Attempt,
) -> denizen::Result<String> {
    let config = denizen::VmPoolConfig {
        enabled: true,
        volume_root,
        shell: "/bin/sh".into(),
        shell_args: vec!["-c".to_owned()],
        ..denizen::VmPoolConfig::default()
    };
    let mut builder = denizen::MicroVmManager::builder((&config).into())
        .cache(settings.cache.clone())
        .isolation(settings.isolation)
        .limits(settings.limits.clone());
    if settings.isolation == Isolation::MicroVm {
        let program = std::env::current_exe();
        builder = builder.agent_program(program.unwrap_or_else(|_| "denizen".into()));
        if let Some(kernel) = &settings.kernel {
            builder = builder.kernel(kernel, settings.kernel_modules.clone());
        }
        // Another one is not known to this pool.
        if let Some(folder) = settings.image.as_ref().filter(|image| is_folder(image)) {
            builder = builder.image(folder);
        }
    }
    let pool = builder.build()?;
    attempt.limited = pool.limited_resources()?;
    attempt.freezer = pool.can_freeze()?;
    attempt.machine = pool.hypervisor().await?;
    if attempt.machine.is_some() && settings.image.as_ref().is_some_and(|image| !is_folder(image)) {
        pool.shutdown().await?;
        return Ok(String::new());
    }
    let session = pool.find_or_name(&"doctor".parse()?).await?;
    let guard = pool.acquire(session).await?;
    let output = guard.command(ATTEMPT).output().await;
    drop(guard);
    // It knows how to delete what only root within could.
    pool.remove(session).await?;
    pool.shutdown().await?;
    Ok(String::from_utf8_lossy(&output?.stdout).into_owned())
}

/// Whether a root is a folder of the host, not an image by its name.
fn is_folder(image: &str) -> bool {
    Path::new(image).is_absolute()
}

/// What machines are made with.
fn machine_parts() -> Finding {
    const NAME: &str = "machine parts";
    const PROGRAMS: [(&str, &str); 3] = [
        ("/usr/bin/qemu-system-x86_64", "qemu-system-x86"),
        ("/usr/bin/qemu-img", "qemu-utils"),
        ("/usr/sbin/mke2fs", "e2fsprogs"),
    ];
    let missing = PROGRAMS.iter().filter(|(path, _)| !Path::new(path).exists());
    let (paths, packages): (Vec<_>, Vec<_>) = missing.copied().unzip();
    if paths.is_empty() {
        return fine(NAME, "QEMU and the programs that make its disks are there");
    }
    let what = format!("not there: {}", paths.join(", "));
    wrong(NAME, Grade::Fail, what, format!("apt-get install {}", packages.join(" ")))
}

/// How processors are had, which only a guest that runs tells.
fn machine(attempt: &Attempt) -> Finding {
    const NAME: &str = "machine";
    match &attempt.machine {
        Some(machine) if machine.contains("without KVM") => {
            let what = format!("{machine}: guests run several times slower than they could");
            wrong(NAME, Grade::Note, what, "see kvm-ok(1); /dev/kvm must be open to this user")
        }
        Some(machine) => fine(NAME, machine.clone()),
        None => fine(NAME, "not known while none can be made"),
    }
}

fn command(settings: &Settings, attempt: &Attempt) -> Finding {
    let isolation = settings.isolation.name();
    let image = settings.image.as_deref().filter(|image| !is_folder(image));
    if let (Isolation::MicroVm, Some(_), Some(image)) =
        (settings.isolation, &attempt.machine, image)
    {
        let what =
            format!("not tried with image {image}, which is another pool's: run `denizen exec`");
        return fine("command", what);
    }
    match &attempt.output {
        Ok(_) if attempt.works() => fine("command", format!("isolation {isolation}: works")),
        Ok(output) => wrong(
            "command",
            Grade::Fail,
            format!("isolation {isolation}: printed {output:?}"),
            "see what fails above",
        ),
        Err(error) => wrong(
            "command",
            Grade::Fail,
            format!("isolation {isolation}: {error}"),
            "see what fails above; with nothing there, set isolation to `host` for trusted code",
        ),
    }
}
