//! Following one task to its end, and showing it on the way.

use std::{
    cell::{Cell, RefCell},
    future::Future,
    io::IsTerminal,
    time::Duration,
};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::{
    error::CliError,
    follow::{Following, News},
    output, words,
};
use crate::{
    master::TaskRow,
    protocol::{Event, Progress, Status, TaskId},
    shutdown::exit,
};

/// How the events of a task are shown.
pub(super) struct View {
    json: bool,
    bar: ProgressBar,
    /// What the events shown so far tell of the task.
    row: RefCell<Option<TaskRow>>,
}

impl View {
    /// JSON lines on the standard output; else a bar on a terminal and plain lines otherwise.
    pub(super) fn new(json: bool) -> Self {
        let terminal = !json && std::io::stderr().is_terminal();
        let bar = ProgressBar::with_draw_target(
            None,
            if terminal { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() },
        );
        bar.set_style(unmeasured());
        if terminal {
            bar.enable_steady_tick(Duration::from_millis(120));
            bar.set_message("published");
        }
        Self { json, bar, row: RefCell::default() }
    }

    /// What was told of the task so far; nothing if nothing was.
    pub(super) fn row(&self) -> Option<TaskRow> {
        self.row.borrow().clone()
    }

    fn show(&self, event: &Event) -> Result<(), CliError> {
        match &mut *self.row.borrow_mut() {
            Some(row) => drop(row.apply(event)),
            unheard => *unheard = Some(TaskRow::heard(event)),
        }
        if self.json {
            return output::json(event);
        }
        if let Some(progress) = &event.progress {
            self.progress(progress);
        } else if self.bar.is_hidden() {
            output::note(&words::event_line(event));
        } else {
            self.bar.set_style(unmeasured());
            self.bar.set_message(event.status.as_str());
            if event.status == Status::Retrying {
                self.bar.suspend(|| output::note(&words::event_line(event)));
            }
        }
        Ok(())
    }

    fn progress(&self, progress: &Progress) {
        if self.bar.is_hidden() {
            return;
        }
        match progress.total {
            Some(total) if total > 0 => {
                self.bar.set_style(measured());
                self.bar.set_length(total);
                self.bar.set_position(progress.done.min(total));
            }
            _ => self.bar.set_style(unmeasured()),
        }
        self.bar.set_message(words::progress_words(progress));
    }

    fn note(&self, text: &str) {
        self.bar.suspend(|| output::note(text));
    }

    /// Says how it ended.
    pub(super) fn end(&self, event: &Event) -> Result<(), CliError> {
        self.bar.finish_and_clear();
        if self.json { Ok(()) } else { output::line(&words::outcome(event)) }
    }
}

fn measured() -> ProgressStyle {
    ProgressStyle::with_template("{spinner} [{bar:30}] {percent:>3}% {msg} ({elapsed})")
        .unwrap_or_else(|_| ProgressStyle::default_bar())
}

fn unmeasured() -> ProgressStyle {
    ProgressStyle::with_template("{spinner} {msg} ({elapsed})").unwrap_or_else(|_| ProgressStyle::default_spinner())
}

/// Follows `task` until a terminal event of it, showing what comes before.
///
/// After a gap `again` asks anew: a terminal event may have been missed, and the agent repeats it.
pub(super) async fn outcome<F>(
    following: &mut Following,
    task: &TaskId,
    timeout: Option<Duration>,
    view: &View,
    again: impl Fn() -> F,
) -> Result<Event, CliError>
where
    F: Future<Output = Result<(), CliError>>,
{
    // A node that does not know the task has said so.
    let unknown = Cell::new(false);
    let end = async {
        loop {
            match following.next().await {
                Some(News::Event(event)) if &event.task_id == task => {
                    view.show(&event)?;
                    if event.status.is_terminal() {
                        return Ok(*event);
                    }
                }
                Some(News::Answer(answer)) if answer.task_id.as_ref() == Some(task) => {
                    if answer.answer == "refused" {
                        return Err(CliError::Refused(words::answer_line(&answer)));
                    }
                    unknown.set(answer.answer == "pending");
                    if !view.json {
                        view.note(&words::answer_line(&answer));
                    }
                }
                Some(News::Event(_) | News::Answer(_)) => {}
                Some(News::Gap) => {
                    view.note("the connection was lost and is back; asking again");
                    again().await?;
                }
                None => {
                    return Err(CliError::Refused(format!(
                        "the subscription was ended by the broker; task {task} goes on, haul events shows it"
                    )));
                }
            }
        }
    };
    match timeout {
        None => end.await,
        Some(timeout) => tokio::time::timeout(timeout, end).await.unwrap_or_else(|_| {
            let time = humantime(timeout);
            Err(CliError::TimedOut(if unknown.get() {
                format!("task {task} did not come to its node within {time}; it is cancelled when it does")
            } else {
                format!(
                    "task {task} did not end within {time}; it goes on: follow it with haul events --task {task}, or \
                     cancel it"
                )
            }))
        }),
    }
}

/// The exit code for a terminal status.
pub(super) fn code(status: Status) -> u8 {
    if status == Status::Succeeded { exit::OK } else { exit::TASK }
}

/// Reads a duration of the command line (`90s`, `10m`).
pub(super) fn duration(text: &str) -> Result<Duration, String> {
    use serde::de::{IntoDeserializer, value::Error};
    let text: serde::de::value::StrDeserializer<'_, Error> = text.into_deserializer();
    humantime_serde::deserialize(text).map_err(|error| error.to_string())
}

/// Writes a duration as the command line reads it.
pub(super) fn humantime(duration: Duration) -> String {
    humantime_serde::re::humantime::format_duration(duration).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_read_as_people_write_them() {
        assert_eq!(duration("90s"), Ok(Duration::from_secs(90)));
        assert_eq!(duration("10m"), Ok(Duration::from_mins(10)));
        assert!(duration("soon").is_err() && duration("").is_err());
        assert_eq!(humantime(Duration::from_secs(90)), "1m 30s");
    }

    #[test]
    fn only_success_is_success() {
        for status in Status::ALL.into_iter().filter(|status| status.is_terminal()) {
            assert_eq!(code(status) == exit::OK, status == Status::Succeeded);
        }
    }
}
