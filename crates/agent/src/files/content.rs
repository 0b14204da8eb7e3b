//! What is in a file, or a part of it (RFC 9110, 13 and 14).

use std::fs::{File, Metadata, OpenOptions};
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use axum::body::Body;
use axum::http::header::{
    ACCEPT_RANGES, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, ETAG, IF_NONE_MATCH, IF_RANGE,
    RANGE,
};
use axum::http::{HeaderMap, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use denizen_api::Code;
use futures::{StreamExt, stream};
use tokio::io::AsyncReadExt;
use tokio_util::io::ReaderStream;

use super::blocking;
use super::refusal::{Answer, Refused};

/// Read at a time.
const PIECE: usize = 128 * 1024;
/// How long the beginning of what the kernel makes may take: some of it waits for an event.
const PATIENCE: Duration = Duration::from_secs(10);

pub(super) async fn get(path: PathBuf, headers: &HeaderMap) -> Answer {
    let (file, metadata) = blocking(move || open(&path)).await?;
    part_of(file, &metadata, headers).await
}

/// What a request with these headers gets of a file that is open.
pub(crate) async fn part_of(file: File, metadata: &Metadata, headers: &HeaderMap) -> Answer {
    let size = metadata.len();
    // What is on no disk may be made as it is read, and has no size or that of a page then.
    let mut file = if metadata.blocks() == 0 && size <= 4096 {
        let begun = tokio::time::timeout(PATIENCE, blocking(move || begin(file, size))).await;
        let silent = || Refused::new(Code::Failed, "it is made as it is read, and nothing comes");
        match begun.map_err(|_| silent())?? {
            Begun::File(file) => file,
            Begun::Made(answer) => return Ok(answer),
        }
    } else {
        file
    };
    let tag = tag(metadata);
    if headers.get_all(IF_NONE_MATCH).iter().any(|tags| names(tags, &tag)) {
        return Ok((StatusCode::NOT_MODIFIED, [(ETAG, tag)]).into_response());
    }
    let range = headers.get(RANGE).and_then(|range| range.to_str().ok());
    // A date is no validator of ours: whoever sends one gets all of it.
    let same = headers.get(IF_RANGE).is_none_or(|it| it.as_bytes() == tag.as_bytes());
    let (status, first, length) = match range.filter(|_| same).map(|range| part(range, size)) {
        None | Some(Part::All) => (StatusCode::OK, 0, size),
        Some(Part::Of { first, length }) => (StatusCode::PARTIAL_CONTENT, first, length),
        Some(Part::None) => {
            let refused = Refused::new(Code::BadRange, format!("the file has {size} bytes"));
            return Err(refused.with(CONTENT_RANGE, text(format!("bytes */{size}"))));
        }
    };
    let file = blocking(move || {
        let found = file.seek(SeekFrom::Start(first));
        found.map_err(|error| Refused::new(Code::Failed, error.to_string()))?;
        Ok(file)
    });
    // No more than was promised, though the file may grow.
    let file = tokio::fs::File::from_std(file.await?).take(length);
    let mut response: Response =
        Body::from_stream(ReaderStream::with_capacity(file, PIECE)).into_response();
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
    headers.insert(CONTENT_LENGTH, length.into());
    headers.insert(ACCEPT_RANGES, HeaderValue::from_static("bytes"));
    headers.insert(ETAG, tag);
    if status == StatusCode::PARTIAL_CONTENT {
        let range = format!("bytes {first}-{}/{size}", first + length - 1);
        headers.insert(CONTENT_RANGE, text(range));
    }
    Ok(response)
}

enum Begun {
    /// It is as long as it says.
    File(File),
    /// It is not: this is all of it.
    Made(Response),
}

/// Reads the beginning of a file that the kernel may make as it is read (proc(5), sysfs(5)): of
/// such a one nothing is known before.
fn begin(file: File, size: u64) -> Result<Begun, Refused> {
    let mut begin = Vec::new();
    let read = (&file).take(PIECE as u64).read_to_end(&mut begin);
    if u64::try_from(begin.len()) == Ok(size) && read.is_ok() {
        return Ok(Begun::File(file));
    }
    let kind = [(CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"))];
    Ok(Begun::Made(match read {
        Err(error) if begin.is_empty() => {
            return Err(Refused::new(Code::Failed, error.to_string()));
        }
        Ok(length) if length < PIECE => {
            (kind, [(CONTENT_LENGTH, HeaderValue::from(length))], begin).into_response()
        }
        _ => {
            let rest = ReaderStream::with_capacity(tokio::fs::File::from_std(file), PIECE);
            let begin = stream::iter([Ok(Bytes::from(begin))]);
            (kind, Body::from_stream(begin.chain(rest))).into_response()
        }
    }))
}

fn open(path: &Path) -> Result<(File, Metadata), Refused> {
    let failed = |error: std::io::Error| Refused::of(path, &error);
    // Not waiting for a writer of a fifo, which is refused below.
    let nonblock = i32::try_from(rustix::fs::OFlags::NONBLOCK.bits()).unwrap_or(0);
    // What is no file may do something when it is opened.
    let there = std::fs::metadata(path).map_err(failed)?;
    let file = if there.is_file() {
        OpenOptions::new().read(true).custom_flags(nonblock).open(path).map_err(failed)?
    } else {
        return Err(not_a_file(path, &there));
    };
    let metadata = file.metadata().map_err(failed)?;
    if metadata.is_file() { Ok((file, metadata)) } else { Err(not_a_file(path, &metadata)) }
}

fn not_a_file(path: &Path, there: &Metadata) -> Refused {
    let path = path.display();
    if there.is_dir() {
        return Refused::new(Code::IsFolder, format!("{path} is a folder: ask for it as=list"));
    }
    Refused::new(Code::NotFile, format!("{path} is neither a file nor a folder"))
}

/// A file that has another size, time or place is another one.
fn tag(metadata: &Metadata) -> HeaderValue {
    let (size, seconds, nanoseconds) = (metadata.len(), metadata.mtime(), metadata.mtime_nsec());
    text(format!("\"{size:x}-{seconds:x}.{nanoseconds:x}-{:x}\"", metadata.ino()))
}

/// Of digits and signs only, which every header takes.
fn text(text: String) -> HeaderValue {
    HeaderValue::try_from(text).unwrap_or_else(|_| HeaderValue::from_static(""))
}

/// Whether a list of tags has this one, or stands for all.
fn names(tags: &HeaderValue, tag: &HeaderValue) -> bool {
    let (Ok(tags), Ok(tag)) = (tags.to_str(), tag.to_str()) else { return false };
    // No tag of ours has a comma.
    tags.split(',').map(str::trim).any(|it| it == "*" || it.trim_start_matches("W/") == tag)
}

/// What of a file is asked for.
#[derive(Debug, PartialEq, Eq)]
enum Part {
    All,
    Of {
        first: u64,
        length: u64,
    },
    /// Nothing that there is.
    None,
}

/// Reads a header `Range`. What is not understood, and more than one range, means all of it.
fn part(range: &str, size: u64) -> Part {
    let number = |text: &str| -> Option<Option<u64>> {
        if text.is_empty() {
            return Some(None);
        }
        let digits = text.bytes().all(|byte| byte.is_ascii_digit());
        // More than any file has.
        digits.then(|| Some(text.parse().unwrap_or(u64::MAX)))
    };
    let spec = range.trim().strip_prefix("bytes=").and_then(|it| it.trim().split_once('-'));
    let bounds = spec.and_then(|(first, last)| Some((number(first)?, number(last)?)));
    let (first, end) = match bounds {
        None | Some((None, None)) => return Part::All,
        Some((Some(first), Some(last))) if last < first => return Part::All,
        Some((Some(first), last)) => {
            (first, last.map_or(size, |last| last.saturating_add(1).min(size)))
        }
        // The last so many.
        Some((None, Some(length))) => (size.saturating_sub(length), size),
    };
    match end.checked_sub(first) {
        None | Some(0) => Part::None,
        Some(length) => Part::Of { first, length },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_what_the_standard_says() {
        let of = |first, length| Part::Of { first, length };
        for (range, wanted) in [
            ("bytes=0-0", of(0, 1)),
            ("bytes=2-5", of(2, 4)),
            ("bytes=5-", of(5, 5)),
            ("bytes=5-99", of(5, 5)),
            ("bytes=-3", of(7, 3)),
            ("bytes=-99", of(0, 10)),
            ("bytes=9-18446744073709551615", of(9, 1)),
            ("bytes=9-99999999999999999999999", of(9, 1)),
            ("bytes=10-", Part::None),
            ("bytes=-0", Part::None),
            ("bytes=99999999999999999999999-", Part::None),
            ("bytes=5-2", Part::All),
            ("bytes=-", Part::All),
            ("bytes=", Part::All),
            ("bytes=a-b", Part::All),
            ("bytes=+1-2", Part::All),
            ("bytes=0-1,3-4", Part::All),
            ("lines=0-1", Part::All),
        ] {
            assert_eq!(part(range, 10), wanted, "{range}");
        }
        assert_eq!(part("bytes=0-", 0), Part::None);
        assert_eq!(part("bytes=-5", 0), Part::None);
    }

    #[test]
    fn tags_are_found_in_lists() {
        let tag = HeaderValue::from_static("\"a-b\"");
        for (tags, wanted) in [
            ("\"a-b\"", true),
            ("W/\"a-b\"", true),
            ("\"x\", \"a-b\"", true),
            ("*", true),
            ("\"a-\"", false),
            ("a-b", false),
            ("", false),
        ] {
            assert_eq!(names(&HeaderValue::from_static(tags), &tag), wanted, "{tags}");
        }
    }
}
