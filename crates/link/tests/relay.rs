//! An owner and the real `denizen-init`, with both relays in between: it is as if they were
//! connected.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use common::{Choice, PATIENCE, packet, pair, read_until, stream};

fn all(mut reader: impl Read) -> Vec<u8> {
    let mut bytes = Vec::new();
    reader.read_to_end(&mut bytes).unwrap();
    bytes
}

#[tokio::test(flavor = "multi_thread")]
async fn commands_and_their_pipes() {
    let (_link, mut owner, _guest) = pair().await;
    for code in [0u32, 1, 42, 255] {
        let running = owner.sh(&format!("exit {code}"));
        assert_eq!(owner.exit(running.id), (0, code));
        assert!(all(running.stdout).is_empty());
    }
    let mut running = owner.sh("read line; echo \"$line!\"; echo no >&2; cat");
    let mut stdin = running.stdin.take().unwrap();
    stdin.write_all(b"hello\nworld").unwrap();
    drop(stdin);
    assert_eq!(all(running.stdout), b"hello!\nworld");
    assert_eq!(all(running.stderr), b"no\n");
    assert_eq!(owner.exit(running.id), (0, 0));
    // Signals.
    let running = owner.sh("exec sleep 1000");
    owner.send(&packet(2, 0, running.id, &15u32.to_le_bytes()), &[]);
    assert_eq!(owner.exit(running.id), (1, 15));
    // A tree.
    let running = owner.sh("sleep 1000 & sleep 1000");
    owner.send(&packet(3, 1, running.id, &[]), &[]);
    assert_eq!(owner.event(&[4], running.id).0[8..], [0; 4]);
    // The list.
    owner.send(&packet(4, 0, 777, &[]), &[]);
    assert_eq!(owner.event(&[6], 777).0.len(), 8);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_started_leaves_nothing() {
    let (_link, mut owner, _guest) = pair().await;
    for _ in 0..3000 {
        let running = owner.begin(&["/nowhere/at/all"]);
        let (event, _) = owner.event(&[1, 2], running.id);
        assert_eq!((event[0], event[1], event[8]), (2, 2, 2));
        assert!(all(running.stdout).is_empty());
        assert!(all(running.stderr).is_empty());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn twenty_megabytes_there_and_back() {
    let (_link, mut owner, _guest) = pair().await;
    let mut running = owner.sh("exec cat");
    let sent = Choice(1).bytes(20_000_000);
    let mut stdin = running.stdin.take().unwrap();
    let copy = sent.clone();
    let writer = std::thread::spawn(move || stdin.write_all(&copy).unwrap());
    let got = all(running.stdout);
    writer.join().unwrap();
    assert!(got == sent, "{} bytes", got.len());
    assert_eq!(owner.exit(running.id), (0, 0));
}

/// The end is told when all is there: whoever then finds an output empty has seen it all.
#[tokio::test(flavor = "multi_thread")]
async fn the_output_is_there_before_the_end() {
    let (_link, mut owner, _guest) = pair().await;
    for round in 0..200u32 {
        // Something holds the outputs open.
        let running = owner.sh("head -c 50000 /dev/zero; sleep 1000 & exit 3");
        assert_eq!(owner.exit(running.id), (0, 3));
        let there = rustix::io::ioctl_fionread(&running.stdout).unwrap();
        assert_eq!(there, 50_000, "round {round}");
        owner.send(&packet(3, 0, running.id, &[]), &[]);
    }
    // More than fits: the end comes when the rest does.
    let mut running = owner.sh("head -c 150000 /dev/zero; sleep 1000 & exit 3");
    let mut buffer = vec![0; 90_000];
    running.stdout.read_exact(&mut buffer).unwrap();
    assert_eq!(owner.exit(running.id), (0, 3));
    assert_eq!(rustix::io::ioctl_fionread(&running.stdout).unwrap(), 60_000);
    // One that is killed has its end told although nobody reads.
    let running = owner.sh("exec cat /dev/zero");
    owner.send(&packet(3, 1, running.id, &[]), &[]);
    assert_eq!(owner.exit(running.id), (1, 9));
}

#[tokio::test(flavor = "multi_thread")]
async fn who_is_slow_stops_who_is_fast() {
    let (_link, mut owner, _guest) = pair().await;
    let mut running =
        owner.sh("i=0; while head -c 10000 /dev/zero; do i=$((i+1)); echo $i >&2; done");
    let mut count = 0usize;
    // What it says of itself stops when nothing is read of the other output.
    loop {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        let mut ready = [PollFd::new(&running.stderr, PollFlags::IN)];
        let quiet = Timespec { tv_sec: 1, tv_nsec: 0 };
        if poll(&mut ready, Some(&quiet)).unwrap() == 0 {
            break;
        }
        let mut buffer = [0; 4096];
        let read = running.stderr.read(&mut buffer).unwrap();
        count += buffer[..read].iter().filter(|byte| **byte == b'\n').count();
        assert!(count < 100, "it writes on and on");
    }
    assert!(count >= 10, "{count}");
    // Others go on meanwhile.
    let other = owner.sh("exit 5");
    assert_eq!(owner.exit(other.id), (0, 5));
    // Nobody reads: SIGPIPE.
    drop(running.stdout);
    let other = owner.sh("exec cat /dev/zero");
    drop(other.stdout);
    assert_eq!(owner.exit(other.id), (1, 13));
    // Nobody reads what is written to it.
    let mut other = owner.sh("exec <&-; sleep 1000");
    let mut stdin = other.stdin.take().unwrap();
    let failed = (0..1_000_000).find_map(|_| stdin.write_all(&[0; 1024]).err());
    assert_eq!(failed.unwrap().kind(), std::io::ErrorKind::BrokenPipe);
}

/// What the host cannot even ask for leaves nothing either.
#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_asked_for() {
    use rustix::event::{PollFd, PollFlags, poll};
    let (_link, mut owner, _guest) = pair().await;
    let null = std::fs::OpenOptions::new().read(true).write(true).open("/dev/null").unwrap();
    for _ in 0..50 {
        let (theirs, stdin) = std::io::pipe().unwrap();
        // That is no terminal.
        let id = owner.ask(&["true"], [theirs.as_fd(), null.as_fd(), null.as_fd()], true);
        drop(theirs);
        let (event, _) = owner.event(&[1, 2], id);
        assert_eq!((event[0], event[8]), (2, 25));
        let mut hung_up = [PollFd::new(&stdin, PollFlags::empty())];
        assert_eq!(poll(&mut hung_up, Some(&common::DEADLINE)), Ok(1));
    }
    let file = tempfile::tempfile().unwrap();
    let id = owner.ask(&["true"], [file.as_fd(); 3], false);
    assert_eq!(owner.event(&[1, 2], id).0[8], 22);
    let running = owner.sh("exit 4");
    assert_eq!(owner.exit(running.id), (0, 4));
}

/// Whoever waits for the other end to be closed, and says nothing, is told.
#[tokio::test(flavor = "multi_thread")]
async fn closing_is_seen_without_a_word() {
    use rustix::event::{PollFd, PollFlags, poll};
    let (_link, mut owner, _guest) = pair().await;
    let running = owner.sh("exec <&-; exec sleep 1000");
    let mut hung_up = [PollFd::new(running.stdin.as_ref().unwrap(), PollFlags::empty())];
    assert_eq!(poll(&mut hung_up, Some(&common::DEADLINE)), Ok(1));
    // And the other way: it is `tail` that looks, as nothing is written.
    let running = owner.sh("tail -f /dev/null");
    drop(running.stdout);
    owner.exit(running.id);
}

/// Letters one by one, for somebody who is slow, are as good as many at once.
#[tokio::test(flavor = "multi_thread")]
async fn letter_by_letter() {
    let (_link, mut owner, _guest) = pair().await;
    let slow: Vec<_> = (0..2)
        .map(|_| owner.spawn(&["dd", "if=/dev/zero", "bs=1", "count=150000", "status=none"]))
        .collect();
    let other = owner.sh("exit 5");
    assert_eq!(owner.exit(other.id), (0, 5));
    for running in slow {
        assert_eq!(all(running.stdout).len(), 150_000);
        assert_eq!(owner.exit(running.id), (0, 0));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_terminal() {
    let (_link, mut owner, _guest) = pair().await;
    let (id, mut master) = owner.on_terminal(&["sh"], 101, 37);
    master.write_all(b"tty; stty size\n").unwrap();
    assert!(read_until(&mut master, "37 101").contains("/dev/pts/"));
    let size = [55u16.to_le_bytes(), 22u16.to_le_bytes()].concat();
    owner.send(&packet(11, 0, id, &size), &[]);
    // What is typed and the size go on different ways.
    let wait = b"until [ \"$(stty size)\" = '22 55' ]; do sleep 0.01; done; echo re'sized'\n";
    master.write_all(wait).unwrap();
    read_until(&mut master, "resized");
    master.write_all(b"echo $((6 * 7)); exit 9\n").unwrap();
    read_until(&mut master, "42");
    assert_eq!(owner.exit(id), (0, 9));
    // The end of the terminal.
    let error = loop {
        match master.read(&mut [0; 100]) {
            Ok(0) => break None,
            Ok(_) => {}
            Err(error) => break error.raw_os_error(),
        }
    };
    assert_eq!(error, Some(5));
    // The owner hangs up.
    let (id, master) = owner.on_terminal(&["sleep", "1000"], 80, 24);
    drop(master);
    assert_eq!(owner.exit(id), (1, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn all_that_a_terminal_printed_is_there_before_the_end() {
    let (_link, mut owner, _guest) = pair().await;
    for _ in 0..50 {
        let (id, mut master) =
            owner.on_terminal(&["sh", "-c", "head -c 3000 /dev/zero; echo end"], 80, 24);
        assert_eq!(owner.exit(id), (0, 0));
        rustix::io::ioctl_fionbio(&master, true).unwrap();
        let mut seen = Vec::new();
        let mut buffer = [0; 4096];
        let end = loop {
            match master.read(&mut buffer) {
                Ok(count @ 1..) => seen.extend_from_slice(&buffer[..count]),
                end => break end,
            }
        };
        assert_eq!(seen.len(), 3005, "{end:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn connections() {
    let (_link, mut owner, _guest) = pair().await;
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    owner.send(&packet(9, 0, 5001, &u32::from(port).to_le_bytes()), &[]);
    let (mut there, _) = listener.accept().unwrap();
    let (event, fd) = owner.event(&[9], 5001);
    assert_eq!(event[8..12], [0; 4]);
    let mut here = std::os::unix::net::UnixStream::from(fd.unwrap());
    // As a runtime wants it.
    here.set_nonblocking(false).unwrap();
    here.write_all(b"question").unwrap();
    here.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(all(&there), b"question");
    there.write_all(b"answer").unwrap();
    drop(there);
    assert_eq!(all(&here), b"answer");
    drop(listener);
    owner.send(&packet(9, 0, 5002, &u32::from(port).to_le_bytes()), &[]);
    let (event, fd) = owner.event(&[9], 5002);
    assert_eq!(event[8..12], 111u32.to_le_bytes());
    assert!(fd.is_none());
}

/// What an agent within a sandbox has: a socket as its stdin.
#[tokio::test(flavor = "multi_thread")]
async fn a_socket_as_stdin() {
    let (_link, mut owner, _guest) = pair().await;
    let (mut ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    let null = std::fs::OpenOptions::new().read(true).write(true).open("/dev/null").unwrap();
    let fds = [theirs.as_fd(), theirs.as_fd(), null.as_fd()];
    let id = owner.ask(&["cat"], fds, false);
    drop(theirs);
    owner.started(id);
    let sent = Choice(2).bytes(1_000_000);
    let copy = sent.clone();
    let mut writing = ours.try_clone().unwrap();
    let writer = std::thread::spawn(move || {
        writing.write_all(&copy).unwrap();
        writing.shutdown(std::net::Shutdown::Write).unwrap();
    });
    let mut got = Vec::new();
    ours.read_to_end(&mut got).unwrap();
    writer.join().unwrap();
    assert!(got == sent, "{}", got.len());
    assert_eq!(owner.exit(id), (0, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn many_at_once() {
    let (_link, mut owner, _guest) = pair().await;
    let all: Vec<_> = (0..200)
        .map(|number: u32| {
            (number, owner.begin(&["sh", "-c", &format!("echo {number}; exit {}", number % 7)]))
        })
        .collect();
    for (number, mut running) in all {
        let mut text = String::new();
        running.stdout.read_to_string(&mut text).unwrap();
        assert_eq!(text, format!("{number}\n"));
        assert_eq!(owner.exit(running.id), (0, number % 7));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn long_arguments() {
    let (_link, mut owner, _guest) = pair().await;
    let long = "x".repeat(100_000);
    let running = owner.spawn(&["printf", "%s", &long]);
    assert_eq!(all(running.stdout), long.as_bytes());
    let too_long = "x".repeat(9_000_000);
    let running = owner.begin(&["printf", "%s", &too_long]);
    assert_eq!(owner.event(&[1, 2], running.id).0[8..12], 7u32.to_le_bytes());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_owner_leaves() {
    let (link, mut owner, mut guest) = pair().await;
    let mut running = owner.sh("trap '' HUP TERM; echo on; sleep 1000 & sleep 1000");
    let mut line = [0; 3];
    running.stdout.read_exact(&mut line).unwrap();
    drop(owner);
    guest.ended().unwrap();
    assert!(all(running.stdout).is_empty());
    let failure = tokio::time::timeout(PATIENCE, link.failed()).await.unwrap();
    assert_eq!(failure, denizen_link::Failure::Ended);
}

/// What was printed before the end of everything is not lost with it.
#[tokio::test(flavor = "multi_thread")]
async fn the_last_words() {
    for _ in 0..20 {
        let (_link, mut owner, mut guest) = pair().await;
        let mut running = owner.sh("head -c 60000 /dev/zero; echo on >&2; sleep 1000");
        running.stderr.read_exact(&mut [0; 3]).unwrap();
        let init = rustix::process::Pid::from_raw(guest.init().try_into().unwrap()).unwrap();
        owner.send(&packet(3, 0, 0, &[]), &[]);
        drop(owner);
        assert_eq!(all(running.stdout).len(), 60_000);
        guest.ended().unwrap();
        assert!(rustix::process::test_kill_process(init).is_err());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_init_ends() {
    let (link, owner, mut guest) = pair().await;
    let init = rustix::process::Pid::from_raw(guest.init().try_into().unwrap()).unwrap();
    rustix::process::kill_process(init, rustix::process::Signal::KILL).unwrap();
    guest.ended().unwrap();
    assert_eq!(owner.receive().unwrap().0[0], 10, "that it is there");
    assert!(owner.receive().is_none());
    let failure = tokio::time::timeout(PATIENCE, link.failed()).await.unwrap();
    assert_eq!(failure, denizen_link::Failure::Ended);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_link_is_dropped() {
    let (link, mut owner, _guest) = pair().await;
    let mut running = owner.sh("exec sleep 1000");
    drop(link);
    assert!(owner.receive().is_none());
    assert_eq!(running.stdout.read(&mut [0]).unwrap(), 0);
}

/// Another process of the daemon, or another guest of the same image.
#[tokio::test(flavor = "multi_thread")]
async fn another_host() {
    let (link, mut owner, guest) = pair().await;
    let mut running = owner.sh("while sleep 0.01; do echo on; done");
    drop(link);
    let (link, socket) = denizen_link::Link::new().unwrap();
    link.connect(stream(guest.port.try_clone().unwrap()), PATIENCE).await.unwrap();
    let mut owner = common::Owner::new(socket);
    // What the other has started goes on, and can print; its numbers are taken.
    assert_eq!(owner.receive().unwrap().0, packet(10, 0, running.id, &1u32.to_le_bytes()));
    owner.last = running.id;
    let second = owner.sh("echo $$; exit 4");
    assert_eq!(owner.exit(second.id), (0, 4));
    assert_eq!(running.stdout.read(&mut [0]).unwrap(), 0);
    owner.send(&packet(4, 0, 777, &[]), &[]);
    assert!(owner.event(&[6], 777).0.len() > 8, "the other's command runs on");
}

/// The guest is moved from one hypervisor to the next, all the time.
#[tokio::test(flavor = "multi_thread")]
async fn the_transport_changes() {
    let guest = common::Guest::new();
    let (link, socket) = denizen_link::Link::new().unwrap();
    let link = std::sync::Arc::new(link);
    let port = stream(guest.port.try_clone().unwrap());
    let moving = link.clone();
    let rounds = std::sync::Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let counter = rounds.clone();
    let mover = tokio::spawn(async move {
        let mut choice = Choice(3);
        loop {
            let (ours, transport) = std::os::unix::net::UnixStream::pair().unwrap();
            let scale = 8 + choice.below(14);
            let limit = 100 + choice.below(1 << scale);
            let connecting = moving.connect(stream(ours), PATIENCE);
            let carrying = common::carry(&port, transport, limit, &mut choice);
            // It may be cut before it has answered.
            tokio::join!(carrying, async { drop(connecting.await) });
            counter.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
            if choice.below(3) == 0 {
                moving.disconnect().await;
            }
        }
    });
    let work = std::thread::spawn(move || {
        let mut owner = common::Owner::new(socket);
        let (terminal, mut master) = owner.on_terminal(&["sh"], 80, 24);
        let mut running = owner.sh("exec cat");
        let sent = Choice(1).bytes(20_000_000);
        let mut stdin = running.stdin.take().unwrap();
        let copy = sent.clone();
        let writer = std::thread::spawn(move || stdin.write_all(&copy).unwrap());
        let mut got = Vec::new();
        for part in 0..20 {
            let mut bytes = vec![0; 1_000_000];
            running.stdout.read_exact(&mut bytes).unwrap();
            got.extend(bytes);
            master.write_all(format!("echo $(({part} + 1000))\n").as_bytes()).unwrap();
            read_until(&mut master, &format!("\n{}", part + 1000));
        }
        got.extend(all(running.stdout));
        writer.join().unwrap();
        assert!(got == sent, "{} bytes", got.len());
        assert_eq!(owner.exit(running.id), (0, 0));
        master.write_all(b"exit 8\n").unwrap();
        assert_eq!(owner.exit(terminal), (0, 8));
        owner
    });
    let owner = tokio::task::spawn_blocking(move || work.join().unwrap()).await.unwrap();
    mover.abort();
    drop(owner);
    let rounds = rounds.load(std::sync::atomic::Ordering::SeqCst);
    assert!(rounds > 30, "{rounds}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_machine_itself() {
    let (link, _owner, _guest) = pair().await;
    assert_eq!(link.sync().await.unwrap(), denizen_link::Steps::default());
    // There is nothing to be frozen there.
    let steps = link.rest().await.unwrap();
    assert_eq!(steps.failed.len(), 1, "{steps:?}");
    assert_eq!(steps.failed[0].0, "freeze");
    // No such time is set, on whatever machine this runs.
    let clock = denizen_link::Clock { seconds: 0, nanoseconds: 2_000_000_000 };
    let wake = denizen_link::Wake { clock, entropy: "no digits".into(), fresh: None };
    let steps = link.wake(&wake).await.unwrap();
    let failed: Vec<_> = steps.failed.iter().map(|(step, _)| step.as_str()).collect();
    assert!(failed.ends_with(&["clock", "entropy"]), "{steps:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_answers() {
    let (link, _owner) = denizen_link::Link::new().unwrap();
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    let begin = Instant::now();
    let error = link.connect(stream(ours), Duration::from_millis(100)).await.unwrap_err();
    assert!(matches!(error, denizen_link::ConnectError::NoAnswer(_)), "{error}");
    assert!(begin.elapsed() < Duration::from_secs(5));
    drop(theirs);
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    drop(theirs);
    let error = link.connect(stream(ours), PATIENCE).await.unwrap_err();
    assert!(matches!(error, denizen_link::ConnectError::Closed), "{error}");
}
