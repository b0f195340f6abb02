//! A file system that turns read-only in the middle of an operation.
//!
//! That is what a kernel does to one in which it finds an error (`errors=remount-ro`), whoever writes just then; here it is
//! told of an error at steps that show on disk, and while an upstream holds back a pack. An administrator's `mount -o
//! remount,ro` is refused for as long as a file is open for writing, and a clone or pull always has one, the lock of its
//! mirror: so that is done to a delete.

use std::{fs, path::PathBuf, time::Duration};

use async_trait::async_trait;
use haul::{
    execute::{Execute, Job},
    failure::Failure,
    git::{Fence, GitSettings},
};
use serde_json::json;
use tokio_util::sync::CancellationToken;

use super::{
    Scene, assert_disk,
    disk::Disk,
    githttp::{Behaviour, Server},
    mend,
    points::{self, Chance, Point, Strike},
    world::{World, assert_alike, git, listing},
};

/// Where it happens to a pull.
const PULL: [Point; 9] = [
    Point::Waiting,
    Point::Noted,
    Point::Noted,
    Point::Written(0),
    Point::Written(120),
    Point::Written(300),
    Point::Written(399),
    Point::Indexed,
    Point::Moved,
];
/// To a clone.
const CLONE: [Point; 7] = [
    Point::Mirrored,
    Point::Mirrored,
    Point::Staged,
    Point::Staged,
    Point::CheckedOut,
    Point::CheckedOut,
    Point::Bound,
];
/// To a delete.
const DELETE: [Point; 7] =
    [Point::Gone, Point::Gone, Point::Buried, Point::Buried, Point::Unbound, Point::Removing, Point::MirrorGone];

async fn guarded() -> Scene {
    Scene::bare(World::new().await, |at| Disk::guarded(at, 64)).await
}

impl Scene {
    /// Lets the disk turn read-only soon after `point` is reached.
    fn read_only_at(&self, project: &points::Scene, point: Point, delay: Duration) -> Strike {
        let error = self.disk.error();
        project.at(point, std::process::id(), delay, move |_| fs::write(&error, "a test").unwrap())
    }

    fn points(&self, project: i64) -> points::Scene {
        points::Scene::new(&self.world, self.world.path("storage"), project)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_turns_read_only_in_the_middle_of_a_pull_leaves_every_file_old_new_or_the_users() {
    let mut scene = guarded().await;
    let (project, mut chance) = (scene.points(1), Chance::new(11));
    project.change(&scene.world, 0);
    scene.world.clone(1, "p", json!({})).await.unwrap();
    project.user_works();
    let (mut failed, mut mixed) = (0, 0);
    for (round, point) in (1..).zip(PULL) {
        let (old, new) = project.change(&scene.world, round);
        // As after the user's editor and a while.
        scene.disk.sync();
        let strike = scene.read_only_at(&project, point, chance.delay());
        let job = scene.world.job("pull", 1, json!({}));
        let first = scene.world.run(&job).await;
        strike.over();
        if let Err(failure) = &first {
            assert_disk(failure);
            failed += 1;
        }
        mend(&mut scene).await;
        mixed += usize::from(project.every_file_is_old_new_or_the_users(&old, &new));
        scene.world.run(&job).await.unwrap_or_else(|failure| panic!("{point:?}: {failure} after {first:?}"));
        project.is_pulled(&new);
        assert_eq!(scene.world.leftovers(), Vec::<String>::new(), "{point:?}");
    }
    eprintln!("{failed} of {} pulls failed, {mixed} between old and new files", PULL.len());
    assert!(failed >= 6, "it came too late: {failed}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_turns_read_only_in_the_middle_of_a_clone_shows_all_of_it_or_nothing() {
    let mut scene = guarded().await;
    let (mut chance, mut failed) = (Chance::new(12), 0);
    for (number, point) in (1..).zip(CLONE) {
        let project = scene.points(number);
        let (_, new) = project.change(&scene.world, u32::try_from(number).unwrap());
        scene.disk.sync();
        let strike = scene.read_only_at(&project, point, chance.delay());
        let job = scene.world.clone_job(number, &project.target, json!({}));
        let first = scene.world.run(&job).await;
        strike.over();
        if let Err(failure) = &first {
            assert_disk(failure);
            failed += 1;
        }
        mend(&mut scene).await;
        assert!(project.is_cloned_or_not(&new) || first.is_err(), "{point:?}: a clone that was done is gone");
        assert_eq!(scene.world.leftovers(), Vec::<String>::new(), "{point:?}");
        scene.world.run(&job).await.unwrap_or_else(|failure| panic!("{point:?}: {failure} after {first:?}"));
        assert!(project.is_cloned_or_not(&new), "{point:?}");
        // The next one begins with nothing fetched.
        scene.world.run(&scene.world.job("delete", number, json!({}))).await.unwrap();
    }
    eprintln!("{failed} of {} clones failed", CLONE.len());
    assert!(failed >= 4, "it came too late: {failed}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_turns_read_only_in_the_middle_of_a_delete_leaves_it_done_or_not_done() {
    let mut scene = guarded().await;
    let (mut chance, mut failed) = (Chance::new(13), 0);
    let (_, new) = scene.points(1).change(&scene.world, 0);
    for (number, point) in (1..).zip(DELETE) {
        let project = scene.points(number);
        scene.world.clone(number, &project.target, json!({})).await.unwrap();
        scene.disk.sync();
        let strike = scene.read_only_at(&project, point, chance.delay() / 8);
        let job = scene.world.job("delete", number, json!({}));
        let first = scene.world.run(&job).await;
        strike.over();
        if let Err(failure) = &first {
            assert_disk(failure);
            failed += 1;
        }
        mend(&mut scene).await;
        let stands = project.is_cloned_or_not(&new);
        let state = scene.world.executor.project(number).await;
        assert_eq!(state.active, stands, "{point:?}: a project stands and is nobody's");
        assert!(first.is_err() || state.deleted, "{point:?}: a delete that was done is not");
        scene.world.run(&job).await.unwrap_or_else(|failure| panic!("{point:?}: {failure} after {first:?}"));
        scene.assert_nothing_in_view(&project.target);
        assert!(scene.world.executor.project(number).await.deleted, "{point:?}");
    }
    eprintln!("{failed} of {} deletes failed", DELETE.len());
    assert!(failed >= 1, "it came too late: {failed}");
}

/// Remounts read-only when a delete asks whether it may go on.
struct Remounting<'a>(&'a Disk);

#[async_trait]
impl Fence for Remounting<'_> {
    async fn check(&self) -> Result<(), Failure> {
        self.0.writable(false);
        Ok(())
    }
}

#[tokio::test]
async fn a_disk_that_is_remounted_read_only_in_the_middle_of_a_delete_leaves_the_project_intact() {
    let scene = Scene::on(|at| Disk::new(at, 24, 2048)).await;
    scene.used_project().await;
    let (before, delete) = (listing(&scene.project()), scene.world.job("delete", 1, json!({})));
    let refused = scene.world.run_with(&delete, CancellationToken::new(), &|_| (), &Remounting(&scene.disk)).await;
    assert_disk(&refused.unwrap_err());
    assert_eq!(listing(&scene.project()), before);
    scene.disk.writable(true);
    scene.world.run(&delete).await.unwrap();
    scene.assert_nothing_in_view("p");
}

/// Runs `job` while the upstream holds back its pack, lets the disk turn read-only, and lets the pack come.
async fn held(scene: &Scene, server: &Server, job: &Job) -> Failure {
    let packs = server.counts().packs;
    server.behave(Behaviour::HoldPack);
    let meanwhile = async {
        while server.counts().packs == packs {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        fs::write(scene.disk.error(), "a test").unwrap();
        server.behave(Behaviour::Serve);
    };
    tokio::join!(scene.world.run(job), meanwhile).0.unwrap_err()
}

/// What `git clone` makes of `url`.
fn reference(scene: &Scene, url: &str) -> PathBuf {
    let at = scene.world.path("reference");
    let _ = fs::remove_dir_all(&at);
    git(scene.world.dir.path(), &["clone", "-q", url, "reference"]);
    at
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_turns_read_only_while_a_pack_is_on_its_way_takes_nothing_and_the_next_attempt_completes() {
    let settings =
        GitSettings { allow_http: true, allow_loopback: true, tree_first_after: None, ..GitSettings::default() };
    let mut scene = Scene::bare(World::with(settings).await, |at| Disk::guarded(at, 48)).await;
    scene.commit(0);
    let server = Server::start(scene.world.dir.path());
    let url = server.url("up.git");
    let clone = scene.world.clone_job(1, "p", json!({"git_url": url}));
    assert_disk(&held(&scene, &server, &clone).await);
    mend(&mut scene).await;
    scene.assert_nothing_in_view("p");
    scene.world.run(&clone).await.unwrap();
    assert_alike(&scene.project(), &reference(&scene, &url));
    scene.disk.sync();
    let before = listing(&scene.project());
    scene.commit(1);
    let pull = scene.world.job("pull", 1, json!({}));
    assert_disk(&held(&scene, &server, &pull).await);
    mend(&mut scene).await;
    assert_eq!(listing(&scene.project()), before);
    scene.world.run(&pull).await.unwrap();
    assert_alike(&scene.project(), &reference(&scene, &url));
}
