//! Images: roots for new sessions.

use std::path::PathBuf;

use axum::body::Body;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use denizen::{Credentials, ImportOptions, Progress, PullOptions, Stage};
use denizen_api::{BringImage, Bringing, Code, Image};
use futures::{StreamExt, stream};
use serde::Deserialize;
use utoipa::IntoParams;

use super::extract::{Json, Query};
use super::refusal::{Answer, Refused};
use super::{Api, wire};

/// List images.
#[utoipa::path(get, path = "/v1/images", tag = "images",
    responses((status = 200, body = Vec<Image>), Refused))]
pub(crate) async fn list(State(api): State<Api>) -> Answer<axum::Json<Vec<Image>>> {
    let all = api.pool.images().await?;
    Ok(axum::Json(all.into_iter().map(wire::image).collect()))
}

/// Bring an image from a registry or a file.
///
/// The answer is one JSON object a line: how far it is, then the image or why there is none.
/// It ends with its request.
#[utoipa::path(post, path = "/v1/images", tag = "images", request_body = BringImage,
    responses((status = 200, content_type = "application/x-ndjson", body = Bringing), Refused))]
pub(crate) async fn bring(
    State(api): State<Api>,
    Json(bring): Json<BringImage>,
) -> Answer<Response> {
    api.pool.images().await?;
    let (lines, told) = tokio::sync::mpsc::unbounded_channel::<Bringing>();
    let progress = {
        let lines = lines.clone();
        move |step: Progress| {
            let stage = match step.stage {
                Stage::Fetching => "fetching",
                Stage::Unpacking => "unpacking",
                Stage::Done => "done",
            };
            // Whoever asked may have gone.
            let _ = lines.send(Bringing::Step {
                stage: stage.to_owned(),
                layer: step.layer,
                layers: step.layers,
                bytes: step.bytes,
                total: Some(step.total).filter(|total| *total > 0),
            });
        }
    };
    let busy = api.leases.busy();
    let work = async move {
        let brought = match bring {
            BringImage::Pull { reference, user, password, certificates } => {
                let mut options = PullOptions::default();
                options.certificates = certificates;
                options.credentials = match (user, password) {
                    (Some(user), Some(password)) => Credentials::Password { user, password },
                    _ => docker_credentials(),
                };
                api.pool.pull_image(&reference, &options, progress).await
            }
            BringImage::Import { path, name, image } => {
                let mut options = ImportOptions::default();
                options.name = name;
                options.image = image;
                api.pool.import_image(path, options, progress).await
            }
        };
        let last = match brought {
            Ok(image) => Bringing::Image { image: wire::image(image) },
            Err(error) => Bringing::Error { error: Refused::from(error).0 },
        };
        let _ = lines.send(last);
        drop(busy);
    };
    // Ends with the response: nobody waits for it any more.
    let work = stream::once(work).filter_map(|()| async { None });
    let told = tokio_stream::wrappers::UnboundedReceiverStream::new(told);
    let lines = stream::select(work, told).map(|line| {
        // Strings and numbers: this cannot fail.
        let mut line = serde_json::to_vec(&line).unwrap_or_default();
        line.push(b'\n');
        Ok::<_, std::convert::Infallible>(line)
    });
    Ok(([("content-type", "application/x-ndjson")], Body::from_stream(lines)).into_response())
}

/// As whom Docker would ask.
fn docker_credentials() -> Credentials {
    let folder = std::env::var_os("DOCKER_CONFIG")
        .map(PathBuf::from)
        .or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".docker")));
    let file = folder.map(|folder| folder.join("config.json")).filter(|file| file.exists());
    file.map_or(Credentials::Anonymous, Credentials::DockerConfig)
}

/// Which image.
#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct Named {
    /// Its name.
    name: String,
}

/// Remove an image; sessions that were made of it go on.
#[utoipa::path(delete, path = "/v1/images", tag = "images", params(Named),
    responses((status = 204, description = "It is gone"), Refused))]
pub(crate) async fn remove(
    State(api): State<Api>,
    Query(Named { name }): Query<Named>,
) -> Answer<StatusCode> {
    if api.pool.remove_image(&name).await? {
        return Ok(StatusCode::NO_CONTENT);
    }
    Err(Refused::new(Code::UnknownImage, format!("there is no image {name}")))
}
