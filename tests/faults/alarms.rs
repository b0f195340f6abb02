//! Alarms of the broker: it takes no messages, and acks still count.

use std::time::Instant;

use crate::{CONSUMING_AGAIN, alone, blocking, githttp::Behaviour, scene::Scene, support::eventually};

/// A task ends while the alarm that `raise` raises is in force, and is told of once `clear` has cleared it.
async fn an_alarm_while_tasks_end(raise: &'static [&'static str], clear: &'static [&'static str]) {
    let (_alone, rabbit) = alone().await;
    let scene = Scene::begin(rabbit, None).await;
    blocking(|| rabbit.ctl(raise)).await;
    // What it publishes when the clone ends is what blocks its connection.
    scene.upstream.behave(Behaviour::Serve);
    let project = scene.agent.projects().join("1_app/a.txt");
    eventually("the clone is done", async || project.exists()).await;
    scene.agent.until_async("the alarm to be seen", async || scene.agent.log().contains("has an alarm")).await;
    assert!(scene.agent.terminal_states("held", 0).is_empty());
    blocking(|| rabbit.ctl(clear)).await;
    scene.consumes_within(CONSUMING_AGAIN, Instant::now()).await;
    scene.ends().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_memory_alarm_while_tasks_end() {
    let (raise, clear) = (&["set_vm_memory_high_watermark", "0.00001"], &["set_vm_memory_high_watermark", "0.4"]);
    an_alarm_while_tasks_end(raise, clear).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_alarm_while_tasks_end() {
    // More than any disk has.
    let (raise, clear) = (&["set_disk_free_limit", "900000GB"], &["set_disk_free_limit", "1MB"]);
    an_alarm_while_tasks_end(raise, clear).await;
}
