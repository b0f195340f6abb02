//! Delete: out of view by one rename, forgotten, and then removed.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use super::{
    Job,
    executor::{GitExecutor, stamp},
};
use crate::{
    failure::Failure,
    git::{Binding, Run},
    protocol::{DeleteTask, Progress, ProjectId, TargetPath, TaskResult},
};

/// How often a removal says how far it is.
const TICK: Duration = Duration::from_millis(500);

pub(super) async fn execute(
    git: &GitExecutor,
    job: &Job,
    work: &DeleteTask,
    run: &Run<'_>,
) -> Result<TaskResult, Failure> {
    let project = job.task.project;
    same_target(git, project, work.target.as_ref())?;
    run.fence.check().await?;
    let (binding, _) = git.projects.of(project);
    let stamp = stamp(job);
    let buried = git.on_projects(move |projects| projects.bury(project, &stamp)).await?;
    // From here on the project is deleted, whatever becomes of what is left of it.
    if let Some(buried) = buried {
        remove(git, buried, run).await;
    }
    if let Some(binding) = &binding {
        remove_mirror(git, binding).await;
    }
    Ok(TaskResult { local_path: binding.map(|binding| binding.target), ..TaskResult::default() })
}

/// Refuses a path that is not the project's own.
pub(super) fn same_target(git: &GitExecutor, project: ProjectId, target: Option<&TargetPath>) -> Result<(), Failure> {
    let Some(target) = target else { return Ok(()) };
    let (binding, _) = git.projects.of(project);
    match (binding, git.projects.owner(target)) {
        (Some(binding), _) if binding.target != target.as_str() => {
            Err(Failure::conflict(format!("project {project} is at {}, not at {target}", binding.target)))
        }
        (_, Some(other)) if other != project => Err(Failure::conflict(format!("{target} belongs to project {other}"))),
        _ => Ok(()),
    }
}

/// Removes what was taken out of view, as far as the run lets it; the rest goes at the next start.
async fn remove(git: &GitExecutor, buried: String, run: &Run<'_>) {
    let (cancel, deadline) = (run.cancel.clone(), run.deadline.into_std());
    let (tell, mut told) = tokio::sync::watch::channel(0_u64);
    let work = git.on_projects(move |projects| {
        let (mut done, mut last) = (0, Instant::now());
        let removed = projects.remove(&buried, &mut || {
            done += 1;
            if last.elapsed() > TICK {
                last = Instant::now();
                let _ = tell.send(done);
            }
            !cancel.is_cancelled() && Instant::now() < deadline
        });
        Ok(removed?)
    });
    tokio::pin!(work);
    let removed = loop {
        tokio::select! {
            removed = &mut work => break removed,
            changed = told.changed() => match changed {
                Ok(()) => {
                    let done = *told.borrow_and_update();
                    (run.progress)(Progress { phase: "removing".to_owned(), done, ..Progress::default() });
                }
                Err(_) => break work.await,
            },
        }
    };
    if let Err(error) = removed {
        tracing::warn!(%error, "a deleted project is out of view but not wholly removed; the next start goes on");
    }
}

/// Removes the mirror of a project that was the last one on it; who fetches into it just now keeps it.
async fn remove_mirror(git: &GitExecutor, binding: &Binding) {
    let key = binding.mirror();
    let (projects, searched) = (Arc::clone(&git.projects), key.clone());
    let removed = git.mirrors.remove(&key, move || projects.mirrored().contains(&searched)).await;
    if let Err(error) = removed {
        tracing::warn!(%error, "the mirror of a deleted project cannot be removed; a later start tries again");
    }
}
