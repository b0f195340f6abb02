//! The broker's side of a connection, made safe to parse.
//!
//! Whoever may publish to a queue chooses the properties and headers of what we read from it, and the broker passes
//! them on as bytes. A property that is not UTF-8, a header of an unknown type or tables nested a thousand deep would
//! end the connection or the process in the parser behind us, and again after each redelivery. So frames are looked at
//! here, one by one, and what cannot be read is replaced in place by something harmless of the same length.

use std::{
    collections::BTreeMap,
    io,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{Buf, BytesMut};
use futures_io::{AsyncRead, AsyncWrite};
use lapin::types::parsing::parse_field_table;
use tokio::time::Sleep;

use super::convert;
use crate::protocol::wire::Headers;

/// Type, channel and size in front of a payload.
const FRAME_HEAD: usize = 7;
/// The byte behind it.
const FRAME_END: usize = 1;
/// Above this a frame is none: what follows is passed on for the parser to refuse.
const LARGEST_FRAME: usize = 64 * 1024 * 1024;
const METHOD: u8 = 1;
const CONTENT_HEADER: u8 = 2;
/// Tables and arrays inside each other; the console and our own headers need two.
pub(super) const DEEPEST: usize = 8;

/// What the broker tells of itself as a connection begins.
#[derive(Clone, Default)]
pub(super) struct ServerProperties(Arc<Mutex<Headers>>);

impl ServerProperties {
    /// As of the last connection; empty before the first.
    pub(super) fn get(&self) -> BTreeMap<String, crate::protocol::wire::HeaderValue> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// A stream whose reading side is filtered frame by frame.
pub(super) struct Inbound<S> {
    stream: S,
    raw: BytesMut,
    /// Bytes at the front of `raw` that may be read.
    ready: usize,
    seen: ServerProperties,
    /// Runs until the broker's first frame has come.
    silence: Option<Pin<Box<Sleep>>>,
    ended: bool,
}

impl<S> Inbound<S> {
    /// Wraps `stream`, which must bring a first frame within `patience`. Needs a tokio context.
    pub(super) fn new(stream: S, seen: ServerProperties, patience: Duration) -> Self {
        let silence = Some(Box::pin(tokio::time::sleep(patience)));
        Self { stream, raw: BytesMut::new(), ready: 0, seen, silence, ended: false }
    }

    /// Releases the whole frames that have come.
    fn release(&mut self) {
        while let Some(head) = self.raw.get(self.ready..self.ready + FRAME_HEAD) {
            let size = u32::from_be_bytes([head[3], head[4], head[5], head[6]]) as usize;
            if size > LARGEST_FRAME {
                self.ready = self.raw.len();
                return;
            }
            let (kind, end) = (head[0], self.ready + FRAME_HEAD + size + FRAME_END);
            let Some(frame) = self.raw.get_mut(self.ready..end) else { return };
            let payload = &mut frame[FRAME_HEAD..FRAME_HEAD + size];
            match kind {
                CONTENT_HEADER => sanitise(payload),
                METHOD if self.silence.is_some() => {
                    // connection.start: class 10, method 10, two bytes of version, then the table.
                    if payload.starts_with(&[0, 10, 0, 10])
                        && let Some(Ok((_, table))) = payload.get(6..).map(parse_field_table)
                    {
                        let headers = convert::headers(&table);
                        *self.seen.0.lock().unwrap_or_else(PoisonError::into_inner) = headers;
                    }
                }
                _ => {}
            }
            self.silence = None;
            self.ready = end;
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Inbound<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut [u8]) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        loop {
            if this.ready > 0 || this.ended {
                let count = if this.ended { this.raw.len() } else { this.ready }.min(buf.len());
                this.raw.copy_to_slice(&mut buf[..count]);
                this.ready = this.ready.saturating_sub(count);
                return Poll::Ready(Ok(count));
            }
            let mut chunk = [0; 16 * 1024];
            match Pin::new(&mut this.stream).poll_read(cx, &mut chunk) {
                Poll::Ready(Ok(0)) => this.ended = true,
                Poll::Ready(Ok(count)) => {
                    this.raw.extend_from_slice(&chunk[..count]);
                    this.release();
                }
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Pending => {
                    if let Some(silence) = &mut this.silence {
                        ready!(silence.as_mut().poll(cx));
                        return Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "the broker says nothing")));
                    }
                    return Poll::Pending;
                }
            }
        }
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Inbound<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_close(cx)
    }
}

/// Makes the payload of a content header frame readable, keeping its length.
///
/// Class, weight and body size (12 bytes), flags (2), then the properties that the flags announce, in this order.
fn sanitise(payload: &mut [u8]) {
    const FLAGS_AT: usize = 12;
    let Some((head, mut rest)) = payload.split_at_mut_checked(FLAGS_AT + 2) else { return };
    let flags = u16::from_be_bytes([head[FLAGS_AT], head[FLAGS_AT + 1]]);
    for bit in (0..16).rev() {
        if flags & (1 << bit) == 0 {
            continue;
        }
        let taken = match bit {
            // content_type, content_encoding; correlation_id, reply_to, expiration, message_id; type, user_id,
            // app_id, cluster_id.
            15 | 14 | 10 | 9 | 8 | 7 | 5 | 4 | 3 | 2 => short_string(rest),
            13 => headers(rest),
            12 | 11 => Some(1),
            6 => Some(8),
            _ => return,
        };
        let Some((_, behind)) = taken.and_then(|taken| rest.split_at_mut_checked(taken)) else { return };
        rest = behind;
    }
}

/// Makes a short string UTF-8; its length with the length byte.
fn short_string(bytes: &mut [u8]) -> Option<usize> {
    let length = usize::from(*bytes.first()?);
    let text = bytes.get_mut(1..=length)?;
    if std::str::from_utf8(text).is_err() {
        text.iter_mut().filter(|byte| !byte.is_ascii()).for_each(|byte| *byte = b'?');
    }
    Some(1 + length)
}

fn headers(bytes: &mut [u8]) -> Option<usize> {
    let length = size(bytes)?;
    let table = bytes.get_mut(4..4 + length)?;
    if entries(table, true, 0).is_none() {
        blank(table);
    }
    Some(4 + length)
}

fn size(bytes: &[u8]) -> Option<usize> {
    let length = bytes.first_chunk::<4>()?;
    usize::try_from(u32::from_be_bytes(*length)).ok()
}

/// Goes through the entries of a table or the values of an array; nothing if they cannot be read.
fn entries(mut bytes: &mut [u8], named: bool, depth: usize) -> Option<()> {
    while !bytes.is_empty() {
        if named {
            let name = short_string(bytes)?;
            bytes = bytes.split_at_mut_checked(name)?.1;
        }
        let (kind, rest) = bytes.split_first_mut()?;
        let taken = match *kind {
            b't' | b'b' | b'B' => 1,
            b's' | b'U' | b'u' => 2,
            b'I' | b'i' | b'f' => 4,
            b'D' => 5,
            b'L' | b'l' | b'd' | b'T' => 8,
            b'V' => 0,
            b'S' | b'x' => 4 + size(rest)?,
            b'F' | b'A' => {
                let length = size(rest)?;
                let inner = rest.get_mut(4..4 + length)?;
                if depth >= DEEPEST || entries(inner, *kind == b'F', depth + 1).is_none() {
                    // Bytes have the same layout, and any content.
                    *kind = b'x';
                }
                4 + length
            }
            _ => return None,
        };
        bytes = rest.split_at_mut_checked(taken)?.1;
    }
    Some(())
}

/// Fills a table with one entry of no meaning that takes exactly its room.
fn blank(table: &mut [u8]) {
    table.fill(b'?');
    match table.len() {
        0 => {}
        // Too short for any entry; the broker cannot have taken it.
        1 => table[0] = 0,
        // A long name without a value.
        length @ 2..=257 => {
            table[0] = u8::try_from(length - 2).unwrap_or(u8::MAX);
            table[length - 1] = b'V';
        }
        // A short name with bytes.
        length => {
            table[0] = 1;
            table[2] = b'x';
            table[3..7].copy_from_slice(&u32::try_from(length - 7).unwrap_or(u32::MAX).to_be_bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use lapin::types::FieldTable;
    use proptest::prelude::*;

    use super::*;

    fn header_frame(flags: u16, properties: &[u8]) -> Vec<u8> {
        let mut payload = vec![0, 60, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2];
        payload.extend(flags.to_be_bytes());
        payload.extend(properties);
        payload
    }

    fn read(table: &[u8]) -> FieldTable {
        let (rest, table) = parse_field_table(table).expect("the table can be parsed");
        assert!(rest.is_empty());
        table
    }

    fn table(entries: &[u8]) -> Vec<u8> {
        [&u32::try_from(entries.len()).unwrap().to_be_bytes()[..], entries].concat()
    }

    #[test]
    fn a_message_id_that_is_not_text_becomes_text() {
        let mut payload = header_frame(1 << 7, &[3, b'a', 0xff, b'b']);
        sanitise(&mut payload);
        assert_eq!(&payload[14..], &[3, b'a', b'?', b'b']);
    }

    #[test]
    fn what_is_valid_stays_as_it_is() {
        let mut properties = vec![3, b'a', b'/', b'b'];
        properties.extend(table(&[1, b'k', b'S', 0, 0, 0, 1, 0xff, 2, 0xc3, 0xa9, b't', 1]));
        let payload = header_frame((1 << 15) | (1 << 13), &properties);
        let mut after = payload.clone();
        sanitise(&mut after);
        assert_eq!(after, payload);
    }

    #[test]
    fn tables_nested_a_thousand_deep_become_bytes() {
        let mut value = vec![b'V'];
        for _ in 0..1000 {
            value = [&[b'A'][..], &table(&value)].concat();
        }
        let mut properties = table(&[&[1, b'k'][..], &value].concat());
        let whole = properties.len();
        assert_eq!(headers(&mut properties), Some(whole));
        assert_eq!(read(&properties).inner().len(), 1);
    }

    #[test]
    fn a_header_of_an_unknown_type_takes_only_its_table_with_it() {
        let mut properties = table(&[&[1, b'k', b'F'][..], &table(&[1, b'x', b'Z', 7]), &[1, b'n', b't', 1]].concat());
        headers(&mut properties).unwrap();
        let read = read(&properties);
        assert!(read.contains_key("k") && read.inner().get("n").and_then(lapin::types::AMQPValue::as_bool).unwrap());
    }

    proptest! {
        #[test]
        fn any_table_can_be_parsed_afterwards(entries in proptest::collection::vec(any::<u8>(), 2..600)) {
            let mut properties = table(&entries);
            let length = properties.len();
            prop_assert_eq!(headers(&mut properties), Some(length));
            read(&properties);
        }
    }
}
