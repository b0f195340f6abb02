//! The steps of a migration.
//!
//! ```text
//!           routes ──▶ old queue                          what is there
//! held      routes ──▶ old queue, incoming                both take what is published
//! cut       routes ──▶ incoming                           the old queue gets no more
//! drained              old queue ──▶ backlog              in order, each confirmed before it is acknowledged
//! deleted, declared                                       the name is free, then taken by the new queue
//! returned             backlog ──▶ new queue
//! bound     routes ──▶ incoming, new queue              incoming ──▶ new queue, before, meanwhile and afterwards
//! parted    routes ──▶ new queue
//! emptied                                               nothing is left in either of them, by the statistics
//! removed                                                 nothing is left aside
//! ```
//!
//! At every moment some queue is bound, so a mandatory publish never comes back, and every message is in a queue that a later
//! run reads. What is published while two queues are bound is there twice, which the journals of agents answer. What was
//! in the old queue keeps its order and stays before what came later; of what is published within the moment of *bound*,
//! some milliseconds, later ones can overtake earlier ones.

use std::{fmt, str::FromStr, time::Duration};

use serde::Serialize;
use tokio::{
    sync::Notify,
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{Migration, Stage};
use crate::broker::{
    BrokerError, Topology,
    management::Management,
    rabbitmq::{Admin, Poured, exists_otherwise},
    topology::Binding,
};

/// How long both queues are bound: a node of a cluster may learn of a binding later than another.
const OVERLAP: Duration = Duration::from_secs(1);
/// How long a consumer may be there, and messages be in hands: those of a run that was killed are for a moment.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long what is published may outrun us before the new queue is bound all the same.
const CATCH_UP: Duration = Duration::from_mins(1);
/// Between questions.
const PERIOD: Duration = Duration::from_millis(500);

/// What was done last; a test ends the process there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "the table above says what each means")]
pub enum MigrateStep {
    Held,
    Cut,
    Taken,
    Copied,
    Drained,
    Deleted,
    Declared,
    TakenBack,
    CopiedBack,
    Returned,
    Bound,
    Parted,
    Emptied,
    HalfRemoved,
    Removed,
}

impl MigrateStep {
    /// All of them, in their order.
    pub const ALL: [Self; 15] = [
        Self::Held,
        Self::Cut,
        Self::Taken,
        Self::Copied,
        Self::Drained,
        Self::Deleted,
        Self::Declared,
        Self::TakenBack,
        Self::CopiedBack,
        Self::Returned,
        Self::Bound,
        Self::Parted,
        Self::Emptied,
        Self::HalfRemoved,
        Self::Removed,
    ];

    const fn as_str(self) -> &'static str {
        match self {
            Self::Held => "held",
            Self::Cut => "cut",
            Self::Taken => "taken",
            Self::Copied => "copied",
            Self::Drained => "drained",
            Self::Deleted => "deleted",
            Self::Declared => "declared",
            Self::TakenBack => "taken-back",
            Self::CopiedBack => "copied-back",
            Self::Returned => "returned",
            Self::Bound => "bound",
            Self::Parted => "parted",
            Self::Emptied => "emptied",
            Self::HalfRemoved => "half-removed",
            Self::Removed => "removed",
        }
    }
}

impl fmt::Display for MigrateStep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for MigrateStep {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::ALL.into_iter().find(|step| step.as_str() == text).ok_or_else(|| format!("there is no step {text:?}"))
    }
}

/// Why a queue could not be made anew. Nothing is lost; running it again goes on from there.
#[derive(Debug, thiserror::Error)]
pub enum MigrateError {
    /// The broker could not be used, or refused.
    #[error(transparent)]
    Broker(#[from] BrokerError),
    /// Somebody consumes or reads a queue that must be quiet.
    #[error(
        "{queue} is in use: stop who consumes it (an agent: haul drain --node NODE, or its service; a master) or reads it \
         (haul dead, the console), then run this again"
    )]
    InUse {
        /// The queue.
        queue: String,
    },
    /// Messages are in the hands of somebody who does not consume any more, or wait for a dead-letter exchange.
    #[error(
        "{count} messages of {queue} are in somebody's hands (haul dead, the console, a program that ends), or wait for a \
         dead-letter exchange that does not take them: see to that, then run this again"
    )]
    Held {
        /// The queue.
        queue: String,
        /// How many.
        count: u64,
    },
    /// There are no statistics.
    #[error(
        "the broker does not tell how many messages {queue} has: enable its management statistics, then run this again"
    )]
    Untold {
        /// The queue.
        queue: String,
    },
    /// The name was taken again before the new queue could have it.
    #[error(
        "{queue} was made again with the old arguments: an agent or master of an older version runs; stop it, then run this \
         again"
    )]
    MadeAgain {
        /// The queue.
        queue: String,
    },
}

/// What was done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Migrated {
    /// Messages that were put aside from the old queue.
    pub set_aside: u64,
    /// Messages that were put into the new queue, duplicates among them.
    pub returned: u64,
}

/// Who makes queues anew.
pub struct Surgeon<'a> {
    /// The connection that is worked with.
    pub admin: &'a Admin,
    /// Where statistics are asked for.
    pub management: &'a Management,
    /// How long the broker's statistics may follow a change.
    pub lag: Duration,
    /// Hears of every step.
    pub told: &'a (dyn Fn(MigrateStep) + Send + Sync),
}

impl Surgeon<'_> {
    /// Makes one queue anew, from wherever an earlier run left it.
    ///
    /// # Errors
    /// See [`MigrateError`].
    pub async fn migrate(&self, migration: &Migration) -> Result<Migrated, MigrateError> {
        let mut done = Migrated::default();
        let (queue, aside) = (&migration.queue, &migration.aside);
        if migration.stage == Stage::Replace {
            // Later it does no harm: nothing is taken from the new queue.
            self.expect_quiet(&migration.quiet).await?;
        }
        self.admin.declare(&aside.topology()).await?;
        if migration.stage != Stage::Return {
            self.bind(migration, &aside.incoming).await?;
            self.tell(MigrateStep::Held);
        }
        if migration.stage == Stage::Replace {
            sleep(OVERLAP).await;
            done.set_aside = self.put_aside(migration).await?;
            self.admin.remove_queue(queue, migration.guarded).await?;
            self.tell(MigrateStep::Deleted);
        }
        let mut anew = Topology { queues: vec![migration.wanted.clone()], ..Topology::default() };
        self.admin.declare(&anew).await.map_err(|error| {
            if exists_otherwise(&error) { MigrateError::MadeAgain { queue: queue.clone() } } else { error.into() }
        })?;
        self.tell(MigrateStep::Declared);
        anew.queues.clear();
        anew.bindings.push(Binding { exchange: aside.back.clone(), queue: queue.clone(), routing_key: String::new() });
        self.admin.declare(&anew).await?;
        let told = |poured| self.tell_back(poured);
        done.returned += self.admin.pour(&aside.backlog, &aside.back, &told, None).await?;
        self.tell(MigrateStep::Returned);
        done.returned += self.hand_over(migration).await?;
        let (backlog, incoming) = tokio::try_join!(
            self.empty(&aside.backlog, &aside.back, &told),
            self.empty(&aside.incoming, &aside.back, &told)
        )?;
        done.returned += backlog + incoming;
        self.tell(MigrateStep::Emptied);
        self.admin.remove_queue(&aside.incoming, false).await?;
        self.admin.remove_exchange(&aside.back).await?;
        self.tell(MigrateStep::HalfRemoved);
        self.admin.remove_queue(&aside.backlog, false).await?;
        self.admin.remove_exchange(&aside.backlog).await?;
        self.tell(MigrateStep::Removed);
        Ok(done)
    }

    /// Takes the old queue off its routes and carries everything out of it.
    async fn put_aside(&self, migration: &Migration) -> Result<u64, MigrateError> {
        self.unbind(migration, &migration.queue).await?;
        self.tell(MigrateStep::Cut);
        let told = |poured| {
            self.tell(match poured {
                Poured::Taken => MigrateStep::Taken,
                Poured::Copied => MigrateStep::Copied,
                Poured::CaughtUp => return,
            });
        };
        let count = self.empty(&migration.queue, &migration.aside.backlog, &told).await?;
        self.expect_quiet(&migration.quiet).await?;
        self.tell(MigrateStep::Drained);
        Ok(count)
    }

    /// Binds the new queue in the place of the incoming one, which is carried over all the while: so whatever is still
    /// published to that one only is in the new one within a moment.
    async fn hand_over(&self, migration: &Migration) -> Result<u64, MigrateError> {
        let (aside, caught_up, parted) = (&migration.aside, Notify::new(), CancellationToken::new());
        let told = |poured| {
            if poured == Poured::CaughtUp {
                caught_up.notify_one();
            }
            self.tell_back(poured);
        };
        let pouring = async { Ok(self.admin.pour(&aside.incoming, &aside.back, &told, Some(&parted)).await?) };
        let binding = async {
            let _ = timeout(CATCH_UP, caught_up.notified()).await;
            self.bind(migration, &migration.queue).await?;
            self.tell(MigrateStep::Bound);
            sleep(OVERLAP).await;
            self.unbind(migration, &aside.incoming).await?;
            self.tell(MigrateStep::Parted);
            parted.cancel();
            Ok::<_, MigrateError>(())
        };
        tokio::try_join!(pouring, binding).map(|(count, ())| count)
    }

    fn tell_back(&self, poured: Poured) {
        match poured {
            Poured::Taken => self.tell(MigrateStep::TakenBack),
            Poured::Copied => self.tell(MigrateStep::CopiedBack),
            Poured::CaughtUp => {}
        }
    }

    /// Pours a queue that nothing is routed to until the broker's statistics agree that nothing is left.
    async fn empty(&self, from: &str, into: &str, told: &(dyn Fn(Poured) + Send + Sync)) -> Result<u64, MigrateError> {
        let (mut count, mut vain) = (0, 0);
        loop {
            let poured = self.admin.pour(from, into, told, None).await?;
            count += poured;
            vain = if poured == 0 { vain + 1 } else { 0 };
            match self.left(from).await? {
                0 => return Ok(count),
                left if vain > 2 => return Err(MigrateError::Held { queue: from.to_owned(), count: left }),
                _ => {}
            }
        }
    }

    /// How many messages a queue holds: ready, in hands, or on their way to a dead-letter exchange. AMQP shows the ready
    /// ones only, and zero where a quorum queue is slow to answer, so the statistics decide, once they are younger than
    /// the last message.
    async fn left(&self, queue: &str) -> Result<u64, MigrateError> {
        sleep(self.lag).await;
        let patience = Instant::now() + PATIENCE;
        loop {
            let load = self.management.load(queue).await?;
            let ready = self.admin.depth(queue).await?.map_or(0, |depth| depth.messages);
            match load {
                _ if ready > 0 => return Ok(ready.into()),
                Some(load) if load.messages == 0 => return Ok(0),
                Some(load) if Instant::now() >= patience => return Ok(load.messages),
                None if Instant::now() >= patience => return Err(MigrateError::Untold { queue: queue.to_owned() }),
                _ => sleep(PERIOD).await,
            }
        }
    }

    /// Nobody consumes these queues; the consumer of a run that was killed may be there for a moment.
    async fn expect_quiet(&self, queues: &[String]) -> Result<(), MigrateError> {
        let patience = Instant::now() + PATIENCE;
        for queue in queues {
            while self.admin.depth(queue).await?.is_some_and(|depth| depth.consumers > 0) {
                if Instant::now() >= patience {
                    return Err(MigrateError::InUse { queue: queue.clone() });
                }
                sleep(PERIOD).await;
            }
        }
        Ok(())
    }

    async fn bind(&self, migration: &Migration, queue: &str) -> Result<(), MigrateError> {
        for binding in bindings(migration, queue) {
            self.admin.bind(&binding).await?;
        }
        Ok(())
    }

    async fn unbind(&self, migration: &Migration, queue: &str) -> Result<(), MigrateError> {
        for binding in bindings(migration, queue) {
            self.admin.unbind(&binding).await?;
        }
        Ok(())
    }

    fn tell(&self, step: MigrateStep) {
        (self.told)(step);
    }
}

fn bindings<'a>(migration: &'a Migration, queue: &'a str) -> impl Iterator<Item = Binding> + 'a {
    migration.routes.iter().map(move |(exchange, routing_key)| Binding {
        exchange: exchange.clone(),
        queue: queue.to_owned(),
        routing_key: routing_key.clone(),
    })
}
