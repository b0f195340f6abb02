//! Submodules of a project in the making: listed from the committed tree, and made one by one as git itself leaves them.
//!
//! Only a clone does this, in a directory that nobody else sees yet. Nothing of ours opens the repository of a submodule
//! later.

use std::{
    collections::BTreeMap,
    io::Write as _,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    path::PathBuf,
};

use gix::{ObjectId, Repository, bstr::ByteSlice, index::entry::Mode};
use jiff::Timestamp;
use rustix::fs::OFlags;
use serde::{Deserialize, Serialize};

use super::{
    Order, done,
    make::{self, damaged},
    skeleton,
    walk::{self, Budget, Size},
};
use crate::{
    failure::{ErrorClass, Failure},
    git::{
        Run,
        child::{Children, Reporter},
        mirror::Listing,
        module::{self, Module, Place},
        projects::{Dir, Follows},
        room,
    },
};

/// Which repository to read.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Survey {
    /// The repository.
    pub(crate) place: Place,
    /// How large its tree may be.
    pub(crate) budget: Budget,
    /// Whether its submodules are wanted.
    pub(crate) submodules: bool,
}

/// Which submodule to make; its objects are in its git directory already.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Add {
    /// The repository that it is a submodule of.
    pub(crate) parent: Place,
    /// The submodule.
    pub(crate) module: Module,
    /// Its address, as the configuration shall have it.
    pub(crate) url: String,
    /// The refs of its upstream.
    pub(crate) listing: Listing,
    /// How large its tree may be.
    pub(crate) budget: Budget,
    /// How many bytes of the disk are to stay free.
    pub(crate) reserve: u64,
}

/// A repository's tree and its submodules.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Surveyed {
    /// Files, links and submodules.
    pub(crate) files: u64,
    /// Bytes of files and links.
    pub(crate) bytes: u64,
    /// The submodules that are to be made.
    pub(crate) modules: Vec<Module>,
}

/// Measures the tree of a repository of a new project, and lists its submodules.
///
/// # Errors
/// As [`module::wanted`] and [`walk::walk`]; otherwise as [`Children::run`].
pub(crate) async fn survey(
    children: &Children,
    directory: OwnedFd,
    order: Survey,
    run: &Run<'_>,
) -> Result<Surveyed, Failure> {
    judged(done(children, directory, Order::Survey(order), run).await?)
}

/// Makes a submodule and lists its own.
///
/// # Errors
/// As [`survey`].
pub(crate) async fn add(
    children: &Children,
    directory: OwnedFd,
    order: Add,
    run: &Run<'_>,
) -> Result<Surveyed, Failure> {
    judged(done(children, directory, Order::Add(order), run).await?)
}

/// What a child says is judged again: the agent makes directories of it.
fn judged(surveyed: Surveyed) -> Result<Surveyed, Failure> {
    surveyed.modules.iter().try_for_each(Module::check)?;
    Ok(surveyed)
}

pub(super) fn run_survey(directory: &Dir, order: &Survey, reporter: &Reporter) -> Result<Surveyed, Failure> {
    let repo = open(directory, &order.place)?;
    let Some(tree) = checked_out(&repo)? else { return Ok(Surveyed::default()) };
    let size = walk::walk(&repo, tree, order.budget, reporter)?;
    let modules = if order.submodules { modules(&repo, tree)? } else { Vec::new() };
    Ok(Surveyed { files: size.files, bytes: size.bytes, modules })
}

pub(super) fn run_add(directory: &Dir, order: &Add, reporter: &Reporter) -> Result<Surveyed, Failure> {
    order.module.check()?;
    let place = order.parent.inner(&order.module);
    let follows = Follows::Commit(order.module.commit.clone());
    let git = beneath(directory, &place.git)?;
    // Its section comes first, and is where git puts the way to the working tree.
    let worktree = format!("\tworktree = {}\n[remote ", skeleton::value(&place.to_tree()));
    let config = skeleton::config(&order.url, &follows, false).replacen("[remote ", &worktree, 1);
    skeleton::lay_out(&git.path, &config, "")?;
    let tree = beneath(directory, &place.tree)?;
    if !tree.dir.entries()?.is_empty() {
        return Err(Failure::internal("a submodule's directory is not empty"));
    }
    let repo = open(directory, &place)?;
    let commit = ObjectId::from_hex(order.module.commit.as_bytes())
        .ok()
        .and_then(|id| repo.find_commit(id).ok())
        .ok_or_else(|| Failure::new(ErrorClass::NotFound, "its upstream does not have the recorded commit"))?;
    let head = commit.tree_id().map_err(|error| damaged(&error))?.detach();
    let Size { files, bytes } = walk::walk(&repo, head, order.budget, reporter)?;
    room(&tree.path, "projects", bytes, order.reserve)?;
    let modules = modules(&repo, head)?;
    make::check_out(&repo, head, &tree.path, files, order.reserve, reporter)?;
    let upstream = skeleton::Upstream { refs: &order.listing.refs, peeled: &order.listing.peeled };
    let refs = skeleton::tracking(&upstream, &follows, false);
    skeleton::lay_out(&git.path, &config, &skeleton::packed(&refs, &order.listing.peeled))?;
    let default = order.listing.head.as_deref().and_then(|head| head.strip_prefix("refs/heads/"));
    if let Some(branch) = default.filter(|branch| refs.contains_key(&format!("refs/remotes/origin/{branch}"))) {
        skeleton::write_origin_head(&git.path, branch)?;
    }
    let now = Timestamp::now().as_second();
    skeleton::write_head(&git.path, &follows, Some(&order.module.commit), &order.url, now)?;
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL;
    tree.dir.open_file(".git", flags, 0o644)?.write_all(format!("gitdir: {}\n", place.to_git()).as_bytes())?;
    let parent = beneath(directory, &order.parent.git)?;
    // As `git submodule update --init` notes it.
    let section =
        format!("[submodule \"{}\"]\n\tactive = true\n\turl = {}\n", order.module.name, skeleton::value(&order.url));
    parent.dir.open_file("config", OFlags::WRONLY | OFlags::APPEND, 0)?.write_all(section.as_bytes())?;
    Ok(Surveyed { files, bytes, modules })
}

/// A directory of the project, and a path to it that nothing can be swapped on.
pub(super) struct Beneath {
    pub(super) dir: Dir,
    pub(super) path: PathBuf,
}

/// Opens a directory of the project without following a link; nothing stands for the project itself.
pub(super) fn beneath(directory: &Dir, path: &str) -> Result<Beneath, Failure> {
    let dir = directory.child(if path.is_empty() { "." } else { path })?;
    let path = PathBuf::from(format!("/proc/self/fd/{}", dir.as_fd().as_raw_fd()));
    Ok(Beneath { dir, path })
}

/// Opens a repository of a project in the making; no settings but those we wrote ourselves count.
pub(super) fn open(directory: &Dir, place: &Place) -> Result<Repository, Failure> {
    // By a path that goes on through the project, since the way to the working tree is relative.
    let path = PathBuf::from(format!("/proc/self/fd/{}/{}", directory.as_fd().as_raw_fd(), place.git));
    gix::open_opts(path, gix::open::Options::isolated().with(gix::sec::Trust::Full))
        .map_err(|error| Failure::internal(format!("a new repository cannot be opened: {error}")))
}

/// The tree that is checked out; `None` for an upstream without commits.
pub(super) fn checked_out(repo: &Repository) -> Result<Option<ObjectId>, Failure> {
    if repo.head().map_err(|error| damaged(&error))?.is_unborn() {
        return Ok(None);
    }
    Ok(Some(repo.head_tree_id().map_err(|error| damaged(&error))?.detach()))
}

/// The submodules of `tree` that are to be made.
fn modules(repo: &Repository, tree: ObjectId) -> Result<Vec<Module>, Failure> {
    let index = repo.index_from_tree(&tree).map_err(|error| damaged(&error))?;
    let (mut links, mut text) = (BTreeMap::new(), Vec::new());
    for entry in index.entries() {
        let path = entry.path(&index);
        if entry.mode == Mode::COMMIT {
            links.insert(path.to_vec(), entry.id.to_string());
        } else if path == ".gitmodules" {
            let size = repo.find_header(entry.id).map_err(|error| damaged(&error))?.size();
            if size > module::LONGEST_FILE {
                return Err(Failure::new(ErrorClass::Quota, "the project's .gitmodules is too long to be read"));
            }
            text = repo.find_object(entry.id).map_err(|error| damaged(&error))?.detach().data;
        }
    }
    let other =
        |path: &str| index.entry_by_path(path.as_bytes().as_bstr()).is_some_and(|entry| entry.mode != Mode::COMMIT);
    module::wanted(&text, &links, other)
}
