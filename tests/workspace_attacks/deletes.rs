//! Deletes, which the agent does itself: it is started anew under a tracer.

use std::{fs, process::Command};

use crate::{
    altered, blocking,
    scene::{Scene, assert_untouched, execute, job, open, program, snapshot},
    table::Payload,
    trace,
};

/// Where the traced process finds the projects.
const STORAGE: &str = "HAUL_TEST_DELETES";

pub(crate) fn run() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    if let Some(storage) = std::env::var_os(STORAGE) {
        return runtime.block_on(delete_all(std::path::Path::new(&storage)));
    }
    let scene = runtime.block_on(Scene::new(false));
    // What would lead a careless removal astray, all in a few projects.
    let chosen: Vec<&Payload> = altered::PAYLOADS
        .iter()
        .filter(|payload| payload.name.contains("link"))
        .chain(blocking::PAYLOADS.iter().filter(|payload| payload.name.contains("without an end")))
        .collect();
    let before = snapshot(&scene.outside());
    for (number, payload) in chosen.iter().enumerate() {
        let (id, name) = (i64::try_from(number).unwrap() + 1, format!("p{number}"));
        runtime.block_on(scene.clone(id, &name)).unwrap();
        scene.behind(&name);
        payload.plant_in(&scene, &name);
    }
    let before_planted = snapshot(&scene.outside());
    drop(before);
    let trace = scene.path("deletes.trace");
    let output = Command::new("strace")
        .args(["-f", "-qq", "-y", "--seccomp-bpf", "-e", "signal=none", "-e"])
        .arg(format!("trace={}", trace::TRACED))
        .arg("-o")
        .arg(&trace)
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "a_delete_of_altered_projects_touches_nothing_else", "--nocapture"])
        .env(STORAGE, scene.storage())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let traced = trace::parse(&fs::read_to_string(&trace).unwrap());
    assert!(traced.executed.is_empty(), "a delete executed {:?}", traced.executed);
    assert!(traced.sockets.iter().all(|call| !call.contains("AF_INET")), "{:?}", traced.sockets);
    let stray: Vec<_> = traced.written.iter().filter(|path| !path.starts_with(scene.storage())).collect();
    assert!(stray.is_empty(), "a delete wrote {stray:?}");
    assert!(traced.written.len() > chosen.len() * 20, "the trace is too short to be one of {} deletes", chosen.len());
    assert_untouched(&before_planted, &snapshot(&scene.outside()), "deleting");
    let left: Vec<_> =
        fs::read_dir(scene.storage().join("projects")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, [".haul"], "projects stand after their deletes");
    println!("{} altered projects deleted under a tracer, {} changes seen", chosen.len(), traced.written.len());
}

async fn delete_all(storage: &std::path::Path) {
    let executor = open(storage, program()).await;
    let projects = fs::read_dir(storage.join("projects")).unwrap();
    let count = projects.filter(|entry| entry.as_ref().unwrap().file_name() != ".haul").count();
    for id in 1..=i64::try_from(count).unwrap() {
        execute(&executor, &job(1000 + id, "delete", id, &serde_json::json!({}))).await.unwrap();
    }
}
