//! The judgement: what a history shows of the promises. Pure: the same history is always judged the same.

mod ends;
mod executions;
mod facts;
mod letters;
mod projects;

use std::{collections::BTreeMap, fmt};

use haul::protocol::Status;

use self::facts::Facts;
use super::history::{FaultKind, Record, Why, Work};

/// What may be found against a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Crime {
    /// A task that the broker took has no end, and nobody has it.
    Lost,
    /// A task that the broker took has no end, and lies in a queue.
    Stuck,
    /// A task ended twice in one round.
    Doubled,
    /// A task ended as it must not, or an event tells of a task that nobody published.
    WrongEnd,
    /// A project is not what its tasks made it.
    WrongState,
    /// A task was executed again without a cause.
    Unexplained,
    /// Two tasks of one project ran at once.
    Overlapped,
    /// A failed task has no dead letter, or a dead letter has no failed task.
    Unaccounted,
    /// An agent ended by itself, panicked, or did not end when it was told to.
    Agent,
}

impl Crime {
    /// All of them.
    pub(crate) const ALL: [Self; 9] = [
        Self::Lost,
        Self::Stuck,
        Self::Doubled,
        Self::WrongEnd,
        Self::WrongState,
        Self::Unexplained,
        Self::Overlapped,
        Self::Unaccounted,
        Self::Agent,
    ];

    /// Its name in the table.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Lost => "lost",
            Self::Stuck => "stuck",
            Self::Doubled => "doubled",
            Self::WrongEnd => "wrong ends",
            Self::WrongState => "wrong final states",
            Self::Unexplained => "executions repeated without a cause",
            Self::Overlapped => "overlapping executions of one project",
            Self::Unaccounted => "dead letters unaccounted",
            Self::Agent => "agents that ended wrongly",
        }
    }
}

/// One thing found against a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Finding {
    pub(crate) crime: Crime,
    pub(crate) text: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.crime.name(), self.text)
    }
}

/// What is known of a run once it was judged.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Verdict {
    pub(crate) work: Option<Work>,
    pub(crate) broker: String,
    pub(crate) seed: u64,
    /// Tasks that the broker took.
    pub(crate) tasks: usize,
    pub(crate) published: BTreeMap<Why, usize>,
    /// Publishes that were not confirmed at first.
    pub(crate) published_again: usize,
    /// Ends by status, one for each task and round.
    pub(crate) ends: BTreeMap<Status, usize>,
    pub(crate) events: usize,
    pub(crate) repeated_events: usize,
    pub(crate) faults: BTreeMap<FaultKind, usize>,
    pub(crate) faults_not_done: usize,
    pub(crate) executions: usize,
    /// Executions that were repeated, by what made them so.
    pub(crate) repeated: BTreeMap<&'static str, usize>,
    /// Ends that came twice because a journal was lost in between.
    pub(crate) doubled_by_loss: usize,
    pub(crate) letters: usize,
    pub(crate) letters_twice: usize,
    pub(crate) letters_of_destroyed: usize,
    /// Of failures that a lost journal forgot before they were told.
    pub(crate) letters_forgotten: usize,
    pub(crate) replayed: usize,
    pub(crate) projects: usize,
    pub(crate) seconds: f64,
    pub(crate) findings: Vec<Finding>,
}

impl Verdict {
    /// Whether nothing was found against the run.
    pub(crate) fn is_good(&self) -> bool {
        self.findings.is_empty()
    }

    /// How much of a kind was found.
    pub(crate) fn count(&self, crime: Crime) -> usize {
        self.findings.iter().filter(|finding| finding.crime == crime).count()
    }

    fn find(&mut self, crime: Crime, text: impl Into<String>) {
        self.findings.push(Finding { crime, text: text.into() });
    }
}

/// Judges a history.
pub(crate) fn judge(records: &[Record]) -> Verdict {
    let facts = Facts::gather(records);
    let mut verdict = Verdict::default();
    count(records, &mut verdict);
    ends::judge(&facts, &mut verdict);
    executions::judge(&facts, &mut verdict);
    projects::judge(&facts, &mut verdict);
    letters::judge(&facts, &mut verdict);
    verdict.findings.sort_by_key(|finding| finding.crime);
    verdict
}

/// What only has to be counted.
fn count(records: &[Record], verdict: &mut Verdict) {
    let mut begun = None;
    for record in records {
        match record {
            Record::Run { at, seed, work, broker, .. } => {
                begun = Some(*at);
                (verdict.seed, verdict.work, verdict.broker) = (*seed, Some(*work), broker.clone());
            }
            Record::Accepted(accepted) => {
                *verdict.published.entry(accepted.why).or_default() += 1;
                verdict.published_again += usize::try_from(accepted.tries.saturating_sub(1)).unwrap_or(0);
            }
            Record::Event(_) => verdict.events += 1,
            Record::Fault(fault) if fault.done => *verdict.faults.entry(fault.kind).or_default() += 1,
            Record::Fault(_) => verdict.faults_not_done += 1,
            Record::Ended { node, how, asked, .. } => {
                use super::history::{PANICKED, TOO_LATE};
                if !asked || how == PANICKED || how == TOO_LATE {
                    let by = if *asked { "when it was told to end" } else { "by itself" };
                    verdict.find(Crime::Agent, format!("the agent of {node} ended {by}: {how}"));
                }
            }
            Record::Replayed { .. } => verdict.replayed += 1,
            Record::Letter { .. } => verdict.letters += 1,
            Record::Over { at, .. } => {
                #[expect(clippy::cast_precision_loss, reason = "a run does not last for years")]
                let seconds = begun.map_or(0.0, |begun| (at - begun) as f64 / 1e6);
                verdict.seconds = seconds;
            }
            Record::Execution(_) | Record::Project(_) | Record::Left { .. } => {}
        }
    }
}
