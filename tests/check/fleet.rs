//! The agents' processes: started, ended in every way, and started again when they end by themselves.

use std::{
    fs::File,
    os::unix::process::ExitStatusExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::Arc,
    time::Duration,
};

use rustix::process::{Pid, Signal, kill_process};
use tokio::{sync::Mutex, time::Instant};

use super::{
    agent::{AgentArgs, HEARTBEAT},
    history::{History, PANICKED, Record, TOO_LATE, Work, now},
    wire::Wire,
};
use crate::support::proxy::Proxy;

/// What an agent that was told to end may take.
const LONGEST_END: Duration = Duration::from_secs(25);
/// Before an agent that ended by itself is started again, as a service manager would.
const BEFORE_RESTART: Duration = Duration::from_millis(500);
/// Between two looks at a process.
const GLANCE: Duration = Duration::from_millis(20);

/// A node: its storage, its way to the broker, and its agent.
pub(crate) struct Member {
    pub(crate) name: String,
    pub(crate) storage: PathBuf,
    /// For slowness.
    pub(crate) wire: Wire,
    /// For what networks and brokers do to connections.
    pub(crate) proxy: Proxy,
    work: Work,
    prefix: String,
    process: Mutex<Option<Child>>,
    history: Arc<History>,
}

impl Member {
    /// A node that does not run yet.
    pub(crate) fn new(
        name: String,
        storage: PathBuf,
        wire: Wire,
        proxy: Proxy,
        work: Work,
        prefix: &str,
        history: Arc<History>,
    ) -> Self {
        Self { name, storage, wire, proxy, work, prefix: prefix.to_owned(), process: Mutex::new(None), history }
    }

    fn command(&self) -> Command {
        let args = AgentArgs {
            node: self.name.clone(),
            url: self.wire.url.clone(),
            prefix: self.prefix.clone(),
            storage: self.storage.clone(),
        };
        match self.work {
            Work::Ledger => {
                let mut command = Command::new(std::env::current_exe().expect("a process knows its program"));
                command.arg("agent").args(args.write());
                command
            }
            Work::Git => {
                let mut command = Command::new(env!("CARGO_BIN_EXE_haul"));
                command.arg("worker").env_clear().envs([
                    ("PATH", std::env::var("PATH").unwrap_or_default()),
                    ("AGENT_NODE_NAME", args.node),
                    ("AGENT_AMQP_URL", args.url),
                    ("AGENT_PREFIX", args.prefix),
                    ("AGENT_STORAGE_PATH", args.storage.to_string_lossy().into_owned()),
                    ("AGENT_SLOTS", "4".to_owned()),
                    ("AGENT_BROKER__HEARTBEAT", format!("{}s", HEARTBEAT.as_secs())),
                    ("AGENT_RETRY__MAX_ATTEMPTS", "12".to_owned()),
                    ("AGENT_RETRY__CAP", "2s".to_owned()),
                    ("AGENT_GIT__ALLOW_HTTP", "true".to_owned()),
                    ("AGENT_GIT__ALLOW_LOOPBACK", "true".to_owned()),
                    ("AGENT_GIT__TREE_FIRST_AFTER", "off".to_owned()),
                    ("AGENT_LOG__FORMAT", "json".to_owned()),
                ]);
                command
            }
        }
    }

    /// Starts the agent if it does not run.
    pub(crate) async fn start(&self) {
        let mut process = self.process.lock().await;
        if process.is_none() {
            *process = Some(self.spawn());
        }
    }

    fn spawn(&self) -> Child {
        let log = File::options().create(true).append(true).open(self.log()).expect("the log can be opened");
        let mut command = self.command();
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        command.spawn().expect("the agent can be started")
    }

    /// The file that the agent logs to.
    pub(crate) fn log(&self) -> PathBuf {
        self.storage.join("agent.log")
    }

    /// Kills the agent, does something while it is down, and starts it again.
    pub(crate) async fn killed(&self, meanwhile: impl FnOnce(&Path)) {
        let mut process = self.process.lock().await;
        if let Some(child) = process.take() {
            self.end(child, Signal::KILL).await;
        }
        meanwhile(&self.storage);
        *process = Some(self.spawn());
    }

    /// Asks the agent to end, and starts it again.
    pub(crate) async fn restarted(&self) {
        let mut process = self.process.lock().await;
        if let Some(child) = process.take() {
            self.end(child, Signal::TERM).await;
        }
        *process = Some(self.spawn());
    }

    /// Asks the agent to end.
    pub(crate) async fn stop(&self) {
        if let Some(child) = self.process.lock().await.take() {
            self.end(child, Signal::TERM).await;
        }
    }

    /// Stops the agent where it stands for a while.
    pub(crate) async fn frozen(&self, lasts: Duration) {
        let process = self.process.lock().await;
        let Some(pid) = process.as_ref().and_then(pid) else { return };
        let _ = kill_process(pid, Signal::STOP);
        tokio::time::sleep(lasts).await;
        let _ = kill_process(pid, Signal::CONT);
    }

    /// Kills a child of the agent, once it has one; what it was.
    pub(crate) async fn child_killed(&self, patience: Duration) -> Option<String> {
        let parent = self.process.lock().await.as_ref().and_then(pid)?;
        let deadline = Instant::now() + patience;
        while Instant::now() < deadline {
            if let Some((child, role)) = child_of(parent)
                && kill_process(child, Signal::KILL).is_ok()
            {
                return Some(role);
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        None
    }

    async fn end(&self, mut child: Child, signal: Signal) {
        let deadline = Instant::now() + LONGEST_END;
        if let Some(pid) = pid(&child) {
            let _ = kill_process(pid, signal);
        }
        let status = loop {
            match child.try_wait() {
                Ok(Some(status)) => break Some(status),
                Ok(None) if Instant::now() > deadline => {
                    let _ = child.kill();
                    let _ = child.wait();
                    break None;
                }
                _ => tokio::time::sleep(GLANCE).await,
            }
        };
        let how = status.map_or_else(|| TOO_LATE.to_owned(), how);
        self.history.add(&Record::Ended { at: now(), node: self.name.clone(), how, asked: true });
    }

    /// Starts the agent again whenever it ends by itself; never returns.
    pub(crate) async fn keep(&self) {
        loop {
            tokio::time::sleep(BEFORE_RESTART).await;
            let mut process = self.process.lock().await;
            let Some(child) = process.as_mut() else { continue };
            if let Ok(Some(status)) = child.try_wait() {
                let how = how(status);
                self.history.add(&Record::Ended { at: now(), node: self.name.clone(), how, asked: false });
                *process = Some(self.spawn());
            }
        }
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        if let Some(mut child) = self.process.get_mut().take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn pid(child: &Child) -> Option<Pid> {
    Pid::from_raw(i32::try_from(child.id()).ok()?)
}

fn how(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(101), _) => PANICKED.to_owned(),
        (Some(code), _) => format!("ended with {code}"),
        (None, Some(signal)) => format!("killed by {signal}"),
        (None, None) => "ended".to_owned(),
    }
}

/// A child of a process, and what it was started as.
fn child_of(parent: Pid) -> Option<(Pid, String)> {
    let parent = parent.as_raw_nonzero().to_string();
    std::fs::read_dir("/proc").ok()?.flatten().find_map(|entry| {
        let child: i32 = entry.file_name().to_str()?.parse().ok()?;
        let stat = std::fs::read_to_string(entry.path().join("stat")).ok()?;
        let mut fields = stat.rsplit_once(") ")?.1.split(' ');
        let (state, of) = (fields.next()?, fields.next()?);
        if of != parent || state == "Z" {
            return None;
        }
        let line = std::fs::read(entry.path().join("cmdline")).ok()?;
        let words: Vec<_> = line.split(|&byte| byte == 0).map(String::from_utf8_lossy).collect();
        Some((Pid::from_raw(child)?, words.get(2).map(ToString::to_string).unwrap_or_default()))
    })
}
