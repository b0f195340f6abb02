//! Identities on the wire.

use std::{fmt, str::FromStr, sync::Arc};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A project's identity, chosen by the master.
pub type ProjectId = i64;

/// A replay counter: 0 for the first publication, one more for each replay of a dead letter.
pub type Round = u32;

/// An event's identity: unique, and the same when the event is sent again.
pub type EventId = String;

/// A new event identity (UUID version 7: sortable by time).
#[must_use]
pub fn new_event_id() -> EventId {
    uuid::Uuid::now_v7().to_string()
}

/// The name of one machine of the fleet: the routing key of its queue and a word of its events' topic.
///
/// 1–63 characters of `[A-Za-z0-9_-]`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String")]
#[schemars(extend("pattern" = "^[A-Za-z0-9_-]{1,63}$"))]
pub struct NodeName(Arc<str>);

/// A task's identity, chosen by the master: 1–128 characters of `[A-Za-z0-9._:-]`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String")]
#[schemars(extend("pattern" = "^[A-Za-z0-9._:-]{1,128}$"))]
pub struct TaskId(Arc<str>);

/// An identity that is not of its form.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{what} must be 1–{longest} characters of {alphabet}")]
pub struct BadIdentity {
    what: &'static str,
    longest: usize,
    alphabet: &'static str,
}

impl NodeName {
    /// The longest name, in characters.
    pub const LONGEST: usize = 63;

    /// Checks and wraps a name.
    ///
    /// # Errors
    /// When it is empty, too long, or has a character that would not survive as a topic word.
    pub fn new(name: impl Into<String>) -> Result<Self, BadIdentity> {
        let name = name.into();
        let fits = (1..=Self::LONGEST).contains(&name.len())
            && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-'));
        if fits {
            Ok(Self(name.into()))
        } else {
            Err(BadIdentity { what: "a node name", longest: Self::LONGEST, alphabet: "[A-Za-z0-9_-]" })
        }
    }

    /// The name itself.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TaskId {
    /// The longest identity, in characters.
    pub const LONGEST: usize = 128;

    /// Checks and wraps an identity.
    ///
    /// # Errors
    /// When it is empty, too long, or has a character outside the alphabet.
    pub fn new(id: impl Into<String>) -> Result<Self, BadIdentity> {
        let id = id.into();
        let fits = (1..=Self::LONGEST).contains(&id.len())
            && id.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b':' | b'-'));
        if fits {
            Ok(Self(id.into()))
        } else {
            Err(BadIdentity { what: "a task_id", longest: Self::LONGEST, alphabet: "[A-Za-z0-9._:-]" })
        }
    }

    /// A new identity (UUID version 7: sortable by time).
    #[must_use]
    pub fn random() -> Self {
        Self(uuid::Uuid::now_v7().to_string().into())
    }

    /// The identity itself.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// The conversions that serde and the command line need, alike for both identities.
macro_rules! conversions {
    ($name:ident) => {
        impl TryFrom<String> for $name {
            type Error = BadIdentity;
            fn try_from(value: String) -> Result<Self, BadIdentity> {
                Self::new(value)
            }
        }
        impl From<$name> for String {
            fn from(value: $name) -> Self {
                value.0.as_ref().to_owned()
            }
        }
        impl FromStr for $name {
            type Err = BadIdentity;
            fn from_str(value: &str) -> Result<Self, BadIdentity> {
                Self::new(value)
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}
conversions!(NodeName);
conversions!(TaskId);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_are_no_topic_words_are_refused() {
        for bad in ["", "a.b", "a b", "nöde", "a#", "*", &"x".repeat(64)] {
            assert!(NodeName::new(bad).is_err(), "{bad:?}");
        }
        for good in ["worker-001", "A_b", &"x".repeat(63)] {
            assert!(NodeName::new(good).is_ok(), "{good:?}");
        }
    }

    #[test]
    fn task_identities_keep_to_their_alphabet() {
        for bad in ["", "a/b", "a b", "a\n", &"x".repeat(129)] {
            assert!(TaskId::new(bad).is_err(), "{bad:?}");
        }
        assert!(TaskId::new("01994e2c-a:b.c_d").is_ok());
        assert!(TaskId::new(TaskId::random().as_str()).is_ok());
    }
}
