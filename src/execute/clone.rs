//! Clone: a mirror brought up to date, a project made apart from view, one rename.
//!
//! A project gets every object that its mirror holds, also those of branches that it does not track: copying packs whole
//! is several times as fast as picking objects out of them. A clone of a single branch is therefore narrow in what it
//! fetches and tracks, and as large as its mirror where other projects made that hold more.

use std::{sync::Arc, time::SystemTime};

use jiff::Timestamp;

use super::{
    Job,
    executor::{GitExecutor, blocking, copied, stamp},
    extras,
    history::PENDING,
    obtain::{self, Obtained},
};
use crate::{
    failure::{ErrorClass, Failure},
    git::{Applied, Binding, Fetched, Follows, Identity, Listing, Look, Make, Packs, Run, Site, Staging, workspace},
    protocol::{CloneTask, Revision, TaskResult},
};

pub(super) async fn execute(
    git: &GitExecutor,
    job: &Job,
    work: &CloneTask,
    run: &Run<'_>,
) -> Result<TaskResult, Failure> {
    let (project, target, url) = (job.task.project, work.target.clone(), work.url.as_str().to_owned());
    let site = {
        let (target, url) = (target.clone(), url.clone());
        git.on_projects(move |projects| projects.site(project, &url, &target)).await?
    };
    match site {
        Site::There(binding, dir) => already_there(git, job, work, *binding, dir.handle()?, run).await,
        Site::Free => {
            let begun = SystemTime::now();
            match anew(git, job, work, run).await {
                // Nobody but the agent writes where a project is made: what cannot be read there is the mirror's.
                Err(failure)
                    if failure.class == ErrorClass::Corrupt
                        && git.mirrors.mend(&work.url, work.credential.as_ref(), &failure, begun, run).await? =>
                {
                    anew(git, job, work, run).await
                }
                ended => ended,
            }
        }
    }
}

/// The project stands where it should: nothing is done again.
async fn already_there(
    git: &GitExecutor,
    job: &Job,
    work: &CloneTask,
    binding: Binding,
    directory: std::os::fd::OwnedFd,
    run: &Run<'_>,
) -> Result<TaskResult, Failure> {
    if !binding.follows.answers(&work.revision) {
        return Err(Failure::conflict(format!(
            "{} was cloned from {}; delete it before cloning something else of the same address",
            binding.target, binding.follows
        )));
    }
    if work.owner.is_some_and(|owner| binding.owner != Some(owner)) {
        return Err(Failure::conflict(format!(
            "{} belongs to another owner; delete it before cloning it for {}",
            binding.target,
            work.owner.map(|owner| owner.to_string()).unwrap_or_default()
        )));
    }
    // Also shows that the tree can be used.
    let looked = workspace::look(&git.children.of(binding.owner), directory, Look::default(), run).await?;
    run.fence.check().await?;
    let history = binding.history.as_ref().map(|_| PENDING.to_owned());
    let (project, stamp) = (binding.project, stamp(job));
    git.on_projects(move |projects| projects.advance(project, &stamp, |_| ())).await?;
    Ok(TaskResult {
        local_path: Some(binding.target),
        branch: looked.branch,
        head: looked.head,
        source: Some("mirror".to_owned()),
        objects: Some(0),
        received_bytes: Some(0),
        history,
        ..TaskResult::default()
    })
}

async fn anew(git: &GitExecutor, job: &Job, work: &CloneTask, run: &Run<'_>) -> Result<TaskResult, Failure> {
    let owner = git.settings.owner(work.owner)?;
    git.reserve.check().await?;
    let Obtained { fetched, follows, object, tree_first, held: _held } = obtain::obtain(git, work, run).await?;
    let task = job.task.id.clone();
    let staging = Arc::new(git.on_projects(move |projects| projects.stage(&task, owner)).await?);
    let made = async {
        let mut result = made(git, work, &fetched, &follows, object, &staging, run).await?;
        let binding = Binding {
            project: job.task.project,
            target: work.target.as_str().to_owned(),
            url: work.url.as_str().to_owned(),
            credential: work.credential.as_ref().map(|name| name.as_str().to_owned()),
            owner,
            follows,
            single_branch: work.single_branch,
            history: tree_first.then(|| fetched.shallow.clone()),
            // Known to the placing alone.
            placed: 0,
            directory: Identity::default(),
            last_fetch: Some(Timestamp::now()),
            applied: Applied::default(),
        };
        run.fence.check().await?;
        let (staging, stamp) = (Arc::clone(&staging), stamp(job));
        let placed = git.on_projects(move |projects| projects.place(&staging, binding, &stamp)).await?;
        result.local_path = Some(placed.target);
        result.history = tree_first.then(|| PENDING.to_owned());
        Ok(result)
    }
    .await;
    if made.is_err() {
        git.on_projects(move |projects| {
            projects.discard(&staging);
            Ok(())
        })
        .await?;
    }
    made
}

/// Makes the project apart from view, down to the disk.
async fn made(
    git: &GitExecutor,
    work: &CloneTask,
    fetched: &Fetched,
    follows: &Follows,
    object: Option<String>,
    staging: &Arc<Staging>,
    run: &Run<'_>,
) -> Result<TaskResult, Failure> {
    git.reserve.check_copy(&fetched.path).await?;
    take_objects(git, fetched, staging, run).await?;
    let order = Make {
        url: work.url.as_str().to_owned(),
        listing: fetched.listing.clone(),
        follows: follows.clone(),
        object,
        single_branch: work.single_branch,
        shallow: fetched.shallow.clone(),
        budget: git.budget(),
        reserve: git.reserve.bytes(),
    };
    let made = workspace::make(&git.children.of(staging.owner), staging.handle()?, order, run).await?;
    extras::add(git, work, fetched, staging, run).await?;
    let staged = Arc::clone(staging);
    blocking(move || staged.flush()).await?;
    Ok(TaskResult {
        branch: match follows {
            Follows::Branch(name) => Some(name.clone()),
            Follows::Tag(_) | Follows::Commit(_) => None,
        },
        head: made.head,
        source: Some(fetched.source.as_str().to_owned()),
        objects: Some(fetched.objects),
        received_bytes: Some(fetched.received_bytes),
        ..TaskResult::default()
    })
}

/// Takes what the mirror holds; ends early when the run does.
async fn take_objects(
    git: &GitExecutor,
    fetched: &Fetched,
    staging: &Arc<Staging>,
    run: &Run<'_>,
) -> Result<(), Failure> {
    let (mirror, staged) = (fetched.path.clone(), Arc::clone(staging));
    let reserve = git.reserve.clone();
    let packs = if fetched.is_passing() { Packs::Moved } else { Packs::Copied };
    copied("copying", run, move |moved| {
        staged.take_objects(&mirror, packs, &mut |count| {
            moved(count)?;
            reserve.still()
        })
    })
    .await
}

/// What a revision means on the upstream: what the project follows, and the object to check out.
pub(super) fn resolve(revision: &Revision, listing: &Listing) -> Result<(Follows, Option<String>), Failure> {
    let absent = |what: String| Failure::new(ErrorClass::NotFound, format!("the upstream has no {what}"));
    match revision {
        Revision::Default => {
            let head = listing.head.as_deref().and_then(|head| head.strip_prefix("refs/heads/"));
            let branch = match head {
                Some(branch) => branch.to_owned(),
                None if listing.refs.is_empty() => "main".to_owned(),
                None => return Err(absent("default branch; name a branch, tag or commit".to_owned())),
            };
            let object = listing.refs.get(&format!("refs/heads/{branch}")).cloned();
            if object.is_none() && !listing.refs.is_empty() {
                return Err(absent(format!("branch {branch}, though its HEAD points to it; name a branch")));
            }
            Ok((Follows::Branch(branch), object))
        }
        Revision::Branch(name) => {
            let object = listing.refs.get(&format!("refs/heads/{name}")).cloned();
            let object = object.ok_or_else(|| absent(format!("branch {name}")))?;
            Ok((Follows::Branch(name.as_str().to_owned()), Some(object)))
        }
        Revision::Tag(name) => {
            let object = listing.refs.get(&format!("refs/tags/{name}")).cloned();
            let object = object.ok_or_else(|| absent(format!("tag {name}")))?;
            Ok((Follows::Tag(name.as_str().to_owned()), Some(object)))
        }
        Revision::Commit(oid) => Ok((Follows::Commit(oid.clone()), Some(oid.clone()))),
    }
}

/// Refuses an upstream whose branch or tag is not at the commit that the task expects.
///
/// The class is `not_found`: what was asked for, that name at that commit, does not exist.
pub(super) fn expected(
    work: &CloneTask,
    follows: &Follows,
    object: Option<&str>,
    listing: &Listing,
) -> Result<(), Failure> {
    let Some(expected) = work.expect_commit.as_deref() else { return Ok(()) };
    let commit = match follows {
        Follows::Tag(name) => listing.peeled.get(&format!("refs/tags/{name}")).map(String::as_str).or(object),
        Follows::Branch(_) | Follows::Commit(_) => object,
    };
    if commit == Some(expected) {
        return Ok(());
    }
    let at = commit.map_or_else(|| "without a commit".to_owned(), |commit| format!("at {commit}"));
    Err(Failure::new(ErrorClass::NotFound, format!("the upstream's {follows} is {at}, not at the expected {expected}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::RefName;

    fn listing(head: Option<&str>, refs: &[&str]) -> Listing {
        Listing {
            head: head.map(str::to_owned),
            refs: refs.iter().map(|name| ((*name).to_owned(), "1".repeat(40))).collect(),
            ..Listing::default()
        }
    }

    #[test]
    fn a_revision_that_is_not_there_is_named() {
        let all = listing(Some("refs/heads/main"), &["refs/heads/main", "refs/tags/v1"]);
        let branch = Revision::Branch(RefName::new("branch", "nope").unwrap());
        let failure = resolve(&branch, &all).unwrap_err();
        assert_eq!(failure.class, ErrorClass::NotFound);
        assert!(failure.message.contains("nope"));
        let tag = Revision::Tag(RefName::new("tag", "v2").unwrap());
        assert!(resolve(&tag, &all).unwrap_err().message.contains("v2"));
    }

    #[test]
    fn the_default_branch_is_what_head_points_to_even_before_its_first_commit() {
        let cases = [
            (listing(Some("refs/heads/dev"), &["refs/heads/dev"]), Ok(("dev", true))),
            (listing(Some("refs/heads/trunk"), &[]), Ok(("trunk", false))),
            (listing(None, &[]), Ok(("main", false))),
            (listing(None, &["refs/heads/a"]), Err(())),
            (listing(Some("refs/heads/gone"), &["refs/heads/a"]), Err(())),
        ];
        for (listing, wanted) in cases {
            let found = resolve(&Revision::Default, &listing).map_err(|_| ());
            let wanted = wanted.map(|(branch, there)| (Follows::Branch(branch.to_owned()), there));
            assert_eq!(found.map(|(follows, object)| (follows, object.is_some())), wanted, "{listing:?}");
        }
    }
}
