//! One question of the batch API: which of these objects may be downloaded, and from where.

use std::collections::{BTreeMap, HashMap};

use serde::Deserialize;
use serde_json::json;

use super::{super::status, link::Link};
use crate::{
    failure::{ErrorClass, Failure},
    git::pointer::Pointer,
};

/// The longest answer, in bytes: a hundred objects with long links.
const LONGEST: u64 = 4 << 20;

/// Where an object is to be downloaded from.
#[derive(Debug, Deserialize)]
pub(super) struct Action {
    /// The link.
    pub(super) href: String,
    /// Headers to be sent there.
    #[serde(default)]
    pub(super) header: BTreeMap<String, String>,
}

#[derive(Deserialize)]
struct Answer {
    #[serde(default)]
    transfer: Option<String>,
    objects: Vec<Object>,
}

#[derive(Deserialize)]
struct Object {
    oid: String,
    size: Option<u64>,
    #[serde(default)]
    actions: Option<Actions>,
    #[serde(default)]
    error: Option<Refusal>,
}

#[derive(Deserialize)]
struct Actions {
    #[serde(default)]
    download: Option<Action>,
}

#[derive(Deserialize)]
struct Refusal {
    code: u16,
}

/// Asks for `wanted`; every one of them is in what is returned.
///
/// # Errors
/// By the status of the answer, or by that of the first object that is refused.
pub(super) fn ask(link: &Link, wanted: &[Pointer]) -> Result<Vec<(Pointer, Action)>, Failure> {
    let objects: Vec<_> = wanted.iter().map(|pointer| json!({"oid": pointer.oid(), "size": pointer.size()})).collect();
    let question = json!({"operation": "download", "transfers": ["basic"], "objects": objects, "hash_algo": "sha256"});
    let text = link.ask(question.to_string().into_bytes(), LONGEST)?;
    answered(link.host(), link.is_authorised(), &text, wanted)
}

/// Takes an answer apart.
fn answered(host: &str, authorised: bool, text: &[u8], wanted: &[Pointer]) -> Result<Vec<(Pointer, Action)>, Failure> {
    let odd = |what: &str| Failure::invalid(format!("{host} answered the LFS request {what}"));
    let answer: Answer = serde_json::from_slice(text).map_err(|_| odd("with what is no answer to it"))?;
    if answer.transfer.is_some_and(|transfer| transfer != "basic") {
        return Err(odd("with a way to transfer objects that was not offered"));
    }
    let mut objects = HashMap::new();
    for object in answer.objects {
        objects.entry(object.oid.clone()).or_insert(object);
    }
    let find = |pointer: &Pointer| {
        let missing =
            |why: &str| Failure::new(ErrorClass::NotFound, format!("{host} {why} the LFS object {}", pointer.oid()));
        let object = objects.remove(pointer.oid()).ok_or_else(|| missing("said nothing of"))?;
        if let Some(Refusal { code }) = object.error {
            // The words of the service are not repeated: they are a stranger's.
            let failure = status::failure(host, code, authorised, None, false);
            let class = failure.map_or(ErrorClass::Invalid, |failure| failure.class);
            let message = format!("{host} refused the LFS object {} with the code {code}", pointer.oid());
            return Err(Failure::new(class, message));
        }
        if object.size.is_some_and(|size| size != pointer.size()) {
            let message = format!("{host} has the LFS object {} with another size than its pointer", pointer.oid());
            return Err(Failure::new(ErrorClass::Corrupt, message));
        }
        let action = object.actions.and_then(|actions| actions.download).ok_or_else(|| missing("does not offer"))?;
        Ok((pointer.clone(), action))
    };
    wanted.iter().map(find).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pointer() -> Pointer {
        Pointer::try_from(("ab".repeat(32), 5)).unwrap()
    }

    fn class(objects: serde_json::Value) -> ErrorClass {
        let text = json!({"objects": objects}).to_string();
        answered("h", true, text.as_bytes(), &[pointer()]).unwrap_err().class
    }

    #[test]
    fn an_object_is_used_only_where_its_download_is_offered() {
        let oid = pointer().oid().to_owned();
        let good = json!({"transfer": "basic", "objects": [
            {"oid": "x", "size": 1},
            {"oid": oid, "size": 5, "actions": {"download": {"href": "https://h/x", "header": {"A": "b"}}}},
        ]});
        let found = answered("h", true, good.to_string().as_bytes(), &[pointer()]).unwrap();
        assert_eq!((found[0].1.href.as_str(), found[0].1.header["A"].as_str()), ("https://h/x", "b"));
        assert_eq!(class(json!([])), ErrorClass::NotFound);
        assert_eq!(class(json!([{"oid": oid, "size": 5}])), ErrorClass::NotFound);
        assert_eq!(class(json!([{"oid": oid, "size": 5, "actions": {}}])), ErrorClass::NotFound);
        assert_eq!(class(json!([{"oid": oid, "size": 6}])), ErrorClass::Corrupt);
    }

    #[test]
    fn a_refused_object_has_the_class_of_its_code() {
        for (code, wanted) in [
            (404, ErrorClass::NotFound),
            (410, ErrorClass::NotFound),
            (401, ErrorClass::Auth),
            (403, ErrorClass::Forbidden),
            (429, ErrorClass::Throttled),
            (500, ErrorClass::Network),
            (422, ErrorClass::Invalid),
            (200, ErrorClass::Invalid),
        ] {
            let refused = json!([{"oid": pointer().oid(), "error": {"code": code, "message": "\u{1b}[31m"}}]);
            assert_eq!(class(refused), wanted, "{code}");
        }
    }

    #[test]
    fn what_is_no_answer_is_refused() {
        for text in ["", "[]", "{}", "{\"objects\": 1}", "{\"transfer\": \"tus\", \"objects\": []}"] {
            let failure = answered("h", true, text.as_bytes(), &[pointer()]).unwrap_err();
            assert_eq!(failure.class, ErrorClass::Invalid, "{text}");
        }
    }
}
