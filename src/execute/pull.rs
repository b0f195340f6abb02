//! Pull: looks, lists the upstream, streams what is missing, and lets the workspace child do the rest.

use std::{
    collections::{BTreeMap, BTreeSet},
    os::fd::OwnedFd,
    sync::{Arc, Mutex, PoisonError},
    time::SystemTime,
};

use jiff::Timestamp;

use super::{
    Job,
    delete::same_target,
    executor::{GitExecutor, blocking, stamp},
    history, status,
};
use crate::{
    failure::{ErrorClass, Failure},
    git::{Binding, Dir, Fetched, Follows, Listing, Look, Looked, Pull, PullNote, Pulled, Run, Want, pack, workspace},
    protocol::{CredentialName, GitUrl, OnConflict, PullTask, TaskResult},
};

/// The most objects that are named as known to whoever packs.
const MOST_HAVES: usize = 2000;

pub(super) async fn execute(
    git: &GitExecutor,
    job: &Job,
    work: &PullTask,
    run: &Run<'_>,
) -> Result<TaskResult, Failure> {
    let (begun, damage) = (SystemTime::now(), Damage::default());
    let ended = once(git, job, work, run, &damage).await;
    let Some((binding, failure)) = damage.0.into_inner().unwrap_or_else(PoisonError::into_inner) else { return ended };
    let (url, credential) = upstream(work, &binding)?;
    if git.mirrors.mend(&url, credential.as_ref(), &failure, begun, run).await? {
        return once(git, job, work, run, &Damage::default()).await;
    }
    ended
}

/// The project whose mirror could not be read, and how that was told. What cannot be read in the project itself is no
/// reason to fetch anything again.
#[derive(Default)]
struct Damage(Mutex<Option<(Binding, Failure)>>);

async fn once(
    git: &GitExecutor,
    job: &Job,
    work: &PullTask,
    run: &Run<'_>,
    damage: &Damage,
) -> Result<TaskResult, Failure> {
    same_target(git, job.task.project, work.target.as_ref())?;
    let (binding, dir) = status::project(git, job.task.project).await?;
    if let Some(url) = work.url.as_ref().filter(|url| url.as_str() != binding.url) {
        return Err(Failure::conflict(format!("{} follows {}, not {url}", binding.target, binding.url)));
    }
    git.reserve.check().await?;
    let order = Look { refs: true, status: false };
    let looked = workspace::look(&git.children.of(binding.owner), dir.handle()?, order, run).await?;
    if looked.busy {
        return Err(Failure::conflict("a merge, rebase or the like is under way in the project; finish or abort it"));
    }
    let (fetched, tip) = fetch(git, work, &binding, &looked, run).await?;
    let (looked, whole) = attached(git, &binding, &dir, &fetched, looked, run).await?;
    let noted = {
        let binding = binding.clone();
        git.on_projects(move |projects| projects.noted_pull(&binding)).await?
    };
    let refs = wanted_refs(&binding, &fetched.listing, whole);
    let pulled = if noted.is_none() && up_to_date(&binding, &looked, tip.as_deref(), &refs) {
        Pulled { branch: looked.branch.clone(), head: looked.head.clone(), ..Pulled::default() }
    } else {
        let order = Pull {
            pack: None,
            branch: branch(&binding).map(str::to_owned),
            tip,
            refs,
            interrupted: noted.map(|note| (note.old, note.new)),
            reset: work.on_conflict == OnConflict::Reset,
            reserve: git.reserve.bytes(),
            backup: (Timestamp::now().strftime("%Y%m%dT%H%M%SZ").to_string(), job.task.id.as_str().to_owned()),
            budget: git.budget(),
        };
        bring(git, &binding, &dir, &fetched, &looked, order, damage, run).await?
    };
    settle(git, job, &binding, run, pulled.updated).await?;
    Ok(TaskResult {
        local_path: Some(binding.target),
        branch: pulled.branch,
        head: pulled.head,
        source: Some(fetched.source.as_str().to_owned()),
        objects: Some(fetched.objects),
        received_bytes: Some(fetched.received_bytes),
        updated: Some(pulled.updated),
        backup_ref: pulled.backup_ref,
        submodules_changed: Some(pulled.submodules).filter(|&count| count > 0),
        lfs_changed: Some(pulled.pointers).filter(|&count| count > 0),
        ..TaskResult::default()
    })
}

/// Attaches the history of a project whose tree came first: the mirror that was just fetched has it, and what a pull brings
/// may lead to any of it. Where that cannot be done yet the pull brings its own branch to the project as it is.
async fn attached(
    git: &GitExecutor,
    binding: &Binding,
    dir: &Dir,
    fetched: &Fetched,
    looked: Looked,
    run: &Run<'_>,
) -> Result<(Looked, bool), Failure> {
    if binding.history.is_none() {
        return Ok((looked, true));
    }
    run.fence.check().await?;
    match history::complete(git, binding, dir, fetched, run).await {
        Ok(()) => {
            let order = Look { refs: true, status: false };
            Ok((workspace::look(&git.children.of(binding.owner), dir.handle()?, order, run).await?, true))
        }
        Err(_) if run.cancel.is_cancelled() => Err(Failure::internal("cancelled")),
        Err(failure) => {
            tracing::info!(error = %failure, "a history could not be attached before a pull");
            Ok((looked, false))
        }
    }
}

/// Brings the mirror up to date and finds the project's branch on the upstream.
async fn fetch(
    git: &GitExecutor,
    work: &PullTask,
    binding: &Binding,
    looked: &Looked,
    run: &Run<'_>,
) -> Result<(Fetched, Option<String>), Failure> {
    let (url, credential) = upstream(work, binding)?;
    git.mirrors.allow(&url)?;
    let want = match (&binding.follows, binding.single_branch) {
        (Follows::Branch(name), true) => Want::Branch(name.clone()),
        _ => Want::All,
    };
    let fetched = git.mirrors.fetch(&url, credential.as_ref(), &want, run).await?;
    let Some(branch) = branch(binding) else { return Ok((fetched, None)) };
    let tip = fetched.listing.refs.get(&format!("refs/heads/{branch}")).cloned();
    // A project cloned from an empty upstream has nothing to miss as long as that is empty.
    if tip.is_none() && !(looked.head.is_none() && fetched.listing.refs.is_empty()) {
        let message = format!("the upstream has no branch {branch} any more");
        return Err(Failure::new(ErrorClass::NotFound, message));
    }
    Ok((fetched, tip))
}

/// Where a project comes from, and what this task shows there.
fn upstream(work: &PullTask, binding: &Binding) -> Result<(GitUrl, Option<CredentialName>), Failure> {
    let credential = match (&work.credential, &binding.credential) {
        (Some(name), _) => Some(name.clone()),
        (None, Some(name)) => Some(CredentialName::new(name.as_str())?),
        (None, None) => None,
    };
    Ok((GitUrl::parse(&binding.url)?, credential))
}

/// The branch that a project follows.
fn branch(binding: &Binding) -> Option<&str> {
    match &binding.follows {
        Follows::Branch(name) => Some(name),
        Follows::Tag(_) | Follows::Commit(_) => None,
    }
}

/// The remote-tracking refs and tags of a project, by their names in it; of one that lacks its history only its branch.
fn wanted_refs(binding: &Binding, listing: &Listing, whole: bool) -> BTreeMap<String, String> {
    let branch = branch(binding);
    let narrow = binding.single_branch || !whole;
    let wanted = |(name, oid): (&String, &String)| {
        let name = match name.strip_prefix("refs/heads/") {
            Some(short) if narrow && branch != Some(short) => return None,
            Some(short) => format!("refs/remotes/origin/{short}"),
            // Of a narrow clone new tags are left out: which of them point into the branch is not known yet.
            None if narrow => return None,
            None => name.clone(),
        };
        Some((name, oid.clone()))
    };
    listing.refs.iter().filter_map(wanted).collect()
}

/// Whether nothing is left to do. Where the project has more refs than were reported, its own branch decides.
fn up_to_date(binding: &Binding, looked: &Looked, tip: Option<&str>, refs: &BTreeMap<String, String>) -> bool {
    let on_branch = branch(binding).is_some() && branch(binding) == looked.branch.as_deref();
    let at_tip = !on_branch || looked.head.as_deref() == tip;
    let known = |(name, oid): (&String, &String)| match looked.refs.get(name) {
        // A tag of the user's own is never moved.
        Some(ours) => ours == oid || name.starts_with("refs/tags/"),
        None => looked.capped,
    };
    at_tip && refs.iter().all(known)
}

/// Streams what is missing and lets the workspace child take it in.
#[expect(clippy::too_many_arguments, reason = "all that one pull is about")]
async fn bring(
    git: &GitExecutor,
    binding: &Binding,
    dir: &Dir,
    fetched: &Fetched,
    looked: &Looked,
    order: Pull,
    damage: &Damage,
    run: &Run<'_>,
) -> Result<Pulled, Failure> {
    let have: BTreeSet<&String> = looked.head.iter().chain(looked.refs.values()).collect();
    let wants: BTreeSet<&String> = order.refs.values().chain(&order.tip).filter(|oid| !have.contains(oid)).collect();
    let wants: Vec<String> = wants.into_iter().cloned().collect();
    // The branches lead to almost everything that tags lead to, and each old tag costs a walk from there to the root.
    let branches = looked.refs.iter().filter(|(name, _)| !name.starts_with("refs/tags/")).map(|(_, oid)| oid);
    let haves: BTreeSet<&String> = looked.head.iter().chain(branches).collect();
    let haves: Vec<String> = haves.into_iter().take(MOST_HAVES).cloned().collect();
    let note = |old: Option<String>, new: String| {
        let projects = Arc::clone(&git.projects);
        let (target, note) = (binding.target.clone(), PullNote { project: binding.project, old, new });
        let future: futures_util::future::BoxFuture<'_, Result<(), Failure>> = Box::pin(async move {
            run.fence.check().await?;
            blocking(move || projects.note_pull(&target, &note)).await
        });
        future
    };
    let children = git.children.of(binding.owner);
    if wants.is_empty() {
        return workspace::pull(&children, dir.handle()?, None, order, run, note).await.map_err(incomplete);
    }
    let (reader, writer) = std::io::pipe()?;
    let pull = workspace::pull(&children, dir.handle()?, Some(OwnedFd::from(reader)), order, run, note);
    let pack = async {
        let shallow = &looked.shallow;
        let packed =
            pack::stream(&git.children, &fetched.path, &wants, &haves, shallow, OwnedFd::from(writer), run).await;
        if let Err(failure) = packed.as_ref()
            && failure.class == ErrorClass::Corrupt
        {
            *damage.0.lock().unwrap_or_else(PoisonError::into_inner) = Some((binding.clone(), failure.clone()));
        }
        packed
    };
    tokio::pin!(pull, pack);
    let (pulled, packed) = tokio::select! {
        pulled = &mut pull => match pulled {
            // The cause of a pack that was cut is at its other end; a pipe that nobody reads any more ends that too.
            Err(failure) if wants_a_cause(&failure) => (Err(failure), pack.await.err()),
            other => (other, None),
        },
        packed = &mut pack => (pull.await, packed.err()),
    };
    pulled.map_err(|failure| match packed {
        Some(cut) if cut.class != ErrorClass::Internal || wants_a_cause(&failure) => cut,
        // Whoever reads no more says why; a pack that nobody reads has no cause of its own.
        _ => incomplete(failure),
    })
}

/// Whether a failure of the workspace's side may follow from one of the mirror's.
fn wants_a_cause(failure: &Failure) -> bool {
    matches!(failure.class, ErrorClass::Internal | ErrorClass::Corrupt | ErrorClass::NotFound)
}

/// What is missing although the mirror sent all that the project said it lacks was taken out of the project.
fn incomplete(failure: Failure) -> Failure {
    match failure.class {
        ErrorClass::NotFound => Failure::conflict(format!("the workspace was altered: {}", failure.message)),
        _ => failure,
    }
}

/// Strikes the note off and counts the task.
async fn settle(git: &GitExecutor, job: &Job, binding: &Binding, run: &Run<'_>, updated: bool) -> Result<(), Failure> {
    if !updated {
        // Where something was written it was asked before that.
        run.fence.check().await?;
    }
    let (project, target, stamp, now) = (binding.project, binding.target.clone(), stamp(job), Timestamp::now());
    git.on_projects(move |projects| {
        projects.strike_pull(&target)?;
        projects.advance(project, &stamp, |binding| binding.last_fetch = Some(now)).map(drop)
    })
    .await
}
