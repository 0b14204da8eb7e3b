//! Finds the key of a repository, or makes a new repository.

use std::sync::Arc;

use bytesize::ByteSize;
use rustic_core::repofile::{Chunker, KeyFile, MasterKey};
use rustic_core::{ConfigOptions, Credentials, FileType, KeyOptions};

use crate::backend::{Gate, name};
use crate::error::{Error, Result, guarded, told};
use crate::files::Files;
use crate::{LEVEL, PACK, PIECE, engine};

/// The most that the derivation of a key may be made to cost: 1 GiB and some seconds. Whoever can
/// write to the destination chooses it.
const DEAREST: u64 = 1 << 30;

/// The key that a password opens.
pub fn open(files: &Arc<dyn Files>, password: &str) -> Result<MasterKey> {
    let place = files.place();
    let failed = |problem: String| Error::Engine { action: "open", place: place.clone(), problem };
    let is_there = || files.size("config").map_err(|error| failed(error.to_string()));
    if is_there()?.is_some() {
        return find(files, password);
    }
    // Without its config, what a repository holds can be read by nobody; a new one beside it
    // would only hide that.
    match files.list(FileType::Snapshot.dirname()) {
        Ok(snapshots) if !snapshots.is_empty() => {
            return Err(failed("it holds backups, but its file `config` is gone".to_owned()));
        }
        Ok(_) => {}
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(failed(error.to_string())),
    }
    let config = ConfigOptions::default()
        .set_version(2_u32)
        .set_compression(LEVEL)
        .set_chunker(Chunker::FixedSize)
        .set_chunk_size(ByteSize::b(PIECE))
        .set_datapack_size(ByteSize::b(PACK))
        .set_datapack_growfactor(0_u32)
        // We read back all that is written, ourselves.
        .set_extra_verify(false);
    let gate = Arc::new(Gate::default());
    let credentials = Credentials::password(password);
    let made = guarded(|| {
        engine(files, gate.clone())?.init(&credentials, &KeyOptions::default(), &config)
    });
    match made {
        Ok(engine) => Ok(engine.key()),
        // Another host may have made it at this moment. Then our key opens nothing.
        Err(error) => {
            let found = if is_there()?.is_some() {
                find(files, password)
            } else {
                Err(failed(told(&error)))
            };
            for key in gate.written(FileType::Key).iter().filter(|_| found.is_ok()) {
                let removed = files.remove(&name(FileType::Key, key));
                // It costs the next ones who open it some time, no more.
                removed.unwrap_or_else(
                    |error| tracing::warn!(place, %error, "a needless key is left"),
                );
            }
            found
        }
    }
}

/// The key among all that are there that opens the config. There are others too: of people's own
/// passwords, and of hosts that were killed or came second when they made the repository.
fn find(files: &Arc<dyn Files>, password: &str) -> Result<MasterKey> {
    let place = files.place();
    let failed = |problem: String| Error::Engine { action: "open", place: place.clone(), problem };
    let keys = files.list(FileType::Key.dirname()).map_err(|error| failed(error.to_string()))?;
    let mut problem = None;
    for (file, _) in keys {
        let bytes = match files.read(&file, None) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            Err(error) => return Err(failed(format!("cannot read {file}: {error}"))),
        };
        let Ok(key) = serde_json::from_slice::<KeyFile>(&bytes) else {
            problem.get_or_insert(format!("{file} is no key"));
            continue;
        };
        let cost = u64::from(key.n) * u64::from(key.r) * 128 * u64::from(key.p.max(1));
        if key.n < 2 || key.r == 0 || cost > DEAREST {
            problem.get_or_insert(format!("{file} asks for too much"));
            continue;
        }
        let Ok(key) = guarded(|| key.key_from_password(&password)) else { continue };
        let (encrypt, k, r) = key.to_keys();
        let mut master = MasterKey::new();
        (master.encrypt, master.mac.k, master.mac.r) = (encrypt, k, r);
        let credentials = Credentials::Masterkey(master.clone());
        match guarded(|| engine(files, Arc::default())?.open(&credentials)) {
            Ok(_) => return Ok(master),
            Err(error) => drop(problem.insert(told(&error))),
        }
    }
    Err(problem.map_or(Error::WrongKey { place: place.clone() }, failed))
}
