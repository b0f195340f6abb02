//! Which fault comes when, and to whom: a function of the seed.

use std::time::Duration;

use super::{
    history::{FaultKind, Work},
    seed::Chance,
};

/// A fault that is to come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Planned {
    pub(crate) kind: FaultKind,
    /// The node it is done to, where it is done to one.
    pub(crate) node: usize,
    /// How long it lasts, where it lasts.
    pub(crate) lasts: Duration,
}

/// How often a fault comes, compared with the others. What takes the whole fleet seconds is rare.
const fn weight(kind: FaultKind, work: Work) -> usize {
    use FaultKind as K;
    match (work, kind) {
        (Work::Git, K::ChildKilled) => 8,
        (_, K::AgentKilled) => 5,
        (_, K::AgentStopped | K::AgentFrozen | K::ConnectionReset) => 3,
        // Real agents have the same way to the broker; what they add is their children, and those of a ledger have none.
        (Work::Git, _) | (Work::Ledger, K::ChildKilled) => 0,
        (_, K::BrokerRestarted | K::BrokerKilled | K::BrokerAppStopped | K::MemoryAlarm | K::DiskAlarm) => 1,
        (_, K::JournalLost | K::QueueDeleted | K::DlxMissing | K::DeadQueueFull) => 2,
        (_, K::HalfOpen | K::Stall | K::Trickle | K::Latency | K::ConnectionsClosed | K::DeadReplayed) => 3,
        (_, K::ChannelClosed | K::ConsumerCancelled) => 4,
    }
}

/// How long a fault lasts, in milliseconds.
const fn lasts(kind: FaultKind) -> (usize, usize) {
    use FaultKind as K;
    match kind {
        // Beyond two heartbeats the broker gives the agent up; short of them it does not notice.
        K::AgentFrozen => (300, 7000),
        K::Stall => (200, 3000),
        K::Trickle | K::Latency => (1000, 3000),
        K::BrokerKilled | K::BrokerAppStopped => (0, 1500),
        K::MemoryAlarm | K::DiskAlarm | K::DlxMissing | K::DeadQueueFull => (500, 2500),
        _ => (0, 300),
    }
}

/// The faults of a run: each kind once while there is room, and then by weight.
pub(crate) fn schedule(seed: u64, count: usize, nodes: usize, work: Work, only: &[FaultKind]) -> Vec<Planned> {
    let mut chance = Chance::new(seed, "schedule");
    let wanted = |kind: &FaultKind| weight(*kind, work) > 0 && (only.is_empty() || only.contains(kind));
    let mut kinds: Vec<_> = FaultKind::ALL.iter().copied().filter(wanted).collect();
    let urn: Vec<_> = kinds.iter().flat_map(|&kind| std::iter::repeat_n(kind, weight(kind, work))).collect();
    if urn.is_empty() {
        return Vec::new();
    }
    chance.shuffle(&mut kinds);
    kinds.truncate(count);
    while kinds.len() < count {
        kinds.push(*chance.pick(&urn));
    }
    chance.shuffle(&mut kinds);
    let planned = |kind| {
        let (low, high) = lasts(kind);
        let ms = chance.between(low, high);
        Planned { kind, node: chance.below(nodes), lasts: Duration::from_millis(ms as u64) }
    };
    kinds.into_iter().map(planned).collect()
}
