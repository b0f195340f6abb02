//! What a process has in the kernel: threads, descriptors, children, memory.

use std::path::PathBuf;

/// The counts of one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Census {
    /// Threads.
    pub threads: usize,
    /// Open descriptors.
    pub descriptors: usize,
    /// Child processes of all its threads.
    pub children: usize,
    /// Resident memory, in bytes.
    pub resident: u64,
}

impl Census {
    /// Counts what the process `pid` has now.
    ///
    /// # Panics
    /// Where there is no such process, or it belongs to somebody else.
    pub fn of(pid: u32) -> Self {
        let proc = PathBuf::from(format!("/proc/{pid}"));
        let threads: Vec<_> = std::fs::read_dir(proc.join("task")).unwrap().flatten().collect();
        let children = threads.iter().filter_map(|task| std::fs::read_to_string(task.path().join("children")).ok());
        let status = std::fs::read_to_string(proc.join("status")).unwrap();
        let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kib = resident.and_then(|text| text.trim().strip_suffix(" kB")?.parse::<u64>().ok());
        Self {
            threads: threads.len(),
            descriptors: std::fs::read_dir(proc.join("fd")).unwrap().count(),
            children: children.map(|list| list.split_whitespace().count()).sum(),
            resident: kib.unwrap() * 1024,
        }
    }

    /// Whether it has no more of anything that is counted than `other`; memory is not compared.
    pub fn fits_in(&self, other: &Self) -> bool {
        self.threads <= other.threads && self.descriptors <= other.descriptors && self.children <= other.children
    }
}
