//! Copying the objects of a mirror into a new project.
//!
//! Cloned where the file system can, else copied; never hard links, through which the owner of a project could
//! change the mirror. What nobody else reads is moved, if it lies on the same file system.

use std::{ffi::OsStr, fs::File, io, os::unix::ffi::OsStrExt, path::Path, thread::JoinHandle};

use rustix::{
    fs::{FileType, OFlags, copy_file_range, ioctl_ficlone},
    io::Errno,
};

use super::{dir::Dir, staging::give};
use crate::{
    failure::{ErrorClass, Failure},
    protocol::Owner,
};

/// How much is copied between two looks at whether to go on.
const CHUNK: usize = 32 << 20;

/// What is this long goes down to the disk on its own, while the project is made; what is shorter waits for the end.
const LONG: u64 = 8 << 20;

/// What becomes of the packs that are taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Packs {
    /// They stay: others read them.
    Copied,
    /// They go: nobody else reads them.
    Moved,
}

/// Files that the disk is taking just now.
#[derive(Debug, Default)]
pub(super) struct Writing(Vec<JoinHandle<io::Result<()>>>);

impl Writing {
    fn start(&mut self, file: File) {
        // Without a thread it waits for the end like everything else.
        let writer = std::thread::Builder::new().name("writer".to_owned()).spawn(move || file.sync_data());
        self.0.extend(writer.ok());
    }

    /// Takes those of another copy over.
    pub(super) fn join(&mut self, other: Self) {
        self.0.extend(other.0);
    }

    /// Waits until the disk has them.
    pub(super) fn finish(&mut self) -> io::Result<()> {
        let ended = |writer: JoinHandle<io::Result<()>>| {
            writer.join().unwrap_or_else(|_| Err(io::Error::other("writing an object file down failed")))
        };
        // All of them, also after one that failed.
        self.0.drain(..).map(ended).fold(Ok(()), io::Result::and)
    }
}

/// Copies packs and loose objects from the bare repository `mirror` into the `objects` directory `into`, and says what
/// is still on its way to the disk.
///
/// What is made is `owner`'s, if one is given. `moved` is told the bytes of every piece, and stops the copy with an error of its own.
///
/// # Errors
/// When something cannot be read or written, or what `moved` said.
pub(super) fn copy(
    mirror: &Path,
    into: &Dir,
    owner: Option<Owner>,
    taken: Packs,
    moved: &mut dyn FnMut(u64) -> Result<(), Failure>,
) -> Result<Writing, Failure> {
    let mut writing = Writing::default();
    let from = Dir::open(&mirror.join("objects"))?;
    let packs = into.ensure("pack", 0o755)?;
    give(&packs, owner)?;
    give(into.ensure("info", 0o755)?, owner)?;
    for (name, kind) in from.entries()? {
        let bytes = name.as_bytes();
        if kind == FileType::Directory && bytes.len() == 2 && bytes.iter().all(u8::is_ascii_hexdigit) {
            let fan = name.to_str().ok_or_else(|| Failure::internal("a name of two digits is not text"))?;
            let fan = into.ensure(fan, 0o755)?;
            give(&fan, owner)?;
            let loose = |file: &[u8]| file.len() == 38;
            copy_files(&from.child(&name)?, &fan, owner, (&loose, Packs::Copied), &mut writing, moved)?;
        }
    }
    match from.child("pack") {
        Ok(source) => {
            let whole = |file: &[u8]| {
                file.starts_with(b"pack-") && [&b".pack"[..], b".idx", b".rev"].iter().any(|end| file.ends_with(end))
            };
            copy_files(&source, &packs, owner, (&whole, taken), &mut writing, moved)?;
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error.into()),
    }
    Ok(writing)
}

fn copy_files(
    from: &Dir,
    into: &Dir,
    owner: Option<Owner>,
    (wanted, taken): (&dyn Fn(&[u8]) -> bool, Packs),
    writing: &mut Writing,
    moved: &mut dyn FnMut(u64) -> Result<(), Failure>,
) -> Result<(), Failure> {
    for (name, kind) in from.entries()? {
        if matches!(kind, FileType::RegularFile | FileType::Unknown) && wanted(name.as_bytes()) {
            let target = match taken {
                Packs::Moved => move_file(from, into, &name, moved)?,
                Packs::Copied => None,
            };
            let target = match target {
                Some(target) => target,
                None => {
                    let source = from.open_file(&name, OFlags::RDONLY, 0)?;
                    let target = into.open_file(&name, OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL, 0o444)?;
                    copy_file(&source, &target, moved)?;
                    target
                }
            };
            rustix::fs::fchmod(&target, rustix::fs::Mode::from_raw_mode(0o444)).map_err(io::Error::from)?;
            give(&target, owner)?;
            if target.metadata()?.len() >= LONG {
                writing.start(target);
            }
        }
    }
    Ok(())
}

/// Moves a file; nothing where it lies on another file system.
fn move_file(
    from: &Dir,
    into: &Dir,
    name: &OsStr,
    moved: &mut dyn FnMut(u64) -> Result<(), Failure>,
) -> Result<Option<File>, Failure> {
    let Some(plain) = name.to_str() else { return Ok(None) };
    match from.rename_to(plain, into, plain) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::CrossesDevices => return Ok(None),
        Err(error) => return Err(error.into()),
    }
    let target = into.open_file(name, OFlags::RDONLY, 0)?;
    moved(target.metadata()?.len())?;
    Ok(Some(target))
}

pub(super) fn copy_file(
    source: &File,
    target: &File,
    moved: &mut dyn FnMut(u64) -> Result<(), Failure>,
) -> Result<(), Failure> {
    let length = source.metadata()?.len();
    if ioctl_ficlone(target, source).is_ok() {
        return moved(length);
    }
    let mut copied = 0;
    loop {
        match copy_file_range(source, None, target, None, CHUNK) {
            Ok(0) => break,
            Ok(count) => {
                copied += count as u64;
                moved(count as u64)?;
            }
            Err(Errno::INTR) => {}
            // Older kernels, and some pairs of file systems.
            Err(Errno::XDEV | Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) if copied == 0 => {
                copied = io::copy(&mut &*source, &mut &*target)?;
                moved(copied)?;
                break;
            }
            Err(error) => return Err(io::Error::from(error).into()),
        }
    }
    if copied != length {
        return Err(Failure::new(ErrorClass::Internal, "a mirror changed while it was copied"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn a_mirror_keeps_its_packs_and_what_nobody_else_reads_gives_them() {
        for (taken, stays) in [(Packs::Copied, true), (Packs::Moved, false)] {
            let place = tempfile::tempdir().unwrap();
            let pack = place.path().join("mirror/objects/pack/pack-1.pack");
            std::fs::create_dir_all(pack.parent().unwrap()).unwrap();
            std::fs::write(&pack, "objects").unwrap();
            std::fs::create_dir(place.path().join("objects")).unwrap();
            let into = Dir::open(&place.path().join("objects")).unwrap();
            let mut bytes = 0;
            let mut moved = |count| {
                bytes += count;
                Ok(())
            };
            copy(&place.path().join("mirror"), &into, None, taken, &mut moved).unwrap();
            let taken = place.path().join("objects/pack/pack-1.pack");
            assert_eq!(std::fs::read(&taken).unwrap(), b"objects");
            assert_eq!(std::fs::metadata(&taken).unwrap().permissions().mode() & 0o777, 0o444);
            assert_eq!((pack.exists(), bytes), (stays, 7));
        }
    }
}
