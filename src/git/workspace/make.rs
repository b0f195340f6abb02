//! Turning objects into a project: the files of `.git`, and the first checkout into a private directory.

use std::{
    collections::HashSet,
    os::fd::{AsFd, AsRawFd},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use gix::{ObjectId, Repository, progress::Count, worktree::stack::state::attributes::Source};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::{
    skeleton,
    walk::{self, Budget},
};
use crate::{
    failure::{ErrorClass, Failure},
    git::{
        child::Reporter,
        mirror::Listing,
        projects::{Dir, Follows},
        room::{blamed, room},
    },
    protocol::Progress,
};

/// How often a checkout says how far it is.
const TICK: Duration = Duration::from_millis(200);

/// What to make.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Make {
    /// The address of the upstream, as the project's configuration shall have it.
    pub(crate) url: String,
    /// The refs of the upstream.
    pub(crate) listing: Listing,
    /// What is checked out.
    pub(crate) follows: Follows,
    /// The object it resolved to, in hex; `None` for an upstream without commits.
    pub(crate) object: Option<String>,
    /// Whether other branches are left out.
    pub(crate) single_branch: bool,
    /// The commits at which the history ends that is there; none where it is whole.
    pub(crate) shallow: Vec<String>,
    /// How large the tree may be.
    pub(crate) budget: Budget,
    /// How many bytes of the disk are to stay free.
    pub(crate) reserve: u64,
}

/// What was made.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Made {
    /// The commit that is checked out.
    pub(crate) head: Option<String>,
    /// Files, links and submodules in its tree.
    pub(crate) files: u64,
}

/// Makes the project in `directory`, whose `.git/objects` is filled.
pub(super) fn run(directory: &Dir, order: &Make, reporter: &Reporter) -> Result<Made, Failure> {
    let root = PathBuf::from(format!("/proc/self/fd/{}", directory.as_fd().as_raw_fd()));
    let git = root.join(".git");
    let config = skeleton::config(&order.url, &order.follows, order.single_branch);
    skeleton::lay_out(&git, &config, "")?;
    if !order.shallow.is_empty() {
        std::fs::write(git.join("shallow"), skeleton::shallow(&order.shallow))?;
    }
    let repo = gix::open_opts(&git, gix::open::Options::isolated().with(gix::sec::Trust::Full))
        .map_err(|error| Failure::internal(format!("a new project cannot be opened: {error}")))?;
    let mut made = Made { head: None, files: 0 };
    if let Some(object) = &order.object {
        let (commit, tree) = resolve(&repo, object)?;
        let size = walk::walk(&repo, tree, order.budget, reporter)?;
        room(&root, "projects", size.bytes, order.reserve)?;
        made.files = size.files;
        check_out(&repo, tree, &root, made.files, order.reserve, reporter)?;
        made.head = Some(commit.to_string());
    }
    let refs = refs(&repo, order, made.head.as_deref())?;
    skeleton::lay_out(&git, &config, &skeleton::packed(&refs, &order.listing.peeled))?;
    let default = order.listing.head.as_deref().and_then(|head| head.strip_prefix("refs/heads/"));
    if let Some(branch) = default.filter(|branch| refs.contains_key(&format!("refs/remotes/origin/{branch}"))) {
        skeleton::write_origin_head(&git, branch)?;
    }
    let now = Timestamp::now().as_second();
    skeleton::write_head(&git, &order.follows, made.head.as_deref(), &order.url, now)?;
    Ok(made)
}

/// The refs of the project; of a narrow clone only the tags that point into what is checked out.
fn refs(
    repo: &Repository,
    order: &Make,
    head: Option<&str>,
) -> Result<std::collections::BTreeMap<String, String>, Failure> {
    let upstream = skeleton::Upstream { refs: &order.listing.refs, peeled: &order.listing.peeled };
    let mut refs = skeleton::tracking(&upstream, &order.follows, order.single_branch);
    if order.single_branch {
        let mut reached = HashSet::new();
        if let Some(head) = head {
            let walk = repo.rev_walk([id(head)?]).all().map_err(|error| damaged(&error))?;
            for commit in walk {
                reached.insert(commit.map_err(|error| damaged(&error))?.id.to_string());
            }
        }
        let peeled = |name: &str, oid: &str| upstream.peeled.get(name).map_or(oid, String::as_str).to_owned();
        refs.retain(|name, oid| !name.starts_with("refs/tags/") || reached.contains(&peeled(name, oid)));
    }
    Ok(refs)
}

/// The commit and the tree behind an object, which may be a tag.
fn resolve(repo: &Repository, object: &str) -> Result<(ObjectId, ObjectId), Failure> {
    let object = repo
        .try_find_object(id(object)?)
        .map_err(|error| damaged(&error))?
        .ok_or_else(|| Failure::new(ErrorClass::NotFound, format!("the upstream has no object {object}")))?;
    let commit = object
        .peel_to_commit()
        .map_err(|_| Failure::invalid("what was asked for is not a commit and does not point to one"))?;
    let tree = commit.tree_id().map_err(|error| damaged(&error))?.detach();
    Ok((commit.id, tree))
}

pub(super) fn check_out(
    repo: &Repository,
    tree: ObjectId,
    root: &Path,
    total: u64,
    reserve: u64,
    reporter: &Reporter,
) -> Result<(), Failure> {
    let fault = |error: &dyn std::fmt::Display| Failure::internal(format!("the first checkout failed: {error}"));
    let mut index = repo.index_from_tree(&tree).map_err(|error| fault(&error))?;
    let mut options = repo.checkout_options(Source::IdMapping).map_err(|error| fault(&error))?;
    options.destination_is_initially_empty = true;
    let objects = repo.objects.clone().into_arc().map_err(|error| fault(&error))?;
    let (files, bytes) = (Counter::default(), Counter::default());
    let stop = AtomicBool::new(false);
    let eaten = std::sync::Mutex::new(None);
    let outcome = std::thread::scope(|scope| {
        let (over, told) = std::sync::mpsc::channel::<()>();
        let (seen_files, seen_bytes) = (&files, &bytes);
        let (stop, eaten) = (&stop, &eaten);
        scope.spawn(move || {
            let mut last = (usize::MAX, usize::MAX);
            while told.recv_timeout(TICK) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
                // It fitted when it began, but others write to the same disk.
                if let Err(failure) = room(root, "projects", 0, reserve)
                    && let Ok(mut eaten) = eaten.lock()
                {
                    stop.store(true, Ordering::Relaxed);
                    eaten.get_or_insert(failure);
                }
                let now = (seen_files.step(), seen_bytes.step());
                // Only what moved counts as movement.
                if now != last {
                    reporter.progress(Progress {
                        phase: "checkout".to_owned(),
                        done: now.0 as u64,
                        total: Some(total),
                        bytes: now.1 as u64,
                        ..Progress::default()
                    });
                    last = now;
                }
            }
        });
        let outcome = gix::worktree::state::checkout(&mut index, root, objects, &files, &bytes, stop, options);
        drop(over);
        outcome
    });
    if let Ok(Some(failure)) = eaten.into_inner() {
        return Err(failure);
    }
    let outcome = outcome.map_err(|error| write_fault(root, &error.to_string()))?;
    if let Some(collision) = outcome.collisions.first() {
        return Err(Failure::forbidden(format!("two files of the tree would be one on this disk: {}", collision.path)));
    }
    if let Some(error) = outcome.errors.first() {
        return Err(write_fault(root, &format!("{}: {}", error.path, error.error)));
    }
    if !outcome.delayed_paths_unknown.is_empty() || !outcome.delayed_paths_unprocessed.is_empty() {
        return Err(fault(&"a filter kept files back"));
    }
    index.write(gix::index::write::Options::default()).map_err(|error| write_fault(root, &error.to_string()))
}

/// The library's errors do not tell a full disk from a fault; the disk itself does.
pub(super) fn write_fault(root: &Path, error: &str) -> Failure {
    blamed(Failure::internal(format!("the first checkout failed: {error}")), &[root])
}

fn id(hex: &str) -> Result<ObjectId, Failure> {
    ObjectId::from_hex(hex.as_bytes()).map_err(|_| Failure::internal(format!("{hex:?} is not an object id")))
}

pub(super) fn damaged(error: &dyn std::fmt::Display) -> Failure {
    Failure::new(ErrorClass::Corrupt, format!("the upstream's history cannot be read: {error}"))
}

/// A count that another thread reads.
#[derive(Default)]
struct Counter(Arc<AtomicUsize>);

impl Count for Counter {
    fn set(&self, step: usize) {
        self.0.store(step, Ordering::Relaxed);
    }

    fn step(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }

    fn inc_by(&self, step: usize) {
        self.0.fetch_add(step, Ordering::Relaxed);
    }

    fn counter(&self) -> Arc<AtomicUsize> {
        Arc::clone(&self.0)
    }
}
