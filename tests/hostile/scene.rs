//! An upstream, an agent whose children are traced, a place outside that nobody may touch, and a project to plant in.

#![allow(dead_code, reason = "each suite uses its own part")]

use std::{
    collections::BTreeMap,
    fs,
    io::Write,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    sync::atomic::{AtomicI64, Ordering},
    time::{Duration, Instant},
};

use async_trait::async_trait;
use bytesize::ByteSize;
use haul::{
    execute::{Execute, GitExecutor, Job},
    failure::Failure,
    git::{Fence, GitSettings, Run},
    protocol::{Owner, Place, Task, TaskMessage, TaskResult},
};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use crate::{githttp, trace::Tracer};

/// The uid and gid of the workspace's user, where the tests run as root.
pub(crate) const USER: u32 = 20_001;
/// The program whose children work, where a test was started anew as another user.
pub(crate) const PROGRAM: &str = "HAUL_TEST_PROGRAM";

pub(crate) struct Always;

#[async_trait]
impl Fence for Always {
    async fn check(&self) -> Result<(), Failure> {
        Ok(())
    }
}

/// Whether children are to work as an owner who is not the agent.
pub(crate) const OWNED: &str = "HAUL_TEST_OWNED";

/// As whom children work, where that is another than the agent.
pub(crate) fn owner() -> Option<Owner> {
    std::env::var_os(OWNED).map(|_| Owner { uid: USER, gid: USER })
}

/// Gives everything at and below `path` to the owner, if there is one.
pub(crate) fn give(path: &Path) {
    if owner().is_none() {
        return;
    }
    // What nobody may change stays whose it is.
    let _ = Command::new("chown").args(["-hR", &format!("{USER}:{USER}")]).arg(path).stderr(Stdio::null()).status();
}

/// Whether every mode bit lets this process pass.
pub(crate) fn privileged() -> bool {
    rustix::process::geteuid().is_root()
}

/// The `haul` binary.
pub(crate) fn program() -> PathBuf {
    std::env::var_os(PROGRAM).map_or_else(|| env!("CARGO_BIN_EXE_haul").into(), PathBuf::from)
}

/// Everything that a test of hostile workspaces needs.
pub(crate) struct Scene {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) upstream: githttp::Upstream,
    pub(crate) server: githttp::Server,
    pub(crate) tracer: Option<Tracer>,
    pub(crate) executor: GitExecutor,
    /// Where projects stand, and where upstream is.
    pub(crate) first: String,
    pub(crate) second: String,
    numbers: AtomicI64,
}

/// What upstream has at first.
const FIRST: &[(&str, &str)] = &[
    ("a.txt", "one\n"),
    ("b.txt", "b\n"),
    ("gone.txt", "leaves\n"),
    ("dir/c.txt", "c\n"),
    ("dir/deep/d.txt", "d\n"),
    (".gitignore", "*.log\n"),
    (".gitattributes", "*.crlf text eol=crlf\n"),
    ("lines.crlf", "x\ny\n"),
];
/// What it has later.
const SECOND: &[(&str, &str)] = &[
    ("a.txt", "two\n"),
    ("b.txt", "b\n"),
    ("new.txt", "new\n"),
    ("dir/c.txt", "cc\n"),
    ("dir/deep/d.txt", "d\n"),
    ("dir/e.txt", "e\n"),
    (".gitignore", "*.log\n"),
    (".gitattributes", "*.crlf text eol=crlf\n"),
    ("lines.crlf", "x\ny\nz\n"),
];

impl Scene {
    /// With an upstream that is one commit ahead of where [`Self::behind`] puts a project.
    pub(crate) async fn new(traced: bool) -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let upstream = githttp::Upstream::new();
        let (first, second) = (commit(&upstream.path(), FIRST), commit(&upstream.path(), SECOND));
        let server = githttp::Server::start(upstream.root());
        let traces = traced.then(|| Tracer::new(&dir.path().join("traces"), &program()));
        let program = traces.as_ref().map_or_else(program, super::trace::Tracer::program);
        let executor = open(&dir.path().join("storage"), program).await;
        let numbers = AtomicI64::new(1);
        let scene = Self { dir, upstream, server, tracer: traces, executor, first, second, numbers };
        scene.furnish();
        give(&scene.outside());
        scene
    }

    fn furnish(&self) {
        let outside = self.outside();
        write(&outside, "a.txt", "one\n");
        write(&outside, "dir/c.txt", "c\n");
        write(&outside, "precious", "precious\n");
        write(&outside, "empty/.keep", "");
        write(&outside, "bin/tool", "#!/bin/sh\n");
        fs::create_dir(self.marks()).unwrap();
        // A stranger's repository, with objects that nobody else has.
        git(&outside, &["init", "-q", "-b", "main", "victim"]);
        write(&outside, "victim/secret", "only here\n");
        git(&outside.join("victim"), &["add", "-A"]);
        git(&outside.join("victim"), &["commit", "-q", "-m", "secret"]);
        git(&outside.join("victim"), &["pack-refs", "--all"]);
        git(&outside.join("victim"), &["gc", "-q"]);
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// What must stay as it is.
    pub(crate) fn outside(&self) -> PathBuf {
        self.path("outside")
    }

    /// Where a program that ran leaves a file.
    pub(crate) fn marks(&self) -> PathBuf {
        self.path("marks")
    }

    pub(crate) fn storage(&self) -> PathBuf {
        self.path("storage")
    }

    pub(crate) fn project(&self, name: &str) -> PathBuf {
        self.storage().join("projects").join(name)
    }

    pub(crate) fn url(&self) -> String {
        self.server.url("app.git")
    }

    pub(crate) fn job(&self, kind: &str, project: i64, more: &Value) -> Job {
        let number = self.numbers.fetch_add(1, Ordering::Relaxed);
        job(number, kind, project, more)
    }

    /// Runs a task to its end, with a stall limit of seconds among the user's files.
    pub(crate) async fn run(&self, kind: &str, project: i64, more: Value) -> Result<TaskResult, Failure> {
        execute(&self.executor, &self.job(kind, project, &more)).await
    }

    /// Clones.
    pub(crate) async fn clone(&self, project: i64, target: &str) -> Result<TaskResult, Failure> {
        self.run("clone", project, json!({"git_url": self.url(), "target_path": target})).await
    }

    /// Puts a project back to where upstream was at first, with files of its user.
    pub(crate) fn behind(&self, name: &str) -> PathBuf {
        let project = self.project(name);
        git(&project, &["reset", "-q", "--hard", &self.first]);
        git(&project, &["update-ref", "refs/remotes/origin/main", &self.first]);
        for (name, content) in USERS {
            write(&project, name, content);
        }
        give(&project);
        project
    }
}

/// Files of the user that no pull may change: modified, untracked, ignored.
pub(crate) const USERS: [(&str, &str); 4] = [
    ("b.txt", "changed by its user\n"),
    ("mine.txt", "untracked\n"),
    ("debug.log", "ignored\n"),
    ("dir/inner.log", "ignored, deeper\n"),
];

/// Opens an agent's executor.
pub(crate) async fn open(storage: &Path, program: PathBuf) -> GitExecutor {
    open_with(storage, program, |_| ()).await
}

/// The same with other settings.
pub(crate) async fn open_with(storage: &Path, program: PathBuf, change: impl FnOnce(&mut GitSettings)) -> GitExecutor {
    let mut settings = GitSettings {
        allow_http: true,
        allow_loopback: true,
        tree_first_after: None,
        kill_grace: Duration::from_millis(300),
        run_as: owner(),
        ..GitSettings::default()
    };
    change(&mut settings);
    // Made by whoever sets a node up: owners of projects go through it.
    fs::create_dir_all(storage).unwrap();
    GitExecutor::open(&settings, storage, &storage.join("projects"), program, ByteSize::b(0)).await.unwrap()
}

/// A task as it would come from a master.
pub(crate) fn job(number: i64, kind: &str, project: i64, more: &Value) -> Job {
    let mut message = json!({"v": 1, "task_id": format!("t{number}"), "kind": kind, "project_id": project});
    message.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    let message: TaskMessage = serde_json::from_value(message).unwrap();
    let place = Place { generation: None, arrived: number };
    Job { task: Task::try_from(message).unwrap(), round: 0, attempt: 1, place }
}

/// Runs a job; it must end within a minute, whatever it meets.
pub(crate) async fn execute(executor: &GitExecutor, job: &Job) -> Result<TaskResult, Failure> {
    executor.admit(&job.task)?;
    let run = Run {
        deadline: tokio::time::Instant::now() + Duration::from_secs(50),
        // The agent's own limit among a user's files. Nothing here comes near it, but for a disk that others keep busy.
        stall: Duration::from_secs(10),
        cancel: CancellationToken::new(),
        progress: &|_| (),
        fence: &Always,
    };
    tokio::time::timeout(Duration::from_mins(1), executor.execute(job, &run)).await.expect("an end, whatever it met")
}

/// Commits exactly `files` on top of `main` of a bare repository.
pub(crate) fn commit(bare: &Path, files: &[(&str, &str)]) -> String {
    let index = bare.join("index.for-a-test");
    let env = [("GIT_INDEX_FILE", index.to_str().unwrap())];
    for (name, content) in files {
        let blob = feed(bare, &["hash-object", "-w", "--stdin"], content.as_bytes());
        let entry = format!("100644,{blob},{name}");
        assert!(
            command(bare).args(["update-index", "--add", "--cacheinfo", &entry]).envs(env).status().unwrap().success()
        );
    }
    let output = command(bare).arg("write-tree").envs(env).output().unwrap();
    fs::remove_file(&index).unwrap();
    let tree = String::from_utf8(output.stdout).unwrap();
    let mut arguments = vec!["commit-tree", "-m", "a commit", tree.trim()];
    let parent = command(bare).args(["rev-parse", "-q", "--verify", "refs/heads/main"]).output().unwrap();
    let parent = String::from_utf8(parent.stdout).unwrap();
    if !parent.trim().is_empty() {
        arguments.extend(["-p", parent.trim()]);
    }
    let commit = git(bare, &arguments);
    git(bare, &["update-ref", "refs/heads/main", &commit]);
    commit
}

/// The only settings besides a repository's own: root works in projects of an owner.
pub(crate) fn global() -> &'static str {
    if owner().is_some() { concat!(env!("CARGO_MANIFEST_DIR"), "/tests/hostile/gitconfig") } else { "/dev/null" }
}

/// Git as nobody in particular.
pub(crate) fn command(dir: &Path) -> Command {
    let mut command = Command::new("git");
    command.current_dir(dir).env_clear().stdin(Stdio::null()).envs([
        ("PATH", "/usr/local/bin:/usr/bin:/bin"),
        ("HOME", "/nonexistent"),
        ("GIT_CONFIG_GLOBAL", global()),
        ("GIT_CONFIG_SYSTEM", "/dev/null"),
        ("GIT_TERMINAL_PROMPT", "0"),
        ("GIT_ADVICE", "0"),
    ]);
    for role in ["AUTHOR", "COMMITTER"] {
        command.env(format!("GIT_{role}_NAME"), "A").env(format!("GIT_{role}_EMAIL"), "a@example.org");
    }
    command
}

/// Runs git; it must succeed.
pub(crate) fn git(dir: &Path, args: &[&str]) -> String {
    let output = command(dir).args(args).output().unwrap();
    assert!(output.status.success(), "git {args:?} in {}: {}", dir.display(), text(&output.stderr));
    text(&output.stdout).trim_end().to_owned()
}

/// The same with something on its standard input.
pub(crate) fn feed(dir: &Path, args: &[&str], input: &[u8]) -> String {
    let mut child =
        command(dir).args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(input).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "git {args:?}: {}", text(&output.stderr));
    text(&output.stdout).trim_end().to_owned()
}

/// Runs a program for so long at most; `None` where it had not ended by then.
pub(crate) fn bounded(mut command: Command, longest: Duration) -> Option<Output> {
    use std::os::unix::process::CommandExt;
    command.process_group(0).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let begun = Instant::now();
    loop {
        if child.try_wait().unwrap().is_some() {
            return Some(child.wait_with_output().unwrap());
        }
        if begun.elapsed() > longest {
            let group = rustix::process::Pid::from_child(&child);
            let _ = rustix::process::kill_process_group(group, rustix::process::Signal::KILL);
            child.wait().unwrap();
            return None;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

pub(crate) fn write(dir: &Path, name: &str, content: &str) {
    let path = dir.join(name);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, content).unwrap();
}

/// Everything at and below `dir`: kind, mode, owner, inode, time of the last change of content, and the content.
pub(crate) fn snapshot(dir: &Path) -> BTreeMap<PathBuf, String> {
    let mut all = BTreeMap::new();
    let mut waiting = vec![dir.to_owned()];
    while let Some(path) = waiting.pop() {
        let stat = path.symlink_metadata().unwrap();
        let what = if stat.is_dir() {
            waiting.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
            String::new()
        } else if stat.is_symlink() {
            fs::read_link(&path).unwrap().display().to_string()
        } else if stat.is_file() && stat.len() < 1 << 24 {
            format!("{:?}", git2::Oid::hash_object(git2::ObjectType::Blob, &fs::read(&path).unwrap()).unwrap())
        } else {
            String::new()
        };
        let line = format!(
            "{:o} {} {} {} {}.{} {what}",
            stat.mode(),
            stat.uid(),
            stat.ino(),
            stat.len(),
            stat.mtime(),
            stat.mtime_nsec()
        );
        all.insert(path, line);
    }
    all
}

/// Asserts that two snapshots are one.
pub(crate) fn assert_untouched(before: &BTreeMap<PathBuf, String>, after: &BTreeMap<PathBuf, String>, what: &str) {
    let differing: Vec<_> = before
        .iter()
        .filter(|(path, line)| after.get(*path) != Some(line))
        .map(|(path, line)| format!("{}: {line} -> {:?}", path.display(), after.get(path)))
        .chain(after.keys().filter(|path| !before.contains_key(*path)).map(|path| format!("{} came", path.display())))
        .collect();
    assert!(differing.is_empty(), "{what} changed something outside: {differing:#?}");
}
