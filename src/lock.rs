//! One agent a storage directory: a lock file that the kernel gives up when its holder dies.

pub mod door;

use std::{
    fs::{self, File},
    io::{self, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use rustix::fs::{FlockOperation, flock};

/// The right to use a storage directory; given up on drop.
#[derive(Debug)]
pub struct StorageLock {
    _file: File,
}

/// Why a storage directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Another agent has it.
    #[error("another agent (process {holder}) uses the storage directory {path}: stop it, or give this one another")]
    Held {
        /// The directory.
        path: PathBuf,
        /// What the holder wrote into the lock file.
        holder: String,
    },
    /// It cannot be made or written.
    #[error("the storage directory {path} cannot be used: {source}")]
    Unusable {
        /// The path in question.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

impl StorageLock {
    /// The agent's own directory under `storage`.
    #[must_use]
    pub fn directory(storage: &Path) -> PathBuf {
        storage.join(".haul")
    }

    /// Makes the agent's directory under `storage` and takes the lock in it.
    ///
    /// # Errors
    /// When another process holds it, or the directory cannot be written.
    pub fn take(storage: &Path) -> Result<Self, LockError> {
        let directory = Self::directory(storage);
        let unusable = |path: &Path| {
            let path = path.to_owned();
            move |source| LockError::Unusable { path, source }
        };
        fs::create_dir_all(storage).map_err(unusable(storage))?;
        fs::DirBuilder::new().recursive(true).mode(0o711).create(&directory).map_err(unusable(&directory))?;
        let path = directory.join("lock");
        let mut options = File::options();
        let mut file = options
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(unusable(&path))?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => {
                let holder = fs::read_to_string(&path).unwrap_or_default().trim().to_owned();
                return Err(LockError::Held { path: storage.to_owned(), holder });
            }
            Err(error) => return Err(unusable(&path)(error.into())),
        }
        file.set_len(0).map_err(unusable(&path))?;
        writeln!(file, "{}", std::process::id()).map_err(unusable(&path))?;
        Ok(Self { _file: file })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_agent_on_one_storage_directory_is_refused_and_told_who_has_it() {
        let storage = tempfile::tempdir().unwrap();
        let first = StorageLock::take(storage.path()).unwrap();
        let refused = StorageLock::take(storage.path()).unwrap_err();
        assert!(refused.to_string().contains(&std::process::id().to_string()), "{refused}");
        drop(first);
        StorageLock::take(storage.path()).unwrap();
    }
}
