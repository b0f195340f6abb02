//! What a row says, and the sum that proves it.
//!
//! SQLite does not notice a flipped bit in the middle of a text. A row that does not match its sum is damage: what it
//! says is never acted on.

use sqlx::{Row as _, sqlite::SqliteRow};

use crate::{journal::Entry, protocol::TaskId};

/// FNV-1a over the parts of a row. Each step can be undone, so a single changed byte always changes the sum.
pub(super) fn sum(parts: &[&[u8]]) -> i64 {
    let mut sum = 0xcbf2_9ce4_8422_2325_u64;
    for part in parts {
        // No text of ours holds this byte: it keeps the parts apart.
        for byte in part.iter().chain(&[0xff]) {
            sum = (sum ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }
    sum.cast_signed()
}

/// The sum of an entry's row.
pub(super) fn entry_sum(task: &str, round: i64, body: &str) -> i64 {
    sum(&[task.as_bytes(), &round.to_be_bytes(), body.as_bytes()])
}

/// The sum of a note's row.
pub(super) fn note_sum(name: &str, value: &str) -> i64 {
    sum(&[name.as_bytes(), value.as_bytes()])
}

/// The entry in a row of `task, round, body, sum`; a row of an earlier version has no sum.
///
/// # Errors
/// What is wrong with the row.
pub(super) fn entry(row: &SqliteRow) -> Result<(TaskId, Entry), String> {
    let wrong = |error: sqlx::Error| format!("a row cannot be read: {error}");
    let (task, round): (String, i64) = (row.try_get(0).map_err(wrong)?, row.try_get(1).map_err(wrong)?);
    let (body, sum): (&str, Option<i64>) = (row.try_get(2).map_err(wrong)?, row.try_get(3).map_err(wrong)?);
    if sum.is_some_and(|sum| sum != entry_sum(&task, round, body)) {
        return Err("the row of a task does not match its sum".to_owned());
    }
    let entry: Entry = serde_json::from_str(body).map_err(|error| format!("the row of a task: {error}"))?;
    if i64::from(entry.round) != round {
        return Err("the row of a task is of another round than it says".to_owned());
    }
    let task = TaskId::new(task).map_err(|error| format!("the row of a task: {error}"))?;
    Ok((task, entry))
}

/// The name and value in a row of `name, value, sum`.
///
/// # Errors
/// What is wrong with the row.
pub(super) fn note(row: &SqliteRow) -> Result<(String, String), String> {
    let wrong = |error: sqlx::Error| format!("a note cannot be read: {error}");
    let (name, value): (String, String) = (row.try_get(0).map_err(wrong)?, row.try_get(1).map_err(wrong)?);
    let sum: Option<i64> = row.try_get(2).map_err(wrong)?;
    if sum.is_some_and(|sum| sum != note_sum(&name, &value)) {
        return Err(format!("the note {name:?} does not match its sum"));
    }
    Ok((name, value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_changed_byte_changes_the_sum() {
        let text = *b"{\"round\":0,\"digest\":\"d\"}";
        let right = sum(&[b"task", &text]);
        for place in 0..text.len() {
            for bit in 0..8 {
                let mut other = text;
                other[place] ^= 1 << bit;
                assert_ne!(sum(&[b"task", &other]), right);
            }
        }
        assert_ne!(sum(&[b"ab", b"c"]), sum(&[b"a", b"bc"]));
    }
}
