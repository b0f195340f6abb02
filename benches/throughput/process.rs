//! What the kernel says of a process.

use std::fs;

/// What a process holds at a moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Holds {
    /// Resident memory, in bytes.
    pub(crate) resident: u64,
    /// The part of it that is its own, not mapped from files.
    pub(crate) anonymous: u64,
    pub(crate) threads: u64,
    pub(crate) descriptors: u64,
    /// Processes below it.
    pub(crate) children: u64,
}

/// What `pid` holds; nothing once it is gone.
pub(crate) fn holds(pid: u32) -> Option<Holds> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0)
    };
    Some(Holds {
        resident: field("VmRSS") * 1024,
        anonymous: field("RssAnon") * 1024,
        threads: field("Threads"),
        descriptors: fs::read_dir(format!("/proc/{pid}/fd")).ok()?.count() as u64,
        children: crate::memory::family(pid).len() as u64 - 1,
    })
}

/// Processor time that a process and its threads have used, in seconds.
pub(crate) fn processor_seconds(pid: u32) -> f64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // User and system time are the 14th and 15th field; the name before may have blanks, its end is the last bracket.
    let rest = stat.rsplit(')').next().unwrap_or_default();
    let ticks: u64 = rest.split_whitespace().skip(11).take(2).filter_map(|field| field.parse::<u64>().ok()).sum();
    ticks as f64 / 100.0
}

pub(crate) fn megabytes(bytes: u64) -> f64 {
    bytes as f64 / 1e6
}
