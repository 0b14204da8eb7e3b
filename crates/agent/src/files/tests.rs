#![allow(clippy::unwrap_used)]

use std::os::unix::ffi::OsStrExt;

use super::*;

#[test]
fn paths_are_read_as_they_are_escaped() {
    let workdir = Path::new("/work");
    for (escaped, wanted) in [
        ("/", &b"/"[..]),
        ("/a%20b/c", b"/a b/c"),
        ("/a%2Fb", b"/a/b"),
        ("/%FF%0a", b"/\xff\n"),
        ("/100%", b"/100%"),
        ("/a+b", b"/a+b"),
        ("/~/notes", b"/work/notes"),
        ("/~", b"/work/"),
        ("/~/", b"/work/"),
        // One of the root's own, as long as it is not written so.
        ("/%7E/notes", b"/~/notes"),
        ("/~other", b"/~other"),
        // Not out of the volume by the way that leads into it.
        ("/~//etc", b"/work/etc"),
        ("/~/%2Fetc", b"/work/etc"),
    ] {
        let path = resolve(workdir, escaped).unwrap();
        assert_eq!(path.as_os_str().as_bytes(), wanted, "{escaped}");
    }
    assert!(resolve(workdir, "/a%00").is_err());
    assert!(absolute(workdir, b"relative".to_vec()).is_err());
    assert_eq!(absolute(workdir, b"~/a".to_vec()).unwrap(), Path::new("/work/a"));
}

#[test]
fn a_query_has_what_is_known_and_once() {
    let mut query = Query::read("as=list&after=a%26%FF+b&recursive=true").unwrap();
    assert_eq!(query.text("as").unwrap().as_deref(), Some("list"));
    assert_eq!(query.take("after").unwrap(), b"a&\xff b");
    assert!(query.end().is_err());
    assert!(query.flag("recursive").unwrap());
    assert!(query.end().is_ok() && !query.flag("recursive").unwrap());
    assert!(Query::read("a=1&%61=2").is_err());
    assert!(Query::read("to=%FF").unwrap().text("to").is_err());
    for (mode, wanted) in [("755", Some(0o755)), ("0644", Some(0o644)), ("7777", Some(0o7777))] {
        assert_eq!(Query::read(&format!("mode={mode}")).unwrap().mode().unwrap(), wanted);
    }
    for wrong in ["", "8", "-1", "+7", "00644", "rwx"] {
        assert!(Query::read(&format!("mode={wrong}")).unwrap().mode().is_err(), "{wrong}");
    }
}
