//! Dead letters in words, for people and programs.

use std::time::Duration;

use jiff::Timestamp;
use serde::Serialize;
use serde_json::json;

use crate::{
    cli::{error::CliError, output, table::Table},
    dead::{Fate, Found, Letter, Summary},
    protocol::printable,
    shutdown::exit,
};

/// What is told of each letter, and how it all ended.
pub(super) struct Report {
    json: bool,
    failed: Option<CliError>,
}

/// One letter and what became of it, as JSON.
#[derive(Serialize)]
struct Told<'a> {
    #[serde(flatten)]
    letter: &'a Letter,
    #[serde(flatten)]
    fate: &'a Fate,
}

impl Report {
    pub(super) fn new(json: bool) -> Self {
        Self { json, failed: None }
    }

    pub(super) fn tell(&mut self, letter: &Letter, fate: &Fate) {
        let told = if self.json {
            output::json(&Told { letter, fate })
        } else {
            output::line(&printable(&format!("{} {}", name(letter), words(fate))))
        };
        // The work goes on even where nobody can be told.
        if let Err(error) = told {
            self.failed.get_or_insert(error);
        }
    }

    pub(super) fn end(self, summary: Summary, done: &str) -> Result<u8, CliError> {
        let left = if summary.left > 0 { format!(", {} left in the queue", summary.left) } else { String::new() };
        let mut sentence = format!("{} of {} dead letters {done}{left}", summary.done, summary.matched);
        if summary.interrupted {
            sentence.push_str("; it ended early, and the rest was not touched");
        }
        output::note(&sentence);
        match self.failed {
            Some(error) => Err(error),
            None if summary.left > 0 => Ok(exit::TASK),
            None if summary.interrupted => Ok(exit::INTERRUPTED),
            None => Ok(exit::OK),
        }
    }
}

fn words(fate: &Fate) -> String {
    match fate {
        Fate::Replayed => "replayed".to_owned(),
        Fate::WouldReplay => "would be replayed".to_owned(),
        Fate::Dropped => "dropped".to_owned(),
        Fate::WouldDrop => "would be dropped".to_owned(),
        Fate::Left { reason } => format!("left: {reason}"),
        Fate::SentAndLeft => "replayed, but the letter could not be removed; replaying it again is harmless".to_owned(),
    }
}

fn name(letter: &Letter) -> String {
    let kind = letter.kind.as_deref().unwrap_or("?");
    let project = letter.project_id.map_or_else(|| "?".to_owned(), |id| id.to_string());
    let node = letter.node.as_ref().map_or("?", |node| node.as_str());
    format!("{} ({kind} of project {project} on {node}, {})", letter.task_id.as_deref().unwrap_or("?"), letter.class)
}

/// The letters as a table.
pub(in crate::cli) fn print_table(found: &[Found], now: Timestamp) -> Result<(), CliError> {
    let mut table = Table::new(["#", "TASK", "NODE", "KIND", "PROJECT", "CLASS", "ATTEMPTS", "AGE", "ERROR"]);
    for Found { letter, .. } in found {
        let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
        table.row([
            letter.position.to_string(),
            or_dash(letter.task_id.clone()),
            or_dash(letter.node.as_ref().map(ToString::to_string)),
            or_dash(letter.kind.clone()),
            or_dash(letter.project_id.map(|id| id.to_string())),
            letter.class.clone(),
            or_dash(letter.attempts.map(|attempts| attempts.to_string())),
            or_dash(letter.age(now).map(age)),
            letter.error.clone(),
        ]);
    }
    table.lines().iter().try_for_each(|line| output::line(line))
}

/// One letter with headers and body.
pub(super) fn print_whole(found: &Found, json: bool) -> Result<(), CliError> {
    let message = &found.message;
    let body: Option<serde_json::Value> = serde_json::from_slice(&message.body).ok();
    let text = String::from_utf8_lossy(&message.body).into_owned();
    if json {
        let mut value = json!(found.letter);
        value["headers"] = json!(message.headers);
        value["content_type"] = json!(message.content_type);
        value["type"] = json!(message.type_);
        value["timestamp"] = json!(message.timestamp);
        value["body"] = body.unwrap_or(serde_json::Value::String(text));
        return output::json(&value);
    }
    let print = |text: &str| text.lines().try_for_each(|line| output::line(&printable(line)));
    print(&name(&found.letter))?;
    print(&format!("  error: {}", found.letter.error))?;
    for entry in &found.letter.history {
        print(&format!("  before: {entry}"))?;
    }
    print("  headers:")?;
    for (name, value) in &message.headers {
        print(&format!("    {name}: {}", value.to_string().replace('\n', " | ")))?;
    }
    print("  body:")?;
    let pretty = body.and_then(|body| serde_json::to_string_pretty(&body).ok()).unwrap_or(text);
    pretty.lines().try_for_each(|line| print(&format!("    {line}")))
}

/// A time in one unit.
fn age(time: Duration) -> String {
    match time.as_secs() {
        seconds @ 0..120 => format!("{seconds}s"),
        seconds @ 120..7200 => format!("{}m", seconds / 60),
        seconds @ 7200..172_800 => format!("{}h", seconds / 3600),
        seconds => format!("{}d", seconds / 86_400),
    }
}
