//! What is going on when a fault comes, and what must have become of it.

use std::time::{Duration, Instant};

use haul::protocol::Status;
use serde_json::json;

use crate::{
    githttp::{Behaviour, Server, Upstream},
    support::{
        agent::Agent,
        eventually,
        proxy::Proxy,
        rabbit::Rabbit,
        repository::{Repository, assert_whole},
    },
};

/// An agent with a clone that runs, held by its upstream, and a status task that waits behind it.
pub(crate) struct Scene {
    pub(crate) agent: Agent,
    pub(crate) upstream: Server,
    pub(crate) head: String,
    pub(crate) other: Repository,
    pub(crate) queue: String,
    _repository: Upstream,
}

impl Scene {
    pub(crate) async fn begin(rabbit: &Rabbit, proxy: Option<&Proxy>) -> Self {
        let repository = Upstream::new();
        let head = repository.commit("main", &[("a.txt", "hello\n")]);
        let upstream = Server::start(repository.root());
        upstream.behave(Behaviour::HoldPack);
        let mut agent = Agent::new(rabbit).await;
        agent.set("AGENT_SLOTS", "4");
        if let Some(proxy) = proxy {
            agent.set("AGENT_AMQP_URL", &proxy.url);
        }
        agent.start(&[]);
        agent.ready().await;
        let clone = json!({"v": 1, "task_id": "held", "kind": "clone", "project_id": 1,
                           "git_url": upstream.url("app.git"), "target_path": "1_app"});
        agent.publish(&clone).await;
        eventually("the clone waits for its pack", async || upstream.counts().packs == 1).await;
        agent.publish(&Agent::task("behind", "status", 1)).await;
        agent.saw("behind", Status::Accepted).await;
        let queue = agent.names.node(agent.node());
        Self { agent, upstream, head, other: Repository::new(), queue, _repository: repository }
    }

    /// A task that is published now ends within `limit` of `since`.
    #[expect(clippy::print_stdout, reason = "the time it took is a figure that people ask for")]
    pub(crate) async fn consumes_within(&self, limit: Duration, since: Instant) {
        let id = format!("probe-{}", self.agent.all_events().len());
        self.agent.publish(&Agent::clone_task(&id, 2, &self.other, "2_app")).await;
        let end = self.agent.end(&id, 0).await;
        let took = since.elapsed();
        println!("consuming again after {took:?}");
        assert_eq!(end.status, Status::Succeeded, "{end:?}");
        assert!(took < limit, "it took {took:?}; the agent's log:\n{}", self.agent.log());
    }

    /// Everything ends once, was executed once, by the process that was there from the beginning, and nothing is left.
    pub(crate) async fn ends(mut self) {
        self.upstream.behave(Behaviour::Serve);
        for id in ["held", "behind"] {
            let end = self.agent.end(id, 0).await;
            assert_eq!(end.status, Status::Succeeded, "{end:?}");
        }
        assert_whole(&self.agent.projects().join("1_app"), &self.head);
        self.agent.drained().await;
        assert!(self.agent.is_running(), "{}", self.agent.log());
        self.agent.signal(rustix::process::Signal::TERM);
        assert!(self.agent.ended().await.success(), "{}", self.agent.log());
        // What had not been acknowledged would be ready again now.
        self.agent.drained().await;
        self.agent.each_ended_once();
        let mut starts: Vec<_> =
            self.agent.events("held").into_iter().filter(|event| event.status == Status::Started).collect();
        starts.dedup_by(|a, b| a.event_id == b.event_id);
        assert_eq!(starts.len(), 1, "{starts:?}");
        assert_eq!(self.upstream.counts().packs, 1);
    }
}
