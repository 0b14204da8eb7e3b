//! The parts of a request, refused in the words of the API if they are not what they should be.

use std::borrow::Cow;

use axum::extract::rejection::{JsonRejection, PathRejection, QueryRejection};
use axum::extract::{FromRequest, FromRequestParts, OptionalFromRequest, Request};
use axum::http::StatusCode;
use axum::http::request::Parts;
use denizen_api::Code;
use percent_encoding::percent_decode_str;
use serde::de::DeserializeOwned;

use super::refusal::Refused;

/// As [`axum::Json`].
pub(crate) struct Json<T>(pub(crate) T);
/// As [`axum::body::Bytes`].
pub(crate) struct Bytes(pub(crate) axum::body::Bytes);
/// As [`axum::extract::Path`].
pub(crate) struct Path<T>(pub(crate) T);
/// As [`axum::extract::Query`].
pub(crate) struct Query<T>(pub(crate) T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for Json<T> {
    type Rejection = Refused;

    async fn from_request(request: Request, state: &S) -> Result<Self, Refused> {
        let value = <axum::Json<T> as FromRequest<S>>::from_request(request, state).await;
        let axum::Json(value) = value?;
        Ok(Self(value))
    }
}

/// Nothing, where no content of any type is sent.
impl<T: DeserializeOwned, S: Send + Sync> OptionalFromRequest<S> for Json<T> {
    type Rejection = Refused;

    async fn from_request(request: Request, state: &S) -> Result<Option<Self>, Refused> {
        let value = <axum::Json<T> as OptionalFromRequest<S>>::from_request(request, state).await?;
        Ok(value.map(|axum::Json(value)| Self(value)))
    }
}

impl<T: DeserializeOwned + Send, S: Send + Sync> FromRequestParts<S> for Path<T> {
    type Rejection = Refused;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Refused> {
        let axum::extract::Path(value) =
            axum::extract::Path::from_request_parts(parts, state).await?;
        Ok(Self(value))
    }
}

impl<T: DeserializeOwned, S: Send + Sync> FromRequestParts<S> for Query<T> {
    type Rejection = Refused;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Refused> {
        let axum::extract::Query(value) =
            axum::extract::Query::from_request_parts(parts, state).await?;
        Ok(Self(value))
    }
}

/// The session in a path `/v1/sessions/{session}/…`, and what follows it as it was written: that
/// may be escaped bytes that are no text, which [`Path`] does not read.
pub(crate) fn session(path: &str) -> Option<(Cow<'_, str>, &str)> {
    let rest = path.strip_prefix("/v1/sessions/")?;
    let (session, rest) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    Some((percent_decode_str(session).decode_utf8().ok()?, rest))
}

impl<S: Send + Sync> FromRequest<S> for Bytes {
    type Rejection = Refused;

    async fn from_request(request: Request, state: &S) -> Result<Self, Refused> {
        let bytes = axum::body::Bytes::from_request(request, state).await;
        bytes.map(Self).map_err(|rejection| {
            let code = match rejection.status() {
                StatusCode::PAYLOAD_TOO_LARGE => Code::TooLarge,
                _ => Code::BrokenOff,
            };
            Refused::new(code, rejection.body_text())
        })
    }
}

impl From<JsonRejection> for Refused {
    fn from(rejection: JsonRejection) -> Self {
        let code = match rejection.status() {
            StatusCode::PAYLOAD_TOO_LARGE => Code::TooLarge,
            StatusCode::UNSUPPORTED_MEDIA_TYPE => Code::BadType,
            _ => Code::BadRequest,
        };
        Self::new(code, rejection.body_text())
    }
}

impl From<PathRejection> for Refused {
    fn from(rejection: PathRejection) -> Self {
        Self::new(Code::BadRequest, rejection.body_text())
    }
}

impl From<QueryRejection> for Refused {
    fn from(rejection: QueryRejection) -> Self {
        Self::new(Code::BadRequest, rejection.body_text())
    }
}
