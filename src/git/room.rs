//! Whether a disk has room for what is about to be written.

use std::path::Path;

use bytesize::ByteSize;

use crate::failure::{ErrorClass, Failure};

/// Refuses to write `bytes` at `place`, the disk of `whose`, where less than `reserve` would stay free.
///
/// # Errors
/// `disk`, which waits without spending attempts.
pub(crate) fn room(place: &Path, whose: &str, bytes: u64, reserve: u64) -> Result<(), Failure> {
    let disk = rustix::fs::statvfs(place).map_err(std::io::Error::from)?;
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

#[cfg(test)]
mod tests {
    use super::*;

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
