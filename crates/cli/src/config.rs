//! Where the program's settings come from: flags before `DENIZEN_*` variables before the
//! configuration file before defaults.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use denizen::{BackupFormat, Isolation, Limits, Network, Retention, Rule, Sleep, VmPoolConfig};
use denizen_server::{Certificate, Front, Habits, KeptLogs};
use serde::{Deserialize, Serialize};

use crate::telemetry::LogFormat;
use crate::{Failure, Result};

/// What sessions may have of the disk unless something else is set: more than most work needs,
/// and little enough that one of them does not take it all.
const DISK: u64 = 20 << 30;

/// Settings that can be given on the command line or in the environment.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Settings")]
pub struct Options {
    /// The configuration file [default: denizen/config.toml in the user's configuration folder]
    #[arg(long, global = true, env = "DENIZEN_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    /// Where the daemon keeps everything [default: denizen in the user's state folder, or
    /// /var/lib/denizen for root]
    #[arg(long, global = true, env = "DENIZEN_STATE", value_name = "FOLDER")]
    state: Option<PathBuf>,
    /// The folder for what can be made again [default: denizen in the user's cache folder, or
    /// /var/cache/denizen for root]
    #[arg(long, global = true, env = "DENIZEN_CACHE", value_name = "FOLDER")]
    cache: Option<PathBuf>,
    /// The daemon's socket [default: denizen.sock in the state folder]
    #[arg(long, global = true, env = "DENIZEN_SOCKET", value_name = "FILE")]
    socket: Option<PathBuf>,
    /// A daemon elsewhere: https://HOST:PORT; its key is taken from DENIZEN_API_KEY [default: the
    /// socket]
    #[arg(long, global = true, env = "DENIZEN_URL", value_name = "URL", hide_short_help = true)]
    url: Option<String>,
    /// Where else the daemon listens, for clients with a key: 127.0.0.1:7878; several with commas
    /// between [default: nowhere]
    #[arg(
        long,
        global = true,
        env = "DENIZEN_LISTEN",
        value_name = "ADDRESS:PORT",
        value_delimiter = ',',
        hide_short_help = true
    )]
    listen: Option<Vec<SocketAddr>>,
    /// Listen without TLS and without a key also on addresses that other machines reach [default:
    /// false]
    #[arg(
        long,
        global = true,
        env = "DENIZEN_INSECURE_LISTEN",
        value_name = "BOOL",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "true",
        hide_short_help = true
    )]
    insecure_listen: Option<bool>,
    /// The file with the certificate that the daemon shows, and those above it (PEM); what comes
    /// in its place counts for the next connection
    #[arg(
        long,
        global = true,
        env = "DENIZEN_TLS_CERTIFICATE",
        value_name = "FILE",
        hide_short_help = true
    )]
    tls_certificate: Option<PathBuf>,
    /// The file with that certificate's key (PEM)
    #[arg(
        long,
        global = true,
        env = "DENIZEN_TLS_KEY",
        value_name = "FILE",
        hide_short_help = true
    )]
    tls_key: Option<PathBuf>,
    /// The names that others call the daemon by
    #[arg(
        long,
        global = true,
        env = "DENIZEN_HOSTS",
        value_name = "NAMES",
        value_delimiter = ',',
        hide_short_help = true
    )]
    hosts: Option<Vec<String>>,
    /// Ports of sessions are reached at <port>-<session>. and this
    #[arg(
        long,
        global = true,
        env = "DENIZEN_DOMAIN",
        value_name = "DOMAIN",
        hide_short_help = true
    )]
    domain: Option<String>,
    /// The origins (https://example.org) of web pages that may use the daemon besides its own
    #[arg(
        long,
        global = true,
        env = "DENIZEN_ORIGINS",
        value_name = "ORIGINS",
        value_delimiter = ',',
        hide_short_help = true
    )]
    origins: Option<Vec<String>>,
    /// Whether the daemon's metrics are there for those who have no key too [default: false]
    #[arg(
        long,
        global = true,
        env = "DENIZEN_METRICS_PUBLIC",
        value_name = "BOOL",
        hide_short_help = true
    )]
    metrics_public: Option<bool>,
    /// How the daemon writes its log: text, or json with an object in each line [default: text]
    #[arg(
        long,
        global = true,
        env = "DENIZEN_LOG_FORMAT",
        value_name = "FORMAT",
        hide_short_help = true
    )]
    log_format: Option<LogFormat>,
    /// Seconds to wait for a session in use or a place in a full pool
    #[arg(long, global = true, env = "DENIZEN_ACQUIRE_TIMEOUT_SECONDS", value_name = "SECONDS")]
    acquire_timeout_seconds: Option<u64>,
    /// How far sessions are kept from this machine: host, sandbox or microvm [default: sandbox]
    #[arg(long, global = true, env = "DENIZEN_ISOLATION", value_name = "ISOLATION")]
    isolation: Option<Isolation>,
    /// How many sandboxes are kept ready for sessions to come [default: 2, or none under microvm]
    #[arg(long, global = true, env = "DENIZEN_SPARES", value_name = "N", hide_short_help = true)]
    spares: Option<usize>,
    /// The root of new sessions: an image's name or a folder's absolute path [default: what
    /// every user of this machine sees of its operating system]
    #[arg(long, global = true, env = "DENIZEN_IMAGE", value_name = "IMAGE")]
    image: Option<String>,
    /// The kernel of virtual machines [default: the newest in /boot that can be one's, Debian's
    /// cloud kernel first]
    #[arg(
        long,
        global = true,
        env = "DENIZEN_KERNEL",
        value_name = "FILE",
        hide_short_help = true
    )]
    kernel: Option<PathBuf>,
    /// The folder with that kernel's modules [default: in /lib/modules by its version]
    #[arg(
        long,
        global = true,
        env = "DENIZEN_KERNEL_MODULES",
        value_name = "FOLDER",
        hide_short_help = true
    )]
    kernel_modules: Option<PathBuf>,
    /// Which networks sandboxes reach: none, filtered (what `allow` opens, by HTTP and HTTPS) or
    /// full (all that is public) [default: none]
    #[arg(long, global = true, env = "DENIZEN_NETWORK", value_name = "NETWORK")]
    network: Option<NetworkKind>,
    /// What else they reach: domains, addresses or networks, each with a port or without, as in
    /// example.org, *.example.org:8443, 192.0.2.0/24
    #[arg(
        long,
        global = true,
        env = "DENIZEN_ALLOW",
        value_name = "RULES",
        value_delimiter = ',',
        hide_short_help = true
    )]
    allow: Option<Vec<Rule>>,
    /// What becomes of idle sessions: stop (their processes end) or freeze (their processes stand
    /// still, and go on with the next use; under microvm they are on disk meanwhile) [default:
    /// stop, or freeze under microvm]
    #[arg(long, global = true, env = "DENIZEN_SLEEP", value_name = "SLEEP")]
    sleep: Option<Sleep>,
    /// Whether processes that a command left running keep their session from sleeping [default:
    /// true]
    #[arg(
        long,
        global = true,
        env = "DENIZEN_BACKGROUND_IS_USE",
        value_name = "BOOL",
        hide_short_help = true
    )]
    background_is_use: Option<bool>,
    /// What each session may use, as a TOML inline table: memory_bytes, processes, cpu_percent,
    /// open_files, disk_bytes [default of the last: 20 GiB; 0 is no limit]
    #[arg(
        long,
        global = true,
        env = "DENIZEN_LIMITS",
        value_name = "TABLE",
        hide_short_help = true
    )]
    limits: Option<Toml<Limits>>,
    /// Seconds that a sandbox in which something runs goes on without a daemon, until the next
    /// one finds it; 0 ends all with the daemon [default: 300]
    #[arg(
        long,
        global = true,
        env = "DENIZEN_LINGER_SECONDS",
        value_name = "SECONDS",
        hide_short_help = true
    )]
    linger_seconds: Option<u64>,
    /// Seconds that commands in the foreground may go on when the daemon is sent SIGTERM, as by a
    /// service manager that stops or restarts it [default: 10]
    #[arg(
        long,
        global = true,
        env = "DENIZEN_GRACE_SECONDS",
        value_name = "SECONDS",
        hide_short_help = true
    )]
    grace_seconds: Option<u64>,
    /// What is kept of what a session's detached commands print, as a TOML inline table: commands,
    /// bytes [default: of the last 100, 64 MiB]
    #[arg(long, global = true, env = "DENIZEN_LOGS", value_name = "TABLE", hide_short_help = true)]
    logs: Option<Toml<KeptLogs>>,
    /// How many full files of the audit log are kept, of 8 MiB each [default: 8]
    #[arg(
        long,
        global = true,
        env = "DENIZEN_AUDIT_FILES",
        value_name = "N",
        hide_short_help = true
    )]
    audit_files: Option<u32>,
    /// What the daemon's log tells: error, warn, info, debug or trace, also for parts of it, as in
    /// info,denizen::pool=debug [default: info]
    #[arg(long, global = true, env = "DENIZEN_LOG", value_name = "FILTER", hide_short_help = true)]
    log: Option<String>,
    /// The folder that holds all sessions
    #[arg(
        long,
        global = true,
        env = "DENIZEN_VOLUME_ROOT",
        value_name = "FOLDER",
        hide_short_help = true
    )]
    volume_root: Option<PathBuf>,
    /// The shell of `denizen shell`
    #[arg(long, global = true, env = "DENIZEN_SHELL", value_name = "FILE", hide_short_help = true)]
    shell: Option<PathBuf>,
    /// Most sessions with files on local disk
    #[arg(long, global = true, env = "DENIZEN_MAX_VMS", value_name = "N", hide_short_help = true)]
    max_vms: Option<usize>,
    /// Seconds without use until a session is stopped
    #[arg(
        long,
        global = true,
        env = "DENIZEN_IDLE_SHUTDOWN_SECONDS",
        value_name = "SECONDS",
        hide_short_help = true
    )]
    idle_shutdown_seconds: Option<u64>,
    /// Seconds of being stopped until a session's local files are deleted
    #[arg(
        long,
        global = true,
        env = "DENIZEN_PRUNE_AFTER_SECONDS",
        value_name = "SECONDS",
        hide_short_help = true
    )]
    prune_after_seconds: Option<u64>,
    /// Seconds of being stopped until a session is backed up
    #[arg(
        long,
        global = true,
        env = "DENIZEN_BACKUP_AFTER_SECONDS",
        value_name = "SECONDS",
        hide_short_help = true
    )]
    backup_after_seconds: Option<u64>,
    /// Where backups go: a folder, or s3://bucket/prefix (with AWS_ACCESS_KEY_ID,
    /// AWS_SECRET_ACCESS_KEY, AWS_REGION and AWS_ENDPOINT_URL) [default: backups in the state
    /// folder]
    #[arg(
        long,
        global = true,
        env = "DENIZEN_BACKUP_DESTINATION",
        value_name = "PLACE",
        hide_short_help = true
    )]
    backup_destination: Option<PathBuf>,
    /// How new backups are kept: in a repository (restic's format: encrypted, each thing once) or
    /// each as an archive (tar.zst) [default: repository]
    #[arg(
        long,
        global = true,
        env = "DENIZEN_BACKUP_FORMAT",
        value_name = "FORMAT",
        hide_short_help = true
    )]
    backup_format: Option<BackupFormat>,
    /// The file with the repository's password, which is made with a new one [default: backup.key
    /// in the state folder]
    #[arg(
        long,
        global = true,
        env = "DENIZEN_BACKUP_KEY",
        value_name = "FILE",
        hide_short_help = true
    )]
    backup_key: Option<PathBuf>,
    /// Which backups are kept, as a TOML inline table: keep_last, keep_hourly, keep_daily,
    /// keep_weekly, keep_monthly, keep_yearly; once a day the others are deleted [default: all
    /// are kept]
    #[arg(
        long,
        global = true,
        env = "DENIZEN_RETENTION",
        value_name = "TABLE",
        hide_short_help = true
    )]
    retention: Option<Toml<Retention>>,
    /// The Nix flake whose shell is built when a session is made
    #[arg(
        long,
        global = true,
        env = "DENIZEN_NIX_PROFILE",
        value_name = "FLAKE",
        hide_short_help = true
    )]
    nix_profile: Option<String>,
    /// What the shell is started with before the line it is to run, as a TOML array
    #[arg(
        long,
        global = true,
        env = "DENIZEN_SHELL_ARGS",
        value_name = "ARRAY",
        hide_short_help = true
    )]
    shell_args: Option<Toml<Vec<String>>>,
    /// The environment of all sessions, as a TOML inline table
    #[arg(
        long,
        global = true,
        env = "DENIZEN_SESSION_ENV",
        value_name = "TABLE",
        hide_short_help = true
    )]
    session_env: Option<Toml<HashMap<String, String>>>,
    /// The command that prepares a new session, as a TOML array
    #[arg(
        long,
        global = true,
        env = "DENIZEN_BOOTSTRAP_COMMAND",
        value_name = "ARRAY",
        hide_short_help = true
    )]
    bootstrap_command: Option<Toml<Vec<String>>>,
}

/// How far sandboxes reach.
#[derive(clap::ValueEnum, Clone, Copy, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NetworkKind {
    /// Nowhere.
    #[default]
    None,
    /// Where rules let them.
    Filtered,
    /// To all that is public.
    Full,
}

/// A setting with parts, written as the configuration file would have it.
#[derive(Clone, Debug)]
struct Toml<T>(T);

impl<T: serde::de::DeserializeOwned> std::str::FromStr for Toml<T> {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        #[derive(Deserialize)]
        struct Only<T> {
            value: T,
        }
        let only: Only<T> = toml::from_str(&format!("value = {text}"))
            .map_err(|error| error.message().to_owned())?;
        Ok(Self(only.value))
    }
}

/// The configuration file: the pool's fields and the daemon's own.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct FileConfig {
    state: Option<PathBuf>,
    cache: Option<PathBuf>,
    socket: Option<PathBuf>,
    url: Option<String>,
    listen: Option<Vec<SocketAddr>>,
    insecure_listen: Option<bool>,
    tls_certificate: Option<PathBuf>,
    tls_key: Option<PathBuf>,
    hosts: Option<Vec<String>>,
    domain: Option<String>,
    origins: Option<Vec<String>>,
    metrics_public: Option<bool>,
    log_format: Option<LogFormat>,
    acquire_timeout_seconds: Option<u64>,
    isolation: Option<Isolation>,
    spares: Option<usize>,
    image: Option<String>,
    kernel: Option<PathBuf>,
    kernel_modules: Option<PathBuf>,
    network: Option<NetworkKind>,
    allow: Option<Vec<Rule>>,
    sleep: Option<Sleep>,
    background_is_use: Option<bool>,
    limits: Option<Limits>,
    linger_seconds: Option<u64>,
    grace_seconds: Option<u64>,
    logs: Option<KeptLogs>,
    audit_files: Option<u32>,
    log: Option<String>,
    backup_format: Option<BackupFormat>,
    backup_key: Option<PathBuf>,
    retention: Option<Retention>,
    pool: toml::Table,
}

/// What the program runs with.
#[derive(Clone, Debug, Serialize)]
pub struct Settings {
    /// Where the daemon keeps everything.
    pub state: PathBuf,
    /// Where it keeps what can be made again.
    pub cache: PathBuf,
    /// The daemon's socket.
    pub socket: PathBuf,
    /// Where the daemon is instead, for clients.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub url: Option<String>,
    /// Where else it listens.
    pub listen: Vec<SocketAddr>,
    /// Whether without TLS and keys, also where others reach it.
    pub insecure_listen: bool,
    /// The certificate that it shows.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls_certificate: Option<PathBuf>,
    /// Its key.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls_key: Option<PathBuf>,
    /// What others call it.
    pub hosts: Vec<String>,
    /// Where ports of sessions are reached.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub domain: Option<String>,
    /// Of which web pages it is used.
    pub origins: Vec<String>,
    /// Whether anybody may read its metrics.
    pub metrics_public: bool,
    /// How it writes its log.
    pub log_format: LogFormat,
    /// How long callers wait in line.
    #[serde(rename = "acquire_timeout_seconds", serialize_with = "seconds")]
    pub acquire_timeout: Duration,
    /// How long sandboxes go on without a daemon.
    #[serde(rename = "linger_seconds", serialize_with = "seconds")]
    pub linger: Duration,
    /// How long commands in the foreground go on when the daemon is to leave.
    #[serde(rename = "grace_seconds", serialize_with = "seconds")]
    pub grace: Duration,
    /// How much is kept of what detached commands print.
    pub logs: KeptLogs,
    /// How much is kept of the audit log.
    pub audit_files: u32,
    /// What the daemon's log tells.
    pub log: String,
    /// How far sessions are kept from this machine.
    pub isolation: Isolation,
    /// How many sandboxes are kept ready for sessions to come.
    pub spares: usize,
    /// The root of new sessions.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
    /// The kernel of virtual machines.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kernel: Option<PathBuf>,
    /// Where its modules are.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kernel_modules: Option<PathBuf>,
    /// Which networks sandboxes reach.
    pub network: NetworkKind,
    /// What the network's kind does not open by itself.
    pub allow: Vec<Rule>,
    /// What becomes of idle sessions.
    pub sleep: Sleep,
    /// Whether processes left running keep a session from that.
    pub background_is_use: bool,
    /// What each session may use.
    pub limits: Limits,
    /// How new backups are kept.
    pub backup_format: BackupFormat,
    /// The file with the password of a repository of backups.
    pub backup_key: PathBuf,
    /// Which backups are kept.
    pub retention: Retention,
    /// The pool.
    pub pool: VmPoolConfig,
}

fn seconds<S: serde::Serializer>(
    duration: &Duration,
    serializer: S,
) -> std::result::Result<S::Ok, S::Error> {
    serializer.serialize_u64(duration.as_secs())
}

/// Where settings are taken from, now and when they are read anew.
#[derive(Clone, Debug)]
pub struct Sources {
    options: Options,
    /// Who the user is. It is asked for once: where a daemon has a range of user ids, it looks
    /// like root to itself later on.
    is_root: bool,
}

impl Sources {
    /// The options, the files and folders of who runs the program.
    pub fn new(options: Options) -> Self {
        Self { options, is_root: rustix::process::geteuid().is_root() }
    }

    /// Puts the settings together.
    pub fn load(&self) -> Result<Settings> {
        load(&self.options, self.is_root)
    }
}

fn load(options: &Options, is_root: bool) -> Result<Settings> {
    let file = options.config.clone().or_else(|| default_file(is_root));
    let given: FileConfig = match &file {
        Some(path) => read(path, options.config.is_some())?,
        None => FileConfig::default(),
    };
    let state = options.state.clone().or(given.state).map_or_else(|| default_state(is_root), Ok)?;
    let state = absolute(&state)?;

    let cache = options.cache.clone().or(given.cache).map_or_else(|| default_cache(is_root), Ok)?;

    // The program's own defaults, where they differ from the library's.
    let bash = Path::new("/bin/bash");
    let mut pool = VmPoolConfig {
        enabled: true,
        volume_root: state.join("pool"),
        shell: if bash.exists() { bash.to_owned() } else { PathBuf::from("/bin/sh") },
        backup_after_seconds: Some(300),
        backup_destination: Some(state.join("backups")),
        ..VmPoolConfig::default()
    };
    let mut table = toml::Table::try_from(&pool).map_err(|error| {
        Failure::new(format!("the default configuration cannot be written down: {error}"))
    })?;
    table.extend(given.pool);
    pool = table.try_into().map_err(|error| {
        let name = file.as_deref().unwrap_or(Path::new("configuration")).display().to_string();
        Failure::new(format!("{name}: [pool]: {error}"))
    })?;
    macro_rules! take {
        ($($field:ident),*) => {
            $(if let Some(value) = &options.$field { pool.$field = value.clone().into(); })*
        };
    }
    take!(volume_root, shell, max_vms, idle_shutdown_seconds, prune_after_seconds);
    take!(backup_after_seconds, backup_destination, nix_profile);
    if let Some(Toml(args)) = &options.shell_args {
        pool.shell_args.clone_from(args);
    }
    if let Some(Toml(env)) = &options.session_env {
        pool.env.extend(env.clone());
    }
    if let Some(Toml(command)) = &options.bootstrap_command {
        pool.bootstrap_command = Some(command.clone());
    }
    // The daemon stands elsewhere.
    pool.volume_root = absolute(&pool.volume_root)?;
    pool.backup_destination = pool.backup_destination.as_deref().map(place).transpose()?;
    let key = options.backup_key.clone().or(given.backup_key);
    let isolation = options.isolation.or(given.isolation).unwrap_or(Isolation::Sandbox);
    let is_machine = isolation == Isolation::MicroVm;
    let limits = options.limits.clone().map(|Toml(it)| it).or(given.limits);
    let limits = limited(limits.unwrap_or_default(), is_machine);
    let socket = options.socket.clone().or(given.socket);
    let wait = options.acquire_timeout_seconds.or(given.acquire_timeout_seconds).unwrap_or(30);
    let linger = options.linger_seconds.or(given.linger_seconds).unwrap_or(300);
    let grace = options.grace_seconds.or(given.grace_seconds).unwrap_or(10);
    let logs = options.logs.clone().map(|Toml(it)| it).or(given.logs).unwrap_or_default();
    Ok(Settings {
        socket: absolute(&socket.unwrap_or_else(|| state.join("denizen.sock")))?,
        url: options.url.clone().or(given.url).filter(|url| !url.is_empty()),
        listen: options.listen.clone().or(given.listen).unwrap_or_default(),
        insecure_listen: options.insecure_listen.or(given.insecure_listen).unwrap_or(false),
        tls_certificate: chosen(&options.tls_certificate, given.tls_certificate)?,
        tls_key: chosen(&options.tls_key, given.tls_key)?,
        hosts: options.hosts.clone().or(given.hosts).unwrap_or_default(),
        domain: options.domain.clone().or(given.domain),
        origins: options.origins.clone().or(given.origins).unwrap_or_default(),
        log_format: options.log_format.or(given.log_format).unwrap_or_default(),
        metrics_public: options.metrics_public.or(given.metrics_public).unwrap_or(false),
        acquire_timeout: Duration::from_secs(wait),
        linger: Duration::from_secs(linger),
        grace: Duration::from_secs(grace),
        logs,
        audit_files: options.audit_files.or(given.audit_files).unwrap_or(8),
        log: options.log.clone().or(given.log).unwrap_or_else(|| "info".to_owned()),
        isolation,
        spares: options.spares.or(given.spares).unwrap_or(if is_machine { 0 } else { 2 }),
        image: options.image.clone().or(given.image),
        kernel: chosen(&options.kernel, given.kernel)?,
        kernel_modules: chosen(&options.kernel_modules, given.kernel_modules)?,
        network: options.network.or(given.network).unwrap_or_default(),
        allow: options.allow.clone().or(given.allow).unwrap_or_default(),
        sleep: options.sleep.or(given.sleep).unwrap_or(if is_machine {
            Sleep::Freeze
        } else {
            Sleep::Stop
        }),
        background_is_use: options.background_is_use.or(given.background_is_use).unwrap_or(true),
        limits,
        backup_format: options
            .backup_format
            .or(given.backup_format)
            .unwrap_or(BackupFormat::Repository),
        backup_key: absolute(&key.unwrap_or_else(|| state.join("backup.key")))?,
        retention: options
            .retention
            .clone()
            .map(|Toml(it)| it)
            .or(given.retention)
            .unwrap_or_default(),
        state,
        cache: absolute(&cache)?,
        pool,
    })
}

/// The path of a file, if one is set.
fn chosen(option: &Option<PathBuf>, given: Option<PathBuf>) -> Result<Option<PathBuf>> {
    option.clone().or(given).as_deref().map(absolute).transpose()
}

/// The limits, with what is set for them if nothing else is.
fn limited(mut limits: Limits, is_machine: bool) -> Limits {
    limits.disk_bytes.get_or_insert(DISK);
    if is_machine {
        limits.memory_bytes = Some(limits.guest_memory());
    }
    limits
}

impl Settings {
    /// The network as the pool is told of it.
    pub fn network(&self) -> Network {
        let rules = self.allow.iter().cloned().collect();
        match self.network {
            NetworkKind::None => Network::None,
            NetworkKind::Filtered => Network::Filtered(rules),
            NetworkKind::Full => Network::Full(rules),
        }
    }

    /// How the daemon is reached besides its socket.
    pub fn front(&self) -> Result<Front> {
        let certificate = match (self.tls_certificate.clone(), self.tls_key.clone()) {
            (Some(certificate), Some(key)) => Some(Certificate { certificate, key }),
            (None, None) => None,
            _ => {
                let why = "TLS needs both: `tls_certificate` and `tls_key`";
                return Err(Failure::new(why));
            }
        };
        Ok(Front {
            certificate,
            listen: self.listen.clone(),
            insecure_listen: self.insecure_listen,
            hosts: self.hosts.clone(),
            domain: self.domain.clone(),
            origins: self.origins.clone(),
            metrics_public: self.metrics_public,
        })
    }

    /// What the daemon goes by.
    pub fn habits(&self, idle_exit: Option<Duration>) -> Habits {
        Habits { idle_exit, grace: self.grace, logs: self.logs, audit_files: self.audit_files }
    }

    /// Takes over what `new` has otherwise and a daemon that runs can change. What it cannot
    /// stays as it is.
    pub fn renew(&mut self, new: &Settings) -> Result<Renewed> {
        let mut renewed = Renewed::default();
        // One is not changed without the other.
        let has_tls = |it: &Self| it.tls_certificate.is_some() && it.tls_key.is_some();
        let keeps_tls = has_tls(self) && has_tls(new);
        for name in differences(&self.to_table()?, &new.to_table()?) {
            match name.as_str() {
                "log" => self.log.clone_from(&new.log),
                "hosts" => self.hosts.clone_from(&new.hosts),
                "domain" => self.domain.clone_from(&new.domain),
                "origins" => self.origins.clone_from(&new.origins),
                "metrics_public" => self.metrics_public = new.metrics_public,
                "retention" => self.retention = new.retention,
                "acquire_timeout_seconds" => self.acquire_timeout = new.acquire_timeout,
                "tls_certificate" if keeps_tls => {
                    self.tls_certificate.clone_from(&new.tls_certificate);
                }
                "tls_key" if keeps_tls => self.tls_key.clone_from(&new.tls_key),
                _ => {
                    renewed.not_taken.push(name);
                    continue;
                }
            }
            renewed.taken.push(name);
        }
        Ok(renewed)
    }

    fn to_table(&self) -> Result<toml::Table> {
        toml::Table::try_from(self).map_err(|error| {
            Failure::new(format!("the configuration cannot be written down: {error}"))
        })
    }

    /// The settings as a configuration file that leads to the same ones.
    pub fn to_toml(&self) -> Result<String> {
        toml::to_string(self).map_err(|error| {
            Failure::new(format!("the configuration cannot be written down: {error}"))
        })
    }
}

/// Names of settings that have changed.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Renewed {
    /// They hold from now on.
    pub taken: Vec<String>,
    /// They need a new daemon.
    pub not_taken: Vec<String>,
}

/// The names of what is not the same in both; those of the pool as `pool.max_vms`.
fn differences(one: &toml::Table, other: &toml::Table) -> Vec<String> {
    let names: std::collections::BTreeSet<_> = one.keys().chain(other.keys()).collect();
    let changed = names.into_iter().filter(|name| one.get(*name) != other.get(*name));
    let named = changed.flat_map(|name| match (one.get(name), other.get(name)) {
        (Some(toml::Value::Table(one)), Some(toml::Value::Table(other))) if name == "pool" => {
            differences(one, other).into_iter().map(|field| format!("{name}.{field}")).collect()
        }
        _ => vec![name.clone()],
    });
    named.collect()
}

/// Where backups go: a folder, or what begins as an address does.
fn place(path: &Path) -> Result<PathBuf> {
    let is_address = path.to_str().is_some_and(|text| text.contains("://"));
    if is_address { Ok(path.to_owned()) } else { absolute(path) }
}

fn absolute(path: &Path) -> Result<PathBuf> {
    std::path::absolute(path).map_err(|error| Failure::new(format!("{}: {error}", path.display())))
}

fn read(path: &Path, must_exist: bool) -> Result<FileConfig> {
    match std::fs::read_to_string(path) {
        Ok(text) => toml::from_str(&text)
            .map_err(|error| Failure::new(format!("{}: {error}", path.display()))),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound && !must_exist => {
            Ok(FileConfig::default())
        }
        Err(error) => Err(Failure::new(format!("cannot read {}: {error}", path.display()))),
    }
}

/// An absolute path from the environment, as the XDG Base Directory Specification has it.
fn from_env(name: &str) -> Option<PathBuf> {
    std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute())
}

fn default_file(is_root: bool) -> Option<PathBuf> {
    if is_root {
        return Some(PathBuf::from("/etc/denizen/config.toml"));
    }
    let folder = from_env("XDG_CONFIG_HOME").or_else(|| Some(from_env("HOME")?.join(".config")));
    Some(folder?.join("denizen/config.toml"))
}

fn default_state(is_root: bool) -> Result<PathBuf> {
    default_folder(is_root, "XDG_STATE_HOME", "/var/lib/denizen", ".local/state", "DENIZEN_STATE")
}

fn default_cache(is_root: bool) -> Result<PathBuf> {
    default_folder(is_root, "XDG_CACHE_HOME", "/var/cache/denizen", ".cache", "DENIZEN_CACHE")
}

/// A folder for denizen's files: where the environment says, root's, or below the home.
fn default_folder(
    is_root: bool,
    xdg: &str,
    of_root: &str,
    below_home: &str,
    ours: &str,
) -> Result<PathBuf> {
    if let Some(folder) = from_env(xdg) {
        return Ok(folder.join("denizen"));
    }
    if is_root {
        return Ok(PathBuf::from(of_root));
    }
    let home = from_env("HOME").ok_or_else(|| {
        Failure::new(format!("no place for denizen's files: set HOME, {xdg} or {ours}"))
    })?;
    Ok(home.join(below_home).join("denizen"))
}
