//! Sessions on their way from one pool to another, each as one archive.
//!
//! What is sent is whole and checked before its first byte leaves, and what is received has
//! arrived before anything is made of it: whoever is at the other end may be slow, and no
//! session waits for them. In between it is a file without a name, which nothing leaves behind.
//! Must never change a session that it reads, nor touch one that is there already.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::task::{Context, Poll};

use denizen_archive::{Given, Owners};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt, ReadBuf};
use uuid::Uuid;

use super::operation::GivenUp;
use super::{Begins, Hold, Origin, Pool, blocking};
use crate::backup;
use crate::error::{ArchiveError, Error, Result};
use crate::lifecycle::{Phase, Want};

/// How much is received at a time.
const PIECE: usize = 256 << 10;
/// How many archives are received at a time; the others are read when these have come.
pub(super) const MOST_IMPORTS: usize = 4;
/// After how much it is looked again whether there is room for the others, too.
const LOOK: u64 = 64 << 20;
/// What stays free, unless that is more than a twentieth of the disk: what is being sent must not
/// be in the way of sessions and of what is remembered of them.
const RESERVE: u64 = 1 << 30;

/// A session as an archive, to be read to its end: `tar.zst`, sealed unless it is a backup that
/// was written without a seal.
#[derive(Debug)]
pub struct Export {
    file: tokio::fs::File,
    bytes: u64,
}

impl Export {
    /// How many bytes there are in all.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

impl AsyncRead for Export {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.file).poll_read(context, into)
    }
}

/// An archive that was received, to make a session of.
pub(super) struct Sent {
    file: File,
    given_up: Arc<AtomicBool>,
}

impl Sent {
    /// Puts what it holds into a session's folder, which has none of it: no more than `limit`
    /// bytes. Blocks.
    pub(super) fn unpack(
        &self,
        owners: Option<Owners>,
        home: &Path,
        limit: Option<u64>,
    ) -> Result<()> {
        let given = Given { file: &self.file, name: Path::new("that was sent"), limit };
        let unpacked = backup::unpack_given(given, owners, home, &self.given_up);
        unpacked.map_err(|error| match error {
            Error::Backup(error) => Error::NotImported(error),
            error => error,
        })
    }
}

impl Pool {
    /// A session as an archive. Cancel-safe: dropped, it leaves the line, or the reading ends
    /// before long and gives the session back.
    pub(crate) async fn export(self: &Arc<Self>, id: Uuid) -> Result<Export> {
        let hold = self.ask(id, Want::Still).await?;
        let hold =
            hold.ok_or_else(|| Error::Task("stillness was asked for and not given".to_owned()))?;
        let given_up = GivenUp::default();
        let interrupted = given_up.flag();
        let read = blocking(move || {
            let file = archive(&hold, &interrupted)?;
            let path = hold.pool.volumes.own();
            let bytes = file.metadata().map_err(|source| Error::volume("read", path, source))?;
            Ok((file, bytes.len()))
        });
        let (file, bytes) = read.await?;
        Ok(Export { file: tokio::fs::File::from_std(file), bytes })
    }

    /// Makes a new session of an archive. Cancel-safe: dropped, it is given up, and nothing is
    /// left unless the session was there already.
    pub(crate) async fn import(
        self: &Arc<Self>,
        id: Uuid,
        content: impl AsyncRead + Send + Unpin,
    ) -> Result<()> {
        let taken = || Error::AlreadyExists { session: id.to_string() };
        // Found out before all of it is sent, too.
        if self.state.lock().core.view(id).is_some() {
            return Err(taken());
        }
        let file = self.receive(content).await?;
        let given_up = GivenUp::default();
        let sent = Arc::new(Sent { file, given_up: given_up.flag() });
        let begins = {
            let mut state = self.state.lock();
            if state.core.view(id).is_some() {
                return Err(taken());
            }
            Begins::with(self, &mut state, id, Origin::Archive(sent)).ok_or_else(taken)?
        };
        // How long it takes has nothing to do with how long others may wait in line.
        let hold = self.ask(id, Want::Guard { patient: false }).await?;
        drop((begins, hold));
        Ok(())
    }

    async fn receive(&self, mut content: impl AsyncRead + Unpin) -> Result<File> {
        // Never closed.
        let _turn = self.imports.acquire().await;
        // What is packed may be a little more than what it makes.
        let limit =
            self.driver.import_limit().map_or(u64::MAX, |it| it.saturating_add(it / 16 + LOOK));
        let (mut received, mut looked) = (0, 0);
        let volumes = self.volumes.clone();
        let file = blocking(move || volumes.nameless_file()).await?;
        let mut file = tokio::fs::File::from_std(file);
        let failed = |source: io::Error| match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                let path = self.volumes.own().to_owned();
                Error::NotImported(ArchiveError::NoSpace { path })
            }
            _ => Error::volume("receive into", self.volumes.own(), source),
        };
        let mut piece = Vec::with_capacity(PIECE);
        loop {
            let read = content.read_buf(&mut piece).await;
            if read.map_err(|source| Error::BrokenOff { source })? == 0 {
                break;
            }
            received += piece.len() as u64;
            if received > limit {
                let path = PathBuf::from("that is being sent");
                return Err(Error::NotImported(ArchiveError::TooLarge { path, limit }));
            }
            if received - looked > LOOK {
                looked = received;
                if !has_reserve(self.volumes.own()) {
                    let path = self.volumes.own().to_owned();
                    return Err(Error::NotImported(ArchiveError::NoSpace { path }));
                }
            }
            file.write_all(&piece).await.map_err(failed)?;
            piece.clear();
        }
        // Its last write may still be on its way.
        file.flush().await.map_err(failed)?;
        Ok(file.into_std().await)
    }
}

/// Whether there is room left for others; also if the file system does not tell.
fn has_reserve(folder: &Path) -> bool {
    rustix::fs::statvfs(folder).map_or(true, |stat| {
        let [free, all] = [stat.f_bavail, stat.f_blocks].map(|it| it.saturating_mul(stat.f_frsize));
        free >= RESERVE.min(all / 20)
    })
}

/// What a session has, local or in its latest backup. Blocks.
fn archive(hold: &Hold, interrupted: &AtomicBool) -> Result<File> {
    let (pool, id) = (&hold.pool, hold.place.site.id);
    let row = pool.state.lock().core.view(id).map(|view| view.row.clone());
    if let Some(row) = row
        && row.phase == Phase::Archived
    {
        let name = row.backup.ok_or(Error::NoBackup { session: id, name: None })?;
        let staging = pool.volumes.stage(id)?;
        let owners = pool.driver.owners();
        return pool.backups()?.open(id, &name, staging.path(), owners, interrupted);
    }
    let staging = pool.volumes.stage(id)?;
    let now = jiff::Timestamp::now();
    let packed =
        backup::pack(&hold.place.site, staging.path(), pool.driver.owners(), now, interrupted);
    let archive = packed?;
    File::open(&archive.path).map_err(|source| Error::volume("read", &archive.path, source))
}
