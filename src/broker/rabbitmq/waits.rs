//! Waiting between attempts to reach a broker: short at first, doubled up to a few seconds, never in step with others.

use std::time::Duration;

use rand::Rng as _;

const FIRST: Duration = Duration::from_millis(100);
/// Between questions that the broker answered with no.
const LONGEST: Duration = Duration::from_secs(3);
/// Between attempts to connect: the first delivery is due within 3 s of the broker's return, and what follows the
/// connection takes its part of them.
const LONGEST_TO_CONNECT: Duration = Duration::from_secs(1);

/// A series of waits.
pub(super) struct Waits {
    next: Duration,
    longest: Duration,
}

impl Waits {
    /// Between questions on a connection that stands.
    pub(super) fn new() -> Self {
        Self { next: FIRST, longest: LONGEST }
    }

    /// Between attempts to connect.
    pub(super) fn to_connect() -> Self {
        Self { next: FIRST, longest: LONGEST_TO_CONNECT }
    }

    /// The next wait: between half of its term and the whole.
    pub(super) fn next(&mut self) -> Duration {
        let wait = self.next.mul_f64(rand::rng().random_range(0.5..1.0));
        self.next = (self.next * 2).min(self.longest);
        wait
    }

    /// Begins again, after a success.
    pub(super) fn reset(&mut self) {
        self.next = FIRST;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_to_a_limit_and_begin_again_after_a_success() {
        let mut waits = Waits::new();
        let series: Vec<_> = (0..20).map(|_| waits.next()).collect();
        assert!(series[0] <= FIRST && series.iter().all(|&wait| wait <= LONGEST) && series[19] > LONGEST / 3);
        waits.reset();
        assert!(waits.next() <= FIRST);
        let mut waits = Waits::to_connect();
        assert!((0..20).map(|_| waits.next()).all(|wait| wait <= LONGEST_TO_CONNECT));
    }
}
