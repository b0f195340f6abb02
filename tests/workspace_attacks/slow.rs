//! A disk that is slow because others write to it is no fault of the workspace.

use std::{fs, time::Duration};

use haul::{execute::Execute, git::Run};
use serde_json::json;
use tokio_util::sync::CancellationToken;

use crate::{
    scene::{Always, Scene, open, program},
    trace::under_strace,
};

/// Longer than what is waited for without a sign of life.
const STALL: Duration = Duration::from_secs(2);
const SYNC: Duration = Duration::from_secs(4);

pub(crate) async fn run() {
    let mut scene = Scene::new(false).await;
    scene.clone(1, "p").await.unwrap();
    let project = scene.behind("p");
    // The kernel writes what others have left to write, too, before `syncfs` returns.
    let script = scene.path("slow.sh");
    let delay = format!("-o /dev/null -e trace=syncfs -e inject=syncfs:delay_enter={}", SYNC.as_micros());
    under_strace(&script, &delay, &program());
    scene.executor = open(&scene.storage(), script).await;
    let job = scene.job("pull", 1, &json!({}));
    let run = Run {
        deadline: tokio::time::Instant::now() + Duration::from_mins(1),
        stall: STALL,
        cancel: CancellationToken::new(),
        progress: &|_| (),
        fence: &Always,
    };
    let begun = std::time::Instant::now();
    let pulled = scene.executor.execute(&job, &run).await.unwrap();
    assert_eq!(pulled.updated, Some(true));
    assert!(begun.elapsed() > SYNC, "nothing was slow");
    assert_eq!(fs::read_to_string(project.join("a.txt")).unwrap(), "two\n");
}
