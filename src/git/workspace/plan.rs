//! What a pull would write, and whether anything of the user is in the way.

use std::{
    collections::{BTreeMap, HashSet},
    ffi::OsStr,
    fs::File,
    io::{self, Read, Write as _},
    os::unix::ffi::OsStrExt,
};

use git2::{Index, ObjectType, Oid};
use rustix::{
    fs::{FileType, OFlags},
    io::Errno,
};

use super::{
    guard::{altered, among},
    lfs,
};
use crate::{
    failure::Failure,
    git::{child::Reporter, pointer::Pointer, projects::Dir},
};

/// The deepest directory of a user's that is looked into; what is deeper is in the way.
const DEEPEST: usize = 128;

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
    /// The length of the longest of the sides: a file that is longer is none of them, and is not read to find out.
    pub(super) longest: u64,
}

/// The mode of a submodule.
const SUBMODULE: u32 = 0o160_000;
/// The mode of a symbolic link.
const LINK: u32 = 0o120_000;

/// The mode of a directory.
const DIRECTORY: u32 = 0o040_000;

impl Side {
    /// As a tree has it; odd permissions mean the nearest that git knows.
    pub(super) fn of(entry: &git2::TreeEntry<'_>) -> Self {
        Self { id: entry.id(), mode: u32::try_from(entry.filemode()).unwrap_or(0) }
    }

    pub(super) fn is_directory(self) -> bool {
        self.mode == DIRECTORY
    }

    pub(super) fn is_submodule(self) -> bool {
        self.mode == SUBMODULE
    }

    pub(super) fn is_link(self) -> bool {
        self.mode == LINK
    }
}

impl Change {
    /// Takes another content, with its length, for one that is not the user's.
    pub(super) fn allow(&mut self, content: Option<(Side, u64)>) {
        if let Some((side, length)) = content {
            self.also.push(side);
            self.longest = self.longest.max(length);
        }
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
        } else if !is_clean(root, change)? && !holds_only(root, &change.path, &judged, DEEPEST)? {
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
    is_clean_at(root, &change.path, change)
}

/// Whether what stands at `path` is not the user's own, judged as the path of `change`.
pub(super) fn is_clean_at(root: &Dir, path: &[u8], change: &Change) -> Result<bool, Failure> {
    let found = find(root, path)?;
    if found == Found::Nothing || lfs::is_fetched(root, path, change, &found)? {
        return Ok(true);
    }
    // One that was made a terabyte long is not read into memory.
    let readable = !matches!(found, Found::File { length, .. } if length > change.longest);
    for side in [change.old, change.new].into_iter().flatten().chain(change.also.iter().copied()) {
        if readable && equals(root, path, &found, side)? {
            return Ok(true);
        }
    }
    // Of a submodule that leaves, only an empty directory is removed.
    Ok(change.new.is_none() && change.old.is_some_and(Side::is_submodule))
}

/// Whether a directory holds nothing but paths that are `judged` by themselves: of the old side, which leave, or of the
/// new one, which an interrupted pull wrote already.
fn holds_only(root: &Dir, path: &[u8], judged: &HashSet<&[u8]>, deepest: usize) -> Result<bool, Failure> {
    if deepest == 0 || find(root, path)? != Found::Directory {
        return Ok(false);
    }
    let Some(dir) = enter(root, path)? else { return Ok(false) };
    for (name, kind) in dir.entries().map_err(among)? {
        let inner = [path, b"/", name.as_bytes()].concat();
        let known = match kind {
            FileType::Directory => holds_only(root, &inner, judged, deepest - 1)?,
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
    let Some(stat) = dir.look(OsStr::from_bytes(name)).map_err(among)? else { return Ok(Found::Nothing) };
    Ok(match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => Found::File {
            length: u64::try_from(stat.st_size).unwrap_or(u64::MAX),
            executable: stat.st_mode & 0o100 != 0,
        },
        FileType::Symlink => {
            let target = rustix::fs::readlinkat(dir, OsStr::from_bytes(name), Vec::new());
            Found::Link(target.map_err(|error| among(error.into()))?.into_bytes())
        }
        FileType::Directory => Found::Directory,
        _ => Found::Other,
    })
}

/// The directory at `path`; `None` where there is none, or only through a link.
pub(super) fn enter(root: &Dir, path: &[u8]) -> Result<Option<Dir>, Failure> {
    match root.child(OsStr::from_bytes(path)) {
        Ok(dir) => Ok(Some(dir)),
        Err(error) => match Errno::from_io_error(&error) {
            Some(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => Ok(None),
            _ => Err(altered(format!("{}: {error}", String::from_utf8_lossy(path)))),
        },
    }
}

/// Opens a regular file; `None` where there is none by now.
pub(super) fn open(root: &Dir, path: &[u8]) -> Result<Option<File>, Failure> {
    match root.open_file(OsStr::from_bytes(path), OFlags::RDONLY, 0) {
        Ok(file) => Ok(file.metadata().map_err(among)?.is_file().then_some(file)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(altered(format!("{}: {error}", String::from_utf8_lossy(path)))),
    }
}

/// The id that the content of a regular file has as a blob, whatever its length; `None` where it is none by now.
fn blob(root: &Dir, path: &[u8]) -> Result<Option<Oid>, Failure> {
    let Some(file) = open(root, path)? else { return Ok(None) };
    let length = file.metadata().map_err(among)?.len();
    let mut hash = gix::hash::io::Write::new(io::sink(), gix::hash::Kind::Sha1);
    write!(hash, "blob {length}\0")?;
    // One that grows while it is read is not the old one anyway.
    io::copy(&mut file.take(length + 1), &mut hash).map_err(among)?;
    let id = hash.hash.try_finalize().map_err(|error| Failure::internal(error.to_string()))?;
    Ok(Some(Oid::from_bytes(id.as_slice()).map_err(|error| Failure::internal(error.to_string()))?))
}

/// Reads a regular file whole; `None` where it is none by now.
pub(super) fn read(root: &Dir, path: &[u8]) -> Result<Option<Vec<u8>>, Failure> {
    let Some(file) = open(root, path)? else { return Ok(None) };
    // One that grows while it is read is not the old one anyway.
    let length = file.metadata().map_err(among)?.len();
    let mut content = Vec::new();
    file.take(length + 1).read_to_end(&mut content).map_err(among)?;
    Ok(Some(content))
}

/// The directory and the name of a path.
pub(super) fn split(path: &[u8]) -> (Option<&[u8]>, &[u8]) {
    match path.iter().rposition(|&byte| byte == b'/') {
        Some(at) => (Some(&path[..at]), &path[at + 1..]),
        None => (None, path),
    }
}
