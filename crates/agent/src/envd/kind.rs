//! What a file is to whoever downloads it: the kind of its content and the name to save it under,
//! both by its name alone. It never looks into a file.

use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use axum::http::HeaderValue;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_encode};

/// All that is no `attr-char` (RFC 8187, 3.2.1), and some more.
const ESCAPED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

/// The kind of content that files of such a name have.
pub(super) fn of(path: &Path) -> HeaderValue {
    let end = path.extension().map(|end| end.to_string_lossy().to_ascii_lowercase());
    HeaderValue::from_static(match end.as_deref().unwrap_or_default() {
        "avif" => "image/avif",
        "bmp" => "image/bmp",
        "css" => "text/css; charset=utf-8",
        "csv" => "text/csv; charset=utf-8",
        "gif" => "image/gif",
        "gz" => "application/gzip",
        "htm" | "html" => "text/html; charset=utf-8",
        "ico" => "image/vnd.microsoft.icon",
        "jpeg" | "jpg" => "image/jpeg",
        "js" | "mjs" => "text/javascript; charset=utf-8",
        "json" => "application/json",
        "log" | "txt" => "text/plain; charset=utf-8",
        "md" => "text/markdown; charset=utf-8",
        "mp3" => "audio/mpeg",
        "mp4" => "video/mp4",
        "pdf" => "application/pdf",
        "png" => "image/png",
        "svg" => "image/svg+xml",
        "tar" => "application/x-tar",
        "wasm" => "application/wasm",
        "wav" => "audio/wav",
        "webm" => "video/webm",
        "webp" => "image/webp",
        "xml" => "text/xml; charset=utf-8",
        "zip" => "application/zip",
        _ => "application/octet-stream",
    })
}

/// Has a browser show the file, or save it under its name (RFC 6266).
pub(super) fn disposition(path: &Path) -> HeaderValue {
    let name = path.file_name().unwrap_or_default().as_bytes();
    let is_token = |byte: &u8| byte.is_ascii_alphanumeric() || b"!#$&+-.^_`|~".contains(byte);
    let is_printable = |byte: &u8| (b' '..=b'~').contains(byte);
    let plain = String::from_utf8_lossy(name);
    let told = if !name.is_empty() && name.iter().all(is_token) {
        format!("inline; filename={plain}")
    } else if name.iter().all(is_printable) {
        let quoted = plain.replace('\\', "\\\\").replace('"', "\\\"");
        format!("inline; filename=\"{quoted}\"")
    } else {
        format!("inline; filename*=utf-8''{}", percent_encode(name, ESCAPED))
    };
    // Printable in all three cases: this cannot fail.
    HeaderValue::try_from(told).unwrap_or_else(|_| HeaderValue::from_static("inline"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_says_what_is_in_a_file_and_is_written_so_that_it_stays_one() {
        for (path, kind, name) in [
            ("/a/test.txt", "text/plain; charset=utf-8", "filename=test.txt"),
            ("/a/p.HTML", "text/html; charset=utf-8", "filename=p.HTML"),
            ("/a/b c.json", "application/json", "filename=\"b c.json\""),
            ("/a/q\"\\.png", "image/png", "filename=\"q\\\"\\\\.png\""),
            ("/a/ü.bin", "application/octet-stream", "filename*=utf-8''%C3%BC.bin"),
            ("/a/x\r\ny: z", "application/octet-stream", "filename*=utf-8''x%0D%0Ay%3A%20z"),
            ("/a/.txt", "application/octet-stream", "filename=.txt"),
        ] {
            let path = Path::new(path);
            assert_eq!(of(path), kind, "{path:?}");
            assert_eq!(disposition(path), format!("inline; {name}"), "{path:?}");
        }
    }
}
