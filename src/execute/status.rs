//! Status: looks, changes nothing.

use super::{Job, delete::same_target, executor::GitExecutor};
use crate::{
    failure::{ErrorClass, Failure},
    git::{Binding, Dir, Look, Run, workspace},
    protocol::{ProjectId, StatusTask, TaskResult},
};

pub(super) async fn execute(
    git: &GitExecutor,
    job: &Job,
    work: &StatusTask,
    run: &Run<'_>,
) -> Result<TaskResult, Failure> {
    same_target(git, job.task.project, work.target.as_ref())?;
    let (binding, dir) = project(git, job.task.project).await?;
    let order = Look { refs: false, status: true };
    let looked = workspace::look(&git.children.of(binding.owner), dir.handle()?, order, run).await?;
    Ok(TaskResult {
        local_path: Some(binding.target),
        branch: looked.branch,
        head: looked.head,
        ahead: looked.ahead,
        behind: looked.behind,
        dirty: looked.dirty,
        last_fetch: binding.last_fetch,
        ..TaskResult::default()
    })
}

/// A project and its directory.
///
/// # Errors
/// `not_found` where there is none, or its user removed it.
pub(super) async fn project(git: &GitExecutor, project: ProjectId) -> Result<(Binding, Dir), Failure> {
    let absent = |message: String| Failure::new(ErrorClass::NotFound, message);
    let (binding, _) = git.projects.of(project);
    let binding = binding.ok_or_else(|| absent(format!("there is no project {project} on this node")))?;
    let looked = binding.clone();
    let dir = git.on_projects(move |projects| projects.directory(&looked)).await?;
    let dir = dir.ok_or_else(|| {
        absent(format!("the directory {} of project {project} was removed or replaced; clone it anew", binding.target))
    })?;
    Ok((binding, dir))
}
