//! `filesystem.Filesystem`: looks at files, moves and removes them, and tells of changes.
//! Never follows a symlink when it removes, and never recurses through one.

use std::collections::HashMap;
use std::fs::Metadata;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;

use buffa_types::google::protobuf::Timestamp;
use connectrpc::{
    ConnectError, Encodable, RequestContext, Response, ServiceRequest, ServiceResult, ServiceStream,
};
use denizen_api::ChangeKind;
use denizen_envd::filesystem as wire;
use denizen_envd::filesystem::__buffa::oneof;
use futures::{StreamExt, stream};
use parking_lot::Mutex;

use super::user::{Place, table};
use super::{Hold, Instance, Instances, blocking, keepalive, metadata, refused, stopped, until};
use crate::watch::{self, Missed};

/// Most watchers that an instance's clients have without a stream.
const MOST_WATCHERS: usize = 64;
/// Most entries of one listing: an answer has to fit into a message.
const MOST_ENTRIES: usize = 20_000;

/// The watchers of one instance that are asked rather than followed.
#[derive(Debug, Default)]
pub struct Watchers(Mutex<Named>);

#[derive(Debug, Default)]
struct Named {
    last: u64,
    watchers: HashMap<String, Watch>,
}

impl Watchers {
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.lock().watchers.is_empty()
    }

    /// Forgets all of them.
    pub fn clear(&self) {
        self.0.lock().watchers.clear();
    }

    fn add(&self, watch: Watch) -> Result<String, ConnectError> {
        let mut named = self.0.lock();
        if named.watchers.len() >= MOST_WATCHERS {
            return Err(ConnectError::resource_exhausted(format!(
                "the session has {MOST_WATCHERS} watchers: remove one first"
            )));
        }
        named.last += 1;
        let id = format!("w{}", named.last);
        named.watchers.insert(id.clone(), watch);
        Ok(id)
    }
}

/// The service.
#[derive(Debug)]
pub struct FilesystemService<I>(I);

impl<I: Instances> FilesystemService<I> {
    /// A service over these instances.
    pub fn new(instances: I) -> Arc<Self> {
        Arc::new(Self(instances))
    }

    async fn instance(&self, context: &RequestContext) -> Result<Instance, ConnectError> {
        self.0.instance(context.headers()).await
    }

    /// The instance, and where the paths of this request begin.
    async fn place(&self, context: &RequestContext) -> Result<(Instance, Place), ConnectError> {
        let instance = self.instance(context).await?;
        let user = instance.user(context.headers());
        let place = Place::of(&instance, user).await?;
        Ok((instance, place))
    }
}

/// What is at a path.
pub(super) fn entry(path: &Path) -> std::io::Result<wire::EntryInfo> {
    let metadata = std::fs::symlink_metadata(path)?;
    let link = metadata.is_symlink().then(|| std::fs::read_link(path)).transpose()?;
    let link = link.map(|link| std::fs::canonicalize(path).unwrap_or(link));
    // What a link leads to says whether it can be listed or read.
    let target = link.as_ref().and_then(|_| std::fs::metadata(path).ok());
    let modified = metadata.modified()?;
    let told = target.as_ref().unwrap_or(&metadata);
    let kind = match told.file_type() {
        kind if kind.is_dir() => wire::FileType::FILE_TYPE_DIRECTORY,
        kind if kind.is_symlink() => wire::FileType::FILE_TYPE_SYMLINK,
        kind if kind.is_file() => wire::FileType::FILE_TYPE_FILE,
        _ => wire::FileType::FILE_TYPE_UNSPECIFIED,
    };
    Ok(wire::EntryInfo {
        name: path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
        r#type: kind.into(),
        path: path.to_string_lossy().into_owned(),
        size: i64::try_from(metadata.len()).unwrap_or(i64::MAX),
        mode: told.permissions().mode() & 0o7777,
        permissions: permissions(&metadata),
        owner: name_of("/etc/passwd", metadata.uid()),
        group: name_of("/etc/group", metadata.gid()),
        modified_time: Timestamp::from(modified).into(),
        is_symlink: link.is_some(),
        symlink_target: link.map(|link| link.to_string_lossy().into_owned()),
        metadata: metadata::read(path).into_iter().collect(),
        ..Default::default()
    })
}

/// Type and permissions as envd writes them: a letter for each thing that it is, then nine bits.
fn permissions(metadata: &Metadata) -> String {
    let kind = metadata.file_type();
    let mode = metadata.permissions().mode();
    let is = [
        ('d', kind.is_dir()),
        ('L', kind.is_symlink()),
        ('D', kind.is_block_device() || kind.is_char_device()),
        ('p', kind.is_fifo()),
        ('S', kind.is_socket()),
        ('u', mode & 0o4000 != 0),
        ('g', mode & 0o2000 != 0),
        ('c', kind.is_char_device()),
        ('t', mode & 0o1000 != 0),
    ];
    let mut text: String = is.into_iter().filter_map(|(letter, is)| is.then_some(letter)).collect();
    if text.is_empty() {
        text.push('-');
    }
    let bits = "rwxrwxrwx".chars().enumerate();
    text.extend(bits.map(|(at, letter)| if mode & (0o400 >> at) != 0 { letter } else { '-' }));
    text
}

/// The name of a user or group, by passwd(5) or group(5) as the instance has them.
fn name_of(path: &str, id: u32) -> String {
    let id = id.to_string();
    let text = table(path);
    let name = text.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)? == id).then(|| name.to_owned())
    });
    name.unwrap_or(id)
}

fn look(path: &Path) -> Result<wire::EntryInfo, ConnectError> {
    entry(path).map_err(|error| refused(path, &error))
}

fn make_folder(place: &Place, path: &Path) -> Result<wire::EntryInfo, ConnectError> {
    match std::fs::metadata(path) {
        Ok(there) if there.is_dir() => {
            let text = format!("{}: the folder is there already", path.display());
            return Err(ConnectError::already_exists(text));
        }
        Ok(_) => {
            let text = format!("{}: there is a file of that name", path.display());
            return Err(ConnectError::invalid_argument(text));
        }
        Err(_) => {}
    }
    place.make_folders(path).map_err(|(path, error)| refused(&path, &error))?;
    look(path)
}

fn move_to(place: &Place, from: &Path, to: &Path) -> Result<wire::EntryInfo, ConnectError> {
    std::fs::symlink_metadata(from).map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => {
            ConnectError::not_found(format!("source file not found: {}", from.display()))
        }
        _ => refused(from, &error),
    })?;
    if let Some(parent) = to.parent() {
        place.make_folders(parent).map_err(|(path, error)| refused(&path, &error))?;
    }
    match std::fs::rename(from, to) {
        Err(error) if error.kind() == std::io::ErrorKind::CrossesDevices => carry(from, to),
        moved => moved,
    }
    .map_err(|error| refused(to, &error))?;
    look(to)
}

/// Moves what is on another file system than where it goes: a copy is there whole before what it
/// was made of goes.
fn carry(from: &Path, to: &Path) -> std::io::Result<()> {
    let beside = to.parent().unwrap_or(Path::new("/"));
    let beside =
        tempfile::Builder::new().prefix(".denizen-").suffix(".partial").tempdir_in(beside)?;
    let made = beside.path().join("copy");
    copy(from, &made)?;
    std::fs::rename(&made, to)?;
    if std::fs::symlink_metadata(from)?.is_dir() {
        std::fs::remove_dir_all(from)
    } else {
        std::fs::remove_file(from)
    }
}

/// Copies files, folders and links with their owners, permissions and times.
fn copy(from: &Path, to: &Path) -> std::io::Result<()> {
    let there = std::fs::symlink_metadata(from)?;
    let kind = there.file_type();
    let owner = (Some(there.uid()), Some(there.gid()));
    if kind.is_symlink() {
        std::os::unix::fs::symlink(std::fs::read_link(from)?, to)?;
        return std::os::unix::fs::lchown(to, owner.0, owner.1);
    }
    if kind.is_dir() {
        std::fs::create_dir(to)?;
        for entry in std::fs::read_dir(from)? {
            let entry = entry?;
            copy(&entry.path(), &to.join(entry.file_name()))?;
        }
    } else if kind.is_file() {
        std::fs::copy(from, to)?;
    } else {
        let what = "only files, folders and links move to another file system";
        return Err(std::io::Error::new(std::io::ErrorKind::InvalidInput, what));
    }
    // The owner first: that takes set-id bits away.
    std::os::unix::fs::lchown(to, owner.0, owner.1)?;
    std::fs::set_permissions(to, there.permissions())?;
    let times =
        std::fs::FileTimes::new().set_accessed(there.accessed()?).set_modified(there.modified()?);
    std::fs::File::open(to)?.set_times(times)
}

fn remove(path: &Path) -> Result<(), ConnectError> {
    let done = match std::fs::symlink_metadata(path) {
        Ok(there) if there.is_dir() => std::fs::remove_dir_all(path),
        Ok(_) => std::fs::remove_file(path),
        Err(error) => Err(error),
    };
    match done {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        done => done.map_err(|error| refused(path, &error)),
    }
}

/// Entries in the order of their paths, folders before what is in them.
fn list(root: &Path, depth: u32) -> Result<Vec<wire::EntryInfo>, ConnectError> {
    let mut entries = Vec::new();
    let mut folders = vec![(root.to_owned(), depth.max(1))];
    while let Some((folder, depth)) = folders.pop() {
        let inside = std::fs::read_dir(&folder).map_err(|error| refused(&folder, &error))?;
        for item in inside {
            let item = item.map_err(|error| refused(&folder, &error))?;
            let path = item.path();
            if depth > 1 && item.file_type().is_ok_and(|kind| kind.is_dir()) {
                folders.push((path.clone(), depth - 1));
            }
            match entry(&path) {
                Ok(entry) => entries.push(entry),
                // Removed meanwhile.
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                Err(error) => return Err(refused(&path, &error)),
            }
            if entries.len() > MOST_ENTRIES {
                return Err(ConnectError::resource_exhausted(format!(
                    "{} has more than {MOST_ENTRIES} entries: list its folders one by one",
                    root.display()
                )));
            }
        }
    }
    entries.sort_by(|a, b| Path::new(&a.path).cmp(Path::new(&b.path)));
    Ok(entries)
}

type Watch = watch::Watch<wire::FilesystemEvent>;

/// What is asked of a watch.
struct Wanted {
    recursive: bool,
    include_entry: bool,
    allow_network_mounts: bool,
}

/// Whether others may change what is there, too, without this kernel's knowing: NFS, FUSE, and the
/// three that SMB had (statfs(2)).
fn is_of_a_network(path: &Path) -> std::io::Result<bool> {
    let kind = rustix::fs::statfs(path)?.f_type;
    let kind = u64::try_from(kind).unwrap_or(0) & u64::from(u32::MAX);
    Ok([0x6969, 0x6573_5546, 0x517b, 0xff53_4d42, 0xfe53_4d42].contains(&kind))
}

fn watch(root: &Path, wanted: &Wanted) -> Result<Watch, ConnectError> {
    let Wanted { recursive, include_entry, allow_network_mounts } = *wanted;
    let there = std::fs::metadata(root).map_err(|error| refused(root, &error))?;
    if !there.is_dir() {
        let text = format!("{}: only a folder can be watched", root.display());
        return Err(ConnectError::invalid_argument(text));
    }
    if !allow_network_mounts && is_of_a_network(root).map_err(|error| refused(root, &error))? {
        let text = format!("cannot watch path on network filesystem: {}", root.display());
        return Err(ConnectError::invalid_argument(text));
    }
    let base = root.to_owned();
    let event = move |kind, path: &Path| {
        let kind = match kind {
            ChangeKind::Created => wire::EventType::EVENT_TYPE_CREATE,
            ChangeKind::Renamed => wire::EventType::EVENT_TYPE_RENAME,
            ChangeKind::Attributes => wire::EventType::EVENT_TYPE_CHMOD,
            ChangeKind::Removed => wire::EventType::EVENT_TYPE_REMOVE,
            _ => wire::EventType::EVENT_TYPE_WRITE,
        };
        let name = path.strip_prefix(&base).unwrap_or(path);
        wire::FilesystemEvent {
            name: name.to_string_lossy().into_owned(),
            r#type: kind.into(),
            entry: include_entry.then(|| entry(path).ok()).flatten().into(),
            ..Default::default()
        }
    };
    let watch = Watch::new(root, recursive, event);
    watch.map_err(|error| ConnectError::resource_exhausted(error.to_string()))
}

fn missed(_: Missed) -> ConnectError {
    ConnectError::data_loss("too many changes at once: some were missed")
}

impl<I: Instances> wire::Filesystem for FilesystemService<I> {
    async fn stat<'a>(
        &'a self,
        context: RequestContext,
        request: ServiceRequest<'_, wire::StatRequest>,
    ) -> ServiceResult<impl Encodable<wire::StatResponse> + Send + use<'a, I>> {
        let (_lease, place) = self.place(&context).await?;
        let path = place.resolve(&request.to_owned_message().path)?;
        let entry = blocking(move || look(&path)).await?;
        Response::ok(wire::StatResponse { entry: entry.into(), ..Default::default() })
    }

    async fn make_dir<'a>(
        &'a self,
        context: RequestContext,
        request: ServiceRequest<'_, wire::MakeDirRequest>,
    ) -> ServiceResult<impl Encodable<wire::MakeDirResponse> + Send + use<'a, I>> {
        let (_lease, place) = self.place(&context).await?;
        let path = place.resolve(&request.to_owned_message().path)?;
        let entry = blocking(move || make_folder(&place, &path)).await?;
        Response::ok(wire::MakeDirResponse { entry: entry.into(), ..Default::default() })
    }

    async fn r#move<'a>(
        &'a self,
        context: RequestContext,
        request: ServiceRequest<'_, wire::MoveRequest>,
    ) -> ServiceResult<impl Encodable<wire::MoveResponse> + Send + use<'a, I>> {
        let (_lease, place) = self.place(&context).await?;
        let request = request.to_owned_message();
        let from = place.resolve(&request.source)?;
        let to = place.resolve(&request.destination)?;
        let entry = blocking(move || move_to(&place, &from, &to)).await?;
        Response::ok(wire::MoveResponse { entry: entry.into(), ..Default::default() })
    }

    async fn list_dir<'a>(
        &'a self,
        context: RequestContext,
        request: ServiceRequest<'_, wire::ListDirRequest>,
    ) -> ServiceResult<impl Encodable<wire::ListDirResponse> + Send + use<'a, I>> {
        let (_lease, place) = self.place(&context).await?;
        let request = request.to_owned_message();
        let path = place.resolve(&request.path)?;
        let entries = blocking(move || list(&path, request.depth)).await?;
        Response::ok(wire::ListDirResponse { entries, ..Default::default() })
    }

    async fn remove<'a>(
        &'a self,
        context: RequestContext,
        request: ServiceRequest<'_, wire::RemoveRequest>,
    ) -> ServiceResult<impl Encodable<wire::RemoveResponse> + Send + use<'a, I>> {
        let (instance, place) = self.place(&context).await?;
        let path = place.resolve(&request.to_owned_message().path)?;
        if path == instance.workdir {
            let text = "that is the session's volume itself: remove what is in it";
            return Err(ConnectError::invalid_argument(text));
        }
        blocking(move || remove(&path)).await?;
        Response::ok(wire::RemoveResponse::default())
    }

    async fn watch_dir(
        &self,
        context: RequestContext,
        request: ServiceRequest<'_, wire::WatchDirRequest>,
    ) -> ServiceResult<ServiceStream<impl Encodable<wire::WatchDirResponse> + Send + use<I>>> {
        use oneof::watch_dir_response::Event;
        let silence = keepalive(context.headers());
        let (instance, place) = self.place(&context).await?;
        let request = request.to_owned_message();
        let path = place.resolve(&request.path)?;
        let wanted = Wanted {
            recursive: request.recursive,
            include_entry: request.include_entry,
            allow_network_mounts: request.allow_network_mounts,
        };
        let watch = blocking(move || watch(&path, &wanted)).await?;
        let item =
            |event: Event| wire::WatchDirResponse { event: Some(event), ..Default::default() };
        let start = item(wire::watch_dir_response::StartEvent::default().into());
        // The instance stays in use as long as somebody watches.
        let deadline = context.deadline().map(tokio::time::Instant::from_std);
        let over = instance.over.clone();
        let instance = Hold::new(instance.lease, instance.over);
        let begin = Some((watch, instance, over));
        let changes = stream::unfold(begin, move |state| async move {
            let (watch, instance, over) = state?;
            let told = tokio::select! {
                biased;
                () = over.cancelled() => Err(stopped()),
                () = until(deadline) => {
                    Err(ConnectError::deadline_exceeded("the time to watch is over"))
                }
                told = tokio::time::timeout(silence, watch.next()) => match told {
                    Ok(told) => told.map(|event| item(event.into())).map_err(missed),
                    Err(_) => Ok(item(wire::watch_dir_response::KeepAlive::default().into())),
                },
            };
            let rest = told.is_ok().then_some((watch, instance, over));
            Some((told, rest))
        });
        let items = stream::iter([Ok(start)]).chain(changes);
        Response::ok(Box::pin(items) as ServiceStream<wire::WatchDirResponse>)
    }

    async fn create_watcher<'a>(
        &'a self,
        context: RequestContext,
        request: ServiceRequest<'_, wire::CreateWatcherRequest>,
    ) -> ServiceResult<impl Encodable<wire::CreateWatcherResponse> + Send + use<'a, I>> {
        let (instance, place) = self.place(&context).await?;
        let request = request.to_owned_message();
        let path = place.resolve(&request.path)?;
        let wanted = Wanted {
            recursive: request.recursive,
            include_entry: request.include_entry,
            allow_network_mounts: request.allow_network_mounts,
        };
        let watch = blocking(move || watch(&path, &wanted)).await?;
        let watcher_id = instance.watchers.add(watch)?;
        Response::ok(wire::CreateWatcherResponse { watcher_id, ..Default::default() })
    }

    async fn get_watcher_events<'a>(
        &'a self,
        context: RequestContext,
        request: ServiceRequest<'_, wire::GetWatcherEventsRequest>,
    ) -> ServiceResult<impl Encodable<wire::GetWatcherEventsResponse> + Send + use<'a, I>> {
        let instance = self.instance(&context).await?;
        let id = request.to_owned_message().watcher_id;
        let news = instance.watchers.0.lock().watchers.get(&id).map(Watch::news);
        let news = news.ok_or_else(|| unknown(&id))?;
        let events = blocking(move || news.take().map_err(missed)).await?;
        Response::ok(wire::GetWatcherEventsResponse { events, ..Default::default() })
    }

    async fn remove_watcher<'a>(
        &'a self,
        context: RequestContext,
        request: ServiceRequest<'_, wire::RemoveWatcherRequest>,
    ) -> ServiceResult<impl Encodable<wire::RemoveWatcherResponse> + Send + use<'a, I>> {
        let instance = self.instance(&context).await?;
        let id = request.to_owned_message().watcher_id;
        let removed = instance.watchers.0.lock().watchers.remove(&id);
        removed.ok_or_else(|| unknown(&id))?;
        Response::ok(wire::RemoveWatcherResponse::default())
    }
}

fn unknown(watcher: &str) -> ConnectError {
    ConnectError::not_found(format!("the session has no watcher {watcher}"))
}
