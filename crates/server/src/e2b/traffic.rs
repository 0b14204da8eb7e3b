//! Requests that are for a sandbox: whether it is there to be asked, and what lets in those that
//! have no key. Whoever knows a sandbox's id may ask its ports, as its clients count on, unless it
//! was made without public traffic; nothing else of it, nor any other session, is open to them.

use std::sync::Arc;

use axum::http::request::Parts;
use axum::http::uri::Authority;
use axum::http::{Extensions, HeaderMap, Method, Uri};
use axum::response::{IntoResponse, Response};
use base64::Engine;
use base64::prelude::{BASE64_STANDARD_NO_PAD, BASE64_URL_SAFE_NO_PAD};
use denizen::{EgressRules, Error, Rule};
use denizen_api::Code;
use jiff::Timestamp;
use serde_json::json;
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;
use uuid::Uuid;

use super::Sandboxes;
use super::record::{Sandbox, Start, after};
use super::routes::{to_the_end, unsupported};
use super::told::{BAD_TOKEN, NO_TOKEN, Told};
use super::wire::{CLIENT, Network, TIMEOUT};
use crate::SESSION;
use crate::access::guard::{OfSandbox, SANDBOX};
use crate::access::rules;
use crate::api::{Answer, Refused};

/// What has the token for a sandbox's ports.
const TRAFFIC_TOKEN: &str = "e2b-traffic-access-token";
/// Where the code interpreter is asked.
const INTERPRETER_PORT: u16 = 49999;

/// That a request is for a port of a sandbox, by one of the ways that clients of E2B know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Visit {
    pub(crate) sandbox: Uuid,
    pub(crate) port: u16,
}

/// That somebody is let in who has no key.
pub(crate) struct Entrance {
    pub(crate) sandbox: Uuid,
    /// The token that its request was signed with, which must be good.
    pub(crate) signed_with: Option<String>,
}

impl Entrance {
    fn open(sandbox: Uuid) -> Self {
        Self { sandbox, signed_with: None }
    }
}

/// The id of a sandbox as its clients write it, some with who they are behind it. Other names of
/// sessions are not for them.
pub(crate) fn id(text: &str) -> Option<Uuid> {
    let plain = text.strip_suffix(CLIENT).and_then(|id| id.strip_suffix('-')).unwrap_or(text);
    let simple = plain.len() == 32 && plain.bytes().all(|byte| byte.is_ascii_hexdigit());
    plain.parse().ok().filter(|_| simple)
}

/// Whether somebody may take that for a sandbox's id, if not here.
pub(crate) fn looks_like_one(text: &str) -> bool {
    let id = text.split('-').next().unwrap_or_default();
    (16..=32).contains(&id.len())
        && id.bytes().all(|byte| byte.is_ascii_alphanumeric())
        && id.bytes().any(|byte| byte.is_ascii_digit())
}

/// That there is no such sandbox, or that it sleeps.
pub(crate) fn gone(sandbox: &str) -> Response {
    Told::gone(sandbox).into_response()
}

/// The same, of one of ours.
fn no_more(sandbox: Uuid) -> Response {
    gone(&sandbox.simple().to_string())
}

/// What lets one in at a sandbox's ports, if not everybody is let in.
pub(super) fn token(network: &Network) -> Option<String> {
    let closed = network.allow_public_traffic == Some(false);
    // Two of them have more than enough that nobody can guess.
    closed.then(|| format!("{}{}", Uuid::new_v4().simple(), Uuid::new_v4().simple()))
}

/// Refuses what of a network is not had here.
pub(super) fn check(network: &Network) -> Answer<()> {
    let has = |value: &Option<serde_json::Value>| {
        value.as_ref().is_some_and(|value| match value {
            serde_json::Value::Object(all) => !all.is_empty(),
            value => !value.is_null(),
        })
    };
    let lacking = [
        (has(&network.egress_proxy), "a proxy for a sandbox's traffic (egressProxy)"),
        (has(&network.rules), "rules that change requests on their way (network.rules)"),
        (
            network.https_ports.as_ref().is_some_and(|ports| !ports.is_empty()),
            "ports that speak TLS within (httpsPorts)",
        ),
        (network.dns_servers.is_some(), "name servers of a sandbox's own (dnsServers)"),
    ];
    if let Some((_, what)) = lacking.into_iter().find(|(asked, _)| *asked) {
        return Err(unsupported(what));
    }
    let asks = |value: &serde_json::Value| {
        !matches!(value, serde_json::Value::Null) && *value != json!([])
    };
    if let Some((name, _)) = network.others.iter().find(|(_, value)| asks(value)) {
        return Err(unsupported(&format!("this of a network: {name}")));
    }
    match &network.mask_request_host {
        Some(mask) if !is_host(&host_at(mask, 1)) => {
            let why = format!("mask request host is not valid: {mask}");
            Err(Refused::new(Code::BadRequest, why))
        }
        _ => Ok(()),
    }
}

/// Whether a text is a host as requests have it: a name or an address, and a port if need be.
fn is_host(text: &str) -> bool {
    let Ok(host) = text.parse::<Authority>() else { return false };
    let name = host.host();
    let end = |byte: Option<&u8>| byte.is_some_and(u8::is_ascii_alphanumeric);
    let is_label = |label: &str| {
        let (bytes, inner) =
            (label.as_bytes(), |byte: &u8| byte.is_ascii_alphanumeric() || b"-_".contains(byte));
        label.len() < 64 && end(bytes.first()) && end(bytes.last()) && bytes.iter().all(inner)
    };
    let is_name = || name.split('.').all(is_label);
    let is_address = name.starts_with('[') && name.ends_with(']');
    let rest = text.strip_prefix(name);
    (is_address || is_name())
        && (rest == Some("") || host.port_u16().is_some() && !text.contains('@'))
}

/// What a port is told to be the host.
fn host_at(mask: &str, port: u16) -> String {
    mask.replace("${PORT}", &port.to_string())
}

/// What of the pool's network is open to a sandbox; none if all of it is.
pub(super) fn egress(network: &Network, allowed: Option<bool>) -> Answer<Option<EgressRules>> {
    let rules = |texts: &Option<Vec<String>>| {
        let texts = texts.as_deref().unwrap_or_default().iter();
        let bad = |error: denizen::InvalidRule| Refused::new(Code::BadRequest, error.to_string());
        texts.map(|text| spelled(text).parse::<Rule>().map_err(bad)).collect::<Answer<Vec<_>>>()
    };
    let mut egress =
        EgressRules { allow: rules(&network.allow_out)?, deny: rules(&network.deny_out)? };
    let nothing = EgressRules::nothing();
    if allowed == Some(false) {
        egress.deny.extend(nothing.deny.clone());
    }
    // Beside all that is open, a name that is allowed would say nothing, and look as if it did.
    if egress.allow.iter().any(is_name) && !nothing.deny.iter().all(|all| egress.deny.contains(all))
    {
        let why = "When specifying allowed domains in allow out, you must include 'ALL_TRAFFIC' in \
                   deny out to block all other traffic.";
        return Err(Refused::new(Code::BadRequest, why));
    }
    if egress.deny.is_empty() {
        // What is allowed stands against what is denied, and says nothing by itself.
        return Ok(None);
    }
    egress.check().map_err(|error| Refused::new(Code::BadRequest, error.to_string()))?;
    Ok(Some(egress))
}

/// Whether a rule is about a name: only what is not can be denied.
fn is_name(rule: &Rule) -> bool {
    EgressRules { allow: Vec::new(), deny: vec![rule.clone()] }.check().is_err()
}

/// A destination as rules have it, which write IPv6 in brackets.
fn spelled(text: &str) -> String {
    let (address, bits) = text.split_once('/').unwrap_or((text, ""));
    match address.parse::<std::net::Ipv6Addr>() {
        Ok(address) if bits.is_empty() => format!("[{address}]"),
        Ok(address) => format!("[{address}]/{bits}"),
        Err(_) => text.to_owned(),
    }
}

/// What was signed for a file of a sandbox.
struct Signed<'a> {
    path: &'a str,
    user: &'a str,
    signature: &'a str,
    expiration: Option<&'a str>,
}

impl Signed<'_> {
    /// Whether it was signed by who has the token, for this and for now.
    fn check(&self, method: &Method, token: &str) -> Result<(), &'static str> {
        let operation = match *method {
            Method::GET | Method::HEAD => "read",
            _ => "write",
        };
        let Self { path, user, signature, expiration } = self;
        let mut signed = format!("{path}:{operation}:{user}:{token}");
        if let Some(expiration) = expiration {
            signed = format!("{signed}:{expiration}");
        }
        let digest = Sha256::digest(signed.as_bytes());
        // Clients differ in the alphabet that they write it in.
        let same = [BASE64_STANDARD_NO_PAD.encode(digest), BASE64_URL_SAFE_NO_PAD.encode(digest)]
            .iter()
            .any(|wanted| {
                bool::from(format!("v1_{wanted}").as_bytes().ct_eq(signature.as_bytes()))
            });
        if !same {
            return Err("invalid signature");
        }
        let until = expiration.map(|text| text.parse::<i64>().map_err(|_| "invalid signature"));
        match until.transpose()? {
            Some(until) if until < Timestamp::now().as_second() => {
                Err("signature is already expired")
            }
            _ => Ok(()),
        }
    }
}

impl Sandboxes {
    /// What is told of a sandbox that was asked for and is not there.
    pub(crate) fn if_gone(&self, asked: Option<Uuid>) -> Option<Response> {
        let is_gone = |id: &Uuid| {
            self.find(*id).is_some_and(|entry| entry.is_leaving())
                || matches!(self.pool.inspect(*id), Err(Error::Unknown { .. }))
        };
        asked.filter(is_gone).map(no_more)
    }

    /// Sees to it that a sandbox which a request is for is there to be asked: one that sleeps and
    /// wakes by itself does. What is no sandbox is nobody's business here.
    pub(crate) async fn arrive(self: &Arc<Self>, parts: &Parts) -> Result<(), Response> {
        let Some(sandbox) = of(parts) else { return Ok(()) };
        let Some(entry) = self.find(sandbox) else {
            // It may be a session that was made in another way.
            return match self.pool.inspect(sandbox) {
                Err(Error::Unknown { .. }) => Err(no_more(sandbox)),
                _ => Ok(()),
            };
        };
        let kept = entry.kept();
        if entry.is_leaving() || entry.is_over(self.now()) || !self.is_there(&entry) {
            return Err(no_more(sandbox));
        }
        if kept.paused.is_none() {
            if kept.setup.start.is_none() {
                return Ok(());
            }
            let all = self.clone();
            let started = to_the_end(async move { all.start(&entry).await });
            return started.await.map_err(IntoResponse::into_response);
        }
        if !kept.wakes_by_itself() {
            return Err(no_more(sandbox));
        }
        let end = after(self.now(), TIMEOUT);
        let end = move |kept: &mut Sandbox, woken: bool| {
            if woken {
                kept.extend(end);
            }
        };
        let all = self.clone();
        let woken = to_the_end(async move { all.resume(&entry, true, end).await }).await;
        woken.map(drop).map_err(IntoResponse::into_response)
    }

    /// Whether somebody is let in who shows no key: to a port, to a file that a signature is for, to
    /// be told that it is well. None if that is not what is asked for.
    pub(crate) fn lets_in(&self, parts: &Parts) -> Answer<Option<Entrance>> {
        if let Some(visit) = parts.extensions.get::<Visit>() {
            let Some(entry) = self.find(visit.sandbox) else { return Ok(None) };
            let kept = entry.kept();
            let Some(wanted) = kept.traffic_token else {
                // Who has seen a page of a sandbox knows its id, and may not run code there.
                let runs = kept.setup.start == Some(Start::Interpreter)
                    && visit.port == INTERPRETER_PORT
                    && parts.uri.path().ends_with("/execute");
                return Ok((!runs).then_some(Entrance::open(kept.id)));
            };
            let no = |why| Refused::new(Code::Forbidden, why);
            let shown = parts.headers.get(TRAFFIC_TOKEN).ok_or_else(|| no(NO_TOKEN))?;
            if wanted.as_bytes().ct_eq(shown.as_bytes()).into() {
                return Ok(Some(Entrance::open(kept.id)));
            }
            return Err(no(BAD_TOKEN));
        }
        match parts.uri.path() {
            // Whether it is well is asked without a token by some.
            "/health" => {
                let entry = of(parts).and_then(|id| self.find(id));
                return Ok(entry.map(|entry| Entrance::open(entry.kept().id)));
            }
            "/files" => {}
            _ => return Ok(None),
        }
        let query = parts.uri.query().unwrap_or_default();
        let query: Vec<(String, String)> = serde_urlencoded::from_str(query).unwrap_or_default();
        let value =
            |name: &str| query.iter().find(|(key, _)| key == name).map(|(_, it)| it.as_str());
        let Some(signature) = value("signature") else { return Ok(None) };
        let entry = of(parts).and_then(|sandbox| self.find(sandbox));
        let refused = |why: &str| Refused::new(Code::Unauthenticated, why);
        let kept = entry.ok_or_else(|| refused("invalid signature"))?.kept();
        if value("mode").is_some() || value("format").is_some() {
            return Err(refused("mode and format are not what was signed"));
        }
        let signed = Signed {
            path: value("path").unwrap_or_default(),
            user: value("username").unwrap_or_default(),
            signature,
            expiration: value("signature_expiration"),
        };
        signed.check(&parts.method, &kept.token).map_err(refused)?;
        Ok(Some(Entrance { sandbox: kept.id, signed_with: Some(kept.token) }))
    }

    /// What a port is told to be the host, if its sandbox was made so.
    pub(crate) fn host_for(&self, visit: Visit) -> Option<String> {
        let mask = self.find(visit.sandbox)?.kept().network.mask_request_host?;
        Some(host_at(&mask, visit.port))
    }
}

/// The sandbox that a request is for, if it is for one by a way of E2B's.
pub(crate) fn asked(uri: &Uri, headers: &HeaderMap, extensions: &Extensions) -> Option<Uuid> {
    let visited = || Some(extensions.get::<Visit>()?.sandbox);
    let by_name = || Some(extensions.get::<OfSandbox>()?.0);
    let named = || {
        // Anywhere else the header means nothing.
        rules::of_envd(uri.path())?;
        if headers.contains_key(SESSION) {
            return None;
        }
        id(headers.get(SANDBOX)?.to_str().ok()?)
    };
    visited().or_else(by_name).or_else(named)
}

fn of(parts: &Parts) -> Option<Uuid> {
    asked(&parts.uri, &parts.headers, &parts.extensions)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn only_what_was_signed_is_let_in() {
        // As sha256sum and base64 have it.
        let digest = Sha256::digest(b"a file.txt:read:user:secret");
        let signature = format!("v1_{}", BASE64_STANDARD_NO_PAD.encode(digest));
        let signed =
            |path, user, expiration| Signed { path, user, signature: &signature, expiration };
        let good = signed("a file.txt", "user", None);
        assert_eq!(good.check(&Method::GET, "secret"), Ok(()));
        assert_eq!(good.check(&Method::HEAD, "secret"), Ok(()));
        for bad in [
            good.check(&Method::POST, "secret"),
            good.check(&Method::GET, "other"),
            signed("a file.txt", "root", None).check(&Method::GET, "secret"),
            signed("b file.txt", "user", None).check(&Method::GET, "secret"),
            signed("a file.txt", "user", Some("9999999999")).check(&Method::GET, "secret"),
        ] {
            assert_eq!(bad, Err("invalid signature"));
        }
    }

    #[test]
    fn a_signature_ends_when_it_says_so() {
        for (until, wanted) in [
            ("1", Err("signature is already expired")),
            ("99999999999", Ok(())),
            ("never", Err("invalid signature")),
        ] {
            let digest = Sha256::digest(format!("f:write::secret:{until}").as_bytes());
            let signature = format!("v1_{}", BASE64_STANDARD_NO_PAD.encode(digest));
            let signed =
                Signed { path: "f", user: "", signature: &signature, expiration: Some(until) };
            assert_eq!(signed.check(&Method::POST, "secret"), wanted, "{until}");
        }
    }

    #[test]
    fn destinations_are_read_as_clients_write_them() {
        let network = |allow: &[&str], deny: &[&str]| Network {
            allow_out: Some(allow.iter().map(|it| (*it).to_owned()).collect()),
            deny_out: Some(deny.iter().map(|it| (*it).to_owned()).collect()),
            ..Network::default()
        };
        let read = egress(&network(&["8.8.8.8", "*.example.org"], &["0.0.0.0/0", "::/0"]), None);
        let read = read.unwrap().unwrap();
        assert_eq!((read.allow.len(), read.deny.len()), (2, 2));
        assert_eq!(read.deny[1].to_string(), "[::]/0");
        // All is open, whatever else is said to be.
        assert_eq!(egress(&network(&["8.8.8.8"], &[]), None).unwrap(), None);
        assert_eq!(egress(&network(&[], &[]), Some(false)).unwrap(), Some(EgressRules::nothing()));
        // A name is only allowed where all else is denied.
        let named = network(&["*.example.org"], &["10.0.0.0/8"]);
        assert_eq!(egress(&named, None).unwrap_err().0.code, Code::BadRequest);
        assert_eq!(egress(&named, Some(false)).unwrap().unwrap().allow.len(), 1);
        for bad in ["example.org", "300.1.1.1/33", "10.0.0.0/33"] {
            assert_eq!(
                egress(&network(&[], &[bad]), None).unwrap_err().0.code,
                Code::BadRequest,
                "{bad}"
            );
        }
    }

    #[test]
    fn a_host_is_one_that_a_request_can_have() {
        for good in ["localhost", "a.example:80", "10.0.0.1", "[::1]:80", "a_b.example"] {
            assert!(is_host(good), "{good}");
        }
        for bad in
            ["", "-https://abcd", "https://a.example", "a@b", "a:", "a:x", "a b", "a..b", "ä"]
        {
            assert!(!is_host(bad), "{bad}");
        }
    }

    #[test]
    fn only_ids_of_sandboxes_are_ids() {
        let id_of = Uuid::from_u128(7);
        assert_eq!(id(&id_of.simple().to_string()), Some(id_of));
        assert_eq!(id(&id_of.to_string()), None);
        assert_eq!(id(&format!("{}-{CLIENT}", id_of.simple())), Some(id_of));
        assert_eq!(id(&format!("{}-other", id_of.simple())), None);
        assert!(looks_like_one("im9r2ycjiy2534qsdy1oo") && looks_like_one("i0123456789abcdef-a"));
        assert!(!looks_like_one("demo") && !looks_like_one("a-name-of-some-length-1"));
        for text in ["", "demo", "0123456789abcdef0123456789abcdeg"] {
            assert_eq!(id(text), None, "{text}");
        }
    }
}
