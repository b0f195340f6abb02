//! What a delivery is to us: step 3 of a message's path.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};

use super::{CRASH_BUDGET, Entry, Page, Phase, WaitingClone};
use crate::protocol::{Kind, Place, ProjectId, Round};

/// A clone whose copy is overdue by this much is taken for lost: nobody waits for it any longer.
const OVERDUE: Duration = Duration::from_hours(1);
/// A copy that is overdue by this much no longer stands for its task: a queue may have been deleted with it in it. If it
/// comes after all, it finds the task running or settled.
const COPY_OVERDUE: Duration = Duration::from_mins(1);

/// A delivered task, as the journal sees it.
#[derive(Clone, Debug, PartialEq)]
pub struct Sighting {
    /// Its round.
    pub round: Round,
    /// SHA-256 of the body, hexadecimal.
    pub digest: String,
    /// Kind of task.
    pub kind: Kind,
    /// Its project.
    pub project: ProjectId,
    /// The master's own order.
    pub generation: Option<u64>,
    /// When it first arrived, if a copy says so.
    pub arrived: Option<i64>,
    /// A unique order of arrival for it, if it is new.
    pub next_arrival: i64,
    /// The attempt it asks for.
    pub attempt: u32,
    /// It is not due before this moment.
    pub not_before: Option<Timestamp>,
    /// Not to be started after this moment.
    pub not_after: Option<Timestamp>,
    /// The newest task that was applied to the project.
    pub mark: Option<Place>,
    /// This start of the agent.
    pub boot: String,
    /// Now.
    pub now: Timestamp,
}

/// The right to go on with a task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ticket {
    /// Its place in the order of its project.
    pub place: Place,
    /// The attempt to charge when it runs: the higher of header and journal.
    pub attempt: u32,
}

/// What a delivery is to us.
#[derive(Clone, Debug, PartialEq)]
pub enum Admission {
    /// To be done.
    Fresh(Ticket),
    /// To be done, but not yet: the copy came early.
    Early(Ticket, Duration),
    /// To be done after a clone of its project that waits for a retry.
    Behind(Ticket),
    /// Settled before; the terminal event answers it.
    Settled(Box<Entry>),
    /// A newer copy is under way.
    Released,
    /// Cancelled before it could run.
    Cancelled(Ticket),
    /// Something newer was applied to the project.
    Superseded(Ticket, String),
    /// Its `not_after` has passed.
    Expired(Ticket),
    /// It was running at too many crashes of the agent.
    Crashed(Ticket),
    /// The same key came with another body before.
    Mismatch,
}

impl Sighting {
    /// The place of a task that is new to the journal.
    fn place(&self) -> Place {
        // After everything that was applied, wherever the clock was then: it may have been put back since, and the
        // journal that knew of it may be lost.
        let newest = self.mark.map_or(self.next_arrival, |mark| self.next_arrival.max(mark.arrived.saturating_add(1)));
        // A place in the future would make everything that comes until then stale.
        let arrived = self.arrived.map_or(newest, |arrived| arrived.min(newest));
        Place { generation: self.generation, arrived }
    }
}

impl Page {
    /// Decides what a delivery is, and notes it. Lower rounds that are still open are returned, to be closed.
    pub fn admit(&mut self, sighting: &Sighting, clones: &[WaitingClone]) -> (Admission, Vec<Entry>) {
        if let Some(known) = self.round(sighting.round) {
            if known.digest != sighting.digest {
                return (Admission::Mismatch, Vec::new());
            }
            if !known.is_open() {
                return (Admission::Settled(Box::new(known.clone())), Vec::new());
            }
        }
        let overtaken = self.highest().is_some_and(|highest| highest > sighting.round);
        let cancelled = sighting.round == 0 && std::mem::take(&mut self.cancel_pending);
        let entry = self.sighted(sighting);
        let attempt = sighting.attempt.max(entry.attempt).max(entry.released).max(1);
        let ticket = Ticket { place: entry.place, attempt };
        entry.cancelled |= cancelled;
        let admission = if entry.cancelled {
            Admission::Cancelled(ticket)
        } else if overtaken {
            Admission::Superseded(ticket, "a replay of it came first".to_owned())
        } else {
            entry.judge(ticket, sighting, clones)
        };
        let closed = self.entries.iter().filter(|entry| entry.round < sighting.round && entry.is_open());
        (admission, closed.cloned().collect())
    }

    /// The entry of a sighted task, made if it is new.
    fn sighted(&mut self, sighting: &Sighting) -> &mut Entry {
        if self.round(sighting.round).is_none() {
            let place = sighting.place();
            let digest = sighting.digest.clone();
            self.insert(Entry::new(sighting.round, digest, sighting.kind, sighting.project, place, sighting.now));
        }
        let entry = self.round_mut(sighting.round).expect("the entry was inserted above");
        entry.seen = sighting.now;
        entry
    }
}

impl Entry {
    /// Counts a crash of the agent at which it was running.
    ///
    /// In company it may have been another's doing: such crashes alone are not enough to give it up, until there are
    /// twice as many of them. After two starts in a row that did not end well everything runs alone.
    fn charge(&mut self, alone: bool) {
        self.crashes += 1;
        self.crashed_alone |= alone;
    }

    /// Whether it was running at too many crashes.
    fn is_given_up(&self) -> bool {
        self.crashes >= if self.crashed_alone { CRASH_BUDGET } else { 2 * CRASH_BUDGET }
    }

    /// What an open, wanted task's delivery is.
    fn judge(&mut self, ticket: Ticket, sighting: &Sighting, clones: &[WaitingClone]) -> Admission {
        if sighting.attempt < self.released {
            if self.copy_is_under_way(sighting.now) {
                return Admission::Released;
            }
            // From now on this delivery stands for it, also when it is asked about again, given back, or left by a crash.
            (self.attempt, self.released) = (ticket.attempt, sighting.attempt);
        }
        match &self.phase {
            Phase::Running { boot, alone } if *boot != sighting.boot => self.charge(*alone),
            _ => {}
        }
        self.phase = Phase::Waiting;
        if self.is_given_up() {
            return Admission::Crashed(ticket);
        }
        if let Some(reason) = stale(ticket.place, sighting) {
            return Admission::Superseded(ticket, reason);
        }
        if sighting.not_after.is_some_and(|limit| sighting.now > limit) {
            return Admission::Expired(ticket);
        }
        if let Some(due) = sighting.not_before
            && let Ok(wait) = Duration::try_from(due.duration_since(sighting.now))
            && !wait.is_zero()
        {
            // The rest of its wait is no turn in between: what waits for it goes on waiting.
            self.phase = Phase::Released { until: due };
            return Admission::Early(ticket, wait);
        }
        let waits_for = |clone: &&WaitingClone| {
            let overdue = SignedDuration::try_from(OVERDUE).unwrap_or(SignedDuration::ZERO);
            // One that is no newer than what was applied is done, or pointless: a journal that was set aside may not know.
            let is_ahead = sighting.mark.is_none_or(|mark| mark.is_older_than(clone.place));
            is_ahead
                && clone.place.is_older_than(ticket.place)
                && clone.until.saturating_add(overdue).is_ok_and(|t| sighting.now < t)
        };
        if sighting.kind.needs_clone() && clones.iter().any(|clone| waits_for(&clone)) {
            return Admission::Behind(ticket);
        }
        Admission::Fresh(ticket)
    }
}

impl Entry {
    /// Whether the copy that was let go may still come. One that had come, and was in the hands of an agent that died, is at
    /// the broker again, unless its queue was deleted: nobody knows, and whichever delivery comes first is as good.
    fn copy_is_under_way(&self, now: Timestamp) -> bool {
        let Phase::Released { until } = self.phase else { return false };
        let patience = SignedDuration::try_from(COPY_OVERDUE).unwrap_or(SignedDuration::MAX);
        until.saturating_add(patience).is_ok_and(|limit| now <= limit)
    }
}

/// Why a task is older than what was applied to its project, if it is.
fn stale(place: Place, sighting: &Sighting) -> Option<String> {
    let mark = sighting.mark.filter(|_| sighting.kind.changes_project())?;
    if !place.is_older_than(mark) {
        return None;
    }
    Some(match (place.generation, mark.generation) {
        (Some(ours), Some(theirs)) if ours != theirs => {
            format!("generation {theirs} was applied to the project, this is generation {ours}")
        }
        _ => "a task that arrived later was applied to the project first".to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        journal::{CancelAnswer, Concluded, Debt, Envelope},
        protocol::{Status, wire::Message},
    };

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_second(1_000_000 + seconds).unwrap()
    }

    fn sighting() -> Sighting {
        Sighting {
            round: 0,
            digest: "d".to_owned(),
            kind: Kind::Clone,
            project: 1,
            generation: None,
            arrived: None,
            next_arrival: 100,
            attempt: 1,
            not_before: None,
            not_after: None,
            mark: None,
            boot: "b1".to_owned(),
            now: at(0),
        }
    }

    fn envelope() -> Envelope {
        Envelope { exchange: "e".to_owned(), routing_key: "k".to_owned(), message: Message::default() }
    }

    fn admit(page: &mut Page, sighting: &Sighting) -> Admission {
        page.admit(sighting, &[]).0
    }

    #[test]
    fn a_new_task_is_fresh_and_keeps_its_first_place() {
        let mut page = Page::default();
        let place = Place { generation: None, arrived: 100 };
        assert_eq!(admit(&mut page, &sighting()), Admission::Fresh(Ticket { place, attempt: 1 }));
        let again = Sighting { next_arrival: 200, ..sighting() };
        assert_eq!(admit(&mut page, &again), Admission::Fresh(Ticket { place, attempt: 1 }));
    }

    #[test]
    fn the_same_key_with_another_body_touches_nothing() {
        let mut page = Page::default();
        admit(&mut page, &sighting());
        let before = page.clone();
        let other = Sighting { digest: "other".to_owned(), ..sighting() };
        assert_eq!(admit(&mut page, &other), Admission::Mismatch);
        assert_eq!(page, before);
    }

    #[test]
    fn a_settled_task_is_answered_with_the_same_event() {
        let mut page = Page::default();
        admit(&mut page, &sighting());
        assert_eq!(page.settle(0, Status::Failed, envelope(), Some(envelope())), Concluded::Now);
        let Admission::Settled(entry) = admit(&mut page, &sighting()) else { panic!("not settled") };
        assert_eq!(entry.debts().iter().map(|(debt, _)| *debt).collect::<Vec<_>>(), [Debt::DeadLetter, Debt::Event]);
        assert_eq!(page.settle(0, Status::Succeeded, envelope(), None), Concluded::Before(Some(envelope().into())));
    }

    #[test]
    fn debts_are_struck_off_one_by_one() {
        let mut page = Page::default();
        admit(&mut page, &sighting());
        page.settle(0, Status::Failed, envelope(), Some(envelope()));
        page.strike(0, Debt::DeadLetter, at(1));
        assert_eq!(page.round(0).unwrap().debts().len(), 1);
        page.strike(0, Debt::Event, at(1));
        assert!(!page.round(0).unwrap().owes());
    }

    #[test]
    fn a_history_is_owed_until_it_is_told_of() {
        let mut page = Page::default();
        admit(&mut page, &sighting());
        page.settle(0, Status::Succeeded, envelope(), None);
        page.owe_history(0, 7);
        page.strike(0, Debt::Event, at(1));
        let entry = page.round(0).unwrap();
        assert!(entry.owes() && entry.debts().is_empty(), "nothing that could be published yet");
        page.put_off_history(0, 2, Some(at(3)));
        assert_eq!(page.round(0).unwrap().owes_history.unwrap().failures, 2);
        page.history_over(0, Some(envelope()));
        assert_eq!(page.round(0).unwrap().debts(), [(Debt::History, envelope().into())]);
        // Told once: what comes late changes nothing.
        page.history_over(0, None);
        page.strike(0, Debt::History, at(4));
        assert!(!page.round(0).unwrap().owes());
    }

    #[test]
    fn a_delivery_older_than_its_released_copy_is_done_with() {
        let mut page = Page::default();
        admit(&mut page, &sighting());
        page.begin(0, 1, "b1", false);
        page.release(0, 2, at(5));
        assert_eq!(admit(&mut page, &sighting()), Admission::Released);
        let copy = Sighting { attempt: 2, ..sighting() };
        assert!(matches!(admit(&mut page, &copy), Admission::Fresh(Ticket { attempt: 2, .. })));
    }

    #[test]
    fn a_task_that_comes_again_is_run_where_its_released_copy_is_long_overdue() {
        let mut page = Page::default();
        admit(&mut page, &sighting());
        page.begin(0, 1, "b1", false);
        page.release(0, 2, at(5));
        let again = |seconds| Sighting { now: at(seconds), ..sighting() };
        assert_eq!(admit(&mut page, &again(60)), Admission::Released);
        let admission = admit(&mut page, &again(66));
        assert!(matches!(admission, Admission::Fresh(Ticket { attempt: 2, .. })), "{admission:?}");
        page.begin(0, 2, "b1", false);
        page.release(0, 3, at(70));
        let late = Sighting { attempt: 2, ..again(71) };
        assert_eq!(admit(&mut page, &late), Admission::Released, "the copy came after all");
    }

    #[test]
    fn a_delivery_that_stands_for_a_lost_copy_goes_on_doing_so() {
        let lost = || {
            let mut page = Page::default();
            admit(&mut page, &sighting());
            page.begin(0, 1, "b1", false);
            page.release(0, 2, at(5));
            page
        };
        let again = |seconds, boot: &str| Sighting { now: at(seconds), boot: boot.to_owned(), ..sighting() };
        let is_second = |admission: &Admission| matches!(admission, Admission::Fresh(Ticket { attempt: 2, .. }));
        // It waits for its turn, and the journal is asked again.
        let mut page = lost();
        for seconds in [66, 67] {
            let admission = admit(&mut page, &again(seconds, "b1"));
            assert!(is_second(&admission), "{admission:?}");
        }
        // It is given back before its turn comes.
        page.give_back(0, at(68));
        let admission = admit(&mut page, &again(69, "b1"));
        assert!(is_second(&admission), "{admission:?}");
        // The agent dies with it in hand.
        page.begin(0, 2, "b1", false);
        let admission = admit(&mut page, &again(70, "b2"));
        assert!(is_second(&admission), "{admission:?}");
        // The agent dies with the copy in hand, and the queue to which that went back is deleted.
        let mut page = lost();
        admit(&mut page, &Sighting { attempt: 2, ..again(6, "b1") });
        page.begin(0, 2, "b1", false);
        let admission = admit(&mut page, &again(7, "b2"));
        assert!(is_second(&admission), "{admission:?}");
    }

    #[test]
    fn the_attempt_is_the_higher_of_header_and_journal() {
        let mut page = Page::default();
        admit(&mut page, &sighting());
        page.begin(0, 3, "b1", false);
        assert!(matches!(admit(&mut page, &sighting()), Admission::Fresh(Ticket { attempt: 3, .. })));
    }

    #[test]
    fn a_task_that_was_running_at_three_crashes_is_given_up() {
        let mut page = Page::default();
        admit(&mut page, &sighting());
        for boot in 1..=3 {
            // The third start takes one delivery at a time.
            assert!(page.begin(0, 1, &format!("b{boot}"), boot == 3));
            let next = Sighting { boot: format!("b{}", boot + 1), ..sighting() };
            let admission = admit(&mut page, &next);
            assert_eq!(matches!(admission, Admission::Crashed(_)), boot == 3, "{boot}: {admission:?}");
        }
    }

    #[test]
    fn a_task_that_never_ran_alone_at_a_crash_is_given_up_later() {
        let mut page = Page::default();
        admit(&mut page, &sighting());
        for boot in 1..=6 {
            assert!(page.begin(0, 1, &format!("b{boot}"), false));
            let next = Sighting { boot: format!("b{}", boot + 1), ..sighting() };
            let admission = admit(&mut page, &next);
            assert_eq!(matches!(admission, Admission::Crashed(_)), boot == 6, "{boot}: {admission:?}");
        }
    }

    #[test]
    fn a_new_task_comes_after_what_was_applied_wherever_the_clock_was_then() {
        let applied = Place { generation: None, arrived: 5_000 };
        let admission = admit(&mut Page::default(), &Sighting { mark: Some(applied), ..sighting() });
        let place = Place { generation: None, arrived: 5_001 };
        assert_eq!(admission, Admission::Fresh(Ticket { place, attempt: 1 }));
        // A copy is believed up to there and no further.
        for (arrived, believed) in [(4_000, 4_000), (5_000, 5_000), (9_000, 5_001)] {
            let copy = Sighting { arrived: Some(arrived), mark: Some(applied), ..sighting() };
            assert_eq!(copy.place().arrived, believed);
        }
    }

    #[test]
    fn what_the_journal_lost_is_known_to_whoever_holds_the_task() {
        let mut page = Page::default();
        let place = Place { generation: None, arrived: 7 };
        let lost = || Entry::new(9, "d".to_owned(), Kind::Clone, 1, place, at(0));
        assert_eq!(page.known(2, lost).round, 2);
        assert_eq!(page.settle(2, Status::Failed, envelope(), None), Concluded::Now);
        page.known(2, || panic!("it is known by now"));
    }

    #[test]
    fn a_task_given_back_at_a_drain_is_not_charged_a_crash() {
        let mut page = Page::default();
        admit(&mut page, &sighting());
        for boot in 1..=5 {
            page.begin(0, 1, &format!("b{boot}"), true);
            page.give_back(0, at(0));
            let next = Sighting { boot: format!("b{}", boot + 1), ..sighting() };
            assert!(matches!(admit(&mut page, &next), Admission::Fresh(_)));
        }
    }

    #[test]
    fn a_clone_that_was_given_back_is_waited_for() {
        let mut page = Page::default();
        admit(&mut page, &sighting());
        page.begin(0, 1, "b1", false);
        assert_eq!(page.round(0).unwrap().waiting_clone(), None);
        page.give_back(0, at(7));
        let place = Place { generation: None, arrived: 100 };
        assert_eq!(page.round(0).unwrap().waiting_clone(), Some(WaitingClone { place, until: at(7) }));
        assert!(matches!(admit(&mut page, &sighting()), Admission::Fresh(_)));
        assert_eq!(page.round(0).unwrap().waiting_clone(), None);
    }

    #[test]
    fn a_task_older_than_what_was_applied_is_superseded_however_it_was_delayed() {
        let mark = |generation, arrived| Some(Place { generation, arrived });
        let cases = [
            (Some(1), Some(50), mark(Some(2), 1), true),
            (Some(3), Some(50), mark(Some(2), 99), false),
            (None, Some(50), mark(None, 99), true),
            (None, Some(50), mark(Some(7), 40), false),
            (None, Some(50), mark(None, 50), false),
        ];
        for (generation, arrived, mark, superseded) in cases {
            let sighting = Sighting { generation, arrived, mark, attempt: 4, ..sighting() };
            let admission = admit(&mut Page::default(), &sighting);
            assert_eq!(matches!(admission, Admission::Superseded(..)), superseded, "{sighting:?}");
        }
        let status = Sighting { kind: Kind::Status, arrived: Some(1), mark: mark(None, 9), ..sighting() };
        assert!(matches!(admit(&mut Page::default(), &status), Admission::Fresh(_)));
    }

    #[test]
    fn a_cancel_that_comes_first_waits_for_round_zero() {
        let mut page = Page::default();
        assert_eq!(page.cancel(), CancelAnswer::Pending);
        assert!(matches!(admit(&mut page, &sighting()), Admission::Cancelled(_)));
        assert!(!page.cancel_pending);
    }

    #[test]
    fn a_cancel_marks_the_highest_open_round_and_is_idempotent() {
        let mut page = Page::default();
        admit(&mut page, &sighting());
        page.settle(0, Status::Failed, envelope(), None);
        admit(&mut page, &Sighting { round: 1, ..sighting() });
        assert!(matches!(page.cancel(), CancelAnswer::Open(entry) if entry.round == 1));
        assert!(matches!(page.cancel(), CancelAnswer::Open(_)));
        assert!(!page.begin(1, 1, "b1", false), "a cancelled task must not begin");
        page.settle(1, Status::Cancelled, envelope(), None);
        assert_eq!(page.cancel(), CancelAnswer::Settled(Some(envelope().into())));
    }

    #[test]
    fn admitting_a_round_closes_lower_ones() {
        let mut page = Page::default();
        admit(&mut page, &sighting());
        let (_, closed) = page.admit(&Sighting { round: 1, ..sighting() }, &[]);
        assert_eq!(closed.iter().map(|entry| entry.round).collect::<Vec<_>>(), [0]);
        let late = admit(&mut page, &sighting());
        assert!(matches!(late, Admission::Superseded(..)), "{late:?}");
    }

    #[test]
    fn an_early_copy_says_how_long_it_has_to_wait() {
        let early = Sighting { not_before: Some(at(30)), ..sighting() };
        let admission = admit(&mut Page::default(), &early);
        assert!(matches!(admission, Admission::Early(_, wait) if wait == Duration::from_secs(30)));
    }

    #[test]
    fn an_expired_task_is_not_started() {
        let late = Sighting { not_after: Some(at(-1)), ..sighting() };
        assert!(matches!(admit(&mut Page::default(), &late), Admission::Expired(_)));
    }

    #[test]
    fn a_pull_waits_behind_a_clone_in_retry_and_not_for_ever() {
        let clone = WaitingClone { place: Place { generation: None, arrived: 50 }, until: at(10) };
        let pull = |now| Sighting { kind: Kind::Pull, now, ..sighting() };
        let (admission, _) = Page::default().admit(&pull(at(0)), &[clone]);
        assert!(matches!(admission, Admission::Behind(_)));
        let (admission, _) = Page::default().admit(&pull(at(10 + 3601)), &[clone]);
        assert!(matches!(admission, Admission::Fresh(_)), "a lost copy must not hold the project for ever");
        let earlier = Sighting { arrived: Some(10), ..pull(at(0)) };
        assert!(matches!(Page::default().admit(&earlier, &[clone]).0, Admission::Fresh(_)));
        let delete = Sighting { kind: Kind::Delete, ..sighting() };
        assert!(matches!(Page::default().admit(&delete, &[clone]).0, Admission::Fresh(_)));
    }

    #[test]
    fn a_clone_that_was_applied_is_not_waited_for_whatever_the_journal_still_says_of_it() {
        let clone = WaitingClone { place: Place { generation: Some(5), arrived: 50 }, until: at(10) };
        let pull = |mark| Sighting { kind: Kind::Pull, generation: Some(6), mark, ..sighting() };
        let before = Some(Place { generation: Some(4), arrived: 40 });
        for (mark, waits) in [(None, true), (before, true), (Some(clone.place), false)] {
            let (admission, _) = Page::default().admit(&pull(mark), &[clone]);
            assert_eq!(matches!(admission, Admission::Behind(_)), waits, "{mark:?}: {admission:?}");
        }
    }
}
