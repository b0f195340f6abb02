//! Making and checking exchanges, queues and bindings.

use std::future::Future;

use lapin::{
    Channel, ErrorKind, ExchangeKind as Kind,
    options::{ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions},
    protocol::{AMQPError, AMQPErrorKind, AMQPHardError, AMQPSoftError},
    types::FieldTable,
};

use super::{convert, dial::words, link::Line};
use crate::{
    broker::{
        BrokerError, Depth, Topology,
        topology::{ExchangeKind, Lifetime},
    },
    protocol::wire::Headers,
};

/// Declares all of `topology` on `channel`, which is closed by the broker if anything is refused.
pub(super) async fn declare(channel: &Channel, topology: &Topology) -> Result<(), (String, lapin::Error)> {
    for exchange in &topology.exchanges {
        let what = || format!("exchange {:?}", exchange.name);
        let mut arguments = Headers::new();
        if let Some(alternate) = &exchange.alternate {
            arguments.insert("alternate-exchange".to_owned(), alternate.clone().into());
        }
        let options = ExchangeDeclareOptions { durable: true, ..ExchangeDeclareOptions::default() };
        channel
            .exchange_declare(convert::cut(&exchange.name), kind(exchange.kind), options, convert::table(&arguments))
            .await
            .map_err(|error| (what(), error))?;
    }
    for queue in &topology.queues {
        let session = queue.lifetime == Lifetime::Session;
        let options = QueueDeclareOptions {
            durable: !session,
            exclusive: session,
            auto_delete: session,
            ..QueueDeclareOptions::default()
        };
        channel
            .queue_declare(convert::cut(&queue.name), options, convert::table(&queue.arguments))
            .await
            .map_err(|error| (format!("queue {:?}", queue.name), error))?;
    }
    for binding in &topology.bindings {
        let (queue, exchange, key) = (&binding.queue, &binding.exchange, &binding.routing_key);
        channel
            .queue_bind(
                convert::cut(queue),
                convert::cut(exchange),
                convert::cut(key),
                QueueBindOptions::default(),
                FieldTable::default(),
            )
            .await
            .map_err(|error| (format!("binding of {queue:?} to {exchange:?} by {key:?}"), error))?;
    }
    Ok(())
}

/// The exchanges and queues of `topology` that do not exist, as far as we may know: from 4.2.6 on a broker tells only who may
/// do something with them.
pub(super) async fn missing(line: &Line, topology: &Topology) -> Result<Vec<String>, BrokerError> {
    let mut missing = Vec::new();
    for exchange in &topology.exchanges {
        let name = &exchange.name;
        let options = ExchangeDeclareOptions { passive: true, ..ExchangeDeclareOptions::default() };
        let ask = async |channel: Channel| {
            channel.exchange_declare(convert::cut(name), kind(exchange.kind), options, FieldTable::default()).await
        };
        if is_absent(asked(line, &format!("exchange {name:?}"), ask).await)? {
            missing.push(name.clone());
        }
    }
    for queue in &topology.queues {
        if is_absent(depth(line, &queue.name).await)? {
            missing.push(queue.name.clone());
        }
    }
    Ok(missing)
}

/// What we may not ask for is for others to see to.
fn is_absent<T>(found: Result<Option<T>, BrokerError>) -> Result<bool, BrokerError> {
    match found {
        Err(BrokerError::Refused { reason, .. }) if reason.starts_with("ACCESS_REFUSED") => Ok(false),
        found => Ok(found?.is_none()),
    }
}

/// Messages and consumers of a queue, if it exists.
pub(super) async fn depth(line: &Line, queue: &str) -> Result<Option<Depth>, BrokerError> {
    asked(line, &format!("queue {queue:?}"), async |channel: Channel| counted(&channel, queue).await).await
}

/// The same on `channel`, which the broker closes where there is no such queue.
pub(super) async fn counted(channel: &Channel, queue: &str) -> lapin::Result<Depth> {
    let options = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
    let found = channel.queue_declare(convert::cut(queue), options, FieldTable::default()).await?;
    Ok(Depth { messages: found.message_count(), consumers: found.consumer_count() })
}

/// Asks on a channel of its own, since the broker closes it where the answer is no.
async fn asked<T, A>(line: &Line, what: &str, ask: impl FnOnce(Channel) -> A) -> Result<Option<T>, BrokerError>
where
    A: Future<Output = lapin::Result<T>>,
{
    let channel = line.channel().await.map_err(|error| refused(what, &error))?;
    match ask(channel).await {
        Ok(found) => Ok(Some(found)),
        Err(error) if is(&error, &AMQPSoftError::NOTFOUND) => Ok(None),
        Err(error) => Err(refused(what, &error)),
    }
}

/// Whether the channel was closed for this reason.
pub(super) fn is(error: &lapin::Error, reason: &AMQPSoftError) -> bool {
    matches!(error.kind(), ErrorKind::ProtocolError(error)
        if matches!(error.kind(), AMQPErrorKind::Soft(soft) if soft == reason))
}

/// Whether `what` exists and the node of the cluster that has it is away: a declare makes what is missing, so that it finds
/// nothing means this alone. What a binding does not find is missing.
pub(super) fn is_away(what: &str, error: &lapin::Error) -> bool {
    what.starts_with("queue ") && is(error, &AMQPSoftError::NOTFOUND)
}

/// The broker's no, in our words around its own.
pub(super) fn refused(what: &str, error: &lapin::Error) -> BrokerError {
    let reason = words(error);
    match error.kind() {
        ErrorKind::ProtocolError(answer) if !is_of_the_connection(answer) => {
            BrokerError::Refused { what: what.to_owned(), reason }
        }
        _ => BrokerError::Unreachable {
            address: "the broker".to_owned(),
            reason: format!("{reason}, asking for {what}"),
        },
    }
}

/// Whether the broker ended the connection for a reason of its own, whatever was asked for: it stops, an operator closed the
/// connection, or it failed inside. Another connection may be served.
fn is_of_the_connection(answer: &AMQPError) -> bool {
    matches!(answer.kind(), AMQPErrorKind::Hard(AMQPHardError::CONNECTIONFORCED | AMQPHardError::INTERNALERROR))
}

fn kind(kind: ExchangeKind) -> Kind {
    match kind {
        ExchangeKind::Direct => Kind::Direct,
        ExchangeKind::Fanout => Kind::Fanout,
        ExchangeKind::Topic => Kind::Topic,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_that_the_broker_closed_is_no_refusal_of_what_was_asked() {
        let told = |kind| {
            let error: lapin::Error = ErrorKind::ProtocolError(AMQPError::new(kind, "words".into())).into();
            matches!(refused("queue \"q\"", &error), BrokerError::Refused { .. })
        };
        for reason in [AMQPSoftError::ACCESSREFUSED, AMQPSoftError::PRECONDITIONFAILED, AMQPSoftError::NOTFOUND] {
            assert!(told(AMQPErrorKind::Soft(reason)));
        }
        assert!(told(AMQPErrorKind::Hard(AMQPHardError::NOTALLOWED)));
        assert!(!told(AMQPErrorKind::Hard(AMQPHardError::CONNECTIONFORCED)));
        assert!(!told(AMQPErrorKind::Hard(AMQPHardError::INTERNALERROR)));
    }
}
