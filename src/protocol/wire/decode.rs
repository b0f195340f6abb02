//! Reading a delivered message: everything that is not clearly one of ours is refused, with the reason.

use serde::{Deserialize, de::DeserializeOwned};
use serde_json::Value;

use super::{CONTENT_TYPE, LARGEST_BODY, Message, truncate};
use crate::{
    failure::Failure,
    protocol::{Control, ControlMessage, Kind, ProjectId, Task, TaskId, TaskMessage, VERSION},
};

/// Why a delivery is no task of ours, and as much of its identity as could be read.
#[derive(Clone, Debug, PartialEq)]
pub struct Undecodable {
    /// Class `invalid`, with the reason.
    pub failure: Failure,
    /// Enough to report it with an event.
    pub identity: Option<Identity>,
}

/// What an event needs to know of a task.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The task.
    pub task_id: TaskId,
    /// Its kind.
    pub kind: Kind,
    /// Its project.
    pub project_id: ProjectId,
    /// Its generation.
    pub generation: Option<u64>,
}

impl From<&Task> for Identity {
    fn from(task: &Task) -> Self {
        Self { task_id: task.id.clone(), kind: task.kind(), project_id: task.project, generation: task.generation }
    }
}

/// Reads a task from a delivered message.
///
/// # Errors
/// [`Undecodable`] with class `invalid`: not JSON, not UTF-8, too large, too deep, another content type, wrong types,
/// duplicate fields, an unknown kind, a higher version, or a field that is refused.
pub fn decode_task(message: &Message) -> Result<Task, Undecodable> {
    parse::<TaskMessage>(message, "a task")
        .and_then(Task::try_from)
        .map_err(|failure| Undecodable { failure, identity: identity(&message.body) })
}

/// Reads a control message from a delivered message.
///
/// # Errors
/// `invalid` with the reason.
pub fn decode_control(message: &Message) -> Result<ControlMessage, Failure> {
    let control: ControlMessage = parse(message, "a command")?;
    Control::try_from(control.clone())?;
    Ok(control)
}

/// Reads a body as one of our messages, refusing it with a reason for people.
fn parse<T: DeserializeOwned>(message: &Message, what: &str) -> Result<T, Failure> {
    let body = &message.body;
    if body.len() > LARGEST_BODY {
        return Err(Failure::invalid(format!("the body has {} bytes, more than {LARGEST_BODY}", body.len())));
    }
    if let Some(content_type) = message.content_type.as_deref().filter(|content_type| !is_json(content_type)) {
        let shown = crate::protocol::names::quoted(content_type);
        return Err(Failure::invalid(format!("the content type is {shown}, not {CONTENT_TYPE}")));
    }
    let Ok(text) = std::str::from_utf8(body) else {
        return Err(Failure::invalid("the body is not UTF-8"));
    };
    // All of it, fields that we do not know included: nesting and numbers have their limits everywhere.
    let value: Value = serde_json::from_str(text).map_err(|error| not(what, &error))?;
    // A later version may have changed anything: say that it is later rather than what is odd about it.
    if let Some(v) = value.get("v").and_then(Value::as_u64).filter(|&v| v > u64::from(VERSION)) {
        let ours = VERSION;
        return Err(Failure::invalid(format!("the message is of version {v}, this agent speaks version {ours}")));
    }
    // From the text again, where a duplicate field is still to be seen.
    serde_json::from_str(text).map_err(|error| not(what, &error))
}

fn not(what: &str, error: &serde_json::Error) -> Failure {
    let mut reason = crate::protocol::printable(&error.to_string());
    truncate(&mut reason, 300);
    Failure::invalid(format!("the body is not {what}: {reason}"))
}

fn is_json(content_type: &str) -> bool {
    let essence = content_type.split(';').next().unwrap_or_default().trim();
    essence.eq_ignore_ascii_case(CONTENT_TYPE)
}

/// As much of a refused task's identity as can be read; nothing where a field of it is there twice, since then it
/// might be reported under the name of another task.
fn identity(body: &[u8]) -> Option<Identity> {
    #[derive(Deserialize)]
    struct Fields {
        task_id: TaskId,
        kind: Kind,
        project_id: ProjectId,
        #[serde(default)]
        generation: Option<Value>,
    }
    if body.len() > LARGEST_BODY {
        return None;
    }
    let fields: Fields = serde_json::from_slice(body).ok()?;
    Some(Identity {
        task_id: fields.task_id,
        kind: fields.kind,
        project_id: fields.project_id,
        generation: fields.generation.as_ref().and_then(Value::as_u64),
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use bytes::Bytes;

    use super::*;

    fn plain() -> Value {
        json!({"v": 1, "task_id": "t", "kind": "clone", "project_id": 42,
            "git_url": "https://git.example/team/app.git", "target_path": "7_app"})
    }

    fn message(body: impl Into<Bytes>) -> Message {
        Message { body: body.into(), content_type: Some(CONTENT_TYPE.to_owned()), ..Message::default() }
    }

    fn with(field: &str, value: Value) -> Message {
        let mut task = plain();
        task[field] = value;
        message(task.to_string())
    }

    fn refusal(message: &Message) -> String {
        let undecodable = decode_task(message).unwrap_err();
        assert_eq!(undecodable.failure.class, crate::failure::ErrorClass::Invalid);
        let sentence = undecodable.failure.message;
        assert!(sentence.len() < 600 && !sentence.chars().any(char::is_control), "{sentence}");
        sentence
    }

    #[test]
    fn bodies_that_are_no_json_object_are_refused() {
        for body in
            ["", " ", "{", "null", "1", "[]", "\"x\"", "{}", "hello", "{\"v\":1}garbage", "\u{feff}{}", "'{}'", "\0"]
        {
            assert!(refusal(&message(body)).starts_with("the body is not a task"), "{body:?}");
        }
        let mut trailing = plain().to_string();
        trailing.push_str("{}");
        refusal(&message(trailing));
    }

    #[test]
    fn a_body_that_is_not_utf_8_is_refused_wherever_it_is_not() {
        for raw in [&b"\xff\xfe{\0}\0"[..], b"{\"v\":1,\"x\":\"\xc3\x28\"}", b"{\"\xed\xa0\x80\":1}", b"\x80"] {
            assert_eq!(refusal(&message(raw.to_vec())), "the body is not UTF-8");
        }
        let latin = plain().to_string().replace("7_app", "7_\u{e9}").chars().map(|c| c as u8).collect::<Vec<_>>();
        assert_eq!(refusal(&message(latin)), "the body is not UTF-8");
    }

    #[test]
    fn a_huge_body_is_refused_unread() {
        let undecodable = decode_task(&message(vec![b'['; 16 * 1024 * 1024])).unwrap_err();
        assert!(undecodable.failure.message.contains("16777216 bytes"));
        assert_eq!(undecodable.identity, None);
        let padded = format!("{}{}", plain(), " ".repeat(LARGEST_BODY));
        assert!(refusal(&message(padded)).contains("more than 65536"));
    }

    #[test]
    fn deep_nesting_is_refused_even_in_a_field_that_nobody_knows() {
        for (open, close) in [("[", "]"), ("{\"a\":", "}")] {
            let deep = format!("{}1{}", open.repeat(5000), close.repeat(5000));
            let body = plain().to_string().replacen('{', &format!("{{\"extra\":{deep},"), 1);
            assert!(refusal(&message(body)).contains("recursion limit"));
        }
    }

    #[test]
    fn a_field_that_is_there_twice_is_refused_and_reported_under_no_name() {
        for twice in ["\"task_id\":\"other\",", "\"kind\":\"delete\",", "\"project_id\":7,"] {
            let body = plain().to_string().replacen('{', &format!("{{{twice}"), 1);
            assert!(refusal(&message(body.clone())).contains("duplicate field"));
            assert_eq!(decode_task(&message(body)).unwrap_err().identity, None, "{twice}");
        }
        let body = plain().to_string().replacen('{', "{\"target_path\":\"8_app\",", 1);
        assert!(refusal(&message(body)).contains("duplicate field"));
    }

    #[test]
    fn wrong_types_are_refused() {
        for (field, value) in [
            ("v", json!("1")),
            ("v", json!(1.0)),
            ("v", json!(null)),
            ("v", json!(0)),
            ("v", json!(-1)),
            ("task_id", json!(7)),
            ("task_id", json!(null)),
            ("task_id", json!(["t"])),
            ("task_id", json!("")),
            ("task_id", json!("a b")),
            ("task_id", json!("x".repeat(129))),
            ("task_id", json!("../x")),
            ("kind", json!(1)),
            ("kind", json!("CLONE")),
            ("kind", json!("explode")),
            ("kind", json!({"clone": {}})),
            ("project_id", json!("42")),
            ("project_id", json!(4.2)),
            ("project_id", json!(true)),
            ("git_url", json!({"url": "https://h/x"})),
            ("git_url", json!(7)),
            ("branch", json!(7)),
            ("branch", json!(["main"])),
            ("depth", json!("1")),
            ("depth", json!(-1)),
            ("lfs", json!("yes")),
            ("generation", json!(-1)),
            ("generation", json!("3")),
            ("priority", json!(9)),
            ("priority", json!("urgent")),
            ("not_after", json!(0)),
            ("not_after", json!("tomorrow")),
            ("timeout_secs", json!(1.5)),
            ("on_conflict", json!("overwrite")),
        ] {
            refusal(&with(field, value));
        }
    }

    #[test]
    fn huge_numbers_are_refused() {
        for number in ["9223372036854775808", "-9223372036854775809", "1e400", "123456789012345678901234567890", "1e2"]
        {
            refusal(&message(plain().to_string().replace("42", number)));
        }
        let unknown = plain().to_string().replacen('{', "{\"extra\":1e999,", 1);
        refusal(&message(unknown));
        let generation = plain().to_string().replacen('{', "{\"generation\":18446744073709551616,", 1);
        refusal(&message(generation));
        let largest = plain().to_string().replace("42", "9223372036854775807");
        assert_eq!(decode_task(&message(largest)).unwrap().project, i64::MAX);
    }

    #[test]
    fn a_later_version_is_refused_as_such_whatever_else_changed() {
        let later = json!({"v": 2, "task_id": "t", "kind": "explode", "project_id": "a name"});
        assert!(refusal(&message(later.to_string())).contains("version 2, this agent speaks version 1"));
        assert!(refusal(&with("v", json!(4_294_967_296_u64))).contains("version 4294967296"));
    }

    #[test]
    fn another_content_type_is_refused_and_a_missing_one_is_not() {
        let typed = |content_type: Option<&str>| {
            decode_task(&Message { content_type: content_type.map(str::to_owned), ..message(plain().to_string()) })
        };
        for bad in ["text/plain", "application/x-python-serialize", "application/json5", "", "\u{1b}[31m"] {
            assert!(typed(Some(bad)).is_err(), "{bad:?}");
        }
        for good in [None, Some("application/json"), Some("Application/JSON; charset=utf-8")] {
            assert!(typed(good).is_ok(), "{good:?}");
        }
    }

    #[test]
    fn a_refused_task_is_reported_under_its_own_name_where_that_can_be_read() {
        let identity = decode_task(&with("target_path", json!(".."))).unwrap_err().identity.unwrap();
        assert_eq!((identity.task_id.as_str(), identity.kind, identity.project_id), ("t", Kind::Clone, 42));
        assert_eq!(decode_task(&with("kind", json!("explode"))).unwrap_err().identity, None);
    }

    #[test]
    fn what_else_a_command_may_be_is_refused() {
        for body in [
            "",
            "[]",
            "{}",
            r#"{"v":1,"command":"reboot"}"#,
            r#"{"v":1,"command":"cancel"}"#,
            r#"{"v":2,"command":"pause"}"#,
            r#"{"v":1,"command":"pause","command":"drain"}"#,
            r#"{"v":1,"command":"cancel","task_id":"a b"}"#,
        ] {
            assert!(decode_control(&message(body)).is_err(), "{body}");
        }
        assert!(decode_control(&message(r#"{"v":1,"command":"cancel","task_id":"t","extra":[]}"#)).is_ok());
    }
}
