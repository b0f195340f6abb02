//! What happened in a run, one JSON line each: all that a judgement is made of, so that it can be repeated.

use std::{
    fs::File,
    io::{BufRead as _, BufReader, BufWriter, Write as _},
    path::Path,
    sync::Mutex,
};

use haul::{
    failure::ErrorClass,
    protocol::{Kind, Place, ProjectStatus, Status},
};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

/// The file of a history in its directory.
pub(crate) const FILE: &str = "history.jsonl";

/// How an agent ended that did not when it was told to.
pub(crate) const TOO_LATE: &str = "had to be killed";
/// How an agent ended that found a fault in itself.
pub(crate) const PANICKED: &str = "panicked";

/// Microseconds since the epoch; agents and checker share a machine, so they compare.
pub(crate) type Moment = i64;

/// The present moment.
pub(crate) fn now() -> Moment {
    Timestamp::now().as_microsecond()
}

/// One thing that happened.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "what", rename_all = "snake_case")]
pub(crate) enum Record {
    /// The run began.
    Run { at: Moment, seed: u64, tasks: usize, faults: usize, nodes: usize, work: Work, broker: String },
    /// The broker confirmed a task to the master.
    Accepted(Accepted),
    /// The master got an event.
    Event(Told),
    /// A fault was done to the system, and undone.
    Fault(Fault),
    /// An agent's process ended.
    Ended {
        at: Moment,
        node: String,
        how: String,
        /// Whether the checker ended it.
        asked: bool,
    },
    /// A line of an agent's ledger.
    Execution(Execution),
    /// What is on a node's disk in the end.
    Project(Project),
    /// A dead letter was sent to its node again.
    Replayed { at: Moment, task: String, round: u32, class: String },
    /// A dead letter that is there in the end.
    Letter { task: String, round: u32, class: String },
    /// A message that is left in a queue of tasks in the end.
    Left { queue: String, task: String, round: u32 },
    /// The run is over.
    Over {
        at: Moment,
        /// Whether everything had ended by itself.
        drained: bool,
    },
}

/// How tasks are executed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Work {
    /// By an executor that writes a ledger.
    Ledger,
    /// By `haul worker`.
    Git,
}

/// A task as the broker took it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Accepted {
    pub(crate) at: Moment,
    pub(crate) task: String,
    pub(crate) round: u32,
    pub(crate) node: String,
    pub(crate) project: i64,
    pub(crate) kind: Kind,
    pub(crate) generation: Option<u64>,
    pub(crate) why: Why,
    /// Publishes that it took until one was confirmed.
    pub(crate) tries: u32,
}

/// Why a task was published.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Why {
    First,
    Duplicate,
    /// A fault had destroyed it by definition.
    Destroyed,
}

/// What an event told.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Told {
    /// When it happened, as its agent says.
    pub(crate) at: Moment,
    pub(crate) event: String,
    pub(crate) task: String,
    pub(crate) round: u32,
    pub(crate) attempt: u32,
    pub(crate) node: String,
    pub(crate) boot: String,
    pub(crate) project: i64,
    pub(crate) project_seq: u64,
    pub(crate) status: Status,
    pub(crate) project_status: ProjectStatus,
    pub(crate) class: Option<ErrorClass>,
    pub(crate) head: Option<String>,
}

/// A fault, done and undone.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Fault {
    pub(crate) at: Moment,
    pub(crate) until: Moment,
    pub(crate) kind: FaultKind,
    /// The node it was done to, if it was one.
    pub(crate) node: Option<String>,
    /// Whether it could be done.
    pub(crate) done: bool,
    pub(crate) note: String,
}

macro_rules! fault_kinds {
    ($($kind:ident = $name:literal,)*) => {
        /// What can be done to the system.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        pub(crate) enum FaultKind {
            $(#[serde(rename = $name)] $kind,)*
        }

        impl FaultKind {
            /// All of them.
            pub(crate) const ALL: &[Self] = &[$(Self::$kind,)*];

            /// Its name.
            pub(crate) const fn name(self) -> &'static str {
                match self { $(Self::$kind => $name,)* }
            }
        }
    };
}

fault_kinds! {
    AgentKilled = "agent-killed",
    AgentStopped = "agent-stopped",
    AgentFrozen = "agent-frozen",
    JournalLost = "journal-lost",
    ChildKilled = "child-killed",
    BrokerRestarted = "broker-restarted",
    BrokerKilled = "broker-killed",
    BrokerAppStopped = "broker-app-stopped",
    ConnectionReset = "connection-reset",
    HalfOpen = "half-open",
    Stall = "stall",
    Trickle = "trickle",
    Latency = "latency",
    ConnectionsClosed = "connections-closed",
    ChannelClosed = "channel-closed",
    ConsumerCancelled = "consumer-cancelled",
    QueueDeleted = "queue-deleted",
    MemoryAlarm = "memory-alarm",
    DiskAlarm = "disk-alarm",
    DlxMissing = "dlx-missing",
    DeadQueueFull = "dead-queue-full",
    DeadReplayed = "dead-replayed",
}

/// A line of a ledger.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Execution {
    pub(crate) at: Moment,
    pub(crate) node: String,
    pub(crate) boot: String,
    pub(crate) task: String,
    pub(crate) round: u32,
    pub(crate) attempt: u32,
    pub(crate) project: i64,
    pub(crate) kind: Kind,
    pub(crate) place: Place,
    pub(crate) step: Step,
}

/// What a line of a ledger says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Step {
    /// An execution begins.
    Started,
    /// It changed its project, and ended.
    Applied,
    /// It ended well and changed nothing.
    Done,
    /// It failed.
    Failed(ErrorClass),
    /// It was told to stop.
    Stopped,
}

/// A project on a node's disk.
#[expect(clippy::struct_field_names, reason = "it is the id that tasks carry under this name")]
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Project {
    pub(crate) node: String,
    pub(crate) project: i64,
    pub(crate) active: bool,
    /// The task that was applied last, where that is known.
    pub(crate) task: Option<String>,
    /// Its place, where that is known.
    pub(crate) place: Option<Place>,
    /// The commit that is checked out, where there is one.
    pub(crate) head: Option<String>,
    /// What is wrong with its files.
    pub(crate) damage: Option<String>,
}

/// A history that is being written.
pub(crate) struct History {
    file: Mutex<BufWriter<File>>,
}

impl History {
    /// A new one in a directory.
    pub(crate) fn create(directory: &Path) -> std::io::Result<Self> {
        std::fs::create_dir_all(directory)?;
        Ok(Self { file: Mutex::new(BufWriter::new(File::create_new(directory.join(FILE))?)) })
    }

    /// Adds what happened.
    pub(crate) fn add(&self, record: &Record) {
        let mut line = serde_json::to_vec(record).expect("a record serialises");
        line.push(b'\n');
        self.file.lock().unwrap().write_all(&line).expect("the history can be written");
    }

    /// Writes everything to its file.
    pub(crate) fn flush(&self) {
        self.file.lock().unwrap().flush().expect("the history can be written");
    }
}

/// Reads a history.
pub(crate) fn read(directory: &Path) -> Result<Vec<Record>, String> {
    let path = directory.join(FILE);
    let refused = |error: &dyn std::fmt::Display| format!("{} cannot be read: {error}", path.display());
    let file = File::open(&path).map_err(|error| refused(&error))?;
    let lines = BufReader::new(file).lines();
    lines
        .map(|line| serde_json::from_str(&line.map_err(|error| refused(&error))?).map_err(|error| refused(&error)))
        .collect()
}
