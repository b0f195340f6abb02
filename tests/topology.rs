//! `haul topology` against a real broker: what it applies, and that the doctor finds each planted fault.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use haul::broker::{Broker, Consume, Topology};
use serde_json::{Value, json};
use support::{command::Haul, eventually, rabbit::Rabbit};

/// The exit code and the findings of the doctor that are worse than a note on the version or an idle queue.
fn doctor(haul: &Haul) -> (Option<i32>, Vec<Value>) {
    let run = haul.run(&["topology", "doctor", "--node", "a", "--json"]);
    let findings: Vec<Value> = serde_json::from_value(run.json()).unwrap();
    let expected = |finding: &Value| {
        let problem = finding["problem"].as_str().unwrap();
        problem.contains("is recommended") || problem.contains("no agent consumes it")
    };
    (run.code, findings.into_iter().filter(|finding| !expected(finding)).collect())
}

/// The doctor has one finding, of this severity and on this subject.
fn only(haul: &Haul, severity: &str, subject: &str, problem: &str, mend: &str) {
    let subject = haul.name(subject);
    let (code, findings) = doctor(haul);
    assert_eq!(code, Some(i32::from(severity == "red")), "{findings:#?}");
    assert_eq!(findings.len(), 1, "{findings:#?}");
    let finding = &findings[0];
    let text = |name: &str| finding[name].as_str().unwrap();
    assert_eq!((text("severity"), text("subject")), (severity, subject.as_str()), "{finding:#}");
    assert!(text("problem").contains(problem) && text("mend").contains(mend), "{finding:#}");
}

#[test]
fn what_was_applied_is_healthy_and_applying_again_changes_nothing() {
    let haul = Haul::new(Rabbit::shared(), "green");
    let (code, findings) = doctor(&haul);
    assert_eq!(code, Some(1));
    assert!(findings.iter().any(|finding| finding["mend"] == "haul topology apply --node a"), "{findings:#?}");
    haul.apply();
    assert_eq!(doctor(&haul), (Some(0), Vec::new()));
    haul.apply();
    let plan = haul.run(&["topology", "plan", "--node", "a", "--json"]);
    let items: Vec<Value> = serde_json::from_str(&plan.out).unwrap();
    assert!(items.iter().all(|item| item["state"] == "equal"), "{}", plan.out);
    let policies = items.iter().filter(|item| item["what"] == "policy").count();
    let listed = haul.rabbit.ctl(&["list_policies", "--silent"]);
    assert_eq!(listed.lines().filter(|line| line.contains(&haul.prefix)).count(), policies);
}

#[test]
fn a_missing_exchange_is_found() {
    let haul = Haul::new(Rabbit::shared(), "exchange");
    haul.apply();
    haul.api("DELETE", &format!("exchanges/%2F/{}.event", haul.prefix), None);
    only(&haul, "red", "event", "the exchange is missing", "haul topology apply");
    haul.apply();
    assert_eq!(doctor(&haul).0, Some(0));
}

#[test]
fn a_missing_binding_is_found() {
    let haul = Haul::new(Rabbit::shared(), "binding");
    haul.apply();
    let prefix = &haul.prefix;
    haul.api("DELETE", &format!("bindings/%2F/e/{prefix}.event/q/{prefix}.master.event/%2A.%2A.failed"), None);
    only(&haul, "red", &format!("event → {prefix}.master.event"), "*.*.failed", "haul topology apply");
}

#[test]
fn a_queue_without_its_dead_letter_exchange_is_found() {
    let haul = Haul::new(Rabbit::shared(), "nodlx");
    haul.apply();
    haul.replace_queue(
        "node.a",
        &json!({"x-queue-type": "quorum", "x-single-active-consumer": true,
                "x-dead-letter-strategy": "at-least-once", "x-overflow": "reject-publish"}),
    );
    let mend = format!("haul topology migrate --queue {}", haul.name("node.a"));
    only(&haul, "red", "node.a", "no dead-letter exchange", &mend);
    let refused = haul.run(&["topology", "apply", "--node", "a"]);
    assert!(refused.code != Some(0) && refused.err.contains("haul topology doctor"), "{}", refused.err);
}

#[test]
fn a_delivery_limit_in_force_is_found() {
    let haul = Haul::new(Rabbit::shared(), "limit");
    haul.apply();
    let pattern = format!("^{}\\.dead$", haul.prefix.replace('.', "\\."));
    let name = format!("{}-foreign", haul.prefix);
    haul.rabbit.ctl(&["set_policy", "--priority", "90", &name, &pattern, r#"{"delivery-limit":7}"#]);
    // The statistics follow the change some seconds later.
    let begin = std::time::Instant::now();
    let problems = loop {
        let (code, findings) = doctor(&haul);
        if code == Some(1) || begin.elapsed() > support::PATIENCE {
            break findings.iter().map(|one| one["problem"].as_str().unwrap().to_owned()).collect::<Vec<_>>();
        }
    };
    assert!(problems.iter().any(|problem| problem.contains("a delivery limit of 7 is in force")), "{problems:#?}");
    let warned = haul.run(&["dead", "list"]);
    assert!(warned.code == Some(0) && warned.err.contains("a delivery limit of 7"), "{}", warned.err);
    haul.rabbit.ctl(&["clear_policy", &name]);
}

#[test]
fn a_timeout_shorter_than_the_longest_deadline_is_found() {
    let haul = Haul::new(Rabbit::shared(), "timeout");
    haul.apply();
    haul.configure(&haul.rabbit.management_url, "consumer_timeout = \"10m\"\n[git]\nmax_timeout = \"2h\"");
    let (code, findings) = doctor(&haul);
    let found =
        findings.iter().any(|one| one["problem"].as_str().unwrap().contains("shorter than the longest deadline"));
    assert!(code == Some(1) && found, "{findings:#?}");
}

#[tokio::test]
async fn a_second_consumer_is_found() {
    let haul = Haul::new(Rabbit::shared(), "ghost");
    haul.apply();
    let (first, second) = (haul.rabbit.client().await, haul.rabbit.client().await);
    let consume = |tag: &str| Consume {
        queue: format!("{}.node.a", haul.prefix),
        tag: tag.to_owned(),
        prefetch: 1,
        declare: Topology::default(),
    };
    let _one = first.consume(consume("one")).await.unwrap();
    let _two = second.consume(consume("two")).await.unwrap();
    // The API's list follows some seconds later.
    eventually("both are listed", async || !doctor(&haul).1.is_empty()).await;
    only(&haul, "yellow", "node.a", "it has 2 consumers", "close_connection");
}

#[test]
fn a_management_api_that_does_not_answer_is_said_and_how_to_enable_it() {
    let haul = Haul::new(Rabbit::shared(), "silent");
    haul.apply();
    haul.configure("http://127.0.0.1:9", "");
    let (code, findings) = doctor(&haul);
    let found = |text: &str| findings.iter().any(|one| one["mend"].as_str().unwrap().contains(text));
    assert!(code == Some(0) && found("rabbitmq-plugins enable rabbitmq_management"), "{findings:#?}");
    // Without the API the commands are printed; where the version needs none, nothing is missing.
    let run = haul.run(&["topology", "apply", "--node", "a"]);
    assert!(run.code == Some(0) || run.out.contains("rabbitmqctl set_policy"), "{}{}", run.out, run.err);
}

#[test]
fn a_broker_that_is_down_is_one_sentence() {
    let haul = Haul::new(Rabbit::shared(), "down");
    haul.write("[broker]\nurls = [\"amqp://u:canary@127.0.0.1:9/\"]\n");
    let run = haul.run(&["topology", "doctor"]);
    assert_eq!(run.code, Some(3), "{}", run.err);
    assert!(run.err.starts_with("haul: ") && !run.err.contains("canary"), "{}", run.err);
}
