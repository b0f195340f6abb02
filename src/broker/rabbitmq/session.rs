//! A consumer that outlives its sessions: after any fault a new channel and a new tag, and no ack of an old one.

use std::{
    fmt,
    sync::{Arc, OnceLock},
    time::Duration,
};

use async_trait::async_trait;
use futures_util::StreamExt as _;
use lapin::{
    Acker, Channel,
    options::{BasicCancelOptions, BasicConsumeOptions, BasicQosOptions},
    protocol::AMQPSoftError,
    types::{FieldTable, ShortString},
};
use tokio::sync::{oneshot, watch};

use super::{
    acks::Hold,
    convert, declare,
    dial::{is_refusal, words},
    link::{Line, State},
    waits::Waits,
};
use crate::{
    broker::{
        BrokerError, Consume, Delivery, Health, Inbox, Presence, Settle, Settlement, StaleDelivery, Stop,
        inbox::stopped,
    },
    protocol::wire::HeaderValue,
};

/// For the broker's part in opening or closing a session.
pub(super) const STEP_TIMEOUT: Duration = Duration::from_secs(10);
/// How long tries to consume may take, one after the other, in milliseconds: ten seconds in all. A broker that is asked
/// before the queue has its leader, soon after a start, is silent for 5 s and fails, even where there is a leader a moment
/// later: whoever asks then is answered at once. The last try waits for a broker that is only slow.
const PATIENCE_MS: [u64; 7] = [500, 500, 500, 1000, 1000, 1000, 5500];
/// Between two of these tries.
const BREATH: Duration = Duration::from_millis(50);
/// For a cancel before a session is given up: without it the broker may still count the old consumer for a moment.
const FAREWELL: Duration = Duration::from_secs(2);
/// Attempts on one connection that end in something else than a refusal, until another connection is made.
const TRIES: u32 = 3;
/// How often a quiet session is looked at: a lost channel is noticed even if nothing said so.
const GLANCE: Duration = Duration::from_secs(1);

/// The right to settle one delivery of one session.
pub(super) struct Tag {
    number: u64,
    /// Only asked whether its channel has ended: settling is its hold's.
    acker: Acker,
    hold: Arc<Hold>,
}

impl Tag {
    /// Wraps what lapin delivered.
    pub(super) fn deliver(arrived: lapin::message::Delivery, hold: &Arc<Hold>) -> Delivery {
        let tag = Self { number: arrived.delivery_tag, acker: arrived.acker, hold: Arc::clone(hold) };
        hold.delivered(tag.number);
        Delivery::new(
            convert::message(&arrived.properties, arrived.data),
            arrived.exchange.to_string(),
            arrived.routing_key.to_string(),
            arrived.redelivered,
            Arc::new(tag),
        )
    }
}

#[async_trait]
impl Settle for Tag {
    async fn settle(&self, settlement: Settlement) -> Result<(), StaleDelivery> {
        if self.is_stale() {
            return Err(StaleDelivery);
        }
        self.hold.settle(self.number, settlement).await
    }

    fn is_stale(&self) -> bool {
        self.hold.has_ended() || self.acker.poisoned()
    }
}

/// Why a session ended.
enum End {
    /// The consumer was stopped or dropped.
    Asked(Stop),
    /// Another session was asked for.
    Rebuild,
    /// Anything else.
    Fault(String),
}

/// Why a session could not be opened.
struct Failure {
    what: String,
    error: Option<lapin::Error>,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.error {
            Some(error) => write!(f, "{}: {}", self.what, words(error)),
            None => write!(f, "{}: no answer in time", self.what),
        }
    }
}

/// The loop behind one consumer.
pub(super) struct Sessions {
    pub(super) consume: Consume,
    pub(super) link: watch::Receiver<State>,
    pub(super) inbox: Arc<Inbox>,
    pub(super) presence: Arc<Presence>,
    pub(super) stop: watch::Receiver<Stop>,
    pub(super) health: watch::Sender<Health>,
}

struct Session {
    channel: Channel,
    stream: lapin::Consumer,
    hold: Arc<Hold>,
    tag: ShortString,
    /// Consumers that the broker counted before this one.
    before: u32,
    line: Arc<Line>,
}

impl Sessions {
    /// Consumes until asked to stop. `first` hears of the first session, or of a refusal that ends it all; while the
    /// broker cannot be reached it hears at once that there is nothing to wait for.
    pub(super) async fn run(mut self, first: oneshot::Sender<Result<(), BrokerError>>) {
        let mut first = Some(first);
        let mut waits = Waits::new();
        let mut number = 0_u64;
        let (mut tries, mut unanswered) = (0_u32, 0_usize);
        let mut tell = |verdict| first.take().is_some_and(|first| first.send(verdict).is_ok());
        loop {
            let line = tokio::select! {
                biased;
                () = stopped(&mut self.stop) => break,
                up = Self::line(&mut self.link, &mut tell) => up,
            };
            let Some(line) = line else { break };
            number += 1;
            let patience = Duration::from_millis(PATIENCE_MS[unanswered]);
            match self.open(Arc::clone(&line), number, patience).await {
                Ok(session) => {
                    (waits, tries, unanswered) = (Waits::new(), 0, 0);
                    tell(Ok(()));
                    tracing::info!(broker.queue = self.consume.queue, broker.tag = %session.tag, "consuming");
                    self.presence.begin(session.tag.as_str(), session.before, &session.hold.counts);
                    let end = self.forward(session).await;
                    self.presence.end();
                    self.health.send_replace(Health::Down);
                    match end {
                        End::Asked(_) => break,
                        End::Rebuild => tracing::info!(broker.queue = self.consume.queue, "consuming anew"),
                        End::Fault(reason) => tracing::warn!(
                            broker.queue = self.consume.queue,
                            error = reason,
                            "the consumer was lost; consuming again"
                        ),
                    }
                }
                Err(failure) => {
                    let refusal = failure.error.as_ref().is_some_and(is_refusal);
                    if refusal
                        && let Some(error) = &failure.error
                        && tell(Err(declare::refused(&failure.what, error)))
                    {
                        break;
                    }
                    tracing::warn!(broker.queue = self.consume.queue, error = %failure, "cannot consume yet");
                    let silent = failure.error.is_none();
                    if silent && unanswered + 1 < PATIENCE_MS.len() {
                        unanswered += 1;
                        tokio::time::sleep(BREATH).await;
                        continue;
                    }
                    unanswered = 0;
                    tries = if refusal { 0 } else { tries + 1 };
                    if (silent || tries >= TRIES) && self.leads_everywhere() {
                        tries = 0;
                        line.give_up(&failure.to_string());
                    }
                }
            }
            tokio::select! {
                () = stopped(&mut self.stop) => break,
                () = tokio::time::sleep(waits.next()) => {}
            }
        }
        self.health.send_replace(Health::Down);
        self.inbox.close();
    }

    /// Whether another node of a cluster may have the queue where this one does not: a quorum queue is on several of
    /// them, and one that is cut off from the others knows of it and cannot serve it. A classic queue is on one node
    /// only, and its trouble must not take the connection from the others.
    fn leads_everywhere(&self) -> bool {
        let quorum = HeaderValue::from("quorum");
        let queues = &self.consume.declare.queues;
        queues
            .iter()
            .any(|queue| queue.name == self.consume.queue && queue.arguments.get("x-queue-type") == Some(&quorum))
    }

    /// The connection, once there is one.
    async fn line(
        link: &mut watch::Receiver<State>,
        tell: &mut impl FnMut(Result<(), BrokerError>) -> bool,
    ) -> Option<Arc<Line>> {
        loop {
            let state = link.borrow_and_update().clone();
            match state {
                State::Up(up) => return Some(up),
                State::Closed => return None,
                State::Failed(error) if error.refused => {
                    if tell(Err(error.into())) {
                        return None;
                    }
                }
                State::Failed(_) => {
                    tell(Ok(()));
                }
                State::Trying => {}
            }
            link.changed().await.ok()?;
        }
    }

    async fn open(&self, line: Arc<Line>, number: u64, patience: Duration) -> Result<Session, Failure> {
        let queue = format!("queue {:?}", self.consume.queue);
        let asked = OnceLock::new();
        let opening = async {
            let failed = |what: &str| {
                let what = what.to_owned();
                move |error| Failure { what, error: Some(error) }
            };
            let mut channel = line.channel().await.map_err(failed("a channel"))?;
            if let Err((what, error)) = declare::declare(&channel, &self.consume.declare).await {
                // Whoever may not declare may well consume what others declared.
                if !declare::is(&error, &AMQPSoftError::ACCESSREFUSED) {
                    return Err(Failure { what, error: Some(error) });
                }
                channel = line.channel().await.map_err(failed("a channel"))?;
            }
            let hold = Hold::new(channel.clone());
            let _ = asked.set(channel.clone());
            channel
                .basic_qos(self.consume.prefetch, BasicQosOptions { global: false })
                .await
                .map_err(failed("a prefetch window"))?;
            let before = declare::counted(&channel, &self.consume.queue).await.map_err(failed(&queue))?;
            let tag = convert::cut(&format!("{}-{number}", self.consume.tag));
            let stream = channel
                .basic_consume(
                    convert::cut(&self.consume.queue),
                    tag.clone(),
                    BasicConsumeOptions::default(),
                    FieldTable::default(),
                )
                .await
                .map_err(failed(&queue))?;
            Ok((channel, stream, hold, tag, before.consumers))
        };
        match tokio::time::timeout(patience, opening).await {
            Ok(Ok((channel, stream, hold, tag, before))) => Ok(Session { channel, stream, hold, tag, before, line }),
            Ok(Err(failure)) => Err(failure),
            Err(_) => {
                // What the broker may still begin there ends with the channel, whose close waits behind it.
                if let Some(channel) = asked.into_inner() {
                    tokio::spawn(async move {
                        let goodbye = channel.close(200, "no answer in time".into());
                        let _ = tokio::time::timeout(STEP_TIMEOUT, goodbye).await;
                    });
                }
                Err(Failure { what: queue, error: None })
            }
        }
    }

    /// Passes deliveries on until the session ends, and cleans up after it.
    async fn forward(&mut self, mut session: Session) -> End {
        let mut glance = tokio::time::interval(GLANCE);
        let mut rebuilds = self.presence.rebuilds();
        let end = loop {
            let health = if session.line.blocked() { Health::Blocked } else { Health::Up };
            self.health.send_if_modified(|old| std::mem::replace(old, health) != health);
            tokio::select! {
                biased;
                () = stopped(&mut self.stop) => break End::Asked(*self.stop.borrow()),
                () = rebuilds.asked() => break End::Rebuild,
                arrived = session.stream.next() => match arrived {
                    Some(Ok(arrived)) => self.inbox.put(Tag::deliver(arrived, &session.hold)),
                    Some(Err(error)) => break End::Fault(words(&error)),
                    // Also what a consumer timeout looks like, with the channel as if nothing had happened.
                    None => break End::Fault("the broker cancelled the consumer".to_owned()),
                },
                _ = glance.tick() => {
                    if !session.line.connected() || !session.channel.status().connected() {
                        break End::Fault("the connection was lost".to_owned());
                    }
                }
            }
        };
        match &end {
            End::Asked(how @ (Stop::No | Stop::GiveBack | Stop::KeepOrder)) => self.wind_up(session, *how).await,
            // Not cancelled first: then the next in line would be served before what we hold is back.
            End::Asked(Stop::LetGo) | End::Rebuild | End::Fault(_) => {
                session.hold.end();
                self.inbox.forget_stale();
                if matches!(end, End::Rebuild) {
                    let cancel = session.channel.basic_cancel(session.tag.clone(), BasicCancelOptions::default());
                    let _ = tokio::time::timeout(FAREWELL, cancel).await;
                }
                // The broker may still count the old consumer; it lets go when the channel closes.
                let goodbye = session.channel.close(200, "starting over".into());
                let _ = tokio::time::timeout(STEP_TIMEOUT, goodbye).await;
            }
        }
        end
    }

    /// Cancels, gives back what was not handed out, and leaves the channel to the deliveries in hand.
    async fn wind_up(&self, mut session: Session, how: Stop) {
        let cancel = session.channel.basic_cancel(session.tag.clone(), BasicCancelOptions::default());
        let cancelled = tokio::time::timeout(STEP_TIMEOUT, cancel).await;
        if !matches!(cancelled, Ok(Ok(()))) {
            return;
        }
        if how == Stop::KeepOrder {
            // It goes back as the channel closes, together with what is in hand.
            return self.inbox.close();
        }
        let mut rest = self.inbox.drain();
        // The cancel is confirmed: what the stream holds now is all there will be.
        while let Ok(Some(Ok(arrived))) = tokio::time::timeout(Duration::ZERO, session.stream.next()).await {
            rest.push(Tag::deliver(arrived, &session.hold));
        }
        for delivery in rest {
            if delivery.requeue().await.is_err() {
                return;
            }
        }
        // An answer on this channel comes after what was given back on it is with the queue: whoever consumes next, on
        // another one, finds it there.
        let asked = session.channel.basic_qos(self.consume.prefetch, BasicQosOptions::default());
        let _ = tokio::time::timeout(STEP_TIMEOUT, asked).await;
    }
}
