//! How fast messages pass the whole path of an agent, and what that costs: tasks that do nothing, on a real broker, with a
//! durable journal, beside a bare loop on the same library and a Celery worker.
//!
//! Run by `scripts/bench-messages`, which starts the broker. docs/benchmarks/README.md says what is measured and how.

#![expect(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "times and sizes are far below what a float holds"
)]
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "this program is there to print")]

#[path = "throughput/agent.rs"]
mod agent;
// As `haul` has it.
#[path = "../src/main/allocator.rs"]
mod allocator;
#[path = "throughput/cases.rs"]
mod cases;
#[path = "throughput/disk.rs"]
mod disk;
mod memory;
#[path = "throughput/nodes.rs"]
mod nodes;
#[path = "throughput/process.rs"]
mod process;
#[path = "throughput/proxy.rs"]
mod proxy;
#[path = "throughput/real.rs"]
mod real;
#[path = "throughput/reconnect.rs"]
mod reconnect;
mod report;
#[path = "throughput/rig.rs"]
mod rig;
#[path = "throughput/sides.rs"]
mod sides;
#[path = "throughput/soak.rs"]
mod soak;
#[path = "throughput/spread.rs"]
mod spread;

use std::{
    fs,
    path::{Path, PathBuf},
};

use clap::Parser;

use self::{agent::Orders, report::Report};

/// What to measure.
#[derive(Parser)]
#[command(about = "Measures the message path of haul; see docs/benchmarks/README.md")]
struct Arguments {
    /// throughput, latency, status, memory, reconnect, nodes or soak; may be repeated. Default: all of them but soak
    #[arg(long = "case", value_name = "CASE")]
    cases: Vec<String>,
    /// Rounds of each side
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Tasks of a round
    #[arg(long, default_value_t = 40_000)]
    tasks: u64,
    /// Tasks that run at a time
    #[arg(long, default_value_t = 256)]
    slots: usize,
    /// Unsettled deliveries at a time
    #[arg(long, default_value_t = 256)]
    window: u16,
    /// Tasks a second that count as half of the load; by default half of what the case throughput measured, else 2000
    #[arg(long)]
    half_load: Option<u64>,
    /// Restarts of the broker that the case reconnect waits for
    #[arg(long, default_value_t = 5)]
    restarts: usize,
    /// Half-open connections that the case reconnect waits for
    #[arg(long, default_value_t = 1)]
    stalls: usize,
    /// Nodes that the case nodes simulates
    #[arg(long, default_value_t = 1000)]
    nodes: usize,
    /// Tasks of the case soak
    #[arg(long, default_value_t = 1_000_000)]
    soak: u64,
    /// Lost connections of the case soak
    #[arg(long, default_value_t = 1000)]
    reconnects: u64,
    /// How long the idle agent is left alone before it is looked at, in seconds
    #[arg(long, default_value_t = 20)]
    idle: u64,
    /// Where journals, logs and projects are made
    #[arg(long, value_name = "DIR")]
    scratch: Option<PathBuf>,
    /// Where the table and the plots are written; nowhere by default
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Be the bare loop on this queue
    #[arg(long, hide = true, value_name = "QUEUE")]
    bare: Option<String>,
    /// As the bare loop, tell this exchange of the begin and the end of each
    #[arg(long, hide = true, value_name = "EXCHANGE")]
    bare_tells: Option<String>,
    #[command(flatten)]
    orders: Orders,
    /// What cargo adds
    #[arg(long, hide = true)]
    bench: bool,
}

/// What a case works with.
struct World {
    arguments: Arguments,
    scratch: PathBuf,
    report: Report,
    /// Tasks a second, as measured.
    measured: Option<f64>,
}

const CASES: [&str; 7] = ["throughput", "latency", "status", "memory", "reconnect", "nodes", "soak"];

fn main() {
    let arguments = Arguments::parse();
    if arguments.orders.agent {
        return agent::be(&arguments.orders, arguments.slots, arguments.window);
    }
    if let Some(queue) = &arguments.bare {
        let events = arguments.bare_tells.as_deref();
        return sides::be_bare(arguments.orders.url(), queue, events, arguments.orders.expect);
    }
    for name in &arguments.cases {
        assert!(CASES.contains(&name.as_str()), "no case is called {name}; see --help");
    }
    let runtime = tokio::runtime::Runtime::new().expect("a runtime can be started");
    runtime.block_on(measure(arguments));
}

async fn measure(arguments: Arguments) {
    let chosen = |case: &str| {
        if arguments.cases.is_empty() { case != "soak" } else { arguments.cases.iter().any(|name| name == case) }
    };
    let cases: Vec<&str> = CASES.into_iter().filter(|case| chosen(case)).collect();
    let scratch = arguments.scratch.clone().unwrap_or_else(std::env::temp_dir);
    let scratch = scratch.join(format!("haul-messages-{}", std::process::id()));
    fs::create_dir_all(&scratch).expect("the scratch directory can be made");
    let mut world = World { arguments, scratch, report: Report::default(), measured: None };
    for case in cases {
        eprintln!("case {case}");
        world.fact(format!("{case}: fsync of a page where the journal is: {}", disk::fsync(&world.scratch)));
        match case {
            "throughput" => cases::throughput(&mut world).await,
            "latency" => cases::latency(&mut world).await,
            "status" => real::status(&mut world).await,
            "memory" => real::memory(&mut world).await,
            "reconnect" => reconnect::run(&mut world).await,
            "nodes" => nodes::run(&mut world).await,
            "soak" => soak::run(&mut world).await,
            other => unreachable!("{other} is no case"),
        }
    }
    let _ = fs::remove_dir_all(&world.scratch);
    if let Some(out) = &world.arguments.out {
        let head = format!("# Messages, measured\n\n{}", machine());
        world.report.write(out, "messages.md", &head).expect("the results can be written");
        println!("\nwritten to {}", out.display());
    }
}

impl World {
    /// Prints a line and keeps it for the table.
    fn fact(&mut self, fact: String) {
        self.report.say(fact);
    }

    /// A new directory for a case.
    fn place(&self, name: &str) -> PathBuf {
        let place = self.scratch.join(name);
        fs::create_dir_all(&place).expect("the scratch directory can be written");
        place
    }

    /// Slots and window of the agents that do nothing.
    fn size(&self) -> (usize, u16) {
        (self.arguments.slots, self.arguments.window)
    }
}

/// What the figures depend on.
fn machine() -> String {
    let broker = fs::read_to_string(rig::broker_directory().join("env")).unwrap_or_default();
    let broker = broker.lines().find_map(|line| line.strip_prefix("VERSION=")).unwrap_or("?");
    let celery = std::env::var("HAUL_BENCH_CELERY").unwrap_or_else(|_| "no Celery".to_owned());
    let measured = report::measured("bench-messages", &format!("RabbitMQ {broker}, {celery}"));
    format!("{measured} Broker, agent and whoever measures share these cores.\n")
}

/// The program under measurement where it is the real one.
fn program() -> PathBuf {
    std::env::var_os("HAUL_BIN").map_or_else(|| PathBuf::from(env!("CARGO_BIN_EXE_haul")), PathBuf::from)
}

/// A log of one's own below `place`.
fn log(place: &Path, name: &str) -> PathBuf {
    place.join(format!("{name}.log"))
}
