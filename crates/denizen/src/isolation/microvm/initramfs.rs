//! The first files that a machine's kernel sees: `denizen-init` and modules, in the `newc` format
//! of cpio (`Documentation/driver-api/early-userspace/buffer-format.rst` of the kernel). The same
//! parts make the same bytes, and a file of them has a name that says which: it is there whole or
//! not at all. They are not compressed: unpacking takes a machine longer than loading.

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::disks::hex;
use super::elf;
use super::modules::{Module, ModuleError, Modules};

/// What every machine needs: disks, the port, memory that is given back, random numbers.
const NEEDED: [&str; 7] = [
    "virtio_pci",
    "virtio_blk",
    "virtio_console",
    "virtio_balloon",
    "virtio_rng",
    "ext4",
    "overlay",
];
/// What ext4 asks for by another name, in kernels that have it.
const CHECKSUMS: &str = "crc32c_generic";
/// What a machine with a network needs beside.
const NETWORK: &str = "virtio_net";
/// What `denizen-init` mounts at (`crates/init/src/boot.rs`), and where modules are.
const FOLDERS: [&str; 8] = ["dev", "disk", "modules", "new", "proc", "root", "sys", "tools"];

/// Why there is no initramfs.
#[derive(Debug, thiserror::Error)]
pub(crate) enum InitramfsError {
    /// The kernel's modules cannot be had.
    #[error(transparent)]
    Modules(#[from] ModuleError),
    /// `denizen-init` needs what no initramfs has.
    #[error(
        "this denizen cannot start machines: where it was built, there was no static C library \
         for denizen-init"
    )]
    NotStatic,
    /// It cannot be kept.
    #[error("cannot write the initramfs to {}", folder.display())]
    Write {
        /// Where to.
        folder: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

/// The path of an initramfs for a kernel with these modules, in a folder that keeps them.
pub(crate) fn keep(modules: &Modules, folder: &Path) -> Result<PathBuf, InitramfsError> {
    let content = make(denizen_init::PROGRAM, modules)?;
    let digest = hex(&Sha256::digest(&content));
    let path = folder.join(format!("initramfs-{digest}.img"));
    if path.exists() {
        return Ok(path);
    }
    let write = || {
        fs::create_dir_all(folder)?;
        let mut file = tempfile::NamedTempFile::new_in(folder)?;
        file.write_all(&content)?;
        file.as_file().sync_all()?;
        file.persist(&path)?;
        Ok(())
    };
    let failed = |source| InitramfsError::Write { folder: folder.to_owned(), source };
    write().map_err(failed).map(|()| path.clone())
}

fn make(program: &[u8], modules: &Modules) -> Result<Vec<u8>, InitramfsError> {
    if elf::has_loader(program) {
        return Err(InitramfsError::NotStatic);
    }
    let mut wanted = NEEDED.to_vec();
    if modules.has(CHECKSUMS) {
        wanted.insert(0, CHECKSUMS);
    }
    let needed = modules.load(&wanted)?;
    let known: BTreeSet<&str> = needed.iter().map(|module| module.name.as_str()).collect();
    let mut network = modules.load(&[NETWORK])?;
    network.retain(|module| !known.contains(module.name.as_str()));

    let mut archive = Archive::default();
    for folder in FOLDERS {
        archive.entry(folder, FOLDER | 0o755, (0, 0), &[]);
    }
    // Both are there before the first process is, which has the former as its descriptors, or
    // the latter in its place.
    archive.entry("dev/console", DEVICE | 0o600, (5, 1), &[]);
    archive.entry("dev/null", DEVICE | 0o666, (1, 3), &[]);
    archive.entry("init", FILE | 0o755, (0, 0), program);
    archive.entry("modules/order", FILE | 0o644, (0, 0), &list(&needed));
    archive.entry("modules/network", FILE | 0o644, (0, 0), &list(&network));
    for module in needed.iter().chain(&network) {
        let name = format!("modules/{}.ko", module.name);
        archive.entry(&name, FILE | 0o644, (0, 0), &module.content);
    }
    Ok(archive.finish())
}

/// The names, a line each.
fn list(modules: &[Module]) -> Vec<u8> {
    modules.iter().flat_map(|module| [module.name.as_bytes(), b"\n"]).flatten().copied().collect()
}

const FOLDER: u32 = 0o040_000;
const FILE: u32 = 0o100_000;
const DEVICE: u32 = 0o020_000;

/// An archive being written. All is root's and from 1970.
#[derive(Default)]
struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    /// Adds a file, a folder, or a device of a number. None is near the 4 GiB that a file can
    /// have here.
    fn entry(&mut self, name: &str, mode: u32, device: (u32, u32), content: &[u8]) {
        self.entries += 1;
        let length = |length: usize| u32::try_from(length).unwrap_or(u32::MAX);
        let links = if mode & FOLDER == 0 { 1 } else { 2 };
        // The file's number, its mode, its owner, its links, its time, its length, the device it
        // is on, the device it is, its name's length with a zero, and no checksum.
        let fields = [
            self.entries,
            mode,
            0,
            0,
            links,
            0,
            length(content.len()),
            0,
            0,
            device.0,
            device.1,
            length(name.len() + 1),
            0,
        ];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, (0, 0), &[]);
        self.bytes
    }
}
