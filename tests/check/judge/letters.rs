//! Every task that failed for good has a dead letter, and every dead letter such a task.

use std::collections::{BTreeMap, BTreeSet};

use haul::{dead::UNKNOWN, failure::ErrorClass, protocol::Status};

use super::{
    super::history::{FaultKind, Step},
    Crime, Verdict,
    facts::{Facts, Key},
};

/// Judges the dead letters.
pub(super) fn judge(facts: &Facts<'_>, verdict: &mut Verdict) {
    let mut written: BTreeMap<Key, usize> = BTreeMap::new();
    for (task, round, class) in facts.letters.iter().chain(&facts.replayed) {
        if *class == UNKNOWN {
            // The broker's own: a copy that came back while its node had no queue.
            destroyed(facts, task, *round, verdict);
        } else if let Some(failed) = round.checked_sub(1) {
            *written.entry(((*task).to_owned(), failed)).or_default() += 1;
        } else {
            verdict.find(Crime::Unaccounted, format!("a letter of {task} asks for the round that failed"));
        }
    }
    let mut failed = BTreeSet::new();
    for (key, life) in &facts.lives {
        let due = life.ends.iter().any(|end| match end.status {
            Status::Failed => end.class != Some(ErrorClass::Conflict),
            Status::Rejected => true,
            _ => false,
        });
        if !due {
            continue;
        }
        failed.insert(key.clone());
        let followed = facts.lives.get(&(key.0.clone(), key.1 + 1)).is_some_and(|next| !next.ends.is_empty());
        if !written.contains_key(key) && !followed {
            verdict.find(Crime::Unaccounted, format!("task {} round {} failed without a dead letter", key.0, key.1));
        }
    }
    for (key, count) in written {
        // Confirmed, but not struck off before a kill: paid again.
        verdict.letters_twice += count - 1;
        if failed.contains(&key) {
            continue;
        }
        if forgotten(facts, &key) {
            verdict.letters_forgotten += 1;
        } else {
            let text = format!("there is a dead letter of {} round {}, which did not fail", key.0, key.1);
            verdict.find(Crime::Unaccounted, text);
        }
    }
}

/// Whether a task failed, which a journal knew that was lost before it was told: its letter was out already.
fn forgotten(facts: &Facts<'_>, key: &Key) -> bool {
    facts.lives.get(key).is_some_and(|life| {
        let mut failures = life.executions.iter().filter(|line| matches!(line.step, Step::Failed(_)));
        failures.any(|line| facts.journal_lost(life.node, line.at, i64::MAX))
    })
}

fn destroyed(facts: &Facts<'_>, task: &str, round: u32, verdict: &mut Verdict) {
    verdict.letters_of_destroyed += 1;
    let life = facts.lives.get(&(task.to_owned(), round));
    let node = life.map_or("", |life| life.node);
    if !facts.happened(FaultKind::QueueDeleted, node, 0, i64::MAX) {
        let text = format!("the broker dead-lettered a copy of {task} round {round}, and its queue was always there");
        verdict.find(Crime::Unaccounted, text);
    }
}
