//! `haul pause`, `resume`, `drain`, `inspect`: one command for one or many nodes.

use std::{sync::Arc, time::Duration};

use tokio::time::Instant;

use super::{AGAIN, ANSWER, EFFECT, Line, NodeArgs, message};
use crate::{
    broker::Broker,
    cli::{
        connect,
        error::CliError,
        follow::{Following, News},
        output, wait, words,
    },
    config::Config,
    protocol::{ControlAnswer, ControlCommand, ControlMessage, NodeName},
    shutdown::exit,
};

pub(super) async fn tell(config: Config, command: ControlCommand, args: NodeArgs) -> Result<u8, CliError> {
    let mut nodes = args.nodes.clone();
    nodes.extend(args.node.clone());
    nodes.sort();
    nodes.dedup();
    let broker = connect(&config).await?;
    let patterns: Vec<_> = nodes.iter().map(|node| format!("{node}.control.*")).collect();
    let mut following = Following::start(&broker, &config.names(), &patterns).await?;
    let asked = nodes.iter().map(|node| Asked::new(node, command)).collect();
    let mut round = Round { broker: Arc::clone(&broker), config: &config, args: &args, command, asked };
    let code = round.run(&mut following).await;
    broker.close().await;
    code
}

/// One node, and how far it is.
struct Asked<'a> {
    node: &'a NodeName,
    message: ControlMessage,
    /// The last question how it is, while its effect is waited for.
    question: Option<ControlMessage>,
    state: State,
    /// The last answer.
    last: Option<ControlAnswer>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Asked,
    Answered,
    Done,
    Failed,
    Late,
}

/// A command on its way to its nodes.
struct Round<'a> {
    broker: Arc<dyn Broker>,
    config: &'a Config,
    args: &'a NodeArgs,
    command: ControlCommand,
    asked: Vec<Asked<'a>>,
}

impl<'a> Asked<'a> {
    fn new(node: &'a NodeName, command: ControlCommand) -> Self {
        Self { node, message: message(command, None), question: None, state: State::Asked, last: None }
    }

    /// Whether the answer is to something that this node was asked here.
    fn knows(&self, answer: &ControlAnswer) -> bool {
        let ids = [Some(&self.message), self.question.as_ref()];
        ids.into_iter().flatten().any(|asked| asked.control_id.is_some() && asked.control_id == answer.control_id)
    }

    fn waits(&self) -> bool {
        matches!(self.state, State::Asked | State::Answered)
    }
}

/// Whether an answer shows that a command has taken effect.
fn has_come(command: ControlCommand, answer: &ControlAnswer) -> bool {
    match command {
        ControlCommand::Drain => answer.answer == "drained",
        ControlCommand::Pause => {
            answer.paused == Some(true) && answer.running == Some(0) && answer.waiting.unwrap_or(0) == 0
        }
        ControlCommand::Resume | ControlCommand::Inspect => answer.ready == Some(true),
        ControlCommand::Cancel => true,
    }
}

impl Round<'_> {
    async fn run(&mut self, following: &mut Following) -> Result<u8, CliError> {
        let effect = self.args.timeout.unwrap_or(if self.args.wait { EFFECT } else { ANSWER });
        let answer = effect.min(if self.args.wait { ANSWER } else { effect });
        self.send_all().await?;
        let begun = Instant::now();
        let mut again = tokio::time::interval_at(begun + AGAIN, AGAIN);
        while self.asked.iter().any(Asked::waits) {
            let heard = self.asked.iter().all(|asked| asked.state != State::Asked);
            tokio::select! {
                news = following.next() => match news {
                    Some(News::Answer(answer)) => self.take(*answer)?,
                    Some(News::Gap) => self.send_unanswered().await?,
                    Some(News::Event(_)) => {}
                    None => return Err(CliError::Refused("the subscription was ended by the broker".to_owned())),
                },
                _ = again.tick(), if self.args.wait => self.question().await?,
                () = tokio::time::sleep_until(begun + answer), if !heard => self.give_up(State::Asked, answer),
                () = tokio::time::sleep_until(begun + effect) => {
                    self.give_up(State::Asked, effect);
                    self.give_up(State::Answered, effect);
                }
            }
        }
        Ok(self.code())
    }

    /// Sends the command to every node; one that is not enrolled does not keep it from the others.
    async fn send_all(&mut self) -> Result<(), CliError> {
        let (broker, config) = (&self.broker, self.config);
        for asked in &mut self.asked {
            let line = Line { broker: Arc::clone(broker), config, node: asked.node };
            match line.send(&asked.message).await {
                Err(error @ CliError::NotEnrolled { .. }) => {
                    output::complain(&error.to_string());
                    asked.state = State::Failed;
                }
                sent => sent?,
            }
        }
        Ok(())
    }

    async fn send_unanswered(&self) -> Result<(), CliError> {
        for asked in self.asked.iter().filter(|asked| asked.state == State::Asked) {
            self.line(asked.node).send(&asked.message).await?;
        }
        Ok(())
    }

    /// Asks how they are those who heard the command and whose effect is waited for.
    async fn question(&mut self) -> Result<(), CliError> {
        if self.command == ControlCommand::Drain {
            return Ok(());
        }
        let (broker, config) = (&self.broker, self.config);
        for asked in self.asked.iter_mut().filter(|asked| asked.state == State::Answered) {
            let question = message(ControlCommand::Inspect, None);
            let line = Line { broker: Arc::clone(broker), config, node: asked.node };
            line.send(&question).await?;
            asked.question = Some(question);
        }
        Ok(())
    }

    fn line<'b>(&'b self, node: &'b NodeName) -> Line<'b> {
        Line { broker: Arc::clone(&self.broker), config: self.config, node }
    }

    fn take(&mut self, answer: ControlAnswer) -> Result<(), CliError> {
        let (wait, command, json) = (self.args.wait, self.command, self.args.json);
        let ours = |asked: &&mut Asked<'_>| *asked.node == answer.node && asked.waits() && asked.knows(&answer);
        let Some(asked) = self.asked.iter_mut().find(ours) else { return Ok(()) };
        let first = asked.state == State::Asked;
        asked.state = match answer.answer.as_str() {
            "refused" => State::Failed,
            _ if !wait || has_come(command, &answer) => State::Done,
            _ => State::Answered,
        };
        // What is asked on the way is shown once it says what was waited for.
        if first || asked.state != State::Answered {
            show(&answer, json)?;
        }
        asked.last = Some(answer);
        Ok(())
    }

    /// Names those who are still in `state`, and waits for them no longer.
    fn give_up(&mut self, state: State, after: Duration) {
        let after = wait::humantime(after);
        for asked in self.asked.iter_mut().filter(|asked| asked.state == state) {
            let node = asked.node;
            if state == State::Asked {
                let rest = match self.command {
                    ControlCommand::Drain => "if its agent is away, the command is forgotten",
                    _ => "the command waits in its queue until its agent is there",
                };
                output::complain(&format!("{node} did not answer within {after}: {rest}"));
            } else {
                let reasons = asked.last.as_ref().and_then(|last| last.not_ready.as_deref()).unwrap_or_default();
                let why = if reasons.is_empty() { String::new() } else { format!(" ({})", reasons.join("; ")) };
                let what = self.command.as_str();
                output::complain(&format!("{node} heard the {what}, which had not taken effect within {after}{why}"));
            }
        }
        let late = |asked: &&mut Asked<'_>| asked.state == state;
        self.asked.iter_mut().filter(late).for_each(|asked| asked.state = State::Late);
    }

    /// The worst of what happened.
    fn code(&self) -> u8 {
        let code = |asked: &Asked<'_>| match asked.state {
            State::Late => exit::TIMED_OUT,
            State::Failed => exit::TASK,
            State::Asked | State::Answered | State::Done => exit::OK,
        };
        self.asked.iter().map(code).max().unwrap_or(exit::OK)
    }
}

fn show(answer: &ControlAnswer, json: bool) -> Result<(), CliError> {
    if json { output::json(answer) } else { output::line(&words::answer_line(answer)) }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn answer(answer: &str, more: serde_json::Value) -> ControlAnswer {
        let mut whole = json!({"v": 1, "event_id": "e", "at": "2026-01-02T03:04:05Z", "node": "n", "boot": "b"});
        whole["answer"] = answer.into();
        whole.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        serde_json::from_value(whole).unwrap()
    }

    #[test]
    fn what_is_waited_for_depends_on_the_command() {
        use ControlCommand::{Drain, Inspect, Pause, Resume};
        let state = |ready: bool, paused: bool, running: u64, waiting: u64| {
            answer("state", json!({"ready": ready, "paused": paused, "running": running, "waiting": waiting}))
        };
        for (command, answer, come) in [
            (Drain, answer("draining", json!({})), false),
            (Drain, answer("drained", json!({})), true),
            (Pause, answer("paused", json!({})), false),
            (Pause, state(false, true, 1, 0), false),
            (Pause, state(false, true, 0, 2), false),
            (Pause, state(false, true, 0, 0), true),
            (Pause, state(true, false, 0, 0), false),
            (Resume, answer("resumed", json!({})), false),
            (Resume, state(false, false, 0, 0), false),
            (Resume, state(true, false, 3, 3), true),
            (Inspect, state(true, false, 0, 0), true),
        ] {
            assert_eq!(has_come(command, &answer), come, "{command:?} {answer:?}");
        }
    }
}
