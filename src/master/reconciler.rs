//! Asks the broker and the agents, and says of every task that is stuck why it is.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use jiff::Timestamp;

use super::{
    answers::Untold,
    client::Client,
    diagnosis::{AgentSeen, DeadSeen, NodeSeen, Patience, Seen, Stuck, Why, diagnose, is_overdue},
    task::TaskRow,
};
use crate::{
    broker::{BrokerError, topology::RETRY_DELAYS},
    protocol::{
        Control, NodeName, TaskId,
        wire::{CopyHeaders, HeaderValue, Message, header},
    },
};

/// How a reconciler looks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReconcilerSettings {
    /// How long silence is nothing unusual.
    pub patience: Patience,
    /// How long an agent may take to say how it is.
    pub answer_within: Duration,
    /// Nodes that are asked at a time.
    pub at_once: usize,
    /// Look for tasks of which there is no other trace among the dead letters.
    ///
    /// Off by default: reading that queue counts towards a delivery limit, which brokers from 4.0 on have unless the policy
    /// of `haul topology apply` lifts it, and publishing the task again tells as much.
    pub reads_dead_letters: bool,
}

impl Default for ReconcilerSettings {
    fn default() -> Self {
        Self {
            patience: Patience::default(),
            answer_within: Duration::from_secs(5),
            at_once: 16,
            reads_dead_letters: false,
        }
    }
}

/// Finds tasks that have not ended and says why.
pub struct Reconciler {
    client: Client,
    settings: ReconcilerSettings,
}

impl Reconciler {
    /// A reconciler that asks through `client`.
    #[must_use]
    pub fn new(client: Client, settings: ReconcilerSettings) -> Self {
        Self { client, settings }
    }

    /// Says of each of `rows` that has not ended, and of which there was no news for a while, why and what to do.
    ///
    /// It changes nothing, and asks nobody where no task is overdue.
    ///
    /// # Errors
    /// When the broker cannot be asked.
    pub async fn reconcile<'a>(
        &self,
        rows: impl IntoIterator<Item = &'a TaskRow>,
        now: Timestamp,
    ) -> Result<Vec<Stuck>, BrokerError> {
        let patience = &self.settings.patience;
        let overdue: Vec<&TaskRow> = rows.into_iter().filter(|row| is_overdue(row, patience, now)).collect();
        if overdue.is_empty() {
            return Ok(Vec::new());
        }
        let mut seen = self.look(overdue.iter().map(|row| row.node().clone()).collect()).await?;
        let mut stuck = diagnose(overdue.iter().copied(), &seen, patience, now);
        let traceless: BTreeSet<TaskId> =
            stuck.iter().filter(|stuck| is_traceless(&stuck.why)).map(|stuck| stuck.task_id.clone()).collect();
        if self.settings.reads_dead_letters && !traceless.is_empty() {
            seen.dead = self.dead_letters(&traceless).await?;
            stuck = diagnose(overdue, &seen, patience, now);
        }
        Ok(stuck)
    }

    /// What the broker and the agents of these nodes say now; the dead letters are not read.
    ///
    /// # Errors
    /// When the broker cannot be asked.
    pub async fn look(&self, nodes: BTreeSet<NodeName>) -> Result<Seen, BrokerError> {
        let asking = nodes.into_iter().map(|node| async move { self.node(&node).await.map(|seen| (node, seen)) });
        let nodes: Vec<(NodeName, NodeSeen)> =
            stream::iter(asking).buffer_unordered(self.settings.at_once.max(1)).try_collect().await?;
        let mut retrying = 0_u32;
        for delay in RETRY_DELAYS {
            retrying = retrying.saturating_add(self.messages(&self.client.names().retry(delay)).await?);
        }
        let results = self.client.results_queue();
        // An empty name stands for none.
        let unread = if results.is_empty() { 0 } else { self.messages(&results).await? };
        Ok(Seen { nodes: nodes.into_iter().collect(), dead: BTreeMap::new(), retrying, unread })
    }

    async fn messages(&self, queue: &str) -> Result<u32, BrokerError> {
        Ok(self.client.broker().depth(queue).await?.map_or(0, |depth| depth.messages))
    }

    async fn node(&self, node: &NodeName) -> Result<NodeSeen, BrokerError> {
        let (broker, names) = (self.client.broker(), self.client.names());
        let queue = broker.depth(&names.node(node)).await?;
        let control = broker.depth(&names.control_node(node)).await?;
        // Where nobody reads the commands nobody answers.
        if control.is_none_or(|control| control.consumers == 0) {
            return Ok(NodeSeen { queue, agent: AgentSeen::Away });
        }
        let agent = match self.client.tell_within(node, Control::Inspect, self.settings.answer_within).await {
            Ok(answer) => AgentSeen::Said(Box::new(answer)),
            Err(Untold::Broker(error)) => return Err(error),
            Err(error) => {
                tracing::debug!(node = %node, error = %error, "an agent did not say how it is");
                AgentSeen::Silent
            }
        };
        Ok(NodeSeen { queue, agent })
    }

    /// Reads the dead letters that are there now and gives all back; those of `wanted` are returned.
    async fn dead_letters(&self, wanted: &BTreeSet<TaskId>) -> Result<BTreeMap<TaskId, DeadSeen>, BrokerError> {
        let queue = self.client.names().dead();
        let mut found = BTreeMap::new();
        // The number is fixed at the beginning: others may go on dying.
        let count = self.messages(&queue).await?;
        if count == 0 {
            return Ok(found);
        }
        let mut browse = self.client.broker().browse(&queue).await?;
        for _ in 0..count {
            let Some(letter) = browse.next().await? else { break };
            let id = letter.message.message_id.clone().and_then(|id| TaskId::new(id).ok());
            if let Some(id) = id.filter(|id| wanted.contains(id)) {
                let dead = dead(&letter.message);
                let newest = found.entry(id).or_insert_with(|| dead.clone());
                if newest.round < dead.round {
                    *newest = dead;
                }
            }
            letter.abandon();
        }
        browse.give_back().await?;
        Ok(found)
    }
}

/// Whether nobody was found to have the task.
fn is_traceless(why: &Why) -> bool {
    matches!(why, Why::Lost | Why::EndMissed | Why::MayBeHeld { .. })
}

fn dead(letter: &Message) -> DeadSeen {
    let text = |name: &str| letter.headers.get(name).and_then(HeaderValue::as_text).unwrap_or("unknown").to_owned();
    DeadSeen {
        round: CopyHeaders::read(&letter.headers).round,
        class: text(header::ERROR_CLASS),
        error: text(header::ERROR),
    }
}
