//! Attempts on the host's shared memory, queues and semaphores, and on its terminals.

use std::os::fd::AsRawFd;
use std::path::Path;

use crate::attempt::{Attempt, Doing, any_of, held, holds, open, read_secret, read_text};
use crate::facts::Facts;
use crate::files::is_device;
use crate::sys::{self, Arg};

pub const ATTEMPTS: &[Attempt] = &[
    Attempt::new("sysv-memory", "Shared memory of the host can be attached by its key.", |facts| {
        let bytes = sys::read_shared(facts.number("sysv-key")?)?;
        if holds(&bytes, facts.secret()) { Ok("read the secret".into()) } else { held("not it") }
    })
    .control(),
    Attempt::new("sysv-queue", "A message queue of the host can be found by its key.", |facts| {
        let key = facts.number("sysv-key")?;
        let id = sys::call(libc::SYS_msgget, &mut [Arg::Num(key), Arg::Num(0)])?;
        Ok(format!("queue {id}"))
    })
    .control(),
    Attempt::new("sysv-semaphore", "Semaphores of the host can be found by their key.", |facts| {
        let key = facts.number("sysv-key")?;
        let id = sys::call(libc::SYS_semget, &mut [Arg::Num(key), Arg::Num(0), Arg::Num(0)])?;
        Ok(format!("set {id}"))
    })
    .control(),
    Attempt::new("sysv-listed", "/proc/sysvipc lists what the host shares.", |facts| {
        let key: i64 = facts.number("sysv-key")?;
        any_of(["shm", "msg", "sem"], |kind| {
            let path = format!("/proc/sysvipc/{kind}");
            let text = read_text(&path).doing(&path)?;
            let key = key.to_string();
            let found = text.lines().find(|line| line.split_whitespace().next() == Some(&key));
            found.map(ToOwned::to_owned).ok_or_else(|| crate::attempt::No::Held("no".into()))
        })
    })
    .leak()
    .control(),
    Attempt::new("posix-queue", "A POSIX message queue of the host can be opened.", |facts| {
        let name = std::ffi::CString::new(facts.text("mq")?).preparing("--mq")?;
        let flags = i64::from(libc::O_RDONLY | libc::O_NONBLOCK | libc::O_CLOEXEC);
        sys::owned(sys::call(libc::SYS_mq_open, &mut [Arg::Text(&name), Arg::Num(flags)]))?;
        Ok("it opens".into())
    })
    .control(),
    Attempt::new("posix-queue-listed", "/dev/mqueue shows the host's message queues.", |facts| {
        let path = Path::new("/dev/mqueue").join(facts.text("mq")?);
        open(&path).doing(&path.display().to_string())?;
        Ok(format!("{} opens", path.display()))
    }),
    Attempt::new("shm-file", "A file in the host's /dev/shm can be read.", |facts| {
        read_secret(facts, &facts.path("shm-file")?)
    })
    .control(),
    Attempt::new("host-terminal", "A terminal of the host can be opened.", |facts| {
        let path = facts.path("tty")?;
        terminal(facts, &path)?;
        Ok(format!("{} opens", path.display()))
    })
    .control(),
    Attempt::new("host-terminal-input", "TIOCSTI types into a terminal of the host.", |facts| {
        let file = terminal(facts, &facts.path("tty")?)?;
        let typed = &mut [
            Arg::Num(i64::from(file.as_raw_fd())),
            Arg::Num(i64::try_from(libc::TIOCSTI).unwrap_or(0)),
            Arg::In(b"x"),
        ];
        sys::call(libc::SYS_ioctl, typed).doing("TIOCSTI")?;
        Ok("typed a letter".into())
    })
    .control()
    .needs("kernel: dev.tty.legacy_tiocsti or CAP_SYS_ADMIN"),
    Attempt::new(
        "own-terminal-input",
        "TIOCSTI types into the terminal a command was given.",
        |_| {
            any_of(0..3, |fd| {
                let typed = &mut [
                    Arg::Num(fd),
                    Arg::Num(i64::try_from(libc::TIOCSTI).unwrap_or(0)),
                    Arg::In(b" "),
                ];
                sys::call(libc::SYS_ioctl, typed).doing("TIOCSTI")?;
                Ok(format!("typed a space into descriptor {fd}"))
            })
        },
    )
    .surface()
    .needs("sandbox: run it with a terminal"),
    Attempt::new("console-calls", "TIOCLINUX reaches a console of the machine.", |_| {
        // Asks which keys are held down.
        const HELD_KEYS: u8 = 6;
        let paths = ["/dev/tty0", "/dev/tty1", "/dev/console", "/proc/self/fd/0", "/dev/tty"];
        any_of(paths, |path| {
            let file = open(Path::new(path)).doing(path)?;
            let mut which = [HELD_KEYS; 16];
            let fd = i64::from(file.as_raw_fd());
            let asked = &mut [
                Arg::Num(fd),
                Arg::Num(i64::try_from(libc::TIOCLINUX).unwrap_or(0)),
                Arg::Out(&mut which),
            ];
            sys::call(libc::SYS_ioctl, asked).doing(path)?;
            Ok(format!("{path} answers"))
        })
    })
    .control()
    .needs("kernel: CONFIG_VT"),
    Attempt::new("console-screen", "The screen of a console can be read.", |_| {
        any_of(["/dev/vcs", "/dev/vcs1", "/dev/vcsa1"], |path| {
            if !is_device(Path::new(path)) {
                return held(format!("{path} is no device"));
            }
            open(Path::new(path)).doing(path)?;
            Ok(format!("{path} opens"))
        })
    })
    .control()
    .needs("kernel: CONFIG_VT"),
    Attempt::new("terminals-seen", "/dev/pts shows terminals of the host.", |_| {
        let entries = std::fs::read_dir("/dev/pts").doing("/dev/pts")?.flatten();
        let own: Vec<_> = (0..3)
            .filter_map(|fd| std::fs::read_link(format!("/proc/self/fd/{fd}")).ok())
            .collect();
        any_of(entries.filter(|entry| entry.file_name() != "ptmx"), |entry| {
            let path = entry.path();
            if own.contains(&path) { held("our own") } else { Ok(path.display().to_string()) }
        })
    })
    .leak(),
];

/// The host's terminal: in a devpts of our own the same path is another one, so its owner's
/// name for it is compared with what stands there.
fn terminal(facts: &Facts, path: &Path) -> Result<std::fs::File, crate::attempt::No> {
    use std::os::unix::fs::MetadataExt;
    let shown = path.display().to_string();
    let flags = libc::O_NOCTTY | libc::O_NONBLOCK | libc::O_CLOEXEC;
    let file = std::os::unix::fs::OpenOptionsExt::custom_flags(
        std::fs::OpenOptions::new().read(true).write(true),
        flags,
    )
    .open(path)
    .doing(&shown)?;
    let device = file.metadata().doing(&shown)?.dev();
    match facts.find("tty-dev") {
        Some(theirs) if theirs.parse() != Ok(device) => held(format!("{shown} is another one")),
        _ => Ok(file),
    }
}
