//! A node as the tests of mirrors need it, and what lies in it.

use std::{
    fs,
    path::{Path, PathBuf},
};

use haul::git::settings::{Engine, GitSettings};

use crate::node::Node;

/// A node that has the credentials `a` and `b`, and room for many transfers of one host at once.
pub(crate) async fn node() -> Node {
    node_with(|_| {}).await
}

/// The same with other settings.
pub(crate) async fn node_with(change: impl FnOnce(&mut GitSettings)) -> Node {
    let node = Node::with(Engine::Gix, |settings| {
        settings.host_limit = 64;
        change(settings);
    })
    .await;
    for name in ["a", "b"] {
        node.credential(&format!("{name}.token"), name);
    }
    node
}

/// The names in a directory, in their order.
pub(crate) fn names(directory: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// The packs of a mirror.
pub(crate) fn packs(mirror: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(mirror.join("objects/pack")).into_iter().flatten();
    let paths = entries.map(|entry| entry.unwrap().path());
    paths.filter(|path| path.extension().is_some_and(|end| end == "pack")).collect()
}
