//! Diagnoses in sentences.

use std::fmt;

use super::{Mend, Stuck, Why};
use crate::protocol::printable;

impl fmt::Display for Stuck {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { task_id, node, why, mend, .. } = self;
        let sentence = match mend {
            Mend::Wait => format!("task {task_id} on {node}: {why}; nothing needs to be done"),
            Mend::PublishAgain => {
                format!("task {task_id} on {node}: {why}; publish it again with the same task_id, it is not done twice")
            }
            Mend::StartAgent => {
                format!("task {task_id} on {node}: {why}; start the agent, the task is safe until then")
            }
            Mend::EnrolAndPublishAgain => format!(
                "task {task_id} on {node}: {why}; start its agent or run haul topology apply --node {node}, then \
                 publish the task again with the same task_id"
            ),
            Mend::Resume => format!("task {task_id} on {node}: {why}; run haul resume --node {node}"),
            Mend::LookAfterAgent => {
                format!("task {task_id} on {node}: {why}; look at its process and its log, and restart it if it hangs")
            }
            Mend::ReadEvents => {
                format!("task {task_id} on {node}: {why}; let the master read its queue of events first")
            }
        };
        f.write_str(&printable(&sentence))
    }
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotConfirmed => f.write_str("the broker never confirmed that it has the task"),
            Self::NotSeen => f.write_str("the node was not looked at"),
            Self::NoQueue => f.write_str("the node has no queue, and what was in it is gone"),
            Self::NodeDown { waiting } => {
                write!(f, "no agent consumes the node's queue, in which {waiting} tasks wait")
            }
            Self::AgentSilent => f.write_str("the node's agent is connected but does not answer"),
            Self::NotConsuming { waiting } => write!(
                f,
                "the node's agent answers but does not consume its queue, in which {waiting} tasks wait: it ends, begins, or \
                 cannot write its journal"
            ),
            Self::Paused => f.write_str("the node's agent is paused and takes no tasks"),
            Self::Queued { waiting } => write!(f, "it waits in the node's queue, in which {waiting} tasks are"),
            Self::InWindow { waiting, running } => {
                write!(f, "it waits for its turn at the agent, where {running} tasks run and {waiting} wait")
            }
            Self::InRetry { until, class, message } => {
                write!(f, "an attempt failed ({class}: {message}) and the next is due at {until}")
            }
            Self::HostPaused { host, state, until } => {
                write!(f, "{host} is {state}, and the task is put off until {until} without spending attempts")
            }
            Self::MayBeHeld { copies } => {
                write!(f, "it is probably one of the {copies} copies that lie in the retry queues")
            }
            Self::Running { silent_secs } => {
                write!(f, "it runs, and has said nothing for {silent_secs} s; its deadline and stall limit end it")
            }
            Self::DeadLettered(dead) => {
                write!(
                    f,
                    "it failed for good ({}: {}) and is a dead letter, but its end was not heard",
                    dead.class, dead.error
                )
            }
            Self::EventsUnread { waiting } => {
                write!(f, "{waiting} events wait in the master's own queue, its end perhaps among them")
            }
            Self::EndMissed => {
                f.write_str("the agent knew it and has nothing to do with it any more: its end was not heard")
            }
            Self::Lost => f.write_str("neither a queue nor the agent has it, and nothing was heard of it"),
        }
    }
}
