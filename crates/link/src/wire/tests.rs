//! Two ends and a transport that loses bytes, in one thread and in an order that a seed decides.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use super::*;

struct Choice(u64);

impl Choice {
    /// SplitMix64 (Steele, Lea and Flood).
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.next() % u64::try_from(limit.max(1)).unwrap()).unwrap()
    }

    /// Small and big ones alike.
    fn size(&mut self, limit: usize) -> usize {
        let scale = self.below(limit.ilog2() as usize + 1);
        self.below(1 << scale) + 1
    }
}

fn context() -> Context<'static> {
    Context::from_waker(Waker::noop())
}

/// One end, with what is above it.
struct End {
    wire: Wire,
    stream: Stream,
    parser: Parser,
    sent: Vec<u8>,
    got: Vec<u8>,
}

impl End {
    fn new(wire: Wire) -> Self {
        let stream = wire.stream();
        Self { wire, stream, parser: Parser::default(), sent: Vec::new(), got: Vec::new() }
    }

    fn write(&mut self, bytes: &[u8]) {
        if let Poll::Ready(count) = Pin::new(&mut self.stream).poll_write(&mut context(), bytes) {
            self.sent.extend_from_slice(&bytes[..count.unwrap()]);
        }
    }

    fn read(&mut self, most: usize) {
        let mut bytes = vec![0; most];
        let mut buffer = ReadBuf::new(&mut bytes);
        if let Poll::Ready(read) = Pin::new(&mut self.stream).poll_read(&mut context(), &mut buffer)
        {
            read.unwrap();
            self.got.extend_from_slice(buffer.filled());
        }
    }

    fn outgoing(&mut self, attempt: Option<u64>) -> Vec<u8> {
        let mut out = Vec::new();
        match self.wire.poll_outgoing(&mut context(), attempt, &mut out) {
            Poll::Ready(true) => out,
            _ => Vec::new(),
        }
    }

    fn failed(&self) -> Option<Failure> {
        self.wire.shared.state.lock().failed.clone()
    }
}

/// The wires, connected.
fn pair() -> (End, End) {
    let mut host = End::new(Wire::host([9; 16]));
    let guest = Wire::guest();
    let attempt = host.wire.begin(true);
    let hello = host.outgoing(Some(attempt));
    guest.incoming(None, &mut Parser::default(), &hello);
    let mut guest = End::new(guest);
    let hello = guest.outgoing(None);
    host.wire.incoming(Some(attempt), &mut Parser::default(), &hello);
    (host, guest)
}

#[test]
fn cut_anywhere_it_is_one_stream() {
    let mut cuts = 0;
    for seed in 0..100 {
        let mut choice = Choice(seed);
        let (mut host, mut guest) = pair();
        let mut attempt = 1;
        // On the way: from the host, from the guest.
        let (mut down, mut up) = (VecDeque::new(), VecDeque::new());
        for step in 0..600 {
            match choice.below(if step < 500 { 11 } else { 10 }) {
                0 | 1 => {
                    let size = choice.size(100_000);
                    let bytes: Vec<u8> =
                        (0..size).map(|_| choice.next().to_le_bytes()[0] & 3).collect();
                    if choice.below(2) == 0 { host.write(&bytes) } else { guest.write(&bytes) }
                }
                2 => host.read(choice.size(100_000)),
                3 => guest.read(choice.size(100_000)),
                4 | 5 => down.extend(host.outgoing(Some(attempt))),
                6 | 7 => up.extend(guest.outgoing(None)),
                8 => {
                    let size = choice.size(200_000).min(down.len());
                    let bytes: Vec<u8> = down.drain(..size).collect();
                    guest.wire.incoming(None, &mut guest.parser, &bytes);
                }
                9 => {
                    let size = choice.size(200_000).min(up.len());
                    let bytes: Vec<u8> = up.drain(..size).collect();
                    host.wire.incoming(Some(attempt), &mut host.parser, &bytes);
                }
                _ if choice.below(4) == 0 => {
                    cuts += 1;
                    // The end of what is on the way down is lost; what is on the way up is lost
                    // from either end.
                    down.truncate(choice.below(down.len() + 1));
                    up.truncate(choice.below(up.len() + 1));
                    up.drain(..choice.below(up.len() + 1));
                    attempt = host.wire.begin(true);
                    host.parser = Parser::default();
                }
                _ => {}
            }
            assert_eq!((host.failed(), guest.failed()), (None, None), "seed {seed}");
            for end in [&host, &guest] {
                let state = end.wire.shared.state.lock();
                assert!(state.inbox.len() <= BUFFER && state.unacked.len() <= BUFFER);
            }
        }
        // Nothing is lost any more.
        attempt = host.wire.begin(true);
        host.parser = Parser::default();
        for _ in 0..100 {
            down.extend(host.outgoing(Some(attempt)));
            up.extend(guest.outgoing(None));
            guest.wire.incoming(None, &mut guest.parser, down.make_contiguous());
            host.wire.incoming(Some(attempt), &mut host.parser, up.make_contiguous());
            down.clear();
            up.clear();
            guest.read(BUFFER);
            host.read(BUFFER);
        }
        assert!(guest.got == host.sent, "seed {seed}: {} {}", guest.got.len(), host.sent.len());
        assert!(host.got == guest.sent, "seed {seed}: {} {}", host.got.len(), guest.sent.len());
        // What is left to be acknowledged is not enough to be worth a frame.
        let left = host.wire.shared.state.lock().unacked.len() as u64;
        assert!(left < QUIET, "seed {seed}: {left}");
    }
    assert!(cuts > 700, "{cuts}");
}

#[test]
fn another_host_begins_anew() {
    let (mut host, mut guest) = pair();
    host.write(b"half a sen");
    guest.write(b"half an ans");
    guest.wire.incoming(None, &mut guest.parser, &host.outgoing(Some(1)));
    let mut other = End::new(Wire::host([1; 16]));
    let attempt = other.wire.begin(true);
    other.write(b"hello");
    let hello = other.outgoing(Some(attempt));
    guest.wire.incoming(None, &mut guest.parser, &hello);
    let mut buffer = [0; 10];
    let mut buffer = ReadBuf::new(&mut buffer);
    let read = Pin::new(&mut guest.stream).poll_read(&mut context(), &mut buffer);
    assert!(matches!(read, Poll::Ready(Err(_))), "{read:?}");
    assert_eq!(guest.wire.status().borrow().epoch, 2);
    let mut guest = End::new(guest.wire);
    guest.write(b"yes?");
    let answer = guest.outgoing(None);
    other.wire.incoming(Some(attempt), &mut other.parser, &answer);
    guest.wire.incoming(None, &mut guest.parser, &other.outgoing(Some(attempt)));
    guest.read(100);
    other.read(100);
    assert_eq!((&guest.got[..], &other.got[..]), (&b"hello"[..], &b"yes?"[..]));
}

#[test]
fn before_the_hello_nothing_is_believed() {
    let mut host = End::new(Wire::host([9; 16]));
    let attempt = host.wire.begin(true);
    let mut lies = Vec::new();
    frame(DATA, &[0; 20], &mut lies);
    frame(ACK, &u64::MAX.to_le_bytes(), &mut lies);
    let hello = |nonce: u8, attempt: u64, offset: u64| {
        let mut out = Vec::new();
        let body = [&[nonce; 16][..], &attempt.to_le_bytes(), &offset.to_le_bytes()].concat();
        frame(HELLO, &body, &mut out);
        out
    };
    // Another's, and one for an earlier transport.
    lies.extend(hello(8, attempt, 0));
    lies.extend(hello(9, attempt + 1, 0));
    host.wire.incoming(Some(attempt), &mut host.parser, &lies);
    host.read(100);
    assert!(host.got.is_empty());
    assert_eq!(host.wire.status().borrow().attempt, 0);
    host.wire.incoming(Some(attempt), &mut host.parser, &hello(9, attempt, 0));
    assert_eq!(host.wire.status().borrow().attempt, attempt);
    assert_eq!(host.failed(), None);
}

#[test]
fn what_cannot_be_true_is_the_end() {
    let state = |offset: u64| {
        let (mut host, _) = pair();
        host.write(b"0123456789");
        host.outgoing(Some(1));
        let mut out = Vec::new();
        frame(ACK, &offset.to_le_bytes(), &mut out);
        host.wire.incoming(Some(1), &mut host.parser, &out);
        host
    };
    assert_eq!(state(10).failed(), None);
    assert_eq!(state(11).failed(), Some(Failure::Acknowledged { offset: 11, sent: 10 }));
    // An older state of the same guest.
    let mut host = state(10);
    let attempt = host.wire.begin(true);
    let mut out = Vec::new();
    let body = [&[9; 16][..], &attempt.to_le_bytes(), &4u64.to_le_bytes()].concat();
    frame(HELLO, &body, &mut out);
    host.wire.incoming(Some(attempt), &mut host.parser, &out);
    assert_eq!(host.failed(), Some(Failure::Behind { offset: 4, forgotten: 10 }));
    assert!(matches!(
        Pin::new(&mut host.stream).poll_write(&mut context(), b"x"),
        Poll::Ready(Err(_))
    ));
    // More than there is room for.
    let (host, _) = pair();
    let mut parser = Parser::default();
    for at in 0..20u64 {
        let mut out = Vec::new();
        let body = [&(at * 20_000).to_le_bytes()[..], &[5; 20_000]].concat();
        frame(DATA, &body, &mut out);
        host.wire.incoming(Some(1), &mut parser, &out);
    }
    assert_eq!(host.failed(), Some(Failure::Overrun));
    assert!(host.wire.shared.state.lock().inbox.len() <= BUFFER);
    let (host, _) = pair();
    let mut out = Vec::new();
    frame(DATA, &[&u64::MAX.to_le_bytes()[..], b"x"].concat(), &mut out);
    host.wire.incoming(Some(1), &mut parser, &out);
    assert_eq!(host.failed(), Some(Failure::Overrun));
    // Something is missing in between.
    let mut host = state(10);
    let mut out = Vec::new();
    frame(DATA, &[&12u64.to_le_bytes()[..], b"x"].concat(), &mut out);
    host.wire.incoming(Some(1), &mut host.parser, &out);
    assert_eq!(host.failed(), Some(Failure::Missing { offset: 12, received: 0 }));
}

#[test]
fn what_is_damaged_is_left_out() {
    let (mut host, mut guest) = pair();
    guest.write(b"before");
    host.wire.incoming(Some(1), &mut host.parser, &guest.outgoing(None));
    let mut damaged = Vec::new();
    frame(DATA, &[&6u64.to_le_bytes()[..], b"lost"].concat(), &mut damaged);
    // Cut short within, of no kind, too long, and without an end for long.
    damaged.remove(damaged.len() - 3);
    frame(77, b"?", &mut damaged);
    frame(DATA, &[&6u64.to_le_bytes()[..], &[7; 33_000]].concat(), &mut damaged);
    damaged.extend(vec![7; 1_000_000]);
    damaged.push(0);
    for bytes in damaged.chunks(1000) {
        host.wire.incoming(Some(1), &mut host.parser, bytes);
        assert!(host.parser.stuffed.len() <= FRAME);
    }
    guest.write(b", after");
    host.wire.incoming(Some(1), &mut host.parser, &guest.outgoing(None));
    host.read(100);
    assert_eq!((&host.got[..], host.failed()), (&b"before, after"[..], None));
}

/// Whatever comes, it ends in an error or in nothing, and takes no more memory than it may.
#[test]
fn garbage_and_changed_frames() {
    let mut failures = 0;
    for seed in 0..400 {
        let mut choice = Choice(seed);
        let (mut host, mut guest) = pair();
        for _ in 0..100 {
            let size = choice.size(3000);
            guest.write(&vec![5; size]);
            host.write(&vec![6; size]);
            let mut bytes = guest.outgoing(None);
            let mut down = host.outgoing(Some(1));
            if choice.below(4) == 0 {
                bytes = (0..choice.size(60_000)).map(|_| choice.next().to_le_bytes()[0]).collect();
            }
            for bytes in [&mut bytes, &mut down] {
                for _ in 0..choice.below(4) {
                    let at = choice.below(bytes.len());
                    match (choice.below(3), bytes.get_mut(at)) {
                        (0, Some(byte)) => *byte ^= 1 << choice.below(8),
                        (1, Some(_)) => drop(bytes.remove(at)),
                        _ => bytes.insert(at, choice.next().to_le_bytes()[0]),
                    }
                }
            }
            host.wire.incoming(Some(1), &mut host.parser, &bytes);
            guest.wire.incoming(None, &mut guest.parser, &down);
            for end in [&mut host, &mut guest] {
                let state = end.wire.shared.state.lock();
                assert!(state.inbox.len() <= BUFFER && state.unacked.len() <= BUFFER);
                assert!(end.parser.stuffed.len() <= FRAME);
            }
            if host.failed().is_some() || guest.failed().is_some() {
                failures += 1;
                break;
            }
            // A guest may have got another host.
            if guest.wire.status().borrow().epoch != 1 {
                break;
            }
        }
    }
    assert!(failures > 0);
}
