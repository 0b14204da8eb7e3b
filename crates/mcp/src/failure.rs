//! Why a tool did not do what it was asked for, in words for a model: what is wrong, and what to
//! do about it.

use denizen_client::Error;
use denizen_client::api::Code;

/// A tool that has failed: its result says so.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Failure(pub(crate) String);

impl Failure {
    pub(crate) fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }
}

/// What a tool gives.
pub(crate) type Result<T> = std::result::Result<T, Failure>;

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let Error::Refused(problem) = &error else { return Self(error.to_string()) };
        let advice = match problem.code {
            Code::UnknownSession => {
                "list_sessions lists those that there are, start_session makes one"
            }
            Code::NoSnapshot => "list_snapshots lists those that there are",
            Code::UnknownProcess => "list_processes lists those that there are",
            Code::NoFile => "list_files shows what a folder has",
            Code::IsFolder => "list_files shows what it has",
            Code::InUse => {
                "something runs in it: kill_process ends that, or `force` where there is it"
            }
            Code::AtCapacity => "stop_session makes room, or try again later",
            Code::NotEmpty => "`recursive` removes what is in it too",
            _ => return Self(problem.detail.clone()),
        };
        let what = match problem.code {
            // What it says to do is for those who speak HTTP.
            Code::IsFolder => problem.title.as_str(),
            _ => problem.detail.as_str(),
        };
        Self(format!("{what} ({advice})"))
    }
}

/// Whether the daemon refuses for this reason.
pub(crate) fn is(error: &Error, code: Code) -> bool {
    matches!(error, Error::Refused(problem) if problem.code == code)
}
