//! Finds the kernel that machines are started with: the one that the user gives, or the best of
//! those that are installed. It reads files and changes nothing.

use std::cmp::Reverse;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use super::modules::{ModuleError, Modules};

/// Where kernels and their modules are installed.
const BOOT: &str = "/boot";
const MODULES: &str = "/lib/modules";
/// A driver that every kernel for a machine of ours has.
const DRIVER: &str = "virtio_blk";

/// A kernel that has what a machine needs, as far as can be seen.
#[derive(Debug)]
pub(crate) struct Kernel {
    /// Its file.
    pub(crate) image: PathBuf,
    /// As `uname -r` says.
    pub(crate) version: String,
    /// Its modules.
    pub(crate) modules: Modules,
}

/// Why there is no kernel.
#[derive(Debug, thiserror::Error)]
pub(crate) enum KernelError {
    /// None is installed.
    #[error(
        "no kernel for microvm: {} has none whose modules with virtio are in {}: install it with \
         `apt-get install linux-image-cloud-amd64 qemu-system-x86`, or give the path of one",
        boot.display(), modules.display()
    )]
    None {
        /// Where kernels were looked for.
        boot: PathBuf,
        /// Where modules were looked for.
        modules: PathBuf,
    },
    /// The file that was given cannot be read.
    #[error("cannot read the kernel {}", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The file that was given is something else.
    #[error("{} is no kernel: a compressed one (bzImage) for x86 is needed", path.display())]
    NotOne {
        /// Which.
        path: PathBuf,
    },
    /// The kernel that was given has no modules of use.
    #[error(
        "the kernel {} ({version}) has no modules with virtio in {}: give the folder of its \
         modules, or install a kernel with `apt-get install linux-image-cloud-amd64 \
         qemu-system-x86`",
        path.display(), modules.display()
    )]
    NoModules {
        /// The kernel.
        path: PathBuf,
        /// Its version.
        version: String,
        /// Where they were looked for.
        modules: PathBuf,
    },
    /// The modules cannot be read.
    #[error(transparent)]
    Modules(#[from] ModuleError),
}

/// The kernel at `given`, with its modules in a folder or where they are installed; without
/// `given` the best that is installed.
pub(crate) fn find(given: Option<(&Path, Option<&Path>)>) -> Result<Kernel, KernelError> {
    find_in(given, Path::new(BOOT), Path::new(MODULES))
}

/// As [`find`], with kernels and modules installed elsewhere.
pub(super) fn find_in(
    given: Option<(&Path, Option<&Path>)>,
    boot: &Path,
    modules: &Path,
) -> Result<Kernel, KernelError> {
    match given {
        Some((image, folder)) => the_one(image, folder, modules),
        None => the_best(boot, modules),
    }
}

fn the_one(image: &Path, folder: Option<&Path>, installed: &Path) -> Result<Kernel, KernelError> {
    let path = image.to_owned();
    let version = match version(image) {
        Ok(Some(version)) => version,
        Ok(None) => return Err(KernelError::NotOne { path }),
        Err(source) => return Err(KernelError::Read { path, source }),
    };
    let folder = folder.map_or_else(|| installed.join(&version), Path::to_owned);
    let found = match Modules::scan(&folder) {
        Err(ModuleError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => None,
        scanned => Some(scanned?).filter(|modules| modules.has(DRIVER)),
    };
    match found {
        Some(modules) => Ok(Kernel { image: path, version, modules }),
        None => Err(KernelError::NoModules { path, version, modules: folder }),
    }
}

/// Of those that have modules with virtio: Debian's for clouds, which has least to set up, then
/// the newest.
fn the_best(boot: &Path, installed: &Path) -> Result<Kernel, KernelError> {
    let none = || KernelError::None { boot: boot.to_owned(), modules: installed.to_owned() };
    let entries = fs::read_dir(boot).map_err(|_| none())?;
    let images = entries.flatten().filter(|entry| {
        entry.file_name().to_str().is_some_and(|name| name.starts_with("vmlinuz-"))
    });
    // What cannot be read is none that can be used.
    let mut kernels: Vec<(PathBuf, String)> =
        images.filter_map(|entry| Some((entry.path(), version(&entry.path()).ok()??))).collect();
    kernels.sort_by_cached_key(|(_, version)| Reverse((version.contains("-cloud-"), age(version))));
    kernels.iter().find_map(|(image, _)| the_one(image, None, installed).ok()).ok_or_else(none)
}

/// The numbers in a version, which tell the newer of two.
fn age(version: &str) -> Vec<u64> {
    version
        .split(|char: char| !char.is_ascii_digit())
        .filter_map(|part| part.parse().ok())
        .collect()
}

/// What a kernel's file says its version is (`Documentation/arch/x86/boot.rst`: the offset less
/// 0x200 of a string is at 0x20e). None if it is no kernel.
fn version(image: &Path) -> io::Result<Option<String>> {
    let mut head = Vec::new();
    // All that an offset can reach.
    File::open(image)?.take(0x200 + (1 << 16) + 256).read_to_end(&mut head)?;
    Ok(version_in(&head))
}

fn version_in(head: &[u8]) -> Option<String> {
    let is_kernel = head.get(0x1fe..0x200)? == b"\x55\xaa" && head.get(0x202..0x206)? == b"HdrS";
    is_kernel.then_some(())?;
    let offset = u16::from_le_bytes(head.get(0x20e..0x210)?.try_into().ok()?);
    let text = head.get(0x200 + usize::from(offset)..)?;
    let text = text.iter().take(256).take_while(|byte| byte.is_ascii_graphic());
    let text: String = text.copied().map(char::from).collect();
    // It becomes the name of a folder.
    let is_version = text.starts_with(|char: char| char.is_ascii_digit()) && !text.contains('/');
    is_version.then_some(text)
}
