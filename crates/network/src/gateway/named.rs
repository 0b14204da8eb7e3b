//! What a sandbox asks for at an address that is open to it for some names only. The bytes are the
//! sandbox's. It must let nothing through before it knows.

use parking_lot::Mutex;
use std::sync::Arc;

use crate::address::Host;
use crate::hello::{self, Hello};
use crate::rules::Why;

/// The names that a connection may be for: one, once it is known which; none if its address is open
/// by itself.
pub(super) type Names = Arc<Mutex<Vec<String>>>;

/// As much of a request as is waited for.
const LONGEST_HEAD: usize = 16 * 1024;
const HEADERS: usize = 64;

/// Looks at how a connection begins; nothing where more has to come first. At other ports than HTTP's
/// and TLS's there is nothing to see.
pub(super) fn check(begins: &[u8], port: u16, names: &Names) -> Option<Result<(), Why>> {
    let asked = match port {
        443 => match hello::read(begins) {
            Hello::Partial if begins.len() < hello::LONGEST => return None,
            Hello::Partial => return Some(Err(Why::Handshake("it is too long"))),
            Hello::Refused(problem) => return Some(Err(Why::Handshake(problem))),
            Hello::Name(asked) => match Host::parse(&asked) {
                Ok(Host::Name(name)) => name,
                _ => return Some(Err(Why::OtherServer(asked))),
            },
        },
        80 => {
            let mut headers = [httparse::EMPTY_HEADER; HEADERS];
            let mut request = httparse::Request::new(&mut headers);
            match request.parse(begins) {
                Ok(httparse::Status::Complete(_)) => {}
                Ok(httparse::Status::Partial) if begins.len() < LONGEST_HEAD => return None,
                _ => return Some(Err(Why::Malformed("its head cannot be read"))),
            }
            let mut hosts =
                request.headers.iter().filter(|header| header.name.eq_ignore_ascii_case("host"));
            let host = hosts.next().and_then(|header| std::str::from_utf8(header.value).ok());
            let is_plain = request.path.is_some_and(|path| path.starts_with('/'));
            match host.map(Host::with_port) {
                Some(Ok((Host::Name(name), None | Some(80))))
                    if is_plain && hosts.next().is_none() =>
                {
                    name
                }
                _ => return Some(Err(Why::HostHeader)),
            }
        }
        _ => return Some(Ok(())),
    };
    let mut names = names.lock();
    if !names.contains(&asked) {
        return Some(Err(if port == 443 { Why::OtherServer(asked) } else { Why::HostHeader }));
    }
    *names = vec![asked];
    Some(Ok(()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_requests_for_the_name_pass() {
        let names = || Names::new(Mutex::new(vec!["a.test".to_owned(), "b.test".to_owned()]));
        let passes = |text: &str| check(text.as_bytes(), 80, &names());
        let refused = Some(Err(Why::HostHeader));
        assert_eq!(passes("GET / HTTP/1.1\r\nHost: a.test\r\n\r\n"), Some(Ok(())));
        assert_eq!(passes("GET / HTTP/1.1\r\nhost: B.test:80\r\n\r\nmore"), Some(Ok(())));
        assert_eq!(passes("GET / HTTP/1.1\r\nHost: a.te"), None);
        assert_eq!(passes("GET / HTTP/1.1\r\nHost: c.test\r\n\r\n"), refused);
        assert_eq!(passes("GET / HTTP/1.1\r\n\r\n"), refused);
        assert_eq!(passes("GET / HTTP/1.1\r\nHost: a.test\r\nHost: c.test\r\n\r\n"), refused);
        assert_eq!(passes("GET http://c.test/ HTTP/1.1\r\nHost: a.test\r\n\r\n"), refused);
        assert!(matches!(passes("hello\r\n\r\n"), Some(Err(Why::Malformed(_)))));
        assert!(matches!(passes(&"x".repeat(LONGEST_HEAD)), Some(Err(_))));
        assert!(matches!(check(b"GET / HTTP/1.1\r\n", 443, &names()), Some(Err(_))));
        assert_eq!(check(b"", 443, &names()), None);
        assert_eq!(check(b"SSH-2.0", 22, &names()), Some(Ok(())));
        let known = names();
        assert_eq!(check(b"GET / HTTP/1.1\r\nHost: b.test\r\n\r\n", 80, &known), Some(Ok(())));
        assert_eq!(*known.lock(), ["b.test"]);
    }
}
