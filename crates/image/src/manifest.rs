//! The documents of an image: indexes, manifests and configurations.
//!
//! Reads OCI's and Docker's (schema 2) forms, which differ in media types only, and picks what
//! fits this machine. Never does I/O, and takes nothing in a document for granted: each was
//! written by whoever made the image.

use std::collections::HashMap;
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::error::shown;
use crate::{Error, Limits, Result};

/// How many indexes may stand in front of a manifest. A layout needs two: its own and that of
/// an image for several architectures.
pub const MOST_INDEXES: usize = 3;

/// The SHA-256 of something. Written `sha256:` and 64 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Digest([u8; 32]);

impl Digest {
    /// That of these bytes.
    pub fn of(bytes: &[u8]) -> Self {
        Self::from(Sha256::new_with_prefix(bytes))
    }

    /// The digits alone.
    pub fn hex(&self) -> String {
        self.0.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    pub(crate) fn from_hex(hex: &str) -> Option<Self> {
        let mut bytes = [0; 32];
        // One digest, one spelling: capitals would name a second folder.
        let digit = |c: u8| matches!(c, b'0'..=b'9' | b'a'..=b'f');
        if hex.len() != 64 || !hex.bytes().all(digit) {
            return None;
        }
        for (byte, pair) in bytes.iter_mut().zip(hex.as_bytes().chunks(2)) {
            *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
        }
        Some(Self(bytes))
    }

    pub(crate) fn check(self, found: Self, what: &str) -> Result<()> {
        if self == found {
            return Ok(());
        }
        let (expected, found) = (self.to_string(), found.to_string());
        Err(Error::Digest { what: what.to_owned(), expected, found })
    }
}

impl From<Sha256> for Digest {
    fn from(hasher: Sha256) -> Self {
        Self(hasher.finalize().into())
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", self.hex())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> Self {
        digest.to_string()
    }
}

impl TryFrom<String> for Digest {
    type Error = Error;

    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

impl FromStr for Digest {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        text.strip_prefix("sha256:").and_then(Self::from_hex).ok_or_else(|| Error::Unsupported {
            what: format!("the digest {:?}", shown(text.as_bytes())),
            detail: "only sha256: and 64 lower-case hexadecimal digits are understood",
        })
    }
}

/// A system and an architecture, in the words of the Go language.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Platform {
    #[serde(default)]
    pub os: String,
    #[serde(default)]
    pub architecture: String,
}

impl Platform {
    /// Linux on this machine, or on the architecture asked for.
    pub fn wanted(architecture: Option<&str>) -> Self {
        let own = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            "x86" => "386",
            "powerpc64" => "ppc64le",
            other => other,
        };
        Self { os: "linux".into(), architecture: architecture.unwrap_or(own).into() }
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown = |text: &str| shown(text.as_bytes());
        write!(f, "{}/{}", shown(&self.os), shown(&self.architecture))
    }
}

/// What a document says of another: where it is and how large.
#[derive(Clone, Debug, Deserialize)]
pub struct Descriptor {
    #[serde(rename = "mediaType", default)]
    media_type: Option<String>,
    digest: String,
    pub size: u64,
    #[serde(default)]
    annotations: Option<HashMap<String, String>>,
    #[serde(default)]
    platform: Option<Platform>,
}

impl Descriptor {
    pub fn digest(&self) -> Result<Digest> {
        self.digest.parse()
    }

    /// The name a layout gives to an image of its index.
    pub fn reference(&self) -> Option<&str> {
        let annotations = self.annotations.as_ref()?;
        ["io.containerd.image.name", "org.opencontainers.image.ref.name"]
            .iter()
            .find_map(|key| annotations.get(*key))
            .map(String::as_str)
    }
}

/// An index or a manifest, as far as it is of interest.
#[derive(Deserialize)]
struct Document {
    #[serde(rename = "schemaVersion", default)]
    schema: Option<u64>,
    #[serde(default)]
    manifests: Option<Vec<Descriptor>>,
    #[serde(default)]
    config: Option<Descriptor>,
    #[serde(default)]
    layers: Option<Vec<Descriptor>>,
}

/// What one layer is.
#[derive(Clone, Debug)]
pub struct Blob {
    pub digest: Digest,
    pub size: u64,
}

/// A manifest: one configuration and the layers, lowest first.
#[derive(Debug)]
pub struct Manifest {
    pub config: Blob,
    pub layers: Vec<Blob>,
}

pub enum Parsed {
    Index(Vec<Descriptor>),
    Manifest(Manifest),
}

pub fn parse(bytes: &[u8], what: &str, limits: &Limits) -> Result<Parsed> {
    let document: Document =
        serde_json::from_slice(bytes).map_err(|e| Error::malformed(what, e.to_string()))?;
    if document.schema == Some(1) {
        return Err(Error::Unsupported {
            what: what.to_owned(),
            detail: "it is in Docker's first format, given up in 2017; push the image again with \
                     a newer tool",
        });
    }
    match (document.manifests, document.config, document.layers) {
        (Some(manifests), None, None) => Ok(Parsed::Index(manifests)),
        (None, Some(config), Some(layers)) => manifest(&config, &layers, what, limits),
        // One reader would see an index and another a manifest.
        (Some(_), ..) => Err(Error::malformed(what, "it is an index and a manifest at once")),
        _ => Err(Error::malformed(what, "it is neither an index nor a manifest")),
    }
}

fn manifest(
    config: &Descriptor,
    layers: &[Descriptor],
    what: &str,
    limits: &Limits,
) -> Result<Parsed> {
    if layers.len() > limits.layers {
        let limit = u64::try_from(limits.layers).unwrap_or(u64::MAX);
        return Err(Error::too_large(what, limit, "layers"));
    }
    let blob = |one: &Descriptor, limit: u64| -> Result<Blob> {
        let digest = one.digest()?;
        let kind = one.media_type.as_deref().unwrap_or_default();
        if kind.contains("encrypted") {
            return Err(Error::Unsupported {
                what: format!("the layer {digest}"),
                detail: "it is encrypted; decrypt the image first",
            });
        }
        if one.size > limit {
            return Err(Error::too_large(&format!("{digest} of {what}"), limit, "bytes"));
        }
        Ok(Blob { digest, size: one.size })
    };
    let layers =
        layers.iter().map(|layer| blob(layer, limits.blob_bytes)).collect::<Result<_>>()?;
    Ok(Parsed::Manifest(Manifest { config: blob(config, limits.manifest_bytes)?, layers }))
}

/// The entry of an index that is for `wanted`.
pub fn choose<'a>(
    index: &'a [Descriptor],
    wanted: &Platform,
    what: &str,
) -> Result<&'a Descriptor> {
    if let Some(found) = index.iter().find(|one| one.platform.as_ref() == Some(wanted)) {
        return Ok(found);
    }
    // A single image without a word on its platform: its configuration will tell.
    if let [only] = index
        && only.platform.is_none()
    {
        return Ok(only);
    }
    let named = index.iter().filter_map(|one| one.platform.as_ref()).take(20);
    let mut available: Vec<String> = named.map(Platform::to_string).collect();
    available.dedup();
    Err(Error::Platform {
        what: what.to_owned(),
        wanted: wanted.to_string(),
        available: if available.is_empty() { "nothing".into() } else { available.join(", ") },
    })
}

/// How the image is to be run.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageConfig {
    /// Names and values, in the image's order.
    pub env: Vec<(String, String)>,
    /// Absolute.
    pub working_dir: PathBuf,
    /// `user`, `user:group`, either as a name or a number; empty for root. Names are those of
    /// the image's own `/etc/passwd`.
    pub user: String,
    /// What runs in front of `cmd`.
    pub entrypoint: Vec<String>,
    /// What runs if the caller names no command.
    pub cmd: Vec<String>,
}

/// Lists are lists, but old images have a single text in their place.
#[derive(Deserialize)]
#[serde(untagged)]
enum Words {
    One(String),
    Many(Vec<String>),
}

impl Words {
    fn list(words: Option<Self>) -> Vec<String> {
        match words {
            None => Vec::new(),
            Some(Self::One(word)) => vec![word],
            Some(Self::Many(words)) => words,
        }
    }
}

#[derive(Deserialize)]
struct ConfigFile {
    #[serde(default)]
    os: Option<String>,
    #[serde(default)]
    architecture: Option<String>,
    #[serde(default)]
    config: Option<RunConfig>,
    rootfs: RootFs,
}

#[derive(Default, Deserialize)]
struct RunConfig {
    #[serde(rename = "Env", default)]
    env: Option<Vec<String>>,
    #[serde(rename = "WorkingDir", default)]
    working_dir: Option<String>,
    #[serde(rename = "User", default)]
    user: Option<String>,
    #[serde(rename = "Entrypoint", default)]
    entrypoint: Option<Words>,
    #[serde(rename = "Cmd", default)]
    cmd: Option<Words>,
}

#[derive(Deserialize)]
struct RootFs {
    #[serde(default)]
    diff_ids: Vec<String>,
}

/// How to run the image, and the digests of its layers' tar streams, lowest first.
pub fn config(
    bytes: &[u8],
    wanted: &Platform,
    layers: usize,
    what: &str,
) -> Result<(ImageConfig, Vec<Digest>)> {
    let file: ConfigFile =
        serde_json::from_slice(bytes).map_err(|e| Error::malformed(what, e.to_string()))?;
    let own = |given: Option<String>, wanted: &str| {
        given.filter(|given| !given.is_empty()).unwrap_or_else(|| wanted.to_owned())
    };
    let is = Platform {
        os: own(file.os, &wanted.os),
        architecture: own(file.architecture, &wanted.architecture),
    };
    if is != *wanted {
        return Err(Error::Platform {
            what: what.to_owned(),
            wanted: wanted.to_string(),
            available: is.to_string(),
        });
    }
    let diff_ids: Vec<Digest> =
        file.rootfs.diff_ids.iter().map(|id| id.parse()).collect::<Result<_>>()?;
    if diff_ids.len() != layers {
        let detail = format!("it names {} layers, its manifest {layers}", diff_ids.len());
        return Err(Error::malformed(what, detail));
    }
    let run = file.config.unwrap_or_default();
    let config = ImageConfig {
        // A word without a value is no variable; Docker drops it as well.
        env: run
            .env
            .unwrap_or_default()
            .iter()
            .filter_map(|one| one.split_once('='))
            .filter(|(name, _)| !name.is_empty())
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .collect(),
        working_dir: PathBuf::from("/").join(run.working_dir.unwrap_or_default()),
        user: run.user.unwrap_or_default(),
        entrypoint: Words::list(run.entrypoint),
        cmd: Words::list(run.cmd),
    };
    // None of these can be handed to a program with a NUL in it.
    let words = config.entrypoint.iter().chain(&config.cmd).chain([&config.user]);
    let pairs = config.env.iter().flat_map(|(name, value)| [name, value]);
    if words.chain(pairs).any(|text| text.contains('\0'))
        || config.working_dir.as_os_str().as_encoded_bytes().contains(&0)
    {
        return Err(Error::malformed(what, "it has a NUL in a text"));
    }
    Ok((config, diff_ids))
}
