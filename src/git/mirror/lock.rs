//! The lock file of a mirror: shared by all who use it, exclusive for whoever takes something out of it.
//!
//! A lock belongs to a file and not to its name, and lock files are removed with their mirrors; so a lock counts only
//! while its file still has its name.

use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use rustix::{
    fs::{FlockOperation, flock},
    io::Errno,
};

use crate::{
    failure::Failure,
    git::{Run, child},
};

/// How often a lock that somebody holds is tried again.
pub(super) const POLL: Duration = Duration::from_millis(50);
/// How often an exclusive lock is tried for before somebody is taken to use the mirror.
const TRIES: usize = 4;

/// Takes the shared lock at `path`, which waits only for upkeep that takes something out of the mirror.
///
/// # Errors
/// When the file cannot be made, or a bound of `run` is passed first.
pub(super) async fn shared(path: PathBuf, run: &Run<'_>) -> Result<File, Failure> {
    let taken = async {
        loop {
            let path = path.clone();
            let tried = tokio::task::spawn_blocking(move || try_shared(&path));
            match tried.await.map_err(|error| Failure::internal(error.to_string()))?? {
                Some(file) => return Ok(file),
                None => tokio::time::sleep(POLL).await,
            }
        }
    };
    child::within(run, None, taken).await?
}

fn try_shared(path: &Path) -> io::Result<Option<File>> {
    let file = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(path)?;
    if !taken(&file, FlockOperation::NonBlockingLockShared)? || !is_at(&file, path)? {
        return Ok(None);
    }
    // Tells when the mirror was last used.
    file.set_modified(SystemTime::now())?;
    Ok(Some(file))
}

/// Takes the exclusive lock at `path` if nobody uses the mirror; `None` also where there is no such lock.
///
/// It is tried a few times: a process that is just being started has our descriptors for a moment, and their locks.
pub(super) fn exclusive(path: &Path) -> io::Result<Option<File>> {
    for _ in 0..TRIES {
        if let Some(file) = try_exclusive(path)? {
            return Ok(Some(file));
        }
        if !path.exists() {
            return Ok(None);
        }
        std::thread::sleep(POLL);
    }
    try_exclusive(path)
}

fn try_exclusive(path: &Path) -> io::Result<Option<File>> {
    let file = match OpenOptions::new().write(true).open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other?,
    };
    let free = taken(&file, FlockOperation::NonBlockingLockExclusive)? && is_at(&file, path)?;
    Ok(free.then_some(file))
}

/// Makes a shared lock exclusive if nobody else has it; otherwise it is given up.
pub(super) fn alone(file: File) -> Option<File> {
    taken(&file, FlockOperation::NonBlockingLockExclusive).unwrap_or(false).then_some(file)
}

fn taken(file: &File, operation: FlockOperation) -> io::Result<bool> {
    match flock(file, operation) {
        Ok(()) => Ok(true),
        Err(Errno::WOULDBLOCK | Errno::INTR) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Whether `file` still stands under its name.
fn is_at(file: &File, path: &Path) -> io::Result<bool> {
    let own = file.metadata()?;
    match path.metadata() {
        Ok(named) => Ok((named.dev(), named.ino()) == (own.dev(), own.ino())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_counts_only_while_its_file_has_its_name() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("a.lock");
        assert!(exclusive(&path).unwrap().is_none(), "nobody ever used it");
        let first = try_shared(&path).unwrap().unwrap();
        let second = try_shared(&path).unwrap().unwrap();
        assert!(exclusive(&path).unwrap().is_none() && alone(first).is_none());
        let first = alone(second).unwrap();
        // Who opened it before it was removed has a lock on nothing.
        let stale = OpenOptions::new().write(true).open(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        drop(first);
        assert!(taken(&stale, FlockOperation::NonBlockingLockShared).unwrap());
        assert!(!is_at(&stale, &path).unwrap());
        try_shared(&path).unwrap().unwrap();
        assert!(exclusive(&path).unwrap().is_some());
    }
}
