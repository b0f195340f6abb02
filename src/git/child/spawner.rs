//! The one thread that starts children.
//!
//! A child asks the kernel for a signal when its parent dies, and the kernel takes the parent to be the thread that
//! started it. So that thread lives as long as the agent.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
    path::{Path, PathBuf},
    process::Stdio,
    sync::mpsc,
};

use rustix::io::{FdFlags, fcntl_setfd};
use tokio::{
    process::{Child, Command},
    runtime::Handle,
    sync::oneshot,
};

use super::{Role, group::Group};
use crate::failure::Failure;

/// One child to start.
struct Order {
    role: Role,
    inherit: Vec<OwnedFd>,
    runtime: Handle,
    reply: oneshot::Sender<io::Result<Child>>,
}

/// The way to the thread; it ends with the last of these.
pub(super) struct Spawner {
    orders: mpsc::Sender<Order>,
}

impl Spawner {
    /// Starts the thread.
    pub(super) fn start(program: PathBuf) -> io::Result<Self> {
        let (orders, inbox) = mpsc::channel::<Order>();
        std::thread::Builder::new().name("spawner".to_owned()).spawn(move || {
            for order in inbox {
                let child = start(&program, order.role, &order.inherit, &order.runtime);
                // Whoever asked may be gone: then the child is too, since nobody could end it later.
                if let Err(Ok(mut child)) = order.reply.send(child) {
                    let _entered = order.runtime.enter();
                    let _ = child.start_kill();
                }
            }
        })?;
        Ok(Self { orders })
    }

    /// Starts a child in a process group of its own.
    pub(super) async fn spawn(&self, role: Role, inherit: Vec<OwnedFd>) -> Result<Group, Failure> {
        let (reply, answer) = oneshot::channel();
        let gone = || Failure::internal("the thread that starts children has ended");
        self.orders.send(Order { role, inherit, runtime: Handle::current(), reply }).map_err(|_| gone())?;
        let child = answer.await.map_err(|_| gone())?.map_err(|error| {
            Failure::internal(format!("a {} child cannot be started: {error}", role.as_str())).deferred()
        })?;
        Group::new(child, role.longest_line()).map_err(Failure::from)
    }
}

fn start(program: &Path, role: Role, inherit: &[OwnedFd], runtime: &Handle) -> io::Result<Child> {
    let _entered = runtime.enter();
    if let Some(standard) = inherit.iter().find(|fd| fd.as_raw_fd() <= 2) {
        let message = format!("descriptor {} would be lost to a standard stream", standard.as_raw_fd());
        return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
    }
    for fd in inherit {
        fcntl_setfd(fd, FdFlags::empty())?;
    }
    let child = Command::new(program)
        .args(["child", role.as_str()])
        .env_clear()
        .envs([("HOME", "/nonexistent"), ("PATH", "/usr/local/bin:/usr/bin:/bin"), ("LC_ALL", "C")])
        .current_dir("/")
        .process_group(0)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    // Only this thread starts programs, so nothing else inherits them in between; they are closed by our caller next.
    for fd in inherit {
        fcntl_setfd(fd, FdFlags::CLOEXEC)?;
    }
    child
}
