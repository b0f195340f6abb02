//! Short-lived children of this same binary: how they are started, listened to and ended.
//!
//! A child gets one request as a JSON line on its standard input and answers with JSON lines on its standard
//! output. Everything it writes is read with limits: a workspace child works among files of a stranger.

mod group;
mod line;
mod sandbox;
mod serve;
mod spawner;

use std::{os::fd::OwnedFd, path::PathBuf, process::ExitCode, sync::Arc, time::Duration};

use futures_util::future::BoxFuture;
use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;
use tokio::sync::watch;

use self::{
    group::{Ended, Group, Held},
    line::{Envelope, Line},
    spawner::Spawner,
};
use super::Run;
use crate::{
    failure::{ErrorClass, Failure},
    protocol::Owner,
};

pub use self::{
    sandbox::{Access, Confined, Confinement, Sandbox, Support, confine, inherited},
    serve::{Reporter, serve},
};

/// How a failure begins that is one of memory.
pub(super) const TOO_MUCH_MEMORY: &str = "this needs more memory than git.child_memory";

/// What a child is for. Roles never mix: each sees only what its work needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The network, one credential, writes one mirror.
    Transfer,
    /// Reads one mirror, writes into a pipe.
    Pack,
    /// Reads and writes one project.
    Workspace,
    /// Reads and writes one mirror, without the network; belongs to no task.
    Upkeep,
}

impl Role {
    /// The name on the command line: `haul child <role>`.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Transfer => "transfer",
            Self::Pack => "pack",
            Self::Workspace => "workspace",
            Self::Upkeep => "upkeep",
        }
    }

    /// The longest line taken from it, in bytes: a transfer answers with a listing of refs.
    const fn longest_line(self) -> usize {
        match self {
            Self::Transfer => 32 << 20,
            Self::Pack | Self::Workspace | Self::Upkeep => 1 << 20,
        }
    }
}

/// Starts children and talks to them. Cheap to clone.
#[derive(Clone)]
pub struct Children {
    spawner: Arc<Spawner>,
    kill_grace: Duration,
    confinement: Confinement,
    /// While it says so, the child stands still.
    pause: Option<watch::Receiver<bool>>,
}

impl Children {
    /// Children of `program` (the `haul` binary); one that was asked to end is killed after `kill_grace`. They shut
    /// themselves in as by default.
    ///
    /// # Errors
    /// When the thread that starts them cannot be started.
    pub fn new(program: PathBuf, kill_grace: Duration) -> std::io::Result<Self> {
        Ok(Self {
            spawner: Arc::new(Spawner::start(program)?),
            kill_grace,
            confinement: Confinement::default(),
            pause: None,
        })
    }

    /// The same, shut in as `confinement` says.
    #[must_use]
    pub fn confined(self, confinement: Confinement) -> Self {
        Self { confinement, ..self }
    }

    /// The same for the project of `owner`: as whom workspace children work; the agent's own user if not set.
    #[must_use]
    pub fn of(&self, owner: Option<Owner>) -> Self {
        self.clone().confined(Confinement { owner, ..self.confinement })
    }

    /// The same; a child stands still while `pause` says so, and its stall clock with it.
    pub(crate) fn pausing(&self, pause: watch::Receiver<bool>) -> Self {
        Self { pause: Some(pause), ..self.clone() }
    }

    /// Runs one child to its end and returns its answer.
    ///
    /// The descriptors of `inherit` keep their numbers in the child, which opens them with [`inherited`]; they
    /// are closed here once it was started. When the future is dropped, the child and what it started are killed.
    ///
    /// # Errors
    /// The child's own failure; `timeout`, `stalled`, or `internal` ("cancelled") when a bound of `run` ended it;
    /// `internal` when it crashed or broke the protocol.
    pub async fn run<Q: Serialize + Sync, A: DeserializeOwned>(
        &self,
        role: Role,
        request: &Q,
        inherit: Vec<OwnedFd>,
        run: &Run<'_>,
    ) -> Result<A, Failure> {
        let refuse = |_| -> BoxFuture<'_, _> {
            Box::pin(async { Err(Failure::internal("a child asked a question that nobody answers")) })
        };
        self.run_asking(role, request, inherit, run, refuse).await
    }

    /// The same as [`run`](Self::run), and answers the questions that the child asks with [`Reporter::ask`].
    ///
    /// While an answer is being made the stall clock stands still; deadline and cancel do not.
    ///
    /// # Errors
    /// As [`run`](Self::run). A failed answer goes to the child, which decides.
    pub async fn run_asking<'a, Q, A, F>(
        &self,
        role: Role,
        request: &Q,
        inherit: Vec<OwnedFd>,
        run: &Run<'_>,
        mut answer: F,
    ) -> Result<A, Failure>
    where
        Q: Serialize + Sync,
        A: DeserializeOwned,
        F: FnMut(Value) -> BoxFuture<'a, Result<Value, Failure>> + Send,
    {
        if run.cancel.is_cancelled() {
            return Err(cancelled());
        }
        let envelope =
            line::encode(&Envelope { parent: std::process::id(), confinement: self.confinement, request })
                .map_err(|error| Failure::internal(format!("the request to a child cannot be written: {error}")))?;
        let mut group = self.spawner.spawn(role, inherit).await?;
        match converse(&mut group, &envelope, run, self.pause.clone(), &mut answer).await {
            Ok(Last::Done(value)) => {
                group.finish(self.kill_grace).await;
                serde_json::from_value(value)
                    .map_err(|error| Failure::internal(format!("a {} child's answer is wrong: {error}", role.as_str())))
            }
            Ok(Last::Failed(failure)) => {
                group.finish(self.kill_grace).await;
                Err(line::cleaned(failure))
            }
            Ok(Last::Broken(how)) => {
                let ended = group.finish(self.kill_grace).await;
                Err(broken(role, &how, &ended))
            }
            Err(halt) => {
                group.stop(self.kill_grace).await;
                Err(halt)
            }
        }
    }
}

/// How a conversation ended from the child's side.
enum Last {
    Done(Value),
    Failed(Failure),
    /// It ended without an answer, or said something that is not in the protocol.
    Broken(String),
}

/// Sends the request and follows the child's lines to the last one.
///
/// An `Err` is a bound of `run` that was passed while the child still ran.
async fn converse<'a, F>(
    group: &mut Group,
    envelope: &[u8],
    run: &Run<'_>,
    mut pause: Option<watch::Receiver<bool>>,
    answer: &mut F,
) -> Result<Last, Failure>
where
    F: FnMut(Value) -> BoxFuture<'a, Result<Value, Failure>> + Send,
{
    if let Err(error) = within(run, Some(run.stall), group.send(envelope)).await? {
        return Ok(Last::Broken(format!("took no request ({error})")));
    }
    loop {
        match next_line(group, run, pause.as_mut()).await? {
            Ok(Some(Line::Progress(progress))) => (run.progress)(line::cleaned_progress(progress)),
            Ok(Some(Line::Step)) => {}
            Ok(Some(Line::Ask(question))) => {
                let reply = within(run, None, answer(question)).await?;
                let reply = line::encode(&reply).map_err(|error| Failure::internal(error.to_string()))?;
                if let Err(error) = within(run, Some(run.stall), group.send(&reply)).await? {
                    return Ok(Last::Broken(format!("took no answer ({error})")));
                }
            }
            Ok(Some(Line::Done(value))) => return Ok(Last::Done(value)),
            Ok(Some(Line::Failed(failure))) => return Ok(Last::Failed(failure)),
            Ok(None) => return Ok(Last::Broken("ended without an answer".to_owned())),
            Err(error) => return Ok(Last::Broken(format!("broke the protocol ({error})"))),
        }
    }
}

/// The child's next line. As long as `pause` says so the child is stopped, and the stall clock stands still.
async fn next_line(
    group: &mut Group,
    run: &Run<'_>,
    pause: Option<&mut watch::Receiver<bool>>,
) -> Result<std::io::Result<Option<Line>>, Failure> {
    let Some(pause) = pause else { return within(run, Some(run.stall), group.line()).await };
    let id = group.id();
    // Kept over a pause: what was read of a line is in it.
    let mut line = std::pin::pin!(group.line());
    loop {
        let asked = async { pause.wait_for(|paused| *paused).await.is_ok() };
        tokio::select! {
            biased;
            line = within(run, Some(run.stall), line.as_mut()) => return line,
            true = asked => {}
        }
        let _held = Held::new(id);
        let over = async { pause.wait_for(|paused| !*paused).await.is_ok() };
        within(run, None, over).await?;
    }
}

/// Waits for `work` within the bounds of `run`.
pub(super) async fn within<T>(
    run: &Run<'_>,
    stall: Option<Duration>,
    work: impl Future<Output = T>,
) -> Result<T, Failure> {
    let stalled = async {
        match stall {
            Some(limit) => tokio::time::sleep(limit).await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        biased;
        () = run.cancel.cancelled() => Err(cancelled()),
        () = tokio::time::sleep_until(run.deadline) => {
            Err(Failure::new(ErrorClass::Timeout, "the deadline of this attempt passed"))
        }
        value = work => Ok(value),
        () = stalled => {
            Err(Failure::new(ErrorClass::Stalled, format!("nothing moved for {:?}", run.stall)))
        }
    }
}

/// What a cancelled run fails with; the worker knows that it cancelled.
fn cancelled() -> Failure {
    Failure::internal("cancelled")
}

fn broken(role: Role, how: &str, ended: &Ended) -> Failure {
    let mut message = format!("a {} child {how}; it {}", role.as_str(), ended.how);
    if !ended.said.is_empty() {
        message.push_str(": ");
        message.push_str(&ended.said);
    }
    // The runtime's own last words; they are not translated.
    if ended.said.contains("memory allocation of") {
        return Failure::new(ErrorClass::Quota, format!("{TOO_MUCH_MEMORY}: {message}"));
    }
    Failure { killed: ended.killed, ..Failure::internal(message) }
}

/// `haul child <role>`: what the binary does when the agent starts it as a child.
#[must_use]
pub fn main(role: &str) -> ExitCode {
    // A workspace child makes files for their owner's everyday use, the others for the agent alone.
    match role {
        "transfer" => {
            serve::set_umask(0o077);
            super::transfer::main()
        }
        "pack" => {
            serve::set_umask(0o077);
            super::pack::main()
        }
        "workspace" => {
            serve::set_umask(0o022);
            super::workspace::main()
        }
        "upkeep" => {
            serve::set_umask(0o077);
            super::mirror::main()
        }
        _ => ExitCode::from(2),
    }
}
