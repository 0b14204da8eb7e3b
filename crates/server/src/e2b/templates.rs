//! Templates and snapshots, as requests ask for them.

use std::sync::Arc;

use axum::Extension;
use axum::body::Body;
use axum::extract::{Path as UriPath, Request, State};
use axum::http::uri::Authority;
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use denizen_api::Code;
use jiff::Timestamp;
use serde::Deserialize;
use serde_json::json;
use uuid::Uuid;

use super::build::{NewBuild, Shown, Step};
use super::record::{self, Build, DEFAULT_TAG, Model, Setup, Source, Start, Template, tagged};
use super::routes::{E2b, memory, processors, to_the_end, unsupported};
use super::start::{HOME, USER};
use super::store::Kind;
use super::{Sandboxes, traffic, wire};
use crate::access::{Access, Caller};
use crate::api::extract::{Json, Query};
use crate::api::{Answer, Refused};
use denizen::{Error, Isolation};

/// The template that is always there: what every session is made of.
const BASE: &str = "base";
/// The same, with a code interpreter.
const INTERPRETER: &str = "code-interpreter-v1";
/// The most templates or snapshots in one part of a list.
const PAGE: usize = 100;

/// An id for a template, in the form that those have.
pub(super) fn new_id() -> String {
    Uuid::new_v4().simple().to_string().chars().take(20).collect()
}

impl Sandboxes {
    /// Finds what a name is for: a template or snapshot by id or name, with or without a tag, or an
    /// image.
    pub(super) async fn model(&self, name: &str) -> Answer<Model> {
        let (plain, tag) = tagged(name);
        if let Some(template) = self.find_template(plain) {
            let build = template.tags.get(tag).and_then(|build| template.builds.get(build));
            let build = build.ok_or_else(|| no_template(name))?;
            return Ok(Model {
                template: template.id.clone(),
                alias: template.name.clone(),
                source: build.source.clone(),
                setup: build.setup.clone(),
                goes_on: template.snapshot_of.is_some()
                    && self.pool.isolation()? == Isolation::MicroVm,
            });
        }
        let setup = self.plain_setup()?;
        let model = |source, setup| Model {
            template: plain.to_owned(),
            alias: Some(plain.to_owned()),
            source,
            setup,
            goes_on: false,
        };
        match plain {
            BASE | INTERPRETER if tag != DEFAULT_TAG => Err(no_template(name)),
            BASE => Ok(model(Source::Root, setup)),
            INTERPRETER => {
                let start = Some(Start::Interpreter);
                Ok(model(Source::Root, Setup { start, ..setup }))
            }
            _ => match self.pool.image(name).await {
                Ok(image) => Ok(Model {
                    template: image.name.clone(),
                    alias: Some(name.to_owned()),
                    source: Source::Image(image.name),
                    setup,
                    goes_on: false,
                }),
                Err(Error::Isolation { .. } | Error::Image(_)) => Err(no_template(name)),
                Err(error) => Err(error.into()),
            },
        }
    }

    /// What sandboxes begin with where a template says nothing.
    pub(super) fn plain_setup(&self) -> Answer<Setup> {
        Ok(match self.pool.isolation()? {
            // Its users are the host's.
            Isolation::Host => Setup::default(),
            _ => Setup {
                user: Some(USER.to_owned()),
                workdir: Some(HOME.to_owned()),
                ..Setup::default()
            },
        })
    }

    /// The template of that id or name.
    fn find_template(&self, name: &str) -> Option<Template> {
        let templates = self.templates.read();
        let by_name = || templates.values().find(|it| it.name.as_deref() == Some(name));
        templates.get(name).or_else(by_name).cloned()
    }

    /// Those that somebody has made, but for snapshots.
    fn made_templates(&self) -> Vec<Template> {
        let templates = self.templates.read();
        templates.values().filter(|it| it.snapshot_of.is_none()).cloned().collect()
    }

    fn get_template(&self, name: &str) -> Answer<Template> {
        self.find_template(name).ok_or_else(|| no_template(name))
    }

    async fn keep_template(&self, template: Template) -> Answer<()> {
        let (id, kept) = (template.id.clone(), template.clone());
        self.stored(move |store| store.save(Kind::Template, &id, &kept)).await?;
        self.templates.write().insert(template.id.clone(), template);
        Ok(())
    }

    /// Changes a template, or makes or removes it, and removes the sessions of builds that nobody can
    /// ask for then. Done to its end, by one at a time.
    async fn change_template<T: Send + 'static>(
        self: Arc<Self>,
        change: impl FnOnce(&Self) -> Answer<(Changed, Vec<Build>, T)> + Send + 'static,
    ) -> Answer<T> {
        to_the_end(async move {
            let _turn = self.changing_templates.lock().await;
            let (changed, gone, told) = change(&self)?;
            let gone = gone.into_iter().filter_map(|build| match build.source {
                Source::Session(session) => Some(session),
                Source::Root | Source::Image(_) => None,
            });
            let gone: Vec<Uuid> = gone.collect();
            // If the daemon is killed before these are removed, the next one does that.
            let unfinished = gone.clone();
            self.stored(move |store| {
                unfinished
                    .iter()
                    .try_for_each(|it| store.save(Kind::Unfinished, &it.to_string(), it))
            })
            .await?;
            match changed {
                Changed::To(template) => self.keep_template(template).await?,
                Changed::Gone(id) => {
                    let key = id.clone();
                    self.stored(move |store| store.forget(Kind::Template, &key)).await?;
                    self.templates.write().remove(&id);
                }
            }
            for session in gone {
                self.remove_unfinished(session).await;
            }
            Ok(told)
        })
        .await
    }

    /// Whether any template is made of a session.
    pub(super) fn is_of_template(&self, session: Uuid) -> bool {
        let templates = self.templates.read();
        let mut builds = templates.values().flat_map(|template| template.builds.values());
        builds.any(|build| build.source == Source::Session(session))
    }

    /// The template of that name, to be changed; or a new one.
    fn template_for(&self, name: Option<&str>) -> Template {
        let known = name.and_then(|name| self.find_template(name));
        known.unwrap_or_else(|| Template::new(new_id(), name.map(str::to_owned), Timestamp::now()))
    }

    /// Gives a template a build.
    pub(super) async fn add_build(
        self: Arc<Self>,
        template: String,
        id: Uuid,
        build: Build,
        tags: Vec<String>,
    ) -> Answer<()> {
        self.change_template(move |all| {
            let mut template = all.get_template(&template)?;
            let gone = template.add(id, build, &tags);
            Ok((Changed::To(template), gone, ()))
        })
        .await
    }

    /// Keeps a session as a snapshot of a sandbox.
    pub(super) async fn keep_snapshot(
        self: Arc<Self>,
        session: Uuid,
        of: record::Sandbox,
        name: Option<String>,
    ) -> Answer<wire::Snapshot> {
        self.change_template(move |all| {
            let named = name.as_deref().map(tagged);
            if let Some((name, _)) = named {
                check_new_name(name)?;
            }
            let tag = named.map_or(DEFAULT_TAG, |(_, tag)| tag);
            let mut template = all.template_for(named.map(|(name, _)| name));
            if template.snapshot_of.is_none() && !template.builds.is_empty() {
                return Err(taken(template.shown()));
            }
            template.snapshot_of = Some(of.id);
            let source = Source::Session(session);
            let build = Build { source, setup: of.setup, made_at: Timestamp::now() };
            let gone = template.add(Uuid::new_v4(), build, &[tag.to_owned()]);
            let told = told_snapshot(&template, tag);
            Ok((Changed::To(template), gone, told))
        })
        .await
    }
}

/// What becomes of a template.
enum Changed {
    To(Template),
    /// That of this id is gone.
    Gone(String),
}

fn taken(name: &str) -> Refused {
    let why =
        format!("{name} is a template, and no snapshot's name, or the other way: take another");
    Refused::new(Code::BadName, why)
}

/// That something new can have a name.
fn check_new_name(name: &str) -> Answer<()> {
    if [BASE, INTERPRETER].contains(&name) {
        let why = format!("{name} is always there, and nobody's to make: take another name");
        return Err(Refused::new(Code::BadName, why));
    }
    check_name(name)
}

fn no_template(name: &str) -> Refused {
    Refused::new(Code::UnknownImage, format!("template '{name}' not found"))
}

fn check_name(name: &str) -> Answer<()> {
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || b"-_./".contains(&byte);
    if !name.is_empty() && name.len() <= 128 && name.bytes().all(fits) {
        return Ok(());
    }
    let why = "a template's name has letters, digits, and - _ . / between them, 128 at most";
    Err(Refused::new(Code::BadName, format!("{name:?}: {why}")))
}

fn told_snapshot(template: &Template, tag: &str) -> wire::Snapshot {
    let names = template.names_from(tag);
    wire::Snapshot { snapshot_id: format!("{}:{tag}", template.shown()), names }
}

/// Which snapshots are listed.
#[derive(Deserialize)]
pub(super) struct OfSnapshots {
    #[serde(rename = "sandboxID")]
    sandbox_id: Option<String>,
    name: Option<String>,
    limit: Option<usize>,
    #[serde(rename = "nextToken")]
    next_token: Option<String>,
}

pub(super) async fn snapshots(
    State(e2b): State<E2b>,
    Extension(caller): Extension<Caller>,
    Query(filter): Query<OfSnapshots>,
) -> Answer<Response> {
    caller.makes_nameless()?;
    let of = |id: &str| traffic::id(id).or_else(|| id.parse().ok()).unwrap_or_default();
    let of = filter.sandbox_id.as_deref().map(of);
    let named = filter.name.as_deref().map(tagged);
    let with_tag = filter.name.as_deref().is_some_and(|name| name.contains(':'));
    let templates = e2b.all.templates.read();
    let mut all: Vec<_> = templates
        .values()
        .filter(|it| it.snapshot_of.is_some() && of.is_none_or(|of| it.snapshot_of == Some(of)))
        .filter(|it| {
            named.is_none_or(|(name, _)| name == it.id || it.name.as_deref() == Some(name))
        })
        .flat_map(|it| it.tags.keys().map(move |tag| (it, tag)))
        .filter(|(_, tag)| !with_tag || named.is_none_or(|(_, wanted)| wanted == tag.as_str()))
        .map(|(template, tag)| (std::cmp::Reverse(template.updated_at), template, tag))
        .collect();
    all.sort_by(|(at, a, tag), (other, b, than)| (at, &a.id, tag).cmp(&(other, &b.id, than)));
    let from = filter.next_token.and_then(|text| text.parse().ok()).unwrap_or(0_usize);
    let limit = filter.limit.unwrap_or(PAGE).clamp(1, PAGE);
    let part: Vec<_> =
        all.iter().skip(from).take(limit).map(|(_, it, tag)| told_snapshot(it, tag)).collect();
    let next = (all.len() > from + limit).then_some(from + limit);
    let mut answer = axum::Json(part).into_response();
    if let Some(next) = next {
        answer.headers_mut().insert("x-next-token", next.into());
    }
    Ok(answer)
}

/// A template, as it is listed.
fn told(e2b: &E2b, template: &Template) -> Answer<serde_json::Value> {
    let (pool, limits) = (&e2b.all.pool, e2b.all.pool.limits()?);
    let latest = template.builds.iter().max_by_key(|(_, build)| build.made_at);
    let spawned = e2b.all.list().into_iter().filter(|it| it.kept.lock().template == template.id);
    Ok(json!({
        "templateID": template.id,
        "buildID": latest.map(|(id, _)| *id).unwrap_or_default(),
        "cpuCount": processors(&limits),
        "memoryMB": memory(&limits, pool.isolation()?) >> 20,
        "diskSizeMB": limits.disk_bytes.unwrap_or_default() >> 20,
        "public": template.public,
        "aliases": template.name.iter().collect::<Vec<_>>(),
        "names": template.name.iter().collect::<Vec<_>>(),
        "createdAt": template.created_at,
        "updatedAt": template.updated_at,
        "createdBy": null,
        "lastSpawnedAt": null,
        "spawnCount": spawned.count(),
        "buildCount": template.builds.len(),
        "envdVersion": wire::ENVD_VERSION,
        "buildStatus": if template.builds.is_empty() { Shown::Waiting } else { Shown::Ready },
    }))
}

pub(super) async fn list(State(e2b): State<E2b>) -> Answer<axum::Json<Vec<serde_json::Value>>> {
    let templates = e2b.all.made_templates();
    Ok(axum::Json(templates.iter().map(|it| told(&e2b, it)).collect::<Answer<_>>()?))
}

/// Which part of a list.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct InParts {
    limit: Option<usize>,
    next_token: Option<String>,
}

pub(super) async fn list_in_parts(
    State(e2b): State<E2b>,
    Query(InParts { limit, next_token }): Query<InParts>,
) -> Answer<Response> {
    let limit = limit.unwrap_or(PAGE);
    if limit == 0 || limit > PAGE {
        return Err(Refused::new(Code::BadRequest, format!("limit is from 1 to {PAGE}")));
    }
    // They are in the order of their ids.
    let mut part = e2b.all.made_templates();
    part.retain(|it| next_token.as_ref().is_none_or(|last| it.id > *last));
    let more = part.len() > limit;
    part.truncate(limit);
    let told = part.iter().map(|it| told(&e2b, it)).collect::<Answer<Vec<_>>>()?;
    let mut answer = axum::Json(told).into_response();
    let next = part.last().filter(|_| more).and_then(|last| last.id.parse().ok());
    if let Some(next) = next {
        answer.headers_mut().insert("x-next-token", next);
    }
    Ok(answer)
}

/// Those that are always there.
pub(super) async fn defaults(State(e2b): State<E2b>) -> Answer<axum::Json<Vec<serde_json::Value>>> {
    let always = [BASE, INTERPRETER].map(|name| {
        let made = Timestamp::UNIX_EPOCH;
        let template = Template::new(name.to_owned(), Some(name.to_owned()), made);
        told(&e2b, &Template { public: true, ..template })
    });
    Ok(axum::Json(always.into_iter().collect::<Answer<_>>()?))
}

pub(super) async fn inspect(
    State(e2b): State<E2b>,
    UriPath(template): UriPath<String>,
) -> Answer<axum::Json<serde_json::Value>> {
    let template = e2b.all.get_template(tagged(&template).0)?;
    let mut whole = told(&e2b, &template)?;
    let limits = e2b.all.pool.limits()?;
    let builds = template.builds.iter().map(|(id, build)| {
        json!({
            "buildID": id,
            "status": Shown::Ready,
            "createdAt": build.made_at,
            "updatedAt": build.made_at,
            "finishedAt": build.made_at,
            "cpuCount": processors(&limits),
            "memoryMB": whole["memoryMB"],
        })
    });
    whole["builds"] = builds.collect();
    Ok(axum::Json(whole))
}

pub(super) async fn by_alias(
    State(e2b): State<E2b>,
    UriPath(alias): UriPath<String>,
) -> Answer<axum::Json<serde_json::Value>> {
    let model = e2b.all.model(&alias).await;
    // One that is only being built is there, and cannot be used.
    let id = match model {
        Ok(model) => model.template,
        Err(refused) => e2b.all.find_template(tagged(&alias).0).ok_or(refused)?.id,
    };
    Ok(axum::Json(json!({ "templateID": id, "public": false })))
}

pub(super) async fn remove(
    State(e2b): State<E2b>,
    UriPath(name): UriPath<String>,
) -> Answer<StatusCode> {
    let remove = move |all: &Sandboxes| {
        let (plain, tag) = tagged(&name);
        let mut template = all.get_template(plain)?;
        let tags: Vec<String> = match name.contains(':') {
            true if !template.tags.contains_key(tag) => return Err(no_template(&name)),
            true => vec![tag.to_owned()],
            false => template.tags.keys().cloned().collect(),
        };
        let gone = template.untag(&tags);
        let changed = if template.tags.is_empty() {
            Changed::Gone(template.id)
        } else {
            Changed::To(template)
        };
        Ok((changed, gone, ()))
    };
    e2b.all.change_template(remove).await?;
    Ok(StatusCode::NO_CONTENT)
}

#[derive(Deserialize)]
pub(super) struct Update {
    public: Option<bool>,
}

pub(super) async fn update(
    State(e2b): State<E2b>,
    UriPath(template): UriPath<String>,
    Json(update): Json<Update>,
) -> Answer<axum::Json<serde_json::Value>> {
    let change = move |all: &Sandboxes| {
        let mut template = all.get_template(&template)?;
        template.public = update.public.unwrap_or(template.public);
        let names = template.names();
        Ok((Changed::To(template), Vec::new(), names))
    };
    let names = e2b.all.change_template(change).await?;
    Ok(axum::Json(json!({ "names": names })))
}

pub(super) async fn tags(
    State(e2b): State<E2b>,
    UriPath(template): UriPath<String>,
) -> Answer<axum::Json<Vec<serde_json::Value>>> {
    let template = e2b.all.get_template(tagged(&template).0)?;
    let tags = template.tags.iter().map(|(tag, build)| {
        let made = template.builds.get(build).map(|build| build.made_at);
        json!({ "tag": tag, "buildID": build, "createdAt": made })
    });
    Ok(axum::Json(tags.collect()))
}

#[derive(Deserialize)]
pub(super) struct Tagging {
    target: String,
    tags: Vec<String>,
}

pub(super) async fn tag(
    State(e2b): State<E2b>,
    Json(tagging): Json<Tagging>,
) -> Answer<(StatusCode, axum::Json<serde_json::Value>)> {
    tagging.tags.iter().try_for_each(|tag| check_name(tag))?;
    let change = move |all: &Sandboxes| {
        let (plain, of) = tagged(&tagging.target);
        let mut template = all.get_template(plain)?;
        let build = *template.tags.get(of).ok_or_else(|| no_template(&tagging.target))?;
        template.tags.extend(tagging.tags.iter().map(|tag| (tag.clone(), build)));
        let gone = template.untag(&[]);
        let told = json!({ "buildID": build, "tags": tagging.tags });
        Ok((Changed::To(template), gone, told))
    };
    let told = e2b.all.change_template(change).await?;
    Ok((StatusCode::CREATED, axum::Json(told)))
}

#[derive(Deserialize)]
pub(super) struct Untagging {
    name: String,
    tags: Vec<String>,
}

pub(super) async fn untag(
    State(e2b): State<E2b>,
    Json(untagging): Json<Untagging>,
) -> Answer<StatusCode> {
    let change = move |all: &Sandboxes| {
        let mut template = all.get_template(tagged(&untagging.name).0)?;
        if let Some(unknown) = untagging.tags.iter().find(|tag| !template.tags.contains_key(*tag)) {
            return Err(no_template(&format!("{}:{unknown}", untagging.name)));
        }
        if untagging.tags.iter().any(|tag| tag == DEFAULT_TAG) {
            let why = format!("Cannot delete the '{DEFAULT_TAG}' tag");
            return Err(Refused::new(Code::BadRequest, why));
        }
        if template.tags.keys().all(|tag| untagging.tags.contains(tag)) {
            let why = "a template keeps one tag at least: remove the template, if it is not wanted";
            return Err(Refused::new(Code::BadRequest, why));
        }
        let gone = template.untag(&untagging.tags);
        Ok((Changed::To(template), gone, ()))
    };
    e2b.all.change_template(change).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// `POST /v3/templates`.
#[derive(Deserialize)]
pub(super) struct Wanted {
    name: Option<String>,
    alias: Option<String>,
    #[serde(default)]
    tags: Vec<String>,
    #[serde(rename = "cpuCount")]
    cpu_count: Option<i64>,
    #[serde(rename = "memoryMB")]
    memory_mb: Option<i64>,
}

/// That a machine could have such a size, though what it has is the daemon's to say.
fn check_size(processors: Option<i64>, mebibytes: Option<i64>) -> Answer<()> {
    const PROCESSORS: i64 = 32;
    const MEBIBYTES: [i64; 2] = [128, 1 << 19];
    let [least, most] = MEBIBYTES;
    let why = match (processors.unwrap_or(1), mebibytes.unwrap_or(least)) {
        (..1, _) => "validation error: CPU count must be at least 1".to_owned(),
        (count, _) if count > PROCESSORS => format!("CPU count must be at most {PROCESSORS}"),
        (count, _) if count != 1 && count % 2 != 0 => {
            "CPU count must be 1 or an even number".to_owned()
        }
        (_, size) if size < least => {
            format!("validation error: Memory must be at least {least} MiB")
        }
        (_, size) if size % 2 != 0 => "Memory must be divisible by 2".to_owned(),
        (_, size) if size > most => format!("Memory can't be higher than {most} MiB"),
        _ => return Ok(()),
    };
    Err(Refused::new(Code::BadRequest, why))
}

pub(super) async fn request_build(
    State(e2b): State<E2b>,
    Extension(caller): Extension<Caller>,
    Json(wanted): Json<Wanted>,
) -> Answer<(StatusCode, axum::Json<serde_json::Value>)> {
    caller.makes_nameless()?;
    check_size(wanted.cpu_count, wanted.memory_mb)?;
    let name = wanted.name.or(wanted.alias);
    let name = name.ok_or_else(|| Refused::new(Code::BadRequest, "which name?"))?;
    let (plain, tag) = tagged(&name);
    check_new_name(plain)?;
    let mut tags = wanted.tags;
    if tags.is_empty() || name.contains(':') {
        tags.push(tag.to_owned());
    }
    tags.iter().try_for_each(|tag| check_name(tag))?;
    tags.sort();
    tags.dedup();
    let named = plain.to_owned();
    let make = move |all: &Sandboxes| {
        let template = all.template_for(Some(&named));
        if template.snapshot_of.is_some() {
            return Err(taken(&named));
        }
        let id = template.id.clone();
        Ok((Changed::To(template), Vec::new(), id))
    };
    let id = e2b.all.clone().change_template(make).await?;
    let build = e2b.all.builds.request(&id, tags.clone())?;
    let told = json!({
        "templateID": id,
        "buildID": build,
        "public": false,
        "names": [plain],
        "tags": tags,
        "aliases": [plain],
    });
    Ok((StatusCode::ACCEPTED, axum::Json(told)))
}

pub(super) async fn upload_link(
    State(e2b): State<E2b>,
    headers: HeaderMap,
    UriPath((template, hash)): UriPath<(String, String)>,
    request: Request,
) -> Answer<(StatusCode, axum::Json<serde_json::Value>)> {
    let template = e2b.all.get_template(&template)?;
    let token = e2b.all.builds.link(&hash)?;
    let present = e2b.all.builds.has(&hash);
    // By the name that the client has for us.
    let host = headers.get("host").and_then(|host| host.to_str().ok());
    let host = host.or_else(|| request.uri().authority().map(Authority::as_str));
    let host = host.ok_or_else(|| Refused::new(Code::BadHost, "by which name?"))?;
    let scheme = if Access::is_tls(request.extensions()) { "https" } else { "http" };
    let url =
        format!("{scheme}://{host}/templates/{}/files/{hash}/content?token={token}", template.id);
    Ok((StatusCode::CREATED, axum::Json(json!({ "present": present, "url": url }))))
}

#[derive(Deserialize)]
pub(super) struct Link {
    token: String,
}

/// Takes in what a step copies. The link says that it may be sent.
pub(super) async fn upload(
    State(e2b): State<E2b>,
    UriPath((_, hash)): UriPath<(String, String)>,
    Query(Link { token }): Query<Link>,
    body: Body,
) -> Answer<StatusCode> {
    e2b.all.builds.take_in(&hash, &token, body).await?;
    Ok(StatusCode::OK)
}

/// `POST /v2/templates/{id}/builds/{build}`.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Definition {
    from_image: Option<String>,
    from_template: Option<String>,
    from_image_registry: Option<serde_json::Value>,
    #[serde(default)]
    steps: Vec<Step>,
    start_cmd: Option<String>,
    ready_cmd: Option<String>,
}

pub(super) async fn start_build(
    State(e2b): State<E2b>,
    UriPath((template, build)): UriPath<(String, Uuid)>,
    Json(definition): Json<Definition>,
) -> Answer<StatusCode> {
    let template = e2b.all.get_template(&template)?;
    if definition.from_image_registry.is_some_and(|it| !it.is_null()) {
        return Err(unsupported(
            "credentials of a registry in a build (fromImageRegistry): `denizen image pull` takes the \
             image with those of the daemon's user",
        ));
    }
    let filled = |text: Option<String>| text.filter(|text| !text.is_empty());
    let new = NewBuild {
        from_image: filled(definition.from_image),
        from_template: filled(definition.from_template),
        steps: definition.steps,
        start: filled(definition.start_cmd),
        ready: filled(definition.ready_cmd),
    };
    new.check()?;
    e2b.all.clone().begin_build(template.id, build, new)?;
    Ok(StatusCode::ACCEPTED)
}

/// Which lines of a build's log.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Lines {
    logs_offset: Option<usize>,
    limit: Option<usize>,
}

pub(super) async fn status(
    State(e2b): State<E2b>,
    UriPath((template, build)): UriPath<(String, Uuid)>,
    Query(lines): Query<Lines>,
) -> Answer<axum::Json<serde_json::Value>> {
    let template = e2b.all.get_template(&template)?;
    let limit = lines.limit.unwrap_or(100).min(100);
    let told = e2b.all.builds.told(build, lines.logs_offset.unwrap_or(0), limit);
    let told = match told {
        Some(told) => told,
        // One of an earlier daemon: what is there was made.
        None if template.builds.contains_key(&build) => {
            json!({ "status": Shown::Ready, "logEntries": [] })
        }
        None => {
            let detail = format!("build '{build}' not found");
            return Err(Refused::new(Code::UnknownImage, detail));
        }
    };
    // The same once more, as it was before lines had levels and times.
    let entries = told["logEntries"].as_array().into_iter().flatten();
    let logs: Vec<_> = entries.map(|entry| entry["message"].clone()).collect();
    let mut whole = json!({ "templateID": template.id, "buildID": build, "logs": logs });
    if let (Some(whole), serde_json::Value::Object(told)) = (whole.as_object_mut(), told) {
        whole.extend(told);
    }
    Ok(axum::Json(whole))
}

pub(super) async fn logs(
    e2b: State<E2b>,
    path: UriPath<(String, Uuid)>,
    Query(lines): Query<Lines>,
) -> Answer<axum::Json<serde_json::Value>> {
    let axum::Json(status) = status(e2b, path, Query(lines)).await?;
    Ok(axum::Json(json!({ "logs": status["logEntries"] })))
}
