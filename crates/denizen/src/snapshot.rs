//! Copies of sessions on their own disk: what a fork begins with, and what is kept under a name.
//!
//! A snapshot is as good as the disk it is on: it must never count as a backup.

use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::time::SystemTime;

use serde::{Serialize, Serializer};
use uuid::Uuid;

use crate::error::Result;
use crate::event::unix_seconds;
use crate::isolation::Site;
use crate::name::SnapshotName;

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
