//! What happens to sessions.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
#[cfg(feature = "openapi")]
use utoipa::ToSchema;
use uuid::Uuid;

/// Something that happened to a session.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
pub struct Event {
    /// When.
    pub at: f64,
    /// To which; all zeroes if to none or to all of them.
    pub session: Uuid,
    /// Its name, if it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// What: `created`, `started`, `stopped`, `backed_up` and so on; new ones may come.
    pub event: String,
    /// What else there is to say, by the kind of event.
    #[serde(flatten)]
    pub details: Map<String, Value>,
}
