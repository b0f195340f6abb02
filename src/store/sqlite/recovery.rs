//! Setting a damaged database aside, with what can be read of it taken over into a fresh one.
//!
//! The fresh one is made whole beside it, under another name, before anything is moved; from then on every step is a
//! rename, and [`finish`] goes on where a crash came between two of them.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use futures_util::TryStreamExt as _;
use jiff::Timestamp;
use sqlx::{Connection as _, Row as _, SqliteConnection};

use super::{
    SCHEMA, beside,
    check::options,
    database, reserve, row,
    row::{entry_sum, note_sum},
};
use crate::{
    journal::{Entry, Phase},
    protocol::TaskId,
    store::{JournalError, LAST_ARRIVAL, SET_ASIDE},
};

/// What SQLite keeps beside a database.
const LOGS: [&str; 3] = ["-wal", "-shm", "-journal"];
/// How many damaged journals are kept for a look.
const KEPT: usize = 3;
/// The longest salvage: what is owed comes first, and what is left behind was settled long ago or is delivered again.
const LONGEST_SALVAGE: Duration = Duration::from_mins(1);
/// Rows that one commit takes over.
const AT_A_TIME: u64 = 5000;
/// Rows that are looked for one by one where the table cannot be gone through.
const ONE_BY_ONE: &str = "SELECT task, round FROM entry INDEXED BY entry_seen ORDER BY seen DESC LIMIT 1000000";

/// What was taken over.
#[derive(Debug, Default)]
struct Salvaged {
    entries: u64,
    notes: u64,
    /// Rows that were there and not to be believed.
    refused: u64,
    last_arrival: i64,
    pending: u64,
}

/// Ends a recovery that a crash cut short.
///
/// # Errors
/// When the files cannot be moved.
pub(super) fn finish(path: &Path) -> Result<(), JournalError> {
    let fresh = beside(path, ".salvaged");
    let moved = match (path.exists(), fresh.exists()) {
        (false, true) => put(&fresh, path),
        // The damaged one has not been moved: it is looked at again.
        (true, true) => remove(&fresh),
        _ => Ok(()),
    };
    moved.map_err(|error| io_error(path, "recovered", &error))
}

/// Sets the database at `path` aside, which nobody has open, and puts a fresh one in its place.
///
/// # Errors
/// When the fresh one cannot be made, or files cannot be moved.
pub(super) async fn recover(path: &Path, reason: &str) -> Result<(), JournalError> {
    let mut made = salvage(path).await;
    if made.is_err() && fs::remove_file(reserve(path)).is_ok() {
        // The disk may be full: this is what the reserve is for.
        made = salvage(path).await;
    }
    let (fresh, salvaged) = made?;
    let moved = set_aside(path).and_then(|aside| put(&fresh, path).map(|()| aside));
    let aside = moved.map_err(|error| io_error(path, "set aside", &error))?;
    tracing::error!(
        path = %path.display(),
        reason,
        set_aside = aside.map(|aside| aside.display().to_string()),
        entries.salvaged = salvaged.entries,
        entries.refused = salvaged.refused,
        notes.salvaged = salvaged.notes,
        "the journal is damaged: it is set aside and a fresh one begun with what could be read of it; tasks that the \
         broker delivers again may run again, and a pause may be forgotten; check the disk, and remove the file once \
         you have looked at it"
    );
    Ok(())
}

/// Makes the fresh database, whole and on disk, under the name that [`finish`] knows.
async fn salvage(path: &Path) -> Result<(PathBuf, Salvaged), JournalError> {
    let (making, made) = (beside(path, ".salvaging"), beside(path, ".salvaged"));
    remove(&making).map_err(|error| io_error(path, "recovered", &error))?;
    let written = |error: sqlx::Error| database(path, "recovered", &error);
    let mut target =
        SqliteConnection::connect_with(&options(&making).create_if_missing(true)).await.map_err(written)?;
    let salvaged = take_over(path, &mut target).await;
    let closed = target.close().await;
    let salvaged = salvaged.map_err(written)?;
    closed.map_err(written)?;
    let synced = File::open(&making).and_then(|file| file.sync_all()).and_then(|()| put(&making, &made));
    synced.map_err(|error| io_error(path, "recovered", &error))?;
    Ok((made, salvaged))
}

/// Takes over what can be read; only what cannot be written is an error.
async fn take_over(path: &Path, target: &mut SqliteConnection) -> Result<Salvaged, sqlx::Error> {
    sqlx::raw_sql(SCHEMA).execute(&mut *target).await?;
    sqlx::query("BEGIN").execute(&mut *target).await?;
    let mut salvaged = Salvaged::default();
    // Of an empty one SQLite would remove the log.
    if fs::metadata(path).is_ok_and(|found| found.len() > 0)
        && let Ok(mut source) = SqliteConnection::connect_with(&options(path).read_only(true)).await
    {
        let begun = Instant::now();
        // A tree that is bent into a ring could be gone through for ever.
        if let Ok(mut handle) = source.lock_handle().await {
            handle.set_progress_handler(10_000, move || begun.elapsed() < LONGEST_SALVAGE);
        }
        // Lets SQLite read a file that is shorter than it says.
        drop(sqlx::query("PRAGMA writable_schema = ON").execute(&mut source).await);
        let taken = salvaged.everything(&mut source, target).await;
        drop(source.close().await);
        taken?;
    }
    salvaged.last_arrival(target).await?;
    put_note(target, SET_ASIDE, &Timestamp::now().to_string()).await?;
    sqlx::raw_sql(super::check::MARK).execute(&mut *target).await?;
    sqlx::query("COMMIT").execute(&mut *target).await?;
    Ok(salvaged)
}

impl Salvaged {
    async fn everything(
        &mut self,
        source: &mut SqliteConnection,
        target: &mut SqliteConnection,
    ) -> Result<(), sqlx::Error> {
        self.notes(source, target).await?;
        // What is owed, and what others wait for, first: there is little of it, and it matters most.
        for few in [
            "SELECT task, round FROM entry INDEXED BY entry_owes WHERE owes",
            "SELECT task, round FROM entry INDEXED BY entry_running WHERE running",
            "SELECT task, round FROM entry INDEXED BY entry_waiting_clone WHERE waiting_clone",
        ] {
            self.by_keys(few, source, target).await?;
        }
        // From the front to the first page that cannot be read, and from the back to the last one.
        let whole = self.scan("SELECT task, round, body, sum FROM entry NOT INDEXED", source, target).await?;
        if !whole {
            // A table of before has no row numbers, and is in the order of its keys.
            for backwards in [
                "SELECT task, round, body, sum FROM entry ORDER BY rowid DESC",
                "SELECT task, round, body, sum FROM entry ORDER BY task DESC, round DESC",
            ] {
                self.scan(backwards, source, target).await?;
            }
            self.by_keys(ONE_BY_ONE, source, target).await?;
        }
        Ok(())
    }

    /// Takes over rows in their order; false if it could not go to the end.
    async fn scan(
        &mut self,
        sql: &'static str,
        source: &mut SqliteConnection,
        target: &mut SqliteConnection,
    ) -> Result<bool, sqlx::Error> {
        let mut rows = sqlx::query(sql).fetch(source);
        loop {
            match rows.try_next().await {
                Ok(Some(found)) => match row::entry(&found) {
                    Ok((task, entry)) => self.keep(&task, &entry, target).await?,
                    Err(_) => self.refused += 1,
                },
                Ok(None) => return Ok(true),
                Err(_) => return Ok(false),
            }
        }
    }

    /// Takes over the rows whose keys an index still knows.
    async fn by_keys(
        &mut self,
        sql: &'static str,
        source: &mut SqliteConnection,
        target: &mut SqliteConnection,
    ) -> Result<(), sqlx::Error> {
        let mut keys: Vec<(String, i64)> = Vec::new();
        {
            let mut rows = sqlx::query(sql).fetch(&mut *source);
            // An index ends where it cannot be read.
            while let Ok(Some(row)) = rows.try_next().await {
                if let (Ok(task), Ok(round)) = (row.try_get(0), row.try_get(1)) {
                    keys.push((task, round));
                }
            }
        }
        for (task, round) in keys {
            let there = sqlx::query("SELECT 1 FROM entry WHERE task = ? AND round = ?").bind(&task).bind(round);
            if there.fetch_optional(&mut *target).await?.is_some() {
                continue;
            }
            let wanted = sqlx::query("SELECT task, round, body, sum FROM entry WHERE task = ? AND round = ?");
            if let Ok(Some(found)) = wanted.bind(&task).bind(round).fetch_optional(&mut *source).await
                && let Ok((task, entry)) = row::entry(&found)
            {
                self.keep(&task, &entry, target).await?;
            }
        }
        Ok(())
    }

    async fn notes(&mut self, source: &mut SqliteConnection, target: &mut SqliteConnection) -> Result<(), sqlx::Error> {
        let mut rows = sqlx::query("SELECT name, value, sum FROM note ORDER BY name").fetch(source);
        while let Ok(Some(found)) = rows.try_next().await {
            match row::note(&found) {
                Ok((name, value)) => {
                    put_note(target, &name, &value).await?;
                    self.notes += 1;
                    if name == LAST_ARRIVAL {
                        self.last_arrival = self.last_arrival.max(value.parse().unwrap_or(0));
                    }
                }
                Err(_) => self.refused += 1,
            }
        }
        Ok(())
    }

    async fn keep(&mut self, task: &TaskId, entry: &Entry, target: &mut SqliteConnection) -> Result<(), sqlx::Error> {
        let body = serde_json::to_string(entry).expect("an entry serialises");
        let done = sqlx::query(
            "INSERT OR IGNORE INTO entry (task, round, seen, owes, waiting_clone, running, body, sum)
             VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        )
        .bind(task.as_str())
        .bind(i64::from(entry.round))
        .bind(entry.seen.as_second())
        .bind(entry.owes())
        .bind(entry.waiting_clone().is_some())
        .bind(matches!(entry.phase, Phase::Running { .. }))
        .bind(&body)
        .bind(entry_sum(task.as_str(), i64::from(entry.round), &body))
        .execute(&mut *target)
        .await?;
        self.entries += done.rows_affected();
        self.last_arrival = self.last_arrival.max(entry.place.arrived);
        self.pending += 1;
        if self.pending >= AT_A_TIME {
            self.pending = 0;
            sqlx::raw_sql("COMMIT; BEGIN").execute(&mut *target).await?;
        }
        Ok(())
    }

    /// The order of arrival goes on after everything that is known.
    async fn last_arrival(&self, target: &mut SqliteConnection) -> Result<(), sqlx::Error> {
        match self.last_arrival {
            0 => Ok(()),
            last => put_note(target, LAST_ARRIVAL, &last.to_string()).await,
        }
    }
}

async fn put_note(target: &mut SqliteConnection, name: &str, value: &str) -> Result<(), sqlx::Error> {
    let put = sqlx::query("INSERT OR REPLACE INTO note (name, value, sum) VALUES (?, ?, ?)");
    put.bind(name).bind(value).bind(note_sum(name, value)).execute(target).await.map(drop)
}

/// Moves what is at `path` and its logs out of the way, and removes the oldest of what was moved before; the new name,
/// if there was a database.
fn set_aside(path: &Path) -> io::Result<Option<PathBuf>> {
    let stamp = Timestamp::now().strftime("%Y%m%dT%H%M%S%.3fZ").to_string();
    let mut aside = beside(path, &format!(".damaged-{stamp}"));
    for number in 2.. {
        if !aside.exists() {
            break;
        }
        aside = beside(path, &format!(".damaged-{stamp}-{number}"));
    }
    for ending in LOGS {
        rename_if_there(&beside(path, ending), &beside(&aside, ending))?;
    }
    let moved = rename_if_there(path, &aside)?;
    for old in older_than_kept(path)? {
        for ending in LOGS {
            let _ = fs::remove_file(beside(&old, ending));
        }
        let _ = fs::remove_file(old);
    }
    Ok(moved.then_some(aside))
}

/// The damaged ones beyond those that are kept. Their names sort by time.
fn older_than_kept(path: &Path) -> io::Result<Vec<PathBuf>> {
    let (Some(directory), Some(name)) = (path.parent(), path.file_name()) else { return Ok(Vec::new()) };
    let head = format!("{}.damaged-", name.to_string_lossy());
    let mut damaged = Vec::new();
    for entry in fs::read_dir(directory)? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if name.starts_with(&head) && !LOGS.iter().any(|ending| name.ends_with(ending)) {
            damaged.push(directory.join(name));
        }
    }
    damaged.sort();
    damaged.truncate(damaged.len().saturating_sub(KEPT));
    Ok(damaged)
}

fn rename_if_there(from: &Path, to: &Path) -> io::Result<bool> {
    match fs::rename(from, to) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// Renames, durably.
fn put(from: &Path, to: &Path) -> io::Result<()> {
    fs::rename(from, to)?;
    let directory = to.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(directory)?.sync_all()
}

/// Removes a database that is not wanted, with its logs.
fn remove(path: &Path) -> io::Result<()> {
    for file in LOGS.iter().map(|ending| beside(path, ending)).chain([path.to_owned()]) {
        match fs::remove_file(file) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

fn io_error(path: &Path, doing: &'static str, error: &io::Error) -> JournalError {
    JournalError::Database { path: path.display().to_string(), doing, reason: error.to_string() }
}
