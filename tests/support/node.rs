//! A storage directory with its mirrors, and the bounds of what is run for it, for tests of children and transfers.
//!
//! A suite that includes this file also includes `support/githttp.rs` as `githttp`.

#![allow(
    dead_code,
    unused_imports,
    unused_macros,
    reason = "each suite that includes this file uses its own part of it"
)]
#![expect(clippy::unwrap_used, reason = "a test that cannot be set up shall fail loudly")]

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::Mutex,
    time::Duration,
};

use async_trait::async_trait;
use haul::{
    failure::Failure,
    git::{
        Fence, Run,
        child::Children,
        mirror::{Fetched, Mirrors, Want},
        settings::{Engine, GitSettings},
    },
    protocol::{CredentialName, GitUrl, Progress},
};
use tokio::{sync::Notify, time::Instant};
use tokio_util::sync::CancellationToken;

use crate::githttp::{Upstream, git_command};

/// Makes of each `async fn name(engine: Engine)` two tests, `gix::name` and `git::name`.
macro_rules! with_both {
    ($($name:ident)+) => {
        mod gix {
            $(#[tokio::test] async fn $name() { super::$name(super::Engine::Gix).await; })+
        }
        mod git {
            $(#[tokio::test] async fn $name() { super::$name(super::Engine::Git).await; })+
        }
    };
}
pub(crate) use with_both;

/// A fence that lets everything pass.
pub(crate) struct Always;

#[async_trait]
impl Fence for Always {
    async fn check(&self) -> Result<(), Failure> {
        Ok(())
    }
}

/// What bounds one run.
#[derive(Clone, Copy)]
pub(crate) struct Bounds {
    pub(crate) deadline: Duration,
    pub(crate) stall: Duration,
}

impl Default for Bounds {
    fn default() -> Self {
        Self { deadline: Duration::from_mins(2), stall: Duration::from_mins(1) }
    }
}

/// What is run within bounds, and what was told of it.
#[derive(Default)]
pub(crate) struct Running {
    pub(crate) bounds: Bounds,
    pub(crate) cancel: CancellationToken,
    pub(crate) progress: Mutex<Vec<Progress>>,
    pub(crate) moved: Notify,
}

impl Running {
    pub(crate) fn within_bounds(bounds: Bounds) -> Self {
        Self { bounds, ..Self::default() }
    }

    /// Does `work` within the bounds.
    pub(crate) async fn run<T>(&self, work: impl AsyncFnOnce(&Run<'_>) -> T) -> T {
        self.run_within(self.bounds, work).await
    }

    async fn run_within<T>(&self, bounds: Bounds, work: impl AsyncFnOnce(&Run<'_>) -> T) -> T {
        let progress = |progress| {
            self.progress.lock().unwrap().push(progress);
            self.moved.notify_one();
        };
        let run = Run {
            deadline: Instant::now() + bounds.deadline,
            stall: bounds.stall,
            cancel: self.cancel.clone(),
            progress: &progress,
            fence: &Always,
        };
        work(&run).await
    }

    /// How often this phase was told.
    pub(crate) fn told(&self, phase: &str) -> usize {
        self.progress.lock().unwrap().iter().filter(|progress| progress.phase == phase).count()
    }
}

/// A storage directory with its mirrors.
pub(crate) struct Node {
    pub(crate) storage: tempfile::TempDir,
    pub(crate) mirrors: Mirrors,
    pub(crate) running: Running,
}

impl Node {
    /// One that fetches by `engine` and no other.
    pub(crate) async fn new(engine: Engine) -> Self {
        Self::with(engine, |_| {}).await
    }

    /// The same with other settings.
    pub(crate) async fn with(engine: Engine, change: impl FnOnce(&mut GitSettings)) -> Self {
        let storage = tempfile::tempdir().unwrap();
        let credentials = storage.path().join("credentials");
        fs::create_dir(&credentials).unwrap();
        let mut settings = GitSettings {
            transport: engine,
            transport_fallback: false,
            allow_http: true,
            allow_file: true,
            allow_loopback: true,
            credentials_path: Some(credentials),
            ..GitSettings::default()
        };
        change(&mut settings);
        let children = Children::new(env!("CARGO_BIN_EXE_haul").into(), Duration::from_secs(2)).unwrap();
        let mirrors = Mirrors::open(storage.path(), &settings, children).await.unwrap();
        Self { storage, mirrors, running: Running::default() }
    }

    /// Keeps a credential of the host that our servers have.
    pub(crate) fn credential(&self, file: &str, text: &str) {
        self.credential_at(&format!("localhost/{file}"), text);
    }

    /// Keeps a credential under this name in the directory of credentials.
    pub(crate) fn credential_at(&self, file: &str, text: &str) {
        let path = self.storage.path().join("credentials").join(file);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    }

    pub(crate) async fn fetch(&self, url: &str) -> Result<Fetched, Failure> {
        self.fetch_as(url, None, &Want::All).await
    }

    pub(crate) async fn fetch_as(&self, url: &str, credential: Option<&str>, want: &Want) -> Result<Fetched, Failure> {
        self.fetch_within(url, credential, want, self.running.bounds).await
    }

    pub(crate) async fn fetch_within(
        &self,
        url: &str,
        credential: Option<&str>,
        want: &Want,
        bounds: Bounds,
    ) -> Result<Fetched, Failure> {
        let credential = credential.map(|name| CredentialName::new(name).unwrap());
        let url = GitUrl::parse(url).unwrap();
        self.running
            .run_within(bounds, async |run| self.mirrors.fetch(&url, credential.as_ref(), want, run).await)
            .await
    }

    /// Waits until some of a pack has arrived.
    pub(crate) async fn receiving(&self) {
        while !self.running.progress.lock().unwrap().iter().any(|progress| progress.bytes > 0) {
            self.running.moved.notified().await;
        }
    }

    /// The other processes that have something of this node's storage open.
    pub(crate) fn processes(&self) -> Vec<i32> {
        let own = std::process::id().cast_signed();
        let numbers = fs::read_dir("/proc").unwrap().flatten();
        let pids = numbers.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
        let opens = |pid: &i32| {
            let links = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
            let mut targets = links.filter_map(|link| fs::read_link(link.path()).ok());
            targets.any(|target| target.starts_with(self.storage.path()))
        };
        pids.filter(|&pid| pid != own).filter(opens).collect()
    }

    /// The directory of mirrors.
    pub(crate) fn directory(&self) -> PathBuf {
        self.storage.path().join(".haul/mirrors")
    }

    /// Files of the mirrors' packs that no finished fetch leaves.
    pub(crate) fn leftovers(&self) -> Vec<PathBuf> {
        let packs = fs::read_dir(self.directory()).unwrap().flatten().map(|entry| entry.path().join("objects/pack"));
        let files = packs.filter_map(|packs| fs::read_dir(packs).ok()).flatten().flatten().map(|entry| entry.path());
        files.filter(|path| !["pack", "idx"].iter().any(|end| path.extension().is_some_and(|it| it == *end))).collect()
    }
}

/// Waits until `is_so`, but not for ever.
pub(crate) async fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
    let waiting = async {
        while !is_so() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    let waited = tokio::time::timeout(Duration::from_mins(1), waiting).await;
    waited.unwrap_or_else(|_| panic!("it never came to be: {what}"));
}

/// The refs of a repository, as git lists them.
pub(crate) fn refs(repository: &Path) -> BTreeMap<String, String> {
    let output = git_command(repository).args(["for-each-ref", "--format=%(refname) %(objectname)"]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    text.lines().map(|line| line.split_once(' ').unwrap()).map(|(a, b)| (a.to_owned(), b.to_owned())).collect()
}

/// Asserts that a repository is whole, down to its oldest commit.
pub(crate) fn assert_sound(repository: &Path) {
    let output = git_command(repository).args(["fsck", "--full", "--strict"]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// Branches, lightweight and annotated tags, and a merge of two histories.
pub(crate) fn rich() -> Upstream {
    let upstream = Upstream::new();
    let first = upstream.commit("main", &[("a.txt", "1")]);
    upstream.git(&["tag", "light", &first]);
    upstream.commit("main", &[("a.txt", "2"), ("b.txt", "1")]);
    upstream.git(&["tag", "-a", "-m", "a tag", "v1.0", "main"]);
    upstream.commit("feature/x", &[("c.txt", "1")]);
    upstream.git(&["tag", "-a", "-m", "a tag", "other", "feature/x"]);
    upstream
}
