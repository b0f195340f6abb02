//! A queue in memory: what is ready, what is out, and whose turn it is.

use std::{collections::BTreeMap, sync::Arc};

use tokio::time::Instant;

use super::session::Hold;
use crate::{
    broker::{ConsumerView, Inbox, topology::Lifetime},
    protocol::wire::{HeaderValue, Headers, Message},
};

/// What a message without a priority counts as.
const ORDINARY: u8 = 4;

/// A message in a queue.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub(super) message: Message,
    pub(super) exchange: String,
    pub(super) routing_key: String,
    /// Its place in the queue, which it keeps when it is given back.
    pub(super) position: u64,
    pub(super) redelivered: bool,
    pub(super) expires: Option<Instant>,
}

impl Entry {
    fn place(&self) -> (u8, u64) {
        (u8::MAX - self.message.priority.unwrap_or(ORDINARY), self.position)
    }
}

/// A delivery that is not settled yet.
pub(super) struct Out {
    pub(super) entry: Entry,
    pub(super) session: u64,
}

/// A consumer that is attached to a queue.
pub(super) struct Attached {
    pub(super) hold: Arc<Hold>,
    pub(super) inbox: Arc<Inbox>,
    pub(super) prefetch: u16,
    pub(super) tag: String,
    /// It is there and gets nothing.
    pub(super) deaf: bool,
}

/// A queue.
#[derive(Default)]
pub(super) struct Queue {
    pub(super) arguments: Headers,
    pub(super) lifetime: Lifetime,
    pub(super) ready: BTreeMap<(u8, u64), Entry>,
    pub(super) out: BTreeMap<u64, Out>,
    pub(super) consumers: Vec<Attached>,
    pub(super) limit: Option<usize>,
    turn: usize,
}

impl Queue {
    pub(super) fn new(arguments: Headers, lifetime: Lifetime) -> Self {
        Self { arguments, lifetime, ..Self::default() }
    }

    fn int(&self, name: &str) -> Option<u64> {
        self.arguments.get(name).and_then(HeaderValue::as_int).and_then(|int| u64::try_from(int).ok())
    }

    fn text(&self, name: &str) -> Option<&str> {
        self.arguments.get(name).and_then(HeaderValue::as_text)
    }

    /// How long messages stay, in milliseconds.
    pub(super) fn ttl_ms(&self) -> Option<u64> {
        self.int("x-message-ttl")
    }

    /// Where dead messages go.
    pub(super) fn dead_letter_exchange(&self) -> Option<String> {
        self.text("x-dead-letter-exchange").map(str::to_owned)
    }

    /// The routing key they get there, instead of their own.
    pub(super) fn dead_letter_key(&self) -> Option<String> {
        self.text("x-dead-letter-routing-key").map(str::to_owned)
    }

    /// Whether a dead message is kept until somebody takes it.
    pub(super) fn keeps_the_dead(&self) -> bool {
        self.text("x-dead-letter-strategy") == Some("at-least-once")
    }

    /// Whether it refuses what is published to it.
    pub(super) fn is_full(&self) -> bool {
        self.limit.is_some_and(|limit| self.ready.len() + self.out.len() >= limit)
    }

    /// Puts a message in its place.
    pub(super) fn put(&mut self, entry: Entry) {
        self.ready.insert(entry.place(), entry);
    }

    /// Takes the next message out for a session; with its number.
    pub(super) fn take(&mut self, number: u64, session: u64) -> Option<Entry> {
        let (_, entry) = self.ready.pop_first()?;
        self.out.insert(number, Out { entry: entry.clone(), session });
        Some(entry)
    }

    /// Returns a delivery to its place.
    pub(super) fn give_back(&mut self, number: u64) {
        if let Some(out) = self.out.remove(&number) {
            self.put(Entry { redelivered: true, ..out.entry });
        }
    }

    /// Returns all of a session's deliveries to their places.
    pub(super) fn give_back_all(&mut self, session: u64) {
        let numbers: Vec<_> =
            self.out.iter().filter(|(_, out)| out.session == session).map(|(&number, _)| number).collect();
        for number in numbers {
            self.give_back(number);
        }
    }

    /// The consumer whose turn it is, if one has room.
    pub(super) fn next_consumer(&mut self) -> Option<&Attached> {
        let room = |consumer: &Attached| {
            let session = consumer.hold.id();
            let out = self.out.values().filter(|out| out.session == session).count();
            !consumer.deaf && (consumer.prefetch == 0 || out < usize::from(consumer.prefetch))
        };
        if self.has_a_single_consumer() {
            return self.consumers.first().filter(|consumer| room(consumer));
        }
        let count = self.consumers.len();
        let index = (0..count).map(|step| (self.turn + step) % count).find(|&index| room(&self.consumers[index]))?;
        self.turn = index + 1;
        self.consumers.get(index)
    }

    fn has_a_single_consumer(&self) -> bool {
        matches!(self.arguments.get("x-single-active-consumer"), Some(HeaderValue::Bool(true)))
    }

    /// The consumers that a look counts: those that stand in line behind a single active one are not among them.
    pub(super) fn counted(&self) -> u32 {
        let count = self.consumers.len();
        u32::try_from(if self.has_a_single_consumer() { count.min(1) } else { count }).unwrap_or(u32::MAX)
    }

    /// Who consumes it.
    pub(super) fn seen(&self, name: &str) -> Vec<ConsumerView> {
        let single = self.has_a_single_consumer();
        let seen = |(place, consumer): (usize, &Attached)| ConsumerView {
            queue: name.to_owned(),
            tag: consumer.tag.clone(),
            connection: "memory".to_owned(),
            active: !single || place == 0,
        };
        self.consumers.iter().enumerate().map(seen).collect()
    }

    /// Takes out what has expired by `now`.
    pub(super) fn expire(&mut self, now: Instant) -> Vec<Entry> {
        let expired = |entry: &Entry| entry.expires.is_some_and(|expires| expires <= now);
        let (gone, ready) = std::mem::take(&mut self.ready).into_iter().partition(|(_, entry)| expired(entry));
        self.ready = ready;
        let gone: BTreeMap<_, _> = gone;
        gone.into_values().collect()
    }
}
