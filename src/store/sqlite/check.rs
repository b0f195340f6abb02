//! Opening a database, and looking whether it is one.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use sqlx::{ConnectOptions as _, Connection as _, Row as _, SqliteConnection, sqlite::SqliteConnectOptions};

use super::{SCHEMA, damaged, database, signs::Left};
use crate::store::JournalError;

/// The version of the tables.
const VERSION: i32 = 1;
/// Every journal of ours says so, with its version: one number alone could be another's after a flipped bit.
const APPLICATION: i32 = 0x4861_0000;
/// What writes both; [`APPLICATION`] and [`VERSION`] together are the application's number.
pub(super) const MARK: &str = "PRAGMA application_id = 1214316545; PRAGMA user_version = 1;";
/// What the tables of before versions were written lack.
const FROM_VERSION_0: &str = "
ALTER TABLE entry ADD COLUMN running INTEGER NOT NULL DEFAULT 0;
ALTER TABLE entry ADD COLUMN sum INTEGER;
ALTER TABLE note ADD COLUMN sum INTEGER;
";
/// The longest look at a journal of an agent that did not end well: a large one is believed after it. What is wrong
/// beyond that is found where it is read.
const LONGEST_LOOK: Duration = Duration::from_secs(2);
/// Steps of SQLite's machine between two looks at the clock.
const STEPS: i32 = 10_000;

/// Opens the database with nothing that touches the file yet: whatever fails then can be closed in order.
pub(super) fn options(path: &Path) -> SqliteConnectOptions {
    SqliteConnectOptions::new().filename(path).busy_timeout(Duration::from_secs(5)).disable_statement_logging()
}

/// Opens the database at `path`, making it if it is not there, and looks at it as closely as what was `left` of the
/// last agent asks for.
///
/// # Errors
/// When it cannot be opened or made, is damaged, or was written by a later version. Its files are free then.
pub(super) async fn connect(path: &Path, left: &Left) -> Result<SqliteConnection, JournalError> {
    let opened = SqliteConnection::connect_with(&options(path).create_if_missing(true)).await;
    let mut connection = opened.map_err(|error| database(path, "opened", &error))?;
    match prepare(&mut connection, path, left).await {
        Ok(()) => Ok(connection),
        Err(error) => {
            drop(connection.close().await);
            Err(error)
        }
    }
}

async fn prepare(connection: &mut SqliteConnection, path: &Path, left: &Left) -> Result<(), JournalError> {
    let failed = |error: sqlx::Error| database(path, "opened", &error);
    let version = version(connection, path).await?;
    let pragmas = [
        "PRAGMA journal_mode = WAL",
        "PRAGMA synchronous = FULL",
        // A few pages are touched at a time: the default cache of 2 MB would only add to the idle agent.
        "PRAGMA cache_size = -512",
        // What undoes a statement of many rows would else be a file made and removed for each.
        "PRAGMA temp_store = MEMORY",
    ];
    for pragma in pragmas {
        sqlx::query(pragma).execute(&mut *connection).await.map_err(failed)?;
    }
    let log = sqlx::query("PRAGMA wal_checkpoint(PASSIVE)").fetch_one(&mut *connection).await.map_err(failed)?;
    let frames: i64 = log.try_get(1).map_err(failed)?;
    if frames < i64::from(left.frames) {
        let reason = format!("its log lost its end: {} of {} pages are left", frames.max(0), left.frames);
        return Err(damaged(path, reason));
    }
    if left.unclean {
        look(connection, path).await?;
    }
    // A table that is not what its version says is damage, whatever SQLite calls it.
    let wrong = |error: sqlx::Error| match &error {
        sqlx::Error::Database(told) if told.code().as_deref() == Some("1") => damaged(path, error.to_string()),
        _ => database(path, "prepared", &error),
    };
    if version == Some(VERSION) {
        for probe in [
            "SELECT task, round, seen, owes, waiting_clone, running, body, sum FROM entry LIMIT 0",
            "SELECT name, value, sum FROM note LIMIT 0",
        ] {
            sqlx::query(probe).execute(&mut *connection).await.map_err(wrong)?;
        }
        return Ok(());
    }
    let changes = if version.is_some() { FROM_VERSION_0 } else { "" };
    // In one step with the tables: a start that is cut short leaves nothing half-made.
    for step in ["BEGIN IMMEDIATE", changes, SCHEMA, MARK, "COMMIT"] {
        sqlx::raw_sql(step).execute(&mut *connection).await.map_err(wrong)?;
    }
    Ok(())
}

/// The version of what is in the file: nothing, that before versions were written (0), or one that is written.
///
/// # Errors
/// When it is later than ours, or damaged.
async fn version(connection: &mut SqliteConnection, path: &Path) -> Result<Option<i32>, JournalError> {
    let mut number = async |sql: &'static str| -> Result<i32, JournalError> {
        let row = sqlx::query(sql).fetch_one(&mut *connection).await;
        row.and_then(|row| row.try_get(0)).map_err(|error| database(path, "opened", &error))
    };
    let tables = number("SELECT count(*) FROM sqlite_schema").await?;
    let (version, application) = (number("PRAGMA user_version").await?, number("PRAGMA application_id").await?);
    match (tables, version, application) {
        (0, 0, 0) => Ok(None),
        (0, ..) => Err(damaged(path, "its tables are gone".to_owned())),
        (_, 0, 0) => Ok(Some(0)),
        (_, version, application) if application != APPLICATION.wrapping_add(version) => {
            Err(damaged(path, "its head contradicts itself".to_owned()))
        }
        (_, VERSION, _) => Ok(Some(VERSION)),
        (_, version, _) => Err(JournalError::Later { path: path.display().to_string(), version }),
    }
}

/// Goes through the pages, for as long as that may take.
async fn look(connection: &mut SqliteConnection, path: &Path) -> Result<(), JournalError> {
    let failed = |error: sqlx::Error| database(path, "looked through", &error);
    let begun = Instant::now();
    let in_time = move || begun.elapsed() < LONGEST_LOOK;
    connection.lock_handle().await.map_err(failed)?.set_progress_handler(STEPS, in_time);
    let looked = sqlx::query("PRAGMA quick_check(1)").fetch_all(&mut *connection).await;
    connection.lock_handle().await.map_err(failed)?.remove_progress_handler();
    let found = match looked {
        Err(sqlx::Error::Database(told)) if told.code().as_deref() == Some("9") => {
            tracing::info!(path = %path.display(), "the journal is too large to be looked through at each start");
            return Ok(());
        }
        found => found.map_err(failed)?,
    };
    let words = found.iter().map(|row| row.try_get::<String, _>(0)).collect::<Result<Vec<_>, _>>().map_err(failed)?;
    match words.as_slice() {
        [ok] if ok == "ok" => Ok(()),
        words => Err(damaged(path, words.join("; "))),
    }
}

/// Whether the database is not what it should be, as opposed to a disk that is full or refuses.
pub(super) fn is_damage(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::Database(told) => {
            let code: u32 = told.code().and_then(|code| code.parse().ok()).unwrap_or(0);
            // CORRUPT, FORMAT, NOTADB; TOOBIG and CONSTRAINT, which no row of ours can be; and of IOERR what is said where
            // the disk gives back something else, or nothing, of what it has.
            matches!(code & 0xff, 11 | 18 | 19 | 24 | 26) || matches!(code, 266 | 522 | 8202 | 8458)
        }
        sqlx::Error::ColumnDecode { .. } | sqlx::Error::Decode(_) | sqlx::Error::WorkerCrashed => true,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_head_of_our_version_is_what_is_written() {
        let mark = format!("PRAGMA application_id = {}; PRAGMA user_version = {VERSION};", APPLICATION + VERSION);
        assert_eq!(MARK, mark);
    }
}
