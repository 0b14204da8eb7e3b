//! Names of images in registries.
//!
//! Understands what Docker does: `debian` is `docker.io/library/debian:latest`. Lets nothing
//! through that would mean something else in a URL.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use crate::error::shown;
use crate::{Digest, Error, Result};

const DEFAULT_REGISTRY: &str = "docker.io";

/// Where an image is in a registry.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Reference {
    registry: String,
    repository: String,
    tag: Option<String>,
    digest: Option<Digest>,
}

impl Reference {
    /// The registry's name, with its port if one was given.
    pub fn registry(&self) -> &str {
        &self.registry
    }

    /// The repository in it.
    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// The digest, if the reference has one.
    pub fn digest(&self) -> Option<Digest> {
        self.digest
    }

    /// The tag; `latest` if neither a tag nor a digest was given.
    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    /// What is asked for in the registry: the digest, or else the tag.
    pub(crate) fn version(&self) -> String {
        match (self.digest, &self.tag) {
            (Some(digest), _) => digest.to_string(),
            (None, Some(tag)) => tag.clone(),
            (None, None) => "latest".into(),
        }
    }

    /// The host that answers for the registry.
    pub(crate) fn host(&self) -> &str {
        if self.registry == DEFAULT_REGISTRY { "registry-1.docker.io" } else { &self.registry }
    }

    /// Whether the registry is on this machine, where nobody listens in.
    pub(crate) fn is_loopback(&self) -> bool {
        let name = match self.registry.strip_prefix('[') {
            Some(rest) => rest.split(']').next().unwrap_or_default(),
            None => self.registry.split(':').next().unwrap_or_default(),
        };
        name == "localhost" || name.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.registry, self.repository)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        if let Some(digest) = &self.digest {
            write!(f, "@{digest}")?;
        }
        Ok(())
    }
}

impl FromStr for Reference {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let bad = |reason| Error::Reference { text: shown(text.as_bytes()), reason };
        if text.len() > 512 {
            return Err(bad("it is too long"));
        }
        let (rest, digest) = match text.split_once('@') {
            Some((rest, digest)) => (rest, Some(digest.parse::<Digest>()?)),
            None => (text, None),
        };
        // A colon after the last slash is a tag's; before it, a port's.
        let name_from = rest.rfind('/').map_or(0, |slash| slash + 1);
        let (rest, tag) = match rest[name_from..].find(':') {
            Some(colon) => {
                let colon = name_from + colon;
                (&rest[..colon], Some(&rest[colon + 1..]))
            }
            None => (rest, None),
        };
        let (registry, repository) = match rest.split_once('/') {
            Some((first, rest)) if first.contains(['.', ':']) || first == "localhost" => {
                (first, rest.to_owned())
            }
            Some(_) => (DEFAULT_REGISTRY, rest.to_owned()),
            None => (DEFAULT_REGISTRY, format!("library/{rest}")),
        };
        let registry = match registry {
            "index.docker.io" | "registry-1.docker.io" => DEFAULT_REGISTRY,
            other => other,
        };
        if !is_registry(registry) {
            return Err(bad("the registry is no host name, with or without a port"));
        }
        let repository = match repository.split_once('/') {
            None if registry == DEFAULT_REGISTRY => format!("library/{repository}"),
            _ => repository,
        };
        if !repository.split('/').all(is_step) {
            return Err(bad("a repository has lower-case letters, digits, and . _ - between them"));
        }
        if !tag.is_none_or(is_tag) {
            return Err(bad("the tag is no possible one"));
        }
        let latest = || digest.is_none().then(|| "latest".to_owned());
        let tag = tag.map(str::to_owned).or_else(latest);
        Ok(Self { registry: registry.to_owned(), repository, tag, digest })
    }
}

fn is_registry(text: &str) -> bool {
    let is_port = |port: &str| {
        port.bytes().all(|b| b.is_ascii_digit()) && port.parse::<u16>().is_ok_and(|n| n > 0)
    };
    let rest_is_port = |rest: &str| rest.is_empty() || rest.strip_prefix(':').is_some_and(is_port);
    if let Some(rest) = text.strip_prefix('[') {
        return rest.split_once(']').is_some_and(|(ip, rest)| {
            ip.parse::<std::net::Ipv6Addr>().is_ok() && rest_is_port(rest)
        });
    }
    let (name, rest) = text.split_at(text.find(':').unwrap_or(text.len()));
    let is_label = |label: &str| {
        !label.is_empty()
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
    };
    name.split('.').all(is_label) && rest_is_port(rest)
}

fn is_step(step: &str) -> bool {
    let inner = |b: u8| matches!(b, b'a'..=b'z' | b'0'..=b'9');
    let bytes = step.as_bytes();
    bytes.first().is_some_and(|&b| inner(b))
        && bytes.last().is_some_and(|&b| inner(b))
        && bytes.iter().all(|&b| inner(b) || matches!(b, b'.' | b'_' | b'-'))
        // `..` would climb in a URL.
        && !step.contains("..")
}

fn is_tag(tag: &str) -> bool {
    let first = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    !tag.is_empty()
        && tag.len() <= 128
        && tag.bytes().next().is_some_and(first)
        && tag.bytes().all(|b| first(b) || matches!(b, b'.' | b'-'))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn short_names_are_made_whole() {
        let digest = format!("sha256:{}", "0".repeat(64));
        for (text, whole) in [
            ("debian", "docker.io/library/debian:latest"),
            ("debian:12", "docker.io/library/debian:12"),
            ("user/image", "docker.io/user/image:latest"),
            ("docker.io/debian", "docker.io/library/debian:latest"),
            ("index.docker.io/library/debian:12", "docker.io/library/debian:12"),
            ("ghcr.io/a/b/c:v1.2-x", "ghcr.io/a/b/c:v1.2-x"),
            ("localhost/x", "localhost/x:latest"),
            ("127.0.0.1:5000/x:y", "127.0.0.1:5000/x:y"),
            ("[::1]:5000/x", "[::1]:5000/x:latest"),
            (&format!("r.io/x@{digest}"), &format!("r.io/x@{digest}")),
            (&format!("r.io/x:1@{digest}"), &format!("r.io/x:1@{digest}")),
        ] {
            let reference: Reference = text.parse().unwrap();
            assert_eq!(reference.to_string(), whole);
            assert_eq!(whole.parse::<Reference>().unwrap(), reference, "{whole}");
        }
    }

    #[test]
    fn what_is_no_reference() {
        for text in [
            "",
            "/",
            ":",
            "@",
            "a/",
            "/a",
            "A",
            "a b",
            "a:",
            "a:-",
            "a@",
            "a@sha256:0",
            "../a",
            "r.io/../a",
            "r.io/a..b",
            "r.io/a?b",
            "r.io/a%2e",
            "r.io:0/a",
            "r.io:x/a",
            "r.io:99999/a",
            "u@r.io/a",
            "r.io#/a",
            "http://r.io/a",
            "[::1/a",
            "[x]/a",
            ".r.io/a",
            "r.io:+5/a",
        ] {
            assert!(text.parse::<Reference>().is_err(), "{text}");
        }
        assert!("a".repeat(513).parse::<Reference>().is_err());
        assert!(format!("a:{}", "t".repeat(129)).parse::<Reference>().is_err());
    }

    #[test]
    fn only_this_machine_is_loopback() {
        for text in ["localhost:5/a", "localhost/a", "127.0.0.1:5/a", "127.9.9.9:5/a", "[::1]/a"] {
            assert!(text.parse::<Reference>().unwrap().is_loopback(), "{text}");
        }
        for text in ["a", "r.io/a", "10.0.0.1:5/a", "localhost.r.io/a", "127.0.0.1.r.io/a"] {
            assert!(!text.parse::<Reference>().unwrap().is_loopback(), "{text}");
        }
    }
}
