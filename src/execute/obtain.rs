//! Getting what a clone is made of: a whole mirror, some commits of it, or its tree first.

use std::num::NonZeroU32;

use super::{
    clone::{expected, resolve},
    executor::GitExecutor,
    extras,
};
use crate::{
    failure::Failure,
    git::{Came, Fetched, Follows, Held, Listing, Run, Tip, Underway, Want},
    protocol::{CloneTask, Revision},
};

/// One commit is enough to show a tree.
const TREE: NonZeroU32 = NonZeroU32::MIN;

/// What a clone is made of.
pub(super) struct Obtained {
    /// The objects.
    pub(super) fetched: Fetched,
    /// What the project will follow.
    pub(super) follows: Follows,
    /// What is checked out; `None` for an upstream without commits.
    pub(super) object: Option<String>,
    /// Whether the history is still on its way into the mirror.
    pub(super) tree_first: bool,
    /// Lets that stand still until the tree is shown.
    pub(super) held: Option<Held>,
}

/// Fetches what `work` needs, as far as it is not there.
pub(super) async fn obtain(git: &GitExecutor, work: &CloneTask, run: &Run<'_>) -> Result<Obtained, Failure> {
    if let Some(depth) = work.depth.and_then(NonZeroU32::new) {
        let listing = git.mirrors.list(&work.url, work.credential.as_ref(), run).await?;
        let (follows, object) = meant(work, &listing)?;
        if let Some(oid) = object {
            let what = Tip { oid: &oid, all: !work.single_branch, depth, lent: false };
            let fetched = git.mirrors.tip(&work.url, work.credential.as_ref(), &listing, what, run).await?;
            return Ok(Obtained { fetched, follows, object: Some(oid), tree_first: false, held: None });
        }
        // Of an empty upstream there is nothing to limit.
    }
    let want = match &work.revision {
        Revision::Commit(oid) => Want::Commit(oid.clone()),
        Revision::Branch(name) if work.single_branch => Want::Branch(name.as_str().to_owned()),
        _ => Want::All,
    };
    // With submodules or LFS files a tree alone is no project yet.
    let Some(after) = git.settings.tree_first_after.filter(|_| !extras::wanted(work)) else {
        return whole(work, git.mirrors.fetch(&work.url, work.credential.as_ref(), &want, run).await?);
    };
    let mut full = git.mirrors.begin(&work.url, work.credential.as_ref(), &want, run.stall);
    let heard = match full.come(after, run).await? {
        Came::Whole(fetched) => return whole(work, fetched),
        Came::Slow(heard) => heard,
    };
    let (follows, object) = meant(work, &heard.listing)?;
    // Only where the very thing that is checked out has to come does it help to hurry.
    match object.filter(|oid| heard.lacking.contains(oid)) {
        Some(oid) => tree_first(git, work, full, (&heard.listing, follows, oid), run).await,
        None => whole(work, full.whole(run).await?),
    }
}

/// Lets a fetch of the tree alone race the full one, which goes on by itself where it loses.
async fn tree_first(
    git: &GitExecutor,
    work: &CloneTask,
    mut full: Underway,
    (listing, follows, oid): (&Listing, Follows, String),
    run: &Run<'_>,
) -> Result<Obtained, Failure> {
    // Both would share the link and the processors of both sides; the tree is what somebody waits for.
    let held = full.hold();
    let what = Tip { oid: &oid, all: false, depth: TREE, lent: true };
    let tip = git.mirrors.tip(&work.url, work.credential.as_ref(), listing, what, run);
    let tip = tokio::select! {
        biased;
        fetched = full.whole(run) => return whole(work, fetched?),
        tip = tip => tip,
    };
    match (full.already(), tip) {
        (Some(fetched), _) => whole(work, fetched),
        (None, Ok(fetched)) => {
            full.let_go();
            Ok(Obtained { fetched, follows, object: Some(oid), tree_first: true, held: Some(held) })
        }
        (None, Err(failure)) => {
            drop(held);
            tracing::info!(error = %failure, "a tree could not be fetched ahead of its history");
            whole(work, full.whole(run).await?)
        }
    }
}

fn whole(work: &CloneTask, fetched: Fetched) -> Result<Obtained, Failure> {
    let (follows, object) = meant(work, &fetched.listing)?;
    Ok(Obtained { fetched, follows, object, tree_first: false, held: None })
}

/// What the task means on the upstream, and whether that is what it expects.
fn meant(work: &CloneTask, listing: &Listing) -> Result<(Follows, Option<String>), Failure> {
    let (follows, object) = resolve(&work.revision, listing)?;
    expected(work, &follows, object.as_deref(), listing)?;
    Ok((follows, object))
}
