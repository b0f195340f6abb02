//! Somebody who never rests in the workspace while two hundred pulls go through it.
//!
//! The writer swaps files and directories for links, rewrites settings, takes and drops locks, moves refs, prunes, edits
//! and makes unreadable, all of it by chance from a seed that is printed. Whatever it does, nothing outside the project
//! changes, every pull ends soon, and no file of the user is lost. All of it runs twice: as whoever runs the tests, and
//! with an owner without privileges, who is the writer, while the agent is root.

#![allow(
    clippy::pedantic,
    clippy::print_stdout,
    reason = "tables, which are read more than they are run, and what they print"
)]
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "hostile_writer/beside.rs"]
mod beside;
#[path = "support/githttp.rs"]
mod githttp;
#[path = "hostile/scene.rs"]
mod scene;
#[path = "hostile/trace.rs"]
mod trace;
#[path = "workspace_attacks/user.rs"]
mod user;
#[path = "hostile_writer/writer.rs"]
mod writer;

use std::{
    collections::BTreeMap,
    fs,
    process::Command,
    time::{Duration, Instant},
};

use beside::Beside;
use haul::failure::ErrorClass;
use scene::{Scene, assert_untouched, commit, git, give, owner, snapshot};
use serde_json::json;
use writer::TRACKED;

/// How many pulls there are at least, and with how many of them upstream moves.
const PULLS: u64 = 200;
const EVERY: u64 = 3;
/// What the writer has done at least when they end; quick pulls, or a program of the writer's that hangs, take more of them.
const STEPS: u64 = PULLS / 2;
/// How long they may take for that.
const PATIENCE: Duration = Duration::from_secs(120);
/// What is run once more with an owner, and what lets the owner write.
const PULLED: &str = "two_hundred_pulls_beside_a_hostile_writer_lose_nothing_and_leave_what_is_outside_alone";
const OWNED: &str = "two_hundred_pulls_of_an_agent_that_is_root_beside_its_hostile_owner_do_so_too";

#[test]
fn two_hundred_pulls_of_an_agent_that_is_root_beside_its_hostile_owner_do_so_too() {
    if !beside::perform() {
        user::again(&[PULLED], true);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_hundred_pulls_beside_a_hostile_writer_lose_nothing_and_leave_what_is_outside_alone() {
    let seed =
        std::env::var("HAUL_TEST_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or_else(rand::random::<u32>);
    println!("seed {seed} (HAUL_TEST_SEED={seed} plays it again, but for the scheduler)");
    let scene = Scene::new(false).await;
    scene.clone(1, "p").await.unwrap();
    let project = scene.project("p");
    // The same as what is outside, and nobody's but the agent's.
    let sealed = scene.path("sealed");
    let copied =
        Command::new("cp").args(["-dR", "--preserve=mode,timestamps"]).args([&scene.outside(), &sealed]).status();
    assert!(copied.unwrap().success());
    let both = || [snapshot(&scene.outside()), snapshot(&sealed)];
    let outside = both();
    let assert_nothing_outside = |what: &str| {
        for (before, after) in outside.iter().zip(&both()) {
            assert_untouched(before, after, what);
        }
    };
    let place = scene.path("writers");
    let beside = Beside::start(&project, &scene.outside(), &sealed, &place, u64::from(seed), OWNED);
    let mut versions: Vec<BTreeMap<&str, String>> = vec![contents(0)];
    let mut ends: BTreeMap<String, u32> = BTreeMap::new();
    let mut slowest = Duration::ZERO;
    let (began, mut pulls, mut through) = (Instant::now(), 0, false);
    while pulls < PULLS || (began.elapsed() < PATIENCE && (beside.steps() < STEPS || !through)) {
        pulls += 1;
        if pulls % EVERY == 0 {
            let next = contents(pulls);
            let files: Vec<(&str, &str)> = next.iter().map(|(name, text)| (*name, text.as_str())).collect();
            commit(&scene.upstream.path(), &files);
            versions.push(next);
        }
        let reset = pulls % 5 == 0;
        let begun = Instant::now();
        let order = if reset { json!({"on_conflict": "reset"}) } else { json!({}) };
        let end = scene.run("pull", 1, order).await;
        slowest = slowest.max(begun.elapsed());
        through |= end.is_ok();
        let told = match &end {
            Ok(result) => if result.updated == Some(true) { "updated" } else { "nothing new" }.to_owned(),
            Err(failure) => {
                let expected = matches!(failure.class, ErrorClass::Conflict);
                assert!(expected, "a pull ended as {failure}");
                failure.class.to_string()
            }
        };
        *ends.entry(told).or_default() += 1;
    }
    let writer = beside.rest();
    assert_nothing_outside("a pull beside a hostile writer");
    let whose = if owner().is_some() { "the owner" } else { "the agent's own user" };
    println!("{pulls} pulls, the slowest {slowest:?}, ended as {ends:?}; {} steps of {whose}", writer.steps);
    assert!(writer.steps >= STEPS, "a writer that rests is not hostile: {}", writer.steps);
    assert!(slowest < Duration::from_secs(40), "a pull took {slowest:?}");
    assert!(through, "no pull ever came through: {ends:?}");

    // What only the user has is as the user left it; what upstream has too is one of the two.
    for (name, content) in &writer.own {
        assert_eq!(
            fs::read_to_string(project.join(name)).ok().as_ref(),
            Some(content),
            "{name} was lost (seed {seed})"
        );
    }
    for name in TRACKED {
        let Ok(found) = fs::read_to_string(project.join(name)) else { continue };
        let upstreams = versions.iter().any(|version| version[name] == found);
        let first = ["one\n", "two\n", "c\n", "cc\n"].contains(&found.as_str());
        assert!(upstreams || first || writer.written.contains(&found), "{name} is nobody's: {found:?} (seed {seed})");
    }
    // Once the writer rests, a pull gets through, and what it leaves is sound.
    writer.mend(&scene.url());
    give(&project);
    // What is not to be brought stays as its user left it, gone or changed: so everything is.
    let next = contents(pulls + 1);
    let files: Vec<(&str, &str)> = next.iter().map(|(name, text)| (*name, text.as_str())).collect();
    commit(&scene.upstream.path(), &files);
    versions.push(next);
    let _ = scene.run("pull", 1, json!({"on_conflict": "reset"})).await;
    let last = scene.run("pull", 1, json!({"on_conflict": "reset"})).await.unwrap();
    let tip = git(&scene.upstream.path(), &["rev-parse", "main"]);
    assert_eq!(last.head, Some(tip), "seed {seed}");
    git(&project, &["fsck", "--full", "--strict", "--no-dangling"]);
    for (name, content) in &versions[versions.len() - 1] {
        assert_eq!(&fs::read_to_string(project.join(name)).unwrap(), content, "{name}");
    }
    for (name, content) in &writer.own {
        assert_eq!(fs::read_to_string(project.join(name)).ok().as_ref(), Some(content), "{name} was lost at the end");
    }
    let left = fs::read_dir(project.join(".git")).unwrap().map(|entry| entry.unwrap().file_name());
    let left: Vec<_> = left.filter(|name| name.to_string_lossy().starts_with("haul-")).collect();
    assert!(left.is_empty(), "left behind: {left:?}");
    assert_nothing_outside("a pull after a hostile writer");
}

/// What upstream has at one of its commits.
fn contents(number: u64) -> BTreeMap<&'static str, String> {
    TRACKED.iter().map(|name| (*name, format!("upstream's {name} of {number}\n"))).collect()
}
