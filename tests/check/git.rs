//! Real work: small upstreams over HTTP that grow during the run, and the projects that came of them.

use std::{
    path::Path,
    process::{Command, Output},
    sync::Mutex,
};

use super::{history::Project, seed::Chance};
use crate::githttp::{Server, Upstream};

/// Upstreams of a run; each has a project on every node.
const UPSTREAMS: usize = 4;

/// The upstreams and their servers.
pub(crate) struct Upstreams {
    list: Vec<(Upstream, Server)>,
    chance: Mutex<Chance>,
}

impl Upstreams {
    /// Upstreams with one commit each.
    pub(crate) fn start(seed: u64) -> Self {
        let start = |number: usize| {
            let upstream = Upstream::new();
            upstream.commit("main", &[("README", "first\n"), ("main.txt", &format!("upstream {number}\n"))]);
            let server = Server::start(upstream.root());
            (upstream, server)
        };
        Self { list: (0..UPSTREAMS).map(start).collect(), chance: Mutex::new(Chance::new(seed, "upstreams")) }
    }

    /// Their addresses.
    pub(crate) fn urls(&self) -> Vec<String> {
        self.list.iter().map(|(_, server)| server.url("app.git")).collect()
    }

    /// Adds a commit to one of them now and then.
    pub(crate) fn grow(&self, number: usize) {
        let mut chance = self.chance.lock().unwrap();
        if chance.percent(30) {
            let (upstream, _) = chance.pick(&self.list);
            upstream.commit("main", &[("README", "first\n"), ("change.txt", &format!("change {number}\n"))]);
        }
    }
}

/// The projects of a node: whether they are whole, and at which commit.
pub(crate) fn projects(node: &str, storage: &Path) -> Vec<Project> {
    let entries = std::fs::read_dir(storage.join("projects")).into_iter().flatten().flatten();
    let projects = entries.filter_map(|entry| {
        let name = entry.file_name().into_string().ok()?;
        let project = name.strip_suffix("_app")?.parse().ok()?;
        let head = git(&entry.path(), &["rev-parse", "HEAD"]);
        let damage = ["fsck --no-progress", "status --porcelain"].into_iter().find_map(|arguments| {
            let output = run(&entry.path(), &arguments.split(' ').collect::<Vec<_>>());
            let fine = output.status.success() && output.stdout.is_empty();
            let said = [&output.stdout[..], &output.stderr[..]].concat();
            (!fine).then(|| format!("git {arguments} says {}", String::from_utf8_lossy(&said).trim()))
        });
        Some(Project { node: node.to_owned(), project, active: true, head, damage, ..Project::default() })
    });
    projects.collect()
}

fn git(directory: &Path, arguments: &[&str]) -> Option<String> {
    let output = run(directory, arguments);
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

fn run(directory: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new("git");
    command.current_dir(directory).env("GIT_CONFIG_GLOBAL", "/dev/null").env("GIT_CONFIG_SYSTEM", "/dev/null");
    command.env_remove("GIT_DIR").args(arguments).output().expect("git can be run")
}
