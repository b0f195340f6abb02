//! Pages in SQLite, in WAL mode with a full sync at each commit.
//!
//! A database that is damaged is never a reason not to start, nor to end: it is set aside, what can be read of it goes
//! into a fresh one, and the broker and the projects' own marks make up for the rest.

mod check;
mod recovery;
mod row;
mod signs;
mod upsert;

use std::{
    ffi::OsString,
    fs::File,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

use async_trait::async_trait;
use jiff::Timestamp;
use rustix::fs::{FallocateFlags, fallocate};
use sqlx::{Connection as _, SqliteConnection, sqlite::SqliteRow};

use super::{JournalError, Rows, Write};
use crate::{journal::Entry, protocol::TaskId};
use upsert::{LARGEST_STATEMENT, NOTES_AT_ONCE};

/// The tables. An entry is one JSON text: only what is searched for has a column of its own.
///
/// A row is about a kilobyte, of which a table without row numbers keeps a part on a page of its own: it writes three times
/// as many pages where identities come in order, and five times where they come by chance. Journals that were made so stay
/// so, and every statement fits both. The indexes hold whole keys, for a table that cannot be read.
const SCHEMA: &str = "
CREATE TABLE IF NOT EXISTS entry (
    task TEXT NOT NULL,
    round INTEGER NOT NULL,
    seen INTEGER NOT NULL,
    owes INTEGER NOT NULL,
    waiting_clone INTEGER NOT NULL,
    running INTEGER NOT NULL DEFAULT 0,
    body TEXT NOT NULL,
    sum INTEGER,
    PRIMARY KEY (task, round)
);
CREATE INDEX IF NOT EXISTS entry_seen ON entry (seen, task, round);
CREATE INDEX IF NOT EXISTS entry_owes ON entry (task, round) WHERE owes;
CREATE INDEX IF NOT EXISTS entry_waiting_clone ON entry (task, round) WHERE waiting_clone;
CREATE INDEX IF NOT EXISTS entry_running ON entry (task, round) WHERE running;
CREATE TABLE IF NOT EXISTS note (name TEXT PRIMARY KEY, value TEXT NOT NULL, sum INTEGER) WITHOUT ROWID;
";

/// Held back on disk beside the database, so that what was begun on a disk that filled up can still be settled. A batch
/// of the largest size writes less than this.
const RESERVE: u64 = 4 * 1024 * 1024;

/// Pages in an SQLite database.
pub struct SqliteRows {
    /// The database, or what is wrong with it while it is none.
    connection: Result<SqliteConnection, String>,
    path: PathBuf,
}

impl SqliteRows {
    /// Opens the database at `path`, making it if it is not there. One that is damaged is set aside, and what can be
    /// read of it is taken over.
    ///
    /// # Errors
    /// When it cannot be opened or made, or was written by a later version.
    pub async fn open(path: &Path) -> Result<Self, JournalError> {
        recovery::finish(path)?;
        let opened = match signs::look(path, &reserve(path)) {
            Ok(left) => check::connect(path, &left).await,
            Err(reason) => Err(damaged(path, reason)),
        };
        let connection = match opened {
            Err(JournalError::Damaged { reason, .. }) => {
                recovery::recover(path, &reason).await?;
                check::connect(path, &signs::Left::default()).await?
            }
            other => other?,
        };
        let mut rows = Self { connection: Ok(connection), path: path.to_owned() };
        if let Err(error) = rows.replenish().await {
            tracing::warn!(error = %error, "the journal starts without its reserve");
        }
        Ok(rows)
    }

    fn database(&mut self) -> Result<&mut SqliteConnection, JournalError> {
        self.connection.as_mut().map_err(|reason| damaged(&self.path, reason.clone()))
    }

    /// One question for a batch of the usual kind: each costs a change of threads, which is dearer than a row.
    async fn write_all(&mut self, batch: &[Write]) -> Result<(), JournalError> {
        let (entries, notes) = upsert::rows_of(batch);
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
        let query = upsert::query(entries, notes, whole);
        query.execute(self.database()?).await.map(drop).map_err(self.written())
    }

    async fn run(&mut self, doing: &'static str, sql: &'static str) -> Result<(), JournalError> {
        let done = sqlx::query(sql).execute(self.database()?).await;
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

    /// Entries with their tasks. One row that cannot be believed is damage: nobody knows what else is wrong.
    fn entries_of_rows(&self, rows: &[SqliteRow]) -> Result<Vec<(TaskId, Entry)>, JournalError> {
        rows.iter().map(row::entry).collect::<Result<_, _>>().map_err(|reason| damaged(&self.path, reason))
    }

    async fn select(&mut self, sql: &'static str) -> Result<Vec<(TaskId, Entry)>, JournalError> {
        let rows = sqlx::query(sql).fetch_all(self.database()?).await.map_err(self.read())?;
        self.entries_of_rows(&rows)
    }
}

/// Where the reserve of the journal at `path` is.
fn reserve(path: &Path) -> PathBuf {
    path.with_extension("reserve")
}

/// A file beside `path`, of the same name with this ending.
fn beside(path: &Path, ending: &str) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(ending);
    name.into()
}

fn damaged(path: &Path, reason: String) -> JournalError {
    JournalError::Damaged { path: path.display().to_string(), reason }
}

fn database(path: &Path, doing: &'static str, error: &sqlx::Error) -> JournalError {
    let reason = error.to_string();
    if check::is_damage(error) {
        return damaged(path, reason);
    }
    JournalError::Database { path: path.display().to_string(), doing, reason }
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
        std::fs::remove_file(reserve(&self.path)).is_ok()
    }

    async fn replenish(&mut self) -> Result<(), JournalError> {
        let path = reserve(&self.path);
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

    async fn renew(&mut self, reason: &str) -> Result<(), JournalError> {
        // Closed before its files are moved: at its end it removes its log by name.
        if let Ok(connection) = std::mem::replace(&mut self.connection, Err(reason.to_owned())) {
            drop(connection.close().await);
        }
        recovery::finish(&self.path)?;
        recovery::recover(&self.path, reason).await?;
        self.connection = Ok(check::connect(&self.path, &signs::Left::default()).await?);
        Ok(())
    }

    async fn close(&mut self) {
        if let Ok(connection) = std::mem::replace(&mut self.connection, Err("it is closed".to_owned())) {
            // What fails here leaves the log, and the next start looks closer.
            drop(connection.close().await);
        }
    }

    async fn entries(&mut self, task: &TaskId) -> Result<Vec<Entry>, JournalError> {
        let rows = sqlx::query("SELECT task, round, body, sum FROM entry WHERE task = ? ORDER BY round")
            .bind(task.as_str())
            .fetch_all(self.database()?)
            .await
            .map_err(self.read())?;
        Ok(self.entries_of_rows(&rows)?.into_iter().map(|(_, entry)| entry).collect())
    }

    async fn entries_of(&mut self, tasks: &[TaskId]) -> Result<Vec<(TaskId, Entry)>, JournalError> {
        // Their alphabet needs no escapes, but nobody has to rely on it.
        let tasks = serde_json::to_string(tasks).expect("identities serialise");
        let rows = sqlx::query(
            "SELECT task, round, body, sum FROM entry WHERE task IN (SELECT value FROM json_each(?)) ORDER BY task, round",
        )
        .bind(tasks)
        .fetch_all(self.database()?)
        .await
        .map_err(self.read())?;
        self.entries_of_rows(&rows)
    }

    async fn owing(&mut self) -> Result<Vec<(TaskId, Entry)>, JournalError> {
        self.select("SELECT task, round, body, sum FROM entry WHERE owes ORDER BY task, round").await
    }

    async fn waiting_clones(&mut self) -> Result<Vec<(TaskId, Entry)>, JournalError> {
        self.select("SELECT task, round, body, sum FROM entry WHERE waiting_clone ORDER BY task, round").await
    }

    async fn running(&mut self) -> Result<Vec<(TaskId, Entry)>, JournalError> {
        self.select("SELECT task, round, body, sum FROM entry WHERE running ORDER BY task, round").await
    }

    async fn note(&mut self, name: &str) -> Result<Option<String>, JournalError> {
        let row = sqlx::query("SELECT name, value, sum FROM note WHERE name = ?")
            .bind(name)
            .fetch_optional(self.database()?)
            .await
            .map_err(self.read())?;
        let note = row.as_ref().map(row::note).transpose().map_err(|reason| damaged(&self.path, reason))?;
        Ok(note.map(|(_, value)| value))
    }

    async fn notes(&mut self, prefix: &str) -> Result<Vec<(String, String)>, JournalError> {
        let rows =
            sqlx::query("SELECT name, value, sum FROM note WHERE substr(name, 1, length(?1)) = ?1 ORDER BY name")
                .bind(prefix)
                .fetch_all(self.database()?)
                .await
                .map_err(self.read())?;
        rows.iter().map(row::note).collect::<Result<_, _>>().map_err(|reason| damaged(&self.path, reason))
    }

    async fn prune(&mut self, limit: Timestamp, most: u32) -> Result<u64, JournalError> {
        let done = sqlx::query(
            "DELETE FROM entry WHERE (task, round) IN
             (SELECT task, round FROM entry WHERE seen < ? AND NOT owes ORDER BY seen LIMIT ?)",
        )
        .bind(limit.as_second())
        .bind(most)
        .execute(self.database()?)
        .await;
        done.map(|done| done.rows_affected()).map_err(self.written())
    }
}
