//! The real executor with the real binary: what it makes equals what `git` makes, and nothing of a user is lost.

#![expect(clippy::unwrap_used, reason = "helpers of tests may fail as tests do")]

#[path = "execute/clones.rs"]
mod clones;
#[path = "execute/deletes.rs"]
mod deletes;
#[path = "execute/depth.rs"]
mod depth;
#[path = "execute/pulls.rs"]
mod pulls;
#[path = "execute/world.rs"]
mod world;
