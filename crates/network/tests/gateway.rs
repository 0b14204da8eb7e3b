//! A whole network for a sandbox: the test runs itself again in a network namespace, which
//! plays the host, and makes another within, which plays the sandbox and hands out its TUN
//! device.

use std::collections::HashMap;
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};

use denizen_network::{Class, Denial, Event, Gateway, Looking, Resolve, Rule, Rules, Why};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, UdpSocket};

struct Names(HashMap<&'static str, Vec<IpAddr>>);

impl Resolve for Names {
    fn look_up<'a>(&'a self, name: &'a str) -> Looking<'a> {
        Box::pin(async move { self.0.get(name).cloned().ok_or(io::ErrorKind::NotFound.into()) })
    }
}

/// Makes a TUN device in its namespace, sends it away and runs a program.
const WITHIN: &str = r#"
import array, fcntl, os, socket, struct, subprocess, sys
tun = os.open("/dev/net/tun", os.O_RDWR)
fcntl.ioctl(tun, 0x400454ca, struct.pack("16sH22x", b"tun0", 0x1001))
for line in ["link set lo up", "link set tun0 up mtu " + sys.argv[2],
             "addr add 10.0.2.15/24 dev tun0", "route add default via 10.0.2.2",
             "-6 addr add fd00::15/64 dev tun0 nodad", "-6 route add default via fd00::2"]:
    subprocess.run(["ip"] + line.split(), check=True)
door = socket.socket(socket.AF_UNIX)
door.connect(sys.argv[1])
door.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [tun]))])
os.close(tun)
os.execvp("sh", ["sh", "-c", sys.argv[3]])
"#;

/// A sandbox with a network by `rules`, in which a shell runs `script`; gives its output and
/// what was told.
async fn sandbox(rules: &[&str], names: Names, mtu: usize, script: &str) -> (String, Vec<Event>) {
    let folder = tempfile::tempdir().unwrap();
    let door = folder.path().join("door");
    let listener = UnixListener::bind(&door).unwrap();
    std::fs::write(folder.path().join("resolv.conf"), "nameserver 10.0.2.3\n").unwrap();
    let resolv = folder.path().join("resolv.conf");
    let script = format!("mount --bind {} /etc/resolv.conf\n{script}", resolv.display());
    let child = Command::new("unshare")
        .args(["--net", "--mount", "python3", "-c", WITHIN])
        .arg(&door)
        .arg(mtu.to_string())
        .arg(script)
        .env_remove("http_proxy")
        .env_remove("all_proxy")
        .env_remove("ALL_PROXY")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let tun = tokio::task::spawn_blocking(move || receive(&listener)).await.unwrap();

    let rules: Rules = rules.iter().map(|rule| rule.parse::<Rule>().unwrap()).collect();
    let events = Arc::new(Mutex::new(Vec::new()));
    let told = events.clone();
    let on_event = move |event| told.lock().unwrap().push(event);
    let gateway = Gateway::new(rules, Arc::new(names), on_event);
    let (end, ended) = tokio::sync::oneshot::channel();
    let serving =
        tokio::spawn(async move { gateway.serve(tun, async { drop(ended.await) }).await });
    let output = tokio::task::spawn_blocking(move || child.wait_with_output().unwrap());
    let output = output.await.unwrap();
    let _ = end.send(());
    // The device may have gone with the sandbox already.
    let _: Result<(), denizen_network::Error> = serving.await.unwrap();
    let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    let events = std::mem::take(&mut *events.lock().unwrap());
    (text, events)
}

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

/// True within a namespace of the test's own, with addresses that are the host's and some that
/// stand for others'; elsewhere runs the test in one.
fn alone(test: &str) -> bool {
    if std::env::var_os("DENIZEN_TEST_ALONE").is_some() {
        return true;
    }
    let status = Command::new("unshare")
        .args(["--user", "--map-root-user", "--net", "sh", "-ec"])
        .arg(
            "ip link set lo up\n\
             for address in 203.0.113.5 203.0.113.6 8.8.8.8; do\n\
             ip addr add $address/32 dev lo; done\n\
             ip -6 addr add 2001:db8::5/128 dev lo nodad\n\
             exec \"$0\" --exact \"$1\" --nocapture",
        )
        .arg(std::env::current_exe().unwrap())
        .arg(test)
        .env("DENIZEN_TEST_ALONE", "1")
        .status()
        .unwrap();
    assert!(status.success());
    false
}

/// A server of HTTP/1.0: `/size` gives so many bytes, and a POST tells how many it had.
async fn server(address: &str) -> u16 {
    let listener = TcpListener::bind(address).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut got = Vec::new();
                let head = loop {
                    if let Some(end) = got.windows(4).position(|piece| piece == b"\r\n\r\n") {
                        break end + 4;
                    }
                    if stream.read_buf(&mut got).await.unwrap_or(0) == 0 {
                        return;
                    }
                };
                let text = String::from_utf8_lossy(&got[..head]).into_owned();
                let number = |text: &str| {
                    let digits: String = text.chars().take_while(char::is_ascii_digit).collect();
                    digits.parse::<usize>().unwrap_or(0)
                };
                stream.write_all(b"HTTP/1.0 200 OK\r\n\r\n").await.unwrap();
                if let Some(length) = text.split("Content-Length: ").nth(1).map(number) {
                    let mut seen = got.len() - head;
                    while seen < length {
                        got.clear();
                        let read = stream.read_buf(&mut got).await.unwrap_or(0);
                        if read == 0 {
                            break;
                        }
                        seen += read;
                    }
                    let _ = stream.write_all(format!("had {seen}\n").as_bytes()).await;
                    return;
                }
                let mut left = number(text.split('/').nth(1).unwrap());
                if left == 0 {
                    let _ = stream.write_all(b"hello from outside\n").await;
                }
                let piece: Vec<u8> = (0..65_536_u32).map(|at| (at % 251) as u8).collect();
                while left > 0 {
                    let count = left.min(piece.len());
                    if stream.write_all(&piece[..count]).await.is_err() {
                        return;
                    }
                    left -= count;
                }
            });
        }
    });
    port
}

fn denials(events: &[Event]) -> Vec<Denial> {
    let denials = events.iter().filter_map(|event| match event {
        Event::Denied(denial) => Some(denial.clone()),
        _ => None,
    });
    denials.collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sandbox_has_a_network() {
    if !alone("a_sandbox_has_a_network") {
        return;
    }
    let port = server("203.0.113.5:0").await;
    let port6 = server("[2001:db8::5]:0").await;
    let echo = UdpSocket::bind("203.0.113.5:0").await.unwrap();
    let echo_port = echo.local_addr().unwrap().port();
    tokio::spawn(async move {
        let mut buffer = [0; 2000];
        while let Ok((length, from)) = echo.recv_from(&mut buffer).await {
            echo.send_to(&buffer[..length], from).await.unwrap();
        }
    });
    let names = HashMap::from([
        ("good.test", vec!["203.0.113.5".parse().unwrap(), "2001:db8::5".parse().unwrap()]),
        ("inside.test", vec!["203.0.113.6".parse().unwrap()]),
    ]);
    let script = format!(
        r#"
        curl="curl -sS --max-time 20"
        $curl http://203.0.113.5:{port}/
        $curl -4 http://good.test:{port}/
        $curl -g "http://[2001:db8::5]:{port6}/"
        $curl -6 http://good.test:{port6}/
        for round in 1 2 3 4; do $curl http://203.0.113.5:{port}/5000000 | sha256sum & done; wait
        head -c 5000000 /dev/zero | $curl -H Expect: --data-binary @- http://203.0.113.5:{port}/
        python3 - <<END
import socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.settimeout(10)
s.connect(("203.0.113.5", {echo_port}))
for length in (0, 1, 1200):
    s.send(b"d" * length)
    print("datagram", len(s.recv(2000)))
END
        echo "begin refused"
        $curl http://203.0.113.5:1/
        $curl http://inside.test:{port}/
        $curl http://nowhere.test/
        for to in 203.0.113.6 169.254.169.254 10.0.0.1 10.0.2.2 100.64.0.1 8.8.8.8; do
            $curl http://$to:{port}/
        done
        "#
    );
    let rules = ["*", "203.0.113.5", "[2001:db8::5]"];
    for mtu in [1500, 65_520] {
        let (text, events) = sandbox(&rules, Names(names.clone()), mtu, &script).await;
        let (open, refused) = text.split_once("begin refused\n").expect(&text);
        assert_eq!(open.matches("hello from outside\n").count(), 4, "{text}");
        let sums: Vec<_> = open.lines().filter(|line| line.ends_with("  -")).collect();
        assert!(sums.len() == 4 && sums.iter().all(|sum| *sum == sums[0]), "{text}");
        assert!(open.contains("had 5000000\n"), "{text}");
        assert!(open.ends_with("datagram 0\ndatagram 1\ndatagram 1200\n"), "{text}");

        // All at once, none by waiting.
        assert_eq!(refused.matches("curl: (7)").count(), 8, "{text}");
        assert_eq!(refused.matches("curl: (6)").count(), 1, "{text}");
        let denials = denials(&events);
        let mut told: Vec<_> =
            denials.iter().map(|denial| (denial.host.as_str(), denial.rule.clone())).collect();
        told.dedup();
        let class = |host, class| (host, Why::Class(class));
        let expected = [
            class("203.0.113.6", Class::Documentation),
            class("169.254.169.254", Class::Metadata),
            class("10.0.0.1", Class::Private),
            class("10.0.2.2", Class::Private),
            class("100.64.0.1", Class::Shared),
            class("8.8.8.8", Class::ThisHost),
        ];
        assert_eq!(told, expected);
        let closed = |event: &&Event| match event {
            Event::Closed(transfer) => transfer.received == 5_000_019,
            _ => false,
        };
        assert_eq!(events.iter().filter(closed).count(), 4, "{events:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn names_that_are_not_open_are_not_looked_up() {
    if !alone("names_that_are_not_open_are_not_looked_up") {
        return;
    }
    let port = server("203.0.113.5:0").await;
    let address = vec!["203.0.113.5".parse().unwrap()];
    let names = Names(HashMap::from([("good.test", address.clone()), ("evil.test", address)]));
    let script = format!("for host in good.test evil.test; do curl -sS http://$host:{port}/; done");
    let (text, events) = sandbox(&["good.test", "203.0.113.5"], names, 1500, &script).await;
    assert_eq!(text.matches("hello from outside\n").count(), 1, "{text}");
    assert!(text.contains("curl: (6)"), "{text}");
    let denied =
        Denial { host: "evil.test".to_owned(), port: 53, address: None, rule: Why::NotListed };
    assert_eq!(denials(&events), [denied]);
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_have_a_limit_and_make_room_again() {
    if !alone("connections_have_a_limit_and_make_room_again") {
        return;
    }
    let port = server("203.0.113.5:0").await;
    let script = format!(
        r#"
        python3 - <<END
import socket
for round in range(3):
    open, refused = [], 0
    for _ in range(300):
        try:
            open.append(socket.create_connection(("203.0.113.5", {port}), 10))
        except ConnectionRefusedError:
            refused += 1
    print(len(open), "open", refused, "refused")
    for one in open:
        one.sendall(b"GET /0 HTTP/1.0\r\n\r\n")
        with one.makefile("rb") as answer:
            assert answer.read().endswith(b"hello from outside\n")
        one.close()
END
        "#
    );
    let (text, events) = sandbox(&["203.0.113.5"], Names(HashMap::new()), 1500, &script).await;
    assert_eq!(text, "256 open 44 refused\n".repeat(3));
    let denials = denials(&events);
    assert!(!denials.is_empty() && denials.iter().all(|denial| denial.rule == Why::TooMany));
}

/// The device stands for a sandbox that writes whatever it likes.
#[tokio::test]
async fn no_packets_make_it_panic() {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut chance = move |end: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        usize::try_from(state % end as u64).unwrap()
    };
    let port = server("127.0.0.1:0").await;
    let (ours, theirs) = std::os::unix::net::UnixDatagram::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    let ours = tokio::net::UnixDatagram::from_std(ours).unwrap();
    let rules: Rules = [format!("127.0.0.1:{port}").parse::<Rule>().unwrap()].into_iter().collect();
    let gateway = Gateway::new(rules, Arc::new(Names(HashMap::new())), |_| {});
    let serving =
        tokio::spawn(async move { gateway.serve(theirs.into(), std::future::pending()).await });

    let sum = |bytes: &[u8]| {
        let words = bytes
            .chunks(2)
            .map(|pair| u32::from(pair[0]) << 8 | pair.get(1).copied().map_or(0, u32::from));
        let mut sum: u32 = words.sum();
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        !u16::try_from(sum).unwrap()
    };
    let mut buffer = [0; 65_536];
    let mut answers = 0;
    for round in 0..60_000 {
        // A TCP segment to the server, with sound sums so that it comes far, and random flags,
        // numbers, options and data.
        let data = chance(40);
        let mut packet =
            vec![0x45, 0, 0, 40 + u8::try_from(data).unwrap(), 0, 0, 0, 0, 64, 6, 0, 0];
        packet.extend_from_slice(&[10, 0, 2, 15, 127, 0, 0, 1]);
        packet.extend_from_slice(&(1 + u16::try_from(chance(4)).unwrap()).to_be_bytes());
        packet.extend_from_slice(&port.to_be_bytes());
        for _ in 0..8 {
            packet.push(u8::try_from(chance(256)).unwrap());
        }
        let words = if chance(2) == 0 { 5 } else { chance(16) };
        packet.push(u8::try_from(words << 4).unwrap());
        packet.push([2, 16, 17, 24, 4, u8::try_from(chance(64)).unwrap()][chance(6)]);
        packet.extend_from_slice(&[255, 255, 0, 0, 0, 0]);
        packet.extend((0..data).map(|_| u8::try_from(chance(256)).unwrap()));
        let check = sum(&packet[..20]);
        packet[10..12].copy_from_slice(&check.to_be_bytes());
        let segment = &packet[20..];
        let length = u8::try_from(segment.len()).unwrap();
        let pseudo = [&packet[12..20], &[0, 6, 0, length], segment].concat();
        let check = sum(&pseudo);
        packet[36..38].copy_from_slice(&check.to_be_bytes());
        // Now and then anything at all.
        for _ in 0..[0, 0, 0, 3][chance(4)] {
            let at = chance(packet.len());
            packet[at] = u8::try_from(chance(256)).unwrap();
        }
        let _ = ours.send(&packet).await;
        if round % 16 == 0 {
            tokio::task::yield_now().await;
        }
        while ours.try_recv(&mut buffer).is_ok() {
            answers += 1;
        }
        assert!(!serving.is_finished());
    }
    assert!(answers > 1000, "{answers}");
    serving.abort();
    assert!(serving.await.unwrap_err().is_cancelled());
}
