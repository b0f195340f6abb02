//! An LFS pointer: the short text that stands in a tree for a large file that is kept elsewhere.

use serde::{Deserialize, Serialize};

/// The longest pointer, in bytes.
pub(crate) const LONGEST: u64 = 1024;
/// The first line of every pointer.
const VERSION: &str = "version https://git-lfs.github.com/spec/v1";

/// What a pointer points to. Its id is 64 lower-case hexadecimal digits, wherever it came from: paths are made of it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "(String, u64)", into = "(String, u64)")]
pub(crate) struct Pointer {
    oid: String,
    size: u64,
}

impl Pointer {
    /// Reads a pointer as git-lfs writes it; `None` for anything else. One with extensions is no pointer to us: what it
    /// points to is not what stands in the file.
    pub(crate) fn parse(text: &[u8]) -> Option<Self> {
        let text = std::str::from_utf8(text).ok().filter(|text| text.len() as u64 <= LONGEST)?;
        let mut lines = text.strip_suffix('\n').unwrap_or(text).split('\n');
        if lines.next() != Some(VERSION) {
            return None;
        }
        let oid = lines.next()?.strip_prefix("oid sha256:")?.to_owned();
        let size = lines.next()?.strip_prefix("size ").filter(|size| size.bytes().all(|byte| byte.is_ascii_digit()))?;
        let size = size.parse().ok()?;
        if lines.next().is_some() {
            return None;
        }
        Self::try_from((oid, size)).ok()
    }

    /// The SHA-256 of the content, in hex.
    pub(crate) fn oid(&self) -> &str {
        &self.oid
    }

    /// How many bytes the content has.
    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    /// Where the content is kept below `lfs/objects`, directory by directory.
    pub(crate) fn place(&self) -> [&str; 3] {
        [&self.oid[..2], &self.oid[2..4], &self.oid]
    }
}

impl TryFrom<(String, u64)> for Pointer {
    type Error = &'static str;

    fn try_from((oid, size): (String, u64)) -> Result<Self, Self::Error> {
        if oid.len() == 64 && oid.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte)) {
            Ok(Self { oid, size })
        } else {
            Err("not the id of an LFS object")
        }
    }
}

impl From<Pointer> for (String, u64) {
    fn from(pointer: Pointer) -> Self {
        (pointer.oid, pointer.size)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pointer_is_read_and_has_its_place() {
        let oid = "ab".repeat(32);
        let pointer = Pointer::parse(format!("{VERSION}\noid sha256:{oid}\nsize 12\n").as_bytes()).unwrap();
        assert_eq!((pointer.oid(), pointer.size()), (oid.as_str(), 12));
        assert_eq!(pointer.place(), ["ab", "ab", oid.as_str()]);
        let text = serde_json::to_string(&pointer).unwrap();
        assert_eq!(serde_json::from_str::<Pointer>(&text).unwrap(), pointer);
    }

    #[test]
    fn what_only_looks_like_a_pointer_is_none() {
        let oid = "ab".repeat(32);
        for text in [
            String::new(),
            format!("version https://other.example/v1\noid sha256:{oid}\nsize 12\n"),
            format!("{VERSION}\noid md5:{oid}\nsize 12\n"),
            format!("{VERSION}\noid sha256:{}\nsize 12\n", oid.to_uppercase()),
            format!("{VERSION}\noid sha256:../../{}\nsize 12\n", &oid[6..]),
            format!("{VERSION}\noid sha256:{oid}\nsize -1\n"),
            format!("{VERSION}\noid sha256:{oid}\nsize +1\n"),
            format!("{VERSION}\noid sha256:{oid}\nsize 99999999999999999999\n"),
            format!("{VERSION}\next-0-x sha256:{oid}\noid sha256:{oid}\nsize 1\n"),
            format!("{VERSION}\noid sha256:{oid}\nsize 12\nmore\n"),
            format!("{VERSION}\r\noid sha256:{oid}\r\nsize 12\r\n"),
        ] {
            assert_eq!(Pointer::parse(text.as_bytes()), None, "{text}");
        }
        assert!(serde_json::from_str::<Pointer>(r#"["../../../../etc/passwd", 1]"#).is_err());
    }
}
