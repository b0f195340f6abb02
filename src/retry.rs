//! When to try again. Pure: takes the failure, the moment and a random number, returns a decision.
//!
//! This is the one file that knows `backoff`. The crate is unmaintained (RUSTSEC-2025-0012), so only its exponential
//! series is used, behind [`RetrySettings::decide`]; replacing it is a matter of this file.

use std::time::Duration;

use backoff::{ExponentialBackoffBuilder, backoff::Backoff};
use jiff::{SignedDuration, Timestamp};
use serde::Deserialize;

use crate::failure::{Disposition, ErrorClass, Failure};

/// `[retry]`: how often and how patiently failed tasks are tried again.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RetrySettings {
    /// Attempts in all, the first one included.
    pub max_attempts: u32,
    /// The wait after the first attempt; doubles with each.
    #[serde(with = "humantime_serde")]
    pub base: Duration,
    /// The longest wait.
    #[serde(with = "humantime_serde")]
    pub cap: Duration,
    /// How long a task may be deferred (full disk, host down) before it fails.
    #[serde(with = "humantime_serde")]
    pub defer_max: Duration,
}

impl Default for RetrySettings {
    fn default() -> Self {
        Self {
            max_attempts: 5,
            base: Duration::from_secs(1),
            cap: Duration::from_mins(15),
            defer_max: Duration::from_hours(24),
        }
    }
}

/// What follows from a failed attempt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Next {
    /// Try again after this time, charging an attempt.
    Retry(Duration),
    /// Try again after this time, charging nothing.
    Defer(Duration),
    /// It has failed.
    Fail(Failure),
}

impl RetrySettings {
    /// What is wrong with the section, in a sentence.
    ///
    /// # Errors
    /// The sentence.
    pub fn check(&self) -> Result<(), String> {
        if self.max_attempts == 0 {
            return Err("retry.max_attempts must be at least 1".to_owned());
        }
        if self.base.is_zero() || self.base > self.cap {
            return Err("retry.base must be longer than nothing and at most retry.cap".to_owned());
        }
        if self.cap > Duration::from_hours(24) {
            return Err("retry.cap must be at most 24h".to_owned());
        }
        Ok(())
    }

    /// The longest wait that [`RetrySettings::decide`] can ask for: what a copy asks for beyond it is not from us.
    #[must_use]
    pub fn longest_wait(&self) -> Duration {
        // A Retry-After goes on top of the series, and jitter on top of that.
        self.defer_max.saturating_add(spread(self.cap, 1.0))
    }

    /// Decides what follows when `attempt` (from 1) failed at `now`.
    ///
    /// `deferred_since` is when the task was first deferred, if it was; `jitter` is a random number in `0..1`.
    #[must_use]
    pub fn decide(
        &self,
        attempt: u32,
        failure: Failure,
        deferred_since: Option<Timestamp>,
        now: Timestamp,
        jitter: f64,
    ) -> Next {
        if failure.class.disposition() == Disposition::Final {
            return Next::Fail(failure);
        }
        let asked = failure.retry_after.unwrap_or_default().min(self.defer_max);
        if failure.deferred {
            let limit = SignedDuration::try_from(self.defer_max).unwrap_or(SignedDuration::MAX);
            if deferred_since.is_some_and(|since| now.duration_since(since) >= limit) {
                let message = format!("{} (deferred for longer than retry.defer_max)", failure.message);
                return Next::Fail(Failure { message, deferred: false, ..failure });
            }
            // Who knows how long it takes is believed; a little more each, so that a crowd does not come back at once.
            if failure.retry_after.is_some() {
                let asked = asked.max(self.base);
                return Next::Defer(asked + asked.min(self.cap).mul_f64(jitter.clamp(0.0, 1.0) / 4.0));
            }
            return Next::Defer(spread(self.base.max(Duration::from_secs(15)), jitter));
        }
        if attempt >= self.max_attempts {
            return Next::Fail(failure);
        }
        // A Retry-After is a lower bound: jitter goes on top, so that a crowd does not come back at once.
        let wait = spread(self.series(attempt), jitter);
        let wait = if failure.class == ErrorClass::Throttled { asked + wait } else { wait.max(asked) };
        Next::Retry(wait)
    }

    /// The wait after `attempt` before jitter: `base · 2^(attempt − 1)`, at most `cap`.
    fn series(&self, attempt: u32) -> Duration {
        let mut series = ExponentialBackoffBuilder::new()
            .with_initial_interval(self.base)
            .with_max_interval(self.cap)
            .with_multiplier(2.0)
            .with_randomization_factor(0.0)
            .with_max_elapsed_time(None)
            .build();
        // The series is flat once it is capped, so a hostile attempt number costs nothing.
        let steps = attempt.clamp(1, 64);
        (0..steps).filter_map(|_| series.next_backoff()).last().unwrap_or(self.cap).min(self.cap)
    }
}

/// `wait` with jitter: between three quarters and five quarters of it.
fn spread(wait: Duration, jitter: f64) -> Duration {
    wait.mul_f64(0.75 + jitter.clamp(0.0, 1.0) / 2.0)
}

/// The holding queue for a wait: the longest of `delays` (ascending) that is not longer, or the shortest.
///
/// What is left of the wait is spent in further hops, so a copy is never late by more than the shortest delay.
#[must_use]
pub fn holding(wait: Duration, delays: &[Duration]) -> Duration {
    delays.iter().rev().find(|&&delay| delay <= wait).or(delays.first()).copied().unwrap_or(wait)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const DELAYS: [Duration; 3] = [Duration::from_secs(1), Duration::from_secs(5), Duration::from_mins(1)];

    fn failure(class: ErrorClass) -> Failure {
        Failure::new(class, "x")
    }

    fn decide(attempt: u32, failure: Failure) -> Next {
        RetrySettings::default().decide(attempt, failure, None, Timestamp::UNIX_EPOCH, 0.5)
    }

    #[test]
    fn waits_double_up_to_the_cap() {
        let settings = RetrySettings { max_attempts: 100, ..RetrySettings::default() };
        let waits: Vec<_> = [1, 2, 3, 4, 11, 50].iter().map(|&attempt| settings.series(attempt).as_secs()).collect();
        assert_eq!(waits, [1, 2, 4, 8, 900, 900]);
    }

    #[test]
    fn the_last_attempt_fails() {
        assert_eq!(decide(4, failure(ErrorClass::Network)), Next::Retry(Duration::from_secs(8)));
        assert_eq!(decide(5, failure(ErrorClass::Network)), Next::Fail(failure(ErrorClass::Network)));
    }

    #[test]
    fn final_classes_fail_at_once() {
        for class in ErrorClass::ALL.into_iter().filter(|class| class.disposition() == Disposition::Final) {
            assert_eq!(decide(1, failure(class)), Next::Fail(failure(class)));
        }
    }

    #[test]
    fn a_full_disk_defers_and_fails_only_after_defer_max() {
        let settings = RetrySettings::default();
        let now = Timestamp::UNIX_EPOCH + SignedDuration::from_hours(25);
        let disk = || failure(ErrorClass::Disk);
        assert!(matches!(settings.decide(99, disk(), None, now, 0.5), Next::Defer(_)));
        let since = Some(Timestamp::UNIX_EPOCH);
        assert!(matches!(settings.decide(1, disk(), since, now, 0.5), Next::Fail(_)));
    }

    #[test]
    fn a_deferred_failure_that_knows_its_wait_is_believed() {
        let down = |secs| failure(ErrorClass::Network).not_before(Duration::from_secs(secs)).deferred();
        assert_eq!(decide(99, down(4)), Next::Defer(Duration::from_millis(4500)));
        assert_eq!(decide(99, down(0)), Next::Defer(Duration::from_millis(1125)));
        assert!(
            matches!(decide(5, failure(ErrorClass::Network).deferred()), Next::Defer(wait) if wait.as_secs() >= 11)
        );
    }

    #[test]
    fn retry_after_is_a_lower_bound() {
        let throttled = failure(ErrorClass::Throttled).not_before(Duration::from_secs(30));
        assert_eq!(decide(1, throttled), Next::Retry(Duration::from_secs(31)));
    }

    #[test]
    fn no_wait_is_longer_than_the_longest() {
        let settings = RetrySettings { max_attempts: 100, ..RetrySettings::default() };
        for deferred in [false, true] {
            let mut failure = failure(ErrorClass::Throttled).not_before(Duration::MAX);
            failure.deferred = deferred;
            let (Next::Retry(wait) | Next::Defer(wait)) =
                settings.decide(99, failure, None, Timestamp::UNIX_EPOCH, 1.0)
            else {
                panic!("it gave up")
            };
            assert!(wait <= settings.longest_wait(), "{wait:?}");
        }
    }

    #[test]
    fn a_wait_is_spent_in_the_longest_queue_that_is_not_longer() {
        let cases = [(0, 1), (1, 1), (4, 1), (5, 5), (59, 5), (60, 60), (9999, 60)];
        for (wait, held) in cases {
            assert_eq!(holding(Duration::from_secs(wait), &DELAYS).as_secs(), held, "{wait}");
        }
    }

    proptest! {
        #[test]
        fn a_wait_is_never_longer_than_the_cap_with_its_jitter(attempt in 1u32..2_000_000, jitter in 0.0f64..1.0) {
            let settings = RetrySettings { max_attempts: u32::MAX, ..RetrySettings::default() };
            let next = settings.decide(attempt, failure(ErrorClass::Network), None, Timestamp::UNIX_EPOCH, jitter);
            let Next::Retry(wait) = next else { panic!("{next:?}") };
            prop_assert!(wait <= settings.cap.mul_f64(1.25) && wait >= settings.base.mul_f64(0.75));
        }
    }
}
