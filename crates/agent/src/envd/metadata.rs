//! What the writers of a file have said of it: pairs of words, kept as extended attributes
//! (`user.e2b.…`), so that they go where the file goes.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::path::Path;

use axum::http::HeaderMap;
use connectrpc::ConnectError;
use rustix::fs::{XattrFlags, flistxattr, fremovexattr, fsetxattr, getxattr, listxattr};
use rustix::io::Errno;

/// What the attributes' names begin with.
const ATTRIBUTE: &str = "user.e2b.";
/// What the headers' names begin with that say it.
const HEADER: &str = "x-metadata-";
/// The longest name of an attribute (xattr(7)).
const LONGEST: usize = 255;
/// The most that a file's attributes are read of.
const MOST: usize = 64 * 1024;

/// What a file's attributes say. What cannot be read, or is no text, is not there.
pub(super) fn read(path: &Path) -> BTreeMap<String, String> {
    let names = names(|names| listxattr(path, names)).unwrap_or_default();
    let pairs = ours(&names).filter_map(|(key, attribute)| {
        let mut value = vec![0; MOST];
        let length = getxattr(path, attribute, &mut value).ok()?;
        value.truncate(length);
        Some((key.to_owned(), String::from_utf8(value).ok()?))
    });
    pairs.collect()
}

/// The names of a file's attributes, each ended by a zero byte.
fn names(read: impl Fn(&mut [u8]) -> rustix::io::Result<usize>) -> rustix::io::Result<Vec<u8>> {
    // Most files have none or few.
    let mut few = [0; 512];
    match read(&mut few) {
        Err(Errno::RANGE) => {
            let mut many = vec![0; MOST];
            let length = read(&mut many)?;
            many.truncate(length);
            Ok(many)
        }
        length => Ok(few.get(..length?).unwrap_or_default().to_vec()),
    }
}

/// The attributes that are such, without and with what their names begin with.
fn ours(names: &[u8]) -> impl Iterator<Item = (&str, &str)> {
    names.split(|byte| *byte == 0).filter_map(|name| {
        let name = std::str::from_utf8(name).ok()?;
        Some((name.strip_prefix(ATTRIBUTE)?, name))
    })
}

/// What a request says of what it writes.
pub(super) fn asked(headers: &HeaderMap) -> Result<BTreeMap<String, String>, ConnectError> {
    let mut pairs = BTreeMap::new();
    for name in headers.keys() {
        let Some(key) = name.as_str().strip_prefix(HEADER).filter(|key| !key.is_empty()) else {
            continue;
        };
        let value = headers.get(name).and_then(|value| value.to_str().ok());
        let value = value.filter(|_| ATTRIBUTE.len() + key.len() <= LONGEST).ok_or_else(|| {
            ConnectError::invalid_argument(format!(
                "metadata {key:?} is too long, or its value is not printable ASCII"
            ))
        })?;
        pairs.insert(key.to_owned(), value.to_owned());
    }
    Ok(pairs)
}

/// Has a file's attributes say this and nothing else.
pub(super) fn write(file: &File, pairs: &BTreeMap<String, String>) -> io::Result<()> {
    let names = names(|names| flistxattr(file, names)).unwrap_or_default();
    for (key, attribute) in ours(&names) {
        if !pairs.contains_key(key) {
            fremovexattr(file, attribute)?;
        }
    }
    for (key, value) in pairs {
        let attribute = format!("{ATTRIBUTE}{key}");
        fsetxattr(file, attribute.as_str(), value.as_bytes(), XattrFlags::empty())?;
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn what_was_said_last_is_read_again_and_nothing_else() {
        let file = tempfile::NamedTempFile::new_in(".").unwrap();
        let pairs = |pairs: &[(&str, &str)]| -> BTreeMap<String, String> {
            pairs.iter().map(|(key, value)| ((*key).into(), (*value).into())).collect()
        };
        assert_eq!(read(file.path()), pairs(&[]));
        fsetxattr(file.as_file(), "user.other", b"x", XattrFlags::empty()).unwrap();
        for said in [pairs(&[("a", "1"), ("b", "2")]), pairs(&[("b", "3")]), pairs(&[])] {
            write(file.as_file(), &said).unwrap();
            assert_eq!(read(file.path()), said);
        }
    }
}
