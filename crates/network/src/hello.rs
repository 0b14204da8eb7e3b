//! The name in a TLS handshake: what a client says first, in the clear, is for which server it
//! is. This module reads that much of a `ClientHello` (RFC 8446, 4.1.2; RFC 6066, 3) and
//! nothing else. The bytes are the sandbox's: it must never trust a length in them.

/// As long as a hello may be with the records around it. Real ones, those with post-quantum
/// keys too, stay below 4 KiB.
pub(crate) const LONGEST: usize = 32 * 1024;

const HANDSHAKE: u8 = 22;
const CLIENT_HELLO: u8 = 1;
const SERVER_NAME: u16 = 0;
const HOST_NAME: u8 = 0;

/// How far reading got.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Hello {
    /// More bytes are needed.
    Partial,
    /// The name it carries.
    Name(String),
    /// It is no hello, or one without a name; says which.
    Refused(&'static str),
}

/// A cursor that can only fail, never go astray.
struct Bytes<'a>(&'a [u8]);

impl<'a> Bytes<'a> {
    fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(taken)
    }

    /// A number of `width` bytes.
    fn number(&mut self, width: usize) -> Option<usize> {
        Some(self.take(width)?.iter().fold(0, |number, byte| number << 8 | usize::from(*byte)))
    }

    /// What follows its own length of `width` bytes.
    fn vector(&mut self, width: usize) -> Option<Bytes<'a>> {
        let length = self.number(width)?;
        self.take(length).map(Bytes)
    }
}

/// Reads the beginning of what a client sent.
pub(crate) fn read(sent: &[u8]) -> Hello {
    let mut records = Bytes(sent);
    let mut message = Vec::new();
    // A hello may be cut into several records.
    loop {
        if let Some(&kind) = records.0.first()
            && kind != HANDSHAKE
        {
            return Hello::Refused("this is not TLS");
        }
        let Some(header) = records.take(5) else { break };
        let length = usize::from(header[3]) << 8 | usize::from(header[4]);
        if header[1] != 3 || length == 0 || length > 1 << 14 {
            return Hello::Refused("this is not TLS");
        }
        let rest = records.0.len();
        let piece = records.take(length.min(rest)).unwrap_or_default();
        message.extend_from_slice(piece);
        if message.first().is_some_and(|kind| *kind != CLIENT_HELLO) {
            return Hello::Refused("it begins with another message");
        }
        let mut whole = Bytes(&message);
        if let Some(mut body) = whole.take(1).and_then(|_| whole.vector(3)) {
            if !whole.0.is_empty() {
                return Hello::Refused("something follows the first message in its record");
            }
            // Two lengths that disagree are for two readers that disagree.
            if length > rest {
                return Hello::Refused("its record is longer than itself");
            }
            return match name(&mut body) {
                Some(Ok(name)) => Hello::Name(name),
                Some(Err(problem)) => Hello::Refused(problem),
                None => Hello::Refused("it is cut off"),
            };
        }
        if length > rest {
            break;
        }
    }
    if sent.len() >= LONGEST { Hello::Refused("it is too long") } else { Hello::Partial }
}

/// The name in a hello's body; nothing if the body ends too early.
fn name(body: &mut Bytes<'_>) -> Option<Result<String, &'static str>> {
    body.take(2 + 32)?; // version, random
    body.vector(1)?; // session
    body.vector(2)?; // ciphers
    body.vector(1)?; // compressions
    if body.0.is_empty() {
        return Some(Err("it names no server"));
    }
    let mut extensions = body.vector(2)?;
    if !body.0.is_empty() {
        return Some(Err("something follows its extensions"));
    }
    let mut found = None;
    while !extensions.0.is_empty() {
        let kind = extensions.number(2)?;
        let mut extension = extensions.vector(2)?;
        if kind != usize::from(SERVER_NAME) {
            continue;
        }
        let mut names = extension.vector(2)?;
        let of_a_host = names.number(1)? == usize::from(HOST_NAME);
        let name = names.vector(2)?.0;
        // One name: which of two counts would be up to each server.
        if !of_a_host || !names.0.is_empty() || !extension.0.is_empty() || found.is_some() {
            return Some(Err("it names more than one server"));
        }
        found = Some(name);
    }
    let Some(name) = found else { return Some(Err("it names no server")) };
    match std::str::from_utf8(name) {
        Ok(name) if name.is_ascii() && !name.bytes().any(|byte| byte.is_ascii_control()) => {
            Some(Ok(name.to_owned()))
        }
        _ => Some(Err("its name is not ASCII")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chance::Chance;

    /// The length of `body` in `width` bytes, and it.
    fn vector(width: usize, body: &[u8]) -> Vec<u8> {
        let length = body.len().to_be_bytes();
        [&length[length.len() - width..], body].concat()
    }

    fn server_name(names: &[&str]) -> Vec<u8> {
        let names: Vec<u8> =
            names.iter().flat_map(|name| [vec![0], vector(2, name.as_bytes())].concat()).collect();
        [vec![0, 0], vector(2, &vector(2, &names))].concat()
    }

    fn message(extensions: &[u8]) -> Vec<u8> {
        let body = [
            &[3, 3][..],
            &[7; 32],
            &vector(1, &[9; 32]),
            &vector(2, &[0x13, 1, 0x13, 2]),
            &vector(1, &[0]),
            &vector(2, extensions),
        ]
        .concat();
        [vec![1], vector(3, &body)].concat()
    }

    fn records(message: &[u8], pieces: usize) -> Vec<u8> {
        let cut = |piece: &[u8]| [vec![22, 3, 1], vector(2, piece)].concat();
        message.chunks(message.len().div_ceil(pieces)).flat_map(cut).collect()
    }

    fn hello(name: &str) -> Vec<u8> {
        let other = [0, 43, 0, 3, 2, 3, 4];
        records(&message(&[&other[..], &server_name(&[name]), &other].concat()), 1)
    }

    #[test]
    fn the_name_is_found_however_it_is_cut() {
        let expected = Hello::Name("example.org".to_owned());
        assert_eq!(read(&hello("example.org")), expected);
        let message = message(&server_name(&["example.org"]));
        for pieces in 1..message.len() {
            let sent = records(&message, pieces);
            assert_eq!(read(&sent), expected, "{pieces} records");
            for end in 0..sent.len() {
                assert_eq!(read(&sent[..end]), Hello::Partial, "{pieces} records, {end} bytes");
            }
        }
        // Early data may follow.
        assert_eq!(read(&[records(&message, 1), vec![23, 3, 3, 0, 1, 0]].concat()), expected);
    }

    #[test]
    fn doubtful_hellos_are_refused() {
        let of = |extensions: &[u8]| records(&message(extensions), 1);
        let name = server_name(&["a.example"]);
        let mut trailing = name.clone();
        trailing[3] += 1;
        trailing.push(0);
        let mut of_another_kind = name.clone();
        of_another_kind[6] = 1;
        let mut short_record = of(&name);
        short_record[4] += 1;
        let no_extensions = {
            let whole = message(&[]);
            let body = &whole[4..whole.len() - 2];
            records(&[vec![1], vector(3, body)].concat(), 1)
        };
        for (what, sent) in [
            ("no name", of(&[0, 43, 0, 3, 2, 3, 4])),
            ("no extensions", no_extensions),
            ("two names", of(&server_name(&["a.example", "b.example"]))),
            ("two extensions", of(&[&name[..], &server_name(&["b.example"])].concat())),
            ("bytes after the name", of(&trailing)),
            ("a name of another kind", of(&of_another_kind)),
            ("an empty list", of(&[0, 0, 0, 2, 0, 0])),
            ("an extension beyond its end", of(&[0, 0, 0, 99, 0, 0])),
            ("not ASCII", of(&server_name(&["bücher.example"]))),
            ("a zero byte", of(&server_name(&["a.example\0.b.example"]))),
            ("a server's hello", records(&[vec![2], vector(3, &[0; 40])].concat(), 1)),
            ("two messages", records(&[message(&name), message(&name)].concat(), 1)),
            ("a record too long", short_record),
            ("an empty record", vec![22, 3, 1, 0, 0]),
            ("HTTP", b"GET / HTTP/1.1\r\n".to_vec()),
            ("SSH", b"SSH-2.0-x\r\n".to_vec()),
            ("SSL 2", vec![0x80, 0x2e, 1, 0, 2]),
        ] {
            let got = read(&sent);
            assert!(matches!(got, Hello::Refused(_)), "{what}: {got:?}");
        }
        let endless = records(&[vec![1], vector(3, &vec![0; 0x10_0000])].concat(), 128);
        assert_eq!(read(&endless[..LONGEST]), Hello::Refused("it is too long"));
    }

    #[test]
    fn no_bytes_make_it_panic_or_find_another_name() {
        let mut chance = Chance::new(0x5e11);
        let whole = hello("example.org");
        for _ in 0..200_000 {
            let mut sent = whole.clone();
            for _ in 0..=chance.below(4) {
                let at = chance.below(sent.len());
                match chance.below(4) {
                    0 => sent[at] = chance.byte(),
                    1 => sent[at] ^= 1 << chance.below(8),
                    2 => sent.insert(at, chance.byte()),
                    _ => sent.truncate(at.max(1)),
                }
            }
            if let Hello::Name(name) = read(&sent) {
                assert!(name.is_ascii());
                assert!(sent.windows(name.len()).any(|piece| piece == name.as_bytes()));
            }
        }
        for _ in 0..50_000 {
            let length = chance.below(80);
            let noise: Vec<u8> = (0..length).map(|_| chance.byte()).collect();
            let _ = read(&noise);
            let _ = read(&[&[22, 3, 1, 0, 80, 1, 0, 0, 76][..], &noise].concat());
        }
    }
}
