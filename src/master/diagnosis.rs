//! Why a task has not ended, and what to do about it. Pure: it is handed what was seen, and the moment.

mod words;

use std::{collections::BTreeMap, time::Duration};

use jiff::{SignedDuration, Timestamp};
use serde::Serialize;

use super::task::TaskRow;
use crate::{
    broker::Depth,
    failure::ErrorClass,
    protocol::{ControlAnswer, HostState, NodeName, Round, Status, TaskId},
};

/// How long silence is nothing unusual.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patience {
    /// A task of which there were news within this time is left alone.
    pub quiet: Duration,
    /// The longest that a copy lies in a retry queue before it moves on.
    pub longest_hold: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        // The longest delay of the retry queues is an hour.
        Self { quiet: Duration::from_mins(1), longest_hold: Duration::from_hours(1) }
    }
}

/// What the broker and the agents say, at about one moment.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Seen {
    /// The nodes that tasks were sent to.
    pub nodes: BTreeMap<NodeName, NodeSeen>,
    /// Dead letters of the tasks that were looked for.
    pub dead: BTreeMap<TaskId, DeadSeen>,
    /// Copies that lie in the retry queues, of the whole fleet.
    pub retrying: u32,
    /// Events that wait in the master's own queue.
    pub unread: u32,
}

/// One node.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct NodeSeen {
    /// Its queue of tasks, if there is one.
    pub queue: Option<Depth>,
    /// Its agent.
    pub agent: AgentSeen,
}

/// One agent.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum AgentSeen {
    /// Nobody reads the node's control queue: it was not asked.
    #[default]
    Away,
    /// It was asked and did not answer in time.
    Silent,
    /// It said how it is.
    Said(Box<ControlAnswer>),
}

/// One dead letter.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DeadSeen {
    /// The round that a replay will be.
    pub round: Round,
    /// Class of the failure.
    pub class: String,
    /// Sentence of the failure.
    pub error: String,
}

/// A task that has not ended, and of which there was no news for a while.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Stuck {
    /// The task.
    pub task_id: TaskId,
    /// Its node.
    pub node: NodeName,
    /// Since when nothing was heard.
    pub since: Option<Timestamp>,
    /// Why.
    pub why: Why,
    /// What to do.
    pub mend: Mend,
}

/// Why a task has not ended.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "why", rename_all = "snake_case")]
pub enum Why {
    /// The master wrote it down, and the broker never confirmed it.
    NotConfirmed,
    /// The node was not looked at.
    NotSeen,
    /// The node has no queue: what was in it is gone.
    NoQueue,
    /// Nobody consumes the node's queue.
    NodeDown {
        /// Tasks that wait there.
        waiting: u32,
    },
    /// Somebody consumes the node's queues, but did not answer.
    AgentSilent,
    /// The agent answers, but does not consume the node's queue.
    NotConsuming {
        /// Tasks that wait there.
        waiting: u32,
    },
    /// The agent was told to take no more.
    Paused,
    /// It waits in the node's queue.
    Queued {
        /// Tasks in the queue, it among them.
        waiting: u32,
    },
    /// The agent has it and has no slot for it yet, or works for another task of its project.
    InWindow {
        /// Tasks that wait there.
        waiting: u64,
        /// Tasks that run there.
        running: u64,
    },
    /// An attempt failed; another follows.
    InRetry {
        /// When it is due.
        until: Timestamp,
        /// What failed.
        class: ErrorClass,
        /// What failed, in a sentence.
        message: String,
    },
    /// The upstream's host is down, or asked to be left alone: the task is put off without spending attempts.
    HostPaused {
        /// The host.
        host: String,
        /// `down` or `throttled`.
        state: String,
        /// When the next try is due.
        until: Timestamp,
    },
    /// A copy of it may lie in a retry queue: a task that may not overtake another is put off without an event.
    MayBeHeld {
        /// Copies there, of the whole fleet.
        copies: u32,
    },
    /// It runs.
    Running {
        /// How long it has said nothing.
        silent_secs: u64,
    },
    /// It failed for good, and the master has not heard it.
    DeadLettered(DeadSeen),
    /// Events wait in the master's own queue, its end perhaps among them.
    EventsUnread {
        /// How many.
        waiting: u32,
    },
    /// It was begun, and its agent is done with it: its end was not heard.
    EndMissed,
    /// Nobody has it, and nothing was ever heard of it in this round.
    Lost,
}

/// What to do about it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "mend", rename_all = "snake_case")]
pub enum Mend {
    /// Nothing: it goes on by itself.
    Wait,
    /// Publish the same submission to the same node again. It is not done twice: where it has ended, the agent repeats the
    /// terminal event.
    PublishAgain,
    /// Start the node's agent.
    StartAgent,
    /// Make the node's queue, then publish the same submission again.
    EnrolAndPublishAgain,
    /// Tell the agent to take tasks again.
    Resume,
    /// Look after the agent's process.
    LookAfterAgent,
    /// Read the master's queue of events.
    ReadEvents,
}

/// Says of each row that has not ended, and of which there was no news for a while, why and what to do.
pub fn diagnose<'a>(
    rows: impl IntoIterator<Item = &'a TaskRow>,
    seen: &Seen,
    patience: &Patience,
    now: Timestamp,
) -> Vec<Stuck> {
    rows.into_iter()
        .filter(|row| is_overdue(row, patience, now))
        .map(|row| Look { row, seen, patience, now }.stuck())
        .collect()
}

/// Whether a task has not ended and was silent for longer than is usual.
pub(super) fn is_overdue(row: &TaskRow, patience: &Patience, now: Timestamp) -> bool {
    !row.is_done() && silence(row, now) >= patience.quiet
}

/// How long nothing was heard; for ever where nothing ever was.
fn silence(row: &TaskRow, now: Timestamp) -> Duration {
    // A clock of a node that goes ahead of ours is no silence.
    row.last_news().map_or(Duration::MAX, |last| Duration::try_from(now.duration_since(last)).unwrap_or_default())
}

/// One task that is looked at.
struct Look<'a> {
    row: &'a TaskRow,
    seen: &'a Seen,
    patience: &'a Patience,
    now: Timestamp,
}

impl Look<'_> {
    fn stuck(&self) -> Stuck {
        let (why, mend) = self.find();
        let row = self.row;
        Stuck { task_id: row.task_id().clone(), node: row.node().clone(), since: row.last_news(), why, mend }
    }

    /// The first cause that holds, from the certain to the merely likely.
    fn find(&self) -> (Why, Mend) {
        let Some(node) = self.seen.nodes.get(self.row.node()) else { return (Why::NotSeen, Mend::Wait) };
        let unheard = self.row.status().is_none();
        if unheard && self.row.wanted_at().is_some() && self.row.confirmed_at().is_none() {
            return (Why::NotConfirmed, Mend::PublishAgain);
        }
        if let Some(dead) = self.seen.dead.get(self.row.task_id()).filter(|dead| dead.round > self.row.round()) {
            return self.unless_unread(Why::DeadLettered(dead.clone()));
        }
        let Some(queue) = node.queue else { return (Why::NoQueue, Mend::EnrolAndPublishAgain) };
        if let Some(retry) = self.retry(&node.agent) {
            return (retry, Mend::Wait);
        }
        match &node.agent {
            AgentSeen::Away if queue.consumers == 0 => (Why::NodeDown { waiting: queue.messages }, Mend::StartAgent),
            AgentSeen::Away | AgentSeen::Silent => (Why::AgentSilent, Mend::LookAfterAgent),
            AgentSeen::Said(agent) => self.at_agent(queue, agent),
        }
    }

    /// The next attempt, where it is still to come.
    fn retry(&self, agent: &AgentSeen) -> Option<Why> {
        let error = self.row.latest().filter(|event| event.status == Status::Retrying)?.error.as_ref()?;
        let until = error.retry_at.filter(|&until| until > self.now)?;
        if let AgentSeen::Said(answer) = agent
            && matches!(error.class, ErrorClass::Network | ErrorClass::Throttled | ErrorClass::Timeout)
            && let Some(host) = self.paused_host(answer)
        {
            let state = host.paused.clone().unwrap_or_default();
            return Some(Why::HostPaused { host: host.host.clone(), state, until });
        }
        Some(Why::InRetry { until, class: error.class, message: error.message.clone() })
    }

    /// The task's own host, if the agent leaves it alone; where the task names none, the only one that is left alone.
    fn paused_host<'a>(&self, agent: &'a ControlAnswer) -> Option<&'a HostState> {
        let mut paused = agent.hosts.iter().flatten().filter(|host| host.paused.is_some());
        match self.row.host() {
            Some(own) => paused.find(|host| host.host == own || host.host.starts_with(&format!("{own}:"))),
            None => paused.next().filter(|_| paused.next().is_none()),
        }
    }

    /// What the agent says for itself, and what follows where it knows nothing.
    fn at_agent(&self, queue: Depth, agent: &ControlAnswer) -> (Why, Mend) {
        let (waiting, running) = (agent.waiting.unwrap_or(0), agent.running.unwrap_or(0));
        let works_on_it = agent.busy_projects.iter().flatten().any(|&project| project == self.row.project_id());
        let begun = matches!(self.row.status(), Some(Status::Started | Status::Progress));
        if works_on_it && begun {
            return (Why::Running { silent_secs: silence(self.row, self.now).as_secs() }, Mend::Wait);
        }
        if agent.paused == Some(true) {
            return (Why::Paused, Mend::Resume);
        }
        if queue.consumers == 0 {
            return (Why::NotConsuming { waiting: queue.messages }, Mend::LookAfterAgent);
        }
        if queue.messages > 0 {
            return (Why::Queued { waiting: queue.messages }, Mend::Wait);
        }
        if waiting > 0 || works_on_it {
            return (Why::InWindow { waiting, running }, Mend::Wait);
        }
        let hold = self.patience.longest_hold.saturating_add(self.patience.quiet);
        if self.seen.retrying > 0 && !begun && self.silence_since_due() < hold {
            return (Why::MayBeHeld { copies: self.seen.retrying }, Mend::Wait);
        }
        self.unless_unread(if self.row.latest().is_some() { Why::EndMissed } else { Why::Lost })
    }

    /// How long the next step has been due.
    fn silence_since_due(&self) -> Duration {
        let due = self.row.latest().and_then(|event| event.error.as_ref()?.retry_at);
        let overdue = due.map(|due| self.now.duration_since(due).max(SignedDuration::ZERO));
        overdue.and_then(|overdue| Duration::try_from(overdue).ok()).unwrap_or_else(|| silence(self.row, self.now))
    }

    /// What its own queue holds back a master should read before it does anything.
    fn unless_unread(&self, why: Why) -> (Why, Mend) {
        match self.seen.unread {
            0 => (why, Mend::PublishAgain),
            waiting => (Why::EventsUnread { waiting }, Mend::ReadEvents),
        }
    }
}
