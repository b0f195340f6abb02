//! What the checker is told by its command line.

use std::path::PathBuf;

use super::{
    agent::AgentArgs,
    history::{FaultKind, Work},
};

/// The name that `cargo test` knows it by.
pub(crate) const TEST: &str = "nothing_is_lost_doubled_or_stuck";

pub(crate) const HELP: &str = "\
Shows that every task ends once whatever happens to agents, broker and network.

Usage: scripts/check [OPTIONS]

Publishes tasks to a few agents on a broker of its own, does faults to them by a seeded schedule, waits until all is quiet,
and judges the history: lost, stuck, doubled, wrong ends and wrong final states, executions repeated without a cause, dead
letters unaccounted. Ends with 0 if nothing was found, else with 101 and the place of the history.

Options:
  --tasks N        tasks to publish [default: 3000]
  --faults N       faults to do; each kind once while there is room, then by weight [default: 23]
  --seed S         of workload and schedule [default: 1]
  --nodes N        agents [default: 3]
  --broker V       the RabbitMQ to run on: any, 3.10 or 4.3 [default: $HAUL_TEST_BROKER, or any]
  --work WORK      ledger: an executor that writes down what it does
                   git: `haul worker` with small repositories over HTTP
                   both: ledger, and then a hundredth of it with git [default: both]
  --only KINDS     faults of these kinds only, with commas between
  --keep DIR       keep histories, ledgers and logs there; a run that is judged bad keeps them in any case
  --judge DIR      judge again what was kept there, and run nothing

Examples:
  scripts/check
  scripts/check --tasks 100000 --faults 200 --seed 7 --broker 4.3
  scripts/check --only broker-killed,journal-lost --faults 10 --keep /tmp/run
  scripts/check --judge /tmp/run

Kinds of fault:";

/// A run.
#[derive(Clone, Debug)]
pub(crate) struct Options {
    pub(crate) tasks: usize,
    pub(crate) faults: usize,
    pub(crate) seed: u64,
    pub(crate) nodes: usize,
    pub(crate) broker: Option<String>,
    pub(crate) works: Vec<Work>,
    pub(crate) only: Vec<FaultKind>,
    pub(crate) keep: Option<PathBuf>,
}

/// What to do.
#[derive(Clone, Debug)]
pub(crate) enum Order {
    Run(Options),
    Judge(PathBuf),
    Agent(AgentArgs),
    /// Print the test's name, as libtest does.
    List,
    /// A filter of `cargo test` leaves it out.
    Nothing,
    Help,
}

/// Options of libtest that take a value; all others of it are switches.
const LIBTEST_VALUES: &[&str] = &["--test-threads", "--color", "--format", "--logfile", "--shuffle-seed", "-Z"];
const LIBTEST_SWITCHES: &[&str] = &[
    "--nocapture",
    "--no-capture",
    "--show-output",
    "--quiet",
    "-q",
    "--include-ignored",
    "--report-time",
    "--shuffle",
    "--test",
];

/// Reads the command line, that of `cargo test` included.
pub(crate) fn read(arguments: &[String]) -> Result<Order, String> {
    if let Some(("agent", rest)) = arguments.split_first().map(|(first, rest)| (first.as_str(), rest)) {
        return AgentArgs::read(rest).map(Order::Agent).ok_or_else(|| "an agent takes four arguments".to_owned());
    }
    let mut options = Options {
        tasks: 3000,
        faults: 23,
        seed: 1,
        nodes: 3,
        broker: None,
        works: vec![Work::Ledger, Work::Git],
        only: Vec::new(),
        keep: None,
    };
    let (mut filters, mut skips, mut exact, mut list, mut ignored) = (Vec::new(), Vec::new(), false, false, false);
    let mut rest = arguments.iter();
    while let Some(argument) = rest.next() {
        let (name, given) = match argument.split_once('=').filter(|_| argument.starts_with("--")) {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => (argument.as_str(), None),
        };
        let mut value =
            || given.clone().or_else(|| rest.next().cloned()).ok_or_else(|| format!("{name} needs a value"));
        match name {
            "--tasks" => options.tasks = number(name, &value()?)?,
            "--faults" => options.faults = number(name, &value()?)?,
            "--seed" => options.seed = number(name, &value()?)?,
            "--nodes" => options.nodes = number::<usize>(name, &value()?)?.max(1),
            "--broker" => options.broker = Some(value()?),
            "--work" => options.works = works(&value()?)?,
            "--only" => options.only = kinds(&value()?)?,
            "--keep" => options.keep = Some(value()?.into()),
            "--judge" => return Ok(Order::Judge(value()?.into())),
            "--help" | "-h" => return Ok(Order::Help),
            "--list" => list = true,
            "--exact" => exact = true,
            "--ignored" => ignored = true,
            "--skip" => skips.push(value()?),
            _ if LIBTEST_VALUES.contains(&name) => drop(value()?),
            _ if LIBTEST_SWITCHES.contains(&name) => {}
            _ if name.starts_with('-') => return Err(format!("unknown option {name}; see scripts/check --help")),
            _ => filters.push(argument.clone()),
        }
    }
    let meant = |filter: &String| if exact { filter == TEST } else { TEST.contains(filter.as_str()) };
    let wanted = (filters.is_empty() || filters.iter().any(meant)) && !skips.iter().any(meant) && !ignored;
    Ok(match (wanted, list) {
        (false, _) => Order::Nothing,
        (true, true) => Order::List,
        (true, false) => Order::Run(options),
    })
}

fn number<N: std::str::FromStr>(name: &str, text: &str) -> Result<N, String> {
    text.parse().map_err(|_| format!("{name} needs a number, and {text:?} is none"))
}

fn works(text: &str) -> Result<Vec<Work>, String> {
    match text {
        "ledger" => Ok(vec![Work::Ledger]),
        "git" => Ok(vec![Work::Git]),
        "both" => Ok(vec![Work::Ledger, Work::Git]),
        _ => Err(format!("--work is ledger, git or both, and not {text:?}")),
    }
}

fn kinds(text: &str) -> Result<Vec<FaultKind>, String> {
    let kind = |name: &str| {
        let kind = FaultKind::ALL.iter().copied().find(|kind| kind.name() == name);
        kind.ok_or_else(|| format!("there is no fault {name:?}; see scripts/check --help"))
    };
    text.split(',').map(kind).collect()
}
