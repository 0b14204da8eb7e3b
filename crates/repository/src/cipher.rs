//! What a repository encrypts and how (restic's design document, "Keys, Encryption and MAC" and
//! "Unpacked Data Format"), for what the engine keeps to itself, and what may be damaged or hostile.
//! It never makes or derives a key.

use std::cell::RefCell;
use std::num::NonZeroU32;

use aes256ctr_poly1305aes::aead::Aead as _;
use aes256ctr_poly1305aes::{Aes256CtrPoly1305Aes, Key, Nonce};
use rustic_core::repofile::{BlobType, MasterKey};
use rustic_core::{BlobId, Id};
use sha2::{Digest as _, Sha256};
use uuid::Uuid;
use zstd::bulk::Decompressor;

/// What stands in front of what is encrypted, and behind it.
const NONCE: usize = 16;
/// The largest pieces that are unpacked: those of files may have been made by other programs, and
/// one of a folder grows with what is in it.
const LARGEST_DATA: u32 = 64 << 20;
const LARGEST_TREE: u32 = 1 << 30;
/// The same for files of the index, packed.
const LARGEST_FILE: usize = 1 << 30;
/// Says that a file is compressed.
const COMPRESSED: u8 = 2;

thread_local! {
    /// Making one takes as long as unpacking a small piece.
    static UNPACK: RefCell<Option<Decompressor<'static>>> = RefCell::new(Decompressor::new().ok());
}

#[derive(Clone)]
pub struct Cipher(Aes256CtrPoly1305Aes);

pub fn digest(bytes: &[u8]) -> Id {
    Id::new(Sha256::digest(bytes).into())
}

impl Cipher {
    pub fn new(key: &MasterKey) -> Option<Self> {
        let all = [&key.encrypt[..], &key.mac.k[..], &key.mac.r[..]].concat();
        (all.len() == 64).then(|| Self(Aes256CtrPoly1305Aes::new(Key::from_slice(&all))))
    }

    pub fn open(&self, sealed: &[u8]) -> Option<Vec<u8>> {
        let (nonce, sealed) = sealed.split_at_checked(NONCE)?;
        self.0.decrypt(Nonce::from_slice(nonce), sealed).ok()
    }

    /// Such a file that holds this. It is not compressed, which every version of the format knows.
    pub fn seal(&self, plain: &[u8]) -> Option<Vec<u8>> {
        let nonce = Uuid::new_v4().into_bytes();
        let sealed = self.0.encrypt(Nonce::from_slice(&nonce), plain).ok()?;
        Some([&nonce[..], &sealed].concat())
    }

    /// What a piece holds, if it is what its name says.
    pub fn piece(
        &self,
        sealed: &[u8],
        kind: BlobType,
        length: Option<NonZeroU32>,
        id: &BlobId,
    ) -> Option<Vec<u8>> {
        let largest = if kind == BlobType::Tree { LARGEST_TREE } else { LARGEST_DATA };
        let mut plain = self.open(sealed)?;
        if let Some(length) = length {
            if length.get() > largest {
                return None;
            }
            let length = usize::try_from(length.get()).ok()?;
            plain = UNPACK
                .with_borrow_mut(|unpack| unpack.as_mut()?.decompress(&plain, length).ok())?;
        }
        (digest(&plain) == **id).then_some(plain)
    }

    /// What a file holds that is not of pieces.
    pub fn file(&self, sealed: &[u8]) -> Option<Vec<u8>> {
        let plain = self.open(sealed)?;
        match plain.split_first() {
            Some((&COMPRESSED, packed)) => {
                let mut unpacked = Vec::new();
                let mut reader = zstd::Decoder::new(packed).ok()?;
                let most = LARGEST_FILE as u64;
                std::io::Read::read_to_end(
                    &mut std::io::Read::take(&mut reader, most),
                    &mut unpacked,
                )
                .ok()?;
                (unpacked.len() < LARGEST_FILE).then_some(unpacked)
            }
            Some(_) => Some(plain),
            None => None,
        }
    }
}
