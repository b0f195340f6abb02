//! The executor that does real git work.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Instant,
};

use async_trait::async_trait;
use bytesize::ByteSize;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::{Execute, Job, Limits, OwedHistory, ProjectState, clone, delete, history, pull, reserve::Reserve, status};
use crate::{
    failure::{ErrorClass, Failure},
    git::{Budget, Children, Confinement, Fence, GitSettings, Mirrors, Projects, Run, Stamp, Support, owner::barred},
    protocol::{HostState, Progress, ProjectId, Scheme, Task, TaskResult, Work},
};

/// Executes tasks on the projects of one agent.
pub struct GitExecutor {
    pub(super) settings: GitSettings,
    pub(super) children: Children,
    pub(super) mirrors: Mirrors,
    /// What goes on for itself ends with this.
    _closing: DropGuard,
    pub(super) projects: Arc<Projects>,
    pub(super) reserve: Reserve,
}

impl GitExecutor {
    /// Opens the projects directory and the mirrors, and sweeps what a crash left in them.
    ///
    /// `program` is the `haul` binary, whose children do the work. With less than `reserve` free no clone and no pull
    /// begins.
    ///
    /// # Errors
    /// When a directory is a link or cannot be made, read or written; `forbidden` where the settings ask for what this
    /// node cannot do.
    pub async fn open(
        settings: &GitSettings,
        storage: &Path,
        projects: &Path,
        program: PathBuf,
        reserve: ByteSize,
    ) -> Result<Self, Failure> {
        let reserve = Reserve::new(reserve, storage, projects);
        let support = Support::of_this_node();
        support.allow(settings)?;
        support.warn(settings);
        let children = Children::new(program, settings.kill_grace)?.confined(Confinement::from(settings));
        let mirrors = Mirrors::open(storage, settings, children.clone()).await?.keeping_free(reserve.bytes());
        let path = projects.to_owned();
        let other_owners = settings.has_other_owners(support.own);
        let projects = blocking(move || {
            let projects = Projects::open(&path)?;
            if let Some(barred) = barred(&path).filter(|_| other_owners) {
                tracing::warn!(path = %barred.display(), "the owners of projects cannot pass this directory: chmod o+x");
            }
            Ok(projects)
        })
        .await?;
        let bound = projects.mirrored();
        mirrors.remove_unused(move |key| bound.contains(key)).await?;
        Ok(Self {
            settings: settings.clone(),
            children,
            _closing: mirrors.closing(),
            mirrors,
            projects: Arc::new(projects),
            reserve,
        })
    }

    /// How large a tree may be.
    pub(super) fn budget(&self) -> Budget {
        Budget { files: self.settings.max_files, bytes: self.settings.max_bytes.as_u64() }
    }

    /// Does `work` on the projects directory, in a thread that may block.
    pub(super) async fn on_projects<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Projects) -> Result<T, Failure> + Send + 'static,
    ) -> Result<T, Failure> {
        let projects = Arc::clone(&self.projects);
        blocking(move || work(&projects)).await
    }
}

/// Runs `work` in a thread that may block, to its end even where nobody waits any more.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Failure> + Send + 'static,
) -> Result<T, Failure> {
    let lost = |error| Failure::internal(format!("a thread of the executor was lost: {error}"));
    tokio::task::spawn_blocking(work).await.map_err(lost)?
}

/// Copies in a thread that may block, telling the bytes as progress of `phase`; ends early when the run does.
pub(super) async fn copied(
    phase: &'static str,
    run: &Run<'_>,
    copy: impl FnOnce(&mut dyn FnMut(u64) -> Result<(), Failure>) -> Result<(), Failure> + Send + 'static,
) -> Result<(), Failure> {
    let (cancel, deadline) = (run.cancel.clone(), run.deadline.into_std());
    let (tell, mut told) = tokio::sync::watch::channel(0_u64);
    let copy = blocking(move || {
        let mut bytes = 0;
        copy(&mut |count| {
            bytes += count;
            let _ = tell.send(bytes);
            if cancel.is_cancelled() {
                return Err(Failure::internal("cancelled"));
            }
            if Instant::now() > deadline {
                return Err(Failure::new(ErrorClass::Timeout, "the deadline of this attempt passed"));
            }
            Ok(())
        })
    });
    tokio::pin!(copy);
    loop {
        tokio::select! {
            done = &mut copy => return done,
            changed = told.changed() => match changed {
                Ok(()) => {
                    let bytes = *told.borrow_and_update();
                    (run.progress)(Progress { phase: phase.to_owned(), bytes, ..Progress::default() });
                }
                Err(_) => return copy.await,
            },
        }
    }
}

/// What a success of `job` writes into the project's order.
pub(super) fn stamp(job: &Job) -> Stamp {
    Stamp { task: job.task.id.clone(), round: job.round, place: job.place }
}

#[async_trait]
impl Execute for GitExecutor {
    async fn project(&self, project: ProjectId) -> ProjectState {
        let (binding, tombstone) = self.projects.of(project);
        match (binding, tombstone) {
            (Some(binding), _) => {
                let (seq, mark) = (binding.applied.seq, binding.applied.mark);
                let there = self.on_projects(move |projects| projects.stands(&binding)).await;
                ProjectState { seq, mark, active: there.unwrap_or(false), deleted: false }
            }
            (None, Some(tombstone)) => {
                ProjectState { seq: tombstone.applied.seq, mark: tombstone.applied.mark, active: false, deleted: true }
            }
            (None, None) => ProjectState::default(),
        }
    }

    fn admit(&self, task: &Task) -> Result<(), Failure> {
        match &task.work {
            Work::Clone(work) => {
                if work.lfs && !matches!(work.url.scheme(), Scheme::Https | Scheme::Http) {
                    return Err(Failure::invalid(
                        "lfs works over https only; clone without it, or from an https address",
                    ));
                }
                self.settings.owner(work.owner)?;
                self.mirrors.allow(&work.url)
            }
            Work::Pull(work) => work.url.as_ref().map_or(Ok(()), |url| self.mirrors.allow(url)),
            Work::Delete(_) | Work::Status(_) => Ok(()),
        }
    }

    fn limits(&self, task: &Task) -> Limits {
        let longest = self.settings.max_timeout;
        Limits {
            timeout: task.timeout.unwrap_or(self.settings.timeout).min(longest),
            stall: task.stall.unwrap_or(self.settings.stall).min(self.settings.max_stall).min(longest),
        }
    }

    fn hosts(&self) -> Vec<HostState> {
        self.mirrors.hosts()
    }

    async fn execute(&self, job: &Job, run: &Run<'_>) -> Result<TaskResult, Failure> {
        let begun = tokio::time::Instant::now();
        let done = match &job.task.work {
            Work::Clone(work) => clone::execute(self, job, work, run).await,
            Work::Pull(work) => pull::execute(self, job, work, run).await,
            Work::Delete(work) => delete::execute(self, job, work, run).await,
            Work::Status(work) => status::execute(self, job, work, run).await,
        };
        let mut result = match done {
            Ok(result) => result,
            Err(failure) => return Err(self.reserve.blamed(failure).await),
        };
        result.duration_ms = Some(u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX));
        Ok(result)
    }

    async fn history(
        &self,
        owed: &OwedHistory,
        stop: &CancellationToken,
        fence: &dyn Fence,
    ) -> Result<Option<TaskResult>, Failure> {
        let begun = tokio::time::Instant::now();
        let mut result = history::execute(self, owed, stop, fence).await?;
        if let Some(result) = &mut result {
            result.duration_ms = Some(u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX));
        }
        Ok(result)
    }

    async fn forget(&self, project: ProjectId) -> Result<(), Failure> {
        self.on_projects(move |projects| projects.forget(project)).await
    }
}
