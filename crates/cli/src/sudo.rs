//! `sudo` in a sandbox, as its shells run it: has the sandbox's first process start a command as
//! somebody else (`denizen_agent::Sudo`), who decides whether that may be. Options are sudo(8)'s,
//! as far as they mean something where no password is asked for and there are no rules but one.
//! It must never do anything by itself that its user may not.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::IsTerminal;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use denizen_agent::{Error, Exit, Scope, Spawn, Sudo};
use parking_lot::Mutex;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::getpgrp;
use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{
    OptionalActions, tcgetattr, tcgetpgrp, tcgetwinsize, tcsetattr, tcsetwinsize,
};
use tokio::signal::unix::{SignalKind, signal};

use crate::command::RawTerminal;

/// Where programs are, whatever the caller's `PATH` says.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Variables of the caller's that a command gets without being asked to: how people see and read
/// it, and the way to networks.
const KEPT: [&str; 11] = [
    "TERM",
    "COLORTERM",
    "LANG",
    "LANGUAGE",
    "LS_COLORS",
    "DISPLAY",
    "XAUTHORITY",
    "http_proxy",
    "https_proxy",
    "ftp_proxy",
    "no_proxy",
];
/// HUP, INT, QUIT, USR1, USR2, TERM, CONT: what is for the command. The first three come from a
/// terminal, for all of a process group.
const PASSED_ON: [i32; 7] = [1, 2, 3, 10, 12, 15, 18];
const OF_TERMINALS: i32 = 3;
/// How long it may take until a terminal that nobody has open is looked at again.
const REOPENED: Duration = Duration::from_millis(50);
/// What sudo says of its own failures.
const FAILED: i32 = 1;
const NOT_ALLOWED: &str = "only members of the group sudo may run commands as others here";

const USAGE: &str = "usage: sudo [-EHinsS] [-u user] [-D directory] [VAR=value] [command [arg ...]]
       sudo -l | -v | -k | -K | -V";

/// What was asked for.
#[derive(Debug, Default, PartialEq, Eq)]
struct Asked {
    user: Option<String>,
    /// All of the caller's variables, and those of these names.
    keep_all: bool,
    keep: Vec<OsString>,
    set_home: bool,
    set: Vec<(OsString, OsString)>,
    folder: Option<PathBuf>,
    shell: Option<Shell>,
    command: Vec<OsString>,
}

/// Which shell is to run the command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Shell {
    /// The one that the caller uses.
    Own,
    /// That of whom it is run as, as if they came in.
    Login,
}

/// What is to be done.
#[derive(Debug, PartialEq, Eq)]
enum Wanted {
    Run(Asked),
    /// Say this, if the caller may run something.
    May(&'static str),
    Say(&'static str),
    /// No password is remembered that could be forgotten.
    Nothing,
}

const ALL: &str = "(ALL) NOPASSWD: ALL";
const VERSION: &str = concat!("denizen ", env!("CARGO_PKG_VERSION"));

/// Runs a command as somebody else; gives its exit code, or sudo's.
pub fn run(args: Vec<OsString>) -> i32 {
    let told = parse(args).and_then(|wanted| match wanted {
        Wanted::Run(asked) => start(asked),
        Wanted::May(what) => {
            // Whether it is there or not, it is told only to who may.
            let asked = Asked { command: vec!["true".into()], ..Asked::default() };
            match Call::of(asked)?.start([null()?, null()?, null()?], false) {
                Err(Error::User { source, .. }) if is_refusal(&source) => {
                    Err(NOT_ALLOWED.to_owned())
                }
                Err(error @ Error::NotFound { .. }) => Err(error.to_string()),
                _ => Ok(say(what)),
            }
        }
        Wanted::Say(what) => Ok(say(what)),
        Wanted::Nothing => Ok(0),
    });
    told.unwrap_or_else(|problem| {
        eprintln!("sudo: {problem}");
        FAILED
    })
}

fn say(what: &str) -> i32 {
    if !what.is_empty() {
        println!("{what}");
    }
    0
}

fn null() -> Result<OwnedFd, String> {
    let null = File::options().read(true).write(true).open("/dev/null");
    null.map(OwnedFd::from).map_err(|error| format!("/dev/null: {error}"))
}

/// The letter of an option that is written out.
fn letter_of(name: &str) -> Option<char> {
    Some(match name {
        "user" => 'u',
        "chdir" => 'D',
        "prompt" => 'p',
        "preserve-env" => 'E',
        "login" => 'i',
        "shell" => 's',
        "set-home" => 'H',
        "non-interactive" => 'n',
        "stdin" => 'S',
        "reset-timestamp" => 'k',
        "remove-timestamp" => 'K',
        "validate" => 'v',
        "list" => 'l',
        "version" => 'V',
        "help" => 'h',
        _ => return None,
    })
}

fn parse(args: Vec<OsString>) -> Result<Wanted, String> {
    let mut asked = Asked::default();
    let mut args = args.into_iter().peekable();
    let wrong = |option: &str| Err(format!("invalid option {option}\n{USAGE}"));
    let mut without = None;
    while let Some(arg) = args.next_if(|arg| arg != "-" && arg.as_bytes().starts_with(b"-")) {
        let Some(text) = arg.to_str() else { return wrong(&arg.to_string_lossy()) };
        if text == "--" {
            break;
        }
        let mut value = |given: &str| match given {
            "" => args.next().ok_or_else(|| format!("option {text} requires an argument\n{USAGE}")),
            given => Ok(given.into()),
        };
        let options = if let Some(long) = text.strip_prefix("--") {
            let (name, given) = long.split_once('=').unwrap_or((long, ""));
            if name == "preserve-env" && !given.is_empty() {
                asked.keep.extend(given.split(',').map(OsString::from));
                continue;
            }
            let Some(letter) = letter_of(name) else { return wrong(text) };
            vec![(letter, given)]
        } else {
            let letters = text.char_indices().skip(1);
            letters.map(|(at, letter)| (letter, &text[at + letter.len_utf8()..])).collect()
        };
        for (letter, rest) in options {
            match letter {
                'u' => asked.user = Some(value(rest)?.to_string_lossy().into_owned()),
                'D' => asked.folder = Some(value(rest)?.into()),
                'p' => drop(value(rest)?),
                'E' => asked.keep_all = true,
                'i' => asked.shell = Some(Shell::Login),
                's' => asked.shell = Some(Shell::Own),
                'H' => asked.set_home = true,
                'n' | 'S' => {}
                'k' | 'K' => without = Some(Wanted::Nothing),
                'v' => without = Some(Wanted::May("")),
                'l' => return Ok(Wanted::May(ALL)),
                'V' => return Ok(Wanted::Say(VERSION)),
                'h' => return Ok(Wanted::Say(USAGE)),
                other => return wrong(&format!("-{other}")),
            }
            if matches!(letter, 'u' | 'D' | 'p') {
                break;
            }
        }
    }
    let variable = |arg: &OsString| {
        let at = arg.as_bytes().iter().position(|byte| *byte == b'=')?;
        let name =
            arg.as_bytes().get(..at).filter(|name| !name.is_empty() && !name.contains(&b'/'));
        Some((
            OsString::from_vec(name?.to_vec()),
            OsString::from_vec(arg.as_bytes()[at + 1..].to_vec()),
        ))
    };
    while let Some(set) = args.peek().and_then(variable) {
        args.next();
        asked.set.push(set);
    }
    asked.command = args.collect();
    if asked.command.is_empty() && asked.shell.is_none() {
        return without.ok_or_else(|| format!("no command\n{USAGE}"));
    }
    Ok(Wanted::Run(asked))
}

/// No more of it than is of use: a variable that is too long keeps a program from being executed.
fn cut(line: OsString) -> OsString {
    let mut bytes = line.into_vec();
    bytes.truncate(4096);
    OsString::from_vec(bytes)
}

/// One entry of a table of users: its name and shell.
fn entry(table: &str, is_it: impl Fn(&[&str]) -> bool) -> Option<(String, String)> {
    table.lines().find_map(|line| {
        let fields: Vec<&str> = line.split(':').collect();
        let [name, _, _, _, _, _, shell] = fields.as_slice() else { return None };
        is_it(&fields).then(|| ((*name).to_owned(), (*shell).to_owned()))
    })
}

/// What the sandbox's first process is asked for.
struct Call {
    caller: String,
    user: String,
    argv: Vec<OsString>,
    env: Vec<(OsString, OsString)>,
    cwd: PathBuf,
}

impl Call {
    fn of(asked: Asked) -> Result<Self, String> {
        let users = std::fs::read_to_string("/etc/passwd").unwrap_or_default();
        let uid = rustix::process::getuid().as_raw().to_string();
        let gid = rustix::process::getgid().as_raw().to_string();
        let own = entry(&users, |fields| fields[2] == uid);
        let mut user = asked.user.clone().unwrap_or_else(|| "root".to_owned());
        if let Some(number) = user.strip_prefix('#') {
            let named = entry(&users, |fields| fields[2] == number);
            user = named.ok_or_else(|| format!("unknown user {user}"))?.0;
        }
        let shell = |of: Option<(String, String)>| {
            let shell = of.map(|(_, shell)| shell).filter(|shell| !shell.is_empty());
            shell.unwrap_or_else(|| "/bin/sh".to_owned())
        };
        let argv = match asked.shell {
            None => asked.command.clone(),
            Some(Shell::Own) => {
                let chosen = std::env::var("SHELL").ok().filter(|it| !it.is_empty());
                through(chosen.unwrap_or_else(|| shell(own.clone())), false, &asked.command)
            }
            Some(Shell::Login) => {
                through(shell(entry(&users, |fields| fields[0] == user)), true, &asked.command)
            }
        };
        let here = std::env::current_dir().unwrap_or_else(|_| "/".into());
        let cwd = match &asked.folder {
            Some(folder) => here.join(folder),
            None if asked.shell == Some(Shell::Login) => "~".into(),
            None => here,
        };
        let caller = own.map_or_else(|| uid.clone(), |(name, _)| name);
        let mut env: Vec<(OsString, OsString)> =
            std::env::vars_os().filter(|(name, _)| is_kept(&asked, name)).collect();
        let told = [
            ("PATH", PATH.into()),
            ("SUDO_COMMAND", cut(argv.join(OsStr::new(" ")))),
            ("SUDO_USER", caller.clone().into()),
            ("SUDO_UID", uid.into()),
            ("SUDO_GID", gid.into()),
        ];
        let told = told.into_iter().map(|(name, value)| (name.into(), value));
        for (name, value) in told.chain(asked.set) {
            env.retain(|(known, _)| *known != name);
            env.push((name, value));
        }
        Ok(Self { caller, user, argv, env, cwd })
    }

    fn start(&self, fds: [OwnedFd; 3], controlling_terminal: bool) -> Result<Sudo, Error> {
        let [stdin, stdout, stderr] = fds;
        let (argv, env, cwd) = (self.argv.clone(), self.env.clone(), self.cwd.clone());
        let user = Some(self.user.clone());
        Sudo::start(Spawn { argv, env, user, cwd, stdin, stdout, stderr, controlling_terminal })
    }

    /// Begins elsewhere, where whom it is run as may not enter the folder that the caller is in.
    fn move_away(&mut self) {
        self.cwd = "/".into();
    }

    /// As sudo(8) tells of it.
    fn failed(&self, error: Error) -> String {
        match error {
            Error::ProgramNotFound { program } => {
                format!("{}: command not found", program.to_string_lossy())
            }
            Error::UnknownUser { user } => format!("unknown user {user}"),
            Error::User { source, .. } if is_refusal(&source) => {
                format!("{}: {NOT_ALLOWED}", self.caller)
            }
            error => error.to_string(),
        }
    }
}

/// Whether it is who asks that may not, and not that it cannot be.
fn is_refusal(error: &std::io::Error) -> bool {
    Errno::from_io_error(error) == Some(Errno::ACCESS)
}

fn copies(fds: &[impl AsFd; 3]) -> Result<[OwnedFd; 3], String> {
    let copy = |at: usize| {
        let copy = fds[at].as_fd().try_clone_to_owned();
        copy.map_err(|error| format!("cannot hand on a descriptor: {error}"))
    };
    Ok([copy(0)?, copy(1)?, copy(2)?])
}

/// Runs it to its end; gives its exit code.
fn start(asked: Asked) -> Result<i32, String> {
    let may_move = asked.folder.is_none() && asked.shell != Some(Shell::Login);
    let mut call = Call::of(asked)?;
    let (stdin, stdout, stderr) = (std::io::stdin(), std::io::stdout(), std::io::stderr());
    let mut fds = copies(&[stdin.as_fd(), stdout.as_fd(), stderr.as_fd()])?;
    let terminal = Terminal::instead_of(&mut fds);
    let terminal = terminal.map_err(|error| format!("unable to allocate pty: {error}"))?;
    let terminal = terminal.map(Arc::new);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| format!("cannot start: {error}"))?;
    let ended = runtime.block_on(async {
        // Before anything runs that they could be for.
        let signals = PASSED_ON.into_iter().filter(|number| !is_ignored(*number));
        let signals: Vec<_> =
            signals.map(|number| (number, signal(SignalKind::from_raw(number)))).collect();
        let mut started = call.start(copies(&fds)?, terminal.is_some());
        if may_move && matches!(started, Err(Error::WorkingDirectory { .. })) {
            call.move_away();
            started = call.start(copies(&fds)?, terminal.is_some());
        }
        drop(fds);
        let sudo = Arc::new(started.map_err(|error| call.failed(error))?);
        for (number, signals) in signals {
            let Ok(mut signals) = signals else { continue };
            let sudo = sudo.clone();
            let scope = if number <= OF_TERMINALS { Scope::Group } else { Scope::Leader };
            tokio::spawn(async move {
                while signals.recv().await.is_some() {
                    sudo.signal(number.unsigned_abs(), scope);
                }
            });
        }
        let raw = terminal.as_ref().map(relay).transpose();
        let _raw = raw.map_err(|error| format!("cannot set the terminal up: {error}"))?;
        let (tell, ended) = tokio::sync::oneshot::channel();
        let wait = move || drop(tell.send(sudo.wait()));
        let waits = std::thread::Builder::new().spawn(wait);
        waits.map_err(|error| format!("cannot wait for it: {error}"))?;
        let ended = ended.await;
        if let Some(terminal) = &terminal {
            // What others go on writing is not waited for: a terminal holds less than that.
            for _ in 0..16 {
                if !terminal.print(false) {
                    break;
                }
            }
        }
        ended.map_err(|_| Error::InitLost).flatten().map_err(|error| error.to_string())
    });
    // What waits for input waits for ever.
    runtime.shutdown_background();
    ended.map(Exit::code)
}

/// Whether whoever started this wants a signal to be nothing, as nohup(1) does.
fn is_ignored(number: i32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    mask.is_some_and(|mask| mask >> (number - 1) & 1 == 1)
}

/// A command as a shell runs it; the shell alone if there is none.
fn through(shell: String, login: bool, command: &[OsString]) -> Vec<OsString> {
    let mut words: Vec<OsString> = vec![shell.into()];
    if login {
        words.push("-l".into());
    }
    if !command.is_empty() {
        let mut line = Vec::new();
        for word in command {
            if !line.is_empty() {
                line.push(b' ');
            }
            if word.is_empty() {
                line.extend(b"''");
            }
            for byte in word.as_bytes() {
                match byte {
                    // A shell takes one that is escaped for none.
                    b'\n' => line.extend(b"'\n'"),
                    // Variables are the shell's to fill in, as sudo(8) has it.
                    b'_' | b'-' | b'$' | 0x80.. => line.push(*byte),
                    _ if byte.is_ascii_alphanumeric() => line.push(*byte),
                    _ => line.extend([b'\\', *byte]),
                }
            }
        }
        words.extend(["-c".into(), OsString::from_vec(line)]);
    }
    words
}

fn is_kept(asked: &Asked, name: &OsStr) -> bool {
    let is_one_of = |names: &[&str]| names.iter().any(|it| name == *it);
    if is_one_of(&["PATH", "USER", "LOGNAME"])
        || name.as_bytes().starts_with(b"SUDO_")
        || (asked.set_home && name == "HOME")
        || (asked.shell == Some(Shell::Login) && is_one_of(&["HOME", "SHELL"]))
    {
        return false;
    }
    let text = name.to_string_lossy();
    asked.keep_all
        || asked.keep.iter().any(|kept| kept == name)
        || text.starts_with("LC_")
        || KEPT.iter().any(|kept| *kept == text || kept.to_uppercase() == *text)
}

/// A terminal of the command's own, where its user sits at one: what it changes of it is gone with
/// it, and it has the one that controls it.
struct Terminal {
    master: OwnedFd,
    /// Held while something is on its way from there to the user's.
    printing: Mutex<()>,
}

impl Terminal {
    /// Puts one in the place of the user's, where both what is typed and what is shown there are
    /// for the command: others in a pipeline would miss theirs.
    fn instead_of(fds: &mut [OwnedFd; 3]) -> std::io::Result<Option<Self>> {
        let [stdin, stdout, _] = &*fds;
        if !stdin.is_terminal() {
            return Ok(None);
        }
        if tcgetpgrp(stdin).is_ok_and(|group| group != getpgrp()) {
            // What is typed is for somebody else.
            fds[0] = File::open("/dev/null")?.into();
            return Ok(None);
        }
        if !stdout.is_terminal() {
            return Ok(None);
        }
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let master = openpt(flags)?;
        grantpt(&master)?;
        unlockpt(&master)?;
        let slave = ioctl_tiocgptpeer(&master, flags)?;
        tcsetattr(&slave, OptionalActions::Now, &tcgetattr(stdin)?)?;
        for fd in fds {
            if fd.is_terminal() {
                *fd = slave.try_clone()?;
            }
        }
        let terminal = Self { master, printing: Mutex::default() };
        terminal.fit();
        Ok(Some(terminal))
    }

    /// Makes it as large as the user's.
    fn fit(&self) {
        // Of a size that is not known nothing is lost.
        let _ = tcgetwinsize(std::io::stdin()).map(|size| tcsetwinsize(&self.master, size));
    }

    /// Shows what was written; with `wait` as soon as there is something. False if there is nothing.
    fn print(&self, wait: bool) -> bool {
        let ready = |until: Option<&Timespec>| {
            let mut ready = [PollFd::new(&self.master, PollFlags::IN)];
            poll(&mut ready, until).is_ok_and(|count| count > 0)
        };
        if wait && !ready(None) {
            return true;
        }
        let _printing = self.printing.lock();
        if !ready(Some(&Timespec::default())) {
            return false;
        }
        let mut buffer = [0; 16 * 1024];
        // While nobody has the other end open there is an error (EIO).
        match rustix::io::read(&self.master, &mut buffer) {
            Ok(count @ 1..) => write_all(std::io::stdout(), &buffer[..count]),
            _ => false,
        }
    }
}

/// Has what is typed go there, and what is written come here, until this process ends. The user's
/// terminal is itself again when what this gives is dropped.
fn relay(terminal: &Arc<Terminal>) -> std::io::Result<Option<RawTerminal>> {
    let raw = RawTerminal::enter().map_err(|error| std::io::Error::other(error.to_string()))?;
    let to = terminal.clone();
    std::thread::Builder::new().spawn(move || {
        let mut buffer = [0; 4096];
        loop {
            match rustix::io::read(std::io::stdin(), &mut buffer) {
                Ok(count @ 1..) if write_all(&to.master, &buffer[..count]) => {}
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => wait_for(std::io::stdin(), PollFlags::IN),
                _ => return,
            }
        }
    })?;
    let from = terminal.clone();
    std::thread::Builder::new().spawn(move || {
        loop {
            if !from.print(true) {
                // It may be opened again, by its name.
                std::thread::sleep(REOPENED);
            }
        }
    })?;
    let sized = terminal.clone();
    let mut resized = signal(SignalKind::window_change())?;
    terminal.fit();
    tokio::spawn(async move {
        while resized.recv().await.is_some() {
            sized.fit();
        }
    });
    Ok(raw)
}

fn wait_for(fd: impl AsFd, what: PollFlags) {
    // An error shows in what is done next.
    let _ = poll(&mut [PollFd::new(&fd, what)], None);
}

fn write_all(to: impl AsFd, mut bytes: &[u8]) -> bool {
    while !bytes.is_empty() {
        match rustix::io::write(&to, bytes) {
            Ok(count) => bytes = bytes.get(count..).unwrap_or_default(),
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => wait_for(&to, PollFlags::OUT),
            Err(_) => return false,
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> Result<Wanted, String> {
        parse(line.split_whitespace().map(OsString::from).collect())
    }

    fn asked(line: &str) -> Asked {
        match parsed(line) {
            Ok(Wanted::Run(asked)) => asked,
            other => panic!("{line}: {other:?}"),
        }
    }

    #[test]
    fn options_are_read_as_sudos() {
        let command = |words: &[&str]| words.iter().map(OsString::from).collect::<Vec<_>>();
        let plain = asked("apt-get install -y jq");
        assert_eq!(plain.command, command(&["apt-get", "install", "-y", "jq"]));
        for line in
            ["-nEu app A=1 env -u B", "-n -E --user=app A=1 env -u B", "-E -uapp -- A=1 env -u B"]
        {
            let it = asked(line);
            assert_eq!(it.command, command(&["env", "-u", "B"]), "{line}");
            assert!(it.keep_all, "{line}");
            assert_eq!(it.user.as_deref(), Some("app"), "{line}");
            assert_eq!(it.set, [("A".into(), "1".into())], "{line}");
        }
        assert_eq!(asked("--preserve-env=A,B true").keep, command(&["A", "B"]));
        assert_eq!(asked("-i").shell, Some(Shell::Login));
        assert_eq!(asked("-s").shell, Some(Shell::Own));
        assert_eq!(asked("su").command, command(&["su"]));
        assert_eq!(asked("-D /srv pwd").folder, Some("/srv".into()));
        assert_eq!(asked("-p prompt: -S true").command, command(&["true"]));
        assert_eq!(asked("./a=b/c").command, command(&["./a=b/c"]));
        assert_eq!(parsed("-k"), Ok(Wanted::Nothing));
        assert_eq!(parsed("-v"), Ok(Wanted::May("")));
        assert_eq!(parsed("-nl"), Ok(Wanted::May(ALL)));
        for wrong in ["", "-x true", "--nothing true", "-u", "--user", "-n", "A=1"] {
            assert!(parsed(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn shells_get_words_as_they_were() {
        let command = ["printf", r"%s\n", "a b", "", "$HOME", "ž;\n"].map(OsString::from);
        let words = through("/bin/sh".to_owned(), false, &command);
        assert_eq!(words[2], "printf \\%s\\\\n a\\ b '' $HOME ž\\;'\n'");
        assert_eq!(through("/bin/sh".to_owned(), true, &[]), ["/bin/sh", "-l"]);
    }

    #[test]
    fn variables_are_left_behind() {
        let all = Asked { keep_all: true, ..Asked::default() };
        let none = Asked::default();
        let home = Asked { keep_all: true, set_home: true, ..Asked::default() };
        let login = Asked { keep_all: true, shell: Some(Shell::Login), ..Asked::default() };
        assert!(!is_kept(&home, "HOME".as_ref()) && is_kept(&home, "SHELL".as_ref()));
        assert!(!is_kept(&login, "HOME".as_ref()) && !is_kept(&login, "SHELL".as_ref()));
        for (name, plain, kept) in [
            ("TERM", true, true),
            ("LC_ALL", true, true),
            ("HTTPS_PROXY", true, true),
            ("LD_PRELOAD", false, true),
            ("HOME", false, true),
            ("USER", false, false),
            ("PATH", false, false),
            ("SUDO_USER", false, false),
        ] {
            assert_eq!(is_kept(&none, name.as_ref()), plain, "{name}");
            assert_eq!(is_kept(&all, name.as_ref()), kept, "{name}");
        }
    }
}
