//! Between lapin's values and our own.

use lapin::{
    BasicProperties,
    types::{AMQPValue, FieldArray, FieldTable, LongString, ShortString},
};

use super::inbound::DEEPEST;
use crate::protocol::wire::{HeaderValue, Headers, Message, truncate};

/// A short string cannot be longer.
const LONGEST: usize = 255;
/// Written to disk by the broker.
const PERSISTENT: u8 = 2;
const TRANSIENT: u8 = 1;

/// A message as it arrived.
pub(super) fn message(properties: &BasicProperties, body: Vec<u8>) -> Message {
    let text = |value: &Option<ShortString>| value.as_ref().map(ToString::to_string);
    Message {
        body: body.into(),
        content_type: text(properties.content_type()),
        message_id: text(properties.message_id()),
        type_: text(properties.kind()),
        timestamp: *properties.timestamp(),
        priority: *properties.priority(),
        app_id: text(properties.app_id()),
        expiration_ms: properties.expiration().as_ref().and_then(|text| text.as_str().parse().ok()),
        transient: *properties.delivery_mode() == Some(TRANSIENT),
        headers: properties.headers().as_ref().map(headers).unwrap_or_default(),
    }
}

/// The properties to publish a message with; a text that is too long for its property is cut.
pub(super) fn properties(message: &Message) -> BasicProperties {
    let mode = if message.transient { TRANSIENT } else { PERSISTENT };
    let mut properties = BasicProperties::default().with_delivery_mode(mode);
    if let Some(text) = &message.content_type {
        properties = properties.with_content_type(cut(text));
    }
    if let Some(text) = &message.message_id {
        properties = properties.with_message_id(cut(text));
    }
    if let Some(text) = &message.type_ {
        properties = properties.with_type(cut(text));
    }
    if let Some(text) = &message.app_id {
        properties = properties.with_app_id(cut(text));
    }
    if let Some(seconds) = message.timestamp {
        properties = properties.with_timestamp(seconds);
    }
    if let Some(priority) = message.priority {
        properties = properties.with_priority(priority);
    }
    if let Some(ms) = message.expiration_ms {
        properties = properties.with_expiration(ms.to_string().into());
    }
    if !message.headers.is_empty() {
        properties = properties.with_headers(table(&message.headers));
    }
    properties
}

/// Headers as we keep them.
pub(super) fn headers(table: &FieldTable) -> Headers {
    table.into_iter().map(|(name, found)| (name.to_string(), value(found))).collect()
}

/// Headers, or the arguments of a queue, as lapin takes them.
pub(super) fn table(headers: &Headers) -> FieldTable {
    shallow_table(headers, 0)
}

fn shallow_table(headers: &Headers, depth: usize) -> FieldTable {
    let mut table = FieldTable::default();
    for (name, value) in headers {
        if let Some(value) = amqp(value, depth) {
            table.insert(cut(name), value);
        }
    }
    table
}

/// A text as a short string, cut where it is too long to be one.
pub(super) fn cut(text: &str) -> ShortString {
    let mut text = text.to_owned();
    truncate(&mut text, LONGEST);
    ShortString::from(text)
}

/// A name as a short string, unless it is too long to be one.
pub(super) fn short(text: &str) -> Option<ShortString> {
    ShortString::try_new(text).ok()
}

fn value(value: &AMQPValue) -> HeaderValue {
    match value {
        AMQPValue::Boolean(value) => HeaderValue::Bool(*value),
        AMQPValue::ShortShortInt(value) => HeaderValue::Int(i64::from(*value)),
        AMQPValue::ShortShortUInt(value) => HeaderValue::Int(i64::from(*value)),
        AMQPValue::ShortInt(value) => HeaderValue::Int(i64::from(*value)),
        AMQPValue::ShortUInt(value) => HeaderValue::Int(i64::from(*value)),
        AMQPValue::LongInt(value) => HeaderValue::Int(i64::from(*value)),
        AMQPValue::LongUInt(value) => HeaderValue::Int(i64::from(*value)),
        AMQPValue::LongLongInt(value) => HeaderValue::Int(*value),
        AMQPValue::Timestamp(value) => i64::try_from(*value).map_or(HeaderValue::Other, HeaderValue::Int),
        AMQPValue::ShortString(text) => HeaderValue::Text(text.to_string()),
        AMQPValue::LongString(text) => {
            std::str::from_utf8(text.as_bytes()).map_or(HeaderValue::Other, HeaderValue::from)
        }
        AMQPValue::FieldArray(values) => HeaderValue::List(values.as_slice().iter().map(self::value).collect()),
        AMQPValue::FieldTable(table) => HeaderValue::Table(headers(table)),
        AMQPValue::Float(_)
        | AMQPValue::Double(_)
        | AMQPValue::DecimalValue(_)
        | AMQPValue::ByteArray(_)
        | AMQPValue::Void => HeaderValue::Other,
    }
}

/// What we kept nothing of is not sent, nor what is nested too deep to be written.
fn amqp(value: &HeaderValue, depth: usize) -> Option<AMQPValue> {
    if depth > DEEPEST {
        return None;
    }
    Some(match value {
        HeaderValue::Bool(value) => AMQPValue::Boolean(*value),
        HeaderValue::Int(value) => AMQPValue::LongLongInt(*value),
        HeaderValue::Text(text) => AMQPValue::LongString(LongString::from(text.as_bytes())),
        HeaderValue::List(values) => AMQPValue::FieldArray(FieldArray::from(
            values.iter().filter_map(|value| amqp(value, depth + 1)).collect::<Vec<_>>(),
        )),
        HeaderValue::Table(values) => AMQPValue::FieldTable(shallow_table(values, depth + 1)),
        HeaderValue::Other => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_survives_the_way_there_and_back() {
        let mut sent = Message::json(&"body", "id-1", "task.clone".to_owned(), jiff::Timestamp::UNIX_EPOCH);
        sent.priority = Some(7);
        sent.expiration_ms = Some(5000);
        sent.set("x-haul-round", 3);
        sent.set("x-haul-node", "worker-001");
        sent.set("nested", HeaderValue::List(vec![HeaderValue::Table([("a".to_owned(), 1.into())].into())]));
        assert_eq!(message(&properties(&sent), sent.body.to_vec()), sent);
    }

    #[test]
    fn headers_of_every_type_are_read_or_marked_as_other() {
        for (amqp, ours) in [
            (AMQPValue::ShortShortUInt(255), HeaderValue::Int(255)),
            (AMQPValue::ShortInt(-2), HeaderValue::Int(-2)),
            (AMQPValue::LongUInt(u32::MAX), HeaderValue::Int(4_294_967_295)),
            (AMQPValue::Timestamp(5), HeaderValue::Int(5)),
            (AMQPValue::Timestamp(u64::MAX), HeaderValue::Other),
            (AMQPValue::LongString(vec![0xff].into()), HeaderValue::Other),
            (AMQPValue::LongString("é".into()), "é".into()),
            (AMQPValue::Double(1.5), HeaderValue::Other),
            (AMQPValue::Void, HeaderValue::Other),
        ] {
            assert_eq!(value(&amqp), ours);
        }
    }

    #[test]
    fn texts_too_long_for_a_property_are_cut_at_a_character() {
        let long = Message { message_id: Some("é".repeat(200)), ..Message::default() };
        assert_eq!(properties(&long).message_id().as_ref().unwrap().as_str().len(), 254);
    }
}
