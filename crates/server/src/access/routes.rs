//! Keys, tokens and who one is, as resources.

use std::sync::Arc;
use std::time::Duration;

use axum::Extension;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use denizen_api::{Code, Keys, MadeKey, NewKey, NewToken, Token, Whoami};
use jiff::Timestamp;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::{Access, Caller, Credential, KeysError, Reach, tokens};
use crate::api::extract::{Json, Path};
use crate::api::{Answer, Refused};

/// The routes, and their description.
pub(crate) fn described() -> OpenApiRouter<Arc<Access>> {
    OpenApiRouter::new()
        .routes(routes!(whoami))
        .routes(routes!(list, create))
        .routes(routes!(revoke))
        .routes(routes!(token, void_tokens))
}

impl From<KeysError> for Refused {
    fn from(error: KeysError) -> Self {
        match error {
            KeysError::Bad(why) => Self::new(Code::BadRequest, why),
            error => Self::new(Code::Failed, error.to_string()),
        }
    }
}

/// Keys are written to disk: not on a thread that serves others.
async fn changing<T: Send + 'static>(
    access: Arc<Access>,
    change: impl FnOnce(&Access) -> Result<T, KeysError> + Send + 'static,
) -> Answer<T> {
    match tokio::task::spawn_blocking(move || change(&access)).await {
        Ok(done) => Ok(done?),
        Err(error) => {
            Err(Refused::new(Code::Failed, format!("the keys were not changed: {error}")))
        }
    }
}

/// Tell by which key or token this is asked, and what that allows.
#[utoipa::path(get, path = "/v1/whoami", tag = "access",
    responses((status = 200, body = Whoami), Refused))]
async fn whoami(Extension(caller): Extension<Caller>) -> axum::Json<Whoami> {
    let id = match caller.credential {
        Credential::Key(id) => Some(id),
        _ => None,
    };
    let (sessions, session) = match caller.reach {
        Reach::All => (None, None),
        Reach::Prefix(prefix) => (Some(prefix), None),
        Reach::One(session) => (None, Some(session)),
    };
    let expires_at = caller.expires.map(|at| at.to_string());
    let Caller { name, scope, .. } = caller;
    axum::Json(Whoami { id, name, scope, sessions, session, expires_at })
}

/// List keys.
#[utoipa::path(get, path = "/v1/keys", tag = "access",
    responses((status = 200, body = Keys), Refused))]
async fn list(State(access): State<Arc<Access>>) -> axum::Json<Keys> {
    let keys = access.keys.list().into_iter().map(super::KeyInfo::told).collect();
    axum::Json(Keys { keys })
}

/// Make a key. It is told in this answer, and never again.
#[utoipa::path(post, path = "/v1/keys", tag = "access", request_body = NewKey,
    responses((status = 201, body = MadeKey), Refused))]
async fn create(
    State(access): State<Arc<Access>>,
    Json(new): Json<NewKey>,
) -> Answer<(StatusCode, axum::Json<MadeKey>)> {
    let (info, key) = changing(access, move |access| access.keys.create(new)).await?;
    Ok((StatusCode::CREATED, axum::Json(MadeKey { info: info.told(), key })))
}

/// Revoke a key: what is being done with it ends.
#[utoipa::path(delete, path = "/v1/keys/{id}", tag = "access",
    params(("id" = String, Path, description = "What names the key")),
    responses((status = 204, description = "It is good for nothing"), Refused))]
async fn revoke(State(access): State<Arc<Access>>, Path(id): Path<String>) -> Answer<StatusCode> {
    let wanted = id.clone();
    if changing(access, move |access| access.keys.revoke(&wanted)).await? {
        return Ok(StatusCode::NO_CONTENT);
    }
    Err(Refused::new(Code::UnknownKey, format!("there is no key {id}")))
}

/// Make a token for one session, which lives no longer than what it is asked for with.
#[utoipa::path(post, path = "/v1/sessions/{session}/tokens", tag = "access",
    params(("session" = String, Path, description = "Name or UUID")),
    request_body = Option<NewToken>,
    responses((status = 201, body = Token), Refused))]
async fn token(
    State(access): State<Arc<Access>>,
    Extension(caller): Extension<Caller>,
    Path(session): Path<String>,
    new: Option<Json<NewToken>>,
) -> Answer<Response> {
    let session = access.leases.find(&session)?;
    access.pool.inspect(session)?;
    let life = new.and_then(|Json(new)| new.expires_in_seconds).map(Duration::from_secs);
    let life = life.unwrap_or(tokens::LIFE);
    if life.is_zero() || life > tokens::LONGEST_LIFE.unsigned_abs() {
        let why = "a token expires in one second to thirty days".to_owned();
        return Err(Refused::new(Code::BadRequest, why));
    }
    let expires = Timestamp::now() + life;
    let expires = caller.expires.map_or(expires, |at| at.min(expires));
    let token = access.keys.token(session, caller.key(), expires);
    let told = Token { token, session, expires_at: expires.to_string() };
    Ok((StatusCode::CREATED, axum::Json(told)).into_response())
}

/// Void all tokens of a session, whoever has made them.
#[utoipa::path(delete, path = "/v1/sessions/{session}/tokens", tag = "access",
    params(("session" = String, Path, description = "Name or UUID")),
    responses((status = 204, description = "They are good for nothing"), Refused))]
async fn void_tokens(
    State(access): State<Arc<Access>>,
    Path(session): Path<String>,
) -> Answer<StatusCode> {
    let session = access.leases.find(&session)?;
    access.pool.inspect(session)?;
    changing(access, move |access| access.keys.void_tokens(session)).await?;
    Ok(StatusCode::NO_CONTENT)
}
