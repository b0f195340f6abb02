//! The allocator of the process.
//!
//! A task is many small allocations on several threads, and every connection brings two buffers of 4 MB: glibc's heaps
//! spend a fifth of the agent's time on that, and grow by what lies behind a buffer that went. jemalloc does neither
//! (docs/benchmarks/README.md). C libraries, SQLite and libgit2 among them, keep to the system's allocator.

use tikv_jemallocator::Jemalloc;

#[global_allocator]
static ALLOCATOR: Jemalloc = Jemalloc;

/// What jemalloc is told at its start (its manual, `opt.`): as many arenas as the agent has threads that work, not four for
/// each processor of a large machine; what is free goes back to the kernel after a second, not after ten, and what is larger
/// than 2 MB at once. So the buffers of a new connection begin untouched, and an idle one needs next to nothing of them.
#[expect(unsafe_code, reason = "jemalloc looks for its settings under this name; nothing else is called so")]
#[unsafe(export_name = "_rjem_malloc_conf")]
pub(crate) static SETTINGS: &[u8; 74] = b"narenas:2,dirty_decay_ms:1000,muzzy_decay_ms:0,oversize_threshold:2097152\0";
