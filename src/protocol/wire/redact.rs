//! What a refused body may still carry along: secrets that somebody put where none belong are taken out of it.
//!
//! Only refused bodies are touched: in a task that is taken there is no place for a secret. What is put in a secret's
//! stead is refused as well, so a replay of the letter cannot run as something else.

use bytes::Bytes;
use serde_json::Value;

use crate::protocol::CredentialName;

/// What stands where a secret was; no field of a task takes it.
const REDACTED: &str = "(redacted)";

/// `body` without users, passwords and tokens in addresses, and without what cannot be the name of a credential.
///
/// A body without any comes back byte for byte.
#[must_use]
pub fn without_secrets(body: &Bytes) -> Bytes {
    let Ok(mut value) = serde_json::from_slice::<Value>(body) else {
        // Not JSON: what looks like an address in the text is all that can be found.
        let text = String::from_utf8_lossy(body).replace(":\\/\\/", "://");
        return redact_addresses(&text).map_or_else(|| body.clone(), Bytes::from);
    };
    let mut found = redact_value(&mut value);
    if let Some(field) = value.get_mut("git_url") {
        found |= field.as_str().and_then(redact_git_url).map(|text| *field = Value::String(text)).is_some();
    }
    if let Some(field) = value.get_mut("credential").filter(|field| !is_credential(field)) {
        *field = REDACTED.into();
        found = true;
    }
    if found { Bytes::from(value.to_string()) } else { body.clone() }
}

fn is_credential(field: &Value) -> bool {
    field.is_null() || field.as_str().is_some_and(|name| CredentialName::new(name).is_ok())
}

/// Whether anything was found; every part is looked at.
fn redact_value(value: &mut Value) -> bool {
    match value {
        Value::String(text) => redact_addresses(text).map(|redacted| *text = redacted).is_some(),
        Value::Array(items) => items.iter_mut().map(redact_value).filter(|&found| found).count() > 0,
        Value::Object(fields) => fields.values_mut().map(redact_value).filter(|&found| found).count() > 0,
        Value::Null | Value::Bool(_) | Value::Number(_) => false,
    }
}

/// The text with each `scheme://user@` made harmless, if there is one. A plain ssh user is no secret.
fn redact_addresses(text: &str) -> Option<String> {
    let mut out = String::new();
    let mut rest = text;
    let mut found = false;
    while let Some((before, after)) = rest.split_once("://") {
        let word = after.split(|c: char| c == '"' || c.is_whitespace()).next().unwrap_or_default();
        out.push_str(before);
        out.push_str("://");
        match end_of_user(word, before.ends_with("ssh")) {
            Some(end) => {
                out.push_str(REDACTED);
                rest = &after[end..];
                found = true;
            }
            None => rest = after,
        }
    }
    out.push_str(rest);
    found.then_some(out)
}

/// Where the `@` is that ends what may be a secret in an address, from behind its scheme on.
fn end_of_user(word: &str, ssh: bool) -> Option<usize> {
    const END: [char; 4] = ['/', '?', '#', '\\'];
    let bare = word.trim_start_matches(END);
    let begin = word.len() - bare.len();
    let authority = bare.split(END).next().unwrap_or_default();
    if let Some((user, _)) = authority.rsplit_once('@') {
        let harmless = ssh && begin == 0 && !user.contains([':', '@', '%']);
        return (!harmless).then_some(begin + user.len());
    }
    // What looks like a port and is none may be the beginning of a password with a separator in it.
    let (_, port) = authority.split_once(':').filter(|_| !authority.starts_with('['))?;
    if port.bytes().all(|b| b.is_ascii_digit()) { None } else { word.rfind('@') }
}

/// The address without a query or fragment, and without a user where there is no scheme.
fn redact_git_url(url: &str) -> Option<String> {
    if let Some((before, _)) = url.split_once(['?', '#']) {
        return Some(format!("{before}?{REDACTED}"));
    }
    let (_, host) = url.rsplit_once('@').filter(|_| !url.contains("://"))?;
    Some(format!("{REDACTED}@{host}"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::protocol::wire::{Message, decode_task};

    fn redacted(body: &str) -> String {
        String::from_utf8(without_secrets(&Bytes::from(body.to_owned())).to_vec()).unwrap()
    }

    #[test]
    fn a_canary_in_a_refused_body_does_not_travel_on_and_stays_refused() {
        for url in [
            "https://canary@host/x",
            "https://user:canary@host/x",
            "https://user:ca@canary@host/x",
            "ssh://git:canary@host/x",
            "http://canary:x-oauth-basic@host",
            "https://host/x?token=canary",
            "https://host/x#canary",
            "canary@host:x",
            "user:canary@host/x",
            "https:///user:canary@host/x",
            "https://user:pass/canary@host/x",
            "https://user:canary/pass@host/x",
            "ssh:///canary@host/x",
        ] {
            let task = json!({"v": 1, "task_id": "t", "kind": "clone", "project_id": 42, "git_url": url,
                "target_path": "7_app", "note": {"seen": ["https://canary@elsewhere/"]}});
            let body = redacted(&task.to_string());
            assert!(!body.contains("canary"), "{body}");
            assert!(decode_task(&Message { body: body.clone().into(), ..Message::default() }).is_err(), "{body}");
        }
        let misplaced = redacted(r#"{"credential": "ghp canary", "git_url": "https:\/\/canary@host\/x"}"#);
        assert!(!misplaced.contains("canary"), "{misplaced}");
        for broken in ["{\"git_url\": \"https://canary@host/x\"", r#"{"git_url": "https:\/\/canary@host\/x""#] {
            assert!(!redacted(broken).contains("canary"));
        }
    }

    #[test]
    fn a_body_without_secrets_stays_as_it_is() {
        for body in [
            r#"{"git_url":"ssh://git@host/x",  "target_path":"..", "target_path":"b", "credential":"team"}"#,
            r#"{"git_url":"https://host/x@y", "credential":null}"#,
            r#"{"git_url":"https://host:8443/x@y", "note":"see https://host/a, ask me@host"}"#,
            "not json at all: a@b",
            "",
        ] {
            assert_eq!(redacted(body), body);
        }
        let raw = Bytes::from_static(b"\xff\xfe");
        assert_eq!(without_secrets(&raw), raw);
    }
}
