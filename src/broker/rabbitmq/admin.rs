//! What changes the topology while messages are under way: moving bindings, removing queues, carrying messages over.
//!
//! An [`Admin`] has a connection of its own. Whatever ends it, the broker takes back what was taken and not acknowledged,
//! so a message is at every moment in the queue it came from, in the one it goes to, or in both.

use std::time::Duration;

use futures_util::StreamExt as _;
use lapin::{
    BasicProperties, Channel, Confirmation,
    message::Delivery,
    options::{
        BasicAckOptions, BasicConsumeOptions, BasicPublishOptions, BasicQosOptions, ConfirmSelectOptions,
        ExchangeDeleteOptions, QueueBindOptions, QueueDeclareOptions, QueueDeleteOptions,
    },
    protocol::AMQPSoftError,
    types::FieldTable,
};
use tokio_util::sync::CancellationToken;

use super::{convert, declare, link::Line};
use crate::broker::{BrokerError, Depth, Topology, topology::Binding};

/// Messages on their way to us while one is carried over.
const PREFETCH: u16 = 64;
/// Nothing came for so long: what waited has been carried over.
const BREATH: Duration = Duration::from_millis(5);
/// A consumer that gets nothing for so long asks whether there is anything.
const QUIET: Duration = Duration::from_millis(300);
/// Answers of zero in a row that are believed: a quorum queue that is slow is counted as zero.
const BELIEVED: u32 = 2;
/// How long messages may be there and not come: then somebody else has them.
const STUCK: Duration = Duration::from_secs(10);
/// For the broker's answer to one question.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
/// Headers that the broker adds at delivery; they say nothing of the message.
const ADDED: &[&str] = &["x-delivery-count", "x-acquired-count"];

/// What [`Admin::pour`] has just done with a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Poured {
    /// It is in hand, and still the old queue's.
    Taken,
    /// The new queue has confirmed it, and it is still the old one's, too.
    Copied,
    /// No further one waits at the moment.
    CaughtUp,
}

/// A connection of one's own for changes of the topology.
pub struct Admin {
    line: Line,
}

impl Admin {
    pub(super) fn new(connection: lapin::Connection) -> Self {
        Self { line: Line::own(connection) }
    }

    /// Takes a name that only one connection can have; it is free again when that one ends. `false` if another has it.
    ///
    /// # Errors
    /// When the broker refuses for another reason, or cannot be asked.
    pub async fn lock(&self, name: &str) -> Result<bool, BrokerError> {
        let what = format!("queue {name:?}");
        let channel = self.channel().await?;
        let options = QueueDeclareOptions { exclusive: true, auto_delete: true, ..QueueDeclareOptions::default() };
        match within(&what, channel.queue_declare(convert::cut(name), options, FieldTable::default())).await? {
            Ok(_) => Ok(true),
            Err(error) if declare::is(&error, &AMQPSoftError::RESOURCELOCKED) => Ok(false),
            Err(error) => Err(declare::refused(&what, &error)),
        }
    }

    /// Declares everything in `topology`.
    ///
    /// # Errors
    /// When something exists with other arguments, or permission is missing.
    pub async fn declare(&self, topology: &Topology) -> Result<(), BrokerError> {
        let channel = self.channel().await?;
        let declared = within("the declarations", declare::declare(&channel, topology)).await?;
        declared.map_err(|(what, error)| declare::refused(&what, &error))
    }

    /// Messages ready in a queue and its consumers, or nothing where there is no such queue.
    ///
    /// The broker says zero where a quorum queue does not answer it in time: zero is no proof.
    ///
    /// # Errors
    /// When the broker cannot be asked.
    pub async fn depth(&self, queue: &str) -> Result<Option<Depth>, BrokerError> {
        within(queue, declare::depth(&self.line, queue)).await?
    }

    /// Binds a queue.
    ///
    /// # Errors
    /// When one of the two is missing, or permission is.
    pub async fn bind(&self, binding: &Binding) -> Result<(), BrokerError> {
        let (channel, what) = (self.channel().await?, described(binding));
        let done = channel.queue_bind(
            convert::cut(&binding.queue),
            convert::cut(&binding.exchange),
            convert::cut(&binding.routing_key),
            QueueBindOptions::default(),
            FieldTable::default(),
        );
        within(&what, done).await?.map_err(|error| declare::refused(&what, &error))
    }

    /// Takes a binding away; no error where there is none.
    ///
    /// # Errors
    /// When permission is missing.
    pub async fn unbind(&self, binding: &Binding) -> Result<(), BrokerError> {
        let (channel, what) = (self.channel().await?, described(binding));
        let done = channel.queue_unbind(
            convert::cut(&binding.queue),
            convert::cut(&binding.exchange),
            convert::cut(&binding.routing_key),
            FieldTable::default(),
        );
        match within(&what, done).await? {
            Err(error) if !declare::is(&error, &AMQPSoftError::NOTFOUND) => Err(declare::refused(&what, &error)),
            _ => Ok(()),
        }
    }

    /// Removes a queue; no error where there is none.
    ///
    /// `guarded` has the broker refuse while it has consumers or messages that are ready. Quorum queues do not know that
    /// guard and end the whole connection where it is asked for.
    ///
    /// # Errors
    /// When the guard or the broker refuses.
    pub async fn remove_queue(&self, queue: &str, guarded: bool) -> Result<(), BrokerError> {
        let (channel, what) = (self.channel().await?, format!("the removal of queue {queue:?}"));
        let options = QueueDeleteOptions { if_unused: guarded, if_empty: guarded, nowait: false };
        match within(&what, channel.queue_delete(convert::cut(queue), options)).await? {
            Err(error) if !declare::is(&error, &AMQPSoftError::NOTFOUND) => Err(declare::refused(&what, &error)),
            _ => Ok(()),
        }
    }

    /// Removes an exchange with its bindings; no error where there is none.
    ///
    /// # Errors
    /// When the broker refuses.
    pub async fn remove_exchange(&self, exchange: &str) -> Result<(), BrokerError> {
        let (channel, what) = (self.channel().await?, format!("the removal of exchange {exchange:?}"));
        match within(&what, channel.exchange_delete(convert::cut(exchange), ExchangeDeleteOptions::default())).await? {
            Err(error) if !declare::is(&error, &AMQPSoftError::NOTFOUND) => Err(declare::refused(&what, &error)),
            _ => Ok(()),
        }
    }

    /// Carries every message of the queue `from` over to the exchange `into`, in order and with its routing key, properties
    /// and headers; each is acknowledged once a queue has confirmed it. Returns how many it carried.
    ///
    /// It ends once the queue is empty; with `until`, once that is cancelled, too. What only the publisher may say of itself,
    /// `user_id`, cannot be kept.
    ///
    /// # Errors
    /// When the queue is missing or somebody else has its messages, when no queue takes one, or when the broker fails.
    pub async fn pour(
        &self,
        from: &str,
        into: &str,
        told: &(dyn Fn(Poured) + Send + Sync),
        until: Option<&CancellationToken>,
    ) -> Result<u64, BrokerError> {
        let mut carried = 0;
        loop {
            carried += self.pour_once(from, into, told, until).await?;
            // What was on its way when the channel closed is ready again by now.
            match self.depth(from).await? {
                Some(depth) if depth.messages > 0 => {}
                _ => return Ok(carried),
            }
        }
    }

    async fn pour_once(
        &self,
        from: &str,
        into: &str,
        told: &(dyn Fn(Poured) + Send + Sync),
        until: Option<&CancellationToken>,
    ) -> Result<u64, BrokerError> {
        let what = format!("queue {from:?}");
        let failed = |error: lapin::Error| declare::refused(&what, &error);
        let giving = self.channel().await?;
        giving.confirm_select(ConfirmSelectOptions::default()).await.map_err(failed)?;
        let taking = self.channel().await?;
        taking.basic_qos(PREFETCH, BasicQosOptions::default()).await.map_err(failed)?;
        let tag = "haul-migrate".into();
        let consuming =
            taking.basic_consume(convert::cut(from), tag, BasicConsumeOptions::default(), FieldTable::default());
        // Consumed, not got: a queue with a single active consumer refuses to be got from.
        let mut stream = within(&what, consuming).await?.map_err(failed)?;
        let (mut carried, mut quiet, mut zeroes) = (0, Duration::ZERO, 0);
        let mut caught_up = false;
        loop {
            let patience = if caught_up { QUIET } else { BREATH };
            match tokio::time::timeout(patience, stream.next()).await {
                Ok(Some(Ok(message))) => {
                    told(Poured::Taken);
                    give(&giving, into, &message).await?;
                    told(Poured::Copied);
                    if !message.acker.ack(BasicAckOptions::default()).await.map_err(failed)? {
                        return Err(stopped(&what, "the channel closed before a message was acknowledged"));
                    }
                    (carried, quiet, zeroes) = (carried + 1, Duration::ZERO, 0);
                }
                Ok(Some(Err(error))) => return Err(failed(error)),
                Ok(None) => return Err(stopped(&what, "the broker cancelled our consumer")),
                Err(_) if !std::mem::replace(&mut caught_up, true) => told(Poured::CaughtUp),
                Err(_) if until.is_some_and(|until| !until.is_cancelled()) => {}
                Err(_) => match self.depth(from).await? {
                    None => break,
                    Some(Depth { messages: 0, .. }) => {
                        zeroes += 1;
                        if zeroes >= BELIEVED {
                            break;
                        }
                    }
                    Some(depth) if quiet >= STUCK => {
                        let reason = format!("{} messages are there, but another consumer has it", depth.messages);
                        return Err(stopped(&what, &reason));
                    }
                    Some(_) => quiet += QUIET,
                },
            }
        }
        // The answer to a close comes after the broker has dealt with everything before it.
        for channel in [taking, giving] {
            within(&what, channel.close(200, "carried over".into())).await?.map_err(failed)?;
        }
        Ok(carried)
    }

    /// Ends the connection.
    pub async fn close(self) {
        self.line.close("done").await;
    }

    async fn channel(&self) -> Result<Channel, BrokerError> {
        within("a channel", self.line.channel()).await?.map_err(|error| declare::refused("a channel", &error))
    }
}

/// Publishes one message as it came, and waits until a queue has it.
async fn give(giving: &Channel, into: &str, message: &Delivery) -> Result<(), BrokerError> {
    let what = format!("a message for exchange {into:?}");
    let failed = |error: lapin::Error| declare::refused(&what, &error);
    let options = BasicPublishOptions { mandatory: true, immediate: false };
    let key = message.routing_key.clone();
    let properties = as_it_came(&message.properties);
    let confirm = giving.basic_publish(convert::cut(into), key, options, &message.data, properties).await;
    match within(&what, confirm.map_err(failed)?).await?.map_err(failed)? {
        Confirmation::Ack(None) => Ok(()),
        Confirmation::Ack(Some(_)) => Err(stopped(&what, "no queue takes it")),
        Confirmation::Nack(_) => Err(stopped(&what, "the queue behind it is full")),
        Confirmation::NotRequested => Err(stopped(&what, "nothing is confirmed on the channel")),
    }
}

/// The properties to publish it with again: all but the user's name, which must be the publisher's own, and what the
/// broker added for this one delivery.
fn as_it_came(old: &BasicProperties) -> BasicProperties {
    let mut new = BasicProperties::default();
    if let Some(text) = old.content_type() {
        new = new.with_content_type(text.clone());
    }
    if let Some(text) = old.content_encoding() {
        new = new.with_content_encoding(text.clone());
    }
    if let Some(found) = old.headers() {
        let mut headers = FieldTable::default();
        for (name, value) in found.into_iter().filter(|(name, _)| !ADDED.contains(&name.as_str())) {
            headers.insert(name.clone(), value.clone());
        }
        new = new.with_headers(headers);
    }
    if let Some(mode) = old.delivery_mode() {
        new = new.with_delivery_mode(*mode);
    }
    if let Some(priority) = old.priority() {
        new = new.with_priority(*priority);
    }
    if let Some(text) = old.correlation_id() {
        new = new.with_correlation_id(text.clone());
    }
    if let Some(text) = old.reply_to() {
        new = new.with_reply_to(text.clone());
    }
    if let Some(text) = old.expiration() {
        new = new.with_expiration(text.clone());
    }
    if let Some(text) = old.message_id() {
        new = new.with_message_id(text.clone());
    }
    if let Some(seconds) = old.timestamp() {
        new = new.with_timestamp(*seconds);
    }
    if let Some(text) = old.kind() {
        new = new.with_type(text.clone());
    }
    if let Some(text) = old.app_id() {
        new = new.with_app_id(text.clone());
    }
    new
}

fn described(binding: &Binding) -> String {
    let Binding { exchange, queue, routing_key } = binding;
    format!("binding of {queue:?} to {exchange:?} by {routing_key:?}")
}

fn stopped(what: &str, reason: &str) -> BrokerError {
    BrokerError::Refused { what: what.to_owned(), reason: reason.to_owned() }
}

/// Puts an end to waiting for an answer.
async fn within<T>(what: &str, answer: impl Future<Output = T>) -> Result<T, BrokerError> {
    tokio::time::timeout(ANSWER_TIMEOUT, answer).await.map_err(|_| BrokerError::Unreachable {
        address: "the broker".to_owned(),
        reason: format!("no answer in time, asking for {what}"),
    })
}

/// Whether the broker refused because something exists otherwise than it was asked for.
#[must_use]
pub fn exists_otherwise(error: &BrokerError) -> bool {
    matches!(error, BrokerError::Refused { reason, .. } if reason.starts_with("PRECONDITION_FAILED"))
}

#[cfg(test)]
mod tests {
    use lapin::types::AMQPValue;

    use super::*;

    #[test]
    fn a_message_is_carried_over_as_it_came_but_for_the_user_s_name_and_the_broker_s_counts() {
        let mut headers = FieldTable::default();
        headers.insert("x-haul-node".into(), AMQPValue::LongString("a".into()));
        headers.insert("x-delivery-count".into(), AMQPValue::LongLongInt(3));
        headers.insert("odd".into(), AMQPValue::Double(1.5));
        let all = || {
            BasicProperties::default()
                .with_content_type("application/json".into())
                .with_content_encoding("identity".into())
                .with_delivery_mode(2)
                .with_priority(7)
                .with_correlation_id("c".into())
                .with_reply_to("r".into())
                .with_expiration("1000".into())
                .with_message_id("m".into())
                .with_timestamp(5)
                .with_type("task.clone".into())
                .with_app_id("master".into())
        };
        let came = all().with_headers(headers.clone()).with_user_id("somebody".into());
        let mut kept = FieldTable::default();
        kept.insert("x-haul-node".into(), AMQPValue::LongString("a".into()));
        kept.insert("odd".into(), AMQPValue::Double(1.5));
        assert_eq!(as_it_came(&came), all().with_headers(kept));
    }
}
