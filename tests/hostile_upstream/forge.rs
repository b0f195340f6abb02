//! Objects and packs as no git program would make them.

use std::collections::BTreeMap;

use git2::{ObjectType, Oid};

/// Objects by their ids, in the order in which they were made.
#[derive(Clone, Default)]
pub(crate) struct Forge {
    objects: Vec<(Oid, ObjectType, Vec<u8>)>,
    /// Entries of a pack that are no whole objects, ready made.
    raw: Vec<Vec<u8>>,
}

impl Forge {
    pub(crate) fn add(&mut self, kind: ObjectType, data: impl Into<Vec<u8>>) -> Oid {
        let data = data.into();
        let id = Oid::hash_object(kind, &data).unwrap();
        self.objects.push((id, kind, data));
        id
    }

    pub(crate) fn blob(&mut self, text: &str) -> Oid {
        self.add(ObjectType::Blob, text)
    }

    /// A tree of these very entries, in this order.
    pub(crate) fn tree(&mut self, entries: &[(&str, &[u8], Oid)]) -> Oid {
        let mut data = Vec::new();
        for (mode, name, id) in entries {
            data.extend_from_slice(mode.as_bytes());
            data.push(b' ');
            data.extend_from_slice(name);
            data.push(0);
            data.extend_from_slice(id.as_bytes());
        }
        self.add(ObjectType::Tree, data)
    }

    pub(crate) fn commit(&mut self, tree: Oid, parents: &[Oid]) -> Oid {
        let mut text = format!("tree {tree}\n");
        for parent in parents {
            text.push_str(&format!("parent {parent}\n"));
        }
        text.push_str("author A <a@example.org> 1700000000 +0000\ncommitter A <a@example.org> 1700000000 +0000\n\nx\n");
        self.add(ObjectType::Commit, text)
    }

    pub(crate) fn tag(&mut self, target: Oid, kind: &str, name: &str) -> Oid {
        let text =
            format!("object {target}\ntype {kind}\ntag {name}\ntagger A <a@example.org> 1700000000 +0000\n\nx\n");
        self.add(ObjectType::Tag, text)
    }

    /// An entry of a pack as it stands there: a type, a length, and what follows.
    pub(crate) fn raw(&mut self, kind: u8, length: u64, rest: Vec<u8>) {
        let mut entry = head(kind, length);
        entry.extend(rest);
        self.raw.push(entry);
    }

    /// Leaves an object out.
    pub(crate) fn forget(&mut self, id: Oid) {
        self.objects.retain(|(other, ..)| *other != id);
    }

    /// All of it as a pack.
    pub(crate) fn pack(&self) -> Vec<u8> {
        let unique: BTreeMap<Oid, (&ObjectType, &Vec<u8>)> =
            self.objects.iter().map(|(id, kind, data)| (*id, (kind, data))).collect();
        let mut pack = b"PACK\0\0\0\x02".to_vec();
        pack.extend(u32::try_from(unique.len() + self.raw.len()).unwrap().to_be_bytes());
        for (kind, data) in unique.values() {
            let number = match kind {
                ObjectType::Commit => 1,
                ObjectType::Tree => 2,
                ObjectType::Blob => 3,
                _ => 4,
            };
            pack.extend(head(number, data.len() as u64));
            pack.extend(stored(data));
        }
        for raw in &self.raw {
            pack.extend(raw);
        }
        sealed(pack)
    }
}

/// A pack with the checksum that belongs at its end.
pub(crate) fn sealed(mut pack: Vec<u8>) -> Vec<u8> {
    let mut hasher = gix::hash::hasher(gix::hash::Kind::Sha1);
    hasher.update(&pack);
    pack.extend_from_slice(hasher.try_finalize().unwrap().as_slice());
    pack
}

fn head(kind: u8, mut length: u64) -> Vec<u8> {
    let mut bytes = vec![kind << 4 | u8::try_from(length & 15).unwrap()];
    length >>= 4;
    while length > 0 {
        *bytes.last_mut().unwrap() |= 0x80;
        bytes.push(u8::try_from(length & 0x7f).unwrap());
        length >>= 7;
    }
    bytes
}

/// A number as deltas have it.
pub(crate) fn number(mut value: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    while value > 0x7f {
        bytes.push(u8::try_from(value & 0x7f).unwrap() | 0x80);
        value >>= 7;
    }
    bytes.push(u8::try_from(value).unwrap());
    bytes
}

/// As zlib has data that it does not compress.
pub(crate) fn stored(data: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0x78, 0x01];
    let mut chunks = data.chunks(65_535).peekable();
    if chunks.peek().is_none() {
        bytes.extend([1, 0, 0, 0xff, 0xff]);
    }
    while let Some(chunk) = chunks.next() {
        let length = u16::try_from(chunk.len()).unwrap();
        bytes.push(u8::from(chunks.peek().is_none()));
        bytes.extend(length.to_le_bytes());
        bytes.extend((!length).to_le_bytes());
        bytes.extend_from_slice(chunk);
    }
    let (mut a, mut b) = (1_u32, 0_u32);
    for byte in data {
        a = (a + u32::from(*byte)) % 65_521;
        b = (b + a) % 65_521;
    }
    bytes.extend((b << 16 | a).to_be_bytes());
    bytes
}

/// As zlib has `1 + 258 * runs` zeros: thirteen bits for each run.
pub(crate) fn zeros(runs: u64) -> Vec<u8> {
    let mut bytes = vec![0x78, 0x01];
    let (mut held, mut count) = (0_u64, 0_u32);
    let mut put = |bits: u64, width: u32, bytes: &mut Vec<u8>| {
        held |= bits << count;
        count += width;
        while count >= 8 {
            bytes.push((held & 0xff).try_into().unwrap());
            held >>= 8;
            count -= 8;
        }
    };
    // The only block, of fixed codes; codes stand in it with their first bit first.
    put(0b011, 3, &mut bytes);
    put(u64::from(0x30_u8.reverse_bits()), 8, &mut bytes);
    for _ in 0..runs {
        put(u64::from(0xc5_u8.reverse_bits()), 8, &mut bytes);
        put(0, 5, &mut bytes);
    }
    put(0, 7, &mut bytes);
    put(0, 7, &mut bytes);
    let sum = u32::try_from((1 + 258 * runs) % 65_521).unwrap();
    bytes.extend((sum << 16 | 1).to_be_bytes());
    bytes
}
