//! `haul cancel`, `pause`, `resume`, `drain`, `inspect`: control messages and their answers.

mod nodes;

use std::{sync::Arc, time::Duration};

use clap::Args;
use jiff::Timestamp;

use super::{
    connect,
    error::CliError,
    follow::{Following, News},
    output, wait, words,
};
use crate::{
    broker::{Broker, Outgoing, PublishError},
    config::Config,
    protocol::{ControlAnswer, ControlCommand, ControlMessage, NodeName, Status, TaskId, VERSION, wire::Message},
    shutdown::exit,
};

const EXAMPLES: &str = "\
Examples:
  haul cancel 01994e2c-7c1e-7000-8000-000000000000 --node worker-001
  haul cancel my-task --node worker-001 --wait --timeout 1m

A cancel may come before its task. A task that has ended already is answered with how it ended. With --wait it ends with \
the task: code 0 if it was cancelled, 4 if it ended otherwise.";

const NODE_EXAMPLES: &str = "\
Examples:
  haul inspect worker-001
  haul pause worker-001 worker-002 --wait     # until nothing runs there any more
  haul drain worker-001 --wait                # until its agent has ended
  haul inspect worker-001 --wait              # until it is ready; the same for resume

The answer is also an event, <node>.control.<answer>, so `haul events` shows it. The command waits in the node's queue if \
its agent is away, but for a drain, which is forgotten. Who does not answer within --timeout is named, and the code is 6; \
it is 4 where a node is not enrolled or its agent refuses.";

/// How long an agent may take to answer.
const ANSWER: Duration = Duration::from_secs(10);
/// How long what was asked for may take, where it is waited for.
const EFFECT: Duration = Duration::from_mins(5);
/// Between questions whether it has come.
const AGAIN: Duration = Duration::from_millis(500);

/// Arguments of the commands for nodes.
#[derive(Debug, Args)]
#[command(after_help = NODE_EXAMPLES)]
pub(super) struct NodeArgs {
    /// The nodes.
    #[arg(value_name = "NODE", required_unless_present = "node")]
    nodes: Vec<NodeName>,
    /// The same; may be repeated.
    #[arg(long, value_name = "NODE")]
    node: Vec<NodeName>,
    /// Wait until it has taken effect, not only until it was heard.
    #[arg(long)]
    wait: bool,
    /// How long to wait [default: 10s, with --wait 5m]
    #[arg(long, value_name = "DURATION", value_parser = wait::duration)]
    timeout: Option<Duration>,
    /// Print each answer as JSON, one a line.
    #[arg(long)]
    json: bool,
}

/// Arguments of `haul cancel`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct CancelArgs {
    /// The task.
    task: TaskId,
    /// The node that the task was sent to.
    #[arg(long)]
    node: NodeName,
    /// Follow the task to its end.
    #[arg(long)]
    wait: bool,
    /// How long to wait for the agent's answer or, with --wait, for the end of the task.
    #[arg(long, value_name = "DURATION", default_value = "10s", value_parser = wait::duration)]
    timeout: Duration,
    /// Print JSON: the answer or, with --wait, each event on a line of its own.
    #[arg(long)]
    json: bool,
}

pub(super) async fn pause(config: Config, args: NodeArgs) -> Result<u8, CliError> {
    nodes::tell(config, ControlCommand::Pause, args).await
}

pub(super) async fn resume(config: Config, args: NodeArgs) -> Result<u8, CliError> {
    nodes::tell(config, ControlCommand::Resume, args).await
}

pub(super) async fn drain(config: Config, args: NodeArgs) -> Result<u8, CliError> {
    nodes::tell(config, ControlCommand::Drain, args).await
}

pub(super) async fn inspect(config: Config, args: NodeArgs) -> Result<u8, CliError> {
    nodes::tell(config, ControlCommand::Inspect, args).await
}

pub(super) async fn cancel(config: Config, args: CancelArgs) -> Result<u8, CliError> {
    let broker = connect(&config).await?;
    let code = cancel_on(&broker, &config, &args).await;
    broker.close().await;
    code
}

async fn cancel_on(broker: &Arc<dyn Broker>, config: &Config, args: &CancelArgs) -> Result<u8, CliError> {
    let line = Line { broker: Arc::clone(broker), config, node: &args.node };
    let pattern = if args.wait { format!("{}.*.*", args.node) } else { format!("{}.control.*", args.node) };
    let mut following = Following::start(broker, &config.names(), &[pattern]).await?;
    let message = message(ControlCommand::Cancel, Some(args.task.clone()));
    line.send(&message).await?;
    if !args.wait {
        let answer = line.answer(&mut following, &message, args.timeout).await?;
        return report(&answer, args.json);
    }
    let view = wait::View::new(args.json);
    let again = || line.send(&message);
    let event = wait::outcome(&mut following, &args.task, Some(args.timeout), &view, again).await?;
    view.end(&event)?;
    Ok(if event.status == Status::Cancelled { exit::OK } else { exit::TASK })
}

fn message(command: ControlCommand, task_id: Option<TaskId>) -> ControlMessage {
    ControlMessage { v: VERSION, command, task_id, control_id: Some(crate::protocol::new_event_id()) }
}

fn report(answer: &ControlAnswer, json: bool) -> Result<u8, CliError> {
    if json {
        output::json(answer)?;
    } else {
        output::line(&words::answer_line(answer))?;
    }
    Ok(if answer.answer == "refused" { exit::TASK } else { exit::OK })
}

/// The way to one node's agent.
struct Line<'a> {
    broker: Arc<dyn Broker>,
    config: &'a Config,
    node: &'a NodeName,
}

impl Line<'_> {
    async fn send(&self, control: &ControlMessage) -> Result<(), CliError> {
        let mut message = Message::control(control, Timestamp::now());
        if control.command == ControlCommand::Drain {
            // An agent that starts tomorrow is not meant.
            message.expiration_ms = u64::try_from(ANSWER.as_millis()).ok();
        }
        let outgoing = Outgoing {
            exchange: self.config.names().control(),
            routing_key: self.node.to_string(),
            message,
            mandatory: true,
        };
        self.broker.publish(outgoing).await.map_err(|error| match error {
            PublishError::Unroutable { .. } => CliError::NotEnrolled { node: self.node.clone() },
            other => CliError::Publish(other),
        })
    }

    /// The agent's answer to `control`.
    async fn answer(
        &self,
        following: &mut Following,
        control: &ControlMessage,
        timeout: Duration,
    ) -> Result<ControlAnswer, CliError> {
        let ours = async {
            loop {
                match following.next().await {
                    Some(News::Answer(answer)) if answer.control_id == control.control_id => return Ok(*answer),
                    Some(News::Gap) => self.send(control).await?,
                    Some(News::Answer(_) | News::Event(_)) => {}
                    None => return Err(CliError::Refused("the subscription was ended by the broker".to_owned())),
                }
            }
        };
        tokio::time::timeout(timeout, ours).await.unwrap_or_else(|_| {
            Err(CliError::TimedOut(format!(
                "{} did not answer within {}: the command waits in its queue until its agent is there",
                self.node,
                wait::humantime(timeout)
            )))
        })
    }
}
