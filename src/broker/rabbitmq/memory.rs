//! What connections that come and go leave of the process's memory.

#![cfg(target_env = "gnu")]

use std::sync::Once;

/// Allocations from here on are mapped: they begin untouched and are given back whole.
const MAPPED: libc::c_int = 1 << 20;
/// So much may lie free at the end of a heap before it is given back.
const FREE: libc::c_int = 4 << 20;

/// Keeps the buffers of connections out of the heaps.
///
/// lapin has two buffers of 4 MB for each connection, of which an idle one touches next to nothing. glibc maps them at
/// first, but takes their end for a sign that such sizes are common (`mallopt(3)`, dynamic mmap threshold): those of
/// the next connection would lie in a heap, zeroed page by page, with smaller things behind them that keep it from
/// shrinking.
pub(super) fn map_buffers() {
    static ONCE: Once = Once::new();
    #[expect(
        unsafe_code,
        reason = "the allocator's settings have no other door; they hold no reference and take a lock"
    )]
    ONCE.call_once(|| unsafe {
        // One that is refused leaves the default.
        libc::mallopt(libc::M_MMAP_THRESHOLD, MAPPED);
        libc::mallopt(libc::M_TRIM_THRESHOLD, FREE);
    });
}

#[cfg(test)]
mod tests {
    use std::hint::black_box;

    use super::*;

    fn resident_kb() -> u64 {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.trim().trim_end_matches(" kB").parse().unwrap()
    }

    #[test]
    fn buffers_begin_untouched_however_many_came_before() {
        map_buffers();
        let buffers = || black_box((0..8).map(|_| vec![0_u8; 4 << 20]).collect::<Vec<_>>());
        for _ in 0..3 {
            drop(buffers());
        }
        let before = resident_kb();
        let held = buffers();
        let after = resident_kb();
        // Other tests run beside this one.
        assert!(after < before + (16 << 10), "{before} kB before, {after} kB with {} untouched buffers", held.len());
    }
}
