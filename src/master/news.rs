//! What comes on the results exchange, read leniently.

use serde_json::Value;

use crate::protocol::{ControlAnswer, Event, Kind, NodeName, Status, VERSION, wire::Message};

/// One message from the results exchange.
#[derive(Clone, Debug, PartialEq)]
pub enum News {
    /// A task's event.
    Event(Box<Event>),
    /// An agent's answer to a control message.
    Answer(Box<ControlAnswer>),
    /// Neither: handed out with the reason, since what nobody sees is lost. It will not become readable by being read
    /// again.
    Unreadable {
        /// All of it.
        message: Box<Message>,
        /// Why it could not be read.
        reason: String,
    },
}

impl News {
    /// Reads a message; fields that are not known are passed over.
    #[must_use]
    pub fn read(message: &Message) -> Self {
        Self::understood(&message.body)
            .unwrap_or_else(|reason| Self::Unreadable { message: Box::new(message.clone()), reason })
    }

    fn understood(body: &[u8]) -> Result<Self, String> {
        let words = |error: serde_json::Error| crate::protocol::printable(&error.to_string());
        let value: Value = serde_json::from_slice(body).map_err(words)?;
        // A later version may have changed anything: say that it is later rather than what is odd about it.
        if let Some(v) = value.get("v").and_then(Value::as_u64).filter(|&v| v > u64::from(VERSION)) {
            return Err(format!("it is of version {v}, this program speaks version {VERSION}"));
        }
        if value.get("answer").is_some() {
            return Ok(Self::Answer(serde_json::from_value(value).map_err(words)?));
        }
        Ok(Self::Event(serde_json::from_value(value).map_err(words)?))
    }
}

/// Which news to follow: within a field any of its values, all fields together; no values, no condition.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Interest {
    nodes: Vec<NodeName>,
    kinds: Vec<&'static str>,
    statuses: Vec<&'static str>,
}

impl Interest {
    /// Everything: events, progress and the answers of agents.
    #[must_use]
    pub fn all() -> Self {
        Self::default()
    }

    /// Only of this node; to be repeated for more.
    #[must_use]
    pub fn node(mut self, node: &NodeName) -> Self {
        self.nodes.push(node.clone());
        self
    }

    /// Only of tasks of this kind; to be repeated for more.
    #[must_use]
    pub fn kind(mut self, kind: Kind) -> Self {
        self.kinds.push(kind.as_str());
        self
    }

    /// Only with this status; to be repeated for more.
    #[must_use]
    pub fn status(mut self, status: Status) -> Self {
        self.statuses.push(status.as_str());
        self
    }

    /// Only the answers of agents to control messages, besides the kinds asked for.
    #[must_use]
    pub fn answers(mut self) -> Self {
        self.kinds.push("control");
        self
    }

    /// The patterns of routing keys to bind a queue with.
    #[must_use]
    pub fn patterns(&self) -> Vec<String> {
        fn or_any<'a>(words: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
            let words: Vec<_> = words.collect();
            if words.is_empty() { vec!["*"] } else { words }
        }
        let kinds = or_any(self.kinds.iter().copied());
        let statuses = or_any(self.statuses.iter().copied());
        let mut patterns = Vec::new();
        for node in or_any(self.nodes.iter().map(NodeName::as_str)) {
            for kind in &kinds {
                patterns.extend(statuses.iter().map(|status| format!("{node}.{kind}.{status}")));
            }
        }
        patterns
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(body: &Value) -> News {
        News::read(&Message { body: body.to_string().into(), ..Message::default() })
    }

    fn event() -> Value {
        json!({"v": 1, "event_id": "e", "at": "2026-01-02T03:04:05Z", "node": "n", "boot": "b", "seq": 1, "task_id": "t",
            "kind": "clone", "project_id": 42, "project_seq": 1, "round": 0, "attempt": 1, "status": "started",
            "project_status": "SYNCING"})
    }

    #[test]
    fn fields_that_are_not_known_are_passed_over() {
        let mut event = event();
        event["colour"] = json!({"deep": ["blue"]});
        event["result"] = json!({"head": null, "mood": "good"});
        assert!(matches!(read(&event), News::Event(event) if event.status == Status::Started));
        let answer = json!({"v": 1, "event_id": "e", "at": "2026-01-02T03:04:05Z", "node": "n", "boot": "b",
            "answer": "state", "paused": true, "temperature": 21});
        assert!(matches!(read(&answer), News::Answer(answer) if answer.paused == Some(true)));
    }

    #[test]
    fn what_cannot_be_read_is_handed_out_with_the_reason() {
        let with = |field: &str, value: Value| {
            let mut event = event();
            event[field] = value;
            event
        };
        for (body, why) in [
            (json!([]), "invalid"),
            (json!({}), "missing field"),
            (with("status", json!("dreaming")), "dreaming"),
            (with("at", json!("yesterday")), "year"),
            (with("v", json!(2)), "version 2"),
        ] {
            let News::Unreadable { message, reason } = read(&body) else { panic!("{body} was read") };
            assert!(reason.contains(why), "{reason}");
            assert_eq!(message.body, body.to_string());
        }
        let raw = Message { body: (&b"\xff{"[..]).into(), ..Message::default() };
        assert!(matches!(News::read(&raw), News::Unreadable { .. }));
    }

    #[test]
    fn an_interest_becomes_patterns_that_the_broker_applies() {
        let node = |name: &str| NodeName::new(name).unwrap();
        assert_eq!(Interest::all().patterns(), ["*.*.*"]);
        let failures = Interest::all().node(&node("a")).status(Status::Failed).status(Status::Rejected);
        assert_eq!(failures.patterns(), ["a.*.failed", "a.*.rejected"]);
        let clones = Interest::all().node(&node("a")).node(&node("b")).kind(Kind::Clone).answers();
        assert_eq!(clones.patterns(), ["a.clone.*", "a.control.*", "b.clone.*", "b.control.*"]);
    }
}
