//! A master on a real RabbitMQ, with a real agent.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use haul::{
    broker::{Broker, Health, Names},
    master::{
        Client, ClientSettings, Ignored, Mend, News, Patience, Projection, Reconciler, ReconcilerSettings, Results,
        Submission, TaskChange, Unpublished, Why,
    },
    protocol::{Control, Event, NodeName, ProjectStatus, Status},
};
use jiff::Timestamp;

use crate::{
    node,
    support::{agent::Agent, eventually, rabbit::Rabbit, repository::Repository, soon, unique},
};

/// A master of its own beside the one that the agent's test support is.
struct Master {
    client: Client,
    results: Results,
    projection: Projection,
    heard: Vec<Event>,
    node: NodeName,
}

impl Master {
    async fn of(agent: &Agent) -> Self {
        let results_queue = Some(format!("{}.mine", agent.names.prefix()));
        let settings = ClientSettings { results_queue, ..ClientSettings::default() };
        let client = Client::new(agent.master.clone(), agent.names.clone(), settings);
        client.declare().await.unwrap();
        let results = client.results().await.unwrap();
        Self { client, results, projection: Projection::new(), heard: Vec::new(), node: agent.node().clone() }
    }

    async fn publish(&mut self, task: &Submission) {
        self.projection.want(&self.node, task, Timestamp::now());
        self.client.publish(&self.node, task).await.unwrap();
        self.projection.confirm(task.task_id(), Timestamp::now());
    }

    /// Applies what comes until the task has ended.
    async fn end(&mut self, task: &Submission) -> Status {
        loop {
            if let Some(row) = self.projection.task(task.task_id()).filter(|row| row.is_done()) {
                return row.status().unwrap();
            }
            self.hear().await;
        }
    }

    async fn hear(&mut self) -> Option<TaskChange> {
        let received = tokio::time::timeout(Duration::from_mins(1), self.results.next()).await.unwrap().unwrap();
        let mut change = None;
        if let News::Event(event) = &received.news {
            change = Some(self.projection.apply(event).task);
            self.heard.push((**event).clone());
        }
        let _ = received.ack().await;
        change
    }

    /// What is said of a task at once.
    async fn explained(&self, task: &Submission) -> haul::master::Stuck {
        let settings = ReconcilerSettings {
            patience: Patience { quiet: Duration::ZERO, ..Patience::default() },
            answer_within: Duration::from_secs(15),
            ..ReconcilerSettings::default()
        };
        let reconciler = Reconciler::new(self.client.clone(), settings);
        let row = self.projection.task(task.task_id()).unwrap();
        soon("a diagnosis", reconciler.reconcile([row], Timestamp::now())).await.unwrap().remove(0)
    }
}

#[tokio::test]
async fn what_a_master_believes_of_a_real_agent_is_what_is_on_its_disk() {
    let upstream = Repository::new();
    let mut agent = Agent::new(Rabbit::shared()).await;
    agent.start(&[]);
    agent.ready().await;
    let mut master = Master::of(&agent).await;
    let clone = Submission::clone(7, upstream.url(), "7_app").build().unwrap();
    master.publish(&clone).await;
    assert_eq!(master.end(&clone).await, Status::Succeeded);
    let missing = Submission::clone(8, format!("{}-missing", upstream.url()), "8_app").build().unwrap();
    let (pull, status) = (Submission::pull(7).build().unwrap(), Submission::status(7).build().unwrap());
    for task in [&missing, &pull, &status] {
        master.publish(task).await;
    }
    assert_eq!(master.end(&missing).await, Status::Failed);
    assert_eq!(master.end(&pull).await, Status::Succeeded);
    assert_eq!(master.end(&status).await, Status::Succeeded);

    let project = |master: &Master, id| master.projection.project(&node("n1"), id).cloned().unwrap();
    let here = project(&master, 7);
    let head = crate::support::repository::git(&agent.projects().join("7_app"), &["rev-parse", "HEAD"]);
    assert_eq!(here.status(), Some(ProjectStatus::Active));
    assert_eq!(here.place().unwrap().head.as_deref(), Some(head.trim()));
    assert_eq!(project(&master, 8).status(), Some(ProjectStatus::Error));
    assert!(project(&master, 8).error().is_some() && !agent.projects().join("8_app").exists());

    // Published again it is a duplicate: answered, not done.
    master.client.publish(&node("n1"), &clone).await.unwrap();
    while master.hear().await != Some(TaskChange::Nothing(Ignored::Again)) {}

    let delete = Submission::delete(7).build().unwrap();
    master.publish(&delete).await;
    assert_eq!(master.end(&delete).await, Status::Succeeded);
    assert_eq!(project(&master, 7).status(), Some(ProjectStatus::Deleted));
    assert!(!agent.projects().join("7_app").exists());

    // The same events backwards, each twice.
    let mut again = Projection::new();
    for event in master.heard.iter().rev().flat_map(|event| [event, event]) {
        again.apply(event);
    }
    for row in master.projection.tasks() {
        assert_eq!(again.task(row.task_id()).unwrap().latest(), row.latest());
    }
    for row in master.projection.projects() {
        let other = again.project(row.node(), row.project_id()).unwrap();
        assert_eq!((other.status(), other.place(), other.error()), (row.status(), row.place(), row.error()));
    }
}

#[tokio::test]
async fn a_reconciler_tells_a_paused_a_stopped_and_a_vanished_agent_apart() {
    let upstream = Repository::new();
    let mut agent = Agent::new(Rabbit::shared()).await;
    agent.start(&[]);
    agent.ready().await;
    let mut master = Master::of(&agent).await;
    let (n1, queue) = (node("n1"), agent.names.node(agent.node()));
    let consumers = async |wanted: u32| {
        eventually("the consumers are so many", async || {
            agent.master.depth(&queue).await.unwrap().is_some_and(|depth| depth.consumers == wanted)
        })
        .await;
    };
    assert_eq!(master.client.tell(&n1, Control::Pause).await.unwrap().answer, "paused");
    consumers(0).await;
    let task = Submission::clone(7, upstream.url(), "7_app").build().unwrap();
    master.publish(&task).await;
    assert_eq!(master.explained(&task).await.why, Why::Paused);
    agent.kill().await;
    eventually("the node is down", async || matches!(master.explained(&task).await.why, Why::NodeDown { waiting: 1 }))
        .await;
    // A pause survives a restart.
    agent.start(&[]);
    eventually("the pause is known again", async || master.explained(&task).await.why == Why::Paused).await;
    assert_eq!(master.client.tell(&n1, Control::Resume).await.unwrap().answer, "resumed");
    assert_eq!(master.end(&task).await, Status::Succeeded);

    // Its end is not heard by this master: asked for by publishing the same task again.
    let mut deaf = Projection::new();
    deaf.want(&n1, &task, Timestamp::now());
    deaf.confirm(task.task_id(), Timestamp::now());
    std::mem::swap(&mut master.projection, &mut deaf);
    let begun = Instant::now();
    loop {
        // The agent may still be at it, and events that nothing waits for may come after the end.
        let stuck = master.explained(&task).await;
        match stuck.why {
            Why::Lost | Why::EndMissed => break assert_eq!(stuck.mend, Mend::PublishAgain),
            Why::EventsUnread { .. } => drop(master.hear().await),
            why => assert!(begun.elapsed() < Duration::from_secs(20), "{why}"),
        }
    }
    master.publish(&task).await;
    assert_eq!(master.end(&task).await, Status::Succeeded);
}

/// A fleet of one node on a real broker, without an agent.
async fn fleet(rabbit: &Rabbit, test: &str) -> (Client, Arc<dyn Broker>, String) {
    let names = Names::new(unique(test));
    let broker: Arc<dyn Broker> = Arc::new(rabbit.client().await);
    let client = Client::new(Arc::clone(&broker), names.clone(), ClientSettings::default());
    soon("the topology", client.declare()).await.unwrap();
    soon("the node", broker.declare(&names.node_topology(&node("n1")))).await.unwrap();
    (client, broker, names.node(&node("n1")))
}

#[tokio::test]
async fn on_a_real_broker_a_node_that_is_not_enrolled_is_an_error_at_once_among_many() {
    let (client, broker, queue) = fleet(Rabbit::shared(), "batch").await;
    let tasks = (0..1000).map(|number| {
        let to = if number % 100 == 50 { "nobody" } else { "n1" };
        (node(to), Submission::status(number).build().unwrap())
    });
    let begun = Instant::now();
    let answers = soon("the batch", client.publish_all(tasks)).await;
    for (number, answer) in answers.iter().enumerate() {
        let unenrolled = matches!(answer, Err(Unpublished::NotEnrolled { node }) if node.as_str() == "nobody");
        assert_eq!(unenrolled, number % 100 == 50, "{number}: {answer:?}");
        assert_eq!(answer.is_ok(), number % 100 != 50, "{number}: {answer:?}");
    }
    assert!(begun.elapsed() < ClientSettings::default().deadline, "not by running into deadlines");
    eventually("all are there", async || broker.depth(&queue).await.unwrap().unwrap().messages == 990).await;
}

#[tokio::test]
async fn with_the_real_broker_away_nothing_is_sent_within_the_deadline_nor_later() {
    let rabbit = Rabbit::start(&[]);
    let (client, broker, queue) = fleet(&rabbit, "away").await;
    client.publish(&node("n1"), &Submission::status(1).build().unwrap()).await.unwrap();
    rabbit.ctl(&["stop_app"]);
    let mut health = broker.health();
    soon("the loss is noticed", health.wait_for(|health| *health == Health::Down)).await.unwrap();
    let within = Duration::from_secs(2);
    let begun = Instant::now();
    let given_up: Vec<_> = (0..20).map(|number| Submission::status(number).build().unwrap()).collect();
    let n1 = node("n1");
    let publishing = given_up.iter().map(|task| client.publish_within(&n1, task, within));
    for answer in futures_util::future::join_all(publishing).await {
        assert!(matches!(answer, Err(Unpublished::NotSent { .. })), "{answer:?}");
    }
    assert!(begun.elapsed() < within + Duration::from_secs(2), "{:?}", begun.elapsed());
    rabbit.ctl(&["start_app"]);
    // Whatever else is on its way on any channel comes before these.
    let more = (0..16).map(|number| (n1.clone(), Submission::status(number).build().unwrap()));
    let patient = ClientSettings { deadline: Duration::from_mins(1), ..ClientSettings::default() };
    let answers = Client::new(Arc::clone(&broker), client.names().clone(), patient).publish_all(more).await;
    assert!(answers.iter().all(Result::is_ok), "{answers:?}");
    assert_eq!(broker.depth(&queue).await.unwrap().unwrap().messages, 17);
}
