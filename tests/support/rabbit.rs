//! A private RabbitMQ for a test binary, by `scripts/rabbitmq`.

use std::{
    path::{Path, PathBuf},
    process::{Command, Output},
    sync::{
        OnceLock,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use haul::broker::{rabbitmq::RabbitMq, settings::BrokerSettings};
use secrecy::SecretString;

/// A running node; it ends when dropped, and in any case with this process.
pub(crate) struct Rabbit {
    directory: PathBuf,
    /// Its plain address.
    pub(crate) url: String,
    /// The address of its management API.
    pub(crate) management_url: String,
}

impl Rabbit {
    /// The node that all tests of this binary share.
    pub(crate) fn shared() -> &'static Self {
        static SHARED: OnceLock<Option<Rabbit>> = OnceLock::new();
        let shared = SHARED.get_or_init(|| std::panic::catch_unwind(|| Self::start(&[])).ok());
        shared.as_ref().expect("the node started; the first test that wanted it says why not")
    }

    /// A node of one's own, of the version under test, with these lines of configuration.
    ///
    /// # Panics
    /// If it cannot be started: a test that needs the broker fails without it.
    pub(crate) fn start(configuration: &[&str]) -> Self {
        Self::start_in(Self::directory(), configuration)
    }

    /// A directory for a node; files for it must lie there, since it may see nothing else.
    pub(crate) fn directory() -> PathBuf {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("rabbit-{}-{count}", std::process::id()));
        // An earlier process that had our id and was killed may have left its own; its node ended with it.
        let _ = std::fs::remove_dir_all(&directory);
        directory
    }

    /// A node in a directory of [`Rabbit::directory`].
    pub(crate) fn start_in(directory: PathBuf, configuration: &[&str]) -> Self {
        Self::launch(directory, configuration, &[])
    }

    /// A node of one's own with these plugins beside management.
    pub(crate) fn start_with_plugins(plugins: &str) -> Self {
        Self::launch(Self::directory(), &[], &["--plugins", &format!("rabbitmq_management,{plugins}")])
    }

    /// A node that ends with another process than this one.
    #[allow(dead_code, reason = "for the test that looks at such an end")]
    pub(crate) fn start_owned_by(process: u32) -> Self {
        Self::launch(Self::directory(), &[], &["--owner", &process.to_string()])
    }

    fn launch(directory: PathBuf, configuration: &[&str], options: &[&str]) -> Self {
        let mut command = starting(&directory);
        command.args(options);
        for line in configuration {
            command.args(["--conf", line]);
        }
        run(command);
        Self::started_in(directory)
    }

    /// The node that the script has started in a directory; it ends with the value.
    pub(crate) fn started_in(directory: PathBuf) -> Self {
        let env = std::fs::read_to_string(directory.join("env")).expect("the script wrote what it started");
        let value = |name: &str| {
            let line = env.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
            line.unwrap_or_else(|| panic!("{name} is missing in {env}")).to_owned()
        };
        Self { url: value("AMQP_URL"), management_url: value("MANAGEMENT_URL"), directory }
    }

    /// Ends the node as a power cut would, but with what it knows of its queues on disk.
    pub(crate) fn kill(&self) {
        let mut kill = script("kill", &self.directory);
        kill.arg("--synced");
        run(kill);
        self.has_let_go();
    }

    /// Ends the node as a power cut would, whatever it has on disk; for a node of a cluster, whose others know the rest.
    pub(crate) fn crash(&self) {
        run(script("kill", &self.directory));
        self.has_let_go();
    }

    /// A process that was killed holds its ports until its last thread has ended, and a restart would find them taken.
    fn has_let_go(&self) {
        let refused = std::net::TcpStream::connect(self.address()).is_err();
        assert!(refused, "a node that was killed still listens on {}", self.address());
    }

    /// Where its logs are.
    #[allow(dead_code, reason = "for those who look at a broker that went wrong")]
    pub(crate) fn log(&self) -> PathBuf {
        self.directory.join("log")
    }

    /// Its name in the cluster.
    pub(crate) fn name(&self) -> String {
        let env = std::fs::read_to_string(self.directory.join("env")).unwrap();
        env.lines().find_map(|line| line.strip_prefix("NODENAME=")).unwrap().to_owned()
    }

    /// The address it listens on, as `host:port`.
    pub(crate) fn address(&self) -> String {
        self.url.rsplit(['@', '/']).nth(1).unwrap().to_owned()
    }

    /// Starts it again on the same data and ports, stopping it first if it runs.
    pub(crate) fn restart(&self) {
        run(script("restart", &self.directory));
    }

    /// `rabbitmqctl`; what it prints.
    pub(crate) fn ctl(&self, arguments: &[&str]) -> String {
        let mut command = script("ctl", &self.directory);
        command.args(arguments);
        String::from_utf8_lossy(&run(command).stdout).into_owned()
    }

    /// Takes an exchange away, with whatever is bound to it.
    pub(crate) fn delete_exchange(&self, name: &str) {
        let delete = format!(
            "ok = rabbit_exchange:delete(rabbit_misc:r(<<\"/\">>, exchange, <<\"{name}\">>), false, <<\"test\">>)."
        );
        self.ctl(&["eval", &delete]);
    }

    /// Settings for it.
    pub(crate) fn settings(&self) -> BrokerSettings {
        BrokerSettings {
            urls: vec![SecretString::from(self.url.clone())],
            confirm_timeout: Duration::from_secs(15),
            ..BrokerSettings::default()
        }
    }

    /// A client of it.
    pub(crate) async fn client(&self) -> RabbitMq {
        RabbitMq::connect(&self.settings(), "haul test").await.expect("the settings are right")
    }
}

impl Drop for Rabbit {
    fn drop(&mut self) {
        let _ = script("stop", &self.directory).arg("--now").output();
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

/// What starts one or more nodes of the version under test in a directory.
pub(super) fn starting(directory: &Path) -> Command {
    let version = std::env::var("HAUL_TEST_BROKER").unwrap_or_else(|_| "3.10".to_owned());
    let mut command = script("start", directory);
    command.args(["--version", &version, "--owner", &std::process::id().to_string()]);
    command
}

pub(super) fn script(verb: &str, directory: &Path) -> Command {
    let mut command = Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/rabbitmq"));
    command.arg(verb).arg(directory);
    command
}

pub(super) fn run(mut command: Command) -> Output {
    let output = command.output().unwrap_or_else(|error| panic!("cannot run {command:?}: {error}"));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?} failed: {said}");
    output
}
