//! The index of a project, worked on in a copy and put back whole.

use std::{
    ffi::OsStr,
    io::{self, Read},
    os::unix::ffi::OsStrExt,
    path::Path,
};

use git2::{Index, IndexEntry, IndexTime};
use rustix::{
    fs::{AtFlags, OFlags, unlinkat},
    io::Errno,
};

use super::{
    guard::{LONGEST, altered, among},
    open::fault,
    plan::{self, Change},
    waiting::{INDEX, Waiting},
};
use crate::{failure::Failure, git::projects::Dir};

/// What tells one version of the file from another: device, inode, length, and the moment of its last change.
type Version = (u64, u64, i64, i64, u64);

/// A copy of the index as it was when the pull began to look.
pub(super) struct Copied {
    /// Its entries.
    pub(super) index: Index,
    version: Option<Version>,
}

impl Copied {
    /// Copies the index into `waiting` and reads it there.
    ///
    /// # Errors
    /// `conflict` where it cannot be read or has unmerged paths.
    pub(super) fn open(waiting: &Waiting) -> Result<Self, Failure> {
        match unlinkat(&waiting.dir, INDEX, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(error) => return Err(among(error.into())),
        }
        let version = match waiting.git.open_file(INDEX, OFlags::RDONLY, 0) {
            Ok(from) => {
                let version = version(&rustix::fs::fstat(&from).map_err(io::Error::from)?);
                let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL;
                let mut to = waiting.dir.open_file(INDEX, flags, 0o644).map_err(among)?;
                // It was checked before, and may have grown since.
                if io::copy(&mut from.take(LONGEST + 1), &mut to).map_err(among)? > LONGEST {
                    return Err(altered("the index is too long to be read"));
                }
                Some(version)
            }
            // A project without commits has none.
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(among(error)),
        };
        let index = Index::open(&waiting.join(INDEX)).map_err(|error| fault("its index cannot be read", &error))?;
        if index.has_conflicts() {
            return Err(Failure::conflict("the index of the project has unmerged paths; resolve them"));
        }
        Ok(Self { index, version })
    }

    /// Enters the new side of every change and puts the index into its place.
    ///
    /// # Errors
    /// `conflict` where another program holds its lock or changed it since it was copied.
    pub(super) fn put(mut self, waiting: &Waiting, root: &Dir, changes: &[Change]) -> Result<(), Failure> {
        let mut write = || -> Result<(), git2::Error> {
            self.doubt()?;
            for change in changes {
                note(root, &mut self.index, change)?;
            }
            self.index.write()
        };
        write().map_err(|error| fault("the index cannot be written", &error))?;
        let before = self.version;
        waiting.put_index(|git| Ok(git.look(INDEX)?.as_ref().map(version) == before))
    }

    /// Lets entries be compared by content that may have changed in the moment in which the old index was written: its
    /// own time tells that they are in doubt, and the new file has a later one.
    fn doubt(&mut self) -> Result<(), git2::Error> {
        let Some((.., seconds, nanoseconds)) = self.version else { return Ok(()) };
        let time = |entry: &IndexEntry| {
            (i64::from(entry.mtime.seconds()), u64::from(entry.mtime.nanoseconds())) >= (seconds, nanoseconds)
        };
        let doubtful: Vec<IndexEntry> = self.index.iter().filter(|entry| entry.file_size != 0 && time(entry)).collect();
        doubtful.into_iter().try_for_each(|entry| self.index.add(&IndexEntry { file_size: 0, ..entry }))
    }
}

fn version(stat: &rustix::fs::Stat) -> Version {
    (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime, stat.st_mtime_nsec)
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
