//! Keeping what a pull was asked to overwrite: as a commit under a ref of its own.

use std::{ffi::OsStr, io::Read, os::unix::ffi::OsStrExt};

use git2::{Commit, Index, IndexEntry, IndexTime, Oid, Repository, Signature};
use rustix::fs::{AtFlags, unlinkat};

use super::{
    apply,
    guard::{altered, among},
    open::fault,
    plan::{self, Change, Found, Side},
};
use crate::{
    failure::{ErrorClass, Failure},
    git::{child::Reporter, projects::Dir},
};

/// One file that was saved.
pub(super) struct Saved {
    path: Vec<u8>,
    side: Side,
    length: u64,
}

/// Reads everything at `paths`, however deep, into objects.
///
/// # Errors
/// `conflict` for what cannot be kept in a tree, `quota` over `longest` bytes.
pub(super) fn collect<'a>(
    repo: &Repository,
    root: &Dir,
    paths: impl Iterator<Item = &'a [u8]>,
    longest: u64,
    reporter: &Reporter,
) -> Result<Vec<Saved>, Failure> {
    let mut saved = Vec::new();
    let (mut waiting, mut bytes): (Vec<Vec<u8>>, u64) = (paths.map(<[u8]>::to_owned).collect(), 0);
    while let Some(path) = waiting.pop() {
        reporter.step();
        let shown = String::from_utf8_lossy(&path).into_owned();
        let (id, length, mode) = match plan::find(root, &path)? {
            Found::Nothing => continue,
            Found::Directory => {
                let Some(dir) = plan::enter(root, &path)? else { continue };
                for (name, _) in dir.entries().map_err(among)? {
                    if name == ".git" {
                        return Err(Failure::conflict(format!("a repository of its own is in the way: {shown}")));
                    }
                    waiting.push([&path[..], b"/", name.as_bytes()].concat());
                }
                continue;
            }
            Found::File { length, executable } => {
                bytes = bytes.saturating_add(length);
                if bytes > longest {
                    return Err(Failure::new(ErrorClass::Quota, "what is in the way is larger than git.max_bytes"));
                }
                let Some((id, length)) = keep(repo, root, &path, longest)? else { continue };
                (id, length, if executable { 0o100_755 } else { 0o100_644 })
            }
            Found::Link(target) => {
                let id = repo.blob(&target).map_err(|error| fault("a link cannot be saved", &error))?;
                (id, target.len() as u64, 0o120_000)
            }
            Found::Other => return Err(altered(format!("{shown} is neither a file nor a directory"))),
        };
        saved.push(Saved { path, side: Side { id, mode }, length });
    }
    Ok(saved)
}

/// Writes a file into an object piece by piece, however long it is; `None` where it is gone by now.
fn keep(repo: &Repository, root: &Dir, path: &[u8], longest: u64) -> Result<Option<(Oid, u64)>, Failure> {
    let Some(file) = plan::open(root, path)? else { return Ok(None) };
    let unwritten = |error: git2::Error| fault("a file cannot be saved", &error);
    let mut blob = repo.blob_writer(None).map_err(unwritten)?;
    // It was measured before, and may grow while it is read.
    let length = std::io::copy(&mut file.take(longest), &mut blob).map_err(among)?;
    Ok(Some((blob.commit().map_err(unwritten)?, length)))
}

/// Commits what was saved on top of `head`, with the index as it was beside it; `name` is the ref.
///
/// # Errors
/// `disk` or `conflict` where it cannot be written.
pub(super) fn commit(
    repo: &Repository,
    index: &mut Index,
    head: Option<&Commit<'_>>,
    saved: &[Saved],
    name: &str,
) -> Result<(), Failure> {
    let mut write = || -> Result<(), git2::Error> {
        let who = Signature::now("haul", "haul@localhost")?;
        let mut parents: Vec<Commit<'_>> = head.cloned().into_iter().collect();
        let staged = repo.find_tree(index.write_tree_to(repo)?)?;
        if head.map(Commit::tree_id) != Some(staged.id()) {
            let parent: Vec<_> = head.into_iter().collect();
            let oid =
                repo.commit(None, &who, &who, "What was staged before a pull overwrote it\n", &staged, &parent)?;
            parents.push(repo.find_commit(oid)?);
        }
        let mut kept = Index::new()?;
        if let Some(head) = head {
            kept.read_tree(&head.tree()?)?;
        }
        for file in saved {
            kept.add(&entry(file))?;
        }
        let tree = repo.find_tree(kept.write_tree_to(repo)?)?;
        let parents: Vec<_> = parents.iter().collect();
        let oid = repo.commit(None, &who, &who, "What was here before a pull overwrote it\n", &tree, &parents)?;
        repo.reference(name, oid, false, "pull: kept before overwriting")?;
        Ok(())
    };
    write().map_err(|error| fault("what is in the way cannot be saved", &error))
}

/// Lets the pull go on over what was saved: at its own paths by rename, elsewhere by removing it.
///
/// # Errors
/// `conflict` where a file changed since it was saved.
pub(super) fn clear(root: &Dir, changes: &mut [Change], saved: Vec<Saved>) -> Result<(), Failure> {
    for file in saved {
        if let Ok(at) = changes.binary_search_by(|change| change.path.cmp(&file.path)) {
            changes[at].allow(Some((file.side, file.length)));
            continue;
        }
        let (old, longest) = (Some(file.side), file.length);
        let judged = Change { path: file.path, old, new: None, also: Vec::new(), lfs: Vec::new(), longest };
        if !plan::is_clean(root, &judged)? {
            let shown = String::from_utf8_lossy(&judged.path).into_owned();
            return Err(altered(format!("{shown} changed while it was saved")));
        }
        let (parent, name) = plan::split(&judged.path);
        let opened = parent.map(|parent| plan::enter(root, parent)).transpose()?.flatten();
        if parent.is_none() || opened.is_some() {
            let dir = opened.as_ref().unwrap_or(root);
            unlinkat(dir, OsStr::from_bytes(name), AtFlags::empty()).map_err(|error| among(error.into()))?;
            apply::prune(root, parent);
        }
    }
    Ok(())
}

/// The ref that keeps what a task overwrote.
pub(super) fn ref_name(time: &str, task: &str) -> String {
    let plain = |text: &str| -> String {
        text.chars().map(|c| if c.is_ascii_alphanumeric() || c == '-' { c } else { '_' }).collect()
    };
    format!("refs/haul/backup/{}-{}", plain(time), plain(task))
}

fn entry(file: &Saved) -> IndexEntry {
    IndexEntry {
        ctime: IndexTime::new(0, 0),
        mtime: IndexTime::new(0, 0),
        dev: 0,
        ino: 0,
        mode: file.side.mode,
        uid: 0,
        gid: 0,
        file_size: 0,
        id: file.side.id,
        flags: 0,
        flags_extended: 0,
        path: file.path.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_task_identity_makes_a_valid_ref() {
        let name = ref_name("20261121T060000Z", "a:b..c.lock");
        assert_eq!(name, "refs/haul/backup/20261121T060000Z-a_b__c_lock");
        assert!(git2::Reference::is_valid_name(&name));
    }
}
