//! Who may talk to one host now, who waits, and who is better sent away. Pure: takes the moment.
//!
//! A task that waits here has a slot of the agent, which a task for another host could use. So nobody waits longer than
//! [`PATIENCE`]: whoever did not get a place by then leaves and comes back later, uncharged. And where that can be
//! foreseen, since transfers with this host have lately taken so long, it is not even tried, but for a few who stand by so
//! that no place stays empty. Short transfers (listings above all) queue by the dozen; long ones do not fill the agent.

use std::{
    collections::{BTreeMap, VecDeque},
    time::{Duration, Instant},
};

use super::breaker::{Breaker, Change, Refusal, Rules, Seen, Why};

/// How long a task waits for a place with a slot of the agent in its hands.
pub(super) const PATIENCE: Duration = Duration::from_secs(10);
/// What a transfer is taken to last before one has ended.
const FIRST_GUESS: f64 = 1.0;
/// How much the newest transfer says about the next.
const NEWEST: f64 = 0.3;
/// The least and the longest that a task is sent away for.
const AWAY: (Duration, Duration) = (Duration::from_secs(5), Duration::from_mins(2));

/// A number for one task in one host's books.
pub(super) type Number = u64;

/// What becomes of a task that asks.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// It may begin; `probe` as the breaker says.
    Go { number: Number, probe: bool },
    /// It waits to be woken.
    Wait(Number),
    /// It is sent away.
    Away(Refusal),
}

/// One host.
#[derive(Debug)]
pub(super) struct Host {
    limit: usize,
    rules: Rules,
    running: BTreeMap<Number, Instant>,
    waiting: VecDeque<(Number, u16)>,
    endpoints: BTreeMap<u16, Breaker>,
    next: Number,
    /// How long a transfer lasts, in seconds.
    lasts: Option<f64>,
    last_use: Option<Instant>,
}

impl Host {
    pub(super) fn new(limit: usize, rules: Rules) -> Self {
        Self {
            limit: limit.max(1),
            rules,
            running: BTreeMap::new(),
            waiting: VecDeque::new(),
            endpoints: BTreeMap::new(),
            next: 0,
            lasts: None,
            last_use: None,
        }
    }

    /// A task wants to talk to `port`.
    pub(super) fn ask(&mut self, port: u16, now: Instant) -> Answer {
        self.last_use = Some(now);
        let rules = self.rules;
        let free = self.running.len() < self.limit && self.waiting.is_empty();
        if free {
            return match self.endpoint(port).pass(now, rules) {
                Ok(probe) => {
                    let number = self.number();
                    self.running.insert(number, now);
                    Answer::Go { number, probe }
                }
                Err(refusal) => Answer::Away(refusal),
            };
        }
        // Where nobody passes there is nothing to wait for. A probe is for whoever has a place by then.
        let closed = self.closed(port, now).is_some_and(|refusal| !refusal.wait.is_zero());
        if closed && let Err(refusal) = self.endpoint(port).pass(now, rules) {
            return Answer::Away(refusal);
        }
        if self.waiting.len() >= (self.limit / 4).max(1) && self.outlook(now) > PATIENCE {
            return Answer::Away(self.busy(now));
        }
        let number = self.number();
        self.waiting.push_back((number, port));
        Answer::Wait(number)
    }

    /// A task that was woken goes on: it has a place, unless its endpoint was closed meanwhile.
    pub(super) fn resume(&mut self, number: Number, port: u16, now: Instant) -> Answer {
        let rules = self.rules;
        match self.endpoint(port).pass(now, rules) {
            Ok(probe) if self.running.contains_key(&number) => {
                self.running.insert(number, now);
                Answer::Go { number, probe }
            }
            // Woken because its endpoint was closed, and that is over already.
            Ok(probe) => {
                self.endpoint(port).report(Seen::Nothing, probe, now, rules);
                Answer::Away(self.busy(now))
            }
            Err(refusal) => Answer::Away(refusal),
        }
    }

    /// A task that waits has lost its patience, or is not wanted any more.
    pub(super) fn quit(&mut self, number: Number) -> Vec<Number> {
        self.waiting.retain(|(waiting, _)| *waiting != number);
        self.running.remove(&number);
        self.move_up()
    }

    /// A transfer has ended. Returns who is to be woken: those who have a place now, and those whose endpoint is closed.
    pub(super) fn end(
        &mut self,
        number: Number,
        port: u16,
        probe: bool,
        seen: Seen,
        now: Instant,
    ) -> (Vec<Number>, Option<Change>) {
        self.last_use = Some(now);
        if let Some(since) = self.running.remove(&number)
            && seen != Seen::Nothing
        {
            let lasted = now.saturating_duration_since(since).as_secs_f64();
            self.lasts = Some(self.lasts.map_or(lasted, |lasts| lasts + NEWEST * (lasted - lasts)));
        }
        let rules = self.rules;
        let change = self.endpoint(port).report(seen, probe, now, rules);
        let mut woken = self.move_up();
        if matches!(change, Some(Change::Opened(_))) {
            woken.extend(self.waiting.iter().filter(|(_, at)| *at == port).map(|(number, _)| *number));
            self.waiting.retain(|(_, at)| *at != port);
        }
        (woken, change)
    }

    /// How long somebody who comes now would wait for a place.
    pub(super) fn busy(&self, now: Instant) -> Refusal {
        Refusal { why: Why::Busy, wait: self.outlook(now).clamp(AWAY.0, AWAY.1) }
    }

    /// How long tasks for `port` are turned away from now on, if they are.
    pub(super) fn closed(&self, port: u16, now: Instant) -> Option<Refusal> {
        self.endpoints.get(&port).and_then(|breaker| breaker.closed_to(now))
    }

    /// Running and waiting tasks, and the ports that are closed now.
    pub(super) fn counts(&self, now: Instant) -> (usize, usize, Vec<(u16, Refusal)>) {
        let closed = self.endpoints.iter().filter_map(|(port, breaker)| Some((*port, breaker.closed_to(now)?)));
        (self.running.len(), self.waiting.len(), closed.collect())
    }

    /// Whether it can be forgotten: nobody is there, and nothing is remembered or it was long ago.
    pub(super) fn is_idle(&self, now: Instant, long: Duration) -> bool {
        let nobody = self.running.is_empty() && self.waiting.is_empty();
        let old = self.last_use.is_none_or(|last| now.saturating_duration_since(last) > long);
        nobody && (old || self.endpoints.values().all(|breaker| breaker.is_idle(now)))
    }

    /// Those next in line take the free places.
    fn move_up(&mut self) -> Vec<Number> {
        let mut woken = Vec::new();
        while self.running.len() < self.limit
            && let Some((number, _)) = self.waiting.pop_front()
        {
            // Its time begins when it goes on; until then the place is only held.
            if let Some(since) = self.last_use {
                self.running.insert(number, since);
            }
            woken.push(number);
        }
        woken
    }

    fn outlook(&self, now: Instant) -> Duration {
        let ages = self.running.values().map(|since| now.saturating_duration_since(*since).as_secs_f64());
        let running = u32::try_from(self.running.len().max(1)).map_or(f64::MAX, f64::from);
        let lasts = self.lasts.unwrap_or(FIRST_GUESS).max(ages.sum::<f64>() / running);
        let before = u32::try_from(self.waiting.len() + 1).map_or(f64::MAX, f64::from);
        let places = u32::try_from(self.limit).map_or(f64::MAX, f64::from);
        Duration::try_from_secs_f64(lasts * before / places).unwrap_or(Duration::MAX)
    }

    fn endpoint(&mut self, port: u16) -> &mut Breaker {
        self.endpoints.entry(port).or_default()
    }

    fn number(&mut self) -> Number {
        self.next += 1;
        self.next
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULES: Rules = Rules { after: 2, pause: Duration::from_secs(30) };
    const PORT: u16 = 443;

    fn secs(secs: u64) -> Duration {
        Duration::from_secs(secs)
    }

    fn go(answer: Answer) -> Number {
        match answer {
            Answer::Go { number, .. } => number,
            other => panic!("it does not go: {other:?}"),
        }
    }

    fn wait(answer: Answer) -> Number {
        match answer {
            Answer::Wait(number) => number,
            other => panic!("it does not wait: {other:?}"),
        }
    }

    fn away(answer: Answer) -> Refusal {
        match answer {
            Answer::Away(refusal) => refusal,
            other => panic!("it is not sent away: {other:?}"),
        }
    }

    #[test]
    fn no_more_than_the_limit_run_and_the_first_to_wait_is_the_first_to_go() {
        let (mut host, now) = (Host::new(2, RULES), Instant::now());
        let running = [go(host.ask(PORT, now)), go(host.ask(PORT, now))];
        let waiting = [wait(host.ask(PORT, now)), wait(host.ask(PORT, now))];
        let (woken, _) = host.end(running[1], PORT, false, Seen::Answered, now);
        assert_eq!(woken, [waiting[0]]);
        // Nobody who comes later gets in between.
        let late = wait(host.ask(PORT, now));
        assert_eq!(go(host.resume(waiting[0], PORT, now)), waiting[0]);
        let (woken, _) = host.end(running[0], PORT, false, Seen::Answered, now);
        assert_eq!(woken, [waiting[1]]);
        assert_eq!(host.quit(waiting[1]), [late]);
        assert_eq!(host.counts(now).0, 2);
    }

    #[test]
    fn short_transfers_queue_and_long_ones_keep_only_a_few_waiting() {
        let mut now = Instant::now();
        let mut short = Host::new(8, RULES);
        let first: Vec<_> = (0..8).map(|_| go(short.ask(PORT, now))).collect();
        for number in first {
            let (woken, _) = short.end(number, PORT, false, Seen::Answered, now + Duration::from_millis(100));
            assert!(woken.is_empty());
        }
        for _ in 0..8 {
            go(short.ask(PORT, now));
        }
        for _ in 0..100 {
            wait(short.ask(PORT, now));
        }
        let mut long = Host::new(8, RULES);
        for _ in 0..8 {
            go(long.ask(PORT, now));
        }
        now += secs(60);
        // Two stand by; the third would wait for half a minute.
        wait(long.ask(PORT, now));
        wait(long.ask(PORT, now));
        let refusal = away(long.ask(PORT, now));
        assert_eq!((refusal.why, refusal.wait.as_secs()), (Why::Busy, 22));
    }

    #[test]
    fn who_waits_for_an_endpoint_that_closes_is_woken_and_sent_away() {
        let (mut host, now) = (Host::new(2, RULES), Instant::now());
        let running = [go(host.ask(PORT, now)), go(host.ask(PORT, now))];
        let (first, other, last) = (wait(host.ask(PORT, now)), wait(host.ask(22, now)), wait(host.ask(PORT, now)));
        let (woken, change) = host.end(running[0], PORT, false, Seen::Down, now);
        assert_eq!((woken, change), (vec![first], None));
        go(host.resume(first, PORT, now));
        let (woken, change) = host.end(first, PORT, false, Seen::Down, now);
        assert_eq!((woken, change), (vec![other, last], Some(Change::Opened(secs(30)))));
        assert_eq!(away(host.resume(last, PORT, now)).why, Why::Down);
        // Another port of the same host is another matter.
        go(host.resume(other, 22, now));
        assert_eq!(away(host.ask(PORT, now + secs(1))).why, Why::Down);
        assert_eq!(host.counts(now).2.len(), 1);
    }

    #[test]
    fn a_place_that_is_given_up_goes_to_the_next() {
        let (mut host, now) = (Host::new(1, RULES), Instant::now());
        let running = go(host.ask(PORT, now));
        let waiting = wait(host.ask(PORT, now));
        assert!(host.quit(waiting).is_empty());
        let waiting = wait(host.ask(PORT, now));
        let (woken, _) = host.end(running, PORT, false, Seen::Nothing, now);
        assert_eq!(woken, [waiting]);
        assert_eq!(host.quit(waiting), Vec::<Number>::new());
        assert!(host.is_idle(now, secs(1)));
        go(host.ask(PORT, now));
    }

    #[test]
    fn what_is_remembered_of_a_host_is_forgotten_after_a_while() {
        let (mut host, now) = (Host::new(1, RULES), Instant::now());
        for _ in 0..2 {
            let number = go(host.ask(PORT, now));
            host.end(number, PORT, false, Seen::Down, now);
        }
        assert!(!host.is_idle(now, secs(3600)));
        assert!(host.is_idle(now + secs(3601), secs(3600)));
    }
}
