//! `haul topology` against a real broker: what it applies, and that the doctor finds each planted fault.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::{path::PathBuf, process::Command};

use haul::broker::{Broker, Consume, Topology};
use serde_json::{Value, json};
use support::{eventually, rabbit::Rabbit, unique};

/// The program, with a configuration of its own.
struct Haul {
    rabbit: &'static Rabbit,
    prefix: String,
    config: PathBuf,
}

/// How a run of the program ended.
struct Run {
    code: Option<i32>,
    out: String,
    err: String,
}

impl Haul {
    fn new(rabbit: &'static Rabbit, test: &str) -> Self {
        let prefix = unique(test);
        let config = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("{}-{prefix}.toml", std::process::id()));
        let haul = Self { rabbit, prefix, config };
        haul.configure(&rabbit.management_url, "");
        haul
    }

    fn configure(&self, management_url: &str, more: &str) {
        let (url, prefix) = (&self.rabbit.url, &self.prefix);
        let text =
            format!("prefix = {prefix:?}\n[broker]\nurls = [{url:?}]\nmanagement_url = {management_url:?}\n{more}\n");
        std::fs::write(&self.config, text).unwrap();
    }

    fn run(&self, arguments: &[&str]) -> Run {
        let mut command = Command::new(env!("CARGO_BIN_EXE_haul"));
        command.arg("--config").arg(&self.config).args(arguments).env_clear();
        let output = command.output().unwrap();
        Run {
            code: output.status.code(),
            out: String::from_utf8(output.stdout).unwrap(),
            err: String::from_utf8(output.stderr).unwrap(),
        }
    }

    fn apply(&self) {
        let run = self.run(&["topology", "apply", "--node", "a"]);
        assert_eq!(run.code, Some(0), "{}{}", run.out, run.err);
    }

    /// The exit code and the findings of the doctor that are worse than a note on the version or an idle queue.
    fn doctor(&self) -> (Option<i32>, Vec<Value>) {
        let run = self.run(&["topology", "doctor", "--node", "a", "--json"]);
        let findings: Vec<Value> = serde_json::from_str(&run.out).unwrap_or_else(|_| panic!("{}{}", run.out, run.err));
        let expected = |finding: &Value| {
            let problem = finding["problem"].as_str().unwrap();
            problem.contains("is recommended") || problem.contains("no agent consumes it")
        };
        (run.code, findings.into_iter().filter(|finding| !expected(finding)).collect())
    }

    /// The one finding, of this severity and on this subject.
    fn only(&self, severity: &str, subject: &str, problem: &str, mend: &str) {
        let subject = format!("{}.{subject}", self.prefix);
        let (code, findings) = self.doctor();
        assert_eq!(code, Some(i32::from(severity == "red")), "{findings:#?}");
        assert_eq!(findings.len(), 1, "{findings:#?}");
        let finding = &findings[0];
        let text = |name: &str| finding[name].as_str().unwrap();
        assert_eq!((text("severity"), text("subject")), (severity, subject.as_str()), "{finding:#}");
        assert!(text("problem").contains(problem) && text("mend").contains(mend), "{finding:#}");
    }

    /// Calls the management API.
    fn api(&self, method: &str, path: &str, body: Option<Value>) {
        let request = ureq::http::Request::builder()
            .method(method)
            .uri(format!("{}/api/{path}", self.rabbit.management_url))
            .header("authorization", "Basic Z3Vlc3Q6Z3Vlc3Q=")
            .header("content-type", "application/json")
            .body(body.map(|body| body.to_string()).unwrap_or_default())
            .unwrap();
        let status = ureq::run(request).unwrap().status();
        assert!(status.is_success(), "{method} {path}: {status}");
    }
}

impl Drop for Haul {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.config);
    }
}

#[test]
fn what_was_applied_is_healthy_and_applying_again_changes_nothing() {
    let haul = Haul::new(Rabbit::shared(), "green");
    let (code, findings) = haul.doctor();
    assert_eq!(code, Some(1));
    assert!(findings.iter().any(|finding| finding["mend"] == "haul topology apply --node a"), "{findings:#?}");
    haul.apply();
    assert_eq!(haul.doctor(), (Some(0), Vec::new()));
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
    haul.only("red", "event", "the exchange is missing", "haul topology apply");
    haul.apply();
    assert_eq!(haul.doctor().0, Some(0));
}

#[test]
fn a_missing_binding_is_found() {
    let haul = Haul::new(Rabbit::shared(), "binding");
    haul.apply();
    let prefix = &haul.prefix;
    haul.api("DELETE", &format!("bindings/%2F/e/{prefix}.event/q/{prefix}.master.event/%2A.%2A.failed"), None);
    haul.only("red", &format!("event → {prefix}.master.event"), "*.*.failed", "haul topology apply");
}

#[test]
fn a_queue_without_its_dead_letter_exchange_is_found() {
    let haul = Haul::new(Rabbit::shared(), "nodlx");
    haul.apply();
    let queue = format!("queues/%2F/{}.node.a", haul.prefix);
    haul.api("DELETE", &queue, None);
    let arguments = json!({"x-queue-type": "quorum", "x-single-active-consumer": true,
        "x-dead-letter-strategy": "at-least-once", "x-overflow": "reject-publish"});
    haul.api("PUT", &queue, Some(json!({"durable": true, "arguments": arguments})));
    for exchange in ["task", "return"] {
        let path = format!("bindings/%2F/e/{0}.{exchange}/q/{0}.node.a", haul.prefix);
        haul.api("POST", &path, Some(json!({"routing_key": "a"})));
    }
    haul.only("red", "node.a", "no dead-letter exchange", "delete_queue");
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
        let (code, findings) = haul.doctor();
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
    let (code, findings) = haul.doctor();
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
    eventually("both are listed", async || !haul.doctor().1.is_empty()).await;
    haul.only("yellow", "node.a", "it has 2 consumers", "close_connection");
}

#[test]
fn a_management_api_that_does_not_answer_is_said_and_how_to_enable_it() {
    let haul = Haul::new(Rabbit::shared(), "silent");
    haul.apply();
    haul.configure("http://127.0.0.1:9", "");
    let (code, findings) = haul.doctor();
    let found = |text: &str| findings.iter().any(|one| one["mend"].as_str().unwrap().contains(text));
    assert!(code == Some(0) && found("rabbitmq-plugins enable rabbitmq_management"), "{findings:#?}");
    // Without the API the commands are printed; where the version needs none, nothing is missing.
    let run = haul.run(&["topology", "apply", "--node", "a"]);
    assert!(run.code == Some(0) || run.out.contains("rabbitmqctl set_policy"), "{}{}", run.out, run.err);
}

#[test]
fn a_broker_that_is_down_is_one_sentence() {
    let haul = Haul::new(Rabbit::shared(), "down");
    std::fs::write(&haul.config, "[broker]\nurls = [\"amqp://u:canary@127.0.0.1:9/\"]\n").unwrap();
    let run = haul.run(&["topology", "doctor"]);
    assert_eq!(run.code, Some(3), "{}", run.err);
    assert!(run.err.starts_with("haul: ") && !run.err.contains("canary"), "{}", run.err);
}
