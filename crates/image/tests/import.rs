//! Images from files, and what the store does with them over time.
#![allow(clippy::unwrap_used)]

mod support;

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Mutex;

use denizen_image::{Error, Image, ImportOptions, Owners, Stage, Store};
use serde_json::json;
use support::*;

fn tar_of(folder: &Path, to: &Path, options: &[&str]) {
    let mut tar = Command::new("tar");
    tar.args(options).arg("-cf").arg(to).arg("-C").arg(folder).arg(".");
    assert!(tar.stdout(Stdio::null()).status().unwrap().success());
}

fn options(edit: impl FnOnce(&mut ImportOptions)) -> ImportOptions {
    let mut options = ImportOptions::default();
    edit(&mut options);
    options
}

fn import(bench: &Bench, path: &Path) -> Result<Image, Error> {
    bench.store.import(path, &ImportOptions::default(), &NEVER, &|_| {})
}

fn two() -> [Layer; 2] {
    [Tar::new().file("a", "low").gzip(), Tar::new().file("b", "high").zstd()]
}

#[test]
fn a_layout_as_a_folder_and_as_an_archive() {
    let bench = Bench::new();
    let folder = bench.path("layout");
    layout(&folder, &two());
    let first = import(&bench, &folder).unwrap();
    assert_eq!(first.name, "layout");
    assert_eq!(names(&first.layers[0]), ["b"]);
    assert_eq!(names(&first.layers[1]), ["a"]);
    assert_eq!(
        first.config.env,
        [("PATH".to_owned(), "/bin".to_owned()), ("EMPTY".to_owned(), String::new())]
    );
    assert_eq!(first.config.working_dir, Path::new("/srv"));
    assert_eq!(first.config.user, "1000:1000");
    assert_eq!(first.config.entrypoint, ["/bin/sh", "-c"]);
    assert_eq!(first.config.cmd, ["true"]);
    for (name, option) in [("layout2.tar", "-v"), ("l3.tar.gz", "-z"), ("l4.tar.zst", "--zstd")] {
        let path = bench.path(name);
        tar_of(&folder, &path, &[option]);
        let image = import(&bench, &path).unwrap();
        assert_eq!(image.name, name.split('.').next().unwrap());
        assert_eq!((image.digest, &image.layers), (first.digest, &first.layers));
    }
    assert_eq!(fs::read_dir(bench.path("store/layers")).unwrap().count(), 2, "unpacked once");
}

#[test]
fn what_an_older_and_a_newer_docker_saves() {
    let bench = Bench::new();
    let layers = [Tar::new().file("a", "x").plain(), Tar::new().file("b", "y").plain()];
    let layers = [layers[0].clone(), layers[1].clone(), layers[0].clone()];
    let config = serde_json::to_vec(&config(&layers)).unwrap();
    let hex = digest(&config).replace("sha256:", "");
    // The older one: a folder for each layer, equal ones as links.
    let old = bench.path("layout-old");
    for name in ["one", "two", "three"] {
        fs::create_dir_all(old.join(name)).unwrap();
    }
    fs::write(old.join("one/layer.tar"), &layers[0].blob).unwrap();
    fs::write(old.join("two/layer.tar"), &layers[1].blob).unwrap();
    symlink("../one/layer.tar", old.join("three/layer.tar")).unwrap();
    fs::write(old.join(format!("{hex}.json")), &config).unwrap();
    let members = ["one/layer.tar", "two/layer.tar", "three/layer.tar"];
    let manifest = json!([{
        "Config": format!("{hex}.json"), "RepoTags": ["demo:1", "demo:2"], "Layers": members,
    }]);
    fs::write(old.join("manifest.json"), manifest.to_string()).unwrap();
    fs::write(old.join("repositories"), "{}").unwrap();
    let archive = bench.path("layout.tar");
    tar_of(&old, &archive, &[]);
    let image = import(&bench, &archive).unwrap();
    assert_eq!(image.name, "docker.io/library/demo:1");
    assert_eq!(image.digest.to_string(), digest(&config));
    // The third is the first again, which overlayfs would refuse.
    let seen: Vec<_> = image.layers.iter().map(|layer| names(layer)).collect();
    assert_eq!(seen, [["a"], ["b"]]);
    // Compressed as a whole, as people send them to each other.
    tar_of(&old, &bench.path("layout.tgz"), &["-z"]);
    let again = import(&bench, &bench.path("layout.tgz")).unwrap();
    assert_eq!(again, image);
    assert_eq!(bench.store.list().unwrap(), [image]);

    let asked = |name: &str| {
        let options = options(|options| options.image = Some(name.to_owned()));
        bench.store.import(&archive, &options, &NEVER, &|_| {})
    };
    assert_eq!(asked("demo:2").unwrap().name, "docker.io/library/demo:2");
    let error = asked("other").unwrap_err();
    assert!(error.to_string().contains("demo:2"), "{error}");

    // No manifest says how large these layers are, so it is found out on the way.
    let small = options(|options| options.limits.blob_bytes = 1000);
    let store = Store::open(&bench.path("small"), Owners::Mine).unwrap();
    let error = store.import(&archive, &small, &NEVER, &|_| {}).unwrap_err();
    assert!(matches!(error, Error::TooLarge { .. }), "{error}");

    // An altered configuration no longer has the digest in its name.
    fs::write(old.join(format!("{hex}.json")), [&config[..], b" "].concat()).unwrap();
    tar_of(&old, &archive, &[]);
    assert!(matches!(import(&bench, &archive).unwrap_err(), Error::Digest { .. }));
    // An altered layer not that in the configuration.
    fs::write(old.join(format!("{hex}.json")), &config).unwrap();
    fs::write(old.join("two/layer.tar"), Tar::new().file("b", "evil").plain().blob).unwrap();
    tar_of(&old, &archive, &[]);
    let store = Store::open(&bench.path("another"), Owners::Mine).unwrap();
    let error = store.import(&archive, &ImportOptions::default(), &NEVER, &|_| {}).unwrap_err();
    assert!(matches!(error, Error::Digest { .. }), "{error}");
}

#[test]
fn what_skopeo_makes_of_a_layout() {
    let bench = Bench::new();
    // Docker's form knows no zstd.
    let layers = [Tar::new().file("a", "low").gzip(), Tar::new().file("b", "high").gzip()];
    layout(&bench.path("layout"), &layers);
    let from = format!("oci:{}", bench.path("layout").display());
    for (kind, tag) in [("oci", ":v1"), ("oci-archive", ":v1"), ("docker-archive", ":demo:v1")] {
        let to = bench.path(&format!("demo.{kind}"));
        let done = Command::new("skopeo")
            .args(["--insecure-policy", "copy", &from, &format!("{kind}:{}{tag}", to.display())])
            .stdout(Stdio::null())
            .status()
            .unwrap();
        assert!(done.success(), "{kind}");
        let image = import(&bench, &to).unwrap();
        let expected =
            if kind == "docker-archive" { "docker.io/library/demo:v1" } else { "demo:v1" };
        assert_eq!(image.name, expected, "{kind}");
        assert_eq!(image.layers.len(), 2);
        assert_eq!(names(&image.layers[0]), ["b"], "{kind}");
    }
    assert_eq!(fs::read_dir(bench.path("store/layers")).unwrap().count(), 2, "the same layers");
}

#[test]
fn the_image_for_this_machine_is_chosen() {
    let bench = Bench::new();
    let folder = bench.path("layout");
    let mut entries = Vec::new();
    for (os, arch) in [("linux", "mips"), ("windows", architecture()), ("linux", architecture())] {
        let layers = [Tar::new().file(os, arch).gzip()];
        let mut config = config(&layers);
        config["architecture"] = json!(arch);
        config["os"] = json!(os);
        let config = serde_json::to_vec(&config).unwrap();
        let manifest = serde_json::to_vec(&manifest(&config, &layers)).unwrap();
        layout_of(&folder, &layers, &config, &manifest);
        let mut entry = descriptor(&manifest, MANIFEST);
        entry["platform"] = json!({ "os": os, "architecture": arch });
        entries.push(entry);
    }
    // As a builder leaves it: an index in the index, with what is no image beside it.
    entries.push(json!({
        "mediaType": MANIFEST, "digest": digest(b"attestation"), "size": 1,
        "platform": { "os": "unknown", "architecture": "unknown" },
    }));
    let inner = json!({ "schemaVersion": 2, "manifests": entries }).to_string();
    put(&folder, inner.as_bytes());
    index(&folder, &[descriptor(inner.as_bytes(), INDEX)]);
    let text = |image: &Image| fs::read_to_string(image.layers[0].join("linux")).unwrap();
    assert_eq!(text(&import(&bench, &folder).unwrap()), architecture());
    let of = |arch: &str| {
        let options = options(|options| options.architecture = Some(arch.to_owned()));
        bench.store.import(&folder, &options, &NEVER, &|_| {})
    };
    assert_eq!(text(&of("mips").unwrap()), "mips");
    let error = of("sparc").unwrap_err();
    assert!(matches!(error, Error::Platform { .. }), "{error}");
    assert!(error.to_string().contains("linux/mips"), "{error}");
    // The index itself may have one entry for each.
    index(&folder, &entries);
    assert_eq!(text(&import(&bench, &folder).unwrap()), architecture());
    // A single image that says in its configuration only that it is for another machine.
    let mut alone = entries[0].clone();
    alone.as_object_mut().unwrap().remove("platform");
    index(&folder, &[alone]);
    assert!(matches!(import(&bench, &folder).unwrap_err(), Error::Platform { .. }));
}

#[test]
fn one_of_several_images_has_to_be_named() {
    let bench = Bench::new();
    let folder = bench.path("layout");
    let mut entries = Vec::new();
    for name in ["first", "second"] {
        let layers = [Tar::new().file(name, "").gzip()];
        let config = serde_json::to_vec(&config(&layers)).unwrap();
        let manifest = serde_json::to_vec(&manifest(&config, &layers)).unwrap();
        layout_of(&folder, &layers, &config, &manifest);
        let mut entry = descriptor(&manifest, MANIFEST);
        entry["annotations"] = json!({ "org.opencontainers.image.ref.name": name });
        entries.push(entry);
    }
    index(&folder, &entries);
    let error = import(&bench, &folder).unwrap_err();
    assert!(error.to_string().contains("first, second"), "{error}");
    let options = options(|options| options.image = Some("second".into()));
    let image = bench.store.import(&folder, &options, &NEVER, &|_| {}).unwrap();
    assert_eq!(image.name, "layout:second");
    assert_eq!(names(&image.layers[0]), ["second"]);
}

#[test]
fn documents_that_are_no_image() {
    let bench = Bench::new();
    let folder = bench.path("layout");
    let layers = [Tar::new().file("x", "").gzip()];
    let good_config = serde_json::to_vec(&config(&layers)).unwrap();
    let attempt = |config: &[u8], manifest: &str| {
        let _ = fs::remove_dir_all(&folder);
        layout_of(&folder, &layers, config, manifest.as_bytes());
        let error = import(&bench, &folder).unwrap_err();
        bench.assert_untouched();
        error
    };
    let good = manifest(&good_config, &layers);
    let both = |key: &str, value: serde_json::Value| {
        let mut manifest = good.clone();
        manifest[key] = value;
        manifest.to_string()
    };
    for (manifest, word) in [
        ("{}".to_owned(), "neither"),
        ("[]".to_owned(), "malformed"),
        ("[".repeat(100_000), "malformed"),
        (both("manifests", json!([])), "at once"),
        (both("schemaVersion", json!(1)), "first format"),
        (both("layers", json!([])), "names 1 layers"),
        (both("layers", json!([{ "digest": "sha512:00", "size": 1 }])), "only sha256"),
        (both("layers", json!([{ "digest": "sha256:../../x", "size": 1 }])), "only sha256"),
        (both("layers", json!([{ "digest": digest(b"x"), "size": -1 }])), "malformed"),
        (both("layers", json!([{ "digest": digest(b"x"), "size": 1u64 << 60 }])), "limit"),
        (both("layers", json!(vec![descriptor(b"", ""); 128])), "127 layers"),
        (both("layers", json!([descriptor(b"", "application/x.tar+gzip+encrypted")])), "encrypted"),
        (both("config", json!({ "digest": digest(b"x"), "size": 1u64 << 40 })), "limit"),
    ] {
        let error = attempt(&good_config, &manifest).to_string();
        assert!(error.contains(word), "{word}: {error}");
    }
    let mut nul = config(&layers);
    nul["config"]["Cmd"] = json!(["a\0b"]);
    for (config, word) in [
        (b"{}".to_vec(), "malformed"),
        (serde_json::to_vec(&nul).unwrap(), "NUL"),
        (vec![b' '; 5 << 20], "limit"),
    ] {
        let error = attempt(&config, &manifest(&config, &layers).to_string()).to_string();
        assert!(error.contains(word), "{word}: {error}");
    }
    // From index to index.
    let mut bytes = good.to_string();
    for _ in 0..4 {
        put(&folder, bytes.as_bytes());
        let entry = descriptor(bytes.as_bytes(), INDEX);
        bytes = json!({ "schemaVersion": 2, "manifests": [entry] }).to_string();
    }
    fs::write(folder.join("index.json"), &bytes).unwrap();
    let error = import(&bench, &folder).unwrap_err().to_string();
    assert!(error.contains("index to index"), "{error}");
}

#[test]
fn folders_and_archives_made_to_hurt() {
    let bench = Bench::new();
    let folder = bench.path("layout");
    // Links to what is not in the folder, and what would never end.
    fs::create_dir_all(&folder).unwrap();
    layout(&bench.path("layout-outside"), &two());
    for outside in [bench.path("layout-outside").as_path(), Path::new("../layout-outside")] {
        for name in ["index.json", "blobs"] {
            symlink(outside.join(name), folder.join(name)).unwrap();
        }
        assert!(matches!(import(&bench, &folder).unwrap_err(), Error::Io { .. }));
        fs::remove_file(folder.join("index.json")).unwrap();
        fs::copy(bench.path("layout-outside/index.json"), folder.join("index.json")).unwrap();
        assert!(matches!(import(&bench, &folder).unwrap_err(), Error::Io { .. }));
        for name in ["index.json", "blobs"] {
            fs::remove_file(folder.join(name)).unwrap();
        }
    }
    assert!(matches!(import(&bench, &folder).unwrap_err(), Error::Unsupported { .. }));
    assert!(Command::new("mkfifo").arg(folder.join("index.json")).status().unwrap().success());
    assert!(matches!(import(&bench, &folder).unwrap_err(), Error::Unsupported { .. }));
    import(&bench, &folder.join("index.json")).unwrap_err();
    import(&bench, Path::new("/dev/zero")).unwrap_err();
    import(&bench, &bench.path("missing")).unwrap_err();
    // Members that link in a circle, or out.
    let manifest = br#"[{"Config":"c","Layers":[]}]"#;
    for target in ["c", "./d/../c", "../outside", "/../../outside", "missing"] {
        let tar = Tar::new().file("manifest.json", manifest).link(b'2', "c", target).plain();
        fs::write(bench.path("layout.tar"), &tar.blob).unwrap();
        let error = import(&bench, &bench.path("layout.tar")).unwrap_err();
        assert!(matches!(error, Error::NotFound { .. }), "{target} {error}");
    }
    for bytes in [&b""[..], b"x", &[0; 512], &[0x1f, 0x8b, 0, 0], &[0x28, 0xb5, 0x2f, 0xfd]] {
        fs::write(bench.path("layout.tar"), bytes).unwrap();
        import(&bench, &bench.path("layout.tar")).unwrap_err();
    }
    // A file of another image's digests, cut at every place.
    fs::remove_dir_all(&folder).unwrap();
    layout(&folder, &two());
    tar_of(&folder, &bench.path("layout.tar"), &[]);
    let whole = fs::read(bench.path("layout.tar")).unwrap();
    for length in (0..whole.len()).step_by(701) {
        fs::write(bench.path("layout.tar"), &whole[..length]).unwrap();
        if let Ok(image) = import(&bench, &bench.path("layout.tar")) {
            assert_eq!(image.layers.len(), 2, "only the padding is missing");
            bench.store.remove(&image.name, |_| false).unwrap();
        }
    }
    bench.store.prune(|_| false).unwrap();
    bench.assert_untouched();
}

#[test]
fn removing_keeps_what_others_have_and_what_is_in_use() {
    let bench = Bench::new();
    let [low, high] = two();
    let third = Tar::new().file("c", "").gzip();
    let one = bench.layers("one", &[low.clone(), high]).unwrap();
    let two = bench.layers("two", &[low, third]).unwrap();
    assert_eq!(one.layers[1], two.layers[1], "shared");
    let all = |bench: &Bench| -> Vec<String> {
        bench.store.list().unwrap().into_iter().map(|image| image.name).collect()
    };
    assert_eq!(all(&bench), ["one", "two"]);
    assert!(!bench.store.remove("none", |_| panic!("all have an image")).unwrap().image);

    let used = one.layers[0].clone();
    let removed = bench.store.remove("one", |layer| layer == used).unwrap();
    assert!(removed.image);
    assert_eq!((removed.layers, removed.in_use), (vec![], vec![used.clone()]));
    assert!(used.join("b").exists());
    assert_eq!(bench.store.get("one").unwrap(), None);
    assert_eq!(bench.store.get("two").unwrap(), Some(two.clone()));
    let removed = bench.store.prune(|_| false).unwrap();
    assert_eq!(removed.layers, std::slice::from_ref(&used));
    assert!(!used.exists());
    assert_eq!(names(&two.layers[1]), ["a"]);

    // A new image takes the name, the layers of the old one are nobody's.
    let newer = bench.layers("two", &[Tar::new().file("new", "").gzip()]).unwrap();
    assert_eq!(bench.store.list().unwrap(), [newer]);
    assert_eq!(bench.store.prune(|_| false).unwrap().layers.len(), 2);
    bench.store.remove("two", |_| false).unwrap();
    fs::remove_dir_all(bench.path("layout-one")).unwrap();
    fs::remove_dir_all(bench.path("layout-two")).unwrap();
    bench.assert_untouched();
}

#[test]
fn a_damaged_record_is_told_and_nothing_is_removed_on_its_account() {
    let bench = Bench::new();
    let image = bench.layers("one", &two()).unwrap();
    let images = bench.path("store/images");
    let record = fs::read_dir(&images).unwrap().next().unwrap().unwrap().path();
    fs::write(&record, "{").unwrap();
    for error in [
        bench.store.list().unwrap_err(),
        bench.store.get("one").unwrap_err(),
        bench.store.prune(|_| false).unwrap_err(),
    ] {
        assert!(error.to_string().contains(record.to_str().unwrap()), "{error}");
    }
    assert!(image.layers.iter().all(|layer| layer.exists()));
    // Importing it again mends it.
    assert_eq!(bench.layers("one", &two()).unwrap(), image);
    // A layer that somebody removed by hand is told too, and comes back.
    fs::remove_dir_all(image.layers[0].parent().unwrap()).unwrap();
    assert!(matches!(bench.store.get("one").unwrap_err(), Error::NotFound { .. }));
    assert_eq!(bench.layers("one", &two()).unwrap(), image);
    assert!(image.layers[0].join("b").exists());
}

#[test]
fn progress_is_told() {
    let bench = Bench::new();
    layout(&bench.path("layout"), &two());
    let told = Mutex::new(Vec::new());
    let note = |progress| told.lock().unwrap().push(progress);
    bench.store.import(&bench.path("layout"), &ImportOptions::default(), &NEVER, &note).unwrap();
    let told = told.into_inner().unwrap();
    assert!(told.iter().all(|p| p.layers == 2 && p.bytes <= p.total));
    for layer in 0..2 {
        let of: Vec<_> = told.iter().filter(|p| p.layer == layer).collect();
        assert_eq!(of.first().unwrap().stage, Stage::Unpacking);
        assert_eq!(of.last().unwrap().stage, Stage::Done);
        assert_eq!(of.last().unwrap().bytes, of.last().unwrap().total);
    }
}

#[test]
fn what_a_killed_process_leaves_is_swept() {
    const CHILD: &str = "DENIZEN_TEST_IMPORT";
    if let Some(folder) = std::env::var_os(CHILD) {
        let folder = Path::new(&folder);
        let store = Store::open(&folder.join("store"), Owners::Mine).unwrap();
        let wait = |_| std::thread::sleep(std::time::Duration::from_millis(20));
        let options = ImportOptions::default();
        store.import(&folder.join("layout"), &options, &NEVER, &wait).unwrap();
        return;
    }
    let bench = Bench::new();
    // Random, so that it takes long enough, with a folder nobody may enter.
    let noise: Vec<u8> =
        (0_u64..8 << 20).map(|n| n.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_be_bytes()[1]).collect();
    let big = Tar::new().file("a/b", &noise).add(b'5', "a/c", "", b"", |h| h.set_mode(0));
    layout(&bench.path("layout"), &[Tar::new().file("small", "").gzip(), big.plain()]);
    let work = bench.path("store/work");
    let busy = || fs::read_dir(&work).unwrap().count();
    for moment in 0..6 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "what_a_killed_process_leaves_is_swept"])
            .env(CHILD, bench.dir.path())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        while busy() == 0 {
            assert!(child.try_wait().unwrap().is_none());
            std::thread::yield_now();
        }
        std::thread::sleep(std::time::Duration::from_millis(moment * 60));
        // Another one that opens the store does not take it away from a living one.
        let other = Store::open(&bench.path("store"), Owners::Mine).unwrap();
        assert_eq!(busy(), 1);
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(busy(), 1);
        drop(other);
        let store = Store::open(&bench.path("store"), Owners::Mine).unwrap();
        assert_eq!(busy(), 0);
        assert_eq!(store.list().unwrap(), []);
        for layer in fs::read_dir(bench.path("store/layers")).unwrap() {
            let layer = layer.unwrap().path();
            assert!(layer.join("layer.json").exists(), "whole or absent");
        }
    }
    let image = import(&bench, &bench.path("layout")).unwrap();
    assert_eq!(fs::read(image.layers[0].join("a/b")).unwrap(), noise);
}

#[test]
fn many_at_once() {
    let bench = Bench::new();
    for n in 0..4 {
        let own = Tar::new().file(&format!("own-{n}"), "").gzip();
        layout(&bench.path(&format!("layout-{n}")), &[two()[0].clone(), own, two()[1].clone()]);
    }
    std::thread::scope(|scope| {
        for n in 0..8 {
            let (bench, folder) = (&bench, format!("layout-{}", n % 4));
            scope.spawn(move || {
                for _ in 0..5 {
                    let image = import(bench, &bench.path(&folder)).unwrap();
                    assert_eq!(image.layers.len(), 3);
                    // Meanwhile others take their layers away, of which these share two.
                    if n >= 4 {
                        bench.store.remove(&folder, |_| false).unwrap();
                    }
                }
            });
        }
    });
    for n in 0..4 {
        let image = import(&bench, &bench.path(&format!("layout-{n}"))).unwrap();
        assert!(image.layers.iter().all(|layer| layer.exists()));
        bench.store.remove(&image.name, |_| false).unwrap();
    }
    for n in 0..4 {
        fs::remove_dir_all(bench.path(&format!("layout-{n}"))).unwrap();
    }
    bench.assert_untouched();
}
