//! The contract as files: what is under `schemas/` is what the program prints, takes and refuses.

#![expect(clippy::unwrap_used, reason = "a test's helpers are tests too")]

use std::{collections::BTreeMap, path::PathBuf};

use haul::{
    cli::schema::{files, pretty},
    protocol::{
        ControlAnswer, Event, schema,
        wire::{Message, decode_control, decode_task},
    },
};
use jsonschema::Validator;
use serde_json::Value;

/// Every file under `schemas/examples/rejected`: part of the reason, and whether the schema alone refuses it too.
const REJECTED: &[(&str, &str, bool)] = &[
    ("control-cancel-null-task", "cancel needs a task_id", true),
    ("control-cancel-without-task", "cancel needs a task_id", true),
    ("control-later-version", "version 2", true),
    ("control-no-command", "missing field `command`", true),
    ("control-unknown-command", "unknown variant `reboot`", true),
    ("task-branch-and-tag", "one of branch, tag and commit", true),
    ("task-branch-double-dot", "not a valid name of a ref", true),
    ("task-branch-head", "not a valid name of a ref", true),
    ("task-branch-lock", "not a valid name of a ref", true),
    ("task-branch-newline", "not a valid name of a ref", true),
    ("task-branch-option", "not a valid name of a ref", true),
    ("task-clone-null-url", "needs git_url", true),
    ("task-clone-without-target", "needs target_path", true),
    ("task-clone-without-url", "needs git_url", true),
    ("task-commit-short", "40 hexadecimal digits", true),
    ("task-commit-zero", "40 hexadecimal digits", true),
    ("task-credential-path", "must be the name of a credential", true),
    ("task-cut-off", "the body is not a task", false),
    ("task-depth-negative", "expected u32", true),
    ("task-depth-zero", "depth must be at least 1", true),
    ("task-duplicate-field", "duplicate field `kind`", false),
    ("task-expect-commit-short", "40 hexadecimal digits", true),
    ("task-generation-negative", "expected u64", true),
    ("task-huge-number", "number out of range", false),
    ("task-huge-project", "the body is not a task", true),
    ("task-id-number", "expected a string", true),
    ("task-id-too-long", "a task_id must be", true),
    ("task-id-with-slash", "a task_id must be", true),
    ("task-kind-in-capitals", "unknown variant `CLONE`", true),
    ("task-later-version", "version 2", true),
    ("task-list", "the body is not a task", true),
    ("task-no-id", "missing field `task_id`", true),
    ("task-no-project", "missing field `project_id`", true),
    ("task-no-version", "missing field `v`", true),
    ("task-not-after-words", "the body is not a task", true),
    ("task-not-json", "the body is not a task", false),
    ("task-null", "the body is not a task", true),
    ("task-on-conflict-unknown", "unknown variant `overwrite`", true),
    ("task-owner-name", "uid:gid", true),
    ("task-owner-root", "must not be root", true),
    ("task-priority-null-generation", "needs a generation", true),
    ("task-priority-unknown", "unknown variant `urgent`", true),
    ("task-priority-without-generation", "needs a generation", true),
    ("task-project-fraction", "expected i64", true),
    ("task-project-text", "expected i64", true),
    ("task-pull-bad-target", "begins with a dot", true),
    ("task-stall-zero", "stall_secs must be at least 1", true),
    ("task-target-absolute", "has a separator", true),
    ("task-target-climbs", "begins with a dot", true),
    ("task-target-empty", "is empty", true),
    ("task-target-newline", "control or invisible", true),
    ("task-target-number", "expected a string", true),
    ("task-target-reserved-device", "reserved device name", false),
    ("task-target-too-long", "longer than 255", true),
    ("task-target-trailing-dot", "ends with a dot", true),
    ("task-target-with-separator", "has a separator", true),
    ("task-timeout-zero", "timeout_secs must be at least 1", true),
    ("task-too-deep", "recursion limit", false),
    ("task-unknown-kind", "unknown variant `explode`", true),
    ("task-url-bare-path", "has no scheme", true),
    ("task-url-climbs", "two dots", false),
    ("task-url-dash-host", "begins with a dash", false),
    ("task-url-ext", "has no scheme", true),
    ("task-url-git-scheme", "the scheme \"git\"", true),
    ("task-url-hidden-newline", "hides a control character", false),
    ("task-url-too-long", "longer than 2048", true),
    ("task-url-with-password", "name a credential", false),
    ("task-url-with-query", "a query or a fragment", true),
    ("task-url-with-space", "a control character, a space or a backslash", true),
    ("task-version-text", "expected u32", true),
    ("task-version-zero", "version 0", true),
];

fn schemas() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("schemas")
}

fn examples(kind: &str) -> BTreeMap<String, String> {
    let directory = schemas().join("examples").join(kind);
    let entries = std::fs::read_dir(&directory).unwrap();
    let read = |entry: Result<std::fs::DirEntry, std::io::Error>| {
        let path = entry.unwrap().path();
        let name = path.file_stem().unwrap().to_string_lossy().into_owned();
        (name, std::fs::read_to_string(&path).unwrap())
    };
    entries.map(read).collect()
}

/// The schema that the beginning of an example's name stands for.
fn schema_of(name: &str) -> (&'static str, Validator) {
    let longest = schema::NAMES.into_iter().filter(|kind| name.starts_with(kind)).max_by_key(|kind| kind.len());
    let kind = longest.unwrap_or_else(|| panic!("{name} is no example of a message"));
    let schema = schema::all().into_iter().find(|(name, _)| *name == kind).unwrap().1;
    let validator = jsonschema::options().should_validate_formats(true).build(&schema).unwrap();
    (kind, validator)
}

fn message(body: &str) -> Message {
    Message { body: body.to_owned().into(), ..Message::default() }
}

#[test]
fn the_files_are_what_the_program_prints() {
    let mut expected: Vec<_> = files().into_iter().map(|(name, _)| name).collect();
    expected.push("examples".to_owned());
    for (name, value) in files() {
        let path = schemas().join(&name);
        let stored = std::fs::read_to_string(&path).unwrap_or_default();
        let printed = pretty(&value) + "\n";
        assert!(stored == printed, "schemas/{name} is stale: run haul schema --write schemas");
    }
    for entry in std::fs::read_dir(schemas()).unwrap() {
        let name = entry.unwrap().file_name().to_string_lossy().into_owned();
        assert!(expected.contains(&name), "{name} belongs to nothing");
    }
}

#[test]
fn the_schemas_are_schemas() {
    for (name, schema) in schema::all() {
        assert!(jsonschema::meta::is_valid(&schema), "{name}");
    }
}

#[test]
fn every_valid_example_is_taken_by_its_schema_and_by_the_program() {
    let examples = examples("valid");
    assert!(schema::NAMES.iter().all(|kind| examples.keys().any(|name| name.starts_with(kind))));
    for (name, body) in examples {
        let (kind, validator) = schema_of(&name);
        let value: Value = serde_json::from_str(&body).unwrap();
        let errors: Vec<_> = validator.iter_errors(&value).map(|error| error.to_string()).collect();
        assert!(errors.is_empty(), "{name}: {errors:?}");
        match kind {
            "task" => {
                let refused = decode_task(&message(&body)).err();
                assert_eq!(refused, None, "{name}");
            }
            "control" => {
                let refused = decode_control(&message(&body)).err();
                assert_eq!(refused, None, "{name}");
            }
            "event" => round_trip::<Event>(&name, &value),
            _ => round_trip::<ControlAnswer>(&name, &value),
        }
    }
}

/// What the program read and writes again still is a message of its schema, with nothing lost that it knows.
fn round_trip<T: serde::de::DeserializeOwned + serde::Serialize>(name: &str, value: &Value) {
    let read: T = serde_json::from_value(value.clone()).unwrap_or_else(|error| panic!("{name}: {error}"));
    let written = serde_json::to_value(&read).unwrap();
    assert!(schema_of(name).1.is_valid(&written), "{name}");
    let known = |field: &&String| !field.starts_with("later");
    for field in value.as_object().unwrap().keys().filter(known) {
        assert!(written.get(field).is_some(), "{name}: {field}");
    }
}

#[test]
fn every_rejected_example_is_refused_with_its_reason() {
    let examples = examples("rejected");
    let listed: Vec<_> = REJECTED.iter().map(|(name, ..)| (*name).to_owned()).collect();
    assert_eq!(examples.keys().cloned().collect::<Vec<_>>(), listed, "the files and the table differ");
    for (name, reason, by_schema) in REJECTED {
        let body = &examples[*name];
        let (kind, validator) = schema_of(name);
        let failure = match kind {
            "task" => decode_task(&message(body)).unwrap_err().failure,
            "control" => decode_control(&message(body)).unwrap_err(),
            _ => panic!("nobody refuses {name}"),
        };
        assert!(failure.message.contains(reason), "{name}: {failure}");
        let taken = serde_json::from_str::<Value>(body).is_ok_and(|value| validator.is_valid(&value));
        let is_json = serde_json::from_str::<Value>(body).is_ok();
        assert_eq!(taken, is_json && !by_schema, "{name}: what the schema says of it");
    }
}
