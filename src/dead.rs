//! Dead letters: what failed for good, read, sent again or dropped by an operator.
//!
//! Reading takes every letter once and gives all back in one step, so the order of the queue stays. The number of
//! letters is fixed at the beginning: a replayed task that fails again at once is not replayed for ever.

mod letter;
mod reading;
mod select;

use std::sync::Arc;

use jiff::Timestamp;
use serde::Serialize;
use serde_json::Value;
use tokio::time::{Interval, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use reading::Reading;

pub use letter::{Letter, UNKNOWN};
pub use select::{Filter, Rate};

use crate::{
    broker::{Broker, BrokerError, Delivery, Names, Outgoing, PublishError},
    protocol::wire::{Message, header},
};

/// Why the dead letters could not be worked on.
#[derive(Debug, thiserror::Error)]
pub enum DeadError {
    /// There is no queue of dead letters.
    #[error("there is no queue {0} on this broker: run `haul topology apply`")]
    NoQueue(String),
    /// The broker could not be used.
    #[error(transparent)]
    Broker(#[from] BrokerError),
}

/// What to do with which letters.
#[derive(Clone, Debug, Default)]
pub struct Selection {
    /// Which letters are meant.
    pub filter: Filter,
    /// At most so many of them.
    pub limit: Option<usize>,
    /// How often the queue delivers one letter before it drops it; nothing where there is no such limit.
    pub delivery_limit: Option<i64>,
}

/// How letters are replayed.
#[derive(Clone, Debug, Default)]
pub struct Replay {
    /// Say what would be done, and do nothing.
    pub dry_run: bool,
    /// How fast.
    pub rate: Option<Rate>,
    /// The new `not_after` of letters whose old one has passed.
    pub not_after: Option<Timestamp>,
}

/// What became of one letter.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "outcome", rename_all = "snake_case")]
pub enum Fate {
    /// Sent to its node, and gone from here.
    Replayed,
    /// Would be sent (`--dry-run`).
    WouldReplay,
    /// Gone.
    Dropped,
    /// Would be dropped (`--dry-run`).
    WouldDrop,
    /// Still here.
    Left {
        /// Why, and what to do.
        reason: String,
    },
    /// Sent, but still here too, since the channel closed before it could be removed; replaying it again is
    /// harmless: the agent knows task and round.
    SentAndLeft,
}

/// What a command did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Summary {
    /// Letters that were meant.
    pub matched: usize,
    /// Letters that were, or would be, replayed or dropped.
    pub done: usize,
    /// Letters that are still here against the wish.
    pub left: usize,
    /// Whether it ended before its time.
    pub interrupted: bool,
}

/// A letter with the message it was read from.
#[derive(Clone, Debug)]
pub struct Found {
    /// As people see it.
    pub letter: Letter,
    /// As it is.
    pub message: Message,
}

/// The fleet's dead letters.
pub struct DeadLetters {
    broker: Arc<dyn Broker>,
    names: Names,
}

impl DeadLetters {
    /// The dead letters of a broker.
    #[must_use]
    pub fn new(broker: Arc<dyn Broker>, names: Names) -> Self {
        Self { broker, names }
    }

    /// Reads the letters that are meant and gives all back, also when `stop` ends it early.
    ///
    /// # Errors
    /// When there is no queue, or the broker fails; it then gives the letters back itself.
    pub async fn list(&self, selection: &Selection, stop: &CancellationToken) -> Result<Vec<Found>, DeadError> {
        let mut reading = self.open(selection).await?;
        let mut found = Vec::new();
        while let Some((letter, delivery)) = reading.next(stop).await? {
            found.push(Found { letter, message: delivery.message.clone() });
            reading.leave(delivery).await;
        }
        reading.give_back(stop.is_cancelled()).await?;
        Ok(found)
    }

    /// Sends the letters that are meant to their nodes again, and removes each once its copy is confirmed.
    ///
    /// A letter that cannot be sent is reported and stays; the rest go on. `report` hears of each at once.
    ///
    /// # Errors
    /// When there is no queue, or the broker fails; what was not confirmed is then still in the queue.
    pub async fn replay(
        &self,
        selection: &Selection,
        replay: &Replay,
        now: fn() -> Timestamp,
        stop: &CancellationToken,
        report: &mut (dyn FnMut(&Letter, &Fate) + Send),
    ) -> Result<Summary, DeadError> {
        let mut reading = self.open(selection).await?;
        let mut pace = replay.rate.filter(|_| !replay.dry_run).map(pace);
        let mut summary = Summary::default();
        while let Some((letter, delivery)) = reading.next(stop).await? {
            summary.matched += 1;
            let (fate, go_on) = match self.outgoing(&letter, &delivery.message, replay, now()) {
                Err(reason) => {
                    reading.leave(delivery).await;
                    (Fate::Left { reason }, true)
                }
                Ok(_) if replay.dry_run => {
                    reading.leave(delivery).await;
                    (Fate::WouldReplay, true)
                }
                Ok(outgoing) => {
                    if !wait_for_turn(pace.as_mut(), stop).await {
                        summary.matched -= 1;
                        reading.leave(delivery).await;
                        break;
                    }
                    self.send(&mut reading, outgoing, delivery).await
                }
            };
            match fate {
                Fate::Left { .. } | Fate::SentAndLeft => summary.left += 1,
                _ => summary.done += 1,
            }
            report(&letter, &fate);
            if !go_on {
                // The channel may be gone with the rest of the connection; the broker then gives them back itself.
                if let Err(error) = reading.give_back(true).await {
                    tracing::warn!(error = %error, "could not give dead letters back");
                }
                summary.interrupted = true;
                return Ok(summary);
            }
            if reading.is_long() {
                reading = reading.renewed().await?;
            }
        }
        summary.interrupted = stop.is_cancelled();
        reading.give_back(stop.is_cancelled()).await?;
        Ok(summary)
    }

    /// Removes the letters that are meant, for ever.
    ///
    /// # Errors
    /// When there is no queue, or the broker fails; what was not removed is then still in the queue.
    pub async fn remove(
        &self,
        selection: &Selection,
        dry_run: bool,
        stop: &CancellationToken,
        report: &mut (dyn FnMut(&Letter, &Fate) + Send),
    ) -> Result<Summary, DeadError> {
        let mut reading = self.open(selection).await?;
        let mut summary = Summary::default();
        while let Some((letter, delivery)) = reading.next(stop).await? {
            summary.matched += 1;
            let fate = if dry_run {
                reading.leave(delivery).await;
                Fate::WouldDrop
            } else if delivery.ack().await.is_ok() {
                Fate::Dropped
            } else {
                Fate::Left { reason: "the channel closed before it could be removed".to_owned() }
            };
            match fate {
                Fate::Left { .. } => summary.left += 1,
                _ => summary.done += 1,
            }
            report(&letter, &fate);
        }
        summary.interrupted = stop.is_cancelled();
        reading.give_back(stop.is_cancelled()).await?;
        Ok(summary)
    }

    async fn open(&self, selection: &Selection) -> Result<Reading, DeadError> {
        Reading::open(&self.broker, &self.names.dead(), selection).await
    }

    /// The message that replays a letter, or why it cannot be.
    fn outgoing(&self, letter: &Letter, dead: &Message, replay: &Replay, now: Timestamp) -> Result<Outgoing, String> {
        let node = letter.node.as_ref().ok_or_else(|| {
            format!("no node is known: it has neither {} nor the broker's notes; publish it anew", header::NODE)
        })?;
        let mut message = dead.copy();
        // The patience of a deferred task begins anew with its replay.
        message.headers.remove(header::DEFERRED);
        message.set(header::NODE, node.as_str());
        if letter.is_expired(now) {
            let last = letter.not_after.unwrap_or(now);
            let fresh = replay.not_after.ok_or_else(|| {
                format!("its not_after {last} has passed: the agent would refuse it; give --not-after a later moment")
            })?;
            if fresh <= now {
                return Err(format!("the new not_after {fresh} has passed too"));
            }
            message.body = with_not_after(&message.body, fresh)?.into();
        }
        Ok(Outgoing { exchange: self.names.task(), routing_key: node.to_string(), message, mandatory: true })
    }

    /// Publishes a replay and then removes its letter; whether the rest may go on.
    async fn send(&self, reading: &mut Reading, outgoing: Outgoing, delivery: Delivery) -> (Fate, bool) {
        let node = outgoing.routing_key.clone();
        let (reason, go_on) = match self.broker.publish(outgoing).await {
            Ok(()) => {
                let removed = delivery.ack().await.is_ok();
                return if removed { (Fate::Replayed, true) } else { (Fate::SentAndLeft, false) };
            }
            Err(PublishError::Unroutable { .. }) => {
                let mend = format!("run `haul topology apply --node {node}` or start its agent");
                (format!("node {node} is not enrolled: {mend}"), true)
            }
            Err(error @ PublishError::Refused { .. }) => (error.to_string(), true),
            Err(error @ (PublishError::Forbidden { .. } | PublishError::Unconfirmed { .. })) => {
                (error.to_string(), false)
            }
        };
        reading.leave(delivery).await;
        (Fate::Left { reason }, go_on)
    }
}

/// Rewrites the one field and leaves the others, known to us or not, as they are.
fn with_not_after(body: &[u8], not_after: Timestamp) -> Result<Vec<u8>, String> {
    let mut body: Value = serde_json::from_slice(body).map_err(|error| format!("its body is not JSON: {error}"))?;
    let fields = body.as_object_mut().ok_or("its body is not a JSON object")?;
    fields.insert("not_after".to_owned(), Value::String(not_after.to_string()));
    serde_json::to_vec(&body).map_err(|error| error.to_string())
}

fn pace(rate: Rate) -> Interval {
    let mut interval = tokio::time::interval(rate.period);
    // Never two at once to make up for a late one, and no drift behind the rate that was asked for.
    interval.set_missed_tick_behavior(MissedTickBehavior::Skip);
    interval
}

/// Whether the turn came before `stop`.
async fn wait_for_turn(pace: Option<&mut Interval>, stop: &CancellationToken) -> bool {
    let Some(pace) = pace else { return true };
    tokio::select! {
        biased;
        () = stop.cancelled() => false,
        _ = pace.tick() => true,
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::Instant;

    use super::*;
    use crate::{
        broker::memory::Memory,
        protocol::{NodeName, wire::HeaderValue},
    };

    /// A broker with the nodes `a` and `b` enrolled.
    async fn fleet() -> (Memory, DeadLetters) {
        let (broker, names) = (Memory::new(), Names::default());
        let topology = ["a", "b"].iter().fold(names.shared_topology(&names.master_event()), |topology, node| {
            topology.and(names.node_topology(&NodeName::new(*node).unwrap()))
        });
        broker.declare(&topology).await.unwrap();
        let letters = DeadLetters::new(Arc::new(broker.clone()), names);
        (broker, letters)
    }

    /// Dead-letters a task the way an agent does.
    async fn bury(broker: &Memory, task: &str, node: &str, class: &str, body: Value) {
        let mut message = Message {
            body: serde_json::to_vec(&body).unwrap().into(),
            message_id: Some(task.to_owned()),
            ..Message::default()
        };
        message.set(header::NODE, node);
        message.set(header::ERROR_CLASS, class);
        message.set(header::ERROR, "it went wrong");
        message.set(header::KIND, "pull");
        message.set(header::PROJECT, 42);
        message.set(header::ROUND, 1);
        message.set(header::ATTEMPTS, 5);
        message.set(header::DEFERRED, 1_000);
        let exchange = Names::default().dlx();
        let routing_key = node.to_owned();
        broker.publish(Outgoing { exchange, routing_key, message, mandatory: true }).await.unwrap();
    }

    async fn bury_all(broker: &Memory, tasks: &[(&str, &str, &str)]) {
        for (task, node, class) in tasks {
            bury(broker, task, node, class, serde_json::json!({"project_id": 42})).await;
        }
    }

    fn ids(broker: &Memory, queue: &str) -> Vec<String> {
        broker.messages(queue).into_iter().filter_map(|message| message.message_id).collect()
    }

    fn by_class(class: &str) -> Selection {
        Selection { filter: Filter { classes: vec![class.to_owned()], ..Filter::default() }, ..Selection::default() }
    }

    fn noon() -> Timestamp {
        "2026-11-20T12:00:00Z".parse().unwrap()
    }

    async fn replay(letters: &DeadLetters, selection: &Selection, replay: &Replay) -> (Summary, Vec<Fate>) {
        let mut fates = Vec::new();
        let stop = CancellationToken::new();
        let mut report = |_: &Letter, fate: &Fate| fates.push(fate.clone());
        let summary = letters.replay(selection, replay, noon, &stop, &mut report).await.unwrap();
        (summary, fates)
    }

    #[tokio::test]
    async fn listing_a_hundred_times_keeps_every_letter_and_the_order() {
        let (broker, letters) = fleet().await;
        let tasks: Vec<_> = (0..10).map(|number| format!("t-{number}")).collect();
        for task in &tasks {
            bury(&broker, task, "a", "network", Value::Null).await;
        }
        for _ in 0..100 {
            let found = letters.list(&Selection::default(), &CancellationToken::new()).await.unwrap();
            let listed: Vec<_> = found.into_iter().filter_map(|found| found.letter.task_id).collect();
            assert_eq!(listed, tasks);
        }
        assert_eq!(ids(&broker, "haul.dead"), tasks);
    }

    #[tokio::test]
    async fn an_interrupted_list_gives_everything_back() {
        let (broker, letters) = fleet().await;
        bury_all(&broker, &[("t-1", "a", "auth"), ("t-2", "a", "auth")]).await;
        let stop = CancellationToken::new();
        stop.cancel();
        assert!(letters.list(&Selection::default(), &stop).await.unwrap().is_empty());
        assert_eq!(ids(&broker, "haul.dead"), ["t-1", "t-2"]);
    }

    #[tokio::test]
    async fn a_replay_goes_to_its_node_with_the_round_it_was_given_and_without_the_reasons() {
        let (broker, letters) = fleet().await;
        bury_all(&broker, &[("t-1", "a", "network"), ("t-2", "b", "auth")]).await;
        let (summary, fates) = replay(&letters, &Selection::default(), &Replay::default()).await;
        assert_eq!((summary.done, summary.left, fates.len()), (2, 0, 2));
        assert_eq!(ids(&broker, "haul.dead"), [""; 0]);
        assert_eq!(
            (ids(&broker, "haul.node.a"), ids(&broker, "haul.node.b")),
            (vec!["t-1".to_owned()], vec!["t-2".to_owned()])
        );
        let headers = &broker.messages("haul.node.a")[0].headers;
        assert_eq!(headers.get(header::ROUND), Some(&HeaderValue::Int(1)));
        let gone = [header::ERROR, header::ERROR_CLASS, header::ATTEMPTS, header::DEFERRED, header::DEATH];
        assert!(gone.iter().all(|name| !headers.contains_key(*name)), "{headers:?}");
    }

    #[tokio::test]
    async fn only_what_is_meant_is_replayed_and_the_rest_keeps_its_order() {
        let (broker, letters) = fleet().await;
        bury_all(
            &broker,
            &[("t-1", "a", "auth"), ("t-2", "a", "network"), ("t-3", "a", "auth"), ("t-4", "a", "network")],
        )
        .await;
        let selection = Selection { limit: Some(1), ..by_class("network") };
        replay(&letters, &selection, &Replay::default()).await;
        assert_eq!(ids(&broker, "haul.node.a"), ["t-2"]);
        assert_eq!(ids(&broker, "haul.dead"), ["t-1", "t-3", "t-4"]);
    }

    #[tokio::test]
    async fn a_dry_run_changes_nothing() {
        let (broker, letters) = fleet().await;
        bury_all(&broker, &[("t-1", "a", "auth"), ("t-2", "b", "network")]).await;
        let before = broker.published().len();
        let (summary, fates) =
            replay(&letters, &Selection::default(), &Replay { dry_run: true, ..Replay::default() }).await;
        assert_eq!((summary.done, fates), (2, vec![Fate::WouldReplay, Fate::WouldReplay]));
        letters.remove(&Selection::default(), true, &CancellationToken::new(), &mut |_, _| {}).await.unwrap();
        assert_eq!((ids(&broker, "haul.dead"), broker.published().len()), (vec!["t-1".into(), "t-2".into()], before));
    }

    #[tokio::test]
    async fn a_letter_for_a_node_that_is_not_enrolled_stays_and_the_rest_go_on() {
        let (broker, letters) = fleet().await;
        bury_all(&broker, &[("t-1", "vanished", "network"), ("t-2", "b", "network")]).await;
        let (summary, fates) = replay(&letters, &Selection::default(), &Replay::default()).await;
        assert_eq!((summary.done, summary.left, summary.interrupted), (1, 1, false));
        assert!(matches!(&fates[0], Fate::Left { reason } if reason.contains("--node vanished")), "{fates:?}");
        assert_eq!((ids(&broker, "haul.dead"), ids(&broker, "haul.node.b")), (vec!["t-1".into()], vec!["t-2".into()]));
    }

    #[tokio::test]
    async fn a_letter_of_nobody_stays() {
        let (broker, letters) = fleet().await;
        let message = Message { body: "what".into(), ..Message::default() };
        let (exchange, routing_key) = (Names::default().dlx(), "x".to_owned());
        broker.publish(Outgoing { exchange, routing_key, message, mandatory: true }).await.unwrap();
        let (summary, fates) = replay(&letters, &by_class(UNKNOWN), &Replay::default()).await;
        assert_eq!((summary.done, summary.left), (0, 1));
        assert!(matches!(&fates[0], Fate::Left { reason } if reason.contains("no node is known")));
        assert_eq!(broker.messages("haul.dead").len(), 1);
    }

    #[tokio::test]
    async fn an_expired_letter_needs_a_new_moment() {
        let (broker, letters) = fleet().await;
        let body = serde_json::json!({"project_id": 42, "not_after": "2026-11-20T11:00:00Z", "colour": "blue"});
        bury(&broker, "t-1", "a", "expired", body).await;
        let (summary, fates) = replay(&letters, &Selection::default(), &Replay::default()).await;
        assert_eq!((summary.left, broker.messages("haul.dead").len()), (1, 1));
        assert!(matches!(&fates[0], Fate::Left { reason } if reason.contains("--not-after")));
        let past = Replay { not_after: "2026-11-20T11:59:00Z".parse().ok(), ..Replay::default() };
        assert_eq!(replay(&letters, &Selection::default(), &past).await.0.left, 1);
        let later = Replay { not_after: "2026-11-21T00:00:00Z".parse().ok(), ..Replay::default() };
        assert_eq!(replay(&letters, &Selection::default(), &later).await.0.done, 1);
        let body: Value = serde_json::from_slice(&broker.messages("haul.node.a")[0].body).unwrap();
        assert_eq!(body, serde_json::json!({"project_id": 42, "not_after": "2026-11-21T00:00:00Z", "colour": "blue"}));
    }

    #[tokio::test(start_paused = true)]
    async fn a_rate_is_kept_and_an_interrupt_between_two_letters_gives_the_rest_back() {
        let (broker, letters) = fleet().await;
        bury_all(&broker, &[("t-1", "a", "auth"), ("t-2", "a", "auth"), ("t-3", "a", "auth")]).await;
        let begin = Instant::now();
        let slow = Replay { rate: Some("30/m".parse().unwrap()), ..Replay::default() };
        replay(&letters, &Selection { limit: Some(2), ..Selection::default() }, &slow).await;
        assert_eq!(begin.elapsed(), Duration::from_secs(2));
        bury_all(&broker, &[("t-4", "a", "auth")]).await;
        let stop = CancellationToken::new();
        let asked = stop.clone();
        let mut report = |_: &Letter, _: &Fate| asked.cancel();
        let summary = letters.replay(&Selection::default(), &slow, noon, &stop, &mut report).await.unwrap();
        assert_eq!((summary.matched, summary.done, summary.interrupted), (1, 1, true));
        assert_eq!(ids(&broker, "haul.dead"), ["t-4"]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_long_replay_takes_its_letters_anew_before_the_broker_does() {
        let (broker, letters) = fleet().await;
        bury_all(&broker, &[("t-0", "vanished", "auth"), ("t-1", "a", "quota"), ("t-2", "a", "auth")]).await;
        bury_all(&broker, &[("t-3", "b", "quota"), ("t-4", "a", "auth"), ("t-5", "b", "auth")]).await;
        let slow = Replay { rate: Some("10/h".parse().unwrap()), ..Replay::default() };
        let (summary, _) = replay(&letters, &by_class("auth"), &slow).await;
        assert_eq!((summary.matched, summary.done, summary.left), (4, 3, 1));
        assert_eq!(ids(&broker, "haul.dead"), ["t-0", "t-1", "t-3"]);
        assert_eq!((ids(&broker, "haul.node.a").len(), ids(&broker, "haul.node.b").len()), (2, 1));
    }

    #[tokio::test]
    async fn a_replay_that_was_not_confirmed_stays_and_ends_the_rest() {
        let (broker, letters) = fleet().await;
        bury_all(&broker, &[("t-1", "a", "auth"), ("t-2", "a", "auth")]).await;
        broker.lose_confirm_once();
        let (summary, _) = replay(&letters, &Selection::default(), &Replay::default()).await;
        assert_eq!((summary.done, summary.left, summary.interrupted), (0, 1, true));
        assert_eq!(ids(&broker, "haul.dead"), ["t-1", "t-2"]);
    }

    #[tokio::test]
    async fn a_letter_near_its_delivery_limit_is_put_anew() {
        let (broker, letters) = fleet().await;
        bury_all(&broker, &[("t-1", "a", "auth")]).await;
        let mut worn = broker.messages("haul.dead").remove(0);
        worn.set("x-delivery-count", 18);
        worn.message_id = Some("t-worn".to_owned());
        let (exchange, routing_key) = (String::new(), "haul.dead".to_owned());
        broker.publish(Outgoing { exchange, routing_key, message: worn, mandatory: true }).await.unwrap();
        let selection = Selection { delivery_limit: Some(20), ..Selection::default() };
        let found = letters.list(&selection, &CancellationToken::new()).await.unwrap();
        assert_eq!(found.len(), 2);
        let anew = broker.messages("haul.dead");
        assert_eq!(
            anew.iter().map(|message| message.message_id.as_deref().unwrap()).collect::<Vec<_>>(),
            ["t-1", "t-worn"]
        );
        assert!(!anew[1].headers.contains_key("x-delivery-count"));
        assert_eq!(anew[1].headers.get(header::ERROR_CLASS), Some(&"auth".into()));
    }

    #[tokio::test]
    async fn what_is_dropped_is_gone_and_nothing_else() {
        let (broker, letters) = fleet().await;
        bury_all(&broker, &[("t-1", "a", "auth"), ("t-2", "a", "quota"), ("t-3", "a", "auth")]).await;
        let stop = CancellationToken::new();
        let summary = letters.remove(&by_class("auth"), false, &stop, &mut |_, _| {}).await.unwrap();
        assert_eq!((summary.done, ids(&broker, "haul.dead")), (2, vec!["t-2".to_owned()]));
    }

    #[tokio::test]
    async fn a_broker_without_the_queue_says_what_to_run() {
        let letters = DeadLetters::new(Arc::new(Memory::new()), Names::default());
        let error = letters.list(&Selection::default(), &CancellationToken::new()).await.unwrap_err();
        assert!(error.to_string().contains("haul topology apply"));
    }
}
