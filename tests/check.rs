//! The checker: nothing is lost, doubled or stuck, whatever happens to agents, broker and network.
//!
//! Without arguments, as `cargo test` runs it, a short run; `scripts/check --help` tells the rest. It starts itself again
//! as the agents.

#![expect(clippy::unwrap_used, reason = "a checker that cannot go on fails loudly")]
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a program for people")]

mod check {
    pub(crate) mod agent;
    pub(crate) mod behaviour;
    pub(crate) mod broker;
    pub(crate) mod faults;
    pub(crate) mod fleet;
    pub(crate) mod git;
    pub(crate) mod history;
    pub(crate) mod judge;
    pub(crate) mod ledger;
    pub(crate) mod master;
    pub(crate) mod options;
    pub(crate) mod report;
    pub(crate) mod run;
    pub(crate) mod schedule;
    pub(crate) mod seed;
    pub(crate) mod wire;
    pub(crate) mod workload;
}
#[path = "support/githttp.rs"]
mod githttp;
mod support;

use std::{
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
    time::Instant,
};

use check::{
    broker::BrokerNode,
    history::{self, FaultKind, Work},
    judge, options,
    options::{HELP, Options, Order, TEST},
    report,
};

/// What a test binary ends with when a test failed.
const FAILED: u8 = 101;
/// The variable that `scripts/rabbitmq` and the suites take the broker's version from.
const BROKER: &str = "HAUL_TEST_BROKER";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match options::read(&arguments) {
        Ok(Order::Agent(args)) => check::agent::run(args),
        Ok(Order::Help) => {
            println!("{HELP}");
            for kind in FaultKind::ALL {
                println!("  {}", kind.name());
            }
            ExitCode::SUCCESS
        }
        Ok(Order::List) => {
            println!("{TEST}: test");
            ExitCode::SUCCESS
        }
        Ok(Order::Nothing) => {
            println!("\nrunning 0 tests\n");
            println!("test result: ok. 0 passed; 0 failed; 0 ignored; 0 measured; 1 filtered out; finished in 0.00s\n");
            ExitCode::SUCCESS
        }
        Ok(Order::Judge(directory)) => judge_again(&directory),
        Ok(Order::Run(options)) => match &options.broker {
            // A variable is only changed for another process.
            Some(version) if std::env::var(BROKER).ok().as_deref() != Some(version) => {
                let program = std::env::current_exe().expect("a process knows its program");
                let error = Command::new(program).args(&arguments).env(BROKER, version).exec();
                eprintln!("check: {error}");
                ExitCode::from(FAILED)
            }
            _ => as_a_test(&options),
        },
        Err(refusal) => {
            eprintln!("check: {refusal}");
            ExitCode::from(2)
        }
    }
}

/// Runs, judges, and says so in the words of libtest, which `scripts/test` adds up.
fn as_a_test(options: &Options) -> ExitCode {
    println!("\nrunning 1 test");
    let begun = Instant::now();
    let good = run_and_judge(options);
    let (word, passed, failed) = if good { ("ok", 1, 0) } else { ("FAILED", 0, 1) };
    println!("test {TEST} ... {word}\n");
    let seconds = begun.elapsed().as_secs_f64();
    println!(
        "test result: {word}. {passed} passed; {failed} failed; 0 ignored; 0 measured; 0 filtered out; finished in {seconds:.2}s\n"
    );
    if good { ExitCode::SUCCESS } else { ExitCode::from(FAILED) }
}

fn run_and_judge(options: &Options) -> bool {
    let directory = options.keep.clone().unwrap_or_else(|| {
        Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("check-{}-{}", options.seed, std::process::id()))
    });
    log_to(&directory.join("checker.log"));
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let broker = BrokerNode::start();
    let mut good = true;
    for &work in &options.works {
        let own = directory.join(name(work));
        let ran = runtime.block_on(async {
            let mut ended = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()).unwrap();
            tokio::select! {
                ran = check::run::run(options, work, &broker, &own) => ran,
                _ = ended.recv() => Err("it was told to end".to_owned()),
                _ = tokio::signal::ctrl_c() => Err("it was told to end".to_owned()),
            }
        });
        good &= match ran {
            Ok(()) => judged(&own),
            Err(refusal) => {
                println!("the run could not be ended: {refusal}");
                false
            }
        };
    }
    drop(broker);
    let place = directory.display();
    if good && options.keep.is_none() {
        let _ = std::fs::remove_dir_all(&directory);
    } else {
        let verdict = if good { "kept" } else { "judged bad, and kept" };
        println!("seed {}: {verdict} in {place}; judge it again with scripts/check --judge {place}", options.seed);
    }
    good
}

/// What the checker's own side of the broker meets: it is a client of Haul's library like any other.
fn log_to(path: &Path) {
    std::fs::create_dir_all(path.parent().unwrap()).expect("the directory can be made");
    let file = std::fs::File::create(path).expect("the log can be written");
    let filter = tracing_subscriber::EnvFilter::try_from_env("HAUL_CHECK_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info,haul::broker=debug,lapin=off"));
    tracing_subscriber::fmt().with_env_filter(filter).with_ansi(false).with_writer(file).init();
}

const fn name(work: Work) -> &'static str {
    match work {
        Work::Ledger => "ledger",
        Work::Git => "git",
    }
}

/// Judges the history of a directory, and prints the table.
fn judged(directory: &Path) -> bool {
    match history::read(directory) {
        Ok(records) => {
            let verdict = judge::judge(&records);
            println!("{}", report::table(&verdict));
            verdict.is_good()
        }
        Err(refusal) => {
            println!("{refusal}");
            false
        }
    }
}

fn judge_again(directory: &Path) -> ExitCode {
    let kept: Vec<PathBuf> =
        [directory.to_owned(), directory.join(name(Work::Ledger)), directory.join(name(Work::Git))]
            .into_iter()
            .filter(|place| place.join(history::FILE).exists())
            .collect();
    if kept.is_empty() {
        eprintln!("check: {} holds no history", directory.display());
        return ExitCode::from(2);
    }
    // Each is judged and told, also after a bad one.
    let bad = kept.iter().filter(|place| !judged(place)).count();
    if bad == 0 { ExitCode::SUCCESS } else { ExitCode::from(FAILED) }
}
