//! Tokens: what lets a client use one session for a while. Nothing of them is kept: a token says
//! itself whose it is and how long, under a MAC that only the daemon can make. So handing one out
//! writes nothing, however many sessions there are; what is kept is which are void (`keys`).
//!
//! `dt_` and, in base64 (RFC 4648, 5): the session (16 bytes), when it was made in microseconds
//! and until when it is good in seconds since 1970 (8 bytes each, big-endian), the id of the key
//! it was made with (12 bytes; zeros for none), and HMAC-SHA256 of all that (32 bytes).

use std::time::Duration;

use base64::Engine;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use hmac::{Hmac, KeyInit, Mac};
use jiff::SignedDuration;
use sha2::Sha256;
use uuid::Uuid;

/// How long a token is good, if nothing is said.
pub(crate) const LIFE: Duration = Duration::from_hours(24);
/// The longest that one may be.
pub(crate) const LONGEST_LIFE: SignedDuration = SignedDuration::from_hours(24 * 30);

const ISSUER: usize = 12;
const BODY: usize = 16 + 8 + 8 + ISSUER;

/// What a token says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Token {
    pub(crate) session: Uuid,
    /// The key it was made with.
    pub(crate) issuer: Option<String>,
    pub(crate) issued: i64,
    pub(crate) expires: i64,
}

fn mac(secret: &str, body: &[u8]) -> Hmac<Sha256> {
    // HMAC takes a secret of any length.
    #[allow(clippy::expect_used)]
    let mut mac = Hmac::new_from_slice(secret.as_bytes()).expect("any length will do");
    mac.update(body);
    mac
}

/// A token as its holder gets it.
pub(crate) fn write(token: &Token, secret: &str) -> String {
    let mut bytes = Vec::with_capacity(BODY + 32);
    bytes.extend(token.session.as_bytes());
    bytes.extend(token.issued.to_be_bytes());
    bytes.extend(token.expires.to_be_bytes());
    let issuer = token.issuer.as_deref().unwrap_or_default();
    bytes.extend(issuer.bytes().chain(std::iter::repeat(0)).take(ISSUER));
    let tag = mac(secret, &bytes).finalize().into_bytes();
    bytes.extend(tag);
    format!("dt_{}", BASE64_URL_SAFE_NO_PAD.encode(bytes))
}

/// What a token says, if it was made with that secret.
pub(crate) fn read(text: &str, secret: &str) -> Option<Token> {
    let bytes = BASE64_URL_SAFE_NO_PAD.decode(text.strip_prefix("dt_")?).ok()?;
    let (body, tag) = bytes.split_at_checked(BODY)?;
    // In constant time, and only in full length.
    mac(secret, body).verify_slice(tag).ok()?;
    let (session, rest) = body.split_first_chunk()?;
    let (issued, rest) = rest.split_first_chunk()?;
    let (expires, issuer) = rest.split_first_chunk()?;
    let issuer = issuer.iter().any(|byte| *byte != 0).then(|| issuer.to_vec());
    Some(Token {
        session: Uuid::from_bytes(*session),
        issuer: issuer.map(String::from_utf8).transpose().ok()?,
        issued: i64::from_be_bytes(*issued),
        expires: i64::from_be_bytes(*expires),
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn what_is_read_is_what_was_written_and_nothing_else_is() {
        for issuer in [None, Some("0123456789ab".to_owned())] {
            let token = Token { session: Uuid::new_v4(), issuer, issued: 5, expires: i64::MAX };
            let text = write(&token, "secret");
            assert_eq!(read(&text, "secret"), Some(token));
            assert_eq!(read(&text, "other"), None);
            let bytes = BASE64_URL_SAFE_NO_PAD.decode(&text[3..]).unwrap();
            for bit in 0..bytes.len() * 8 {
                let mut changed = bytes.clone();
                changed[bit / 8] ^= 1 << (bit % 8);
                let changed = format!("dt_{}", BASE64_URL_SAFE_NO_PAD.encode(changed));
                assert_eq!(read(&changed, "secret"), None, "bit {bit}");
            }
            for end in 0..text.len() {
                assert_eq!(read(&text[..end], "secret"), None);
            }
        }
    }
}
