//! An upstream repository on disk, made with the git command.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

/// A bare upstream and a working tree that pushes to it.
pub struct Repository {
    directory: tempfile::TempDir,
}

/// Runs git without any of the user's settings; panics unless it succeeds, returns what it printed.
pub fn git(directory: &Path, arguments: &[&str]) -> String {
    let output = Command::new("git")
        .current_dir(directory)
        .args(["-c", "protocol.file.allow=always", "-c", "core.fsync=none"])
        .args(arguments)
        .env_remove("GIT_DIR")
        .env("GIT_CONFIG_GLOBAL", "/dev/null")
        .env("GIT_CONFIG_SYSTEM", "/dev/null")
        .env("GIT_AUTHOR_NAME", "A")
        .env("GIT_AUTHOR_EMAIL", "a@example.org")
        .env("GIT_COMMITTER_NAME", "A")
        .env("GIT_COMMITTER_EMAIL", "a@example.org")
        .env("GIT_TERMINAL_PROMPT", "0")
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "git {arguments:?} in {}: {}",
        directory.display(),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

impl Repository {
    /// An upstream with one commit on `main`.
    pub fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        git(directory.path(), &["init", "-q", "--bare", "-b", "main", "upstream.git"]);
        git(directory.path(), &["init", "-q", "-b", "main", "work"]);
        let repository = Self { directory };
        git(&repository.work(), &["remote", "add", "origin", repository.bare().to_str().unwrap()]);
        std::fs::create_dir(repository.work().join("src")).unwrap();
        std::fs::write(repository.work().join("src/main.txt"), "main\n").unwrap();
        repository.commit("README", "first\n");
        repository
    }

    /// The working tree.
    pub fn work(&self) -> PathBuf {
        self.directory.path().join("work")
    }

    /// The bare repository.
    pub fn bare(&self) -> PathBuf {
        self.directory.path().join("upstream.git")
    }

    /// Its address.
    pub fn url(&self) -> String {
        format!("file://{}", self.bare().display())
    }

    /// Writes a file, commits everything and pushes; returns the commit.
    pub fn commit(&self, file: &str, content: &str) -> String {
        std::fs::write(self.work().join(file), content).unwrap();
        git(&self.work(), &["add", "-A"]);
        git(&self.work(), &["commit", "-q", "-m", &format!("change {file}")]);
        git(&self.work(), &["push", "-q", "origin", "HEAD"]);
        git(&self.work(), &["rev-parse", "HEAD"])
    }
}

/// Whether a project is whole: objects complete, nothing changed, at this commit.
pub fn assert_whole(project: &Path, head: &str) {
    git(project, &["fsck", "--no-progress"]);
    assert_eq!(git(project, &["rev-parse", "HEAD"]), head);
    assert_eq!(git(project, &["status", "--porcelain"]), "");
}
