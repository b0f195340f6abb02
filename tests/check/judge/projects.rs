//! In the end every project is what its tasks made it, and what the events told of it.

use std::collections::BTreeMap;

use haul::protocol::{Kind, ProjectStatus, Status};

use super::{
    super::history::{Execution, Project, Step, Told},
    Crime, Verdict,
    facts::{Facts, Life},
};

/// A node and a project.
type Place<'a> = (&'a str, i64);

/// Judges the projects.
pub(super) fn judge(facts: &Facts<'_>, verdict: &mut Verdict) {
    let mut lives: BTreeMap<Place<'_>, Vec<(&str, &Life<'_>)>> = BTreeMap::new();
    for ((task, _), life) in &facts.lives {
        lives.entry((life.node, life.project)).or_default().push((task, life));
    }
    let mut applied: BTreeMap<Place<'_>, Vec<&Execution>> = BTreeMap::new();
    for line in facts.executions.iter().filter(|line| line.step == Step::Applied) {
        applied.entry((&line.node, line.project)).or_default().push(line);
    }
    let disk: BTreeMap<Place<'_>, &Project> =
        facts.projects.iter().map(|project| ((project.node.as_str(), project.project), *project)).collect();
    verdict.projects = disk.len();
    let ledger = !facts.executions.is_empty();
    for (place, lives) in &lives {
        let what = format!("project {} of {}", place.1, place.0);
        let applied = applied.get(place).map_or(&[][..], Vec::as_slice);
        let project = disk.get(place).copied();
        if let Some(damage) = project.and_then(|project| project.damage.as_ref()) {
            verdict.find(Crime::WrongState, format!("{what} is damaged: {damage}"));
        }
        in_order(facts, place.0, applied, &what, verdict);
        as_told(lives, project, &what, verdict);
        newest(lives, project, &what, verdict);
        if ledger {
            last(applied, project, &what, verdict);
            justly_superseded(lives, applied, &what, verdict);
        }
    }
}

/// Nothing is applied after something newer, but where the lost journal was the only one who knew the order.
fn in_order(facts: &Facts<'_>, node: &str, applied: &[&Execution], what: &str, verdict: &mut Verdict) {
    for pair in applied.windows(2) {
        let (first, second) = (pair[0], pair[1]);
        if !second.place.is_older_than(first.place) {
            continue;
        }
        let by_generation = second.place.generation.is_some() && first.place.generation.is_some();
        if by_generation || !facts.journal_lost(node, 0, second.at) {
            let text = format!("{what}: {} was applied after {}, which is newer", second.task, first.task);
            verdict.find(Crime::WrongState, text);
        }
    }
}

/// What the newest terminal event says of the project is so.
fn as_told(lives: &[(&str, &Life<'_>)], project: Option<&Project>, what: &str, verdict: &mut Verdict) {
    let ends = lives.iter().flat_map(|(_, life)| life.ends.iter().copied());
    let Some(newest) = ends.clone().map(|end| end.project_seq).max() else { return };
    for end in ends.filter(|end| end.project_seq == newest) {
        let active = project.is_some_and(|project| project.active);
        let told = match end.project_status {
            ProjectStatus::Active => true,
            ProjectStatus::Deleted | ProjectStatus::Error => false,
            ProjectStatus::Pending | ProjectStatus::Syncing => !active,
        };
        if told != active {
            let text = format!("{what} is told to be {:?} by {}, and active is {active}", end.project_status, end.task);
            verdict.find(Crime::WrongState, text);
        }
    }
}

/// Where the master gave the order, the newest task that succeeded made the project what it is.
fn newest(lives: &[(&str, &Life<'_>)], project: Option<&Project>, what: &str, verdict: &mut Verdict) {
    let succeeded = lives.iter().filter_map(|(task, life)| {
        let kind = life.kind.filter(|kind| kind.changes_project())?;
        let end = life.ends.iter().rfind(|end| end.status == Status::Succeeded)?;
        Some((life.generation?, *task, kind, *end))
    });
    let Some((generation, task, kind, end)) = succeeded.max_by_key(|(generation, ..)| *generation) else { return };
    let mut wrong = |why: &str| {
        verdict.find(Crime::WrongState, format!("{what}: {task} of generation {generation} succeeded last, but {why}"));
    };
    let Some(project) = project else {
        if kind != Kind::Delete {
            wrong("the project is not there");
        }
        return;
    };
    if project.active == (kind == Kind::Delete) {
        wrong(if project.active { "it is still there" } else { "it is not there" });
    }
    if project.place.is_some_and(|place| place.generation != Some(generation)) {
        wrong(&format!("generation {:?} was applied", project.place.and_then(|place| place.generation)));
    }
    if kind != Kind::Delete {
        same_head(end, project, &mut wrong);
    }
}

fn same_head(end: &Told, project: &Project, wrong: &mut impl FnMut(&str)) {
    if let Some(head) = &end.head
        && project.head.as_ref() != Some(head)
    {
        wrong(&format!("its head is {:?} and not {head}", project.head));
    }
}

/// The last line of the ledger is what is on disk.
fn last(applied: &[&Execution], project: Option<&Project>, what: &str, verdict: &mut Verdict) {
    let (last, there) = (applied.last().map(|line| &line.task), project.and_then(|project| project.task.as_ref()));
    if last != there {
        verdict.find(Crime::WrongState, format!("{what}: {last:?} was applied last, but {there:?} is there"));
    }
}

/// Something newer was applied, or a replay came.
fn justly_superseded(lives: &[(&str, &Life<'_>)], applied: &[&Execution], what: &str, verdict: &mut Verdict) {
    for (task, life) in lives {
        if !life.ends.iter().any(|end| end.status == Status::Superseded) {
            continue;
        }
        let newer = |line: &&Execution| match (line.place.generation, life.generation) {
            (Some(theirs), Some(ours)) => theirs > ours || line.task == *task,
            _ => true,
        };
        let replayed = lives.iter().filter(|(other, life)| other == task && !life.ends.is_empty()).count() > 1;
        if !applied.iter().any(newer) && !replayed {
            let text = format!("{what}: {task} was superseded, but nothing newer was applied");
            verdict.find(Crime::WrongState, text);
        }
    }
}
