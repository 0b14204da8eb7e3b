//! Questions about names, and their answers: as much of DNS (RFC 1035, 4) as a program that
//! looks for an address needs. The bytes are the sandbox's.

use std::net::IpAddr;

const A: u16 = 1;
const AAAA: u16 = 28;
const INTERNET: u16 = 1;
/// Short: an answer is for now, and the host has a cache if it wants one.
const SECONDS: u32 = 5;
/// With these a message stays below the 512 bytes that every client takes.
const MOST_ADDRESSES: usize = 8;

/// One question.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Question {
    id: [u8; 2],
    wants_recursion: bool,
    /// As it was asked.
    section: Vec<u8>,
    kind: u16,
    /// The name, with dots.
    pub(super) name: String,
}

/// What to answer.
pub(super) enum Answer<'a> {
    /// Those of the kind that was asked for.
    Addresses(&'a [IpAddr]),
    Failed,
    NoSuchName,
    Refused,
}

impl Question {
    /// Nothing for what is no plain question.
    pub(super) fn read(bytes: &[u8]) -> Option<Self> {
        let (header, mut rest) = bytes.split_at_checked(12)?;
        let question = header[2] & 0b1111_1000 == 0;
        if !question || header[4..6] != [0, 1] || header[6..10] != [0; 4] {
            return None;
        }
        let section = rest;
        let mut name = String::new();
        loop {
            let (&length, after) = rest.split_first()?;
            rest = after;
            // Longer than 63 would be a pointer, and there is nothing before it to point to.
            if length == 0 || length > 63 {
                (length == 0).then_some(())?;
                break;
            }
            let (label, after) = rest.split_at_checked(length.into())?;
            rest = after;
            // A dot within a label would make another name of it.
            if !label.is_ascii() || label.contains(&b'.') || name.len() > 255 {
                return None;
            }
            if !name.is_empty() {
                name.push('.');
            }
            name.push_str(std::str::from_utf8(label).ok()?);
        }
        let kind = u16::from_be_bytes(*rest.first_chunk()?);
        let class = u16::from_be_bytes(*rest.get(2..)?.first_chunk()?);
        if class != INTERNET {
            return None;
        }
        let section = section[..section.len() - (rest.len() - 4)].to_vec();
        let wants_recursion = header[2] & 1 == 1;
        Some(Self { id: [header[0], header[1]], wants_recursion, section, kind, name })
    }

    /// Whether an address would answer it.
    pub(super) fn wants_addresses(&self) -> bool {
        self.kind == A || self.kind == AAAA
    }

    /// The message that answers it.
    pub(super) fn answer(&self, answer: &Answer<'_>) -> Vec<u8> {
        let (code, found): (u8, &[IpAddr]) = match answer {
            Answer::Addresses(found) => (0, found),
            Answer::Failed => (2, &[]),
            Answer::NoSuchName => (3, &[]),
            Answer::Refused => (5, &[]),
        };
        let mut records = Vec::new();
        let mut count = 0_u8;
        for address in found.iter().map(IpAddr::to_canonical) {
            let data = match address {
                IpAddr::V4(address) if self.kind == A => address.octets().to_vec(),
                IpAddr::V6(address) if self.kind == AAAA => address.octets().to_vec(),
                _ => continue,
            };
            if usize::from(count) == MOST_ADDRESSES {
                break;
            }
            count += 1;
            // The name is the one at byte 12.
            records.extend_from_slice(&[0xc0, 12]);
            records.extend_from_slice(&self.kind.to_be_bytes());
            records.extend_from_slice(&INTERNET.to_be_bytes());
            records.extend_from_slice(&SECONDS.to_be_bytes());
            records.extend_from_slice(&[0, if self.kind == A { 4 } else { 16 }]);
            records.extend_from_slice(&data);
        }
        let flags = [0x80 | u8::from(self.wants_recursion), 0x80 | code];
        [&self.id[..], &flags, &[0, 1, 0, count, 0, 0, 0, 0], &self.section, &records].concat()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chance::Chance;

    fn question(name: &str, kind: u8) -> Vec<u8> {
        let mut bytes = vec![0xab, 0xcd, 1, 0, 0, 1, 0, 0, 0, 0, 0, 1];
        for label in name.split('.') {
            bytes.push(u8::try_from(label.len()).unwrap());
            bytes.extend_from_slice(label.as_bytes());
        }
        // And what EDNS adds.
        bytes.extend_from_slice(&[0, 0, kind, 0, 1, 0, 0, 41, 4, 208, 0, 0, 0, 0, 0, 0]);
        bytes
    }

    #[test]
    fn addresses_of_the_kind_that_was_asked_for() {
        let found: Vec<IpAddr> =
            ["1.1.1.1", "2606:4700::1111", "1.0.0.1"].map(|text| text.parse().unwrap()).to_vec();
        for (kind, count, length) in [(1, 2, 16), (28, 1, 28), (16, 0, 0)] {
            let asked = Question::read(&question("www.example.org", kind)).unwrap();
            assert_eq!(asked.name, "www.example.org");
            assert_eq!(asked.wants_addresses(), count > 0);
            let answer = asked.answer(&Answer::Addresses(&found));
            let expected = [0xab, 0xcd, 0x81, 0x80, 0, 1, 0, count, 0, 0, 0, 0];
            assert_eq!(answer[..12], expected);
            assert_eq!(answer.len(), 12 + 17 + 4 + usize::from(count) * length);
        }
        let asked = Question::read(&question("a.test", 1)).unwrap();
        assert_eq!(asked.answer(&Answer::Refused)[2..4], [0x81, 0x85]);
        let many = vec![found[1]; 100];
        let asked = Question::read(&question(&"a".repeat(63), 28)).unwrap();
        assert!(asked.answer(&Answer::Addresses(&many)).len() <= 512);
    }

    #[test]
    fn no_bytes_make_it_panic() {
        assert_eq!(Question::read(&question("a.b\u{7f}.test\u{e9}", 1)), None);
        assert_eq!(Question::read(&[0; 12]), None);
        let mut chance = Chance::new(0xd25);
        let whole = question("www.example.org", 1);
        for _ in 0..100_000 {
            let mut bytes = whole.clone();
            for _ in 0..=chance.below(4) {
                let at = chance.below(bytes.len());
                bytes[at] = chance.byte();
            }
            bytes.truncate(chance.below(bytes.len() + 1));
            if let Some(question) = Question::read(&bytes) {
                let _ = question.answer(&Answer::NoSuchName);
            }
        }
    }
}
