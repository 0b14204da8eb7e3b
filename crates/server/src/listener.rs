//! The daemon's Unix socket: for its own user (and root) only, by file mode and by what the
//! kernel says of each peer (`SO_PEERCRED`, unix(7)). In a user namespace of the daemon's own
//! that user is 0, and the host's root is one of those that have no number: it is refused.

use std::io;
use std::path::{Path, PathBuf};

use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with,
};
use tokio::net::{UnixListener, UnixStream};

use crate::ServeError;

pub(crate) struct OwnListener {
    listener: UnixListener,
    /// The socket's file, if it is ours to delete.
    path: Option<PathBuf>,
}

impl OwnListener {
    pub(crate) fn bind(path: &Path) -> Result<Self, ServeError> {
        let failed = |source| ServeError::Socket { path: path.to_owned(), source };
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).map_err(failed)?;
        }
        match std::os::unix::net::UnixStream::connect(path) {
            Ok(_) => return Err(ServeError::Taken { path: path.to_owned() }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            // Left behind by a daemon that was killed.
            Err(_) => std::fs::remove_file(path).map_err(failed)?,
        }
        let listener = Self::listen(path).map_err(failed)?;
        Ok(Self { listener, path: Some(path.to_owned()) })
    }

    /// One that somebody else has opened, and will open again.
    pub(crate) fn handed(listener: std::os::unix::net::UnixListener) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        Ok(Self { listener: UnixListener::from_std(listener)?, path: None })
    }

    fn listen(path: &Path) -> io::Result<UnixListener> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        // Its file gets the mode that the socket has (`net/unix/af_unix.c`), so that nobody can
        // connect before it is right. Not by the umask: that is all threads', and they are
        // making folders.
        rustix::fs::fchmod(&socket, rustix::fs::Mode::from_raw_mode(0o600))?;
        bind(&socket, &SocketAddrUnix::new(path)?)?;
        listen(&socket, 1024)?;
        UnixListener::from_std(std::os::unix::net::UnixListener::from(socket))
    }

    /// Where it is reached.
    pub(crate) fn place(&self) -> Option<PathBuf> {
        Some(self.listener.local_addr().ok()?.as_pathname()?.to_owned())
    }

    /// What deletes its file, if that is ours to delete.
    pub(crate) fn remover(&self) -> impl FnOnce() + use<> {
        let path = self.path.clone();
        move || {
            if let Some(path) = path {
                // It may be gone already, with all of the folder.
                let _ = std::fs::remove_file(path);
            }
        }
    }
}

impl OwnListener {
    /// The next connection that is let in, and whose it is. Cancel-safe.
    pub(crate) async fn accept(&mut self) -> (UnixStream, u32) {
        loop {
            let stream = match self.listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    // Out of descriptors, most likely: give others time to return some.
                    tracing::warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                    continue;
                }
            };
            let me = rustix::process::geteuid().as_raw();
            match stream.peer_cred() {
                Ok(peer) if peer.uid() == me || peer.uid() == 0 => {
                    return (stream, peer.uid());
                }
                Ok(peer) => tracing::warn!(uid = peer.uid(), "connection of another user refused"),
                Err(error) => tracing::warn!(%error, "connection without credentials refused"),
            }
        }
    }
}
