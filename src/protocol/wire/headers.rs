//! The values of headers, and what ours say of a copy.

use std::{collections::BTreeMap, fmt, time::Duration};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::{LONGEST_HISTORY, header};
use crate::protocol::{NodeName, Round};

/// A header's value, as far as we understand it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum HeaderValue {
    /// A boolean.
    Bool(bool),
    /// Any integer that fits.
    Int(i64),
    /// Any UTF-8 string.
    Text(String),
    /// An array.
    List(Vec<HeaderValue>),
    /// A table.
    Table(BTreeMap<String, HeaderValue>),
    /// Something else, of which we keep nothing.
    Other,
}

/// Headers by name.
pub type Headers = BTreeMap<String, HeaderValue>;

impl HeaderValue {
    /// The text, if it is one.
    #[must_use]
    pub fn as_text(&self) -> Option<&str> {
        match self {
            Self::Text(text) => Some(text),
            _ => None,
        }
    }

    /// The number, if it is one, or text that is one (a master in another language may send either).
    #[must_use]
    pub fn as_int(&self) -> Option<i64> {
        match self {
            Self::Int(int) => Some(*int),
            Self::Text(text) => text.parse().ok(),
            _ => None,
        }
    }

    pub(super) fn weight(&self) -> usize {
        match self {
            Self::Text(text) => text.len(),
            _ => 8,
        }
    }
}

impl From<&str> for HeaderValue {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

impl From<String> for HeaderValue {
    fn from(text: String) -> Self {
        Self::Text(text)
    }
}

impl From<i64> for HeaderValue {
    fn from(int: i64) -> Self {
        Self::Int(int)
    }
}

impl fmt::Display for HeaderValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bool(value) => write!(f, "{value}"),
            Self::Int(value) => write!(f, "{value}"),
            Self::Text(value) => f.write_str(value),
            Self::List(values) => f.debug_list().entries(values).finish(),
            Self::Table(values) => f.debug_map().entries(values).finish(),
            Self::Other => f.write_str("?"),
        }
    }
}

/// What our headers say of a copy. Hostile values (negative, huge, of another type) read as absent or are clamped.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CopyHeaders {
    /// Replays so far.
    pub round: Round,
    /// The attempt asked for; at least 1.
    pub attempt: u32,
    /// Order of first arrival, in microseconds.
    pub arrived: Option<i64>,
    /// Not before this moment.
    pub not_before: Option<Timestamp>,
    /// It still has to wait for so long, at most.
    pub left: Option<Duration>,
    /// When it was first deferred.
    pub deferred_since: Option<Timestamp>,
    /// Whose task it is.
    pub node: Option<NodeName>,
    /// Failures so far, the oldest first.
    pub history: Vec<String>,
}

impl CopyHeaders {
    /// The highest round or attempt that is believed; a header above it is clamped.
    pub const HIGHEST: u32 = 1_000_000;

    /// Reads the headers of a delivery.
    #[must_use]
    pub fn read(headers: &Headers) -> Self {
        let int = |name: &str| headers.get(name).and_then(HeaderValue::as_int).filter(|&int| int >= 0);
        let count = |name: &str| int(name).map(|int| u32::try_from(int).unwrap_or(u32::MAX).min(Self::HIGHEST));
        let moment = |name: &str| int(name).and_then(|ms| Timestamp::from_millisecond(ms).ok());
        Self {
            round: count(header::ROUND).unwrap_or(0),
            attempt: count(header::ATTEMPT).unwrap_or(1).max(1),
            arrived: int(header::ARRIVED).filter(|&us| us > 0),
            not_before: moment(header::NOT_BEFORE),
            left: int(header::LEFT).and_then(|ms| u64::try_from(ms).ok()).map(Duration::from_millis),
            deferred_since: moment(header::DEFERRED),
            node: owner_node(headers),
            history: headers
                .get(header::HISTORY)
                .and_then(HeaderValue::as_text)
                .map(|text| text.lines().take(LONGEST_HISTORY).map(str::to_owned).collect())
                .unwrap_or_default(),
        }
    }
}

/// Whose task it is: our header, else the first routing key that the broker noted when it dead-lettered it.
fn owner_node(headers: &Headers) -> Option<NodeName> {
    if let Some(node) = headers.get(header::NODE).and_then(HeaderValue::as_text) {
        return NodeName::new(node).ok();
    }
    let Some(HeaderValue::List(deaths)) = headers.get(header::DEATH) else { return None };
    let Some(HeaderValue::Table(first)) = deaths.last() else { return None };
    let Some(HeaderValue::List(keys)) = first.get("routing-keys") else { return None };
    NodeName::new(keys.first()?.as_text()?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hostile_headers_read_as_absent_or_are_clamped() {
        let read = |name: &str, value: HeaderValue| CopyHeaders::read(&Headers::from([(name.to_owned(), value)]));
        let odd = || {
            [
                HeaderValue::Int(-1),
                HeaderValue::Int(i64::MIN),
                HeaderValue::Bool(true),
                HeaderValue::Other,
                HeaderValue::Text(String::new()),
                HeaderValue::Text("-7 ".to_owned()),
                HeaderValue::Text("9".repeat(100)),
                HeaderValue::Text("\u{1b}[2J".to_owned()),
                HeaderValue::List(vec![HeaderValue::Int(3)]),
                HeaderValue::Table(BTreeMap::from([("a".to_owned(), HeaderValue::Int(3))])),
            ]
        };
        let names =
            [header::ROUND, header::ATTEMPT, header::ARRIVED, header::NOT_BEFORE, header::LEFT, header::DEFERRED];
        for name in names.into_iter().chain([header::NODE, header::DEATH]) {
            for value in odd() {
                let headers = read(name, value.clone());
                assert_eq!(headers, CopyHeaders { attempt: 1, ..CopyHeaders::default() }, "{name} {value:?}");
            }
        }
        let huge = || HeaderValue::Int(i64::MAX);
        assert_eq!(read(header::ROUND, huge()).round, CopyHeaders::HIGHEST);
        assert_eq!(read(header::ATTEMPT, huge()).attempt, CopyHeaders::HIGHEST);
        assert_eq!(read(header::ATTEMPT, HeaderValue::Int(0)).attempt, 1);
        assert_eq!(read(header::ATTEMPT, "-7".into()).attempt, 1);
        assert_eq!(read(header::NOT_BEFORE, huge()).not_before, None);
        assert_eq!(read(header::ROUND, HeaderValue::Text("3".to_owned())).round, 3);
        assert_eq!(read(header::HISTORY, "a\n".repeat(5000).into()).history.len(), LONGEST_HISTORY);
    }

    #[test]
    fn the_owner_is_our_header_before_what_the_broker_noted() {
        let death = |key: HeaderValue| {
            let first = HeaderValue::Table(BTreeMap::from([("routing-keys".to_owned(), HeaderValue::List(vec![key]))]));
            HeaderValue::List(vec![HeaderValue::Table(BTreeMap::new()), first])
        };
        let mut headers = Headers::from([(header::DEATH.to_owned(), death("worker-001".into()))]);
        assert_eq!(CopyHeaders::read(&headers).node, NodeName::new("worker-001").ok());
        headers.insert(header::NODE.to_owned(), "worker-002".into());
        assert_eq!(CopyHeaders::read(&headers).node, NodeName::new("worker-002").ok());
        headers = Headers::from([(header::DEATH.to_owned(), death(HeaderValue::Int(1)))]);
        assert_eq!(CopyHeaders::read(&headers).node, None);
    }
}
