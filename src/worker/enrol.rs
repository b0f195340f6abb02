//! Before the first message: what the broker must have, and whether the queue is free.

use std::{sync::Arc, time::Duration};

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{WorkerError, WorkerSettings};
use crate::broker::{Broker, BrokerError, Consume, Consumer, Health, Topology};

/// For the first session of a consumer that stands in line.
const IN_LINE: Duration = Duration::from_secs(10);
/// How often it is looked whether a migration of our queue is over.
const MIGRATION_INTERVAL: Duration = Duration::from_secs(2);

/// The way to the broker, made ready before the worker has its storage: for an agent that succeeds a running one.
#[derive(Default)]
pub struct Ahead {
    /// Everything that the broker must have was seen there.
    pub(super) enrolled: bool,
    /// Stands in line for the queue; the broker serves it in the moment in which the one before lets go.
    pub(super) consumer: Option<Consumer>,
}

impl Ahead {
    /// Does all that needs no storage. `stand_in_line`: also stands in line for the queue, behind whoever consumes it.
    ///
    /// # Errors
    /// When the broker cannot be reached or refuses.
    pub async fn prepare(
        broker: &Arc<dyn Broker>,
        settings: &WorkerSettings,
        boot: &str,
        stand_in_line: bool,
    ) -> Result<Self, WorkerError> {
        if migrating(&**broker, settings).await? {
            // It waits as any other start does.
            return Ok(Self::default());
        }
        ensure_topology(&**broker, settings).await?;
        if !stand_in_line {
            return Ok(Self { enrolled: true, consumer: None });
        }
        let consumer = broker.consume(tasks(settings, boot, settings.window)).await?;
        let mut health = consumer.health();
        let up = tokio::time::timeout(IN_LINE, health.wait_for(|health| *health != Health::Down)).await;
        if !matches!(up, Ok(Ok(_))) {
            let reason = "the queue could not be consumed in time".to_owned();
            return Err(BrokerError::Unreachable { address: "the broker".to_owned(), reason }.into());
        }
        Ok(Self { enrolled: true, consumer: Some(consumer) })
    }
}

/// How the queue of tasks is consumed.
pub(super) fn tasks(settings: &WorkerSettings, boot: &str, prefetch: u16) -> Consume {
    let names = &settings.names;
    Consume {
        queue: names.node(&settings.node),
        tag: format!("haul-{}-{boot}", settings.node),
        prefetch,
        declare: names.node_topology(&settings.node),
    }
}

/// Makes what is missing where we may; an agent without the right to configure shared objects only checks them.
pub(super) async fn ensure_topology(broker: &dyn Broker, settings: &WorkerSettings) -> Result<(), WorkerError> {
    let names = &settings.names;
    let shared = names.shared_topology(&settings.results_queue);
    let missing = broker.missing(&shared).await?;
    if !missing.is_empty() {
        tracing::info!(missing = ?missing, "making shared exchanges and queues");
        if let Err(error) = broker.declare(&shared).await {
            return Err(not_made(error, &missing));
        }
    }
    ensure_own(broker, &names.node_topology(&settings.node)).await?;
    ensure_own(broker, &names.control_topology(&settings.node)).await
}

/// What it means that shared objects could not be made: a broker that went away meanwhile refused nothing.
fn not_made(error: BrokerError, missing: &[String]) -> WorkerError {
    if matches!(error, BrokerError::Unreachable { .. }) {
        return error.into();
    }
    tracing::error!(error = %error, "shared exchanges and queues could not be made");
    WorkerError::Topology { missing: missing.join(", ") }
}

/// Makes a queue of our own; who may not can use it all the same where somebody else has made it.
async fn ensure_own(broker: &dyn Broker, own: &Topology) -> Result<(), WorkerError> {
    match broker.declare(own).await {
        Err(BrokerError::Refused { reason, .. }) if reason.starts_with("ACCESS_REFUSED") => {
            let missing = broker.missing(own).await?;
            if missing.is_empty() { Ok(()) } else { Err(WorkerError::Topology { missing: missing.join(", ") }) }
        }
        declared => Ok(declared?),
    }
}

/// While our queue is being made anew, what waited in it is put aside: taking what comes meanwhile would turn the order
/// round, and a task that a later one has overtaken is superseded.
pub(super) async fn wait_for_a_migration(
    broker: &dyn Broker,
    settings: &WorkerSettings,
    soft: &CancellationToken,
) -> Result<(), WorkerError> {
    let mut said = false;
    while !soft.is_cancelled() && migrating(broker, settings).await? {
        if !std::mem::replace(&mut said, true) {
            tracing::warn!(
                broker.queue = settings.names.node(&settings.node),
                "our queue is being made anew: haul topology migrate completes it"
            );
        }
        tokio::select! {
            () = tokio::time::sleep(MIGRATION_INTERVAL) => {}
            () = soft.cancelled() => {}
        }
    }
    Ok(())
}

async fn migrating(broker: &dyn Broker, settings: &WorkerSettings) -> Result<bool, WorkerError> {
    let aside = settings.names.set_aside(&settings.names.node(&settings.node));
    match broker.depth(&aside).await {
        Err(BrokerError::Refused { reason, .. }) if reason.starts_with("ACCESS_REFUSED") => Ok(false),
        depth => Ok(depth?.is_some()),
    }
}

/// A consumer on our queue while we hold the storage lock is another agent of the same name, or the ghost of a lost
/// connection of our own, which the broker drops once its heartbeats are missed.
pub(super) async fn refuse_an_occupied_queue(
    broker: &dyn Broker,
    settings: &WorkerSettings,
    soft: &CancellationToken,
) -> Result<(), WorkerError> {
    let queue = settings.names.node(&settings.node);
    if settings.force {
        return Ok(());
    }
    let patience = Instant::now() + settings.ghost_limit;
    let mut said = false;
    loop {
        match broker.depth(&queue).await? {
            Some(depth) if depth.consumers > 0 => {}
            _ => return Ok(()),
        }
        if Instant::now() >= patience {
            return Err(WorkerError::Occupied { queue });
        }
        if !std::mem::replace(&mut said, true) {
            let patience_ms = u64::try_from(settings.ghost_limit.as_millis()).unwrap_or(u64::MAX);
            tracing::warn!(
                broker.queue = queue,
                wait_ms = patience_ms,
                "another consumer is on our queue; waiting, since it may be a lost connection of our own"
            );
        }
        tokio::select! {
            () = tokio::time::sleep(Duration::from_secs(1)) => {}
            () = soft.cancelled() => return Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_broker_that_went_away_while_shared_objects_were_made_is_waited_for() {
        let missing = ["exchange \"haul.events\"".to_owned()];
        let gone = BrokerError::Unreachable { address: "the broker".to_owned(), reason: "closed".to_owned() };
        assert!(matches!(not_made(gone, &missing), WorkerError::Broker(BrokerError::Unreachable { .. })));
        let no = BrokerError::Refused { what: "exchange".to_owned(), reason: "ACCESS_REFUSED".to_owned() };
        assert!(matches!(not_made(no, &missing), WorkerError::Topology { .. }));
    }
}
