//! What a pool is configured with: the form people write ([`VmPoolConfig`]) and the form the
//! pool runs on ([`VmPoolRuntimeConfig`]). Both are plain data; what else can be chosen is on
//! [`crate::Builder`].

use std::collections::HashMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;
use std::{fs, io};

use denizen_repository::Destination;
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// A pool's configuration as it stands in a file. Keys that are not fields here are refused,
/// so that a misspelt one does not pass in silence.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct VmPoolConfig {
    /// Whether there is a pool at all. Default: no.
    pub enabled: bool,
    /// The folder that holds all sessions of the pool.
    pub volume_root: PathBuf,
    /// A Nix flake whose development shell is built when a session is made.
    pub nix_profile: Option<String>,
    /// The shell that runs command lines. Default: `/bin/bash`.
    pub shell: PathBuf,
    /// What the shell is given before the command line. Default: `-lc`.
    pub shell_args: Vec<String>,
    /// Environment of every command. Nothing else of the host's environment is passed on.
    pub env: HashMap<String, String>,
    /// Most sessions with files on local disk at once. Default: 32.
    pub max_vms: usize,
    /// Seconds without use after which a session is stopped. Default: 900.
    pub idle_shutdown_seconds: u64,
    /// Seconds of being stopped after which a session's local files are deleted. Default: 3600.
    pub prune_after_seconds: u64,
    /// Seconds of being stopped after which a session is backed up. Needs
    /// `backup_destination`.
    pub backup_after_seconds: Option<u64>,
    /// Where backups are written to: a folder, or `s3://bucket/prefix`. With it, nothing is
    /// deleted before a verified backup holds it.
    pub backup_destination: Option<PathBuf>,
    /// A program and its arguments, run in the volume once, when a session is made.
    pub bootstrap_command: Option<Vec<String>>,
}

impl Default for VmPoolConfig {
    fn default() -> Self {
        Self {
            enabled: false,
            volume_root: PathBuf::from("/var/lib/denizen"),
            nix_profile: None,
            shell: PathBuf::from("/bin/bash"),
            shell_args: vec!["-lc".to_owned()],
            env: HashMap::new(),
            max_vms: 32,
            idle_shutdown_seconds: 900,
            prune_after_seconds: 3600,
            backup_after_seconds: None,
            backup_destination: None,
            bootstrap_command: None,
        }
    }
}

impl VmPoolConfig {
    /// Checks that the values make sense and, if the pool is enabled, that its folders can be
    /// made and written to.
    ///
    /// # Errors
    /// [`Error::Config`] names the field and says what is wrong with it.
    pub fn validate(&self) -> Result<()> {
        let positive = |field, value: u64| {
            if value == 0 {
                return Err(Error::config(field, "must be greater than zero"));
            }
            Ok(())
        };
        positive("max_vms", self.max_vms as u64)?;
        positive("idle_shutdown_seconds", self.idle_shutdown_seconds)?;
        positive("prune_after_seconds", self.prune_after_seconds)?;
        if let Some(seconds) = self.backup_after_seconds {
            positive("backup_after_seconds", seconds)?;
            if self.backup_destination.is_none() {
                return Err(Error::config(
                    "backup_after_seconds",
                    "needs backup_destination, where backups go to",
                ));
            }
        }
        if self.bootstrap_command.as_ref().is_some_and(Vec::is_empty) {
            return Err(Error::config("bootstrap_command", "must name a program"));
        }
        if self.enabled {
            writable("volume_root", &self.volume_root)?;
            if let Some(destination) = &self.backup_destination
                && let Destination::Folder(folder) = backup_destination(destination)?
            {
                writable("backup_destination", &folder)?;
            }
        }
        Ok(())
    }
}

/// What `backup_destination` stands for.
pub(crate) fn backup_destination(path: &Path) -> Result<Destination> {
    // What is not text is a folder.
    let Some(text) = path.to_str() else { return Ok(Destination::Folder(path.to_owned())) };
    text.parse().map_err(|error: denizen_repository::Error| {
        Error::config("backup_destination", error.to_string())
    })
}

/// Makes the folder if need be and writes a file in it.
fn writable(field: &'static str, path: &Path) -> Result<()> {
    fs::create_dir_all(path).and_then(|()| probe(path)).map_err(|source| {
        Error::config(field, format!("cannot be made or written to: {}: {source}", path.display()))
    })
}

/// Writes a file in a folder: permissions alone do not tell of a read-only or full file system.
/// Blocks.
pub(crate) fn probe(folder: &Path) -> io::Result<()> {
    use rustix::fs::{Mode, OFlags};
    // A file without a name is gone however this process ends.
    let flags = OFlags::TMPFILE | OFlags::WRONLY | OFlags::CLOEXEC;
    match rustix::fs::open(folder, flags, Mode::RUSR | Mode::WUSR) {
        Ok(file) => fs::File::from(file).write_all(b"probe"),
        Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL) => {
            // One name for all: at most one is left behind, and goes with the next.
            let probe = folder.join(".denizen-probe");
            let written = fs::write(&probe, b"probe");
            match fs::remove_file(&probe) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => written.and(Err(error)),
                _ => written,
            }
        }
        Err(errno) => Err(errno.into()),
    }
}

/// [`VmPoolConfig`] with times as [`Duration`]s.
#[derive(Clone, Debug)]
pub struct VmPoolRuntimeConfig {
    /// Whether there is a pool at all.
    pub enabled: bool,
    /// The folder that holds all sessions of the pool.
    pub volume_root: PathBuf,
    /// A Nix flake whose development shell is built when a session is made.
    pub nix_profile: Option<String>,
    /// The shell that runs command lines.
    pub shell: PathBuf,
    /// What the shell is given before the command line.
    pub shell_args: Vec<String>,
    /// Environment of every command.
    pub env: HashMap<String, String>,
    /// Most sessions with files on local disk at once.
    pub max_vms: usize,
    /// Without use for this long, a session is stopped.
    pub idle_shutdown: Duration,
    /// Stopped for this long, a session's local files are deleted.
    pub prune_after: Duration,
    /// Stopped for this long, a session is backed up.
    pub backup_after: Option<Duration>,
    /// Where backups are written to: a folder, or `s3://bucket/prefix`.
    pub backup_destination: Option<PathBuf>,
    /// A program and its arguments, run in the volume once, when a session is made.
    pub bootstrap_command: Option<Vec<String>>,
}

impl From<&VmPoolConfig> for VmPoolRuntimeConfig {
    fn from(config: &VmPoolConfig) -> Self {
        let config = config.clone();
        Self {
            enabled: config.enabled,
            volume_root: config.volume_root,
            nix_profile: config.nix_profile,
            shell: config.shell,
            shell_args: config.shell_args,
            env: config.env,
            max_vms: config.max_vms,
            idle_shutdown: Duration::from_secs(config.idle_shutdown_seconds),
            prune_after: Duration::from_secs(config.prune_after_seconds),
            backup_after: config.backup_after_seconds.map(Duration::from_secs),
            backup_destination: config.backup_destination,
            bootstrap_command: config.bootstrap_command,
        }
    }
}
