//! Runs the payloads that lead out or block, one project each, several at a time.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use futures_util::{StreamExt, stream};
use haul::{failure::ErrorClass, failure::Failure, protocol::TaskResult};
use serde_json::json;

use crate::{
    altered, blocking,
    programs::{copy, users, who},
    scene::{Scene, assert_untouched, bounded, command, git, give, privileged, snapshot},
};

/// How many projects are worked in at once.
const AT_ONCE: usize = 4;

/// How a payload is shown to bite plain git.
#[derive(Clone, Copy)]
pub(crate) enum Shown {
    /// What is outside changes.
    Changes(&'static [&'static str]),
    /// An object that only the stranger has can be read.
    Reads,
    /// The program runs.
    Runs(&'static str),
    /// Git waits, or fails.
    Fails(&'static str),
    /// The same for whom mode bits hold.
    FailsUnlessRoot(&'static str),
    /// Git itself does right.
    Withstood,
}

/// How a task may end.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum End {
    Works,
    Conflict,
    /// Conflict for root, who can make a file immutable; nobody else can.
    IfRoot,
    /// Either, soon.
    Any,
}

/// Where to plant.
pub(crate) struct Where {
    pub(crate) project: PathBuf,
    pub(crate) outside: PathBuf,
    pub(crate) first: String,
    pub(crate) second: String,
    mark: PathBuf,
}

impl Where {
    /// A program that leaves a mark.
    pub(crate) fn program(&self) -> String {
        let path = self.mark.with_extension("sh");
        fs::write(&path, format!("#!/bin/sh\n: >'{}'\n", self.mark.display())).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        path.display().to_string()
    }
}

/// Something to plant.
pub(crate) struct Payload {
    pub(crate) name: &'static str,
    pub(crate) shown: Shown,
    /// Of a status, and of a pull.
    pub(crate) ends: (End, End),
    pub(crate) plant: fn(&Where),
    /// What must still be there afterwards.
    pub(crate) stays: &'static [&'static str],
}

impl Payload {
    /// Plants it in a project of `scene`.
    pub(crate) fn plant_in(&self, scene: &Scene, name: &str) {
        (self.plant)(&Where {
            project: scene.project(name),
            outside: scene.outside(),
            first: scene.first.clone(),
            second: scene.second.clone(),
            mark: scene.marks().join(name),
        });
    }
}

impl End {
    fn allows(self, result: &Result<TaskResult, Failure>) -> bool {
        let (works, conflict) = match self {
            Self::Works => (true, false),
            Self::Conflict => (false, true),
            Self::IfRoot => (!privileged(), privileged()),
            Self::Any => (true, true),
        };
        match result {
            Ok(_) => works,
            Err(failure) => conflict && failure.class == ErrorClass::Conflict,
        }
    }
}

pub(crate) async fn run() {
    let scene = Scene::new(true).await;
    let payloads: Vec<&Payload> = altered::PAYLOADS.iter().chain(blocking::PAYLOADS).collect();
    let begun = Instant::now();
    // With a stranger's own copy of everything outside, since the snapshots of two payloads must not meet.
    let outcomes: Vec<Result<String, String>> = stream::iter(payloads.iter().enumerate())
        .map(|(number, payload)| attempt(&scene, payload, number))
        .buffer_unordered(AT_ONCE)
        .collect()
        .await;
    let traces = scene.tracer.as_ref().unwrap().take();
    let mut failed = Vec::new();
    for outcome in outcomes {
        match outcome {
            Ok(line) => println!("{line}"),
            Err(line) => failed.push(line),
        }
    }
    blocking::thaw(&scene.storage());
    assert!(failed.is_empty(), "{} of {}: {failed:#?}", failed.len(), payloads.len());
    for trace in &traces {
        trace.judge(&scene.storage(), "in an altered workspace");
    }
    println!(
        "{} payloads that lead out, block or are held, {} traces of children, {:?}, as {}",
        payloads.len(),
        traces.len(),
        begun.elapsed(),
        who()
    );
}

/// One payload: shown, planted, met.
async fn attempt(scene: &Scene, payload: &Payload, number: usize) -> Result<String, String> {
    let id = i64::try_from(number).unwrap() + 1;
    let name = format!("p{number}");
    let wrong = |what: String| Err(format!("{}: {what}", payload.name));
    if let Err(failure) = scene.clone(id, &name).await {
        return wrong(format!("a clone beside the others failed: {failure}"));
    }
    let project = scene.behind(&name);
    let place = scene.path(&format!("place-{number}"));
    let shown = {
        let (project, place) = (project.clone(), place.clone());
        let (outside, first, second) = (scene.outside(), scene.first.clone(), scene.second.clone());
        let (shown, plant) = (payload.shown, payload.plant);
        tokio::task::spawn_blocking(move || show(shown, plant, &project, &place, &outside, (&first, &second))).await
    };
    let shown = match shown.unwrap() {
        Ok(shown) => shown,
        Err(said) => return wrong(format!("does not bite plain git: {said}")),
    };
    let mark = place.join("met");
    let outside = copy(&scene.outside(), &place.join("outside"));
    let w = Where {
        project: project.clone(),
        outside: outside.clone(),
        first: scene.first.clone(),
        second: scene.second.clone(),
        mark: mark.clone(),
    };
    (payload.plant)(&w);
    give(&project);
    let (before, of_users) = (snapshot(&outside), users(&project));
    let begun = Instant::now();
    let status = scene.run("status", id, json!({})).await;
    let pull = scene.run("pull", id, json!({})).await;
    let took = begun.elapsed();
    for (what, end, result) in [("status", payload.ends.0, &status), ("pull", payload.ends.1, &pull)] {
        if !end.allows(result) {
            return wrong(format!("{what} should have ended as {end:?}, not {result:?}"));
        }
        if let Err(failure) = result
            && (failure.message.len() < 15 || failure.message.chars().any(char::is_control))
        {
            return wrong(format!("{what} says {:?}", failure.message));
        }
    }
    if users(&project) != of_users {
        return wrong("a file of the user was changed".to_owned());
    }
    if let Some(gone) = payload.stays.iter().find(|name| project.join(name).symlink_metadata().is_err()) {
        return wrong(format!("{gone} was removed"));
    }
    if mark.exists() {
        return wrong("its program was run".to_owned());
    }
    assert_untouched(&before, &snapshot(&outside), payload.name);
    if took > Duration::from_secs(20) {
        return wrong(format!("took {took:?}"));
    }
    blocking::thaw(&project);
    if let Err(failure) = scene.run("delete", id, json!({})).await {
        return wrong(format!("its delete failed: {failure}"));
    }
    assert_untouched(&before, &snapshot(&outside), payload.name);
    if project.exists() {
        return wrong("it stands after its delete".to_owned());
    }
    let ended = |result: &Result<TaskResult, Failure>| match result {
        Ok(_) => "works".to_owned(),
        Err(failure) => failure.message.clone(),
    };
    Ok(format!("{:<55} git {shown}; status {}; pull {}", payload.name, ended(&status), ended(&pull)))
}

/// Plants it in a copy of the project and lets plain git meet it.
fn show(
    shown: Shown,
    plant: fn(&Where),
    project: &Path,
    place: &Path,
    outside: &Path,
    commits: (&str, &str),
) -> Result<&'static str, String> {
    fs::create_dir(place).unwrap();
    if matches!(shown, Shown::Withstood) {
        return Ok("withstands it");
    }
    let twin = copy(project, &place.join("twin"));
    let outside = copy(outside, &place.join("twin-outside"));
    let mark = place.join("shown");
    let w = Where {
        project: twin.clone(),
        outside: outside.clone(),
        first: commits.0.to_owned(),
        second: commits.1.to_owned(),
        mark: mark.clone(),
    };
    plant(&w);
    let before = snapshot(&outside);
    let run = |line: &str| {
        let mut git = command(&twin);
        git.args(line.replace("^1", commits.0).split(' '));
        bounded(git, Duration::from_millis(500))
    };
    let hangs_or_fails = |line: &str| match run(line) {
        None => Ok("hangs"),
        Some(output) if !output.status.success() => Ok("fails"),
        Some(_) => Err(format!("git {line} succeeds")),
    };
    let result = match shown {
        Shown::Changes(lines) => {
            let said: Vec<_> =
                lines.iter().map(|line| run(line).map(|output| crate::scene::text(&output.stderr))).collect();
            if snapshot(&outside) == before { Err(format!("{said:?}")) } else { Ok("changes what is outside") }
        }
        Shown::Reads => {
            let secret = git(&outside.join("victim"), &["rev-parse", "HEAD:secret"]);
            match run(&format!("cat-file -e {secret}")) {
                Some(output) if output.status.success() => Ok("reads what is outside"),
                _ => Err("it cannot be read".to_owned()),
            }
        }
        Shown::Runs(line) => {
            run(line);
            if mark.exists() { Ok("runs the program") } else { Err("it does not run".to_owned()) }
        }
        Shown::Fails(line) => hangs_or_fails(line),
        Shown::FailsUnlessRoot(line) if !privileged() => hangs_or_fails(line),
        Shown::FailsUnlessRoot(_) | Shown::Withstood => Ok("withstands it"),
    };
    blocking::thaw(&twin);
    let _ = fs::remove_dir_all(&twin);
    result
}
