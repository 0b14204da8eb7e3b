//! Images from files: an OCI image layout, as a folder or a tar of it, and what `docker save`
//! writes.
//!
//! Never makes anything outside the store, and reads nothing outside the folder or file it was
//! given, whatever links that holds.

use std::collections::{BTreeSet, HashMap};
use std::fs::File;
use std::io::{self, BufReader, Read, Seek as _, SeekFrom, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use serde::Deserialize;

use crate::entries::{Entries, Kind};
use crate::error::shown;
use crate::manifest::{self, Descriptor, Digest, MOST_INDEXES, Manifest, Parsed, Platform};
use crate::store::{Image, Store, Wanted};
use crate::stream::{Bounds, Budget, decompressed};
use crate::work::Work;
use crate::{Error, Limits, OnProgress, Progress, Reference, Result, Stage};

/// The most members of an archive of an image. One of 127 layers has less than 400.
const MOST_MEMBERS: u64 = 100_000;
/// The longest name an archive may give its image.
const LONGEST_NAME: usize = 512;
/// How many links in a row are followed between members of an archive.
const MOST_LINKS: usize = 8;

/// How an image is imported.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct ImportOptions {
    /// Which image, if there are several: a name that the archive gives one.
    pub image: Option<String>,
    /// The name the image gets; else the one in the archive, or that of the file.
    pub name: Option<String>,
    /// The architecture, in Go's words (`amd64`); else this machine's.
    pub architecture: Option<String>,
    /// What it may cost.
    pub limits: Limits,
}

impl Store {
    /// Imports an image from `path`: an OCI image layout, as a folder or as a tar of one, or
    /// an archive as `docker save` writes it; either may be compressed. Blocks.
    ///
    /// Setting `cancelled` ends it soon, with [`Error::Cancelled`].
    ///
    /// # Errors
    /// Any [`Error`]; the store then has the image it had before under that name, if any.
    pub fn import(
        &self,
        path: &Path,
        options: &ImportOptions,
        cancelled: &AtomicBool,
        progress: OnProgress<'_>,
    ) -> Result<Image> {
        let budget = Budget::new(&options.limits);
        let bounds = Bounds { limits: &options.limits, budget: &budget, cancelled };
        let work = self.work()?;
        let source = Source::open(path, &work, &bounds)?;
        let found = source.find(options)?;
        let count = found.wanted.layers.len();
        self.pin(&found.wanted.layers, &work)?;
        for (index, layer) in found.wanted.layers.iter().enumerate() {
            let blob = &found.blobs[index];
            let (reader, total) = source.open_member(&blob.name)?;
            let at = |stage, bytes| Progress { layer: index, layers: count, stage, bytes, total };
            if !self.has_layer(*layer) {
                if blob.size.is_some_and(|size| size != total) {
                    let detail = "its size is not the one in the manifest";
                    return Err(Error::damaged(&format!("the layer {layer}"), detail));
                }
                let mut done = 0;
                let told = Told {
                    inner: reader,
                    tell: |got| {
                        done += got;
                        progress(at(Stage::Unpacking, done));
                    },
                };
                self.add_layer(told, *layer, blob.digest, &work, &bounds)?;
            }
            progress(at(Stage::Done, total));
        }
        self.add_image(&found.wanted, &work)
    }
}

/// Tells how much was read.
pub struct Told<R, F> {
    pub inner: R,
    pub tell: F,
}

impl<R: Read, F: FnMut(u64)> Read for Told<R, F> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let got = self.inner.read(buffer)?;
        (self.tell)(got as u64);
        Ok(got)
    }
}

/// An image that was found, and where its layers are.
struct Found {
    wanted: Wanted,
    /// In the order of `wanted.layers`.
    blobs: Vec<Member>,
}

struct Member {
    name: String,
    /// What the manifest says of it; nothing in the archives of `docker save`.
    digest: Option<Digest>,
    size: Option<u64>,
}

/// One image of `docker save`'s `manifest.json`.
#[derive(Deserialize)]
struct Saved {
    #[serde(rename = "Config")]
    config: String,
    #[serde(rename = "RepoTags", default)]
    names: Option<Vec<String>>,
    #[serde(rename = "Layers")]
    layers: Vec<String>,
}

/// Where an image's files are.
struct Source {
    path: PathBuf,
    kind: Container,
}

enum Container {
    Folder(OwnedFd),
    Tar { file: Arc<File>, members: HashMap<Vec<u8>, Place> },
}

/// A member of an archive.
enum Place {
    Content { at: u64, size: u64 },
    Link(Vec<u8>),
}

impl Source {
    fn open(path: &Path, work: &Work, bounds: &Bounds<'_>) -> Result<Self> {
        // Neither a fifo nor a device may keep us waiting.
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(CWD, path, flags, Mode::empty())
            .map_err(|e| Error::io("open", path, e))?;
        let stat = rustix::fs::fstat(&fd).map_err(|e| Error::io("look at", path, e))?;
        let kind = match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => Container::Folder(fd),
            FileType::RegularFile => Container::tar(File::from(fd), path, work, bounds)?,
            _ => {
                return Err(Error::Unsupported {
                    what: path.display().to_string(),
                    detail: "it is neither a folder nor a file",
                });
            }
        };
        Ok(Self { path: path.to_path_buf(), kind })
    }

    fn find(&self, options: &ImportOptions) -> Result<Found> {
        let limits = &options.limits;
        if let Some(index) = self.document("index.json", limits)? {
            return self.find_in_layout(&index, options);
        }
        if let Some(saved) = self.document("manifest.json", limits)? {
            return self.find_saved(&saved, options);
        }
        Err(Error::Unsupported {
            what: self.path.display().to_string(),
            detail: "it has neither an index.json (OCI image layout) nor a manifest.json \
                     (docker save); give one of those",
        })
    }

    fn find_in_layout(&self, index: &[u8], options: &ImportOptions) -> Result<Found> {
        let what = format!("index.json of {}", self.path.display());
        let Parsed::Index(entries) = manifest::parse(index, &what, &options.limits)? else {
            return Err(Error::malformed(&what, "it is no index"));
        };
        let entry = self.choose_named(&entries, options, &what)?;
        let name = entry.reference().map(str::to_owned);
        let wanted = Platform::wanted(options.architecture.as_deref());
        let mut next = entry.clone();
        for _ in 0..MOST_INDEXES {
            let digest = next.digest()?;
            let what = format!("the manifest {digest}");
            let bytes = self.blob(digest, &what, &options.limits)?;
            match manifest::parse(&bytes, &what, &options.limits)? {
                Parsed::Index(entries) => {
                    next = manifest::choose(&entries, &wanted, &what)?.clone();
                }
                Parsed::Manifest(manifest) => {
                    return self.found(digest, &manifest, name.as_deref(), options);
                }
            }
        }
        Err(Error::malformed(&what, "it leads from index to index"))
    }

    fn found(
        &self,
        digest: Digest,
        manifest: &Manifest,
        name: Option<&str>,
        options: &ImportOptions,
    ) -> Result<Found> {
        let wanted = Platform::wanted(options.architecture.as_deref());
        let what = format!("the configuration {}", manifest.config.digest);
        let bytes = self.blob(manifest.config.digest, &what, &options.limits)?;
        let (config, layers) = manifest::config(&bytes, &wanted, manifest.layers.len(), &what)?;
        let blobs = manifest.layers.iter().map(|layer| Member {
            name: member(layer.digest),
            digest: Some(layer.digest),
            size: Some(layer.size),
        });
        Ok(Found {
            wanted: Wanted { name: self.name(name, options), digest, layers, config },
            blobs: blobs.collect(),
        })
    }

    /// The entry of a layout's own index: the one asked for, or the only image there is (which
    /// may be there once for each architecture).
    fn choose_named<'a>(
        &self,
        entries: &'a [Descriptor],
        options: &ImportOptions,
        what: &str,
    ) -> Result<&'a Descriptor> {
        let asked = options.image.as_deref();
        let of_name = |entry: &&Descriptor| asked.is_none() || entry.reference() == asked;
        let fitting: Vec<Descriptor> = entries.iter().filter(of_name).cloned().collect();
        let names: BTreeSet<_> = fitting.iter().map(Descriptor::reference).collect();
        if fitting.is_empty() || names.len() > 1 {
            return Err(self.which(entries.iter().filter_map(Descriptor::reference)));
        }
        let wanted = Platform::wanted(options.architecture.as_deref());
        let chosen = match &fitting[..] {
            [only] => only.digest()?,
            several => manifest::choose(several, &wanted, what)?.digest()?,
        };
        let same = |entry: &&Descriptor| entry.digest().is_ok_and(|digest| digest == chosen);
        entries.iter().filter(of_name).find(same).ok_or_else(|| self.which(std::iter::empty()))
    }

    fn find_saved(&self, saved: &[u8], options: &ImportOptions) -> Result<Found> {
        let what = format!("manifest.json of {}", self.path.display());
        let images: Vec<Saved> =
            serde_json::from_slice(saved).map_err(|e| Error::malformed(&what, e.to_string()))?;
        let names = |image: &Saved| image.names.clone().unwrap_or_default();
        let fitting: Vec<&Saved> = match &options.image {
            Some(name) => images.iter().filter(|image| names(image).contains(name)).collect(),
            None => images.iter().collect(),
        };
        let [image] = fitting[..] else {
            let all: Vec<String> = images.iter().flat_map(names).collect();
            return Err(self.which(all.iter().map(String::as_str)));
        };
        if image.layers.len() > options.limits.layers {
            let limit = u64::try_from(options.limits.layers).unwrap_or(u64::MAX);
            return Err(Error::too_large(&what, limit, "layers"));
        }
        let bytes = self.small(&image.config, &options.limits)?;
        let digest = Digest::of(&bytes);
        let what = format!("the configuration {:?}", shown(image.config.as_bytes()));
        // Its name is its digest, in the older form with an ending.
        let stem = image.config.rsplit('/').next().unwrap_or_default();
        let stem = stem.strip_suffix(".json").unwrap_or(stem);
        if let Some(named) = Digest::from_hex(stem) {
            named.check(digest, &what)?;
        }
        let wanted = Platform::wanted(options.architecture.as_deref());
        let (config, layers) = manifest::config(&bytes, &wanted, image.layers.len(), &what)?;
        let name = options.image.clone().or_else(|| names(image).into_iter().next());
        let blob = |member: &String| Member { name: member.clone(), digest: None, size: None };
        Ok(Found {
            wanted: Wanted { name: self.name(name.as_deref(), options), digest, layers, config },
            blobs: image.layers.iter().map(blob).collect(),
        })
    }

    /// What the image is called in the store.
    fn name(&self, own: Option<&str>, options: &ImportOptions) -> String {
        if let Some(name) = &options.name {
            return name.clone();
        }
        let stem = || {
            let stem = self.path.file_stem().unwrap_or_default().to_string_lossy();
            let stem = stem.strip_suffix(".tar").unwrap_or(&stem).to_owned();
            if stem.is_empty() { "image".to_owned() } else { stem }
        };
        // A name of somebody else's may be on its way to a terminal.
        let own = own.filter(|own| own.len() <= LONGEST_NAME && !own.contains(char::is_control));
        match own {
            None => stem(),
            // Many layouts give the tag only.
            Some(tag) if !tag.contains(['/', ':']) => format!("{}:{tag}", stem()),
            Some(name) => match name.parse::<Reference>() {
                Ok(reference) => reference.to_string(),
                Err(_) => name.to_owned(),
            },
        }
    }

    fn which<'a>(&self, names: impl Iterator<Item = &'a str>) -> Error {
        let names: Vec<String> = names.take(20).map(|name| shown(name.as_bytes())).collect();
        Error::NotFound {
            what: format!("one image to take from {} ({})", self.path.display(), names.join(", ")),
            hint: "name one of those in it",
        }
    }

    /// A document that is named by its digest.
    fn blob(&self, digest: Digest, what: &str, limits: &Limits) -> Result<Vec<u8>> {
        let bytes = self.small(&member(digest), limits)?;
        digest.check(Digest::of(&bytes), what)?;
        Ok(bytes)
    }

    fn document(&self, name: &str, limits: &Limits) -> Result<Option<Vec<u8>>> {
        match self.small(name, limits) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(Error::NotFound { .. }) => Ok(None),
            Err(e) => Err(e),
        }
    }

    fn small(&self, name: &str, limits: &Limits) -> Result<Vec<u8>> {
        let what = || format!("{:?} of {}", shown(name.as_bytes()), self.path.display());
        let (reader, size) = self.open_member(name)?;
        if size > limits.manifest_bytes {
            return Err(Error::too_large(&what(), limits.manifest_bytes, "bytes"));
        }
        let mut bytes = Vec::new();
        let read = reader.take(limits.manifest_bytes).read_to_end(&mut bytes);
        read.map_err(|e| Error::io("read", &self.path, e))?;
        Ok(bytes)
    }

    fn open_member(&self, name: &str) -> Result<(Section, u64)> {
        let missing = || Error::NotFound {
            what: format!("{:?} in {}", shown(name.as_bytes()), self.path.display()),
            hint: "the image is not complete; make the folder or archive again",
        };
        match &self.kind {
            Container::Folder(folder) => {
                let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
                let inside = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
                let opened = rustix::fs::openat2(folder, name, flags, Mode::empty(), inside);
                let file = match opened {
                    Ok(file) => File::from(file),
                    Err(Errno::NOENT) => return Err(missing()),
                    Err(e) => return Err(Error::io("open", &self.path.join(name), e)),
                };
                let meta = file.metadata().map_err(|e| Error::io("look at", &self.path, e))?;
                if !meta.is_file() {
                    return Err(missing());
                }
                let end = meta.len();
                Ok((Section { file: Arc::new(file), at: 0, end }, end))
            }
            Container::Tar { file, members } => {
                let mut name = plain(name.as_bytes()).ok_or_else(missing)?;
                for _ in 0..MOST_LINKS {
                    match members.get(&name).ok_or_else(missing)? {
                        Place::Content { at, size } => {
                            let end = at.checked_add(*size).ok_or_else(missing)?;
                            return Ok((Section { file: Arc::clone(file), at: *at, end }, *size));
                        }
                        Place::Link(target) => name.clone_from(target),
                    }
                }
                Err(missing())
            }
        }
    }
}

fn member(digest: Digest) -> String {
    format!("blobs/sha256/{}", digest.hex())
}

impl Container {
    /// Notes where the members are.
    fn tar(mut file: File, path: &Path, work: &Work, bounds: &Bounds<'_>) -> Result<Self> {
        let failed = |e| Error::io("read", path, e);
        let what = path.display().to_string();
        let mut head = [0; 4];
        let plain_tar = match file.read_at(&mut head, 0).map_err(failed)? {
            4 => head[..2] != [0x1f, 0x8b] && head != [0x28, 0xb5, 0x2f, 0xfd],
            _ => true,
        };
        if !plain_tar {
            // Its members are needed in any order.
            let mut unpacked = work.file("archive.tar")?;
            // What is within is unpacked once more, and counted then.
            let budget = Budget::new(bounds.limits);
            let bounds = Bounds { budget: &budget, ..*bounds };
            let copied = decompressed(file, &what, &bounds, |content| {
                loop {
                    use std::io::BufRead as _;
                    let ready = content.fill_buf().map_err(|e| Error::reading(&what, e))?;
                    if ready.is_empty() {
                        return Ok(());
                    }
                    let length = ready.len();
                    unpacked.write_all(ready).map_err(|e| Error::io("write", work.path(), e))?;
                    content.consume(length);
                }
            });
            copied?;
            unpacked.seek(SeekFrom::Start(0)).map_err(failed)?;
            file = unpacked;
        }
        let file = Arc::new(file);
        let end = file.metadata().map_err(failed)?.len();
        let reader =
            BufReader::with_capacity(256 << 10, Section { file: Arc::clone(&file), at: 0, end });
        let mut entries = Entries::new(reader, &what, MOST_MEMBERS);
        let mut members = HashMap::new();
        while let Some(entry) = entries.next_entry()? {
            let Some(name) = plain(&entry.path) else { continue };
            let place = match entry.kind {
                Kind::File => Place::Content { at: entries.position(), size: entry.size },
                // Older `docker save` writes equal layers once.
                Kind::HardLink => match plain(&entry.link) {
                    Some(target) => Place::Link(target),
                    None => continue,
                },
                Kind::Symlink => {
                    let parent = name.iter().rposition(|&b| b == b'/').map_or(0, |at| at + 1);
                    match plain(&[&name[..parent], &entry.link].concat()) {
                        Some(target) => Place::Link(target),
                        None => continue,
                    }
                }
                _ => continue,
            };
            members.insert(name, place);
        }
        Ok(Self::Tar { file, members })
    }
}

/// A member's name without what means nothing in it; `None` if it leads out of the archive.
fn plain(name: &[u8]) -> Option<Vec<u8>> {
    let mut steps = Vec::new();
    for step in name.split(|&b| b == b'/') {
        match step {
            b"" | b"." => {}
            b".." => {
                steps.pop()?;
            }
            step => steps.push(step),
        }
    }
    Some(steps.join(&b'/'))
}

/// A stretch of a file, read without moving anybody else's place in it.
struct Section {
    file: Arc<File>,
    at: u64,
    end: u64,
}

impl Read for Section {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = usize::try_from(self.end.saturating_sub(self.at)).unwrap_or(usize::MAX);
        let length = buffer.len().min(left);
        let got = self.file.read_at(&mut buffer[..length], self.at)?;
        self.at += got as u64;
        Ok(got)
    }
}
