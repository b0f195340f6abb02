//! The descriptors that a child was started with: those that its request names are taken, all others closed.

use std::{
    collections::HashMap,
    fs::{self, File},
    io,
    os::fd::{FromRawFd, OwnedFd, RawFd},
    sync::{Mutex, PoisonError},
};

use rustix::io::{FdFlags, fcntl_setfd};

/// What was taken and not yet asked for.
static TAKEN: Mutex<Option<HashMap<RawFd, OwnedFd>>> = Mutex::new(None);

/// Takes the descriptors in `named` and closes every other one above the standard streams.
pub(super) fn adopt(named: &[RawFd]) -> io::Result<()> {
    let mut open = Vec::new();
    for entry in fs::read_dir("/proc/self/fd")? {
        let number = entry?.file_name().to_str().and_then(|name| name.parse::<RawFd>().ok());
        open.extend(number.filter(|&number| number > 2));
    }
    let mut taken = HashMap::new();
    for number in open {
        // The one through which they were listed is closed by now.
        if fs::symlink_metadata(format!("/proc/self/fd/{number}")).is_err() {
            continue;
        }
        #[expect(unsafe_code, reason = "a descriptor that came with the process has no owner in it until here")]
        // SAFETY: it is open, and nothing in this process has opened a descriptor that it still holds: children call
        // this first thing, with one thread.
        let fd = unsafe { OwnedFd::from_raw_fd(number) };
        if named.contains(&number) {
            // Not for a program that the child may run.
            fcntl_setfd(&fd, FdFlags::CLOEXEC)?;
            taken.insert(number, fd);
        }
    }
    if let Some(missing) = named.iter().find(|number| !taken.contains_key(number)) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("descriptor {missing} was not inherited")));
    }
    *TAKEN.lock().unwrap_or_else(PoisonError::into_inner) = Some(taken);
    Ok(())
}

/// The descriptor that the agent left open for this child under `number`; given out once.
///
/// # Errors
/// When the request does not name it, or it was asked for before.
pub fn inherited(number: RawFd) -> io::Result<File> {
    let mut taken = TAKEN.lock().unwrap_or_else(PoisonError::into_inner);
    let fd = taken.as_mut().and_then(|taken| taken.remove(&number));
    let missing = || io::Error::new(io::ErrorKind::InvalidInput, format!("descriptor {number} was not inherited"));
    Ok(fd.ok_or_else(missing)?.into())
}

/// Lends a descriptor that was taken.
pub(super) fn borrow<T>(number: RawFd, look: impl FnOnce(&OwnedFd) -> T) -> Option<T> {
    let taken = TAKEN.lock().unwrap_or_else(PoisonError::into_inner);
    taken.as_ref()?.get(&number).map(look)
}
