//! A broker and a network that fail, under a real agent: it consumes again within ten seconds of the broker's return and
//! without a restart; what ran meanwhile is executed once and ends once, and nothing is lost. A fault, a test.

#![expect(clippy::unwrap_used, reason = "a helper of a test that cannot go on fails the test")]

#[path = "faults/alarms.rs"]
mod alarms;
#[path = "faults/channels.rs"]
mod channels;
#[path = "faults/copies.rs"]
mod copies;
#[path = "faults/dead.rs"]
mod dead;
#[path = "support/githttp.rs"]
mod githttp;
#[path = "faults/network.rs"]
mod network;
#[path = "faults/publishes.rs"]
mod publishes;
#[path = "faults/queues.rs"]
mod queues;
#[path = "faults/restarts.rs"]
mod restarts;
#[path = "faults/scene.rs"]
mod scene;
mod support;
#[path = "faults/timeouts.rs"]
mod timeouts;
#[path = "faults/upstream.rs"]
mod upstream;

use std::{sync::OnceLock, time::Duration};

use support::rabbit::Rabbit;
use tokio::sync::{RwLock, RwLockReadGuard, RwLockWriteGuard};

/// What is promised, counted from the moment the broker can be used.
const CONSUMING_AGAIN: Duration = Duration::from_secs(10);
/// The heartbeat that agents have here, which is the default.
const HEARTBEAT: Duration = Duration::from_secs(4);

/// Who breaks the node of this binary, and who breaks only what is its own.
static BREAKING: RwLock<()> = RwLock::const_new(());

/// The node of this binary, to oneself: for tests that break it for everybody.
async fn alone() -> (RwLockWriteGuard<'static, ()>, &'static Rabbit) {
    let alone = BREAKING.write().await;
    (alone, rabbit().await)
}

/// The node of this binary, whole, for tests that break nothing but their own.
async fn together() -> (RwLockReadGuard<'static, ()>, &'static Rabbit) {
    let together = BREAKING.read().await;
    (together, rabbit().await)
}

async fn rabbit() -> &'static Rabbit {
    static NODE: OnceLock<Option<Rabbit>> = OnceLock::new();
    support::logs();
    let start = || NODE.get_or_init(|| std::panic::catch_unwind(|| Rabbit::start(&[])).ok()).as_ref();
    let node = blocking(start).await;
    node.expect("the node started; the first test that wanted it says why not")
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    tokio::task::spawn_blocking(work).await.unwrap()
}
