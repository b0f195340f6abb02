//! What is checked before a library opens a repository that its user can write to.
//!
//! A pipe in place of a file blocks for ever, and a link leads out of the project. Whoever writes there can do so after
//! the check as well; the stall limit of the agent bounds what the check cannot see.

use std::{ffi::OsStr, io, os::unix::ffi::OsStrExt};

use rustix::{fs::FileType, io::Errno};

use super::waiting;
use crate::{
    failure::{ErrorClass, Failure},
    git::{child::Reporter, projects::Dir},
};

/// The most entries of a `.git`.
const MOST: usize = 300_000;
/// The deepest directory of a `.git`.
const DEEPEST: usize = 64;
/// The longest file that is read as a whole, in bytes.
pub(super) const LONGEST: u64 = 1 << 28;
/// The longest configuration, in bytes.
const LONGEST_CONFIG: u64 = 1 << 20;
/// Not read by anything we do.
const UNREAD: [&str; 6] = ["modules", "lfs", "hooks", "worktrees", "rr-cache", "annex"];
/// Files that lead a library to objects or settings outside the project.
const LEADING_OUT: [&str; 4] = ["commondir", "gitdir", "objects/info/alternates", "objects/info/http-alternates"];

/// A workspace that is not what the agent made.
pub(super) fn altered(what: impl std::fmt::Display) -> Failure {
    Failure::conflict(format!("the workspace was altered: {what}"))
}

/// What an error of the file system among a user's files means: what the user made of them, unless the disk or this
/// process is at its end.
pub(super) fn among(error: io::Error) -> Failure {
    match Errno::from_io_error(&error) {
        None | Some(Errno::MFILE | Errno::NFILE | Errno::NOMEM | Errno::BADF) => Failure::from(error),
        Some(_) => match Failure::from(error) {
            failure if failure.class == ErrorClass::Disk => failure,
            failure => altered(failure.message),
        },
    }
}

pub(super) fn is_directory(stat: &rustix::fs::Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::Directory
}

/// Checks the `.git` of `directory`.
///
/// # Errors
/// `conflict` for anything but plain files and directories in it, or where it leads out.
pub(super) fn check(directory: &Dir, reporter: &Reporter) -> Result<(), Failure> {
    match directory.look(".git").map_err(among)? {
        Some(stat) if is_directory(&stat) => {}
        Some(_) => return Err(altered(".git is not a directory")),
        None => return Err(altered(".git is gone")),
    }
    for name in [".gitignore", ".gitattributes"] {
        plain(directory, OsStr::new(name), LONGEST_CONFIG * 16)?;
    }
    let git = directory.child(".git").map_err(|error| altered(format!(".git: {error}")))?;
    for name in LEADING_OUT {
        // A missing directory on the way is found below.
        if git.look(name).is_ok_and(|found| found.is_some()) {
            return Err(altered(format!(".git/{name} leads out of the project")));
        }
    }
    for (name, longest) in [("HEAD", 4096), ("config", LONGEST_CONFIG), ("config.worktree", LONGEST_CONFIG)] {
        plain(&git, OsStr::new(name), longest)?;
    }
    for name in ["objects", "refs"] {
        git.child(name).map_err(|error| altered(format!(".git/{name}: {error}")))?;
    }
    for (name, needed) in [("config", true), ("config.worktree", false)] {
        let config = git.read(name, LONGEST_CONFIG).map_err(|error| altered(format!(".git/{name}: {error}")))?;
        let Some(config) = config else {
            if needed {
                return Err(altered(format!(".git/{name} is gone")));
            }
            continue;
        };
        if config.to_ascii_lowercase().windows(8).any(|window| window == b"[include") {
            return Err(altered(format!(".git/{name} includes other files")));
        }
    }
    let mut seen = 0;
    tree(&git, 0, false, &mut seen, reporter)
}

/// Checks everything beneath `dir`.
fn tree(dir: &Dir, depth: usize, objects: bool, seen: &mut usize, reporter: &Reporter) -> Result<(), Failure> {
    if depth > DEEPEST {
        return Err(altered("a directory in .git is too deep"));
    }
    for (name, kind) in dir.entries().map_err(among)? {
        *seen += 1;
        if *seen > MOST {
            return Err(altered(format!(".git has more than {MOST} entries")));
        }
        if seen.is_multiple_of(4096) {
            reporter.step();
        }
        match kind {
            // Swept by the next pull before anything in it is read; a killed one leaves links in there.
            FileType::Directory if depth == 0 && waiting::is_ours(&name) => {}
            FileType::Directory if depth == 0 && UNREAD.iter().any(|unread| OsStr::new(unread) == name) => {}
            FileType::Directory => {
                let inner = dir.child(&name).map_err(|error| altered(format!("{}: {error}", name.display())))?;
                tree(&inner, depth + 1, objects || (depth == 0 && name == "objects"), seen, reporter)?;
            }
            // Packs are mapped piece by piece, and single objects are many.
            FileType::RegularFile if objects && !name.as_bytes().ends_with(b".idx") => {}
            // That of git's own watcher; nothing opens it here.
            FileType::Socket if depth == 0 && name == "fsmonitor--daemon.ipc" => {}
            _ => plain(dir, &name, LONGEST)?,
        }
    }
    Ok(())
}

/// Checks that `name`, if it is there, is a regular file of a bearable length.
fn plain(dir: &Dir, name: &OsStr, longest: u64) -> Result<(), Failure> {
    let Some(stat) = dir.look(name).map_err(among)? else { return Ok(()) };
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(altered(format!("{} is not a regular file", name.display())));
    }
    if u64::try_from(stat.st_size).unwrap_or(u64::MAX) > longest {
        return Err(altered(format!("{} is too long to be read", name.display())));
    }
    Ok(())
}
