//! The envd protocol as its clients see it: JSON over HTTP, against the router itself.
#![cfg(feature = "envd")]
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::http::{HeaderMap, Request, StatusCode};
use connectrpc::ConnectError;
use denizen_agent::Agent;
use denizen_agent::envd::{Instance, Instances, Jobs, KeptLogs, router};
use serde_json::{Value, json};
use tower::ServiceExt;

mod common;

struct One(Instance);

impl Instances for One {
    async fn instance(&self, _: &HeaderMap) -> Result<Instance, ConnectError> {
        Ok(self.0.clone())
    }
}

struct Place {
    folder: tempfile::TempDir,
    router: Router,
}

impl Place {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let workdir = folder.path().join("volume");
        std::fs::create_dir(&workdir).unwrap();
        let instance = Instance {
            agent: Agent::new(),
            workdir,
            env: BTreeMap::from([("PATH".to_owned(), "/usr/bin:/bin".to_owned())]),
            jobs: Arc::new(Jobs::new(folder.path().join("logs"), KeptLogs::default())),
            watchers: Arc::default(),
            explain: Arc::new(|_| None),
            started: Arc::new(|_| {}),
            trace: Arc::new(|| (tracing::Span::none(), Vec::new())),
            lease: Arc::new(()),
            over: tokio_util::sync::CancellationToken::new(),
        };
        Self { router: router(Arc::new(One(instance))), folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join("volume").join(name)
    }

    async fn send(&self, request: Request<Body>) -> (StatusCode, Vec<u8>) {
        let response = self.router.clone().oneshot(request).await.unwrap();
        let status = response.status();
        (status, to_bytes(response.into_body(), usize::MAX).await.unwrap().to_vec())
    }

    /// A unary call; the answer, or the code of the error.
    async fn call(&self, method: &str, request: Value) -> Result<Value, String> {
        let request = Request::post(format!("/filesystem.Filesystem/{method}"))
            .header("content-type", "application/json")
            .body(Body::from(request.to_string()))
            .unwrap();
        let (status, body) = self.send(request).await;
        let body: Value = serde_json::from_slice(&body).unwrap();
        if status.is_success() { Ok(body) } else { Err(body["code"].as_str().unwrap().to_owned()) }
    }

    async fn get(&self, uri: &str) -> (StatusCode, Vec<u8>) {
        self.send(Request::get(uri).body(Body::empty()).unwrap()).await
    }

    async fn post(&self, uri: &str, kind: &str, body: impl Into<Body>) -> (StatusCode, Value) {
        let request = Request::post(uri).header("content-type", kind).body(body.into()).unwrap();
        let (status, body) = self.send(request).await;
        (status, serde_json::from_slice(&body).unwrap_or_default())
    }
}

fn watcher(place: &Place, kind: &str) -> Value {
    json!({ "path": place.path(kind).to_str().unwrap(), "recursive": true, "includeEntry": true })
}

#[tokio::test]
async fn entries_are_described_as_ls_would() {
    let place = Place::new();
    std::fs::write(place.path("file"), "12345").unwrap();
    std::fs::set_permissions(place.path("file"), PermissionsExt::from_mode(0o4750)).unwrap();
    std::os::unix::fs::symlink("file", place.path("link")).unwrap();
    std::os::unix::fs::symlink("nowhere", place.path("lost")).unwrap();
    let entry = place.call("Stat", json!({ "path": "file" })).await.unwrap()["entry"].clone();
    assert_eq!(entry["type"], "FILE_TYPE_FILE");
    assert_eq!(entry["size"], "5");
    assert_eq!(entry["mode"], 0o4750);
    assert_eq!(entry["permissions"], "-rwsr-x---");
    assert_eq!(entry["path"], place.path("file").to_str().unwrap());
    assert!(entry["modifiedTime"].as_str().unwrap().ends_with('Z'));
    let link = place.call("Stat", json!({ "path": "link" })).await.unwrap()["entry"].clone();
    assert_eq!((&link["type"], &link["symlinkTarget"]), (&"FILE_TYPE_FILE".into(), &"file".into()));
    let lost = place.call("Stat", json!({ "path": "lost" })).await.unwrap()["entry"].clone();
    assert_eq!(lost["type"], "FILE_TYPE_SYMLINK");
    assert_eq!(place.call("Stat", json!({ "path": "none" })).await.unwrap_err(), "not_found");
}

#[tokio::test]
async fn folders_are_made_listed_moved_and_removed() {
    let place = Place::new();
    place.call("MakeDir", json!({ "path": "a/b/c" })).await.unwrap();
    let again = place.call("MakeDir", json!({ "path": "a/b/c" })).await;
    assert_eq!(again.unwrap_err(), "already_exists");
    std::fs::write(place.path("a/b/file"), "").unwrap();
    std::os::unix::fs::symlink("/", place.path("a/b/root")).unwrap();
    let names = |listing: Value| -> Vec<String> {
        let entries = listing["entries"].as_array().unwrap().clone();
        entries.iter().map(|entry| entry["name"].as_str().unwrap().to_owned()).collect()
    };
    let list = async |depth: u32| {
        names(place.call("ListDir", json!({ "path": "a", "depth": depth })).await.unwrap())
    };
    assert_eq!(list(0).await, ["b"]);
    assert_eq!(list(9).await, ["b", "c", "file", "root"], "not through the symlink");
    let file = place.call("ListDir", json!({ "path": "a/b/file" })).await;
    assert_eq!(file.unwrap_err(), "invalid_argument");
    place.call("Move", json!({ "source": "a/b", "destination": "x/y" })).await.unwrap();
    assert!(place.path("x/y/file").exists() && !place.path("a/b").exists());
    place.call("Remove", json!({ "path": "x" })).await.unwrap();
    place.call("Remove", json!({ "path": "x" })).await.unwrap();
    assert!(!place.path("x").exists() && std::path::Path::new("/").exists());
    let itself = place.call("Remove", json!({ "path": "" })).await;
    assert_eq!(itself.unwrap_err(), "invalid_argument");
}

#[tokio::test]
async fn a_watcher_tells_what_happened_to_whom() {
    let place = Place::new();
    place.call("MakeDir", json!({ "path": "w/in" })).await.unwrap();
    let made = place.call("CreateWatcher", watcher(&place, "w")).await.unwrap();
    let id = made["watcherId"].clone();
    std::fs::write(place.path("w/in/file"), "text").unwrap();
    std::fs::rename(place.path("w/in/file"), place.path("w/in/other")).unwrap();
    std::fs::remove_file(place.path("w/in/other")).unwrap();
    let mut told = Vec::new();
    let last = ("in/other".to_owned(), "EVENT_TYPE_REMOVE".to_owned());
    // The kernel tells in its own time: ask until the last event is there.
    let all = async {
        while !told.contains(&last) {
            let events = place.call("GetWatcherEvents", json!({ "watcherId": id })).await.unwrap();
            for event in events["events"].as_array().into_iter().flatten() {
                let part = |name: &str| event[name].as_str().unwrap().to_owned();
                told.push((part("name"), part("type")));
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(10), all).await.unwrap();
    for (name, kind) in
        [("file", "CREATE"), ("file", "WRITE"), ("file", "RENAME"), ("other", "CREATE")]
    {
        let wanted = (format!("in/{name}"), format!("EVENT_TYPE_{kind}"));
        assert!(told.contains(&wanted), "{wanted:?} is not in {told:?}");
    }
    place.call("RemoveWatcher", json!({ "watcherId": id })).await.unwrap();
    let gone = place.call("GetWatcherEvents", json!({ "watcherId": id })).await;
    assert_eq!(gone.unwrap_err(), "not_found");
    let file = place.call("CreateWatcher", watcher(&place, "none")).await;
    assert_eq!(file.unwrap_err(), "not_found");
}

#[tokio::test]
async fn files_come_and_go_as_bytes() {
    let place = Place::new();
    let bytes: Vec<u8> = (0..3_000_000_u32).map(|i| i.to_le_bytes()[0] ^ 0xa5).collect();
    let (status, made) =
        place.post("/files?path=new/raw&mode=448", "application/octet-stream", bytes.clone()).await;
    assert_eq!((status, &made[0]["name"]), (StatusCode::OK, &"raw".into()));
    assert_eq!(
        std::fs::metadata(place.path("new/raw")).unwrap().permissions().mode() & 0o777,
        0o700
    );
    assert_eq!(place.get("/files?path=new/raw").await, (StatusCode::OK, bytes));
    // Two parts, each under its own name.
    let form = "--x\r\nContent-Disposition: form-data; name=\"file\"; filename=\"one\"\r\n\r\n1\r\n\
        --x\r\nContent-Disposition: form-data; name=\"file\"; filename=\"dir/two\"\r\n\r\n2\r\n--x--\r\n";
    let (status, made) = place.post("/files", "multipart/form-data; boundary=x", form).await;
    assert_eq!((status, made.as_array().unwrap().len()), (StatusCode::OK, 2));
    assert_eq!(std::fs::read(place.path("dir/two")).unwrap(), b"2");
    assert_eq!(place.get("/files?path=none").await.0, StatusCode::NOT_FOUND);
    assert_eq!(place.get("/files?path=dir").await.0, StatusCode::BAD_REQUEST);
    assert_eq!(place.get("/files").await.0, StatusCode::BAD_REQUEST);
    rustix::fs::mknodat(
        rustix::fs::CWD,
        place.path("fifo"),
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RWXU,
        0,
    )
    .unwrap();
    assert_eq!(place.get("/files?path=fifo").await.0, StatusCode::BAD_REQUEST, "never waits");
}

#[tokio::test]
async fn an_upload_that_breaks_off_leaves_the_old_file() {
    let place = Place::new();
    std::fs::write(place.path("file"), "old").unwrap();
    let pieces = futures::stream::iter([Ok("new"), Err(std::io::Error::other("cut off"))]);
    let body = Body::from_stream(pieces);
    let (status, error) = place.post("/files?path=file", "application/octet-stream", body).await;
    assert!(!status.is_success(), "{error}");
    assert_eq!(std::fs::read(place.path("file")).unwrap(), b"old");
    assert_eq!(std::fs::read_dir(place.path("")).unwrap().count(), 1, "nothing is left behind");
}

#[tokio::test]
async fn a_stream_that_leads_out_of_its_folder_is_refused() {
    let place = Place::new();
    let mut header = tar::Header::new_ustar();
    header.as_old_mut().name[..9].copy_from_slice(b"../escape");
    header.set_size(1);
    header.set_mode(0o644);
    header.set_cksum();
    let mut archive = tar::Builder::new(Vec::new());
    archive.append(&header, &b"x"[..]).unwrap();
    let archive = archive.into_inner().unwrap();
    let (status, error) =
        place.post("/files?path=in&format=tar", "application/x-tar", archive.clone()).await;
    assert!(!status.is_success());
    assert!(error["message"].as_str().unwrap().contains("escape"), "{error}");
    assert!(!place.path("escape").exists());
    // One that is cut off is no success either.
    std::fs::write(place.path("file"), [7; 2000]).unwrap();
    let whole = place.get("/files?path=.&format=tar").await.1;
    let cut = whole[..1500].to_vec();
    let (status, _) = place.post("/files?path=in&format=tar", "application/x-tar", cut).await;
    assert!(!status.is_success());
}

#[tokio::test]
async fn the_instance_says_how_it_is() {
    let place = Place::new();
    assert_eq!(place.get("/health").await.0, StatusCode::NO_CONTENT);
    let envs: Value = serde_json::from_slice(&place.get("/envs").await.1).unwrap();
    assert_eq!(envs["PATH"], "/usr/bin:/bin");
    let metrics: Value = serde_json::from_slice(&place.get("/metrics").await.1).unwrap();
    for field in ["cpu_count", "mem_total", "mem_used", "disk_total", "disk_used", "ts"] {
        assert!(metrics[field].as_u64().unwrap() > 0, "{field}: {metrics}");
    }
    let kind = "application/json";
    assert_eq!(place.post("/init", kind, "{}").await.0, StatusCode::NO_CONTENT);
    let vars = r#"{"envVars": {"A": "b"}}"#;
    assert_eq!(place.post("/init", kind, vars).await.0, StatusCode::BAD_REQUEST);
}

#[tokio::test]
async fn only_files_are_as_large_as_they_are() {
    let place = Place::new();
    let much = vec![b' '; 3 << 20];
    let kind = "application/json";
    let (status, _) = place.post("/init", kind, much.clone()).await;
    assert_eq!(status, StatusCode::PAYLOAD_TOO_LARGE);
    let (status, _) = place.post("/init", kind, "{}").await;
    assert_eq!(status, StatusCode::NO_CONTENT);
    let (status, _) = place.post("/files?path=large", "application/octet-stream", much).await;
    assert_eq!(status, StatusCode::OK);
}

#[tokio::test]
async fn a_reader_that_stands_still_does_not_hold_a_command_in_the_background_up() {
    let place = Place::new();
    // More than what is kept for a reader that has no room.
    let line = "head -c 4M /dev/zero; touch done; sleep 100";
    let request = json!({ "process": { "cmd": "sh", "args": ["-c", line] } }).to_string();
    let mut body = vec![0];
    body.extend(u32::try_from(request.len()).unwrap().to_be_bytes());
    body.extend(request.as_bytes());
    let request = Request::post("/process.Process/Start")
        .header("content-type", "application/connect+json")
        .body(Body::from(body))
        .unwrap();
    let unread = place.router.clone().oneshot(request).await.unwrap();
    assert_eq!(unread.status(), StatusCode::OK);
    common::until("it goes on", || place.path("done").exists()).await;
    // Who reads then is told that something is missing.
    let read = to_bytes(unread.into_body(), usize::MAX).await.unwrap();
    assert!(String::from_utf8_lossy(&read).contains("data_loss"));
}
