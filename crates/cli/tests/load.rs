//! A daemon with a thousand sessions and hundreds of clients, who do everything at once, and of whom
//! some read nothing and some say nothing: everything is answered, nothing that they do not use is
//! held, and memory does not grow with time.
//!
//! `DENIZEN_LOAD_SECONDS` says for how long, `DENIZEN_LOAD_ISOLATION` where sessions run (`host`),
//! and `DENIZEN_LOAD_REPORT` which file gets the figures; `cargo xtask load` sets them.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeMap;
use std::fmt::{Display, Write as _};
use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use common::User;
use denizen_client::api::NewSession;
use denizen_client::{Client, NewProcess, Run, RunEvent, Target, Told, empty, path};
use http_body_util::{BodyExt, Full};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

const SESSIONS: usize = 1000;
/// How many do one thing after the other, each with sessions of its own.
const WORKERS: usize = 24;
/// How many listen all the time: half to what happens, half to what a command prints.
const LISTENERS: usize = 200;
/// How many ask for a stream and read nothing of it.
const SLOW: usize = 200;
/// The sessions whose output these ask for, and as many to which some have begun to say something.
const SLOW_SESSIONS: usize = 10;
/// How many begin a request and never end it.
const HALF_OPEN: usize = 100;
/// How many sessions with a command that prints all the time.
const TALKERS: usize = LISTENERS / 2;

type Result<T> = std::result::Result<T, String>;

fn text(error: impl Display) -> String {
    error.to_string()
}

/// What all of them share.
struct Load {
    client: Client,
    socket: PathBuf,
    times: parking_lot::Mutex<BTreeMap<&'static str, Vec<Duration>>>,
    failures: parking_lot::Mutex<Vec<String>>,
    over: AtomicBool,
}

impl Load {
    /// Does something, and notes how long it took or why it did not work.
    async fn timed<T>(
        &self,
        verb: &'static str,
        work: impl Future<Output = Result<T>>,
    ) -> Option<T> {
        let begin = Instant::now();
        match work.await {
            Ok(done) => {
                self.times.lock().entry(verb).or_default().push(begin.elapsed());
                Some(done)
            }
            Err(error) => {
                self.failures.lock().push(format!("{verb}: {error}"));
                None
            }
        }
    }

    fn goes_on(&self) -> bool {
        !self.over.load(Ordering::Relaxed)
    }
}

fn shell(line: &str) -> NewProcess {
    NewProcess::command(["sh", "-c", line])
}

/// All that a command prints, and its code.
async fn all(mut run: Run) -> Result<(Vec<u8>, i32)> {
    let mut printed = Vec::new();
    loop {
        match run.next().await.map_err(text)?.ok_or("it has no end")? {
            RunEvent::Output(piece) => printed.extend_from_slice(&piece.bytes),
            RunEvent::Exit(ended) => return Ok((printed, ended.code)),
            RunEvent::Gap { from, to } => return Err(format!("a gap from {from} to {to}")),
            _ => {}
        }
    }
}

/// A sequence that looks random and is the same each time.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % sides
    }
}

/// One who does one thing after the other in sessions that nobody else uses.
async fn work(load: Arc<Load>, number: usize, sessions: Vec<String>) {
    let mut dice = Dice(0x9E37_79B9_7F4A_7C15 ^ (number as u64 + 1));
    for round in 0_u64.. {
        if !load.goes_on() {
            return;
        }
        let session = &sessions[usize::try_from(dice.roll(sessions.len() as u64)).unwrap()];
        match dice.roll(100) {
            0..35 => drop(load.timed("exec", exec(&load, session, round)).await),
            35..50 => detach(&load, session, &format!("job-{number}-{round}")).await,
            50..65 => files(&load, session, dice.roll(1 << 17)).await,
            65..70 => drop(load.timed("list", list(&load)).await),
            70..85 => {
                let inspected = async { load.client.session(session).await.map_err(text) };
                drop(load.timed("inspect", inspected).await);
            }
            85..90 => drop(load.timed("events", event(&load, session)).await),
            90..95 => restart(&load, session).await,
            95..98 => {
                let backup = async { load.client.backup(session).await.map_err(text) };
                drop(load.timed("backup", backup).await);
            }
            _ => fork(&load, session).await,
        }
    }
}

async fn exec(load: &Load, session: &str, round: u64) -> Result<()> {
    let line = format!("echo {round} > round; cat round; exit 3");
    let run = load.client.run(session, &shell(&line)).await.map_err(text)?;
    let told = all(run).await?;
    let right = told == (format!("{round}\n").into_bytes(), 3);
    right.then_some(()).ok_or_else(|| format!("round {round}: {told:?}"))
}

/// Starts a command in the background, reads what it prints, and again from the middle on.
async fn detach(load: &Load, session: &str, tag: &str) {
    let line = "for i in 1 2 3; do echo line $i; done";
    let new = NewProcess { tag: Some(tag.to_owned()), ..shell(line) };
    let start = async { load.client.start(session, &new).await.map_err(text) };
    if load.timed("detach", start).await.is_none() {
        return;
    }
    for from in [0, 7] {
        let read = async {
            let output = load.client.output(session, tag, from).await.map_err(text)?;
            let (printed, code) = all(output).await?;
            let wanted = &b"line 1\nline 2\nline 3\n"[usize::try_from(from).unwrap()..];
            let right = (printed.as_slice(), code) == (wanted, 0);
            right.then_some(()).ok_or_else(|| format!("{tag} from {from}: {printed:?}, {code}"))
        };
        load.timed(if from == 0 { "read output" } else { "reattach" }, read).await;
    }
}

async fn files(load: &Load, session: &str, size: u64) {
    let header = Some(("denizen-session", session));
    let content = vec![b'a' + u8::try_from(size % 26).unwrap(); usize::try_from(size).unwrap()];
    let upload = async {
        let body = Full::new(content.clone().into()).map_err(|never| match never {}).boxed();
        let sent = load.client.request("POST", "/files?path=file&mode=420", header, body).await;
        sent.map(drop).map_err(text)
    };
    if load.timed("upload", upload).await.is_none() {
        return;
    }
    let download = async {
        let answer = load.client.request("GET", "/files?path=file", header, empty()).await;
        let body = answer.map_err(text)?.into_body().collect().await.map_err(text)?.to_bytes();
        (body == content).then_some(()).ok_or_else(|| format!("{} of {size} bytes", body.len()))
    };
    load.timed("download", download).await;
}

async fn list(load: &Load) -> Result<()> {
    let all = load.client.sessions().await.map_err(text)?;
    (all.len() >= SESSIONS).then_some(()).ok_or_else(|| format!("{} sessions", all.len()))
}

/// Listens until something happens to a session.
async fn event(load: &Load, session: &str) -> Result<()> {
    let mut events = load.client.events(Some(session), None).await.map_err(text)?;
    load.client.stop(session, true).await.map_err(text)?;
    load.client.ensure(session, None).await.map_err(text)?;
    loop {
        match events.next().await.map_err(text)? {
            Told::Event(event) if event.event == "started" => return Ok(()),
            Told::Event(_) => {}
            Told::Lost => return Err("some are lost".to_owned()),
        }
    }
}

async fn restart(load: &Load, session: &str) {
    let stop = async { load.client.stop(session, true).await.map_err(text) };
    load.timed("stop", stop).await;
    let start = async { load.client.ensure(session, None).await.map_err(text) };
    load.timed("start", start).await;
}

async fn fork(load: &Load, session: &str) {
    let fork = async {
        let made = load.client.json("POST", &path(session, "/fork")).await.map_err(text)?;
        Ok(made["id"].as_str().ok_or("a fork without an id")?.to_owned())
    };
    if let Some(made) = load.timed("fork", fork).await {
        let remove = async { load.client.remove(&made, true).await.map_err(text) };
        load.timed("remove", remove).await;
    }
}

/// Reads what a command prints once a second, in which nothing may be missing.
async fn listen(load: Arc<Load>, session: String, heard: Arc<AtomicU64>) {
    let listened = async {
        let mut run = load.client.output(&session, "talk", 0).await.map_err(text)?;
        let (mut printed, mut wanted) = (Vec::new(), 0_u64);
        loop {
            match run.next().await.map_err(text)?.ok_or("it has no end")? {
                RunEvent::Output(piece) => printed.extend_from_slice(&piece.bytes),
                other => return Err(format!("{other:?}")),
            }
            while let Some(end) = printed.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = printed.drain(..=end).collect();
                if line != format!("{wanted}\n").into_bytes() {
                    return Err(format!("{} instead of {wanted}", common::text(&line)));
                }
                wanted += 1;
                heard.fetch_add(1, Ordering::Relaxed);
            }
        }
    };
    let result: Result<()> = listened.await;
    load.failures.lock().push(format!("listening to {session}: {result:?}"));
}

/// Hears of what happens to all; some may be lost to one who is slow.
async fn hear(load: Arc<Load>, heard: Arc<AtomicU64>) {
    let listened = async {
        let mut events = load.client.events(None, None).await.map_err(text)?;
        loop {
            events.next().await.map_err(text)?;
            heard.fetch_add(1, Ordering::Relaxed);
        }
    };
    let result: Result<()> = listened.await;
    load.failures.lock().push(format!("listening to events: {result:?}"));
}

/// Asks for something, and does nothing more.
fn ask(socket: &Path, request: &str) -> UnixStream {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.write_all(request.as_bytes()).unwrap();
    stream
}

/// Makes all sessions.
async fn make(load: &Arc<Load>) {
    let places = Arc::new(Semaphore::new(16));
    let mut making = JoinSet::new();
    for number in 0..SESSIONS {
        let (load, places) = (load.clone(), places.clone());
        making.spawn(async move {
            let _place = places.acquire_owned().await.unwrap();
            let new = NewSession { name: Some(name(number)), image: None };
            let create = async { load.client.create(&new, None).await.map_err(text) };
            load.timed("create", create).await;
        });
    }
    making.join_all().await;
}

fn name(number: usize) -> String {
    format!("load-{number:04}")
}

/// The daemon's memory in KiB, and how many descriptors it has open.
fn daemon(pid: u32) -> (u64, usize) {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let memory = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    let memory = memory.trim().trim_end_matches(" kB").parse().unwrap();
    (memory, fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count())
}

/// Serves in the foreground, its log in a file.
fn serve(user: &User, isolation: &str) -> (Child, PathBuf) {
    let log = user.state.path().join("log");
    let mut serve = user.denizen(&["--isolation", isolation, "--spares", "0", "serve"]);
    serve.args(["--max-vms", "2000", "--idle-shutdown-seconds", "10"]);
    let child = serve.stderr(File::create(&log).unwrap()).spawn().unwrap();
    common::until("it serves", || {
        UnixStream::connect(user.state.path().join("denizen.sock")).is_ok()
    });
    (child, log)
}

fn setting(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_sessions_and_hundreds_of_clients() {
    let seconds = setting("DENIZEN_LOAD_SECONDS").map_or(60, |it| it.parse().unwrap());
    let isolation = setting("DENIZEN_LOAD_ISOLATION").unwrap_or_else(|| "host".to_owned());
    let user = User::new();
    let (mut child, log) = serve(&user, &isolation);
    let socket = user.state.path().join("denizen.sock");
    let load = Arc::new(Load {
        client: Client::new(Target::socket(&socket)),
        socket,
        times: parking_lot::Mutex::default(),
        failures: parking_lot::Mutex::default(),
        over: AtomicBool::new(false),
    });
    make(&load).await;
    assert_eq!(load.failures.lock().first(), None);
    assert_eq!(load.client.sessions().await.unwrap().len(), SESSIONS);

    // Who talks and who listens.
    let (lines, events) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let mut listeners = JoinSet::new();
    let talk = "i=0; while :; do echo $i; i=$((i+1)); sleep 1; done";
    for number in 0..TALKERS {
        let new = NewProcess { tag: Some("talk".to_owned()), ..shell(talk) };
        load.client.start(&name(number), &new).await.unwrap();
        listeners.spawn(listen(load.clone(), name(number), lines.clone()));
        listeners.spawn(hear(load.clone(), events.clone()));
    }
    // Who asks and reads nothing, and who never ends a request.
    let slow: Vec<String> = (TALKERS..TALKERS + SLOW_SESSIONS).map(name).collect();
    for session in &slow {
        let line = "while :; do head -c 100000 /dev/zero | tr '\\0' x; sleep 1; done";
        let new = NewProcess { tag: Some("much".to_owned()), ..shell(line) };
        load.client.start(session, &new).await.unwrap();
    }
    let quiet: Vec<String> =
        (0..SLOW_SESSIONS).map(|n| name(TALKERS + SLOW_SESSIONS + n)).collect();
    let mut silent: Vec<UnixStream> = Vec::new();
    for number in 0..SLOW {
        let path = match number % 2 {
            0 => "/v1/events".to_owned(),
            _ => path(&slow[number / 2 % slow.len()], "/processes/much/output"),
        };
        let request =
            format!("GET {path} HTTP/1.1\r\nhost: it\r\naccept: text/event-stream\r\n\r\n");
        silent.push(ask(&load.socket, &request));
    }
    for number in 0..HALF_OPEN {
        let session = &slow[number / 2 % slow.len()];
        silent.push(ask(
            &load.socket,
            &match number % 2 {
                0 => format!("POST /v1/sessions/{session}/proc"),
                _ => format!(
                    "POST /v1/sessions/{session}/processes HTTP/1.1\r\nhost: it\r\ncontent-type: \
                 application/json\r\ncontent-length: 1000\r\n\r\n{{\"shell\": "
                ),
            },
        ));
    }

    // Who works.
    let rest: Vec<String> = (TALKERS + 2 * SLOW_SESSIONS..SESSIONS).map(name).collect();
    let mut workers = JoinSet::new();
    for (number, sessions) in rest.chunks(rest.len().div_ceil(WORKERS)).enumerate() {
        workers.spawn(work(load.clone(), number, sessions.to_vec()));
    }
    let begin = Instant::now();
    let mut samples = Vec::new();
    // The first tenth is for what is kept of each session once it was used.
    for part in 1..=10 {
        let at = Duration::from_secs_f64(f64::from(seconds) * f64::from(part) / 10.0);
        tokio::time::sleep(at.saturating_sub(begin.elapsed())).await;
        samples.push(daemon(child.id()));
    }
    load.over.store(true, Ordering::Relaxed);
    workers.join_all().await;

    // Nobody uses these, whoever has begun to say something to them: they sleep.
    for session in &quiet {
        loop {
            let told = load.client.session(session).await.unwrap();
            if told.state == "stopped" {
                break;
            }
            assert!(begin.elapsed() < Duration::from_secs(u64::from(seconds) + 60), "{told:?}");
            tokio::task::yield_now().await;
        }
    }
    // Nor does who reads nothing keep these from being ended.
    for session in &slow {
        let removed = load.client.remove(session, true);
        tokio::time::timeout(Duration::from_secs(20), removed).await.unwrap().unwrap();
    }
    let failures = std::mem::take(&mut *load.failures.lock());
    // Those of the listeners and of who hears events and reads nothing; the others are closed
    // already, or may be.
    let (_, open) = daemon(child.id());
    listeners.shutdown().await;
    drop(silent);
    let gone = open.saturating_sub(2 * TALKERS + SLOW / 2);
    common::until("connections are closed", || daemon(child.id()).1 <= gone);
    // With a hundred of them running, each of which is measured.
    let begin = Instant::now();
    assert!(load.client.sessions().await.unwrap().len() >= SESSIONS - SLOW_SESSIONS);
    let took = begin.elapsed();
    let [lines, events] = [lines, events].map(|it| it.load(Ordering::Relaxed));
    let heard = format!("{lines} lines and {events} events");
    let told = report(&load, (seconds, &isolation, &heard), &samples, took);
    println!("{told}");
    if let Some(file) = setting("DENIZEN_LOAD_REPORT") {
        fs::write(file, &told).unwrap();
    }

    assert!(
        failures.is_empty(),
        "{} failures: {:#?}",
        failures.len(),
        &failures[..failures.len().min(10)]
    );
    let log = fs::read_to_string(&log).unwrap();
    assert!(!log.contains("panicked"), "{log}");
    for verb in ["exec", "reattach", "upload", "download", "list", "inspect", "stop", "start"] {
        assert!(load.times.lock().contains_key(verb), "{verb}");
    }
    // A quarter of what they could have heard, on a machine that has other work to do.
    let least = u64::from(seconds) * TALKERS as u64 / 4;
    assert!(lines > least && events > least, "{lines} lines, {events} events");
    let (middle, last) = (samples[4].0, samples[9].0);
    assert!(last < middle + middle / 4 + 16 * 1024, "memory grows: {samples:?}");
    assert!(took < Duration::from_secs(1), "a list takes {took:?}");
    assert!(user.run(&["shutdown"]).status.success());
    assert!(child.wait().unwrap().success());
}

/// The median, and what 99 of 100 are not longer than.
fn quantiles(times: &mut [Duration]) -> (Duration, Duration) {
    times.sort_unstable();
    let at = |part: usize| times[(times.len() - 1) * part / 100];
    (at(50), at(99))
}

/// What was done and how long it took, as Markdown.
fn report(
    load: &Load,
    (seconds, isolation, heard): (u32, &str, &str),
    samples: &[(u64, usize)],
    quiet: Duration,
) -> String {
    let mut told = format!(
        "# Load\n\nWritten by `cargo xtask load`, with the daemon as the tests have it, not optimised: \
         {SESSIONS} sessions (`{isolation}`), {WORKERS} clients that do one thing after the other \
         for {seconds} s, {LISTENERS} that listen all the time (and heard {heard}), {SLOW} that read \
         nothing, {HALF_OPEN} that never end a request, all on one machine.\n\n| what | how often \
         | half of them within | 99 of 100 within |\n|---|---|---|---|\n"
    );
    let millis = |time: Duration| time.as_secs_f64() * 1000.0;
    for (verb, times) in load.times.lock().iter_mut() {
        let (half, most) = quantiles(times);
        let (count, half, most) = (times.len(), millis(half), millis(most));
        // Writing to a string cannot fail.
        writeln!(told, "| {verb} | {count} | {half:.1} ms | {most:.1} ms |").unwrap();
    }
    let [first, middle, last] = [0, 4, 9].map(|sample: usize| samples[sample].0 / 1024);
    writeln!(
        told,
        "\nA list of all, when nobody else asks: {:.1} ms. Memory of the daemon after a tenth of the \
         time, half of it and all of it: {first}, {middle} and {last} MiB.",
        millis(quiet)
    )
    .unwrap();
    told
}
