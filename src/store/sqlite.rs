//! Pages in SQLite, in WAL mode with a full sync at each commit.

mod upsert;

use std::{
    collections::BTreeMap,
    fs::File,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

use async_trait::async_trait;
use jiff::Timestamp;
use rustix::fs::{FallocateFlags, fallocate};
use sqlx::{
    ConnectOptions as _, Connection as _, Row as _, SqliteConnection,
    sqlite::{SqliteConnectOptions, SqliteJournalMode, SqliteRow, SqliteSynchronous},
};

use super::{JournalError, Rows, Write};
use crate::{journal::Entry, protocol::TaskId};
use upsert::{COLUMNS, LARGEST_STATEMENT, NOTES_AT_ONCE};

/// The tables. An entry is one JSON text: only what is searched for has a column of its own.
const SCHEMA: &str = "
CREATE TABLE IF NOT EXISTS entry (
    task TEXT NOT NULL,
    round INTEGER NOT NULL,
    seen INTEGER NOT NULL,
    owes INTEGER NOT NULL,
    waiting_clone INTEGER NOT NULL,
    body TEXT NOT NULL,
    PRIMARY KEY (task, round)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS entry_seen ON entry (seen);
CREATE INDEX IF NOT EXISTS entry_owes ON entry (task) WHERE owes;
CREATE INDEX IF NOT EXISTS entry_waiting_clone ON entry (task) WHERE waiting_clone;
CREATE TABLE IF NOT EXISTS note (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
";

/// Held back on disk beside the database, so that what was begun on a disk that filled up can still be settled. A batch
/// of the largest size writes less than this.
const RESERVE: u64 = 4 * 1024 * 1024;

/// Pages in an SQLite database.
pub struct SqliteRows {
    connection: SqliteConnection,
    path: PathBuf,
}

impl SqliteRows {
    /// Opens the database at `path`, making it if it is not there.
    ///
    /// # Errors
    /// When it cannot be opened, is damaged, or was written by a later version.
    pub async fn open(path: &Path) -> Result<Self, JournalError> {
        let options = SqliteConnectOptions::new()
            .filename(path)
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Full)
            .busy_timeout(std::time::Duration::from_secs(5))
            // A few pages are touched at a time: the default of 2 MB would only add to the idle agent.
            .pragma("cache_size", "-512")
            .disable_statement_logging();
        let failed = |doing| move |error: sqlx::Error| database(path, doing, &error);
        let mut connection = SqliteConnection::connect_with(&options).await.map_err(failed("opened"))?;
        sqlx::raw_sql(SCHEMA).execute(&mut connection).await.map_err(failed("prepared"))?;
        let mut rows = Self { connection, path: path.to_owned() };
        if let Err(error) = rows.replenish().await {
            tracing::warn!(error = %error, "the journal starts without its reserve");
        }
        Ok(rows)
    }

    fn reserve(&self) -> PathBuf {
        self.path.with_extension("reserve")
    }

    /// One question for a batch of the usual kind: each costs a change of threads, which is dearer than a row.
    async fn write_all(&mut self, batch: &[Write]) -> Result<(), JournalError> {
        let (entries, notes) = rows_of(batch);
        if entries.len() <= LARGEST_STATEMENT && notes.len() <= NOTES_AT_ONCE {
            return self.write_rows(&entries, &notes, true).await;
        }
        self.run("written", "BEGIN IMMEDIATE").await?;
        for entries in entries.chunks(LARGEST_STATEMENT) {
            self.write_rows(entries, &[], false).await?;
        }
        for notes in notes.chunks(NOTES_AT_ONCE) {
            self.write_rows(&[], notes, false).await?;
        }
        self.run("written", "COMMIT").await
    }

    /// Writes so many rows as one statement takes, as a transaction of their own where `whole`.
    async fn write_rows(
        &mut self,
        entries: &[(&TaskId, &Entry)],
        notes: &[(&str, Option<&str>)],
        whole: bool,
    ) -> Result<(), JournalError> {
        let text = upsert::statement(entries.len(), !notes.is_empty(), whole);
        let mut query = sqlx::query(text.sql.as_str());
        for (task, entry) in entries {
            query = query
                .bind(task.as_str())
                .bind(i64::from(entry.round))
                .bind(entry.seen.as_second())
                .bind(entry.owes())
                .bind(entry.waiting_clone().is_some())
                .bind(serde_json::to_string(entry).expect("an entry serialises"));
        }
        // What is not bound is null; it is bound all the same where something follows.
        for _ in 0..(text.rows - entries.len()) * COLUMNS {
            query = query.bind(None::<i64>);
        }
        if text.notes {
            for at in 0..NOTES_AT_ONCE {
                let (name, value) = notes.get(at).copied().unzip();
                query = query.bind(name).bind(value.flatten());
            }
            for at in 0..NOTES_AT_ONCE {
                query = query.bind(notes.get(at).filter(|(_, value)| value.is_none()).map(|(name, _)| *name));
            }
        }
        query.execute(&mut self.connection).await.map(drop).map_err(self.written())
    }

    async fn run(&mut self, doing: &'static str, sql: &'static str) -> Result<(), JournalError> {
        let done = sqlx::query(sql).execute(&mut self.connection).await;
        done.map(drop).map_err(|error| database(&self.path, doing, &error))
    }

    fn read(&self) -> impl Fn(sqlx::Error) -> JournalError + use<> {
        let path = self.path.clone();
        move |error| database(&path, "read", &error)
    }

    fn written(&self) -> impl Fn(sqlx::Error) -> JournalError + use<> {
        let path = self.path.clone();
        move |error| database(&path, "written", &error)
    }

    /// Entries with their tasks; a row that cannot be read (a later version's) is left out and logged.
    fn entries_of_rows(&self, rows: Vec<SqliteRow>) -> Vec<(TaskId, Entry)> {
        let read = |row: SqliteRow| {
            let task = TaskId::new(row.get::<String, _>(0)).ok()?;
            match serde_json::from_str(row.get::<&str, _>(1)) {
                Ok(entry) => Some((task, entry)),
                Err(error) => {
                    tracing::error!(task.id = %task, error = %error, path = %self.path.display(), "journal entry unreadable");
                    None
                }
            }
        };
        rows.into_iter().filter_map(read).collect()
    }
}

/// A batch by its rows; of several writes to one note the last counts.
fn rows_of(batch: &[Write]) -> (Vec<(&TaskId, &Entry)>, Vec<(&str, Option<&str>)>) {
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

fn database(path: &Path, doing: &'static str, error: &sqlx::Error) -> JournalError {
    JournalError::Database { path: path.display().to_string(), doing, reason: error.to_string() }
}

#[async_trait]
impl Rows for SqliteRows {
    async fn write(&mut self, batch: &[Write]) -> Result<(), JournalError> {
        let written = self.write_all(batch).await;
        if written.is_err() {
            // Fails where SQLite has rolled back by itself; either way nothing of the batch is left.
            drop(self.run("rolled back", "ROLLBACK").await);
        }
        written
    }

    async fn relieve(&mut self) -> bool {
        std::fs::remove_file(self.reserve()).is_ok()
    }

    async fn replenish(&mut self) -> Result<(), JournalError> {
        let path = self.reserve();
        let made = File::options().create(true).truncate(false).write(true).mode(0o600).open(&path).and_then(|file| {
            // Allocated, not sparse: a hole would hold nothing back.
            fallocate(&file, FallocateFlags::empty(), 0, RESERVE)?;
            file.sync_all()
        });
        if let Err(error) = made {
            drop(std::fs::remove_file(&path));
            let reason = format!("no room for its reserve: {error}");
            return Err(JournalError::Database { path: path.display().to_string(), doing: "written", reason });
        }
        let probe = [Write::Note("probe".to_owned(), Some(Timestamp::now().to_string()))];
        self.write(&probe).await
    }

    async fn entries(&mut self, task: &TaskId) -> Result<Vec<Entry>, JournalError> {
        let rows = sqlx::query("SELECT task, body FROM entry WHERE task = ? ORDER BY round")
            .bind(task.as_str())
            .fetch_all(&mut self.connection)
            .await
            .map_err(self.read())?;
        Ok(self.entries_of_rows(rows).into_iter().map(|(_, entry)| entry).collect())
    }

    async fn entries_of(&mut self, tasks: &[TaskId]) -> Result<Vec<(TaskId, Entry)>, JournalError> {
        // Their alphabet needs no escapes, but nobody has to rely on it.
        let tasks = serde_json::to_string(tasks).expect("identities serialise");
        let rows = sqlx::query(
            "SELECT task, body FROM entry WHERE task IN (SELECT value FROM json_each(?)) ORDER BY task, round",
        )
        .bind(tasks)
        .fetch_all(&mut self.connection)
        .await
        .map_err(self.read())?;
        Ok(self.entries_of_rows(rows))
    }

    async fn owing(&mut self) -> Result<Vec<(TaskId, Entry)>, JournalError> {
        let rows = sqlx::query("SELECT task, body FROM entry WHERE owes ORDER BY task, round")
            .fetch_all(&mut self.connection)
            .await
            .map_err(self.read())?;
        Ok(self.entries_of_rows(rows))
    }

    async fn waiting_clones(&mut self) -> Result<Vec<(TaskId, Entry)>, JournalError> {
        let rows = sqlx::query("SELECT task, body FROM entry WHERE waiting_clone ORDER BY task, round")
            .fetch_all(&mut self.connection)
            .await
            .map_err(self.read())?;
        Ok(self.entries_of_rows(rows))
    }

    async fn note(&mut self, name: &str) -> Result<Option<String>, JournalError> {
        let row = sqlx::query("SELECT value FROM note WHERE name = ?")
            .bind(name)
            .fetch_optional(&mut self.connection)
            .await
            .map_err(self.read())?;
        Ok(row.map(|row| row.get(0)))
    }

    async fn notes(&mut self, prefix: &str) -> Result<Vec<String>, JournalError> {
        let rows = sqlx::query("SELECT name FROM note WHERE substr(name, 1, length(?1)) = ?1 ORDER BY name")
            .bind(prefix)
            .fetch_all(&mut self.connection)
            .await
            .map_err(self.read())?;
        Ok(rows.into_iter().map(|row| row.get(0)).collect())
    }

    async fn prune(&mut self, limit: Timestamp, most: u32) -> Result<u64, JournalError> {
        let done = sqlx::query(
            "DELETE FROM entry WHERE (task, round) IN
             (SELECT task, round FROM entry WHERE seen < ? AND NOT owes ORDER BY seen LIMIT ?)",
        )
        .bind(limit.as_second())
        .bind(most)
        .execute(&mut self.connection)
        .await;
        done.map(|done| done.rows_affected()).map_err(self.written())
    }
}
