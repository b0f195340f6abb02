//! Somebody who never rests in the workspace while histories are attached to it.

use std::{
    fs,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use haul::{failure::ErrorClass, git::GitSettings};
use serde_json::json;

use crate::{
    githttp::Behaviour,
    scene::Scene,
    world::{git, listing, read, write},
    writer::Writer,
};

/// How many histories are attached, and how often each is tried beside the writer.
const HISTORIES: u64 = 20;
const TRIES: u32 = 10;

#[tokio::test(flavor = "multi_thread")]
async fn twenty_histories_beside_a_hostile_writer_lose_nothing_and_leave_what_is_outside_alone() {
    let seed =
        std::env::var("HAUL_TEST_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or_else(rand::random::<u32>);
    let (mut beside, mut after) = (0, 0);
    for round in 0..HISTORIES {
        let scene = Scene::with(GitSettings {
            tree_first_after: Some(std::time::Duration::ZERO),
            stall: std::time::Duration::from_secs(2),
            ..GitSettings::default()
        })
        .await;
        scene.tree_first(json!({})).await;
        scene.server.behave(Behaviour::Serve);
        let (project, outside) = (scene.project(), scene.world.path("outside"));
        fs::create_dir_all(outside.join("empty")).unwrap();
        write(&outside, "precious", "precious");
        write(&outside, "dir/c.txt", "c");
        git(&outside, &["init", "-q", "-b", "main", "victim"]);
        write(&outside.join("victim"), "secret", "only here");
        git(&outside.join("victim"), &["add", "."]);
        git(&outside.join("victim"), &["commit", "-q", "-m", "theirs"]);
        let before = listing(&outside);
        let stop = Arc::new(AtomicBool::new(false));
        let mut writer = Writer::new(&project, &outside, &scene.world.path("aside"), u64::from(seed) + round);
        let writing = {
            let stop = Arc::clone(&stop);
            std::thread::spawn(move || {
                while !stop.load(Ordering::SeqCst) {
                    writer.step();
                }
                writer.rest();
                writer
            })
        };
        let mut attached = false;
        for _ in 0..TRIES {
            match scene.history().await {
                Ok(result) => {
                    attached = result.is_some();
                    break;
                }
                Err(failure) => {
                    // Where the writer swapped the objects, what the project lacks looks like what upstream lacks.
                    let given_up = [ErrorClass::Conflict, ErrorClass::NotFound].contains(&failure.class);
                    let expected = failure.deferred || given_up;
                    assert!(expected, "an attachment ended as {failure} (seed {seed}, round {round})");
                }
            }
        }
        stop.store(true, Ordering::SeqCst);
        let writer = writing.join().unwrap();
        assert_eq!(listing(&outside), before, "something outside changed (seed {seed}, round {round})");
        writer.mend(&scene.url());
        if attached {
            beside += 1;
        } else {
            after += 1;
            // Its user may have made it whole by the fetch just now; then nothing is owed.
            scene.history().await.unwrap();
        }
        for (name, content) in &writer.own {
            assert_eq!(&read(&project, name), content, "{name} was lost (seed {seed}, round {round})");
        }
        assert!(!scene.is_shallow(), "seed {seed}, round {round}");
        git(&project, &["fsck", "--full", "--strict", "--no-dangling"]);
        assert_eq!(listing(&outside), before, "something outside changed (seed {seed}, round {round})");
    }
    eprintln!("seed {seed}: {beside} histories attached beside the writer, {after} once it rested");
}
