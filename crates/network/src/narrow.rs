//! What one sandbox may reach of what its pool's rules open. Nothing here does I/O. These rules
//! close and never open: whatever they say, the pool's rules have permitted a destination first.

use std::net::{IpAddr, Ipv4Addr};

use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use crate::address::Host;
use crate::error::InvalidRule;
use crate::rules::{Ports, Rule, Verdict, What, Why};

/// The rules of one sandbox, which narrow those of its pool: what is in `deny` is closed, but for
/// what is in `allow`. Empty ones, which are the default, close nothing.
///
/// An entry of `allow` is a [`Rule`], for all ports where it names none. An entry of `deny` is an
/// address or a network; `0.0.0.0/0` is all that there is, names and IPv6 too. A name in `allow`
/// opens what it leads to for that name only: a server that is asked for another one, in a TLS
/// handshake or an HTTP request, is not reached.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EgressRules {
    /// What is open whatever is denied.
    pub allow: Vec<Rule>,
    /// What is closed.
    pub deny: Vec<Rule>,
}

impl EgressRules {
    /// No network at all.
    pub fn nothing() -> Self {
        let what = What::Network { first: Ipv4Addr::UNSPECIFIED.into(), bits: 0 };
        Self { allow: Vec::new(), deny: vec![Rule { what, ports: Ports::Any }] }
    }

    /// That nothing is denied by its name, which nobody could hold to.
    ///
    /// # Errors
    /// [`InvalidRule`] with the first entry that is.
    pub fn check(&self) -> Result<(), InvalidRule> {
        let by_name = |rule: &&Rule| !matches!(rule.what, What::Network { .. });
        match self.deny.iter().find(by_name) {
            Some(rule) => {
                let problem = "only addresses and networks can be denied";
                Err(InvalidRule { text: rule.to_string(), problem })
            }
            None => Ok(()),
        }
    }

    /// Weighs again what the pool's rules say of a destination.
    pub(crate) fn weigh(
        &self,
        verdict: Verdict,
        host: &Host,
        port: u16,
        resolved: &[IpAddr],
    ) -> Verdict {
        let Verdict::Permitted { by_name } = verdict else { return verdict };
        let refused = |address| Verdict::Refused { address, why: Why::Denied };
        match host {
            Host::Address(address) if self.reaches(*address, port) => verdict,
            Host::Address(address) => refused(Some(*address)),
            Host::Name(name) if self.allows(name, port) => {
                Verdict::Permitted { by_name: by_name || !self.deny.is_empty() }
            }
            Host::Name(_) if self.deny.iter().any(|rule| all(rule) && rule.ports.have(port)) => {
                refused(None)
            }
            Host::Name(_) => resolved
                .iter()
                .find(|address| !self.reaches(**address, port))
                .map_or(verdict, |address| refused(Some(*address))),
        }
    }

    /// Whether a name may be looked up.
    pub(crate) fn looks_up(&self, name: &str) -> bool {
        let nothing = self.deny.iter().any(|rule| all(rule) && rule.ports == Ports::Any);
        !nothing || self.allow.iter().any(|rule| rule.has_name(name))
    }

    /// Whether what a name leads to is open for that name.
    pub(crate) fn allows(&self, name: &str, port: u16) -> bool {
        self.allow.iter().any(|rule| rule.has_name(name) && has_port(rule, port))
    }

    /// Whether an address is open by itself.
    pub(crate) fn reaches(&self, address: IpAddr, port: u16) -> bool {
        let address = address.to_canonical();
        let denied =
            |rule: &Rule| (all(rule) || rule.has_address(address)) && rule.ports.have(port);
        let allowed = |rule: &Rule| {
            (rule.what == What::Public || rule.has_address(address)) && has_port(rule, port)
        };
        !self.deny.iter().any(denied) || self.allow.iter().any(allowed)
    }
}

/// Of one that names none, all: these rules open nothing.
fn has_port(rule: &Rule, port: u16) -> bool {
    rule.ports == Ports::Web || rule.ports.have(port)
}

fn all(rule: &Rule) -> bool {
    rule.what == What::Network { first: Ipv4Addr::UNSPECIFIED.into(), bits: 0 }
}

/// Rules that may change while they are in force.
pub type Narrowed = watch::Receiver<EgressRules>;

/// Rules that close nothing, and stay so.
pub(crate) fn not_narrowed() -> Narrowed {
    watch::channel(EgressRules::default()).1
}

/// Waits until they change; for ever where nobody can change them any more. Cancel-safe.
pub(crate) async fn changed(rules: &mut Narrowed) {
    if rules.changed().await.is_err() {
        std::future::pending::<()>().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chance::Chance;
    use crate::rules::Rules;

    fn rules(allow: &[&str], deny: &[&str]) -> EgressRules {
        let all = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect();
        EgressRules { allow: all(allow), deny: all(deny) }
    }

    fn permits(rules: &EgressRules, pool: &[&str], target: &str, found: &[IpAddr]) -> Verdict {
        let pool: Rules = pool.iter().map(|text| text.parse::<Rule>().unwrap()).collect();
        let (host, port) = Host::with_port(target).unwrap();
        let verdict = pool.permits(&host, port.unwrap(), found);
        rules.weigh(verdict, &host, port.unwrap(), found)
    }

    #[test]
    fn the_table() {
        let everything = "0.0.0.0/0";
        for (allow, deny, target, found, open) in [
            (&[][..], &[][..], "1.1.1.1:22", "", true),
            (&[], &[everything], "1.1.1.1:22", "", false),
            (&[], &[everything], "[2606:4700::1]:22", "", false),
            (&[], &[everything], "a.example:443", "", false),
            (&[], &["[::]/0"], "[2606:4700::1]:22", "", false),
            (&[], &["[::]/0"], "1.1.1.1:22", "", true),
            (&[], &["1.1.1.0/24"], "1.1.1.1:22", "", false),
            (&[], &["1.1.1.0/24"], "1.1.2.1:22", "", true),
            (&[], &["1.1.1.0/24:25"], "1.1.1.1:22", "", true),
            (&[], &["1.1.1.0/24"], "a.example:443", "", true),
            (&[], &["1.1.1.0/24"], "a.example:443", "1.1.1.1", false),
            (&[], &["1.1.1.0/24"], "a.example:443", "::ffff:1.1.1.1", false),
            (&["1.1.1.1"], &[everything], "1.1.1.1:22", "", true),
            (&["1.1.1.1:80"], &[everything], "1.1.1.1:22", "", false),
            (&["1.1.1.1"], &[everything], "1.1.1.2:22", "", false),
            (&["a.example"], &[everything], "a.example:22", "1.1.1.1", true),
            (&["a.example:80"], &[everything], "a.example:22", "1.1.1.1", false),
            (&["a.example"], &[everything], "b.example:443", "1.1.1.1", false),
            (&["a.example"], &[everything], "1.1.1.1:443", "", false),
            (&["*.example"], &[everything], "a.example:443", "1.1.1.1", true),
            (&["*"], &[everything], "1.1.1.1:443", "", true),
            // Nothing that the pool does not open.
            (&["127.0.0.1"], &[], "127.0.0.1:80", "", false),
            (&["a.example"], &[], "a.example:80", "127.0.0.1", false),
        ] {
            let found: Vec<IpAddr> =
                found.split_terminator(' ').map(|it| it.parse().unwrap()).collect();
            let verdict = permits(&rules(allow, deny), &["*"], target, &found);
            let is_open = matches!(verdict, Verdict::Permitted { .. });
            assert_eq!(is_open, open, "{allow:?} {deny:?} {target} {found:?}: {verdict:?}");
        }
        // What is open for its name only is asked for by that.
        let by_name = |rules| permits(&rules, &["*"], "a.example:443", &[]);
        let open = rules(&["a.example"], &[everything]);
        assert_eq!(by_name(open), Verdict::Permitted { by_name: true });
        assert_eq!(by_name(rules(&["a.example"], &[])), Verdict::Permitted { by_name: false });
        assert!(EgressRules::nothing().deny == rules(&[], &[everything]).deny);
    }

    #[test]
    fn only_addresses_are_denied() {
        rules(&["*", "a.example"], &["0.0.0.0/0", "[::]/0", "10.0.0.0/8:22"]).check().unwrap();
        for deny in ["a.example", "*.example", "*"] {
            let error = rules(&[], &["10.0.0.0/8", deny]).check().unwrap_err();
            assert_eq!(error.text, deny);
        }
        let text = r#"{"allow":["a.example"],"deny":["0.0.0.0/0"]}"#;
        let read: EgressRules = serde_json::from_str(text).unwrap();
        assert_eq!(serde_json::to_string(&read).unwrap(), text);
    }

    /// Whatever the rules: nothing is open that the pool's do not open, empty ones change nothing,
    /// what is denied and not allowed is closed, and what is allowed is as the pool has it.
    #[test]
    fn they_close_and_never_open() {
        let texts = [
            "*",
            "a.test",
            "*.test",
            "b.a.test:22",
            "1.1.1.1",
            "1.1.0.0/16",
            "10.0.0.0/8:443",
            "127.0.0.1",
            "0.0.0.0/0",
            "[::]/0",
            "[2606:4700::]/32",
        ];
        let hosts = [
            "a.test",
            "b.a.test",
            "c.other",
            "1.1.1.1",
            "1.1.2.2",
            "10.0.0.1",
            "127.0.0.1",
            "[2606:4700::1]",
        ];
        let mut chance = Chance::new(0x0a55);
        let mut closed = 0;
        for _ in 0..50_000 {
            let mut some = |texts: &[&str]| -> Vec<Rule> {
                let count = chance.below(4);
                (0..count).map(|_| texts[chance.below(texts.len())].parse().unwrap()).collect()
            };
            let pool: Rules = some(&texts).into_iter().collect();
            let rules = EgressRules { allow: some(&texts), deny: some(&texts[4..]) };
            let host = Host::parse(hosts[chance.below(hosts.len())]).unwrap();
            let port = [22, 80, 443][chance.below(3)];
            let found: Vec<IpAddr> = match host {
                Host::Address(_) => Vec::new(),
                Host::Name(_) => ["1.1.1.1", "1.2.3.4", "10.0.0.1", "2606:4700::1"]
                    [..chance.below(5)]
                    .iter()
                    .map(|it| it.parse().unwrap())
                    .collect(),
            };
            let before = pool.permits(&host, port, &found);
            let after = rules.weigh(before.clone(), &host, port, &found);
            let is_open = |verdict: &Verdict| matches!(verdict, Verdict::Permitted { .. });
            assert!(is_open(&before) || after == before);
            assert_eq!(EgressRules::default().weigh(before.clone(), &host, port, &found), before);
            let allowed = EgressRules { deny: Vec::new(), ..rules.clone() };
            assert_eq!(allowed.weigh(before.clone(), &host, port, &found), before);
            let reached: Vec<IpAddr> = match host {
                Host::Address(address) => vec![address],
                Host::Name(_) => found.clone(),
            };
            let none = EgressRules { allow: Vec::new(), ..rules.clone() };
            let denied = reached.iter().any(|address| {
                rules.deny.iter().any(|rule| rule.has_address(*address) && rule.ports.have(port))
            });
            assert!(!denied || !is_open(&none.weigh(before.clone(), &host, port, &found)));
            closed += usize::from(is_open(&before) && !is_open(&after));
        }
        assert!(closed > 1_000, "{closed}");
    }
}
