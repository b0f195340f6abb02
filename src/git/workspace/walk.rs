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
    let mode = matches!(kind, EntryKind::Link).then_some(component::Mode::Symlink);
    // Disguises of `.git` are refused for every file system: a project may be copied to another.
    let options = component::Options { protect_windows: false, protect_hfs: true, protect_ntfs: true };
    match gix::validate::path::component(name.as_bstr(), mode, options) {
        Ok(_) => Ok(()),
        Err(component::Error::DotGitDir) => Err("is a disguise of .git"),
        Err(component::Error::SymlinkedGitModules) => Err("is a link in place of .gitmodules"),
        Err(_) => Err("is not a plain name"),
    }
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
        let bad: [&[u8]; 11] = [
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
        ];
        for name in bad {
            assert!(check_name(name, EntryKind::Tree).is_err(), "{:?}", name.as_bstr());
        }
        assert!(check_name(&[b'x'; 256], EntryKind::Blob).is_err());
        assert!(check_name(b".gitmodules", EntryKind::Link).is_err());
        for name in [&b".gitignore"[..], b".gitmodules", b"a b", b"con", b"\xff\xfe", b"a:b", b"...", b".github"] {
            assert!(check_name(name, EntryKind::Blob).is_ok(), "{:?}", name.as_bstr());
        }
    }
}
