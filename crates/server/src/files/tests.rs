//! Agents that mean harm: each speaks HTTP/2 by hand, as far as its plan goes.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::sync::atomic::{AtomicU64, Ordering};

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;

const DATA: u8 = 0;
const HEADERS_FRAME: u8 = 1;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const CONTINUATION: u8 = 9;

/// A frame as RFC 9113, 4.1 has it.
fn frame(kind: u8, flags: u8, stream: u32, content: &[u8]) -> Vec<u8> {
    let length = u32::try_from(content.len()).unwrap().to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), content].concat()
}

/// A header as RFC 7541, 6.2.2 has it: literal, not to be remembered.
fn header(name: &str, value: &str) -> Vec<u8> {
    let short = |text: &str| vec![u8::try_from(text.len()).unwrap()];
    [&[0][..], &short(name), name.as_bytes(), &short(value), value.as_bytes()].concat()
}

/// `:status: 200`, from the table that all have.
const OK: u8 = 0x88;

/// What an agent does once it has been asked.
#[derive(Clone)]
enum Plan {
    /// Says these bytes, then no more.
    Say(Vec<u8>),
    /// Says the first, then the second again and again.
    Repeat(Vec<u8>, Vec<u8>),
}

/// An agent with a plan; and how many bytes it got rid of.
async fn agent(plan: Plan) -> (SendRequest<Body>, Arc<AtomicU64>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let said = Arc::new(AtomicU64::new(0));
    let count = said.clone();
    tokio::spawn(async move {
        let (mut reading, mut writing) = theirs.into_split();
        writing.write_all(&frame(SETTINGS, 0, 0, &[])).await.unwrap();
        // The preface has 24 bytes; then come frames, the request's headers among them.
        reading.read_exact(&mut [0; 24]).await.unwrap();
        loop {
            let mut head = [0; 9];
            if reading.read_exact(&mut head).await.is_err() {
                return;
            }
            let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
            let mut content = vec![0; usize::try_from(length).unwrap()];
            reading.read_exact(&mut content).await.unwrap();
            if head[3] == HEADERS_FRAME {
                break;
            }
        }
        let mut buffer = vec![0; 1 << 16];
        // It goes on reading, so that nobody is held up by that.
        tokio::spawn(async move { while reading.read(&mut buffer).await.is_ok_and(|n| n > 0) {} });
        let (mut words, again) = match plan {
            Plan::Say(words) => (words, None),
            Plan::Repeat(words, again) => (words, Some(again)),
        };
        loop {
            if writing.write_all(&words).await.is_err() {
                return;
            }
            count.fetch_add(u64::try_from(words.len()).unwrap(), Ordering::Relaxed);
            match &again {
                Some(again) => words.clone_from(again),
                None => return std::future::pending().await,
            }
        }
    });
    (speak_to(ours).await.unwrap(), said)
}

fn get() -> Request {
    Request::get("http://within/x")
        .version(axum::http::Version::HTTP_2)
        .body(Body::empty())
        .unwrap()
}

/// Asks with little patience.
async fn answer(plan: Plan) -> (Result<Response<Incoming>, ConnectError>, Arc<AtomicU64>) {
    let (mut requests, said) = agent(plan).await;
    let asked = ask(&mut requests, get(), Duration::from_millis(300));
    let answer = tokio::time::timeout(Duration::from_secs(20), asked).await;
    (answer.expect("it holds the daemon up"), said)
}

#[tokio::test]
async fn one_that_never_answers_is_given_up() {
    let (answer, _) = answer(Plan::Say(Vec::new())).await;
    assert_eq!(answer.unwrap_err().code, connectrpc::ErrorCode::DeadlineExceeded);
    // Nor does it help to take part otherwise.
    let (mut requests, _) = agent(Plan::Repeat(Vec::new(), frame(PING, 0, 0, b"12345678"))).await;
    let asked = ask(&mut requests, get(), Duration::from_millis(300)).await;
    assert!(asked.is_err());
}

#[tokio::test]
async fn one_that_takes_no_request_is_given_up() {
    // No stream may be open at a time (SETTINGS_MAX_CONCURRENT_STREAMS).
    let none = frame(SETTINGS, 0, 0, &[0, 3, 0, 0, 0, 0]);
    let (mut requests, _) = agent(Plan::Say(none)).await;
    for _ in 0..3 {
        let asked = ask(&mut requests, get(), Duration::from_millis(300));
        let answer = tokio::time::timeout(Duration::from_secs(20), asked).await;
        assert!(answer.expect("it holds the daemon up").is_err());
    }
    // A body that it does not take: its windows are what they are at first, 64 KiB.
    let (mut requests, _) = agent(Plan::Say(Vec::new())).await;
    let endless = futures::stream::repeat_with(|| Ok::<_, std::io::Error>(vec![0_u8; 1 << 16]));
    let put = Request::post("http://within/x").body(Body::from_stream(endless)).unwrap();
    let asked = ask(&mut requests, put, Duration::from_millis(300));
    let answer = tokio::time::timeout(Duration::from_secs(20), asked).await;
    let code = answer.expect("it holds the daemon up").unwrap_err().code;
    assert_eq!(code, connectrpc::ErrorCode::DeadlineExceeded);
}

#[tokio::test]
async fn a_slow_client_is_not_the_agents_fault() {
    let (mut requests, _) = agent(Plan::Say(Vec::new())).await;
    let piece = futures::stream::once(async {
        tokio::time::sleep(Duration::from_millis(900)).await;
        Ok::<_, std::io::Error>(vec![0_u8; 10])
    });
    let put = Request::post("http://within/x").body(Body::from_stream(piece)).unwrap();
    let begin = Instant::now();
    assert!(ask(&mut requests, put, Duration::from_millis(300)).await.is_err());
    assert!(begin.elapsed() > Duration::from_millis(1100), "{:?}", begin.elapsed());
}

#[tokio::test]
async fn headers_have_an_end() {
    let one = header("x-more", &"x".repeat(100));
    let first = [&[OK][..], &one].concat();
    // Without END_HEADERS, so that more must follow.
    let endless = Plan::Repeat(
        frame(HEADERS_FRAME, 0, 1, &first),
        frame(CONTINUATION, 0, 1, &one.repeat(100)),
    );
    let (ended, said) = answer(endless).await;
    assert!(ended.is_err());
    // What a socket holds included.
    assert!(said.load(Ordering::Relaxed) < 4 << 20, "{said:?}");
    let (ended, said) =
        answer(Plan::Repeat(frame(HEADERS_FRAME, 0, 1, &first), frame(CONTINUATION, 0, 1, &[])))
            .await;
    assert!(ended.is_err());
    assert!(said.load(Ordering::Relaxed) < 4 << 20, "{said:?}");
    // Whole, but more than is taken.
    let big = [&[OK][..], &one.repeat(150)].concat();
    let (refused, _) = answer(Plan::Say(frame(HEADERS_FRAME, 4, 1, &big))).await;
    assert!(refused.is_err());
}

#[tokio::test]
async fn what_lets_a_client_in_does_not_reach_the_agent() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (told, mut heard) = tokio::sync::mpsc::unbounded_channel();
    let service = hyper::service::service_fn(move |request: hyper::Request<Incoming>| {
        told.send((request.uri().clone(), request.headers().clone())).unwrap();
        async { Ok::<_, std::convert::Infallible>(Response::new(Body::empty())) }
    });
    let server = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
    tokio::spawn(server.serve_connection(TokioIo::new(theirs), service));
    let mut requests = speak_to(ours).await.unwrap();
    let request = Request::get("/files?path=a")
        .header("authorization", "Bearer secret")
        .header("Cookie", "a=secret")
        .header("proxy-authorization", "secret")
        .header("X-API-Key", "secret")
        .header("x-access-token", "secret")
        .header("connection", "keep-alive")
        .header("range", "bytes=1-2")
        .body(Body::empty())
        .unwrap();
    let request = for_the_agent(request, None).unwrap();
    ask(&mut requests, request, Duration::from_secs(20)).await.unwrap();
    let (uri, headers) = heard.recv().await.unwrap();
    assert_eq!(uri.path_and_query().unwrap(), "/files?path=a");
    assert_eq!(headers.get("range").unwrap(), "bytes=1-2");
    let secret: Vec<_> =
        headers.iter().filter(|(_, value)| value.as_bytes().ends_with(b"secret")).collect();
    assert!(secret.is_empty(), "{secret:?}");
    assert!(!headers.contains_key("connection"));
}

/// Pages that this process has in memory (`proc_pid_statm(5)`).
fn pages() -> u64 {
    let text = std::fs::read_to_string("/proc/self/statm").unwrap();
    text.split(' ').nth(1).unwrap().parse().unwrap()
}

#[tokio::test]
async fn an_endless_answer_waits_for_its_reader() {
    // This agent does not even keep to the window that it was given.
    let endless =
        Plan::Repeat(frame(HEADERS_FRAME, 4, 1, &[OK]), frame(DATA, 0, 1, &[7; 16 * 1024]));
    let (mut requests, said) = agent(endless).await;
    let before = pages();
    let answer = ask(&mut requests, get(), Duration::from_secs(20)).await.unwrap();
    let enough = 256 << 20;
    let begin = Instant::now();
    while said.load(Ordering::Relaxed) < enough && begin.elapsed() < Duration::from_secs(2) {
        tokio::task::yield_now().await;
    }
    let grown = pages().saturating_sub(before) * 4096;
    assert!(grown < 48 << 20, "{grown} bytes more after {said:?}");
    drop(answer);
}

#[tokio::test]
async fn what_is_no_answer_is_an_error() {
    for words in [
        b"HTTP/1.1 200 OK\r\n\r\n".to_vec(),
        vec![0xff; 1 << 16],
        frame(HEADERS_FRAME, 4, 1, &[0xff; 100]),
        frame(HEADERS_FRAME, 4, 1, &header(":status", "abc")),
        frame(HEADERS_FRAME, 4, 1, &[&[OK][..], &header("connection", "close")].concat()),
        frame(HEADERS_FRAME, 4, 2, &[OK]),
        frame(DATA, 1, 1, b"no headers"),
        frame(HEADERS_FRAME, 5, 1, &header("x", "no status")),
    ] {
        let (answer, _) = answer(Plan::Say(words.clone())).await;
        assert!(answer.is_err(), "{words:?} {answer:?}");
    }
}

#[test]
fn of_an_answer_only_what_is_about_it_is_passed_on() {
    let parts = |status: u16| {
        let response = Response::builder()
            .status(status)
            .header("content-type", "text/plain")
            .header("etag", "\"1\"")
            .header("location", "https://evil.example/")
            .header("set-cookie", "a=b")
            .header("clear-site-data", "\"*\"")
            .header("alt-svc", "h2=\"evil.example:443\"")
            .header("access-control-allow-origin", "*");
        response.body(()).unwrap().into_parts().0
    };
    for status in [200, 206, 304, 404, 500] {
        let mut parts = parts(status);
        from_the_agent(&mut parts).unwrap();
        let mut names: Vec<_> = parts.headers.keys().map(|name| name.as_str()).collect();
        names.sort_unstable();
        assert_eq!(names, ["content-type", "etag"], "{status}");
    }
    for status in [100, 101, 103, 301, 302, 307, 308] {
        from_the_agent(&mut parts(status)).unwrap_err();
    }
}
