//! The program against a broker, under a prefix of a test's own, and the broker's management API.

use std::{
    path::PathBuf,
    process::{Command, Output},
};

use serde_json::{Value, json};

use super::{rabbit::Rabbit, unique};

/// The program, with a configuration of its own.
pub(crate) struct Haul {
    pub(crate) rabbit: &'static Rabbit,
    pub(crate) prefix: String,
    config: PathBuf,
}

/// How a run of the program ended.
#[derive(Debug)]
pub(crate) struct Run {
    /// Nothing where a signal ended it.
    pub(crate) code: Option<i32>,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl From<Output> for Run {
    fn from(output: Output) -> Self {
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        Self { code: output.status.code(), out: text(output.stdout), err: text(output.stderr) }
    }
}

impl Run {
    /// The run, if it ended with this code.
    #[track_caller]
    pub(crate) fn ended(self, code: i32) -> Self {
        assert_eq!(self.code, Some(code), "{}{}", self.out, self.err);
        self
    }

    /// What it printed as one line of JSON.
    #[track_caller]
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.out).unwrap_or_else(|_| panic!("{}{}", self.out, self.err))
    }
}

impl Haul {
    pub(crate) fn new(rabbit: &'static Rabbit, test: &str) -> Self {
        let prefix = unique(test);
        let config = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("{}-{prefix}.toml", std::process::id()));
        let haul = Self { rabbit, prefix, config };
        haul.configure(&rabbit.management_url, "");
        haul
    }

    /// Writes its configuration.
    pub(crate) fn configure(&self, management_url: &str, more: &str) {
        let (url, prefix) = (&self.rabbit.url, &self.prefix);
        self.write(&format!(
            "prefix = {prefix:?}\n[broker]\nurls = [{url:?}]\nmanagement_url = {management_url:?}\n{more}\n"
        ));
    }

    /// Replaces its configuration.
    pub(crate) fn write(&self, text: &str) {
        std::fs::write(&self.config, text).unwrap();
    }

    /// A command of the program.
    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_haul"));
        command.arg("--config").arg(&self.config).args(arguments).env_clear();
        command
    }

    pub(crate) fn run(&self, arguments: &[&str]) -> Run {
        self.command(arguments).output().unwrap().into()
    }

    /// Has everything made for the node `a`.
    pub(crate) fn apply(&self) {
        self.run(&["topology", "apply", "--node", "a"]).ended(0);
    }

    /// A name under the prefix.
    pub(crate) fn name(&self, rest: &str) -> String {
        format!("{}.{rest}", self.prefix)
    }

    /// Calls the management API.
    pub(crate) fn api(&self, method: &str, path: &str, body: Option<Value>) -> Value {
        self.rabbit.api(method, path, body)
    }

    /// Puts a queue with these arguments in the place of another, and binds it where that one is bound.
    pub(crate) fn replace_queue(&self, queue: &str, arguments: &Value) {
        let name = self.name(queue);
        let bindings = self.api("GET", &format!("queues/%2F/{name}/bindings"), None);
        self.api("DELETE", &format!("queues/%2F/{name}"), None);
        self.api("PUT", &format!("queues/%2F/{name}"), Some(json!({"durable": true, "arguments": arguments})));
        for binding in bindings.as_array().unwrap().iter().filter(|binding| binding["source"] != "") {
            let path = format!("bindings/%2F/e/{}/q/{name}", binding["source"].as_str().unwrap());
            self.api("POST", &path, Some(json!({"routing_key": binding["routing_key"]})));
        }
    }
}

impl Drop for Haul {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.config);
    }
}

impl Rabbit {
    /// Calls the management API as the administrator; null for an empty answer.
    pub(crate) fn api(&self, method: &str, path: &str, body: Option<Value>) -> Value {
        let request = ureq::http::Request::builder()
            .method(method)
            .uri(format!("{}/api/{path}", self.management_url))
            .header("authorization", "Basic Z3Vlc3Q6Z3Vlc3Q=")
            .header("content-type", "application/json")
            .body(body.map(|body| body.to_string()).unwrap_or_default())
            .unwrap();
        let mut response = ureq::run(request).unwrap();
        assert!(response.status().is_success(), "{method} {path}: {}", response.status());
        let text = response.body_mut().read_to_string().unwrap();
        if text.is_empty() { Value::Null } else { serde_json::from_str(&text).unwrap() }
    }
}
