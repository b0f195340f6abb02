//! How old the records are, in time that an agent was there to see pass.
//!
//! A record says by the wall clock when it was last seen. A clock that was put forward by a month would make all of them
//! old at once, so their age is told by marks: at such a moment of the wall clock, so much time had passed.

use std::{collections::VecDeque, time::Duration};

use jiff::Timestamp;

/// Marks a retention is divided by: records are kept longer than it by at most one part.
const PARTS: u32 = 28;

/// The marks, the oldest first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ages {
    /// Seconds that passed, as far as agents saw.
    passed: u64,
    /// At so many seconds the wall clock said this.
    marks: VecDeque<(u64, Timestamp)>,
}

impl Ages {
    /// Reads what [`Ages::text`] wrote; what cannot be read is forgotten, and ages begin anew.
    #[must_use]
    pub fn read(text: &str) -> Self {
        let mut words = text.split(' ');
        let passed = words.next().and_then(|word| word.parse().ok());
        let mark = |word: &str| {
            let (passed, at) = word.split_once('@')?;
            Some((passed.parse().ok()?, Timestamp::from_second(at.parse().ok()?).ok()?))
        };
        let marks: Option<VecDeque<_>> = words.map(mark).collect();
        match (passed, marks) {
            (Some(passed), Some(marks)) => Self { passed, marks },
            _ => Self::default(),
        }
    }

    /// The text to keep.
    #[must_use]
    pub fn text(&self) -> String {
        let marks = self.marks.iter().map(|(passed, at)| format!(" {passed}@{}", at.as_second()));
        std::iter::once(self.passed.to_string()).chain(marks).collect()
    }

    /// Takes note that `time` passed, and that the wall clock says `now`.
    pub fn pass(&mut self, time: Duration, now: Timestamp, retention: Duration) {
        self.passed = self.passed.saturating_add(time.as_secs());
        let part = (retention / PARTS).as_secs();
        if self.marks.back().is_none_or(|(passed, _)| self.passed.saturating_sub(*passed) >= part) {
            self.marks.push_back((self.passed, now));
        }
        // One that is old enough is needed, and none before it.
        while self.marks.get(1).is_some_and(|mark| self.is_past(mark, retention)) {
            self.marks.pop_front();
        }
    }

    /// The moment before which a record was last seen that is older than `retention`; nothing while no record is.
    #[must_use]
    pub fn limit(&self, retention: Duration) -> Option<Timestamp> {
        self.marks.front().filter(|mark| self.is_past(mark, retention))?;
        // A clock that was put back: what was seen since is not older than what was seen before.
        self.marks.iter().map(|(_, at)| *at).min()
    }

    fn is_past(&self, (passed, _): &(u64, Timestamp), retention: Duration) -> bool {
        self.passed.saturating_sub(*passed) >= retention.as_secs()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_hours(1);
    const RETENTION: Duration = Duration::from_hours(14 * 24);

    fn at(hours: i64) -> Timestamp {
        Timestamp::from_second(1_800_000_000 + hours * 3600).unwrap()
    }

    /// What is pruned after so many hours, with the clock ahead by `ahead` of the hour; as hours.
    fn limit(hours: i64, ahead: impl Fn(i64) -> i64) -> Option<i64> {
        let mut ages = Ages::default();
        for hour in 0..=hours {
            ages.pass(HOUR, at(hour + ahead(hour)), RETENTION);
            // A restart changes nothing.
            ages = Ages::read(&ages.text());
            assert!(ages.marks.len() <= 30, "{}", ages.marks.len());
        }
        ages.limit(RETENTION).map(|limit| (limit.as_second() - 1_800_000_000) / 3600)
    }

    #[test]
    fn nothing_is_old_before_the_retention_has_passed_and_then_all_that_is_older() {
        assert_eq!(limit(14 * 24 - 1, |_| 0), None);
        assert_eq!(limit(14 * 24, |_| 0), Some(0));
        let later = limit(20 * 24, |_| 0).unwrap();
        assert!((5 * 24..=6 * 24).contains(&later), "{later}");
    }

    #[test]
    fn a_clock_that_is_put_forward_makes_nothing_old() {
        let month = |hour| if hour >= 10 { 30 * 24 } else { 0 };
        assert_eq!(limit(14 * 24 - 1, month), None);
        let limit = limit(14 * 24 + 5, month).unwrap();
        assert!(limit <= 10, "what was seen after the step is not old yet: {limit}");
    }

    #[test]
    fn a_clock_that_is_put_back_makes_nothing_old() {
        let back = |hour| if hour >= 10 { 0 } else { 30 * 24 };
        let limit = limit(14 * 24 + 5, back).unwrap();
        assert!(limit <= 24, "what was seen after the step is not old yet: {limit}");
    }

    #[test]
    fn what_cannot_be_read_begins_anew() {
        for text in ["", "x", "5 3", "5 3@x", "5 3@99999999999999"] {
            assert_eq!(Ages::read(text), Ages::default(), "{text}");
        }
    }
}
