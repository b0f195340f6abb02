//! Whose files are.

#![expect(clippy::unwrap_used, reason = "a test that cannot be set up shall fail loudly")]

use std::{collections::BTreeSet, fs, os::unix::fs::MetadataExt, path::Path};

/// The users and groups of everything under `path`, itself included.
pub(crate) fn owners(path: &Path) -> BTreeSet<(u32, u32)> {
    let stat = fs::symlink_metadata(path).unwrap();
    let mut all = BTreeSet::from([(stat.uid(), stat.gid())]);
    if stat.is_dir() {
        for entry in fs::read_dir(path).unwrap() {
            all.extend(owners(&entry.unwrap().path()));
        }
    }
    all
}
