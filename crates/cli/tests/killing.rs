//! kill -9 at random moments, again and again: of the daemon, of a session's first process, of
//! the one that waits for it outside, of what commands run, and of several at once. Whatever
//! was hit, the next command finds the session's files, and nothing else is left.
//!
//! `DENIZEN_KILLS=n` kills so often (500 otherwise); `DENIZEN_KILL_SEED=n` makes the same
//! choices again, which the machine's scheduler may answer differently.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::hash::{BuildHasher, RandomState};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Output, Stdio};
use std::time::{Duration, Instant};

use common::{User, text, until};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

/// What the soak's commands sleep for begins with this, so that they can be found.
const MARK: &str = "71847";
/// Sessions that live through all of it. Nothing writes to the last one, so that it can be
/// saved and put back at any time.
const SESSIONS: [&str; 3] = ["a", "b", "shelf"];
/// Prints what each session has kept in its volume and in its root. Backups do not have the
/// latter.
const SHOW: [&str; 3] = ["cat kept /root/kept", "cat kept /root/kept", "cat kept kept"];

/// Steele, Lea and Flood: SplitMix64.
struct Choice(u64);

impl Choice {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % limit
    }

    fn of<'t, T>(&mut self, all: &'t [T]) -> Option<&'t T> {
        let count = u64::try_from(all.len()).unwrap().max(1);
        all.get(usize::try_from(self.below(count)).unwrap())
    }
}

/// A process as /proc shows it.
struct Process {
    pid: i32,
    parent: i32,
    /// Its arguments, each ended by a space.
    line: String,
    /// How many process namespaces it is in.
    depth: usize,
}

fn processes() -> Vec<Process> {
    let all = fs::read_dir("/proc").unwrap().flatten();
    all.filter_map(|entry| {
        let pid: i32 = entry.file_name().to_str()?.parse().ok()?;
        let line = fs::read(entry.path().join("cmdline")).ok()?;
        let line = text(&line).replace('\0', " ");
        if line.is_empty() {
            return None;
        }
        let status = fs::read_to_string(entry.path().join("status")).ok()?;
        let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name));
        let parent = field("PPid:")?.trim().parse().ok()?;
        let depth = field("NSpid:")?.split_whitespace().count();
        Some(Process { pid, parent, line, depth })
    })
    .collect()
}

/// The last part of a path.
fn name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// A process that others cannot be taken for, as they could be for its number, which the next
/// may get.
struct Held {
    pid: i32,
    process: OwnedFd,
}

impl Held {
    /// None if it has ended and was reaped.
    fn new(pid: i32) -> Option<Self> {
        let process = pidfd_open(Pid::from_raw(pid)?, PidfdFlags::empty()).ok()?;
        Some(Self { pid, process })
    }

    /// Returns when none of its threads is left (`pidfd_open(2)`): until then its descriptors
    /// may be open.
    fn wait(&self) {
        let mut ready = [PollFd::new(&self.process, PollFlags::IN)];
        let limit = Timespec { tv_sec: 20, tv_nsec: 0 };
        if poll(&mut ready, Some(&limit)).unwrap() == 0 {
            let file = |name: &str| fs::read(format!("/proc/{}/{name}", self.pid));
            let shown = ["cmdline", "status", "cgroup", "wchan", "stack"].map(file);
            let shown = shown.map(|it| text(&it.unwrap_or_default()).replace('\0', " "));
            panic!("{} was killed and goes on:\n{}", self.pid, shown.join("\n"));
        }
    }
}

/// Kills a process and waits for its end.
fn end(pid: i32) {
    let held = Held::new(pid).unwrap();
    pidfd_send_signal(&held.process, Signal::KILL).unwrap();
    held.wait();
}

#[derive(Clone, Copy, Debug)]
enum Victim {
    Daemon,
    Outer,
    Inner,
    Both,
    All,
    Command,
    Agent,
}

const KINDS: [Victim; 8] = [
    Victim::Daemon,
    Victim::Daemon,
    Victim::Outer,
    Victim::Inner,
    Victim::Both,
    Victim::All,
    Victim::Command,
    Victim::Agent,
];

struct Soak {
    user: User,
    choice: Choice,
    kills: u64,
    /// How often each kind was killed.
    tally: BTreeMap<String, u64>,
    round: u64,
    /// What each session must have kept.
    kept: [String; 3],
    /// Every session that there ever was.
    ids: BTreeSet<String>,
    clients: Vec<Child>,
    /// What was killed in this round.
    victims: Vec<Held>,
    /// What happened in this round, for whoever has to find out why it failed.
    story: Vec<String>,
}

impl Soak {
    fn without_sessions(seed: u64) -> Self {
        Self {
            user: User::new(),
            choice: Choice(seed),
            kills: 0,
            tally: BTreeMap::new(),
            round: 0,
            kept: Default::default(),
            ids: BTreeSet::new(),
            clients: Vec::new(),
            victims: Vec::new(),
            story: Vec::new(),
        }
    }

    fn new(seed: u64) -> Self {
        let mut soak = Self::without_sessions(seed);
        for at in 0..SESSIONS.len() {
            soak.keep(at);
        }
        // So that it can be restored.
        let saved = soak.user.run(&["backup", "shelf"]);
        assert!(saved.status.success(), "{saved:?}");
        soak
    }

    fn pool(&self) -> PathBuf {
        self.user.state.path().join("pool")
    }

    /// Has a session keep something more.
    fn keep(&mut self, at: usize) {
        let line = format!("echo {0} >> kept; echo {0} >> /root/kept", self.round);
        let output = self.user.exec(SESSIONS[at], &line);
        assert!(output.status.success(), "{}", self.explain(&output));
        self.kept[at].push_str(&format!("{}\n", self.round));
    }

    fn explain(&self, output: &Output) -> String {
        let log = fs::read_to_string(self.user.state.path().join("daemon.log"));
        let log = log.unwrap_or_default();
        let lines: Vec<_> = log.lines().collect();
        let end = lines[lines.len().saturating_sub(30)..].join("\n");
        format!("{:?}\n{output:?}\nthe daemon's log ends:\n{end}", self.story)
    }

    fn client(&mut self, args: &[&str]) {
        self.story.push(args.join(" "));
        let mut command = self.user.denizen(args);
        command.stdout(Stdio::null()).stderr(Stdio::null());
        self.clients.push(command.spawn().unwrap());
    }

    /// Begins something that a kill can interrupt.
    fn act(&mut self) {
        let number = format!("{MARK}{}", self.round);
        let tree = format!("(setsid sleep {number}1 &); sleep {number}2 & sleep {number}3");
        let at = self.choice.below(2);
        let session = SESSIONS[usize::try_from(at).unwrap()];
        match self.choice.below(9) {
            0 | 1 => self.client(&["exec", session, "--", "sh", "-c", &tree]),
            2 | 3 => self.client(&["exec", "-d", session, "--", "sh", "-c", &tree]),
            4 => self.client(&["exec", "new", "--", "sh", "-c", &tree]),
            5 => self.client(&["backup", "shelf"]),
            6 => self.client(&["restore", "shelf"]),
            7 => self.client(&["fork", "shelf"]),
            _ => self.copy(),
        }
    }

    /// Reads a file, which takes an agent within.
    fn copy(&mut self) {
        let copy = self.user.state.path().join("copy");
        self.client(&["cp", "b:kept", copy.to_str().unwrap()]);
    }

    /// The folders of the sessions that there are, and of those to come.
    fn homes(&self) -> Vec<PathBuf> {
        let own = fs::read_dir(self.pool()).into_iter().flatten().flatten();
        let own = own.map(|entry| entry.path()).filter(|path| name(path).len() == 36);
        own.chain(self.spares()).collect()
    }

    fn spares(&self) -> Vec<PathBuf> {
        let spares = fs::read_dir(self.pool().join(".denizen/spares"));
        spares.into_iter().flatten().flatten().map(|entry| entry.path()).collect()
    }

    /// The names of sessions and of their control groups.
    fn note_ids(&mut self) {
        for home in self.homes() {
            let groups = fs::read_to_string(home.join("groups")).unwrap_or_default();
            self.ids.extend(groups.lines().map(|group| name(Path::new(group))));
            self.ids.insert(name(&home));
        }
    }

    /// The command lines of the inits that sessions have on record now.
    fn inits(homes: &[PathBuf]) -> BTreeSet<String> {
        let records = homes.iter().map(|home| fs::read_to_string(home.join("init")));
        let records = records.filter_map(Result::ok);
        let numbers = records.filter_map(|record| record.lines().next().map(str::to_owned));
        numbers.map(|number| format!("denizen-init {number} ")).collect()
    }

    /// All that were started for this user, whatever they believe.
    fn daemons(&self, all: &[Process]) -> Vec<i32> {
        let log = self.user.state.path().join("daemon.log");
        let ours = |process: &&Process| {
            process.line.contains(" serve ")
                && fs::read_link(format!("/proc/{}/fd/2", process.pid)).is_ok_and(|it| it == log)
        };
        all.iter().filter(ours).map(|process| process.pid).collect()
    }

    /// Kills one of a kind, or several at once; whether there was any.
    fn kill(&mut self, kind: Victim) -> bool {
        self.note_ids();
        let all = processes();
        let daemons = self.daemons(&all);
        let inits = Self::inits(&self.homes());
        let inits: Vec<&Process> =
            all.iter().filter(|process| inits.contains(&process.line)).collect();
        let pids = |inner: bool| -> Vec<i32> {
            let own = inits.iter().filter(|process| (process.depth > 1) == inner);
            own.map(|process| process.pid).collect()
        };
        let (outer, inner) = (pids(false), pids(true));
        let within = |word: &str| -> Vec<i32> {
            let word = word.to_owned();
            let found = all.iter().filter(|it| it.depth > 1 && it.line.contains(&word));
            found.map(|process| process.pid).collect()
        };
        let one = |choice: &mut Choice, of: &[i32]| choice.of(of).copied().into_iter();
        let choice = &mut self.choice;
        let victims: Vec<i32> = match kind {
            Victim::Daemon => daemons,
            Victim::Outer => one(choice, &outer).collect(),
            Victim::Inner => one(choice, &inner).collect(),
            Victim::Both => one(choice, &outer).chain(daemons).collect(),
            Victim::All => [&daemons[..], &outer, &inner].concat(),
            Victim::Command => one(choice, &within(&format!("sleep {MARK}"))).collect(),
            Victim::Agent => {
                let agents = all.iter().filter(|process| {
                    inner.contains(&process.parent) && process.line.ends_with(" agent ")
                });
                one(choice, &agents.map(|process| process.pid).collect::<Vec<_>>()).collect()
            }
        };
        if victims.is_empty() {
            return false;
        }
        // The first process within goes with the one outside, a little later. What a killed
        // command has started goes on.
        let killed = |it: &&&Process| outer.contains(&it.parent) && victims.contains(&it.parent);
        let along = inits.iter().filter(killed).filter_map(|process| Held::new(process.pid));
        self.victims.extend(along);
        self.story.push(format!("kill {kind:?} {victims:?}"));
        for held in victims.into_iter().filter_map(Held::new) {
            // It may have gone along with the one before.
            let _ = pidfd_send_signal(&held.process, Signal::KILL);
            self.victims.push(held);
        }
        self.kills += 1;
        *self.tally.entry(format!("{kind:?}")).or_default() += 1;
        true
    }

    fn round(&mut self) {
        self.round += 1;
        self.story.clear();
        for _ in 0..4 + self.choice.below(8) {
            let kind = *self.choice.of(&KINDS).unwrap();
            if self.choice.below(3) > 0 || self.clients.is_empty() {
                self.act();
            }
            if matches!(kind, Victim::Agent) {
                self.copy();
            }
            // The moment is what is tried here; nothing is waited for.
            let most = 1 << self.choice.below(17);
            let moment = self.choice.below(most);
            std::thread::sleep(Duration::from_micros(moment));
            // What is not there yet may come; if not, the daemon is.
            let begin = Instant::now();
            while !self.kill(kind) {
                if begin.elapsed() > Duration::from_millis(300) {
                    self.kill(Victim::Daemon);
                    break;
                }
            }
        }
        for mut client in std::mem::take(&mut self.clients) {
            client.kill().unwrap();
            client.wait().unwrap();
        }
        // What asks a dying daemon is told that it is gone, and rightly so.
        std::mem::take(&mut self.victims).iter().for_each(Held::wait);
        for (at, session) in SESSIONS.into_iter().enumerate() {
            let output = self.user.exec(session, SHOW[at]);
            let expected = self.kept[at].repeat(2);
            assert_eq!(text(&output.stdout), expected, "{session}: {}", self.explain(&output));
        }
        let at = self.choice.below(2);
        self.keep(usize::try_from(at).unwrap());
        self.clear();
        self.nothing_stays();
    }

    /// Stops what shall stay and removes the rest.
    fn clear(&mut self) {
        self.note_ids();
        let sessions = self.user.json(&["ls"]);
        for session in sessions.as_array().unwrap() {
            self.ids.insert(session["id"].as_str().unwrap().to_owned());
            let stays = SESSIONS.into_iter().find(|name| session["name"] == *name);
            let id = session["id"].as_str().unwrap();
            let output = match stays {
                Some(name) => self.user.run(&["stop", "--force", name]),
                None => self.user.run(&["rm", "--force", id]),
            };
            assert!(output.status.success(), "{}", self.explain(&output));
        }
    }

    /// All sessions are stopped: there is a daemon, what it keeps ready, and nothing else.
    fn nothing_stays(&self) {
        let begin = Instant::now();
        loop {
            let left = self.left();
            if left.is_empty() {
                return;
            }
            let in_time = begin.elapsed() < Duration::from_secs(20);
            assert!(in_time, "round {}: {:?}\n{left:#?}", self.round, self.story);
            std::thread::yield_now();
        }
    }

    fn left(&self) -> Vec<String> {
        let mut left = Vec::new();
        let state = self.user.state.path().to_str().unwrap();
        let inits = Self::inits(&self.homes());
        let spares = self.spares();
        let of_spares = Self::inits(&spares);
        let spares: BTreeSet<String> = spares.iter().map(|home| name(home)).collect();
        let ids: Vec<&String> = self.ids.iter().filter(|id| !spares.contains(*id)).collect();
        let all = processes();
        let known = self.user.daemon_pid();
        let strays = self.daemons(&all).into_iter().filter(|pid| Some(*pid) != known);
        left.extend(strays.map(|pid| format!("a daemon that nobody can ask: {pid}")));
        for process in all.into_iter().filter(|process| !of_spares.contains(&process.line)) {
            let file = |name: &str| {
                let path = format!("/proc/{}/{name}", process.pid);
                text(&fs::read(path).unwrap_or_default())
            };
            let ours = process.line.contains(&format!("sleep {MARK}"))
                || inits.contains(&process.line)
                || ids.iter().any(|id| file("cgroup").contains(id.as_str()));
            if ours && !process.line.contains("DENIZEN_KILL") {
                left.push(format!("process {} {}", process.pid, process.line));
            }
            // In whichever mount namespace there is one.
            if file("mountinfo").contains(state) {
                left.push(format!("mount seen by {} {}", process.pid, process.line));
            }
        }
        let hierarchies = Path::new("/sys/fs/cgroup");
        let mut folders = vec![hierarchies.to_owned()];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
                if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                    continue;
                }
                if ids.contains(&&name(&entry.path())) {
                    left.push(format!("control group {}", entry.path().display()));
                }
                folders.push(entry.path());
            }
        }
        let own = self.pool().join(".denizen");
        for folder in [own.join("staging"), own.join("trash")] {
            let entries = fs::read_dir(folder).unwrap().flatten();
            left.extend(entries.map(|entry| entry.path().display().to_string()));
        }
        let backups = fs::read_dir(self.user.state.path().join("backups/tmp"));
        for entry in backups.into_iter().flatten().flatten() {
            left.push(format!("half a backup {}", entry.path().display()));
        }
        for entry in fs::read_dir(state).unwrap().flatten() {
            let is_socket = entry.file_type().is_ok_and(|kind| kind.is_socket());
            if is_socket && std::os::unix::net::UnixStream::connect(entry.path()).is_err() {
                left.push(format!("socket {}", entry.path().display()));
            }
        }
        left
    }
}

/// A group of the test's own in the hierarchy of a controller, and none if that is not granted.
fn own_group(controller: &str) -> Option<PathBuf> {
    let groups = fs::read_to_string("/proc/self/cgroup").unwrap();
    let own = groups.lines().find_map(|line| {
        let (names, path) = line.split_once(':')?.1.split_once(':')?;
        names.split(',').any(|name| name == controller).then_some(path)
    })?;
    let folder = Path::new("/sys/fs/cgroup").join(controller).join(own.trim_start_matches('/'));
    let folder = folder.join(format!("denizen-killing-{}", std::process::id()));
    fs::create_dir(&folder).ok()?;
    Some(folder)
}

#[test]
fn a_daemon_in_another_group_clears_up_after_the_one_before() {
    // Version 1: there a process may enter a group that has others below.
    let Some(group) = own_group("pids") else { return };
    let mut soak = Soak::without_sessions(0);
    let procs = group.join("cgroup.procs");
    // A client in the group starts the daemon there.
    let mut client = soak.user.denizen(&["exec", "a", "--", "true"]);
    let program = client.get_program().to_owned();
    let line = "echo $$ > \"$0\" && exec \"$@\"";
    let mut shell = std::process::Command::new("sh");
    shell.args(["-c", line]).arg(&procs).arg(program).args(client.get_args());
    for (name, value) in client.get_envs() {
        match value {
            Some(value) => shell.env(name, value),
            None => shell.env_remove(name),
        };
    }
    client = shell;
    let output = client.output().unwrap();
    assert!(output.status.success(), "{output:?}");
    soak.note_ids();
    let id = soak.user.json(&["inspect", "a"])["id"].as_str().unwrap().to_owned();
    let groups = fs::read_to_string(soak.pool().join(&id).join("groups")).unwrap();
    let here = groups.lines().any(|line| Path::new(line).starts_with(&group));
    assert!(here, "the daemon is elsewhere: {groups}");
    let daemon = soak.user.daemon_pid().unwrap();
    end(daemon);
    // The next daemon, which is in the test's own group, has found it.
    assert_eq!(soak.user.json(&["inspect", "a"])["state"], "active");
    assert!(soak.user.run(&["stop", "a"]).status.success());
    soak.nothing_stays();
    fs::remove_dir(group.join("denizen")).unwrap();
    fs::remove_dir(&group).unwrap();
}

/// Kills the daemon while a session is frozen whose command sleeps; the next daemon, which
/// freezes nothing itself, clears up. The first one is started after `prepare`.
fn kill_while_frozen(prepare: &str) {
    let mut soak = Soak::without_sessions(0);
    let sleep = format!("sleep 61848{}", std::process::id());
    let client = soak.user.denizen(&["exec", "a", "--", "sh", "-c"]);
    let line = format!("{prepare} && exec \"$0\" \"$@\"");
    let mut shell = std::process::Command::new("unshare");
    shell.args(["--mount", "sh", "-c", &line]).arg(client.get_program()).args(client.get_args());
    shell.arg(format!("{sleep} > /dev/null 2>&1 &"));
    for (name, value) in client.get_envs() {
        match value {
            Some(value) => shell.env(name, value),
            None => shell.env_remove(name),
        };
    }
    shell.env("DENIZEN_SLEEP", "freeze").env("DENIZEN_BACKGROUND_IS_USE", "false");
    shell.env("DENIZEN_IDLE_SHUTDOWN_SECONDS", "1");
    let output = shell.output().unwrap();
    assert!(output.status.success(), "{output:?}");
    soak.note_ids();
    until("it is frozen", || soak.user.json(&["inspect", "a"])["state"] == "frozen");
    let daemon = soak.user.daemon_pid().unwrap();
    end(daemon);
    // Nobody can end it now: it does not see that its owner is gone.
    assert_eq!(common::running(&sleep).len(), 1);
    let found = soak.user.json(&["inspect", "a"]);
    assert_eq!((&found["state"], &found["unsaved"]), (&"stopped".into(), &true.into()));
    assert!(common::running(&sleep).is_empty());
    soak.nothing_stays();
    let log = fs::read_to_string(soak.user.state.path().join("daemon.log")).unwrap();
    assert!(!log.contains("faster than they can be killed"), "they were killed in vain: {log}");
}

/// Whether groups can be made below this place.
fn is_granted(place: &str) -> bool {
    let folder = Path::new(place).join(format!("denizen-killing-{}", std::process::id()));
    fs::create_dir(&folder).is_ok_and(|()| fs::remove_dir(&folder).is_ok())
}

#[test]
fn what_a_killed_daemon_has_frozen_is_ended() {
    let unified = "/sys/fs/cgroup/unified";
    let only = Path::new("/sys/fs/cgroup/cgroup.controllers").exists();
    let two = is_granted(unified) || (only && is_granted("/sys/fs/cgroup"));
    if two {
        kill_while_frozen(":");
    }
    if is_granted("/sys/fs/cgroup/freezer") {
        kill_while_frozen(&format!("{{ umount {unified} || ! test -e {unified}; }}"));
    }
}

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().map(|text| text.parse().unwrap())
}

#[test]
fn whatever_is_killed_nothing_is_lost_and_nothing_stays() {
    let wanted = number("DENIZEN_KILLS").unwrap_or(500);
    let seed = number("DENIZEN_KILL_SEED").unwrap_or_else(|| RandomState::new().hash_one(0) >> 1);
    println!("DENIZEN_KILL_SEED={seed}");
    let mut soak = Soak::new(seed);
    while soak.kills < wanted {
        soak.round();
    }
    println!("{} kills in {} rounds: {:?}", soak.kills, soak.round, soak.tally);
    if wanted >= 500 {
        assert_eq!(soak.tally.len(), 7, "not everything was tried: {:?}", soak.tally);
    }
    let ended = soak.user.run(&["shutdown"]);
    assert!(ended.status.success(), "{ended:?}");
    let socket = soak.user.state.path().join("denizen.sock");
    until("the socket is gone", || !socket.exists());
    soak.nothing_stays();
}
