//! Copies of sessions on their own disk: what a fork begins with, and what is kept under a name.
//!
//! A snapshot is as good as the disk it is on: it must never count as a backup.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::time::SystemTime;

use serde::{Serialize, Serializer};
use uuid::Uuid;

use crate::error::Result;
use crate::event::unix_seconds;
use crate::isolation::Site;
use crate::name::SnapshotName;

pub use denizen_archive::{Aspect, Node};

/// A session's files as they once were, on the same disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Snapshot {
    /// Its name; each session has its own.
    #[serde(serialize_with = "as_text")]
    pub name: SnapshotName,
    /// When it was taken.
    #[serde(serialize_with = "unix_seconds")]
    pub taken_at: SystemTime,
}

fn as_text<S: Serializer>(
    name: &SnapshotName,
    serializer: S,
) -> std::result::Result<S::Ok, S::Error> {
    serializer.serialize_str(name.as_str())
}

/// Copies what a backup of a session would hold into a folder that has none of it. Nothing may
/// write there meanwhile. Blocks.
pub(crate) fn copy(from: &Site, home: &Path) -> Result<()> {
    let into = Site::in_folder(Uuid::nil(), home.to_owned());
    let never = AtomicBool::new(false);
    let mut trees = vec![(&from.volume, into.volume.clone())];
    let changes = from.root_changes();
    if changes.is_dir() {
        trees.push((&changes, into.root_changes()));
    }
    for (tree, into) in trees {
        let copied = denizen_archive::copy(tree, &into, &never)?;
        for skipped in &copied.skipped {
            tracing::warn!(session = %from.id, ?skipped, "not in the copy");
        }
        for warning in &copied.warnings {
            tracing::warn!(session = %from.id, %warning, "copied with a loss");
        }
    }
    Ok(())
}

/// A session as it is, or as a snapshot has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Version {
    /// The session.
    pub session: Uuid,
    /// The snapshot; none is the session as it is now.
    pub snapshot: Option<SnapshotName>,
}

/// Something that is not in both of two versions, or not the same.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Difference {
    /// `volume`, or `root`: what was changed in a root of its own, a folder for each overlay.
    pub tree: &'static str,
    /// Where it is in that.
    pub path: PathBuf,
    /// What is there in the first.
    pub before: Option<Node>,
    /// What is there in the second.
    pub after: Option<Node>,
    /// In what they differ, if it is in both.
    pub aspects: Vec<Aspect>,
}

/// What two folders of sessions differ in. Nothing may write there meanwhile. Blocks.
pub(crate) fn diff(before: &Site, after: &Site) -> Result<Vec<Difference>> {
    let never = AtomicBool::new(false);
    let mut all = Vec::new();
    let trees = [
        ("root", before.root_changes(), after.root_changes()),
        ("volume", before.volume.clone(), after.volume.clone()),
    ];
    for (tree, before, after) in trees {
        let [before, after] = [&before, &after].map(|tree| tree.is_dir().then_some(tree.as_path()));
        let found = denizen_archive::diff(before, after, &never)?;
        all.extend(found.into_iter().map(
            |denizen_archive::Difference { path, before, after, aspects }| Difference {
                tree,
                path,
                before,
                after,
                aspects,
            },
        ));
    }
    Ok(all)
}
