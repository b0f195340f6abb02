//! `haul events`: follows the results exchange.

use clap::Args;

use super::{
    connect,
    error::CliError,
    follow::{Following, News},
    output, submit,
    words::{self, event_line},
};
use crate::{
    config::Config,
    master::Interest,
    protocol::{Kind, NodeName, Status, TaskId},
};

const EXAMPLES: &str = "\
Examples:
  haul events
  haul events --node worker-001 --status failed --status rejected
  haul events --json | jq -r 'select(.status == \"failed\") | .error.message'

Events from before the start are not shown; it ends at Ctrl-C.";

/// Arguments of `haul events`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct EventsArgs {
    /// Only events of this node; may be repeated.
    #[arg(long, value_name = "NODE")]
    node: Vec<NodeName>,
    /// Only events of tasks of this kind; may be repeated.
    #[arg(long, value_name = "KIND", value_parser = submit::words::<Kind>(words::KINDS))]
    kind: Vec<Kind>,
    /// Only events with this status; may be repeated.
    #[arg(long, value_name = "STATUS", value_parser = submit::words::<Status>(words::STATUSES))]
    status: Vec<Status>,
    /// Only events of this task; may be repeated.
    #[arg(long, value_name = "TASK")]
    task: Vec<TaskId>,
    /// Print each event as it came, one JSON object a line.
    #[arg(long)]
    json: bool,
}

pub(super) async fn run(config: Config, args: EventsArgs) -> Result<u8, CliError> {
    let broker = connect(&config).await?;
    let mut following = Following::start(&broker, &config.names(), &args.patterns()).await?;
    if !args.json {
        output::note("following events; Ctrl-C ends");
    }
    while let Some(news) = following.next().await {
        args.print(&news)?;
    }
    Err(CliError::Refused("the subscription was ended by the broker; start again".to_owned()))
}

impl EventsArgs {
    /// The routing keys to ask the broker for.
    fn patterns(&self) -> Vec<String> {
        let interest = self.node.iter().fold(Interest::all(), Interest::node);
        let interest = self.kind.iter().fold(interest, |interest, &kind| interest.kind(kind));
        self.status.iter().fold(interest, |interest, &status| interest.status(status)).patterns()
    }

    fn print(&self, news: &News) -> Result<(), CliError> {
        let wanted = |task: Option<&TaskId>| self.task.is_empty() || task.is_some_and(|task| self.task.contains(task));
        match news {
            News::Event(event) if wanted(Some(&event.task_id)) && self.json => output::json(event),
            News::Event(event) if wanted(Some(&event.task_id)) => output::line(&event_line(event)),
            News::Answer(answer) if wanted(answer.task_id.as_ref()) && self.json => output::json(answer),
            News::Answer(answer) if wanted(answer.task_id.as_ref()) => output::line(&words::answer_line(answer)),
            News::Gap => {
                output::note("the connection was lost and is back; events in between are not shown");
                Ok(())
            }
            News::Event(_) | News::Answer(_) => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: EventsArgs,
    }

    fn patterns(line: &[&str]) -> Vec<String> {
        Line::parse_from([&["events"], line].concat()).args.patterns()
    }

    #[test]
    fn filters_become_patterns_that_the_broker_applies() {
        assert_eq!(patterns(&[]), ["*.*.*"]);
        assert_eq!(
            patterns(&["--node", "a", "--status", "failed", "--status", "rejected"]),
            ["a.*.failed", "a.*.rejected"]
        );
        assert_eq!(patterns(&["--node", "a", "--node", "b", "--kind", "clone"]), ["a.clone.*", "b.clone.*"]);
    }

    #[test]
    fn a_status_that_does_not_exist_is_refused() {
        assert!(Line::try_parse_from(["events", "--status", "done"]).is_err());
    }
}
