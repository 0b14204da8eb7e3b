//! Images: root file systems in layers, pulled from a registry or imported from a file.
//!
//! This crate fetches images, checks them, unpacks each layer once and keeps count of which
//! layers an image is made of. It mounts nothing and runs nothing of an image. It trusts
//! nothing an image says either: every byte is checked against the digest that named it, and
//! no layer reaches outside the folder it is unpacked into.
//!
//! # The folder
//!
//! ```text
//! images/{sha256 of the name}.json    one image: its name, layers and configuration
//! layers/{diff_id}/tree               one layer, ready to be a lowerdir of an overlay
//! layers/{diff_id}/layer.json         what was made of it, and what was left out
//! owners.json                         whom all of them belong to
//! work/{pid}-{random}/                what is not finished; its writer holds a lock on it
//! lock                                held for the instant in which images or layers change
//! ```
//!
//! A layer is a folder named after the SHA-256 of its tar stream. It is made under `work` and
//! renamed when it is complete, checked and on disk, so it is whole or absent. [`Store::open`]
//! removes what dead processes left under `work`. Several processes may use one store: layers
//! of an image that is on its way are not removed.
//!
//! `layers` and `work` let in nobody but their owner: with [`Owners::Mine`] a program in a
//! layer that is setuid belongs to the caller, and no other user of the machine may run it.
//!
//! # Mounting
//!
//! [`Image::layers`] are the lower directories, top first, for an overlay with `userxattr`.
//! Mount it `nosuid,nodev`, and mind that one page holds all options of the old `mount(2)`:
//! with many layers, change into the store and use relative paths, or use `fsconfig`.

mod entries;
mod error;
mod manifest;
mod reference;
mod registry;
mod source;
mod store;
mod stream;
mod unpack;
mod work;

use serde::{Deserialize, Serialize};

pub use error::{Error, Result};
pub use manifest::{Digest, ImageConfig};
pub use reference::Reference;
pub use registry::{Credentials, PullOptions, Transport};
pub use source::ImportOptions;
pub use store::{Image, Removed, Store};
pub use unpack::Report;

/// Whom the files of a layer belong to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Owners {
    /// The calling user, who needs no privilege. The owners in the archive are dropped.
    Mine,
    /// The ids of a range, for which the caller must be root: uid `u` of the layer becomes
    /// `uid_base + u`. An id that is not below `count` becomes nobody's (65534, or the last one
    /// of a smaller range) and loses setuid: refusing would make images unusable over a file that some build machine left
    /// with its own user's number. [`Report::owners`] counts those.
    Shifted {
        /// Where uid 0 goes; never 0.
        uid_base: u32,
        /// Where gid 0 goes; never 0.
        gid_base: u32,
        /// How many ids there are; at least 1000, for a system's own users.
        count: u32,
    },
}

/// What an image may cost. More is refused with [`Error::TooLarge`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Limits {
    /// Bytes of a manifest, an index or a configuration.
    pub manifest_bytes: u64,
    /// Layers of an image. Overlayfs takes 500; no builder makes more than 127.
    pub layers: usize,
    /// Bytes of a layer as it is sent or stored.
    pub blob_bytes: u64,
    /// Bytes of all the layers of an image, unpacked.
    pub bytes: u64,
    /// Bytes of one file.
    pub file_bytes: u64,
    /// Entries of a layer.
    pub entries: u64,
    /// How many bytes one compressed byte may become, once there are more than 64 MiB.
    pub ratio: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            manifest_bytes: 4 << 20,
            layers: 127,
            blob_bytes: 16 << 30,
            bytes: 64 << 30,
            file_bytes: 16 << 30,
            entries: 4_000_000,
            ratio: 200,
        }
    }
}

/// How far the work on one layer is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Which layer, counted from 0, lowest first.
    pub layer: usize,
    /// Of how many.
    pub layers: usize,
    /// What is being done with it.
    pub stage: Stage,
    /// Compressed bytes done.
    pub bytes: u64,
    /// Of how many.
    pub total: u64,
}

/// What is being done with a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// It comes from the registry.
    Fetching,
    /// Its files are being made.
    Unpacking,
    /// It is in the store.
    Done,
}

/// Is told of progress, from any thread, often.
pub type OnProgress<'a> = &'a (dyn Fn(Progress) + Send + Sync);
