//! Whether a disk has room for what is about to be written, and whether it is to blame for what failed.

use std::{os::fd::AsFd, path::Path};

use bytesize::ByteSize;
use rustix::{
    fs::{AtFlags, CWD, Mode, OFlags, StatVfsMountFlags, StatxAttributes, StatxFlags, openat, statvfs, statx},
    io::Errno,
};

use crate::failure::{ErrorClass, Failure};

/// Refuses to write `bytes` at `place`, the disk of `whose`, where less than `reserve` would stay free.
///
/// # Errors
/// `disk`, which waits without spending attempts.
pub(crate) fn room(place: &Path, whose: &str, bytes: u64, reserve: u64) -> Result<(), Failure> {
    enough(rustix::fs::statvfs(place).map_err(std::io::Error::from)?, whose, bytes, reserve)
}

/// The same for the disk of a directory that is open: the names that lead to it may be a user's to change.
pub(crate) fn room_within(place: impl AsFd, whose: &str, bytes: u64, reserve: u64) -> Result<(), Failure> {
    enough(rustix::fs::fstatvfs(place).map_err(std::io::Error::from)?, whose, bytes, reserve)
}

fn enough(disk: rustix::fs::StatVfs, whose: &str, bytes: u64, reserve: u64) -> Result<(), Failure> {
    let free = disk.f_bavail.saturating_mul(disk.f_frsize);
    if free >= bytes.saturating_add(reserve) {
        return Ok(());
    }
    let need = if bytes == 0 { String::new() } else { format!("{} are needed and ", ByteSize::b(bytes)) };
    let (free, reserve) = (ByteSize::b(free), ByteSize::b(reserve));
    Err(Failure::new(
        ErrorClass::Disk,
        format!(
            "{free} are free on the disk of the {whose}, but {need}{reserve} are to stay free (disk.reserve); \
             free some space or delete projects"
        ),
    ))
}

/// What a kernel says where a file system refuses: no space, no quota, no writes, a device that fails.
const REFUSALS: [&str; 4] =
    ["No space left on device", "Disk quota exceeded", "Read-only file system", "Input/output error"];
/// The same as numbers, for libraries that drop the words.
const NUMBERS: [&str; 4] = ["os error 28)", "os error 122)", "os error 30)", "os error 5)"];

/// Whether the words of an error are those of a file system that refuses.
pub(crate) fn refused(words: &str) -> bool {
    REFUSALS.iter().chain(&NUMBERS).any(|text| words.contains(text))
}

/// The failure of class `disk` in place of one that a library could not explain, where the disk is to blame: the words
/// of the kernel are in it, or one of `places` takes nothing just now. Others stay what they are.
pub(crate) fn blamed(failure: Failure, places: &[&Path]) -> Failure {
    if !matches!(failure.class, ErrorClass::Internal | ErrorClass::Corrupt) {
        return failure;
    }
    let message = if refused(&failure.message) {
        failure.message
    } else if let Some(why) = places.iter().find_map(|place| refusal(place)) {
        format!("{} ({why})", failure.message)
    } else {
        return failure;
    };
    Failure::new(ErrorClass::Disk, message)
}

/// Why nothing can be written at `place` just now, if that is so.
pub(crate) fn refusal(place: &Path) -> Option<&'static str> {
    if let Ok(disk) = statvfs(place) {
        if disk.f_bavail == 0 {
            return Some("the disk is full");
        } else if disk.f_files > 0 && disk.f_favail == 0 {
            return Some("the disk has no inodes left");
        } else if disk.f_flag.contains(StatVfsMountFlags::RDONLY) {
            return Some("the file system is read-only");
        }
    }
    let fixed = StatxAttributes::IMMUTABLE | StatxAttributes::APPEND;
    let stat = statx(CWD, place, AtFlags::SYMLINK_NOFOLLOW, StatxFlags::empty());
    if stat.is_ok_and(|stat| stat.stx_attributes.intersects(fixed)) {
        return Some("the directory is immutable (chattr -i)");
    }
    // A file system in which the kernel found an error need not say that it is read-only: a file without a name is tried,
    // where it knows of such files.
    let nameless = OFlags::TMPFILE | OFlags::WRONLY | OFlags::CLOEXEC;
    match openat(CWD, place, nameless, Mode::RUSR | Mode::WUSR) {
        Err(Errno::ROFS) => Some("the file system takes no writes"),
        Err(Errno::IO) => Some("the device fails"),
        Err(Errno::NOSPC | Errno::DQUOT) => Some("the disk is full"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_a_disk_refused_is_blamed_on_it() {
        let place = tempfile::tempdir().unwrap();
        let class = |failure: Failure| blamed(failure, &[place.path()]).class;
        for (failure, expected) in [
            (Failure::internal("x: No space left on device (os error 28)"), ErrorClass::Disk),
            (Failure::internal("x: IO error (os error 5)"), ErrorClass::Disk),
            (Failure::new(ErrorClass::Corrupt, "write error: Input/output error"), ErrorClass::Disk),
            (Failure::internal("x"), ErrorClass::Internal),
            (Failure::conflict("No space left on device"), ErrorClass::Conflict),
        ] {
            assert_eq!(class(failure.clone()), expected, "{failure}");
        }
    }

    #[test]
    fn room_is_asked_of_a_directory_wherever_its_name_leads() {
        let place = tempfile::tempdir().unwrap();
        let inner = place.path().join("inner");
        std::fs::create_dir(&inner).unwrap();
        let directory = std::fs::File::open(&inner).unwrap();
        std::fs::rename(&inner, place.path().join("aside")).unwrap();
        room_within(&directory, "projects", 1, 1).unwrap();
        assert_eq!(room_within(&directory, "projects", 1, u64::MAX).unwrap_err().class, ErrorClass::Disk);
    }

    #[test]
    fn what_would_use_up_the_reserve_waits_and_says_what_is_missing() {
        let place = tempfile::tempdir().unwrap();
        room(place.path(), "projects", 0, 0).unwrap();
        room(place.path(), "projects", 1, 1).unwrap();
        for (bytes, reserve) in [(0, u64::MAX), (u64::MAX, 0), (u64::MAX, u64::MAX)] {
            let failure = room(place.path(), "projects", bytes, reserve).unwrap_err();
            assert_eq!((failure.class, failure.deferred), (ErrorClass::Disk, true));
            assert!(failure.message.contains("disk.reserve"), "{failure}");
        }
    }
}
