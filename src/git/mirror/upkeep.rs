//! Keeping the directory of mirrors: what killed transfers left goes, and so do mirrors that nobody uses.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::DirBuilderExt,
    path::Path,
    time::{Duration, SystemTime},
};

use rustix::fs::{FlockOperation, flock};

use super::{Mirrors, tip};
use crate::failure::Failure;

/// How long a mirror that no project is bound to stays: a clone that is tried again finds what was fetched before.
const UNUSED: Duration = Duration::from_hours(24);
/// How long is waited for a fetch that was stopped.
const AHEAD: Duration = Duration::from_secs(5);

impl Mirrors {
    /// Removes the mirror `key` unless it is in use or still `wanted`, which is asked once nobody can begin to use it.
    ///
    /// # Errors
    /// When it cannot be removed; the next start goes on.
    pub(crate) async fn remove(&self, key: &str, wanted: impl Fn() -> bool + Send + 'static) -> Result<(), Failure> {
        if self.settings.keep_mirrors {
            return Ok(());
        }
        let turn = if !wanted() && self.stop_ahead(key) {
            // Went on for the history of what is being removed; it ends as soon as its child does.
            tokio::time::timeout(AHEAD, self.flight(key).lock_owned()).await.ok()
        } else {
            self.flight(key).try_lock_owned().ok()
        };
        let Some(turn) = turn else { return Ok(()) };
        let (directory, key) = (self.directory.clone(), key.to_owned());
        let removed = tokio::task::spawn_blocking(move || {
            // Held to the end of this even where nobody waits for it any more.
            let _turn = turn;
            match exclusive(&directory, &key)? {
                Some(_lock) if !wanted() => remove(&directory, &key),
                _ => Ok(()),
            }
        });
        Ok(removed.await.map_err(|error| Failure::internal(error.to_string()))??)
    }

    /// Removes the mirrors that are not `bound` and were not used for long: of failed clones, of deletes that were
    /// interrupted, of credentials that a task named for itself. Called before the first task.
    ///
    /// # Errors
    /// When the directory cannot be read; a mirror that cannot be removed is reported and stays.
    pub(crate) async fn remove_unused(&self, bound: impl Fn(&str) -> bool + Send) -> Result<(), Failure> {
        if self.settings.keep_mirrors {
            return Ok(());
        }
        let now = SystemTime::now();
        for entry in fs::read_dir(&self.directory)? {
            let path = entry?.path();
            let key = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default().to_owned();
            if path.extension().is_none_or(|extension| extension != "git") || bound(&key) {
                continue;
            }
            let used = path.with_extension("lock").metadata().or_else(|_| path.metadata())?.modified()?;
            // A clock that was set back makes nothing old.
            if now.duration_since(used).is_ok_and(|age| age > UNUSED)
                && let Err(error) = self.remove(&key, || false).await
            {
                tracing::warn!(%error, mirror.path = %path.display(), "a mirror that nobody uses cannot be removed");
            }
        }
        Ok(())
    }
}

/// The exclusive lock of a mirror, if nobody uses it.
fn exclusive(directory: &Path, key: &str) -> io::Result<Option<File>> {
    let file = match OpenOptions::new().write(true).open(directory.join(format!("{key}.lock"))) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other?,
    };
    Ok(flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok().then_some(file))
}

/// Takes a mirror out of use by one rename, then removes it; the lock goes last, while nobody can wait for it.
fn remove(directory: &Path, key: &str) -> io::Result<()> {
    let old = directory.join(format!("{key}.git.old-{:032x}", rand::random::<u128>()));
    match fs::rename(directory.join(format!("{key}.git")), &old) {
        Ok(()) => fs::remove_dir_all(&old)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    fs::remove_file(directory.join(format!("{key}.lock")))
}

/// Makes `directory` and removes from all mirrors what killed transfers left.
pub(super) fn sweep_all(directory: &Path) -> Result<(), Failure> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if name.contains(".git.new-") || name.contains(".git.old-") || tip::is_store(name) {
            fs::remove_dir_all(&path)?;
        } else if path.extension().is_some_and(|extension| extension == "git") {
            sweep(&path)?;
        }
    }
    Ok(())
}

/// Removes from one mirror what killed transfers left; nobody may be writing to it.
pub(in crate::git) fn sweep(mirror: &Path) -> Result<(), Failure> {
    for directory in [mirror.join("objects/pack"), mirror.to_owned()] {
        let entries = match fs::read_dir(&directory) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error.into()),
        };
        for entry in entries {
            let path = entry?.path();
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            let ends = |end: &str| path.extension().is_some_and(|extension| extension == end);
            // A pack is no use without its index, and was never announced.
            let half = ends("pack") && !path.with_extension("idx").exists();
            if name.starts_with(".tmp") || name.starts_with("tmp_") || ends("keep") || ends("lock") || half {
                fs::remove_file(&path)?;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sweep_takes_what_a_killed_transfer_left_and_nothing_else() {
        let directory = tempfile::tempdir().unwrap();
        let pack = directory.path().join("a.git/objects/pack");
        fs::create_dir_all(&pack).unwrap();
        fs::create_dir_all(directory.path().join("b.git.new-77/objects")).unwrap();
        let all = [".tmpAbC", "tmp_pack_1", "pack-1.keep", "pack-1.pack", "pack-1.idx", "pack-2.pack"];
        for name in all {
            fs::write(pack.join(name), "x").unwrap();
        }
        for name in ["HEAD", "packed-refs", "packed-refs.lock"] {
            fs::write(directory.path().join("a.git").join(name), "x").unwrap();
        }
        fs::write(directory.path().join("a.lock"), "").unwrap();
        sweep_all(directory.path()).unwrap();
        let names = |path: &Path| {
            let mut names: Vec<_> =
                fs::read_dir(path).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
            names.sort();
            names
        };
        assert_eq!(names(&pack), ["pack-1.idx", "pack-1.pack"]);
        assert_eq!(names(&directory.path().join("a.git")), ["HEAD", "objects", "packed-refs"]);
        assert_eq!(names(directory.path()), ["a.git", "a.lock"]);
    }
}
