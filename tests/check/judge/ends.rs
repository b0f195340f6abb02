//! Every task that the broker took ends once in each round, and as it may.

use std::collections::BTreeSet;

use haul::failure::ErrorClass;

use super::{
    super::{
        behaviour::Behaviour,
        history::{Moment, Step},
    },
    Crime, Verdict,
    facts::{Facts, Key, Life},
};

/// Crashes at which a task was running, after which its agent gives it up.
const CRASH_BUDGET: usize = 3;

/// Judges the ends.
pub(super) fn judge(facts: &Facts<'_>, verdict: &mut Verdict) {
    verdict.repeated_events = facts.repeated_events;
    let tasks: BTreeSet<_> = facts.lives.iter().filter(|(_, life)| life.wanted).map(|((task, _), _)| task).collect();
    verdict.tasks = tasks.len();
    for (key, life) in &facts.lives {
        let what = || format!("task {} round {} of {}", key.0, key.1, life.node);
        let Some(first) = life.ends.first() else {
            if life.wanted {
                missing(facts, key, what(), verdict);
            }
            continue;
        };
        *verdict.ends.entry(first.status).or_default() += 1;
        if !life.wanted && !replayed_unseen(facts, key) {
            verdict.find(Crime::WrongEnd, format!("{} ended, but nobody published it", what()));
            continue;
        }
        once(facts, life, what(), verdict);
        for end in &life.ends {
            fits(key, life, end.status, end.class, &what(), verdict);
        }
    }
}

fn missing(facts: &Facts<'_>, key: &Key, what: String, verdict: &mut Verdict) {
    if facts.left.iter().any(|(task, _)| *task == key.0) {
        verdict.find(Crime::Stuck, format!("{what} has not ended and lies in a queue"));
    } else {
        let last = facts.lives[key].executions.last();
        let seen = last.map_or_else(|| "was never executed".to_owned(), |line| format!("was last {:?}", line.step));
        verdict.find(Crime::Lost, format!("{what} has not ended; it {seen}"));
    }
}

/// A replay that broke off may have sent what it could not report.
fn replayed_unseen(facts: &Facts<'_>, (task, round): &Key) -> bool {
    *round > 0 && facts.lives.get(&(task.clone(), round - 1)).is_some_and(|before| !before.ends.is_empty())
}

/// One event and one status, unless the journal that knew of the first was lost before the second.
fn once(facts: &Facts<'_>, life: &Life<'_>, what: String, verdict: &mut Verdict) {
    for pair in life.ends.windows(2) {
        let (first, second) = (pair[0], pair[1]);
        let (after, before): (Moment, Moment) = (first.at.min(second.at), first.at.max(second.at));
        if facts.journal_lost(life.node, after, before) {
            verdict.doubled_by_loss += 1;
        } else {
            let (first, second) = ((&first.event, first.status), (&second.event, second.status));
            verdict.find(Crime::Doubled, format!("{what} ended twice: {first:?} and {second:?}"));
        }
    }
}

/// Whether a task may end like this.
fn fits(
    (task, round): &Key,
    life: &Life<'_>,
    status: haul::protocol::Status,
    class: Option<ErrorClass>,
    what: &str,
    verdict: &mut Verdict,
) {
    let (Some(kind), Some(behaviour)) = (life.kind, Behaviour::of(task)) else {
        return verdict.find(Crime::WrongEnd, format!("{what} is no task of this run"));
    };
    if class == Some(ErrorClass::Crashed) {
        let crashes = crashes(life);
        if crashes < CRASH_BUDGET {
            let text = format!("{what} was given up after {crashes} crashes at which it was running");
            verdict.find(Crime::WrongEnd, text);
        }
        return;
    }
    if !behaviour.may_end(kind, *round, status, class) {
        let class = class.map_or("", ErrorClass::as_str);
        verdict.find(Crime::WrongEnd, format!("{what} ended as {status} {class}, which its work never comes to"));
    }
}

/// Starts of the agent that ended while the task was running.
fn crashes(life: &Life<'_>) -> usize {
    let boots: BTreeSet<_> = life.executions.iter().map(|line| &line.boot).collect();
    let ended_by_itself = |boot: &&&String| {
        let last = life.executions.iter().rfind(|line| line.boot == ***boot);
        last.is_some_and(|line| line.step != Step::Started)
    };
    boots.len() - boots.iter().filter(ended_by_itself).count()
}
