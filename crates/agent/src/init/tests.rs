//! An owner whose init lies: its thread runs as ever, but what it is told comes from the test,
//! and the process that it believes to be an init only sleeps.
#![allow(clippy::unwrap_used)]

use super::*;

/// Steele, Lea and Flood: SplitMix64.
struct Choice(u64);

impl Choice {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.next() % u64::try_from(limit).unwrap()).unwrap()
    }

    fn bytes(&mut self, count: usize) -> Vec<u8> {
        (0..count).map(|_| self.next().to_le_bytes()[0]).collect()
    }
}

struct Liar {
    init: Init,
    socket: OwnedFd,
    thread: std::thread::JoinHandle<()>,
}

impl Liar {
    fn new() -> Self {
        Self::of(Launched::Child)
    }

    /// One that another owner has launched.
    fn found() -> Self {
        Self::of(|child| {
            let fd = pidfd_open(Pid::from_child(&child), PidfdFlags::empty()).unwrap();
            Launched::Found(fd)
        })
    }

    fn of(launched: impl FnOnce(process::Child) -> Launched) -> Self {
        let (ours, socket) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
                .unwrap();
        let child = Command::new("sleep").arg("1000").spawn().unwrap();
        let shared = Arc::new(Shared {
            socket: ours,
            wake: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap(),
            pid: child.id(),
            process: pidfd_open(Pid::from_child(&child), PidfdFlags::empty()).ok(),
            // No process has it.
            nonce: 1 << 31,
            state: Mutex::default(),
            finished: watch::Sender::new(false),
            contained: true,
            lingers: true,
            machine: None,
            patience: Duration::from_millis(200),
            ending: ENDING,
        });
        let remote = Remote { shared: Arc::clone(&shared) };
        let launched = launched(child);
        let thread = std::thread::spawn(move || serve(&shared, launched));
        Self { init: Init { remote }, socket, thread }
    }

    /// Tells something; false if nobody listens any more.
    fn tell(&self, packet: &[u8], descriptors: &[OwnedFd]) -> bool {
        loop {
            match send_packet(self.socket.as_fd(), packet, descriptors) {
                Ok(()) => return true,
                Err(Errno::AGAIN) if self.init.is_alive() => std::thread::yield_now(),
                Err(_) => return false,
            }
        }
    }

    /// Its owner gives it up. Whatever it told, all comes to its end.
    fn end(self) {
        drop(self.init);
        self.thread.join().unwrap();
    }
}

fn packet(kind: u8, flags: u8, id: u32, rest: &[u8]) -> Vec<u8> {
    [&[kind, flags, 0, 0][..], &id.to_le_bytes(), rest].concat()
}

fn some_spawn() -> Spawn {
    let null = || OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
    Spawn {
        argv: vec!["true".into()],
        env: Vec::new(),
        user: None,
        cwd: "/".into(),
        stdin: null(),
        stdout: null(),
        stderr: null(),
        controlling_terminal: false,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_it_tells_it_harms_nobody() {
    for seed in 0..20 {
        let mut choice = Choice(seed);
        let liar = if seed % 2 == 0 { Liar::new() } else { Liar::found() };
        let remote = liar.init.remote();
        let mut asked = tokio::task::JoinSet::new();
        for _ in 0..8 {
            let remote = remote.clone();
            asked.spawn(async move {
                if let Ok(command) = remote.spawn(some_spawn()).await {
                    let _ = tokio::join!(command.wait(), command.kill_tree());
                }
                let _ = tokio::join!(remote.list(), remote.terminal());
            });
        }
        let (reading, writing) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
        for _ in 0..1000 {
            let kind = choice.next().to_le_bytes()[0] % 12;
            let mut told = packet(
                kind,
                choice.next().to_le_bytes()[0],
                u32::try_from(choice.below(40)).unwrap(),
                &[],
            );
            let most = 1 << choice.below(15);
            let length = choice.below(most);
            told.extend(choice.bytes(length));
            told.truncate(choice.below(told.len() + 1).max(1).max(told.len() / 2));
            let count = choice.below(5);
            let descriptors: Vec<_> = (0..count).map(|_| writing.try_clone().unwrap()).collect();
            if !liar.tell(&told, &descriptors) {
                break;
            }
        }
        liar.end();
        drop(remote);
        let waited = tokio::time::timeout(Duration::from_secs(20), asked.join_all()).await;
        assert!(waited.is_ok(), "seed {seed}: somebody waits for ever");
        drop(writing);
        // Nobody has kept the other end: there is an end to read.
        let hung_up = [PollFd::new(&reading, PollFlags::IN)];
        let mut hung_up = hung_up;
        poll(&mut hung_up, Some(&timespec(Duration::from_secs(20)))).unwrap();
        assert!(hung_up[0].revents().contains(PollFlags::HUP), "seed {seed}: a descriptor stays");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_list_without_end_is_its_end() {
    for part in [0, 1000] {
        let liar = Liar::new();
        let remote = liar.init.remote();
        let asked = tokio::spawn(async move { remote.list().await });
        while liar.init.remote.shared.state.lock().lists.is_empty() {
            tokio::task::yield_now().await;
        }
        let told = packet(6, 1, 1, &vec![1; part * 28]);
        let mut count = 0;
        while liar.tell(&told, &[]) {
            count += 1;
            assert!(count < 100_000, "it is believed for ever");
        }
        assert!(matches!(asked.await.unwrap(), Err(Error::InitLost)));
        // What the socket held beyond that was not read.
        assert!(count * part < 2 * MOST_PROCESSES, "{count} parts of {part} were taken");
        liar.end();
    }
}

#[tokio::test]
async fn silence_is_its_end() {
    for new in [Liar::new, Liar::found] {
        let liar = new();
        assert!(matches!(liar.init.list().await, Err(Error::InitLost)));
        let Liar { init, socket, thread } = liar;
        // Its socket stays open: only the thread can have ended it.
        thread.join().unwrap();
        assert!(!init.is_alive());
        drop(socket);

        let Liar { init, socket, thread } = new();
        init.shutdown(Duration::from_millis(10)).await.unwrap();
        thread.join().unwrap();
        drop(socket);
    }
}

/// Its end is seen before who is within has closed the socket, and without.
#[tokio::test]
async fn it_is_dead_when_the_process_outside_is() {
    for new in [Liar::new, Liar::found] {
        let Liar { init, socket, thread } = new();
        assert!(init.is_alive());
        let process = init.remote.shared.process.as_ref().unwrap().try_clone().unwrap();
        pidfd_send_signal(&process, Signal::KILL).unwrap();
        poll(&mut [PollFd::new(&process, PollFlags::IN)], None).unwrap();
        assert!(!init.is_alive());
        // The socket stays open, and nobody closes the owner's end.
        thread.join().unwrap();
        init.end().await;
        drop(socket);
    }
}

#[tokio::test]
async fn what_is_left_is_not_ended() {
    let Liar { init, socket, thread } = Liar::found();
    let process =
        pidfd_open(Pid::from_raw(init.pid().unwrap().cast_signed()).unwrap(), PidfdFlags::empty());
    let remote = init.remote();
    init.leave();
    assert!(matches!(remote.list().await, Err(Error::InitLost)));
    // Both directions are closed, and not a word was said.
    let mut hung_up = [PollFd::new(&socket, PollFlags::IN)];
    poll(&mut hung_up, Some(&timespec(Duration::from_secs(20)))).unwrap();
    assert!(hung_up[0].revents().contains(PollFlags::HUP));
    assert_eq!(receive_packet(socket.as_fd(), &mut [0; 100]).unwrap().0, 0);
    let process = process.unwrap();
    let none = Timespec { tv_sec: 0, tv_nsec: 0 };
    assert_eq!(poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(&none)), Ok(0));
    pidfd_send_signal(process, Signal::KILL).unwrap();
    // It has waited to reap it.
    thread.join().unwrap();
}

/// The owner may be gone before its init looks: then nothing but a word tells that it wanted this.
#[tokio::test]
async fn what_is_to_end_is_told_so() {
    let Liar { init, socket, thread } = Liar::new();
    drop(init);
    let mut told = [0; 100];
    let (count, _) = receive_packet(socket.as_fd(), &mut told).unwrap();
    assert_eq!(&told[..count], message::kill(0, false));
    assert_eq!(receive_packet(socket.as_fd(), &mut told).unwrap().0, 0);
    thread.join().unwrap();
}

#[test]
fn a_first_word_is_one_or_none() {
    let mut choice = Choice(11);
    let wait = Duration::from_millis(20);
    let pair = || {
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap()
    };
    let (reading, writing) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
    let writing = [writing];
    for round in 0..2000 {
        let (ours, theirs) = pair();
        let length = choice.below(40).max(1);
        let mut told = choice.bytes(length);
        // Mostly of the right kind.
        if round % 3 > 0 {
            told[0] = 10;
        }
        let count = choice.below(2);
        send_packet(theirs.as_fd(), &told, &writing[..count]).unwrap();
        let is_one = told[0] == 10 && told.get(8..12) == Some(&[1, 0, 0, 0]);
        assert_eq!(found::await_word(&ours, wait).is_ok(), is_one, "{told:?}");
    }
    let (ours, theirs) = pair();
    let word = packet(10, 0, 77, &1u32.to_le_bytes());
    send_packet(theirs.as_fd(), &word, &writing).unwrap();
    let (last_id, door) = found::await_word(&ours, wait).unwrap();
    assert_eq!((last_id, door.is_some()), (77, true));
    // Of another version, silent, or gone.
    send_packet(theirs.as_fd(), &packet(10, 0, 77, &2u32.to_le_bytes()), &writing).unwrap();
    assert!(found::await_word(&ours, wait).is_err());
    let silent = found::await_word(&ours, wait).unwrap_err();
    assert_eq!(silent.kind(), io::ErrorKind::TimedOut);
    drop(theirs);
    assert!(found::await_word(&ours, wait).is_err());
    // Nobody has kept what came along.
    drop((door, writing));
    let mut hung_up = [PollFd::new(&reading, PollFlags::IN)];
    poll(&mut hung_up, Some(&timespec(Duration::from_secs(20)))).unwrap();
    assert!(hung_up[0].revents().contains(PollFlags::HUP));
}

/// Somebody answers on the socket, but the process that the record names is not of the session.
#[test]
fn only_what_was_launched_is_found() {
    let folder = tempfile::tempdir().unwrap();
    let record = folder.path().join("init");
    let long = folder.path().join("a".repeat(120));
    std::fs::create_dir(&long).unwrap();
    let linger = Linger { socket: long.join("init.sock"), time: Duration::MAX, held: None };
    let listener = linger.bind().unwrap();
    rustix::net::listen(&listener, 8).unwrap();
    let launch =
        Launch { record: Some(record.clone()), linger: Some(linger.clone()), ..Launch::default() };
    let refused = |launch: &Launch| {
        let error = Init::find(launch).map(drop).unwrap_err();
        assert!(matches!(error, Error::NotFound { .. }), "{error}");
    };
    refused(&launch);
    for text in ["", "7\n", "7\nx\n", &format!("7\n{}\n", std::process::id()), "7\n-1\n", "7\n0\n"]
    {
        std::fs::write(&record, text).unwrap();
        refused(&launch);
        if !text.is_empty() {
            assert_eq!(sweep::recorded(&record), Some(7), "{text:?}");
        }
    }
    refused(&Launch { linger: None, ..launch.clone() });
    drop(listener);
    refused(&launch);
    assert_eq!(linger.milliseconds(), u32::MAX);
}

#[tokio::test]
async fn what_it_does_not_take_does_not_pile_up() {
    let liar = Liar::new();
    let shared = &liar.init.remote.shared;
    let refused = loop {
        let sent = shared.send(&mut shared.state.lock(), message::kill(1, false), Vec::new());
        if let Err(error) = sent {
            break error;
        }
    };
    assert!(matches!(refused, Error::Io { .. }), "{refused:?}");
    assert_eq!(shared.state.lock().queue.len(), MOST_WAITING);
    liar.end();
}

#[test]
fn no_bytes_confuse_the_parser() {
    let mut choice = Choice(7);
    for round in 0..200_000 {
        let length = choice.below(64);
        let mut bytes = choice.bytes(length);
        if let Some(kind) = bytes.first_mut() {
            *kind = u8::try_from(round % 14).unwrap();
        }
        if let Some(Event::Listing { part, .. }) = message::event(&bytes) {
            assert!(part.len() <= bytes.len() / 28);
        }
    }
}
