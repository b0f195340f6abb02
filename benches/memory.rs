//! The peak memory of a process and of everything below it, by the kernel's own high-water marks, looked at often.

use std::{
    collections::BTreeMap,
    fs,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

/// How often the processes are looked at; the mark is the kernel's, so only a process's last moments can be missed.
const TICK: Duration = Duration::from_millis(5);

/// Watches until [`Watch::peaks`].
pub(crate) struct Watch {
    over: Arc<AtomicBool>,
    peaks: Arc<Mutex<BTreeMap<String, u64>>>,
    thread: JoinHandle<()>,
}

impl Watch {
    /// Watches `root` and its descendants.
    pub(crate) fn over(root: u32) -> Self {
        let over = Arc::new(AtomicBool::new(false));
        let peaks = Arc::new(Mutex::new(BTreeMap::new()));
        let (stop, told) = (Arc::clone(&over), Arc::clone(&peaks));
        let thread = std::thread::spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                for pid in family(root) {
                    if let (Some(name), Some(peak)) = (name(pid), high_water(pid)) {
                        let mut peaks = told.lock().expect("nobody panicked");
                        let known = peaks.entry(name).or_insert(0);
                        *known = peak.max(*known);
                    }
                }
                std::thread::sleep(TICK);
            }
        });
        Self { over, peaks, thread }
    }

    /// The highest mark of every kind of process, in bytes.
    pub(crate) fn peaks(self) -> BTreeMap<String, u64> {
        self.over.store(true, Ordering::Relaxed);
        self.thread.join().expect("the watch does not panic");
        self.peaks.lock().expect("nobody panicked").clone()
    }
}

/// `root` and all below it.
pub(crate) fn family(root: u32) -> Vec<u32> {
    let mut found = vec![root];
    let mut next = 0;
    while let Some(pid) = found.get(next).copied() {
        next += 1;
        let Ok(tasks) = fs::read_dir(format!("/proc/{pid}/task")) else { continue };
        for task in tasks.flatten() {
            let children = fs::read_to_string(task.path().join("children")).unwrap_or_default();
            found.extend(children.split_whitespace().filter_map(|child| child.parse::<u32>().ok()));
        }
    }
    found
}

/// What a process is: the name of the program and its first words.
pub(crate) fn name(pid: u32) -> Option<String> {
    let line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let mut words = line.split(|byte| *byte == 0).map(|word| String::from_utf8_lossy(word).into_owned());
    let program = words.next()?;
    let program = program.rsplit('/').next()?.to_owned();
    let words: Vec<String> = words.filter(|word| word.starts_with(|c: char| c.is_ascii_lowercase())).take(2).collect();
    let words: Vec<&str> =
        words.iter().map(String::as_str).filter(|word| !word.contains('/') && !word.contains('=')).collect();
    (!program.is_empty()).then(|| format!("{program} {}", words.join(" ")).trim().to_owned())
}

fn high_water(pid: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.split_whitespace().next()?.parse::<u64>().ok().map(|kilobytes| kilobytes * 1024)
}
