//! Writing what a pull brings: each file beside its place first, then by one rename.

use std::{ffi::OsStr, os::unix::ffi::OsStrExt, path::Path};

use git2::{ObjectType, Oid, Repository, build::CheckoutBuilder};
use rustix::{
    fs::{AtFlags, Mode, mkdirat, renameat, unlinkat},
    io::Errno,
};

use super::{
    guard::altered,
    open::fault,
    plan::{self, Change, Found, Side},
    waiting::Waiting,
};
use crate::{
    failure::Failure,
    git::{child::Reporter, projects::Dir},
    protocol::Progress,
};

/// Files as a checkout writes them, apart from the working tree.
pub(super) struct Stage(Dir);

impl Stage {
    /// Writes `paths` of `tree`, through the filters that the tree itself asks for and no others.
    pub(super) fn new(repo: &Repository, waiting: &Waiting, tree: Oid, paths: &[&[u8]]) -> Result<Self, Failure> {
        let path = waiting.directory()?;
        let filled = fill(repo, &path, tree, paths);
        filled.map_err(|error| fault("files cannot be written beside their places", &error))?;
        Ok(Self(Dir::open(&path)?))
    }

    /// What waits for `path`, as it stands there.
    pub(super) fn side(&self, path: &[u8], like: Side) -> Result<Option<Side>, Failure> {
        if like.is_link() || like.is_submodule() {
            return Ok(Some(like));
        }
        let Some(content) = plan::read(&self.0, path)? else { return Ok(None) };
        let id = Oid::hash_object(ObjectType::Blob, &content).map_err(|error| Failure::internal(error.to_string()))?;
        Ok(Some(Side { id, mode: like.mode }))
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
pub(super) fn apply(root: &Dir, stage: &Stage, changes: &[Change], reporter: &Reporter) -> Result<(), Failure> {
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
        remove(root, change)?;
        moved();
    }
    for change in changes {
        if let Some(side) = change.new {
            put(root, stage, change, side)?;
            moved();
        }
    }
    Ok(rustix::fs::syncfs(root).map_err(std::io::Error::from)?)
}

fn remove(root: &Dir, change: &Change) -> Result<(), Failure> {
    if !change.old.is_some_and(Side::is_submodule) && plan::find(root, &change.path)? == Found::Directory {
        // The file is gone, and what is to come beneath its name may be there already.
        return Ok(());
    }
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
        Err(error) => return Err(refused(&change.path, error)),
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
            Found::Nothing => {
                mkdirat(dir, name, Mode::from_raw_mode(0o755)).map_err(|error| refused(&change.path, error))
            }
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
    let waiting = parent.map(|parent| stage.0.child(OsStr::from_bytes(parent))).transpose()?;
    renameat(waiting.as_ref().unwrap_or(&stage.0), name, dir, name).map_err(|error| refused(&change.path, error))
}

/// Opens the directory at `path`, making what is missing of it.
fn make_way(root: &Dir, path: &[u8]) -> Result<Dir, Failure> {
    let mut at = root.child(".")?;
    for name in path.split(|&byte| byte == b'/') {
        let name = OsStr::from_bytes(name);
        match mkdirat(&at, name, Mode::from_raw_mode(0o755)) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(refused(path, error)),
        }
        at = at.child(name).map_err(|_| raced(path))?;
    }
    Ok(at)
}

/// What an error at one path means: rights that are missing there are its user's doing.
fn refused(path: &[u8], error: Errno) -> Failure {
    if matches!(error, Errno::ACCESS | Errno::PERM) {
        return altered(format!("{} cannot be written: {error}", String::from_utf8_lossy(path)));
    }
    std::io::Error::from(error).into()
}

fn raced(path: &[u8]) -> Failure {
    altered(format!("{} changed while the pull was writing", String::from_utf8_lossy(path)))
}
