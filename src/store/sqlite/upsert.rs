//! The statements that write a batch: a few texts, each for up to so many rows, so that SQLite keeps them prepared.

use std::{collections::BTreeMap, sync::LazyLock};

use sqlx::{Sqlite, query::Query, sqlite::SqliteArguments};

use super::row;
use crate::{
    journal::{Entry, Phase},
    protocol::TaskId,
    store::Write,
};

/// Entries that one statement writes at most.
pub(super) const LARGEST_STATEMENT: usize = 256;
/// Notes that one statement writes at most; a batch seldom has more than one.
pub(super) const NOTES_AT_ONCE: usize = 4;
/// Columns of an entry.
const COLUMNS: usize = 8;

/// A statement that writes up to so many entries, and notes.
struct Statement {
    sql: String,
    /// Entries that it takes.
    rows: usize,
    /// Whether it takes notes.
    notes: bool,
}

/// A note and its value, if it is not to be forgotten.
type Note<'a> = (&'a str, Option<&'a str>);

/// A batch by its rows; of several writes to one note the last counts.
pub(super) fn rows_of(batch: &[Write]) -> (Vec<(&TaskId, &Entry)>, Vec<Note<'_>>) {
    let mut entries = Vec::with_capacity(batch.len());
    let mut notes = BTreeMap::new();
    for write in batch {
        match write {
            Write::Entry(task, entry) => entries.push((task, entry.as_ref())),
            Write::Note(name, value) => drop(notes.insert(name.as_str(), value.as_deref())),
        }
    }
    (entries, notes.into_iter().collect())
}

/// Writes so many rows as one statement takes, as a transaction of their own where `whole`.
pub(super) fn query<'a>(
    entries: &[(&'a TaskId, &Entry)],
    notes: &[Note<'a>],
    whole: bool,
) -> Query<'a, Sqlite, SqliteArguments> {
    let text = statement(entries.len(), !notes.is_empty(), whole);
    let mut query = sqlx::query(text.sql.as_str());
    for (task, entry) in entries {
        let (task, round) = (task.as_str(), i64::from(entry.round));
        let body = serde_json::to_string(entry).expect("an entry serialises");
        let sum = row::entry_sum(task, round, &body);
        query = query
            .bind(task)
            .bind(round)
            .bind(entry.seen.as_second())
            .bind(entry.owes())
            .bind(entry.waiting_clone().is_some())
            .bind(matches!(entry.phase, Phase::Running { .. }))
            .bind(body)
            .bind(sum);
    }
    // What is not bound is null; it is bound all the same, since something may follow.
    for _ in 0..(text.rows - entries.len()) * COLUMNS {
        query = query.bind(None::<i64>);
    }
    if text.notes {
        for at in 0..NOTES_AT_ONCE {
            let (name, value) = notes.get(at).copied().unzip();
            let value = value.flatten();
            query = query.bind(name).bind(value).bind(name.zip(value).map(|(name, value)| row::note_sum(name, value)));
        }
        for at in 0..NOTES_AT_ONCE {
            query = query.bind(notes.get(at).filter(|(_, value)| value.is_none()).map(|(name, _)| *name));
        }
    }
    query
}

/// The smallest of a few statements that takes so many entries: SQLite keeps each prepared, and rows that are left over
/// are null and cost next to nothing.
fn statement(entries: usize, notes: bool, whole: bool) -> &'static Statement {
    const SIZES: [usize; 8] = [0, 1, 4, 12, 32, 64, 128, LARGEST_STATEMENT];
    static STATEMENTS: LazyLock<Vec<Statement>> = LazyLock::new(|| {
        let kinds = [(false, false), (false, true), (true, false), (true, true)];
        SIZES.iter().flat_map(|&rows| kinds.map(|(notes, whole)| Statement::new(rows, notes, whole))).collect()
    });
    let size = SIZES.iter().position(|&rows| rows >= entries).unwrap_or(SIZES.len() - 1);
    &STATEMENTS[size * 4 + usize::from(notes) * 2 + usize::from(whole)]
}

impl Statement {
    fn new(rows: usize, notes: bool, whole: bool) -> Self {
        let listed = |row: &str, count: usize| vec![row; count].join(",");
        let entries = format!(
            "INSERT INTO entry (task, round, seen, owes, waiting_clone, running, body, sum)
             SELECT column1, column2, column3, column4, column5, column6, column7, column8
             FROM (VALUES {}) WHERE column1 IS NOT NULL
             ON CONFLICT (task, round) DO UPDATE SET
             seen = excluded.seen, owes = excluded.owes, waiting_clone = excluded.waiting_clone,
             running = excluded.running, body = excluded.body, sum = excluded.sum;",
            listed("(?,?,?,?,?,?,?,?)", rows)
        );
        let memos = format!(
            "INSERT INTO note (name, value, sum) SELECT column1, column2, column3
             FROM (VALUES {}) WHERE column2 IS NOT NULL
             ON CONFLICT (name) DO UPDATE SET value = excluded.value, sum = excluded.sum;
             DELETE FROM note WHERE name IN ({});",
            listed("(?,?,?)", NOTES_AT_ONCE),
            listed("?", NOTES_AT_ONCE)
        );
        let parts = [(whole, "BEGIN IMMEDIATE;"), (rows > 0, &entries), (notes, &memos), (whole, "COMMIT;")];
        let sql = parts.into_iter().filter(|(wanted, _)| *wanted).map(|(_, part)| part).collect();
        Self { sql, rows, notes }
    }
}
