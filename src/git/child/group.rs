//! A running child and everything it started: one process group that ends as a whole.

use std::{io, os::fd::OwnedFd, os::unix::process::ExitStatusExt, time::Duration};

use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, BufReader, unix::AsyncFd},
    process::{Child, ChildStderr, ChildStdin, ChildStdout},
    task::JoinHandle,
};

use super::line::{self, Line};
use crate::protocol::printable;

/// How much of what a child writes to its standard error is kept: the end of it, in bytes.
const TAIL: usize = 4096;

/// One child, the leader of its group. Dropping it kills the group.
pub(super) struct Group {
    /// Not yet waited for while `pid` is there, so that its number cannot belong to anybody else.
    child: Child,
    pid: Option<Pid>,
    watch: AsyncFd<OwnedFd>,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
    stderr: JoinHandle<Vec<u8>>,
    longest_line: usize,
}

/// A group that stands still until this is dropped; its leader must not have been waited for by then.
pub(super) struct Held(Option<Pid>);

impl Held {
    pub(super) fn new(pid: Option<Pid>) -> Self {
        if let Some(pid) = pid {
            let _ = kill_process_group(pid, Signal::STOP);
        }
        Self(pid)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if let Some(pid) = self.0 {
            let _ = kill_process_group(pid, Signal::CONT);
        }
    }
}

/// How a child ended.
pub(super) struct Ended {
    /// In words.
    pub(super) how: String,
    /// The end of its standard error.
    pub(super) said: String,
    /// Whether somebody else killed it.
    pub(super) killed: bool,
}

impl Group {
    pub(super) fn new(mut child: Child, longest_line: usize) -> io::Result<Self> {
        let missing = || io::Error::other("a child has no pipes");
        let pid = child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw).ok_or_else(missing)?;
        #[expect(
            deprecated,
            reason = "the successor is unsafe code; an owned descriptor keeps the promise it asks for"
        )]
        let watch = AsyncFd::new(pidfd_open(pid, PidfdFlags::empty())?)?;
        let stdin = child.stdin.take().ok_or_else(missing)?;
        let stdout = BufReader::new(child.stdout.take().ok_or_else(missing)?);
        let stderr = tokio::spawn(tail(child.stderr.take().ok_or_else(missing)?));
        Ok(Self { child, pid: Some(pid), watch, stdin, stdout, stderr, longest_line })
    }

    /// Its number, for [`Held`].
    pub(super) fn id(&self) -> Option<Pid> {
        self.pid
    }

    /// Sends it a line.
    pub(super) async fn send(&mut self, line: &[u8]) -> io::Result<()> {
        self.stdin.write_all(line).await?;
        self.stdin.flush().await
    }

    /// Its next line; `None` once it closed its standard output.
    pub(super) async fn line(&mut self) -> io::Result<Option<Line>> {
        line::read(&mut self.stdout, self.longest_line).await
    }

    /// Lets the child end by itself for `grace`, then kills what is left of the group.
    pub(super) async fn finish(mut self, grace: Duration) -> Ended {
        let by_itself = tokio::time::timeout(grace, self.exited()).await.is_ok();
        self.kill();
        let status = self.child.wait().await;
        let killed = by_itself && status.as_ref().is_ok_and(|status| status.signal() == Some(Signal::KILL.as_raw()));
        let how = match status {
            Ok(status) if !by_itself => format!("had to be killed ({status})"),
            Ok(status) => match (status.code(), status.signal()) {
                (Some(code), _) => format!("exited with code {code}"),
                (None, Some(signal)) => format!("was killed by signal {signal}"),
                (None, None) => "ended".to_owned(),
            },
            Err(error) => format!("could not be waited for ({error})"),
        };
        // Whatever of the group held the other end of the pipe is dead by now; who left the group is not waited for.
        let said = tokio::time::timeout(grace, &mut self.stderr).await;
        let said = said.ok().and_then(Result::ok).unwrap_or_default();
        Ended { how, killed, said: printable(&String::from_utf8_lossy(&said)).trim().to_owned() }
    }

    /// Asks the group to end, and kills it after `grace`.
    pub(super) async fn stop(self, grace: Duration) -> Ended {
        if let Some(pid) = self.pid {
            let _ = kill_process_group(pid, Signal::TERM);
        }
        self.finish(grace).await
    }

    /// Waits for the leader's end without reaping it.
    async fn exited(&self) {
        let _ = self.watch.readable().await;
    }

    /// Kills the whole group; the leader's number is still its own.
    fn kill(&mut self) {
        if let Some(pid) = self.pid.take() {
            let _ = kill_process_group(pid, Signal::KILL);
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.kill();
        self.stderr.abort();
    }
}

/// Reads to the end and keeps the last [`TAIL`] bytes.
async fn tail(mut from: ChildStderr) -> Vec<u8> {
    let mut kept = Vec::new();
    let mut chunk = [0; 1024];
    while let Ok(count @ 1..) = from.read(&mut chunk).await {
        kept.extend_from_slice(&chunk[..count]);
        if kept.len() > TAIL {
            kept.drain(..kept.len() - TAIL);
        }
    }
    kept
}
