//! What lies below a session's own changes to its root: the host's root, an image, or a folder
//! that the operator names. It is chosen when the session is made and written down beside the
//! changes, which mean nothing over anything else; a backup takes it along.

use std::collections::BTreeMap;
use std::fs::{DirBuilder, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use denizen_image::Store;
use rustix::fs::OFlags;
use serde::{Deserialize, Serialize};

use super::host_root::HostRoot;
use crate::error::{Error, Result};
use crate::isolation::Site;

/// The name of the record, beside the folders of the overlays.
pub(crate) const RECORD: &str = "base.json";

/// What is written down of a session's base.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(in crate::isolation) enum Base {
    /// The host's root.
    Host,
    /// A folder of the host.
    Folder { path: PathBuf },
    /// An image.
    Image {
        name: String,
        /// Of its manifest.
        digest: String,
        /// The layers' digests, top first.
        layers: Vec<String>,
        env: BTreeMap<String, String>,
    },
}

/// An overlay of a base: where it goes, and what is below, from the top.
#[derive(Clone, Debug)]
pub(in crate::isolation) struct Below {
    pub(in crate::isolation) target: PathBuf,
    pub(in crate::isolation) lower: Vec<PathBuf>,
    /// Whether the lowest belongs to users of the host, and is to be the sandbox's own.
    pub(in crate::isolation) hosts: bool,
}

/// Where bases are found.
pub(in crate::isolation) struct Roots {
    pub(super) host: HostRoot,
    pub(in crate::isolation) images: Store,
    /// The images' folder.
    pub(super) folder: PathBuf,
    /// What new sessions get: an image's name or a folder's path; none is the host's root.
    pub(super) default: Option<String>,
}

impl Roots {
    /// The base of a session; a new one is given its own.
    pub(in crate::isolation) fn of(&self, site: &Site) -> Result<Base> {
        let record = site.root_changes().join(RECORD);
        let failed = |source| Error::volume("read", &record, source);
        if let Some(base) = read(&record).map_err(failed)? {
            return if self.may_be(&base) {
                Ok(base)
            } else {
                Err(failed(io::Error::other("it names what no session here can have")))
            };
        }
        let base = self.default_base()?;
        write(site, &base)?;
        Ok(base)
    }

    /// Gives a new session an image as its base.
    pub(in crate::isolation) fn choose(&self, site: &Site, image: &str) -> Result<()> {
        // A folder is the operator's choice only: any could be named.
        write(site, &self.image(image)?)
    }

    /// Gives a new session what is another one's base.
    pub(in crate::isolation) fn copy(from: &Site, into: &Site) -> Result<()> {
        let record = from.root_changes().join(RECORD);
        match read(&record).map_err(|source| Error::volume("read", &record, source))? {
            Some(base) => write(into, &base),
            None => Ok(()),
        }
    }

    /// The name of the image that is a session's base.
    pub(in crate::isolation) fn image_of(site: &Site) -> Option<String> {
        match read(&site.root_changes().join(RECORD)) {
            Ok(Some(Base::Image { name, .. })) => Some(name),
            _ => None,
        }
    }

    /// Whether a record can be ours: it comes back from backups, which others may have changed.
    fn may_be(&self, base: &Base) -> bool {
        let is_hex =
            |text: &String| text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        match base {
            Base::Host => true,
            Base::Folder { path } => {
                self.default.as_ref().is_some_and(|default| Path::new(default) == path)
            }
            Base::Image { layers, .. } => layers.iter().all(is_hex),
        }
    }

    /// What a new session gets.
    pub(in crate::isolation) fn default_base(&self) -> Result<Base> {
        let Some(name) = &self.default else { return Ok(Base::Host) };
        if Path::new(name).is_absolute() {
            return Ok(Base::Folder { path: name.into() });
        }
        self.image(name)
    }

    fn image(&self, name: &str) -> Result<Base> {
        let image = self.images.get(name)?.ok_or_else(|| Error::no_image(name))?;
        let layers = image.layers.iter().filter_map(|layer| {
            let digest = layer.parent()?.file_name()?;
            Some(digest.to_string_lossy().into_owned())
        });
        Ok(Base::Image {
            name: image.name.clone(),
            digest: image.digest.to_string(),
            layers: layers.collect(),
            env: image.config.env.iter().cloned().collect(),
        })
    }

    /// The overlays of a base, the root first.
    pub(in crate::isolation) fn below(&self, base: &Base) -> Result<Vec<Below>> {
        let root = |lower, hosts| Below { target: "/".into(), lower, hosts };
        Ok(match base {
            Base::Host => {
                let mut all = vec![root(vec![self.host.copy.clone()], false)];
                all.extend(self.host.merged.iter().map(|path| Below {
                    target: Path::new("/").join(path),
                    lower: vec![self.host.copy.join(path), Path::new("/").join(path)],
                    // Their owners stay nobody's: what others may not read stays shut, also
                    // what appears there later.
                    hosts: false,
                }));
                all
            }
            Base::Folder { path } => vec![root(vec![path.clone()], true)],
            Base::Image { name, digest, layers, .. } => {
                let layers = layers.iter().map(|layer| self.layer(layer));
                let layers: Vec<_> = layers.collect();
                if !layers.iter().all(|layer| layer.is_dir()) {
                    return Err(Error::no_image(&format!("{name}@{digest}")));
                }
                vec![root(layers, false)]
            }
        })
    }

    /// Where a layer is in the store.
    fn layer(&self, digest: &str) -> PathBuf {
        self.folder.join("layers").join(digest).join("tree")
    }

    /// The layers that a session's record names.
    pub(in crate::isolation) fn layers_of(&self, site: &Site) -> Vec<PathBuf> {
        match read(&site.root_changes().join(RECORD)) {
            Ok(Some(Base::Image { layers, .. })) => {
                layers.iter().map(|one| self.layer(one)).collect()
            }
            _ => Vec::new(),
        }
    }
}

impl Base {
    /// What the base adds to every command's environment.
    pub(in crate::isolation) fn env(&self) -> BTreeMap<String, String> {
        match self {
            Self::Image { env, .. } => env.clone(),
            _ => BTreeMap::new(),
        }
    }
}

fn write(site: &Site, base: &Base) -> Result<()> {
    let record = site.root_changes().join(RECORD);
    let write = || {
        let text = serde_json::to_vec(base).map_err(io::Error::other)?;
        DirBuilder::new().recursive(true).mode(0o700).create(site.root_changes())?;
        // Never through a link.
        File::create_new(&record)?.write_all(&text)
    };
    write().map_err(|source| Error::volume("write", &record, source))
}

/// What is written down, if it is. A backup may bring anything by this name.
fn read(record: &Path) -> io::Result<Option<Base>> {
    const MOST: u64 = 1 << 20;
    let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits();
    let flags = i32::try_from(flags).map_err(io::Error::other)?;
    let file = match File::options().read(true).custom_flags(flags).open(record) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        opened => opened?,
    };
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("it is no regular file"));
    }
    let mut text = Vec::new();
    file.take(MOST).read_to_end(&mut text)?;
    serde_json::from_slice(&text).map(Some).map_err(io::Error::other)
}
