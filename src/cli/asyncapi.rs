//! The AsyncAPI document.
use serde_json::{Value, json};

use crate::broker::Names;

/// The document.
#[must_use]
pub fn document(names: &Names) -> Value {
    json!({"x": names.task()})
}
