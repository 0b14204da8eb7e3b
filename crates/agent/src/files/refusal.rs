//! What a request for a file is refused with.

use std::io;
use std::path::Path;

use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderName, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use denizen_api::{Code, PROBLEM, Problem};

/// An answer that is none; perhaps with a header that says more.
#[derive(Debug)]
pub(crate) struct Refused {
    code: Code,
    detail: String,
    header: Option<(HeaderName, HeaderValue)>,
}

pub(super) type Answer = Result<Response, Refused>;

impl Refused {
    pub(super) fn new(code: Code, detail: impl Into<String>) -> Self {
        Self { code, detail: detail.into(), header: None }
    }

    pub(super) fn bad(detail: impl Into<String>) -> Self {
        Self::new(Code::BadRequest, detail)
    }

    pub(super) fn with(mut self, name: HeaderName, value: HeaderValue) -> Self {
        self.header = Some((name, value));
        self
    }

    /// What the system says of a path.
    pub(super) fn of(path: &Path, error: &io::Error) -> Self {
        use io::ErrorKind;
        let code = match error.kind() {
            ErrorKind::NotFound => Code::NoFile,
            ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem => Code::NotPermitted,
            ErrorKind::AlreadyExists => Code::AlreadyExists,
            ErrorKind::NotADirectory => Code::NotFolder,
            ErrorKind::IsADirectory => Code::IsFolder,
            ErrorKind::DirectoryNotEmpty => Code::NotEmpty,
            ErrorKind::CrossesDevices => Code::OtherDisk,
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::FileTooLarge => {
                Code::NoSpace
            }
            ErrorKind::InvalidInput | ErrorKind::InvalidFilename => Code::BadName,
            ErrorKind::ResourceBusy | ErrorKind::ExecutableFileBusy => Code::BadState,
            _ if error.raw_os_error() == Some(rustix::io::Errno::LOOP.raw_os_error()) => {
                Code::BadName
            }
            _ => Code::Failed,
        };
        Self::new(code, format!("{}: {error}", path.display()))
    }
}

impl IntoResponse for Refused {
    fn into_response(self) -> Response {
        let problem = Problem::new(self.code, self.detail);
        let status = StatusCode::from_u16(problem.status);
        let status = status.unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        // Strings and a number: this cannot fail.
        let body = serde_json::to_vec(&problem).unwrap_or_default();
        let mut response = (status, [(CONTENT_TYPE, PROBLEM)], body).into_response();
        if let Some((name, value)) = self.header {
            response.headers_mut().insert(name, value);
        }
        response
    }
}
