//! History: what a clone whose tree came first still lacks, brought from the mirror once that is whole.

use std::{collections::BTreeMap, os::fd::OwnedFd};

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{
    OwedHistory,
    executor::{GitExecutor, blocking},
};
use crate::{
    failure::Failure,
    git::{Attach, Binding, Dir, Fence, Fetched, Follows, Run, Want, send_objects, workspace},
    protocol::{CredentialName, GitUrl, TaskResult},
};

/// The word of the wire contract for history that is still to come.
pub const PENDING: &str = "pending";
/// The word for history that has come.
const ATTACHED: &str = "attached";

/// Attaches what `owed` says, unless the project was deleted or made anew since.
pub(super) async fn execute(
    git: &GitExecutor,
    owed: &OwedHistory,
    stop: &CancellationToken,
    fence: &dyn Fence,
) -> Result<Option<TaskResult>, Failure> {
    let run = Run {
        deadline: Instant::now() + git.settings.max_timeout,
        stall: git.settings.stall,
        cancel: stop.clone(),
        progress: &|_| (),
        fence,
    };
    let Some(binding) = still(git, owed) else { return Ok(None) };
    let Some(boundary) = &binding.history else { return Ok(Some(attached(&binding, None))) };
    git.reserve.check().await?;
    let url = GitUrl::parse(&binding.url)?;
    git.mirrors.allow(&url)?;
    let credential = binding.credential.as_deref().map(CredentialName::new).transpose()?;
    let want = match (&binding.follows, boundary.first()) {
        (Follows::Branch(name), _) if binding.single_branch => Want::Branch(name.clone()),
        // Whatever became of the refs since, what the project has must be led to.
        (_, Some(oid)) => Want::Commit(oid.clone()),
        (_, None) => Want::All,
    };
    let fetched = git.mirrors.fetch(&url, credential.as_ref(), &want, &run).await?;
    fence.check().await?;
    // A delete, a clone or a pull may have had its turn before this.
    let Some(binding) = still(git, owed) else { return Ok(None) };
    if binding.history.is_some() {
        let looked = binding.clone();
        let dir = git.on_projects(move |projects| projects.directory(&looked)).await?;
        let Some(dir) = dir else { return Ok(None) };
        complete(git, &binding, &dir, &fetched, &run).await?;
    }
    Ok(Some(attached(&binding, Some(&fetched))))
}

/// The binding of the very project whose history is owed.
fn still(git: &GitExecutor, owed: &OwedHistory) -> Option<Binding> {
    git.projects.of(owed.project).0.filter(|binding| binding.placed <= owed.seq)
}

fn attached(binding: &Binding, fetched: Option<&Fetched>) -> TaskResult {
    TaskResult {
        local_path: Some(binding.target.clone()),
        source: fetched.map(|fetched| fetched.source.as_str().to_owned()),
        objects: fetched.map(|fetched| fetched.objects),
        received_bytes: fetched.map(|fetched| fetched.received_bytes),
        history: Some(ATTACHED.to_owned()),
        ..TaskResult::default()
    }
}

/// Brings everything of a whole mirror into a project whose turn is ours, and notes that it is whole.
pub(super) async fn complete(
    git: &GitExecutor,
    binding: &Binding,
    dir: &Dir,
    fetched: &Fetched,
    run: &Run<'_>,
) -> Result<(), Failure> {
    git.reserve.check_copy(&fetched.path).await?;
    let order = Attach {
        objects: None,
        shallow: binding.history.clone().unwrap_or_default(),
        refs: refs(fetched),
        peeled: fetched.listing.peeled.clone(),
        head: fetched.listing.head.clone(),
        // Of a narrow clone the mirror's listing is narrow already where it follows a branch.
        tags_within: binding.single_branch && !matches!(binding.follows, Follows::Branch(_)),
    };
    let (reader, writer) = std::io::pipe()?;
    let mirror = fetched.path.clone();
    let sending = blocking(move || send_objects(&mirror, writer));
    let children = git.children.of(binding.owner);
    let attaching = workspace::attach(&children, dir.handle()?, OwnedFd::from(reader), order, run);
    // Whichever end fails closes its side of the pipe, which ends the other.
    let (attached, sent) = tokio::join!(attaching, sending);
    attached?;
    sent?;
    let project = binding.project;
    git.on_projects(move |projects| projects.note_whole(project)).await
}

/// The refs of a whole clone, by their names in it.
fn refs(fetched: &Fetched) -> BTreeMap<String, String> {
    let named = |(name, oid): (&String, &String)| {
        let name = match name.strip_prefix("refs/heads/") {
            Some(short) => format!("refs/remotes/origin/{short}"),
            None => name.clone(),
        };
        (name, oid.clone())
    };
    fetched.listing.refs.iter().map(named).collect()
}
