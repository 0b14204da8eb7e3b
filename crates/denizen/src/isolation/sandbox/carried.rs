//! A program of the host that every sandbox has, whatever its root: denizen's own, which
//! serves a session's files from within and is the sandbox's `sudo`. With it come the loader and the libraries that it
//! was linked with, so that it runs where there are none, or others. It is shown read-only;
//! nothing here runs it.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::plan::{Attributes, Plan};

/// Where it is within.
const FOLDER: &str = "/run/denizen";
/// What is run there as `sudo`.
const SUDO: &str = "/run/denizen/sudo";

/// The program and what it needs.
#[derive(Clone, Debug)]
pub(in crate::isolation) struct Carried {
    program: PathBuf,
    loader: Option<PathBuf>,
    libraries: Vec<PathBuf>,
}

impl Carried {
    /// Takes up the program that runs here, which `program` must be, and keeps a name of it
    /// in `store`: the other one may be replaced while sandboxes need it.
    pub(in crate::isolation) fn this_program(program: &Path, store: &Path) -> io::Result<Self> {
        let kept = store.join("agent");
        match fs::remove_file(&kept) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        // Another file system takes a copy.
        fs::hard_link(program, &kept).or_else(|_| fs::copy(program, &kept).map(drop))?;
        let maps = fs::read_to_string("/proc/self/maps")?;
        let mut libraries: Vec<PathBuf> = maps
            .lines()
            .filter_map(|line| line.split_whitespace().nth(5))
            .filter(|path| path.starts_with('/') && path.contains(".so"))
            .map(PathBuf::from)
            .collect();
        libraries.sort_unstable();
        libraries.dedup();
        let is_loader = |path: &&PathBuf| {
            path.file_name().is_some_and(|name| name.as_bytes().starts_with(b"ld"))
        };
        let loader = libraries.iter().find(is_loader).cloned();
        Ok(Self { program: kept, loader, libraries })
    }

    /// Its files, all of which are in one folder within.
    pub(in crate::isolation) fn files(&self) -> impl Iterator<Item = &Path> {
        self.libraries.iter().chain([&self.program]).map(PathBuf::as_path)
    }

    /// Shows it in a sandbox.
    pub(super) fn show(&self, plan: &mut Plan) {
        plan.dir(FOLDER, 0o755);
        for path in self.files() {
            let within = within(path);
            plan.step(["file", &within]);
            plan.bind(path, &within, Attributes::PROGRAM);
        }
        let words: Vec<_> =
            self.command().iter().map(|word| format!("'{}'", word.to_string_lossy())).collect();
        let script = format!("#!/bin/sh\nexec {} sudo \"$@\"\n", words.join(" "));
        plan.step(["put", SUDO, "755", &script]);
        plan.step(["sudo"]);
    }

    /// How it is run within.
    pub(in crate::isolation) fn command(&self) -> Vec<OsString> {
        let mut words = Vec::new();
        if let Some(loader) = &self.loader {
            words.extend([within(loader).into(), "--library-path".into(), FOLDER.into()]);
        }
        words.push(within(&self.program).into());
        words
    }
}

fn within(path: &Path) -> String {
    format!("{FOLDER}/{}", path.file_name().unwrap_or_default().to_string_lossy())
}
