//! Exchanges, bindings and the way of a message into queues; behind one lock.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use jiff::Timestamp;
use tokio::time::Instant;

use super::queue::{Entry, Queue};
use crate::{
    broker::{
        BrokerError, Outgoing, PublishError, Topology,
        topology::{Binding, Exchange, ExchangeKind, Lifetime},
    },
    protocol::wire::{HeaderValue, Message, header},
};

/// How often a dead message that nobody takes is offered again where the queue keeps it.
const OFFERED_AGAIN: Duration = Duration::from_mins(3);

/// Everything a broker knows.
#[derive(Default)]
pub(super) struct State {
    pub(super) exchanges: BTreeMap<String, Exchange>,
    pub(super) queues: BTreeMap<String, Queue>,
    pub(super) bindings: BTreeSet<Binding>,
    pub(super) published: Vec<Outgoing>,
    pub(super) refusing: bool,
    pub(super) losing: bool,
    pub(super) telling: bool,
    /// How often each queue was looked at, and consumed anew.
    pub(super) tally: BTreeMap<String, Tally>,
    numbers: u64,
}

/// What was done with a queue.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Tally {
    pub(super) looks: u64,
    pub(super) sessions: u64,
}

/// A queue to look at when a time has come.
pub(super) type Alarm = (String, Instant);

impl State {
    /// A number that was not used before.
    pub(super) fn number(&mut self) -> u64 {
        self.numbers += 1;
        self.numbers
    }

    /// Publishes; the alarms are for what will expire.
    pub(super) fn publish(&mut self, outgoing: Outgoing, now: Instant) -> (Result<(), PublishError>, Vec<Alarm>) {
        let exchange = outgoing.exchange.clone();
        if self.refusing {
            return (Err(PublishError::Refused { exchange }), Vec::new());
        }
        if !exchange.is_empty() && !self.exchanges.contains_key(&exchange) {
            let reason = format!("NOT_FOUND - no exchange '{exchange}' in vhost '/'");
            return (Err(PublishError::Forbidden { exchange, reason }), Vec::new());
        }
        let targets = self.route(&exchange, &outgoing.routing_key);
        if targets.is_empty() && outgoing.mandatory {
            let routing_key = outgoing.routing_key;
            return (Err(PublishError::Unroutable { exchange, routing_key }), Vec::new());
        }
        let mut alarms = Vec::new();
        let mut full = false;
        for target in targets {
            if self.queues.get(&target).is_some_and(Queue::is_full) {
                full = true;
                continue;
            }
            alarms.extend(self.enqueue(&target, outgoing.message.clone(), &exchange, &outgoing.routing_key, now));
        }
        if full {
            return (Err(PublishError::Refused { exchange }), alarms);
        }
        self.published.push(outgoing);
        if std::mem::take(&mut self.losing) {
            let reason = "the connection was lost".to_owned();
            return (Err(PublishError::Unconfirmed { reason }), alarms);
        }
        (Ok(()), alarms)
    }

    fn enqueue(
        &mut self,
        queue: &str,
        message: Message,
        exchange: &str,
        routing_key: &str,
        now: Instant,
    ) -> Option<Alarm> {
        let position = self.number();
        let target = self.queues.get_mut(queue)?;
        let ttl = [target.ttl_ms(), message.expiration_ms].into_iter().flatten().min();
        let expires = ttl.map(|ms| now + Duration::from_millis(ms));
        target.put(Entry {
            message,
            exchange: exchange.to_owned(),
            routing_key: routing_key.to_owned(),
            position,
            redelivered: false,
            expires,
        });
        expires.map(|expires| (queue.to_owned(), expires))
    }

    /// The queues that an exchange chooses, or its alternate where it chooses none.
    pub(super) fn route(&self, exchange: &str, key: &str) -> BTreeSet<String> {
        let mut name = exchange.to_owned();
        let mut visited = BTreeSet::new();
        loop {
            if name.is_empty() {
                return self.queues.contains_key(key).then(|| key.to_owned()).into_iter().collect();
            }
            let Some(exchange) = self.exchanges.get(&name).filter(|_| visited.insert(name.clone())) else {
                return BTreeSet::new();
            };
            let chosen: BTreeSet<_> = self
                .bindings
                .iter()
                .filter(|binding| binding.exchange == name && chooses(exchange.kind, &binding.routing_key, key))
                .map(|binding| binding.queue.clone())
                .collect();
            match &exchange.alternate {
                Some(alternate) if chosen.is_empty() => name.clone_from(alternate),
                _ => return chosen,
            }
        }
    }

    /// Moves what has expired in `queue`; also the queues that got something, and what will expire there.
    pub(super) fn expire(&mut self, queue: &str, now: Instant) -> (BTreeSet<String>, Vec<Alarm>) {
        let expired = self.queues.get_mut(queue).map(|queue| queue.expire(now)).unwrap_or_default();
        let (mut touched, mut alarms) = (BTreeSet::new(), Vec::new());
        for entry in expired {
            let (queues, more) = self.bury(queue, entry, "expired", now);
            touched.extend(queues);
            alarms.extend(more);
        }
        (touched, alarms)
    }

    /// Sends a message to its queue's dead-letter exchange.
    pub(super) fn bury(
        &mut self,
        queue: &str,
        entry: Entry,
        reason: &str,
        now: Instant,
    ) -> (BTreeSet<String>, Vec<Alarm>) {
        let Some(home) = self.queues.get_mut(queue) else { return Default::default() };
        let Some(exchange) = home.dead_letter_exchange() else { return Default::default() };
        let (key, keeps) = (home.dead_letter_key().unwrap_or_else(|| entry.routing_key.clone()), home.keeps_the_dead());
        let targets = self.route(&exchange, &key);
        if targets.is_empty() && keeps {
            let expires = now + OFFERED_AGAIN;
            if let Some(home) = self.queues.get_mut(queue) {
                home.put(Entry { expires: Some(expires), ..entry });
            }
            return (BTreeSet::new(), vec![(queue.to_owned(), expires)]);
        }
        let mut message = entry.message;
        note_death(&mut message, queue, &entry.exchange, &entry.routing_key, reason);
        message.expiration_ms = None;
        let alarms =
            targets.iter().filter_map(|target| self.enqueue(target, message.clone(), &exchange, &key, now)).collect();
        (targets, alarms)
    }

    /// Deletes the queues that lived with a consumer that is gone.
    pub(super) fn end_sessions(&mut self) {
        self.queues.retain(|_, queue| queue.lifetime == Lifetime::Durable || !queue.consumers.is_empty());
        let Self { queues, bindings, .. } = self;
        bindings.retain(|binding| queues.contains_key(&binding.queue));
    }

    /// Declares all of `topology`.
    pub(super) fn declare(&mut self, topology: &Topology) -> Result<(), BrokerError> {
        let refused = |what: String, reason: String| Err(BrokerError::Refused { what, reason });
        for exchange in &topology.exchanges {
            let existing = self.exchanges.entry(exchange.name.clone()).or_insert_with(|| exchange.clone());
            if existing != exchange {
                let what = format!("exchange {:?}", exchange.name);
                return refused(what, "PRECONDITION_FAILED - it exists with other arguments".to_owned());
            }
        }
        for queue in &topology.queues {
            let make = || Queue::new(queue.arguments.clone(), queue.lifetime);
            let existing = self.queues.entry(queue.name.clone()).or_insert_with(make);
            if (&existing.arguments, existing.lifetime) != (&queue.arguments, queue.lifetime) {
                let what = format!("queue {:?}", queue.name);
                return refused(what, "PRECONDITION_FAILED - it exists with other arguments".to_owned());
            }
        }
        for binding in &topology.bindings {
            let absent = if self.queues.contains_key(&binding.queue) {
                (!self.exchanges.contains_key(&binding.exchange)).then_some(("exchange", &binding.exchange))
            } else {
                Some(("queue", &binding.queue))
            };
            if let Some((kind, name)) = absent {
                let what = format!("binding of {:?} to {:?}", binding.queue, binding.exchange);
                return refused(what, format!("NOT_FOUND - no {kind} '{name}' in vhost '/'"));
            }
            self.bindings.insert(binding.clone());
        }
        Ok(())
    }
}

fn chooses(kind: ExchangeKind, pattern: &str, key: &str) -> bool {
    match kind {
        ExchangeKind::Direct => pattern == key,
        ExchangeKind::Fanout => true,
        ExchangeKind::Topic => {
            let (pattern, key): (Vec<_>, Vec<_>) = (pattern.split('.').collect(), key.split('.').collect());
            topic(&pattern, &key)
        }
    }
}

/// `*` is one word, `#` any number of them.
fn topic(pattern: &[&str], key: &[&str]) -> bool {
    match (pattern.split_first(), key.split_first()) {
        (None, None) => true,
        (Some((&"#", rest)), _) => (0..=key.len()).any(|skipped| topic(rest, &key[skipped..])),
        (Some((&word, rest)), Some((&first, others))) => (word == "*" || word == first) && topic(rest, others),
        _ => false,
    }
}

/// Notes in the headers where and why a message died, as the broker does: the latest first, one entry for a queue and
/// reason.
fn note_death(message: &mut Message, queue: &str, exchange: &str, routing_key: &str, reason: &str) {
    let mut deaths = match message.headers.remove(header::DEATH) {
        Some(HeaderValue::List(deaths)) => deaths,
        _ => Vec::new(),
    };
    let same = deaths.iter().position(|death| {
        matches!(death, HeaderValue::Table(death)
            if death.get("queue") == Some(&queue.into()) && death.get("reason") == Some(&reason.into()))
    });
    let death = match same.map(|index| deaths.remove(index)) {
        Some(HeaderValue::Table(mut death)) => {
            let count = death.get("count").and_then(HeaderValue::as_int).unwrap_or(0);
            death.insert("count".to_owned(), (count + 1).into());
            death
        }
        _ => [
            ("count".to_owned(), 1.into()),
            ("exchange".to_owned(), exchange.into()),
            ("queue".to_owned(), queue.into()),
            ("reason".to_owned(), reason.into()),
            ("routing-keys".to_owned(), HeaderValue::List(vec![routing_key.into()])),
            ("time".to_owned(), Timestamp::now().as_second().into()),
        ]
        .into(),
    };
    deaths.insert(0, HeaderValue::Table(death));
    message.headers.insert(header::DEATH.to_owned(), HeaderValue::List(deaths));
    for (name, value) in
        [("x-first-death-exchange", exchange), ("x-first-death-queue", queue), ("x-first-death-reason", reason)]
    {
        message.headers.entry(name.to_owned()).or_insert_with(|| value.into());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn topic_patterns_match_words() {
        for (pattern, key, expected) in [
            ("*.*.succeeded", "node.clone.succeeded", true),
            ("*.*.succeeded", "node.succeeded", false),
            ("node.#", "node", true),
            ("node.#", "node.clone.failed", true),
            ("#.failed", "node.clone.failed", true),
            ("node.*", "other.clone", false),
            ("#", "", true),
        ] {
            assert_eq!(chooses(ExchangeKind::Topic, pattern, key), expected, "{pattern} {key}");
        }
    }

    #[test]
    fn a_second_death_of_the_same_kind_is_counted() {
        let mut message = Message::default();
        note_death(&mut message, "retry", "haul.retry.1s", "node", "expired");
        note_death(&mut message, "dead", "haul.dlx", "node", "rejected");
        note_death(&mut message, "retry", "haul.retry.1s", "node", "expired");
        let Some(HeaderValue::List(deaths)) = message.headers.get(header::DEATH) else { panic!("no deaths") };
        let Some(HeaderValue::Table(latest)) = deaths.first() else { panic!("no table") };
        assert_eq!((deaths.len(), latest.get("count")), (2, Some(&HeaderValue::Int(2))));
        assert_eq!(message.headers.get("x-first-death-queue"), Some(&"retry".into()));
    }
}
