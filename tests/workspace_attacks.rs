//! What the user of a workspace may plant in it, thing by thing: each is first shown to bite plain git in a copy of the
//! project, and then met by clone, pull, status and delete under a tracer that sees every program, socket and file.
//!
//! All of it runs three times: as whoever runs the tests, as a user without privileges, since root passes every mode bit,
//! and with an owner without privileges for whom the agent works.

#![allow(
    clippy::pedantic,
    clippy::print_stdout,
    reason = "tables, which are read more than they are run, and what they print"
)]
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "workspace_attacks/altered.rs"]
mod altered;
#[path = "workspace_attacks/blocking.rs"]
mod blocking;
#[path = "workspace_attacks/deletes.rs"]
mod deletes;
#[path = "workspace_attacks/documents.rs"]
mod documents;
#[path = "support/githttp.rs"]
mod githttp;
#[path = "workspace_attacks/mirror.rs"]
mod mirror;
#[path = "workspace_attacks/programs.rs"]
mod programs;
#[path = "hostile/scene.rs"]
mod scene;
#[path = "workspace_attacks/slow.rs"]
mod slow;
#[path = "workspace_attacks/table.rs"]
mod table;
#[path = "hostile/trace.rs"]
mod trace;
#[path = "workspace_attacks/unguarded.rs"]
mod unguarded;
#[path = "workspace_attacks/user.rs"]
mod user;

/// What is run once more as others.
const TABLES: &[&str] = &[
    "no_program_of_a_workspace_is_ever_run",
    "whatever_leads_out_of_a_workspace_or_blocks_is_bounded_and_changes_nothing_outside",
];

#[tokio::test(flavor = "multi_thread")]
async fn no_program_of_a_workspace_is_ever_run() {
    programs::run().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_leads_out_of_a_workspace_or_blocks_is_bounded_and_changes_nothing_outside() {
    table::run().await;
}

#[test]
fn the_same_holds_for_a_user_without_privileges() {
    user::again(TABLES, false);
}

#[test]
fn the_same_holds_for_an_owner_without_privileges() {
    user::again(TABLES, true);
}

#[tokio::test(flavor = "multi_thread")]
async fn unguarded_calls_of_libgit2_do_no_harm_in_a_project_that_nobody_altered() {
    unguarded::perform();
    table::healthy().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_others_keep_busy_is_not_taken_for_an_altered_workspace() {
    slow::run().await;
}

#[test]
fn every_row_of_the_table_of_threats_names_tests_that_exist() {
    documents::check();
}

#[test]
fn a_delete_of_altered_projects_touches_nothing_else() {
    deletes::run();
}
