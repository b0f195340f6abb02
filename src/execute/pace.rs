//! How fast a task gets on, and how long its phase will take. Pure: takes the moment.

use std::time::{Duration, Instant};

use crate::protocol::Progress;

/// Less than this between two looks says nothing.
const LEAST: Duration = Duration::from_millis(200);
/// After about so long the past has lost most of its weight.
const MEMORY: f64 = 3.0;
/// An estimate beyond this helps nobody.
const LONGEST: f64 = 48.0 * 3600.0;

/// Measures one task's progress. What children say of rate and estimate is not used.
#[derive(Debug, Default)]
pub struct Pace {
    last: Option<Look>,
    /// Bytes a second, smoothed.
    bytes: Option<f64>,
    /// Units a second, smoothed.
    units: Option<f64>,
}

#[derive(Debug)]
struct Look {
    at: Instant,
    phase: String,
    done: u64,
    bytes: u64,
}

impl Pace {
    /// The same progress with rate and estimate; each phase is measured for itself.
    pub fn measure(&mut self, now: Instant, mut progress: Progress) -> Progress {
        let same = self.last.as_ref().is_some_and(|last| {
            last.phase == progress.phase && last.done <= progress.done && last.bytes <= progress.bytes
        });
        if !same {
            (self.bytes, self.units) = (None, None);
            self.look(now, &progress);
        } else if let Some(last) = &self.last
            && let passed = now.saturating_duration_since(last.at)
            && passed >= LEAST
        {
            let weight = 1.0 - (-passed.as_secs_f64() / MEMORY).exp();
            let smoothed = |before: Option<f64>, grown: u64| {
                let rate = float(grown) / passed.as_secs_f64();
                Some(before.map_or(rate, |before| before + weight * (rate - before)))
            };
            self.bytes = smoothed(self.bytes, progress.bytes - last.bytes);
            self.units = smoothed(self.units, progress.done - last.done);
            self.look(now, &progress);
        }
        progress.rate = self.bytes.filter(|rate| *rate >= 1.0).map(whole);
        let left = progress.total.map(|total| float(total.saturating_sub(progress.done)));
        progress.eta_secs = match (left, self.units) {
            (Some(left), Some(units)) if units > 0.0 => Some(left / units).filter(|secs| *secs < LONGEST).map(whole),
            _ => None,
        };
        progress
    }

    fn look(&mut self, at: Instant, progress: &Progress) {
        let Progress { phase, done, bytes, .. } = progress;
        self.last = Some(Look { at, phase: phase.clone(), done: *done, bytes: *bytes });
    }
}

#[expect(clippy::cast_precision_loss, reason = "a rate is no account")]
fn float(number: u64) -> f64 {
    number as f64
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "rounded up, never negative, and saturating"
)]
fn whole(number: f64) -> u64 {
    number.ceil() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn progress(phase: &str, done: u64, total: Option<u64>, bytes: u64) -> Progress {
        Progress { phase: phase.to_owned(), done, total, bytes, ..Progress::default() }
    }

    /// What is measured of these looks, each so many milliseconds after the first.
    fn measured(looks: &[(u64, Progress)]) -> Vec<(Option<u64>, Option<u64>)> {
        let (mut pace, start) = (Pace::default(), Instant::now());
        let mut measure = |(ms, progress): &(u64, Progress)| {
            let progress = pace.measure(start + Duration::from_millis(*ms), progress.clone());
            (progress.rate, progress.eta_secs)
        };
        looks.iter().map(&mut measure).collect()
    }

    #[test]
    fn a_steady_transfer_has_a_rate_and_an_estimate() {
        let looks: Vec<_> =
            (0..5).map(|n| (n * 1000, progress("receiving", n * 100, Some(1000), n * 1_000_000))).collect();
        assert_eq!(
            measured(&looks),
            [
                (None, None),
                (Some(1_000_000), Some(9)),
                (Some(1_000_000), Some(8)),
                (Some(1_000_000), Some(7)),
                (Some(1_000_000), Some(6))
            ]
        );
    }

    #[test]
    fn a_jump_counts_only_in_part_and_a_stop_lets_the_rate_fall() {
        let looks = [
            (0, progress("receiving", 0, None, 0)),
            (1000, progress("receiving", 0, None, 1000)),
            (2000, progress("receiving", 0, None, 11_000)),
            (3000, progress("receiving", 0, None, 11_000)),
        ];
        let rates: Vec<_> = measured(&looks).into_iter().map(|(rate, _)| rate.unwrap_or_default()).collect();
        assert!(rates[2] > 1000 && rates[2] < 5000 && rates[3] < rates[2], "{rates:?}");
    }

    #[test]
    fn a_new_phase_begins_anew_and_looks_too_close_say_nothing() {
        let looks = [
            (0, progress("receiving", 0, Some(10), 0)),
            (1000, progress("receiving", 5, Some(10), 5000)),
            (1001, progress("receiving", 6, Some(10), 9000)),
            (2000, progress("resolving", 0, Some(10), 9000)),
            (3000, progress("resolving", 2, Some(10), 9000)),
        ];
        let measured = measured(&looks);
        assert_eq!(measured[1], (Some(5000), Some(1)));
        assert_eq!(measured[2], (Some(5000), Some(1)));
        assert_eq!(measured[3], (None, None));
        assert_eq!(measured[4], (None, Some(4)));
    }

    #[test]
    fn what_a_child_claims_is_not_passed_on() {
        let claimed = Progress { rate: Some(7), eta_secs: Some(7), ..progress("receiving", 0, Some(9), 0) };
        assert_eq!(measured(&[(0, claimed)]), [(None, None)]);
    }

    #[test]
    fn an_estimate_of_days_is_none() {
        let looks =
            [(0, progress("receiving", 0, Some(u64::MAX), 0)), (1000, progress("receiving", 1, Some(u64::MAX), 1))];
        assert_eq!(measured(&looks)[1], (Some(1), None));
    }
}
