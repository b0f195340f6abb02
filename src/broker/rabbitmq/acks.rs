//! Settling what was delivered on one channel: one frame for a run of acknowledgements instead of one for each.
//!
//! The broker handles a frame that acknowledges everything up to a tag at the cost of one that acknowledges a single
//! message. It may be sent only where nothing below that tag is still in hand, so one task does all settling of a channel,
//! in turn, and knows what is in hand.

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex, PoisonError},
};

use futures_util::future::join_all;
use lapin::{
    Channel,
    options::{BasicAckOptions, BasicNackOptions, BasicRejectOptions},
};
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use super::session::STEP_TIMEOUT;
use crate::broker::{Counts, Settlement, StaleDelivery};

/// Settlements that are looked at together.
const BATCH: usize = 512;

/// Keeps a channel open while deliveries of it are in hand, settles them, and knows when they can no longer be settled.
pub(super) struct Hold {
    shared: Arc<Shared>,
    pub(super) counts: Arc<Counts>,
    settlings: mpsc::UnboundedSender<Settling>,
}

struct Shared {
    ended: CancellationToken,
    /// Tags in hand; the prefetch window bounds them.
    in_hand: Mutex<BTreeSet<u64>>,
}

struct Settling {
    tag: u64,
    settlement: Settlement,
    settled: oneshot::Sender<bool>,
}

/// How a batch of acknowledgements is sent.
#[derive(Debug, Default, PartialEq, Eq)]
struct Plan {
    /// Everything up to this tag.
    up_to: Option<u64>,
    /// One by one.
    single: Vec<u64>,
}

impl Hold {
    /// Begins to settle what is delivered on `channel`. Needs a tokio context.
    pub(super) fn new(channel: Channel) -> Arc<Self> {
        let shared = Arc::new(Shared { ended: CancellationToken::new(), in_hand: Mutex::default() });
        let (settlings, queue) = mpsc::unbounded_channel();
        tokio::spawn(settle(channel, Arc::clone(&shared), queue));
        Arc::new(Self { shared, counts: Arc::default(), settlings })
    }

    /// Notes that a tag was delivered; before anybody can settle it, in the order of delivery.
    pub(super) fn delivered(&self, tag: u64) {
        self.counts.arrived();
        self.shared.in_hand().insert(tag);
    }

    /// From now on nothing is sent for its deliveries.
    pub(super) fn end(&self) {
        self.shared.ended.cancel();
    }

    /// Whether nothing is sent any more.
    pub(super) fn has_ended(&self) -> bool {
        self.shared.ended.is_cancelled()
    }

    /// Settles one delivery; returns once that has been written to the broker.
    pub(super) async fn settle(&self, tag: u64, settlement: Settlement) -> Result<(), StaleDelivery> {
        let (settled, done) = oneshot::channel();
        self.settlings.send(Settling { tag, settlement, settled }).map_err(|_| StaleDelivery)?;
        match done.await {
            Ok(true) => {
                self.counts.settled();
                Ok(())
            }
            Ok(false) | Err(_) => Err(StaleDelivery),
        }
    }
}

/// Waits until frames are written; false where they cannot be. What is asked of a connection in the moment in which it ends
/// may never be answered.
async fn written(shared: &Shared, sending: impl Future<Output = bool>) -> bool {
    tokio::select! {
        biased;
        sent = sending => sent,
        () = shared.ended.cancelled() => false,
        () = tokio::time::sleep(STEP_TIMEOUT) => false,
    }
}

impl Shared {
    fn in_hand(&self) -> std::sync::MutexGuard<'_, BTreeSet<u64>> {
        self.in_hand.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Works until its hold is gone and everything is settled; then its share of the channel goes too.
async fn settle(channel: Channel, shared: Arc<Shared>, mut queue: mpsc::UnboundedReceiver<Settling>) {
    let mut batch = Vec::new();
    while queue.recv_many(&mut batch, BATCH).await > 0 {
        // Those that wait for the same commit are woken together: let them add theirs.
        tokio::task::yield_now().await;
        while batch.len() < BATCH
            && let Ok(settling) = queue.try_recv()
        {
            batch.push(settling);
        }
        let (acks, others): (Vec<_>, Vec<_>) =
            batch.drain(..).partition(|settling| settling.settlement == Settlement::Ack);
        acknowledge(&channel, &shared, acks).await;
        for Settling { tag, settlement, settled } in others {
            shared.in_hand().remove(&tag);
            let giving = async { give(&channel, tag, settlement).await.is_ok() };
            let sent = !shared.ended.is_cancelled() && written(&shared, giving).await;
            // Whoever wanted to know may be gone.
            let _ = settled.send(sent);
        }
    }
}

async fn acknowledge(channel: &Channel, shared: &Shared, acks: Vec<Settling>) {
    if acks.is_empty() {
        return;
    }
    let plan = plan(&mut shared.in_hand(), acks.iter().map(|ack| ack.tag).collect());
    if shared.ended.is_cancelled() {
        for ack in acks {
            let _ = ack.settled.send(false);
        }
        return;
    }
    let ack = |tag, multiple| channel.basic_ack(tag, BasicAckOptions { multiple });
    let frames = plan.up_to.map(|tag| ack(tag, true)).into_iter();
    let frames = frames.chain(plan.single.iter().map(|tag| ack(*tag, false)));
    // They fail together, with their channel: then all of them come again.
    let sent = written(shared, async { join_all(frames).await.iter().all(Result::is_ok) }).await;
    for ack in acks {
        let _ = ack.settled.send(sent);
    }
}

async fn give(channel: &Channel, tag: u64, settlement: Settlement) -> lapin::Result<()> {
    match settlement {
        Settlement::Ack => channel.basic_ack(tag, BasicAckOptions::default()).await,
        Settlement::Requeue => channel.basic_nack(tag, BasicNackOptions { requeue: true, multiple: false }).await,
        Settlement::Reject => channel.basic_reject(tag, BasicRejectOptions { requeue: false }).await,
    }
}

/// Takes `acked` out of what is in hand. What has nothing in hand before it goes in one frame, the rest one by one.
fn plan(in_hand: &mut BTreeSet<u64>, acked: BTreeSet<u64>) -> Plan {
    let run: Vec<u64> = in_hand.iter().copied().take_while(|tag| acked.contains(tag)).collect();
    let up_to = run.last().copied().filter(|_| run.len() > 1);
    let single = acked.iter().copied().filter(|tag| up_to.is_none_or(|up_to| *tag > up_to)).collect();
    for tag in &acked {
        in_hand.remove(tag);
    }
    Plan { up_to, single }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn planned(in_hand: &mut BTreeSet<u64>, acked: &[u64]) -> Plan {
        plan(in_hand, acked.iter().copied().collect())
    }

    #[test]
    fn a_run_without_gaps_is_acknowledged_by_its_last_tag() {
        let mut in_hand = (1..=9).collect::<BTreeSet<u64>>();
        assert_eq!(planned(&mut in_hand, &[3, 1, 2]), Plan { up_to: Some(3), single: vec![] });
        assert_eq!(in_hand, (4..=9).collect::<BTreeSet<u64>>());
    }

    #[test]
    fn what_is_behind_a_delivery_in_hand_is_acknowledged_one_by_one() {
        let mut in_hand = (1..=6).collect::<BTreeSet<u64>>();
        assert_eq!(planned(&mut in_hand, &[2, 3, 5]), Plan { up_to: None, single: vec![2, 3, 5] });
        assert_eq!(planned(&mut in_hand, &[1, 4]), Plan { up_to: Some(4), single: vec![] }, "the gaps are settled");
        assert_eq!(planned(&mut in_hand, &[6]), Plan { up_to: None, single: vec![6] });
    }

    proptest! {
        #[test]
        fn nothing_is_acknowledged_that_was_not_asked_for_and_all_that_was(
            batches in prop::collection::vec(prop::collection::btree_set(1_u64..60, 1..20), 1..30),
        ) {
            // As the broker sees it: a frame for all up to a tag takes everything below it that it still has.
            let (mut in_hand, mut broker) = ((1..60).collect::<BTreeSet<u64>>(), (1..60).collect::<BTreeSet<u64>>());
            for batch in batches {
                let asked: BTreeSet<u64> = batch.intersection(&in_hand).copied().collect();
                let before = broker.clone();
                let plan = plan(&mut in_hand, asked.clone());
                if let Some(up_to) = plan.up_to {
                    prop_assert!(broker.contains(&up_to), "the broker closes the channel for a tag that it does not have");
                    broker.retain(|tag| *tag > up_to);
                }
                for tag in plan.single {
                    prop_assert!(broker.remove(&tag), "the broker closes the channel for a tag that it does not have");
                }
                prop_assert_eq!(before.difference(&broker).copied().collect::<BTreeSet<_>>(), asked);
                prop_assert_eq!(&in_hand, &broker);
            }
        }
    }
}
