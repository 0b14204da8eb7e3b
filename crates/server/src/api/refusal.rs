//! What a request is refused with: a pool's error in the words of the API.

use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use denizen::{ArchiveError, Error};
use denizen_api::{Code, PROBLEM, Problem};
use utoipa::openapi::{Ref, RefOr};

/// An answer that is none.
#[derive(Debug)]
pub(crate) struct Refused(
    pub(crate) Problem,
    /// After how many seconds the same may be asked again, if it may be.
    pub(crate) u64,
);

impl Refused {
    pub(crate) fn new(code: Code, detail: impl Into<String>) -> Self {
        Self(Problem::new(code, detail), 1)
    }

    /// Because the session had to be given back before it was done.
    pub(crate) fn stopped() -> Self {
        Self::new(Code::Stopped, "the session is being stopped: a part may have been done")
    }

    /// The same, if it may be asked again after so many seconds and not before.
    pub(crate) fn after(self, seconds: u64) -> Self {
        Self(self.0, seconds)
    }
}

pub(crate) type Answer<T> = Result<T, Refused>;

impl IntoResponse for Refused {
    fn into_response(self) -> Response {
        let Self(problem, after) = self;
        let status = StatusCode::from_u16(problem.status);
        let status = status.unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        // Strings and a number: this cannot fail.
        let body = serde_json::to_vec(&problem).unwrap_or_default();
        let mut response = (status, [(CONTENT_TYPE, PROBLEM)], body).into_response();
        let headers = response.headers_mut();
        match problem.code {
            Code::Unauthenticated => {
                headers.insert("www-authenticate", HeaderValue::from_static("Bearer"));
            }
            Code::AtCapacity | Code::ShuttingDown | Code::RateLimited => {
                headers.insert("retry-after", after.into());
            }
            Code::Upgrade => {
                headers.insert("upgrade", HeaderValue::from_static("tcp"));
            }
            _ => {}
        }
        // For who words it in another way.
        response.extensions_mut().insert(problem);
        response
    }
}

impl From<Error> for Refused {
    fn from(error: Error) -> Self {
        let code = match error.kind() {
            Error::Unknown { .. } => Code::UnknownSession,
            Error::NoBackup { .. } | Error::UnknownBackup { .. } => Code::NoBackup,
            Error::BackupNeeded { .. } => Code::BackupNeeded,
            Error::NotPutBack { .. } => Code::NoFile,
            Error::NoSnapshot { .. } => Code::NoSnapshot,
            Error::SnapshotExists { .. } => Code::SnapshotExists,
            Error::Name { .. } => Code::BadName,
            Error::InUse { .. } | Error::ShareInUse { .. } => Code::InUse,
            Error::AlreadyExists { .. } | Error::ShareExists { .. } => Code::AlreadyExists,
            Error::UnknownShare { .. } => Code::NotFound,
            Error::Mounts { .. } => Code::BadRequest,
            Error::BrokenOff { .. } => Code::BrokenOff,
            Error::NotImported(ArchiveError::NoSpace { .. })
            | Error::Backup(ArchiveError::NoSpace { .. }) => Code::NoSpace,
            Error::NotImported(
                ArchiveError::Damaged { .. }
                | ArchiveError::Refused { .. }
                | ArchiveError::TooLarge { .. },
            ) => Code::BadArchive,
            Error::OtherImage { .. } => Code::OtherImage,
            Error::NoDestination | Error::DestinationGone { .. } => Code::NoDestination,
            Error::VolumeMissing { .. } => Code::VolumeMissing,
            Error::AtCapacity { .. } | Error::AcquireTimeout { .. } => Code::AtCapacity,
            Error::Image(denizen_image::Error::NotFound { .. }) => Code::UnknownImage,
            Error::Isolation { .. } | Error::NoFreezer { .. } => Code::Isolation,
            Error::ShuttingDown => Code::ShuttingDown,
            _ => Code::Failed,
        };
        Self::new(code, error.to_string())
    }
}

/// All that is refused is refused in the same way, with whatever status fits.
impl utoipa::IntoResponses for Refused {
    fn responses() -> std::collections::BTreeMap<String, RefOr<utoipa::openapi::response::Response>>
    {
        let content = utoipa::openapi::ContentBuilder::new()
            .schema(Some(RefOr::Ref(Ref::from_schema_name("Problem"))))
            .build();
        let response = utoipa::openapi::ResponseBuilder::new()
            .description("Refused: problem details (RFC 9457)")
            .content(PROBLEM, content)
            .build();
        [("4XX", response.clone()), ("5XX", response)]
            .map(|(status, response)| (status.to_owned(), RefOr::T(response)))
            .into()
    }
}
