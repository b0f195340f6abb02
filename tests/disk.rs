//! Disks that are full, out of inodes, read-only, partly immutable or broken, at every stage of clone, pull and delete.
//!
//! Held to each time: the class is `disk`, which waits without spending attempts; nothing half-made is in view; every
//! file of a project is old, new or the user's; and once the cause is gone the next attempt completes. The disks are
//! real ones on loop devices, so the suite needs root.

#![expect(clippy::unwrap_used, reason = "a test that cannot be set up shall fail loudly")]

#[path = "support/disk.rs"]
mod disk;
#[path = "support/githttp.rs"]
mod githttp;
#[path = "disk/midway.rs"]
mod midway;
#[expect(dead_code, reason = "made for more tests than this one")]
#[path = "crash_git/scene.rs"]
mod points;
#[expect(dead_code, reason = "made for more tests than this one")]
#[path = "execute/world.rs"]
mod world;

use std::{collections::BTreeSet, fmt::Write as _, fs, path::Path};

use disk::{Disk, Immutable};
use haul::{
    execute::Execute,
    failure::{ErrorClass, Failure},
};
use serde_json::json;
use world::{World, assert_alike, git, listing, read, write};

const FILES: usize = 30;
const KIB: u64 = 1 << 10;

/// A world whose storage is a disk of its own.
struct Scene {
    // Unmounted before the directory around it is removed.
    disk: Disk,
    world: World,
}

impl Scene {
    async fn on(make: impl FnOnce(&Path) -> Disk) -> Self {
        let scene = Self::bare(World::new().await, make).await;
        scene.commit(0);
        scene
    }

    /// The same with an upstream that is empty.
    async fn bare(mut world: World, make: impl FnOnce(&Path) -> Disk) -> Self {
        let disk = make(&world.path("storage"));
        world.restart().await;
        Self { disk, world }
    }

    /// Commits files that differ from those of every other `round` and do not compress well.
    fn commit(&self, round: usize) -> String {
        for number in 0..FILES {
            write(&self.world.seed(), &format!("d{}/f{number}", number % 3), &content(round, number));
        }
        self.world.push("a round")
    }

    /// The project 1 with a file of the user's own and one that the user changed.
    async fn used_project(&self) {
        write(&self.world.seed(), "kept", "as it was\n");
        self.world.push("a file that no round changes");
        self.world.clone(1, "p", json!({})).await.unwrap();
        write(&self.project(), "mine", "nobody else's\n");
        write(&self.project(), "kept", "changed by the user\n");
    }

    fn project(&self) -> std::path::PathBuf {
        self.world.project("p")
    }

    /// Nothing of a clone is to be seen.
    fn assert_nothing_in_view(&self, target: &str) {
        assert!(!self.world.project(target).exists());
        assert_eq!(self.world.leftovers(), Vec::<String>::new());
        assert!(!self.world.project(".haul/owners").join(target).exists());
    }

    /// Every file of the project is old, new or the user's, and git can work in it.
    fn assert_old_or_new(&self, old: usize, new: usize) {
        for number in 0..FILES {
            let text = read(&self.project(), &format!("d{}/f{number}", number % 3));
            let known = [content(old, number), content(new, number)].contains(&text);
            assert!(known, "f{number} is neither the old nor the new one: {} bytes", text.len());
        }
        self.assert_users_own();
        git(&self.project(), &["--no-optional-locks", "status", "--porcelain"]);
        git(&self.project(), &["fsck", "--connectivity-only", "--no-dangling", "--no-progress"]);
    }

    fn assert_users_own(&self) {
        assert_eq!(read(&self.project(), "mine"), "nobody else's\n");
        assert_eq!(read(&self.project(), "kept"), "changed by the user\n");
    }

    /// The pull that completes.
    async fn assert_pulls(&self, tip: &str, round: usize) {
        let result = self.world.pull(1, json!({})).await.unwrap();
        assert_eq!(result.head.as_deref(), Some(tip));
        self.assert_old_or_new(round, round);
        assert_eq!(git(&self.project(), &["status", "--porcelain"]), " M kept\n?? mine");
        assert_eq!(self.world.leftovers(), Vec::<String>::new());
    }

    /// Clones with less and less of what `leave` leaves missing, until that succeeds; returns where it failed.
    async fn clone_with_ever_more(&self, steps: &[u64], leave: impl Fn(&Disk, u64)) -> BTreeSet<String> {
        let mut said = BTreeSet::new();
        for &step in steps {
            leave(&self.disk, step);
            match self.world.clone(1, "p", json!({})).await {
                Err(failure) => {
                    said.insert(assert_disk(&failure));
                    self.assert_nothing_in_view("p");
                }
                Ok(_) => break,
            }
        }
        self.disk.clear();
        if !self.project().exists() {
            self.world.clone(1, "p", json!({})).await.unwrap();
        }
        assert_alike(&self.project(), &self.world.reference(&[]));
        assert_eq!(self.world.leftovers(), Vec::<String>::new());
        said
    }

    /// The same with pulls.
    async fn pull_with_ever_more(&self, steps: &[u64], leave: impl Fn(&Disk, u64)) -> BTreeSet<String> {
        self.used_project().await;
        let (mut said, mut round) = (BTreeSet::new(), 0);
        for &step in steps {
            let tip = self.commit(round + 1);
            leave(&self.disk, step);
            match self.world.pull(1, json!({})).await {
                Err(failure) => {
                    said.insert(assert_disk(&failure));
                    self.assert_old_or_new(round, round + 1);
                }
                Ok(result) => assert_eq!(result.head.as_deref(), Some(tip.as_str())),
            }
            self.disk.clear();
            self.assert_pulls(&tip, round + 1).await;
            round += 1;
        }
        said
    }

    /// Deletes while `leave` leaves nothing: that is what makes room.
    async fn delete_with_nothing_left(&self, leave: impl Fn(&Disk)) {
        self.used_project().await;
        leave(&self.disk);
        self.world.run(&self.world.job("delete", 1, json!({}))).await.unwrap();
        self.assert_nothing_in_view("p");
        assert!(self.world.executor.project(1).await.deleted);
        self.disk.clear();
    }
}

fn content(round: usize, number: usize) -> String {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64.wrapping_mul((round * 1000 + number + 1) as u64);
    let mut text = String::new();
    while text.len() < 24_000 {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let _ = writeln!(text, "{state:016x}");
    }
    text
}

/// A failure that waits for the disk; returns its words without numbers and names that change.
fn assert_disk(failure: &Failure) -> String {
    assert_eq!((failure.class, failure.deferred), (ErrorClass::Disk, true), "{failure}");
    failure.message.split(['/', '"', ':']).next().unwrap_or_default().to_owned()
}

#[tokio::test]
async fn a_full_disk_stops_a_clone_wherever_it_fills_up_and_nothing_is_seen_of_it() {
    let scene = Scene::on(|at| Disk::new(at, 16, 2048)).await;
    let steps: Vec<u64> = [0, 4, 20, 60, 120, 250, 400, 430, 480, 600, 800, 830, 860, 900].map(|kib| kib * KIB).into();
    let more: Vec<u64> = (10..32).map(|step| step * 100 * KIB).collect();
    let said = scene.clone_with_ever_more(&[steps, more].concat(), Disk::leave).await;
    assert!(said.len() >= 3, "it filled up in too few places: {said:?}");
}

#[tokio::test]
async fn a_disk_without_inodes_stops_a_clone_wherever_they_run_out() {
    let scene = Scene::on(|at| Disk::new(at, 16, 512)).await;
    let steps: Vec<u64> = (0..16).map(|step| step * 2).chain((32..120).step_by(8)).collect();
    let said = scene.clone_with_ever_more(&steps, Disk::leave_inodes).await;
    // Before the checkout the words are the same wherever they run out: few of the steps are told apart.
    assert!(said.len() >= 2, "they ran out in too few places: {said:?}");
}

#[tokio::test]
async fn a_full_disk_stops_a_pull_wherever_it_fills_up_and_every_file_is_old_or_new() {
    let scene = Scene::on(|at| Disk::new(at, 48, 2048)).await;
    let steps = [0, 60, 300, 420, 480, 700, 840, 880, 950, 1200, 1500, 1620].map(|kib| kib * KIB);
    let said = scene.pull_with_ever_more(&steps, Disk::leave).await;
    assert!(said.len() >= 2, "it filled up in too few places: {said:?}");
}

#[tokio::test]
async fn a_disk_without_inodes_stops_a_pull_wherever_they_run_out() {
    let scene = Scene::on(|at| Disk::new(at, 48, 1024)).await;
    let said = scene.pull_with_ever_more(&[0, 2, 5, 9, 12, 16, 24, 40, 48], Disk::leave_inodes).await;
    assert!(said.len() >= 2, "they ran out in too few places: {said:?}");
}

#[tokio::test]
async fn a_delete_makes_room_on_a_disk_that_has_none() {
    Scene::on(|at| Disk::new(at, 16, 2048)).await.delete_with_nothing_left(|disk| disk.leave(0)).await;
    Scene::on(|at| Disk::new(at, 16, 512)).await.delete_with_nothing_left(|disk| disk.leave_inodes(0)).await;
}

#[tokio::test]
async fn a_read_only_disk_defers_everything_and_changes_nothing() {
    let scene = Scene::on(|at| Disk::new(at, 24, 2048)).await;
    scene.used_project().await;
    let before = listing(&scene.project());
    let tip = scene.commit(1);
    scene.disk.writable(false);
    for attempt in [
        scene.world.clone(2, "q", json!({})).await,
        scene.world.pull(1, json!({})).await,
        scene.world.run(&scene.world.job("delete", 1, json!({}))).await,
    ] {
        assert_disk(&attempt.unwrap_err());
    }
    assert_eq!(listing(&scene.project()), before);
    // What only reads goes on.
    scene.world.run(&scene.world.job("status", 1, json!({}))).await.unwrap();
    scene.disk.writable(true);
    scene.assert_nothing_in_view("q");
    scene.assert_pulls(&tip, 1).await;
    scene.world.clone(2, "q", json!({})).await.unwrap();
    scene.world.run(&scene.world.job("delete", 1, json!({}))).await.unwrap();
    scene.assert_nothing_in_view("p");
}

#[tokio::test]
async fn a_directory_that_nobody_may_change_defers_what_would_change_it() {
    let scene = Scene::on(|at| Disk::new(at, 24, 2048)).await;
    scene.used_project().await;
    let delete = || scene.world.job("delete", 1, json!({}));
    let before = listing(&scene.project());
    // Of another upstream a mirror has to be made.
    git(scene.world.dir.path(), &["clone", "-q", "--bare", "up.git", "other.git"]);
    for place in
        ["storage/.haul/mirrors", "storage/projects/.haul", "storage/projects/.haul/owners", "storage/projects"]
    {
        let fixed = Immutable::new(scene.world.path(place));
        let url = format!("file://{}", scene.world.path("other.git").display());
        let failure = scene.world.clone(2, "q", json!({"git_url": url})).await.unwrap_err();
        assert_disk(&failure);
        assert!(failure.message.contains("immutable"), "{failure}");
        assert!(!scene.world.project("q").exists());
        drop(fixed);
    }
    let places =
        ["storage/projects", "storage/projects/.haul/trash", "storage/projects/.haul/gone", "storage/projects/p"];
    for place in places {
        let fixed = Immutable::new(scene.world.path(place));
        let failure = scene.world.run(&delete()).await.unwrap_err();
        assert_disk(&failure);
        drop(fixed);
        assert_eq!(listing(&scene.project()), before, "{place}");
    }
    scene.world.run(&delete()).await.unwrap();
    scene.assert_nothing_in_view("p");
    scene.world.clone(2, "q", json!({})).await.unwrap();
}

#[tokio::test]
async fn a_delete_that_cannot_remove_the_binding_is_completed_by_the_next_attempt() {
    let scene = Scene::on(|at| Disk::new(at, 24, 2048)).await;
    scene.used_project().await;
    let delete = scene.world.job("delete", 1, json!({}));
    let fixed = Immutable::new(scene.world.path("storage/projects/.haul/owners"));
    assert_disk(&scene.world.run(&delete).await.unwrap_err());
    // Out of view it stays, and what it takes up is not forgotten.
    assert!(!scene.project().exists() && scene.world.leftovers().len() == 1);
    drop(fixed);
    scene.world.run(&delete).await.unwrap();
    scene.assert_nothing_in_view("p");
    assert!(scene.world.executor.project(1).await.deleted);
}

#[tokio::test]
async fn a_file_that_nobody_may_remove_is_out_of_view_with_its_project_and_goes_at_a_later_start() {
    let mut scene = Scene::on(|at| Disk::new(at, 24, 2048)).await;
    scene.used_project().await;
    let mut fixed = Immutable::new(scene.project().join("d1/f13"));
    scene.world.run(&scene.world.job("delete", 1, json!({}))).await.unwrap();
    assert!(!scene.project().exists() && scene.world.executor.project(1).await.deleted);
    let left = scene.world.leftovers();
    assert_eq!(left.len(), 1);
    // The place is free all the same.
    scene.world.clone(2, "p", json!({})).await.unwrap();
    scene.world.restart().await;
    assert_eq!(scene.world.leftovers(), left);
    fixed.moved(scene.world.path("storage/projects/.haul/trash").join(&left[0]).join("d1/f13"));
    drop(fixed);
    scene.world.restart().await;
    assert_eq!(scene.world.leftovers(), Vec::<String>::new());
    assert!(scene.project().exists());
}

#[tokio::test]
async fn a_file_that_nobody_may_change_is_a_conflict_and_the_pull_completes_without_it() {
    let scene = Scene::on(|at| Disk::new(at, 24, 2048)).await;
    scene.used_project().await;
    let tip = scene.commit(1);
    let fixed = Immutable::new(scene.project().join("d1/f13"));
    let failure = scene.world.pull(1, json!({})).await.unwrap_err();
    assert_eq!(failure.class, ErrorClass::Conflict, "{failure}");
    assert!(failure.message.contains("d1/f13"), "{failure}");
    scene.assert_old_or_new(0, 1);
    drop(fixed);
    scene.assert_pulls(&tip, 1).await;
}

/// What was only in memory is forgotten, as by a restart of the machine; the device is whole again.
async fn mend(scene: &mut Scene) {
    scene.disk.detach();
    // Lets go of the detached one.
    scene.world.restart().await;
    scene.disk.mend();
    scene.world.restart().await;
}

#[tokio::test]
async fn a_device_that_fails_stops_a_clone_and_the_next_attempt_is_whole() {
    let mut failed = 0;
    for kib in [0, 300, 500, 900, 1200] {
        let mut scene = Scene::on(|at| Disk::thin(at, 48)).await;
        scene.disk.fail_after(kib);
        if let Err(failure) = scene.world.clone(1, "p", json!({})).await {
            assert_disk(&failure);
            assert!(!scene.project().exists());
            failed += 1;
        }
        mend(&mut scene).await;
        if !scene.project().exists() {
            scene.assert_nothing_in_view("p");
            scene.world.clone(1, "p", json!({})).await.unwrap();
        }
        assert_alike(&scene.project(), &scene.world.reference(&[]));
    }
    assert!(failed >= 3, "the device failed in too few places: {failed}");
}

#[tokio::test]
async fn a_device_that_fails_stops_a_pull_and_every_file_is_old_or_new() {
    let mut failed = 0;
    for kib in [0, 300, 600, 900, 1200] {
        let mut scene = Scene::on(|at| Disk::thin(at, 48)).await;
        scene.used_project().await;
        // As after the user's editor and a while.
        rustix::fs::syncfs(fs::File::open(scene.project()).unwrap()).unwrap();
        let tip = scene.commit(1);
        scene.disk.fail_after(kib);
        if let Err(failure) = scene.world.pull(1, json!({})).await {
            assert_disk(&failure);
            failed += 1;
        }
        mend(&mut scene).await;
        scene.assert_old_or_new(0, 1);
        scene.assert_pulls(&tip, 1).await;
    }
    assert!(failed >= 3, "the device failed in too few places: {failed}");
}

#[tokio::test]
async fn a_device_that_fails_leaves_a_delete_done_or_not_done_and_the_next_attempt_completes() {
    let (mut failed, mut intact) = (0, 0);
    // Where the tombstone is written, and where the file system's own journal is.
    let thin = [(false, 0), (false, 4)];
    let brittle = [0, 4, 8, 12, 16, 20, 28, 40].map(|kib| (true, kib));
    for (brittle, kib) in thin.into_iter().chain(brittle) {
        let mut scene = Scene::on(|at| if brittle { Disk::brittle(at, 48) } else { Disk::thin(at, 48) }).await;
        scene.used_project().await;
        let before = listing(&scene.project());
        scene.disk.fail_after(kib);
        let delete = scene.world.job("delete", 1, json!({}));
        let first = scene.world.run(&delete).await;
        if let Err(failure) = &first {
            assert_disk(failure);
            failed += 1;
        }
        mend(&mut scene).await;
        if scene.project().exists() {
            assert!(first.is_err(), "a project is back after its delete ({kib} KiB)");
            assert!(scene.world.executor.project(1).await.active, "a project stands and is nobody's ({kib} KiB)");
            assert_eq!(listing(&scene.project()), before);
            git(&scene.project(), &["fsck", "--connectivity-only", "--no-dangling", "--no-progress"]);
            intact += 1;
        }
        scene.world.run(&delete).await.unwrap();
        scene.assert_nothing_in_view("p");
        assert!(scene.world.executor.project(1).await.deleted);
        scene.world.clone(1, "p", json!({})).await.unwrap();
        assert_alike(&scene.project(), &scene.world.reference(&[]));
    }
    assert!(failed >= 4 && intact >= 2, "the device failed in too few places: {failed}, {intact} left intact");
}
