//! Whom a request is for: from where their paths begin, and who owns what is made for them.
//! Users are those of the root that this process sees. Nothing here lets anybody in.

use std::fs::{File, Metadata};
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Component, Path, PathBuf};

use axum::http::HeaderMap;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use connectrpc::ConnectError;
use rustix::fs::{Gid, OFlags, Uid};

use super::{Instance, blocking};

/// Request header by which the daemon tells an agent within whom a request is for.
pub const USER: &str = "denizen-user";
/// More than a table of users has.
const MOST: u64 = 4 * 1024 * 1024;
/// Permissions of a folder that is new.
const FOLDER: u32 = 0o755;

/// The user that a client names as envd's do: `Authorization: Basic`, with any password.
pub fn named(headers: &HeaderMap) -> Option<String> {
    let names = headers.get_all("authorization").iter().filter_map(|value| {
        let (scheme, rest) = value.to_str().ok()?.split_once(' ')?;
        let rest = scheme.eq_ignore_ascii_case("basic").then(|| rest.trim())?;
        let pair = String::from_utf8(STANDARD.decode(rest).ok()?).ok()?;
        let name = pair.split_once(':').map_or(pair.as_str(), |(name, _)| name);
        Some(name.to_owned())
    });
    names.into_iter().find(|name| !name.is_empty())
}

/// The user that the daemon names.
pub(super) fn told(headers: &HeaderMap) -> Option<String> {
    headers.get(USER).and_then(|value| Some(value.to_str().ok()?.to_owned()))
}

/// There is no such user.
pub fn no_such_user(name: &str) -> ConnectError {
    ConnectError::unauthenticated(format!("invalid username: '{name}'"))
}

/// Where a user's paths begin, and to whom belongs what is made there.
#[derive(Clone, Debug)]
pub(super) struct Place {
    base: PathBuf,
    /// None: whoever makes it.
    owner: Option<(Uid, Gid)>,
}

impl Place {
    /// That of a user by name; of the volume, if none is named.
    pub(super) async fn of(
        instance: &Instance,
        user: Option<String>,
    ) -> Result<Self, ConnectError> {
        let Some(user) = user else {
            return Ok(Self { base: instance.workdir.clone(), owner: None });
        };
        blocking(move || {
            let (uid, gid, base) = find(&user).ok_or_else(|| no_such_user(&user))?;
            let own = rustix::process::geteuid();
            if !own.is_root() && own != uid {
                let text = format!("files of the user {user:?} cannot be served here");
                return Err(ConnectError::permission_denied(text));
            }
            Ok(Self { base, owner: Some((uid, gid)) })
        })
        .await
    }

    /// Whether somebody is named, rather than only a volume.
    pub(super) fn is_of_a_user(&self) -> bool {
        self.owner.is_some()
    }

    /// A path as a client gives it: from there, or from the root.
    pub(super) fn resolve(&self, path: &str) -> Result<PathBuf, ConnectError> {
        if path.contains('\0') {
            return Err(ConnectError::invalid_argument("a path has no zero bytes"));
        }
        let below = path.strip_prefix("~/").or((path == "~").then_some("")).unwrap_or(path);
        if self.owner.is_none() || below.starts_with('/') {
            return Ok(self.base.join(below));
        }
        if below.starts_with('~') {
            let text = format!("{path}: only ~ itself is a home, not that of another user");
            return Err(ConnectError::invalid_argument(text));
        }
        let mut clean = self.base.clone();
        for part in Path::new(below).components() {
            match part {
                Component::Normal(name) => clean.push(name),
                Component::ParentDir => drop(clean.pop()),
                _ => {}
            }
        }
        Ok(clean)
    }

    /// Makes a folder and those that it is in, all of them the user's; what is there stays as
    /// it is.
    pub(super) fn make_folders(&self, path: &Path) -> Result<(), (PathBuf, io::Error)> {
        let missing: Vec<_> =
            path.ancestors().take_while(|folder| std::fs::metadata(folder).is_err()).collect();
        for folder in missing.into_iter().rev().filter(|folder| !folder.as_os_str().is_empty()) {
            let failed = |error| (folder.to_owned(), error);
            match std::fs::create_dir(folder) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
                made => made.map_err(failed)?,
            }
            if self.owner.is_some() {
                let opened = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let made = rustix::fs::open(folder, opened, rustix::fs::Mode::empty());
                let made = made.map_err(|error| failed(error.into()))?;
                rustix::fs::fchmod(&made, FOLDER.into()).map_err(|error| failed(error.into()))?;
                self.give(&made).map_err(failed)?;
            }
        }
        Ok(())
    }

    /// Whether something is the user's.
    pub(super) fn owns(&self, there: &Metadata) -> bool {
        self.owner
            .is_some_and(|(uid, gid)| (uid.as_raw(), gid.as_raw()) == (there.uid(), there.gid()))
    }

    /// Gives what is open to the user.
    pub(super) fn give(&self, file: impl std::os::fd::AsFd) -> io::Result<()> {
        let Some((uid, gid)) = self.owner else { return Ok(()) };
        rustix::fs::fchown(file, Some(uid), Some(gid)).map_err(io::Error::from)
    }
}

/// A user's numbers and home, by passwd(5).
fn find(name: &str) -> Option<(Uid, Gid, PathBuf)> {
    if name.is_empty() {
        return None;
    }
    table("/etc/passwd").lines().find_map(|line| {
        let mut fields = line.split(':');
        fields.next().filter(|own| *own == name)?;
        let number =
            |field: Option<&str>| field?.parse().ok().filter(|number: &u32| *number != u32::MAX);
        let (uid, gid) = (number(fields.nth(1))?, number(fields.next())?);
        let home = fields.nth(1).filter(|home| home.starts_with('/')).unwrap_or("/");
        Some((Uid::from_raw(uid), Gid::from_raw(gid), home.into()))
    })
}

/// A table of users or groups, as far as it is a sensible one.
pub(super) fn table(path: &str) -> String {
    let nonblock = i32::try_from((OFlags::NONBLOCK | OFlags::NOCTTY).bits()).unwrap_or(0);
    let read = || {
        let file = File::options().read(true).custom_flags(nonblock).open(path)?;
        let mut text = Vec::new();
        if file.metadata()?.is_file() {
            file.take(MOST).read_to_end(&mut text)?;
        }
        Ok::<_, io::Error>(text)
    };
    String::from_utf8_lossy(&read().unwrap_or_default()).into_owned()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn paths_begin_at_home_and_are_written_plainly() {
        let owner = Some((Uid::from_raw(1), Gid::from_raw(1)));
        let place = Place { base: "/home/user".into(), owner };
        let resolve = |path| place.resolve(path).map(|path| path.to_str().unwrap().to_owned());
        for (path, is) in [
            ("", "/home/user"),
            ("~", "/home/user"),
            ("a/./b/../c", "/home/user/a/c"),
            ("~/a", "/home/user/a"),
            ("../x", "/home/x"),
            ("/a/../b", "/a/../b"),
        ] {
            assert_eq!(resolve(path).unwrap(), is);
        }
        assert!(resolve("~root/a").is_err() && resolve("a\0").is_err());
    }

    #[test]
    fn a_name_is_what_stands_before_the_colon() {
        let mut headers = HeaderMap::new();
        headers.append("authorization", "Bearer dXNlcjo=".parse().unwrap());
        assert_eq!(named(&headers), None);
        headers.append("authorization", "Basic dXNlcjo=".parse().unwrap());
        assert_eq!(named(&headers).as_deref(), Some("user"));
    }
}
