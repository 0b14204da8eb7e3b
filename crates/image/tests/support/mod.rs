//! What the tests share: layers made by hand, layouts around them, and a place to work in.
#![allow(clippy::unwrap_used, dead_code)]

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::AtomicBool;

use denizen_image::{Digest, Error, Image, ImportOptions, Owners, Store};
use serde_json::{Value, json};

pub static NEVER: AtomicBool = AtomicBool::new(false);
pub const END: [u8; 1024] = [0; 1024];

/// A folder for a test, and a store in it.
pub struct Bench {
    pub dir: tempfile::TempDir,
    pub store: Store,
}

impl Bench {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("outside"), "untouched").unwrap();
        let store = Store::open(&dir.path().join("store"), Owners::Mine).unwrap();
        Self { dir, store }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Imports an image of these layers, lowest first.
    pub fn layers(&self, name: &str, layers: &[Layer]) -> Result<Image, Error> {
        let folder = self.path(&format!("layout-{name}"));
        layout(&folder, layers);
        self.import(&folder, name)
    }

    pub fn import(&self, path: &Path, name: &str) -> Result<Image, Error> {
        let mut options = ImportOptions::default();
        options.name = Some(name.to_owned());
        self.store.import(path, &options, &NEVER, &|_| {})
    }

    /// The folder of a one-layer image.
    pub fn one(&self, tar: Tar) -> Result<PathBuf, Error> {
        let image = self.layers("one", &[tar.plain()])?;
        Ok(image.layers[0].clone())
    }

    /// Nothing but what was there before, and nothing unfinished.
    pub fn assert_untouched(&self) {
        assert_eq!(fs::read(self.path("outside")).unwrap(), b"untouched");
        for folder in ["work", "layers", "images"] {
            let left: Vec<_> = fs::read_dir(self.path("store").join(folder)).unwrap().collect();
            assert!(left.is_empty(), "{folder}: {left:?}");
        }
        for entry in fs::read_dir(self.dir.path()).unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            assert!(name == "outside" || name == "store" || name.starts_with("layout"), "{name}");
        }
    }
}

/// A tar stream in the making.
#[derive(Clone, Default)]
pub struct Tar(pub Vec<u8>);

impl Tar {
    pub fn new() -> Self {
        Self::default()
    }

    pub fn dir(self, name: &str) -> Self {
        self.add(b'5', name, "", b"", |h| h.set_mode(0o755))
    }

    pub fn file(self, name: &str, content: impl AsRef<[u8]>) -> Self {
        self.add(b'0', name, "", content.as_ref(), |_| {})
    }

    pub fn link(self, kind: u8, name: &str, target: &str) -> Self {
        self.add(kind, name, target, b"", |_| {})
    }

    pub fn add(
        mut self,
        kind: u8,
        name: &str,
        link: &str,
        content: &[u8],
        edit: impl FnOnce(&mut tar::Header),
    ) -> Self {
        if name.len() > 100 {
            self = self.pax("path", name.as_bytes());
        }
        if link.len() > 100 {
            self = self.pax("linkpath", link.as_bytes());
        }
        let mut header = tar::Header::new_ustar();
        // The crate's own setters refuse what a hostile archive is made of.
        let field = |field: &mut [u8], text: &str| {
            let length = text.len().min(field.len());
            field[..length].copy_from_slice(&text.as_bytes()[..length]);
        };
        field(&mut header.as_old_mut().name, name);
        field(&mut header.as_old_mut().linkname, link);
        header.as_old_mut().linkflag = [kind];
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(1_000_000_000);
        header.set_size(content.len() as u64);
        edit(&mut header);
        header.set_cksum();
        self.0.extend(header.as_bytes());
        self.0.extend(content);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        self
    }

    /// A record for the next entry.
    pub fn pax(self, key: &str, value: &[u8]) -> Self {
        self.add(b'x', "pax", "", &record(key, value), |_| {})
    }

    pub fn plain(mut self) -> Layer {
        self.0.extend(END);
        Layer::new(&self.0.clone(), self.0, "application/vnd.oci.image.layer.v1.tar")
    }

    pub fn gzip(mut self) -> Layer {
        self.0.extend(END);
        let blob = gzip(&self.0);
        Layer::new(&self.0, blob, "application/vnd.oci.image.layer.v1.tar+gzip")
    }

    pub fn zstd(mut self) -> Layer {
        self.0.extend(END);
        let blob = zstd::encode_all(&self.0[..], 3).unwrap();
        Layer::new(&self.0, blob, "application/vnd.oci.image.layer.v1.tar+zstd")
    }
}

pub fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

pub fn record(key: &str, value: &[u8]) -> Vec<u8> {
    let rest = key.len() + value.len() + 3;
    let length = (rest + 1..rest + 20).find(|l| rest + l.to_string().len() == *l).unwrap();
    [format!("{length} {key}=").as_bytes(), value, b"\n"].concat()
}

/// A layer as it is in a registry.
#[derive(Clone)]
pub struct Layer {
    pub blob: Vec<u8>,
    pub diff_id: String,
    pub media: &'static str,
}

impl Layer {
    pub fn new(tar: &[u8], blob: Vec<u8>, media: &'static str) -> Self {
        Self { blob, diff_id: digest(tar), media }
    }
}

pub fn digest(bytes: &[u8]) -> String {
    Digest::of(bytes).to_string()
}

pub fn config(layers: &[Layer]) -> Value {
    let diff_ids: Vec<_> = layers.iter().map(|layer| &layer.diff_id).collect();
    json!({
        "architecture": architecture(),
        "os": "linux",
        "config": {
            "Env": ["PATH=/bin", "EMPTY=", "word"],
            "WorkingDir": "/srv",
            "User": "1000:1000",
            "Entrypoint": ["/bin/sh", "-c"],
            "Cmd": ["true"],
        },
        "rootfs": { "type": "layers", "diff_ids": diff_ids },
    })
}

pub fn architecture() -> &'static str {
    if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" }
}

pub fn descriptor(bytes: &[u8], media: &str) -> Value {
    json!({ "mediaType": media, "digest": digest(bytes), "size": bytes.len() })
}

pub fn manifest(config: &[u8], layers: &[Layer]) -> Value {
    let layers: Vec<_> = layers.iter().map(|l| descriptor(&l.blob, l.media)).collect();
    json!({
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": descriptor(config, "application/vnd.oci.image.config.v1+json"),
        "layers": layers,
    })
}

pub const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub const INDEX: &str = "application/vnd.oci.image.index.v1+json";

pub fn put(folder: &Path, bytes: &[u8]) {
    let name = digest(bytes).replace(':', "/");
    let path = folder.join("blobs").join(name);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, bytes).unwrap();
}

/// An OCI image layout with one image.
pub fn layout(folder: &Path, layers: &[Layer]) {
    let config = serde_json::to_vec(&config(layers)).unwrap();
    let manifest = serde_json::to_vec(&manifest(&config, layers)).unwrap();
    layout_of(folder, layers, &config, &manifest);
}

pub fn layout_of(folder: &Path, layers: &[Layer], config: &[u8], manifest: &[u8]) {
    for bytes in layers.iter().map(|layer| &layer.blob[..]).chain([config, manifest]) {
        put(folder, bytes);
    }
    index(folder, &[descriptor(manifest, MANIFEST)]);
}

pub fn index(folder: &Path, entries: &[Value]) {
    let index = json!({ "schemaVersion": 2, "mediaType": INDEX, "manifests": entries });
    fs::write(folder.join("index.json"), index.to_string()).unwrap();
    fs::write(folder.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
}

/// Runs the test again, as root of new user and mount namespaces. True within.
pub fn apart(test: &str) -> bool {
    again(test, "unshare", &["--user", "--map-root-user", "--mount"])
}

/// Runs the test again as a user without any privilege, if this one is root. True within, or
/// if this user has none anyway.
pub fn unprivileged(test: &str) -> bool {
    if !rustix::process::geteuid().is_root() {
        return true;
    }
    again(test, "setpriv", &["--reuid=65534", "--regid=65534", "--clear-groups"])
}

fn again(test: &str, program: &str, options: &[&str]) -> bool {
    if std::env::var_os("DENIZEN_TEST_APART").is_some() {
        return true;
    }
    // The other user may have no way to where this program is.
    let folder = tempfile::tempdir_in("/tmp").unwrap();
    let everybody = std::os::unix::fs::PermissionsExt::from_mode(0o777);
    fs::set_permissions(folder.path(), everybody).unwrap();
    let copy = folder.path().join("test");
    fs::copy(std::env::current_exe().unwrap(), &copy).unwrap();
    let output = Command::new(program)
        .args(options)
        .arg(&copy)
        .args(["--exact", test, "--nocapture"])
        .env("DENIZEN_TEST_APART", "1")
        .env("TMPDIR", folder.path())
        .output()
        .unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "{}{}", text(&output.stdout), text(&output.stderr));
    false
}

/// Mounts an image as it will be mounted for a session, on `merged` in `folder`.
pub fn mount(image: &Image, folder: &Path) -> PathBuf {
    let [merged, upper, work] = ["merged", "upper", "work"].map(|name| folder.join(name));
    for path in [&merged, &upper, &work] {
        fs::create_dir_all(path).unwrap();
    }
    let lower: Vec<_> = image.layers.iter().map(|path| path.to_str().unwrap()).collect();
    let options = format!(
        "userxattr,lowerdir={},upperdir={},workdir={}",
        lower.join(":"),
        upper.display(),
        work.display()
    );
    let done = Command::new("mount")
        .args(["-t", "overlay", "overlay", "-o", &options])
        .arg(&merged)
        .status()
        .unwrap();
    assert!(done.success(), "{options}");
    merged
}

/// All names in a tree, directories with a slash at their end.
pub fn names(root: &Path) -> Vec<String> {
    let mut names = Vec::new();
    let mut folders = vec![root.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let entry = entry.unwrap();
            let path = entry.path();
            let name = path.strip_prefix(root).unwrap().to_str().unwrap().to_owned();
            if entry.file_type().unwrap().is_dir() {
                folders.push(path);
                names.push(format!("{name}/"));
            } else {
                names.push(name);
            }
        }
    }
    names.sort();
    names
}
