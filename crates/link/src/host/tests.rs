//! Guests that do what no guest of ours does: the link ends, in time and within bounds.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use h2::server::SendResponse;
use http::Response;

use super::*;

const SOON: Duration = Duration::from_secs(20);

fn stream(socket: UnixStream) -> tokio::net::UnixStream {
    socket.set_nonblocking(true).unwrap();
    tokio::net::UnixStream::from_std(socket).unwrap()
}

/// A link, its owner's socket, and the wire of a guest that is connected to it.
async fn hostile() -> (Link, Packets, Wire) {
    // A task's panic would go unnoticed.
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        let usual = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            usual(info);
            if std::thread::current().name() == Some("tokio-rt-worker") {
                std::process::abort();
            }
        }));
    });
    let (link, owner) = Link::new().unwrap();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let wire = Wire::guest();
    let (mut reader, mut writer) = tokio::io::split(stream(theirs));
    let (reading, writing) = (wire.clone(), wire.clone());
    tokio::spawn(async move {
        let mut buffer = vec![0; 65536];
        let mut parser = Parser::default();
        while let Ok(count @ 1..) = reader.read(&mut buffer).await {
            reading.incoming(None, &mut parser, &buffer[..count]);
        }
    });
    tokio::spawn(async move {
        let mut out = Vec::new();
        loop {
            std::future::poll_fn(|cx| writing.poll_outgoing(cx, None, &mut out)).await;
            if writer.write_all(&out).await.is_err() {
                return;
            }
        }
    });
    link.connect(stream(ours), SOON).await.unwrap();
    (link, Packets::new(owner).unwrap(), wire)
}

async fn failed(link: &Link) -> Failure {
    tokio::time::timeout(SOON, link.failed()).await.expect("it goes on")
}

/// The next event; empty at the end.
async fn event(owner: &Packets) -> Vec<u8> {
    let mut buffer = vec![0; 65536];
    let (count, _) = tokio::time::timeout(SOON, owner.receive(&mut buffer)).await.unwrap().unwrap();
    buffer.truncate(count);
    buffer
}

/// A guest with HTTP/2 as it should be. It says to `/init` what `init` says; what is asked for
/// else is given to `other`.
fn serve<F>(
    wire: &Wire,
    init: impl FnOnce(SendStream<Bytes>) -> F + Send + 'static,
    other: impl Fn(SendResponse<Bytes>) + Send + 'static,
) where
    F: Future<Output = ()> + Send,
{
    let stream = wire.stream();
    tokio::spawn(async move {
        let connection = h2::server::Builder::new()
            .max_concurrent_streams(10_000)
            .max_pending_accept_reset_streams(10_000)
            .handshake(stream)
            .await;
        let mut connection = connection.unwrap();
        let mut init = Some(init);
        while let Some(Ok((request, mut respond))) = connection.accept().await {
            if request.uri().path() != "/init" {
                other(respond);
                continue;
            }
            let init = init.take().unwrap();
            tokio::spawn(async move {
                let _requests = request.into_body();
                let send = respond.send_response(Response::new(()), false).unwrap();
                init(send).await;
                std::future::pending::<()>().await;
            });
        }
    });
}

async fn say(send: &mut SendStream<Bytes>, event: &[u8]) -> bool {
    send_all(send, message::to_host(&[], event).into()).await
}

#[tokio::test(flavor = "multi_thread")]
async fn garbage_is_no_guest() {
    let (link, _owner) = Link::new().unwrap();
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let flooding = std::thread::spawn(move || {
        use std::io::Write;
        // With and without ends of frames, for as long as it is taken.
        let garbage: Vec<u8> =
            (0..100_000u32).map(|at| (at.wrapping_mul(at) >> 7).to_le_bytes()[0]).collect();
        while theirs.write_all(&garbage).is_ok() && theirs.write_all(&[1; 100_000]).is_ok() {}
    });
    let error = link.connect(stream(ours), Duration::from_millis(300)).await.unwrap_err();
    assert!(matches!(error, ConnectError::NoAnswer(_)), "{error}");
    tokio::task::spawn_blocking(|| flooding.join().unwrap()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hello_that_lies() {
    let (link, _owner) = Link::new().unwrap();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut theirs = stream(theirs);
    let lying = tokio::spawn(async move {
        let mut hello = vec![0; 200];
        let count = theirs.read(&mut hello).await.unwrap();
        let mut plain = Vec::new();
        let end = hello[1..count].iter().position(|byte| *byte == 0).unwrap() + 1;
        assert!(crate::cobs::unstuff(&hello[1..end], &mut plain));
        // All of its bytes, and one more.
        let length = plain.len();
        plain[length - 8..].copy_from_slice(&u64::MAX.to_le_bytes());
        let mut answer = vec![0];
        crate::cobs::stuff(&plain, &mut answer);
        answer.push(0);
        theirs.write_all(&answer).await.unwrap();
        theirs
    });
    let error = link.connect(stream(ours), SOON).await.unwrap_err();
    let wanted = |failure: &Failure| matches!(failure, Failure::Acknowledged { .. });
    assert!(matches!(&error, ConnectError::Failed(it) if wanted(it)), "{error}");
    assert!(wanted(&failed(&link).await));
    drop(lying.await);
    // There is no way back.
    let (ours, _theirs) = UnixStream::pair().unwrap();
    let error = link.connect(stream(ours), SOON).await.unwrap_err();
    assert!(matches!(error, ConnectError::Failed(_)), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_http() {
    for seed in 0..20u8 {
        let (link, owner, wire) = hostile().await;
        let mut stream = wire.stream();
        let writing = tokio::spawn(async move {
            let mut byte = seed;
            loop {
                let garbage: Vec<u8> = (0..1000u32)
                    .map(|at| {
                        byte = byte.wrapping_mul(167).wrapping_add(at.to_le_bytes()[0]);
                        byte
                    })
                    .collect();
                if stream.write_all(&garbage).await.is_err() {
                    return;
                }
            }
        });
        let failure = failed(&link).await;
        assert!(matches!(failure, Failure::Connection(_)), "{failure}");
        assert!(event(&owner).await.is_empty());
        writing.abort();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn packets_that_are_none() {
    let cases: [&[u8]; 5] = [
        // Longer than anything.
        &[0xff; 8],
        // Of nothing.
        &[0, 0, 0, 0],
        // Entries that are not there.
        &[1, 0, 0, 0, 200],
        // No head.
        &[4, 0, 0, 0, 0, 1, 2, 3],
        // A length for a packet that is too long by little.
        &[0xff, 0xff, 0, 0, 0],
    ];
    for case in cases {
        let (link, owner, wire) = hostile().await;
        let say = async move |mut send: SendStream<Bytes>| {
            send_all(&mut send, Bytes::from_static(case)).await;
        };
        serve(&wire, say, |_| {});
        assert_eq!(failed(&link).await, Failure::Packet, "{case:?}");
        assert!(event(&owner).await.is_empty());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_nobody_asked_for_is_not_told() {
    let (_link, owner, wire) = hostile().await;
    let tell = async |mut send: SendStream<Bytes>| {
        // No kind, given, entered, refused, found, and such as no one knows.
        for kind in [0, 9, 7, 8, 10, 11, 200] {
            say(&mut send, &message::with_number(kind, 1, 0)).await;
        }
        let marks = [Mark { stream: 77, offset: 5 }, Mark { stream: 0, offset: u64::MAX }];
        let event = message::with_number(message::EXITED, 5, 3);
        send_all(&mut send, message::to_host(&marks, &event).into()).await;
        send_all(&mut send, message::to_host(&marks, &[]).into()).await;
        say(&mut send, &message::with_number(5, 0, 0)).await;
    };
    serve(&wire, tell, |_| {});
    assert_eq!(event(&owner).await, message::with_number(message::EXITED, 5, 3));
    assert_eq!(event(&owner).await, message::with_number(5, 0, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn endless_events_wait_for_their_reader() {
    let (link, owner, wire) = hostile().await;
    let told = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&told);
    let tell = async move |mut send: SendStream<Bytes>| {
        let event = message::with_number(message::LISTING, 1, 1);
        while say(&mut send, &event).await {
            counter.fetch_add(1, Ordering::SeqCst);
        }
    };
    serve(&wire, tell, |_| {});
    // It comes to a stop by itself.
    let mut before = 0;
    loop {
        tokio::time::sleep(Duration::from_millis(300)).await;
        let now = told.load(Ordering::SeqCst);
        if now == before && now > 0 {
            break;
        }
        before = now;
    }
    assert!(before < 100_000, "{before}");
    for _ in 0..before {
        assert_eq!(event(&owner).await[0], message::LISTING);
    }
    drop(link);
}

/// Streams of descriptors that flood, begin without end, or go away at once.
#[tokio::test(flavor = "multi_thread")]
async fn streams_that_are_misused() {
    let (link, owner, wire) = hostile().await;
    let sent = Arc::new(AtomicUsize::new(0));
    let done = Arc::new(AtomicBool::new(false));
    let (counter, over) = (Arc::clone(&sent), Arc::clone(&done));
    let number = AtomicUsize::new(0);
    let fd = move |mut respond: SendResponse<Bytes>| {
        let (counter, over) = (Arc::clone(&counter), Arc::clone(&over));
        let number = number.fetch_add(1, Ordering::SeqCst);
        tokio::spawn(async move {
            match number {
                // The input: heads that are not the last one.
                0 => {
                    for _ in 0..50_000 {
                        let mut head = Response::new(());
                        *head.status_mut() = StatusCode::EARLY_HINTS;
                        if respond.send_informational(head).is_err() {
                            break;
                        }
                        tokio::task::yield_now().await;
                    }
                    over.store(true, Ordering::SeqCst);
                }
                1 => {
                    let mut send = respond.send_response(Response::new(()), false).unwrap();
                    while send_all(&mut send, Bytes::from_static(&[7; 1000])).await {
                        counter.fetch_add(1000, Ordering::SeqCst);
                    }
                }
                _ => respond.send_reset(h2::Reason::INTERNAL_ERROR),
            }
        });
    };
    serve(&wire, async |_send| {}, fd);
    let pipes = [0; 3].map(|_| std::io::pipe().unwrap());
    let theirs: [OwnedFd; 3] = [
        pipes[0].0.try_clone().unwrap().into(),
        pipes[1].1.try_clone().unwrap().into(),
        pipes[2].1.try_clone().unwrap().into(),
    ];
    let mut spawn = message::header(message::SPAWN, 0, 1);
    spawn.extend([0; 8]);
    let fds: Vec<_> = theirs.iter().map(AsFd::as_fd).collect();
    owner.send(&spawn, &fds).await.unwrap();
    drop(theirs);
    let [(stdin, ours), (stdout, out), (mut stderr, err)] = pipes;
    drop((stdin, out, err));
    // It is not there any more.
    let ended =
        tokio::task::spawn_blocking(move || std::io::Read::read(&mut stderr, &mut [0]).unwrap());
    assert_eq!(tokio::time::timeout(SOON, ended).await.unwrap().unwrap(), 0);
    let mut before = 0;
    loop {
        tokio::time::sleep(Duration::from_millis(300)).await;
        let now = sent.load(Ordering::SeqCst);
        if now == before && now > 0 && done.load(Ordering::SeqCst) {
            break;
        }
        before = now;
    }
    // A pipe, a window, and what its own end has.
    assert!(before < 400_000, "{before}");
    drop((ours, stdout, link));
}

/// A guest of ours, but for some bytes of its HTTP/2.
#[tokio::test(flavor = "multi_thread")]
async fn bytes_changed_on_the_way() {
    let mut over = 0;
    for seed in 0..150u64 {
        let (link, owner, wire) = hostile().await;
        let (inner, outer) = tokio::io::duplex(100_000);
        tokio::spawn(async move {
            let mut connection = h2::server::handshake(inner).await.unwrap();
            while let Some(Ok((request, mut respond))) = connection.accept().await {
                tokio::spawn(async move {
                    let init = request.uri().path() == "/init";
                    let mut recv = request.into_body();
                    let Ok(mut send) = respond.send_response(Response::new(()), false) else {
                        return;
                    };
                    while let Some(Ok(bytes)) = recv.data().await {
                        let _ = recv.flow_control().release_capacity(bytes.len());
                        let answer = if init {
                            let mut all = Vec::new();
                            for kind in [1, 3] {
                                let event = message::with_number(kind, 1, 0);
                                let marks = [Mark { stream: 2, offset: 3 }];
                                all.extend(message::to_host(&marks, &event));
                            }
                            all.into()
                        } else {
                            bytes
                        };
                        send_all(&mut send, answer).await;
                    }
                });
            }
        });
        let (mut from, mut to) = tokio::io::split(outer);
        let (mut up, mut down) = (wire.stream(), wire.stream());
        tokio::spawn(async move { tokio::io::copy(&mut down, &mut to).await });
        tokio::spawn(async move {
            let mut state = seed;
            let mut next = move |limit: u64| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(144_115);
                (state >> 33) % limit
            };
            let mut buffer = vec![0; 10_000];
            while let Ok(count @ 1..) = from.read(&mut buffer).await {
                for byte in &mut buffer[..count] {
                    if next(60) == 0 {
                        *byte ^= 1 << next(8);
                    }
                }
                if up.write_all(&buffer[..count]).await.is_err() {
                    return;
                }
            }
        });
        let pipes = [0; 3].map(|_| std::io::pipe().unwrap());
        let fds = [pipes[0].0.as_fd(), pipes[1].1.as_fd(), pipes[2].1.as_fd()];
        let mut spawn = message::header(message::SPAWN, 0, 1);
        spawn.extend([0; 8]);
        let _ = owner.send(&spawn, &fds).await;
        std::io::Write::write_all(&mut &pipes[0].1, &[0; 5000]).unwrap();
        if tokio::time::timeout(Duration::from_millis(50), link.failed()).await.is_ok() {
            over += 1;
            let mut buffer = [0; 100];
            while owner.receive(&mut buffer).await.unwrap().0 > 0 {}
        }
    }
    assert!(over > 50, "{over}");
}
