//! What a sandbox may reach: rules as text, and the one function that weighs a destination
//! against them. Nothing here does I/O, so that all of it can be tested. A destination that no
//! rule opens is closed; a rule must never open more than it says.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::address::{Class, Host, Spelling, port};
use crate::error::InvalidRule;

/// One line of an allow-list.
///
/// | text | opens |
/// |---|---|
/// | `example.org` | that domain and no other, ports 80 and 443 |
/// | `example.org:8443` | that port of it; `example.org:*` all ports |
/// | `*.example.org` | its sub-domains at any depth, not itself; ports as above |
/// | `192.0.2.7`, `192.0.2.0/24`, `[2001:db8::]/32` | these addresses, all ports |
/// | `192.0.2.0/24:443` | that port of them |
/// | `*`, `*:443` | every name, and every public address |
///
/// Only a rule with an address opens an address that is not public: a name that leads to one
/// needs both its own rule and that one.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Rule {
    pub(crate) what: What,
    pub(crate) ports: Ports,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum What {
    Domain(String),
    SubDomains(String),
    Network { first: IpAddr, bits: u8 },
    Public,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Ports {
    /// 80 and 443.
    Web,
    Any,
    One(u16),
}

impl Ports {
    pub(crate) fn have(self, port: u16) -> bool {
        match self {
            Self::Web => port == 80 || port == 443,
            Self::Any => port != 0,
            Self::One(one) => port == one,
        }
    }
}

impl Rule {
    /// Every name and every public address.
    pub fn public() -> Self {
        Self { what: What::Public, ports: Ports::Any }
    }

    pub(crate) fn has_name(&self, name: &str) -> bool {
        match &self.what {
            What::Domain(domain) => domain == name,
            What::SubDomains(domain) => name
                .strip_suffix(domain.as_str())
                .and_then(|labels| labels.strip_suffix('.'))
                .is_some_and(|labels| !labels.is_empty()),
            What::Network { .. } => false,
            What::Public => true,
        }
    }

    pub(crate) fn has_address(&self, address: IpAddr) -> bool {
        let What::Network { first, bits } = &self.what else { return false };
        masked(address, *bits) == Some(*first)
    }
}

/// The first address of the network of `bits` that `address` is in.
fn masked(address: IpAddr, bits: u8) -> Option<IpAddr> {
    match address {
        IpAddr::V4(address) => {
            let host = 32_u32.checked_sub(bits.into())?;
            let mask = u32::MAX.checked_shl(host).unwrap_or(0);
            Some(IpAddr::V4((u32::from(address) & mask).into()))
        }
        IpAddr::V6(address) => {
            let host = 128_u32.checked_sub(bits.into())?;
            let mask = u128::MAX.checked_shl(host).unwrap_or(0);
            Some(IpAddr::V6((u128::from(address) & mask).into()))
        }
    }
}

impl FromStr for Rule {
    type Err = InvalidRule;

    fn from_str(text: &str) -> Result<Self, InvalidRule> {
        parse(text).map_err(|problem| InvalidRule { text: text.to_owned(), problem })
    }
}

fn parse(text: &str) -> Result<Rule, &'static str> {
    if text.contains("://") {
        return Err("write the host alone, without a scheme or path");
    }
    // The last colon, unless it is one within an IPv6 address.
    let (host, ports) = match text.rsplit_once(':') {
        Some((host, ports)) if !ports.contains(']') => {
            let ports = match ports {
                "*" => Ports::Any,
                digits => Ports::One(port(digits).ok_or("the port is no number from 1 to 65535")?),
            };
            (host, Some(ports))
        }
        _ => (text, None),
    };
    if host.contains(':') && !host.starts_with('[') {
        return Err("write an IPv6 address in brackets");
    }
    let (host, bits) = match host.split_once('/') {
        Some((host, bits)) => (host, Some(bits)),
        None => (host, None),
    };
    if host == "*" && bits.is_none() {
        return Ok(Rule { what: What::Public, ports: ports.unwrap_or(Ports::Any) });
    }
    let (above, host) = match host.strip_prefix("*.") {
        Some(host) => (true, host),
        None => (false, host),
    };
    let host = Host::parse(host).map_err(|spelling| match spelling {
        Spelling::Address => "write an address in its usual form",
        Spelling::NotAscii => "write the name in ASCII (xn--…)",
        _ => "it is neither a domain, nor an address, nor a network",
    })?;
    match (host, above, bits) {
        (Host::Name(name), false, None) => {
            Ok(Rule { what: What::Domain(name), ports: ports.unwrap_or(Ports::Web) })
        }
        (Host::Name(name), true, None) => {
            Ok(Rule { what: What::SubDomains(name), ports: ports.unwrap_or(Ports::Web) })
        }
        (Host::Name(_), _, Some(_)) => Err("only an address has a network"),
        (Host::Address(_), true, _) => Err("only a domain has sub-domains"),
        (Host::Address(first), false, bits) => {
            let most = if first.is_ipv4() { 32 } else { 128 };
            let bits = match bits {
                // As for a port: digits, and no zeros in front.
                Some("0") => 0,
                Some(bits) => port(bits)
                    .and_then(|bits| u8::try_from(bits).ok())
                    .ok_or("a network is an address, a slash and a number of bits")?,
                None => most,
            };
            match masked(first, bits) {
                None => Err("the network has more bits than the address"),
                Some(masked) if masked != first => {
                    Err("the address has bits beyond its network: write the network's first")
                }
                Some(first) => {
                    let what = What::Network { first, bits };
                    Ok(Rule { what, ports: ports.unwrap_or(Ports::Any) })
                }
            }
        }
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let usual = match &self.what {
            What::Domain(name) => write!(f, "{name}").map(|()| Ports::Web)?,
            What::SubDomains(name) => write!(f, "*.{name}").map(|()| Ports::Web)?,
            What::Public => write!(f, "*").map(|()| Ports::Any)?,
            What::Network { first, bits } => {
                write!(f, "{}", Host::Address(*first))?;
                if *bits != if first.is_ipv4() { 32 } else { 128 } {
                    write!(f, "/{bits}")?;
                }
                Ports::Any
            }
        };
        match self.ports {
            ports if ports == usual => Ok(()),
            Ports::One(port) => write!(f, ":{port}"),
            Ports::Any | Ports::Web => write!(f, ":*"),
        }
    }
}

impl Serialize for Rule {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Rule {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// An allow-list. An empty one, which is the default, opens nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rules {
    /// What is open.
    pub allow: Vec<Rule>,
}

/// What came of weighing a destination.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// It may be reached: by these addresses and no others.
    Permitted {
        /// Whether it is open because of its name: what is said to be for another name is not.
        by_name: bool,
    },
    /// It may not.
    Refused {
        /// The address that is to blame, if it is an address.
        address: Option<IpAddr>,
        /// Why not.
        why: Why,
    },
}

/// Why something was refused. As text it is a plain sentence, of ASCII only.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Why {
    /// No rule is about the host.
    #[error("not in the allow-list")]
    NotListed,
    /// A rule is about the host, but not about this port of it.
    #[error("the allow-list has this host, but not this port")]
    PortNotListed,
    /// The sandbox's own rules close it.
    #[error("denied by the session's own rules")]
    Denied,
    /// The address is of a kind that only a rule with an address opens.
    #[error("{0} addresses are never reachable without a rule")]
    Class(Class),
    /// The host is not spelled as hosts are.
    #[error("{0}")]
    Spelling(#[from] Spelling),
    /// `https://` for a proxy that would have to see into it, or no scheme at all.
    #[error("a proxy takes http:// addresses and CONNECT")]
    Scheme,
    /// The `Host` header does not say what the URL says.
    #[error("the Host header is for another host than the URL")]
    HostHeader,
    /// The request could be read in more than one way.
    #[error("the request is malformed: {0}")]
    Malformed(&'static str),
    /// The TLS handshake asks for another server than the tunnel was made to.
    #[error("the TLS handshake is for another server: {0}")]
    OtherServer(String),
    /// The TLS handshake is none, or does not say for whom it is.
    #[error("a tunnel to port 443 begins with a TLS handshake that names its server: {0}")]
    Handshake(&'static str),
    /// As many connections are open as may be.
    #[error("too many connections at once")]
    TooMany,
}

impl Serialize for Why {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl Rules {
    /// Weighs a destination. A name is weighed twice: first with no addresses, which says
    /// whether it may be looked up at all, then with all that the look-up found, each of which
    /// must be open. `class` says of what kind an address is; see [`Class::of`].
    pub fn permits_with(
        &self,
        host: &Host,
        port: u16,
        resolved: &[IpAddr],
        class: impl Fn(IpAddr) -> Class,
    ) -> Verdict {
        let refused = |address, why| Verdict::Refused { address, why };
        let by_name = match host {
            Host::Address(address) => {
                // A rule for IPv6 is none for IPv4 in its clothes.
                let address = address.to_canonical();
                return match self.address(address, port, class) {
                    Ok(()) => Verdict::Permitted { by_name: false },
                    Err(why) => refused(Some(address), why),
                };
            }
            Host::Name(name) => {
                let mut about = self.allow.iter().filter(|rule| rule.has_name(name)).peekable();
                if about.peek().is_none() {
                    return refused(None, Why::NotListed);
                }
                let mut open = about.filter(|rule| rule.ports.have(port)).peekable();
                if open.peek().is_none() {
                    return refused(None, Why::PortNotListed);
                }
                !open.any(|rule| rule.what == What::Public)
            }
        };
        for address in resolved {
            let address = address.to_canonical();
            let kind = class(address);
            if kind != Class::Public && !self.names(address, port) {
                return refused(Some(address), Why::Class(kind));
            }
        }
        Verdict::Permitted { by_name }
    }

    /// [`Self::permits_with`] with kinds told by number alone.
    pub fn permits(&self, host: &Host, port: u16, resolved: &[IpAddr]) -> Verdict {
        self.permits_with(host, port, resolved, Class::of)
    }

    /// Whether a name may be looked up, at least for one port.
    pub(crate) fn has_name(&self, name: &str) -> bool {
        self.allow.iter().any(|rule| rule.has_name(name))
    }

    /// Whether a rule with an address opens this one.
    fn names(&self, address: IpAddr, port: u16) -> bool {
        self.allow.iter().any(|rule| rule.has_address(address) && rule.ports.have(port))
    }

    fn address(
        &self,
        address: IpAddr,
        port: u16,
        class: impl Fn(IpAddr) -> Class,
    ) -> Result<(), Why> {
        if self.names(address, port) {
            return Ok(());
        }
        let kind = class(address);
        let public = |rule: &&Rule| kind == Class::Public && rule.what == What::Public;
        if self.allow.iter().filter(public).any(|rule| rule.ports.have(port)) {
            return Ok(());
        }
        if self.allow.iter().any(|rule| rule.has_address(address) || public(&rule)) {
            return Err(Why::PortNotListed);
        }
        Err(if kind == Class::Public { Why::NotListed } else { Why::Class(kind) })
    }
}

impl FromIterator<Rule> for Rules {
    fn from_iter<I: IntoIterator<Item = Rule>>(rules: I) -> Self {
        Self { allow: rules.into_iter().collect() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chance::Chance;

    fn rules(texts: &[&str]) -> Rules {
        texts.iter().map(|text| text.parse::<Rule>().unwrap()).collect()
    }

    fn addresses(texts: &[&str]) -> Vec<IpAddr> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn rules_are_text() {
        for (text, usual) in [
            ("example.org", "example.org"),
            ("Example.ORG.", "example.org"),
            ("example.org:8443", "example.org:8443"),
            ("example.org:*", "example.org:*"),
            ("*.example.org", "*.example.org"),
            ("*.example.org:22", "*.example.org:22"),
            ("192.0.2.7", "192.0.2.7"),
            ("192.0.2.7:*", "192.0.2.7"),
            ("192.0.2.7/32", "192.0.2.7"),
            ("192.0.2.0/24:443", "192.0.2.0/24:443"),
            ("0.0.0.0/0", "0.0.0.0/0"),
            ("[2001:db8::]/32", "[2001:db8::]/32"),
            ("[2001:db8::1]:53", "[2001:db8::1]:53"),
            ("[::]/0:80", "[::]/0:80"),
            ("*", "*"),
            ("*:443", "*:443"),
            ("localhost:3000", "localhost:3000"),
        ] {
            let rule: Rule = text.parse().unwrap();
            assert_eq!(rule.to_string(), usual);
            assert_eq!(usual.parse::<Rule>().unwrap(), rule);
            let json = serde_json::to_string(&rule).unwrap();
            assert_eq!(serde_json::from_str::<Rule>(&json).unwrap(), rule);
        }
        for text in [
            "",
            " ",
            ".",
            "*.",
            "*.*",
            "**",
            "*x.example",
            "a.*.example",
            "https://example.org",
            "example.org/",
            "example.org/24",
            "*.192.0.2.7",
            "*/8",
            "example.org:",
            "example.org:0",
            "example.org:+80",
            "example.org:65536",
            "example.org:80:80",
            "192.0.2.7/24",
            "192.0.2.0/",
            "192.0.2.0/33",
            "192.0.2.0/024",
            "192.0.2.0/-1",
            "192.0.2/24",
            "127.1",
            "0x7f000001",
            "2130706433",
            "2001:db8::1",
            "[2001:db8::1]/32",
            "[2001:db8::]/129",
            "[2001:db8::",
            "::1",
            "[::ffff:10.0.0.1]",
            "[fe80::1%eth0]",
            "[2001:DB8::1]",
            "[192.0.2.7]",
            "user@example.org",
            "bücher.example",
            "example.org,example.com",
            "exam ple.org",
            "!example.org",
        ] {
            assert!(text.parse::<Rule>().is_err(), "{text:?}");
        }
        let both: Rules =
            serde_json::from_str(r#"{"allow": ["a.example", "10.0.0.0/8"]}"#).unwrap();
        assert_eq!(both, rules(&["a.example", "10.0.0.0/8"]));
        assert!(serde_json::from_str::<Rules>(r#"{"allow": ["10.0.0.1/8"]}"#).is_err());
    }

    /// What a name may be connected to, with the addresses it has.
    #[test]
    fn the_table() {
        let yes = |by_name| Verdict::Permitted { by_name };
        let no = |why| Verdict::Refused { address: None, why };
        let never = |address: &str, class| Verdict::Refused {
            address: Some(address.parse().unwrap()),
            why: Why::Class(class),
        };
        let v4 = "1.1.1.1";
        for (allow, target, resolved, expected) in [
            (&[][..], "example.org:443", &[][..], no(Why::NotListed)),
            (&["example.org"], "example.org:443", &[v4], yes(true)),
            (&["example.org"], "EXAMPLE.org.:80", &[v4], yes(true)),
            (&["example.org"], "example.org:8443", &[v4], no(Why::PortNotListed)),
            (&["example.org:8443"], "example.org:8443", &[v4], yes(true)),
            (&["example.org:8443"], "example.org:443", &[v4], no(Why::PortNotListed)),
            (&["example.org"], "www.example.org:443", &[v4], no(Why::NotListed)),
            (&["example.org"], "notexample.org:443", &[v4], no(Why::NotListed)),
            (&["example.org"], "example.org.evil.test:443", &[v4], no(Why::NotListed)),
            (&["example.org"], "org:443", &[v4], no(Why::NotListed)),
            (&["*.example.org"], "a.example.org:443", &[v4], yes(true)),
            (&["*.example.org"], "b.a.example.org:443", &[v4], yes(true)),
            (&["*.example.org"], "example.org:443", &[v4], no(Why::NotListed)),
            (&["*.example.org"], "aexample.org:443", &[v4], no(Why::NotListed)),
            (&["192.0.2.0/24"], "example.org:443", &["192.0.2.7"], no(Why::NotListed)),
            (&["example.org"], "example.org:443", &["10.0.0.1"], never("10.0.0.1", Class::Private)),
            (&["example.org"], "example.org:443", &[v4, "::1"], never("::1", Class::Loopback)),
            (
                &["example.org"],
                "example.org:443",
                &["::ffff:169.254.169.254"],
                never("169.254.169.254", Class::Metadata),
            ),
            (
                &["example.org"],
                "example.org:443",
                &["64:ff9b::7f00:1"],
                never("64:ff9b::7f00:1", Class::Embedded),
            ),
            (&["example.org", "10.0.0.0/8"], "example.org:443", &["10.0.0.1"], yes(true)),
            (&["example.org", "10.0.0.0/8"], "example.org:443", &["::ffff:10.0.0.1"], yes(true)),
            (
                &["example.org", "10.0.0.0/8:22"],
                "example.org:443",
                &["10.0.0.1"],
                never("10.0.0.1", Class::Private),
            ),
            (&["*"], "example.org:25", &[v4], yes(false)),
            (&["*", "example.org"], "example.org:443", &[v4], yes(false)),
            (&["*:80", "example.org"], "example.org:443", &[v4], yes(true)),
            (&["*:443"], "example.org:25", &[v4], no(Why::PortNotListed)),
            (&["*"], "example.org:80", &["127.0.0.1"], never("127.0.0.1", Class::Loopback)),
            (&["*"], "1.1.1.1:53", &[], yes(false)),
            (&["*"], "127.0.0.1:53", &[], never("127.0.0.1", Class::Loopback)),
            (&["*"], "[fe80::1]:53", &[], never("fe80::1", Class::LinkLocal)),
            (&["127.0.0.0/8:53"], "127.0.0.1:53", &[], yes(false)),
            (&["[2001:db8::]/32"], "[2001:db8:1::1]:53", &[], yes(false)),
            (
                &["[2001:db8::]/32"],
                "[2001:db9::1]:53",
                &[],
                Verdict::Refused {
                    address: Some("2001:db9::1".parse().unwrap()),
                    why: Why::NotListed,
                },
            ),
            (
                &["1.1.1.1:53"],
                "1.1.1.1:80",
                &[],
                Verdict::Refused { address: Some(v4.parse().unwrap()), why: Why::PortNotListed },
            ),
            (&["0.0.0.0/0"], "[::1]:80", &[], never("::1", Class::Loopback)),
            (&["[::]/0"], "127.0.0.1:80", &[], never("127.0.0.1", Class::Loopback)),
        ] {
            let (host, port) = Host::with_port(target).unwrap();
            let got = rules(allow).permits(&host, port.unwrap(), &addresses(resolved));
            assert_eq!(got, expected, "{allow:?} {target} {resolved:?}");
        }
    }

    #[test]
    fn a_rule_for_ipv6_is_none_for_ipv4() {
        let mapped: IpAddr = "::ffff:127.0.0.1".parse().unwrap();
        let (never, all) = (Why::Class(Class::Loopback), rules(&["[::]/0", "*", "good.test"]));
        let refused = Verdict::Refused { address: Some(mapped.to_canonical()), why: never };
        assert_eq!(all.permits(&Host::Address(mapped), 80, &[]), refused);
        assert_eq!(all.permits(&Host::Name("good.test".into()), 80, &[mapped]), refused);
    }

    #[test]
    fn a_kind_that_only_the_host_knows_counts() {
        let own = |_| Class::ThisHost;
        let (host, found) = (Host::Name("example.org".into()), addresses(&["1.1.1.1"]));
        for (allow, open) in
            [(&["*"][..], false), (&["example.org"], false), (&["*", "1.1.1.1"], true)]
        {
            let verdict = rules(allow).permits_with(&host, 443, &found, own);
            assert_eq!(matches!(verdict, Verdict::Permitted { .. }), open, "{allow:?}");
            let verdict = rules(allow).permits_with(&Host::Address(found[0]), 443, &[], own);
            assert_eq!(matches!(verdict, Verdict::Permitted { .. }), open, "{allow:?}");
        }
    }

    /// Whatever the rules and the destination: no address that is not public without a rule
    /// that has it, no name without a rule that has it, and more rules never close anything.
    #[test]
    fn promises_hold_for_any_rules() {
        let mut chance = Chance::new(0xa110);
        let labels = ["a", "b", "example", "org", "xn--x"];
        let name = |chance: &mut Chance| {
            let count = 1 + chance.below(3);
            let picked: Vec<_> = (0..count).map(|_| labels[chance.below(labels.len())]).collect();
            picked.join(".")
        };
        let address = |chance: &mut Chance| -> IpAddr {
            let word = chance.word();
            let starts: [u32; 7] =
                [0x7f00_0000, 0x0a00_0000, 0xa9fe_a900, 0x0101_0000, 0, 0x6440_0000, 0xc0a8_0000];
            let v4 = starts[chance.below(7)] | u32::try_from(word & 0xff).unwrap();
            match chance.below(5) {
                0 => IpAddr::V6((u128::from(word) << 64 | u128::from(chance.word())).into()),
                1 => IpAddr::V6((0xffff_0000_0000 | u128::from(v4)).into()),
                2 => IpAddr::V6((0x64_ff9b << 96 | u128::from(v4)).into()),
                _ => IpAddr::V4(v4.into()),
            }
        };
        let mut permitted = 0;
        for _ in 0..100_000 {
            let mut allow = Rules::default();
            for _ in 0..chance.below(4) {
                let ports = [Ports::Web, Ports::Any, Ports::One(443)][chance.below(3)];
                let what = match chance.below(4) {
                    0 => What::Domain(name(&mut chance)),
                    1 => What::SubDomains(name(&mut chance)),
                    2 => What::Public,
                    _ => {
                        let address = address(&mut chance).to_canonical();
                        let bits = if address.is_ipv4() { 33 } else { 129 };
                        let bits = u8::try_from(chance.below(bits)).unwrap();
                        What::Network { first: masked(address, bits).unwrap(), bits }
                    }
                };
                let rule = Rule { what, ports };
                if ports != Ports::Web || !matches!(rule.what, What::Public | What::Network { .. })
                {
                    assert_eq!(rule.to_string().parse::<Rule>().as_ref(), Ok(&rule));
                }
                allow.allow.push(rule);
            }
            let port = [80, 443, 22][chance.below(3)];
            let (host, resolved) = if chance.below(3) == 0 {
                (Host::Address(address(&mut chance).to_canonical()), vec![])
            } else {
                let found = (0..chance.below(3)).map(|_| address(&mut chance)).collect();
                (Host::Name(name(&mut chance)), found)
            };
            let verdict = allow.permits(&host, port, &resolved);
            let Verdict::Permitted { .. } = verdict else { continue };
            permitted += 1;
            let mut reached = resolved.clone();
            match &host {
                Host::Address(address) => reached.push(*address),
                Host::Name(name) => {
                    let own = |rule: &Rule| match &rule.what {
                        What::Domain(domain) => domain == name,
                        What::SubDomains(domain) => name.ends_with(&format!(".{domain}")),
                        What::Public => true,
                        What::Network { .. } => false,
                    };
                    assert!(allow.allow.iter().any(|rule| own(rule) && rule.ports.have(port)));
                }
            }
            for address in reached {
                let listed = |rule: &Rule| match rule.what {
                    What::Network { first, bits } => masked(address.to_canonical(), bits)
                        .is_some_and(|start| start == first && rule.ports.have(port)),
                    _ => false,
                };
                let listed = allow.allow.iter().any(listed);
                assert!(listed || Class::of(address) == Class::Public, "{allow:?} {address}");
            }
            let more = [&allow.allow[..], &[Rule::public()]].concat();
            let more = Rules { allow: more }.permits(&host, port, &resolved);
            assert!(matches!(more, Verdict::Permitted { .. }));
        }
        assert!(permitted > 1_000, "{permitted}");
    }
}
