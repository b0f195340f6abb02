//! A storage directory with its mirrors, and short ways to fetch into them.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::Mutex,
    time::Duration,
};

use haul::{
    failure::Failure,
    git::{
        Run,
        child::Children,
        mirror::{Fetched, Mirrors, Want},
        settings::GitSettings,
    },
    protocol::{CredentialName, GitUrl, Progress},
};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::{githttp, world::Open};

pub(crate) struct Node {
    pub(crate) storage: tempfile::TempDir,
    pub(crate) mirrors: Mirrors,
    pub(crate) progress: Mutex<Vec<Progress>>,
}

/// What bounds one fetch.
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

impl Node {
    pub(crate) async fn new() -> Self {
        Self::with(|_| {}).await
    }

    pub(crate) async fn with(change: impl FnOnce(&mut GitSettings)) -> Self {
        let storage = tempfile::tempdir().unwrap();
        let credentials = storage.path().join("credentials");
        fs::create_dir(&credentials).unwrap();
        // One that is bound to no host is not sent anywhere.
        let credentials_of_host = credentials.join("localhost");
        fs::create_dir(&credentials_of_host).unwrap();
        for name in ["a", "b"] {
            let path = credentials_of_host.join(format!("{name}.token"));
            fs::write(&path, name).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        }
        let mut settings = GitSettings {
            allow_http: true,
            allow_loopback: true,
            host_limit: 64,
            // What is counted here is what one engine asks for.
            transport_fallback: false,
            credentials_path: Some(credentials),
            ..GitSettings::default()
        };
        change(&mut settings);
        let children = Children::new(env!("CARGO_BIN_EXE_haul").into(), Duration::from_secs(2)).unwrap();
        let mirrors = Mirrors::open(storage.path(), &settings, children).await.unwrap();
        Self { storage, mirrors, progress: Mutex::default() }
    }

    pub(crate) async fn fetch(&self, url: &str) -> Result<Fetched, Failure> {
        self.fetch_as(url, None, &Want::All, Bounds::default()).await
    }

    pub(crate) async fn fetch_as(
        &self,
        url: &str,
        credential: Option<&str>,
        want: &Want,
        bounds: Bounds,
    ) -> Result<Fetched, Failure> {
        let credential = credential.map(|name| CredentialName::new(name).unwrap());
        let progress = |progress| self.progress.lock().unwrap().push(progress);
        let run = Run {
            deadline: Instant::now() + bounds.deadline,
            stall: bounds.stall,
            cancel: CancellationToken::new(),
            progress: &progress,
            fence: &Open,
        };
        self.mirrors.fetch(&GitUrl::parse(url).unwrap(), credential.as_ref(), want, &run).await
    }

    /// How often this phase was told.
    pub(crate) fn told(&self, phase: &str) -> usize {
        self.progress.lock().unwrap().iter().filter(|progress| progress.phase == phase).count()
    }

    /// Everything in the directory of mirrors.
    pub(crate) fn names(&self) -> Vec<String> {
        names(&self.storage.path().join(".haul/mirrors"))
    }
}

/// The names in a directory, in their order.
pub(crate) fn names(directory: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// The packs of a mirror.
pub(crate) fn packs(mirror: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(mirror.join("objects/pack")).into_iter().flatten();
    let paths = entries.map(|entry| entry.unwrap().path());
    paths.filter(|path| path.extension().is_some_and(|end| end == "pack")).collect()
}

/// Waits until `is_so`, but not for ever.
pub(crate) async fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
    let waiting = async {
        while !is_so() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(Duration::from_mins(1), waiting)
        .await
        .unwrap_or_else(|_| panic!("it never came to be: {what}"));
}

/// Asserts that a repository is whole, down to its oldest commit.
pub(crate) fn assert_sound(repository: &Path) {
    let output = githttp::git_command(repository).args(["fsck", "--full", "--strict"]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}
