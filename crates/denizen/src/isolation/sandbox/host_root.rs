//! The host's own root as a sandbox's: what every user of the host may see of its operating
//! system, and nothing else.
//!
//! Programs and libraries (`/usr` and its like) and the list of installed packages are the
//! host's, read-only underneath an overlay each. Everything else is a copy, made once, of what
//! others may read: the configuration in `/etc` without keys and secrets. No other folder of
//! the host exists within: `/home`, `/root`, `/srv`, `/opt` and `/var` are new.
//!
//! The host's files belong to users that a sandbox does not have, and stay theirs: root within
//! is one of those "others" to them. The copy has every folder that goes over one of the host's,
//! empty. In a merged folder an overlay shows the owner of the topmost one, so these make the
//! host's folders the sandbox's own: root within can put files there, replace and delete them,
//! though it owns none of the files below. That is what a package manager needs, and
//! [`APT_HOOK`] for the rest. (Showing the files with shifted owners instead would make root
//! within their owner, also of what only the host's root may read.)
//!
//! Nothing here shows what is not everybody's: a file or folder that others may not read is
//! left out, whoever runs this.

use std::fs::{self, DirBuilder, File, FileType, Metadata};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::FlockOperation;
use uuid::Uuid;

use super::users::Users;
use crate::error::{Error, Result};

/// Made anew when what is copied, or how, has changed.
const VERSION: u32 = 5;

/// Folders with programs and libraries, and what package managers know of them. Where they
/// are links (`/bin` to `usr/bin`), the copy has the links.
const MERGED: [&str; 9] =
    ["usr", "bin", "sbin", "lib", "lib32", "lib64", "libx32", "var/lib/dpkg", "var/lib/rpm"];

/// Folders that are copied, apart from [`SECRET`].
const COPIED: [&str; 2] = ["etc", "var/cache/debconf"];

/// What is not copied though others may read it: it tells of the host's users, networks,
/// services or keys.
const SECRET: [&str; 30] = [
    "etc/cloud",
    "etc/cni",
    "etc/containers",
    "etc/crypttab",
    "etc/cron.d",
    "etc/denizen",
    "etc/docker",
    "etc/environment",
    "etc/environment.d",
    "etc/exports",
    "etc/fstab",
    "etc/hostname",
    "etc/hosts",
    "etc/kubernetes",
    "etc/ld.so.preload",
    "etc/letsencrypt",
    "etc/machine-id",
    "etc/mtab",
    "etc/netplan",
    "etc/network",
    "etc/NetworkManager",
    "etc/openvpn",
    "etc/profile.d/proxy.sh",
    "etc/resolv.conf",
    "etc/ssh",
    "etc/ssl/private",
    "etc/subgid",
    "etc/subuid",
    "etc/systemd",
    "etc/wireguard",
];

/// New folders, with their modes.
const FOLDERS: [(&str, u32); 23] = [
    ("dev", 0o755),
    ("home", 0o755),
    ("mnt", 0o755),
    ("opt", 0o755),
    ("proc", 0o555),
    ("root", 0o700),
    ("run", 0o755),
    ("srv", 0o755),
    ("sys", 0o555),
    ("tmp", 0o1777),
    ("var", 0o755),
    ("var/cache", 0o755),
    ("var/cache/apt", 0o755),
    ("var/cache/apt/archives", 0o755),
    ("var/cache/apt/archives/partial", 0o700),
    ("var/lib", 0o755),
    ("var/lib/apt", 0o755),
    ("var/lib/apt/lists", 0o755),
    ("var/local", 0o755),
    ("var/log", 0o755),
    ("var/spool", 0o755),
    ("var/tmp", 0o1777),
    ("volume", 0o755),
];

/// Files that programs write in place: where the host has them, they are new.
const LOCKS: [&str; 3] =
    ["var/lib/dpkg/lock", "var/lib/dpkg/lock-frontend", "var/lib/dpkg/triggers/Lock"];

/// What a machine without neighbours knows.
pub(super) const HOSTS: &str = "127.0.0.1 localhost denizen\n::1 localhost\n";

/// New files with their content and modes.
const FILES: [(&str, &str, u32); 6] = [
    ("etc/hosts", HOSTS, 0o644),
    ("etc/resolv.conf", "", 0o644),
    ("etc/shadow", "root:*:19000:0:99999:7:::\n", 0o600),
    ("etc/gshadow", "root:*::\n", 0o600),
    ("etc/machine-id", "", 0o444),
    ("etc/fstab", "", 0o644),
];

/// Folders of [`MERGED`] whose own files, not those in folders below, are copied: they are
/// linked to other names, which needs their owner.
const LINKED: [&str; 1] = ["var/lib/dpkg"];

/// Tells apt not to become somebody else: where there is one user only it would find out that
/// it has not (see `calls`).
pub(super) const APT_ALONE: (&str, &str) =
    ("/etc/apt/apt.conf.d/90denizen", "APT::Sandbox::User \"root\";\n");

/// Has apt call the next one.
const APT_OWN: (&str, &str) =
    ("etc/apt/apt.conf.d/91denizen", "DPkg::Pre-Install-Pkgs { \"/etc/apt/denizen-own\"; };\n");

/// Makes files that a package is about to replace the sandbox's own: dpkg links them to other
/// names first, which only their owner may. Reads the packages' files as apt.conf(5) says.
const APT_HOOK: (&str, &str) = (
    "etc/apt/denizen-own",
    r#"#!/bin/sh
# Packages replace files of the machine below, which are not this user's: copies are.
while read -r package; do
    dpkg-deb --fsys-tarfile "$package" | tar -tf -
done | while read -r file; do
    file="/${file#./}"
    if [ -f "$file" ] && [ ! -L "$file" ] && [ ! -O "$file" ]; then
        cp -p "$file" "$file.denizen-own" && mv "$file.denizen-own" "$file"
    fi
done
"#,
);

/// The copy, and which of the host's folders go below it.
#[derive(Debug)]
pub(super) struct HostRoot {
    pub(super) copy: PathBuf,
    /// Paths in the root, without their slash, of folders with the host's below the copy's.
    pub(super) merged: Vec<&'static str>,
    /// Locked, shared with others who use the copy, so that nobody deletes it.
    pub(super) lock: Arc<File>,
}

impl HostRoot {
    /// Finds the copy in `store`, or makes it. Older ones that nobody uses are deleted.
    pub(super) fn prepare(store: &Path, users: Users) -> Result<Self> {
        let failed = |source| Error::volume("copy the host's root into", store, source);
        let name = fingerprint(users);
        let copy = store.join(&name);
        DirBuilder::new().recursive(true).mode(0o700).create(store).map_err(failed)?;
        let merged = MERGED.into_iter().filter(|name| is_folder(&Path::new("/").join(name)));
        let merged: Vec<_> = merged.collect();
        // One at a time makes or deletes copies.
        let _making = lock(store, FlockOperation::LockExclusive).map_err(failed)?;
        if !copy.is_dir() {
            // A name for each, or another's could be in the way for ever.
            let partial = store.join(format!("partial-{}", users.name()));
            crate::volume::remove_tree(&partial).map_err(failed)?;
            make(&partial, users, &merged).map_err(failed)?;
            fs::rename(&partial, &copy).map_err(failed)?;
        }
        let held = lock(&copy, FlockOperation::LockShared).map_err(failed)?;
        let mut old = Vec::new();
        for other in fs::read_dir(store).map_err(failed)?.flatten() {
            let path = other.path();
            let unused = || lock(&path, FlockOperation::NonBlockingLockExclusive);
            if path != copy
                && path.is_dir()
                && let Ok(held) = unused()
            {
                // Away from where somebody else may want to make one.
                let away = store.join(format!("old-{}", Uuid::new_v4()));
                fs::rename(&path, &away).map_err(failed)?;
                old.push((away, held));
            }
        }
        delete(old);
        Ok(Self { copy, merged, lock: Arc::new(held) })
    }
}

/// Deletes copies that nobody uses, when there is time: they have thousands of folders. What is
/// not deleted to the end, the next one finds.
fn delete(old: Vec<(PathBuf, File)>) {
    if old.is_empty() {
        return;
    }
    let delete = move || {
        for (path, _held) in old {
            // It may belong to a range that this process does not have.
            if let Err(error) = crate::volume::remove_tree(&path) {
                tracing::warn!(path = %path.display(), %error, "an old copy stays behind");
            }
        }
    };
    if let Err(error) = std::thread::Builder::new().name("denizen-old-root".into()).spawn(delete) {
        tracing::warn!(%error, "old copies of the host's root stay behind");
    }
}

/// Locks a folder (`flock(2)`) until what this gives is dropped.
fn lock(folder: &Path, how: FlockOperation) -> io::Result<File> {
    let file = File::open(folder)?;
    rustix::fs::flock(&file, how)?;
    Ok(file)
}

fn is_folder(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|meta| meta.is_dir())
}

/// Changes when the host's packages or configuration do.
fn fingerprint(users: Users) -> String {
    let changed = ["/etc", "/usr", "/usr/bin", "/usr/lib", "/var/lib/dpkg/status", "/etc/passwd"];
    let times = changed.map(|path| {
        fs::metadata(path).map_or_else(|_| "-".to_owned(), |meta| format!("{:x}", meta.mtime()))
    });
    let given = users.given().map_or_else(String::new, |given| format!("-of-{given}"));
    format!("host-{VERSION}-{}{given}-{}", users.name(), times.join("-"))
}

fn make(root: &Path, users: Users, merged: &[&str]) -> io::Result<()> {
    let copier = Copier { root, users };
    copier.folder("", 0o755, (0, 0))?;
    for (path, mode) in FOLDERS {
        copier.folder(path, mode, (0, 0))?;
    }
    for name in MERGED {
        let source = Path::new("/").join(name);
        match fs::symlink_metadata(&source) {
            Ok(meta) if meta.is_symlink() => {
                symlink(fs::read_link(&source)?, root.join(name))?;
                users.give(&root.join(name), (0, 0))?;
            }
            Ok(meta) if merged.contains(&name) => {
                copier.folder(name, mode_of(&meta), owner_of(&meta))?;
                // Most of what is there is files that stay where they are: not even looked at.
                let wanted = |to: &Path, kind: FileType| {
                    kind.is_dir() || LINKED.iter().any(|it| to.parent() == Some(Path::new(it)))
                };
                copier.tree(&source, Path::new(name), &wanted, &|copier, from, to, meta| {
                    if meta.is_dir() {
                        copier.merged(to, meta)
                    } else {
                        copier.whole(from, to, meta)
                    }
                })?;
            }
            _ => {}
        }
    }
    for path in COPIED {
        let source = Path::new("/").join(path);
        let Ok(meta) = fs::symlink_metadata(&source) else { continue };
        if !meta.is_dir() || !others_may_look(&meta) {
            continue;
        }
        copier.folder(path, mode_of(&meta), owner_of(&meta))?;
        let wanted = |to: &Path, _| !SECRET.iter().any(|secret| to == Path::new(secret));
        copier.tree(&source, Path::new(path), &wanted, &|copier, from, to, meta| {
            copier.whole(from, to, meta)
        })?;
    }
    for path in LOCKS {
        if Path::new("/").join(path).exists() {
            copier.file(path, "", 0o640)?;
        }
    }
    for (path, content, mode) in FILES {
        copier.file(path, content, mode)?;
    }
    if root.join("etc/apt/apt.conf.d").is_dir() {
        copier.file(APT_OWN.0, APT_OWN.1, 0o644)?;
        copier.file(APT_HOOK.0, APT_HOOK.1, 0o755)?;
    }
    Ok(())
}

fn mode_of(meta: &Metadata) -> u32 {
    meta.mode() & 0o1777
}

/// Who has a copy. To a user namespace all of the host's users but its own are one, the kernel's
/// `overflowuid`, and what is copied is root's.
fn owner_of(meta: &Metadata) -> (u32, u32) {
    const OVERFLOW: u32 = 65534;
    let id = |id: u32| if id == OVERFLOW { 0 } else { id };
    (id(meta.uid()), id(meta.gid()))
}

fn others_may_look(meta: &Metadata) -> bool {
    meta.mode() & 0o005 == 0o005
}

struct Copier<'a> {
    root: &'a Path,
    users: Users,
}

/// Whether anything becomes of one thing on the way.
type Wanted<'w> = &'w dyn Fn(&Path, FileType) -> bool;

/// What becomes of one thing on the way; true: go into the folder it is.
type Visit<'v> = &'v dyn Fn(&Copier<'_>, &Path, &Path, &Metadata) -> io::Result<bool>;

impl Copier<'_> {
    /// Makes a folder, and those above it.
    fn folder(&self, path: impl AsRef<Path>, mode: u32, owner: (u32, u32)) -> io::Result<()> {
        let target = self.root.join(path.as_ref());
        match fs::create_dir(&target) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let above = path.as_ref().parent().ok_or(error)?;
                self.folder(above, 0o755, (0, 0))?;
                fs::create_dir(&target)?;
            }
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        fs::set_permissions(&target, fs::Permissions::from_mode(mode))?;
        self.users.give(&target, owner)
    }

    fn file(&self, path: impl AsRef<Path>, content: &str, mode: u32) -> io::Result<()> {
        let target = self.root.join(path);
        // Not through a link that was copied.
        let _ = fs::remove_file(&target);
        fs::write(&target, content)?;
        fs::set_permissions(&target, fs::Permissions::from_mode(mode))?;
        self.users.give(&target, (0, 0))
    }

    /// A folder whose content will be the host's below. One that others may not look into is
    /// empty: what it kept from them would be open under a new owner.
    fn merged(&self, to: &Path, meta: &Metadata) -> io::Result<bool> {
        let open = others_may_look(meta);
        self.folder(to, mode_of(meta), owner_of(meta))?;
        if !open {
            xattr::set(self.root.join(to), "user.overlay.opaque", b"y")?;
        }
        Ok(open)
    }

    /// A file, link or folder that others may read; nothing else.
    fn whole(&self, from: &Path, to: &Path, meta: &Metadata) -> io::Result<bool> {
        let target = self.root.join(to);
        if meta.is_dir() {
            if others_may_look(meta) {
                self.folder(to, mode_of(meta), owner_of(meta))?;
                return Ok(true);
            }
        } else if meta.is_symlink() {
            symlink(fs::read_link(from)?, &target)?;
            self.users.give(&target, owner_of(meta))?;
        } else if meta.is_file() && meta.mode() & 0o004 != 0 {
            fs::copy(from, &target)?;
            fs::set_permissions(&target, fs::Permissions::from_mode(meta.mode() & 0o777))?;
            self.users.give(&target, owner_of(meta))?;
        }
        Ok(false)
    }

    /// Visits what is wanted of all that is below a folder of the host, on the same file system.
    fn tree(
        &self,
        source: &Path,
        at: &Path,
        wanted: Wanted<'_>,
        visit: Visit<'_>,
    ) -> io::Result<()> {
        let device = fs::symlink_metadata(source)?.dev();
        let mut folders = vec![(source.to_owned(), at.to_owned())];
        while let Some((from, to)) = folders.pop() {
            let Ok(entries) = fs::read_dir(&from) else { continue };
            for entry in entries {
                let entry = entry?;
                let (from, to) = (entry.path(), to.join(entry.file_name()));
                if !entry.file_type().is_ok_and(|kind| wanted(&to, kind)) {
                    continue;
                }
                // Gone meanwhile is fine: the host goes on living.
                let Ok(meta) = entry.metadata() else { continue };
                if meta.dev() == device && visit(self, &from, &to, &meta)? {
                    folders.push((from, to));
                }
            }
        }
        Ok(())
    }
}
