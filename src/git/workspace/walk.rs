//! One walk over a wanted tree before anything of it is written: names, counts, sizes, and that every object is there.

use std::collections::HashSet;

use gix::{
    ObjectId, Repository,
    bstr::{BString, ByteSlice},
    objs::tree::EntryKind,
    validate::path::component,
};
use serde::{Deserialize, Serialize};

use crate::{
    failure::{ErrorClass, Failure},
    git::child::Reporter,
};

/// The longest path that a file system takes, in bytes.
const LONGEST_PATH: usize = 4000;
/// The longest target of a link, in bytes.
const LONGEST_LINK: u64 = 4095;
/// Disguises of `.git` are refused for every file system: a project may be copied to another.
const EVERYWHERE: component::Options =
    component::Options { protect_windows: false, protect_hfs: true, protect_ntfs: true };
/// How many entries are walked between two steps.
const STRIDE: u64 = 4096;

/// How large a tree may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Budget {
    /// Files, links and submodules.
    pub(crate) files: u64,
    /// Bytes of files and links.
    pub(crate) bytes: u64,
}

/// What a tree holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Size {
    /// Files, links and submodules.
    pub(super) files: u64,
    /// Bytes of files and links.
    pub(super) bytes: u64,
}

/// Walks `tree` of `repo`.
///
/// # Errors
/// `quota` over the budget, `forbidden` for a name that must not be written, `corrupt` where an object is missing.
pub(super) fn walk(repo: &Repository, tree: ObjectId, budget: Budget, reporter: &Reporter) -> Result<Size, Failure> {
    let mut size = Size::default();
    let mut seen = 0_u64;
    let mut waiting = vec![(tree, BString::default())];
    while let Some((id, path)) = waiting.pop() {
        let tree = repo.find_tree(id).map_err(|error| missing(&path, &error.to_string()))?;
        let mut names = HashSet::new();
        let mut last = Vec::new();
        for entry in tree.iter() {
            let entry = entry.map_err(|error| missing(&path, &error.to_string()))?;
            seen += 1;
            if seen.is_multiple_of(STRIDE) {
                reporter.step();
            }
            let name = entry.filename();
            check_name(name, entry.kind()).map_err(|why| refused(&path, name, why))?;
            if !names.insert(name.to_owned()) {
                return Err(refused(&path, name, "is there twice"));
            }
            check_mode(entry.mode().value().into()).map_err(|why| missing(&path, why))?;
            let place = place(name, entry.mode().is_tree());
            if place <= last {
                return Err(missing(&path, OUT_OF_ORDER));
            }
            last = place;
            let mut inner = path.clone();
            if !inner.is_empty() {
                inner.push(b'/');
            }
            inner.extend_from_slice(name);
            if inner.len() > LONGEST_PATH {
                return Err(refused(&path, name, "has a path too long for a file system"));
            }
            match entry.kind() {
                EntryKind::Tree => {
                    // A tree of trees without files must end as well.
                    if seen > budget.files.saturating_mul(4).saturating_add(STRIDE) {
                        return Err(over("entries", budget.files, "max_files"));
                    }
                    waiting.push((entry.object_id(), inner));
                    continue;
                }
                EntryKind::Commit => {}
                EntryKind::Blob | EntryKind::BlobExecutable | EntryKind::Link => {
                    let header = repo.find_header(entry.object_id());
                    let header = header.map_err(|error| missing(&inner, &error.to_string()))?;
                    if !header.kind().is_blob() {
                        return Err(missing(&inner, "it is no file"));
                    }
                    if entry.mode().is_link() {
                        let why = check_link(header.size(), || {
                            repo.find_object(entry.object_id()).map(|link| link.detach().data)
                        });
                        why.map_err(|why| refused(&path, name, why))?;
                    }
                    size.bytes = size.bytes.saturating_add(header.size());
                }
            }
            size.files += 1;
            if size.files > budget.files {
                return Err(over("files", budget.files, "max_files"));
            }
            if size.bytes > budget.bytes {
                return Err(over("bytes", budget.bytes, "max_bytes"));
            }
        }
    }
    Ok(size)
}

/// What is said of a tree that git would not write.
pub(super) const OUT_OF_ORDER: &str = "its entries are not in order";

/// Where an entry stands among those of its tree: a directory as if its name ended in a slash.
pub(super) fn place(name: &[u8], directory: bool) -> Vec<u8> {
    [name, if directory { b"/" } else { b"" }].concat()
}

/// Whether a mode says what an entry is.
///
/// # Errors
/// Why not.
pub(super) fn check_mode(mode: u32) -> Result<(), &'static str> {
    match mode & 0o170_000 {
        0o100_000 | 0o120_000 | 0o040_000 | 0o160_000 => Ok(()),
        _ => Err("an entry of it is of an unknown kind"),
    }
}

/// Whether a link can be made; where it leads is nobody's business, since none is followed.
///
/// # Errors
/// Why not.
pub(super) fn check_link<E>(length: u64, read: impl FnOnce() -> Result<Vec<u8>, E>) -> Result<(), &'static str> {
    if length == 0 || length > LONGEST_LINK {
        return Err("is a link to nothing that a path could name");
    }
    match read() {
        Ok(target) if !target.contains(&0) => Ok(()),
        _ => Err("is a link to nothing that a path could name"),
    }
}

/// Whether a component may be written at all.
///
/// # Errors
/// Why not.
pub(in crate::git) fn check_name(name: &[u8], kind: EntryKind) -> Result<(), &'static str> {
    if name.len() > 255 {
        return Err("is longer than a file system takes");
    }
    if name.contains(&0) {
        return Err("has a byte of zero");
    }
    // On the file systems where this matters, it parts names as a slash does.
    if name.contains(&b'\\') && name.split(|byte| *byte == b'\\').any(is_dot_git) {
        return Err("is a disguise of .git");
    }
    let mode = matches!(kind, EntryKind::Link).then_some(component::Mode::Symlink);
    match gix::validate::path::component(name.as_bstr(), mode, EVERYWHERE) {
        Ok(_) => Ok(()),
        Err(component::Error::DotGitDir) => Err("is a disguise of .git"),
        Err(component::Error::SymlinkedGitModules) => Err("is a link in place of .gitmodules"),
        Err(_) => Err("is not a plain name"),
    }
}

fn is_dot_git(part: &[u8]) -> bool {
    matches!(gix::validate::path::component(part.as_bstr(), None, EVERYWHERE), Err(component::Error::DotGitDir))
}

fn refused(path: &BString, name: &[u8], why: &str) -> Failure {
    let path = if path.is_empty() { String::new() } else { format!("{}/", path.to_str_lossy()) };
    let message = format!("the upstream's tree has an entry that {why}: {path}{}", name.to_str_lossy());
    Failure::forbidden(message)
}

fn missing(path: &BString, why: &str) -> Failure {
    let message = format!("an object of the upstream's tree cannot be read at {:?}: {why}", path.to_str_lossy());
    Failure::new(ErrorClass::Corrupt, message)
}

fn over(what: &str, limit: u64, setting: &str) -> Failure {
    Failure::new(ErrorClass::Quota, format!("the upstream's tree has more than {limit} {what} (git.{setting})"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disguises_of_dot_git_and_climbing_names_are_refused() {
        let bad: [&[u8]; 13] = [
            b".git",
            b".GIT",
            b".Git",
            b"git~1",
            b"GIT~1",
            ".g\u{200c}it".as_bytes(),
            b".git ",
            b".git.",
            b".git::$INDEX_ALLOCATION",
            b"..",
            b"a/b",
            b".git\\config",
            b"a\\GIT~1\\b",
        ];
        for name in bad {
            assert!(check_name(name, EntryKind::Tree).is_err(), "{:?}", name.as_bstr());
        }
        assert!(check_name(&[b'x'; 256], EntryKind::Blob).is_err());
        assert!(check_name(b".gitmodules", EntryKind::Link).is_err());
        for name in
            [&b".gitignore"[..], b".gitmodules", b"a b", b"con", b"\xff\xfe", b"a:b", b"...", b".github", b"a\\b"]
        {
            assert!(check_name(name, EntryKind::Blob).is_ok(), "{:?}", name.as_bstr());
        }
    }
}
