//! A folder on the wire: an uncompressed tar stream of what is in it, for `/files?format=tar`.
//! Both ends use these two functions. Neither follows a symlink out of its folder.

use std::io::{self, Read, Write};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use futures::{Stream, StreamExt};
use tokio_util::io::{ReaderStream, StreamReader, SyncIoBridge};

/// Bytes on their way between the folder and the wire.
const PIPE: usize = 256 * 1024;

/// A folder's content: files, folders, symlinks, fifos, with modes and times. Sockets and
/// devices are left out, for they mean nothing elsewhere. What meets reading the folder is the
/// last item.
pub fn send(folder: PathBuf) -> impl Stream<Item = io::Result<Bytes>> + Send + Sync {
    let (reader, writer) = tokio::io::duplex(PIPE);
    // Ends by itself when nobody reads any more.
    let packed = tokio::task::spawn_blocking(move || pack(&folder, SyncIoBridge::new(writer)));
    let end = futures::stream::once(packed).filter_map(|done| {
        let done = done.unwrap_or_else(|error| Err(io::Error::other(error)));
        std::future::ready(done.err().map(Err))
    });
    ReaderStream::new(reader).chain(end)
}

/// Adds the content of a stream to a folder, which is made if need be. A file of the same name
/// is replaced. Not cancel-safe: dropped, it leaves what has arrived.
///
/// # Errors
/// A stream that breaks off or is no tar archive, an entry that leads out of the folder or is a
/// device, and what met making the files.
pub async fn receive(
    content: impl Stream<Item = io::Result<Bytes>> + Send + Unpin + 'static,
    folder: PathBuf,
) -> io::Result<()> {
    let content = SyncIoBridge::new(StreamReader::new(content));
    let done = tokio::task::spawn_blocking(move || unpack(content, &folder)).await;
    // The tar reader keeps what really went wrong inside.
    done.unwrap_or_else(|error| Err(io::Error::other(error))).map_err(|error| {
        match std::error::Error::source(&error) {
            Some(reason) => io::Error::new(error.kind(), format!("{error}: {reason}")),
            None => error,
        }
    })
}

fn pack(folder: &Path, out: impl Write) -> io::Result<()> {
    let mut tar = tar::Builder::new(out);
    tar.follow_symlinks(false);
    tar.append_dir(".", folder)?;
    let mut waiting = vec![folder.to_owned()];
    while let Some(next) = waiting.pop() {
        for item in std::fs::read_dir(&next)? {
            let item = item?;
            let path = item.path();
            let name = path.strip_prefix(folder).unwrap_or(&path);
            let kind = item.file_type()?;
            if kind.is_socket() || kind.is_block_device() || kind.is_char_device() {
                continue;
            }
            tar.append_path_with_name(&path, name)?;
            if kind.is_dir() {
                waiting.push(path);
            }
        }
    }
    tar.into_inner()?.flush()
}

fn unpack(input: impl Read, folder: &Path) -> io::Result<()> {
    std::fs::create_dir_all(folder)?;
    let mut tar = tar::Archive::new(input);
    tar.set_preserve_permissions(true);
    // Whoever sent it must not make programs here that run as whoever unpacks them.
    tar.set_mask(0o7000);
    tar.set_preserve_mtime(true);
    tar.set_overwrite(true);
    // Folders last and from the bottom, or a read-only one would refuse what is in it.
    let mut folders = Vec::new();
    for entry in tar.entries()? {
        let mut entry = entry?;
        if entry.header().entry_type().is_dir() {
            folders.push(entry);
        } else {
            put(&mut entry, folder)?;
        }
    }
    folders.sort_by(|a, b| b.path_bytes().cmp(&a.path_bytes()));
    for mut entry in folders {
        put(&mut entry, folder)?;
    }
    Ok(())
}

fn put<R: Read>(entry: &mut tar::Entry<'_, R>, folder: &Path) -> io::Result<()> {
    let kind = entry.header().entry_type();
    let why = if kind.is_block_special() || kind.is_character_special() {
        "is a device"
    } else if entry.unpack_in(folder)? {
        return Ok(());
    } else {
        "leads out of the folder"
    };
    let name = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
    Err(io::Error::new(io::ErrorKind::InvalidData, format!("{name} {why}")))
}
