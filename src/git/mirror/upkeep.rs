//! Keeping the directory of mirrors: what killed transfers left goes, and so do mirrors that nobody uses or that the
//! budget has no room for.
//!
//! Nothing here makes a task wait for long. What takes time is done beside the tasks; what takes something out of a
//! mirror is a rename or an unlink under the exclusive lock, taken only where nobody uses the mirror.

use std::{
    collections::HashSet,
    ffi::OsStr,
    fs::{self, File},
    io,
    os::unix::fs::DirBuilderExt,
    path::Path,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant, SystemTime},
};

use super::{Mirrors, lock, repack};
use crate::{failure::Failure, git::transfer};

/// How long a mirror that no project is bound to stays: a clone that is tried again finds what was fetched before.
const UNUSED: Duration = Duration::from_hours(24);
/// How long is waited for a fetch that was stopped.
const AHEAD: Duration = Duration::from_secs(5);

/// What is done for the mirrors beside the tasks: one at a time.
#[derive(Debug, Default)]
pub(super) struct Upkeep {
    turn: tokio::sync::Mutex<()>,
    /// The mirrors that wait for it.
    waiting: Mutex<HashSet<String>>,
}

/// A mirror, as the budget sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Holding {
    key: String,
    bytes: u64,
    used: SystemTime,
}

impl Mirrors {
    /// Removes the mirror `key` unless it is in use or still `wanted`, which is asked once nobody can begin to use it.
    ///
    /// # Errors
    /// When it cannot be removed; the next start goes on.
    pub(crate) async fn remove(&self, key: &str, wanted: impl Fn() -> bool + Send + 'static) -> Result<(), Failure> {
        if self.settings.keep_mirrors {
            return Ok(());
        }
        // What went on for the history of what is being removed ends as soon as its child does.
        let patience = if !wanted() && self.stop_ahead(key) { AHEAD } else { Duration::ZERO };
        let (directory, key) = (self.directory.clone(), key.to_owned());
        let removed = tokio::task::spawn_blocking(move || {
            let (place, begun) = (directory.join(format!("{key}.lock")), Instant::now());
            let mut lock = lock::exclusive(&place)?;
            while lock.is_none() && begun.elapsed() < patience && place.exists() {
                lock = lock::exclusive(&place)?;
            }
            match lock {
                Some(lock) if !wanted() => remove(&directory, &key, lock)?,
                _ => return Ok(()),
            }
            for tip in keys(&directory)?.into_iter().filter(|other| other.starts_with(&format!("{key}.tip-"))) {
                if let Some(lock) = lock::exclusive(&directory.join(format!("{tip}.lock")))? {
                    remove(&directory, &tip, lock)?;
                }
            }
            Ok::<_, io::Error>(())
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
        for key in keys(&self.directory)?.into_iter().filter(|key| !bound(key)) {
            // A clock that was set back makes nothing old.
            if now.duration_since(used(&self.directory, &key)?).is_ok_and(|age| age > UNUSED)
                && let Err(error) = self.remove(&key, || false).await
            {
                let path = self.path(&key);
                tracing::warn!(%error, mirror.path = %path.display(), "a mirror that nobody uses cannot be removed");
            }
        }
        Ok(())
    }

    /// Begins the upkeep of the mirror of `request`, unless it waits for that already.
    pub(super) fn tend(&self, request: &transfer::Request) {
        let Some(key) = request.mirror.file_stem().and_then(OsStr::to_str).map(str::to_owned) else { return };
        // Without a runtime the process is ending; the next start sweeps.
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        if !self.upkeep.waiting.lock().unwrap_or_else(PoisonError::into_inner).insert(key.clone()) {
            return;
        }
        let (mirrors, request) = (self.clone(), request.clone());
        runtime.spawn(async move {
            let _one = mirrors.upkeep.turn.lock().await;
            mirrors.upkeep.waiting.lock().unwrap_or_else(PoisonError::into_inner).remove(&key);
            if let Err(error) = mirrors.tend_now(&key, &request).await {
                tracing::warn!(%error, mirror.path = %request.mirror.display(), "the upkeep of a mirror failed");
            }
        });
    }

    async fn tend_now(&self, key: &str, request: &transfer::Request) -> Result<(), Failure> {
        self.blocking(key, clear).await?;
        // A tip store serves one project and goes as a whole.
        if !key.contains(".tip-") {
            self.repack(key, request).await?;
        }
        let budget = self.settings.mirror_budget.as_u64();
        self.blocking(key, move |directory, _| evict(directory, budget)).await
    }

    /// Does `work` on the mirror `key` in a thread that may block.
    pub(super) async fn blocking<T: Send + 'static>(
        &self,
        key: &str,
        work: impl FnOnce(&Path, &str) -> io::Result<T> + Send + 'static,
    ) -> Result<T, Failure> {
        let (directory, key) = (self.directory.clone(), key.to_owned());
        let done = tokio::task::spawn_blocking(move || work(&directory, &key)).await;
        Ok(done.map_err(|error| Failure::internal(error.to_string()))??)
    }
}

/// The keys of all mirrors and tip stores.
fn keys(directory: &Path) -> io::Result<Vec<String>> {
    let mut keys = Vec::new();
    for entry in fs::read_dir(directory)? {
        let name = entry?.file_name();
        keys.extend(name.to_str().and_then(|name| name.strip_suffix(".git")).map(str::to_owned));
    }
    Ok(keys)
}

/// When a mirror was last used.
fn used(directory: &Path, key: &str) -> io::Result<SystemTime> {
    let lock = directory.join(format!("{key}.lock")).metadata();
    lock.or_else(|_| directory.join(format!("{key}.git")).metadata())?.modified()
}

/// Where nobody uses the mirror: removes what killed transfers left and what was put aside, and takes in what was
/// repacked.
fn clear(directory: &Path, key: &str) -> io::Result<()> {
    let Some(_lock) = lock::exclusive(&directory.join(format!("{key}.lock")))? else { return Ok(()) };
    let mirror = directory.join(format!("{key}.git"));
    sweep(&mirror)?;
    repack::settle(&mirror)?;
    let aside = format!("{key}.git.old-");
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        if entry.file_name().to_str().is_some_and(|name| name.starts_with(&aside)) {
            fs::remove_dir_all(entry.path())?;
        }
    }
    Ok(())
}

/// Takes a mirror out of use by one rename, then removes it; the name of the lock goes while nobody can wait for it.
fn remove(directory: &Path, key: &str, lock: File) -> io::Result<()> {
    let old = directory.join(format!("{key}.git.old-{:032x}", rand::random::<u128>()));
    let renamed = match fs::rename(directory.join(format!("{key}.git")), &old) {
        Ok(()) => true,
        Err(error) if error.kind() == io::ErrorKind::NotFound => false,
        Err(error) => return Err(error),
    };
    fs::remove_file(directory.join(format!("{key}.lock")))?;
    drop(lock);
    if renamed { fs::remove_dir_all(&old) } else { Ok(()) }
}

/// Removes the mirrors that were not used for longest, until all that stay fit into `budget` bytes; 0 is no limit.
///
/// One that is in use stays. Projects have their own copies of all objects: a pull after this fetches again.
pub(super) fn evict(directory: &Path, budget: u64) -> io::Result<()> {
    if budget == 0 {
        return Ok(());
    }
    let mut holdings = Vec::new();
    for key in keys(directory)? {
        let path = directory.join(format!("{key}.git"));
        // Whatever vanishes meanwhile needs no room.
        if let (Ok(bytes), Ok(used)) = (size(&path), used(directory, &key)) {
            holdings.push(Holding { key, bytes, used });
        }
    }
    let evicted = surplus(holdings, budget, |key| {
        let lock = directory.join(format!("{key}.lock"));
        match lock::exclusive(&lock) {
            Ok(Some(lock)) => remove(directory, key, lock).is_ok(),
            // A mirror without a lock file is from a crash between the two; nobody can use it without making one.
            Ok(None) if !lock.exists() => fs::remove_dir_all(directory.join(format!("{key}.git"))).is_ok(),
            _ => false,
        }
    });
    if !evicted.is_empty() {
        tracing::info!(mirror.evicted = evicted.len(), "mirrors were removed to keep git.mirror_budget");
    }
    Ok(())
}

/// Goes through `holdings`, those not used for longest first, and has them removed until the rest fits into `budget`.
/// Returns what could be removed.
fn surplus(mut holdings: Vec<Holding>, budget: u64, mut remove: impl FnMut(&str) -> bool) -> Vec<String> {
    let mut total: u64 = holdings.iter().map(|holding| holding.bytes).sum();
    holdings.sort_by(|a, b| (a.used, &a.key).cmp(&(b.used, &b.key)));
    let mut removed = Vec::new();
    for holding in holdings {
        if total <= budget {
            break;
        }
        if remove(&holding.key) {
            total -= holding.bytes;
            removed.push(holding.key);
        }
    }
    removed
}

/// How many bytes the files below `path` have.
fn size(path: &Path) -> io::Result<u64> {
    let mut bytes = 0;
    let mut waiting = vec![path.to_owned()];
    while let Some(directory) = waiting.pop() {
        for entry in fs::read_dir(directory)? {
            let entry = entry?;
            let stat = entry.metadata()?;
            if stat.is_dir() {
                waiting.push(entry.path());
            } else {
                bytes += stat.len();
            }
        }
    }
    Ok(bytes)
}

/// Makes `directory` and removes from all mirrors what killed transfers left. Called before anybody uses a mirror.
pub(super) fn sweep_all(directory: &Path) -> io::Result<()> {
    if let Some(storage) = directory.parent().and_then(Path::parent) {
        // The owners of projects pass through it.
        fs::create_dir_all(storage)?;
    }
    fs::DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        let name = path.file_name().and_then(OsStr::to_str).unwrap_or_default();
        let (tip, end) = (name.contains(".tip-"), path.extension().and_then(OsStr::to_str));
        if name.contains(".git.new-") || name.contains(".git.old-") || (tip && end == Some("git")) {
            fs::remove_dir_all(&path)?;
        } else if tip && end == Some("lock") {
            fs::remove_file(&path)?;
        } else if end == Some("git") {
            sweep(&path)?;
            repack::settle(&path)?;
        }
    }
    Ok(())
}

/// Removes from one mirror what killed transfers left; nobody may be writing to it.
pub(in crate::git) fn sweep(mirror: &Path) -> io::Result<()> {
    for directory in [mirror.join("objects/pack"), mirror.join("objects/info"), mirror.to_owned()] {
        let entries = match fs::read_dir(&directory) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        for entry in entries {
            let path = entry?.path();
            let name = path.file_name().and_then(OsStr::to_str).unwrap_or_default();
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
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn names(path: &Path) -> Vec<String> {
        let mut names: Vec<_> =
            fs::read_dir(path).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn what_is_ours_is_closed_and_the_way_to_projects_open() {
        let place = tempfile::tempdir().unwrap();
        let storage = place.path().join("storage");
        sweep_all(&storage.join(".haul/mirrors")).unwrap();
        let others = |path: &Path| path.metadata().unwrap().permissions().mode() & 0o011;
        assert_eq!((others(&storage), others(&storage.join(".haul"))), (0o011, 0));
    }

    #[test]
    fn a_sweep_takes_what_a_killed_transfer_left_and_nothing_else() {
        let directory = tempfile::tempdir().unwrap();
        let pack = directory.path().join("a.git/objects/pack");
        fs::create_dir_all(&pack).unwrap();
        for other in ["b.git.new-77/objects", "a.git.old-1", "a.tip-1.git/objects"] {
            fs::create_dir_all(directory.path().join(other)).unwrap();
        }
        let all = [".tmpAbC", "tmp_pack_1", "pack-1.keep", "pack-1.pack", "pack-1.idx", "pack-2.pack"];
        for name in all {
            fs::write(pack.join(name), "x").unwrap();
        }
        for name in ["HEAD", "packed-refs", "packed-refs.lock"] {
            fs::write(directory.path().join("a.git").join(name), "x").unwrap();
        }
        for lock in ["a.lock", "a.tip-1.lock"] {
            fs::write(directory.path().join(lock), "").unwrap();
        }
        sweep_all(directory.path()).unwrap();
        assert_eq!(names(&pack), ["pack-1.idx", "pack-1.pack"]);
        assert_eq!(names(&directory.path().join("a.git")), ["HEAD", "objects", "packed-refs"]);
        assert_eq!(names(directory.path()), ["a.git", "a.lock"]);
    }

    #[test]
    fn what_was_not_used_for_longest_goes_first_and_what_is_in_use_stays() {
        let holding = |key: &str, bytes, used| Holding {
            key: key.to_owned(),
            bytes,
            used: SystemTime::UNIX_EPOCH + Duration::from_secs(used),
        };
        let all = [holding("new", 40, 9), holding("old", 30, 1), holding("middle", 20, 5), holding("large", 100, 7)];
        let cases: [(u64, &[&str], &[&str]); 6] = [
            (190, &[], &[]),
            (189, &[], &["old"]),
            (160, &[], &["old"]),
            (150, &[], &["old", "middle"]),
            (150, &["old"], &["middle", "large"]),
            (0, &["new"], &["old", "middle", "large"]),
        ];
        for (budget, busy, gone) in cases {
            let removed = surplus(all.to_vec(), budget, |key| !busy.contains(&key));
            assert_eq!(removed, gone, "{budget} {busy:?}");
        }
    }

    #[test]
    fn eviction_heeds_the_lock_and_the_time_of_use() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        let mut locks = Vec::new();
        for (age, key) in [(30, "a"), (20, "b"), (10, "c")] {
            fs::create_dir_all(at(&format!("{key}.git/objects/pack"))).unwrap();
            fs::write(at(&format!("{key}.git/objects/pack/pack-1.pack")), [0; 100]).unwrap();
            let lock = File::create(at(&format!("{key}.lock"))).unwrap();
            lock.set_modified(SystemTime::now() - Duration::from_secs(age)).unwrap();
            locks.push(lock);
        }
        evict(directory.path(), 0).unwrap();
        evict(directory.path(), 300).unwrap();
        assert_eq!(names(directory.path()).len(), 6);
        rustix::fs::flock(&locks[0], rustix::fs::FlockOperation::LockShared).unwrap();
        evict(directory.path(), 200).unwrap();
        assert_eq!(names(directory.path()), ["a.git", "a.lock", "c.git", "c.lock"]);
        evict(directory.path(), 1).unwrap();
        assert_eq!(names(directory.path()), ["a.git", "a.lock"]);
    }
}
