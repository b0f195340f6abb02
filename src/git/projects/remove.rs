//! Removing a tree by descriptor: no link is followed, no file system left, no depth or width too much.

use std::{ffi::OsStr, io};

use rustix::{
    fs::{AtFlags, FileType, Mode, OFlags, RenameFlags, ResolveFlags, openat2, renameat_with, unlinkat},
    io::Errno,
    process::{getgid, getuid},
};

use super::dir::Dir;

/// Directories deeper than this are first moved up, so that descriptors and stack stay bounded.
const DEEPEST: usize = 48;

/// Removes what stands under `name` in `trash`, a directory that only the agent enters.
///
/// Stops early when `go_on` says so, which is asked for every entry.
///
/// # Errors
/// The first thing that could not be removed; the rest is removed all the same.
pub(super) fn remove(trash: &Dir, name: &OsStr, go_on: &mut dyn FnMut() -> bool) -> io::Result<()> {
    let mut moved = Vec::new();
    let mut result = remove_one(trash, trash, name, 0, &mut moved, go_on);
    while let Some(next) = moved.pop() {
        let removed = remove_one(trash, trash, OsStr::new(&next), 0, &mut moved, go_on);
        result = result.and(removed);
    }
    result
}

fn remove_one(
    trash: &Dir,
    parent: &Dir,
    name: &OsStr,
    depth: usize,
    moved: &mut Vec<String>,
    go_on: &mut dyn FnMut() -> bool,
) -> io::Result<()> {
    if !go_on() {
        return Err(io::Error::new(io::ErrorKind::Interrupted, "stopped"));
    }
    match unlinkat(parent, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => return Ok(()),
        Err(Errno::ISDIR | Errno::PERM) => {}
        Err(error) => return Err(error.into()),
    }
    if depth >= DEEPEST {
        let up = format!("{:032x}", rand::random::<u128>());
        renameat_with(parent, name, trash, up.as_str(), RenameFlags::NOREPLACE)?;
        moved.push(up);
        return Ok(());
    }
    let dir = enter(parent, name)?;
    let mut result = Ok(());
    for (inner, kind) in dir.entries()? {
        let removed = match kind {
            FileType::Directory | FileType::Unknown => remove_one(trash, &dir, &inner, depth + 1, moved, go_on),
            _ if !go_on() => Err(io::Error::new(io::ErrorKind::Interrupted, "stopped")),
            _ => match unlinkat(&dir, inner.as_os_str(), AtFlags::empty()) {
                Ok(()) | Err(Errno::NOENT) => Ok(()),
                Err(error) => Err(error.into()),
            },
        };
        result = result.and(removed);
    }
    result?;
    Ok(unlinkat(parent, name, AtFlags::REMOVEDIR)?)
}

/// Opens a directory to empty it, giving its owner the right to where that is missing; mount points are not entered.
fn enter(parent: &Dir, name: &OsStr) -> io::Result<Dir> {
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    let open = |flags| {
        openat2(parent, name, flags | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty(), resolve)
    };
    // Only through a handle on the very directory: a name could be swapped for a link.
    if let Ok(handle) = open(OFlags::PATH) {
        use std::os::fd::AsRawFd;
        let name = format!("/proc/self/fd/{}", handle.as_raw_fd());
        if rustix::fs::chmod(&name, Mode::RWXU) == Err(Errno::PERM) {
            // Another's: the agent may make it its own.
            let _ = rustix::fs::chownat(&handle, "", Some(getuid()), Some(getgid()), AtFlags::EMPTY_PATH);
            let _ = rustix::fs::chmod(&name, Mode::RWXU);
        }
    }
    Ok(open(OFlags::RDONLY)?.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn deep_and_locked_trees_go_and_links_are_not_followed() {
        let place = tempfile::tempdir().unwrap();
        let trash = place.path().join("trash");
        let keep = place.path().join("keep");
        fs::create_dir_all(&keep).unwrap();
        fs::write(keep.join("file"), "x").unwrap();
        let deep = (0..400).fold(trash.join("x"), |path, _| path.join("d"));
        fs::create_dir_all(&deep).unwrap();
        fs::write(deep.join("f"), "x").unwrap();
        std::os::unix::fs::symlink(&keep, trash.join("x/link")).unwrap();
        let locked = trash.join("x/locked");
        fs::create_dir(&locked).unwrap();
        fs::write(locked.join("f"), "x").unwrap();
        fs::set_permissions(&locked, std::os::unix::fs::PermissionsExt::from_mode(0o000)).unwrap();
        let dir = Dir::open(&trash).unwrap();
        remove(&dir, OsStr::new("x"), &mut || true).unwrap();
        assert!(dir.entries().unwrap().is_empty());
        assert!(keep.join("file").exists());
    }
}
