//! Skeleton.
use std::path::Path;
pub(crate) fn run(_: Option<&Path>) -> Result<(), String> {
    Err("not there yet".to_owned())
}
