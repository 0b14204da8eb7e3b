//! Attempts on the network and on sockets of the host. Nothing is ever sent to an address
//! other than loopback.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr as UnixAddress, UnixDatagram, UnixStream};
use std::path::Path;
use std::time::Duration;

use crate::attempt::{Attempt, Doing, No, Verdict, any_of, held, open_to_write, read_text};
use crate::sys::{self, Arg};

const WAIT: Duration = Duration::from_secs(2);

pub const ATTEMPTS: &[Attempt] = &[
    Attempt::new("loopback-tcp", "A TCP port on the host's 127.0.0.1 can be reached.", |facts| {
        tcp(SocketAddr::from((Ipv4Addr::LOCALHOST, facts.number("host-port")?)))
    })
    .control(),
    Attempt::new("loopback-tcp6", "A TCP port on the host's ::1 can be reached.", |facts| {
        tcp(SocketAddr::from((Ipv6Addr::LOCALHOST, facts.number("host-port6")?)))
    })
    .control()
    .needs("test: the stage could listen on ::1"),
    Attempt::new(
        "loopback-tcp-any",
        "A TCP port of the host can be reached by the address 0.0.0.0.",
        |facts| tcp(SocketAddr::from((Ipv4Addr::UNSPECIFIED, facts.number("host-port")?))),
    )
    .control(),
    Attempt::new(
        "loopback-tcp-mapped",
        "A TCP port of the host can be reached by ::ffff:127.0.0.1.",
        |facts| {
            tcp(SocketAddr::from((
                Ipv4Addr::LOCALHOST.to_ipv6_mapped(),
                facts.number("host-port")?,
            )))
        },
    )
    .control()
    .needs("test: the stage could listen on ::1"),
    Attempt::new("loopback-udp", "A UDP port on the host's 127.0.0.1 can be reached.", |facts| {
        let port: u16 = facts.number("host-udp")?;
        let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).doing("bind")?;
        socket.connect((Ipv4Addr::LOCALHOST, port)).doing("connect")?;
        socket.set_read_timeout(Some(Duration::from_millis(300))).preparing("a time limit")?;
        socket.send(b"denizen-escape").doing("send")?;
        // Where nobody listens, the kernel says so at once.
        match socket.recv(&mut [0; 16]) {
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                Ok("nobody refused it".into())
            }
            Err(error) => held(error.to_string()),
            Ok(_) => Ok("it answers".into()),
        }
    })
    .control(),
    Attempt::new(
        "abstract-socket",
        "An abstract Unix socket of the host can be reached.",
        |facts| {
            let name = facts.text("abstract")?;
            let address = UnixAddress::from_abstract_name(name).preparing(name)?;
            UnixStream::connect_addr(&address).doing("connect")?;
            Ok(format!("connected to @{name}"))
        },
    )
    .control(),
    Attempt::new("host-socket", "A Unix socket of the host can be reached by its path.", |facts| {
        connect(&facts.path("host-socket")?)
    })
    .control(),
    Attempt::new(
        "host-socket-proc-root",
        "A Unix socket of the host can be reached through /proc.",
        |facts| {
            let socket = facts.path("host-socket")?;
            any_of(crate::attempt::process_numbers(), |pid| {
                let root = format!("/proc/{pid}/root");
                connect(&crate::attempt::below(Path::new(&root), &socket))
            })
        },
    )
    .control(),
    Attempt::new("host-fifo", "A FIFO of the host can be written to.", |facts| {
        // Without a reader at the other end it does not open.
        let path = facts.path("host-fifo")?;
        open_to_write(&path).doing(&path.display().to_string())?;
        Ok("it opens, and somebody reads it".into())
    })
    .control(),
    Attempt::new("docker-socket", "The socket of a container engine can be reached.", |_| {
        any_of(
            [
                "/var/run/docker.sock",
                "/run/docker.sock",
                "/run/containerd/containerd.sock",
                "/run/podman/podman.sock",
                "/run/crio/crio.sock",
                "/var/run/balena-engine.sock",
            ],
            |path| connect(Path::new(path)),
        )
    }),
    Attempt::new(
        "system-sockets",
        "A socket of the host's system services can be reached.",
        |_| {
            any_of(
                [
                    "/run/systemd/private",
                    "/run/systemd/notify",
                    "/run/systemd/journal/socket",
                    "/run/systemd/journal/dev-log",
                    "/run/dbus/system_bus_socket",
                    "/var/run/dbus/system_bus_socket",
                    "/run/snapd.socket",
                    "/run/udev/control",
                    "/run/libvirt/libvirt-sock",
                    "/run/acpid.socket",
                    "/var/lib/lxd/unix.socket",
                    "/dev/log",
                ],
                |path| connect(Path::new(path)),
            )
        },
    ),
    Attempt::new(
        "user-sockets",
        "A socket of a user's session on the host can be reached.",
        |_| {
            let folders = std::fs::read_dir("/run/user").into_iter().flatten().flatten();
            let named =
                ["bus", "systemd/private", "docker.sock", "podman/podman.sock", "wayland-0"];
            let in_run = folders.flat_map(|entry| named.map(|name| entry.path().join(name)));
            let fixed = ["/tmp/.X11-unix/X0", "/tmp/.ICE-unix"].map(std::path::PathBuf::from);
            any_of(in_run.chain(fixed), |path| connect(&path))
        },
    ),
    Attempt::new("denizen-socket", "The daemon's own API can be reached from a session.", |_| {
        let home = std::env::var("HOME").unwrap_or_else(|_| "/root".into());
        let names = [
            "/run/denizen/denizen.sock".to_owned(),
            "/run/denizen.sock".to_owned(),
            "/var/lib/denizen/denizen.sock".to_owned(),
            format!("{home}/.local/state/denizen/denizen.sock"),
        ];
        any_of(names, |path| connect(Path::new(&path)))
    }),
    Attempt::new("sockets-listed", "/proc/net shows sockets of the host.", |facts| {
        let name = facts.text("abstract")?;
        let text = read_text("/proc/net/unix").doing("/proc/net/unix")?;
        if text.contains(name) { Ok("the abstract one is there".into()) } else { held("no") }
    })
    .leak()
    .control(),
    Attempt::new("raw-socket", "A raw socket can be made.", |_| {
        socket(libc::AF_INET, libc::SOCK_RAW, libc::IPPROTO_ICMP)
    })
    .surface()
    .control(),
    Attempt::new("raw-socket6", "A raw socket of IPv6 can be made.", |_| {
        socket(libc::AF_INET6, libc::SOCK_RAW, libc::IPPROTO_ICMPV6)
    })
    .surface()
    .control()
    .needs("kernel: CONFIG_IPV6"),
    Attempt::new("packet-socket", "A packet socket can be made, which sees all packets.", |_| {
        socket(libc::AF_PACKET, libc::SOCK_RAW, 0x0300)
    })
    .surface()
    .control()
    .needs("kernel: CONFIG_PACKET"),
    Attempt::new("packet-socket-cooked", "A packet socket without headers can be made.", |_| {
        socket(libc::AF_PACKET, libc::SOCK_DGRAM, 0)
    })
    .surface()
    .control()
    .needs("kernel: CONFIG_PACKET"),
    Attempt::new("route-change", "The host's network can be changed through netlink.", |facts| {
        change_loopback()?;
        if facts.is_in_hosts("net")? { Ok("it can".into()) } else { held("only our own") }
    })
    .control(),
    Attempt::new("route-own", "The session's own network can be changed through netlink.", |_| {
        change_loopback()?;
        Ok("it can".into())
    })
    .surface()
    .control(),
    Attempt::new(
        "netfilter",
        "The packet filter takes commands, a large part of the kernel.",
        |_| {
            // Asks nf_tables for its generation, which wants the same right as changing it.
            const SUBSYSTEM: u16 = 10;
            const GET_GENERATION: u16 = 16;
            netlink(libc::NETLINK_NETFILTER, SUBSYSTEM << 8 | GET_GENERATION, &[0; 4])?;
            Ok("nf_tables answers".into())
        },
    )
    .surface()
    .control()
    .needs("kernel: CONFIG_NF_TABLES"),
    Attempt::new("netlink-xfrm", "The kernel's IPsec takes commands.", |_| {
        const GET_POLICY_INFO: u16 = 0x25;
        netlink(libc::NETLINK_XFRM, GET_POLICY_INFO, &[0; 4])?;
        Ok("xfrm answers".into())
    })
    .surface()
    .control()
    .needs("kernel: CONFIG_XFRM_USER"),
    Attempt::new("netlink-audit", "The audit system can be asked for its state.", |_| {
        const GET: u16 = 1000;
        netlink(libc::NETLINK_AUDIT, GET, &[])?;
        Ok("audit answers".into())
    })
    .control()
    .needs("kernel: CONFIG_AUDIT"),
    Attempt::new("uevents", "Events of the host's devices can be listened to.", |facts| {
        socket(libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_KOBJECT_UEVENT)?;
        if facts.is_in_hosts("net")? { Ok("a socket".into()) } else { held("only our own") }
    })
    .leak()
    .control(),
    Attempt::new("vsock", "AF_VSOCK, which leads to the machine's own host, can be used.", |_| {
        socket(libc::AF_VSOCK, libc::SOCK_STREAM, 0)
    })
    .surface()
    .control()
    .needs("kernel: CONFIG_VSOCKETS"),
    Attempt::new("crypto-socket", "AF_ALG, the kernel's ciphers, can be used.", |_| {
        socket(libc::AF_ALG, libc::SOCK_SEQPACKET, 0)
    })
    .surface()
    .control()
    .needs("kernel: CONFIG_CRYPTO_USER_API"),
    Attempt::new(
        "rare-sockets",
        "A family of sockets can be used that hardly anyone needs.",
        |_| {
            let families = [
                ("AF_AX25", 3, libc::SOCK_DGRAM),
                ("AF_IPX", 4, libc::SOCK_DGRAM),
                ("AF_APPLETALK", 5, libc::SOCK_DGRAM),
                ("AF_X25", 9, libc::SOCK_SEQPACKET),
                ("AF_KEY", 15, libc::SOCK_RAW),
                ("AF_RDS", 21, libc::SOCK_SEQPACKET),
                ("AF_PPPOX", 24, libc::SOCK_STREAM),
                ("AF_LLC", 26, libc::SOCK_DGRAM),
                ("AF_CAN", 29, libc::SOCK_RAW),
                ("AF_TIPC", 30, libc::SOCK_RDM),
                ("AF_BLUETOOTH", 31, libc::SOCK_RAW),
                ("AF_RXRPC", 33, libc::SOCK_DGRAM),
                ("AF_PHONET", 35, libc::SOCK_DGRAM),
                ("AF_IEEE802154", 36, libc::SOCK_RAW),
                ("AF_NFC", 39, libc::SOCK_SEQPACKET),
                ("AF_KCM", 41, libc::SOCK_DGRAM),
                ("AF_QIPCRTR", 42, libc::SOCK_DGRAM),
                ("AF_SMC", 43, libc::SOCK_STREAM),
                ("AF_XDP", 44, libc::SOCK_RAW),
                ("AF_MCTP", 45, libc::SOCK_DGRAM),
            ];
            any_of(families, |(name, family, kind)| {
                let protocol = if name == "AF_KEY" { 2 } else { 0 };
                socket(family, kind, protocol).map(|_| name.to_owned()).map_err(|no| match no {
                    No::Held(why) | No::Impossible(why) => No::Held(format!("{name}: {why}")),
                })
            })
        },
    )
    .surface(),
    Attempt::new("interfaces", "There is a network interface besides loopback.", |_| {
        // What `none` should not have; a filtered or full network does.
        let text = read_text("/proc/net/dev").doing("/proc/net/dev")?;
        let names = text.lines().filter_map(|line| line.split_once(':')).map(|(name, _)| name);
        match names.map(str::trim).find(|name| *name != "lo") {
            Some(name) => Ok(name.to_owned()),
            None => held("there is none"),
        }
    })
    .needs("sandbox: only for the network `none`"),
];

fn tcp(address: SocketAddr) -> Verdict {
    TcpStream::connect_timeout(&address, WAIT).doing(&address.to_string())?;
    Ok(format!("connected to {address}"))
}

/// Connects to a socket, of whichever kind it is.
fn connect(path: &Path) -> Verdict {
    let shown = path.display().to_string();
    let stream = UnixStream::connect(path);
    if stream.as_ref().is_err_and(|error| error.raw_os_error() == Some(libc::EPROTOTYPE)) {
        let socket = UnixDatagram::unbound().preparing("a socket")?;
        socket.connect(path).doing(&shown)?;
    } else {
        stream.doing(&shown)?;
    }
    Ok(format!("connected to {shown}"))
}

fn socket_of(family: i32, kind: i32, protocol: i32) -> std::io::Result<OwnedFd> {
    let kind = kind | libc::SOCK_CLOEXEC;
    sys::owned(sys::call(
        libc::SYS_socket,
        &mut [
            Arg::Num(i64::from(family)),
            Arg::Num(i64::from(kind)),
            Arg::Num(i64::from(protocol)),
        ],
    ))
}

fn socket(family: i32, kind: i32, protocol: i32) -> Verdict {
    socket_of(family, kind, protocol)?;
    Ok(format!("a socket of family {family}"))
}

/// Sends one request that asks for an answer; Ok if the answer is no refusal.
fn netlink(protocol: i32, request: u16, body: &[u8]) -> Result<(), No> {
    const REQUEST_WITH_ANSWER: u16 = 5;
    const ERROR: u16 = 2;
    let socket = socket_of(libc::AF_NETLINK, libc::SOCK_RAW, protocol).doing("socket")?;
    let length = u32::try_from(16 + body.len()).unwrap_or(16);
    let mut message = length.to_ne_bytes().to_vec();
    message.extend(request.to_ne_bytes());
    message.extend(REQUEST_WITH_ANSWER.to_ne_bytes());
    message.extend([1, 0, 0, 0, 0, 0, 0, 0]);
    message.extend(body);
    let fd = i64::from(socket.as_raw_fd());
    let size = i64::from(length);
    // To the kernel: a netlink address of only its family.
    let mut to = [0; 12];
    if let Some(family) = to.first_chunk_mut() {
        *family = 16_u16.to_ne_bytes();
    }
    sys::call(
        libc::SYS_sendto,
        &mut [
            Arg::Num(fd),
            Arg::In(&message),
            Arg::Num(size),
            Arg::Num(0),
            Arg::In(&to),
            Arg::Num(12),
        ],
    )
    .doing("send")?;
    let mut answer = [0; 4096];
    let wait = i64::from(libc::MSG_DONTWAIT);
    let arguments = &mut [Arg::Num(fd), Arg::Out(&mut answer), Arg::Num(4096), Arg::Num(wait)];
    sys::call(libc::SYS_recvfrom, arguments).doing("its answer")?;
    let kind = answer.get(4..6).and_then(|part| part.try_into().ok()).map(u16::from_ne_bytes);
    let code = answer.get(16..20).and_then(|part| part.try_into().ok()).map(i32::from_ne_bytes);
    match (kind, code) {
        (Some(ERROR), Some(code)) if code != 0 => {
            Err(std::io::Error::from_raw_os_error(-code)).doing("the answer")
        }
        _ => Ok(()),
    }
}

/// A request to change loopback in nothing, which wants the right to change it.
fn change_loopback() -> Result<(), No> {
    const NEW_LINK: u16 = 16;
    // struct ifinfomsg: family and kind, interface 1, no flags, and none to change.
    netlink(libc::NETLINK_ROUTE, NEW_LINK, &sys::halves(&[0, 1, 0, 0]))
}
