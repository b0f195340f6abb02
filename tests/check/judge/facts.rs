//! A history, put in order.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use haul::protocol::Kind;

use super::super::history::{Execution, Fault, FaultKind, Moment, Project, Record, Told};

/// A task and a round.
pub(super) type Key = (String, u32);

/// What is known of one task in one round.
#[derive(Debug, Default)]
pub(super) struct Life<'a> {
    pub(super) node: &'a str,
    pub(super) project: i64,
    pub(super) kind: Option<Kind>,
    pub(super) generation: Option<u64>,
    /// Whether somebody asked for it: the master, or who replayed a letter.
    pub(super) wanted: bool,
    /// Its terminal events, in the order in which they came, each once.
    pub(super) ends: Vec<&'a Told>,
    /// Its executions, in the order of the ledger.
    pub(super) executions: Vec<&'a Execution>,
}

/// A history, put in order.
#[derive(Debug, Default)]
pub(super) struct Facts<'a> {
    pub(super) lives: BTreeMap<Key, Life<'a>>,
    pub(super) faults: Vec<&'a Fault>,
    /// When agents ended, by node.
    pub(super) agent_ends: Vec<(&'a str, Moment)>,
    /// The ledgers, one after the other.
    pub(super) executions: Vec<&'a Execution>,
    pub(super) projects: Vec<&'a Project>,
    /// Dead letters that are there: task, round that a replay would be, class.
    pub(super) letters: Vec<(&'a str, u32, &'a str)>,
    /// Dead letters that were sent again.
    pub(super) replayed: Vec<(&'a str, u32, &'a str)>,
    /// Messages that are left in queues of tasks.
    pub(super) left: BTreeSet<Key>,
    /// Events that came again with the same identity.
    pub(super) repeated_events: usize,
}

impl<'a> Facts<'a> {
    /// Puts a history in order.
    pub(super) fn gather(records: &'a [Record]) -> Self {
        let mut facts = Self::default();
        let mut seen = HashSet::new();
        for record in records {
            match record {
                Record::Accepted(accepted) => {
                    let life = facts.life(&accepted.task, accepted.round);
                    (life.node, life.project, life.wanted) = (&accepted.node, accepted.project, true);
                    (life.kind, life.generation) = (Some(accepted.kind), accepted.generation);
                }
                Record::Event(told) => {
                    if !seen.insert((&told.event, told.status)) {
                        facts.repeated_events += 1;
                    } else if told.status.is_terminal() {
                        let life = facts.life(&told.task, told.round);
                        life.ends.push(told);
                        if !life.wanted {
                            (life.node, life.project) = (&told.node, told.project);
                        }
                    }
                }
                Record::Fault(fault) => facts.faults.push(fault),
                Record::Ended { at, node, .. } => facts.agent_ends.push((node, *at)),
                Record::Execution(execution) => {
                    facts.executions.push(execution);
                    facts.life(&execution.task, execution.round).executions.push(execution);
                }
                Record::Project(project) => facts.projects.push(project),
                Record::Letter { task, round, class } => facts.letters.push((task, *round, class)),
                Record::Replayed { task, round, class, .. } => {
                    facts.replayed.push((task, *round, class));
                    facts.life(task, *round).wanted = true;
                }
                Record::Left { task, round, .. } => drop(facts.left.insert((task.clone(), *round))),
                Record::Run { .. } | Record::Over { .. } => {}
            }
        }
        facts.inherit();
        facts
    }

    /// A replay is of the same project as its first round.
    fn inherit(&mut self) {
        let firsts: Vec<_> = self.lives.iter().filter(|((_, round), _)| *round == 0).collect();
        let firsts: BTreeMap<String, _> = firsts
            .into_iter()
            .map(|((task, _), life)| (task.clone(), (life.node, life.project, life.kind, life.generation)))
            .collect();
        for ((task, round), life) in &mut self.lives {
            if let Some(first) = firsts.get(task).filter(|_| *round > 0) {
                (life.node, life.project, life.kind, life.generation) = *first;
            }
        }
    }

    fn life(&mut self, task: &str, round: u32) -> &mut Life<'a> {
        self.lives.entry((task.to_owned(), round)).or_default()
    }

    /// Whether a node's journal was lost at some moment between these two.
    pub(super) fn journal_lost(&self, node: &str, after: Moment, before: Moment) -> bool {
        self.happened(FaultKind::JournalLost, node, after, before)
    }

    /// Whether a fault of a kind was done to a node at some moment between these two.
    pub(super) fn happened(&self, kind: FaultKind, node: &str, after: Moment, before: Moment) -> bool {
        self.faults.iter().any(|fault| {
            let there = fault.node.as_deref().is_none_or(|of| of == node);
            fault.kind == kind && there && fault.at <= before && fault.until >= after
        })
    }

    /// The fault that an agent ended by between two moments, if it ended.
    pub(super) fn agent_ended(&self, node: &str, after: Moment, before: Moment) -> Option<&'static str> {
        use FaultKind as K;
        for kind in [K::JournalLost, K::AgentKilled, K::AgentStopped] {
            if self.happened(kind, node, after, before) {
                return Some(kind.name());
            }
        }
        let ended = self.agent_ends.iter().any(|(of, at)| *of == node && (after..=before).contains(at));
        ended.then_some("agent ended by itself")
    }
}
