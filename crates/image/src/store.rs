//! The store: which images there are, their layers on disk, and the way of a layer into it.
//!
//! A layer is published by one rename when it is whole; an image by one rename when all its
//! layers are there. Never removes a layer that an image has, or that the caller says is in
//! use.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Read, Write as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FlockOperation, Mode, OFlags, RenameFlags};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::manifest::{Digest, ImageConfig};
use crate::stream::Bounds;
use crate::unpack::{LEAST_IDS, Report, unpack};
use crate::work::{FOLDER, Work, names, sweep};
use crate::{Error, Owners, Reference, Result};

/// The most bytes of an image's record. A configuration is smaller by the limits on it.
const MOST_RECORD: u64 = 64 << 20;

/// What the names of the files start with that keep a layer while an image is on its way.
const PIN: &str = "pin-";

/// The images in one folder.
#[derive(Clone, Debug)]
pub struct Store {
    root: PathBuf,
    owners: Owners,
}

/// An image whose layers are on disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// What [`Store::get`] finds it by.
    pub name: String,
    /// Of its manifest; of its configuration if it came without a manifest.
    pub digest: Digest,
    /// Folders, top first, ready to be lower directories of an overlay with `userxattr`. If a
    /// layer hides everything below it, those below are not among them.
    pub layers: Vec<PathBuf>,
    /// How to run it.
    pub config: ImageConfig,
}

/// What [`Store::remove`] or [`Store::prune`] removed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Removed {
    /// Whether there was an image of that name.
    pub image: bool,
    /// Layers that are gone, by their folders' former paths as in [`Image::layers`].
    pub layers: Vec<PathBuf>,
    /// Layers that no image has any more but that are in use.
    pub in_use: Vec<PathBuf>,
}

/// An image as it is written down.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Record {
    name: String,
    digest: Digest,
    /// Lowest first.
    layers: Vec<Digest>,
    config: ImageConfig,
}

/// An image that is to come into the store.
pub struct Wanted {
    pub name: String,
    pub digest: Digest,
    pub layers: Vec<Digest>,
    pub config: ImageConfig,
}

impl Store {
    /// Opens the store in the folder `root`, making it if need be, and removes what processes
    /// that died left unfinished.
    ///
    /// # Errors
    /// [`Error::Owners`] if the range cannot be used, or what met the folder.
    pub fn open(root: &Path, owners: Owners) -> Result<Self> {
        if let Owners::Shifted { uid_base, gid_base, count } = owners {
            let refuse = |reason| Err(Error::Owners { reason });
            if !rustix::process::geteuid().is_root() {
                return refuse("only root can give files away; use the caller's own owner");
            }
            if count < LEAST_IDS {
                return refuse("the range has less than 1000 ids, too few for a system's users");
            }
            // The highest number means "leave it" to chown(2).
            let last = |base: u32| base.checked_add(count).is_some();
            if uid_base == 0 || gid_base == 0 || !last(uid_base) || !last(gid_base) {
                return refuse("the range begins with the host's root, or goes past the last id");
            }
        }
        fs::create_dir_all(root).map_err(|e| Error::io("make", root, e))?;
        let root = root.canonicalize().map_err(|e| Error::io("find", root, e))?;
        for name in ["images", "layers", "work"] {
            let path = root.join(name);
            match rustix::fs::mkdirat(CWD, &path, Mode::RWXU) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(e) => return Err(Error::io("make", &path, e)),
            }
        }
        let store = Self { root, owners };
        store.claim()?;
        let swept = sweep(&store.root.join("work"))?;
        if swept > 0 {
            tracing::info!(swept, "removed what was left unfinished among the images");
        }
        Ok(store)
    }

    /// Layers are shared by all images, so all have to be of the same owners.
    fn claim(&self) -> Result<()> {
        let _locked = self.lock()?;
        let path = self.root.join("owners.json");
        match fs::read(&path) {
            Ok(text) => {
                if serde_json::from_slice::<Owners>(&text).ok() == Some(self.owners) {
                    return Ok(());
                }
                Err(Error::Owners { reason: "the store was made for others; use another folder" })
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                let work = self.work()?;
                let mut file = work.file("owners.json")?;
                write_json(&mut file, &self.owners, &path)?;
                file.sync_all().map_err(|e| Error::io("write to disk", &path, e))?;
                rustix::fs::renameat(work.folder(), "owners.json", CWD, &path)
                    .map_err(|e| Error::io("write", &path, e))
            }
            Err(e) => Err(Error::io("read", &path, e)),
        }
    }

    /// All images, by name.
    ///
    /// # Errors
    /// What met the reading of the records. One that cannot be read is not passed over: what
    /// it needs could be removed.
    pub fn list(&self) -> Result<Vec<Image>> {
        let _locked = self.lock()?;
        self.records()?.into_iter().map(|record| self.image(record)).collect()
    }

    /// The image of that name. A short name (`debian:12`) finds the whole one too
    /// (`docker.io/library/debian:12`).
    ///
    /// # Errors
    /// What met the reading of the record.
    pub fn get(&self, name: &str) -> Result<Option<Image>> {
        let _locked = self.lock()?;
        self.find(name)?.map(|record| self.image(record)).transpose()
    }

    /// Removes an image, and every layer that no image has and for which `in_use` (which is
    /// given a folder as in [`Image::layers`]) does not say otherwise. Those go with a later
    /// call of this or of [`Store::prune`].
    ///
    /// # Errors
    /// What met the reading or the removal of records and folders.
    pub fn remove(&self, name: &str, in_use: impl Fn(&Path) -> bool) -> Result<Removed> {
        let locked = self.lock()?;
        let found = self.find(name)?;
        if let Some(record) = &found {
            let path = self.record_path(&record.name);
            fs::remove_file(&path).map_err(|e| Error::io("remove", &path, e))?;
            self.sync("images")?;
        }
        let removed = self.prune_locked(locked, in_use)?;
        Ok(Removed { image: found.is_some(), ..removed })
    }

    /// Removes the layers that no image has and that are not in use: those of an image whose
    /// name went to a newer one, or of a pull that was broken off.
    ///
    /// # Errors
    /// What met the reading or the removal of records and folders.
    pub fn prune(&self, in_use: impl Fn(&Path) -> bool) -> Result<Removed> {
        let locked = self.lock()?;
        self.prune_locked(locked, in_use)
    }

    fn prune_locked(&self, locked: File, in_use: impl Fn(&Path) -> bool) -> Result<Removed> {
        sweep(&self.root.join("work"))?;
        let mut used = self.pinned()?;
        used.extend(self.records()?.into_iter().flat_map(|record| record.layers));
        let mut removed = Removed::default();
        let mut work = None;
        let layers = self.root.join("layers");
        for entry in fs::read_dir(&layers).map_err(|e| Error::io("read", &layers, e))? {
            let entry = entry.map_err(|e| Error::io("read", &layers, e))?;
            let Some(digest) = entry.file_name().to_str().and_then(Digest::from_hex) else {
                continue;
            };
            if used.contains(&digest) {
                continue;
            }
            let tree = self.tree(digest);
            if in_use(&tree) {
                removed.in_use.push(tree);
                continue;
            }
            // Out of sight at once, deleted when nobody has to wait for it.
            let work = match &work {
                Some(work) => work,
                None => work.insert(Work::create(&self.root.join("work"))?),
            };
            rustix::fs::renameat(CWD, entry.path(), work.folder(), digest.hex())
                .map_err(|e| Error::io("remove", &entry.path(), e))?;
            removed.layers.push(tree);
        }
        drop(locked);
        drop(work);
        removed.layers.sort();
        removed.in_use.sort();
        Ok(removed)
    }

    /// What was made of a layer, given its folder as in [`Image::layers`].
    ///
    /// # Errors
    /// What met the reading.
    pub fn report(&self, layer: &Path) -> Result<Report> {
        let path = layer.with_file_name("layer.json");
        let text = fs::read(&path).map_err(|e| Error::io("read", &path, e))?;
        serde_json::from_slice(&text)
            .map_err(|e| Error::malformed(&path.display().to_string(), e.to_string()))
    }

    pub(crate) fn has_layer(&self, layer: Digest) -> bool {
        self.tree(layer).is_dir()
    }

    pub(crate) fn work(&self) -> Result<Work> {
        Work::create(&self.root.join("work"))
    }

    /// Unpacks a layer and publishes it. `expected` is the digest of `blob` as it comes, if it
    /// was not checked before.
    pub(crate) fn add_layer(
        &self,
        blob: impl Read + Send,
        layer: Digest,
        expected: Option<Digest>,
        work: &Work,
        bounds: &Bounds<'_>,
    ) -> Result<()> {
        let what = format!("the layer {layer}");
        let make = |name: &str| -> Result<(OwnedFd, PathBuf)> {
            let path = work.path().join(name);
            rustix::fs::mkdirat(work.folder(), name, Mode::RWXU)
                .and_then(|()| rustix::fs::openat(work.folder(), name, FOLDER, Mode::empty()))
                .map(|folder| (folder, path.clone()))
                .map_err(|e| Error::io("make", &path, e))
        };
        // Two layers of an image may be the same, so the names are no digests.
        let unique = uuid::Uuid::new_v4().simple().to_string();
        let (folder, path) = make(&unique)?;
        let (tree, tree_path) = make(&format!("{unique}/tree"))?;
        let (trash, _) = make(&format!("{unique}-replaced"))?;
        let (report, digests) =
            unpack(blob, &what, tree.as_fd(), &tree_path, trash.as_fd(), self.owners, bounds)?;
        if let Some(expected) = expected {
            expected.check(digests.blob, &what)?;
        }
        layer.check(digests.content, &format!("the tar stream of {what}"))?;
        if report.devices + report.attributes + report.owners > 0 {
            tracing::debug!(%layer, ?report, "not everything of a layer was made");
        }
        let mut file = work.file(&format!("{unique}/layer.json"))?;
        write_json(&mut file, &report, &path.join("layer.json"))?;
        rustix::fs::syncfs(&folder).map_err(|e| Error::io("write to disk", &path, e))?;
        let to = self.layer(layer);
        let unused = RenameFlags::NOREPLACE;
        match rustix::fs::renameat_with(work.folder(), &unique, CWD, &to, unused) {
            Ok(()) => self.sync("layers"),
            // Somebody else was faster; theirs is the same.
            Err(Errno::EXIST | Errno::NOTEMPTY) => Ok(()),
            Err(e) => Err(Error::io("give a layer its name,", &to, e)),
        }
    }

    /// Keeps these layers from being removed as long as `work` is there: an image is on its way
    /// that has them. To be called before looking which of them are there.
    pub(crate) fn pin(&self, layers: &[Digest], work: &Work) -> Result<()> {
        let _locked = self.lock()?;
        for layer in layers.iter().collect::<BTreeSet<_>>() {
            work.file(&format!("{PIN}{}", layer.hex()))?;
        }
        Ok(())
    }

    /// The layers that images on their way have. A writer that died no longer counts once its
    /// folder is swept.
    fn pinned(&self) -> Result<BTreeSet<Digest>> {
        let path = self.root.join("work");
        let folder = rustix::fs::openat(CWD, &path, FOLDER, Mode::empty())
            .map_err(|e| Error::io("open", &path, e))?;
        let mut pinned = BTreeSet::new();
        for name in names(folder.as_fd()).map_err(|e| Error::io("read", &path, e))? {
            let pins = match rustix::fs::openat(&folder, &*name, FOLDER, Mode::empty()) {
                Ok(work) => names(work.as_fd()).map_err(|e| Error::io("read", &path, e))?,
                // Its image has come, or will not.
                Err(Errno::NOENT | Errno::NOTDIR) => continue,
                Err(e) => return Err(Error::io("open", &path, e)),
            };
            let digest =
                |pin: &Vec<u8>| Digest::from_hex(std::str::from_utf8(pin).ok()?.strip_prefix(PIN)?);
            pinned.extend(pins.iter().filter_map(digest));
        }
        Ok(pinned)
    }

    /// Writes the image down. Its layers must have been pinned and added.
    pub(crate) fn add_image(&self, wanted: &Wanted, work: &Work) -> Result<Image> {
        let _locked = self.lock()?;
        if let Some(layer) = wanted.layers.iter().find(|layer| !self.has_layer(**layer)) {
            return Err(Error::NotFound {
                what: format!("the layer {layer} of {:?}", wanted.name),
                hint: "somebody removed it by hand; pull or import the image again",
            });
        }
        let record = Record {
            name: wanted.name.clone(),
            digest: wanted.digest,
            layers: wanted.layers.clone(),
            config: wanted.config.clone(),
        };
        let mut file = work.file("image.json")?;
        write_json(&mut file, &record, work.path())?;
        file.sync_all().map_err(|e| Error::io("write to disk", work.path(), e))?;
        let to = self.record_path(&record.name);
        rustix::fs::renameat(work.folder(), "image.json", CWD, &to)
            .map_err(|e| Error::io("write", &to, e))?;
        self.sync("images")?;
        self.image(record)
    }

    fn image(&self, record: Record) -> Result<Image> {
        let mut layers = Vec::new();
        for layer in record.layers.iter().rev() {
            let tree = self.tree(*layer);
            // Not asked of the folder itself, whose mode may not let us in.
            let report = match self.report(&tree) {
                Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                    return Err(Error::NotFound {
                        what: format!("{} of the image {:?}", tree.display(), record.name),
                        hint: "somebody removed it; pull or import the image again",
                    });
                }
                report => report?,
            };
            // The same layer twice shows nothing more, and overlayfs takes it only once.
            if !layers.contains(&tree) {
                layers.push(tree);
            }
            if report.hides_lower {
                break;
            }
        }
        Ok(Image { name: record.name, digest: record.digest, layers, config: record.config })
    }

    fn records(&self) -> Result<Vec<Record>> {
        let folder = self.root.join("images");
        let mut records = Vec::new();
        for entry in fs::read_dir(&folder).map_err(|e| Error::io("read", &folder, e))? {
            let path = entry.map_err(|e| Error::io("read", &folder, e))?.path();
            if path.extension().is_some_and(|extension| extension == "json") {
                records.extend(read_record(&path)?);
            }
        }
        records.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(records)
    }

    fn find(&self, name: &str) -> Result<Option<Record>> {
        if let Some(found) = read_record(&self.record_path(name))? {
            return Ok(Some(found));
        }
        match name.parse::<Reference>() {
            Ok(whole) => read_record(&self.record_path(&whole.to_string())),
            Err(_) => Ok(None),
        }
    }

    fn record_path(&self, name: &str) -> PathBuf {
        // A name may be longer than a file's.
        let file = format!("{}.json", Digest::of(name.as_bytes()).hex());
        self.root.join("images").join(file)
    }

    fn layer(&self, layer: Digest) -> PathBuf {
        self.root.join("layers").join(layer.hex())
    }

    fn tree(&self, layer: Digest) -> PathBuf {
        self.layer(layer).join("tree")
    }

    /// Keeps others, in this process too, from changing what images and layers there are.
    fn lock(&self) -> Result<File> {
        let path = self.root.join("lock");
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = rustix::fs::openat(CWD, &path, flags, Mode::RUSR | Mode::WUSR)
            .map_err(|e| Error::io("open", &path, e))?;
        let lock = || rustix::fs::flock(&file, FlockOperation::LockExclusive);
        rustix::io::retry_on_intr(lock).map_err(|e| Error::io("lock", &path, e))?;
        Ok(File::from(file))
    }

    fn sync(&self, folder: &str) -> Result<()> {
        let path = self.root.join(folder);
        rustix::fs::openat(CWD, &path, FOLDER, Mode::empty())
            .and_then(|folder| rustix::fs::fsync(&folder))
            .map_err(|e| Error::io("write to disk", &path, e))
    }
}

fn write_json(file: &mut File, value: &impl Serialize, path: &Path) -> Result<()> {
    let text = serde_json::to_vec(value).map_err(io::Error::from);
    text.and_then(|text| file.write_all(&text)).map_err(|e| Error::io("write", path, e))
}

fn read_record(path: &Path) -> Result<Option<Record>> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = match rustix::fs::openat(CWD, path, flags, Mode::empty()) {
        Ok(file) => File::from(file),
        Err(Errno::NOENT) => return Ok(None),
        Err(e) => return Err(Error::io("open", path, e)),
    };
    let mut text = Vec::new();
    let read = file.take(MOST_RECORD).read_to_end(&mut text);
    read.map_err(|e| Error::io("read", path, e))?;
    serde_json::from_slice(&text).map(Some).map_err(|e| Error::Malformed {
        what: format!("the record {} (remove it, and pull or import again)", path.display()),
        detail: e.to_string(),
    })
}
