//! Every execution has a cause, and no two of one project overlap.

use std::collections::HashMap;

use super::{
    super::history::{Execution, Step},
    Crime, Verdict,
    facts::Facts,
};

/// Judges the ledgers.
pub(super) fn judge(facts: &Facts<'_>, verdict: &mut Verdict) {
    verdict.executions = facts.executions.iter().filter(|line| line.step == Step::Started).count();
    for ((task, round), life) in &facts.lives {
        let mut before: Option<(&Execution, Option<&Execution>)> = None;
        for line in &life.executions {
            if line.step != Step::Started {
                if let Some((started, end)) = &mut before
                    && started.boot == line.boot
                {
                    *end = Some(line);
                }
                continue;
            }
            if let Some((started, end)) = before
                && !is_next_attempt(end, line)
            {
                let cause = facts.agent_ended(life.node, started.at, line.at).filter(|_| started.boot != line.boot);
                if let Some(cause) = cause {
                    *verdict.repeated.entry(cause).or_default() += 1;
                } else {
                    let ended = end.map(|end| end.step);
                    let attempts = (started.attempt, line.attempt);
                    let text = format!(
                        "task {task} round {round} of {} was executed again, attempts {attempts:?}, after {ended:?}",
                        life.node
                    );
                    verdict.find(Crime::Unexplained, text);
                }
            }
            before = Some((line, None));
        }
    }
    overlaps(facts, verdict);
}

/// Whether an execution is the attempt that the end of the one before it asked for.
fn is_next_attempt(end: Option<&Execution>, next: &Execution) -> bool {
    end.is_some_and(|end| match end.step {
        Step::Failed(_) => next.attempt > end.attempt,
        // Told to stop, it was given back uncharged.
        Step::Stopped => next.attempt >= end.attempt,
        Step::Started | Step::Applied | Step::Done => false,
    })
}

/// Two executions of one project in one start of an agent follow each other.
fn overlaps(facts: &Facts<'_>, verdict: &mut Verdict) {
    let mut running: HashMap<(&str, i64), &Execution> = HashMap::new();
    for &line in &facts.executions {
        let project = (line.node.as_str(), line.project);
        if line.step != Step::Started {
            running.remove(&project);
        } else if let Some(other) = running.insert(project, line).filter(|other| other.boot == line.boot) {
            let text =
                format!("{} ran while {} did, on project {} of {}", line.task, other.task, line.project, line.node);
            verdict.find(Crime::Overlapped, text);
        }
    }
}
