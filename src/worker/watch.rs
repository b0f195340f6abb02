//! The broker's view of our consumer against our own.
//!
//! A consumer can be gone, or be given nothing, while its channel and its connection look healthy. What a user of least
//! privilege can ask is how much waits in a queue and how many consume it; the rest follows from what came meanwhile. On
//! a busy queue nothing is asked at all: a delivery proves more than any answer.

use std::{fmt, sync::Arc, time::Duration};

use tokio::{sync::watch, time::Instant};

use crate::broker::{Broker, ConsumerView, Depth, Ours, Presence, View};

/// Between looks at a quiet queue. With [`PATIENCE`] and the second that a new session takes it stays well under the ten
/// seconds within which a lost consumer has to be noticed.
const PACE: Duration = Duration::from_secs(3);
/// Between looks while something seems wrong.
const CLOSER: Duration = Duration::from_millis(500);
/// How long messages may lie beside room in our window.
const PATIENCE: Duration = Duration::from_secs(2);
/// How often it is asked who consumes, where the broker can be asked.
const CLOSELY: Duration = Duration::from_secs(30);
/// Between two rebuilds of which the first changed nothing; doubles up to [`LONGEST_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_secs(2);
/// The longest wait between two rebuilds.
const LONGEST_PAUSE: Duration = Duration::from_mins(1);
/// Looks in a row that find no consumer, before that is believed.
const EMPTY_LOOKS: u32 = 2;
/// The same where the answer is "nothing, nobody", which is also what a broker says that had no time to count.
const BLANK_LOOKS: u32 = 3;

/// What a comparison of both views comes to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) enum Verdict {
    /// They agree.
    #[default]
    Well,
    /// It cannot be said yet: what was said before stands.
    Open,
    /// The broker has no consumer of ours.
    Gone,
    /// It has one, and gives it nothing.
    Silent,
    /// It serves another one, by its name where that is known.
    Behind(Option<String>),
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Well | Self::Open => f.write_str("the broker serves our consumer"),
            Self::Gone => f.write_str("the broker has no consumer of ours"),
            Self::Silent => f.write_str("messages wait, there is room for them here, and the broker delivers none"),
            Self::Behind(None) => f.write_str(
                "another consumer has the queue: an agent of the same name elsewhere, or a lost connection of ours that \
                 the broker still counts",
            ),
            Self::Behind(Some(other)) => {
                write!(f, "another consumer has the queue: {other}; stop that agent, or rename this node")
            }
        }
    }
}

/// Both sides at one moment.
#[derive(Clone, Debug)]
pub(super) struct Look {
    /// Since the watch began.
    pub(super) at: Duration,
    /// What we know.
    pub(super) ours: Ours,
    /// What the broker says; without a queue there is no consumer either.
    pub(super) seen: View,
}

/// What the last looks have shown. Pure: it is handed each look and says what follows.
#[derive(Debug)]
pub(super) struct Watch {
    /// Deliveries that may be unsettled at a time.
    window: u64,
    /// Whether the queue has one active consumer at a time.
    single: bool,
    tag: Option<String>,
    arrived: u64,
    /// Looks in a row that found no consumer.
    empty: u32,
    /// Since when messages lie beside room in our window.
    unserved: Option<Duration>,
    /// Rebuilds since all was well, and when the last one was.
    rebuilds: u32,
    rebuilt: Duration,
}

impl Watch {
    pub(super) fn new(window: u16, single: bool) -> Self {
        Self {
            window: u64::from(window),
            single,
            tag: None,
            arrived: 0,
            empty: 0,
            unserved: None,
            rebuilds: 0,
            rebuilt: Duration::ZERO,
        }
    }

    /// Whether something came since the last look, so that there is nothing to ask.
    pub(super) fn hears(&mut self, ours: &Ours) -> bool {
        if self.tag != ours.tag {
            self.tag.clone_from(&ours.tag);
            (self.arrived, self.empty, self.unserved) = (0, 0, None);
        }
        let came = ours.arrived > self.arrived;
        self.arrived = ours.arrived;
        if came {
            self.calm();
        }
        came
    }

    /// What the look shows, and whether the consumer is to be made anew now.
    pub(super) fn judge(&mut self, look: &Look) -> (Verdict, bool) {
        let Look { at, ours, seen } = look;
        let Some(tag) = &ours.tag else { return (Verdict::Open, false) };
        if self.hears(ours) {
            return (Verdict::Well, false);
        }
        if seen.depth.consumers == 0 {
            self.empty += 1;
            let enough = if seen.depth.messages == 0 { BLANK_LOOKS } else { EMPTY_LOOKS };
            return if self.empty < enough { (Verdict::Open, false) } else { (Verdict::Gone, self.may_rebuild(*at)) };
        }
        self.empty = 0;
        let ahead = if self.single { ahead(tag, seen.consumers.as_deref()) } else { Ahead::Nobody };
        let in_line = self.single && ours.stands_in_line() && ahead != Ahead::Nobody;
        let unserved = seen.depth.messages > 0 && ours.unsettled < self.window;
        if unserved && at.saturating_sub(*self.unserved.get_or_insert(*at)) < PATIENCE {
            return (Verdict::Open, false);
        }
        match ahead {
            // The broker itself says who it is: another session would stand in line just the same.
            Ahead::Other(other) => (Verdict::Behind(Some(other)), false),
            // With nothing to deliver, a new session shows whether somebody still is before us.
            Ahead::Unknown if in_line => (Verdict::Behind(None), self.may_rebuild(*at)),
            Ahead::Unknown if unserved && seen.depth.consumers > 1 => (Verdict::Behind(None), self.may_rebuild(*at)),
            Ahead::Nobody | Ahead::Unknown if unserved => (Verdict::Silent, self.may_rebuild(*at)),
            Ahead::Nobody | Ahead::Unknown => {
                self.calm();
                (Verdict::Well, false)
            }
        }
    }

    /// When to look again.
    pub(super) fn pace(&self) -> Duration {
        if self.empty > 0 || self.unserved.is_some() { CLOSER } else { PACE }
    }

    fn may_rebuild(&mut self, at: Duration) -> bool {
        let doublings = self.rebuilds.saturating_sub(1).min(16);
        let pause = (FIRST_PAUSE * 2_u32.pow(doublings)).min(LONGEST_PAUSE);
        let may = self.rebuilds == 0 || at >= self.rebuilt + pause;
        if may {
            self.rebuilds += 1;
            self.rebuilt = at;
            (self.empty, self.unserved) = (0, None);
        }
        may
    }

    fn calm(&mut self) {
        (self.empty, self.unserved, self.rebuilds) = (0, None, 0);
    }
}

/// Who is served before us.
#[derive(Debug, PartialEq, Eq)]
enum Ahead {
    Nobody,
    Other(String),
    /// The broker was not asked, or does not know us yet.
    Unknown,
}

fn ahead(tag: &str, consumers: Option<&[ConsumerView]>) -> Ahead {
    let Some(consumers) = consumers else { return Ahead::Unknown };
    match consumers.iter().find(|one| one.tag == tag) {
        Some(own) if own.active => Ahead::Nobody,
        Some(_) => match consumers.iter().find(|one| one.active) {
            Some(other) => Ahead::Other(format!("{} on connection {}", other.tag, other.connection)),
            None => Ahead::Unknown,
        },
        None => Ahead::Unknown,
    }
}

/// A consumer to be watched.
pub(super) struct Watched {
    pub(super) broker: Arc<dyn Broker>,
    pub(super) queue: String,
    pub(super) presence: Arc<Presence>,
    pub(super) window: u16,
    pub(super) single: bool,
}

impl Watched {
    /// Looks again and again, tells what it finds, and has the consumer made anew where that may help. Ends when dropped.
    pub(super) async fn watch(self, tell: watch::Sender<Verdict>) {
        let begun = Instant::now();
        let mut watch = Watch::new(self.window, self.single);
        let mut asked_closely = None::<Instant>;
        loop {
            tokio::time::sleep(watch.pace()).await;
            let ours = self.presence.now();
            if watch.hears(&ours) {
                self.say(&tell, Verdict::Well);
                continue;
            }
            if ours.tag.is_none() {
                continue;
            }
            let doubtful = watch.pace() == CLOSER || ours.stands_in_line() || *tell.borrow() != Verdict::Well;
            let closely = self.single && (doubtful || asked_closely.is_none_or(|asked| asked.elapsed() >= CLOSELY));
            let Ok(seen) = self.broker.look(&self.queue, closely).await else { continue };
            if closely {
                asked_closely = Some(Instant::now());
            }
            let now = self.presence.now();
            // What was seen belongs to a session that has ended meanwhile.
            if now.tag != ours.tag {
                continue;
            }
            let nobody = View { depth: Depth { messages: 0, consumers: 0 }, consumers: None };
            let look = Look { at: begun.elapsed(), ours: now, seen: seen.unwrap_or(nobody) };
            let (verdict, rebuild) = watch.judge(&look);
            if verdict == Verdict::Well && look.ours.stands_in_line() {
                self.presence.leads();
                // Who reads our presence has nothing else to be woken by.
                tell.send_modify(|_| {});
            }
            self.say(&tell, verdict);
            if rebuild {
                self.presence.rebuild();
            }
        }
    }

    fn say(&self, tell: &watch::Sender<Verdict>, verdict: Verdict) {
        if verdict == Verdict::Open || verdict == *tell.borrow() {
            return;
        }
        if verdict == Verdict::Well {
            tracing::info!(broker.queue = self.queue, "{verdict} again");
        } else {
            tracing::warn!(broker.queue = self.queue, reason = %verdict, "what the broker says of our consumer differs");
        }
        tell.send_replace(verdict);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WINDOW: u16 = 4;

    /// A name, the looks, and what each of them comes to.
    type Case = (&'static str, Vec<Look>, Vec<(Verdict, bool)>);

    fn ours(before: u32, arrived: u64, unsettled: u64) -> Ours {
        Ours { tag: Some("us-1".to_owned()), before, arrived, unsettled }
    }

    fn look(at_ms: u64, ours: Ours, messages: u32, consumers: u32) -> Look {
        let depth = Depth { messages, consumers };
        Look { at: Duration::from_millis(at_ms), ours, seen: View { depth, consumers: None } }
    }

    fn told(mut look: Look, consumers: &[(&str, bool)]) -> Look {
        let view = |&(tag, active): &(&str, bool)| ConsumerView {
            queue: "q".to_owned(),
            tag: tag.to_owned(),
            connection: "1.2.3.4:5".to_owned(),
            active,
        };
        look.seen.consumers = Some(consumers.iter().map(view).collect());
        look
    }

    fn judged(looks: &[Look]) -> Vec<(Verdict, bool)> {
        let mut watch = Watch::new(WINDOW, true);
        looks.iter().map(|look| watch.judge(look)).collect()
    }

    fn other() -> Verdict {
        Verdict::Behind(Some("them-1 on connection 1.2.3.4:5".to_owned()))
    }

    #[test]
    fn each_state_of_both_sides_has_its_verdict() {
        use Verdict::{Behind, Gone, Open, Silent, Well};
        let (anew, not) = (true, false);
        let cases: Vec<Case> = vec![
            ("idle", vec![look(0, ours(0, 0, 0), 0, 1)], vec![(Well, not)]),
            ("no session stands", vec![look(0, Ours::default(), 9, 0)], vec![(Open, not)]),
            (
                "a consumer that is gone beside waiting messages",
                vec![look(0, ours(0, 0, 0), 3, 0), look(500, ours(0, 0, 0), 3, 0)],
                vec![(Open, not), (Gone, anew)],
            ),
            (
                "nothing and nobody may be said for want of time",
                (0..3).map(|n| look(n * 500, ours(0, 0, 0), 0, 0)).collect(),
                vec![(Open, not), (Open, not), (Gone, anew)],
            ),
            (
                "an answer for want of time between true ones",
                vec![look(0, ours(0, 0, 0), 0, 0), look(500, ours(0, 0, 0), 0, 1), look(3500, ours(0, 0, 0), 0, 0)],
                vec![(Open, not), (Well, not), (Open, not)],
            ),
            (
                "messages lie beside room",
                vec![look(0, ours(0, 0, 0), 3, 1), look(1500, ours(0, 0, 0), 3, 1), look(2000, ours(0, 0, 0), 3, 1)],
                vec![(Open, not), (Open, not), (Silent, anew)],
            ),
            (
                "messages lie and something comes",
                vec![look(0, ours(0, 2, 1), 3, 1), look(1500, ours(0, 3, 1), 3, 1), look(3000, ours(0, 3, 1), 3, 1)],
                vec![(Well, not), (Well, not), (Open, not)],
            ),
            (
                "messages lie beside a full window",
                vec![look(0, ours(0, 4, 4), 900, 1), look(9000, ours(0, 4, 4), 900, 1)],
                vec![(Well, not), (Well, not)],
            ),
            (
                "somebody was there before us",
                vec![look(0, ours(1, 0, 0), 0, 1), look(500, ours(1, 0, 0), 0, 1)],
                vec![(Behind(None), anew), (Behind(None), not)],
            ),
            (
                "somebody was there before us, and then it is our turn",
                vec![look(0, ours(1, 0, 0), 0, 1), look(500, ours(1, 1, 1), 0, 1)],
                vec![(Behind(None), anew), (Well, not)],
            ),
            (
                "the broker knows another one who is active",
                vec![told(look(0, ours(0, 0, 0), 0, 1), &[("us-1", false), ("them-1", true)])],
                vec![(other(), not)],
            ),
            (
                "the broker knows that it is us",
                vec![told(look(0, ours(1, 0, 0), 0, 1), &[("us-1", true), ("them-1", false)])],
                vec![(Well, not)],
            ),
            (
                "the broker's statistics do not know us yet",
                vec![told(look(0, ours(0, 0, 0), 0, 1), &[("us-0", true)])],
                vec![(Well, not)],
            ),
            (
                "the broker has us as the active one and gives nothing",
                [0, 2000].map(|at| told(look(at, ours(0, 0, 0), 3, 1), &[("us-1", true)])).to_vec(),
                vec![(Open, not), (Silent, anew)],
            ),
            (
                "two are counted and none is served here",
                vec![look(0, ours(0, 0, 0), 3, 2), look(2000, ours(0, 0, 0), 3, 2)],
                vec![(Open, not), (Behind(None), anew)],
            ),
        ];
        for (name, looks, verdicts) in cases {
            assert_eq!(judged(&looks), verdicts, "{name}");
        }
    }

    #[test]
    fn a_queue_of_several_consumers_knows_no_line() {
        let mut watch = Watch::new(WINDOW, false);
        assert_eq!(watch.judge(&look(0, ours(1, 0, 0), 0, 2)), (Verdict::Well, false));
        watch.judge(&look(3000, ours(1, 0, 0), 1, 2));
        assert_eq!(watch.judge(&look(5000, ours(1, 0, 0), 1, 2)), (Verdict::Silent, true));
    }

    #[test]
    fn rebuilds_that_change_nothing_come_ever_more_rarely() {
        let mut watch = Watch::new(WINDOW, true);
        let mut rebuilds = Vec::new();
        for second in 0..600 {
            let ours = Ours { tag: Some(format!("us-{}", rebuilds.len())), ..ours(1, 0, 0) };
            if watch.judge(&look(second * 1000, ours, 0, 1)).1 {
                rebuilds.push(second);
            }
        }
        assert_eq!(rebuilds[..7], [0, 2, 6, 14, 30, 62, 122]);
        assert!(rebuilds.len() < 16, "{rebuilds:?}");
        // Once it was well the next fault is mended at once.
        let served = Ours { tag: Some("us-99".to_owned()), ..ours(0, 3, 0) };
        assert_eq!(watch.judge(&look(600_500, served, 0, 1)), (Verdict::Well, false));
        let next = Ours { tag: Some("us-100".to_owned()), ..ours(1, 0, 0) };
        assert_eq!(watch.judge(&look(601_000, next, 0, 1)), (Verdict::Behind(None), true));
    }

    #[test]
    fn a_lost_consumer_is_noticed_well_within_ten_seconds() {
        assert!(PACE + CLOSER * BLANK_LOOKS < Duration::from_secs(5));
        assert!(PACE + PATIENCE + CLOSER < Duration::from_secs(6));
    }
}
