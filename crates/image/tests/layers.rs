//! What becomes of a layer: its files, and what overlayfs makes of several of them.
#![allow(clippy::unwrap_used)]

mod support;

use std::fs;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _};

use denizen_image::{Error, ImportOptions, Owners, Store};
use support::*;

#[test]
fn every_kind_of_entry_and_every_compression() {
    let bench = Bench::new();
    let tar = || {
        Tar::new()
            .add(b'5', "./", "", b"", |h| h.set_mode(0o751))
            .dir("./bin/")
            .add(b'0', "bin/su", "", b"program", |h| h.set_mode(0o4755))
            .add(b'5', "tmp", "", b"", |h| h.set_mode(0o1777))
            .link(b'1', "bin/su2", "bin/su")
            .link(b'2', "sh", "/bin/su")
            .link(b'2', "bin/up", "../tmp/./x")
            .add(b'6', "fifo", "", b"", |h| h.set_mode(0o620))
            .pax("SCHILY.xattr.user.note", b"with\nnewline\0")
            .pax("mtime", b"1500000000.25")
            .file("/absolute/implied/file", b"")
            .file(&format!("long/{}/{}", "d".repeat(200), "f".repeat(255)), b"long")
    };
    // They are one layer, so each needs a store of its own.
    for (index, layer) in [tar().plain(), tar().gzip(), tar().zstd()].iter().enumerate() {
        let store = Store::open(&bench.path(&format!("store-{index}")), Owners::Mine).unwrap();
        let folder = bench.path(&format!("layout-{index}"));
        layout(&folder, std::slice::from_ref(layer));
        let image = store.import(&folder, &ImportOptions::default(), &NEVER, &|_| {}).unwrap();
        let root = &image.layers[0];
        let meta = |name: &str| fs::symlink_metadata(root.join(name)).unwrap();
        assert_eq!(meta("").mode() & 0o7777, 0o751);
        assert_eq!(meta("bin").mode() & 0o7777, 0o755);
        assert_eq!(meta("bin/su").mode() & 0o7777, 0o4755);
        assert_eq!(meta("bin/su").mtime(), 1_000_000_000);
        assert_eq!(meta("bin").mtime(), 1_000_000_000);
        assert_eq!(meta("tmp").mode() & 0o7777, 0o1777);
        assert_eq!(meta("bin/su").ino(), meta("bin/su2").ino());
        assert_eq!(fs::read_link(root.join("sh")).unwrap().to_str(), Some("/bin/su"));
        assert_eq!(meta("sh").mtime(), 1_000_000_000);
        assert!(meta("fifo").file_type().is_fifo());
        assert_eq!(meta("fifo").mode() & 0o7777, 0o620);
        assert_eq!(meta("absolute/implied/file").mtime_nsec(), 250_000_000);
        let note = xattr::get(root.join("absolute/implied/file"), "user.note").unwrap();
        // A second extended header replaces nothing of the first.
        assert_eq!(note.as_deref(), Some(&b"with\nnewline\0"[..]));
        let long = format!("long/{}/{}", "d".repeat(200), "f".repeat(255));
        assert_eq!(fs::read(root.join(long)).unwrap(), b"long");
        let report = store.report(root).unwrap();
        assert_eq!((report.entries, report.bytes, report.devices), (10, 11, 0));
    }
}

#[test]
fn devices_and_foreign_attributes_are_left_out_and_counted() {
    let bench = Bench::new();
    let root = bench
        .one(
            Tar::new()
                .add(b'3', "dev/null", "", b"", |h| h.set_device_major(1).unwrap())
                // To overlayfs it would be a deleted file.
                .add(b'3', "dev/zero-zero", "", b"", |_| {})
                .add(b'4', "dev/sda", "", b"", |_| {})
                .pax("SCHILY.xattr.user.overlay.opaque", b"y")
                .pax("SCHILY.xattr.user.overlay.redirect", b"/etc")
                .pax("SCHILY.xattr.trusted.overlay.opaque", b"y")
                .pax("SCHILY.xattr.security.capability", b"\x01\0\0\x02")
                .pax("SCHILY.xattr.system.posix_acl_access", b"\x02\0\0\0")
                .pax("SCHILY.xattr.user.kept", b"y")
                .dir("etc"),
        )
        .unwrap();
    assert_eq!(names(&root), ["etc/"]);
    let attributes: Vec<_> = xattr::list(root.join("etc")).unwrap().collect();
    assert_eq!(attributes, ["user.kept"]);
    let report = bench.store.report(&root).unwrap();
    assert_eq!((report.devices, report.attributes, report.entries), (3, 5, 1));
}

#[test]
fn a_later_entry_takes_the_place_of_an_earlier_one() {
    let bench = Bench::new();
    let root = bench
        .one(
            Tar::new()
                .file("file", "first")
                .link(b'1', "other-name", "file")
                .file("file", "second")
                .dir("tree")
                .dir("tree/below")
                .file("tree/below/file", "x")
                .file("tree", "now a file")
                .file("was-a-file", "x")
                .dir("was-a-file")
                .file("was-a-file/within", "y")
                .link(b'2', "link", "nowhere")
                .dir("link")
                .file("link/within", "z")
                .add(b'5', "kept", "", b"", |h| h.set_mode(0o700))
                .file("kept/within", "k")
                .add(b'5', "kept", "", b"", |h| h.set_mode(0o711))
                .dir("linked")
                .file("linked/within", "l")
                .link(b'1', "linked", "linked/within")
                .file("same", "s")
                .link(b'1', "same", "./same"),
        )
        .unwrap();
    let text = |name: &str| fs::read_to_string(root.join(name)).unwrap();
    assert_eq!(text("file"), "second");
    assert_eq!(text("other-name"), "first");
    assert_eq!(text("tree"), "now a file");
    assert_eq!(text("was-a-file/within"), "y");
    assert_eq!(text("link/within"), "z");
    assert!(fs::symlink_metadata(root.join("link")).unwrap().is_dir());
    assert_eq!(text("kept/within"), "k");
    assert_eq!(fs::metadata(root.join("kept")).unwrap().mode() & 0o777, 0o711);
    assert_eq!(text("linked"), "l");
    assert_eq!(text("same"), "s");
}

#[test]
fn deleted_and_hidden_names_as_overlayfs_shows_them() {
    if !apart("deleted_and_hidden_names_as_overlayfs_shows_them") {
        return;
    }
    let bench = Bench::new();
    let lowest = Tar::new()
        .file("etc/kept", "low")
        .file("etc/deleted", "low")
        .file("etc/changed", "low")
        .file("gone/a/b", "low")
        .file("hidden/low", "low")
        .file("replaced/low", "low")
        .file("replaced2/low", "low")
        .file("replaced3/low", "low")
        .file("again", "low")
        .dir("usr/lib")
        .file("usr/lib/low", "low")
        .link(b'2', "lib", "usr/lib");
    let upper = Tar::new()
        .file("etc/.wh.deleted", "")
        .file("etc/changed", "high")
        .file(".wh.gone", "")
        .file("hidden/.wh..wh..opq", "")
        .file("hidden/high", "high")
        // Both orders of a deletion and what comes in its place.
        .file(".wh.replaced", "")
        .file("replaced/high", "high")
        .file("replaced2/high", "high")
        .file(".wh.replaced2", "")
        .file(".wh.replaced3", "")
        .dir("replaced3")
        .file("replaced3/high", "high")
        .file("again", "high")
        .file(".wh.again", "")
        // What AUFS kept for itself.
        .dir(".wh..wh.plnk")
        .file(".wh..wh.plnk/1.2", "")
        .file(".wh..wh.aufs", "");
    let top = Tar::new().dir("gone").file("gone/new", "top").file("lib/top", "top");
    let image = bench.layers("three", &[lowest.gzip(), upper.zstd(), top.plain()]).unwrap();
    assert_eq!(image.layers.len(), 3);
    let merged = mount(&image, bench.dir.path());
    assert_eq!(
        names(&merged),
        [
            "again",
            "etc/",
            "etc/changed",
            "etc/kept",
            "gone/",
            "gone/new",
            "hidden/",
            "hidden/high",
            "lib/",
            "lib/top",
            "replaced/",
            "replaced/high",
            "replaced2/",
            "replaced2/high",
            "replaced3/",
            "replaced3/high",
            "usr/",
            "usr/lib/",
            "usr/lib/low",
        ]
    );
    assert_eq!(fs::read_to_string(merged.join("etc/changed")).unwrap(), "high");
    assert_eq!(fs::read_to_string(merged.join("again")).unwrap(), "high");
    // A session can write there, and delete for itself.
    fs::write(merged.join("etc/kept"), "mine").unwrap();
    fs::remove_file(merged.join("again")).unwrap();
    let low = image.layers[2].join("etc/kept");
    assert_eq!(fs::read_to_string(low).unwrap(), "low");
}

#[test]
fn a_deleted_name_that_no_lower_layer_has_is_not_listed() {
    if !apart("a_deleted_name_that_no_lower_layer_has_is_not_listed") {
        return;
    }
    let bench = Bench::new();
    let low = Tar::new().file("only/.wh.x", "").file("only/y", "").file("o/low", "");
    let top = Tar::new().file("o/.wh..wh..opq", "").file("o/.wh.x", "").file("o/y", "");
    let image = bench.layers("only", &[low.gzip(), top.gzip()]).unwrap();
    let merged = mount(&image, bench.dir.path());
    assert_eq!(names(&merged), ["o/", "o/y", "only/", "only/y"]);
    fs::write(merged.join("only/x"), "new").unwrap();
    fs::remove_dir_all(merged.join("o")).unwrap();
    assert_eq!(names(&merged), ["only/", "only/x", "only/y"]);
}

#[test]
fn a_layer_that_hides_everything_below_it() {
    if !apart("a_layer_that_hides_everything_below_it") {
        return;
    }
    let bench = Bench::new();
    let low = Tar::new().file("low", "").gzip();
    let hides = Tar::new().file(".wh..wh..opq", "").file("middle", "").gzip();
    let top = Tar::new().file("top", "").gzip();
    let image = bench.layers("hides", &[low, hides, top]).unwrap();
    assert_eq!(image.layers.len(), 2, "the lowest is not seen");
    assert_eq!(names(&mount(&image, bench.dir.path())), ["middle", "top"]);
}

#[test]
fn without_any_privilege() {
    if !unprivileged("without_any_privilege") {
        return;
    }
    let bench = Bench::new();
    let lower = Tar::new()
        .add(b'5', "locked", "", b"", |h| h.set_mode(0))
        .add(b'5', "locked/deeper", "", b"", |h| h.set_mode(0o111))
        .add(b'0', "locked/deeper/file", "", b"x", |h| h.set_mode(0))
        .pax("SCHILY.xattr.user.note", b"on what may not be written")
        .add(b'0', "read-only", "", b"x", |h| h.set_mode(0o444))
        .add(b'0', "su", "", b"x", |h| {
            h.set_uid(0);
            h.set_mode(0o4755);
        })
        .file("deleted", "");
    // Of the root too: a folder that may not be written cannot be moved.
    let upper = Tar::new().add(b'5', ".", "", b"", |h| h.set_mode(0o555)).file(".wh.deleted", "");
    let image = bench.layers("locked", &[lower.gzip(), upper.gzip()]).unwrap();
    let (top, low) = (&image.layers[0], &image.layers[1]);
    assert_eq!(fs::metadata(top).unwrap().mode() & 0o7777, 0o555);
    assert!(fs::symlink_metadata(top.join("deleted")).unwrap().file_type().is_char_device());
    assert_eq!(fs::metadata(low.join("locked")).unwrap().mode() & 0o7777, 0);
    assert_eq!(fs::metadata(low.join("su")).unwrap().mode() & 0o7777, 0o4755);
    assert!(xattr::get(low.join("read-only"), "user.note").unwrap().is_some());
    let store = fs::metadata(bench.path("store/layers")).unwrap();
    assert_eq!(store.permissions().mode() & 0o777, 0o700, "nobody else may run what is in it");
    let removed = bench.store.remove("locked", |_| false).unwrap();
    assert_eq!(removed.layers.len(), 2);
    fs::remove_dir_all(bench.path("layout-locked")).unwrap();
    bench.assert_untouched();
}

#[test]
fn owners_are_shifted_into_the_range() {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let bench = Bench::new();
    let owners = Owners::Shifted { uid_base: 200_000, gid_base: 300_000, count: 65_536 };
    let store = Store::open(&bench.path("shifted"), owners).unwrap();
    let layer = Tar::new()
        .add(b'0', "implied/root", "", b"", |h| h.set_mode(0o4755))
        .add(b'5', "folder", "", b"", |h| h.set_uid(33))
        .add(b'2', "link", "root", b"", |h| h.set_gid(44))
        .pax("uid", b"4000000000")
        .add(b'0', "foreign", "", b"", |h| h.set_mode(0o6755))
        .pax("gid", b"99999999999999")
        .add(b'6', "fifo", "", b"", |_| {})
        .file(".wh.deleted", "");
    layout(&bench.path("layout"), &[layer.gzip()]);
    let image =
        store.import(&bench.path("layout"), &ImportOptions::default(), &NEVER, &|_| {}).unwrap();
    let root = &image.layers[0];
    let owner = |name: &str| {
        let meta = fs::symlink_metadata(root.join(name)).unwrap();
        (meta.uid(), meta.gid(), meta.mode() & 0o7777)
    };
    assert_eq!(owner(""), (200_000, 300_000, 0o755));
    assert_eq!(owner("implied"), (200_000, 300_000, 0o755));
    assert_eq!(owner("implied/root"), (200_000, 300_000, 0o4755));
    assert_eq!(owner("folder"), (200_033, 300_000, 0o644));
    assert_eq!(owner("link").1, 300_044);
    assert_eq!(owner("foreign"), (265_534, 300_000, 0o755), "and not setuid nobody");
    assert_eq!(owner("fifo"), (200_000, 365_534, 0o644));
    assert_eq!(store.report(root).unwrap().owners, 2);
    // The layers would be wrong for anybody else.
    let error = Store::open(&bench.path("shifted"), Owners::Mine).unwrap_err();
    assert!(matches!(error, Error::Owners { .. }), "{error}");
    let other = Owners::Shifted { uid_base: 200_000, gid_base: 300_001, count: 65_536 };
    Store::open(&bench.path("shifted"), other).unwrap_err();
    assert_eq!(Store::open(&bench.path("shifted"), owners).unwrap().list().unwrap(), [image]);
}

#[test]
fn owners_that_cannot_be() {
    let bench = Bench::new();
    for (uid_base, gid_base, count) in
        [(0, 1, 65_536), (1, 0, 65_536), (1, 1, 999), (u32::MAX - 65_535, 1, 65_536)]
    {
        let owners = Owners::Shifted { uid_base, gid_base, count };
        let error = Store::open(&bench.path("store"), owners).unwrap_err();
        assert!(matches!(error, Error::Owners { .. }), "{error}");
    }
}
