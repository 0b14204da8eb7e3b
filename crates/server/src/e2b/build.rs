//! Builds of templates: a session is made of what the definition begins with, its steps are done
//! in that one after the other, and what it is then is kept for new sandboxes to be copies of. A
//! step that needs a builder of another kind is refused by its name, before anything is done.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use denizen::{Error, VmExecutionGuard};
use denizen_agent::envd::{Job, Piece};
use denizen_api::Code;
use denizen_image::PullOptions;
use futures::StreamExt;
use jiff::Timestamp;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use subtle::ConstantTimeEq;
use tokio::io::AsyncWriteExt;
use tokio::task::JoinHandle;
use uuid::Uuid;

use super::Sandboxes;
use super::record::{Build, Model, Setup, Source, Start};
use super::routes::unsupported;
use super::start::{self, HOME, USER};
use super::store::Kind;
use super::wire::Level;
use crate::api::{Answer, Refused};
use crate::lease::Lease;

/// How many builds are remembered for those who ask how they went, and lines of each.
const REMEMBERED: usize = 100;
const LINES: usize = 10_000;
/// The most bytes of a build's log.
const LOG_BYTES: usize = 4 << 20;
/// The most that the files of one step may have, in bytes, packed.
const FILES: u64 = 8 << 30;
/// For how long files are kept after they were sent, and how many bytes of them.
const KEPT_FOR: Duration = Duration::from_hours(24 * 7);
const KEPT_BYTES: u64 = 16 << 30;
/// How many links for files are good at a time.
const LINKS: usize = 1000;
/// The most that the variables of a template have together: what the kernel takes as one of a
/// program's (`MAX_ARG_STRLEN` in execve(2)).
const ENV_BYTES: usize = 128 << 10;
/// How long one step may take.
const STEP: Duration = Duration::from_hours(1);
/// How long is waited for the output of a start command that has ended.
const LAST_WORDS: Duration = Duration::from_secs(5);
/// What an image of E2B's is called that has nothing of its own: here it is what every session is
/// made of.
const E2B_BASE: &str = "e2bdev/base";

/// Makes the folder `$1`, and gives what had to be made for it to `$2`.
const MAKE_FOLDER: &str = r#"
set -eu
path=${1%/} new=
while [ -n "$path" ] && [ ! -d "$path" ]; do
    new=$path
    path=${path%/*}
done
[ -z "$new" ] || { mkdir -p "$1" && chown -R "$2" "$new"; }
"#;

/// Has login shells, which set `PATH` anew, keep `$1`, which is quoted.
const KEEP_PATH: &str = r#"
set -eu
[ -d /etc/profile.d ] || exit 0
printf 'PATH=%s\nexport PATH\n' "$1" >/etc/profile.d/zz-template.sh
"#;

/// Unpacks what was sent, and puts it where it belongs as `COPY` of a Dockerfile does: of a folder
/// what is in it, to a name that ends in a slash or is a folder's into that, otherwise under the
/// name. Standard input is the archive.
const COPY: &str = r#"
set -eu
source=$1 target=$2 owner=$3 mode=$4 unpack=$5
stage=$(mktemp -d)
trap 'rm -rf "$stage"' EXIT
tar -x $unpack -f - -C "$stage"
[ -z "$mode" ] || chmod -R "$mode" "$stage"
chown -R "$owner" "$stage"
cd "$stage"
made=
into() {
    [ -d "$1" ] || made=$1
    mkdir -p "$1"
    [ -z "$made" ] || chown "$owner" "$made"
}
if [ -d "$source" ]; then
    into "$target"
    cp -a "$source/." "$target/"
elif [ -e "$source" ] || [ -h "$source" ]; then
    case $target in
        */) into "$target" ;;
        *) [ -d "$target" ] || into "$(dirname "$target")" ;;
    esac
    cp -a "$source" "$target"
else
    into "$target"
    # A pattern, of which the client has sent what fits; it may be one that no shell knows.
    IFS=
    set -- $source
    [ -e "$1" ] || set -- ./*
    cp -a "$@" "$target/"
fi
"#;

/// How far a build is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Shown {
    Waiting,
    Building,
    Ready,
    Error,
}

#[derive(Clone, Debug, Serialize)]
struct Line {
    timestamp: Timestamp,
    level: Level,
    message: String,
    step: String,
}

/// Why a build has failed, and at which of its steps.
#[derive(Clone, Debug, Serialize)]
struct Reason {
    message: String,
    step: String,
}

struct Progress {
    tags: Vec<String>,
    template: String,
    status: Shown,
    log: VecDeque<Line>,
    /// How many lines are not there any more.
    lost: usize,
    /// Bytes of those that are.
    bytes: usize,
    reason: Option<Reason>,
}

impl Progress {
    fn line(&mut self, step: &str, level: Level, message: String) {
        self.bytes += message.len();
        while self.log.len() == LINES || self.bytes > LOG_BYTES {
            let Some(lost) = self.log.pop_front() else { break };
            self.bytes -= lost.message.len();
            self.lost += 1;
        }
        let (timestamp, step) = (Timestamp::now(), step.to_owned());
        self.log.push_back(Line { timestamp, level, message, step });
    }
}

/// Builds of this daemon, and files for them.
pub(super) struct Builds {
    files: PathBuf,
    all: Mutex<VecDeque<(Uuid, Arc<Mutex<Progress>>)>>,
    links: Mutex<HashMap<String, String>>,
}

impl Builds {
    pub(super) fn new(files: PathBuf) -> Self {
        let (all, links) = Default::default();
        Self { files, all, links }
    }

    /// Begins a build that is not defined yet.
    pub(super) fn request(&self, template: &str, tags: Vec<String>) -> Answer<Uuid> {
        let (template, status) = (template.to_owned(), Shown::Waiting);
        let (log, lost, bytes, reason) = Default::default();
        let progress = Progress { tags, template, status, log, lost, bytes, reason };
        let mut all = self.all.lock();
        if all.len() == REMEMBERED {
            let done = |(_, it): &(Uuid, Arc<Mutex<Progress>>)| it.lock().status != Shown::Building;
            let oldest = all.iter().position(done).ok_or_else(|| {
                Refused::new(Code::AtCapacity, "too many builds at once: try again later")
            })?;
            all.remove(oldest);
        }
        let id = Uuid::new_v4();
        all.push_back((id, Arc::new(Mutex::new(progress))));
        Ok(id)
    }

    fn find(&self, id: Uuid) -> Option<Arc<Mutex<Progress>>> {
        self.all.lock().iter().find(|(it, _)| *it == id).map(|(_, progress)| progress.clone())
    }

    /// How a build goes, with lines of its log from the given one on.
    pub(super) fn told(&self, id: Uuid, from: usize, most: usize) -> Option<serde_json::Value> {
        let progress = self.find(id)?;
        let progress = progress.lock();
        let from = from.saturating_sub(progress.lost);
        let lines: Vec<_> = progress.log.iter().skip(from).take(most).collect();
        let mut told = serde_json::json!({ "status": progress.status, "logEntries": lines });
        if let Some(reason) = &progress.reason {
            told["reason"] = serde_json::json!({
                "message": reason.message, "step": reason.step, "logEntries": [],
            });
        }
        Some(told)
    }

    /// Where files of that hash are, if they can be any.
    fn place(&self, hash: &str) -> Answer<PathBuf> {
        let hex = hash.len() == 64 && hash.bytes().all(|byte| byte.is_ascii_hexdigit());
        if hex {
            Ok(self.files.join(hash))
        } else {
            Err(Refused::new(Code::BadRequest, "files are named by their SHA-256, in hex"))
        }
    }

    pub(super) fn has(&self, hash: &str) -> bool {
        self.place(hash).is_ok_and(|place| place.exists())
    }

    /// What lets whoever has it send files of that hash.
    pub(super) fn link(&self, hash: &str) -> Answer<String> {
        self.place(hash)?;
        let mut links = self.links.lock();
        if links.len() >= LINKS {
            // They would have been used by now.
            links.retain(|hash, _| !self.has(hash));
        }
        if links.len() >= LINKS {
            return Err(Refused::new(Code::AtCapacity, "too many files are being sent"));
        }
        let new = || Uuid::new_v4().simple().to_string();
        Ok(links.entry(hash.to_owned()).or_insert_with(new).clone())
    }

    /// Takes files in: whole, or not at all.
    pub(super) async fn take_in(&self, hash: &str, token: &str, body: Body) -> Answer<()> {
        let place = self.place(hash)?;
        let known = self.links.lock().get(hash).cloned().unwrap_or_default();
        if known.is_empty() || !bool::from(known.as_bytes().ct_eq(token.as_bytes())) {
            return Err(Refused::new(Code::Forbidden, "this link is not good, or not any more"));
        }
        let failed = |error: std::io::Error| match error.kind() {
            std::io::ErrorKind::StorageFull => Refused::new(Code::NoSpace, error.to_string()),
            _ => Refused::new(Code::Failed, format!("{}: {error}", self.files.display())),
        };
        let new = || {
            std::fs::create_dir_all(&self.files)?;
            tempfile::NamedTempFile::new_in(&self.files)
        };
        if place.exists() {
            // Another build has sent the same; what is there stays.
            let mut body = body.into_data_stream();
            while let Some(piece) = body.next().await {
                piece.map_err(|error| Refused::new(Code::BrokenOff, error.to_string()))?;
            }
            return Ok(());
        }
        let (file, path) = new().map_err(failed)?.into_parts();
        let mut file = tokio::fs::File::from_std(file);
        let mut body = body.into_data_stream();
        let mut bytes = 0;
        while let Some(piece) = body.next().await {
            let piece = piece.map_err(|error| Refused::new(Code::BrokenOff, error.to_string()))?;
            bytes += piece.len() as u64;
            if bytes > FILES {
                let why = format!("the files of a step have {FILES} bytes at most, packed");
                return Err(Refused::new(Code::TooLarge, why));
            }
            file.write_all(&piece).await.map_err(failed)?;
        }
        file.flush().await.map_err(failed)?;
        // What is there by its name is whole, also after a power cut.
        file.sync_all().await.map_err(failed)?;
        // The link stays good: another build may be sending the same, and the first one wins.
        match path.persist_noclobber(place) {
            Err(error) if error.error.kind() != std::io::ErrorKind::AlreadyExists => {
                return Err(failed(error.error));
            }
            _ => {}
        }
        self.tidy();
        Ok(())
    }

    /// Removes files that were not used for long, and the oldest beyond what is kept. What is being
    /// received has another name, and is only left by a daemon that was killed.
    fn tidy(&self) {
        let Ok(all) = std::fs::read_dir(&self.files) else { return };
        let mut all: Vec<_> = all
            .filter_map(|file| {
                let file = file.ok()?;
                let there = file.metadata().ok()?;
                Some((there.modified().ok()?, there.len(), file.path()))
            })
            .collect();
        all.sort_by_key(|(written, ..)| std::cmp::Reverse(*written));
        let mut bytes = 0;
        for (written, size, path) in all {
            bytes += size;
            let is_old = written.elapsed().is_ok_and(|age| age > KEPT_FOR);
            if (is_old || bytes > KEPT_BYTES)
                && let Err(error) = std::fs::remove_file(&path)
            {
                tracing::warn!(path = %path.display(), %error, "old files of builds stay");
            }
        }
    }
}

/// A step, as clients send it.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Step {
    r#type: String,
    #[serde(default)]
    args: Vec<String>,
    files_hash: Option<String>,
}

/// What is to be built.
#[derive(Clone, Debug)]
pub(super) struct NewBuild {
    pub(super) from_image: Option<String>,
    pub(super) from_template: Option<String>,
    pub(super) steps: Vec<Step>,
    pub(super) start: Option<String>,
    pub(super) ready: Option<String>,
}

impl NewBuild {
    /// That all of it can be built here.
    pub(super) fn check(&self) -> Answer<()> {
        if self.from_image.is_some() == self.from_template.is_some() {
            let why =
                "a template begins with either an image (fromImage) or a template (fromTemplate)";
            return Err(Refused::new(Code::BadRequest, why));
        }
        for (number, step) in self.steps.iter().enumerate() {
            let fits = match (step.r#type.as_str(), step.args.len()) {
                ("RUN", 1 | 2) | ("WORKDIR" | "USER", 1) => true,
                ("COPY", 2..=4) => step.files_hash.is_some(),
                ("ENV", count) => count > 0 && count % 2 == 0,
                ("RUN" | "WORKDIR" | "USER" | "COPY", _) => false,
                (other, _) => return Err(unsupported(&format!("steps of the type {other}"))),
            };
            if !fits {
                let kind = &step.r#type;
                let why = format!("step {}: {kind} has other arguments", number + 1);
                return Err(Refused::new(Code::BadRequest, why));
            }
        }
        Ok(())
    }
}

/// A build that goes on.
struct Building {
    all: Arc<Sandboxes>,
    session: Uuid,
    setup: Setup,
    progress: Arc<Mutex<Progress>>,
}

impl Sandboxes {
    /// Begins to build what was requested.
    pub(super) fn begin_build(
        self: Arc<Self>,
        template: String,
        id: Uuid,
        new: NewBuild,
    ) -> Answer<()> {
        let unknown = || Refused::new(Code::UnknownImage, format!("build '{id}' not found"));
        let progress = self.builds.find(id).ok_or_else(unknown)?;
        {
            let mut progress = progress.lock();
            if progress.template != template {
                return Err(unknown());
            }
            if progress.status != Shown::Waiting {
                return Err(Refused::new(Code::BadState, "this build has begun already"));
            }
            progress.status = Shown::Building;
        }
        tokio::spawn(async move {
            let _busy = self.leases.busy();
            let mut step = "base".to_owned();
            let built = self.clone().build(&template, id, new, progress.clone(), &mut step).await;
            let mut progress = progress.lock();
            match built {
                Ok(()) => {
                    progress.line("finalize", Level::Info, "Build finished".to_owned());
                    progress.status = Shown::Ready;
                }
                Err(Refused(problem, _)) => {
                    progress.line(&step, Level::Error, problem.detail.clone());
                    progress.reason = Some(Reason { message: problem.detail, step });
                    progress.status = Shown::Error;
                }
            }
        });
        Ok(())
    }

    async fn build(
        self: Arc<Self>,
        template: &str,
        id: Uuid,
        new: NewBuild,
        progress: Arc<Mutex<Progress>>,
        step: &mut String,
    ) -> Answer<()> {
        let from = new.from_template.as_deref().or(new.from_image.as_deref()).unwrap_or_default();
        progress.lock().line(step, Level::Info, format!("FROM {from}"));
        let model = match new.from_template {
            Some(name) => self.model(&name).await?,
            None => self.model_of_image(from).await?,
        };
        let session = match model.source {
            Source::Session(of) => self.pool.fork(of).await?,
            Source::Root | Source::Image(_) => Uuid::new_v4(),
        };
        let key = session.to_string();
        // If the daemon is killed meanwhile, the next one removes it.
        let unfinished = key.clone();
        self.stored(move |store| store.save(Kind::Unfinished, &unfinished, &session)).await?;
        let mut building =
            Building { all: self.clone(), session, setup: model.setup, progress: progress.clone() };
        let built = building.run(&model.source, &new.steps, new.start, new.ready, step).await;
        let tags = progress.lock().tags.clone();
        let kept = match built {
            Ok(setup) => {
                let (source, made_at) = (Source::Session(session), Timestamp::now());
                let build = Build { source, setup, made_at };
                self.clone().add_build(template.to_owned(), id, build, tags).await
            }
            Err(refused) => Err(refused),
        };
        match kept {
            // If that fails, the next daemon sees that a template is made of it.
            Ok(()) => self.stored(move |store| store.forget(Kind::Unfinished, &key)).await,
            Err(refused) => {
                self.remove_unfinished(session).await;
                Err(refused)
            }
        }
    }

    /// What a build begins with that names an image, which is brought if it is not there.
    async fn model_of_image(&self, image: &str) -> Answer<Model> {
        let setup = self.plain_setup()?;
        let template = image.to_owned();
        let model = |source| Model { template, alias: None, source, setup, goes_on: false };
        if image.split(':').next() == Some(E2B_BASE) {
            return Ok(model(Source::Root));
        }
        let known = match self.pool.image(image).await {
            Err(Error::Image(denizen_image::Error::NotFound { .. })) => {
                self.pool.pull_image(image, &PullOptions::default(), |_| {}).await
            }
            known => known,
        };
        Ok(model(Source::Image(known?.name)))
    }

    /// Removes what builds of a daemon that was killed have left.
    pub(crate) async fn tidy(self: Arc<Self>) {
        self.builds.tidy();
        let Ok(unfinished) = self.store.all::<Uuid>(Kind::Unfinished) else { return };
        for session in unfinished {
            self.remove_unfinished(session).await;
        }
    }

    /// Removes a session that no template is made of, now or by the next daemon.
    pub(super) async fn remove_unfinished(&self, session: Uuid) {
        self.leases.unset_defaults(session);
        if !self.is_of_template(session) {
            match self.leases.remove(session).await {
                Ok(()) | Err(Error::Unknown { .. }) => {}
                Err(error) => {
                    tracing::warn!(%session, %error, "the files of a build that is gone stay");
                    return;
                }
            }
        }
        let key = session.to_string();
        // If it stays, it is tried again by the next daemon.
        let _ = self.stored(move |store| store.forget(Kind::Unfinished, &key)).await;
    }
}

/// Tells what a start command prints, until it ends.
async fn tell(job: Arc<Job>, progress: Arc<Mutex<Progress>>, name: String) {
    let Some(pieces) = job.read(0) else { return };
    let mut pieces = std::pin::pin!(pieces);
    let (mut out, mut err) = (Lines::default(), Lines::default());
    let line = |from: &str, text: String| {
        progress.lock().line(&name, Level::Info, format!("[start] [{from}]: {text}"));
    };
    while let Some(piece) = pieces.next().await {
        let Piece::Output { chunk, .. } = piece else { continue };
        match chunk.stream {
            denizen_agent::Stream::Stderr => err.take(&chunk.bytes, |text| line("stderr", text)),
            _ => out.take(&chunk.bytes, |text| line("stdout", text)),
        }
    }
    out.finish(|text| line("stdout", text));
    err.finish(|text| line("stderr", text));
}

impl Building {
    fn line(&self, step: &str, message: String) {
        self.progress.lock().line(step, Level::Info, message);
    }

    /// Does all steps, and gives what sandboxes begin with.
    async fn run(
        &mut self,
        source: &Source,
        steps: &[Step],
        start: Option<String>,
        ready: Option<String>,
        name: &mut String,
    ) -> Answer<Setup> {
        let image = match source {
            Source::Image(image) => Some(image.as_str()),
            _ => None,
        };
        let lease = self.all.leases.take(self.session, image).await?;
        if !start::prepare(&lease, self.all.pool.isolation()?).await? {
            (self.setup.user, self.setup.workdir) = (None, None);
        }
        drop(lease);
        for (number, step) in steps.iter().enumerate() {
            *name = (number + 1).to_string();
            self.line(
                name,
                format!("[{name}/{}] {} {}", steps.len(), step.r#type, step.args.join(" ")),
            );
            // Each has what the ones before it have changed.
            let lease = self.lease().await?;
            tokio::select! {
                done = self.step(&lease, step, name) => done?,
                () = lease.ended() => return Err(Refused::stopped()),
            }
        }
        "finalize".clone_into(name);
        let mut started = None;
        if start.is_some() || ready.is_some() {
            let line = start.unwrap_or_else(|| "sleep infinity".to_owned());
            let lease = self.lease().await?;
            started = Some(tokio::select! {
                told = self.try_start(&lease, &line, ready.as_deref(), name) => told?,
                () = lease.ended() => return Err(Refused::stopped()),
            });
            self.setup.start = Some(Start::Command { line, ready });
        }
        drop(self.all.leases.stop(self.session, true).await?);
        if let Some(told) = started {
            // It has ended now, and nothing more comes of it.
            let _ = tokio::time::timeout(LAST_WORDS, told).await;
        }
        self.all.leases.unset_defaults(self.session);
        Ok(self.setup.clone())
    }

    /// Starts what sandboxes will run from their start on, and waits until it is ready. What is
    /// returned ends when all is told that it has printed, which is after its end.
    async fn try_start(
        &self,
        lease: &Arc<Lease>,
        line: &str,
        ready: Option<&str>,
        name: &str,
    ) -> Answer<JoinHandle<()>> {
        self.line(name, format!("Running start command: {line}"));
        let instance = lease.clone().instance(&axum::http::HeaderMap::new())?;
        let job = denizen_agent::envd::start_detached(&instance, start::shell(line), None).await?;
        let told = tokio::spawn(tell(job.clone(), self.progress.clone(), name.to_owned()));
        let Some(ready) = ready else { return Ok(told) };
        self.line(name, format!("Waiting for template to be ready: {ready}"));
        if let Err(refused) = start::wait(&instance, ready, &job).await {
            if job.info().ended.is_some() {
                // The reason may be in what it has printed.
                let _ = tokio::time::timeout(LAST_WORDS, told).await;
            }
            return Err(refused);
        }
        self.line(name, "Template is ready".to_owned());
        Ok(told)
    }

    /// The session, with what its commands have by now.
    async fn lease(&self) -> Answer<Arc<Lease>> {
        let Setup { env, user, workdir, .. } = self.setup.clone();
        let defaults = crate::lease::Defaults { env, user, workdir };
        self.all.leases.set_defaults(self.session, defaults);
        Ok(self.all.leases.take(self.session, None).await?)
    }

    fn user(&self) -> &str {
        self.setup.user.as_deref().unwrap_or("root")
    }

    async fn step(&mut self, lease: &Arc<Lease>, step: &Step, name: &str) -> Answer<()> {
        let argument = |number: usize| step.args.get(number).map_or("", String::as_str);
        match step.r#type.as_str() {
            "ENV" => {
                // Each means what is set before this step, not in it (Dockerfile reference).
                let mut set = Vec::new();
                for pair in step.args.chunks_exact(2) {
                    set.push((pair[0].clone(), self.expanded(&lease.guard, &pair[1]).await?));
                }
                if let Some((_, path)) = set.iter().find(|(name, _)| name == "PATH") {
                    let quoted = format!("'{}'", path.replace('\'', r"'\''"));
                    self.as_root(&lease.guard, KEEP_PATH, &[&quoted], None, name).await?;
                }
                self.setup.env.extend(set);
                Ok(())
            }
            "USER" => {
                if is_new_users(argument(0)) {
                    start::make_user(lease, argument(0)).await?;
                }
                let mut instance = lease.clone().instance(&axum::http::HeaderMap::new())?;
                instance.default_user = Some(argument(0).to_owned());
                // One that cannot be had is found out here, and not by who uses the template.
                start::run(&instance, start::shell("true"), Some(STEP), |_, _| {}).await?;
                self.setup.user = Some(argument(0).to_owned());
                if self.setup.workdir.as_deref() == Some("/") && argument(0) == USER {
                    self.setup.workdir = Some(HOME.to_owned());
                }
                Ok(())
            }
            "WORKDIR" => {
                let folder = self.resolved(argument(0));
                let owner = format!("{}:", self.user());
                self.as_root(&lease.guard, MAKE_FOLDER, &[&folder, &owner], None, name).await?;
                self.setup.workdir = Some(folder);
                Ok(())
            }
            "RUN" => {
                let line = argument(0);
                let mut instance = lease.clone().instance(&axum::http::HeaderMap::new())?;
                if !argument(1).is_empty() {
                    instance.default_user = Some(argument(1).to_owned());
                }
                let mut lines = Lines::default();
                let ran = start::run(&instance, start::shell(line), Some(STEP), |bytes, _| {
                    lines.take(bytes, |text| self.line(name, text));
                });
                let ran = ran.await;
                lines.finish(|text| self.line(name, text));
                let why = match ran {
                    Ok(exit) if exit.success() => return Ok(()),
                    Ok(exit) => format!("exit status {}", exit.code()),
                    Err(Refused(problem, _)) => format!("command failed: {}", problem.detail),
                };
                Err(Refused::new(Code::Failed, format!("failed to run command '{line}': {why}")))
            }
            // It is one of those that were let in.
            _ => {
                let hash = step.files_hash.as_deref().unwrap_or_default();
                let files = self.all.builds.place(hash)?;
                let mut target = self.resolved(argument(1));
                if argument(1).ends_with('/') && !target.ends_with('/') {
                    target.push('/');
                }
                let owner = match argument(2) {
                    "" => self.user(),
                    owner => owner,
                };
                let owner =
                    if owner.contains(':') { owner.to_owned() } else { format!("{owner}:") };
                let unpack = if is_gzip(&files).await? { "-z" } else { "" };
                let arguments = [argument(0), &target, &owner, argument(3), unpack];
                self.as_root(&lease.guard, COPY, &arguments, Some(&files), name).await
            }
        }
    }

    /// A value as `ENV` has it: what is set so far in the place of names, and what commands have by
    /// themselves.
    async fn expanded(&self, guard: &VmExecutionGuard, value: &str) -> Answer<String> {
        let mut known = self.setup.env.clone();
        for name in names_in(value) {
            if known.contains_key(&name) {
                continue;
            }
            // Not by a login shell: what that says is not the image's.
            let say = format!("printf %s \"${name}\"");
            let said = guard.program("/bin/sh").args(["-c", &say]).timeout(STEP).output().await?;
            known.insert(name, String::from_utf8_lossy(&said.stdout).into_owned());
        }
        let expanded = expand(value, &known);
        let all: usize = self.setup.env.iter().map(|(name, value)| name.len() + value.len()).sum();
        match expanded {
            Some(value) if all + value.len() <= ENV_BYTES => Ok(value),
            _ => {
                let why = format!("the variables of a template have {ENV_BYTES} bytes at most");
                Err(Refused::new(Code::TooLarge, why))
            }
        }
    }

    /// A path as steps write it: from the working folder, if it is not from the root.
    fn resolved(&self, path: &str) -> String {
        let home = path.strip_prefix("~/").map(|rest| Path::new(HOME).join(rest));
        let workdir = Path::new(self.setup.workdir.as_deref().unwrap_or("/"));
        home.unwrap_or_else(|| workdir.join(path)).to_string_lossy().into_owned()
    }

    /// Runs a script of ours as root.
    async fn as_root(
        &self,
        guard: &VmExecutionGuard,
        script: &str,
        arguments: &[&str],
        input: Option<&Path>,
        name: &str,
    ) -> Answer<()> {
        let command = guard.program("/bin/sh").args(["-c", script, "sh"]);
        let command = command.args(arguments.iter().map(|it| (*it).to_owned()));
        let mut running = command.piped_stdin().spawn().await?;
        let stdin = running.stdin();
        let feed = async {
            let (Some(mut stdin), Some(input)) = (stdin, input) else { return Ok(()) };
            let mut input = tokio::fs::File::open(input).await?;
            match tokio::io::copy(&mut input, &mut stdin).await {
                // The script says itself why it has not read all.
                Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
                copied => copied.map(drop),
            }
        };
        let mut lines = Lines::default();
        let mut last = String::new();
        let read = async {
            while let Some(chunk) = running.next().await? {
                lines.take(&chunk.bytes, |text| {
                    self.line(name, text.clone());
                    last = text;
                });
            }
            running.wait().await
        };
        let (fed, exit) = futures::join!(feed, read);
        let exit = exit?;
        if let Err(error) = fed {
            let detail = format!("the files of this step were not sent, or are gone: {error}");
            return Err(Refused::new(Code::Failed, detail));
        }
        if exit.success() {
            return Ok(());
        }
        Err(Refused::new(Code::Failed, format!("step {name} has failed: {last}")))
    }
}

/// Whether a user of that name may be made: of such letters as useradd(8) takes.
fn is_new_users(name: &str) -> bool {
    let mut letters = name.bytes();
    letters.next().is_some_and(|first| first.is_ascii_lowercase() || first == b'_')
        && name.len() <= 32
        && letters.all(|it| it.is_ascii_lowercase() || it.is_ascii_digit() || b"_-".contains(&it))
}

/// The parts of a value with names in it, as an `ENV` of a Dockerfile has them.
enum Part<'v> {
    Text(&'v str),
    /// `$name`, `${name}`, `${name:-word}` and `${name:+word}`.
    Name {
        name: &'v str,
        instead: Option<(char, &'v str)>,
    },
}

fn parts(value: &str) -> Vec<Part<'_>> {
    let end_of = |text: &str| {
        text.find(|it: char| !it.is_ascii_alphanumeric() && it != '_').unwrap_or(text.len())
    };
    let mut parts = Vec::new();
    let mut rest = value;
    while let Some(at) = rest.find(['$', '\\']) {
        parts.push(Part::Text(&rest[..at]));
        let after = &rest[at + 1..];
        if rest[at..].starts_with('\\') {
            // Only before a dollar it says that this is one.
            let (text, next) = match after.strip_prefix('$') {
                Some(next) => ("$", next),
                None => ("\\", after),
            };
            parts.push(Part::Text(text));
            rest = next;
            continue;
        }
        if let Some(inner) = after.strip_prefix('{').and_then(|it| it.split_once('}')) {
            let (inner, next) = inner;
            let (name, more) = inner.split_at(end_of(inner));
            let instead = match more.strip_prefix(':').and_then(|it| it.split_at_checked(1)) {
                Some(("-", word)) => Some(('-', word)),
                Some(("+", word)) => Some(('+', word)),
                _ => None,
            };
            parts.push(Part::Name { name, instead });
            rest = next;
            continue;
        }
        let (name, next) = after.split_at(end_of(after));
        parts.push(if name.is_empty() {
            Part::Text("$")
        } else {
            Part::Name { name, instead: None }
        });
        rest = next;
    }
    parts.push(Part::Text(rest));
    parts
}

/// The names in a value.
fn names_in(value: &str) -> Vec<String> {
    let name = |part| match part {
        Part::Name { name, .. } if !name.is_empty() => Some(name.to_owned()),
        _ => None,
    };
    parts(value).into_iter().filter_map(name).collect()
}

/// A value with what is known in the place of names; none if that is too long.
fn expand(value: &str, known: &BTreeMap<String, String>) -> Option<String> {
    let mut expanded = String::new();
    for part in parts(value) {
        expanded.push_str(match part {
            Part::Text(text) => text,
            Part::Name { name, instead } => {
                let found = known.get(name).map_or("", String::as_str);
                match instead {
                    Some(('-', word)) if found.is_empty() => word,
                    Some(('+', word)) if !found.is_empty() => word,
                    Some(('+', _)) => "",
                    _ => found,
                }
            }
        });
        if expanded.len() > ENV_BYTES {
            return None;
        }
    }
    Some(expanded)
}

async fn is_gzip(file: &Path) -> Answer<bool> {
    use tokio::io::AsyncReadExt;
    let gone = |error: std::io::Error| {
        Refused::new(Code::Failed, format!("the files of this step were not sent: {error}"))
    };
    let mut file = tokio::fs::File::open(file).await.map_err(gone)?;
    let mut magic = [0; 2];
    Ok(file.read_exact(&mut magic).await.is_ok() && magic == [0x1f, 0x8b])
}

/// Output in lines.
#[derive(Default)]
struct Lines(Vec<u8>);

impl Lines {
    /// The longest that is waited for the end of.
    const LONGEST: usize = 16 * 1024;

    fn take(&mut self, bytes: &[u8], mut each: impl FnMut(String)) {
        for piece in bytes.split_inclusive(|byte| *byte == b'\n') {
            self.0.extend_from_slice(piece);
            if piece.ends_with(b"\n") {
                let line = std::mem::take(&mut self.0);
                each(String::from_utf8_lossy(line.trim_ascii_end()).into_owned());
            }
        }
        if self.0.len() > Self::LONGEST {
            self.finish(each);
        }
    }

    fn finish(&mut self, mut each: impl FnMut(String)) {
        let rest = std::mem::take(&mut self.0);
        if !rest.is_empty() {
            each(String::from_utf8_lossy(rest.trim_ascii_end()).into_owned());
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn output_is_told_in_lines_however_it_comes() {
        let mut told = Vec::new();
        let mut lines = Lines::default();
        for piece in ["a", "b\nc\r", "\n\n", "d"] {
            lines.take(piece.as_bytes(), |line| told.push(line));
        }
        lines.finish(|line| told.push(line));
        lines.finish(|line| told.push(line));
        assert_eq!(told, ["ab", "c", "", "d"]);
        lines.take(&vec![b'x'; Lines::LONGEST + 1], |line| told.push(line));
        assert_eq!(told.last().unwrap().len(), Lines::LONGEST + 1);
    }

    #[test]
    fn values_have_what_is_set_before_them() {
        let known = [("A", "1"), ("PATH", "/bin"), ("EMPTY", "")];
        let known = known.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
        for (value, wanted) in [
            ("", ""),
            ("plain", "plain"),
            ("$A", "1"),
            ("/opt:$PATH", "/opt:/bin"),
            ("${PATH}:/opt", "/bin:/opt"),
            ("$A$A-$A.b", "11-1.b"),
            ("$NONE|${NONE}", "|"),
            ("${NONE:-word}${EMPTY:-word}${A:-word}", "wordword1"),
            ("${NONE:+word}${A:+word}", "word"),
            (r"\$A \\ \n", r"$A \\ \n"),
            ("100$ $", "100$ $"),
            ("${A", "${A"),
            ("$1", ""),
            ("ü$Aü", "ü1ü"),
        ] {
            assert_eq!(expand(value, &known).as_deref(), Some(wanted), "{value}");
        }
        let long = [("L".to_owned(), "x".repeat(ENV_BYTES / 2))].into();
        assert!(expand("$L$L", &long).is_some() && expand("$L$L$L", &long).is_none());
        assert_eq!(names_in("$A${B:-c}$"), ["A", "B"]);
        for (name, good) in
            [("app", true), ("_a-1", true), ("", false), ("1a", false), ("a;b", false)]
        {
            assert_eq!(is_new_users(name), good, "{name}");
        }
    }

    #[test]
    fn what_needs_another_builder_is_refused_by_its_name() {
        let step = |kind: &str, args: &[&str], hash: Option<&str>| Step {
            r#type: kind.to_owned(),
            args: args.iter().map(|it| (*it).to_owned()).collect(),
            files_hash: hash.map(str::to_owned),
        };
        let build = |step: Step| NewBuild {
            from_image: Some("a".to_owned()),
            from_template: None,
            steps: vec![step],
            start: None,
            ready: None,
        };
        for good in [
            step("RUN", &["true"], None),
            step("RUN", &["true", "root"], None),
            step("COPY", &["a", "b"], Some("00")),
            step("ENV", &["a", "b", "c", "d"], None),
        ] {
            build(good).check().unwrap();
        }
        for (bad, code) in [
            (step("HEALTHCHECK", &["x"], None), Code::Unsupported),
            (step("COPY", &["a", "b"], None), Code::BadRequest),
            (step("ENV", &["a"], None), Code::BadRequest),
            (step("RUN", &[], None), Code::BadRequest),
        ] {
            assert_eq!(build(bad).check().unwrap_err().0.code, code);
        }
        let mut neither = build(step("RUN", &["true"], None));
        neither.from_image = None;
        assert_eq!(neither.check().unwrap_err().0.code, Code::BadRequest);
    }
}
