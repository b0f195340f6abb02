//! How much a node can do at a time, where the operator does not say.

/// What one executing task may need at its peak, in bytes: resolving a large pack.
const MEMORY_A_SLOT: u64 = 512 * 1024 * 1024;
/// More transfers at a time than this help nobody: the upstream and the disk are shared.
const MOST_SLOTS: u64 = 16;

/// Slots for this many cores and this much memory: two a core, since a transfer mostly waits.
pub(super) fn slots(cores: u64, memory: u64) -> usize {
    let slots = (cores * 2).min(memory / MEMORY_A_SLOT).clamp(1, MOST_SLOTS);
    usize::try_from(slots).unwrap_or(1)
}

/// A window for this many slots: four times as many, so that priorities and projects have something to choose from.
pub(super) fn window(slots: usize) -> u16 {
    u16::try_from(slots.saturating_mul(4)).unwrap_or(u16::MAX).clamp(8, 1024)
}

/// Cores that this process may use.
pub(super) fn cores() -> u64 {
    std::thread::available_parallelism().map_or(1, |cores| cores.get() as u64)
}

/// Memory that this process may use, in bytes: the machine's, or its control group's if that is less.
pub(super) fn memory() -> u64 {
    let machine = std::fs::read_to_string("/proc/meminfo").ok().and_then(|text| total(&text));
    let group = std::fs::read_to_string("/sys/fs/cgroup/memory.max").ok().and_then(|text| text.trim().parse().ok());
    match (machine, group) {
        (Some(machine), Some(group)) => std::cmp::min::<u64>(machine, group),
        (Some(only), None) | (None, Some(only)) => only,
        (None, None) => MEMORY_A_SLOT,
    }
}

fn total(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_follow_cores_until_memory_or_sense_stops_them() {
        const GIB: u64 = 1024 * 1024 * 1024;
        let cases = [(1, 8 * GIB, 2), (4, 64 * GIB, 8), (64, 512 * GIB, 16), (8, GIB, 2), (8, 0, 1)];
        for (cores, memory, expected) in cases {
            assert_eq!(slots(cores, memory), expected, "{cores} cores, {memory} bytes");
        }
    }

    #[test]
    fn a_window_holds_more_than_what_executes() {
        assert_eq!([1, 2, 4, 16].map(window), [8, 8, 16, 64]);
    }

    #[test]
    fn memory_is_read_from_the_system_s_own_words() {
        assert_eq!(total("MemTotal:        8 kB\nMemFree: 1 kB\n"), Some(8192));
        assert_eq!(total("nothing"), None);
    }
}
