//! Haul against the git command: both sides in one run, in turn, on a file system made for the case.
//!
//! Run by `scripts/bench`, which starts the broker. Haul's time is from the publishing of a task on a real broker to the
//! arrival of its terminal event, with a real agent; git's is that of the command, on the same URL over smart HTTP.
//! docs/benchmarks/README.md says what is measured and how.

#![expect(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "times and sizes are far below what a float holds"
)]
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "this program is there to print")]

mod agent;
mod cases;
mod generator;
mod memory;
mod place;
mod report;
mod server;

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use clap::Parser;

use self::{place::Kind, report::Report, server::Server};

/// What to measure.
#[derive(Parser)]
#[command(about = "Measures haul against the git command; see docs/benchmarks/README.md")]
struct Arguments {
    /// cold, tree, warm, pull, concurrent, resume or memory; may be repeated. Default: all of them
    #[arg(long = "case", value_name = "CASE")]
    cases: Vec<String>,
    /// small, medium, large or history; may be repeated. Default: those that the case is about
    #[arg(long = "size", value_name = "SIZE")]
    sizes: Vec<String>,
    /// Any repository on this machine, instead of the made ones; it is only read
    #[arg(long, value_name = "PATH")]
    repository: Option<PathBuf>,
    /// Rounds of each side
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Setting of the agent as a variable (`AGENT_GIT__SANDBOX=off`); may be repeated
    #[arg(long = "set", value_name = "NAME=VALUE")]
    settings: Vec<String>,
    /// The file system to make
    #[arg(long, value_enum, default_value_t = Kind::Ext4)]
    fs: Kind,
    /// Where file systems are made
    #[arg(long, value_name = "DIR")]
    scratch: Option<PathBuf>,
    /// Where the table and the plots are written; nowhere by default
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Only make the repositories
    #[arg(long)]
    prepare: bool,
    /// What cargo adds
    #[arg(long, hide = true)]
    bench: bool,
}

/// What a case works with.
struct World {
    rounds: usize,
    settings: Vec<(String, String)>,
    kind: Kind,
    scratch: PathBuf,
    server: Server,
    report: Report,
    /// What file system was made, and what the agent did not know.
    places: Vec<String>,
}

/// A case: its name, and the repositories it is about.
const CASES: [(&str, &[&str]); 7] = [
    ("cold", &["small", "medium", "history", "large"]),
    ("tree", &["history"]),
    ("warm", &["small", "medium", "history", "large"]),
    ("pull", &["medium", "history"]),
    ("concurrent", &["small"]),
    ("resume", &["history"]),
    ("memory", &["small", "history", "large"]),
];

#[tokio::main]
async fn main() {
    let arguments = Arguments::parse();
    let cache = Path::new(env!("CARGO_TARGET_TMPDIR")).join("../bench/repositories");
    let chosen = |case: &str| arguments.cases.is_empty() || arguments.cases.iter().any(|name| name == case);
    for name in &arguments.cases {
        assert!(CASES.iter().any(|(case, _)| case == name), "no case is called {name}; see --help");
    }
    let scratch = arguments.scratch.clone().unwrap_or_else(std::env::temp_dir);
    let scratch = scratch.join(format!("haul-bench-{}", std::process::id()));
    fs::create_dir_all(&scratch).expect("the scratch directory can be made");
    let settings = arguments.settings.iter().filter_map(|set| set.split_once('='));
    let settings = settings.map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
    let mut world = World {
        rounds: arguments.rounds,
        settings,
        kind: arguments.fs,
        scratch: scratch.clone(),
        server: Server::start(),
        report: Report::default(),
        places: Vec::new(),
    };
    let mut described = Vec::new();
    for (case, sizes) in CASES.iter().filter(|(case, _)| chosen(case)) {
        let wanted: Vec<String> = match &arguments.repository {
            Some(_) => vec!["given".to_owned()],
            None if arguments.sizes.is_empty() => sizes.iter().map(|size| (*size).to_owned()).collect(),
            None => arguments.sizes.clone(),
        };
        for size in wanted {
            let path = match &arguments.repository {
                Some(path) => fs::canonicalize(path).expect("the repository is there"),
                None => generator::repository(&size, &cache),
            };
            if !described.iter().any(|(name, _)| *name == size) {
                let facts = generator::facts(&path);
                println!("repository {size}: {facts}");
                described.push((size.clone(), facts));
            }
            if arguments.prepare {
                continue;
            }
            world.server.offer(&size, &path);
            cases::run(case, &mut world, &size, &path).await;
        }
    }
    let _ = fs::remove_dir_all(&scratch);
    if let Some(out) = arguments.out.filter(|_| !arguments.prepare) {
        let mut head = format!("# Measured\n\n{}\n", machine(&world));
        head.push_str("Repositories:\n\n");
        for (name, facts) in described {
            head.extend(["- ", &name, ": ", &facts, "\n"]);
        }
        world.report.write(&out, "results.md", &head).expect("the results can be written");
        println!("\nwritten to {}", out.display());
    }
}

/// What the figures depend on.
fn machine(world: &World) -> String {
    let measured = report::measured("bench", &git(Path::new("/"), &["--version"]));
    let mut text = format!("{measured} Server, broker, agent and git share these cores.\n\n");
    for place in &world.places {
        text.extend(["- ", place, "\n"]);
    }
    text
}

/// Git without anybody's settings.
fn git_command(directory: &Path) -> Command {
    let mut command = Command::new("git");
    command
        .current_dir(directory)
        .env("GIT_CONFIG_NOSYSTEM", "1")
        .env("GIT_CONFIG_GLOBAL", "/dev/null")
        .env("GIT_TERMINAL_PROMPT", "0")
        .env("GIT_CONFIG_COUNT", "1")
        .env("GIT_CONFIG_KEY_0", "safe.directory")
        .env("GIT_CONFIG_VALUE_0", "*")
        .stdin(Stdio::null());
    for role in ["AUTHOR", "COMMITTER"] {
        command.env(format!("GIT_{role}_NAME"), "Bench").env(format!("GIT_{role}_EMAIL"), "bench@example.org");
    }
    command
}

/// Runs it to its end; it must succeed. What it printed.
fn git(directory: &Path, arguments: &[&str]) -> String {
    let output = git_command(directory).args(arguments).output().expect("git can be run");
    assert!(output.status.success(), "git {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}
