//! Layers made to hurt: none may reach outside, take memory or disk without end, or leave a
//! trace.
#![allow(clippy::unwrap_used)]

mod support;

use std::fs;
use std::io::Write as _;

use denizen_image::{Error, ImportOptions, Limits};
use support::*;

/// Imports a stream that must be refused, and looks for traces.
fn reject(layer: &Layer) -> Error {
    let bench = Bench::new();
    let error = bench.layers("hostile", std::slice::from_ref(layer)).unwrap_err();
    bench.assert_untouched();
    error
}

fn refused(tar: Tar) -> String {
    match reject(&tar.plain()) {
        Error::Refused { reason, .. } => reason.to_owned(),
        other => panic!("{other:?}"),
    }
}

fn damaged(layer: &Layer) -> String {
    match reject(layer) {
        Error::Damaged { detail, .. } => detail,
        other => panic!("{other:?}"),
    }
}

fn limited(layer: &Layer, edit: impl Fn(&mut Limits)) -> Error {
    let bench = Bench::new();
    layout(&bench.path("layout"), std::slice::from_ref(layer));
    let mut options = ImportOptions::default();
    edit(&mut options.limits);
    let error = bench.store.import(&bench.path("layout"), &options, &NEVER, &|_| {}).unwrap_err();
    bench.assert_untouched();
    assert!(matches!(error, Error::TooLarge { .. }), "{error:?}");
    error
}

#[test]
fn names_that_lead_outside() {
    for name in ["../outside", "a/../../outside", "a/..", "..", "/../outside", "./../outside"] {
        assert!(refused(Tar::new().file(name, "x")).contains(".."), "{name}");
        assert!(refused(Tar::new().dir(name)).contains(".."), "{name}");
        assert!(refused(Tar::new().pax("path", name.as_bytes()).file("x", "")).contains(".."));
        assert!(refused(Tar::new().link(b'2', name, "x")).contains(".."), "{name}");
        assert!(refused(Tar::new().link(b'3', name, "x")).contains(".."), "{name}");
    }
    let long_name = Tar::new().add(b'L', "x", "", b"../outside\0", |_| {});
    assert!(refused(long_name.file("x", "")).contains(".."));
    assert!(refused(Tar::new().file("a/../.wh.b", "")).contains(".."));
}

#[test]
fn an_absolute_name_is_one_of_the_layer() {
    let bench = Bench::new();
    let root = bench.one(Tar::new().file("//etc//./passwd", "x")).unwrap();
    assert_eq!(names(&root), ["etc/", "etc/passwd"]);
    let outside = bench.path("outside").to_str().unwrap().to_owned();
    let image = bench.layers("absolute", &[Tar::new().file(&outside, "x").plain()]).unwrap();
    assert!(image.layers[0].join(&outside[1..]).exists());
    assert_eq!(fs::read(outside).unwrap(), b"untouched");
}

#[test]
fn the_layer_itself_as_something_else() {
    for kind in [b'0', b'2', b'6'] {
        assert!(refused(Tar::new().link(kind, ".", "x")).contains("stands for"));
        assert!(refused(Tar::new().link(kind, "", "x")).contains("stands for"));
    }
}

#[test]
fn writing_through_a_symlink() {
    for target in ["a", "/tmp", "a/..", "/", "."] {
        let link = Tar::new().dir("a").link(b'2', "l", target);
        assert!(refused(link.clone().file("l/outside", "x")).contains("symlink"), "{target}");
        assert!(refused(link.clone().dir("l/b/c")).contains("symlink"), "{target}");
        assert!(refused(link.clone().link(b'2', "l/b", "x")).contains("symlink"), "{target}");
        assert!(refused(link.clone().link(b'6', "l/b", "")).contains("symlink"), "{target}");
        assert!(refused(link.clone().file("l/.wh.b", "")).contains("symlink"), "{target}");
        assert!(refused(link.file("l/.wh..wh..opq", "")).contains("symlink"), "{target}");
    }
    // Through it to what is there.
    let through = Tar::new().dir("a/b").link(b'2', "l", "a");
    assert!(refused(through.clone().file("l/b/c", "x")).contains("symlink"));
    assert!(refused(through.file("a/b/c", "").link(b'1', "h", "l/b/c")).contains("symlink"));
    // Deeper, and after the directory was open already.
    let swapped = Tar::new().dir("a/b").file("a/b/c", "").link(b'2', "a/b", "/tmp");
    assert!(refused(swapped.file("a/b/d", "x")).contains("symlink"));
    let swapped = Tar::new().file("a/b/c", "").link(b'2', "a", "/tmp");
    assert!(refused(swapped.file("a/b/d", "x")).contains("symlink"));
    assert!(refused(Tar::new().file("f", "").file("f/g", "")).contains("no directory"));
    assert!(refused(Tar::new().link(b'6', "f", "").file("f/g", "")).contains("no directory"));
}

#[test]
fn replacing_a_symlink_does_not_follow_it() {
    let bench = Bench::new();
    let outside = bench.path("outside");
    let outside = outside.to_str().unwrap();
    let image = bench.layers(
        "replaced",
        &[Tar::new()
            .link(b'2', "l", outside)
            .add(b'0', "l", "", b"inside", |h| h.set_mode(0o666))
            .link(b'2', "m", outside)
            .add(b'6', "m", "", b"", |h| h.set_mode(0o666))
            .plain()],
    );
    assert_eq!(fs::read(image.unwrap().layers[0].join("l")).unwrap(), b"inside");
    assert_eq!(fs::read(outside).unwrap(), b"untouched");
}

#[test]
fn symlinks_out_of_the_layer() {
    for (name, target) in
        [("l", ".."), ("l", "../outside"), ("a/l", "../../x"), ("a/l", "b/../../../x")]
    {
        assert!(refused(Tar::new().link(b'2', name, target)).contains("out of"), "{target}");
    }
    for target in ["", &"x".repeat(5000)] {
        assert!(refused(Tar::new().link(b'2', "l", target)).contains("target"));
    }
    assert!(refused(Tar::new().pax("linkpath", b"a\0b").link(b'2', "l", "")).contains("target"));
}

#[test]
fn hard_links_to_what_is_not_in_the_layer() {
    for target in ["../outside", "a/../../outside"] {
        assert!(refused(Tar::new().dir("a").link(b'1', "l", target)).contains(".."), "{target}");
    }
    // Even if such a file is on the host.
    for target in ["/etc/passwd", "missing", "missing/too"] {
        assert!(refused(Tar::new().link(b'1', "l", target)).contains("not there"), "{target}");
    }
    assert!(refused(Tar::new().dir("d").link(b'1', "l", "d")).contains("directory"));
    assert!(refused(Tar::new().link(b'1', "l", "/")).contains("no file"));
    for up in ["a", "/", "/etc"] {
        let through = Tar::new().dir("a").link(b'2', "up", up).link(b'1', "l", "up/passwd");
        assert!(refused(through).contains("symlink"), "{up}");
    }
    let deleted = Tar::new().file(".wh.x", "").link(b'1', "l", "x");
    assert!(refused(deleted).contains("deleted"));
    assert!(refused(Tar::new().link(b'1', "l", ".wh.x")).contains("no file"));
}

#[test]
fn a_hard_link_to_a_symlink_is_the_symlink() {
    let bench = Bench::new();
    let outside = bench.path("outside");
    let tar = Tar::new().link(b'2', "s", outside.to_str().unwrap()).link(b'1', "l", "s");
    // Written over, it is the link that goes.
    let root = bench.one(tar.file("l", "inside")).unwrap();
    assert!(fs::symlink_metadata(root.join("s")).unwrap().is_symlink());
    assert_eq!(fs::read(root.join("l")).unwrap(), b"inside");
    assert_eq!(fs::read(outside).unwrap(), b"untouched");
}

#[test]
fn deletions_of_no_name() {
    for name in [".wh.", "a/.wh..", "a/.wh..."] {
        assert!(refused(Tar::new().file(name, "")).contains("deletes no name"), "{name}");
    }
    assert!(refused(Tar::new().file(".wh.a/b", "x")).contains("below a deleted"));
    let bench = Bench::new();
    // Whatever kind a deletion is, it makes one thing only.
    let root = bench
        .one(Tar::new().dir(".wh.d").link(b'2', ".wh.l", "/etc").link(b'1', ".wh.h", "/etc/x"));
    assert_eq!(names(&root.unwrap()), ["d", "h", "l"]);
}

#[test]
fn names_that_are_too_long() {
    assert!(refused(Tar::new().file(&"n".repeat(256), "")).contains("too long"));
    assert!(refused(Tar::new().file(&"n/".repeat(513), "")).contains("too long"));
    let long = format!("{}f", format!("{}/", "n".repeat(200)).repeat(21));
    assert!(refused(Tar::new().file(&long, "")).contains("too long"));
    assert!(refused(Tar::new().pax("path", b"a\0b").file("x", "")).contains("NUL"));
    let bench = Bench::new();
    let deepest = format!("{}f", "n/".repeat(511));
    bench.one(Tar::new().file(&deepest, "")).unwrap();
    assert_eq!(bench.store.remove("one", |_| false).unwrap().layers.len(), 1);
    fs::remove_dir_all(bench.path("layout-one")).unwrap();
    bench.assert_untouched();
}

#[test]
fn unknown_kinds_and_sparse_files() {
    for kind in *b"SVMDNX" {
        let reason = refused(Tar::new().link(kind, "x", ""));
        assert!(reason.contains("unknown") || reason.contains("sparse"), "{reason}");
    }
    assert!(refused(Tar::new().pax("GNU.sparse.major", b"1").file("x", "")).contains("sparse"));
}

#[test]
fn headers_that_are_none() {
    let good = Tar::new().file("x", "content");
    for at in [0, 100, 130, 148, 150, 156, 257, 511] {
        let mut tar = good.clone();
        tar.0[at] ^= 0x15;
        damaged(&tar.plain());
    }
    damaged(&Layer::new(b"not a tar file", b"not a tar file".to_vec(), MANIFEST));
    for records in [
        &b"12 path=abc"[..],
        b"99999999999999999999999 a=b\n",
        b"99 a=b\n",
        b"2 a=b\n",
        b"0 \n",
        b"x",
        b" ",
        b"-1 a=b\n",
        b"7 noeq\n",
        b"18 size=999999999x\n",
        b"10 uid=-1\n",
        b"11 mtime=x\n",
    ] {
        damaged(&Tar::new().add(b'x', "pax", "", records, |_| {}).file("x", "").plain());
    }
    // A size that no stream can have.
    let huge = Tar::new().pax("size", b"18446744073709551615").file("x", "");
    assert!(matches!(reject(&huge.plain()), Error::TooLarge { .. }));
    damaged(&Tar::new().pax("size", b"10000").file("x", "").plain());
}

#[test]
fn streams_that_end_early() {
    let whole = Tar::new().dir("a").file("a/b", vec![7; 3000]).0;
    for length in [1, 511, 513, 600, 1024, 1025, 2000, 4095] {
        let cut = &whole[..length];
        let layer = |blob: Vec<u8>| Layer { diff_id: digest(&whole), ..Layer::new(cut, blob, "") };
        for blob in [cut.to_vec(), gzip(cut), zstd::encode_all(cut, 1).unwrap()] {
            let error = reject(&layer(blob));
            // Between two entries it is the digest that tells.
            assert!(matches!(error, Error::Damaged { .. } | Error::Digest { .. }), "{error:?}");
        }
        let (gzip, zstd) = (gzip(&whole), zstd::encode_all(&whole[..], 1).unwrap());
        for blob in [&gzip[..gzip.len() - 5], &gzip[..12], &zstd[..zstd.len() - 5], &zstd[..7]] {
            damaged(&layer(blob.to_vec()));
        }
    }
    // The mark of the end may be missing, an extended header's entry may not.
    Bench::new().layers("x", &[Layer::new(&whole, whole.clone(), "")]).unwrap();
    damaged(&Tar::new().pax("path", b"x").plain());
    // Something else behind compressed data is no layer.
    let mut trailing = gzip(&whole);
    trailing.extend(b"trailing garbage");
    damaged(&Layer::new(&whole, trailing, ""));
}

#[test]
fn what_follows_the_end_counts_for_the_digest_only() {
    let mut tar = Tar::new().file("a", "").0;
    tar.extend(END);
    tar.extend(Tar::new().file("../outside", "x").0);
    let bench = Bench::new();
    let image = bench.layers("x", &[Layer::new(&tar, gzip(&tar), "")]).unwrap();
    assert_eq!(names(&image.layers[0]), ["a"]);
}

#[test]
fn wrong_digests() {
    let layer = Tar::new().file("x", "content").gzip();
    let wrong = Layer { diff_id: digest(b"another"), ..layer.clone() };
    assert!(matches!(reject(&wrong), Error::Digest { .. }));
    // Another blob with the same content under the name of the first one.
    let bench = Bench::new();
    let folder = bench.path("layout");
    layout(&folder, std::slice::from_ref(&layer));
    let blob = folder.join("blobs").join(digest(&layer.blob).replace(':', "/"));
    let mut other = layer.blob.clone();
    other[4] ^= 1; // The time in the gzip header, which no checksum covers.
    fs::write(&blob, &other).unwrap();
    assert!(matches!(bench.import(&folder, "x").unwrap_err(), Error::Digest { .. }));
    fs::write(&blob, &other[1..]).unwrap();
    assert!(matches!(bench.import(&folder, "x").unwrap_err(), Error::Damaged { .. }));
    bench.assert_untouched();
}

#[test]
fn bombs() {
    // 100 MiB of zeros, once as a file and once behind the end of the archive.
    let zeros = vec![0; 100 << 20];
    for tar in [Tar::new().file("zeros", &zeros).0, [&END[..], &zeros].concat()] {
        for blob in [gzip(&tar), zstd::encode_all(&tar[..], 1).unwrap()] {
            let layer = Layer::new(&tar, blob, "");
            let error = limited(&layer, |_| {});
            assert!(error.to_string().contains("for each compressed"), "{error}");
            let error = limited(&layer, |limits| limits.bytes = 50 << 20);
            assert!(error.to_string().contains("unpacked"), "{error}");
            let bench = Bench::new();
            layout(&bench.path("layout"), &[layer]);
            let mut options = ImportOptions::default();
            options.limits.ratio = 1_000_000;
            bench.store.import(&bench.path("layout"), &options, &NEVER, &|_| {}).unwrap();
        }
    }
    // An extended header without end.
    let mut tar = Tar::new().add(b'x', "pax", "", b"", |h| h.set_size(1 << 33)).0;
    tar.extend(&zeros[..40 << 20]);
    let error = limited(&Layer::new(&tar, gzip(&tar), ""), |_| {});
    assert!(error.to_string().contains("one header"), "{error}");
    let tar = Tar::new().add(b'L', "x", "", b"", |h| h.set_size(1 << 33));
    limited(&tar.plain(), |_| {});
    // Many times itself.
    let mut many = gzip(&vec![0; 1 << 20]);
    many = many.repeat(100);
    limited(&Layer::new(b"", many, ""), |_| {});
}

#[test]
fn limits_on_files_entries_and_blobs() {
    let three = Tar::new().file("a", "12345").file("b", "").file("c", "").gzip();
    limited(&three, |limits| limits.entries = 2);
    limited(&three, |limits| limits.file_bytes = 4);
    limited(&three, |limits| limits.blob_bytes = 10);
    limited(&three, |limits| limits.layers = 0);
    limited(&three, |limits| limits.manifest_bytes = 100);
    // Headers count, although they make nothing.
    let headers = (0..20).fold(Tar::new(), |tar, _| tar.add(b'g', "g", "", b"", |_| {}));
    limited(&headers.plain(), |limits| limits.entries = 10);
    // All layers together.
    let bench = Bench::new();
    let layer = |name: &str| Tar::new().file(name, vec![1; 5000]).gzip();
    layout(&bench.path("layout"), &[layer("a"), layer("b")]);
    let mut options = ImportOptions::default();
    options.limits.bytes = 10_000;
    let error = bench.store.import(&bench.path("layout"), &options, &NEVER, &|_| {}).unwrap_err();
    assert!(matches!(error, Error::TooLarge { .. }), "{error:?}");
}

#[test]
fn a_window_that_takes_too_much_memory() {
    let tar = Tar::new().file("x", vec![1; 1 << 20]).0;
    let mut encoder = zstd::stream::write::Encoder::new(Vec::new(), 1).unwrap();
    encoder.set_parameter(zstd::zstd_safe::CParameter::WindowLog(29)).unwrap();
    encoder.write_all(&tar).unwrap();
    damaged(&Layer::new(&tar, encoder.finish().unwrap(), ""));
}

#[test]
fn a_cancelled_import_leaves_nothing() {
    let bench = Bench::new();
    layout(&bench.path("layout"), &[Tar::new().file("x", vec![1; 10 << 20]).gzip()]);
    let cancelled = std::sync::atomic::AtomicBool::new(false);
    let stop = |_| cancelled.store(true, std::sync::atomic::Ordering::Relaxed);
    let options = ImportOptions::default();
    let error = bench.store.import(&bench.path("layout"), &options, &cancelled, &stop);
    assert!(matches!(error.unwrap_err(), Error::Cancelled { .. }));
    bench.assert_untouched();
}

/// A generator without a dependency, the same in every run for one seed.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16
    }

    fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.next() % limit as u64).unwrap()
    }
}

/// A stream of entries whose names and targets meet each other in every way.
fn entries(random: &mut Random) -> Vec<u8> {
    const STEPS: [&str; 12] =
        ["a", "b", "c", "..", ".", ".wh.a", ".wh.b", ".wh..wh..opq", "", "outside", "/", ".wh."];
    let mut tar = Tar::new();
    let mut random_length = Random(random.next() | 1);
    for _ in 0..random.below(16) {
        let mut name = || {
            let mut step = || match STEPS[random.below(STEPS.len())] {
                // The first refusal ends it, so mostly harmless ones.
                ".." | ".wh." if random.below(30) > 0 => "d",
                step => step,
            };
            (0..=random_length.below(4)).map(|_| step()).collect::<Vec<_>>().join("/")
        };
        let (path, link) = (name(), name());
        let content = vec![7; random.below(600)];
        let kind = b"0001122222335556"[random.below(16)];
        let content = if kind == b'0' { &content[..] } else { b"" };
        let mode = u32::try_from(random.below(0o10000)).unwrap();
        tar = tar.add(kind, &path, &link, content, |h| h.set_mode(mode));
    }
    tar.0
}

#[test]
fn random_and_mutated_streams_neither_panic_nor_reach_outside() {
    if !unprivileged("random_and_mutated_streams_neither_panic_nor_reach_outside") {
        return;
    }
    let seed = std::env::var("DENIZEN_FUZZ_SEED").ok().and_then(|s| s.parse().ok());
    let rounds = std::env::var("DENIZEN_FUZZ_ROUNDS").ok().and_then(|s| s.parse().ok());
    let bench = Bench::new();
    let folder = bench.path("layout");
    let (mut whole, mut kinds) = (0, std::collections::BTreeMap::<String, u32>::new());
    for round in 0..rounds.unwrap_or(600) {
        let seed: u64 = seed.unwrap_or(round + 1);
        let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let mut stream = entries(&mut random);
        match random.below(4) {
            // As it is.
            0 | 1 => stream.extend(END),
            // Some bytes are other ones, with headers' sums made right or not.
            2 => {
                for _ in 0..=random.below(8) {
                    let at = random.below(stream.len() + 1);
                    if let Some(byte) = stream.get_mut(at) {
                        *byte = u8::try_from(random.below(256)).unwrap();
                    }
                    let block = at / 512 * 512;
                    if let Some(bytes) = stream.get_mut(block..block + 512)
                        && random.below(3) > 0
                    {
                        let mut header = tar::Header::new_old();
                        header.as_mut_bytes().copy_from_slice(bytes);
                        header.set_cksum();
                        bytes.copy_from_slice(header.as_bytes());
                    }
                }
            }
            _ => stream.truncate(random.below(stream.len() + 1)),
        }
        let mut blob = match random.below(3) {
            0 => stream.clone(),
            1 => gzip(&stream),
            _ => zstd::encode_all(&stream[..], 1).unwrap(),
        };
        if random.below(5) == 0 && !blob.is_empty() {
            let at = random.below(blob.len());
            blob[at] = u8::try_from(random.below(256)).unwrap();
        }
        layout(&folder, &[Layer::new(&stream, blob, "")]);
        match bench.import(&folder, "fuzz") {
            Ok(image) => {
                whole += 1;
                for name in names_seen(&image.layers[0]) {
                    assert!(!name.starts_with(".wh."), "seed {seed}: {name}");
                }
                bench.store.remove("fuzz", |_| false).unwrap();
            }
            Err(error) => {
                let kind = format!("{error:?}");
                let kind = kind.split([' ', '{']).next().unwrap().to_owned();
                assert!(
                    ["Refused", "Damaged", "Digest", "TooLarge"].contains(&&*kind),
                    "seed {seed}: {error:?}"
                );
                *kinds.entry(kind).or_default() += 1;
            }
        }
        fs::remove_dir_all(&folder).unwrap();
        bench.assert_untouched();
    }
    println!("{whole} whole, {kinds:?}");
    assert!(whole > 0, "the streams are of some use");
}

/// The names of a tree as far as its modes let us look.
fn names_seen(root: &std::path::Path) -> Vec<String> {
    let mut names = Vec::new();
    let mut folders = vec![root.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            names.push(entry.file_name().to_string_lossy().into_owned());
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                folders.push(entry.path());
            }
        }
    }
    names
}
