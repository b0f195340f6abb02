//! What a pull would write, and whether anything of the user is in the way.

use std::{
    collections::{BTreeMap, HashSet},
    ffi::OsStr,
    fs::File,
    io::{self, Read, Write as _},
    os::unix::ffi::OsStrExt,
};

use git2::{Delta, DiffOptions, FileMode, Index, ObjectType, Oid, Repository, Tree};
use gix::objs::tree::EntryKind;
use rustix::fs::{FileType, OFlags};

use super::{
    lfs,
    open::fault,
    walk::{self, Budget},
};
use crate::{
    failure::{ErrorClass, Failure},
    git::{child::Reporter, pointer::Pointer, projects::Dir},
};

/// One side of a change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Side {
    /// The blob, or the commit of a submodule.
    pub(super) id: Oid,
    /// As in a tree.
    pub(super) mode: u32,
}

/// One path that differs between what is checked out and what shall be.
#[derive(Clone, Debug)]
pub(super) struct Change {
    /// Relative to the project.
    pub(super) path: Vec<u8>,
    /// What is checked out.
    pub(super) old: Option<Side>,
    /// What shall be.
    pub(super) new: Option<Side>,
    /// Other contents that are not the user's, or were saved: what a filter makes of either side.
    pub(super) also: Vec<Side>,
    /// Either side as an LFS pointer, and whether it may be executed: what it points to is not the user's either.
    pub(super) lfs: Vec<(Pointer, bool)>,
}

/// The mode of a submodule.
const SUBMODULE: u32 = 0o160_000;
/// The mode of a symbolic link.
const LINK: u32 = 0o120_000;

impl Side {
    fn new(id: Oid, mode: FileMode) -> Self {
        // The one that old programs wrote into trees means the plain one.
        let mode = if mode == FileMode::BlobGroupWritable { FileMode::Blob } else { mode };
        Self { id, mode: u32::try_from(i32::from(mode)).unwrap_or(0) }
    }

    pub(super) fn is_submodule(self) -> bool {
        self.mode == SUBMODULE
    }

    pub(super) fn is_link(self) -> bool {
        self.mode == LINK
    }
}

/// What stands at a path of the working tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// Nothing.
    Nothing,
    /// A file: its length, and whether its owner may execute it.
    File { length: u64, executable: bool },
    /// A link and where it leads.
    Link(Vec<u8>),
    /// A directory.
    Directory,
    /// A pipe, socket or device, or a way to it that is no directory.
    Other,
}

/// Every path that differs between two trees, checked for names and size.
///
/// # Errors
/// `quota` over the budget, `forbidden` for a name that must not be written.
pub(super) fn changes(
    repo: &Repository,
    old: Option<&Tree<'_>>,
    new: &Tree<'_>,
    budget: Budget,
    reporter: &Reporter,
) -> Result<Vec<Change>, Failure> {
    let mut options = DiffOptions::new();
    options.include_typechange(true).skip_binary_check(true).ignore_submodules(false);
    let diff = repo
        .diff_tree_to_tree(old, Some(new), Some(&mut options))
        .map_err(|error| Failure::new(ErrorClass::Corrupt, format!("the trees cannot be compared: {error}")))?;
    reporter.step();
    let odb = repo.odb().map_err(|error| fault("its objects cannot be opened", &error))?;
    let (mut all, mut bytes) = (Vec::new(), 0_u64);
    for delta in diff.deltas() {
        let side = |file: git2::DiffFile<'_>, absent: Delta| {
            (delta.status() != absent && !file.id().is_zero()).then(|| Side::new(file.id(), file.mode()))
        };
        let (old, new) = (side(delta.old_file(), Delta::Added), side(delta.new_file(), Delta::Deleted));
        let path = delta.new_file().path_bytes().or_else(|| delta.old_file().path_bytes());
        let path = path.ok_or_else(|| Failure::internal("a changed path has no name"))?.to_owned();
        if let Some(new) = new {
            check_path(&path, new, delta.new_file().mode())?;
            if !new.is_submodule() {
                let header = odb.read_header(new.id);
                let (length, kind) = header.map_err(|error| Failure::new(ErrorClass::Corrupt, error.message()))?;
                if kind != ObjectType::Blob {
                    return Err(Failure::new(ErrorClass::Corrupt, "the upstream's tree has a file that is not one"));
                }
                bytes += length as u64;
            }
        }
        all.push(Change { path, old, new, also: Vec::new(), lfs: Vec::new() });
        if all.len() as u64 > budget.files || bytes > budget.bytes {
            let message = "the pull would write more than git.max_files or git.max_bytes allow";
            return Err(Failure::new(ErrorClass::Quota, message));
        }
    }
    Ok(all)
}

fn check_path(path: &[u8], side: Side, mode: FileMode) -> Result<(), Failure> {
    let refused = |why: &str| {
        let shown = String::from_utf8_lossy(path);
        Failure::forbidden(format!("the upstream's tree has an entry that {why}: {shown}"))
    };
    if !matches!(
        mode,
        FileMode::Blob | FileMode::BlobGroupWritable | FileMode::BlobExecutable | FileMode::Link | FileMode::Commit
    ) {
        return Err(refused("is of an unknown kind"));
    }
    let kind = if side.is_link() { EntryKind::Link } else { EntryKind::Blob };
    path.split(|&byte| byte == b'/').try_for_each(|name| walk::check_name(name, kind)).map_err(refused)
}

/// The paths of `changes` at which something of the user is in the way.
///
/// What equals the old or the new side is not the user's; what is missing loses nothing.
///
/// # Errors
/// When the working tree cannot be read.
pub(super) fn in_the_way(
    root: &Dir,
    index: &Index,
    changes: &[Change],
    reporter: &Reporter,
) -> Result<BTreeMap<Vec<u8>, &'static str>, Failure> {
    let mut way = BTreeMap::new();
    let leaving: HashSet<&[u8]> =
        changes.iter().filter(|change| change.new.is_none()).map(|change| change.path.as_slice()).collect();
    let judged: HashSet<&[u8]> = changes.iter().map(|change| change.path.as_slice()).collect();
    for (number, change) in changes.iter().enumerate() {
        if number.is_multiple_of(256) {
            reporter.step();
        }
        let staged = index.get_path(std::path::Path::new(OsStr::from_bytes(&change.path)), 0);
        let staged = staged.map(|entry| Side { id: entry.id, mode: entry.mode });
        if staged != change.old && staged != change.new {
            way.insert(change.path.clone(), "staged");
            continue;
        }
        if let Some(blocking) = blocked(root, change, &leaving)? {
            way.insert(blocking, "in the way");
        } else if !is_clean(root, change)? && !holds_only(root, &change.path, &judged)? {
            way.insert(change.path.clone(), if change.old.is_some() { "modified" } else { "untracked" });
        }
    }
    Ok(way)
}

/// A component on the way to a path to be written that is no directory and does not leave either.
fn blocked(root: &Dir, change: &Change, leaving: &HashSet<&[u8]>) -> Result<Option<Vec<u8>>, Failure> {
    if change.new.is_none() {
        return Ok(None);
    }
    for (end, _) in change.path.iter().enumerate().filter(|(_, byte)| **byte == b'/') {
        let parent = &change.path[..end];
        match find(root, parent)? {
            Found::Directory => {}
            Found::Nothing => return Ok(None),
            _ if leaving.contains(parent) => return Ok(None),
            _ => return Ok(Some(parent.to_owned())),
        }
    }
    Ok(None)
}

/// Whether what stands at the path of `change` is not the user's own.
pub(super) fn is_clean(root: &Dir, change: &Change) -> Result<bool, Failure> {
    let found = find(root, &change.path)?;
    if found == Found::Nothing || lfs::is_fetched(root, change, &found)? {
        return Ok(true);
    }
    for side in [change.old, change.new].into_iter().flatten().chain(change.also.iter().copied()) {
        if equals(root, &change.path, &found, side)? {
            return Ok(true);
        }
    }
    // Of a submodule that leaves, only an empty directory is removed.
    Ok(change.new.is_none() && change.old.is_some_and(Side::is_submodule))
}

/// Whether a directory holds nothing but paths that are `judged` by themselves: of the old side, which leave, or of the
/// new one, which an interrupted pull wrote already.
fn holds_only(root: &Dir, path: &[u8], judged: &HashSet<&[u8]>) -> Result<bool, Failure> {
    if find(root, path)? != Found::Directory {
        return Ok(false);
    }
    let Some(dir) = enter(root, path)? else { return Ok(false) };
    for (name, kind) in dir.entries()? {
        let inner = [path, b"/", name.as_bytes()].concat();
        let known = match kind {
            FileType::Directory => holds_only(root, &inner, judged)?,
            _ => judged.contains(inner.as_slice()),
        };
        if !known {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Whether what was found is `side`, byte for byte.
fn equals(root: &Dir, path: &[u8], found: &Found, side: Side) -> Result<bool, Failure> {
    let id = match found {
        Found::Link(target) if side.is_link() => Oid::hash_object(ObjectType::Blob, target),
        Found::Directory => return Ok(side.is_submodule()),
        Found::File { executable, .. } if !side.is_link() && !side.is_submodule() => {
            if *executable != (side.mode & 0o100 != 0) {
                return Ok(false);
            }
            match blob(root, path)? {
                Some(id) => Ok(id),
                None => return Ok(false),
            }
        }
        _ => return Ok(false),
    };
    Ok(id.map_err(|error| Failure::internal(error.to_string()))? == side.id)
}

/// What stands at a path; no link on the way is followed.
pub(super) fn find(root: &Dir, path: &[u8]) -> Result<Found, Failure> {
    let (parent, name) = split(path);
    let parent = match parent.map(|parent| enter(root, parent)).transpose()? {
        Some(None) => return Ok(Found::Nothing),
        Some(Some(parent)) => Some(parent),
        None => None,
    };
    let dir = parent.as_ref().unwrap_or(root);
    let Some(stat) = dir.look(OsStr::from_bytes(name))? else { return Ok(Found::Nothing) };
    Ok(match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => Found::File {
            length: u64::try_from(stat.st_size).unwrap_or(u64::MAX),
            executable: stat.st_mode & 0o100 != 0,
        },
        FileType::Symlink => {
            let target = rustix::fs::readlinkat(dir, OsStr::from_bytes(name), Vec::new()).map_err(io::Error::from)?;
            Found::Link(target.into_bytes())
        }
        FileType::Directory => Found::Directory,
        _ => Found::Other,
    })
}

/// The directory at `path`; `None` where there is none, or only through a link.
pub(super) fn enter(root: &Dir, path: &[u8]) -> Result<Option<Dir>, Failure> {
    match root.child(OsStr::from_bytes(path)) {
        Ok(dir) => Ok(Some(dir)),
        Err(error) => match rustix::io::Errno::from_io_error(&error) {
            Some(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR | rustix::io::Errno::LOOP) => Ok(None),
            _ => Err(super::guard::altered(format!("{}: {error}", String::from_utf8_lossy(path)))),
        },
    }
}

/// The id that the content of a regular file has as a blob, whatever its length; `None` where it is none by now.
fn blob(root: &Dir, path: &[u8]) -> Result<Option<Oid>, Failure> {
    let Some((file, length)) = regular(root, path)? else { return Ok(None) };
    let mut hash = gix::hash::io::Write::new(io::sink(), gix::hash::Kind::Sha1);
    write!(hash, "blob {length}\0")?;
    // One that grows while it is read is not the old one anyway.
    io::copy(&mut file.take(length + 1), &mut hash)?;
    let id = hash.hash.try_finalize().map_err(|error| Failure::internal(error.to_string()))?;
    Ok(Some(Oid::from_bytes(id.as_slice()).map_err(|error| Failure::internal(error.to_string()))?))
}

/// Reads a regular file whole; `None` where it is none by now.
pub(super) fn read(root: &Dir, path: &[u8]) -> Result<Option<Vec<u8>>, Failure> {
    let Some((file, length)) = regular(root, path)? else { return Ok(None) };
    let mut content = Vec::new();
    file.take(length + 1).read_to_end(&mut content)?;
    Ok(Some(content))
}

/// Opens a regular file and tells its length; `None` where it is none by now.
fn regular(root: &Dir, path: &[u8]) -> Result<Option<(File, u64)>, Failure> {
    let opened = root.open_file(OsStr::from_bytes(path), OFlags::RDONLY, 0);
    let file = match opened {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => {
            return Err(super::guard::altered(format!("{}: {error}", String::from_utf8_lossy(path))));
        }
    };
    let length = file.metadata().map_err(Failure::from)?;
    Ok(length.is_file().then_some((file, length.len())))
}

/// The directory and the name of a path.
pub(super) fn split(path: &[u8]) -> (Option<&[u8]>, &[u8]) {
    match path.iter().rposition(|&byte| byte == b'/') {
        Some(at) => (Some(&path[..at]), &path[at + 1..]),
        None => (None, path),
    }
}
