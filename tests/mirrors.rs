//! Mirrors: shared by the tasks, mended when damaged, resumed when cut, and kept within bounds.

#![expect(clippy::unwrap_used, reason = "helpers of tests may fail as tests do")]
#![expect(clippy::print_stdout, reason = "what was measured is shown beside what is asserted")]

#[path = "support/githttp.rs"]
mod githttp;
#[path = "support/node.rs"]
mod node;
#[path = "mirrors/place.rs"]
mod place;
#[path = "mirrors/repairs.rs"]
mod repairs;
#[path = "mirrors/resuming.rs"]
mod resuming;
#[path = "mirrors/sharing.rs"]
mod sharing;
#[path = "mirrors/upkeep.rs"]
mod upkeep;
#[path = "execute/world.rs"]
#[allow(dead_code, reason = "each suite that includes this file uses its own part of it")]
mod world;
