//! Lets the disk take a pack while the rest of it still comes: what is left to wait for at its end is little.

use std::{
    ffi::OsStr,
    fs::{self, File},
    io::{self, ErrorKind},
    os::unix::ffi::OsStrExt,
    path::Path,
    sync::mpsc::{RecvTimeoutError, channel},
    time::Duration,
};

/// How long bytes may stand in memory before the disk is asked to take them.
const PAUSE: Duration = Duration::from_millis(500);

/// Does `work`, which writes temporary files into `directory`, while they go down to the disk.
///
/// # Errors
/// What the disk said: it tells a fault once, so whoever asks it later would not hear of it.
pub(super) fn written<T>(directory: &Path, work: impl FnOnce() -> T) -> io::Result<T> {
    let (over, told) = channel::<()>();
    std::thread::scope(|scope| {
        let writer = scope.spawn(move || {
            while told.recv_timeout(PAUSE) == Err(RecvTimeoutError::Timeout) {
                write(directory)?;
            }
            Ok(())
        });
        let result = work();
        drop(over);
        writer.join().unwrap_or_else(|_| Err(io::Error::other("writing a pack early failed")))?;
        Ok(result)
    })
}

fn write(directory: &Path) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        if !is_temporary(&entry.file_name()) {
            continue;
        }
        match File::open(entry.path()) {
            Ok(file) => file.sync_data()?,
            // It has its name by now.
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn is_temporary(name: &OsStr) -> bool {
    name.as_bytes().starts_with(b".tmp")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_work_answers_comes_back_and_finished_files_are_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("pack-1.pack"), "whole").unwrap();
        fs::write(directory.path().join(".tmpABC"), "half").unwrap();
        assert_eq!(written(directory.path(), || 7).unwrap(), 7);
        write(directory.path()).unwrap();
        assert_eq!(fs::read(directory.path().join(".tmpABC")).unwrap(), b"half");
    }
}
