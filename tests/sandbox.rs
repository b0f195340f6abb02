//! What a child can still do once it has shut itself in, and whose the projects are that it works in.
//!
//! These tests change users and give files away: they need root, and say so.

#![expect(clippy::unwrap_used, reason = "a test that cannot be set up shall fail loudly")]

#[path = "support/githttp.rs"]
mod githttp;
#[path = "sandbox/inside.rs"]
mod inside;
#[path = "sandbox/owners.rs"]
mod owners;
#[path = "sandbox/running.rs"]
mod running;
#[path = "support/owners.rs"]
mod whose;
#[expect(dead_code, reason = "shared with the tests of the executor, which use more of it")]
#[path = "execute/world.rs"]
mod world;

/// A user and a group that nobody is.
const UID: u32 = 54_321;
const GID: u32 = 54_322;

fn require_root() {
    assert!(rustix::process::getuid().is_root(), "this test changes users: run it as root (scripts/test does)");
}
