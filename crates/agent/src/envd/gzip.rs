//! Content that is packed on its way (RFC 9110, 8.4). It is packed and unpacked piece by piece:
//! however much comes of a piece, little of it is held at a time.

use std::io::{self, Read, Write};

use axum::http::{HeaderMap, header};
use bytes::Bytes;
use connectrpc::{CompressionProvider, ConnectError};
use flate2::Compression;
use flate2::write::{GzDecoder, GzEncoder};
use futures::{Stream, StreamExt, stream};

/// As much is unpacked at a time: no more than a thousand times of it comes of that.
const BITE: usize = 1024;

/// Whether an answer is to be packed; none if it can be neither packed nor not (RFC 9110, 12.5.3).
pub(super) fn is_wanted(headers: &HeaderMap) -> Option<bool> {
    let names = headers.get_all(header::ACCEPT_ENCODING).iter().filter_map(|it| it.to_str().ok());
    let weighed = |name: &str| {
        let mut parts = name.split(';').map(|part| part.trim().to_ascii_lowercase());
        let name = parts.next().filter(|name| !name.is_empty())?;
        let weight = parts.find_map(|it| it.strip_prefix("q=").map(str::to_owned));
        Some((name, weight.map_or(1.0, |weight| weight.parse().unwrap_or(0.0))))
    };
    let mut listed: Vec<(String, f32)> =
        names.flat_map(|it| it.split(',')).filter_map(weighed).collect();
    let weight = |wanted: &str| {
        let named = listed.iter().find(|(name, _)| name == wanted);
        named.map(|(_, weight)| *weight)
    };
    let as_it_is = weight("identity").or(weight("*")).is_none_or(|weight| weight > 0.0);
    let gzip_is_named = weight("gzip").is_some();
    listed.retain(|(_, weight)| *weight > 0.0);
    // What is listed first is liked better than what weighs the same.
    listed.sort_by(|(_, a), (_, b)| b.total_cmp(a));
    let best = listed.iter().find_map(|(name, _)| match name.as_str() {
        "gzip" => Some(true),
        "identity" => Some(false),
        "*" if as_it_is => Some(false),
        "*" if !gzip_is_named => Some(true),
        _ => None,
    });
    best.or(as_it_is.then_some(false))
}

/// Whether a request's content is packed.
pub(super) fn is_packed(headers: &HeaderMap) -> Result<bool, ConnectError> {
    let name = headers.get(header::CONTENT_ENCODING).map(|name| name.to_str().unwrap_or("?"));
    match name.map(|name| name.trim().to_ascii_lowercase()).as_deref() {
        None | Some("" | "identity") => Ok(false),
        Some("gzip") => Ok(true),
        Some(other) => Err(ConnectError::invalid_argument(format!(
            "unsupported Content-Encoding {other:?}: use gzip"
        ))),
    }
}

/// Messages that are packed, each by itself.
pub(super) struct Messages;

impl CompressionProvider for Messages {
    fn name(&self) -> &'static str {
        "gzip"
    }

    fn compress(&self, message: &[u8]) -> Result<Bytes, ConnectError> {
        let mut packer = GzEncoder::new(Vec::new(), Compression::fast());
        let packed = packer.write_all(message).and_then(|()| packer.finish());
        packed.map(Bytes::from).map_err(|error| ConnectError::internal(error.to_string()))
    }

    fn decompressor<'a>(&self, packed: &'a [u8]) -> Result<Box<dyn Read + 'a>, ConnectError> {
        Ok(Box::new(flate2::read::GzDecoder::new(packed)))
    }
}

/// The content, packed. Of a file that becomes shorter meanwhile, it is what a program would read.
pub(super) fn pack(
    content: impl Stream<Item = io::Result<Bytes>> + Send + Unpin + 'static,
) -> impl Stream<Item = io::Result<Bytes>> + Send + 'static {
    let packer = GzEncoder::new(Vec::new(), Compression::fast());
    stream::try_unfold(Some((content, packer)), |state| async move {
        let Some((mut content, mut packer)) = state else { return Ok(None) };
        while let Some(piece) = content.next().await.transpose()? {
            packer.write_all(&piece)?;
            let packed = std::mem::take(packer.get_mut());
            if !packed.is_empty() {
                return Ok(Some((Bytes::from(packed), Some((content, packer)))));
            }
        }
        Ok(Some((Bytes::from(packer.finish()?), None)))
    })
}

/// The content, unpacked; it ends with an error if it is not whole.
pub(super) fn unpack(
    content: impl Stream<Item = io::Result<Bytes>> + Send + Unpin + 'static,
) -> impl Stream<Item = io::Result<Bytes>> + Send + 'static {
    let unpacker = GzDecoder::new(Vec::new());
    stream::try_unfold(Some((content, Bytes::new(), unpacker)), |state| async move {
        let Some((mut content, mut piece, mut unpacker)) = state else { return Ok(None) };
        loop {
            while !piece.is_empty() {
                let bite = piece.split_to(piece.len().min(BITE));
                unpacker.write_all(&bite)?;
                let unpacked = std::mem::take(unpacker.get_mut());
                if !unpacked.is_empty() {
                    let state = Some((content, piece, unpacker));
                    return Ok(Some((Bytes::from(unpacked), state)));
                }
            }
            match content.next().await.transpose()? {
                Some(next) => piece = next,
                None => return Ok(Some((Bytes::from(unpacker.finish()?), None))),
            }
        }
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    async fn all(pieces: impl Stream<Item = io::Result<Bytes>>) -> io::Result<Vec<u8>> {
        let pieces: Vec<_> = pieces.collect().await;
        Ok(pieces.into_iter().collect::<io::Result<Vec<_>>>()?.concat())
    }

    fn stream_of(bytes: &[u8]) -> impl Stream<Item = io::Result<Bytes>> + Send + Unpin + 'static {
        let pieces: Vec<_> = bytes.chunks(700).map(|it| Ok(Bytes::copy_from_slice(it))).collect();
        stream::iter(pieces)
    }

    #[test]
    fn what_is_liked_best_is_chosen_of_what_there_is() {
        for (asked, is) in [
            ("", Some(false)),
            ("gzip", Some(true)),
            ("GZIP;q=0.1", Some(true)),
            ("br, gzip", Some(true)),
            ("gzip;q=0", Some(false)),
            ("gzip;q=0.5, identity;q=1", Some(false)),
            ("identity;q=0.5, gzip;q=1", Some(true)),
            ("*", Some(false)),
            ("*, identity;q=0", Some(true)),
            ("*, identity;q=0, gzip;q=0", None),
            ("br, identity;q=0", None),
            ("*;q=0", None),
            ("gzip, *;q=0", Some(true)),
            ("gzip;q=x", Some(false)),
        ] {
            let headers = HeaderMap::from_iter([(header::ACCEPT_ENCODING, asked.parse().unwrap())]);
            assert_eq!(is_wanted(&headers), is, "{asked:?}");
        }
        assert_eq!(is_wanted(&HeaderMap::new()), Some(false));
    }

    #[tokio::test]
    async fn what_is_packed_is_the_same_again_and_a_part_of_it_is_an_error() {
        let content: Vec<u8> = (0..100_000u32).flat_map(u32::to_le_bytes).collect();
        let packed = all(pack(stream_of(&content))).await.unwrap();
        assert!(packed.len() < content.len());
        assert_eq!(all(unpack(stream_of(&packed))).await.unwrap(), content);
        assert!(all(unpack(stream_of(&packed[..packed.len() - 9]))).await.is_err());
        assert!(all(unpack(stream_of(b"plain"))).await.is_err());
        assert_eq!(
            all(unpack(stream_of(&all(pack(stream_of(b""))).await.unwrap()))).await.unwrap(),
            b""
        );
    }

    #[tokio::test]
    async fn little_is_held_of_what_a_little_unpacks_to() {
        let mut packer = GzEncoder::new(Vec::new(), Compression::best());
        packer.write_all(&vec![0; 64 << 20]).unwrap();
        let bomb = Bytes::from(packer.finish().unwrap());
        let mut pieces = Box::pin(unpack(stream::iter([Ok(bomb)])));
        let mut total = 0;
        while let Some(piece) = pieces.next().await {
            let piece = piece.unwrap();
            assert!(piece.len() <= 2 << 20, "{}", piece.len());
            total += piece.len();
        }
        assert_eq!(total, 64 << 20);
    }
}
