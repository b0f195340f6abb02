//! Which version a broker is, as far as behaviour depends on it.

use std::{fmt, str::FromStr};

use serde::Serialize;

/// A RabbitMQ version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Version {
    /// First number.
    pub major: u16,
    /// Second number.
    pub minor: u16,
    /// Third number.
    pub patch: u16,
}

impl Version {
    /// A version by its numbers.
    #[must_use]
    pub const fn new(major: u16, minor: u16, patch: u16) -> Self {
        Self { major, minor, patch }
    }

    /// The oldest version that works: at-least-once dead lettering begins here.
    pub const OLDEST: Self = Self::new(3, 10, 0);
    /// The oldest version that is recommended: consumer timeouts and strict priorities work as they should.
    pub const RECOMMENDED: Self = Self::new(4, 3, 3);

    /// Whether quorum queues have a delivery limit of 20 where none is set, and a policy of -1 lifts it.
    #[must_use]
    pub fn limits_deliveries(self) -> bool {
        self >= Self::new(4, 0, 0)
    }

    /// Whether a policy may set the consumer timeout; older brokers refuse the key.
    #[must_use]
    pub fn has_consumer_timeout_policy(self) -> bool {
        self >= Self::new(3, 12, 0)
    }

    /// Whether a consumer keeps its place for a while when the node that its connection was on is gone, and a policy may
    /// say for how long.
    #[must_use]
    pub fn keeps_places_of_the_disconnected(self) -> bool {
        self >= Self::new(4, 3, 0)
    }
}

impl FromStr for Version {
    type Err = String;

    /// Reads `4.3.6`, also with what packagers append (`3.13.0-rc.1`, `4.3.6+dfsg`).
    fn from_str(text: &str) -> Result<Self, String> {
        let mut parts = text.trim().splitn(3, '.').map(|part| {
            let digits = part.find(|c: char| !c.is_ascii_digit()).map_or(part, |end| &part[..end]);
            digits.parse::<u16>().ok()
        });
        match (parts.next().flatten(), parts.next().flatten(), parts.next().flatten()) {
            (Some(major), Some(minor), patch) => Ok(Self::new(major, minor, patch.unwrap_or(0))),
            _ => Err(format!("{text:?} is not a version")),
        }
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.patch)
    }
}

impl Serialize for Version {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_read_with_what_packagers_append() {
        for (text, version) in [
            ("3.10.8", Version::new(3, 10, 8)),
            ("4.3.6+dfsg", Version::new(4, 3, 6)),
            ("3.13.0-rc.1", Version::new(3, 13, 0)),
            ("4.1", Version::new(4, 1, 0)),
        ] {
            assert_eq!(text.parse::<Version>().unwrap(), version, "{text}");
        }
        for bad in ["", "four", "4", "x.1.2"] {
            assert!(bad.parse::<Version>().is_err(), "{bad}");
        }
    }

    #[test]
    fn each_behaviour_begins_at_its_version() {
        let known = |text: &str| text.parse::<Version>().unwrap();
        assert!(!known("3.11.28").has_consumer_timeout_policy() && known("3.12.0").has_consumer_timeout_policy());
        assert!(!known("3.13.7").limits_deliveries() && known("4.0.0").limits_deliveries());
    }
}
