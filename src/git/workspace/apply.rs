//! Writing what a pull brings: each file beside its place first, then by one rename.
//!
//! Whoever works in the project does so at the same time. So nothing is overwritten or removed at its place: it is taken
//! out of it, looked at where nobody else puts anything, and put back if it is the user's.

use std::{ffi::OsStr, os::unix::ffi::OsStrExt, path::Path};

use git2::{ObjectType, Oid, Repository, build::CheckoutBuilder};
use rustix::{
    fs::{AtFlags, Mode, RenameFlags, mkdirat, renameat, renameat_with, unlinkat},
    io::Errno,
};

use super::{
    guard::{altered, among},
    open::fault,
    plan::{self, Change, Found, Side},
    pulse,
    waiting::Waiting,
};
use crate::{
    failure::{ErrorClass, Failure},
    git::{child::Reporter, projects::Dir},
    protocol::Progress,
};

/// The name, among what waits, of a file that is being removed.
const LEAVING: &str = "leaving";

/// Files as a checkout writes them, apart from the working tree.
pub(super) struct Stage(Dir);

impl Stage {
    /// Writes `paths` of `tree`, through the filters that the tree itself asks for and no others.
    pub(super) fn new(repo: &Repository, waiting: &Waiting, tree: Oid, paths: &[&[u8]]) -> Result<Self, Failure> {
        let path = waiting.directory()?;
        let filled = fill(repo, &path, tree, paths);
        filled.map_err(|error| fault("files cannot be written beside their places", &error))?;
        Ok(Self(Dir::open(&path).map_err(among)?))
    }

    /// Asserts that every one of `paths` is there, before the first of them is moved.
    pub(super) fn check(&self, paths: &[&[u8]]) -> Result<(), Failure> {
        for path in paths {
            if matches!(plan::find(&self.0, path)?, Found::Nothing | Found::Directory) {
                let path = String::from_utf8_lossy(path);
                return Err(Failure::new(ErrorClass::Corrupt, format!("{path} of the upstream cannot be checked out")));
            }
        }
        Ok(())
    }

    /// What waits for `path`, as it stands there, and its length.
    pub(super) fn side(&self, path: &[u8], like: Side) -> Result<Option<(Side, u64)>, Failure> {
        if like.is_link() || like.is_submodule() {
            return Ok(Some((like, 0)));
        }
        let Some(content) = plan::read(&self.0, path)? else { return Ok(None) };
        let id = Oid::hash_object(ObjectType::Blob, &content).map_err(|error| Failure::internal(error.to_string()))?;
        Ok(Some((Side { id, mode: like.mode }, content.len() as u64)))
    }
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

/// Brings the working tree from the old to the new side of every change, down to the disk.
///
/// # Errors
/// `conflict` where a path was changed since it was judged; what was written before stays, and is clean next time.
pub(super) fn apply(
    root: &Dir,
    waiting: &Waiting,
    stage: &Stage,
    changes: &[Change],
    reporter: &Reporter,
) -> Result<(), Failure> {
    let total = changes.len() as u64;
    let mut done = 0_u64;
    let mut moved = || {
        done += 1;
        if done.is_multiple_of(64) || done == total {
            reporter.progress(Progress {
                phase: "checkout".to_owned(),
                done,
                total: Some(total),
                ..Progress::default()
            });
        }
    };
    // From the deepest up, so that a directory can make room for a file.
    let mut leaving: Vec<_> = changes.iter().filter(|change| change.new.is_none()).collect();
    leaving.sort_by(|a, b| b.path.cmp(&a.path));
    for change in leaving {
        remove(root, waiting, change)?;
        moved();
    }
    for change in changes {
        if let Some(side) = change.new {
            put(root, stage, change, side)?;
            moved();
        }
    }
    pulse::flush(root)
}

fn remove(root: &Dir, waiting: &Waiting, change: &Change) -> Result<(), Failure> {
    if !change.old.is_some_and(Side::is_submodule) && plan::find(root, &change.path)? == Found::Directory {
        // The file is gone, and what is to come beneath its name may be there already.
        return Ok(());
    }
    let (parent, name) = plan::split(&change.path);
    let opened = parent.map(|parent| plan::enter(root, parent)).transpose()?;
    let dir = match &opened {
        Some(None) => return Ok(()),
        Some(Some(dir)) => dir,
        None => root,
    };
    let name = OsStr::from_bytes(name);
    if change.old.is_some_and(Side::is_submodule) {
        match unlinkat(dir, name, AtFlags::REMOVEDIR) {
            // A submodule that holds something stays where it is.
            Ok(()) | Err(Errno::NOENT | Errno::NOTEMPTY | Errno::NOTDIR) => {}
            Err(error) => return Err(unwritten(&change.path, error)),
        }
    } else {
        take_out(waiting, dir, name, change)?;
    }
    prune(root, parent);
    Ok(())
}

/// Removes a file, unless it turns out to be the user's once it is out of its place.
fn take_out(waiting: &Waiting, dir: &Dir, name: &OsStr, change: &Change) -> Result<(), Failure> {
    match renameat(dir, name, &waiting.dir, LEAVING) {
        Ok(()) => {}
        Err(Errno::NOENT) => return Ok(()),
        Err(error) => return Err(unwritten(&change.path, error)),
    }
    if plan::is_clean_at(&waiting.dir, LEAVING.as_bytes(), change)? {
        return unlinkat(&waiting.dir, LEAVING, AtFlags::empty()).map_err(|error| unwritten(&change.path, error));
    }
    // Where the user made another of this name meanwhile, the older one is kept beside it.
    if renameat_with(&waiting.dir, LEAVING, dir, name, RenameFlags::NOREPLACE).is_err() {
        let beside = format!("{}.haul-{:08x}", name.display(), rand::random::<u32>());
        renameat(&waiting.dir, LEAVING, dir, beside.as_str()).map_err(|error| unwritten(&change.path, error))?;
    }
    Err(raced(&change.path))
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
            Found::Nothing => {
                mkdirat(dir, name, Mode::from_raw_mode(0o755)).map_err(|error| unwritten(&change.path, error))
            }
            Found::Directory => Ok(()),
            _ => Err(raced(&change.path)),
        };
    }
    if found == Found::Directory {
        // Whatever left it has left it empty by now.
        unlinkat(dir, name, AtFlags::REMOVEDIR).map_err(|_| raced(&change.path))?;
    }
    let waiting = parent.map(|parent| stage.0.child(OsStr::from_bytes(parent))).transpose().map_err(among)?;
    put_in(stage, waiting.as_ref().unwrap_or(&stage.0), dir, name, change)
}

/// Puts the file that waits in `waiting` into its place, and what stood there back if that is the user's.
fn put_in(stage: &Stage, waiting: &Dir, dir: &Dir, name: &OsStr, change: &Change) -> Result<(), Failure> {
    let failed = |error| unwritten(&change.path, error);
    match renameat_with(waiting, name, dir, name, RenameFlags::NOREPLACE) {
        Err(Errno::EXIST) => {}
        // Not every file system can do either; there, the look before is all that there is.
        Err(Errno::INVAL) => return put_over(waiting, dir, name, change),
        other => return other.map_err(failed),
    }
    let ours = waiting.look(name).map_err(among)?.map(|stat| stat.st_ino);
    match renameat_with(waiting, name, dir, name, RenameFlags::EXCHANGE) {
        Err(Errno::INVAL) => return put_over(waiting, dir, name, change),
        // It went away in between.
        Err(Errno::NOENT) => return renameat_with(waiting, name, dir, name, RenameFlags::NOREPLACE).map_err(failed),
        other => other.map_err(failed)?,
    }
    if plan::is_clean(&stage.0, change)? {
        return Ok(());
    }
    match renameat_with(waiting, name, dir, name, RenameFlags::EXCHANGE) {
        Err(Errno::NOENT) => renameat_with(waiting, name, dir, name, RenameFlags::NOREPLACE).map_err(failed)?,
        other => other.map_err(failed)?,
    }
    if waiting.look(name).map_err(among)?.map(|stat| stat.st_ino) != ours {
        // The user put a newer one there in this moment.
        let _ = renameat_with(waiting, name, dir, name, RenameFlags::EXCHANGE);
    }
    Err(raced(&change.path))
}

fn put_over(waiting: &Dir, dir: &Dir, name: &OsStr, change: &Change) -> Result<(), Failure> {
    if !plan::is_clean_at(dir, name.as_bytes(), change)? {
        return Err(raced(&change.path));
    }
    renameat(waiting, name, dir, name).map_err(|error| unwritten(&change.path, error))
}

/// Opens the directory at `path`, making what is missing of it.
fn make_way(root: &Dir, path: &[u8]) -> Result<Dir, Failure> {
    let mut at = root.child(".").map_err(among)?;
    for name in path.split(|&byte| byte == b'/') {
        let name = OsStr::from_bytes(name);
        match mkdirat(&at, name, Mode::from_raw_mode(0o755)) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(unwritten(path, error)),
        }
        at = at.child(name).map_err(|_| raced(path))?;
    }
    Ok(at)
}

fn unwritten(path: &[u8], error: Errno) -> Failure {
    let failure = among(error.into());
    Failure { message: format!("{}: {}", String::from_utf8_lossy(path), failure.message), ..failure }
}

fn raced(path: &[u8]) -> Failure {
    altered(format!("{} changed while the pull was writing", String::from_utf8_lossy(path)))
}
