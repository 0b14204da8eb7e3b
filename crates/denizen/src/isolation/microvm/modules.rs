//! A kernel's modules: which there are, what each needs, and in which order they can be loaded.
//! All is read from the modules themselves, so that any folder of them will do, with or without
//! what `depmod` makes. They are data here: nothing of them is run.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use super::elf;

/// Far more than any module has.
const LARGEST: u64 = 64 << 20;

/// Why a kernel's modules cannot be had.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ModuleError {
    /// A file or folder cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file is no module.
    #[error("{} is damaged: it is no kernel module", path.display())]
    Damaged {
        /// Which.
        path: PathBuf,
    },
    /// The kernel lacks a module.
    #[error(
        "the kernel of the modules in {} has no {name}: use another one, such as \
         linux-image-cloud-amd64", folder.display()
    )]
    Missing {
        /// Its name.
        name: String,
        /// Where it was looked for.
        folder: PathBuf,
    },
}

/// A module, as the kernel takes it.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Module {
    pub(crate) name: String,
    pub(crate) content: Vec<u8>,
}

/// What a folder has, by the names that modules know each other by.
#[derive(Debug)]
pub(crate) struct Modules {
    folder: PathBuf,
    files: BTreeMap<String, PathBuf>,
    /// None if nobody says: then what has no file is believed to be in the kernel.
    built_in: Option<BTreeSet<String>>,
}

impl Modules {
    /// Looks at a folder and all below.
    pub(crate) fn scan(folder: &Path) -> Result<Self, ModuleError> {
        let mut files = BTreeMap::new();
        let mut open = vec![folder.to_owned()];
        while let Some(path) = open.pop() {
            let failed = |source| ModuleError::Read { path: path.clone(), source };
            for entry in fs::read_dir(&path).map_err(failed)? {
                let entry = entry.map_err(failed)?;
                let kind = entry.file_type().map_err(failed)?;
                if kind.is_dir() {
                    open.push(entry.path());
                } else if let Some(name) = entry.file_name().to_str().and_then(module_name) {
                    files.insert(name, entry.path());
                }
            }
        }
        let list = folder.join("modules.builtin");
        let built_in = match fs::read_to_string(&list) {
            Ok(list) => {
                let names = list.lines().filter_map(|line| module_name(line.rsplit('/').next()?));
                Some(names.collect())
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(source) => return Err(ModuleError::Read { path: list, source }),
        };
        Ok(Self { folder: folder.to_owned(), files, built_in })
    }

    /// Whether the kernel has it, as a file or within.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.files.contains_key(name)
            || self.built_in.as_ref().is_some_and(|names| names.contains(name))
    }

    /// These and what they need that is not in the kernel, each after all that it needs.
    pub(crate) fn load(&self, wanted: &[&str]) -> Result<Vec<Module>, ModuleError> {
        let mut loaded = Vec::new();
        let mut seen = BTreeSet::new();
        for name in wanted {
            self.load_one(name, &mut seen, &mut loaded)?;
        }
        Ok(loaded)
    }

    fn load_one(
        &self,
        name: &str,
        seen: &mut BTreeSet<String>,
        loaded: &mut Vec<Module>,
    ) -> Result<(), ModuleError> {
        if !seen.insert(name.to_owned()) {
            return Ok(());
        }
        let Some(path) = self.files.get(name) else {
            if self.built_in.is_none() || self.has(name) {
                return Ok(());
            }
            return Err(ModuleError::Missing { name: name.into(), folder: self.folder.clone() });
        };
        let content = contents(path)?;
        let damaged = || ModuleError::Damaged { path: path.clone() };
        for needed in needs(&content).ok_or_else(damaged)? {
            self.load_one(&needed, seen, loaded)?;
        }
        loaded.push(Module { name: name.to_owned(), content });
        Ok(())
    }
}

/// `virtio-rng.ko.xz` is `virtio_rng`.
fn module_name(file: &str) -> Option<String> {
    let (name, ending) = file.split_once(".ko")?;
    ["", ".gz", ".xz", ".zst"].contains(&ending).then(|| name.replace('-', "_"))
}

/// The names that a module says it needs. None if it is no module.
fn needs(module: &[u8]) -> Option<Vec<String>> {
    let told = elf::section(module, ".modinfo")?;
    let list = told.split(|byte| *byte == 0).find_map(|line| line.strip_prefix(b"depends="))?;
    let names = std::str::from_utf8(list).ok()?.split(',').filter(|name| !name.is_empty());
    Some(names.map(|name| name.replace('-', "_")).collect())
}

/// A module's file, decompressed: not every kernel can do that itself.
fn contents(path: &Path) -> Result<Vec<u8>, ModuleError> {
    let failed = |source| ModuleError::Read { path: path.to_owned(), source };
    let file = fs::File::open(path).map_err(failed)?;
    let mut reader: Box<dyn Read> = match path.extension().and_then(|ending| ending.to_str()) {
        Some("gz") => Box::new(flate2::read::MultiGzDecoder::new(file)),
        Some("xz") => Box::new(lzma_rust2::XzReader::new(file, true)),
        Some("zst") => Box::new(zstd::stream::read::Decoder::new(file).map_err(failed)?),
        _ => Box::new(file),
    };
    let mut content = Vec::new();
    let count = reader.by_ref().take(LARGEST + 1).read_to_end(&mut content).map_err(failed)?;
    if count as u64 > LARGEST {
        return Err(ModuleError::Damaged { path: path.to_owned() });
    }
    Ok(content)
}
