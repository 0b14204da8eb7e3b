//! Pulling: from Docker's own registry, started here on loopback, and from one of our own that
//! lies, stalls and breaks off.
#![allow(clippy::unwrap_used)]

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use denizen_image::{Credentials, Error, Image, PullOptions, Stage, Transport};
use serde_json::json;
use support::*;

/// Docker's registry. Dropping it ends it.
struct Registry {
    child: Child,
    host: String,
}

impl Registry {
    fn start(folder: &Path, more: &str) -> Self {
        // Free at this moment; the registry takes no socket from us.
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let host = format!("127.0.0.1:{port}");
        let storage = folder.join("registry");
        let config = format!(
            "version: 0.1\nlog:\n  level: error\nstorage:\n  filesystem:\n    rootdirectory: {}\n\
             http:\n  addr: {host}\n  secret: s\n{more}",
            storage.display()
        );
        let path = folder.join("layout-registry.yml");
        fs::write(&path, config).unwrap();
        let log = fs::File::create(folder.join("layout-registry.log")).unwrap();
        let child = Command::new("docker-registry")
            .arg("serve")
            .arg(&path)
            .env("OTEL_TRACES_EXPORTER", "none")
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        let registry = Self { child, host };
        let until = Instant::now() + Duration::from_secs(20);
        while TcpStream::connect(&registry.host).is_err() {
            assert!(Instant::now() < until, "the registry does not start");
            std::thread::sleep(Duration::from_millis(20));
        }
        registry
    }

    fn push(&self, layout: &Path, name: &str, more: &[&str]) {
        let output = Command::new("skopeo")
            .args(["--insecure-policy", "copy", "--all", "--dest-tls-verify=false"])
            .args(more)
            .arg(format!("oci:{}", layout.display()))
            .arg(format!("docker://{}/{name}", self.host))
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

async fn pull(bench: &Bench, reference: &str) -> Result<Image, Error> {
    bench.store.pull(reference, &PullOptions::default(), |_| {}).await
}

fn options(edit: impl FnOnce(&mut PullOptions)) -> PullOptions {
    let mut options = PullOptions::default();
    edit(&mut options);
    options
}

/// A small system that runs.
fn busybox() -> Vec<Layer> {
    let program = fs::read(
        ["/bin/busybox", "/usr/bin/busybox"].iter().find(|p| Path::new(p).exists()).unwrap(),
    );
    let system = ["sh", "ls", "cat", "rm", "id"].iter().fold(
        Tar::new()
            .dir("bin")
            .add(b'0', "bin/busybox", "", &program.unwrap(), |h| h.set_mode(0o755)),
        |tar, name| tar.link(b'2', &format!("bin/{name}"), "busybox"),
    );
    let system = system.dir("etc").file("etc/motd", "low").file("etc/secret", "low");
    let own = Tar::new().file("etc/.wh.secret", "").file("etc/motd", "hello").dir("srv");
    vec![system.gzip(), own.gzip()]
}

#[tokio::test]
async fn from_a_real_registry_to_a_system_that_runs() {
    if !apart("from_a_real_registry_to_a_system_that_runs") {
        return;
    }
    let bench = Bench::new();
    let registry = Registry::start(bench.dir.path(), "");
    layout(&bench.path("layout"), &busybox());
    registry.push(&bench.path("layout"), "demo/busybox:1", &[]);
    let told = Arc::new(Mutex::new(Vec::new()));
    let tell = {
        let told = Arc::clone(&told);
        move |progress| told.lock().unwrap().push(progress)
    };
    let reference = format!("{}/demo/busybox:1", registry.host);
    let image = bench.store.pull(&reference, &PullOptions::default(), tell).await.unwrap();
    assert_eq!(image.name, reference);
    for stage in [Stage::Fetching, Stage::Unpacking, Stage::Done] {
        for layer in 0..2 {
            let told = told.lock().unwrap();
            assert!(
                told.iter().any(|p| p.stage == stage && p.layer == layer && p.bytes == p.total)
            );
        }
    }
    let merged = mount(&image, bench.dir.path());
    let script = "cat /etc/motd; ls /etc; rm /etc/motd; ls /etc";
    let output =
        Command::new("chroot").arg(&merged).args(["/bin/sh", "-c", script]).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout), "hellomotd\n", "{output:?}");

    // By its digest as well, and under that name too; nothing is fetched twice.
    let digest = image.digest;
    let by_digest = format!("{}/demo/busybox@{digest}", registry.host);
    let again = pull(&bench, &by_digest).await.unwrap();
    assert_eq!((again.digest, &again.layers), (digest, &image.layers));
    let blobs = bench.path("registry/docker/registry/v2/blobs");
    for layer in busybox() {
        let hex = layer.diff_id.replace("sha256:", "");
        assert!(bench.path("store/layers").join(hex).exists());
    }
    assert!(blobs.exists());

    let missing = pull(&bench, &format!("{}/demo/busybox:2", registry.host)).await.unwrap_err();
    assert!(matches!(missing, Error::NotFound { .. }), "{missing}");
    let missing = pull(&bench, &format!("{}/demo/nothing", registry.host)).await.unwrap_err();
    assert!(matches!(missing, Error::NotFound { .. }), "{missing}");

    // The same in Docker's own format.
    registry.push(&bench.path("layout"), "demo/docker:1", &["--format", "v2s2"]);
    let docker = pull(&bench, &format!("{}/demo/docker:1", registry.host)).await.unwrap();
    assert_eq!(docker.layers, image.layers);
    assert_ne!(docker.digest, digest);
    assert_eq!(docker.config, image.config);

    // What the registry holds is altered: its own fault, but not ours.
    let fresh = Bench::new();
    let layer = &busybox()[1];
    let hex = support::digest(&layer.blob).replace("sha256:", "");
    let data = blobs.join("sha256").join(&hex[..2]).join(&hex).join("data");
    let mut altered = layer.blob.clone();
    altered[4] ^= 1;
    fs::write(&data, altered).unwrap();
    let error = pull(&fresh, &reference).await.unwrap_err();
    assert!(matches!(error, Error::Digest { .. }), "{error}");
    assert_eq!(fresh.store.list().unwrap(), []);
    // The whole layer was kept for the next attempt, or was broken off.
    fresh.store.prune(|_| false).unwrap();
    fresh.assert_untouched();
}

#[tokio::test]
async fn with_a_password_over_tls() {
    let bench = Bench::new();
    let path = |name: &str| bench.path(&format!("layout-{name}")).to_str().unwrap().to_owned();
    let (key, certificate, users, ca) = (path("key"), path("cert"), path("users"), path("ca"));
    let settings = path("openssl");
    fs::write(&settings, "[req]\ndistinguished_name=name\n[name]\n").unwrap();
    let openssl = |more: &[&str]| {
        let made = Command::new("openssl")
            .args(["req", "-config", &settings, "-x509", "-newkey", "rsa:2048", "-nodes"])
            .args(["-days", "2", "-subj", "/CN=demo"])
            .args(more)
            .output()
            .unwrap();
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    };
    let ca_key = path("ca-key");
    openssl(&["-addext", "basicConstraints=critical,CA:TRUE", "-keyout", &ca_key, "-out", &ca]);
    let own = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", &key, "-out", &certificate];
    let leaf = ["-addext", "basicConstraints=critical,CA:FALSE", "-CA", &ca, "-CAkey", &ca_key];
    openssl(&[&own[..], &leaf[..]].concat());
    let hash = "$2b$04$zuihoZkZLIsjGD7oFTWLn.XJ.yAMGLKg7zifvPfwjq39VpphytvQO";
    fs::write(&users, format!("demo:{hash}\n")).unwrap();
    let more = format!(
        "  tls:\n    certificate: {certificate}\n    key: {key}\nauth:\n  htpasswd:\n    \
         realm: demo\n    path: {users}\n"
    );
    let registry = Registry::start(bench.dir.path(), &more);
    layout(&bench.path("layout"), &[Tar::new().file("x", "").gzip()]);
    registry.push(&bench.path("layout"), "x:1", &["--dest-creds", "demo:secret"]);
    let reference = format!("{}/x:1", registry.host);
    let with = |credentials: Credentials| {
        options(|options| {
            options.credentials = credentials;
            options.transport = Transport::Tls;
            options.certificates = vec![PathBuf::from(&ca)];
        })
    };
    let password =
        |password: &str| Credentials::Password { user: "demo".into(), password: password.into() };
    let attempt = async |options: PullOptions| bench.store.pull(&reference, &options, |_| {}).await;
    for credentials in [Credentials::Anonymous, password("wrong")] {
        let error = attempt(with(credentials)).await.unwrap_err();
        assert!(matches!(error, Error::Unauthorized { .. }), "{error}");
    }
    // Nobody vouches for it.
    let mut unknown = with(password("secret"));
    unknown.certificates.clear();
    let error = attempt(unknown).await.unwrap_err();
    assert!(matches!(error, Error::Network { .. }), "{error}");
    attempt(with(password("secret"))).await.unwrap();

    let config = bench.path("layout-docker.json");
    let auths = |key: &str, auth: &str| json!({ "auths": { key: { "auth": auth } } }).to_string();
    for key in [registry.host.clone(), format!("https://{}/v1/", registry.host)] {
        fs::write(&config, auths(&key, "ZGVtbzpzZWNyZXQ=")).unwrap();
        attempt(with(Credentials::DockerConfig(config.clone()))).await.unwrap();
    }
    for (text, authorized) in [
        (auths("ghcr.io", "ZGVtbzpzZWNyZXQ="), true),
        (auths(&registry.host, ""), true),
        ("{}".to_owned(), true),
        (auths(&registry.host, "???"), false),
        (auths(&registry.host, "ZGVtbw=="), false),
        ("[".to_owned(), false),
    ] {
        fs::write(&config, &text).unwrap();
        let error = attempt(with(Credentials::DockerConfig(config.clone()))).await.unwrap_err();
        let expected = if authorized {
            matches!(error, Error::Unauthorized { .. })
        } else {
            matches!(error, Error::Credentials { .. })
        };
        assert!(expected, "{text} {error}");
        assert!(!format!("{error:?}").contains("secret"));
    }
    assert!(!format!("{:?}", password("secret")).contains("secret"));
    assert_eq!(fs::metadata(&key).unwrap().permissions().mode() & 0o77, 0);
}

/// What a client asked.
#[derive(Clone, Debug)]
struct Request {
    path: String,
    headers: BTreeMap<String, String>,
}

struct Answer {
    status: u16,
    headers: Vec<(&'static str, String)>,
    body: Vec<u8>,
    /// Breaks off after so many bytes of the body.
    cut: Option<usize>,
}

impl Answer {
    fn new(status: u16, body: impl Into<Vec<u8>>) -> Self {
        Self { status, headers: Vec::new(), body: body.into(), cut: None }
    }

    fn with(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }
}

/// A registry of our own, with whatever manners a test wants. It ends with the test's process.
struct Fake {
    host: String,
    asked: Arc<Mutex<Vec<Request>>>,
}

impl Fake {
    fn start(answer: impl Fn(&Request) -> Answer + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let host = listener.local_addr().unwrap().to_string();
        let asked = Arc::new(Mutex::new(Vec::new()));
        let (answer, log) = (Arc::new(answer), Arc::clone(&asked));
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (answer, log) = (Arc::clone(&answer), Arc::clone(&log));
                std::thread::spawn(move || serve(&stream.unwrap(), &*answer, &log));
            }
        });
        Self { host, asked }
    }

    fn asked(&self) -> Vec<Request> {
        self.asked.lock().unwrap().clone()
    }
}

fn serve(
    stream: &TcpStream,
    answer: &(dyn Fn(&Request) -> Answer + Send + Sync),
    log: &Mutex<Vec<Request>>,
) {
    let mut lines = BufReader::new(stream).lines();
    let Some(Ok(first)) = lines.next() else { return };
    let path = first.split(' ').nth(1).unwrap_or_default().to_owned();
    let mut headers = BTreeMap::new();
    for line in lines.map_while(Result::ok).take_while(|line| !line.is_empty()) {
        let (name, value) = line.split_once(':').unwrap();
        headers.insert(name.to_ascii_lowercase(), value.trim().to_owned());
    }
    let request = Request { path, headers };
    log.lock().unwrap().push(request.clone());
    let answer = answer(&request);
    let mut head = format!("HTTP/1.1 {} x\r\nConnection: close\r\n", answer.status);
    head += &format!("Content-Length: {}\r\n", answer.body.len());
    for (name, value) in &answer.headers {
        head += &format!("{name}: {value}\r\n");
    }
    let mut stream = stream;
    let body = &answer.body[..answer.cut.unwrap_or(answer.body.len())];
    // A client that has had enough hangs up.
    let _ = stream.write_all(head.as_bytes());
    let _ = stream.write_all(b"\r\n");
    let _ = stream.write_all(body);
}

/// The documents of an image, by the paths a registry has them at.
fn served(layers: &[Layer]) -> BTreeMap<String, Vec<u8>> {
    let config = serde_json::to_vec(&config(layers)).unwrap();
    let manifest = serde_json::to_vec(&manifest(&config, layers)).unwrap();
    let mut all = BTreeMap::new();
    for blob in layers.iter().map(|layer| &layer.blob).chain([&config]) {
        all.insert(format!("/v2/x/blobs/{}", digest(blob)), blob.clone());
    }
    all.insert(format!("/v2/x/manifests/{}", digest(&manifest)), manifest.clone());
    all.insert("/v2/x/manifests/latest".to_owned(), manifest);
    all
}

fn find(all: &BTreeMap<String, Vec<u8>>, path: &str) -> Answer {
    match all.get(path) {
        Some(body) => Answer::new(200, body.clone()),
        None => Answer::new(404, r#"{"errors":[{"code":"MANIFEST_UNKNOWN","message":"no"}]}"#),
    }
}

fn one() -> [Layer; 1] {
    [Tar::new().file("x", vec![3; 1 << 20]).plain()]
}

#[tokio::test]
async fn a_connection_that_breaks_is_gone_on_with() {
    for ranges in [true, false] {
        let all = served(&one());
        let fake = Fake::start(move |request| {
            let mut answer = find(&all, &request.path);
            if answer.body.len() < 1 << 20 {
                return answer;
            }
            let from = request.headers.get("range").map(|range| {
                range.strip_prefix("bytes=").unwrap().trim_end_matches('-').parse().unwrap()
            });
            let from: usize = from.unwrap_or(0);
            if from > 0 && ranges {
                answer.status = 206;
                answer.body.drain(..from);
            }
            // Each attempt brings some more; without ranges each starts anew.
            let all = answer.body.len();
            answer.cut = Some(if ranges { all.min(400_000) } else { all.min(from + 400_000) });
            answer
        });
        let bench = Bench::new();
        let image = pull(&bench, &format!("{}/x", fake.host)).await.unwrap();
        assert_eq!(fs::read(image.layers[0].join("x")).unwrap(), vec![3; 1 << 20]);
        let asked = fake.asked().iter().filter(|r| r.headers.contains_key("range")).count();
        assert!(asked >= 2, "{asked}");
    }
}

#[tokio::test]
async fn a_registry_that_lies() {
    let layers = one();
    let blob = digest(&layers[0].blob);
    type Twist = fn(&Request, Answer) -> Answer;
    let twists: [(&str, Twist); 10] = [
        ("shorter than named", |request, mut answer| {
            if answer.body.len() >= 1 << 20 {
                answer.body.truncate(if request.headers.contains_key("range") { 0 } else { 5000 });
            }
            answer
        }),
        ("larger than named", |_, mut answer| {
            if answer.body.len() >= 1 << 20 {
                answer.body.extend([0; 512]);
            }
            answer
        }),
        ("has the digest", |_, mut answer| {
            if let Some(byte) = answer.body.get_mut(600_000) {
                *byte ^= 1;
            }
            answer
        }),
        ("over the limit of 4194304 bytes", |request, mut answer| {
            if request.path.contains("manifests") {
                answer.body.resize(5 << 20, b' ');
            }
            answer
        }),
        ("has the digest", |request, mut answer| {
            if request.path.contains("blobs") && answer.body.len() < 1 << 20 {
                answer.body.push(b' ');
            }
            answer
        }),
        ("malformed", |request, mut answer| {
            if request.path.contains("manifests") {
                answer.body = b"[".repeat(1 << 20);
            }
            answer
        }),
        ("answered 500 (BOOM: broken)", |_, _| {
            Answer::new(500, r#"{"errors":[{"code":"BOOM","message":"broken"}]}"#)
        }),
        ("answered 429 (slow down)", |_, _| Answer::new(429, "slow down")),
        ("no connection", |_, answer| answer.status_line("nonsense")),
        ("does not let us have", |_, _| Answer::new(403, "")),
    ];
    for (word, twist) in twists {
        let all = served(&layers);
        let fake = Fake::start(move |request| twist(request, find(&all, &request.path)));
        let bench = Bench::new();
        let error = pull(&bench, &format!("{}/x", fake.host)).await.unwrap_err();
        assert!(error.to_string().contains(word), "{word}: {error} {error:?}");
        bench.assert_untouched();
    }
    // By digest, a manifest cannot be another one.
    let all = served(&layers);
    let fake = Fake::start(move |request| {
        let latest = find(&all, "/v2/x/manifests/latest");
        if request.path.contains("manifests") { latest } else { find(&all, &request.path) }
    });
    let bench = Bench::new();
    let error = pull(&bench, &format!("{}/x@{blob}", fake.host)).await.unwrap_err();
    assert!(matches!(error, Error::Digest { .. }), "{error}");
    bench.assert_untouched();
}

impl Answer {
    /// What is no answer in HTTP.
    fn status_line(mut self, text: &str) -> Self {
        self.status = 1;
        self.body = text.into();
        self
    }
}

#[tokio::test]
async fn an_index_of_indexes_and_the_right_platform() {
    let layers = one();
    let mut all = served(&layers);
    let manifest = all["/v2/x/manifests/latest"].clone();
    let entry = |bytes: &[u8], arch: &str| {
        let mut entry = descriptor(bytes, INDEX);
        entry["platform"] = json!({ "os": "linux", "architecture": arch });
        entry
    };
    let index = |entries: &[serde_json::Value]| {
        json!({ "schemaVersion": 2, "manifests": entries }).to_string().into_bytes()
    };
    let mut inner = index(&[entry(b"x", "mips"), entry(&manifest, architecture())]);
    all.insert("/v2/x/manifests/good".into(), inner.clone());
    for _ in 0..4 {
        all.insert(format!("/v2/x/manifests/{}", digest(&inner)), inner.clone());
        inner = index(&[entry(&inner, architecture())]);
    }
    all.insert("/v2/x/manifests/deep".into(), inner);
    all.insert("/v2/x/manifests/none".into(), index(&[]));
    let fake = Fake::start(move |request| find(&all, &request.path));
    let bench = Bench::new();
    let image = pull(&bench, &format!("{}/x:good", fake.host)).await.unwrap();
    assert_eq!(image.digest.to_string(), digest(&manifest));
    let error = pull(&bench, &format!("{}/x:deep", fake.host)).await.unwrap_err();
    assert!(error.to_string().contains("index to index"), "{error}");
    let error = pull(&bench, &format!("{}/x:none", fake.host)).await.unwrap_err();
    assert!(matches!(error, Error::Platform { .. }), "{error}");
    let other = options(|options| options.architecture = Some("mips".into()));
    let reference = format!("{}/x:good", fake.host);
    let error = bench.store.pull(&reference, &other, |_| {}).await.unwrap_err();
    assert!(matches!(error, Error::NotFound { .. }), "{error}");
}

#[tokio::test]
async fn tokens_are_fetched_renewed_and_told_to_nobody_else() {
    let all = served(&one());
    let storage = {
        let all = all.clone();
        Fake::start(move |request| find(&all, &request.path))
    };
    let elsewhere = format!("http://{}", storage.host);
    let issued = Arc::new(Mutex::new(0));
    let own = Arc::new(Mutex::new(String::new()));
    let (issuer, realm) = (Arc::clone(&issued), Arc::clone(&own));
    let fake = Fake::start(move |request| {
        if request.path.starts_with("/token") {
            let mut issued = issuer.lock().unwrap();
            *issued += 1;
            return Answer::new(200, json!({ "token": format!("t{issued}") }).to_string());
        }
        // The first token is good for manifests only.
        let good = if request.path.contains("blobs") { "Bearer t2" } else { "Bearer t" };
        if !request.headers.get("authorization").is_some_and(|value| value.starts_with(good)) {
            let realm = realm.lock().unwrap().clone();
            let challenge = format!(r#"Bearer realm="{realm}",service="a \"b",scope="ignored""#);
            return Answer::new(401, "").with("WWW-Authenticate", challenge);
        }
        if request.path.contains("blobs") {
            return Answer::new(307, "").with("Location", format!("{elsewhere}{}", request.path));
        }
        find(&all, &request.path)
    });
    *own.lock().unwrap() = format!("http://{}/token?a=b", fake.host);
    let bench = Bench::new();
    let with_user = options(|options| {
        options.credentials = Credentials::Password { user: "u".into(), password: "p".into() };
    });
    let reference = format!("{}/x", fake.host);
    bench.store.pull(&reference, &with_user, |_| {}).await.unwrap();
    assert_eq!(*issued.lock().unwrap(), 2);
    let tokens: Vec<_> =
        fake.asked().into_iter().filter(|r| r.path.starts_with("/token")).collect();
    assert_eq!(tokens[0].path, "/token?a=b&scope=repository%3Ax%3Apull&service=a+%22b");
    assert_eq!(tokens[0].headers["authorization"], "Basic dTpw");
    // Until it is asked for, nothing is said.
    assert!(!fake.asked()[0].headers.contains_key("authorization"));
    assert!(!storage.asked().is_empty());
    for request in storage.asked() {
        assert!(!request.headers.contains_key("authorization"), "{request:?}");
    }
}

#[tokio::test]
async fn token_services_that_lie() {
    let realm = Arc::new(Mutex::new(String::new()));
    for (answer, word) in [
        (r#"{"token":"a\nb"}"#, "cannot be sent"),
        ("[", "malformed"),
        (r#"{"token":"good"}"#, "does not let us have"),
        ("HUGE", "limit"),
    ] {
        let at = Arc::clone(&realm);
        let fake = Fake::start(move |request| match &*request.path {
            path if path.starts_with("/token") && answer == "HUGE" => {
                Answer::new(200, vec![b' '; 1 << 20])
            }
            path if path.starts_with("/token") => Answer::new(200, answer),
            _ => Answer::new(401, "")
                .with("WWW-Authenticate", "Basic")
                .with("WWW-Authenticate", "\"=,,=")
                .with("WWW-Authenticate", format!("Bearer realm=\"{}\"", at.lock().unwrap())),
        });
        *realm.lock().unwrap() = format!("http://{}/token", fake.host);
        let error = pull(&Bench::new(), &format!("{}/x", fake.host)).await.unwrap_err();
        assert!(error.to_string().contains(word), "{word}: {error}");
    }
    for (bad, word) in [("", "malformed"), ("file:///etc/passwd", "TLS"), ("x", "malformed")] {
        let at = bad.to_owned();
        let fake = Fake::start(move |_| {
            Answer::new(401, "").with("WWW-Authenticate", format!("Bearer realm=\"{at}\""))
        });
        let error = pull(&Bench::new(), &format!("{}/x", fake.host)).await.unwrap_err();
        assert!(error.to_string().contains(word), "{bad}: {error}");
    }
}

#[tokio::test]
async fn redirects_end() {
    let fake =
        Fake::start(|request| Answer::new(302, "").with("Location", format!("{}x", request.path)));
    let error = pull(&Bench::new(), &format!("{}/x", fake.host)).await.unwrap_err();
    assert!(matches!(error, Error::Network { .. }), "{error}");
    assert!(fake.asked().len() < 20);
}

#[tokio::test]
async fn a_pull_that_is_dropped_leaves_nothing() {
    let all = served(&[Tar::new().file("x", vec![3; 1 << 20]).plain()]);
    let fake = Fake::start(move |request| {
        let answer = find(&all, &request.path);
        if answer.body.len() >= 1 << 20 {
            std::thread::sleep(Duration::from_millis(300));
        }
        answer
    });
    let bench = Bench::new();
    let reference = format!("{}/x", fake.host);
    let pulled = tokio::time::timeout(Duration::from_millis(150), pull(&bench, &reference)).await;
    assert!(pulled.is_err());
    bench.assert_untouched();
    pull(&bench, &reference).await.unwrap();
}

#[tokio::test]
async fn plain_http_is_for_this_machine_only() {
    let bench = Bench::new();
    // A name that cannot be found, so nobody is asked; what is asked for would be TLS.
    let error = pull(&bench, "registry.invalid/x").await.unwrap_err();
    assert!(matches!(error, Error::Network { .. }), "{error}");
    let fake = Fake::start(|_| Answer::new(404, ""));
    let tls = options(|options| options.transport = Transport::Tls);
    let reference = format!("{}/x", fake.host);
    let error = bench.store.pull(&reference, &tls, |_| {}).await.unwrap_err();
    assert!(matches!(error, Error::Network { .. }), "{error}");
    assert!(matches!(pull(&bench, "no reference").await, Err(Error::Reference { .. })));
}
