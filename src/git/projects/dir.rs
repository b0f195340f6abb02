//! A directory held by its descriptor: whatever is swapped on the way to it later, the work stays in it.

use std::{
    ffi::OsStr,
    fs::File,
    io::{self, Read, Write},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
};

use rustix::{
    fs::{
        AtFlags, FileType, Mode, OFlags, RawDir, RenameFlags, ResolveFlags, Stat, Statx, StatxAttributes, StatxFlags,
        fstat, fsync, makedev, mkdirat, open, openat2, renameat_with, statat, statx, unlinkat,
    },
    io::Errno,
};
use serde::{Deserialize, Serialize};

/// A name is one component, and nothing on the way is a link.
const BENEATH: ResolveFlags = ResolveFlags::BENEATH.union(ResolveFlags::NO_SYMLINKS).union(ResolveFlags::NO_MAGICLINKS);

/// An open directory.
#[derive(Debug)]
pub(crate) struct Dir(OwnedFd);

/// Which directory it is, whatever its name.
#[derive(Clone, Copy, Debug, Default, Eq, Serialize, Deserialize)]
pub(crate) struct Identity {
    /// The file system, until the next mount: disks may be numbered in another order then.
    pub(crate) device: u64,
    /// The inode on it.
    pub(crate) inode: u64,
    /// When it was made, in nanoseconds, where the file system tells: numbers of removed inodes are given out again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) born: Option<i64>,
}

impl PartialEq for Identity {
    fn eq(&self, other: &Self) -> bool {
        let same = match (self.born, other.born) {
            // Two directories made in the same nanosecond under the same number are one.
            (Some(ours), Some(theirs)) => ours == theirs,
            _ => self.device == other.device,
        };
        same && self.inode == other.inode
    }
}

impl Identity {
    fn of(stat: &Statx) -> Self {
        let born = (stat.stx_mask & StatxFlags::BTIME.bits() != 0)
            .then(|| stat.stx_btime.tv_sec.saturating_mul(1_000_000_000).saturating_add(stat.stx_btime.tv_nsec.into()));
        Self { device: makedev(stat.stx_dev_major, stat.stx_dev_minor), inode: stat.stx_ino, born }
    }
}

impl Dir {
    /// Opens a directory by its path; the last component must not be a link.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        Ok(Self(open(path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?))
    }

    /// Opens a directory beneath this one.
    pub(crate) fn child(&self, name: impl AsRef<OsStr>) -> io::Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        Ok(Self(openat2(&self.0, name.as_ref(), flags, Mode::empty(), BENEATH)?))
    }

    /// Makes a directory with exactly `mode`, or takes the one that is there, and opens it.
    pub(crate) fn ensure(&self, name: &str, mode: u32) -> io::Result<Self> {
        match mkdirat(&self.0, name, Mode::from_raw_mode(mode)) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(self.explained(error)),
        }
        let child = self.child(name)?;
        // One that was given away already is not ours to change.
        if fstat(&child.0)?.st_mode & 0o7777 != mode {
            child.set_mode(mode)?;
        }
        Ok(child)
    }

    /// Makes a new directory with exactly `mode` and opens it.
    pub(crate) fn make(&self, name: &str, mode: u32) -> io::Result<Self> {
        mkdirat(&self.0, name, Mode::from_raw_mode(mode)).map_err(|error| self.explained(error))?;
        let child = self.child(name)?;
        child.set_mode(mode)?;
        Ok(child)
    }

    /// Sets the permissions of this directory.
    pub(crate) fn set_mode(&self, mode: u32) -> io::Result<()> {
        Ok(rustix::fs::fchmod(&self.0, Mode::from_raw_mode(mode))?)
    }

    /// Which directory this is.
    pub(crate) fn identity(&self) -> io::Result<Identity> {
        let wanted = StatxFlags::BASIC_STATS | StatxFlags::BTIME;
        Ok(Identity::of(&statx(&self.0, "", AtFlags::EMPTY_PATH, wanted)?))
    }

    /// Which directory stands under `name`; `None` where nothing does, or anything else.
    pub(crate) fn identify(&self, name: &str) -> io::Result<Option<Identity>> {
        match statx(&self.0, name, AtFlags::SYMLINK_NOFOLLOW, StatxFlags::BASIC_STATS | StatxFlags::BTIME) {
            Ok(stat) if FileType::from_raw_mode(stat.stx_mode.into()) == FileType::Directory => {
                Ok(Some(Identity::of(&stat)))
            }
            Ok(_) | Err(Errno::NOENT) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// What stands under `name`, links not followed; `None` where nothing does.
    pub(crate) fn look(&self, name: impl AsRef<OsStr>) -> io::Result<Option<Stat>> {
        match statat(&self.0, name.as_ref(), AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => Ok(Some(stat)),
            Err(Errno::NOENT) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Opens a file beneath this directory; never blocks on one that is not regular.
    pub(crate) fn open_file(&self, name: impl AsRef<OsStr>, flags: OFlags, mode: u32) -> io::Result<File> {
        let flags = flags | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let opened = openat2(&self.0, name.as_ref(), flags, Mode::from_raw_mode(mode), BENEATH);
        Ok(opened.map_err(|error| self.explained(error))?.into())
    }

    /// Reads a small regular file; `None` where nothing stands under `name`.
    pub(crate) fn read(&self, name: impl AsRef<OsStr>, longest: u64) -> io::Result<Option<Vec<u8>>> {
        let file = match self.open_file(name, OFlags::RDONLY, 0) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        if !file.metadata()?.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "not a regular file"));
        }
        let mut bytes = Vec::new();
        file.take(longest + 1).read_to_end(&mut bytes)?;
        if bytes.len() as u64 > longest {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "too long"));
        }
        Ok(Some(bytes))
    }

    /// Writes a file that is, after any crash, the old one or the new one, and durable once this returns.
    pub(crate) fn write_durably(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        // Names of ours never begin with a dot, so this is nobody else's.
        let beside = format!(".{:032x}", rand::random::<u128>());
        let written =
            self.open_file(&beside, OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL, 0o600).and_then(|mut file| {
                file.write_all(bytes)?;
                file.sync_all()?;
                renameat_with(&self.0, beside.as_str(), &self.0, name, RenameFlags::empty())?;
                self.sync()
            });
        if written.is_err() {
            let _ = unlinkat(&self.0, beside.as_str(), AtFlags::empty());
        }
        written
    }

    /// Removes a file durably; nothing to do where it is not there.
    pub(crate) fn unlink_durably(&self, name: &str) -> io::Result<()> {
        match unlinkat(&self.0, name, AtFlags::empty()) {
            Ok(()) => self.sync(),
            Err(Errno::NOENT) => Ok(()),
            Err(error) => Err(self.explained(error)),
        }
    }

    /// Renames into another directory, where nothing may stand under the new name.
    pub(crate) fn rename_to(&self, name: &str, into: &Self, new: &str) -> io::Result<()> {
        renameat_with(&self.0, name, &into.0, new, RenameFlags::NOREPLACE).map_err(|error| {
            let fixed = [self.is_fixed(""), self.is_fixed(name), into.is_fixed("")].contains(&true);
            if error == Errno::PERM && fixed { immutable() } else { error.into() }
        })
    }

    /// An error of something done in this directory. Of one that may not change the kernel says the same as where rights
    /// are missing.
    fn explained(&self, error: Errno) -> io::Error {
        if error == Errno::PERM && self.is_fixed("") { immutable() } else { error.into() }
    }

    /// Whether an administrator forbade every change of this directory or of an entry of it.
    fn is_fixed(&self, name: &str) -> bool {
        let flags = AtFlags::EMPTY_PATH | AtFlags::SYMLINK_NOFOLLOW;
        let fixed = StatxAttributes::IMMUTABLE | StatxAttributes::APPEND;
        statx(&self.0, name, flags, StatxFlags::empty()).is_ok_and(|stat| stat.stx_attributes.intersects(fixed))
    }

    /// Makes its entries durable.
    pub(crate) fn sync(&self) -> io::Result<()> {
        Ok(fsync(&self.0)?)
    }

    /// Every name in it, with its type.
    pub(crate) fn entries(&self) -> io::Result<Vec<(std::ffi::OsString, FileType)>> {
        // A descriptor of its own: reading moves the offset.
        let own = self.child(".")?;
        let mut buffer = Vec::with_capacity(16 << 10);
        let mut raw = RawDir::new(&own.0, buffer.spare_capacity_mut());
        let mut found = Vec::new();
        while let Some(entry) = raw.next() {
            let entry = entry?;
            let name = entry.file_name().to_bytes();
            if name != b"." && name != b".." {
                found.push((OsStr::from_bytes(name).to_owned(), entry.file_type()));
            }
        }
        Ok(found)
    }

    /// A second descriptor of it, for a child.
    pub(crate) fn handle(&self) -> io::Result<OwnedFd> {
        Ok(rustix::io::fcntl_dupfd_cloexec(&self.0, 3)?)
    }
}

/// What a file system that refuses writes says, for a directory that does.
fn immutable() -> io::Error {
    io::Error::new(io::ErrorKind::ReadOnlyFilesystem, "a directory is immutable (lsattr; chattr -i)")
}

impl AsFd for Dir {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl From<OwnedFd> for Dir {
    fn from(fd: OwnedFd) -> Self {
        Self(fd)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_and_climbing_names_are_not_followed() {
        let place = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(place.path().join("real/inner")).unwrap();
        std::os::unix::fs::symlink("inner", place.path().join("real/link")).unwrap();
        let dir = Dir::open(&place.path().join("real")).unwrap();
        for bad in ["link", "..", "../real", "/tmp"] {
            assert!(dir.child(bad).is_err(), "{bad}");
        }
        assert!(dir.child("inner").is_ok());
        std::os::unix::fs::symlink("real", place.path().join("away")).unwrap();
        assert!(Dir::open(&place.path().join("away")).is_err());
    }

    #[test]
    fn a_directory_stays_itself_when_its_disk_gets_another_number() {
        let one = Identity { device: 1, inode: 2, born: Some(3) };
        assert_eq!(one, Identity { device: 9, ..one });
        assert_ne!(one, Identity { born: Some(4), ..one });
        assert_ne!(one, Identity { inode: 4, ..one });
        let unborn = Identity { born: None, ..one };
        assert_ne!(unborn, Identity { device: 9, ..unborn });
        assert_eq!(unborn, one);
    }

    #[test]
    fn a_file_is_written_whole_and_its_helper_is_gone() {
        let place = tempfile::tempdir().unwrap();
        let dir = Dir::open(place.path()).unwrap();
        dir.write_durably("a", b"one").unwrap();
        dir.write_durably("a", b"two").unwrap();
        assert_eq!(dir.read("a", 10).unwrap().unwrap(), b"two");
        assert_eq!(dir.entries().unwrap().len(), 1);
        assert!(dir.read("a", 2).is_err());
        assert_eq!(dir.read("b", 2).unwrap(), None);
    }
}
