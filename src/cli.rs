//! The command line: one binary, several roles.
//!
//! Each command has a file of its own with its arguments on top. All of them read the same configuration, print data
//! to the standard output and everything else to the standard error stream, and end with a code of
//! [`exit`](crate::shutdown::exit).

pub mod asyncapi;
mod completions;
mod control;
mod dead;
mod demo;
mod doctor;
mod error;
mod events;
mod follow;
mod output;
mod project;
pub mod schema;
mod submit;
mod table;
mod topology;
mod wait;
mod words;
mod worker;

use std::{future::Future, path::PathBuf, process::ExitCode, sync::Arc};

use clap::{Args, Parser, Subcommand};

use self::error::CliError;
use crate::{
    broker::{Broker, rabbitmq::RabbitMq},
    config::Config,
    shutdown::exit,
};

const EXIT_CODES: &str = "\
Exit codes:
    0  all went well
    1  failed; doctor found something red
    2  command line, configuration or input cannot be used
    3  broker unreachable, or it refused or did not confirm
    4  the task did not succeed, or no node takes it
    5  an agent uses the storage directory
    6  timed out
  130  interrupted";

/// What a command logs by default. The AMQP library writes whole messages into its warnings; what matters of them is
/// said by ourselves.
const CLIENT_FILTER: &str = "warn,lapin=off";

/// Puts git projects on the nodes of a fleet and keeps them there.
///
/// An agent (`haul worker`) runs on every node and takes clone, pull, delete and status tasks from RabbitMQ; the other
/// commands publish tasks, follow events, look after dead letters and set up the broker.
#[derive(Debug, Parser)]
#[command(name = "haul", version, propagate_version = true, after_help = EXIT_CODES)]
pub struct Cli {
    #[command(flatten)]
    common: Common,
    #[command(subcommand)]
    command: Command,
}

/// What every command takes.
#[derive(Debug, Args)]
struct Common {
    /// Configuration file; /etc/haul/haul.toml if it exists. Variables (AGENT_…) win over it.
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the agent of this node
    Worker(worker::WorkerArgs),
    /// Publish one task, and follow it to its end with --wait
    #[command(subcommand)]
    Submit(Box<submit::SubmitCommand>),
    /// Cancel a queued, waiting or running task
    Cancel(control::CancelArgs),
    /// Tell an agent to take no more tasks; survives its restart
    Pause(control::NodeArgs),
    /// Tell a paused agent to take tasks again
    Resume(control::NodeArgs),
    /// Tell an agent to finish what runs, give back the rest, and end
    Drain(control::NodeArgs),
    /// Ask an agent how it is
    Inspect(control::NodeArgs),
    /// Follow the events of the fleet
    Events(events::EventsArgs),
    /// Look after dead letters: list, show, replay, drop
    #[command(subcommand)]
    Dead(dead::DeadCommand),
    /// What the broker should have and has: plan, apply, doctor
    #[command(subcommand)]
    Topology(topology::TopologyCommand),
    /// What this node can do for the work: sandbox, capabilities, disk
    Doctor(doctor::DoctorArgs),
    /// Look after the projects of this node's storage: list, forget
    #[command(subcommand)]
    Project(project::ProjectCommand),
    /// Print the schemas of the messages
    Schema(schema::SchemaArgs),
    /// Print a completion script for a shell
    Completions(completions::CompletionsArgs),
    /// Take a project's whole walk in one process, on the in-memory broker
    #[command(hide = true)]
    Demo(demo::DemoArgs),
}

/// Runs the command that the process was started with.
#[must_use]
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(cli) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            output::complain(&error.to_string());
            ExitCode::from(error.code())
        }
    }
}

fn run(cli: Cli) -> Result<u8, CliError> {
    let load = || -> Result<Config, CliError> { Ok(Config::load(cli.common.config.as_deref())?) };
    match cli.command {
        Command::Worker(args) => worker::run(load()?, args),
        Command::Submit(command) => Ok(done(client(load()?, |config| submit::run(config, *command))?)),
        Command::Cancel(args) => Ok(done(client(load()?, |config| control::cancel(config, args))?)),
        Command::Pause(args) => Ok(done(client(load()?, |config| control::pause(config, args))?)),
        Command::Resume(args) => Ok(done(client(load()?, |config| control::resume(config, args))?)),
        Command::Drain(args) => Ok(done(client(load()?, |config| control::drain(config, args))?)),
        Command::Inspect(args) => Ok(done(client(load()?, |config| control::inspect(config, args))?)),
        // Ctrl-C is how following ends.
        Command::Events(args) => Ok(client(load()?, |config| events::run(config, args))?.unwrap_or(exit::OK)),
        Command::Dead(command) => dead::run(load()?, command),
        Command::Topology(command) => Ok(done(client(load()?, |config| topology::run(config, command))?)),
        Command::Doctor(args) => doctor::run(&load()?, &args),
        Command::Project(command) => project::run(load()?, command),
        Command::Schema(args) => schema::run(&args),
        Command::Completions(args) => completions::run(&args),
        Command::Demo(args) => demo::run(load()?, args),
    }
}

/// Runs a command that talks to the broker and ends: one thread, warnings only. `None` if a signal came first.
fn client<F>(config: Config, command: impl FnOnce(Config) -> F) -> Result<Option<u8>, CliError>
where
    F: Future<Output = Result<u8, CliError>>,
{
    config.log.install(CLIENT_FILTER);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(CliError::Runtime)?;
    let command = command(config);
    let code = runtime.block_on(async {
        tokio::select! {
            code = command => code.map(Some),
            () = interrupted() => Ok(None),
        }
    });
    // A thread that resolves a name or reads a file may hang; nobody waits for it.
    runtime.shutdown_background();
    code
}

/// The code of a command that a signal may have cut short.
fn done(code: Option<u8>) -> u8 {
    code.unwrap_or_else(|| {
        output::note("interrupted; what was published goes on: haul events shows it, haul cancel ends it");
        exit::INTERRUPTED
    })
}

/// Ends at `SIGINT` or `SIGTERM`.
async fn interrupted() {
    use tokio::signal::unix::{SignalKind, signal};
    let Ok(mut terminate) = signal(SignalKind::terminate()) else { return std::future::pending().await };
    tokio::select! {
        _ = tokio::signal::ctrl_c() => {}
        _ = terminate.recv() => {}
    }
}

/// The broker of the configuration, which answered just now: a person is told at once where an agent would wait.
async fn connect(config: &Config) -> Result<Arc<dyn Broker>, CliError> {
    let broker = RabbitMq::connect(&config.broker, "haul").await?;
    broker.about().await?;
    Ok(Arc::new(broker))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_command_says_what_it_does_in_one_line() {
        for command in Cli::command().get_subcommands().filter(|command| !command.is_hide_set()) {
            let about = command.get_about().map(ToString::to_string).unwrap_or_default();
            assert!(!about.is_empty() && about.len() < 80, "{}: {about:?}", command.get_name());
        }
    }
}
