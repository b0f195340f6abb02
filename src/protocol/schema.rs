//! JSON Schemas (draft 2020-12) of every message, printed from the types.

use schemars::{JsonSchema, generate::SchemaSettings};
use serde_json::Value;

use super::{ControlAnswer, ControlMessage, Event, TaskMessage};

/// The names of the messages.
pub const NAMES: [&str; 4] = ["task", "event", "control", "control-answer"];

/// Every schema, by the name of its message.
#[must_use]
pub fn all() -> Vec<(&'static str, Value)> {
    NAMES.into_iter().zip([task(), event(), control(), control_answer()]).collect()
}

/// The schema of a task.
#[must_use]
pub fn task() -> Value {
    schema::<TaskMessage>("task")
}

/// The schema of an event.
#[must_use]
pub fn event() -> Value {
    schema::<Event>("event")
}

/// The schema of a control message.
#[must_use]
pub fn control() -> Value {
    schema::<ControlMessage>("control")
}

/// The schema of an answer to a control message.
#[must_use]
pub fn control_answer() -> Value {
    schema::<ControlAnswer>("control-answer")
}

fn schema<T: JsonSchema>(name: &str) -> Value {
    let generated = SchemaSettings::draft2020_12().into_generator().into_root_schema_for::<T>();
    let mut value = Value::from(generated);
    if let Some(object) = value.as_object_mut() {
        object.insert("$id".to_owned(), format!("urn:haul:v1:{name}").into());
    }
    value
}
