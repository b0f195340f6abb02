//! An upstream behind a server that can hold back whole histories, and one project of it.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use haul::{
    execute::{Execute, Job, OwedHistory},
    failure::Failure,
    git::GitSettings,
    protocol::TaskResult,
};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

pub(crate) use crate::{githttp::git_command as command, world::git};
use crate::{
    githttp::{Behaviour, Server},
    world::{Open, World, assert_alike, kill_children, open},
};

pub(crate) struct Scene {
    pub(crate) world: World,
    pub(crate) server: Server,
    /// The clone of the project.
    pub(crate) job: Job,
}

impl Scene {
    /// Trees come first at once.
    pub(crate) async fn new() -> Self {
        Self::after(Some(Duration::ZERO)).await
    }

    pub(crate) async fn after(tree_first_after: Option<Duration>) -> Self {
        Self::with(GitSettings { tree_first_after, ..GitSettings::default() }).await
    }

    pub(crate) async fn with(settings: GitSettings) -> Self {
        Self::serving(settings, Server::start).await
    }

    /// With a server of another kind.
    pub(crate) async fn serving(settings: GitSettings, start: impl FnOnce(&Path) -> Server) -> Self {
        let settings = GitSettings { allow_file: true, allow_http: true, allow_loopback: true, ..settings };
        let world = World::with(settings).await;
        let seed = world.seed();
        for number in 0..6 {
            world.commit(&[("a.txt", &format!("{number}\n")), (&format!("only-{number}"), "x")]);
            git(&seed, &["tag", &format!("light-{number}")]);
            git(&seed, &["tag", "-a", "-m", "annotated", &format!("v{number}")]);
        }
        git(&seed, &["checkout", "-q", "-b", "dev", "light-3"]);
        world.commit(&[("dev.txt", "dev")]);
        git(&seed, &["checkout", "-q", "main"]);
        git(&seed, &["push", "-q", "origin", "--tags"]);
        let server = start(world.dir.path());
        let job = world.clone_job(1, "p", json!({"git_url": server.url("up.git")}));
        Self { world, server, job }
    }

    pub(crate) fn url(&self) -> String {
        self.server.url("up.git")
    }

    pub(crate) fn project(&self) -> PathBuf {
        self.world.project("p")
    }

    pub(crate) async fn clone(&self, mut fields: Value) -> Result<TaskResult, Failure> {
        fields["git_url"] = self.url().into();
        self.world.run(&self.world.clone_job(1, "p", fields)).await
    }

    /// Clones while whole histories are held back.
    pub(crate) async fn tree_first(&self, fields: Value) -> TaskResult {
        self.server.behave(Behaviour::HoldWhole);
        let result = self.clone(fields).await.unwrap();
        assert_eq!(result.history.as_deref(), Some("pending"));
        result
    }

    /// Attaches the history that the first task of the project owes.
    pub(crate) async fn history(&self) -> Result<Option<TaskResult>, Failure> {
        let owed = OwedHistory { task: self.job.task.id.clone(), project: 1, seq: 1 };
        let stop = CancellationToken::new();
        let attached = self.world.executor.history(&owed, &stop, &Open);
        tokio::time::timeout(Duration::from_mins(1), attached).await.expect("an end")
    }

    /// As after a crash and a new start of the agent.
    pub(crate) async fn restart(&mut self) {
        // Everything that it still does ends first.
        let elsewhere = self.world.path("elsewhere");
        self.world.executor = open(&elsewhere, &self.world.settings, self.world.reserve).await.unwrap();
        let (storage, begun) = (self.world.path("storage"), std::time::Instant::now());
        while kill_children(&storage, "transfer") > 0 {
            assert!(begun.elapsed() < Duration::from_mins(1), "children of an agent that is gone go on");
            tokio::task::yield_now().await;
        }
        self.world.restart().await;
    }

    pub(crate) fn is_shallow(&self) -> bool {
        git(&self.project(), &["rev-parse", "--is-shallow-repository"]) == "true"
    }

    /// What is left in the directory of mirrors beside mirrors.
    pub(crate) fn tip_stores(&self) -> Vec<String> {
        let names = fs::read_dir(self.world.mirrors()).unwrap().map(|entry| entry.unwrap().file_name());
        names.filter_map(|name| name.into_string().ok()).filter(|name| name.contains(".tip-")).collect()
    }

    /// Asserts that the project equals what git makes, and that nothing of the work is left in it.
    pub(crate) fn equals_one_that_waited(&self, fields: &Value) {
        let named = fields.get("branch").or(fields.get("tag")).and_then(Value::as_str);
        let mut args = vec!["-c", "advice.detachedHead=false", "clone", "-q"];
        args.extend(named.iter().flat_map(|name| ["--branch", name]));
        if fields.get("single_branch").is_some() {
            args.push("--single-branch");
        }
        let (url, at) = (self.url(), self.world.path("reference"));
        let _ = fs::remove_dir_all(&at);
        args.extend([url.as_str(), "reference"]);
        git(self.world.dir.path(), &args);
        assert!(!self.is_shallow());
        assert_alike(&self.project(), &at);
        self.nothing_strays();
    }

    /// No helper file is left anywhere in the repository.
    pub(crate) fn nothing_strays(&self) {
        let mut waiting = vec![self.project().join(".git")];
        while let Some(dir) = waiting.pop() {
            for entry in fs::read_dir(dir).unwrap().flatten() {
                let name = entry.file_name().into_string().unwrap();
                let end = Path::new(&name).extension().and_then(std::ffi::OsStr::to_str);
                let stray = name.starts_with("haul-waiting-") || matches!(end, Some("keep" | "lock"));
                assert!(!stray, "{name} is left");
                if entry.file_type().unwrap().is_dir() {
                    waiting.push(entry.path());
                }
            }
        }
    }
}
