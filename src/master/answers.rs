//! The answers of agents, handed to whoever asked: one subscription for all.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    sync::{oneshot, watch},
    task::JoinHandle,
};

use super::{
    live::{Heard, Live},
    news::News,
    publish::Unpublished,
};
use crate::{
    broker::BrokerError,
    protocol::{ControlAnswer, NodeName},
};

/// Why an agent was not told something, or did not answer.
#[derive(Debug, thiserror::Error)]
pub enum Untold {
    /// The command was not published.
    #[error(transparent)]
    Unpublished(#[from] Unpublished),
    /// The answers could not be subscribed to.
    #[error(transparent)]
    Broker(#[from] BrokerError),
    /// The agent would not.
    #[error("{node} refused the command: {reason}")]
    Refused {
        /// The node.
        node: NodeName,
        /// The agent's words.
        reason: String,
    },
    /// The agent is away, or its answer was lost.
    #[error("{node} did not answer within {within:?}; a command may still be obeyed when its agent is there")]
    NoAnswer {
        /// The node.
        node: NodeName,
        /// How long it had.
        within: Duration,
    },
    /// The connection was closed for good.
    #[error("the subscription to the answers has ended; what was told may be obeyed")]
    Ended,
}

type Waiting = HashMap<String, oneshot::Sender<Box<ControlAnswer>>>;

/// A running subscription to the answers of all agents.
pub(super) struct Answers {
    waiting: Arc<Mutex<Waiting>>,
    gaps: watch::Receiver<u64>,
    listening: JoinHandle<()>,
}

/// An answer that somebody waits for.
pub(super) struct Expected<'a> {
    id: String,
    waiting: &'a Mutex<Waiting>,
    receiver: oneshot::Receiver<Box<ControlAnswer>>,
}

impl Answers {
    pub(super) fn start(live: Live) -> Self {
        let waiting = Arc::default();
        let (gaps_out, gaps) = watch::channel(0);
        let listening = tokio::spawn(listen(live, Arc::clone(&waiting), gaps_out));
        Self { waiting, gaps, listening }
    }

    /// Whether there will be no more answers.
    pub(super) fn has_ended(&self) -> bool {
        self.listening.is_finished()
    }

    /// Waits from now on for the answer to `id`.
    pub(super) fn expect(&self, id: String) -> Expected<'_> {
        let (sender, receiver) = oneshot::channel();
        locked(&self.waiting).insert(id.clone(), sender);
        Expected { id, waiting: &self.waiting, receiver }
    }

    /// Counts the times at which answers may have been missed.
    pub(super) fn gaps(&self) -> watch::Receiver<u64> {
        let mut gaps = self.gaps.clone();
        gaps.mark_unchanged();
        gaps
    }
}

impl Drop for Answers {
    fn drop(&mut self) {
        self.listening.abort();
    }
}

impl Expected<'_> {
    /// The answer; nothing if there will be none.
    pub(super) async fn answer(&mut self) -> Option<Box<ControlAnswer>> {
        (&mut self.receiver).await.ok()
    }
}

impl Drop for Expected<'_> {
    fn drop(&mut self) {
        locked(self.waiting).remove(&self.id);
    }
}

fn locked(waiting: &Mutex<Waiting>) -> MutexGuard<'_, Waiting> {
    waiting.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn listen(mut live: Live, waiting: Arc<Mutex<Waiting>>, gaps: watch::Sender<u64>) {
    while let Some(heard) = live.next().await {
        match heard {
            Heard::News(News::Answer(answer)) => {
                let asker = answer.control_id.as_ref().and_then(|id| locked(&waiting).remove(id));
                if let Some(asker) = asker {
                    // Whoever asked may have gone.
                    let _ = asker.send(answer);
                }
            }
            Heard::News(_) => {}
            Heard::Gap => gaps.send_modify(|count| *count += 1),
        }
    }
    // Nobody waits in vain.
    locked(&waiting).clear();
}
