//! Archives made to hurt: none may reach outside, take memory without end, or leave a trace.
#![allow(clippy::unwrap_used)]

mod support;

use std::fs;
use std::io::Write as _;
use std::path::Path;

use denizen_archive::{Beside, Error, verify};
use support::*;

/// Size of the seal at the end of one of our files.
const SEAL: usize = 123;
const END: [u8; 1024] = [0; 1024];

/// Restores a stream that must be refused, and looks for traces.
fn reject(stream: &[u8]) -> Error {
    let bench = Bench::new();
    let outside = bench.outside();
    let archive = bench.destination.join("hostile.tar.zst");
    pack(&archive, stream);
    let error = restore(&archive, &bench.into).unwrap_err();
    assert!(!bench.into.exists(), "left something after {error}");
    assert_eq!(fs::read(&outside).unwrap(), b"untouched");
    // In a directory that was there before, what was made goes, the directory stays.
    fs::create_dir(&bench.into).unwrap();
    restore(&archive, &bench.into).unwrap_err();
    assert_eq!(fs::read_dir(&bench.into).unwrap().count(), 0);
    assert_eq!(fs::read_dir(bench.dir.path()).unwrap().count(), 4);
    error
}

fn refused(entries: &[Raw<'_>]) -> String {
    let mut stream = raw_stream(entries);
    stream.extend(END);
    match reject(&stream) {
        Error::Refused { reason, .. } => reason.to_owned(),
        other => panic!("{other:?}"),
    }
}

fn damaged(stream: &[u8]) -> String {
    match reject(stream) {
        Error::Damaged { detail, .. } => detail,
        other => panic!("{other:?}"),
    }
}

fn file<'a>(name: &'a str, content: &'a [u8]) -> Raw<'a> {
    Raw { content, ..Raw::new(name, b'0') }
}

fn link<'a>(name: &'a str, kind: u8, link: &'a str) -> Raw<'a> {
    Raw { link, ..Raw::new(name, kind) }
}

#[test]
fn a_harmless_stream_made_the_same_way_is_restored() {
    let bench = Bench::new();
    let archive = bench.destination.join("harmless.tar.zst");
    let mut stream = raw_stream(&[
        Raw::new("./", b'5'),
        file("./a/implied/file", b"content"),
        link("./hard", b'1', "./a/implied/file"),
        Raw::new("a", b'5'),
        Raw::new("./a/", b'5'),
    ]);
    stream.extend(END);
    pack(&archive, &stream);
    restore(&archive, &bench.into).unwrap();
    assert_eq!(fs::read(bench.into.join("hard")).unwrap(), b"content");
}

#[test]
fn names_that_lead_outside() {
    for name in ["../outside", "./a/../../outside", "a/..", ".."] {
        assert!(refused(&[file(name, b"x")]).contains(".."), "{name}");
    }
    assert!(refused(&[file("/tmp/outside", b"x")]).contains("absolute"));
    assert!(refused(&[Raw::new("../folder/", b'5')]).contains(".."));
    assert!(refused(&[file(".", b"x")]).contains("volume"));
}

#[test]
fn the_volume_itself_as_something_else() {
    assert!(refused(&[link(".", b'2', "/etc")]).contains("volume"));
    assert!(refused(&[link("./", b'2', "/etc")]).contains("volume"));
}

#[test]
fn device_nodes() {
    for kind in [b'3', b'4'] {
        assert!(refused(&[Raw::new("null", kind)]).contains("device"));
    }
}

#[test]
fn unknown_kinds() {
    for kind in *b"VMX" {
        assert!(refused(&[Raw::new("x", kind)]).contains("unknown"));
    }
}

#[test]
fn writing_through_a_symlink() {
    for target in ["..", "/tmp", "folder"] {
        let through = [
            Raw::new("folder/", b'5'),
            link("link", b'2', target),
            file("link/outside", b"overwritten"),
        ];
        assert!(refused(&through).contains("symlink"), "{target}");
    }
}

#[test]
fn a_directory_in_place_of_a_symlink() {
    let over = [link("link", b'2', ".."), Raw::new("link/", b'5'), file("link/outside", b"x")];
    assert!(refused(&over).contains("twice"));
}

#[test]
fn a_file_in_place_of_a_symlink() {
    assert!(refused(&[link("l", b'2', "../outside"), file("l", b"x")]).contains("twice"));
    assert!(refused(&[file("f", b"a"), file("f", b"b")]).contains("twice"));
    assert!(refused(&[file("f", b"a"), link("f", b'2', "g")]).contains("twice"));
    assert!(refused(&[file("f", b"a"), file("f/below", b"b")]).contains("below"));
}

#[test]
fn hard_links_to_what_is_not_in_the_archive() {
    for target in ["../outside", "/etc/passwd", "./", "a/../../outside"] {
        assert!(refused(&[link("l", b'1', target)]).contains("outside"), "{target}");
    }
    assert!(refused(&[link("l", b'1', "missing")]).contains("not there"));
    assert!(refused(&[link("l", b'1', "missing/too")]).contains("not there"));
    assert!(refused(&[Raw::new("d/", b'5'), link("l", b'1', "d")]).contains("directory"));
}

#[test]
fn hard_links_through_a_symlink() {
    let through = [link("up", b'2', ".."), link("l", b'1', "up/outside")];
    assert!(refused(&through).contains("symlink"));
}

#[test]
fn a_hard_link_to_a_symlink_is_the_symlink() {
    let bench = Bench::new();
    let outside = bench.outside();
    let archive = bench.destination.join("x.tar.zst");
    let mut stream = raw_stream(&[link("s", b'2', "../outside"), link("l", b'1', "s")]);
    stream.extend(END);
    pack(&archive, &stream);
    restore(&archive, &bench.into).unwrap();
    assert!(fs::symlink_metadata(bench.into.join("l")).unwrap().is_symlink());
    assert_eq!(fs::read(outside).unwrap(), b"untouched");
}

fn extended(kind: u8, records: &[u8]) -> Vec<u8> {
    let mut stream = raw_header(b"x", kind, b"", records.len() as u64).as_bytes().to_vec();
    stream.extend(records);
    stream.resize(stream.len().next_multiple_of(512), 0);
    stream
}

fn record(key: &str, value: &str) -> Vec<u8> {
    let rest = key.len() + value.len() + 3;
    let length = (rest + 1..).find(|l| rest + l.to_string().len() == *l).unwrap();
    format!("{length} {key}={value}\n").into_bytes()
}

/// An extended header in front of a file.
fn with_record(key: &str, value: &str) -> Vec<u8> {
    let mut stream = extended(b'x', &record(key, value));
    stream.extend(raw_stream(&[file("plain", &[b'x'; 512])]));
    stream.extend(END);
    stream
}

#[test]
fn names_in_extended_headers() {
    for name in ["../outside", "/tmp/outside", "", "a\0b"] {
        let error = reject(&with_record("path", name));
        assert!(matches!(error, Error::Refused { .. }), "{name:?} {error:?}");
    }
    let mut stream = extended(b'L', b"../outside\0");
    stream.extend(raw_stream(&[file("plain", b"x")]));
    stream.extend(END);
    assert!(matches!(reject(&stream), Error::Refused { .. }));
}

#[test]
fn malformed_extended_headers() {
    for records in [
        &b"12 path=abc"[..],
        b"99999999999999999999999 a=b\n",
        b"99 a=b\n",
        b"2 a=b\n",
        b"0 \n",
        b"6 abc\n",
        b"xx a=b\n",
        b"\0\0\0",
        b" ",
    ] {
        let mut stream = extended(b'x', records);
        stream.extend(raw_stream(&[file("plain", b"x")]));
        stream.extend(END);
        damaged(&stream);
    }
    for (key, value) in
        [("size", "-1"), ("size", "999999999999999999999"), ("mtime", "noon"), ("uid", "root")]
    {
        damaged(&with_record(key, value));
    }
    let twice = [extended(b'x', &record("a", "b")), with_record("c", "d")].concat();
    assert!(damaged(&twice).contains("two extended"));
    assert!(damaged(&[extended(b'x', &record("a", "b")), END.to_vec()].concat()).contains("ends"));
}

#[test]
fn global_headers_that_would_change_entries() {
    let mut stream = extended(b'g', &record("path", "../outside"));
    stream.extend(raw_stream(&[file("plain", b"x")]));
    stream.extend(END);
    assert!(matches!(reject(&stream), Error::Refused { .. }));
}

#[test]
fn names_of_what_is_beside_lead_nowhere() {
    let said = |entry: &str, name: &str| {
        let mut stream = raw_stream(&[Raw::new("./", b'5')]);
        let comment = extended(b'x', &record("comment", &format!("denizen-beside:{name}")));
        let at = if entry == "first" { 0 } else { stream.len() };
        stream.splice(at..at, comment);
        stream.extend(raw_stream(&[file("a", b"x")]));
        stream.extend(END);
        stream
    };
    for name in ["..", ".", "../outside", "/etc", "a/b", "a\0"] {
        assert!(damaged(&said("first", name)).contains("name"), "{name:?}");
    }
    for (entry, beside) in [("first", Beside::Named("a".into())), ("second", Beside::Unsaid)] {
        let bench = Bench::new();
        let archive = bench.destination.join("x.tar.zst");
        pack(&archive, &said(entry, "a"));
        assert_eq!(restore(&archive, &bench.into).unwrap().beside, beside);
    }
}

#[test]
fn impossible_sparse_maps() {
    let sparse = |map: &str, real: &str| {
        let mut records = record("GNU.sparse.major", "1");
        records.extend(record("GNU.sparse.minor", "0"));
        records.extend(record("GNU.sparse.name", "sparse"));
        records.extend(record("GNU.sparse.realsize", real));
        let mut content = map.as_bytes().to_vec();
        content.resize(512, 0);
        content.extend([b'x'; 512]);
        let mut stream = extended(b'x', &records);
        stream.extend(raw_stream(&[file("s", &content)]));
        stream.extend(END);
        stream
    };
    for map in [
        "1\n512\n511\n",
        "2\n512\n256\n0\n256\n",
        "1\n18446744073709551615\n512\n",
        "99999999\n",
        "9999999999999999999999\n",
        "1\n0\n",
        "-1\n",
        "\n",
        "",
    ] {
        damaged(&sparse(map, "4096"));
    }
    damaged(&sparse("1\n3584\n512\n", "4000"));
    damaged(&sparse("1\n0\n512\n", "18446744073709551615"));
    for (major, minor) in [("0", "1"), ("2", "0")] {
        let records =
            [record("GNU.sparse.major", major), record("GNU.sparse.minor", minor)].concat();
        let mut stream = extended(b'x', &records);
        stream.extend(raw_stream(&[file("s", b"x")]));
        stream.extend(END);
        assert!(matches!(reject(&stream), Error::Refused { .. }));
    }
    let old = record("GNU.sparse.size", "4096");
    let stream = [extended(b'x', &old), raw_stream(&[file("s", b"x")]), END.to_vec()].concat();
    assert!(matches!(reject(&stream), Error::Refused { .. }));
}

/// Peak memory of this process in kilobytes, from proc(5).
fn peak_memory() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|l| l.starts_with("VmHWM:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// A stream that starts with `head` and goes on with gigabytes of zeros or lies about it.
fn bomb(archive: &Path, head: &[u8], zeros: u64) {
    let mut encoder = zstd::Encoder::new(fs::File::create(archive).unwrap(), 1).unwrap();
    encoder.write_all(head).unwrap();
    let chunk = vec![0; 1 << 20];
    for _ in 0..zeros >> 20 {
        encoder.write_all(&chunk).unwrap();
    }
    encoder.finish().unwrap();
}

#[test]
fn bombs_do_not_take_memory() {
    let bench = Bench::new();
    let archive = bench.destination.join("bomb.tar.zst");
    let before = peak_memory();
    for kind in *b"xgLK" {
        for size in [1 << 30, 1 << 62] {
            bomb(&archive, raw_header(b"x", kind, b"", size).as_bytes(), 1 << 30);
            let error = restore(&archive, &bench.into).unwrap_err();
            assert!(matches!(error, Error::Damaged { .. }), "{error:?}");
            assert!(!bench.into.exists());
        }
    }
    // A gigabyte that is counted, not kept.
    let mut stream = raw_header(b"big", b'0', b"", 1 << 30).as_bytes().to_vec();
    bomb(&archive, &stream, (1 << 30) + (1 << 20));
    assert_eq!(verify(&archive).unwrap().bytes, 1 << 30);
    // More is announced than there is.
    stream = raw_header(b"big", b'0', b"", 1 << 50).as_bytes().to_vec();
    bomb(&archive, &stream, 1 << 20);
    let error = restore(&archive, &bench.into).unwrap_err();
    assert!(matches!(error, Error::Damaged { .. }), "{error:?}");
    let grown = (peak_memory() - before) / 1024;
    assert!(grown < 200, "took {grown} MiB");
}

/// So many folders, next to each other or one in another, with attributes of 64 KiB each that no
/// file system takes.
fn folders_with_attributes(count: usize, nested: bool) -> Vec<u8> {
    let value = "v".repeat(64 << 10);
    let mut stream = Vec::new();
    let mut name = String::from("./");
    for number in 0..count {
        if nested {
            name.push_str("d/");
        } else {
            name = format!("./{number}/");
        }
        let records = [record("path", &name), record("SCHILY.xattr.none.such", &value)].concat();
        stream.extend(extended(b'x', &records));
        stream.extend(raw_stream(&[Raw::new("x", b'5')]));
    }
    stream.extend(END);
    stream
}

#[test]
fn only_the_folders_on_the_way_take_memory() {
    let bench = Bench::new();
    let archive = bench.destination.join("x.tar.zst");
    pack(&archive, &folders_with_attributes(4200, false));
    let restored = restore(&archive, &bench.into).unwrap();
    assert_eq!(restored.warnings.len() as u64 + restored.more_warnings, 4200);
    assert_eq!(fs::read_dir(&bench.into).unwrap().count(), 4200);
    match reject(&folders_with_attributes(4200, true)) {
        Error::Refused { reason, .. } => assert!(reason.contains("attributes"), "{reason}"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn every_truncation_is_noticed() {
    let bench = Bench::new();
    random_tree(&bench.volume, 77, 25);
    let written = write(&bench.volume, &bench.destination).unwrap();
    let whole = fs::read(&written.entry.path).unwrap();
    let archive = bench.destination.join("cut");
    let step = (whole.len() / 60).max(1);
    for length in (0..whole.len()).step_by(step).chain([whole.len() - 1]) {
        fs::write(&archive, &whole[..length]).unwrap();
        if length == whole.len() - SEAL {
            continue;
        }
        let error = restore(&archive, &bench.into).unwrap_err();
        assert!(matches!(error, Error::Damaged { .. }), "{length}: {error:?}");
        assert!(!bench.into.exists());
        verify(&archive).unwrap_err();
    }
    // Without the seal alone, everything is there.
    fs::write(&archive, &whole[..whole.len() - SEAL]).unwrap();
    let (with, without) = (verify(&written.entry.path).unwrap(), verify(&archive).unwrap());
    assert!(with.sealed && !without.sealed && with.entries == without.entries);
    // Cut in the stream, not in the file: at every block.
    let stream = unpacked(&written.entry.path);
    for length in (0..stream.len() - 1024).step_by(512 * (stream.len() / 512 / 60).max(1)) {
        pack(&archive, &stream[..length]);
        assert!(matches!(verify(&archive), Err(Error::Damaged { .. })), "{length}");
    }
}

#[test]
fn every_flipped_bit_is_noticed() {
    let bench = Bench::new();
    random_tree(&bench.volume, 78, 25);
    let written = write(&bench.volume, &bench.destination).unwrap();
    let whole = fs::read(&written.entry.path).unwrap();
    let archive = bench.destination.join("flipped");
    let mut random = Random::new(3);
    for _ in 0..80 {
        let at = usize::try_from(random.below(whole.len() as u64)).unwrap();
        let mut changed = whole.clone();
        changed[at] ^= 1 << random.below(8);
        fs::write(&archive, &changed).unwrap();
        let error = restore(&archive, &bench.into).unwrap_err();
        assert!(!bench.into.exists(), "{at}: {error:?}");
    }
    // Changed before compression, so that only the seal can tell.
    let stream = unpacked(&written.entry.path);
    let mut noticed = 0;
    for _ in 0..80 {
        let at = usize::try_from(random.below(stream.len() as u64 - 2048)).unwrap();
        let mut changed = stream.clone();
        changed[at] ^= 1 << random.below(8);
        pack(&archive, &changed);
        let seal = &whole[whole.len() - SEAL..];
        fs::OpenOptions::new().append(true).open(&archive).unwrap().write_all(seal).unwrap();
        let error = verify(&archive).unwrap_err();
        noticed += usize::from(error.to_string().contains("seal"));
    }
    assert!(noticed > 0, "the seal was never asked");
}

#[test]
fn something_after_the_end() {
    let bench = Bench::new();
    fs::write(bench.volume.join("a"), "x").unwrap();
    let written = write(&bench.volume, &bench.destination).unwrap();
    let stream = unpacked(&written.entry.path);
    let more = raw_stream(&[file("b", b"x")]);
    let after_end = [stream.clone(), more.clone(), END.to_vec()].concat();
    assert!(damaged(&after_end).contains("end"));
    // Behind the seal, where a second frame would be.
    let mut file = fs::OpenOptions::new().append(true).open(&written.entry.path).unwrap();
    file.write_all(&zstd::encode_all(&[more, END.to_vec()].concat()[..], 1).unwrap()).unwrap();
    assert!(matches!(verify(&written.entry.path), Err(Error::Damaged { .. })));
}

#[test]
fn things_that_are_no_archives() {
    let bench = Bench::new();
    let archive = bench.destination.join("x");
    for content in [&b""[..], b"not zstd at all", &[0x28, 0xb5, 0x2f, 0xfd]] {
        fs::write(&archive, content).unwrap();
        let error = restore(&archive, &bench.into).unwrap_err();
        assert!(matches!(error, Error::Damaged { .. }), "{error:?}");
        assert!(!bench.into.exists());
    }
    damaged(&[b'z'; 5000]);
    damaged(b"");
    let error = restore(&bench.destination.join("missing"), &bench.into).unwrap_err();
    assert!(matches!(error, Error::Io { .. }) && !bench.into.exists(), "{error:?}");
}

#[test]
fn noise_never_panics() {
    let bench = Bench::new();
    fs::write(bench.volume.join("a"), "x").unwrap();
    let written = write(&bench.volume, &bench.destination).unwrap();
    let stream = unpacked(&written.entry.path);
    let archive = bench.destination.join("noise");
    let mut random = Random::new(11);
    for round in 0..400 {
        println!("round {round}");
        let mut noise = stream.clone();
        for block in noise.chunks_exact_mut(512).take(6) {
            for _ in 0..random.below(4) {
                let at = usize::try_from(random.below(512)).unwrap();
                block[at] = random.bytes(1)[0];
            }
            // With a correct checksum, so that what is behind it is reached.
            let mut header = tar::Header::new_old();
            header.as_mut_bytes().copy_from_slice(block);
            header.set_cksum();
            block.copy_from_slice(header.as_bytes());
        }
        pack(&archive, &noise);
        if restore(&archive, &bench.into).is_ok() {
            fs::remove_dir_all(&bench.into).unwrap();
        }
        assert!(!bench.into.exists());
    }
}
