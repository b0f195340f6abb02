//! The statements that write a batch: a few texts, each for up to so many rows, so that SQLite keeps them prepared.

use std::sync::LazyLock;

/// Entries that one statement writes at most.
pub(super) const LARGEST_STATEMENT: usize = 256;
/// Notes that one statement writes at most; a batch seldom has more than one.
pub(super) const NOTES_AT_ONCE: usize = 4;
/// Columns of an entry.
pub(super) const COLUMNS: usize = 6;

/// A statement that writes up to so many entries, and notes.
pub(super) struct Statement {
    pub(super) sql: String,
    /// Entries that it takes.
    pub(super) rows: usize,
    /// Whether it takes notes.
    pub(super) notes: bool,
}

/// The smallest of a few statements that takes so many entries: SQLite keeps each prepared, and rows that are left over
/// are null and cost next to nothing.
pub(super) fn statement(entries: usize, notes: bool, whole: bool) -> &'static Statement {
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
        let mut sql = String::new();
        if whole {
            sql.push_str("BEGIN IMMEDIATE;");
        }
        if rows > 0 {
            let values = listed("(?,?,?,?,?,?)", rows);
            sql.push_str(&format!(
                "INSERT INTO entry (task, round, seen, owes, waiting_clone, body)
                 SELECT column1, column2, column3, column4, column5, column6 FROM (VALUES {values})
                 WHERE column1 IS NOT NULL
                 ON CONFLICT (task, round) DO UPDATE SET seen = excluded.seen, owes = excluded.owes,
                 waiting_clone = excluded.waiting_clone, body = excluded.body;"
            ));
        }
        if notes {
            let (values, names) = (listed("(?,?)", NOTES_AT_ONCE), listed("?", NOTES_AT_ONCE));
            sql.push_str(&format!(
                "INSERT INTO note (name, value) SELECT column1, column2 FROM (VALUES {values}) WHERE column2 IS NOT NULL
                 ON CONFLICT (name) DO UPDATE SET value = excluded.value;
                 DELETE FROM note WHERE name IN ({names});"
            ));
        }
        if whole {
            sql.push_str("COMMIT;");
        }
        Self { sql, rows, notes }
    }
}
