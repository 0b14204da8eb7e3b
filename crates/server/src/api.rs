//! `/v1`: sessions as resources, in JSON. What is said is in the crate `denizen-api`; its
//! description for machines (OpenAPI 3.1) is made of the handlers here, and served at
//! `/v1/openapi.json`.
//!
//! A handler reads a request, asks the pool and words the answer. It must never decide anything
//! about a session.

mod backups;
mod daemon;
mod events;
pub(crate) mod extract;
mod files;
mod images;
mod ports;
mod processes;
mod refusal;
mod repeats;
mod sessions;
mod snapshots;
mod wire;

use std::sync::Arc;

use axum::Router;
use axum::body::Bytes;
use axum::http::Uri;
use axum::http::header::CONTENT_TYPE;
use axum::routing::any;
use denizen::MicroVmManager;
use denizen_api::Code;
use tokio::sync::Notify;
use utoipa::OpenApi as _;
use utoipa::openapi::OpenApi;
use utoipa::openapi::security::{Http, HttpAuthScheme, SecurityScheme};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

pub(crate) use daemon::metrics_or_envd;
pub(crate) use events::Recent;
pub(crate) use refusal::{Answer, Refused};
pub(crate) use repeats::Repeats;

use crate::access::{Access, routes};
use crate::e2b::Sandboxes;
use crate::lease::{Lease, Leases};

/// What handlers have.
#[derive(Clone)]
pub(crate) struct Api {
    pub(crate) pool: Arc<MicroVmManager>,
    pub(crate) leases: Arc<Leases>,
    /// Told when somebody wants the daemon to end.
    pub(crate) stop: Arc<Notify>,
    pub(crate) recent: Arc<Recent>,
    sandboxes: Arc<Sandboxes>,
    repeats: Arc<Repeats>,
    ready: Arc<daemon::Ready>,
}

impl Api {
    pub(crate) fn new(
        pool: Arc<MicroVmManager>,
        leases: Arc<Leases>,
        stop: Arc<Notify>,
        recent: Arc<Recent>,
        sandboxes: Arc<Sandboxes>,
    ) -> Self {
        Self {
            pool,
            leases,
            stop,
            recent,
            sandboxes,
            repeats: Arc::default(),
            ready: Arc::default(),
        }
    }

    /// Shares the guard of a session that is there already; one that sleeps wakes. Cancel-safe.
    async fn take_known(&self, session: &str) -> Answer<Arc<Lease>> {
        let id = self.leases.find(session)?;
        self.pool.inspect(id)?;
        Ok(self.leases.take(id, None).await?)
    }
}

#[derive(utoipa::OpenApi)]
#[openapi(info(
    title = "denizen",
    description = "A persistent, isolated computer for every agent session. Within a session, \
                   processes and files can also be spoken to with envd's protocol, which is not \
                   described here.",
    license(name = "MIT", identifier = "MIT"),
), components(schemas(
    // What only a query or the data of an event has.
    files::View,
    files::WriteAs,
    denizen_api::Change,
    denizen_api::Ended,
    denizen_api::Event,
    denizen_api::Output,
)), modifiers(&Bearer), security(("key" = [])))]
struct Description;

/// How a client over TCP shows what lets it in. On the Unix socket nothing is needed.
struct Bearer;

impl utoipa::Modify for Bearer {
    fn modify(&self, description: &mut OpenApi) {
        let bearer = SecurityScheme::Http(Http::new(HttpAuthScheme::Bearer));
        let components = description.components.get_or_insert_default();
        components.add_security_scheme("key", bearer);
    }
}

/// All routes, and their description.
fn described() -> OpenApiRouter<Api> {
    OpenApiRouter::with_openapi(Description::openapi())
        .routes(routes!(daemon::health))
        .routes(routes!(daemon::lives))
        .routes(routes!(daemon::is_ready))
        .routes(routes!(daemon::metrics))
        .routes(routes!(daemon::shutdown))
        .routes(routes!(events::events))
        .routes(routes!(images::list, images::bring, images::remove))
        .routes(routes!(backups::all))
        .routes(routes!(backups::verify))
        .routes(routes!(backups::forget))
        .routes(routes!(backups::delete))
        .routes(routes!(backups::recover))
        .routes(routes!(sessions::list, sessions::create))
        .routes(routes!(sessions::inspect, sessions::ensure, sessions::remove))
        .routes(routes!(sessions::start))
        .routes(routes!(sessions::pause))
        .routes(routes!(sessions::stop))
        .routes(routes!(sessions::fork))
        .routes(routes!(backups::backup))
        .routes(routes!(backups::of_session))
        .routes(routes!(backups::restore))
        .routes(routes!(snapshots::diff))
        .routes(routes!(snapshots::list))
        .routes(routes!(snapshots::take, snapshots::remove))
        .routes(routes!(backups::export))
        .routes(routes!(backups::import))
        .routes(routes!(processes::list, processes::start))
        .routes(routes!(processes::output))
        .routes(routes!(processes::input))
        .routes(routes!(processes::signal))
        .routes(routes!(processes::resize))
        .routes(routes!(processes::log))
        .routes(routes!(files::read, files::write, files::rename, files::remove))
        .routes(routes!(ports::connect))
        .routes(routes!(ports::proxied))
}

/// The API as it is described to machines.
pub fn description() -> OpenApi {
    let mut description = described().into_openapi();
    description.merge(routes::described().into_openapi());
    // What the router calls the rest of a path, is a part of it like any other elsewhere.
    let paths = std::mem::take(&mut description.paths.paths);
    description.paths.paths =
        paths.into_iter().map(|(path, item)| (path.replace("{*", "{"), item)).collect();
    description
}

/// The API, with what is about access.
pub(crate) fn router(api: Api, access: Arc<Access>) -> Router {
    // Strings and numbers: this cannot fail. Made once: anybody may ask for it.
    let description = Bytes::from(serde_json::to_vec(&description()).unwrap_or_default());
    let machines = move || std::future::ready(([(CONTENT_TYPE, "application/json")], description));
    let root = axum::routing::get(files::read).put(files::write).post(files::rename);
    Router::from(described())
        .route("/v1/openapi.json", axum::routing::get(machines))
        // The rest of a path is not empty: the root of a session, and of what a port serves.
        .route("/v1/sessions/{session}/files/", root.delete(files::remove))
        .route("/v1/sessions/{session}/ports/{port}/", any(ports::proxy))
        .route("/v1/sessions/{session}/ports/{port}/{*rest}", any(ports::proxy))
        .route("/v1/{*rest}", any(nothing))
        .with_state(api)
        .merge(Router::from(routes::described()).with_state(access))
        .method_not_allowed_fallback(no_method)
}

async fn nothing(uri: Uri) -> Refused {
    Refused::new(Code::NotFound, format!("{}: see /v1/openapi.json", uri.path()))
}

async fn no_method(uri: Uri) -> Refused {
    Refused::new(Code::BadMethod, format!("{}: see /v1/openapi.json", uri.path()))
}
