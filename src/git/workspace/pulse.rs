//! Signs of life while the library works for long without a word.

use std::{
    fs::File,
    io,
    os::unix::fs::FileExt,
    sync::{
        atomic::{AtomicBool, Ordering},
        mpsc::{RecvTimeoutError, channel},
    },
    time::Duration,
};

use crate::{
    failure::Failure,
    git::{child::Reporter, projects::Dir},
};

/// How often is looked whether the work goes on.
const TICK: Duration = Duration::from_secs(1);
/// Computing for less than this is no sign: about what the kernel's clock resolves.
const LEAST: Duration = Duration::from_millis(4);

/// Whether this process waits for the disk.
static FLUSHING: AtomicBool = AtomicBool::new(false);

/// Does `work`, and says a step as long as this thread, the process's first, computes or flushes.
///
/// Comparing a large tree or counting a long history is one call of the library. What waits for a pipe in place of a
/// file computes nothing, and is stopped by the agent's stall limit as before.
pub(super) fn with<T>(reporter: &Reporter, work: impl FnOnce() -> T) -> T {
    let (over, told) = channel::<()>();
    std::thread::scope(|scope| {
        // Opened while everything can be; without it the limit is only stricter.
        let clock = File::open("/proc/self/schedstat").ok();
        scope.spawn(move || {
            let clock = || clock.as_ref().map(computed).unwrap_or_default();
            let mut last = clock();
            while told.recv_timeout(TICK) == Err(RecvTimeoutError::Timeout) {
                let now = clock();
                if now >= last + LEAST || FLUSHING.load(Ordering::Relaxed) {
                    reporter.step();
                    last = now;
                }
            }
        });
        let result = work();
        drop(over);
        result
    })
}

/// Writes what is in memory of a file system down to its disk; [`with`] says a step as long as that takes.
///
/// The kernel writes what everybody has left to write there, which on a busy disk takes longer than anything else here,
/// and nothing in a workspace can hold it up. The wall deadline holds.
///
/// # Errors
/// `disk` where the disk refuses.
pub(super) fn flush(directory: &Dir) -> Result<(), Failure> {
    FLUSHING.store(true, Ordering::Relaxed);
    let done = rustix::fs::syncfs(directory);
    FLUSHING.store(false, Ordering::Relaxed);
    Ok(done.map_err(io::Error::from)?)
}

/// How long the first thread of this process has computed.
fn computed(clock: &File) -> Duration {
    let mut text = [0; 64];
    let length = clock.read_at(&mut text, 0).unwrap_or(0);
    let text = std::str::from_utf8(&text[..length]).unwrap_or_default();
    Duration::from_nanos(text.split_whitespace().next().and_then(|nanos| nanos.parse().ok()).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[test]
    fn computing_moves_the_clock_and_waiting_does_not() {
        // That of this test's own thread, since the first one belongs to the harness.
        let clock = File::open("/proc/thread-self/schedstat").unwrap();
        let before = computed(&clock);
        let begun = Instant::now();
        while computed(&clock) < before + LEAST {
            assert!(begun.elapsed() < Duration::from_secs(30), "the clock stands still");
        }
        let before = computed(&clock);
        std::thread::park_timeout(Duration::from_millis(100));
        assert!(computed(&clock) < before + Duration::from_millis(50));
    }
}
