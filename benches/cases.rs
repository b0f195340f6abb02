//! The cases. In each the sides take turns, round by round, and nothing is measured while the other side's writes are
//! still on their way to the disk.

use std::{
    fs::File,
    io::Write,
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use serde_json::json;

use crate::{
    World,
    agent::Agent,
    git, git_command, memory,
    place::Place,
    report::{Comparison, Series},
};

/// Full history first, as far as the agent can do otherwise.
const TREE_FIRST_OFF: (&str, &str) = ("AGENT_GIT__TREE_FIRST_AFTER", "off");
/// How many clones are asked for at once.
const CROWD: usize = 50;
/// How often the transfer is killed, and the share of the pack that the link lets through in that time.
const KILL_EVERY: Duration = Duration::from_secs(4);
const SHARE: u64 = 5;
/// A clone that did not get through by then does not.
const MOST_KILLS: u32 = 200;

pub(crate) async fn run(case: &str, world: &mut World, size: &str, path: &Path) {
    eprintln!("case {case}, repository {size}, {} rounds", world.rounds);
    match case {
        "cold" => cold(world, size).await,
        "tree" => tree(world, size).await,
        "warm" => warm(world, size).await,
        "pull" => pull(world, size, path).await,
        "concurrent" => concurrent(world, size).await,
        "resume" => resume(world, size).await,
        "memory" => memory(world, size).await,
        other => panic!("no case is called {other}"),
    }
}

impl World {
    fn place(&mut self, name: &str) -> Place {
        let place = Place::fresh(self.kind, &self.scratch, name);
        let line = format!("File system: {}", place.what);
        if !self.places.contains(&line) {
            self.places.push(line);
        }
        place
    }

    async fn agent(&mut self, place: &Place, more: &[(&str, &str)]) -> Agent {
        let mut settings: Vec<(&str, &str)> = more.to_vec();
        settings.extend(self.settings.iter().map(|(name, value)| (name.as_str(), value.as_str())));
        let agent = Agent::start(place.path(), &settings).await;
        for name in &agent.unknown {
            let line = format!("This agent does not know {name}; it ran without.");
            if !self.places.contains(&line) {
                println!("{line}");
                self.places.push(line);
            }
        }
        agent
    }

    fn more_rounds_for(&self, size: &str) -> usize {
        // Short ones vary more, and cost nothing.
        if size == "small" { self.rounds * 3 } else { self.rounds }
    }
}

async fn cold(world: &mut World, size: &str) {
    let place = world.place(&format!("cold-{size}"));
    let mut agent = world.agent(&place, &[TREE_FIRST_OFF]).await;
    let (mut haul, mut theirs) = (Series::new("haul, full history"), Series::new("git clone"));
    for round in 0..world.more_rounds_for(size) {
        place.settle();
        let url = world.server.url(&format!("cold{round}"), size);
        haul.rounds.push(ms(agent.clone(round as u64 + 1, &url, &format!("cold-{round}")).await.after));
        place.settle();
        theirs.rounds.push(timed(git_clone(&place, &url, &format!("git-{round}"))));
    }
    same_tree(&agent.project("cold-0"), &place.path().join("git-0"));
    let title = format!("Cold clone, {size}: full history");
    world.report.add(Comparison { name: format!("cold-{size}"), title, series: vec![haul, theirs], rate: false });
}

async fn tree(world: &mut World, size: &str) {
    let place = world.place(&format!("tree-{size}"));
    let mut agent = world.agent(&place, &[]).await;
    let mut usable = Series::new("haul, usable tree");
    let (mut history, mut theirs) = (Series::new("haul, history attached"), Series::new("git clone"));
    for round in 0..world.rounds {
        place.settle();
        let url = world.server.url(&format!("tree{round}"), size);
        let more = json!({"git_url": url, "target_path": format!("tree-{round}")});
        let (done, attached) = agent.run("clone", round as u64 + 1, more, true).await;
        usable.rounds.push(ms(done.after));
        history.rounds.push(ms(attached.unwrap_or(done).after));
        place.settle();
        theirs.rounds.push(timed(git_clone(&place, &url, &format!("git-{round}"))));
    }
    let title = format!("Cold clone, {size}: tree first");
    world.report.add(Comparison {
        name: format!("tree-{size}"),
        title,
        series: vec![usable, history, theirs],
        rate: false,
    });
}

async fn warm(world: &mut World, size: &str) {
    let place = world.place(&format!("warm-{size}"));
    let mut agent = world.agent(&place, &[TREE_FIRST_OFF]).await;
    let url = world.server.url("warm", size);
    agent.clone(1, &url, "first").await;
    let mut haul = Series::new("haul, mirror there");
    let (mut copied, mut theirs) = (Series::new("cp -r, then sync"), Series::new("git clone"));
    let mut listed = Series::new("git ls-remote, the listing alone");
    for round in 0..world.more_rounds_for(size) {
        place.settle();
        haul.rounds.push(ms(agent.clone(round as u64 + 2, &url, &format!("warm-{round}")).await.after));
        place.settle();
        let begun = Instant::now();
        let target = place.path().join(format!("copy-{round}"));
        let status = Command::new("cp").arg("-r").arg(agent.project("first")).arg(target).status();
        assert!(status.is_ok_and(|status| status.success()), "cp failed");
        place.settle();
        copied.rounds.push(ms(begun.elapsed()));
        theirs.rounds.push(timed(git_clone(&place, &url, &format!("git-{round}"))));
        let mut listing = git_command(place.path());
        listing.args(["ls-remote", "--quiet", &url]);
        listed.rounds.push(timed(listing));
    }
    let title = format!("Warm clone, {size}");
    world.report.add(Comparison {
        name: format!("warm-{size}"),
        title,
        series: vec![haul, copied, theirs, listed],
        rate: false,
    });
}

async fn pull(world: &mut World, size: &str, path: &Path) {
    let place = world.place(&format!("pull-{size}"));
    // The upstream gets commits of ours; the repository itself is only read.
    let upstream = place.path().join("upstream.git");
    let (from, to) = (path.to_str().expect("a path is text"), upstream.to_str().expect("a path is text"));
    git(place.path(), &["clone", "--quiet", "--bare", "--shared", from, to]);
    let name = format!("{size}-pulled");
    world.server.offer(&name, &upstream);
    let url = world.server.url("pull", &name);
    let mut agent = world.agent(&place, &[TREE_FIRST_OFF]).await;
    agent.clone(1, &url, "project").await;
    let theirs_at = place.path().join("git");
    run_git(git_clone(&place, &url, "git"));
    let pull = || {
        let mut command = git_command(&theirs_at);
        command.args(["pull", "--quiet", "--ff-only"]);
        command
    };
    let (mut haul, mut theirs) = (Series::new("haul pull"), Series::new("git pull"));
    let before = world.server.counts();
    for _ in 0..world.rounds * 3 {
        haul.rounds.push(ms(agent.run("pull", 1, json!({}), false).await.0.after));
        theirs.rounds.push(timed(pull()));
    }
    let asked = world.server.counts().listings - before.listings;
    world
        .report
        .say(format!("no-change pull, {size}: {asked} listings asked for by {} pulls of each side", world.rounds * 3));
    let title = format!("Pull with nothing new, {size}");
    world.report.add(Comparison { name: format!("pull-none-{size}"), title, series: vec![haul, theirs], rate: false });
    let (mut haul, mut theirs) = (Series::new("haul pull"), Series::new("git pull"));
    for round in 0..world.rounds * 2 {
        commit(&upstream, round);
        place.settle();
        haul.rounds.push(ms(agent.run("pull", 1, json!({}), false).await.0.after));
        theirs.rounds.push(timed(pull()));
    }
    same_tree(&agent.project("project"), &theirs_at);
    let title = format!("Pull of one commit, {size}");
    world.report.add(Comparison { name: format!("pull-one-{size}"), title, series: vec![haul, theirs], rate: false });
}

async fn concurrent(world: &mut World, size: &str) {
    let place = world.place(&format!("concurrent-{size}"));
    let mut agent = world.agent(&place, &[TREE_FIRST_OFF]).await;
    let (mut haul, mut theirs) =
        (Series::new(format!("haul, {CROWD} clones")), Series::new(format!("git, {CROWD} clones")));
    let mut project = 0;
    for round in 0..world.rounds {
        place.settle();
        let url = world.server.url(&format!("crowd{round}"), size);
        let before = world.server.counts();
        let begun = Instant::now();
        for clone in 0..CROWD {
            project += 1;
            let target = format!("crowd-{round}-{clone}");
            agent.publish("clone", project, json!({"git_url": url, "target_path": target})).await;
        }
        let mut done = 0;
        let mut last = Duration::ZERO;
        while done < CROWD {
            let seen = agent.event(begun).await;
            match seen.event["status"].as_str() {
                Some("succeeded") => done += 1,
                Some("failed" | "rejected" | "superseded") => panic!("a clone failed: {}", seen.event),
                _ => {}
            }
            last = seen.after;
        }
        haul.rounds.push(ms(last));
        let after = world.server.counts();
        world.report.say(format!(
            "{CROWD} concurrent clones, {size}, round {}: {} listings, {} requests for packs",
            round + 1,
            after.listings - before.listings,
            after.packs - before.packs
        ));
        place.settle();
        let begun = Instant::now();
        let clones = (0..CROWD).map(|clone| {
            let mut command = git_clone(&place, &url, &format!("git-{round}-{clone}"));
            command.spawn().expect("git can be run")
        });
        for mut clone in clones.collect::<Vec<_>>() {
            assert!(clone.wait().is_ok_and(|status| status.success()), "git clone failed");
        }
        theirs.rounds.push(ms(begun.elapsed()));
    }
    let title = format!("{CROWD} clones of one upstream at once, {size}");
    world.report.add(Comparison { name: format!("concurrent-{size}"), title, series: vec![haul, theirs], rate: false });
}

/// A link that lets a fifth of the pack through before the transfer is killed again.
async fn resume(world: &mut World, size: &str) {
    let place = world.place(&format!("resume-{size}"));
    let limits =
        [TREE_FIRST_OFF, ("AGENT_RETRY__MAX_ATTEMPTS", "300"), ("AGENT_RETRY__BASE", "1s"), ("AGENT_RETRY__CAP", "1s")];
    let mut agent = world.agent(&place, &limits).await;
    let url = world.server.url("whole", size);
    let before = world.server.counts();
    run_git(git_clone(&place, &url, "whole"));
    let whole = world.server.counts().pack_bytes - before.pack_bytes;
    assert!(whole > 0, "a clone fetches something");
    world.server.limit(whole / SHARE / KILL_EVERY.as_secs());
    let before = world.server.counts();
    let begun = Instant::now();
    let more = json!({"git_url": world.server.url("resume", size), "target_path": "resumed"});
    let id = agent.publish("clone", 1, more).await;
    let (mut kills, mut transfer, mut over) = (0, None::<(u32, Instant)>, None);
    while over.is_none() && kills < MOST_KILLS {
        if let Ok(seen) = tokio::time::timeout(Duration::from_millis(50), agent.event(begun)).await
            && seen.event["task_id"] == *id
            && matches!(seen.event["status"].as_str(), Some("succeeded" | "failed" | "rejected"))
        {
            over = Some(seen);
        }
        let running = memory::family(agent.pid())
            .into_iter()
            .find(|pid| memory::name(*pid).is_some_and(|name| name.contains("child transfer")));
        transfer = match (running, transfer) {
            (Some(pid), Some((known, since))) if pid == known => {
                if since.elapsed() >= KILL_EVERY {
                    kill(pid);
                    kills += 1;
                    None
                } else {
                    transfer
                }
            }
            (Some(pid), _) => Some((pid, Instant::now())),
            (None, _) => None,
        };
    }
    world.server.limit(0);
    let sent = world.server.counts().pack_bytes - before.pack_bytes;
    let end = over.map_or_else(
        || "did not complete".to_owned(),
        |seen| format!("{} after {:.1} s", seen.event["status"].as_str().unwrap_or_default(), seen.after.as_secs_f64()),
    );
    world.report.say(format!(
        "resume, {size}: transfer killed every {} s on a link of {} kB/s: {end}, {kills} kills, {:.1} MB sent for a pack of \
         {:.1} MB ({:.2} times; {:.1} MB again for each kill). A plain fetch gets a {SHARE}th of it between two kills and \
         never finishes.",
        KILL_EVERY.as_secs(),
        whole / SHARE / KILL_EVERY.as_secs() / 1000,
        sent as f64 / 1e6,
        whole as f64 / 1e6,
        sent as f64 / whole as f64,
        sent.saturating_sub(whole) as f64 / 1e6 / f64::from(kills.max(1)),
    ));
}

async fn memory(world: &mut World, size: &str) {
    let place = world.place(&format!("memory-{size}"));
    let mut agent = world.agent(&place, &[TREE_FIRST_OFF]).await;
    let url = world.server.url("memory", size);
    let watch = memory::Watch::over(agent.pid());
    agent.clone(1, &url, "cold").await;
    agent.clone(2, &url, "warm").await;
    agent.run("pull", 2, json!({}), false).await;
    for (process, peak) in watch.peaks() {
        world.report.say(format!("memory, {size}: {process}: at most {:.1} MB", peak as f64 / 1e6));
    }
    let mut command = git_clone(&place, &url, "git");
    let mut child = command.spawn().expect("git can be run");
    let watch = memory::Watch::over(child.id());
    assert!(child.wait().is_ok_and(|status| status.success()), "git clone failed");
    for (process, peak) in watch.peaks() {
        world.report.say(format!("memory, {size}: {process}: at most {:.1} MB", peak as f64 / 1e6));
    }
}

fn git_clone(place: &Place, url: &str, target: &str) -> Command {
    let mut command = git_command(place.path());
    command.args(["clone", "--quiet", url, target]).stdout(Stdio::null());
    command
}

fn timed(command: Command) -> f64 {
    let begun = Instant::now();
    run_git(command);
    ms(begun.elapsed())
}

fn run_git(mut command: Command) {
    let output = command.output().expect("git can be run");
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

/// A measured clone that is not the same as git's is worth nothing.
fn same_tree(ours: &Path, theirs: &Path) {
    for arguments in [["rev-parse", "HEAD"].as_slice(), &["status", "--porcelain"], &["write-tree"]] {
        assert_eq!(
            git(ours, arguments),
            git(theirs, arguments),
            "git {arguments:?} says another thing of haul's project"
        );
    }
    assert_eq!(git(ours, &["rev-list", "--count", "--all"]), git(theirs, &["rev-list", "--count", "--all"]));
}

/// Changes one file in one commit, straight in the upstream.
fn commit(upstream: &Path, round: usize) {
    let listed = git(upstream, &["ls-tree", "-r", "HEAD"]);
    let chosen = listed.lines().nth(round * 37 % listed.lines().count()).expect("there are files");
    let file = chosen.split('\t').nth(1).expect("a line of ls-tree has a path");
    let index = upstream.join("bench-index");
    let with_index = |arguments: &[&str]| {
        let output = git_command(upstream).args(arguments).env("GIT_INDEX_FILE", &index).output();
        let output = output.expect("git can be run");
        assert!(output.status.success(), "git {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    };
    let mut feed = git_command(upstream);
    feed.args(["hash-object", "-w", "--stdin"]).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut feed = feed.spawn().expect("git can be run");
    let text = format!("round {round}\n");
    feed.stdin.take().expect("it is piped").write_all(text.as_bytes()).expect("git reads");
    let blob = feed.wait_with_output().expect("git ends");
    let blob = String::from_utf8_lossy(&blob.stdout).trim().to_owned();
    with_index(&["read-tree", "HEAD"]);
    with_index(&["update-index", "--cacheinfo", &format!("100644,{blob},{file}")]);
    let tree = with_index(&["write-tree"]);
    let new = git(upstream, &["commit-tree", "-m", "a round", "-p", "HEAD", &tree]);
    git(upstream, &["update-ref", "HEAD", &new]);
    File::open(upstream).and_then(|directory| directory.sync_all()).expect("the disk takes it");
}

fn kill(pid: u32) {
    if let Some(pid) = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw) {
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
    }
}
