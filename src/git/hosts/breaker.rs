//! When an endpoint of a host is left alone, and when one task tries whether it is back. Pure: takes the moment.

use std::time::{Duration, Instant};

/// The longest pause; it is also what a lone probe costs an upstream that stays away for days.
const LONGEST_PAUSE: Duration = Duration::from_mins(15);
/// What lies between the returns of two tasks that were turned away: they come back one after the other.
const APART: Duration = Duration::from_millis(200);

/// What a transfer that has ended tells of its endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Seen {
    /// It answered, whatever it said.
    Answered,
    /// It asks to be left alone for so long.
    Throttled(Duration),
    /// It could not be reached.
    Down,
    /// Nothing: the transfer was given up for reasons of our own.
    Nothing,
}

/// Why a task is turned away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Why {
    /// The endpoint cannot be reached.
    Down,
    /// It asked for a pause.
    Throttled,
    /// More wait for the host than it is worth to wait with.
    Busy,
}

/// A task that is turned away, and for how long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Refusal {
    pub(super) why: Why,
    pub(super) wait: Duration,
}

/// What a report has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Change {
    /// Tasks are turned away for so long.
    Opened(Duration),
    /// They pass again.
    Closed,
}

/// When it opens and for how long.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rules {
    /// Failures in a row after which it opens.
    pub(super) after: u32,
    /// The first pause; doubles with each probe that fails.
    pub(super) pause: Duration,
}

/// One endpoint: a port of a host.
#[derive(Debug, Default)]
pub(super) struct Breaker {
    failures: u32,
    state: State,
    /// Pauses in a row.
    pauses: u32,
    /// Tasks turned away in this pause.
    refused: u32,
    throttled_until: Option<Instant>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum State {
    #[default]
    Closed,
    Open {
        until: Instant,
    },
    /// One task tries; the others wait for what it finds.
    Probing,
}

impl Breaker {
    /// Lets a task pass, or turns it away. The one that passes after a pause is the probe: `true`.
    pub(super) fn pass(&mut self, now: Instant, rules: Rules) -> Result<bool, Refusal> {
        if let Some(until) = self.throttled_until {
            if now < until {
                return Err(self.refuse(Why::Throttled, until - now));
            }
            self.throttled_until = None;
            self.refused = 0;
        }
        match self.state {
            State::Closed => Ok(false),
            State::Open { until } if now < until => Err(self.refuse(Why::Down, until - now)),
            State::Open { .. } => {
                self.state = State::Probing;
                Ok(true)
            }
            State::Probing => Err(self.refuse(Why::Down, rules.pause)),
        }
    }

    /// Whether tasks are turned away at `now`, and why.
    pub(super) fn closed_to(&self, now: Instant) -> Option<Refusal> {
        let rest = |why, until: Instant| Some(Refusal { why, wait: until.saturating_duration_since(now) });
        match (self.throttled_until, self.state) {
            (Some(until), _) if now < until => rest(Why::Throttled, until),
            (_, State::Open { until }) => rest(Why::Down, until),
            (_, State::Probing) => rest(Why::Down, now),
            (_, State::Closed) => None,
        }
    }

    /// Takes in what a transfer has seen; `probe` as it was told when it passed.
    pub(super) fn report(&mut self, seen: Seen, probe: bool, now: Instant, rules: Rules) -> Option<Change> {
        match seen {
            Seen::Answered | Seen::Throttled(_) => {
                let was = std::mem::take(&mut self.state);
                (self.failures, self.pauses) = (0, 0);
                if let Seen::Throttled(wait) = seen {
                    let until = now + wait;
                    self.throttled_until = self.throttled_until.max(Some(until));
                    return Some(Change::Opened(wait));
                }
                (was != State::Closed).then_some(Change::Closed)
            }
            Seen::Down => {
                self.failures = self.failures.saturating_add(1);
                let opens = match self.state {
                    State::Closed => self.failures >= rules.after,
                    State::Probing => probe,
                    // It began before the pause and only confirms it.
                    State::Open { .. } => false,
                };
                opens.then(|| {
                    let pause =
                        rules.pause.saturating_mul(1 << self.pauses.min(16)).min(LONGEST_PAUSE.max(rules.pause));
                    self.pauses += 1;
                    self.refused = 0;
                    self.state = State::Open { until: now + pause };
                    Change::Opened(pause)
                })
            }
            Seen::Nothing => {
                if probe && self.state == State::Probing {
                    // The next one tries.
                    self.state = State::Open { until: now };
                }
                None
            }
        }
    }

    /// Whether there is nothing to remember.
    pub(super) fn is_idle(&self, now: Instant) -> bool {
        self.failures == 0 && self.state == State::Closed && self.throttled_until.is_none_or(|until| until <= now)
    }

    fn refuse(&mut self, why: Why, rest: Duration) -> Refusal {
        let spread = APART.saturating_mul(self.refused).min(rest);
        self.refused = self.refused.saturating_add(1);
        Refusal { why, wait: rest + spread }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULES: Rules = Rules { after: 3, pause: Duration::from_secs(10) };

    fn secs(secs: u64) -> Duration {
        Duration::from_secs(secs)
    }

    /// A breaker that has just opened, and when.
    fn opened() -> (Breaker, Instant) {
        let (mut breaker, now) = (Breaker::default(), Instant::now());
        for _ in 0..2 {
            assert_eq!(breaker.report(Seen::Down, false, now, RULES), None);
        }
        assert_eq!(breaker.report(Seen::Down, false, now, RULES), Some(Change::Opened(secs(10))));
        (breaker, now)
    }

    #[test]
    fn it_opens_after_failures_in_a_row_and_not_before() {
        let (mut breaker, now) = (Breaker::default(), Instant::now());
        for seen in [Seen::Down, Seen::Down, Seen::Answered, Seen::Down, Seen::Nothing, Seen::Down] {
            assert_eq!(breaker.report(seen, false, now, RULES), None);
            assert_eq!(breaker.pass(now, RULES), Ok(false));
        }
        assert_eq!(breaker.report(Seen::Down, false, now, RULES), Some(Change::Opened(secs(10))));
        assert_eq!(breaker.pass(now + secs(4), RULES), Err(Refusal { why: Why::Down, wait: secs(6) }));
    }

    #[test]
    fn one_probe_passes_after_the_pause_and_the_others_wait_for_it() {
        let (mut breaker, now) = opened();
        let later = now + secs(10);
        assert_eq!(breaker.pass(later, RULES), Ok(true));
        assert_eq!(breaker.pass(later, RULES), Err(Refusal { why: Why::Down, wait: secs(10) }));
        assert_eq!(breaker.report(Seen::Answered, true, later, RULES), Some(Change::Closed));
        assert_eq!(breaker.pass(later, RULES), Ok(false));
    }

    #[test]
    fn the_pause_doubles_with_each_probe_that_fails_up_to_a_cap_and_starts_anew_after_an_answer() {
        let (mut breaker, mut now) = opened();
        let mut pauses = Vec::new();
        for _ in 0..9 {
            now += LONGEST_PAUSE;
            assert_eq!(breaker.pass(now, RULES), Ok(true));
            let Some(Change::Opened(pause)) = breaker.report(Seen::Down, true, now, RULES) else {
                panic!("it did not open")
            };
            pauses.push(pause.as_secs());
        }
        assert_eq!(pauses, [20, 40, 80, 160, 320, 640, 900, 900, 900]);
        now += LONGEST_PAUSE;
        assert_eq!(breaker.pass(now, RULES), Ok(true));
        breaker.report(Seen::Answered, true, now, RULES);
        for _ in 0..2 {
            breaker.report(Seen::Down, false, now, RULES);
        }
        assert_eq!(breaker.report(Seen::Down, false, now, RULES), Some(Change::Opened(secs(10))));
    }

    #[test]
    fn a_probe_that_was_given_up_leaves_the_way_to_the_next() {
        let (mut breaker, now) = opened();
        let later = now + secs(11);
        assert_eq!(breaker.pass(later, RULES), Ok(true));
        assert_eq!(breaker.report(Seen::Nothing, true, later, RULES), None);
        assert_eq!(breaker.pass(later, RULES), Ok(true));
    }

    #[test]
    fn failures_of_transfers_that_began_before_the_pause_do_not_lengthen_it() {
        let (mut breaker, now) = opened();
        for _ in 0..10 {
            assert_eq!(breaker.report(Seen::Down, false, now + secs(5), RULES), None);
        }
        assert_eq!(breaker.pass(now + secs(10), RULES), Ok(true));
    }

    #[test]
    fn a_wish_to_slow_down_holds_everybody_for_its_time_and_needs_no_probe() {
        let (mut breaker, now) = (Breaker::default(), Instant::now());
        assert_eq!(breaker.report(Seen::Throttled(secs(7)), false, now, RULES), Some(Change::Opened(secs(7))));
        // A shorter wish does not shorten it, nor does an answer to somebody who was under way.
        breaker.report(Seen::Throttled(secs(1)), false, now, RULES);
        breaker.report(Seen::Answered, false, now, RULES);
        assert_eq!(breaker.pass(now + secs(3), RULES), Err(Refusal { why: Why::Throttled, wait: secs(4) }));
        assert!(!breaker.is_idle(now + secs(3)));
        assert_eq!(breaker.pass(now + secs(7), RULES), Ok(false));
        assert_eq!(breaker.pass(now + secs(7), RULES), Ok(false));
        assert!(breaker.is_idle(now + secs(7)));
    }

    #[test]
    fn those_who_are_turned_away_come_back_one_after_the_other() {
        let (mut breaker, now) = opened();
        let waits: Vec<_> = (0..3).map(|_| breaker.pass(now, RULES).unwrap_err().wait.as_millis()).collect();
        assert_eq!(waits, [10_000, 10_200, 10_400]);
        for _ in 0..1000 {
            assert!(breaker.pass(now, RULES).unwrap_err().wait <= secs(20));
        }
    }
}
