//! Control messages: what a master tells an agent outside the queue of tasks, and what the agent answers.

use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{EventId, NodeName, ProjectId, TaskId};

/// A control message as it is written on the wire (`haul.control`, routing key = node name).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[schemars(title = "Control")]
#[schemars(extend("allOf" = [
    {"if": {"properties": {"command": {"const": "cancel"}}}, "then": {"required": ["task_id"], "properties": {"task_id": {"type": "string"}}}},
]))]
pub struct ControlMessage {
    /// Version of the contract: 1.
    #[schemars(range(min = 1, max = 1))]
    pub v: u32,
    /// What to do.
    pub command: ControlCommand,
    /// The task, for `cancel`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub task_id: Option<TaskId>,
    /// Repeated in the answer, so that who asked can tell it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub control_id: Option<String>,
}

/// What an agent can be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum ControlCommand {
    /// Cancel a queued, waiting or running task.
    Cancel,
    /// Take no more tasks; survives a restart.
    Pause,
    /// Take tasks again.
    Resume,
    /// Finish what runs, give back the rest, and end; does not survive a restart.
    Drain,
    /// Say how the agent is.
    Inspect,
}

/// A checked control message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Control {
    /// Cancel this task.
    Cancel(TaskId),
    /// Take no more tasks.
    Pause,
    /// Take tasks again.
    Resume,
    /// Finish and end.
    Drain,
    /// Report.
    Inspect,
}

/// What an agent answers, on the results exchange with routing key `<node>.control.<answer>`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ControlAnswer {
    /// Version of the contract: 1.
    #[schemars(range(min = 1, max = 1))]
    pub v: u32,
    /// Identity of the answer.
    pub event_id: EventId,
    /// When.
    pub at: Timestamp,
    /// Who answers.
    pub node: NodeName,
    /// Identity of this start of the agent.
    pub boot: String,
    /// `pending` (a cancel of a task not seen yet), `cancelling`, `settled`, `paused`, `resumed`, `draining`, later
    /// `drained`, `state`, or `refused`.
    pub answer: String,
    /// The command that it answers, where it could be read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub command: Option<ControlCommand>,
    /// As in the command.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub control_id: Option<String>,
    /// As in the command.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub task_id: Option<TaskId>,
    /// Why a command was refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// For `state`: whether the agent can do its job: it consumes, publishes, hears commands and writes its journal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ready: Option<bool>,
    /// For `state`: whether it consumes its queue, and the broker serves it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub consuming: Option<bool>,
    /// For `state`: why it is not ready, in sentences.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub not_ready: Option<Vec<String>>,
    /// For `state`: whether the agent is paused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub paused: Option<bool>,
    /// For `state`: tasks executing now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub running: Option<u64>,
    /// For `state`: tasks waiting in the window.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub waiting: Option<u64>,
    /// For `state`: the projects being worked on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub busy_projects: Option<Vec<ProjectId>>,
    /// For `state`: the hosts of upstreams that are talked to, waited for or left alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hosts: Option<Vec<HostState>>,
    /// For `state`: when a damaged journal was last set aside; the agent's log says more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub journal_set_aside: Option<Timestamp>,
    /// For `state`: version of the agent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agent_version: Option<String>,
}

/// One host of upstreams, as an agent sees it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct HostState {
    /// Its name.
    pub host: String,
    /// Transfers with it now.
    pub running: u64,
    /// Tasks that wait for one of them to end.
    pub waiting: u64,
    /// Why its tasks are put off: `down` or `throttled`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub paused: Option<String>,
    /// For how many seconds more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub paused_secs: Option<u64>,
}

impl ControlCommand {
    /// The command's name on the wire.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Cancel => "cancel",
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::Drain => "drain",
            Self::Inspect => "inspect",
        }
    }
}

impl TryFrom<ControlMessage> for Control {
    type Error = crate::failure::Failure;

    fn try_from(message: ControlMessage) -> Result<Self, Self::Error> {
        use crate::failure::Failure;
        if message.v != super::VERSION {
            return Err(Failure::invalid(format!("the command is of version {}, this agent speaks 1", message.v)));
        }
        Ok(match message.command {
            ControlCommand::Cancel => {
                Self::Cancel(message.task_id.ok_or_else(|| Failure::invalid("cancel needs a task_id"))?)
            }
            ControlCommand::Pause => Self::Pause,
            ControlCommand::Resume => Self::Resume,
            ControlCommand::Drain => Self::Drain,
            ControlCommand::Inspect => Self::Inspect,
        })
    }
}
