//! Keys, tokens and who one is, as resources.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post};
use axum::{Extension, Json, Router};
use denizen_api::Code;
use jiff::Timestamp;
use serde::Deserialize;

use super::{Access, Caller, Credential, KeysError, NewKey, Reach, tokens};
use crate::api::Refused;

pub(crate) fn router() -> Router<Arc<Access>> {
    Router::new()
        .route("/v1/whoami", get(whoami))
        .route("/v1/keys", get(list).post(create))
        .route("/v1/keys/{id}", delete(revoke))
        .route("/v1/sessions/{session}/tokens", post(token).delete(void_tokens))
}

type Answer<T> = Result<T, Refused>;

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

async fn whoami(Extension(caller): Extension<Caller>) -> Json<serde_json::Value> {
    let id = match &caller.credential {
        Credential::Key(id) => Some(id),
        _ => None,
    };
    let session = match &caller.reach {
        Reach::One(session) => Some(session),
        _ => None,
    };
    let sessions = match &caller.reach {
        Reach::Prefix(prefix) => Some(prefix),
        _ => None,
    };
    Json(serde_json::json!({
        "id": id, "name": caller.name, "scope": caller.scope, "sessions": sessions,
        "session": session, "expires_at": caller.expires,
    }))
}

async fn list(State(access): State<Arc<Access>>) -> Json<serde_json::Value> {
    Json(serde_json::json!({ "keys": access.keys.list() }))
}

async fn create(State(access): State<Arc<Access>>, Json(new): Json<NewKey>) -> Answer<Response> {
    let (info, key) = changing(access, move |access| access.keys.create(new)).await?;
    let told = serde_json::json!({
        "id": info.id, "name": info.name, "scope": info.scope, "sessions": info.sessions,
        "created_at": info.created_at, "expires_at": info.expires_at, "key": key,
    });
    Ok((StatusCode::CREATED, Json(told)).into_response())
}

async fn revoke(State(access): State<Arc<Access>>, Path(id): Path<String>) -> Answer<StatusCode> {
    let wanted = id.clone();
    if changing(access, move |access| access.keys.revoke(&wanted)).await? {
        return Ok(StatusCode::NO_CONTENT);
    }
    Err(Refused::new(Code::UnknownKey, format!("there is no key {id}")))
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct NewToken {
    expires_in_seconds: Option<u64>,
}

/// A token lives no longer than what it was asked for with.
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
    let issuer = match &caller.credential {
        Credential::Key(id) => Some(id.as_str()),
        Credential::Token(token) => token.issuer.as_deref(),
        Credential::Local { .. } | Credential::None => None,
    };
    let token = access.keys.token(session, issuer, expires);
    let told = serde_json::json!({
        "token": token, "session": session, "expires_at": expires,
    });
    Ok((StatusCode::CREATED, Json(told)).into_response())
}

/// All tokens of a session, whoever has made them.
async fn void_tokens(
    State(access): State<Arc<Access>>,
    Path(session): Path<String>,
) -> Answer<StatusCode> {
    let session = access.leases.find(&session)?;
    access.pool.inspect(session)?;
    changing(access, move |access| access.keys.void_tokens(session)).await?;
    Ok(StatusCode::NO_CONTENT)
}
