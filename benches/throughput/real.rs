//! The real `haul worker`: tasks that ask for a project's status, by child processes, and the agent's memory.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use futures_util::StreamExt as _;
use lapin::{options::BasicConsumeOptions, types::FieldTable};
use serde_json::{Value, json};

use crate::{
    World, log, memory, process, program,
    rig::{self, Rig},
};

/// Projects that the tasks ask about, and so tasks that can run at a time.
const PROJECTS: u64 = 64;
/// Tasks about each.
const ROUNDS: u64 = 15;
/// Nothing here takes as long.
const PATIENCE: Duration = Duration::from_mins(10);

/// A running `haul worker`.
struct Worker {
    process: Child,
    log: PathBuf,
}

impl Worker {
    async fn start(rig: &Rig, place: &Path, slots: u64) -> Self {
        let log = log(place, "worker");
        let process = Command::new(program())
            .arg("worker")
            .env_clear()
            .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
            .env("AGENT_NODE_NAME", rig::NODE)
            .env("AGENT_AMQP_URL", &rig.url)
            .env("AGENT_STORAGE_PATH", place.join("storage"))
            .env("AGENT_PREFIX", rig.names.prefix())
            .env("AGENT_SLOTS", slots.to_string())
            .env("AGENT_GIT__ALLOW_FILE", "true")
            .env("AGENT_GIT__TREE_FIRST_AFTER", "off")
            .env("AGENT_LOG__FORMAT", "json")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(&log).expect("the log can be written"))
            .spawn()
            .expect("the agent can be started");
        let mut worker = Self { process, log };
        let end = Instant::now() + Duration::from_mins(1);
        while !worker.log().contains(r#""message":"readiness","ready":true"#) {
            let ended = worker.process.try_wait().expect("it is ours");
            assert!(ended.is_none() && Instant::now() < end, "the agent is not ready:\n{}", worker.log());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        worker
    }

    fn pid(&self) -> u32 {
        self.process.id()
    }

    fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        if let Some(pid) = i32::try_from(self.pid()).ok().and_then(rustix::process::Pid::from_raw) {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        }
        let end = Instant::now() + Duration::from_secs(35);
        while Instant::now() < end {
            if matches!(self.process.try_wait(), Ok(Some(_))) {
                return;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// `status` tasks with the executor that `haul worker` has, and the agent's memory while 64 of them run at a time.
pub(crate) async fn status(world: &mut World) {
    let place = world.place("status");
    let upstream = upstream(&place);
    let rig = Rig::new().await;
    let worker = Worker::start(&rig, &place, PROJECTS).await;
    let ends = Ends::new(&rig).await;
    for project in 0..PROJECTS {
        let more = json!({"git_url": format!("file://{}", upstream.display()), "target_path": format!("p{project}")});
        publish(&rig, "clone", project, more).await;
    }
    let mut ends = ends.succeed(PROJECTS, &worker).await;
    for slots in [4, PROJECTS] {
        // One at a time of each project, as many projects as there are slots.
        let watch = memory::Watch::over(worker.pid());
        let begun = Instant::now();
        for round in 0..ROUNDS {
            for project in 0..slots {
                publish(&rig, "status", project, json!({})).await;
            }
            // Four may wait for a project here; more go round, which is another path.
            if round % 3 == 2 {
                ends = ends.succeed(slots * 3, &worker).await;
            }
        }
        let rate = (ROUNDS * slots) as f64 / begun.elapsed().as_secs_f64();
        let peaks = watch.peaks();
        let peak = |wanted: &str| {
            let found = peaks.iter().filter(|(name, _)| name.contains(wanted)).map(|(_, bytes)| *bytes).max();
            process::megabytes(found.unwrap_or(0))
        };
        let (agent, child) = (peak("worker"), peak("workspace"));
        world.fact(format!(
            "status: {rate:.0} tasks a second over {slots} projects, each in a child process of its own; agent {agent:.1} MB \
             at most, a child {child:.1} MB"
        ));
    }
    drop(worker);
    rig.remove(std::iter::once(rig::NODE.to_owned())).await;
}

/// The agent that does nothing.
pub(crate) async fn memory(world: &mut World) {
    let place = world.place("memory");
    let rig = Rig::new().await;
    let worker = Worker::start(&rig, &place, 64).await;
    tokio::time::sleep(Duration::from_secs(world.arguments.idle)).await;
    let holds = process::holds(worker.pid()).expect("the agent runs");
    world.fact(format!(
        "memory: idle for {} s: {:.1} MB resident, {:.1} MB of its own, {} threads, {} descriptors",
        world.arguments.idle,
        process::megabytes(holds.resident),
        process::megabytes(holds.anonymous),
        holds.threads,
        holds.descriptors
    ));
    drop(worker);
    rig.remove(std::iter::once(rig::NODE.to_owned())).await;
}

async fn publish(rig: &Rig, kind: &str, project: u64, more: Value) {
    let id = uuid::Uuid::now_v7().to_string();
    let mut task = json!({"v": 1, "task_id": id, "kind": kind, "project_id": project});
    if let (Value::Object(task), Value::Object(more)) = (&mut task, more) {
        task.extend(more);
    }
    let confirm = rig::publish(&rig.channel, &rig.names.task(), rig::NODE, task.to_string().as_bytes()).await;
    drop(confirm.await.expect("the broker takes it"));
}

/// The ends of tasks, as they come.
struct Ends {
    events: lapin::Consumer,
    _connection: lapin::Connection,
}

impl Ends {
    async fn new(rig: &Rig) -> Self {
        let (connection, channel) = rig::connect(&rig.url).await;
        let options = BasicConsumeOptions { no_ack: true, ..BasicConsumeOptions::default() };
        let queue = rig.names.master_event();
        let events = channel.basic_consume(queue.into(), "ends".into(), options, FieldTable::default()).await;
        Self { events: events.expect("it is ours"), _connection: connection }
    }

    /// Waits until so many tasks have succeeded; none may end otherwise.
    async fn succeed(mut self, tasks: u64, worker: &Worker) -> Self {
        let mut ended = 0;
        while ended < tasks {
            let next = tokio::time::timeout(PATIENCE, self.events.next()).await;
            let Ok(Some(Ok(delivery))) = next else { panic!("no event came; the agent's log:\n{}", worker.log()) };
            let event: Value = serde_json::from_slice(&delivery.data).unwrap_or_default();
            match event["status"].as_str() {
                Some("succeeded") => ended += 1,
                Some("failed" | "rejected" | "cancelled" | "superseded") => panic!("a task did not succeed: {event}"),
                _ => {}
            }
        }
        self
    }
}

/// A small repository.
fn upstream(place: &Path) -> PathBuf {
    let path = place.join("upstream");
    fs::create_dir_all(&path).expect("the scratch directory can be written");
    let git = |arguments: &[&str]| {
        let mut command = Command::new("git");
        command.current_dir(&path).env("GIT_CONFIG_NOSYSTEM", "1").env("GIT_CONFIG_GLOBAL", "/dev/null");
        for role in ["AUTHOR", "COMMITTER"] {
            command.env(format!("GIT_{role}_NAME"), "Bench").env(format!("GIT_{role}_EMAIL"), "bench@example.org");
        }
        let output = command.args(arguments).output().expect("git can be run");
        assert!(output.status.success(), "git {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    };
    git(&["init", "--quiet", "--initial-branch=main"]);
    for number in 0..20 {
        fs::write(path.join(format!("file{number}")), "some lines\n".repeat(100)).expect("it can be written");
    }
    git(&["add", "."]);
    git(&["commit", "--quiet", "--message", "first"]);
    path
}
