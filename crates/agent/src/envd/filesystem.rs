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

use super::{Hold, Instance, Instances, blocking, keepalive, refused};
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
}

/// What is at a path.
pub(super) fn entry(path: &Path) -> std::io::Result<wire::EntryInfo> {
    let metadata = std::fs::symlink_metadata(path)?;
    let link = metadata.is_symlink().then(|| std::fs::read_link(path)).transpose()?;
    // What a link leads to says whether it can be listed or read.
    let target = link.as_ref().and_then(|_| std::fs::metadata(path).ok());
    let modified = metadata.modified()?;
    let kind = match target.as_ref().unwrap_or(&metadata).file_type() {
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
        mode: metadata.permissions().mode() & 0o7777,
        permissions: permissions(&metadata),
        owner: name_of("/etc/passwd", metadata.uid()),
        group: name_of("/etc/group", metadata.gid()),
        modified_time: Timestamp::from(modified).into(),
        symlink_target: link.map(|link| link.to_string_lossy().into_owned()),
        ..Default::default()
    })
}

/// Type and permissions as ls(1) prints them.
fn permissions(metadata: &Metadata) -> String {
    let kind = metadata.file_type();
    let letter = match () {
        () if kind.is_dir() => 'd',
        () if kind.is_symlink() => 'l',
        () if kind.is_fifo() => 'p',
        () if kind.is_socket() => 's',
        () if kind.is_block_device() => 'b',
        () if kind.is_char_device() => 'c',
        () => '-',
    };
    let mode = metadata.permissions().mode();
    let mut text = String::from(letter);
    for (shift, special, set) in [(6, 0o4000, 's'), (3, 0o2000, 's'), (0, 0o1000, 't')] {
        let bits = mode >> shift;
        text.push(if bits & 4 != 0 { 'r' } else { '-' });
        text.push(if bits & 2 != 0 { 'w' } else { '-' });
        text.push(match (mode & special != 0, bits & 1 != 0) {
            (true, true) => set,
            (true, false) => set.to_ascii_uppercase(),
            (false, true) => 'x',
            (false, false) => '-',
        });
    }
    text
}

/// The name of a user or group, by passwd(5) or group(5) as the instance has them.
fn name_of(table: &str, id: u32) -> String {
    let id = id.to_string();
    let text = std::fs::read(table).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
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

fn make_folder(path: &Path) -> Result<wire::EntryInfo, ConnectError> {
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
    std::fs::create_dir_all(path).map_err(|error| refused(path, &error))?;
    look(path)
}

fn move_to(from: &Path, to: &Path) -> Result<wire::EntryInfo, ConnectError> {
    std::fs::symlink_metadata(from).map_err(|error| refused(from, &error))?;
    if let Some(parent) = to.parent() {
        std::fs::create_dir_all(parent).map_err(|error| refused(parent, &error))?;
    }
    std::fs::rename(from, to).map_err(|error| refused(to, &error))?;
    look(to)
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

fn watch(root: &Path, recursive: bool, include_entry: bool) -> Result<Watch, ConnectError> {
    let there = std::fs::metadata(root).map_err(|error| refused(root, &error))?;
    if !there.is_dir() {
        let text = format!("{}: only a folder can be watched", root.display());
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
        let instance = self.instance(&context).await?;
        let path = instance.resolve(&request.to_owned_message().path);
        let entry = blocking(move || look(&path)).await?;
        Response::ok(wire::StatResponse { entry: entry.into(), ..Default::default() })
    }

    async fn make_dir<'a>(
        &'a self,
        context: RequestContext,
        request: ServiceRequest<'_, wire::MakeDirRequest>,
    ) -> ServiceResult<impl Encodable<wire::MakeDirResponse> + Send + use<'a, I>> {
        let instance = self.instance(&context).await?;
        let path = instance.resolve(&request.to_owned_message().path);
        let entry = blocking(move || make_folder(&path)).await?;
        Response::ok(wire::MakeDirResponse { entry: entry.into(), ..Default::default() })
    }

    async fn r#move<'a>(
        &'a self,
        context: RequestContext,
        request: ServiceRequest<'_, wire::MoveRequest>,
    ) -> ServiceResult<impl Encodable<wire::MoveResponse> + Send + use<'a, I>> {
        let instance = self.instance(&context).await?;
        let request = request.to_owned_message();
        let from = instance.resolve(&request.source);
        let to = instance.resolve(&request.destination);
        let entry = blocking(move || move_to(&from, &to)).await?;
        Response::ok(wire::MoveResponse { entry: entry.into(), ..Default::default() })
    }

    async fn list_dir<'a>(
        &'a self,
        context: RequestContext,
        request: ServiceRequest<'_, wire::ListDirRequest>,
    ) -> ServiceResult<impl Encodable<wire::ListDirResponse> + Send + use<'a, I>> {
        let instance = self.instance(&context).await?;
        let request = request.to_owned_message();
        let path = instance.resolve(&request.path);
        let entries = blocking(move || list(&path, request.depth)).await?;
        Response::ok(wire::ListDirResponse { entries, ..Default::default() })
    }

    async fn remove<'a>(
        &'a self,
        context: RequestContext,
        request: ServiceRequest<'_, wire::RemoveRequest>,
    ) -> ServiceResult<impl Encodable<wire::RemoveResponse> + Send + use<'a, I>> {
        let instance = self.instance(&context).await?;
        let path = instance.resolve(&request.to_owned_message().path);
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
        let instance = self.instance(&context).await?;
        let request = request.to_owned_message();
        let path = instance.resolve(&request.path);
        let watch =
            blocking(move || watch(&path, request.recursive, request.include_entry)).await?;
        let item =
            |event: Event| wire::WatchDirResponse { event: Some(event), ..Default::default() };
        let start = item(wire::watch_dir_response::StartEvent::default().into());
        // The instance stays in use as long as somebody watches.
        let over = instance.over.clone().cancelled_owned();
        let instance = Hold::new(instance.lease, instance.over);
        let changes = stream::unfold(Some((watch, instance)), move |state| async move {
            let (watch, instance) = state?;
            match tokio::time::timeout(silence, watch.next()).await {
                Ok(Ok(event)) => Some((Ok(item(event.into())), Some((watch, instance)))),
                Ok(Err(some)) => Some((Err(missed(some)), None)),
                Err(_) => {
                    let alive = wire::watch_dir_response::KeepAlive::default();
                    Some((Ok(item(alive.into())), Some((watch, instance))))
                }
            }
        });
        let changes = changes.take_until(over);
        let items = stream::iter([Ok(start)]).chain(changes);
        Response::ok(Box::pin(items) as ServiceStream<wire::WatchDirResponse>)
    }

    async fn create_watcher<'a>(
        &'a self,
        context: RequestContext,
        request: ServiceRequest<'_, wire::CreateWatcherRequest>,
    ) -> ServiceResult<impl Encodable<wire::CreateWatcherResponse> + Send + use<'a, I>> {
        let instance = self.instance(&context).await?;
        let request = request.to_owned_message();
        let path = instance.resolve(&request.path);
        let watch =
            blocking(move || watch(&path, request.recursive, request.include_entry)).await?;
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
        let queue = instance.watchers.0.lock().watchers.get(&id).map(Watch::queue);
        let queue = queue.ok_or_else(|| unknown(&id))?;
        let mut events = Vec::new();
        while let Some(event) = queue.pop().map_err(missed)? {
            events.push(event);
        }
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
