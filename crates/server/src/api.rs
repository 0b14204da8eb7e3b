//! `/v1`: sessions as resources, in JSON. What is said is in the crate `denizen-api`; its
//! description for machines (OpenAPI 3.1) is made of the handlers here, and served at
//! `/v1/openapi.json`.
//!
//! A handler reads a request, asks the pool and words the answer. It must never decide anything
//! about a session.

mod backups;
mod daemon;
mod events;
mod extract;
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
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

pub(crate) use daemon::metrics_or_envd;
pub(crate) use events::Recent;
pub(crate) use refusal::Refused;
use repeats::Repeats;

use crate::lease::Leases;

/// What handlers have.
#[derive(Clone)]
pub(crate) struct Api {
    pub(crate) pool: Arc<MicroVmManager>,
    pub(crate) leases: Arc<Leases>,
    /// Told when somebody wants the daemon to end.
    pub(crate) stop: Arc<Notify>,
    pub(crate) recent: Arc<Recent>,
    repeats: Arc<Repeats>,
    ready: Arc<daemon::Ready>,
}

impl Api {
    pub(crate) fn new(
        pool: Arc<MicroVmManager>,
        leases: Arc<Leases>,
        stop: Arc<Notify>,
        recent: Arc<Recent>,
    ) -> Self {
        Self { pool, leases, stop, recent, repeats: Arc::default(), ready: Arc::default() }
    }
}

#[derive(utoipa::OpenApi)]
#[openapi(info(
    title = "denizen",
    description = "A persistent, isolated computer for every agent session. Within a session, \
                   processes and files can also be spoken to with envd's protocol, which is not \
                   described here.",
    license(name = "MIT", identifier = "MIT"),
))]
struct Description;

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
        .routes(routes!(ports::connect))
}

/// The API as it is described to machines.
pub fn description() -> OpenApi {
    described().into_openapi()
}

pub(crate) fn router(api: Api) -> Router {
    let (router, description) = described().split_for_parts();
    // Strings and numbers: this cannot fail. Made once: anybody may ask for it.
    let description = Bytes::from(serde_json::to_vec(&description).unwrap_or_default());
    let described = move || std::future::ready(([(CONTENT_TYPE, "application/json")], description));
    router
        .route("/v1/openapi.json", axum::routing::get(described))
        .route("/v1/{*rest}", any(nothing))
        .method_not_allowed_fallback(no_method)
        .with_state(api)
}

async fn nothing(uri: Uri) -> Refused {
    Refused::new(Code::NotFound, format!("{}: see /v1/openapi.json", uri.path()))
}

async fn no_method(uri: Uri) -> Refused {
    Refused::new(Code::BadMethod, format!("{}: see /v1/openapi.json", uri.path()))
}
