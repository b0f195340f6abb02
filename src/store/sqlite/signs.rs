//! Signs of damage that SQLite itself does not tell: it takes an empty file for a new database, a log that is gone for
//! one that was never there, and a log that lost its end for one that ends there.

use std::{
    fs::{self, File},
    io::{Read as _, Seek as _, SeekFrom},
    path::{Path, PathBuf},
};

use super::beside;

/// What lies beside the database, as an agent that did not end well left it.
#[derive(Debug, Default)]
pub(super) struct Left {
    /// There is a log: whoever ends well leaves none.
    pub(super) unclean: bool,
    /// Frames that were written to the log, durably, by the last count of who wrote it.
    pub(super) frames: u32,
}

/// Looks at the files before anything opens them. `reserve` is what every journal has beside it.
///
/// # Errors
/// What is wrong, after "the journal is damaged".
pub(super) fn look(path: &Path, reserve: &Path) -> Result<Left, String> {
    let (log, index) = (beside(path, "-wal"), beside(path, "-shm"));
    match fs::metadata(path) {
        Ok(found) if found.len() == 0 => return Err("its file is empty".to_owned()),
        Ok(_) => {}
        Err(_) if [&log, &index].into_iter().any(|file| file.exists()) || reserve.exists() => {
            return Err("its file is gone".to_owned());
        }
        Err(_) => return Ok(Left::default()),
    }
    match (log.exists(), index.exists()) {
        (false, true) => Err("its log is gone".to_owned()),
        (false, false) => Ok(Left::default()),
        (true, _) => Ok(Left { unclean: true, frames: promised(&log, &index).unwrap_or(0) }),
    }
}

/// The frames that the index of the log counts. The index is written after the log was synced, so a log with fewer
/// frames has lost some. Its layout is part of SQLite's file format (<https://sqlite.org/walformat.html>).
fn promised(log: &PathBuf, index: &PathBuf) -> Option<u32> {
    let mut head = [0_u8; 96];
    File::open(index).ok()?.read_exact(&mut head).ok()?;
    let (first, second) = head.split_at(48);
    // The count is written twice, and holds where both copies agree.
    let holds = first == second && first[12] == 1;
    let frames = u32::from_ne_bytes(first[16..20].try_into().ok()?);
    let mut log = File::open(log).ok()?;
    if log.metadata().ok()?.len() >= 32 {
        let mut salt = [0_u8; 8];
        log.seek(SeekFrom::Start(16)).ok()?;
        log.read_exact(&mut salt).ok()?;
        // A log that was begun anew has another salt, and its frames are not those that were counted.
        if salt != first[32..40] {
            return None;
        }
    }
    holds.then_some(frames)
}
