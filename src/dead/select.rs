//! Which dead letters are meant, and how fast they may go.

use std::{str::FromStr, time::Duration};

use super::letter::Letter;
use crate::protocol::{NodeName, ProjectId};

/// Which letters are meant: within a field any of its values, all fields together; no values, no condition.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Filter {
    /// Task ids.
    pub tasks: Vec<String>,
    /// Node names.
    pub nodes: Vec<String>,
    /// Kinds of task.
    pub kinds: Vec<String>,
    /// Error classes, or [`UNKNOWN`](super::UNKNOWN).
    pub classes: Vec<String>,
    /// Projects.
    pub projects: Vec<ProjectId>,
}

impl Filter {
    /// Whether it names nothing: every letter is meant.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Whether a letter is meant.
    #[must_use]
    pub fn matches(&self, letter: &Letter) -> bool {
        any(&self.tasks, letter.task_id.as_deref())
            && any(&self.nodes, letter.node.as_ref().map(NodeName::as_str))
            && any(&self.kinds, letter.kind.as_deref())
            && any(&self.classes, Some(letter.class.as_str()))
            && (self.projects.is_empty() || letter.project_id.is_some_and(|project| self.projects.contains(&project)))
    }
}

fn any(wanted: &[String], value: Option<&str>) -> bool {
    wanted.is_empty() || value.is_some_and(|value| wanted.iter().any(|wanted| wanted == value))
}

/// How many letters may be replayed in a time: `5/s`, `30/m`, `100/h`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// The time between two letters.
    pub period: Duration,
}

impl FromStr for Rate {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let refusal = || format!("{text:?} is not a rate: write for example 5/s, 30/m or 100/h (at least 6/h)");
        let (count, unit) = text.split_once('/').unwrap_or((text, "s"));
        let count: f64 = count.trim().parse().map_err(|_| refusal())?;
        let unit = match unit.trim() {
            "s" | "sec" | "second" => 1.0,
            "m" | "min" | "minute" => 60.0,
            "h" | "hour" => 3600.0,
            _ => return Err(refusal()),
        };
        // A letter waits for its turn unsettled, which a broker bears for less than its consumer timeout.
        let period = Duration::try_from_secs_f64(unit / count).map_err(|_| refusal())?;
        if period.is_zero() || period > Duration::from_mins(10) {
            return Err(refusal());
        }
        Ok(Self { period })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::wire::{Message, header};

    fn letter(class: &str, project: i64) -> Letter {
        let mut message = Message { message_id: Some(format!("t-{project}")), ..Message::default() };
        message.set(header::ERROR_CLASS, class);
        message.set(header::PROJECT, project);
        message.set(header::NODE, "a");
        message.set(header::KIND, "pull");
        Letter::read(&message, 1)
    }

    #[test]
    fn fields_narrow_and_values_widen() {
        let strings = |list: &[&str]| list.iter().map(|&text| text.to_owned()).collect::<Vec<_>>();
        let filter = Filter { classes: strings(&["auth", "network"]), kinds: strings(&["pull"]), ..Filter::default() };
        assert!(filter.matches(&letter("auth", 1)) && filter.matches(&letter("network", 2)));
        assert!(!filter.matches(&letter("quota", 1)));
        for filter in [
            Filter { tasks: strings(&["t-2"]), ..Filter::default() },
            Filter { projects: vec![2], ..Filter::default() },
        ] {
            assert!(filter.matches(&letter("auth", 2)) && !filter.matches(&letter("auth", 1)));
        }
        assert!(!Filter { nodes: strings(&["b"]), ..Filter::default() }.matches(&letter("auth", 1)));
        assert!(Filter::default().matches(&letter("auth", 1)));
    }

    #[test]
    fn rates_read_as_people_write_them() {
        for (text, millis) in [("5/s", 200), ("30/m", 2000), ("10", 100), ("0.5/s", 2000), ("60/h", 60_000)] {
            assert_eq!(text.parse::<Rate>().unwrap().period, Duration::from_millis(millis), "{text}");
        }
        for bad in ["", "0/s", "-1/s", "5/year", "fast", "inf/s", "NaN", "5/h"] {
            assert!(bad.parse::<Rate>().is_err(), "{bad}");
        }
    }
}
