//! What differs between the tree that is checked out and the one that shall be.
//!
//! Both are walked side by side and only where they differ, so that a tree of a few objects that unfolds into a million
//! files is refused after the first of them that are too many.

use std::collections::BTreeMap;

use git2::{ObjectType, Odb, Oid, Repository, Tree};
use gix::objs::tree::EntryKind;

use super::{
    guard::altered,
    open::fault,
    plan::{Change, Side},
    walk::{self, Budget},
};
use crate::{
    failure::{ErrorClass, Failure},
    git::child::Reporter,
};

/// The longest path that a file system takes, in bytes.
const LONGEST_PATH: usize = 4000;
/// How many entries are compared between two steps.
const STRIDE: u64 = 4096;

/// The entries of a directory by their names.
type Entries = BTreeMap<Vec<u8>, Side>;

/// Every path that differs between two trees, checked for names and size.
///
/// # Errors
/// `quota` over the budget, `forbidden` for a name that must not be written, `corrupt` where an object is missing.
pub(super) fn changes(
    repo: &Repository,
    old: Option<&Tree<'_>>,
    new: &Tree<'_>,
    budget: Budget,
    reporter: &Reporter,
) -> Result<Vec<Change>, Failure> {
    let odb = repo.odb().map_err(|error| fault("its objects cannot be opened", &error))?;
    let mut compare = Compare { repo, odb, budget, reporter, all: Vec::new(), bytes: 0, seen: 0 };
    let mut waiting = vec![(old.map(Tree::id), Some(new.id()), Vec::new())];
    while let Some((old, new, path)) = waiting.pop() {
        let before = old.map(|id| compare.old_entries(id)).transpose()?.unwrap_or_default();
        let mut after = new.map(|id| compare.new_entries(id, &path)).transpose()?.unwrap_or_default();
        let pairs = before.into_iter().map(|(name, old)| {
            let new = after.remove(&name);
            (name, Some(old), new)
        });
        let mut pairs: Vec<_> = pairs.collect();
        pairs.extend(after.into_iter().map(|(name, new)| (name, None, Some(new))));
        for (name, old, new) in pairs {
            if old == new {
                continue;
            }
            let mut inner = path.clone();
            if !inner.is_empty() {
                inner.push(b'/');
            }
            inner.extend_from_slice(&name);
            let directory = |side: Option<Side>| side.filter(|side| side.is_directory()).map(|side| side.id);
            let file = |side: Option<Side>| side.filter(|side| !side.is_directory());
            let (trees, files) = ((directory(old), directory(new)), (file(old), file(new)));
            if inner.len() > LONGEST_PATH {
                return Err(refused(&path, &name, "has a path too long for a file system"));
            }
            if files != (None, None) {
                compare.add(inner.clone(), files.0, files.1)?;
            }
            if trees != (None, None) {
                waiting.push((trees.0, trees.1, inner));
            }
        }
    }
    Ok(compare.all)
}

struct Compare<'a> {
    repo: &'a Repository,
    odb: Odb<'a>,
    budget: Budget,
    reporter: &'a Reporter,
    all: Vec<Change>,
    bytes: u64,
    seen: u64,
}

impl Compare<'_> {
    /// The entries of a tree that is checked out, which the user may have made.
    fn old_entries(&mut self, id: Oid) -> Result<Entries, Failure> {
        let tree = self.repo.find_tree(id).map_err(|error| fault("its history cannot be read", &error))?;
        let mut entries = Entries::new();
        for entry in &tree {
            self.count()?;
            let side = Side::of(&entry);
            if walk::check_name(entry.name_bytes(), kind(side)).is_err() {
                return Err(altered("its commit has a name that must not be written"));
            }
            entries.insert(entry.name_bytes().to_owned(), side);
        }
        Ok(entries)
    }

    /// The entries of a tree of the upstream.
    fn new_entries(&mut self, id: Oid, path: &[u8]) -> Result<Entries, Failure> {
        let tree = self.repo.find_tree(id).map_err(|error| unread(path, &error))?;
        let (mut entries, mut last) = (Entries::new(), Vec::new());
        for entry in &tree {
            self.count()?;
            let (name, side) = (entry.name_bytes(), Side::of(&entry));
            walk::check_name(name, kind(side)).map_err(|why| refused(path, name, why))?;
            walk::check_mode(entry.filemode_raw().cast_unsigned()).map_err(|why| damaged(path, why))?;
            if entries.insert(name.to_owned(), side).is_some() {
                return Err(refused(path, name, "is there twice"));
            }
            let place = walk::place(name, side.is_directory());
            if place <= last {
                return Err(damaged(path, walk::OUT_OF_ORDER));
            }
            last = place;
        }
        Ok(entries)
    }

    /// Counts an entry. A tree of trees without files must end as well.
    fn count(&mut self) -> Result<(), Failure> {
        self.seen += 1;
        if self.seen.is_multiple_of(STRIDE) {
            self.reporter.step();
        }
        if self.seen > self.budget.files.saturating_mul(8).saturating_add(STRIDE) {
            return Err(over());
        }
        Ok(())
    }

    fn add(&mut self, path: Vec<u8>, old: Option<Side>, new: Option<Side>) -> Result<(), Failure> {
        let mut longest = 0;
        if let Some(old) = old.filter(|old| !old.is_submodule()) {
            // Where it cannot be read any more, what is checked out only counts as the user's.
            longest = self.odb.read_header(old.id).map_or(0, |(length, _)| length as u64);
        }
        if let Some(new) = new.filter(|new| !new.is_submodule()) {
            let (length, kind) = self.odb.read_header(new.id).map_err(|error| unread(&path, &error))?;
            if kind != ObjectType::Blob {
                return Err(damaged(&path, "it is no file"));
            }
            if new.is_link() {
                let read = || self.odb.read(new.id).map(|object| object.data().to_vec());
                walk::check_link(length as u64, read).map_err(|why| refused(b"", &path, why))?;
            }
            longest = longest.max(length as u64);
            self.bytes = self.bytes.saturating_add(length as u64);
        }
        self.all.push(Change { path, old, new, also: Vec::new(), lfs: Vec::new(), longest });
        if self.all.len() as u64 > self.budget.files || self.bytes > self.budget.bytes {
            return Err(over());
        }
        Ok(())
    }
}

fn kind(side: Side) -> EntryKind {
    if side.is_link() { EntryKind::Link } else { EntryKind::Blob }
}

fn over() -> Failure {
    Failure::new(ErrorClass::Quota, "the pull would write more than git.max_files or git.max_bytes allow")
}

fn refused(path: &[u8], name: &[u8], why: &str) -> Failure {
    let path = if path.is_empty() { String::new() } else { format!("{}/", String::from_utf8_lossy(path)) };
    Failure::forbidden(format!("the upstream's tree has an entry that {why}: {path}{}", String::from_utf8_lossy(name)))
}

/// What is missing was there when the history was proven whole.
fn unread(path: &[u8], error: &git2::Error) -> Failure {
    match error.code() {
        git2::ErrorCode::NotFound => altered(format!("an object is gone: {}", error.message())),
        _ => damaged(path, error.message()),
    }
}

fn damaged(path: &[u8], why: &str) -> Failure {
    let path = String::from_utf8_lossy(path);
    Failure::new(ErrorClass::Corrupt, format!("an object of the upstream's tree cannot be read at {path:?}: {why}"))
}
