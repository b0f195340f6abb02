//! The side of the agent that comes: takes the storage directory, from a running agent if need be.

use std::{sync::Arc, time::Duration};

use tokio::time::Instant;

use super::{CliError, WorkerArgs};
use crate::{
    broker::Broker,
    config::Config,
    git::Support,
    lock::{
        LockError, StorageLock,
        door::{Answer, Ask, Visit},
    },
    shutdown::Shutdown,
    worker::{Ahead, WorkerSettings},
};

/// Between tries of the lock while its holder leaves: what a task waits for longer because of it.
const TRY: Duration = Duration::from_millis(5);
/// How long a holder without a door may keep the lock: a command that needs the storage for a moment.
const NO_DOOR: Duration = Duration::from_secs(5);
/// For the broker's part before the running agent is asked to leave.
const PREPARING: Duration = Duration::from_mins(1);
/// What leaving may take beyond the grace: children that are killed, last events, connections that are closed.
const LEAVING: Duration = Duration::from_mins(1);

/// The storage directory and the way to the broker; nothing if a signal came first.
pub(super) async fn storage(
    config: &Config,
    args: &WorkerArgs,
    broker: &Arc<dyn Broker>,
    settings: &WorkerSettings,
    boot: &str,
    shutdown: &Shutdown,
) -> Result<Option<(StorageLock, Ahead)>, CliError> {
    match StorageLock::take(&config.storage_path) {
        Ok(lock) => Ok(Some((lock, Ahead::default()))),
        Err(LockError::Held { holder, .. }) if args.take_over => {
            let taking = TakeOver { config, args, broker, settings, boot, holder };
            // Dropped half-way, the visit ends and the running agent goes on.
            shutdown.soft().run_until_cancelled(taking.run()).await.transpose()
        }
        Err(error) => Err(error.into()),
    }
}

struct TakeOver<'a> {
    config: &'a Config,
    args: &'a WorkerArgs,
    broker: &'a Arc<dyn Broker>,
    settings: &'a WorkerSettings,
    boot: &'a str,
    /// The holder's number, as it is in the lock file.
    holder: String,
}

impl TakeOver<'_> {
    async fn run(&self) -> Result<(StorageLock, Ahead), CliError> {
        let mut visit = match self.visit().await? {
            Met::Lock(lock) => return Ok((lock, Ahead::default())),
            Met::Holder(visit) => visit,
        };
        let (node, prefix) = (self.settings.node.as_str(), self.settings.names.prefix());
        if (visit.holder.node.as_str(), visit.holder.prefix.as_str()) != (node, prefix) {
            return Err(self.refused(&format!(
                "is node {} under the prefix {}, and this would be {node} under {prefix}: stop it first, or give this one \
                 another storage directory",
                visit.holder.node, visit.holder.prefix
            )));
        }
        // What this process would refuse to start for is found while the other one still runs.
        Support::of_this_node()
            .allow(&self.config.git)
            .map_err(|failure| self.refused(&format!("goes on: {failure}")))?;
        tracing::info!(
            process.id = visit.holder.pid,
            version = visit.holder.version,
            "taking over from a running agent: preparing"
        );
        // A paused agent consumes nothing, and neither must who comes after it.
        let preparing = Ahead::prepare(self.broker, self.settings, self.boot, !visit.holder.paused);
        let ahead = tokio::time::timeout(PREPARING, preparing).await.map_err(|_| {
            let what = "goes on: the broker did not answer in time, and without it nothing is taken over";
            self.refused(what)
        })??;
        let grace_ms = self.args.grace.map(|grace| u64::try_from(grace.as_millis()).unwrap_or(u64::MAX));
        let ask = Ask { pid: std::process::id(), version: env!("CARGO_PKG_VERSION").to_owned(), grace_ms };
        let grace = match visit.ask(&ask).await {
            Ok(Answer::Leaving { grace_ms }) => Duration::from_millis(grace_ms),
            Ok(Answer::Refused { reason }) => return Err(self.refused(&format!("stays: {reason}"))),
            Err(error) => return Err(self.refused(&format!("did not answer ({error}): end it, then start again"))),
        };
        let patience = grace + LEAVING;
        match self.lock_within(patience).await? {
            Some(lock) => Ok((lock, ahead)),
            None => Err(self.refused(&format!(
                "did not leave within {} s and seems to hang: end it (kill -9 {}), then start again",
                patience.as_secs(),
                self.holder
            ))),
        }
    }

    /// Meets the holder, or finds the directory free.
    async fn visit(&self) -> Result<Met, CliError> {
        let begun = Instant::now();
        loop {
            match Visit::begin(&self.config.storage_path).await {
                Ok(Some(visit)) => return Ok(Met::Holder(visit)),
                Ok(None) => {}
                Err(error) => {
                    let what = format!("does not answer ({error}): end it (kill -9 {}), then start again", self.holder);
                    return Err(self.refused(&what));
                }
            }
            if let Some(lock) = self.lock()? {
                return Ok(Met::Lock(lock));
            }
            if begun.elapsed() >= NO_DOOR {
                return Err(self.refused("cannot be taken over from: stop it, then start again"));
            }
            tokio::time::sleep(TRY * 10).await;
        }
    }

    async fn lock_within(&self, patience: Duration) -> Result<Option<StorageLock>, CliError> {
        let begun = Instant::now();
        loop {
            if let Some(lock) = self.lock()? {
                return Ok(Some(lock));
            }
            if begun.elapsed() >= patience {
                return Ok(None);
            }
            tokio::time::sleep(TRY).await;
        }
    }

    fn lock(&self) -> Result<Option<StorageLock>, CliError> {
        match StorageLock::take(&self.config.storage_path) {
            Ok(lock) => Ok(Some(lock)),
            Err(LockError::Held { .. }) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    fn refused(&self, what: &str) -> CliError {
        let (holder, path) = (&self.holder, self.config.storage_path.display());
        CliError::TakeOver(format!("the process {holder} that uses the storage directory {path} {what}"))
    }
}

/// Who was met at the door.
enum Met {
    Holder(Visit),
    Lock(StorageLock),
}
