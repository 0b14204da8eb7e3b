//! Hosts as a sandbox may spell them, and what kind of place an address is. Nothing here does
//! more than look at text and numbers, but for one question to the kernel: whether an address
//! is this host's own. It must never guess what a spelling might mean: one that resolvers and
//! libraries read differently is refused.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket};

use serde::{Serialize, Serializer};

/// A host in the one spelling that is compared with rules.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Host {
    /// A domain: lower case, ASCII, without a dot at its end. Never a spelling of an address.
    Name(String),
    /// An address. An IPv4 address in IPv6's clothes is none.
    Address(IpAddr),
}

/// What is wrong with a host's spelling.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
#[non_exhaustive]
pub enum Spelling {
    /// A number where a name should end: `127.1`, `0x7f000001`, `2130706433`.
    #[error("an address must be spelled in its usual form")]
    Address,
    /// Letters that are not ASCII: how they map to a domain is a matter of versions.
    #[error("a name must be spelled in ASCII (xn--...)")]
    NotAscii,
    /// Anything else that is not a domain's name.
    #[error("it is not the name of a host")]
    Name,
    /// A port that is no number from 1 to 65535, or none where one is needed.
    #[error("the port is missing or no number from 1 to 65535")]
    Port,
}

impl Host {
    /// Reads a host as it stands in a URL: IPv6 addresses in brackets.
    pub fn parse(text: &str) -> Result<Self, Spelling> {
        if let Some(rest) = text.strip_prefix('[') {
            let inner = rest.strip_suffix(']').ok_or(Spelling::Address)?;
            let address: Ipv6Addr = inner.parse().map_err(|_| Spelling::Address)?;
            // What two spellings share is an address, and one of them slips past a rule, a log
            // or a reader; so there is one spelling.
            let usual = address.to_string() == inner && address.to_ipv4_mapped().is_none();
            return usual.then_some(Self::Address(address.into())).ok_or(Spelling::Address);
        }
        if let Ok(address) = text.parse::<Ipv4Addr>() {
            return Ok(Self::Address(address.into()));
        }
        if !text.is_ascii() {
            return Err(Spelling::NotAscii);
        }
        let name = text.strip_suffix('.').unwrap_or(text).to_ascii_lowercase();
        let fits = |label: &str| {
            let known = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
            (1..=63).contains(&label.len())
                && label.bytes().all(known)
                && !label.starts_with('-')
                && !label.ends_with('-')
        };
        if name.len() > 253 || !name.split('.').all(fits) {
            return Err(Spelling::Name);
        }
        // No top-level domain is a number; what ends in one is an address to some resolver.
        let last = name.rsplit('.').next().unwrap_or_default();
        let digits = last.bytes().all(|byte| byte.is_ascii_digit());
        let hexadecimal = last
            .strip_prefix("0x")
            .is_some_and(|digits| digits.bytes().all(|byte| byte.is_ascii_hexdigit()));
        if digits || hexadecimal {
            return Err(Spelling::Address);
        }
        Ok(Self::Name(name))
    }

    /// Reads `host` or `host:port`, as in a request's target or `Host` header.
    pub fn with_port(text: &str) -> Result<(Self, Option<u16>), Spelling> {
        let end = if text.starts_with('[') {
            text.find(']').map_or(text.len(), |bracket| bracket + 1)
        } else {
            text.find(':').unwrap_or(text.len())
        };
        let (host, rest) = text.split_at(end);
        let port = match rest.strip_prefix(':') {
            Some(digits) => Some(port(digits).ok_or(Spelling::Port)?),
            None if rest.is_empty() => None,
            None => return Err(Spelling::Name),
        };
        Ok((Self::parse(host)?, port))
    }
}

/// Reads a port: digits only, where `u16::from_str` takes a sign and zeros in front.
pub(crate) fn port(digits: &str) -> Option<u16> {
    let plain = digits.bytes().all(|byte| byte.is_ascii_digit()) && !digits.starts_with('0');
    plain.then(|| digits.parse().ok()).flatten()
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Name(name) => f.write_str(name),
            Self::Address(IpAddr::V4(address)) => address.fmt(f),
            Self::Address(IpAddr::V6(address)) => write!(f, "[{address}]"),
        }
    }
}

/// What kind of place an address is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Class {
    /// Anywhere on the internet.
    Public,
    /// The host itself, by an address of one of its interfaces.
    ThisHost,
    /// 127.0.0.0/8, ::1.
    Loopback,
    /// 169.254.0.0/16, fe80::/10.
    LinkLocal,
    /// Where clouds tell a machine its secrets: 169.254.169.254 and its like.
    Metadata,
    /// RFC 1918, unique local and the former site-local addresses.
    Private,
    /// 100.64.0.0/10: between a provider and its customers.
    Shared,
    /// 0.0.0.0/8, ::.
    Unspecified,
    /// Many at once.
    Multicast,
    /// 255.255.255.255.
    Broadcast,
    /// For books.
    Documentation,
    /// For protocols, measurements or the future.
    Reserved,
    /// An IPv4 address within an IPv6 one (6to4, NAT64) that would not be public by itself.
    Embedded,
}

impl fmt::Display for Class {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Public => "public",
            Self::ThisHost => "this host's own",
            Self::Loopback => "loopback",
            Self::LinkLocal => "link-local",
            Self::Metadata => "metadata",
            Self::Private => "private",
            Self::Shared => "carrier-grade NAT",
            Self::Unspecified => "unspecified",
            Self::Multicast => "multicast",
            Self::Broadcast => "broadcast",
            Self::Documentation => "documentation",
            Self::Reserved => "reserved",
            Self::Embedded => "disguised IPv4",
        })
    }
}

impl Serialize for Class {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl Class {
    /// What kind of place `address` is, by its number alone: never [`Class::ThisHost`].
    pub fn of(address: IpAddr) -> Self {
        match address.to_canonical() {
            IpAddr::V4(address) => Self::of_v4(address),
            IpAddr::V6(address) => Self::of_v6(address),
        }
    }

    fn of_v4(address: Ipv4Addr) -> Self {
        match address.octets() {
            [0, ..] => Self::Unspecified,
            [127, ..] => Self::Loopback,
            // Amazon's and most others', Azure's, Alibaba's, Oracle's.
            [169, 254, 169, 254] | [168, 63, 129, 16] | [100, 100, 100, 200] | [192, 0, 0, 192] => {
                Self::Metadata
            }
            [169, 254, ..] => Self::LinkLocal,
            [10, ..] | [172, 16..=31, ..] | [192, 168, ..] => Self::Private,
            [100, 64..=127, ..] => Self::Shared,
            [192, 0, 2, _] | [198, 51, 100, _] | [203, 0, 113, _] => Self::Documentation,
            [192, 0, 0, _] | [192, 88, 99, _] | [198, 18..=19, ..] => Self::Reserved,
            [224..=239, ..] => Self::Multicast,
            [255, 255, 255, 255] => Self::Broadcast,
            [240..=255, ..] => Self::Reserved,
            _ => Self::Public,
        }
    }

    fn of_v6(address: Ipv6Addr) -> Self {
        let parts = address.segments();
        let within = |at: usize| {
            let (high, low) = (u32::from(parts[at]), u32::from(parts[at + 1]));
            match Self::of_v4(Ipv4Addr::from(high << 16 | low)) {
                Self::Public => Self::Public,
                _ => Self::Embedded,
            }
        };
        match parts {
            [0, 0, 0, 0, 0, 0, 0, 0] => Self::Unspecified,
            [0, 0, 0, 0, 0, 0, 0, 1] => Self::Loopback,
            [0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254] => Self::Metadata,
            [0xfe80..=0xfebf, ..] => Self::LinkLocal,
            [0xfc00..=0xfdff | 0xfec0..=0xfeff, ..] => Self::Private,
            [0xff00..=0xffff, ..] => Self::Multicast,
            [0x2001, 0xdb8, ..] | [0x3fff, 0..=0xfff, ..] => Self::Documentation,
            [0x64, 0xff9b, 0, 0, 0, 0, _, _] => within(6),
            [0x2002, ..] => within(1),
            // Teredo, benchmarks, ORCHID and the rest of what is the protocols' own.
            [0x2001, 0..=0x1ff, ..] => Self::Reserved,
            [0x2000..=0x3fff, ..] => Self::Public,
            // The internet's part of IPv6 is 2000::/3; nothing else is assigned to it.
            _ => Self::Reserved,
        }
    }

    /// What kind of place `address` is, the host's own addresses told from others: a service
    /// of the host that listens everywhere answers there too, past any firewall at its door.
    pub fn seen_from_here(address: IpAddr) -> Self {
        match Self::of(address) {
            Self::Public if is_own(address) => Self::ThisHost,
            class => class,
        }
    }
}

/// Whether `address` belongs to an interface of this host: only to those can a socket be bound.
/// (With `ip_nonlocal_bind` set all addresses look like it, so that all are refused.)
fn is_own(address: IpAddr) -> bool {
    UdpSocket::bind((address, 0)).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_have_one_spelling() {
        let name = |text: &str| Ok(Host::Name(text.into()));
        let address = |text: &str| Ok(Host::Address(text.parse().unwrap()));
        for (text, expected) in [
            ("example.org", name("example.org")),
            ("EXAMPLE.Org.", name("example.org")),
            ("xn--bcher-kva.example", name("xn--bcher-kva.example")),
            ("_dns.example", name("_dns.example")),
            ("localhost", name("localhost")),
            ("1.example", name("1.example")),
            ("0xg", name("0xg")),
            ("192.0.2.7", address("192.0.2.7")),
            ("[2001:db8::1]", address("2001:db8::1")),
            ("127.0.0.1.", Err(Spelling::Address)),
            ("127.1", Err(Spelling::Address)),
            ("127.0.1", Err(Spelling::Address)),
            ("2130706433", Err(Spelling::Address)),
            ("0x7f000001", Err(Spelling::Address)),
            ("0X7F.0.0.1", Err(Spelling::Address)),
            ("127.0.0.0x1", Err(Spelling::Address)),
            ("0x", Err(Spelling::Address)),
            ("0177.0.0.1", Err(Spelling::Address)),
            ("127.0.0.01", Err(Spelling::Address)),
            ("017700000001", Err(Spelling::Address)),
            ("1.2.3.4.5", Err(Spelling::Address)),
            ("256.1.1.1", Err(Spelling::Address)),
            ("example.1", Err(Spelling::Address)),
            ("[::ffff:127.0.0.1]", Err(Spelling::Address)),
            ("[::ffff:7f00:1]", Err(Spelling::Address)),
            ("[0:0:0:0:0:0:0:1]", Err(Spelling::Address)),
            ("[2001:DB8::1]", Err(Spelling::Address)),
            ("[2001:0db8::1]", Err(Spelling::Address)),
            ("[fe80::1%eth0]", Err(Spelling::Address)),
            ("[fe80::1%25eth0]", Err(Spelling::Address)),
            ("[127.0.0.1]", Err(Spelling::Address)),
            ("[example.org]", Err(Spelling::Address)),
            ("[[::1]]", Err(Spelling::Address)),
            ("[::1", Err(Spelling::Address)),
            ("::1", Err(Spelling::Name)),
            ("bücher.example", Err(Spelling::NotAscii)),
            ("127。0。0。1", Err(Spelling::NotAscii)),
            ("①②⑦.0.0.1", Err(Spelling::NotAscii)),
            ("exa%6dple.org", Err(Spelling::Name)),
            ("example.org%00.example", Err(Spelling::Name)),
            ("example.org\0", Err(Spelling::Name)),
            ("example.org\t", Err(Spelling::Name)),
            (" example.org", Err(Spelling::Name)),
            ("user@example.org", Err(Spelling::Name)),
            ("example..org", Err(Spelling::Name)),
            ("example.org..", Err(Spelling::Name)),
            (".example.org", Err(Spelling::Name)),
            ("-a.example", Err(Spelling::Name)),
            ("*.example.org", Err(Spelling::Name)),
            (".", Err(Spelling::Name)),
            ("", Err(Spelling::Name)),
        ] {
            assert_eq!(Host::parse(text), expected, "{text:?}");
        }
        assert_eq!(Host::parse(&format!("{}.a", "a".repeat(64))), Err(Spelling::Name));
        assert_eq!(Host::parse(&"a.".repeat(127)), name(&"a.".repeat(127)[..253]));
        assert_eq!(Host::parse(&"a.".repeat(128)), Err(Spelling::Name));
    }

    #[test]
    fn ports_are_digits() {
        let with_port = |text: &str| Host::with_port(text).map(|(_, port)| port);
        assert_eq!(with_port("example.org"), Ok(None));
        assert_eq!(with_port("example.org:443"), Ok(Some(443)));
        assert_eq!(with_port("[2001:db8::1]:80"), Ok(Some(80)));
        for port in ["", "0", "+80", "-1", "080", "65536", "80 ", "8x", "80:80", "0x50"] {
            assert_eq!(with_port(&format!("example.org:{port}")), Err(Spelling::Port), "{port}");
        }
        assert_eq!(with_port("[2001:db8::1]80"), Err(Spelling::Name));
        assert_eq!(with_port("2001:db8::1"), Err(Spelling::Port));
    }

    #[test]
    fn every_kind_of_address() {
        for (text, class) in [
            ("1.1.1.1", Class::Public),
            ("9.255.255.255", Class::Public),
            ("11.0.0.0", Class::Public),
            ("172.15.0.1", Class::Public),
            ("172.32.0.1", Class::Public),
            ("100.63.0.1", Class::Public),
            ("100.128.0.1", Class::Public),
            ("0.0.0.0", Class::Unspecified),
            ("0.1.2.3", Class::Unspecified),
            ("127.0.0.1", Class::Loopback),
            ("127.255.0.3", Class::Loopback),
            ("169.254.169.254", Class::Metadata),
            ("168.63.129.16", Class::Metadata),
            ("100.100.100.200", Class::Metadata),
            ("192.0.0.192", Class::Metadata),
            ("169.254.0.1", Class::LinkLocal),
            ("10.1.2.3", Class::Private),
            ("172.16.0.1", Class::Private),
            ("172.31.255.255", Class::Private),
            ("192.168.1.1", Class::Private),
            ("100.64.0.1", Class::Shared),
            ("100.127.255.255", Class::Shared),
            ("192.0.0.1", Class::Reserved),
            ("192.88.99.1", Class::Reserved),
            ("198.18.0.1", Class::Reserved),
            ("198.19.0.1", Class::Reserved),
            ("240.0.0.1", Class::Reserved),
            ("192.0.2.1", Class::Documentation),
            ("198.51.100.1", Class::Documentation),
            ("203.0.113.1", Class::Documentation),
            ("224.0.0.1", Class::Multicast),
            ("239.1.1.1", Class::Multicast),
            ("255.255.255.255", Class::Broadcast),
            ("2606:4700::1111", Class::Public),
            ("2001:4860:4860::8888", Class::Public),
            ("::", Class::Unspecified),
            ("::1", Class::Loopback),
            ("fe80::1", Class::LinkLocal),
            ("febf::1", Class::LinkLocal),
            ("fec0::1", Class::Private),
            ("fc00::1", Class::Private),
            ("fdff::1", Class::Private),
            ("fd00:ec2::254", Class::Metadata),
            ("ff02::1", Class::Multicast),
            ("2001:db8::1", Class::Documentation),
            ("3fff::1", Class::Documentation),
            ("100::1", Class::Reserved),
            ("2001::1", Class::Reserved),
            ("2001:20::1", Class::Reserved),
            ("4000::1", Class::Reserved),
            ("::127.0.0.1", Class::Reserved),
            ("64:ff9b:1::7f00:1", Class::Reserved),
            ("::ffff:127.0.0.1", Class::Loopback),
            ("::ffff:169.254.169.254", Class::Metadata),
            ("::ffff:1.1.1.1", Class::Public),
            ("64:ff9b::127.0.0.1", Class::Embedded),
            ("64:ff9b::10.0.0.1", Class::Embedded),
            ("64:ff9b::1.1.1.1", Class::Public),
            ("2002:7f00:1::", Class::Embedded),
            ("2002:a9fe:a9fe::1", Class::Embedded),
            ("2002:101:101::1", Class::Public),
        ] {
            assert_eq!(Class::of(text.parse().unwrap()), class, "{text}");
        }
    }

    #[test]
    fn an_address_of_an_interface_is_the_hosts_own() {
        assert!(is_own("127.0.0.1".parse().unwrap()));
        assert!(!is_own("192.0.2.1".parse().unwrap()));
        assert!(!is_own("2001:db8::1".parse().unwrap()));
    }
}
