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
use futures::StreamExt;
use serde_json::{Value, json};
use tower::ServiceExt;

mod common;

type Whom = Arc<std::sync::Mutex<Option<String>>>;

struct One(Instance, Whom);

impl Instances for One {
    async fn instance(&self, _: &HeaderMap) -> Result<Instance, ConnectError> {
        let default_user = self.1.lock().unwrap().clone();
        Ok(Instance { default_user, ..self.0.clone() })
    }
}

struct Place {
    folder: tempfile::TempDir,
    router: Router,
    agent: Agent,
    default_user: Whom,
    over: tokio_util::sync::CancellationToken,
}

/// A message of a stream.
fn message(flags: u8, content: &[u8]) -> Vec<u8> {
    let mut message = vec![flags];
    message.extend(u32::try_from(content.len()).unwrap().to_be_bytes());
    message.extend(content);
    message
}

fn packed(content: &[u8]) -> Vec<u8> {
    use std::io::Write;
    let mut packer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    packer.write_all(content).unwrap();
    packer.finish().unwrap()
}

/// What the events of a command say that it has printed.
fn printed(events: &[Value]) -> String {
    let bytes = events.iter().filter_map(|it| it["event"]["data"]["stdout"].as_str());
    bytes.map(common::base64).collect()
}

impl Place {
    fn new() -> Self {
        Self::of(None)
    }

    /// Whose requests are for this user by default.
    fn of(default_user: Option<String>) -> Self {
        let agent = Agent::new();
        let over = tokio_util::sync::CancellationToken::new();
        let folder = tempfile::tempdir().unwrap();
        let workdir = folder.path().join("volume");
        std::fs::create_dir(&workdir).unwrap();
        let instance = Instance {
            agent: agent.clone(),
            workdir,
            env: BTreeMap::from([("PATH".to_owned(), "/usr/bin:/bin".to_owned())]),
            default_user: None,
            jobs: Arc::new(Jobs::new(folder.path().join("logs"), KeptLogs::default())),
            watchers: Arc::default(),
            explain: Arc::new(|_| None),
            started: Arc::new(|_| {}),
            trace: Arc::new(|| (tracing::Span::none(), Vec::new())),
            lease: Arc::new(()),
            over: over.clone(),
        };
        let default_user = Arc::new(std::sync::Mutex::new(default_user));
        let router = router(Arc::new(One(instance, default_user.clone())));
        Self { folder, router, agent, default_user, over }
    }

    fn user(&self, name: &str) {
        *self.default_user.lock().unwrap() = Some(name.to_owned());
    }

    /// A call whose answer is a stream: its messages.
    async fn stream(&self, method: &str, request: Value) -> Vec<Value> {
        self.stream_with(&format!("process.Process/{method}"), request, &[]).await
    }

    async fn stream_with(
        &self,
        method: &str,
        request: Value,
        headers: &[(&str, &str)],
    ) -> Vec<Value> {
        let mut call =
            Request::post(format!("/{method}")).header("content-type", "application/connect+json");
        for (name, value) in headers {
            call = call.header(*name, *value);
        }
        let (_, answer) =
            self.send(call.body(message(0, request.to_string().as_bytes()).into()).unwrap()).await;
        let (mut rest, mut messages) = (answer.as_slice(), Vec::new());
        while let [_, a, b, c, d, after @ ..] = rest {
            let length = usize::try_from(u32::from_be_bytes([*a, *b, *c, *d])).unwrap();
            let message: Value = serde_json::from_slice(&after[..length]).unwrap();
            rest = &after[length..];
            if message != json!({}) {
                messages.push(message);
            }
        }
        messages
    }

    /// A command from its start to its end.
    async fn start(&self, process: Value) -> Vec<Value> {
        self.stream("Start", json!({ "process": process, "stdin": false })).await
    }

    /// The number of a command that writes it into a file, when it can be asked for by that.
    async fn pid(&self) -> u64 {
        let file = self.path("pid");
        common::until("it runs", || file.exists()).await;
        let pid = std::fs::read_to_string(&file).unwrap().trim().parse().unwrap();
        std::fs::remove_file(file).unwrap();
        let known = async || {
            let list =
                Request::post("/process.Process/List").header("content-type", "application/json");
            let (_, list) = self.send(list.body("{}".into()).unwrap()).await;
            let list: Value = serde_json::from_slice(&list).unwrap();
            list["processes"].as_array().is_some_and(|all| all.iter().any(|it| it["pid"] == pid))
        };
        while !known().await {
            tokio::task::yield_now().await;
        }
        pid
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
async fn entries_are_described_as_envd_would() {
    let place = Place::new();
    std::fs::write(place.path("file"), "12345").unwrap();
    std::fs::set_permissions(place.path("file"), PermissionsExt::from_mode(0o4750)).unwrap();
    std::os::unix::fs::symlink("file", place.path("link")).unwrap();
    std::os::unix::fs::symlink("nowhere", place.path("lost")).unwrap();
    let entry = place.call("Stat", json!({ "path": "file" })).await.unwrap()["entry"].clone();
    assert_eq!(entry["type"], "FILE_TYPE_FILE");
    assert_eq!(entry["size"], "5");
    assert_eq!(entry["mode"], 0o4750);
    assert_eq!(entry["permissions"], "urwxr-x---");
    std::fs::create_dir(place.path("folder")).unwrap();
    std::fs::set_permissions(place.path("folder"), PermissionsExt::from_mode(0o3751)).unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(place.path("socket")).unwrap();
    std::fs::set_permissions(place.path("socket"), PermissionsExt::from_mode(0o600)).unwrap();
    for (path, permissions) in [
        ("folder", "dgtrwxr-x--x"),
        ("link", "Lrwxrwxrwx"),
        ("socket", "Srw-------"),
        ("/dev/null", "Dcrw-rw-rw-"),
    ] {
        let entry = place.call("Stat", json!({ "path": path })).await.unwrap()["entry"].clone();
        assert_eq!(entry["permissions"], permissions, "{path}");
    }
    assert_eq!(entry["path"], place.path("file").to_str().unwrap());
    assert!(entry["modifiedTime"].as_str().unwrap().ends_with('Z'));
    let link = place.call("Stat", json!({ "path": "link" })).await.unwrap()["entry"].clone();
    assert_eq!((&link["type"], &link["isSymlink"]), (&"FILE_TYPE_FILE".into(), &true.into()));
    let target = place.path("file").canonicalize().unwrap();
    assert_eq!(link["symlinkTarget"], target.to_str().unwrap());
    let lost = place.call("Stat", json!({ "path": "lost" })).await.unwrap()["entry"].clone();
    assert_eq!(lost["type"], "FILE_TYPE_SYMLINK");
    assert_eq!(lost["symlinkTarget"], "nowhere");
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
    std::os::unix::fs::symlink("round", place.path("round")).unwrap();
    let round = place.call("ListDir", json!({ "path": "round" })).await;
    assert_eq!(round.unwrap_err(), "failed_precondition");
    let none = place.call("Move", json!({ "source": "none", "destination": "x/y" })).await;
    assert_eq!(none.unwrap_err(), "not_found");
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
async fn what_the_kernel_makes_as_it_is_read_is_read_to_its_end() {
    let place = Place::new();
    for path in ["/proc/version", "/proc/self/maps", "/sys/kernel/mm/transparent_hugepage/enabled"]
    {
        let (status, content) = place.get(&format!("/files?path={path}")).await;
        assert_eq!(status, StatusCode::OK, "{path}");
        assert!(content.ends_with(b"\n"), "{path}: {content:?}");
    }
    let version = std::fs::read("/proc/version").unwrap();
    let request = Request::get("/files?path=/proc/version")
        .header("range", "bytes=0-3")
        .header("accept-encoding", "gzip");
    let request = request.body(Body::empty()).unwrap();
    let response = place.router.clone().oneshot(request).await.unwrap();
    assert_eq!(
        (response.status(), &response.headers()["content-encoding"]),
        (StatusCode::OK, &"gzip".parse().unwrap())
    );
    assert!(!response.headers().contains_key("content-length"));
    let content = to_bytes(response.into_body(), usize::MAX).await.unwrap();
    assert_eq!(content, packed(&version));
    let request = Request::head("/files?path=/proc/version").body(Body::empty()).unwrap();
    let response = place.router.clone().oneshot(request).await.unwrap();
    assert_eq!(response.headers()["content-length"], version.len().to_string());
    // What is empty is that.
    std::fs::write(place.path("empty"), "").unwrap();
    let request = Request::get("/files?path=empty").header("accept-encoding", "gzip");
    let request = request.body(Body::empty()).unwrap();
    let response = place.router.clone().oneshot(request).await.unwrap();
    assert_eq!(
        (response.status(), &response.headers()["content-length"]),
        (StatusCode::OK, &"0".parse().unwrap())
    );
}

#[tokio::test]
async fn a_file_says_what_it_is_and_can_do_nothing() {
    let place = Place::new();
    std::fs::write(place.path("a page.html"), "<script>").unwrap();
    let ask = async |method: &str, headers: &[(&str, &str)]| {
        let mut request = Request::builder().method(method).uri("/files?path=a%20page.html");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        place.router.clone().oneshot(request.body(Body::empty()).unwrap()).await.unwrap()
    };
    let answer = ask("GET", &[]).await;
    let header = |name: &str| answer.headers()[name].to_str().unwrap();
    assert_eq!(header("content-type"), "text/html; charset=utf-8");
    assert_eq!(header("content-disposition"), "inline; filename=\"a page.html\"");
    assert_eq!(header("content-security-policy"), "sandbox; default-src 'none'");
    let modified = std::fs::metadata(place.path("a page.html")).unwrap().modified().unwrap();
    assert_eq!(header("last-modified"), httpdate::fmt_http_date(modified));
    // Its length is that of what there is, however it would be sent.
    let head = ask("HEAD", &[("accept-encoding", "gzip")]).await;
    assert_eq!(
        (head.status(), &head.headers()["content-length"]),
        (StatusCode::OK, &"8".parse().unwrap())
    );
    let none = ask("GET", &[("accept-encoding", "br, identity;q=0")]).await;
    assert_eq!(none.status(), StatusCode::NOT_ACCEPTABLE);
    let (status, error) = place.get("/files?path=none").await;
    let error: Value = serde_json::from_slice(&error).unwrap();
    let text = format!("path '{}' does not exist", place.path("none").display());
    assert_eq!((status, error), (StatusCode::NOT_FOUND, json!({ "code": 404, "message": text })));
    let (status, _) = place.post("/files?path=x", "application/json; charset=utf-8", "{}").await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
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
    let vars = r#"{"envVars": {"A": "b", "PATH": "/bin"}, "timestamp": "2026-01-01T00:00:00Z"}"#;
    assert_eq!(place.post("/init", kind, vars).await.0, StatusCode::NO_CONTENT);
    let envs: Value = serde_json::from_slice(&place.get("/envs").await.1).unwrap();
    assert_eq!(envs, json!({ "A": "b", "PATH": "/bin" }));
    let events = place.start(json!({ "cmd": "sh", "args": ["-c", "echo $A $PATH"] })).await;
    assert_eq!(printed(&events), "b /bin\n");
    let vars = r#"{"envVars": {"A=": "b"}}"#;
    assert_eq!(place.post("/init", kind, vars).await.0, StatusCode::BAD_REQUEST);
}

/// Who runs this, by name and number.
fn myself() -> (String, u32) {
    let id = |what| {
        let output = std::process::Command::new("id").arg(what).output().unwrap();
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    };
    (id("-un"), id("-u").parse().unwrap())
}

#[tokio::test]
async fn who_is_named_by_default_is_whom_all_is_for() {
    let (name, number) = myself();
    let place = Place::of(Some(name.clone()));
    let told = place.start(json!({ "cmd": "sh", "args": ["-c", "id -u; echo $USER; pwd"] })).await;
    let home = place.path("").canonicalize().unwrap();
    // Where nothing is said, they begin in the volume: that is theirs by default.
    assert_eq!(printed(&told), format!("{number}\n{name}\n{}\n", home.display()));
    let told = place.start(json!({ "cmd": "pwd", "cwd": "/" })).await;
    assert_eq!(printed(&told), "/\n");
    // Root may be anybody, and then is nobody else.
    if number == 0 {
        place.user("nobody");
        let line = "id -un; grep CapEff /proc/self/status; touch /etc/denizen-was-here";
        let told = json!({ "cmd": "sh", "args": ["-c", line], "cwd": "/" });
        let told = place.start(told).await;
        let (user, rights) = printed(&told)
            .split_once('\n')
            .map(|(a, b)| (a.into(), b.into()))
            .unwrap_or_else(|| (String::new(), String::new()));
        assert_eq!((user.as_str(), rights.trim()), ("nobody", "CapEff:\t0000000000000000"));
        assert_ne!(told.last().unwrap()["event"]["end"]["exitCode"], Value::Null);
        assert!(!std::path::Path::new("/etc/denizen-was-here").exists());
    }
    place.user("no-such-user-here");
    let told = place.start(json!({ "cmd": "true" })).await;
    let error = &told.last().unwrap()["error"];
    assert_eq!(error["code"], "unauthenticated");
    assert_eq!(error["message"], "invalid username: 'no-such-user-here'");
    assert_eq!(place.call("Stat", json!({ "path": "/" })).await.unwrap_err(), "unauthenticated");
    assert_eq!(place.get("/files?path=/etc/passwd").await.0, StatusCode::UNAUTHORIZED);
    let uri = format!("/files?path=/etc/passwd&username={name}");
    assert_eq!(place.get(&uri).await.0, StatusCode::OK);
}

#[tokio::test]
async fn a_file_of_a_user_is_written_where_it_is() {
    let place = Place::of(Some(myself().0));
    place.call("MakeDir", json!({ "path": place.path("w").to_str().unwrap() })).await.unwrap();
    let made = place.call("CreateWatcher", watcher(&place, "w")).await.unwrap();
    let uri = format!("/files?path={}", place.path("w/in/file").display());
    let octets = "application/octet-stream";
    let events = async || {
        let asked = json!({ "watcherId": made["watcherId"] });
        let told = place.call("GetWatcherEvents", asked).await.unwrap();
        let told = told["events"].as_array().cloned().unwrap_or_default();
        let part = |event: &Value, name: &str| event[name].as_str().unwrap().to_owned();
        let told = told.iter().map(|it| format!("{} {}", part(it, "type"), part(it, "name")));
        told.map(|it| it.replace("EVENT_TYPE_", "")).collect::<Vec<_>>()
    };
    std::fs::create_dir(place.path("w/in")).unwrap();
    assert_eq!(events().await, ["CREATE in"]);
    assert_eq!(place.post(&uri, octets, "content").await.0, StatusCode::OK);
    assert_eq!(events().await, ["CREATE in/file", "CHMOD in/file", "WRITE in/file"]);
    std::fs::hard_link(place.path("w/in/file"), place.path("other")).unwrap();
    assert_eq!(place.post(&uri, octets, "new").await.0, StatusCode::OK);
    assert_eq!(std::fs::read(place.path("other")).unwrap(), b"new");
    let told = events().await;
    assert!(!told.is_empty() && told.iter().all(|it| it == "WRITE in/file"), "{told:?}");
    // Of one that was not there, nothing is left that broke off.
    let pieces = futures::stream::iter([Ok("new"), Err(std::io::Error::other("cut off"))]);
    let broken = format!("/files?path={}", place.path("w/broken").display());
    let (status, _) = place.post(&broken, octets, Body::from_stream(pieces)).await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
    assert!(!place.path("w/broken").exists());
    let folder = format!("/files?path={}", place.path("w").display());
    let (status, error) = place.post(&folder, octets, "x").await;
    assert_eq!((status, &error["code"]), (StatusCode::BAD_REQUEST, &json!(400)), "{error}");
    // Two of one upload cannot be the same.
    let form = "--x\r\nContent-Disposition: form-data; name=\"file\"; filename=\"/1\"\r\n\r\n1\r\n\
        --x\r\nContent-Disposition: form-data; name=\"file\"; filename=\"/2\"\r\n\r\n2\r\n--x--\r\n";
    let (status, _) = place.post(&uri, "multipart/form-data; boundary=x", form).await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
}

#[tokio::test]
async fn what_is_said_of_a_file_goes_with_it() {
    let place = Place::of(Some(myself().0));
    let path = place.path("file").to_str().unwrap().to_owned();
    let send = async |said: &[(&str, &str)]| {
        let mut request = Request::post(format!("/files?path={path}"));
        for (name, value) in said {
            request = request.header(format!("X-Metadata-{name}"), *value);
        }
        let (status, body) = place.send(request.body("x".into()).unwrap()).await;
        assert_eq!(status, StatusCode::OK);
        serde_json::from_slice::<Value>(&body).unwrap()[0].clone()
    };
    let said = json!({ "author": "me", "purpose": "test" });
    assert_eq!(send(&[("Author", "me"), ("purpose", "test")]).await["metadata"], said);
    let moved = json!({ "source": path, "destination": place.path("moved").to_str().unwrap() });
    assert_eq!(place.call("Move", moved).await.unwrap()["entry"]["metadata"], said);
    send(&[("a", "b")]).await;
    // What is written anew is not what was spoken of.
    assert_eq!(send(&[]).await["metadata"], Value::Null);
    let entry = place.call("Stat", json!({ "path": path })).await.unwrap()["entry"].clone();
    assert_eq!(entry["metadata"], Value::Null, "{entry}");
}

#[tokio::test]
async fn content_may_be_packed_on_its_way() {
    let place = Place::new();
    let content = "the same again ".repeat(10_000);
    std::fs::write(place.path("file"), &content).unwrap();
    let request = Request::get("/files?path=file").header("accept-encoding", "gzip");
    let response = place.router.clone().oneshot(request.body(Body::empty()).unwrap()).await;
    let response = response.unwrap();
    assert_eq!(response.headers()["content-encoding"], "gzip");
    let packed = to_bytes(response.into_body(), usize::MAX).await.unwrap();
    assert!(packed.len() < content.len() / 10);
    let send = async |name: &str, encoding: &str, body: &[u8]| {
        let request = Request::post(format!("/files?path={name}"))
            .header("content-encoding", encoding)
            .body(Body::from(body.to_vec()));
        place.send(request.unwrap()).await.0
    };
    assert_eq!(send("copy", "gzip", &packed).await, StatusCode::OK);
    assert_eq!(std::fs::read_to_string(place.path("copy")).unwrap(), content);
    assert_eq!(send("copy", "br", &packed).await, StatusCode::BAD_REQUEST);
    assert_eq!(send("copy", "gzip", &packed[..100]).await, StatusCode::BAD_REQUEST);
    assert_eq!(std::fs::read_to_string(place.path("copy")).unwrap(), content);
    let request = Request::get("/files?path=file")
        .header("accept-encoding", "gzip")
        .header("range", "bytes=4-7");
    let (status, part) = place.send(request.body(Body::empty()).unwrap()).await;
    assert_eq!((status, part.as_slice()), (StatusCode::PARTIAL_CONTENT, &b"same"[..]));
}

#[tokio::test]
async fn how_a_command_ended_is_told_later_unless_all_was_ended() {
    let place = Place::new();
    let end = async |headers: &[(&str, &str)]| {
        let line = json!({ "process": { "cmd": "sh", "args": ["-c", "exit 7"] } });
        let told = place.stream_with("process.Process/Start", line, headers).await;
        let pid = told[0]["event"]["start"]["pid"].as_u64().unwrap();
        place.stream("Connect", json!({ "process": { "pid": pid } })).await
    };
    let told = end(&[(denizen_envd::DETACH, "1")]).await;
    assert_eq!(told[1]["event"]["end"]["exitCode"], 7, "{told:?}");
    // What was not started to be looked at later is gone.
    let told = end(&[]).await;
    assert_eq!(told[0]["error"]["code"], "not_found", "{told:?}");
    let told = place.stream("Connect", json!({ "process": { "pid": 999_999 } })).await;
    assert_eq!(told[0]["error"]["code"], "not_found", "{told:?}");
    // One that is ended with its instance has not ended by itself.
    let mark = place.path("runs");
    let line = json!({ "cmd": "sh", "args": ["-c", "touch runs; exec sleep 1000"] });
    let shut_down = async {
        common::until("it runs", || mark.exists()).await;
        place.agent.shutdown(Duration::from_secs(10)).await.unwrap();
    };
    let (told, ()) = tokio::join!(place.start(line), shut_down);
    assert_eq!(told.last().unwrap()["error"]["code"], "unavailable", "{told:?}");
    // Nor is anybody left waiting for one that only sleeps from now on.
    std::fs::remove_file(&mark).unwrap();
    let line = json!({ "cmd": "sh", "args": ["-c", "touch runs; exec sleep 1000"] });
    let given_up = async {
        common::until("it runs", || mark.exists()).await;
        place.over.cancel();
    };
    let (told, ()) = tokio::join!(place.start(line), given_up);
    assert_eq!(told.last().unwrap()["error"]["code"], "unavailable", "{told:?}");
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
    let request = Request::post("/process.Process/Start")
        .header("content-type", "application/connect+json")
        .body(Body::from(message(0, request.as_bytes())))
        .unwrap();
    let unread = place.router.clone().oneshot(request).await.unwrap();
    assert_eq!(unread.status(), StatusCode::OK);
    common::until("it goes on", || place.path("done").exists()).await;
    // Who reads then is told that something is missing.
    let read = to_bytes(unread.into_body(), usize::MAX).await.unwrap();
    assert!(String::from_utf8_lossy(&read).contains("data_loss"));
}

#[tokio::test]
async fn an_end_by_a_signal_is_named() {
    let place = Place::new();
    for (signal, name) in [(9, "killed"), (15, "terminated"), (1, "hangup"), (40, "signal 40")] {
        let line = format!("kill -{signal} $$");
        let told = place.start(json!({ "cmd": "sh", "args": ["-c", line] })).await;
        let end = &told.last().unwrap()["event"]["end"];
        assert_eq!(end["error"], format!("signal: {name}"), "{told:?}");
        assert_eq!((&end["status"], &end["exitCode"]), (&end["error"], &json!(128 + signal)));
    }
}

#[tokio::test]
async fn a_folder_that_is_missing_is_named() {
    let place = Place::new();
    let told = place.start(json!({ "cmd": "pwd", "cwd": "/nonexistent" })).await;
    let error =
        json!({ "code": "invalid_argument", "message": "cwd '/nonexistent' does not exist" });
    assert_eq!(told[0]["error"], error);
}

#[tokio::test]
async fn input_of_the_wrong_kind_is_refused() {
    let place = Place::new();
    let send = async |pid: u64, kind: &str| {
        let request = json!({ "process": { "pid": pid }, "input": { kind: "eA==" } });
        let request = Request::post("/process.Process/SendInput")
            .header("content-type", "application/json")
            .body(Body::from(request.to_string()));
        let (_, answer) = place.send(request.unwrap()).await;
        serde_json::from_slice::<Value>(&answer).unwrap()["code"].clone()
    };
    for (pty, wrong, right) in [(json!({}), "stdin", "pty"), (Value::Null, "pty", "stdin")] {
        let tag = right;
        let line = json!({
            "process": { "cmd": "sh", "args": ["-c", "echo $$ > pid.new; mv pid.new pid; sleep 1000"] },
            "pty": pty, "tag": tag,
        });
        let tried = async {
            let pid = place.pid().await;
            (send(pid, wrong).await, send(pid, right).await)
        };
        tokio::select! {
            told = place.stream("Start", line) => panic!("{told:?}"),
            told = tried => assert_eq!(told, (json!("failed_precondition"), Value::Null), "{right}"),
        }
    }
}

#[tokio::test]
async fn who_watches_or_writes_is_told_when_that_is_over() {
    let place = Place::new();
    place.call("MakeDir", json!({ "path": "w" })).await.unwrap();
    let watch = async |headers: &[(&str, &str)]| {
        let watched = json!({ "path": "w" });
        let told = place.stream_with("filesystem.Filesystem/WatchDir", watched, headers).await;
        assert_eq!(told.len(), 2, "{told:?}");
        told[1]["error"]["code"].clone()
    };
    assert_eq!(watch(&[("connect-timeout-ms", "200")]).await, "deadline_exceeded");
    let line = "echo $$ > pid.new; mv pid.new pid; head -c 1 > read; exec sleep 1000";
    let line = json!({ "process": { "cmd": "sh", "args": ["-c", line] } });
    let input = async {
        let pid = place.pid().await;
        let start = json!({ "start": { "process": { "pid": pid } } }).to_string();
        let pieces = futures::stream::iter([Ok::<_, std::io::Error>(message(0, start.as_bytes()))]);
        let pieces = pieces.chain(futures::stream::once(async {
            Ok(message(0, br#"{"data":{"input":{"stdin":"eA=="}}}"#))
        }));
        let request = Request::post("/process.Process/StreamInput")
            .header("content-type", "application/connect+json")
            .body(Body::from_stream(pieces.chain(futures::stream::pending())));
        let (_, answer) = place.send(request.unwrap()).await;
        String::from_utf8_lossy(&answer).into_owned()
    };
    let all = async { tokio::join!(watch(&[]), input, place.stream("Start", line)) };
    let over = async {
        let read = || std::fs::read(place.path("read")).is_ok_and(|it| it == b"x");
        common::until("its input is read", read).await;
        place.over.cancel();
    };
    let ((watched, written, followed), ()) = tokio::join!(all, over);
    assert_eq!(watched, "unavailable");
    assert!(written.contains("unavailable"), "{written}");
    assert_eq!(followed.last().unwrap()["error"]["code"], "unavailable", "{followed:?}");
}

#[tokio::test]
async fn requests_may_be_packed() {
    let place = Place::new();
    std::fs::write(place.path("file"), "").unwrap();
    let request = Request::post("/filesystem.Filesystem/Stat")
        .header("content-type", "application/json")
        .header("content-encoding", "gzip")
        .body(Body::from(packed(br#"{"path":"file"}"#)));
    assert_eq!(place.send(request.unwrap()).await.0, StatusCode::OK);
    let line = br#"{"process":{"cmd":"echo","args":["unpacked"]}}"#;
    let request = Request::post("/process.Process/Start")
        .header("content-type", "application/connect+json")
        .header("connect-content-encoding", "gzip")
        .body(Body::from(message(1, &packed(line))));
    let (_, answer) = place.send(request.unwrap()).await;
    assert!(String::from_utf8_lossy(&answer).contains("dW5wYWNrZWQK"));
}
