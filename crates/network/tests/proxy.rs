//! The proxy from a sandbox's side: real sockets on loopback, real clients. Names are answered
//! by the tests; where ports below 1024 are needed, a test runs itself again in a network
//! namespace of its own.

use std::collections::HashMap;
use std::io::{self, BufRead, BufReader, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use denizen_network::{
    Class, Denial, Egress, EgressRules, Event, Limits, Looking, Resolve, Rule, Rules, Transfer, Why,
};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;
use tokio::time::Instant;

/// Answers from a list, and remembers the questions.
#[derive(Default)]
struct Names {
    answers: Mutex<HashMap<String, Vec<Vec<IpAddr>>>>,
    asked: Mutex<Vec<String>>,
}

impl Names {
    /// One answer after another; the last one stays.
    fn answer(&self, name: &str, answers: &[&[&str]]) {
        let answers = answers
            .iter()
            .map(|addresses| addresses.iter().map(|address| address.parse().unwrap()).collect());
        self.answers.lock().unwrap().insert(name.to_owned(), answers.collect());
    }
}

impl Resolve for Names {
    fn look_up<'a>(&'a self, name: &'a str) -> Looking<'a> {
        Box::pin(async move {
            self.asked.lock().unwrap().push(name.to_owned());
            let mut answers = self.answers.lock().unwrap();
            let answers = answers.get_mut(name).ok_or(io::ErrorKind::NotFound)?;
            Ok(if answers.len() > 1 { answers.remove(0) } else { answers[0].clone() })
        })
    }
}

struct Proxy {
    port: u16,
    names: Arc<Names>,
    events: Arc<Mutex<Vec<Event>>>,
    stop: Option<oneshot::Sender<()>>,
    served: tokio::task::JoinHandle<()>,
}

impl Proxy {
    async fn with_limits(rules: &[&str], limits: Limits) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (names, events) = (Arc::new(Names::default()), Arc::new(Mutex::new(Vec::new())));
        let rules: Rules = rules.iter().map(|rule| rule.parse::<Rule>().unwrap()).collect();
        let told = events.clone();
        let on_event = move |event| told.lock().unwrap().push(event);
        let egress = Egress::with_limits(rules, names.clone(), on_event, limits);
        let (stop, stopped) = oneshot::channel::<()>();
        let served = tokio::spawn(async move {
            let stopped = async { drop(stopped.await) };
            egress.serve(listener, stopped).await.unwrap();
        });
        Self { port, names, events, stop: Some(stop), served }
    }

    async fn new(rules: &[&str]) -> Self {
        Self::with_limits(rules, Limits::default()).await
    }

    async fn connect(&self) -> TcpStream {
        TcpStream::connect(("127.0.0.1", self.port)).await.unwrap()
    }

    /// Sends bytes and reads until the proxy closes or the text `until` is there.
    async fn say(&self, bytes: &str, until: &str) -> String {
        let mut stream = self.connect().await;
        stream.write_all(bytes.as_bytes()).await.unwrap();
        read(&mut stream, until).await
    }

    /// What was refused since the last question.
    fn denials(&self) -> Vec<Denial> {
        let events = std::mem::take(&mut *self.events.lock().unwrap());
        let denials = events.into_iter().filter_map(|event| match event {
            Event::Denied(denial) => Some(denial),
            _ => None,
        });
        denials.collect()
    }

    /// The first connection that is over; waits for it.
    async fn closed(&self) -> Transfer {
        loop {
            for event in &*self.events.lock().unwrap() {
                if let Event::Closed(transfer) = event {
                    return transfer.clone();
                }
            }
            tokio::task::yield_now().await;
        }
    }
}

/// Reads until `until` is there; if it is empty, until the end.
async fn read(stream: &mut TcpStream, until: &str) -> String {
    let mut got = Vec::new();
    loop {
        let text = String::from_utf8_lossy(&got).into_owned();
        if !until.is_empty() && text.contains(until) {
            return text;
        }
        // A reset is an end as well.
        if matches!(stream.read_buf(&mut got).await, Ok(0) | Err(_)) {
            return text;
        }
    }
}

/// A server that answers each request with the request, as often as it is asked.
async fn mirror(address: &str) -> u16 {
    let listener = TcpListener::bind(address).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut got = Vec::new();
                while !got.windows(4).any(|piece| piece == b"\r\n\r\n") {
                    if stream.read_buf(&mut got).await.unwrap_or(0) == 0 {
                        return;
                    }
                }
                let text = String::from_utf8_lossy(&got).to_ascii_lowercase();
                let length = text
                    .split("content-length: ")
                    .nth(1)
                    .and_then(|text| text.split("\r\n").next().unwrap().parse::<usize>().ok());
                let head = text.find("\r\n\r\n").unwrap() + 4;
                let done = |got: &[u8]| match length {
                    Some(length) => got.len() >= head + length,
                    None if text.contains("transfer-encoding") => got.ends_with(b"0\r\n\r\n"),
                    None => true,
                };
                while !done(&got) {
                    if stream.read_buf(&mut got).await.unwrap_or(0) == 0 {
                        return;
                    }
                }
                let head = format!(
                    "HTTP/1.1 200 OK\r\nKeep-Alive: timeout=5\r\nConnection: X-Secret\r\n\
                     X-Secret: 1\r\nX-Kept: 1\r\nContent-Length: {}\r\n\r\n",
                    got.len()
                );
                let _ = stream.write_all(&[head.as_bytes(), &got].concat()).await;
            });
        }
    });
    port
}

fn get(target: &str) -> String {
    let authority = target.strip_prefix("http://").unwrap().split('/').next().unwrap();
    format!("GET {target} HTTP/1.1\r\nHost: {authority}\r\nConnection: close\r\n\r\n")
}

fn connect(target: &str) -> String {
    format!("CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n")
}

/// Runs a program; gives its success and all its output.
async fn run(program: &str, args: &[&str]) -> (bool, String) {
    let mut command = Command::new(program);
    command.args(args).stdin(Stdio::null()).env_clear().env("PATH", std::env::var("PATH").unwrap());
    let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
    let text = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8_lossy(&text).into_owned())
}

/// True within a network namespace of the test's own; elsewhere runs the test in one.
fn alone(test: &str) -> bool {
    if std::env::var_os("DENIZEN_TEST_ALONE").is_some() {
        return true;
    }
    let status = Command::new("unshare")
        .args(["--user", "--map-root-user", "--net", "sh", "-c"])
        .arg("ip link set lo up && exec \"$0\" --exact \"$1\" --nocapture")
        .arg(std::env::current_exe().unwrap())
        .arg(test)
        .env("DENIZEN_TEST_ALONE", "1")
        .status()
        .unwrap();
    assert!(status.success());
    false
}

#[tokio::test(flavor = "multi_thread")]
async fn curl_reaches_what_is_open_and_nothing_else() {
    let port = mirror("127.0.0.1:0").await;
    let site = format!("site.test:{port}");
    let proxy = Proxy::new(&[&site, "127.0.0.0/8"]).await;
    proxy.names.answer("site.test", &[&["127.0.0.1"]]);
    let through = format!("http://127.0.0.1:{}", proxy.port);
    let curl = async |args: &[&str]| {
        run("curl", &[&["-sS", "-i", "--noproxy", "", "-x", &through], args].concat()).await
    };

    let url = format!("http://{site}/file?x=1");
    let (ok, text) = curl(&[&url]).await;
    assert!(ok && text.contains("\r\n\r\nGET /file?x=1 HTTP/1.1\r\n"), "{text}");
    let closed = proxy.closed().await;
    assert_eq!((closed.host.as_str(), closed.port), ("site.test", port));
    assert_eq!(closed.address, "127.0.0.1".parse::<IpAddr>().unwrap());
    assert!(closed.sent > 50 && closed.received > closed.sent, "{closed:?}");

    let (ok, text) = curl(&["-p", &url]).await;
    assert!(ok && text.contains("\r\n\r\nGET /file?x=1 HTTP/1.1\r\n"), "{text}");

    let (ok, text) = curl(&["-d", "a body", &url]).await;
    assert!(ok && text.ends_with("\r\n\r\na body"), "{text}");
    let chunked = "Transfer-Encoding: chunked";
    let (ok, text) = curl(&["-d", "a body", "-H", chunked, &url]).await;
    assert!(ok && text.ends_with("6\r\na body\r\n0\r\n\r\n"), "{text}");
    let (ok, text) = curl(&["-d", "a body", "-H", "Expect: 100-continue", &url]).await;
    assert!(ok && text.ends_with("\r\n\r\na body"), "{text}");

    assert_eq!(proxy.denials(), []);
    let (ok, text) = curl(&["http://other.test/"]).await;
    assert!(ok && text.starts_with("HTTP/1.1 403 "), "{text}");
    assert!(text.contains("x-denizen-denied: not in the allow-list\r\n"), "{text}");
    assert!(text.ends_with("\r\n\r\nother.test:80 was refused: not in the allow-list\n"), "{text}");
    let (ok, text) = curl(&["https://other.test/"]).await;
    assert!(!ok && text.contains("HTTP/1.1 403 "), "{text}");
    let denied =
        |port| Denial { host: "other.test".to_owned(), port, address: None, rule: Why::NotListed };
    assert_eq!(proxy.denials(), [denied(80), denied(443)]);
    assert!(!proxy.names.asked.lock().unwrap().contains(&"other.test".to_owned()));
}

/// Every way around that we know of, against rules that are as open as they can be without
/// naming an address, and against one domain's.
#[tokio::test]
async fn no_spelling_gets_around() {
    let port = mirror("127.0.0.1:0").await;
    for rules in [&["good.test", "*.good.test"][..], &["*"]] {
        let proxy = Proxy::new(rules).await;
        for host in [
            "127.0.0.1",
            "127.1",
            "127.0.1",
            "127.00.0.1",
            "0177.0.0.1",
            "2130706433",
            "017700000001",
            "0x7f000001",
            "0x7f.1",
            "0X7F.0.0.1",
            "127.0.0.1.",
            "127.0.0.0x1",
            "0",
            "0.0.0.0",
            "169.254.169.254",
            "2852039166",
            "0xa9fea9fe",
            "10.0.0.1",
            "192.168.0.1",
            "172.16.0.1",
            "100.64.0.1",
            "255.255.255.255",
            "224.0.0.1",
            "[::1]",
            "[::]",
            "[0:0:0:0:0:0:0:1]",
            "[::ffff:127.0.0.1]",
            "[::ffff:7f00:1]",
            "[::127.0.0.1]",
            "[64:ff9b::7f00:1]",
            "[2002:7f00:1::]",
            "[fe80::1]",
            "[fe80::1%25lo]",
            "[fe80::1%lo]",
            "[fd00::1]",
            "[127.0.0.1]",
            "::1",
            "good.test@127.0.0.1",
            "127.0.0.1@good.test",
            "good.test%00.evil.example",
            "good%2etest",
            "good.test%20",
            "good.test#.evil.example",
            "good.test/.evil.example",
            "good.test\\.evil.example",
            "good.test\t",
            "good.test\x0b",
            "good.test,evil.example",
            "good..test",
            ".good.test",
            "good.test..",
            "g\u{f6}od.test",
            "\u{ff11}27.0.0.1",
            "127\u{3002}0\u{3002}0\u{3002}1",
            "",
        ] {
            let name = host.starts_with("good.test/") || host.starts_with("good.test#");
            let mut requests = vec![connect(&format!("{host}:{port}")), connect(host)];
            if !name {
                requests.push(format!(
                    "GET http://{host}:{port}/ HTTP/1.1\r\nHost: {host}:{port}\r\n\r\n"
                ));
            }
            for request in requests {
                let text = proxy.say(&request, "\r\n\r\n").await;
                let denied = text.starts_with("HTTP/1.1 403 ") || text.starts_with("HTTP/1.1 400 ");
                assert!(denied, "{rules:?} {request:?}: {text:?}");
                tokio::task::yield_now().await;
            }
        }
        assert_eq!(*proxy.names.asked.lock().unwrap(), [""; 0]);
        let denials = proxy.denials();
        assert!(denials.len() > 120, "{}", denials.len());
        // All of a spelled-out address were told with it.
        let own = denials.iter().filter(|denial| denial.rule == Why::Class(Class::Loopback));
        assert!(own.count() >= 2);
    }
}

#[tokio::test]
async fn every_answer_is_checked_and_used_as_checked() {
    let port = mirror("127.0.0.1:0").await;
    let proxy = Proxy::new(&[&format!("good.test:{port}"), "127.0.0.1"]).await;
    for answers in [
        &["127.0.0.2"][..],
        &["127.0.0.1", "127.0.0.2"],
        &["1.1.1.1", "169.254.169.254"],
        &["::ffff:127.0.0.3"],
        &["64:ff9b::7f00:1"],
        &["127.0.0.1", "::1"],
    ] {
        proxy.names.answer("good.test", &[answers]);
        for request in
            [get(&format!("http://good.test:{port}/")), connect(&format!("good.test:{port}"))]
        {
            let text = proxy.say(&request, "\r\n\r\n").await;
            assert!(text.starts_with("HTTP/1.1 403 "), "{answers:?}: {text}");
            let denials = proxy.denials();
            assert!(matches!(denials[0].rule, Why::Class(_)), "{denials:?}");
            assert_eq!(
                denials[0].address,
                Some(answers.last().unwrap().parse::<IpAddr>().unwrap().to_canonical())
            );
        }
    }
    // Who changes the answer after the check finds nobody asking again.
    proxy.names.asked.lock().unwrap().clear();
    proxy.names.answer("good.test", &[&["127.0.0.1"], &["127.0.0.2"]]);
    let text = proxy.say(&get(&format!("http://good.test:{port}/")), "").await;
    assert!(text.starts_with("HTTP/1.1 200 "), "{text}");
    assert_eq!(proxy.names.asked.lock().unwrap().len(), 1);
    let text = proxy.say(&get(&format!("http://good.test:{port}/")), "").await;
    assert!(text.starts_with("HTTP/1.1 403 "), "{text}");

    // Nothing found, nothing there.
    proxy.names.answer("good.test", &[&[]]);
    let text = proxy.say(&get(&format!("http://good.test:{port}/")), "").await;
    assert!(text.starts_with("HTTP/1.1 502 "), "{text}");
    proxy.names.answers.lock().unwrap().clear();
    let text = proxy.say(&get(&format!("http://good.test:{port}/")), "").await;
    assert!(text.starts_with("HTTP/1.1 502 "), "{text}");
}

#[tokio::test]
async fn every_request_of_a_connection_is_checked() {
    let port = mirror("127.0.0.1:0").await;
    let proxy = Proxy::new(&[&format!("good.test:{port}"), "127.0.0.1"]).await;
    proxy.names.answer("good.test", &[&["127.0.0.1"]]);
    let mut stream = proxy.connect().await;
    let request = |host: &str| {
        format!("GET http://{host}:{port}/{host} HTTP/1.1\r\nHost: {host}:{port}\r\n\r\n")
    };
    for _ in 0..3 {
        stream.write_all(request("good.test").as_bytes()).await.unwrap();
        let text = read(&mut stream, "GET /good.test HTTP/1.1").await;
        assert!(text.starts_with("HTTP/1.1 200 "), "{text}");
        // The mirrored head has its own end.
        if !text.ends_with("\r\n\r\n") {
            read(&mut stream, "\r\n\r\n").await;
        }
        stream.write_all(request("evil.test").as_bytes()).await.unwrap();
        let text = read(&mut stream, "allow-list\n").await;
        assert!(text.starts_with("HTTP/1.1 403 "), "{text}");
    }
    // Two in one piece.
    let both = [request("good.test"), request("evil.test")].concat();
    stream.write_all(both.as_bytes()).await.unwrap();
    let text = read(&mut stream, "allow-list\n").await;
    assert!(text.contains("HTTP/1.1 200 ") && text.contains("HTTP/1.1 403 "), "{text}");
    assert_eq!(*proxy.names.asked.lock().unwrap(), ["good.test"; 4]);

    // A tunnel that is refused, or a body of unknown length, is the last on its connection.
    let after = request("good.test");
    let text = proxy.say(&[connect("evil.test:443"), after.clone()].concat(), "").await;
    assert!(text.contains("connection: close") && !text.contains(" 200 "), "{text}");
    let chunked = format!(
        "POST http://good.test:{port}/ HTTP/1.1\r\nHost: good.test:{port}\r\n\
         Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n{after}"
    );
    let text = proxy.say(&chunked, "").await;
    assert!(text.contains("connection: close"), "{text}");
    assert_eq!(text.matches("HTTP/1.1 200 OK").count(), 1, "{text}");
}

#[tokio::test]
async fn what_is_between_two_does_not_go_on() {
    let port = mirror("127.0.0.1:0").await;
    let proxy = Proxy::new(&[&format!("good.test:{port}"), "127.0.0.1"]).await;
    proxy.names.answer("good.test", &[&["127.0.0.1"]]);
    let text = proxy
        .say(
            &format!(
                "GET http://GOOD.test.:{port}?x HTTP/1.1\r\nHost: good.TEST:{port}\r\n\
                 Proxy-Authorization: Basic c2VjcmV0\r\nProxy-Connection: keep-alive\r\n\
                 Keep-Alive: 1\r\nTE: trailers\r\nUpgrade: h2c\r\nX-Mine: 1\r\nX-Kept: 2\r\n\
                 Connection: close, X-Mine, Content-Length\r\n\r\n"
            ),
            "",
        )
        .await;
    let (head, mirrored) = text.split_once("\r\n\r\n").unwrap();
    assert!(head.contains("x-kept: 1") && !head.to_lowercase().contains("x-secret"), "{head}");
    assert!(!head.to_lowercase().contains("keep-alive"), "{head}");
    let mirrored = mirrored.to_lowercase();
    assert!(mirrored.starts_with("get /?x http/1.1\r\n"), "{mirrored}");
    assert!(mirrored.contains(&format!("host: good.test:{port}\r\n")), "{mirrored}");
    assert!(mirrored.contains("x-kept: 2"), "{mirrored}");
    for gone in ["proxy-", "keep-alive", "te: ", "upgrade", "x-mine", "secret"] {
        assert!(!mirrored.contains(gone), "{gone}: {mirrored}");
    }
}

#[tokio::test]
async fn requests_that_say_two_things_are_refused() {
    let port = mirror("127.0.0.1:0").await;
    let proxy = Proxy::new(&[&format!("good.test:{port}"), "127.0.0.1", "*"]).await;
    proxy.names.answer("good.test", &[&["127.0.0.1"]]);
    let url = format!("http://good.test:{port}/");
    let host = format!("Connection: close\r\nHost: good.test:{port}");
    for (request, why) in [
        (
            format!("GET {url} HTTP/1.1\r\nConnection: close\r\nHost: evil.test\r\n\r\n"),
            "the Host header",
        ),
        (
            format!("GET {url} HTTP/1.1\r\nConnection: close\r\nHost: good.test\r\n\r\n"),
            "the Host header",
        ),
        (
            format!("GET {url} HTTP/1.1\r\nConnection: close\r\nHost: good.test:{port}.\r\n\r\n"),
            "the Host header",
        ),
        (format!("GET {url} HTTP/1.1\r\nConnection: close\r\nHost:\r\n\r\n"), "the Host header"),
        (format!("GET {url} HTTP/1.1\r\nConnection: close\r\n\r\n"), "the Host header"),
        (format!("GET {url} HTTP/1.1\r\n{host}\r\n{host}\r\n\r\n"), "malformed"),
        (format!("GET / HTTP/1.1\r\n{host}\r\n\r\n"), "a proxy takes"),
        (format!("GET https://good.test:{port}/ HTTP/1.1\r\n{host}\r\n\r\n"), "a proxy takes"),
        (format!("GET ftp://good.test:{port}/ HTTP/1.1\r\n{host}\r\n\r\n"), "a proxy takes"),
        (
            format!(
                "POST {url} HTTP/1.1\r\n{host}\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n"
            ),
            "both a Content-Length and a Transfer-Encoding",
        ),
        (
            format!(
                "POST {url} HTTP/1.1\r\n{host}\r\nTransfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n"
            ),
            "both a Content-Length and a Transfer-Encoding",
        ),
        (format!("GET {url} HTTP/1.1\n{host}\n\n"), "a line does not end"),
        (format!("GET {url} HTTP/1.1\r\n{host}\r\nA: {}\r\n\r\n", "a".repeat(9000)), "too long"),
    ] {
        let text = proxy.say(&request, "").await;
        assert!(text.starts_with("HTTP/1.1 40") && text.contains(why), "{request:?}: {text}");
        let denials = proxy.denials();
        assert_eq!(denials.len(), 1, "{request:?}: {denials:?}");
        assert!(denials[0].rule.to_string().contains(why), "{denials:?}");
    }
    assert_eq!(*proxy.names.asked.lock().unwrap(), [""; 0]);
    let text = proxy.say(&format!("GET {url} HTTP/1.0\r\n\r\n"), "").await;
    assert!(text.contains(" 200 "), "{text}");
}

#[tokio::test(start_paused = true)]
async fn who_is_slow_is_cut_off() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let silent = listener.local_addr().unwrap().port();
    let proxy = Proxy::new(&["127.0.0.1"]).await;
    let limits = Limits::default();

    for head in ["", "GET http://127.0.0.1/ HTTP/1.1\r\nHost: 127.0.0.1\r\nA: b"] {
        let (mut stream, begin) = (proxy.connect().await, Instant::now());
        stream.write_all(head.as_bytes()).await.unwrap();
        assert_eq!(read(&mut stream, "").await, "");
        let took = begin.elapsed();
        assert!(took >= limits.head && took < limits.head + Duration::from_secs(5), "{took:?}");
    }
    // A byte now and then does not help.
    let (mut stream, begin) = (proxy.connect().await, Instant::now());
    while stream.write_all(b"G").await.is_ok() {
        tokio::time::sleep(Duration::from_secs(4)).await;
        assert!(begin.elapsed() < limits.head * 2);
    }

    // A tunnel where nothing happens ends, and one where something does goes on.
    let request = connect(&format!("127.0.0.1:{silent}"));
    let (mut stream, begin) = (proxy.connect().await, Instant::now());
    stream.write_all(request.as_bytes()).await.unwrap();
    assert!(read(&mut stream, "\r\n\r\n").await.contains(" 200 "));
    let (mut server, _) = listener.accept().await.unwrap();
    for _ in 0..5 {
        tokio::time::sleep(limits.idle * 9 / 10).await;
        server.write_all(b"x").await.unwrap();
        assert_eq!(stream.read_u8().await.unwrap(), b'x');
    }
    assert_eq!(read(&mut stream, "").await, "");
    assert!(begin.elapsed() > limits.idle * 5 && begin.elapsed() < limits.idle * 8);
    assert_eq!(server.read(&mut [0; 8]).await.unwrap(), 0);
    assert_eq!(proxy.closed().await.received, 5);

    // A server that never answers holds nobody for ever.
    let request = get(&format!("http://127.0.0.1:{silent}/"));
    let begin = Instant::now();
    assert_eq!(proxy.say(&request, "").await, "");
    assert!(begin.elapsed() <= limits.idle * 2);
}

#[tokio::test]
async fn connections_are_counted_and_end_with_the_proxy() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let limits = Limits { connections: 2, ..Limits::default() };
    let mut proxy = Proxy::with_limits(&["127.0.0.1"], limits).await;
    let mut tunnels = Vec::new();
    for _ in 0..2 {
        let mut stream = proxy.connect().await;
        let request = connect(&format!("127.0.0.1:{port}"));
        stream.write_all(request.as_bytes()).await.unwrap();
        assert!(read(&mut stream, "\r\n\r\n").await.starts_with("HTTP/1.1 200 "));
        tunnels.push((stream, listener.accept().await.unwrap().0));
    }
    let mut third = proxy.connect().await;
    let text = read(&mut third, "").await;
    assert!(text.starts_with("HTTP/1.1 503 ") && text.contains("too many connections"), "{text}");
    assert_eq!(proxy.denials()[0].rule, Why::TooMany);

    // One direction may end before the other.
    let (mut client, mut server) = tunnels.pop().unwrap();
    client.write_all(b"hello").await.unwrap();
    client.shutdown().await.unwrap();
    assert_eq!(read(&mut server, "").await, "hello");
    server.write_all(b"good bye").await.unwrap();
    drop(server);
    assert_eq!(read(&mut client, "").await, "good bye");
    let closed = proxy.closed().await;
    assert_eq!((closed.sent, closed.received), (5, 8));
    drop(client);
    let text = loop {
        let text = proxy.say(&get("http://evil.test/"), "").await;
        if !text.contains(" 503 ") {
            break text;
        }
    };
    assert!(text.contains(" 403 "), "{text}");

    proxy.stop.take().unwrap().send(()).unwrap();
    (&mut proxy.served).await.unwrap();
    let (mut client, mut server) = tunnels.pop().unwrap();
    assert_eq!(read(&mut client, "").await, "");
    assert_eq!(read(&mut server, "").await, "");
    assert!(TcpStream::connect(("127.0.0.1", proxy.port)).await.is_err());
}

#[tokio::test]
async fn an_address_of_the_hosts_own_is_not_public() {
    if !alone("an_address_of_the_hosts_own_is_not_public") {
        return;
    }
    let added = run("ip", &["addr", "add", "8.8.8.8/32", "dev", "lo"]).await;
    assert!(added.0, "{added:?}");
    let port = mirror("8.8.8.8:0").await;
    for (rules, open) in [(&["*"][..], false), (&["*", "8.8.8.8"], true)] {
        let proxy = Proxy::new(rules).await;
        proxy.names.answer("good.test", &[&["8.8.8.8"]]);
        for host in ["good.test", "8.8.8.8"] {
            let target = format!("{host}:{port}");
            for request in [connect(&target), get(&format!("http://{target}/"))] {
                let text = proxy.say(&request, "\r\n\r\n").await;
                assert_eq!(text.starts_with("HTTP/1.1 200 "), open, "{rules:?} {request}: {text}");
                assert_eq!(text.starts_with("HTTP/1.1 403 "), !open, "{rules:?} {request}: {text}");
            }
        }
        let own = |denial: &Denial| denial.rule == Why::Class(Class::ThisHost);
        assert_eq!(
            proxy.denials().iter().filter(|denial| own(denial)).count(),
            4 * usize::from(!open)
        );
    }
}

/// Makes a listener in its namespace, sends it away and runs a program.
const WITHIN: &str = r#"
import array, os, socket, subprocess, sys
subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
listener = socket.create_server(("127.0.0.1", 3128))
door = socket.socket(socket.AF_UNIX)
door.connect(sys.argv[1])
door.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [listener.fileno()]))])
listener.close()
os.execvp("sh", ["sh", "-c", sys.argv[2]])
"#;

fn receive(listener: &UnixListener) -> OwnedFd {
    let (stream, _) = listener.accept().unwrap();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    recvmsg(&stream, &mut [IoSliceMut::new(&mut byte)], &mut ancillary, RecvFlags::empty())
        .unwrap();
    ancillary
        .drain()
        .find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut files) => files.next(),
            _ => None,
        })
        .unwrap()
}

/// As a sandbox has it: a namespace with nothing but loopback, and the proxy as the only door.
#[tokio::test(flavor = "multi_thread")]
async fn a_namespace_has_no_way_out_but_the_proxy() {
    if !alone("a_namespace_has_no_way_out_but_the_proxy") {
        return;
    }
    let port = mirror("127.0.0.1:0").await;
    let folder = tempfile::tempdir().unwrap();
    let door = folder.path().join("door");
    let listener = UnixListener::bind(&door).unwrap();
    let curl = format!("curl -sS --max-time 20 http://good.test:{port}/");
    let script = format!(
        "{curl}\nexport http_proxy=http://127.0.0.1:3128\n{curl}\necho ready; read go\n{curl}"
    );
    let mut child = Command::new("unshare")
        .args(["--net", "python3", "-c", WITHIN])
        .arg(&door)
        .arg(script)
        .env_remove("http_proxy")
        .env_remove("all_proxy")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let listener = tokio::task::spawn_blocking(move || receive(&listener)).await.unwrap();
    let listener = std::net::TcpListener::from(listener);
    listener.set_nonblocking(true).unwrap();
    let listener = TcpListener::from_std(listener).unwrap();
    let names = Arc::new(Names::default());
    names.answer("good.test", &[&["127.0.0.1"]]);
    let rules: Rules = [format!("good.test:{port}"), "127.0.0.1".into()]
        .iter()
        .map(|it| it.parse::<Rule>().unwrap())
        .collect();
    let egress = Egress::new(rules, names, |_| {});
    let serving = tokio::spawn(async move { egress.serve(listener, std::future::pending()).await });

    let mut input = child.stdin.take().unwrap();
    let mut output = BufReader::new(child.stdout.take().unwrap());
    let before = tokio::task::spawn_blocking(move || {
        let mut before = String::new();
        while !before.ends_with("ready\n") && output.read_line(&mut before).unwrap() > 0 {}
        (before, output)
    });
    let (before, mut output) = before.await.unwrap();
    // Without the proxy everything is closed.
    serving.abort();
    assert!(serving.await.unwrap_err().is_cancelled());
    let after = tokio::task::spawn_blocking(move || {
        input.write_all(b"go\n").unwrap();
        drop(input);
        let mut after = String::new();
        output.read_to_string(&mut after).unwrap();
        let mut errors = String::new();
        child.stderr.take().unwrap().read_to_string(&mut errors).unwrap();
        child.wait().unwrap();
        (after, errors)
    });
    let (after, errors) = after.await.unwrap();
    assert!(before.starts_with("GET / HTTP/1.1\r\n"), "{before}\n{errors}");
    assert_eq!(before.matches("GET / ").count(), 1, "{before}");
    assert_eq!(after, "", "{errors}");
    assert!(errors.contains("curl: (6)") && errors.contains("curl: (7)"), "{errors}");
}

/// A certificate for `good.test` and a server that has it, at 127.0.0.1:443.
struct TlsServer(std::process::Child);

impl TlsServer {
    async fn start(folder: &Path) -> Self {
        let (key, certificate) = (folder.join("key"), folder.join("certificate"));
        let (key, certificate) = (key.to_str().unwrap(), certificate.to_str().unwrap());
        let (ok, text) = run(
            "openssl",
            &[
                "req",
                "-x509",
                "-newkey",
                "ec",
                "-pkeyopt",
                "ec_paramgen_curve:P-256",
                "-nodes",
                "-days",
                "2",
                "-subj",
                "/CN=good.test",
                "-addext",
                "subjectAltName=DNS:good.test",
                "-keyout",
                key,
                "-out",
                certificate,
            ],
        )
        .await;
        assert!(ok, "{text}");
        let server = Command::new("openssl")
            .args(["s_server", "-accept", "127.0.0.1:443", "-www", "-quiet", "-key", key, "-cert"])
            .arg(certificate)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        while TcpStream::connect("127.0.0.1:443").await.is_err() {
            tokio::task::yield_now().await;
        }
        Self(server)
    }
}

impl Drop for TlsServer {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tunnel_is_for_the_server_it_was_made_to() {
    if !alone("a_tunnel_is_for_the_server_it_was_made_to") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let _server = TlsServer::start(folder.path()).await;
    let certificate = folder.path().join("certificate");
    let proxy = Proxy::new(&["good.test", "127.0.0.1"]).await;
    proxy.names.answer("good.test", &[&["127.0.0.1"]]);
    let through = format!("127.0.0.1:{}", proxy.port);

    let curl = ["-sS", "-x", &through, "--cacert", certificate.to_str().unwrap()];
    let (ok, text) = run("curl", &[&curl[..], &["https://good.test/"]].concat()).await;
    assert!(ok && text.contains("Ciphers supported in s_server"), "{text}");
    assert_eq!(proxy.denials(), []);

    let client = async |args: &[&str]| {
        let to = ["s_client", "-proxy", &through, "-connect", "good.test:443"];
        run("openssl", &[&to[..], args].concat()).await
    };
    for args in [&["-servername", "GOOD.test"][..], &["-tls1_2", "-servername", "good.test"]] {
        let (ok, text) = client(args).await;
        assert!(ok && text.contains("CN = good.test"), "{args:?}: {text}");
    }
    assert_eq!(proxy.denials(), []);
    let other = |name: &str| Why::OtherServer(name.to_owned());
    for (args, rule) in [
        (&["-servername", "evil.test"][..], other("evil.test")),
        (&["-servername", "www.good.test"], other("www.good.test")),
        (&["-servername", "127.0.0.1"], other("127.0.0.1")),
        (&["-tls1_2", "-servername", "evil.test"], other("evil.test")),
        (&["-noservername"], Why::Handshake("it names no server")),
    ] {
        let (ok, text) = client(args).await;
        assert!(!ok && text.contains("alert access denied"), "{args:?}: {text}");
        let denials = proxy.denials();
        assert_eq!(denials.len(), 1, "{args:?}: {denials:?}");
        assert_eq!((&denials[0].rule, denials[0].port), (&rule, 443));
    }
    // An address has no name to ask for.
    let to = ["s_client", "-proxy", &through, "-connect", "127.0.0.1:443", "-noservername"];
    let (ok, text) = run("openssl", &to).await;
    assert!(ok && text.contains("CN = good.test"), "{text}");
}

#[tokio::test(start_paused = true)]
async fn a_tunnel_to_443_begins_with_tls() {
    if !alone("a_tunnel_to_443_begins_with_tls") {
        return;
    }
    let listener = TcpListener::bind("127.0.0.1:443").await.unwrap();
    let proxy = Proxy::new(&["good.test", "127.0.0.1"]).await;
    proxy.names.answer("good.test", &[&["127.0.0.1"]]);
    for (first, why) in [
        ("", "it did not come in time"),
        ("\x16\x03\x01\x02\x00\x01", "it did not come in time"),
        ("SSH-2.0-x\r\n", "this is not TLS"),
        ("GET / HTTP/1.1\r\nHost: evil.test\r\n\r\n", "this is not TLS"),
    ] {
        for early in [false, true] {
            let mut stream = proxy.connect().await;
            let begin = Instant::now();
            let request = connect("good.test:443");
            if early {
                stream.write_all([&request, first].concat().as_bytes()).await.unwrap();
            } else {
                stream.write_all(request.as_bytes()).await.unwrap();
            }
            assert!(read(&mut stream, "\r\n\r\n").await.starts_with("HTTP/1.1 200 "));
            let (mut server, _) = listener.accept().await.unwrap();
            if !early {
                stream.write_all(first.as_bytes()).await.unwrap();
            }
            read(&mut stream, "").await;
            assert!(begin.elapsed() < Limits::default().hello + Duration::from_secs(5));
            assert_eq!(proxy.denials()[0].rule, Why::Handshake(why), "{first:?}");
            assert_eq!(server.read(&mut [0; 8]).await.unwrap(), 0, "{first:?} came through");
        }
    }
}

/// Rules of one sandbox hold from the moment on that they change, also for what is open.
#[tokio::test]
async fn what_the_sandboxes_own_rules_close_is_cut() {
    let outside = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = outside.local_addr().unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let proxy = listener.local_addr().unwrap();
    let (own, narrowed) = tokio::sync::watch::channel(EgressRules::default());
    let rules: Rules = [at.to_string().parse().unwrap()].into_iter().collect();
    let egress = Egress::new(rules, Arc::new(Names::default()), |_| {}).narrowed(narrowed);
    let served = tokio::spawn(async move { egress.serve(listener, std::future::pending()).await });
    let tunnel = async || {
        let mut client = TcpStream::connect(proxy).await.unwrap();
        let connect = format!("CONNECT {at} HTTP/1.1\r\nHost: {at}\r\n\r\n");
        client.write_all(connect.as_bytes()).await.unwrap();
        let answer = read(&mut client, "\r\n\r\n").await;
        (client, answer)
    };
    let (mut client, answer) = tunnel().await;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    let (mut server, _) = outside.accept().await.unwrap();
    // What changes nothing for it goes on.
    own.send_replace(EgressRules { allow: vec![Rule::public()], ..EgressRules::nothing() });
    client.write_all(b"hello").await.unwrap();
    assert_eq!(read(&mut server, "hello").await, "hello");
    own.send_replace(EgressRules::nothing());
    read(&mut client, "").await;
    read(&mut server, "").await;
    let (_, answer) = tunnel().await;
    assert!(answer.contains("403") && answer.contains("own rules"), "{answer}");
    own.send_replace(EgressRules::default());
    assert!(tunnel().await.1.starts_with("HTTP/1.1 200"));
    served.abort();
}
