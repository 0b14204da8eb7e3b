//! The denizen program. `denizen serve` is the daemon; every other verb is a client of it and
//! starts one in the background if none answers.

mod backups;
mod client;
mod command;
mod config;
mod copy;
mod doctor;
mod handed;
mod image;
mod key;
mod log;
mod man;
mod mcp;
mod moving;
mod notify;
mod port;
mod progress;
mod range;
mod serve;
mod show;
mod sudo;
mod telemetry;
mod terminal;
mod top;

use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};
use denizen_client::api::Code;
use denizen_server::Handed;

use crate::config::{Options, Sources};
use crate::range::Range;

/// denizen's own failures, as env(1) and docker have them.
const FAILED: u8 = 125;

#[derive(Parser)]
#[command(
    name = "denizen",
    version,
    about = "A persistent, isolated computer for every agent session",
    after_help = "Examples:
  denizen exec demo -- sh -c 'echo hello >> notes; cat notes'
  denizen shell demo
  denizen ls

Exit codes: that of the command for exec and shell (128 and the signal's number if a signal
ended it); 124 if its --timeout was over, 125 if denizen itself failed, 126 if the command cannot
be executed, 127 if it was not found. 1 if doctor or `backups verify` has found something wrong."
)]
struct Cli {
    #[command(flatten)]
    options: Options,

    /// Print JSON rather than text
    #[arg(long, global = true)]
    json: bool,

    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Run a command in a session, which is made if need be
    Exec(command::Exec),
    /// Open an interactive terminal in a session
    Shell {
        /// Name or UUID
        session: String,
    },
    /// List sessions
    Ls,
    /// Show all that is known of a session
    Inspect {
        /// Name or UUID
        session: String,
    },
    /// Show what sessions use of the machine: on a terminal until q is pressed
    Top,
    /// Follow what happens, to one session or to all
    Events {
        /// Name or UUID
        session: Option<String>,
    },
    /// Print what a detached command has printed
    Logs {
        /// Name or UUID
        session: String,
        /// What `exec --detach` printed, or its tag
        job: String,
    },
    /// Put a session to sleep with all that runs in it, until it is next used
    Pause {
        /// Name or UUID
        session: String,
    },
    /// Stop a session: its processes end, its files stay
    Stop {
        /// Name or UUID
        session: String,
        /// End commands in the foreground and background processes too
        #[arg(long)]
        force: bool,
    },
    /// Make a session, of an image if one is named; if there is one already, start it
    Create {
        /// Name or UUID
        session: String,
        /// Its root: the name of an image (`denizen image ls`)
        #[arg(id = "root", value_name = "IMAGE")]
        image: Option<String>,
    },
    /// Start a session, which is made if need be
    Start {
        /// Name or UUID
        session: String,
    },
    /// Back a session up now
    Backup {
        /// Name or UUID
        session: String,
    },
    /// List what a session, or all of them, can be restored from; check it
    #[command(args_conflicts_with_subcommands = true)]
    Backups {
        /// Name or UUID; all if none is named
        session: Option<String>,
        #[command(subcommand)]
        verb: Option<backups::BackupsVerb>,
    },
    /// Make sessions known here of which there are only backups: on a new machine, with the
    /// destination and the key of the old one
    #[command(after_help = "Example:
  denizen --backup-destination s3://bucket/denizen --backup-key ./backup.key recover")]
    Recover,
    /// Put a session, or some of its files, back as a backup or a snapshot has it: as the latest
    /// backup, if none is named
    #[command(after_help = "What has changed since the last backup is saved first. A folder that \
is named is then as it was, without what has been added to it; all that is not named stays.

Examples:
  denizen restore demo --at '2 hours ago'
  denizen restore demo notes.txt src --backup 3f9a
  denizen restore demo /etc/hosts --snapshot before")]
    Restore {
        #[command(flatten)]
        source: backups::Source,
        /// Only these files and folders, as the session sees them
        #[arg(value_name = "PATH")]
        paths: Vec<String>,
    },
    /// Make a new session that begins with a copy of another's files, also while that runs, or
    /// from a backup of it, which leaves it alone
    #[command(after_help = "Examples:
  denizen fork demo
  denizen fork demo --at '2 hours ago'")]
    Fork(backups::Source),
    /// Keep a session's files as they are now under a name, on this disk; no backup
    Snapshot {
        /// Name or UUID
        session: String,
        /// The snapshot's name
        name: String,
    },
    /// List a session's snapshots
    Snapshots {
        /// Name or UUID
        session: String,
    },
    /// Write a session to a file, from which it can be imported, here or elsewhere
    ///
    /// The file is a compressed tar archive (tar.zst) of the session's files and of what it has
    /// changed in its root. A session that is active is stopped for it.
    #[command(after_help = "Examples:
  denizen export demo > demo.tar.zst
  denizen export demo | ssh elsewhere denizen import demo")]
    Export {
        /// Name or UUID
        session: String,
        /// Where to; - is standard output, as is none
        #[arg(short, long, value_name = "FILE")]
        output: Option<PathBuf>,
    },
    /// Make a new session of an archive: an exported one, a backup, or any tar.zst of a folder
    #[command(after_help = "Examples:
  denizen import demo demo.tar.zst
  tar --zstd -C ./project -c . | denizen import demo")]
    Import {
        /// Name or UUID of the new session
        session: String,
        /// The archive; - is standard input, as is none
        file: Option<PathBuf>,
    },
    /// List what differs between two states of sessions, each SESSION or SESSION:SNAPSHOT
    #[command(
        after_help = "Paths begin with `volume/`, or with `root/` for what was changed in a \
sandbox's root: a folder for each overlay, `main` for that over `/`.

Examples:
  denizen diff demo:before            since the snapshot
  denizen diff demo:before demo:after
  denizen diff demo other"
    )]
    Diff {
        /// The first
        from: String,
        /// The second [default: the same session, as it is now]
        to: Option<String>,
    },
    /// Remove sessions, their local files and snapshots; backups stay
    Rm {
        /// Names or UUIDs
        #[arg(required = true)]
        sessions: Vec<String>,
        /// End what runs in them first
        #[arg(long)]
        force: bool,
        /// Only their snapshots of this name
        #[arg(long, value_name = "NAME", conflicts_with = "force")]
        snapshot: Option<String>,
    },
    /// Copy a file or folder into or out of a session: one side is SESSION:PATH
    Cp {
        /// Where from
        from: String,
        /// Where to
        to: String,
    },
    /// Reach a port that something in a session listens on, by a port of this machine
    Port {
        /// Name or UUID
        session: String,
        /// The port within the session
        port: u16,
        /// Where to listen [default: 127.0.0.1 and any free port]
        #[arg(
            long,
            value_name = "ADDRESS:PORT",
            default_value = "127.0.0.1:0",
            hide_default_value = true
        )]
        on: std::net::SocketAddr,
    },
    /// Bring, list and remove images: root file systems for new sessions (`--image`)
    Image {
        #[command(subcommand)]
        verb: image::Verb,
    },
    /// Make, list and revoke keys: what lets clients in that do not use the daemon's socket
    Key {
        #[command(subcommand)]
        verb: key::Verb,
    },
    /// Serve a client of MCP on standard input and output
    Mcp {
        /// Name or UUID of the session for calls that name none [default: one for each client]
        #[arg(long, value_name = "SESSION")]
        session: Option<String>,
    },
    /// Run the daemon in the foreground
    Serve(serve::Serve),
    /// Serve the files of this sandbox on standard input, which is a socket; denizen's own
    #[command(hide = true)]
    Agent,
    /// Serve the first process of this virtual machine's session to the host; denizen's own
    #[command(hide = true)]
    Guest,
    /// Make a user namespace and hold it until standard input ends; denizen's own
    #[command(hide = true)]
    Namespace,
    /// Stop the daemon, and wait for its end
    Shutdown,
    /// Check what this machine offers
    Doctor,
    /// Print the configuration in force
    Config,
    /// Write manual pages into a folder
    #[command(hide = true)]
    Man {
        /// The folder
        folder: PathBuf,
    },
    /// Print a completion script for a shell
    Completions {
        /// Which shell
        #[arg(id = "for", value_name = "SHELL")]
        shell: clap_complete::Shell,
    },
}

impl Verb {
    /// The sessions that it is about, which have to be there.
    fn sessions(&self) -> Vec<&str> {
        match self {
            Self::Inspect { session }
            | Self::Logs { session, .. }
            | Self::Stop { session, .. }
            | Self::Backup { session }
            | Self::Backups { session: Some(session), .. }
            | Self::Export { session, .. }
            | Self::Snapshot { session, .. }
            | Self::Snapshots { session }
            | Self::Port { session, .. } => vec![session],
            Self::Restore { source, .. } | Self::Fork(source) => vec![source.session()],
            Self::Rm { sessions, .. } => sessions.iter().map(String::as_str).collect(),
            Self::Diff { from, to } => {
                let states = std::iter::once(from).chain(to);
                states
                    .map(|state| state.split_once(':').map_or(state.as_str(), |it| it.0))
                    .collect()
            }
            Self::Cp { from, to } => {
                let states = [from, to].into_iter().filter_map(|it| copy::remote(it));
                states.map(|(session, _)| session).collect()
            }
            _ => Vec::new(),
        }
    }
}

/// A failure with the exit code it leads to.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    code: u8,
    message: String,
    /// What the daemon calls it, if it was that which refused.
    refusal: Option<Code>,
}

impl Failure {
    fn new(message: impl Into<String>) -> Self {
        Self::with_code(FAILED, message)
    }

    fn with_code(code: u8, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), refusal: None }
    }
}

/// A result of the program.
pub type Result<T> = std::result::Result<T, Failure>;

fn main() -> ExitCode {
    // Its words are another program's, and so are its variables: a sandbox may have ours.
    if std::env::args_os().nth(1).is_some_and(|verb| verb == "sudo") {
        std::process::exit(sudo::run(std::env::args_os().skip(2).collect()));
    }
    let cli = Cli::try_parse().unwrap_or_else(|error| {
        // clap's own code for wrong usage is 2, which a command may exit with too.
        let code = if error.use_stderr() { i32::from(FAILED) } else { 0 };
        // Nothing can be done if the terminal is gone.
        let _ = error.print();
        std::process::exit(code);
    });
    match run(cli) {
        Ok(code) => {
            // Standard input may still be being read by a thread that cannot be ended.
            std::process::exit(code);
        }
        Err(failure) => {
            eprintln!("denizen: {}", show::harmless(&failure.to_string()));
            ExitCode::from(failure.code)
        }
    }
}

fn run(cli: Cli) -> Result<i32> {
    match cli.verb {
        Verb::Completions { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "denizen", &mut std::io::stdout());
            return Ok(0);
        }
        Verb::Config => {
            show::config(&Sources::new(cli.options).load()?, cli.json)?;
            return Ok(0);
        }
        Verb::Man { folder } => return man::write(&folder).map(|()| 0),
        Verb::Agent => return agent().map(|()| 0),
        Verb::Guest => return guest().map(|()| 0),
        Verb::Namespace => return range::helper().map(|()| 0),
        _ => {}
    }
    let sources = Sources::new(cli.options.clone());
    let settings = sources.load()?;
    let serving = matches!(cli.verb, Verb::Serve(_));
    // Before anything is started that would have it too.
    let handed = if serving { handed::take()? } else { Handed::default() };
    // All paths are known, and there is no other thread yet. The doctor tries what the daemon
    // does, as who the daemon is.
    let range = if serving || matches!(cli.verb, Verb::Doctor) {
        range::enter(&settings)
    } else {
        Range::NotNeeded
    };
    let runtime = if serving {
        tokio::runtime::Builder::new_multi_thread().enable_all().build()
    } else {
        tokio::runtime::Builder::new_current_thread().enable_all().build()
    };
    let runtime = runtime.map_err(|error| Failure::new(format!("cannot start: {error}")))?;
    let code = match cli.verb {
        Verb::Serve(serve) => {
            let served = serve::run(serve, sources, settings, range, handed);
            runtime.block_on(served).map(|()| 0)
        }
        _ => runtime.block_on(act(cli, settings, range)),
    };
    // A thread may hang in a read of the terminal for ever.
    runtime.shutdown_background();
    code
}

async fn act(cli: Cli, settings: config::Settings, range: Range) -> Result<i32> {
    let json = cli.json;
    if let Verb::Doctor = cli.verb {
        return doctor::run(&settings, &range, json).await;
    }
    if let Verb::Shutdown = cli.verb {
        return client::shutdown(&settings).await.map(|()| 0);
    }
    if let Verb::Key { verb } = cli.verb {
        return key::run(&settings, verb, json).await.map(|()| 0);
    }
    let client = client::connect(&settings).await?;
    if let Verb::Mcp { session } = cli.verb {
        return mcp::run(client, settings, session).await.map(|()| 0);
    }
    let wanted: Vec<String> = cli.verb.sessions().into_iter().map(str::to_owned).collect();
    let mut done = ask(&client, &settings, cli.verb, json).await;
    if let Err(failure) = &mut done
        && failure.refusal == Some(Code::UnknownSession)
    {
        let wanted: Vec<_> = wanted.iter().map(String::as_str).collect();
        let hint = client::suggestion(&client, &wanted).await;
        let hint = hint.unwrap_or_else(|| "`denizen ls` lists those that there are".to_owned());
        failure.message.push_str(&format!(": {hint}"));
    }
    done
}

/// Has the daemon do what a verb says.
async fn ask(
    client: &client::Client,
    settings: &config::Settings,
    verb: Verb,
    json: bool,
) -> Result<i32> {
    match verb {
        Verb::Exec(exec) => return command::exec(client, exec, json).await,
        Verb::Shell { session } => return command::shell(client, settings, session).await,
        Verb::Top => top::run(client, json).await?,
        Verb::Ls => show::sessions(&show::value(client.sessions().await?)?, json)?,
        Verb::Inspect { session } => {
            show::session(&show::value(client.session(&session).await?)?, json)?;
        }
        Verb::Events { session } => {
            let mut events = client.events(session.as_deref(), None).await?;
            loop {
                show::told(events.next().await?, json)?;
            }
        }
        Verb::Logs { session, job } => {
            let path = client::path(&session, &format!("/logs/{}", client::escape(&job)));
            client.download(&path, &mut tokio::io::stdout()).await?;
        }
        Verb::Pause { session } => {
            client.pause(&session).await?;
        }
        Verb::Stop { session, force } => {
            client.stop(&session, force).await?;
        }
        Verb::Create { session, image } => {
            let made = client.ensure(&session, image.as_deref()).await?;
            show::session(&show::value(made)?, json)?;
        }
        Verb::Start { session } => {
            let started = client.ensure(&session, None).await?;
            show::session(&show::value(started)?, json)?;
        }
        Verb::Backup { session } => backups::backup(client, &session, json).await?,
        Verb::Backups { session, verb } => {
            return backups::run(client, session.as_deref(), verb, json).await;
        }
        Verb::Recover => backups::recover(client, json).await?,
        Verb::Restore { source, paths } => {
            backups::restore(client, source, &paths, json).await?;
        }
        Verb::Fork(source) => backups::fork(client, source, json).await?,
        Verb::Export { session, output } => moving::export(client, &session, output).await?,
        Verb::Import { session, file } => moving::import(client, &session, file, json).await?,
        Verb::Snapshot { session, name } => {
            client.snapshot(&session, &name).await?;
        }
        Verb::Snapshots { session } => {
            show::snapshots(&show::value(client.snapshots(&session).await?)?, json)?;
        }
        Verb::Diff { from, to } => {
            let found = client::diff(client, &from, to.as_deref()).await?;
            show::differences(&show::value(found)?, json)?;
        }
        Verb::Rm { sessions, force, snapshot } => {
            for session in sessions {
                match &snapshot {
                    Some(name) => client.remove_snapshot(&session, name).await?,
                    None => client.remove(&session, force).await?,
                }
            }
        }
        Verb::Port { session, port, on } => {
            port::run(client, &session, port, on, json).await?;
        }
        Verb::Image { verb } => image::run(client, verb, json).await?,
        Verb::Cp { from, to } => copy::run(client, &from, &to).await?,
        Verb::Key { .. }
        | Verb::Mcp { .. }
        | Verb::Serve(_)
        | Verb::Agent
        | Verb::Guest
        | Verb::Namespace
        | Verb::Shutdown
        | Verb::Doctor
        | Verb::Config
        | Verb::Man { .. }
        | Verb::Completions { .. } => {}
    }
    Ok(0)
}

/// The agent within a sandbox: until the daemon closes the socket, or is gone.
fn agent() -> Result<()> {
    let failed = |error: std::io::Error| Failure::new(format!("agent: {error}"));
    let socket = std::io::stdin().as_fd().try_clone_to_owned().map_err(failed)?;
    let socket = std::os::unix::net::UnixStream::from(socket);
    socket.set_nonblocking(true).map_err(failed)?;
    let workdir = std::env::current_dir().map_err(failed)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.map_err(failed)?.block_on(async {
        // A file that is too large for the session is an error of its request, not our end.
        let too_large = tokio::signal::unix::SignalKind::from_raw(25);
        let _too_large = tokio::signal::unix::signal(too_large).map_err(failed)?;
        let socket = tokio::net::UnixStream::from_std(socket).map_err(failed)?;
        denizen_agent::envd::serve_files(socket, workdir).await.map_err(failed)
    })
}

/// Stands between the host and the first process of a virtual machine's session: that is on
/// standard input, which is a socket, the host on standard output, which is a port.
fn guest() -> Result<()> {
    let failed = |error: std::io::Error| Failure::new(format!("guest: {error}"));
    let init = std::io::stdin().as_fd().try_clone_to_owned().map_err(failed)?;
    let port = std::io::stdout().as_fd().try_clone_to_owned().map_err(failed)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let volume = std::path::Path::new("/volume");
    let served = denizen_link::guest::serve(port, init, volume);
    runtime.map_err(failed)?.block_on(served).map_err(failed)
}

/// The daemon's log, when it was started in the background.
fn log_file(settings: &config::Settings) -> PathBuf {
    settings.state.join("daemon.log")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// clap knows arguments by their ids: one of a verb that is called as a setting would be taken
    /// for that setting, and reach the daemon.
    #[test]
    fn no_argument_of_a_verb_is_taken_for_a_setting() {
        let program = Cli::command();
        let settings: Vec<_> = program.get_arguments().map(|arg| arg.get_id().clone()).collect();
        let mut verbs: Vec<_> = program.get_subcommands().collect();
        assert!(settings.len() > 40 && verbs.len() > 25);
        while let Some(verb) = verbs.pop() {
            for arg in verb.get_arguments() {
                let id = arg.get_id();
                assert!(!settings.contains(id), "{id} of {}", verb.get_name());
            }
            verbs.extend(verb.get_subcommands());
        }
        Cli::command().debug_assert();
    }
}
