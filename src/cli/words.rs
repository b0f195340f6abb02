//! Events, answers and outcomes in words, for people.

use std::time::Duration;

use bytesize::ByteSize;

use crate::protocol::{ControlAnswer, Event, Progress, Status, printable};

/// The kinds of task, for the command line.
pub(super) const KINDS: [&str; 4] = ["clone", "pull", "delete", "status"];
/// The statuses of a task, for the command line.
pub(super) const STATUSES: [&str; 10] = [
    "accepted",
    "started",
    "progress",
    "retrying",
    "succeeded",
    "history",
    "failed",
    "rejected",
    "cancelled",
    "superseded",
];

/// One line for one event.
pub(super) fn event_line(event: &Event) -> String {
    let mut line = vec![format!(
        "{} {} {:<6} project {} {:<10} {}",
        event.at.strftime("%Y-%m-%dT%H:%M:%S%.3fZ"),
        event.node,
        event.kind.as_str(),
        event.project_id,
        event.status.as_str(),
        event.task_id,
    )];
    if event.round > 0 {
        line.push(format!(" round {}", event.round));
    }
    if event.attempt > 1 {
        line.push(format!(" attempt {}", event.attempt));
    }
    if let Some(details) = details(event) {
        line.push(format!(": {details}"));
    }
    printable(&line.concat())
}

/// One line for one answer of an agent.
pub(super) fn answer_line(answer: &ControlAnswer) -> String {
    let mut line = vec![format!(
        "{} {} {} {}",
        answer.at.strftime("%Y-%m-%dT%H:%M:%S%.3fZ"),
        answer.node,
        answer.command.map_or("control", |command| command.as_str()),
        answer.answer
    )];
    if let Some(task) = &answer.task_id {
        line.push(format!(" {task}"));
    }
    if let Some(reason) = answer.reason.as_deref().or_else(|| meaning(answer)) {
        line.push(format!(": {reason}"));
    }
    if let (Some(running), Some(waiting)) = (answer.running, answer.waiting) {
        line.push(format!(": {running} running, {waiting} waiting"));
    }
    match answer.ready {
        Some(true) => line.push(", ready".to_owned()),
        Some(false) => line.push(", not ready".to_owned()),
        None => {}
    }
    if answer.paused == Some(true) {
        line.push(", paused".to_owned());
    }
    if let Some(reasons) = answer.not_ready.as_ref().filter(|reasons| !reasons.is_empty()) {
        line.push(format!(" ({})", reasons.join("; ")));
    }
    if let Some(projects) = answer.busy_projects.as_ref().filter(|projects| !projects.is_empty()) {
        let projects: Vec<_> = projects.iter().map(ToString::to_string).collect();
        line.push(format!(", busy with {}", projects.join(" ")));
    }
    for host in answer.hosts.iter().flatten() {
        let rest = host.paused_secs.map(|secs| format!(", left alone for {secs} s")).unwrap_or_default();
        let why = host.paused.as_ref().map(|why| format!(" ({why})")).unwrap_or_default();
        line.push(format!("; {}: {} running, {} waiting{rest}{why}", host.host, host.running, host.waiting));
    }
    if let Some(at) = &answer.journal_set_aside {
        line.push(format!("; a damaged journal was set aside at {}", at.strftime("%Y-%m-%dT%H:%M:%SZ")));
    }
    if let Some(version) = &answer.agent_version {
        line.push(format!(", version {version}"));
    }
    printable(&line.concat())
}

/// What the answer to a cancel means, where the agent gives no reason.
fn meaning(answer: &ControlAnswer) -> Option<&'static str> {
    answer.task_id.as_ref()?;
    match answer.answer.as_str() {
        "pending" => Some("the node does not know it; it is cancelled when it comes"),
        "settled" => Some("it has ended already; how it ended is reported again"),
        _ => None,
    }
}

/// How a task ended, as a sentence.
pub(super) fn outcome(event: &Event) -> String {
    let what = format!("{} of project {} on {}", event.kind, event.project_id, event.node);
    let how = match event.status {
        Status::Succeeded => "succeeded",
        Status::Failed => "failed",
        Status::Rejected => "was rejected",
        Status::Cancelled => "was cancelled",
        Status::Superseded => "was superseded by something newer",
        Status::Accepted | Status::Started | Status::Progress | Status::Retrying | Status::History => "goes on",
    };
    let sentence = match details(event) {
        Some(details) => format!("{what} {how}: {details}"),
        None => format!("{what} {how}"),
    };
    printable(&sentence)
}

/// What an event says beyond its status.
fn details(event: &Event) -> Option<String> {
    if let Some(error) = &event.error {
        let retry = error.retry_at.map(|at| format!(" (again at {})", at.strftime("%H:%M:%S"))).unwrap_or_default();
        return Some(format!("{}: {}{retry}", error.class, error.message));
    }
    if let Some(progress) = &event.progress {
        return Some(progress_words(progress));
    }
    let result = event.result.as_ref()?;
    let mut parts = Vec::new();
    if let Some(path) = &result.local_path {
        parts.push(path.clone());
    }
    match (&result.branch, &result.head) {
        (Some(branch), Some(head)) => parts.push(format!("{branch} at {}", short(head))),
        (Some(branch), None) => parts.push(format!("{branch}, no commit yet")),
        (None, Some(head)) => parts.push(format!("at {}", short(head))),
        (None, None) => {}
    }
    if result.updated == Some(false) {
        parts.push("already up to date".to_owned());
    }
    if let (Some(ahead), Some(behind)) = (result.ahead, result.behind) {
        parts.push(format!("{ahead} ahead, {behind} behind"));
    }
    if let Some(dirty) = result.dirty {
        parts.push(if dirty { "changed" } else { "clean" }.to_owned());
    }
    if let Some(bytes) = result.received_bytes.filter(|&bytes| bytes > 0) {
        parts.push(format!("{} received", ByteSize(bytes)));
    }
    if let Some(count) = result.submodules_changed {
        parts.push(format!("{count} submodules changed and were left as they are"));
    }
    if let Some(count) = result.lfs_changed {
        parts.push(format!("{count} LFS files changed and are pointers now"));
    }
    if let Some(backup) = &result.backup_ref {
        parts.push(format!("what was overwritten is in {backup}"));
    }
    if let Some(ms) = result.duration_ms {
        parts.push(format!("in {}", seconds(Duration::from_millis(ms))));
    }
    (!parts.is_empty()).then(|| parts.join(", "))
}

/// How far a running task is.
pub(super) fn progress_words(progress: &Progress) -> String {
    let mut words = vec![progress.phase.clone()];
    match progress.total {
        Some(total) => words.push(format!(" {} of {total}", progress.done)),
        None if progress.done > 0 => words.push(format!(" {}", progress.done)),
        None => {}
    }
    if progress.bytes > 0 {
        words.push(format!(", {}", ByteSize(progress.bytes)));
    }
    if let Some(rate) = progress.rate {
        words.push(format!(", {}/s", ByteSize(rate)));
    }
    if let Some(left) = progress.eta_secs {
        words.push(match left {
            0..60 => format!(", about {left} s left"),
            60..3600 => format!(", about {} min left", left.div_ceil(60)),
            _ => format!(", about {} h left", left.div_ceil(3600)),
        });
    }
    printable(&words.concat())
}

/// A time with one decimal.
fn seconds(time: Duration) -> String {
    format!("{:.1} s", time.as_secs_f64())
}

/// The first digits of a commit's name.
fn short(oid: &str) -> &str {
    oid.get(..12).unwrap_or(oid)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::protocol::Kind;

    fn event(extra: serde_json::Value) -> Event {
        let mut event = json!({"v": 1, "event_id": "e", "at": "2026-01-02T03:04:05.678Z", "node": "worker-001",
            "boot": "b", "seq": 1, "task_id": "t", "kind": "clone", "project_id": 42, "project_seq": 1, "round": 0,
            "attempt": 1, "status": "started", "project_status": "SYNCING"});
        event.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        serde_json::from_value(event).unwrap()
    }

    #[test]
    fn the_words_of_the_command_line_are_those_of_the_contract() {
        assert_eq!(KINDS, Kind::ALL.map(Kind::as_str));
        assert_eq!(STATUSES, Status::ALL.map(Status::as_str));
    }

    #[test]
    fn an_event_is_one_line() {
        assert_eq!(event_line(&event(json!({}))), "2026-01-02T03:04:05.678Z worker-001 clone  project 42 started    t");
        let retrying = event(json!({"status": "retrying", "attempt": 2, "error":
            {"class": "network", "message": "reset\n\u{1b}[31m", "retry_at": "2026-01-02T03:05:00Z"}}));
        let line = event_line(&retrying);
        assert!(line.contains("attempt 2: network: reset"), "{line}");
        assert!(line.ends_with("(again at 03:05:00)") && !line.chars().any(char::is_control), "{line}");
    }

    #[test]
    fn an_outcome_is_a_sentence() {
        let done = event(json!({"status": "succeeded", "result": {"local_path": "7_app", "branch": "main",
            "head": "0123456789abcdef0123456789abcdef01234567", "received_bytes": 2048, "duration_ms": 9120}}));
        assert_eq!(
            outcome(&done),
            "clone of project 42 on worker-001 succeeded: 7_app, main at 0123456789ab, 2.0 KiB received, in 9.1 s"
        );
        let failed = event(json!({"status": "failed", "error": {"class": "auth", "message": "refused"}}));
        assert_eq!(outcome(&failed), "clone of project 42 on worker-001 failed: auth: refused");
        assert_eq!(outcome(&event(json!({"status": "cancelled"}))), "clone of project 42 on worker-001 was cancelled");
    }

    #[test]
    fn progress_says_how_much_of_what() {
        let progress = |done, total, bytes| {
            progress_words(&Progress { phase: "receiving".to_owned(), done, total, bytes, ..Progress::default() })
        };
        assert_eq!(progress(5, Some(10), 1024), "receiving 5 of 10, 1.0 KiB");
        assert_eq!(progress(0, None, 0), "receiving");
        let paced = |rate, eta_secs| {
            progress_words(&Progress { phase: "receiving".to_owned(), rate, eta_secs, ..Progress::default() })
        };
        assert_eq!(paced(Some(2048), Some(12)), "receiving, 2.0 KiB/s, about 12 s left");
        assert_eq!(paced(None, Some(61)), "receiving, about 2 min left");
    }
}
