//! What a hostile upstream may serve, at a clone and to a project whose upstream was good before: rows 13 and 14.

#![allow(
    clippy::pedantic,
    clippy::print_stdout,
    reason = "tables, which are read more than they are run, and what they print"
)]
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "hostile_upstream/cases.rs"]
mod cases;
#[path = "hostile_upstream/forge.rs"]
mod forge;
#[path = "hostile_upstream/links.rs"]
mod links;
#[path = "hostile_upstream/server.rs"]
mod server;

#[path = "support/githttp.rs"]
mod githttp;
#[path = "hostile/scene.rs"]
mod scene;
#[path = "hostile/trace.rs"]
mod trace;

#[tokio::test(flavor = "multi_thread")]
async fn hostile_trees_and_objects_are_refused_at_a_clone_and_at_a_pull() {
    cases::run().await;
}
