//! Messages that break whoever handles them: none of them goes round for ever.
//!
//! A panic is charged to its task like a crash of the agent, and the third ends it as `crashed`. A message that takes the
//! whole agent with it before the journal knows its task is found by caution: with one delivery at a time, the journal
//! knows beforehand which message is in hand.

use std::{panic::AssertUnwindSafe, sync::Arc, time::Duration};

use futures_util::FutureExt as _;
use jiff::Timestamp;

use super::{
    Interrupted, Through, Worker,
    arrival::{self, Arrival},
    step::Step,
};
use crate::{
    failure::{ErrorClass, Failure},
    journal::{CRASH_BUDGET, Entry, Key, Ticket},
    protocol::{
        Outcome, Place,
        wire::{Message, Undecodable, header, without_secrets},
    },
};

/// How long a task whose handling panicked stays here before it is given back: a fault that repeats must not spin.
const AFTER_A_PANIC: Duration = Duration::from_secs(5);
/// The note of the message in hand, while one delivery is taken at a time.
pub(super) const IN_HAND: &str = "in_hand";

/// What is known of a message before anything looks into it.
pub(super) enum Trial {
    /// It may be handled.
    Passed,
    /// It was in hand at three crashes, and could be read: its task is given up.
    GivenUp,
    /// It was in hand at three crashes, and nobody got as far as to read it.
    Unreadable,
}

impl Worker {
    /// Reads a delivered message; one that breaks the decoder is refused like one that cannot be read.
    pub(super) fn read(&self, message: &Message) -> Result<Arrival, Undecodable> {
        let read = AssertUnwindSafe(|| {
            self.observer.reached(Step::Received, None);
            let arrival = Arrival::decode(message, self.clock.now(), &self.lines)?;
            self.observer.reached(Step::Decoded, Some(&arrival.key.task_id));
            Ok(arrival)
        });
        std::panic::catch_unwind(read).unwrap_or_else(|_panic| {
            tracing::error!(message.id = message.message_id, "panicked while reading a message");
            let failure = Failure::new(ErrorClass::Crashed, "reading it broke the agent; this is a fault of the agent");
            Err(Undecodable { failure, identity: None })
        })
    }

    /// While one delivery is taken at a time: notes which message is in hand, and tells whether it was at too many
    /// crashes.
    pub(super) async fn try_alone(&self, message: &Message) -> Trial {
        if !self.caution.is_on() {
            return Trial::Passed;
        }
        let digest = arrival::digest(message);
        let (times, was_read) = match self.journal.note(IN_HAND).await {
            Ok(note) => note.and_then(|note| in_hand(&note, &digest)).unwrap_or_default(),
            // Handling it will meet the same trouble, and give it back.
            Err(_) => return Trial::Passed,
        };
        if times >= CRASH_BUDGET {
            return if was_read { Trial::GivenUp } else { Trial::Unreadable };
        }
        self.note_in_hand(&format!("{digest} {} received", times + 1)).await;
        Trial::Passed
    }

    /// While one delivery is taken at a time: the message in hand can be read.
    pub(super) async fn was_read(&self, arrival: &Arrival) {
        if !self.caution.is_on() {
            return;
        }
        if let Ok(Some(note)) = self.journal.note(IN_HAND).await
            && let Some((times, _)) = in_hand(&note, &arrival.digest)
        {
            self.note_in_hand(&format!("{} {times} read", arrival.digest)).await;
        }
    }

    async fn note_in_hand(&self, note: &str) {
        if let Err(error) = self.journal.set_note(IN_HAND, Some(note)).await {
            tracing::warn!(error = %error, "the message in hand could not be noted");
        }
    }

    /// A delivery was settled: what was noted of it goes, and caution may be over.
    pub(super) async fn settled_one(&self, key: Option<&Key>) {
        if !self.caution.is_on() {
            return;
        }
        if let Err(error) = self.journal.set_note(IN_HAND, None).await {
            tracing::warn!(error = %error, "the message in hand is still noted");
        }
        if self.caution.settled(key) {
            self.changed.notify_one();
        }
    }

    /// A panic on the way is a fault of ours. The task must neither be lost nor go round for ever.
    pub(super) async fn after_panic(self: &Arc<Self>, arrival: &Arrival) {
        tracing::error!(task.id = %arrival.key.task_id, "panicked while handling the task");
        tokio::select! {
            () = tokio::time::sleep(AFTER_A_PANIC) => {}
            () = self.soft.cancelled() => {}
        }
        match AssertUnwindSafe(self.charge_panic(arrival)).catch_unwind().await {
            Ok(Ok(times)) if times < CRASH_BUDGET => self.give_back(arrival, Interrupted::Stopping).await,
            Ok(Err(interrupted)) => self.give_back(arrival, interrupted).await,
            Ok(Ok(_)) | Err(_) => self.give_up(arrival).await,
        }
    }

    async fn charge_panic(&self, arrival: &Arrival) -> Result<u32, Interrupted> {
        let (round, now) = (arrival.key.round, self.clock.now());
        let lost = arrival.entry(arrival.place(now), now);
        let step = self.journal.step(&arrival.key.task_id, now, move |step| {
            let entry = step.page.known(round, || lost);
            entry.crashes += 1;
            entry.crashed_alone = true;
            entry.crashes
        });
        Ok(step.await?)
    }

    /// Ends a task as `crashed`, whatever it takes.
    pub(super) async fn give_up(self: &Arc<Self>, arrival: &Arrival) {
        let ended = AssertUnwindSafe(async {
            let ticket = Ticket { place: arrival.place(self.clock.now()), attempt: arrival.headers.attempt };
            let owed = self.settle(arrival, ticket, crashed()).await?;
            self.pay(&arrival.key, owed).await
        });
        match ended.catch_unwind().await {
            Ok(Ok(())) => self.acknowledge(arrival, Through::Ended).await,
            Ok(Err(interrupted)) => self.give_back(arrival, interrupted).await,
            // Not even its end can be told in the usual way.
            Err(_panic) => match self.bury(&arrival.message).await {
                Ok(()) => self.acknowledge(arrival, Through::Ended).await,
                Err(interrupted) => self.give_back(arrival, interrupted).await,
            },
        }
    }

    /// Does `work` on a message that is no task in hand; what breaks over it is dead-lettered.
    pub(super) async fn sure(
        &self,
        message: &Message,
        work: impl Future<Output = Result<(), Interrupted>>,
    ) -> Result<(), Interrupted> {
        match AssertUnwindSafe(work).catch_unwind().await {
            Ok(Err(Interrupted::Broken)) | Err(_) => self.bury(message).await,
            Ok(done) => done,
        }
    }

    /// Dead-letters a message without looking into it.
    pub(super) async fn bury(&self, message: &Message) -> Result<(), Interrupted> {
        tracing::error!(message.id = message.message_id, "dead-lettered without a look: it breaks the agent");
        let mut letter = Message { body: message.body.clone(), ..Message::default() };
        letter.message_id = message.message_id.clone().filter(|id| id.len() <= 255);
        letter.set(header::NODE, self.settings.node.as_str());
        letter.set(header::ERROR_CLASS, ErrorClass::Crashed.as_str());
        letter.set(header::ERROR, "the agent broke down each time it had this message in hand; this is its fault");
        letter.set(header::DEAD_AT, self.clock.now().as_millisecond());
        // Hiding secrets means reading: not where that is what takes the agent down.
        if !self.caution.is_on()
            && let Ok(hidden) = std::panic::catch_unwind(AssertUnwindSafe(|| without_secrets(&letter.body)))
        {
            letter.body = hidden;
        }
        self.deliver(self.dead_envelope(letter).into(), false).await
    }
}

/// The end of a task that broke the agent too often.
pub(super) fn crashed() -> Outcome {
    let message = "the agent crashed three times while this task was running; replay it once that is mended";
    Outcome::Failed(Failure::new(ErrorClass::Crashed, message))
}

/// How often the message was in hand, and whether it could be read, if the note is about it.
fn in_hand(note: &str, digest: &str) -> Option<(u32, bool)> {
    let mut words = note.split(' ').skip_while(|word| *word == digest);
    let times = words.next()?.parse().ok().filter(|_| note.starts_with(digest))?;
    Some((times, words.next() == Some("read")))
}

impl Arrival {
    /// Its place, where the journal does not tell.
    fn place(&self, now: Timestamp) -> Place {
        let now = now.as_microsecond();
        Place { generation: self.task.generation, arrived: self.headers.arrived.unwrap_or(now).min(now) }
    }

    /// Its entry, where the journal has lost it.
    pub(super) fn entry(&self, place: Place, now: Timestamp) -> Entry {
        Entry::new(self.key.round, self.digest.clone(), self.task.kind(), self.task.project, place, now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_note_is_about_one_message() {
        assert_eq!(in_hand("abc 2 received", "abc"), Some((2, false)));
        assert_eq!(in_hand("abc 3 read", "abc"), Some((3, true)));
        for note in ["abc 2 read", "", "x", "abd 1"] {
            assert_eq!(in_hand(note, "abd x"), None, "{note}");
        }
        assert_eq!(in_hand("abc 2 read", "abd"), None);
    }
}
