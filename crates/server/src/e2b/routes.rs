//! Requests about sandboxes, and their answers.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::extract::{FromRequestParts, Path as UriPath, Request, State};
use axum::http::request::Parts;
use axum::http::{HeaderMap, StatusCode};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post, put};
use axum::{Extension, Router};
use denizen::{Isolation, Limits, Mount};
use denizen_api::{Code, Problem};
use jiff::Timestamp;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use uuid::Uuid;

use super::record::{self, Model, OnTimeout, Sandbox, Source};
use super::told::{Told, reads_pages};
use super::wire::{self, Level, Network, Seconds, State as Shown};
use super::{Entry, Sandboxes, templates, traffic, volumes};
use crate::access::guard::SANDBOX;
use crate::access::tokens::LONGEST_LIFE;
use crate::access::{Access, Caller};
use crate::api::extract::{Json, Query};
use crate::api::{Answer, Refused, Repeats};

/// What handlers have.
#[derive(Clone)]
pub(crate) struct E2b {
    pub(super) all: Arc<Sandboxes>,
    pub(super) access: Arc<Access>,
    repeats: Arc<Repeats>,
}

impl E2b {
    pub(crate) fn new(all: Arc<Sandboxes>, access: Arc<Access>) -> Self {
        Self { all, access, repeats: Arc::default() }
    }
}

/// The most sandboxes in one part of a list.
const PAGE: usize = 100;
/// What clients know that there is nothing to be woken by.
const NO_SNAPSHOT: &str = "Sandbox can't be resumed, no snapshot found";
/// The most forks that are made at once.
const FORKS: usize = 100;

/// All routes.
pub(crate) fn router(e2b: E2b) -> Router {
    Router::new()
        .route("/sandboxes", post(create_v1).get(list_running))
        .route("/v2/sandboxes", post(create).get(list))
        .route("/sandboxes/metrics", get(metrics_of_some))
        .route("/sandboxes/{sandbox}", get(inspect).delete(kill))
        .route("/sandboxes/{sandbox}/pause", post(pause))
        .route("/sandboxes/{sandbox}/resume", post(resume))
        .route("/sandboxes/{sandbox}/connect", post(connect))
        .route("/v2/sandboxes/{sandbox}/connect", post(connect))
        .route("/sandboxes/{sandbox}/timeout", post(set_timeout))
        .route("/sandboxes/{sandbox}/refreshes", post(refresh))
        .route("/sandboxes/{sandbox}/fork", post(fork))
        .route("/sandboxes/{sandbox}/snapshots", post(snapshot))
        .route("/sandboxes/{sandbox}/metrics", get(metrics))
        .route("/sandboxes/{sandbox}/logs", get(logs_v1))
        .route("/v2/sandboxes/{sandbox}/logs", get(logs))
        .route("/sandboxes/{sandbox}/network", put(set_network))
        .route("/snapshots", get(templates::snapshots))
        .route("/templates", get(templates::list))
        .route("/v2/templates", get(templates::list_in_parts))
        .route("/default-templates", get(templates::defaults))
        .route("/v3/templates", post(templates::request_build))
        .route("/templates/aliases/{alias}", get(templates::by_alias))
        .route("/templates/tags", post(templates::tag).delete(templates::untag))
        .route(
            "/templates/{template}",
            get(templates::inspect).delete(templates::remove).patch(templates::update),
        )
        .route("/v2/templates/{template}", axum::routing::patch(templates::update))
        .route("/templates/{template}/tags", get(templates::tags))
        .route("/templates/{template}/files/{hash}", get(templates::upload_link))
        .route("/templates/{template}/files/{hash}/content", put(templates::upload))
        .route("/v2/templates/{template}/builds/{build}", post(templates::start_build))
        .route("/templates/{template}/builds/{build}/status", get(templates::status))
        .route("/templates/{template}/builds/{build}/logs", get(templates::logs))
        .route("/secrets", get(refused).post(refused))
        .route("/secrets/{secret}", get(refused).post(refused).delete(refused))
        .merge(volumes::router())
        .with_state(e2b)
}

/// Words refusals as E2B's clients read them, where the request is one of theirs.
pub(crate) async fn worded(request: Request, next: Next) -> Response {
    let visit = request.extensions().get::<super::Visit>().copied();
    let theirs = wire::is_ours(request.uri().path()) || request.headers().contains_key(SANDBOX);
    let on_page = reads_pages(request.headers());
    let answer = next.run(request).await;
    let known = answer.extensions();
    let told = match (known.get::<Told>(), known.get::<Problem>(), visit) {
        (Some(told), ..) => Some(told.clone()),
        (None, Some(problem), Some(visit)) => Some(Told::refused(visit, problem)),
        _ => None,
    };
    let mut worded = match (told, known.get::<Problem>()) {
        (Some(told), _) if on_page => told.page(),
        (Some(told), _) => told.into_response(),
        (None, Some(problem)) if theirs => {
            let body = serde_json::json!({ "code": problem.status, "message": problem.detail });
            (answer.status(), axum::Json(body)).into_response()
        }
        _ => return answer,
    };
    for (name, value) in answer.headers() {
        if !worded.headers().contains_key(name) {
            worded.headers_mut().insert(name, value.clone());
        }
    }
    *worded.extensions_mut() = answer.extensions().clone();
    worded
}

async fn refused() -> Refused {
    unsupported("secrets: give them to a sandbox as variables (envs)")
}

/// A refusal that says what is not had here.
pub(super) fn unsupported(what: &str) -> Refused {
    Refused::new(Code::Unsupported, format!("denizen does not have {what}"))
}

/// How many processors a sandbox may use.
pub(super) fn processors(limits: &Limits) -> u32 {
    let of_host = || std::thread::available_parallelism().map_or(1, usize::from);
    let whole = limits.cpu_percent.map(|percent| percent.div_ceil(100).max(1));
    whole.unwrap_or_else(|| u32::try_from(of_host()).unwrap_or(u32::MAX))
}

/// How many bytes of memory a sandbox may use.
pub(super) fn memory(limits: &Limits, isolation: Isolation) -> u64 {
    let of_host = || Limits::default().memory_bytes.unwrap_or_default() * 2;
    match isolation {
        Isolation::MicroVm => limits.guest_memory(),
        _ => limits.memory_bytes.unwrap_or_else(of_host),
    }
}

fn mebibytes(bytes: u64) -> u32 {
    u32::try_from(bytes >> 20).unwrap_or(u32::MAX)
}

/// Does something to its end, also if its client goes away half-way.
pub(super) async fn to_the_end<T: Send + 'static>(
    work: impl Future<Output = Answer<T>> + Send + 'static,
) -> Answer<T> {
    let done = tokio::spawn(work).await;
    done.unwrap_or_else(|error| {
        Err(Refused::new(Code::Failed, format!("the request was given up: {error}")))
    })
}

impl E2b {
    /// The sandbox of that id, if the caller may know of it and it is not about to be ended.
    fn get(&self, caller: &Caller, sandbox: &str) -> Answer<Arc<Entry>> {
        let entry = self.find(caller, sandbox)?;
        if entry.is_over(self.all.now()) {
            return Err(super::not_found(sandbox));
        }
        Ok(entry)
    }

    /// The same, also if it is.
    fn find(&self, caller: &Caller, sandbox: &str) -> Answer<Arc<Entry>> {
        let id = traffic::id(sandbox).map(|id| id.to_string());
        let entry = self.all.get(id.as_deref().unwrap_or(sandbox));
        let entry = entry.map_err(|_| super::not_found(sandbox))?;
        if !self.sees(caller, &entry) {
            return Err(super::not_found(sandbox));
        }
        Ok(entry)
    }

    fn sees(&self, caller: &Caller, entry: &Entry) -> bool {
        if caller.is_token() {
            // It would be told one that lives longer than its own.
            return false;
        }
        let id = entry.kept.lock().id;
        let name = || self.all.pool.inspect(id).ok().and_then(|session| session.name);
        // Most callers see it whatever it is called.
        caller.sees(id, None) || caller.sees(id, name().as_deref())
    }

    fn domain(&self) -> Option<String> {
        self.access.front().domain.clone()
    }

    /// A sandbox as whoever uses it is told of it.
    fn told(&self, kept: Sandbox) -> wire::Sandbox {
        wire::Sandbox {
            template_id: kept.template,
            id: kept.id.simple().to_string(),
            alias: kept.alias,
            client_id: wire::CLIENT,
            envd_version: wire::ENVD_VERSION,
            envd_access_token: kept.token,
            traffic_access_token: kept.traffic_token,
            domain: self.domain(),
        }
    }

    fn listed(&self, kept: &Sandbox) -> Answer<wire::Listed> {
        let (pool, limits) = (&self.all.pool, self.all.pool.limits()?);
        let memory = memory(&limits, pool.isolation()?);
        Ok(wire::Listed {
            template_id: kept.template.clone(),
            id: kept.id.simple().to_string(),
            alias: kept.alias.clone(),
            client_id: wire::CLIENT,
            started_at: kept.started_at,
            end_at: kept.end_at,
            cpu_count: processors(&limits),
            memory_mb: mebibytes(memory),
            disk_size_mb: mebibytes(limits.disk_bytes.unwrap_or_default()),
            state: if kept.paused.is_some() { Shown::Paused } else { Shown::Running },
            envd_version: wire::ENVD_VERSION,
            metadata: kept.metadata.clone(),
            volume_mounts: kept.volume_mounts.clone(),
        })
    }

    /// A token for a sandbox or a volume, in its maker's name. Whoever connects when it is void gets
    /// another.
    pub(super) fn token(&self, caller: &Caller, id: Uuid) -> String {
        let most = Timestamp::now().checked_add(LONGEST_LIFE).unwrap_or(Timestamp::MAX);
        let expires = caller.expires().map_or(most, |at| at.min(most));
        self.access.keys.token(id, caller.key(), expires)
    }

    /// A sandbox's token is good for whoever may connect to it: if the one that it had is void,
    /// it has another from then on.
    async fn renew(&self, caller: &Caller, entry: &Arc<Entry>) -> Answer<()> {
        let _turn = entry.turn.lock().await;
        let kept = entry.kept();
        if self.access.keys.read_token(&kept.token).is_some() {
            return Ok(());
        }
        let token = self.token(caller, kept.id);
        self.all.change(entry, |kept| kept.token = token).await
    }

    /// Makes a session of a template's files, and gives its id.
    async fn session(&self, caller: &Caller, model: &mut Model) -> Answer<Uuid> {
        let (pool, leases) = (&self.all.pool, &self.all.leases);
        let image = match &model.source {
            Source::Session(of) => {
                caller.makes_nameless()?;
                return Ok(pool.fork(*of).await?);
            }
            Source::Image(image) => Some(image.as_str()),
            Source::Root => None,
        };
        let id = if let Some(name) = caller.name_for_new() {
            leases.find_or_name(&name).await?
        } else {
            caller.makes_nameless()?;
            Uuid::new_v4()
        };
        let made = async {
            let lease = leases.take(id, image).await?;
            super::start::prepare(&lease, pool.isolation()?).await
        };
        match made.await {
            Ok(true) => {}
            // Whoever it is there, it is at home.
            Ok(false) => (model.setup.user, model.setup.workdir) = (None, None),
            Err(refused) => {
                self.give_up(id).await;
                return Err(refused);
            }
        }
        Ok(id)
    }

    /// Removes what was made of a sandbox that is not to be.
    async fn give_up(&self, id: Uuid) {
        if let Err(error) = self.all.leases.remove(id).await
            && !matches!(error, denizen::Error::Unknown { .. })
        {
            tracing::warn!(session = %id, %error, "a sandbox that was not made has left a session");
        }
    }

    /// Makes a sandbox of a session that was just made for it, in which there may go on what it runs
    /// from its start on.
    async fn settle(&self, kept: Sandbox, mounts: Vec<Mount>, goes_on: bool) -> Answer<Arc<Entry>> {
        let id = kept.id;
        let settled = async {
            let egress = traffic::egress(&kept.network, kept.allow_internet_access)?;
            // What it was made of may have had other rules.
            self.all.pool.set_egress(id, egress).await?;
            self.mount(id, mounts).await?;
            self.all.save(&kept).await?;
            self.all.leases.set_defaults(id, super::defaults(&kept));
            let entry = Arc::new(Entry::new(kept, goes_on));
            self.all.all.write().insert(id, entry.clone());
            self.all.start(&entry).await?;
            Ok(entry)
        };
        match settled.await {
            Ok(entry) => {
                entry.note(Level::Info, "created");
                self.all.sooner.notify_one();
                Ok(entry)
            }
            Err(refused) => {
                self.all.forget(id);
                self.give_up(id).await;
                Err(refused)
            }
        }
    }

    async fn make(
        self,
        caller: Caller,
        new: wire::NewSandbox,
        timeout: u64,
    ) -> Answer<wire::Sandbox> {
        supported(&new)?;
        let network = new.network.unwrap_or_default();
        traffic::check(&network)?;
        traffic::egress(&network, new.allow_internet_access)?;
        let mounts = self.mounts(&caller, &new.volume_mounts).await?;
        let mut model = self.all.model(&new.template_id).await?;
        let id = self.session(&caller, &mut model).await?;
        let Model { template, alias, mut setup, goes_on, .. } = model;
        setup.env.extend(new.env_vars.unwrap_or_default());
        let now = self.all.now();
        let kept = Sandbox {
            id,
            template,
            alias,
            metadata: new.metadata.unwrap_or_default(),
            started_at: now,
            end_at: record::after(now, timeout),
            on_timeout: if new.auto_pause { OnTimeout::Pause } else { OnTimeout::Kill },
            keeps_memory: new.auto_pause_memory.unwrap_or(true),
            auto_resume: new.auto_resume.is_some_and(|resume| resume.enabled),
            paused: None,
            token: self.token(&caller, id),
            traffic_token: traffic::token(&network),
            network,
            allow_internet_access: new.allow_internet_access,
            volume_mounts: new.volume_mounts,
            setup,
        };
        let entry = self.settle(kept, mounts, goes_on).await?;
        Ok(self.told(entry.kept()))
    }

    async fn fork_one(
        &self,
        caller: &Caller,
        of: &Sandbox,
        end_at: Timestamp,
    ) -> Answer<wire::Sandbox> {
        // A machine's copy has its memory.
        let goes_on = self.all.pool.isolation()? == Isolation::MicroVm;
        let id = self.all.pool.fork(of.id).await?;
        let kept = Sandbox {
            id,
            started_at: self.all.now(),
            end_at,
            paused: None,
            token: self.token(caller, id),
            traffic_token: traffic::token(&of.network),
            ..of.clone()
        };
        let mounts = self.all.pool.mounts(id)?;
        let entry = self.settle(kept, mounts, goes_on).await?;
        Ok(self.told(entry.kept()))
    }
}

/// Refuses by its name what is asked for and not had here.
fn supported(new: &wire::NewSandbox) -> Answer<()> {
    let tokens = new.iam.as_ref().and_then(|iam| iam.get("tokens")?.as_object());
    if tokens.is_some_and(|tokens| !tokens.is_empty()) {
        return Err(unsupported("workload identities (iam)"));
    }
    let wakes = new.auto_resume.as_ref().is_some_and(|resume| resume.enabled);
    if wakes && new.auto_pause && new.auto_pause_memory == Some(false) {
        let why =
            "what is paused without its memory does not resume by itself: leave autoResume out";
        return Err(Refused::new(Code::BadRequest, why));
    }
    if new.auto_pause_memory == Some(false) && !new.auto_pause {
        let why = "autoPauseMemory says how it is paused at its end (autoPause), and it is not";
        return Err(Refused::new(Code::BadRequest, why));
    }
    Ok(())
}

async fn create_v1(
    e2b: State<E2b>,
    caller: Extension<Caller>,
    headers: HeaderMap,
    Json(mut new): Json<wire::NewSandbox>,
) -> Answer<Response> {
    new.timeout.get_or_insert(Seconds(wire::OLD_TIMEOUT));
    Box::pin(create(e2b, caller, headers, Json(new))).await
}

async fn create(
    State(e2b): State<E2b>,
    Extension(caller): Extension<Caller>,
    headers: HeaderMap,
    Json(new): Json<wire::NewSandbox>,
) -> Answer<Response> {
    // What was read can be written: this cannot fail.
    let request = serde_json::to_string(&new).unwrap_or_default();
    let Seconds(timeout) = new.timeout.unwrap_or(Seconds(wire::TIMEOUT));
    let making = Box::pin(to_the_end(e2b.clone().make(caller.clone(), new, timeout)));
    let made = async {
        let made = serde_json::to_value(making.await?).unwrap_or_default();
        Ok((StatusCode::CREATED, made))
    };
    let made = e2b.repeats.once(caller, &headers, &["sandbox", &request], made).await?;
    Ok(made.into_response())
}

/// A query of which some parts are lists: with commas, or named again for each.
struct Lists<T>(T);

impl<T: DeserializeOwned, S: Sync> FromRequestParts<S> for Lists<T> {
    type Rejection = Refused;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Answer<Self> {
        let bad = |error: &dyn std::fmt::Display| {
            Refused::new(Code::BadRequest, format!("this is no query: {error}"))
        };
        let query = parts.uri.query().unwrap_or_default();
        let mut all: Vec<(String, String)> = Vec::new();
        let pairs: Vec<(String, String)> =
            serde_urlencoded::from_str(query).map_err(|error| bad(&error))?;
        for (name, value) in pairs {
            let is_list = ["state", "sandbox_ids"].contains(&name.as_str());
            match all.iter_mut().find(|(known, _)| is_list && *known == name) {
                Some((_, values)) => *values = format!("{values},{value}"),
                None => all.push((name, value)),
            }
        }
        let query = serde_urlencoded::to_string(all).map_err(|error| bad(&error))?;
        serde_urlencoded::from_str(&query).map(Self).map_err(|error| bad(&error))
    }
}

/// A part of a list.
struct Part {
    sandboxes: Vec<Sandbox>,
    /// What the next one is asked for with.
    next: Option<String>,
    /// How many run of all that were asked for, if any were.
    running: Option<usize>,
}

/// Which sandboxes are listed.
#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Filter {
    metadata: Option<String>,
    state: Option<String>,
    template: Option<String>,
    order: Option<String>,
    started_after: Option<Timestamp>,
    next_token: Option<String>,
    limit: Option<usize>,
}

/// Pairs as clients write them: each part escaped, and then the whole as a form.
fn pairs(text: &str) -> Answer<BTreeMap<String, String>> {
    let bad = || Refused::new(Code::BadRequest, "metadata is not a list of key=value".to_owned());
    let plain = |text: &str| {
        let text = text.replace('+', " ");
        // Twice by one client, once by the other: what is no escape stays as it is.
        let once = percent_encoding::percent_decode_str(&text).decode_utf8().ok()?.into_owned();
        Some(percent_encoding::percent_decode_str(&once).decode_utf8().ok()?.into_owned())
    };
    let pairs = text.split('&').filter(|pair| !pair.is_empty()).map(|pair| {
        let (key, value) = pair.split_once('=').ok_or_else(bad)?;
        Ok((plain(key).ok_or_else(bad)?, plain(value).ok_or_else(bad)?))
    });
    pairs.collect()
}

impl Filter {
    fn shown(&self) -> Answer<Vec<Shown>> {
        let all = self.state.as_deref().unwrap_or("running,paused").split(',');
        let all = all.map(|state| match state {
            "running" => Ok(Shown::Running),
            "paused" => Ok(Shown::Paused),
            other => {
                let why = format!("state is running or paused, not {other:?}");
                Err(Refused::new(Code::BadRequest, why))
            }
        });
        all.collect()
    }

    fn of(self, mut all: Vec<Sandbox>) -> Answer<Part> {
        let wanted = self.metadata.as_deref().map(pairs).transpose()?.unwrap_or_default();
        let shown = self.shown()?;
        let template = self.template.as_deref().map(record::tagged);
        all.retain(|kept| {
            let state = if kept.paused.is_some() { Shown::Paused } else { Shown::Running };
            let of = [Some(kept.template.as_str()), kept.alias.as_deref()];
            shown.contains(&state)
                && wanted.iter().all(|(key, value)| kept.metadata.get(key) == Some(value))
                && template.is_none_or(|(name, _)| of.contains(&Some(name)))
                && self.started_after.is_none_or(|after| kept.started_at >= after)
        });
        let running = || all.iter().filter(|kept| kept.paused.is_none()).count();
        let running = shown.contains(&Shown::Running).then(running);
        let key = |kept: &Sandbox| (kept.started_at.as_microsecond(), kept.id);
        let oldest_first = self.order.as_deref() == Some("asc");
        all.sort_by_key(key);
        if !oldest_first {
            all.reverse();
        }
        if let Some(token) = &self.next_token {
            let bad = || Refused::new(Code::BadRequest, "this nextToken is not one of ours");
            let (at, id) = token.split_once('_').ok_or_else(bad)?;
            let after = (at.parse().map_err(|_| bad())?, id.parse::<Uuid>().map_err(|_| bad())?);
            all.retain(|kept| if oldest_first { key(kept) > after } else { key(kept) < after });
        }
        let limit = self.limit.unwrap_or(PAGE);
        if limit == 0 || limit > PAGE {
            return Err(Refused::new(Code::BadRequest, format!("limit is from 1 to {PAGE}")));
        }
        let more = all.len() > limit;
        all.truncate(limit);
        let next = all.last().filter(|_| more).map(key);
        let next = next.map(|(at, id)| format!("{at}_{}", id.simple()));
        Ok(Part { sandboxes: all, next, running })
    }
}

fn page(e2b: &E2b, caller: &Caller, filter: Filter) -> Answer<Response> {
    let seen = e2b.all.list().into_iter().filter(|entry| e2b.sees(caller, entry));
    let now = e2b.all.now();
    let kept = seen.filter(|entry| !entry.is_over(now)).map(|entry| entry.kept());
    let Part { sandboxes, next, running } = filter.of(kept.collect())?;
    let part: Vec<_> = sandboxes.iter().map(|kept| e2b.listed(kept)).collect::<Answer<_>>()?;
    let mut answer = axum::Json(part).into_response();
    if let Some(next) = next.and_then(|next| next.parse().ok()) {
        answer.headers_mut().insert("x-next-token", next);
    }
    if let Some(running) = running {
        answer.headers_mut().insert("x-total-running", running.into());
    }
    Ok(answer)
}

async fn list(
    State(e2b): State<E2b>,
    Extension(caller): Extension<Caller>,
    Lists(filter): Lists<Filter>,
) -> Answer<Response> {
    page(&e2b, &caller, filter)
}

async fn list_running(
    State(e2b): State<E2b>,
    Extension(caller): Extension<Caller>,
    Lists(filter): Lists<Filter>,
) -> Answer<Response> {
    page(&e2b, &caller, Filter { state: Some("running".to_owned()), ..filter })
}

async fn inspect(
    State(e2b): State<E2b>,
    Extension(caller): Extension<Caller>,
    UriPath(sandbox): UriPath<String>,
) -> Answer<axum::Json<wire::Detail>> {
    let kept = e2b.get(&caller, &sandbox)?.kept();
    Ok(axum::Json(wire::Detail {
        listed: e2b.listed(&kept)?,
        envd_access_token: kept.token,
        allow_internet_access: kept.allow_internet_access,
        domain: e2b.domain(),
        lifecycle: wire::Lifecycle { auto_resume: kept.auto_resume, on_timeout: kept.on_timeout },
        pause_mode: kept.paused.map(|pause| if pause.memory { "full" } else { "filesystem" }),
        network: kept.network,
    }))
}

async fn kill(
    State(e2b): State<E2b>,
    Extension(caller): Extension<Caller>,
    UriPath(sandbox): UriPath<String>,
) -> Answer<StatusCode> {
    let entry = e2b.find(&caller, &sandbox)?;
    // Whose time is over is nobody's to end, unless that has failed; who comes while another one
    // ends it, ends it too.
    if !entry.may_be_ended() {
        e2b.get(&caller, &sandbox)?;
    }
    to_the_end(async move {
        let _ending = entry.end();
        e2b.all.kill(&entry).await
    })
    .await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn pause(
    State(e2b): State<E2b>,
    Extension(caller): Extension<Caller>,
    UriPath(sandbox): UriPath<String>,
    body: Option<Json<wire::PauseAs>>,
) -> Answer<StatusCode> {
    let entry = e2b.get(&caller, &sandbox)?;
    let memory = body.and_then(|Json(body)| body.memory).unwrap_or(true);
    if entry.kept.lock().paused.is_some() {
        return Err(Refused::new(Code::BadState, format!("Sandbox {sandbox} is already paused")));
    }
    // If another one has done it meanwhile, it is done.
    to_the_end(async move { e2b.all.pause(&entry, memory).await }).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Wakes a sandbox if need be, and sees to its end.
async fn wake(
    e2b: &E2b,
    caller: Caller,
    entry: Arc<Entry>,
    memory: bool,
    end: impl FnOnce(&mut Sandbox, bool) + Send + 'static,
) -> Answer<(bool, wire::Sandbox)> {
    let e2b = e2b.clone();
    to_the_end(async move {
        let woken = e2b.all.resume(&entry, memory, end).await?;
        e2b.renew(&caller, &entry).await?;
        Ok((woken, e2b.told(entry.kept())))
    })
    .await
}

async fn connect(
    State(e2b): State<E2b>,
    Extension(caller): Extension<Caller>,
    UriPath(sandbox): UriPath<String>,
    body: Option<Json<wire::Connect>>,
) -> Answer<(StatusCode, axum::Json<wire::Sandbox>)> {
    let entry = e2b.get(&caller, &sandbox)?;
    let body = body.map(|Json(body)| body).unwrap_or_default();
    let Seconds(timeout) = body.timeout.unwrap_or(Seconds(wire::TIMEOUT));
    let end = record::after(e2b.all.now(), timeout);
    let end = move |kept: &mut Sandbox, woken: bool| {
        // Of one that runs, another client may count on the time that it has.
        if woken { kept.end_at = end } else { kept.extend(end) }
    };
    let (woken, told) = wake(&e2b, caller, entry, body.memory.unwrap_or(true), end).await?;
    let status = if woken { StatusCode::CREATED } else { StatusCode::OK };
    Ok((status, axum::Json(told)))
}

async fn resume(
    State(e2b): State<E2b>,
    Extension(caller): Extension<Caller>,
    UriPath(sandbox): UriPath<String>,
    body: Option<Json<wire::Connect>>,
) -> Answer<(StatusCode, axum::Json<wire::Sandbox>)> {
    let none = |_| Refused::new(Code::UnknownSession, NO_SNAPSHOT);
    let entry = e2b.get(&caller, &sandbox).map_err(none)?;
    if entry.kept.lock().paused.is_none() {
        return Err(Refused::new(Code::BadState, format!("Sandbox {sandbox} is already running")));
    }
    let body = body.map(|Json(body)| body).unwrap_or_default();
    let Seconds(timeout) = body.timeout.unwrap_or(Seconds(wire::OLD_TIMEOUT));
    let end = record::after(e2b.all.now(), timeout);
    let end = move |kept: &mut Sandbox, _| {
        kept.end_at = end;
        match body.auto_pause {
            Some(true) => kept.on_timeout = OnTimeout::Pause,
            Some(false) => kept.on_timeout = OnTimeout::Kill,
            None => {}
        }
    };
    let (_, told) = wake(&e2b, caller, entry, body.memory.unwrap_or(true), end).await?;
    Ok((StatusCode::CREATED, axum::Json(told)))
}

async fn set_timeout(
    State(e2b): State<E2b>,
    Extension(caller): Extension<Caller>,
    UriPath(sandbox): UriPath<String>,
    Json(body): Json<wire::SetTimeout>,
) -> Answer<StatusCode> {
    let end = record::after(e2b.all.now(), body.timeout.0);
    let change = move |kept: &mut Sandbox| {
        if body.extend_only { kept.extend(end) } else { kept.end_at = end }
    };
    change_end(e2b, &caller, &sandbox, change).await
}

async fn refresh(
    State(e2b): State<E2b>,
    Extension(caller): Extension<Caller>,
    UriPath(sandbox): UriPath<String>,
    body: Option<Json<wire::Refresh>>,
) -> Answer<StatusCode> {
    let duration = body.and_then(|Json(body)| body.duration);
    let Seconds(duration) = duration.unwrap_or(Seconds(wire::OLD_TIMEOUT));
    let end = record::after(e2b.all.now(), duration);
    change_end(e2b, &caller, &sandbox, move |kept| kept.extend(end)).await
}

async fn change_end(
    e2b: E2b,
    caller: &Caller,
    sandbox: &str,
    change: impl FnOnce(&mut Sandbox) + Send + 'static,
) -> Answer<StatusCode> {
    let entry = e2b.get(caller, sandbox)?;
    let id = entry.kept.lock().id.simple().to_string();
    to_the_end(async move {
        let _turn = entry.turn.lock().await;
        // It may have been removed, or put to sleep, while this one was in line.
        e2b.all.get(&id)?;
        if entry.kept.lock().paused.is_some() {
            let why = format!("Sandbox {id} is paused: it has no deadline until it is resumed");
            return Err(Refused::new(Code::BadState, why));
        }
        e2b.all.change(&entry, change).await
    })
    .await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn fork(
    State(e2b): State<E2b>,
    Extension(caller): Extension<Caller>,
    UriPath(sandbox): UriPath<String>,
    body: Option<Json<wire::Fork>>,
) -> Answer<(StatusCode, axum::Json<Vec<wire::Forked>>)> {
    caller.makes_nameless()?;
    let entry = e2b.get(&caller, &sandbox)?;
    let body = body.map(|Json(body)| body).unwrap_or_default();
    let count = body.count.unwrap_or(1);
    if count == 0 || count > FORKS {
        return Err(Refused::new(Code::BadRequest, format!("count is from 1 to {FORKS}")));
    }
    let forks = to_the_end(async move {
        let of = entry.kept();
        let Seconds(timeout) = body.timeout.unwrap_or(Seconds(wire::OLD_TIMEOUT));
        let end = record::after(e2b.all.now(), timeout);
        let forks = (0..count).map(|_| e2b.fork_one(&caller, &of, end));
        let forks = futures::future::join_all(forks).await.into_iter().map(|fork| match fork {
            Ok(fork) => wire::Forked::Sandbox(fork),
            Err(Refused(problem, _)) => {
                wire::Forked::Error { code: problem.status, message: problem.detail }
            }
        });
        Ok(forks.collect())
    });
    Ok((StatusCode::CREATED, axum::Json(forks.await?)))
}

async fn snapshot(
    State(e2b): State<E2b>,
    Extension(caller): Extension<Caller>,
    UriPath(sandbox): UriPath<String>,
    body: Option<Json<wire::NewSnapshot>>,
) -> Answer<(StatusCode, axum::Json<wire::Snapshot>)> {
    caller.makes_nameless()?;
    let entry = e2b.get(&caller, &sandbox)?;
    let name = body.and_then(|Json(body)| body.name).filter(|name| !name.is_empty());
    let taken = to_the_end(async move {
        let of = entry.kept();
        let session = e2b.all.pool.fork(of.id).await?;
        let taken = async {
            // Files of sandboxes are kept, not what volumes they had.
            e2b.all.pool.set_mounts(session, Vec::new()).await?;
            // A machine's copy would go on.
            if e2b.all.pool.isolation()? == Isolation::MicroVm {
                e2b.all.pool.pause(session).await?;
            }
            e2b.all.clone().keep_snapshot(session, of, name).await
        };
        let taken = taken.await;
        if taken.is_err() {
            e2b.give_up(session).await;
        }
        taken
    });
    Ok((StatusCode::CREATED, axum::Json(taken.await?)))
}

/// Of which time.
#[derive(Deserialize)]
struct Span {
    start: Option<i64>,
    end: Option<i64>,
}

async fn metrics(
    State(e2b): State<E2b>,
    Extension(caller): Extension<Caller>,
    UriPath(sandbox): UriPath<String>,
    Query(span): Query<Span>,
) -> Answer<axum::Json<Vec<wire::Metric>>> {
    let entry = e2b.get(&caller, &sandbox)?;
    if entry.metrics.lock().is_empty() && entry.kept.lock().paused.is_none() {
        // Nobody has to wait for the first.
        e2b.all.measure_now(std::slice::from_ref(&entry)).await?;
    }
    let within = |metric: &&wire::Metric| {
        span.start.is_none_or(|start| metric.timestamp_unix >= start)
            && span.end.is_none_or(|end| metric.timestamp_unix <= end)
    };
    let told = entry.metrics.lock().iter().filter(within).cloned().collect();
    Ok(axum::Json(told))
}

#[derive(Deserialize)]
struct Some {
    sandbox_ids: String,
}

async fn metrics_of_some(
    State(e2b): State<E2b>,
    Extension(caller): Extension<Caller>,
    Lists(Some { sandbox_ids }): Lists<Some>,
) -> Answer<axum::Json<serde_json::Value>> {
    let mut all = BTreeMap::new();
    for sandbox in sandbox_ids.split(',').filter(|id| !id.is_empty()) {
        let Ok(entry) = e2b.get(&caller, sandbox) else { continue };
        if let Some(last) = entry.metrics.lock().back().cloned() {
            all.insert(sandbox.to_owned(), last);
        }
    }
    Ok(axum::Json(serde_json::json!({ "sandboxes": all })))
}

/// Which lines of a log.
#[derive(Deserialize)]
struct Lines {
    start: Option<i64>,
    cursor: Option<i64>,
    limit: Option<usize>,
    direction: Option<String>,
    level: Option<String>,
    search: Option<String>,
}

impl Lines {
    fn of(&self, entry: &Entry) -> Vec<wire::LogEntry> {
        let least = match self.level.as_deref() {
            Some("error") => 2,
            Some("warn") => 1,
            _ => 0,
        };
        let backward = self.direction.as_deref() == Some("backward");
        let from = self.cursor.or(self.start);
        let taken = |line: &&wire::LogEntry| {
            let at = line.timestamp.as_millisecond();
            from.is_none_or(|from| if backward { at <= from } else { at >= from })
                && line.level as usize >= least
                && self.search.as_ref().is_none_or(|text| line.message.contains(text.as_str()))
        };
        let log = entry.log.lock();
        let limit = self.limit.unwrap_or(1000).min(1000);
        if backward {
            log.iter().rev().filter(taken).take(limit).cloned().collect()
        } else {
            log.iter().filter(taken).take(limit).cloned().collect()
        }
    }
}

async fn logs_v1(
    State(e2b): State<E2b>,
    Extension(caller): Extension<Caller>,
    UriPath(sandbox): UriPath<String>,
    Query(lines): Query<Lines>,
) -> Answer<axum::Json<serde_json::Value>> {
    let entries = lines.of(&*e2b.get(&caller, &sandbox)?);
    let plain = entries
        .iter()
        .map(|entry| serde_json::json!({ "timestamp": entry.timestamp, "line": entry.message }));
    let plain: Vec<_> = plain.collect();
    Ok(axum::Json(serde_json::json!({ "logs": plain, "logEntries": entries })))
}

async fn logs(
    State(e2b): State<E2b>,
    Extension(caller): Extension<Caller>,
    UriPath(sandbox): UriPath<String>,
    Query(lines): Query<Lines>,
) -> Answer<axum::Json<serde_json::Value>> {
    let entries = lines.of(&*e2b.get(&caller, &sandbox)?);
    Ok(axum::Json(serde_json::json!({ "logs": entries })))
}

async fn set_network(
    State(e2b): State<E2b>,
    Extension(caller): Extension<Caller>,
    UriPath(sandbox): UriPath<String>,
    Json(update): Json<wire::NetworkUpdate>,
) -> Answer<StatusCode> {
    let entry = e2b.get(&caller, &sandbox)?;
    let kept = entry.kept();
    let network = Network {
        allow_out: update.allow_out,
        deny_out: update.deny_out,
        dns_servers: update.dns_servers,
        egress_proxy: update.egress_proxy,
        rules: update.rules,
        mask_request_host: update.mask_request_host,
        others: update.others,
        ..kept.network
    };
    traffic::check(&network)?;
    let egress = traffic::egress(&network, update.allow_internet_access)?;
    to_the_end(async move {
        let _turn = entry.turn.lock().await;
        e2b.all.pool.set_egress(kept.id, egress).await?;
        let allow = update.allow_internet_access;
        let change = |kept: &mut Sandbox| {
            kept.network = network;
            kept.allow_internet_access = allow;
        };
        e2b.all.change(&entry, change).await
    })
    .await?;
    Ok(StatusCode::NO_CONTENT)
}
