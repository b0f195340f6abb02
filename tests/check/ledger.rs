//! An executor that does nothing but write down what it did, and keep of each project what the real one keeps: a state
//! that outlives the journal, changed in one step.

use std::{
    collections::HashMap,
    fs::File,
    io::Write as _,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use haul::{
    execute::{Execute, Job, Limits, OwedHistory, ProjectState},
    failure::{ErrorClass, Failure},
    git::{Fence, Run},
    protocol::{Kind, Place, ProjectId, Task, TaskResult},
};
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

use super::{
    behaviour::Behaviour,
    history::{Execution, Project, Step, now},
};

/// The ledger in a node's storage.
const LEDGER: &str = "ledger.jsonl";
const PROJECTS: &str = "projects";

/// A project as it is kept.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Kept {
    seq: u64,
    place: Place,
    active: bool,
    task: String,
}

/// The executor.
pub(crate) struct Ledger {
    node: String,
    boot: String,
    projects: PathBuf,
    file: Mutex<File>,
    known: Mutex<HashMap<ProjectId, Option<Kept>>>,
}

impl Ledger {
    /// The ledger of a node, continued.
    pub(crate) fn open(node: &str, boot: &str, storage: &Path) -> std::io::Result<Self> {
        let projects = storage.join(PROJECTS);
        std::fs::create_dir_all(&projects)?;
        let file = File::options().create(true).append(true).open(storage.join(LEDGER))?;
        Ok(Self {
            node: node.to_owned(),
            boot: boot.to_owned(),
            projects,
            file: Mutex::new(file),
            known: Mutex::default(),
        })
    }

    fn write(&self, job: &Job, step: Step) {
        let line = Execution {
            at: now(),
            node: self.node.clone(),
            boot: self.boot.clone(),
            task: job.task.id.to_string(),
            round: job.round,
            attempt: job.attempt,
            project: job.task.project,
            kind: job.task.kind(),
            place: job.place,
            step,
        };
        let mut line = serde_json::to_vec(&line).expect("a line serialises");
        line.push(b'\n');
        // One call, so that a kill leaves whole lines.
        self.file.lock().unwrap_or_else(PoisonError::into_inner).write_all(&line).expect("the ledger can be written");
    }

    fn kept(&self, project: ProjectId) -> Option<Kept> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.entry(project).or_insert_with(|| read(&self.projects.join(project.to_string()))).clone()
    }

    fn keep(&self, project: ProjectId, kept: Kept) -> std::io::Result<()> {
        let path = self.projects.join(project.to_string());
        let beside = path.with_extension("new");
        std::fs::write(&beside, serde_json::to_vec(&kept).expect("a project serialises"))?;
        std::fs::rename(beside, path)?;
        self.known.lock().unwrap_or_else(PoisonError::into_inner).insert(project, Some(kept));
        Ok(())
    }

    async fn work(&self, job: &Job, run: &Run<'_>) -> Result<(), Failure> {
        let behaviour = Behaviour::of(job.task.id.as_str()).unwrap_or(Behaviour::Good);
        if let Behaviour::Slow(ms) = behaviour {
            tokio::select! {
                () = tokio::time::sleep(Duration::from_millis(u64::from(ms))) => {}
                () = run.cancel.cancelled() => return Err(Failure::internal("stopped")),
            }
        }
        if let Some(class) = behaviour.failure(job.round, job.attempt) {
            return Err(Failure::new(class, "told to fail"));
        }
        let (project, kind) = (job.task.project, job.task.kind());
        let before = self.kept(project);
        let active = before.as_ref().is_some_and(|kept| kept.active);
        if !active && matches!(kind, Kind::Pull | Kind::Status) {
            return Err(Failure::new(ErrorClass::NotFound, "there is no such project here"));
        }
        if !kind.changes_project() {
            return Ok(());
        }
        run.fence.check().await?;
        let again = before.as_ref().is_some_and(|kept| kept.place == job.place);
        let seq = before.map_or(0, |kept| kept.seq) + u64::from(!again);
        let task = job.task.id.to_string();
        let kept = Kept { seq, place: job.place, active: kind != Kind::Delete, task };
        self.keep(project, kept).map_err(|error| Failure::new(ErrorClass::Disk, error.to_string()))
    }
}

#[async_trait]
impl Execute for Ledger {
    async fn project(&self, project: ProjectId) -> ProjectState {
        self.kept(project).map_or_else(ProjectState::default, |kept| ProjectState {
            seq: kept.seq,
            mark: Some(kept.place),
            active: kept.active,
            deleted: !kept.active,
        })
    }

    fn admit(&self, _task: &Task) -> Result<(), Failure> {
        Ok(())
    }

    fn limits(&self, _task: &Task) -> Limits {
        Limits { timeout: Duration::from_mins(1), stall: Duration::from_mins(1) }
    }

    async fn execute(&self, job: &Job, run: &Run<'_>) -> Result<TaskResult, Failure> {
        self.write(job, Step::Started);
        let worked = self.work(job, run).await;
        self.write(
            job,
            match &worked {
                Ok(()) if job.task.kind().changes_project() => Step::Applied,
                Ok(()) => Step::Done,
                Err(_) if run.cancel.is_cancelled() => Step::Stopped,
                Err(failure) => Step::Failed(failure.class),
            },
        );
        worked.map(|()| TaskResult::default())
    }

    async fn history(
        &self,
        _owed: &OwedHistory,
        _stop: &CancellationToken,
        _fence: &dyn Fence,
    ) -> Result<Option<TaskResult>, Failure> {
        Ok(None)
    }

    async fn forget(&self, _project: ProjectId) -> Result<(), Failure> {
        Ok(())
    }
}

fn read(path: &Path) -> Option<Kept> {
    let text = std::fs::read(path).ok()?;
    Some(serde_json::from_slice(&text).expect("a project is written whole"))
}

/// The lines of a node's ledger, in their order.
pub(crate) fn executions(storage: &Path) -> Vec<Execution> {
    let text = std::fs::read_to_string(storage.join(LEDGER)).unwrap_or_default();
    text.lines().map(|line| serde_json::from_str(line).expect("a line is written whole")).collect()
}

/// The projects of a node.
pub(crate) fn projects(node: &str, storage: &Path) -> Vec<Project> {
    let entries = std::fs::read_dir(storage.join(PROJECTS)).into_iter().flatten().flatten();
    let projects = entries.filter_map(|entry| {
        let project = entry.file_name().to_str()?.parse().ok()?;
        let kept = read(&entry.path())?;
        Some(Project {
            node: node.to_owned(),
            project,
            active: kept.active,
            task: Some(kept.task),
            place: Some(kept.place),
            ..Project::default()
        })
    });
    projects.collect()
}
