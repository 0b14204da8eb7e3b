//! Makes this process the first one of a sandbox: new namespaces, a root of its own, and no
//! way back. It follows a plan that the owner has made and decides nothing; whatever step
//! fails, the process must not go on with less than was planned.
//!
//! A plan is a list of words, each ended by a zero byte. Steps, with what follows each:
//!
//! | step | follows |
//! |---|---|
//! | `map` | lines of `uid_map`, lines of `gid_map` (user_namespaces(7)) |
//! | `alone` | – ; the maps are one user and group: no other may be had |
//! | `group` | `tasks` file of a control group of version 1, or folder of one of version 2, to be in |
//! | `shift` | path of a folder of the host, whose owners are to be those of the same numbers within |
//! | `overlay` | target, attributes, upper, work, number of lower folders, these from the top |
//! | `bind`, `rbind` | target, attributes, source; of one mount, or with those below it |
//! | `fs` | target, attributes, type, number of settings, these (`key=value` or `flag`) |
//! | `try` | as `fs`, but may fail |
//! | `dir` | path, mode (octal) |
//! | `plain` | path, which must be a folder and no link |
//! | `file` | path |
//! | `link` | content, path |
//! | `protect` | path, to be read-only; not being there is fine |
//! | `hide` | path, to be empty; not being there is fine |
//! | `give` | path, content: a file, unless it is there or its folder is not |
//! | `put` | path, mode (octal), content: a file, in the place of what is there |
//! | `set` | path, value: a setting of the kernel's; not being there is fine |
//! | `host` | name |
//! | `loopback` | – |
//! | `listen` | port of 127.0.0.1; the owner gets the listening socket |
//! | `tun` | address, gateway (IPv4, as numbers), length of the network's prefix, MTU: a network device `tun0` with these, which the owner gets, and the way to everywhere by it |
//! | `limit` | number (getrlimit(2)), value |
//! | `root-only` | – ; Landlock: nothing outside of the root |
//! | `capabilities` | mask (hexadecimal) of those that commands may have |
//! | `key` | two numbers (hexadecimal): what a call to set `RLIMIT_LOCKS` has to carry to pass the filter |
//! | `sudo` | – ; members of a group start commands as others ([`crate::sudo`]) |
//! | `calls` | seccomp filter: 16 hexadecimal digits for each instruction |
//!
//! Attributes are `MOUNT_ATTR_…` in decimal (mount_setattr(2)). Sources are opened and mounts
//! made while the host's files are still there, before anything of the session's is looked
//! at; what is shifted covers itself before that; the first mount becomes the root; only then are targets and paths looked up, within
//! it. So no link that a session has left can lead a step out of its root.

use std::ffi::{CStr, CString, OsStr};
use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, symlink};
use std::path::Path;

use crate::sudo::Sudo;
use crate::sys::{self, PollFd, sandbox as kernel};

/// `MOUNT_ATTR_`: RDONLY, NOSUID, NODEV.
const READ_ONLY: u64 = 1 | 2 | 4;
/// And NOEXEC.
const LOCKED_DOWN: u64 = 1 | 2 | 4 | 8;

/// The step that could not be done, and the errno.
pub type Refusal = (String, i32);
type Result<T> = std::result::Result<T, Refusal>;

/// What has become of this process.
pub enum Entered {
    /// It is the first process of the sandbox.
    Inside {
        /// What the owner is to get.
        door: Option<OwnedFd>,
        /// Where other owners come in.
        listener: Option<OwnedFd>,
        /// To set marks with.
        key: [u64; 2],
        /// Who lets commands be started as others.
        sudo: Option<Sudo>,
    },
    /// It has stayed outside, the sandbox has ended, with this status.
    Ended(i32),
}

/// Follows the plan. One process becomes two here; see [`Entered`]. The one that stays outside
/// keeps `outside` open until the sandbox has ended.
pub fn enter(plan: &[u8], listener: Option<OwnedFd>, outside: Vec<OwnedFd>) -> Result<Entered> {
    let steps = parse(plan)?;
    let io = |what: &str| {
        let what = what.to_owned();
        move |error: io::Error| (what, error.raw_os_error().unwrap_or(sys::EINVAL))
    };
    let unified = join_groups(&steps)?;
    let (mut wait, mut go) = io::pipe().map_err(io("pipe"))?;
    let mut shifted = Vec::new();
    for step in &steps {
        if let Step::Shift { path } = step {
            // While this process still has its rights over the host's file systems.
            let copy = kernel::open_path(path)
                .and_then(|found| kernel::copy_mount(&found, false, READ_ONLY));
            shifted.push((*path, copy.map_err(|error| (describe(step), error))?));
        }
    }
    match kernel::split(unified.as_ref()).map_err(|error| ("namespaces".to_owned(), error))? {
        kernel::Side::Parent(pid) => {
            drop(wait);
            for step in &steps {
                match step {
                    Step::Map { users, groups } => {
                        write_map(pid, "uid_map", users)?;
                        write_map(pid, "gid_map", groups)?;
                    }
                    Step::Alone => write_map(pid, "setgroups", c"deny")?,
                    _ => {}
                }
            }
            for (path, copy) in &shifted {
                let done = kernel::shift_owners(copy, pid);
                done.map_err(|error| (format!("shift {}", path.to_string_lossy()), error))?;
            }
            go.write_all(&[1]).map_err(io("go"))?;
            // The one inside holds it, and its end shall be seen.
            sys::close_control();
            drop(listener);
            let status = kernel::wait_for(pid);
            // Not before: an end of `go` tells the one inside that this process is gone.
            drop((go, outside));
            Ok(Entered::Ended(status))
        }
        kernel::Side::Child => {
            drop((go, outside));
            // Nothing comes if the maps could not be written, and nobody is left to tell.
            if wait.read_exact(&mut [0]).is_err() {
                std::process::exit(1);
            }
            if let Some(listener) = &listener {
                // Here, so that who connects is told this process's number (unix(7)).
                kernel::wait_for_owners(listener).map_err(|error| ("owners".into(), error))?;
            }
            let key = steps.iter().find_map(|step| match step {
                Step::Key { key } => Some(*key),
                _ => None,
            });
            let key = key.unwrap_or_default();
            let door = inside(&steps, shifted, &wait)?;
            // Once this process is confined as those are who connect (`scoped`, landlock(7)).
            let sudo = steps.iter().find(|step| matches!(step, Step::Sudo));
            let sudo = sudo.map(|step| Sudo::new().map_err(|error| (describe(step), error)));
            Ok(Entered::Inside { door, listener, key, sudo: sudo.transpose()? })
        }
    }
}

/// Has this process join control groups of version 1, and finds the one of version 2. To move
/// another process, or a whole one in version 2, the kernel waits for all processors to come by
/// (`kernel/cgroup/cgroup.c`: `cgroup_procs_write_start`), ten times as long as all the rest
/// takes here.
fn join_groups(steps: &[Step<'_>]) -> Result<Option<OwnedFd>> {
    let mut unified = None;
    for step in steps {
        let Step::Group { path } = step else { continue };
        let failed = |error: i32| (describe(step), error);
        if path.to_bytes().ends_with(b"/tasks") {
            let joined = fs::write(path_of(path), "0");
            joined.map_err(|error| failed(error.raw_os_error().unwrap_or(sys::EINVAL)))?;
        } else {
            unified = Some(kernel::open_path(path).map_err(failed)?);
        }
    }
    Ok(unified)
}

fn write_map(pid: i32, name: &str, content: &CStr) -> Result<()> {
    fs::write(format!("/proc/{pid}/{name}"), content.to_bytes())
        .map_err(|error| (name.to_owned(), error.raw_os_error().unwrap_or(sys::EINVAL)))
}

/// A step of a plan.
enum Step<'p> {
    Map { users: &'p CStr, groups: &'p CStr },
    Alone,
    Group { path: &'p CStr },
    Shift { path: &'p CStr },
    Mount { at: &'p CStr, what: Mount<'p> },
    Dir { path: &'p CStr, mode: u32 },
    Plain { path: &'p CStr },
    File { path: &'p CStr },
    Link { content: &'p CStr, path: &'p CStr },
    Protect { path: &'p CStr },
    Hide { path: &'p CStr },
    Give { path: &'p CStr, content: &'p CStr },
    Put { path: &'p CStr, mode: u32, content: &'p CStr },
    Set { path: &'p CStr, value: &'p CStr },
    Host { name: &'p CStr },
    Loopback,
    Listen { port: u16 },
    Tun { address: u32, gateway: u32, prefix: u32, mtu: u32 },
    Limit { what: i32, value: u64 },
    RootOnly,
    Capabilities { keep: u64 },
    Key { key: [u64; 2] },
    Sudo,
    Calls { filter: Vec<u64> },
}

enum Mount<'p> {
    Overlay { attributes: u64, upper: &'p CStr, work: &'p CStr, lower: Vec<&'p CStr> },
    Bind { attributes: u64, source: &'p CStr, recursive: bool },
    Fs { attributes: u64, kind: &'p CStr, settings: Vec<&'p CStr>, needed: bool },
}

fn parse(plan: &[u8]) -> Result<Vec<Step<'_>>> {
    let mut words = plan.split_inclusive(|byte| *byte == 0).map(CStr::from_bytes_with_nul);
    let mut steps = Vec::new();
    while let Some(word) = words.next() {
        let bad = || (format!("plan: step {}: {word:?}", steps.len()), sys::EINVAL);
        let step = word.map_err(|_| bad())?.to_bytes();
        let mut next = || words.next().and_then(std::result::Result::ok).ok_or_else(bad);
        steps.push(match step {
            b"map" => Step::Map { users: next()?, groups: next()? },
            b"alone" => Step::Alone,
            b"group" => Step::Group { path: next()? },
            b"shift" => Step::Shift { path: next()? },
            b"overlay" => {
                let (at, attributes) = (next()?, number(next()?, 10).ok_or_else(bad)?);
                let (upper, work) = (next()?, next()?);
                let count = number(next()?, 10).ok_or_else(bad)?;
                let lower = (0..count).map(|_| next()).collect::<Result<_>>()?;
                Step::Mount { at, what: Mount::Overlay { attributes, upper, work, lower } }
            }
            b"bind" | b"rbind" => {
                let (at, attributes) = (next()?, number(next()?, 10).ok_or_else(bad)?);
                let (source, recursive) = (next()?, step == b"rbind");
                Step::Mount { at, what: Mount::Bind { attributes, source, recursive } }
            }
            b"fs" | b"try" => {
                let (at, attributes) = (next()?, number(next()?, 10).ok_or_else(bad)?);
                let kind = next()?;
                let count = number(next()?, 10).ok_or_else(bad)?;
                let settings = (0..count).map(|_| next()).collect::<Result<_>>()?;
                let needed = step == b"fs";
                Step::Mount { at, what: Mount::Fs { attributes, kind, settings, needed } }
            }
            b"dir" => {
                let (path, mode) = (next()?, number(next()?, 8).ok_or_else(bad)?);
                Step::Dir { path, mode: u32::try_from(mode).map_err(|_| bad())? }
            }
            b"plain" => Step::Plain { path: next()? },
            b"file" => Step::File { path: next()? },
            b"link" => Step::Link { content: next()?, path: next()? },
            b"protect" => Step::Protect { path: next()? },
            b"hide" => Step::Hide { path: next()? },
            b"host" => Step::Host { name: next()? },
            b"give" => Step::Give { path: next()?, content: next()? },
            b"set" => Step::Set { path: next()?, value: next()? },
            b"put" => {
                let (path, mode) = (next()?, number(next()?, 8).ok_or_else(bad)?);
                let mode = u32::try_from(mode).map_err(|_| bad())?;
                Step::Put { path, mode, content: next()? }
            }
            b"loopback" => Step::Loopback,
            b"listen" => {
                let port = number(next()?, 10).and_then(|port| u16::try_from(port).ok());
                Step::Listen { port: port.ok_or_else(bad)? }
            }
            b"tun" => {
                let mut small = || {
                    let value = number(next()?, 10).and_then(|value| u32::try_from(value).ok());
                    value.ok_or_else(bad)
                };
                Step::Tun { address: small()?, gateway: small()?, prefix: small()?, mtu: small()? }
            }
            b"limit" => {
                let what = number(next()?, 10).and_then(|what| i32::try_from(what).ok());
                let value = number(next()?, 10).ok_or_else(bad)?;
                Step::Limit { what: what.ok_or_else(bad)?, value }
            }
            b"root-only" => Step::RootOnly,
            b"capabilities" => Step::Capabilities { keep: number(next()?, 16).ok_or_else(bad)? },
            b"key" => {
                let mut half = || number(next()?, 16).ok_or_else(bad);
                Step::Key { key: [half()?, half()?] }
            }
            b"sudo" => Step::Sudo,
            b"calls" => {
                let digits = next()?.to_bytes().chunks(16);
                let filter = digits.map(|word| {
                    let text = std::str::from_utf8(word).ok()?;
                    u64::from_str_radix(text, 16).ok()
                });
                Step::Calls { filter: filter.collect::<Option<_>>().ok_or_else(bad)? }
            }
            _ => return Err(bad()),
        });
    }
    Ok(steps)
}

fn number(word: &CStr, radix: u32) -> Option<u64> {
    u64::from_str_radix(word.to_str().ok()?, radix).ok()
}

fn path_of(word: &CStr) -> &Path {
    Path::new(OsStr::from_bytes(word.to_bytes()))
}

/// The rest, as the first process of the new namespaces. What is read from `parent` ends with
/// the process outside.
fn inside(
    steps: &[Step<'_>],
    shifted: Vec<(&CStr, OwnedFd)>,
    parent: &impl AsRawFd,
) -> Result<Option<OwnedFd>> {
    let at = |name: &'static str| move |error| (name.to_owned(), error);
    kernel::bind_to_parent().map_err(at("dumpable"))?;
    kernel::keep_mounts_private().map_err(at("private mounts"))?;
    for (path, copy) in shifted {
        kernel::attach(&copy, path).map_err(at("cover what is shifted"))?;
    }
    let mut sources = open_sources(steps)?;
    // A device of the host's, which this user may perhaps not use any more below.
    let mut door = None;
    for step in steps {
        let made = match step {
            Step::Listen { port } => kernel::listen(*port),
            Step::Tun { address, gateway, prefix, mtu } => {
                kernel::make_tun(*address, *gateway, *prefix, *mtu)
            }
            _ => continue,
        };
        door = Some(made.map_err(|error| (describe(step), error))?);
    }
    let alone = steps.iter().any(|step| matches!(step, Step::Alone));
    kernel::become_root(alone).map_err(at("user"))?;
    // From here on the kernel ends this process with its parent; one that was gone before, or
    // while this process changed its user, has no end that could be told of.
    let mut ended = [PollFd { fd: parent.as_raw_fd(), events: 0, revents: 0 }];
    sys::wait_ready(&mut ended, 0);
    if ended[0].revents != 0 {
        std::process::exit(1);
    }
    sys::usual_umask();
    let mut mounts = Vec::new();
    for step in steps {
        if let Step::Mount { at, what } = step {
            let made = make_mount(what, &mut sources);
            let made =
                made.map_err(|error| (format!("make mount {}", at.to_string_lossy()), error));
            mounts.push((at, made?));
        }
    }
    let mut mounts = mounts.into_iter();
    let (at_root, Some(root)) = mounts.next().ok_or(("no root".to_owned(), sys::EINVAL))? else {
        return Err(("no root".to_owned(), sys::EINVAL));
    };
    kernel::attach(&root, at_root).map_err(at("attach root"))?;
    kernel::change_root(at_root).map_err(at("pivot_root"))?;
    let mut is_root = true;
    for step in steps {
        let done = match step {
            Step::Mount { .. } if std::mem::take(&mut is_root) => Ok(()),
            Step::Mount { at, .. } => match mounts.next() {
                Some((_, Some(mount))) => kernel::attach(&mount, at),
                _ => Ok(()),
            },
            step => follow(step),
        };
        done.map_err(|error| (describe(step), error))?;
    }
    Ok(door)
}

/// Where plans' sources are, by a name that needs no right to the folders above them.
type Sources = std::vec::IntoIter<(OwnedFd, CString)>;

/// Opens the sources of all mounts, in order.
fn open_sources(steps: &[Step<'_>]) -> Result<Sources> {
    let mut sources = Vec::new();
    for step in steps {
        let Step::Mount { what, .. } = step else { continue };
        let paths = match what {
            Mount::Overlay { upper, work, lower, .. } => [&[*upper, *work][..], lower].concat(),
            Mount::Bind { source, .. } => vec![*source],
            Mount::Fs { .. } => Vec::new(),
        };
        for path in paths {
            let fd = kernel::open_path(path)
                .map_err(|error| (format!("open {}", path.to_string_lossy()), error))?;
            let name = format!("/proc/self/fd/{}", fd.as_raw_fd());
            let name = CString::new(name).map_err(|_| (String::new(), sys::EINVAL))?;
            sources.push((fd, name));
        }
    }
    Ok(sources.into_iter())
}

/// None if it could not be made and need not be.
fn make_mount(
    what: &Mount<'_>,
    sources: &mut Sources,
) -> std::result::Result<Option<OwnedFd>, i32> {
    let mut source = || sources.next().ok_or(sys::EINVAL);
    match what {
        Mount::Overlay { attributes, lower, .. } => {
            let (_upper, upper) = source()?;
            let (_work, work) = source()?;
            let lower =
                lower.iter().map(|_| source()).collect::<std::result::Result<Vec<_>, _>>()?;
            let common = [
                (c"userxattr", None),
                (c"upperdir", Some(upper.as_c_str())),
                (c"workdir", Some(work.as_c_str())),
            ];
            let one_by_one = lower.iter().map(|(_, name)| (c"lowerdir+", Some(name.as_c_str())));
            let settings: Vec<_> = common.iter().copied().chain(one_by_one).collect();
            match kernel::make_file_system(c"overlay", &settings, *attributes) {
                // Kernels before 6.7 take them in one string only.
                Err(sys::EINVAL) => {
                    let names: Vec<_> = lower.iter().map(|(_, name)| name.to_bytes()).collect();
                    let joined = CString::new(names.join(&b':')).map_err(|_| sys::EINVAL)?;
                    let settings = [&common[..], &[(c"lowerdir", Some(&joined))]].concat();
                    kernel::make_file_system(c"overlay", &settings, *attributes).map(Some)
                }
                made => made.map(Some),
            }
        }
        Mount::Bind { attributes, recursive, .. } => {
            kernel::copy_mount(&source()?.0, *recursive, *attributes).map(Some)
        }
        Mount::Fs { attributes, kind, settings, needed } => {
            let split = settings.iter().map(|setting| split_setting(setting));
            let split = split.collect::<Option<Vec<_>>>().ok_or(sys::EINVAL)?;
            let settings: Vec<_> =
                split.iter().map(|(key, value)| (key.as_c_str(), value.as_deref())).collect();
            match kernel::make_file_system(kind, &settings, *attributes) {
                Err(_) if !needed => Ok(None),
                made => made.map(Some),
            }
        }
    }
}

fn split_setting(setting: &CStr) -> Option<(CString, Option<CString>)> {
    let mut parts = setting.to_bytes().splitn(2, |byte| *byte == b'=');
    let key = CString::new(parts.next()?).ok()?;
    let value = parts.next().map(CString::new).transpose().ok()?;
    Some((key, value))
}

/// Does a step that is no mount.
fn follow(step: &Step<'_>) -> std::result::Result<(), i32> {
    let errno = |error: io::Error| error.raw_os_error().unwrap_or(sys::EINVAL);
    let unless_there = |result: io::Result<()>| match result {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        result => result.map_err(errno),
    };
    match step {
        // Done before, or elsewhere.
        Step::Map { .. }
        | Step::Alone
        | Step::Group { .. }
        | Step::Shift { .. }
        | Step::Mount { .. }
        | Step::Listen { .. }
        | Step::Tun { .. }
        | Step::Key { .. }
        | Step::Sudo => Ok(()),
        Step::Give { path, content } => give(path_of(path), content.to_bytes()).map_err(errno),
        Step::Set { path, value } => match OpenOptions::new().write(true).open(path_of(path)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            opened => opened.and_then(|mut it| it.write_all(value.to_bytes())).map_err(errno),
        },
        Step::Put { path, mode, content } => {
            put(path_of(path), *mode, content.to_bytes()).map_err(errno)
        }
        Step::Dir { path, mode } => {
            unless_there(DirBuilder::new().mode(*mode).create(path_of(path)))
        }
        Step::Plain { path } => match fs::symlink_metadata(path_of(path)) {
            Ok(found) if found.is_dir() => Ok(()),
            Ok(_) => Err(sys::ENOTDIR),
            Err(error) => Err(errno(error)),
        },
        Step::File { path } => {
            let open =
                OpenOptions::new().write(true).create_new(true).mode(0o644).open(path_of(path));
            unless_there(open.map(drop))
        }
        Step::Link { content, path } => unless_there(symlink(path_of(content), path_of(path))),
        Step::Protect { path } => match kernel::open_path(path) {
            Err(sys::ENOENT) => Ok(()),
            found => kernel::attach(&kernel::copy_mount(&found?, false, LOCKED_DOWN)?, path),
        },
        Step::Hide { path } => match fs::metadata(path_of(path)) {
            Err(_) => Ok(()),
            Ok(meta) if meta.is_dir() => {
                let empty =
                    kernel::make_file_system(c"tmpfs", &[(c"mode", Some(c"555"))], LOCKED_DOWN)?;
                kernel::attach(&empty, path)
            }
            Ok(_) => {
                let null = kernel::open_path(c"/dev/null")?;
                // Its device must stay one.
                kernel::attach(&kernel::copy_mount(&null, false, 1 | 2 | 8)?, path)
            }
        },
        Step::Host { name } => kernel::name_host(name),
        Step::Loopback => kernel::raise_loopback(),
        Step::Limit { what, value } => kernel::limit(*what, *value),
        Step::RootOnly => kernel::confine_to_root().map(drop),
        Step::Capabilities { keep } => {
            kernel::leave_keyrings();
            kernel::bound_capabilities(*keep)
        }
        Step::Calls { filter } => kernel::filter_calls(filter),
    }
}

/// Writes a file, unless it is there or its folder is not.
pub fn give(path: &Path, content: &[u8]) -> io::Result<()> {
    if fs::symlink_metadata(path).is_ok() || !path.parent().is_some_and(Path::is_dir) {
        return Ok(());
    }
    fs::write(path, content)
}

/// Writes a file in the place of what is there, which may be a link.
pub fn put(path: &Path, mode: u32, content: &[u8]) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut options = OpenOptions::new();
    options.write(true).create_new(true).mode(mode).open(path)?.write_all(content)
}

fn describe(step: &Step<'_>) -> String {
    let (verb, what) = match step {
        Step::Map { .. } => ("map", None),
        Step::Alone => ("alone", None),
        Step::Group { path } => ("join control group", Some(path)),
        Step::Shift { path } => ("shift", Some(path)),
        Step::Mount { at, .. } => ("mount", Some(at)),
        Step::Dir { path, .. } => ("make folder", Some(path)),
        Step::Plain { path } => ("find a folder, and no link, at", Some(path)),
        Step::File { path } => ("make file", Some(path)),
        Step::Link { path, .. } => ("make link", Some(path)),
        Step::Protect { path } => ("protect", Some(path)),
        Step::Hide { path } => ("hide", Some(path)),
        Step::Host { name } => ("name host", Some(name)),
        Step::Give { path, .. } | Step::Put { path, .. } | Step::Set { path, .. } => {
            ("write", Some(path))
        }
        Step::Loopback => ("loopback", None),
        Step::Listen { .. } => ("listen", None),
        Step::Tun { .. } => ("make the network device", None),
        Step::Limit { .. } => ("limit", None),
        Step::RootOnly => ("landlock", None),
        Step::Capabilities { .. } => ("capabilities", None),
        Step::Key { .. } => ("key", None),
        Step::Sudo => ("sudo", None),
        Step::Calls { .. } => ("seccomp", None),
    };
    match what {
        Some(what) => format!("{verb} {}", what.to_string_lossy()),
        None => verb.to_owned(),
    }
}
