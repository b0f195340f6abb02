//! Which keys there are, asked of the types themselves, so that no list of them can fall behind.

use std::collections::BTreeMap;

use serde::{
    Deserialize,
    de::{DeserializeSeed, Deserializer, Error, MapAccess, Visitor, value::StrDeserializer},
    forward_to_deserialize_any,
};

/// What a key holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Shape {
    /// A list of texts; the environment writes it with commas.
    pub(super) list: bool,
    /// It need not be set at all.
    pub(super) optional: bool,
}

/// Every key of `T` with its shape, dotted for tables within.
pub(super) fn keys<'de, T: Deserialize<'de>>() -> BTreeMap<String, Shape> {
    let mut found = BTreeMap::new();
    walk::<T>(&mut Vec::new(), &mut found);
    found
}

fn walk<'de, T: Deserialize<'de>>(path: &mut Vec<&'static str>, found: &mut BTreeMap<String, Shape>) {
    let mut probe = Found::default();
    // The probe always answers with an error once it has seen what it was sent for.
    let _ = T::deserialize(Probe { path, found: &mut probe });
    match probe.fields {
        Some(fields) => {
            for field in fields {
                path.push(field);
                walk::<T>(path, found);
                path.pop();
            }
        }
        None => {
            found.insert(path.join("."), Shape { list: probe.list, optional: probe.optional });
        }
    }
}

#[derive(Default)]
struct Found {
    fields: Option<&'static [&'static str]>,
    list: bool,
    optional: bool,
}

/// A deserializer that walks down `path` and notes what the type asks for at its end.
struct Probe<'a> {
    path: &'a [&'static str],
    found: &'a mut Found,
}

type Seen = serde::de::value::Error;

impl<'de> Deserializer<'de> for Probe<'_> {
    type Error = Seen;

    fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, Seen> {
        Err(Seen::custom("seen"))
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Seen> {
        self.found.optional = true;
        visitor.visit_some(self)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(self, _: &'static str, visitor: V) -> Result<V::Value, Seen> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_seq<V: Visitor<'de>>(self, _: V) -> Result<V::Value, Seen> {
        self.found.list = true;
        Err(Seen::custom("seen"))
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Seen> {
        if self.path.is_empty() {
            self.found.fields = Some(fields);
            return Err(Seen::custom("seen"));
        }
        visitor.visit_map(self)
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf unit unit_struct
        tuple tuple_struct map enum identifier ignored_any
    }
}

impl<'de> MapAccess<'de> for Probe<'_> {
    type Error = Seen;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, Seen> {
        seed.deserialize(StrDeserializer::new(self.path[0])).map(Some)
    }

    fn next_value_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<S::Value, Seen> {
        seed.deserialize(Probe { path: &self.path[1..], found: self.found })
    }
}

/// The known key that looks most like `unknown`, if one does.
pub(super) fn nearest<'a>(unknown: &str, known: impl Iterator<Item = &'a String>) -> Option<&'a String> {
    let within = unknown.len() / 3 + 1;
    let distances = known.map(|key| {
        // Somebody who leaves out the section means the key all the same.
        let short = key.rsplit('.').next().unwrap_or(key);
        (distance(unknown, key).min(distance(unknown, short) + 1), key)
    });
    distances.min().filter(|&(distance, _)| distance <= within).map(|(_, key)| key)
}

/// Insertions, deletions and replacements between two texts.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, from) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, &to) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(from != to);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_types_tell_their_keys() {
        let keys = keys::<crate::config::Config>();
        let shape = |list, optional| Some(Shape { list, optional });
        assert_eq!(keys.get("broker.urls").copied(), shape(true, false));
        assert_eq!(keys.get("node_name").copied(), shape(false, true));
        assert_eq!(keys.get("git.timeout").copied(), shape(false, false));
        assert_eq!(keys.get("git.hosts").copied(), shape(true, false));
        assert_eq!(keys.get("disk.reserve").copied(), shape(false, false));
        assert!(!keys.contains_key("git"));
    }

    #[test]
    fn the_nearest_key_is_found_and_nothing_far_is_offered() {
        let keys = keys::<crate::config::Config>();
        let near = |text: &str| nearest(text, keys.keys()).map(String::as_str);
        assert_eq!(near("git.timeot"), Some("git.timeout"));
        assert_eq!(near("storage_pth"), Some("storage_path"));
        assert_eq!(near("max_attempts"), Some("retry.max_attempts"));
        assert_eq!(near("completely.different.thing"), None);
    }
}
