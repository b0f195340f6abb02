//! Where a pull keeps what is not in its place yet: a directory of its own inside `.git`.
//!
//! Whatever a killed pull leaves stands in there, and tells which locks beside it were that pull's: the next one
//! removes both. A lock of anybody else is never touched.

use std::{
    ffi::OsStr,
    fmt::Write as _,
    fs,
    io::{self, Read},
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

use git2::Repository;
use rustix::{
    fs::{AtFlags, OFlags, RenameFlags, linkat, renameat, renameat_with, unlinkat},
    io::Errno,
};

use super::{guard::among, plan};
use crate::{failure::Failure, git::projects::Dir};

/// How such directories begin.
const PREFIX: &[u8] = b"haul-waiting-";
/// The new index in it; while the lock of the index is ours, both are one file.
pub(super) const INDEX: &str = "index";
/// The lock of the list of where a history ends, in it and beside it in the same way.
const SHALLOW: &str = "shallow";
/// The list of refs in it that are about to be written: `<id> <name>` a line.
const REFS: &str = "refs";
/// The longest such list, in bytes; it only guards against a mistake.
const LONGEST: u64 = 256 << 20;

/// Whether an entry of `.git` is such a directory.
pub(super) fn is_ours(name: &OsStr) -> bool {
    name.as_bytes().starts_with(PREFIX)
}

/// The directory of one pull. Dropping it removes it.
pub(super) struct Waiting {
    path: PathBuf,
    /// The directory itself.
    pub(super) dir: Dir,
    /// The `.git` around it.
    pub(super) git: Dir,
}

impl Waiting {
    /// Makes one in `repo`.
    pub(super) fn new(repo: &Repository) -> Result<Self, Failure> {
        let path = repo.path().join(format!("haul-waiting-{:032x}", rand::random::<u128>()));
        fs::create_dir(&path).map_err(among)?;
        Ok(Self { dir: Dir::open(&path).map_err(among)?, git: Dir::open(repo.path()).map_err(among)?, path })
    }

    /// Makes a directory in it that nobody else has.
    pub(super) fn directory(&self) -> Result<PathBuf, Failure> {
        let path = self.path.join(format!("{:032x}", rand::random::<u128>()));
        fs::create_dir(&path).map_err(among)?;
        Ok(path)
    }

    /// The path of `name` in it.
    pub(super) fn join(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Says which refs are about to be written, so that their locks are known should this process be killed.
    pub(super) fn announce<'a>(&self, refs: impl Iterator<Item = (&'a str, &'a str)>) -> Result<(), Failure> {
        let mut text = String::new();
        for (name, id) in refs {
            let _ = writeln!(text, "{id} {name}");
        }
        fs::write(self.join(REFS), text).map_err(among)
    }

    /// Puts the new index into its place, under the lock that git takes for it.
    ///
    /// # Errors
    /// `conflict` where somebody else holds the lock or, as `unchanged` tells, changed the index meanwhile.
    pub(super) fn put_index(&self, unchanged: impl FnOnce(&Dir) -> io::Result<bool>) -> Result<(), Failure> {
        let lock = "index.lock";
        if !self.take(INDEX, lock)? {
            return Err(locked());
        }
        let put = if unchanged(&self.git).map_err(among)? {
            renameat(&self.git, lock, &self.git, INDEX).map_err(|error| {
                let _ = unlinkat(&self.git, lock, AtFlags::empty());
                among(error.into())
            })
        } else {
            let _ = unlinkat(&self.git, lock, AtFlags::empty());
            Err(Failure::conflict("another git program changed the index of the project during the pull; pull again"))
        };
        // The index in its place has one name only from here on.
        let _ = unlinkat(&self.dir, INDEX, AtFlags::empty());
        put
    }
}

impl Waiting {
    /// Lets the file `name` in here be `lock` beside it as well, as git takes its locks; false where somebody has it.
    fn take(&self, name: &str, lock: &str) -> Result<bool, Failure> {
        let taken = match linkat(&self.dir, name, &self.git, lock, AtFlags::empty()) {
            // Where no file may have two names, a lock that a kill leaves is not known as ours.
            Err(Errno::PERM | Errno::OPNOTSUPP | Errno::MLINK) => {
                renameat_with(&self.dir, name, &self.git, lock, RenameFlags::NOREPLACE)
            }
            other => other,
        };
        match taken {
            Ok(()) => Ok(true),
            Err(Errno::EXIST) => Ok(false),
            Err(error) => Err(among(error.into())),
        }
    }

    /// Removes the list of where the history ends if it is `as_written`, under the lock that git takes for it; false
    /// where it says something else.
    ///
    /// # Errors
    /// Deferred where somebody else holds the lock.
    pub(super) fn remove_shallow(&self, as_written: impl FnOnce() -> Result<bool, Failure>) -> Result<bool, Failure> {
        let lock = "shallow.lock";
        self.dir.open_file(SHALLOW, OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL, 0o644).map_err(among)?;
        if !self.take(SHALLOW, lock)? {
            let message = "another git program is at work on the project's history (.git/shallow.lock is there)";
            return Err(Failure::internal(message).deferred());
        }
        let removed = as_written().and_then(|ours| {
            if ours {
                match unlinkat(&self.git, SHALLOW, AtFlags::empty()) {
                    Ok(()) => self.git.sync()?,
                    Err(Errno::NOENT) => {}
                    Err(error) => return Err(among(error.into())),
                }
            }
            Ok(ours)
        });
        let _ = unlinkat(&self.git, lock, AtFlags::empty());
        let _ = unlinkat(&self.dir, SHALLOW, AtFlags::empty());
        removed
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.path);
    }
}

/// The conflict that a held lock of the index is.
pub(super) fn locked() -> Failure {
    held("index.lock")
}

/// The conflict that a held lock is.
pub(super) fn held(lock: &str) -> Failure {
    Failure::conflict(format!("another git program is at work in the project (.git/{lock} is there)"))
}

/// Removes what killed pulls left, with their locks.
pub(super) fn sweep(repo: &Repository) -> Result<(), Failure> {
    let git = Dir::open(repo.path()).map_err(among)?;
    for (name, kind) in git.entries().map_err(among)? {
        if is_ours(&name) && kind == rustix::fs::FileType::Directory {
            let left = git.child(&name).map_err(among)?;
            release(&git, &left, INDEX)?;
            release(&git, &left, SHALLOW)?;
            release_refs(&git, &left)?;
            fs::remove_dir_all(repo.path().join(Path::new(&name))).map_err(among)?;
        }
    }
    Ok(())
}

/// Removes the lock of `name` if it is the very file that waits in `left`.
fn release(git: &Dir, left: &Dir, name: &str) -> Result<(), Failure> {
    let lock = format!("{name}.lock");
    let stat = |dir: &Dir, name: &str| dir.look(name).map_err(among);
    if let (Some(ours), Some(held)) = (stat(left, name)?, stat(git, &lock)?)
        && (ours.st_dev, ours.st_ino) == (held.st_dev, held.st_ino)
    {
        unlinkat(git, &lock, AtFlags::empty()).map_err(|error| among(error.into()))?;
    }
    Ok(())
}

/// Removes the locks of refs that hold what the killed pull was about to write, or nothing yet.
fn release_refs(git: &Dir, left: &Dir) -> Result<(), Failure> {
    // One that cannot be read is none of ours.
    let Ok(Some(list)) = left.read(REFS, LONGEST) else { return Ok(()) };
    for line in list.split(|&byte| byte == b'\n') {
        let Some((id, name)) = line.split_at_checked(40).filter(|(_, name)| name.starts_with(b" refs/")) else {
            continue;
        };
        let lock = [&name[1..], b".lock"].concat();
        let Ok(mut file) = git.open_file(OsStr::from_bytes(&lock), OFlags::RDONLY, 0) else { continue };
        let mut held = Vec::new();
        if file.metadata()?.is_file() && file.by_ref().take(64).read_to_end(&mut held).is_ok() {
            let written = held.strip_suffix(b"\n").unwrap_or(&held);
            let (parent, name) = plan::split(&lock);
            if id.starts_with(written)
                && let Some(parent) = parent.and_then(|parent| git.child(OsStr::from_bytes(parent)).ok())
            {
                let _ = unlinkat(&parent, OsStr::from_bytes(name), AtFlags::empty());
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn locks_of_a_killed_pull_go_and_those_of_others_stay() {
        let place = tempfile::tempdir().unwrap();
        let repo = Repository::init(place.path()).unwrap();
        let git = place.path().join(".git");
        let id = "1".repeat(40);
        let waiting = Waiting::new(&repo).unwrap();
        waiting
            .announce([("refs/heads/a", id.as_str()), ("refs/heads/b", &id), ("refs/heads/c", &id)].into_iter())
            .unwrap();
        fs::write(waiting.join(INDEX), "new").unwrap();
        fs::hard_link(waiting.join(INDEX), git.join("index.lock")).unwrap();
        // As a kill leaves it: half of the id, the whole of it, and another program's.
        fs::write(git.join("refs/heads/a.lock"), "").unwrap();
        fs::write(git.join("refs/heads/b.lock"), format!("{id}\n")).unwrap();
        fs::write(git.join("refs/heads/c.lock"), format!("{}\n", "2".repeat(40))).unwrap();
        fs::write(git.join("refs/heads/d.lock"), "").unwrap();
        std::mem::forget(waiting);
        sweep(&repo).unwrap();
        let there = |name: &str| git.join(name).exists();
        assert!(!there("index.lock") && !there("refs/heads/a.lock") && !there("refs/heads/b.lock"));
        assert!(there("refs/heads/c.lock") && there("refs/heads/d.lock"));
        assert!(!fs::read_dir(&git).unwrap().any(|entry| is_ours(&entry.unwrap().file_name())));
    }

    #[test]
    fn a_lock_of_the_index_that_is_not_ours_stays() {
        let place = tempfile::tempdir().unwrap();
        let repo = Repository::init(place.path()).unwrap();
        let waiting = Waiting::new(&repo).unwrap();
        fs::write(waiting.join(INDEX), "new").unwrap();
        let lock = place.path().join(".git/index.lock");
        fs::write(&lock, "theirs").unwrap();
        waiting.put_index(|_| Ok(true)).unwrap_err();
        std::mem::forget(waiting);
        sweep(&repo).unwrap();
        assert_eq!(fs::read_to_string(lock).unwrap(), "theirs");
    }

    #[test]
    fn an_index_that_somebody_changed_stays_theirs() {
        let place = tempfile::tempdir().unwrap();
        let repo = Repository::init(place.path()).unwrap();
        let git = place.path().join(".git");
        let waiting = Waiting::new(&repo).unwrap();
        fs::write(waiting.join(INDEX), "new").unwrap();
        fs::write(git.join("index"), "theirs").unwrap();
        waiting.put_index(|_| Ok(false)).unwrap_err();
        assert_eq!(fs::read_to_string(git.join("index")).unwrap(), "theirs");
        assert!(!git.join("index.lock").exists());
        fs::write(waiting.join(INDEX), "new").unwrap();
        waiting.put_index(|_| Ok(true)).unwrap();
        assert_eq!(fs::read_to_string(git.join("index")).unwrap(), "new");
        assert!(!git.join("index.lock").exists() && !waiting.join(INDEX).exists());
    }
}
