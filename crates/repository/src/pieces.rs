//! The pieces that files and folders are made of, as the index finds them: read, decrypted and
//! compared with their digests. What a piece claims to be is never believed, and a hostile one
//! cannot take more memory than a large one.

use std::num::NonZeroU32;
use std::sync::Arc;

use rustic_core::repofile::Tree;
use rustic_core::{BlobId, DataId, FileType, Id, IndexedFullStatus, PackedId, TreeId};

use crate::Engine;
use crate::backend::{Backend, name};
use crate::cipher::Cipher;

/// Why there is no piece.
#[derive(Debug)]
pub struct Problem {
    pub text: String,
    /// The file that it should be in, if that is known.
    pub pack: Option<Id>,
}

pub struct Pieces {
    pub engine: Engine<IndexedFullStatus>,
    pub backend: Arc<Backend>,
    pub cipher: Cipher,
}

/// Where a piece is.
pub struct Spot {
    pub pack: Id,
    pub offset: u32,
    pub length: u32,
    plain: Option<NonZeroU32>,
}

impl Spot {
    pub fn end(&self) -> u64 {
        u64::from(self.offset) + u64::from(self.length)
    }
}

impl Pieces {
    pub fn spot<I: PackedId>(&self, id: &I) -> Result<Spot, Problem> {
        let blob: BlobId = (*id).into();
        let entry = self.engine.get_index_entry(id).map_err(|_| Problem {
            text: format!("the piece {} is nowhere", blob.to_hex().as_str()),
            pack: None,
        })?;
        Ok(Spot {
            pack: *entry.pack,
            offset: entry.location.offset,
            length: entry.location.length,
            plain: entry.location.uncompressed_length,
        })
    }

    fn read<I: PackedId>(&self, id: &I) -> Result<Vec<u8>, Problem> {
        let blob: BlobId = (*id).into();
        let spot = self.spot(id)?;
        let file = name(FileType::Pack, &spot.pack);
        let problem = |text| Problem { text, pack: Some(spot.pack) };
        let sealed = self.backend.part(&spot.pack, spot.offset.into(), spot.length.into());
        let sealed = sealed.map_err(|error| problem(format!("{file} cannot be read: {error}")))?;
        let plain = self.cipher.piece(&sealed, I::TYPE, spot.plain, &blob);
        plain.ok_or_else(|| problem(format!("{file} is altered")))
    }

    /// A piece of a file.
    pub fn data(&self, id: &DataId) -> Result<Vec<u8>, Problem> {
        self.read(id)
    }

    /// A folder.
    pub fn tree(&self, id: &TreeId) -> Result<Tree, Problem> {
        let bytes = self.read(id)?;
        serde_json::from_slice(&bytes).map_err(|_| Problem {
            text: format!("the folder {} is none", id.to_hex().as_str()),
            pack: None,
        })
    }
}
