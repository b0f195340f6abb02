//! The LFS objects that are here, in the order of directories that git-lfs uses.

use std::{
    fs::{self, File, OpenOptions},
    io::{Read, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::atomic::Ordering,
    time::Duration,
};

use gix::progress::StepShared;
use rustix::{
    fs::{FlockOperation, flock},
    io::Errno,
};
use sha2::{Digest, Sha256};

use crate::{
    failure::{ErrorClass, Failure},
    git::pointer::Pointer,
};

/// How often is tried to become the one who writes.
const POLL: Duration = Duration::from_millis(50);
/// How much is read at once.
const CHUNK: usize = 64 << 10;

/// A directory of LFS objects, to which nobody else writes just now.
pub(super) struct Store {
    objects: PathBuf,
    incoming: PathBuf,
    /// Held for as long as something may be written.
    _lock: File,
}

impl Store {
    /// Opens the store, once nobody else writes to it, and removes what a killed transfer left. Each try is a step.
    pub(super) fn open(path: &Path, steps: &StepShared) -> Result<Self, Failure> {
        let lock = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(path.join("lock"))?;
        loop {
            match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => break,
                Err(Errno::WOULDBLOCK | Errno::INTR) => {
                    steps.fetch_add(1, Ordering::Relaxed);
                    std::thread::sleep(POLL);
                }
                Err(error) => return Err(std::io::Error::from(error).into()),
            }
        }
        let store = Self { objects: path.join("objects"), incoming: path.join("incoming"), _lock: lock };
        match fs::remove_file(&store.incoming) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error.into()),
            _ => {}
        }
        fs::create_dir_all(&store.objects)?;
        Ok(store)
    }

    fn path(&self, pointer: &Pointer) -> PathBuf {
        pointer.place().iter().fold(self.objects.clone(), |path, part| path.join(part))
    }

    /// Whether the object is here; it was checked when it came.
    pub(super) fn has(&self, pointer: &Pointer) -> bool {
        self.path(pointer).symlink_metadata().is_ok_and(|stat| stat.is_file() && stat.len() == pointer.size())
    }

    /// Takes the object in, if it is what the pointer says; `host` sends it.
    pub(super) fn take(
        &self,
        pointer: &Pointer,
        from: impl Read,
        moved: &StepShared,
        host: &str,
    ) -> Result<(), Failure> {
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&self.incoming)?;
        copy(pointer, from, &mut file, moved, host)?;
        // Whole before it has its name: what has a name is believed later. The name itself may be lost.
        file.sync_all()?;
        let path = self.path(pointer);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
        }
        Ok(fs::rename(&self.incoming, &path)?)
    }
}

/// Copies what comes, and not a byte more than was announced.
fn copy(
    pointer: &Pointer,
    from: impl Read,
    into: &mut impl Write,
    moved: &StepShared,
    host: &str,
) -> Result<(), Failure> {
    let wrong = |what: &str| {
        let message = format!("what {host} sends as the LFS object {} has another {what}", pointer.oid());
        Failure::new(ErrorClass::Corrupt, message)
    };
    let mut from = from.take(pointer.size().saturating_add(1));
    let (mut hash, mut length, mut chunk) = (Sha256::new(), 0_u64, vec![0; CHUNK]);
    loop {
        let count = match from.read(&mut chunk) {
            Ok(0) => break,
            Ok(count) => count,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(error) => {
                let message = format!("{host}: the connection broke within an LFS object: {}", error.kind());
                return Err(Failure::new(ErrorClass::Network, message));
            }
        };
        moved.fetch_add(count, Ordering::Relaxed);
        length += count as u64;
        if length > pointer.size() {
            return Err(wrong("size"));
        }
        hash.update(&chunk[..count]);
        into.write_all(&chunk[..count])?;
    }
    if length != pointer.size() {
        return Err(wrong("size"));
    }
    let hash: [u8; 32] = hash.finalize().into();
    let oid = (0..32).map(|at| u8::from_str_radix(&pointer.oid()[2 * at..2 * at + 2], 16));
    if !hash.iter().copied().map(Ok).eq(oid) {
        return Err(wrong("content"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The SHA-256 of `hello`.
    const HELLO: &str = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824";

    #[test]
    fn only_what_the_pointer_says_is_taken() {
        let place = tempfile::tempdir().unwrap();
        let store = Store::open(place.path(), &StepShared::default()).unwrap();
        let pointer = Pointer::try_from((HELLO.to_owned(), 5)).unwrap();
        let moved = StepShared::default();
        for bad in ["", "hell", "hellO", "hello!"] {
            let failure = store.take(&pointer, bad.as_bytes(), &moved, "h").unwrap_err();
            assert_eq!(failure.class, ErrorClass::Corrupt, "{bad}");
            assert!(!store.has(&pointer));
        }
        // One that never ends is not read to its end.
        assert!(store.take(&pointer, std::io::repeat(b'x'), &moved, "h").is_err());
        store.take(&pointer, &b"hello"[..], &moved, "h").unwrap();
        assert!(store.has(&pointer));
        assert!(place.path().join("objects/2c/f2").join(HELLO).exists());
    }
}
