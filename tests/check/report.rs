//! The verdict as a table.

use std::fmt::Write as _;

use super::{
    history::Why,
    judge::{Crime, Verdict},
};

/// Findings that are printed; the history has them all.
const MOST: usize = 20;

/// The table of a verdict.
pub(crate) fn table(verdict: &Verdict) -> String {
    let mut text = String::new();
    let work = verdict.work.map(|work| format!("{work:?}").to_lowercase()).unwrap_or_default();
    let _ = writeln!(text, "checker: work {work}, RabbitMQ {}, seed {}", verdict.broker, verdict.seed);
    let mut row = |name: &str, value: String| {
        let _ = writeln!(text, "  {name:<38} {value}");
    };
    #[expect(clippy::cast_precision_loss, reason = "a figure for people")]
    let rate = verdict.tasks as f64 / verdict.seconds.max(0.001);
    row("tasks", format!("{} in {:.1} s, {rate:.0} a second", verdict.tasks, verdict.seconds));
    let published = |why| verdict.published.get(&why).copied().unwrap_or(0);
    row("duplicates published", published(Why::Duplicate).to_string());
    row("published again, destroyed by a fault", published(Why::Destroyed).to_string());
    row("published again, not confirmed", verdict.published_again.to_string());
    row("ends", listed(verdict.ends.iter().map(|(status, count)| (status.to_string(), *count))));
    row("events", format!("{}, and {} again with the same identity", verdict.events, verdict.repeated_events));
    let faults: usize = verdict.faults.values().sum();
    row("faults", format!("{faults} done, {} that could not be", verdict.faults_not_done));
    for (kind, count) in &verdict.faults {
        row(&format!("  {}", kind.name()), count.to_string());
    }
    row("executions", verdict.executions.to_string());
    row("executions repeated", listed(verdict.repeated.iter().map(|(cause, count)| ((*cause).to_owned(), *count))));
    row("ended twice, journal lost in between", verdict.doubled_by_loss.to_string());
    row(
        "dead letters",
        format!(
            "{} there, {} replayed; {} twice, {} of deleted queues, {} of failures that a lost journal forgot",
            verdict.letters,
            verdict.replayed,
            verdict.letters_twice,
            verdict.letters_of_destroyed,
            verdict.letters_forgotten
        ),
    );
    row("projects", verdict.projects.to_string());
    for crime in Crime::ALL {
        row(crime.name(), verdict.count(crime).to_string());
    }
    for finding in verdict.findings.iter().take(MOST) {
        let _ = writeln!(text, "  ! {finding}");
    }
    if let Some(more @ 1..) = verdict.findings.len().checked_sub(MOST) {
        let _ = writeln!(text, "  ! and {more} more");
    }
    text
}

fn listed(counts: impl Iterator<Item = (String, usize)>) -> String {
    let parts: Vec<_> = counts.map(|(name, count)| format!("{count} {name}")).collect();
    if parts.is_empty() { "0".to_owned() } else { parts.join(", ") }
}
