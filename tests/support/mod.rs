//! What the tests of several binaries share.

#![allow(dead_code, unreachable_pub, reason = "each test binary uses its own part")]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

pub(crate) mod agent;
pub(crate) mod census;
pub(crate) mod cluster;
pub(crate) mod command;
pub(crate) mod pipeline;
pub(crate) mod proxy;
pub(crate) mod rabbit;
pub(crate) mod repository;

use std::{
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant},
};

/// Long enough for a loaded machine; a test that waits this long has failed.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// Prints what is logged, as `RUST_LOG` has it; for a test that fails.
pub(crate) fn logs() {
    let filter = tracing_subscriber::EnvFilter::from_default_env();
    let _ = tracing_subscriber::fmt().with_env_filter(filter).with_test_writer().try_init();
}

/// A prefix for names on the broker that no other test uses.
pub(crate) fn unique(test: &str) -> String {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    format!("t{}.{test}", COUNT.fetch_add(1, Ordering::Relaxed))
}

/// Asks until the answer is yes; panics after [`PATIENCE`]. The pauses are between questions, not for an effect.
pub(crate) async fn eventually(what: &str, mut ask: impl AsyncFnMut() -> bool) {
    let begun = Instant::now();
    while !ask().await {
        assert!(begun.elapsed() < PATIENCE, "it never came to be that {what}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Waits for something that should come; panics after [`PATIENCE`].
pub(crate) async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.unwrap_or_else(|_| panic!("{what} did not come"))
}
