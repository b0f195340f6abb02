//! Runs the payloads that lead out or block, one project each, several at a time.

use std::{
    collections::BTreeMap,
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
    unguarded,
    unguarded::{Call, Harm},
};

/// How many projects are worked in at once.
const AT_ONCE: usize = 4;

/// How a payload is shown to bite: plain git, or libgit2 where nobody guards it. In lines for git `^1` and `^2` are the
/// commits at which the project stands and to which it is pulled.
#[derive(Clone, Copy)]
pub(crate) enum Shown {
    /// What is outside changes.
    Changes(&'static [&'static str]),
    /// An object that only the stranger has can be read.
    Reads,
    /// Git says what only a file outside tells it to say.
    Obeys(&'static str, &'static str),
    /// The program runs.
    Runs(&'static str),
    /// Git waits, or fails.
    Fails(&'static str),
    /// The same for whom mode bits hold.
    FailsUnlessRoot(&'static str),
    /// The same for root, who alone makes files that nobody may change.
    FailsIfRoot(&'static str),
    /// Git does right, and libgit2 does harm by one call with its defaults.
    Unguarded(Call, Harm),
    /// Neither is harmed; why it is tried all the same.
    Neither(&'static str),
}

/// Who was shown to be harmed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Bites {
    Git,
    Library,
    Nobody,
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
    let outcomes: Vec<Result<(Bites, String), String>> = stream::iter(payloads.iter().enumerate())
        .map(|(number, payload)| attempt(&scene, payload, number))
        .buffer_unordered(AT_ONCE)
        .collect()
        .await;
    let traces = scene.tracer.as_ref().unwrap().take();
    let (mut failed, mut bitten) = (Vec::new(), BTreeMap::<Bites, usize>::new());
    for outcome in outcomes {
        match outcome {
            Ok((bites, line)) => {
                println!("{line}");
                *bitten.entry(bites).or_default() += 1;
            }
            Err(line) => failed.push(line),
        }
    }
    blocking::thaw(&scene.storage());
    assert!(failed.is_empty(), "{} of {}: {failed:#?}", failed.len(), payloads.len());
    for trace in &traces {
        trace.judge(&scene.storage(), "in an altered workspace");
    }
    println!(
        "{} payloads that lead out, block or are held ({}), {} traces of children, {:?}, as {}",
        payloads.len(),
        told(&bitten),
        traces.len(),
        begun.elapsed(),
        who()
    );
}

/// How many of the payloads were shown by whom.
pub(crate) fn told(bitten: &BTreeMap<Bites, usize>) -> String {
    let count = |bites| bitten.get(&bites).copied().unwrap_or_default();
    let (git, library, nobody) = (count(Bites::Git), count(Bites::Library), count(Bites::Nobody));
    format!("{git} shown against plain git, {library} against unguarded libgit2, {nobody} against neither")
}

/// One payload: shown, planted, met.
async fn attempt(scene: &Scene, payload: &Payload, number: usize) -> Result<(Bites, String), String> {
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
        let (shown, plant, upstream) = (payload.shown, payload.plant, scene.upstream.path());
        tokio::task::spawn_blocking(move || {
            let stage = Stage { project: &project, place: &place, outside: &outside, upstream: &upstream };
            stage.show(shown, plant, (&first, &second))
        })
        .await
    };
    let (bites, shown) = match shown.unwrap() {
        Ok(shown) => shown,
        Err(said) => return wrong(format!("does not bite: {said}")),
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
    if took > Duration::from_secs(40) {
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
    let line = format!("{:<55} {shown}; status {}; pull {}", payload.name, ended(&status), ended(&pull));
    Ok((bites, line))
}

/// What bites an altered project must do nothing to one that is not.
pub(crate) async fn healthy() {
    let scene = Scene::new(false).await;
    scene.clone(1, "p").await.unwrap();
    let project = scene.behind("p");
    for (number, call) in Call::ALL.into_iter().enumerate() {
        let place = scene.path(&format!("place-{number}"));
        let (upstream, outside) = (scene.upstream.path(), scene.outside());
        let stage = Stage { project: &project, place: &place, outside: &outside, upstream: &upstream };
        let shown = stage.show(Shown::Unguarded(call, Harm::Nothing), |_| (), (&scene.first, &scene.second));
        assert!(shown.is_ok(), "{shown:?}");
    }
}

/// Where a payload is shown.
struct Stage<'a> {
    project: &'a Path,
    place: &'a Path,
    outside: &'a Path,
    upstream: &'a Path,
}

impl Stage<'_> {
    /// Plants it in a copy of the project and lets plain git or libgit2 meet it.
    fn show(&self, shown: Shown, plant: fn(&Where), commits: (&str, &str)) -> Result<(Bites, String), String> {
        fs::create_dir(self.place).unwrap();
        let planted = || {
            let twin = copy(self.project, &self.place.join("twin"));
            let outside = copy(self.outside, &self.place.join("twin-outside"));
            let (first, second) = (commits.0.to_owned(), commits.1.to_owned());
            let w = Where { project: twin, outside, first, second, mark: self.place.join("shown") };
            plant(&w);
            w
        };
        let by_library = |call: Call, harm: Harm| {
            let w = planted();
            let met = unguarded::meet(call, &w, self.upstream);
            remove(&w);
            if met == harm {
                Ok((Bites::Library, format!("libgit2 {met} ({call:?})")))
            } else {
                Err(format!("libgit2 {met} ({call:?})"))
            }
        };
        let nobody = |why: &str| Ok((Bites::Nobody, format!("withstood ({why})")));
        match shown {
            Shown::Neither(why) => nobody(why),
            Shown::FailsUnlessRoot(_) if privileged() => nobody("root passes every mode bit"),
            Shown::FailsIfRoot(_) if !privileged() => nobody("nobody but root makes a file immutable"),
            Shown::Unguarded(call, harm) => by_library(call, harm),
            by_git => {
                let w = planted();
                let met = met_by_git(by_git, &w);
                remove(&w);
                met.map(|how| (Bites::Git, format!("git {how}")))
            }
        }
    }
}

/// Removes what was only there to show something.
fn remove(w: &Where) {
    blocking::thaw(&w.project);
    let _ = fs::remove_dir_all(&w.project);
    let _ = fs::remove_dir_all(&w.outside);
}

/// What plain git does in an altered copy; why it does no harm where that is so.
fn met_by_git(shown: Shown, w: &Where) -> Result<&'static str, String> {
    let before = snapshot(&w.outside);
    let prepared = |line: &str| {
        let mut git = command(&w.project);
        git.args(line.replace("^1", &w.first).replace("^2", &w.second).split(' '));
        git
    };
    let run = |line: &str| bounded(prepared(line), Duration::from_secs(10));
    match shown {
        Shown::Changes(lines) => {
            let said: Vec<_> =
                lines.iter().map(|line| run(line).map(|output| crate::scene::text(&output.stderr))).collect();
            if snapshot(&w.outside) == before { Err(format!("{said:?}")) } else { Ok("changes what is outside") }
        }
        Shown::Reads => {
            let secret = git(&w.outside.join("victim"), &["rev-parse", "HEAD:secret"]);
            match run(&format!("cat-file -e {secret}")) {
                Some(output) if output.status.success() => Ok("reads what is outside"),
                _ => Err("it cannot be read".to_owned()),
            }
        }
        Shown::Obeys(line, told) => {
            let output = prepared(line).output().unwrap();
            let said = crate::scene::text(&output.stdout);
            if said.contains(told) { Ok("obeys what is outside") } else { Err(format!("git {line} says {said:?}")) }
        }
        Shown::Runs(line) => {
            run(line);
            if w.mark.exists() { Ok("runs the program") } else { Err("it does not run".to_owned()) }
        }
        Shown::Fails(line) | Shown::FailsUnlessRoot(line) | Shown::FailsIfRoot(line) => {
            match bounded(prepared(line), Duration::from_millis(500)) {
                None => Ok("hangs"),
                Some(output) if !output.status.success() => Ok("fails"),
                Some(_) => Err(format!("git {line} succeeds")),
            }
        }
        Shown::Unguarded(..) | Shown::Neither(_) => Err("not for git".to_owned()),
    }
}
