//! An upstream, an agent's directories, and short ways to say what a test does.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
    sync::atomic::{AtomicI64, Ordering},
    time::Duration,
};

use async_trait::async_trait;
use bytesize::ByteSize;
use haul::{
    execute::{Execute, GitExecutor, Job},
    failure::{ErrorClass, Failure},
    git::{Fence, GitSettings, Run},
    protocol::{Place, Progress, ProjectId, Task, TaskMessage, TaskResult},
};
use serde_json::{Value, json};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// Runs git as nobody in particular: no settings but the repository's own.
pub(crate) fn git_raw(dir: &Path, args: &[&str]) -> Output {
    Command::new("git")
        .current_dir(dir)
        .args(args)
        .env_clear()
        .envs([
            ("PATH", "/usr/local/bin:/usr/bin:/bin"),
            ("HOME", "/nonexistent"),
            ("GIT_CONFIG_GLOBAL", "/dev/null"),
            ("GIT_CONFIG_SYSTEM", "/dev/null"),
            ("GIT_AUTHOR_NAME", "A"),
            ("GIT_AUTHOR_EMAIL", "a@example.org"),
            ("GIT_COMMITTER_NAME", "A"),
            ("GIT_COMMITTER_EMAIL", "a@example.org"),
            ("GIT_ALLOW_PROTOCOL", "file:http:https"),
            ("GIT_SSL_CAINFO", concat!(env!("CARGO_MANIFEST_DIR"), "/tests/support/tls/ca.pem")),
        ])
        .output()
        .unwrap()
}

pub(crate) fn git(dir: &Path, args: &[&str]) -> String {
    let out = git_raw(dir, args);
    assert!(out.status.success(), "git {args:?}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8_lossy(&out.stdout).trim_end().to_owned()
}

/// A fence that lets everything pass.
pub(crate) struct Open;

#[async_trait]
impl Fence for Open {
    async fn check(&self) -> Result<(), Failure> {
        Ok(())
    }
}

/// A fence that refuses, as for a task that was superseded meanwhile.
pub(crate) struct Shut;

#[async_trait]
impl Fence for Shut {
    async fn check(&self) -> Result<(), Failure> {
        Err(Failure::internal("superseded"))
    }
}

pub(crate) struct World {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) settings: GitSettings,
    pub(crate) reserve: ByteSize,
    pub(crate) executor: GitExecutor,
    arrived: AtomicI64,
}

impl World {
    pub(crate) async fn new() -> Self {
        // A machine under load shall not show trees first by chance: what is asked for is tested by itself.
        Self::with(GitSettings { allow_file: true, tree_first_after: None, ..GitSettings::default() }).await
    }

    pub(crate) async fn with(settings: GitSettings) -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("seed")).unwrap();
        let world_dir = dir.path();
        git(world_dir, &["init", "-q", "--bare", "-b", "main", "up.git"]);
        git(world_dir, &["init", "-q", "-b", "main", "seed"]);
        git(&world_dir.join("seed"), &["remote", "add", "origin", "../up.git"]);
        let reserve = ByteSize::b(0);
        let executor = open(dir.path(), &settings, reserve).await.unwrap();
        Self { dir, settings, reserve, executor, arrived: AtomicI64::new(1) }
    }

    /// As after a crash and a new start of the agent.
    pub(crate) async fn restart(&mut self) {
        self.executor = open(self.dir.path(), &self.settings, self.reserve).await.unwrap();
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn seed(&self) -> PathBuf {
        self.path("seed")
    }

    pub(crate) fn project(&self, name: &str) -> PathBuf {
        self.path("storage/projects").join(name)
    }

    pub(crate) fn url(&self) -> String {
        format!("file://{}", self.path("up.git").display())
    }

    /// Writes files in the seed, commits and pushes everything; returns the commit.
    pub(crate) fn commit(&self, files: &[(&str, &str)]) -> String {
        for (name, content) in files {
            write(&self.seed(), name, content);
        }
        self.push("more")
    }

    /// Commits whatever the seed holds and pushes it.
    pub(crate) fn push(&self, message: &str) -> String {
        let seed = self.seed();
        git(&seed, &["add", "-A"]);
        git(&seed, &["commit", "-q", "--allow-empty", "-m", message]);
        git(&seed, &["push", "-q", "-f", "origin", "HEAD"]);
        git(&seed, &["rev-parse", "HEAD"])
    }

    /// What `git clone` makes of the upstream.
    pub(crate) fn reference(&self, args: &[&str]) -> PathBuf {
        let path = self.path("reference");
        let _ = fs::remove_dir_all(&path);
        let url = self.url();
        let mut all = vec!["-c", "advice.detachedHead=false", "clone", "-q"];
        all.extend(args);
        all.extend([url.as_str(), "reference"]);
        git(self.dir.path(), &all);
        path
    }

    pub(crate) fn job(&self, kind: &str, project: ProjectId, more: Value) -> Job {
        let number = self.arrived.fetch_add(1, Ordering::Relaxed);
        let mut message = json!({"v": 1, "task_id": format!("t{number}"), "kind": kind, "project_id": project});
        message.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let message: TaskMessage = serde_json::from_value(message).unwrap();
        let place = Place { generation: None, arrived: number };
        Job { task: Task::try_from(message).unwrap(), round: 0, attempt: 1, place }
    }

    pub(crate) fn clone_job(&self, project: ProjectId, target: &str, more: Value) -> Job {
        let mut fields = json!({"git_url": self.url(), "target_path": target});
        fields.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        self.job("clone", project, fields)
    }

    pub(crate) async fn run(&self, job: &Job) -> Result<TaskResult, Failure> {
        self.run_with(job, CancellationToken::new(), &|_| (), &Open).await
    }

    pub(crate) async fn run_with(
        &self,
        job: &Job,
        cancel: CancellationToken,
        progress: &(dyn Fn(Progress) + Send + Sync),
        fence: &dyn Fence,
    ) -> Result<TaskResult, Failure> {
        self.executor.admit(&job.task)?;
        let limits = self.executor.limits(&job.task);
        let run = Run { deadline: Instant::now() + limits.timeout, stall: limits.stall, cancel, progress, fence };
        tokio::time::timeout(Duration::from_mins(1), self.executor.execute(job, &run)).await.expect("an end")
    }

    pub(crate) async fn clone(&self, project: ProjectId, target: &str, more: Value) -> Result<TaskResult, Failure> {
        self.run(&self.clone_job(project, target, more)).await
    }

    pub(crate) async fn pull(&self, project: ProjectId, more: Value) -> Result<TaskResult, Failure> {
        self.run(&self.job("pull", project, more)).await
    }

    pub(crate) async fn seq(&self, project: ProjectId) -> u64 {
        self.executor.project(project).await.seq
    }

    /// The mirrors of the agent.
    pub(crate) fn mirrors(&self) -> PathBuf {
        self.path("storage/.haul/mirrors")
    }

    /// What is left in the agent's own directory beside what is kept there.
    pub(crate) fn leftovers(&self) -> Vec<String> {
        let ours = self.project(".haul");
        let names = |dir: &Path| -> Vec<String> {
            fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
        };
        let mut left = names(&ours);
        left.retain(|name| !["owners", "gone", "pulls", "trash"].contains(&name.as_str()));
        left.extend(names(&ours.join("trash")));
        left.extend(names(&ours.join("pulls")));
        left
    }
}

pub(crate) async fn open(dir: &Path, settings: &GitSettings, reserve: ByteSize) -> Result<GitExecutor, Failure> {
    let storage = dir.join("storage");
    let program = PathBuf::from(env!("CARGO_BIN_EXE_haul"));
    GitExecutor::open(settings, &storage, &storage.join("projects"), program, reserve).await
}

pub(crate) fn write(dir: &Path, name: &str, content: &str) {
    let path = dir.join(name);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, content).unwrap();
}

pub(crate) fn read(dir: &Path, name: &str) -> String {
    fs::read_to_string(dir.join(name)).unwrap()
}

/// Every path under `dir` but `.git`, with its kind, permission to execute, and content.
pub(crate) fn listing(dir: &Path) -> Vec<(Vec<u8>, String, Vec<u8>)> {
    use std::os::unix::{ffi::OsStrExt, fs::PermissionsExt};
    fn walk(root: &Path, at: &Path, all: &mut Vec<(Vec<u8>, String, Vec<u8>)>) {
        for entry in fs::read_dir(at).unwrap() {
            let path = entry.unwrap().path();
            if path == root.join(".git") {
                continue;
            }
            let stat = path.symlink_metadata().unwrap();
            let name = path.strip_prefix(root).unwrap().as_os_str().as_bytes().to_vec();
            if stat.is_symlink() {
                all.push((name, "link".to_owned(), fs::read_link(&path).unwrap().as_os_str().as_bytes().to_vec()));
            } else if stat.is_dir() {
                all.push((name, "directory".to_owned(), Vec::new()));
                walk(root, &path, all);
            } else {
                let kind = if stat.permissions().mode() & 0o100 != 0 { "program" } else { "file" };
                all.push((name, kind.to_owned(), fs::read(&path).unwrap()));
            }
        }
    }
    let mut all = Vec::new();
    walk(dir, dir, &mut all);
    all.sort();
    all
}

/// Asserts that two repositories are alike: trees, refs, HEAD, settings, history, and that git finds them clean.
pub(crate) fn assert_alike(ours: &Path, reference: &Path) {
    assert_eq!(listing(ours), listing(reference));
    for args in [
        &["log", "--format=%H %s", "--all"][..],
        &["for-each-ref", "--format=%(refname) %(objectname) %(symref)"],
        &["rev-parse", "--symbolic-full-name", "HEAD"],
        &["status", "--porcelain=v2", "--branch"],
        &["ls-files", "--stage"],
        &["config", "--local", "--get-regexp", "^(remote|branch)\\."],
    ] {
        let (a, b) = (git_raw(ours, args), git_raw(reference, args));
        assert_eq!(String::from_utf8_lossy(&a.stdout), String::from_utf8_lossy(&b.stdout), "{args:?}");
        assert_eq!(a.status.code(), b.status.code(), "{args:?}: {}", String::from_utf8_lossy(&a.stderr));
    }
    assert_eq!(git(ours, &["status", "--porcelain"]), "");
    let fsck = git_raw(ours, &["fsck", "--full", "--strict"]);
    assert!(fsck.status.success(), "{}", String::from_utf8_lossy(&fsck.stderr));
}

pub(crate) fn class(result: &Result<TaskResult, Failure>) -> ErrorClass {
    match result {
        Ok(result) => panic!("expected a failure, got {result:?}"),
        Err(failure) => failure.class,
    }
}

/// Kills, as the kernel would, every child that works below `dir`; returns how many there were.
pub(crate) fn kill_children(dir: &Path, role: &str) -> usize {
    let mut killed = 0;
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else { continue };
        let command = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let ours = command.ends_with(format!("child\0{role}\0").as_bytes())
            && fs::read_dir(entry.path().join("fd")).is_ok_and(|mut fds| {
                fds.any(|fd| fd.is_ok_and(|fd| fs::read_link(fd.path()).is_ok_and(|path| path.starts_with(dir))))
            });
        if ours && let Some(pid) = rustix::process::Pid::from_raw(pid) {
            killed += usize::from(rustix::process::kill_process(pid, rustix::process::Signal::KILL).is_ok());
        }
    }
    killed
}
