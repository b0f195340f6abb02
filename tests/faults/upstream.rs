//! Here it is the upstream that is away.

use haul::protocol::Status;
use serde_json::json;

use crate::{
    githttp::{Server, Upstream},
    support::{agent::Agent, eventually, repository::assert_whole},
    together,
};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tasks_of_a_dead_host_wait_uncharged_and_a_probe_finds_it_back() {
    let (_together, rabbit) = together().await;
    let upstream = Upstream::new();
    let head = upstream.commit("main", &[("a.txt", "hello\n")]);
    let mut agent = Agent::new(rabbit).await;
    for (name, value) in
        [("AGENT_RETRY__MAX_ATTEMPTS", "3"), ("AGENT_GIT__BREAKER_AFTER", "2"), ("AGENT_GIT__BREAKER_PAUSE", "1s")]
    {
        agent.set(name, value);
    }
    agent.start(&[]);
    agent.ready().await;
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let clone = |id: &str, project: i64, url: &str| {
        json!({"v": 1, "task_id": id, "kind": "clone", "project_id": project, "git_url": url,
            "target_path": format!("{project}_app")})
    };
    agent.publish(&clone("dead", 1, &format!("http://localhost:{port}/app.git"))).await;
    let retries =
        || agent.events("dead").into_iter().filter(|event| event.status == Status::Retrying).collect::<Vec<_>>();
    // More often than it has attempts.
    eventually("it was put off four times", async || retries().len() >= 4).await;
    let attempts: Vec<_> = retries().iter().map(|event| event.attempt).collect();
    assert!(attempts.iter().all(|&attempt| attempt <= 2), "{attempts:?}");
    assert_eq!(agent.terminal_states("dead", 0), []);
    agent.control(&json!({"v": 1, "command": "inspect", "control_id": "c"})).await;
    let hosts = agent.answered("state").await.hosts.unwrap();
    assert_eq!((hosts[0].host.as_str(), hosts[0].paused.as_deref()), ("localhost", Some("down")));
    // Another host, here another port, is as quick as ever.
    let alive = Server::start(upstream.root());
    agent.publish(&clone("alive", 2, &alive.url("app.git"))).await;
    assert_eq!(agent.end("alive", 0).await.status, Status::Succeeded);
    let back = Server::start_at(upstream.root(), port);
    let end = agent.end("dead", 0).await;
    assert_eq!((end.status, end.attempt), (Status::Succeeded, 2), "{}", agent.log());
    assert_whole(&agent.projects().join("1_app"), &head);
    assert!(back.counts().packs == 1 && agent.log().contains("the host is back"), "{}", agent.log());
}
