//! Doing a fault to the system, and undoing it.

use std::{collections::HashMap, path::Path, sync::Arc, time::Duration};

use haul::{
    dead::{DeadLetters, Fate, Letter, Replay, Selection},
    protocol::NodeName,
};
use jiff::Timestamp;
use tokio_util::sync::CancellationToken;

use super::{
    broker::BrokerNode,
    fleet::Member,
    history::{Fault, FaultKind, History, Record, now},
    master::Master,
    schedule::Planned,
    wire::Pace,
};
use crate::support::{proxy::Proxy, rabbit::Rabbit};

/// Dead letters that are sent again at a time.
const REPLAYED: usize = 25;
/// How long an agent of real work is watched for a child.
const CHILD: Duration = Duration::from_secs(4);
const TRIES: u32 = 5;
const BETWEEN_TRIES: Duration = Duration::from_millis(800);
/// After a publish that had been confirmed when a queue was deleted: what the master heard of it meanwhile.
const IN_FLIGHT: Duration = Duration::from_millis(500);

/// Everything that faults are done to.
pub(crate) struct World {
    pub(crate) broker: BrokerNode,
    pub(crate) members: Vec<Arc<Member>>,
    pub(crate) master: Arc<Master>,
    pub(crate) history: Arc<History>,
}

impl World {
    /// Does a fault, for as long as it lasts, and notes it.
    pub(crate) async fn suffer(&self, planned: Planned) {
        let member = &self.members[planned.node];
        let at = now();
        let mut done = self.inject(planned, member).await;
        // The fault before may have left nothing to do this one to yet, such as a consumer.
        for _ in 1..TRIES {
            if done.is_ok() || planned.kind == FaultKind::ChildKilled {
                break;
            }
            tokio::time::sleep(BETWEEN_TRIES).await;
            done = self.inject(planned, member).await;
        }
        let node = of_one_node(planned.kind).then(|| member.name.clone());
        let (done, told) = match done {
            Ok(what) => (true, what),
            Err(refusal) => (false, refusal),
        };
        self.history.add(&Record::Fault(Fault { at, until: now(), kind: planned.kind, node, done, note: told }));
    }

    async fn inject(&self, planned: Planned, member: &Arc<Member>) -> Result<String, String> {
        use FaultKind as K;
        let lasts = planned.lasts;
        let names = &self.master.names;
        let node = NodeName::new(member.name.clone()).map_err(|error| error.to_string())?;
        match planned.kind {
            K::AgentKilled => member.killed(|_| ()).await,
            K::AgentStopped => member.restarted().await,
            K::AgentFrozen => member.frozen(lasts).await,
            K::JournalLost => {
                member.killed(lose_journal).await;
                self.master.destroyed(&member.name);
            }
            K::ChildKilled => return member.child_killed(CHILD).await.ok_or_else(|| "it had no child".to_owned()),
            K::BrokerRestarted => self.broker.on(Rabbit::restart).await?,
            K::BrokerKilled => {
                self.broker.on(Rabbit::kill).await?;
                tokio::time::sleep(lasts).await;
                self.broker.on(Rabbit::restart).await?;
            }
            K::BrokerAppStopped => {
                self.broker.ctl(&["stop_app"]).await?;
                tokio::time::sleep(lasts).await;
                self.broker.ctl(&["start_app"]).await?;
            }
            K::ConnectionReset => member.proxy.reset(),
            K::HalfOpen => member.proxy.stall(),
            K::Stall => paced(member, Pace::Held, lasts).await,
            K::Trickle => paced(member, Pace::Drops(8 * 1024), lasts).await,
            K::Latency => paced(member, Pace::Late(Duration::from_millis(80)), lasts).await,
            K::ConnectionsClosed => {
                self.broker.ctl(&["close_all_connections", "--global", "closed by the checker"]).await?;
            }
            K::ChannelClosed => at_consumer(member, names.node(&node), Proxy::forge_ack).await?,
            K::ConsumerCancelled => {
                at_consumer(member, names.node(&node), Proxy::drop_consumer).await?;
            }
            K::QueueDeleted => {
                self.broker.delete(format!("queues/%2F/{}", names.node(&node))).await?;
                tokio::time::sleep(IN_FLIGHT).await;
                self.master.destroyed(&member.name);
            }
            K::MemoryAlarm => {
                self.broker.ctl(&["set_vm_memory_high_watermark", "0.00001"]).await?;
                tokio::time::sleep(lasts).await;
                self.broker.ctl(&["set_vm_memory_high_watermark", "0.4"]).await?;
            }
            K::DiskAlarm => {
                self.broker.ctl(&["set_disk_free_limit", "100000000000000"]).await?;
                tokio::time::sleep(lasts).await;
                self.broker.ctl(&["set_disk_free_limit", "50MB"]).await?;
            }
            K::DlxMissing => {
                self.broker.delete(format!("exchanges/%2F/{}", names.dlx())).await?;
                tokio::time::sleep(lasts).await;
                self.master.declare().await?;
            }
            K::DeadQueueFull => {
                self.broker.fill(&names.dead()).await?;
                tokio::time::sleep(lasts).await;
                self.broker.unfill().await?;
            }
            K::DeadReplayed => return self.replay(Some(REPLAYED)).await,
        }
        Ok(String::new())
    }

    /// Sends dead letters to their nodes again, as an operator does.
    pub(crate) async fn replay(&self, limit: Option<usize>) -> Result<String, String> {
        let letters = DeadLetters::new(self.master.broker.clone(), self.master.names.clone());
        let (selection, stop) = (Selection { limit, ..Selection::default() }, CancellationToken::new());
        let refused = |error: haul::dead::DeadError| error.to_string();
        let found = letters.list(&selection, &stop).await.map_err(refused)?;
        let messages: HashMap<_, _> =
            found.into_iter().map(|found| ((found.letter.task_id, found.letter.round), found.message)).collect();
        let mut report = |letter: &Letter, fate: &Fate| {
            if let (Fate::Replayed | Fate::SentAndLeft, Some(task)) = (fate, &letter.task_id) {
                let (task, round, class) = (task.clone(), letter.round, letter.class.clone());
                let message = messages.get(&(Some(task.clone()), round));
                if let (Some(message), Some(node)) = (message, &letter.node) {
                    self.master.replayed(node, round, message);
                }
                self.history.add(&Record::Replayed { at: now(), task, round, class });
            }
        };
        let replay = Replay::default();
        let summary = letters.replay(&selection, &replay, Timestamp::now, &stop, &mut report).await.map_err(refused)?;
        Ok(format!("{} letters sent", summary.done))
    }

    /// Takes back whatever a fault may have left, after one that could not be undone.
    pub(crate) async fn heal(&self) {
        for member in &self.members {
            member.wire.pace(Pace::Free);
            member.start().await;
        }
        let _ = self.broker.ctl(&["start_app"]).await;
        let _ = self.broker.ctl(&["set_vm_memory_high_watermark", "0.4"]).await;
        let _ = self.broker.ctl(&["set_disk_free_limit", "50MB"]).await;
        let _ = self.broker.unfill().await;
        let _ = self.master.declare().await;
    }
}

/// Whether a fault is done to one node of the fleet.
fn of_one_node(kind: FaultKind) -> bool {
    use FaultKind as K;
    matches!(
        kind,
        K::AgentKilled
            | K::AgentStopped
            | K::AgentFrozen
            | K::JournalLost
            | K::ChildKilled
            | K::ConnectionReset
            | K::HalfOpen
            | K::Stall
            | K::Trickle
            | K::Latency
            | K::ChannelClosed
            | K::ConsumerCancelled
            | K::QueueDeleted
    )
}

async fn paced(member: &Member, pace: Pace, lasts: Duration) {
    member.wire.pace(pace);
    tokio::time::sleep(lasts).await;
    member.wire.pace(Pace::Free);
}

/// Does something to the agent's consumer, if it has one.
async fn at_consumer(member: &Arc<Member>, queue: String, harm: fn(&Proxy, &str)) -> Result<(), String> {
    if !member.proxy.consumes(&queue) {
        return Err("it has no consumer".to_owned());
    }
    let member = member.clone();
    // The proxy insists on a link that still stands.
    let done = tokio::spawn(async move { harm(&member.proxy, &queue) }).await;
    done.map_err(|_| "it had no consumer".to_owned())
}

/// The journal is gone with all its files.
fn lose_journal(storage: &Path) {
    let own = haul::lock::StorageLock::directory(storage);
    for entry in std::fs::read_dir(own).into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().starts_with("journal") {
            std::fs::remove_file(entry.path()).expect("the journal can be removed");
        }
    }
}
