//! Writing what a pull brings: each file beside its place first, then by one rename.

use std::{
    ffi::OsStr,
    fs,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

use git2::{Index, IndexEntry, IndexTime, ObjectType, Oid, Repository, build::CheckoutBuilder};
use rustix::{
    fs::{AtFlags, Mode, mkdirat, renameat, unlinkat},
    io::Errno,
};

use super::{
    guard::altered,
    open::fault,
    plan::{self, Change, Found, Side},
};
use crate::{
    failure::Failure,
    git::{child::Reporter, projects::Dir},
    protocol::Progress,
};

/// How the directories begin in which files wait for their rename, inside `.git`.
const WAITING: &str = "haul-waiting-";

/// Files as a checkout writes them, apart from the working tree. Dropping it removes them.
pub(super) struct Stage {
    path: PathBuf,
    dir: Dir,
}

impl Stage {
    /// Writes `paths` of `tree`, through the filters that the tree itself asks for and no others.
    pub(super) fn new(repo: &Repository, tree: Oid, paths: &[&[u8]]) -> Result<Self, Failure> {
        let path = repo.path().join(format!("{WAITING}{:032x}", rand::random::<u128>()));
        fs::create_dir(&path)?;
        let stage = Self { dir: Dir::open(&path)?, path };
        let filled = fill(repo, &stage.path, tree, paths);
        filled.map_err(|error| fault("files cannot be written beside their places", &error))?;
        Ok(stage)
    }

    /// What waits for `path`, as it stands there.
    pub(super) fn side(&self, path: &[u8], like: Side) -> Result<Option<Side>, Failure> {
        if like.is_link() || like.is_submodule() {
            return Ok(Some(like));
        }
        let Some(content) = plan::read(&self.dir, path)? else { return Ok(None) };
        let id = Oid::hash_object(ObjectType::Blob, &content).map_err(|error| Failure::internal(error.to_string()))?;
        Ok(Some(Side { id, mode: like.mode }))
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.path);
    }
}

/// Removes what a killed pull left waiting.
pub(super) fn sweep(repo: &Repository) -> Result<(), Failure> {
    for entry in fs::read_dir(repo.path())? {
        let entry = entry?;
        if entry.file_name().as_bytes().starts_with(WAITING.as_bytes()) && entry.file_type()?.is_dir() {
            fs::remove_dir_all(entry.path())?;
        }
    }
    Ok(())
}

/// A repository of its own around the objects of `repo`: neither its settings nor its attributes count.
fn fill(repo: &Repository, into: &Path, tree: Oid, paths: &[&[u8]]) -> Result<(), git2::Error> {
    let apart = Repository::init(into)?;
    let objects = repo.path().join("objects");
    let objects = objects.to_str().ok_or_else(|| git2::Error::from_str("the path of the project is not UTF-8"))?;
    apart.odb()?.add_disk_alternate(objects)?;
    let tree = apart.find_tree(tree)?;
    // Attributes are looked for in the working tree, which is empty, and then here.
    let mut index = apart.index()?;
    index.read_tree(&tree)?;
    let mut options = CheckoutBuilder::new();
    options.force().disable_pathspec_match(true).update_index(false).refresh(false);
    for path in paths {
        options.path(*path);
    }
    if paths.is_empty() {
        return Ok(());
    }
    apart.checkout_tree(tree.as_object(), Some(&mut options))
}

/// Brings the working tree and the index from the old to the new side of every change.
///
/// # Errors
/// `conflict` where a path was changed since it was judged; what was written before stays, and is clean next time.
pub(super) fn apply(
    root: &Dir,
    stage: &Stage,
    index: &mut Index,
    changes: &[Change],
    reporter: &Reporter,
) -> Result<(), Failure> {
    let total = changes.len() as u64;
    let mut done = 0_u64;
    let mut moved = || {
        done += 1;
        if done.is_multiple_of(64) || done == total {
            reporter.progress(Progress { phase: "checkout".to_owned(), done, total: Some(total), bytes: 0 });
        }
    };
    // From the deepest up, so that a directory can make room for a file.
    let mut leaving: Vec<_> = changes.iter().filter(|change| change.new.is_none()).collect();
    leaving.sort_by(|a, b| b.path.cmp(&a.path));
    for change in leaving {
        remove(root, change)?;
        moved();
    }
    for change in changes {
        if let Some(side) = change.new {
            put(root, stage, change, side)?;
            moved();
        }
    }
    for change in changes {
        note(root, index, change).map_err(|error| fault("the index cannot be changed", &error))?;
    }
    rustix::fs::syncfs(root).map_err(std::io::Error::from)?;
    index.write().map_err(|error| fault("the index cannot be written", &error))
}

fn remove(root: &Dir, change: &Change) -> Result<(), Failure> {
    if !plan::is_clean(root, change)? {
        return Err(raced(&change.path));
    }
    let (parent, name) = plan::split(&change.path);
    let opened = parent.map(|parent| plan::enter(root, parent)).transpose()?;
    let dir = match &opened {
        Some(None) => return Ok(()),
        Some(Some(dir)) => dir,
        None => root,
    };
    let flags = if change.old.is_some_and(Side::is_submodule) { AtFlags::REMOVEDIR } else { AtFlags::empty() };
    match unlinkat(dir, OsStr::from_bytes(name), flags) {
        // A submodule that holds something stays where it is.
        Ok(()) | Err(Errno::NOENT | Errno::NOTEMPTY | Errno::NOTDIR) => {}
        Err(error) => return Err(std::io::Error::from(error).into()),
    }
    prune(root, parent);
    Ok(())
}

/// Removes the directories on the way that are empty now.
pub(super) fn prune(root: &Dir, mut path: Option<&[u8]>) {
    while let Some(at) = path {
        let (parent, name) = plan::split(at);
        let removed = match parent.map(|parent| plan::enter(root, parent)) {
            None => unlinkat(root, OsStr::from_bytes(name), AtFlags::REMOVEDIR).is_ok(),
            Some(Ok(Some(dir))) => unlinkat(&dir, OsStr::from_bytes(name), AtFlags::REMOVEDIR).is_ok(),
            Some(_) => false,
        };
        if !removed {
            return;
        }
        path = parent;
    }
}

fn put(root: &Dir, stage: &Stage, change: &Change, side: Side) -> Result<(), Failure> {
    let (parent, name) = plan::split(&change.path);
    let name = OsStr::from_bytes(name);
    let made = parent.map(|parent| make_way(root, parent)).transpose()?;
    let dir = made.as_ref().unwrap_or(root);
    let found = plan::find(root, &change.path)?;
    if side.is_submodule() {
        return match found {
            Found::Nothing => Ok(mkdirat(dir, name, Mode::from_raw_mode(0o755)).map_err(std::io::Error::from)?),
            Found::Directory => Ok(()),
            _ => Err(raced(&change.path)),
        };
    }
    if found == Found::Directory {
        // Whatever left it has left it empty by now.
        unlinkat(dir, name, AtFlags::REMOVEDIR).map_err(|_| raced(&change.path))?;
    } else if !plan::is_clean(root, change)? {
        return Err(raced(&change.path));
    }
    let waiting = parent.map(|parent| stage.dir.child(OsStr::from_bytes(parent))).transpose()?;
    renameat(waiting.as_ref().unwrap_or(&stage.dir), name, dir, name).map_err(std::io::Error::from)?;
    Ok(())
}

/// Opens the directory at `path`, making what is missing of it.
fn make_way(root: &Dir, path: &[u8]) -> Result<Dir, Failure> {
    let mut at = root.child(".")?;
    for name in path.split(|&byte| byte == b'/') {
        let name = OsStr::from_bytes(name);
        match mkdirat(&at, name, Mode::from_raw_mode(0o755)) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(std::io::Error::from(error).into()),
        }
        at = at.child(name).map_err(|_| raced(path))?;
    }
    Ok(at)
}

fn raced(path: &[u8]) -> Failure {
    altered(format!("{} changed while the pull was writing", String::from_utf8_lossy(path)))
}

/// Enters the new side of a change into the index.
fn note(root: &Dir, index: &mut Index, change: &Change) -> Result<(), git2::Error> {
    let path = Path::new(OsStr::from_bytes(&change.path));
    let Some(side) = change.new else {
        return match index.remove(path, 0) {
            Err(error) if error.code() != git2::ErrorCode::NotFound => Err(error),
            _ => Ok(()),
        };
    };
    let (parent, name) = plan::split(&change.path);
    let dir = parent.and_then(|parent| root.child(OsStr::from_bytes(parent)).ok());
    let stat = dir.as_ref().unwrap_or(root).look(OsStr::from_bytes(name)).ok().flatten();
    let stat = stat.filter(|_| !side.is_submodule());
    // As git does: the lower half of each number.
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "the index keeps 32 bits of each")]
    let low = |number: i64| number as u32;
    let time = |seconds: i64, nanoseconds: u64| {
        IndexTime::new(i32::try_from(seconds).unwrap_or(0), u32::try_from(nanoseconds).unwrap_or(0))
    };
    let entry = IndexEntry {
        ctime: stat.map_or(IndexTime::new(0, 0), |stat| time(stat.st_ctime, stat.st_ctime_nsec)),
        mtime: stat.map_or(IndexTime::new(0, 0), |stat| time(stat.st_mtime, stat.st_mtime_nsec)),
        dev: stat.map_or(0, |stat| low(stat.st_dev.cast_signed())),
        ino: stat.map_or(0, |stat| low(stat.st_ino.cast_signed())),
        mode: side.mode,
        uid: stat.map_or(0, |stat| stat.st_uid),
        gid: stat.map_or(0, |stat| stat.st_gid),
        file_size: stat.map_or(0, |stat| low(stat.st_size)),
        id: side.id,
        flags: 0,
        flags_extended: 0,
        path: change.path.clone(),
    };
    index.add(&entry)
}
