//! The Python example against the real agent, over a real RabbitMQ and a smart-HTTP upstream: what a master in another
//! language sees, knowing only the schemas. It fails where any of them cannot be had.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    fs,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

const NODE: &str = "python-node";
/// A cold start of the agent on a loaded machine.
const START: Duration = Duration::from_mins(1);

/// A child process that ends with the test.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A private RabbitMQ node that ends with the test, or with this process.
struct RabbitMq {
    directory: PathBuf,
    url: String,
}

impl RabbitMq {
    fn start(directory: &Path) -> Self {
        let version = std::env::var("HAUL_TEST_BROKER").unwrap_or_else(|_| "any".to_owned());
        let owner = std::process::id().to_string();
        let mut command = script("rabbitmq");
        succeed(command.arg("start").arg(directory).args(["--version", &version, "--owner", &owner]));
        let env = fs::read_to_string(directory.join("env")).unwrap();
        let url = env.lines().find_map(|line| line.strip_prefix("AMQP_URL=")).unwrap().to_owned();
        Self { directory: directory.to_owned(), url }
    }
}

impl Drop for RabbitMq {
    fn drop(&mut self) {
        let _ = script("rabbitmq").arg("stop").arg(&self.directory).arg("--now").status();
    }
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn script(name: &str) -> Command {
    Command::new(root().join("scripts").join(name))
}

fn succeed(command: &mut Command) -> String {
    let output = command.stderr(Stdio::inherit()).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{command:?} ended with {}:\n{text}", output.status);
    text
}

/// A bare repository with two commits, an executable file and a symbolic link.
fn make_upstream(bare: &Path, scratch: &Path) {
    let work = scratch.join("first-commits");
    let git = |arguments: &[&str]| {
        let identity =
            ["-c", "user.name=Test", "-c", "user.email=test@example.invalid", "-c", "init.defaultBranch=main"];
        succeed(Command::new("git").args(identity).arg("-C").arg(&work).args(arguments));
    };
    fs::create_dir_all(work.join("source/deep")).unwrap();
    git(&["init", "--quiet"]);
    fs::write(work.join("README"), "hello\n").unwrap();
    git(&["add", "."]);
    git(&["commit", "--quiet", "--message", "Begin"]);
    fs::write(work.join("source/deep/data"), [0_u8, 1, 2, 255]).unwrap();
    fs::write(work.join("run"), "#!/bin/sh\n").unwrap();
    std::os::unix::fs::symlink("source/deep/data", work.join("link")).unwrap();
    git(&["add", "."]);
    git(&["update-index", "--chmod=+x", "run"]);
    git(&["commit", "--quiet", "--message", "Grow"]);
    succeed(Command::new("git").args(["clone", "--quiet", "--bare"]).arg(&work).arg(bare));
}

fn serve(directory: &Path) -> (Running, String) {
    let mut server = script("git-http-server")
        .arg(directory)
        .args(["--owner", &std::process::id().to_string()])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut address = String::new();
    BufReader::new(server.stdout.take().unwrap()).read_line(&mut address).unwrap();
    (Running(server), address.trim().to_owned())
}

fn start_agent(broker: &RabbitMq, storage: &Path) -> Running {
    let mut command = Command::new(env!("CARGO_BIN_EXE_haul"));
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("AGENT_")) {
        command.env_remove(name);
    }
    let mut agent = Running(
        command
            .arg("worker")
            .env("AGENT_NODE_NAME", NODE)
            .env("AGENT_AMQP_URL", &broker.url)
            .env("AGENT_STORAGE_PATH", storage)
            .env("AGENT_GIT__ALLOW_HTTP", "true")
            .env("AGENT_GIT__ALLOW_LOOPBACK", "true")
            .env("AGENT_RETRY__BASE", "1s")
            .env("AGENT_RETRY__MAX_ATTEMPTS", "2")
            .spawn()
            .unwrap(),
    );
    let end = Instant::now() + START;
    loop {
        let queues = succeed(script("rabbitmq").arg("ctl").arg(&broker.directory).args([
            "list_queues",
            "name",
            "consumers",
            "--silent",
        ]));
        // Both queues of the node: tasks and control.
        let consumed = queues.lines().filter(|line| line.contains(NODE) && line.ends_with("\t1")).count();
        if consumed == 2 {
            return agent;
        }
        assert!(agent.0.try_wait().unwrap().is_none(), "the agent ended at its start");
        assert!(Instant::now() < end, "the agent does not consume its queues:\n{queues}");
    }
}

#[test]
fn a_client_that_knows_only_the_schemas_and_a_python_master_drive_the_agent() {
    let scratch = tempfile::tempdir().unwrap();
    let python = succeed(&mut script("python-environment"));
    let python = Path::new(python.trim());
    let upstreams = scratch.path().join("upstreams");
    fs::create_dir(&upstreams).unwrap();
    let bare = upstreams.join("project.git");
    make_upstream(&bare, scratch.path());
    let (_server, address) = serve(&upstreams);
    let upstream = format!("{address}/project.git");
    let broker = RabbitMq::start(&scratch.path().join("rabbitmq"));
    let storage = scratch.path().join("storage");
    let _agent = start_agent(&broker, &storage);
    let projects = storage.join("projects");
    let example = root().join("examples/python");

    succeed(
        Command::new(python)
            .arg(example.join("drive.py"))
            .args(["--verbose", "--amqp-url", &broker.url, "--node", NODE, "--upstream", &upstream])
            .arg("--projects")
            .arg(&projects)
            .arg("--upstream-path")
            .arg(&bare),
    );
    succeed(
        Command::new(python)
            .args(["-m", "pytest", "-q", "--color=no", "-p", "no:cacheprovider"])
            .arg(example.join("live.py"))
            .env("AMQP_URL", &broker.url)
            .env("HAUL_LIVE_NODE", NODE)
            .env("HAUL_LIVE_UPSTREAM", &upstream)
            .env("HAUL_LIVE_PROJECTS", &projects),
    );
}
