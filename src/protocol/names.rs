//! Names in a task that end in a path, an argument or a ref, each checked once, here.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::failure::Failure;

/// The directory of a project: one component under the projects directory.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TargetPath(String);

/// A short or full name of a branch or tag that git itself would accept.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct RefName(String);

/// The name of a credential that the agent resolves in its own directory.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct CredentialName(String);

/// The user and group that shall own a project (`"1000:1000"`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Owner {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
}

/// How the tokens of well-known services begin: as the name of a credential they are a secret in the wrong field.
const TOKENS: [&str; 8] = ["ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_", "glpat-", "xoxb-"];

/// What a schema can say of a target path: no reserved beginning, no character that is refused, no odd end.
pub(super) const TARGET_PATTERN: &str =
    r#"^(?![.\-~ ])[^/\\:*?"<>|%\u0000-\u001f\u007f-\u009f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]*(?<![ .])$"#;

/// What a schema can say of the name of a ref: the rules of `git check-ref-format`, but for the length in bytes.
pub(super) const REF_PATTERN: &str = concat!(
    r"^(?!refs/)(?![Hh][Ee][Aa][Dd]$)(?!@$)(?!.*(\.\.|@\{|//|/$|\.$|\.[Ll][Oo][Cc][Kk](/|$)))(?![.\-/])(?!.*/[.\-])",
    r"[^ ~^:?*\[\\\u0000-\u001f\u007f-\u009f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]+$",
);

impl TargetPath {
    /// The longest component that common file systems take, in bytes.
    pub const LONGEST: usize = 255;

    /// Checks a `target_path`.
    ///
    /// # Errors
    /// `invalid` for anything that is not one plain, unreserved component.
    pub fn new(path: impl Into<String>) -> Result<Self, Failure> {
        let path = path.into();
        let reason = if path.is_empty() {
            "is empty"
        } else if path.len() > Self::LONGEST {
            "is longer than 255 bytes"
        } else if path.contains(['/', '\\']) {
            "has a separator; it must be one component under the projects directory"
        } else if path.chars().any(is_unprintable) {
            "has a control or invisible character"
        } else if path.starts_with('.') {
            "begins with a dot; such names are reserved"
        } else if path.starts_with('-') {
            "begins with a dash"
        } else if path.starts_with(' ') || path.ends_with([' ', '.']) {
            "begins or ends with a space, or ends with a dot"
        } else if path.starts_with('~') || path.contains([':', '*', '?', '"', '<', '>', '|', '%']) {
            "has a character that some file system or shell gives a meaning to"
        } else if is_device_name(&path) {
            "is a reserved device name"
        } else {
            return Ok(Self(path));
        };
        Err(Failure::invalid(format!("target_path {} {reason}", quoted(&path))))
    }

    /// The component itself.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl RefName {
    /// Checks the name of a branch or tag by the rules of `git check-ref-format`.
    ///
    /// # Errors
    /// `invalid` with the field's name in the sentence.
    pub fn new(field: &str, name: impl Into<String>) -> Result<Self, Failure> {
        let name = name.into();
        let bad_part = |part: &str| {
            part.is_empty() || part.starts_with(['.', '-']) || part.to_ascii_lowercase().ends_with(".lock")
        };
        let bad = name.len() > 250
            || name == "@"
            || name.starts_with("refs/")
            || name.eq_ignore_ascii_case("HEAD")
            || name.ends_with('.')
            || name.contains("..")
            || name.contains("@{")
            || name.chars().any(|c| is_unprintable(c) || matches!(c, ' ' | '~' | '^' | ':' | '?' | '*' | '[' | '\\'))
            || name.split('/').any(bad_part);
        if bad {
            return Err(Failure::invalid(format!("{field} {} is not a valid name of a ref", quoted(&name))));
        }
        Ok(Self(name))
    }

    /// The name itself.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl CredentialName {
    /// Checks a credential's name: 1–64 of `[A-Za-z0-9._-]`, not beginning with a dot or a dash.
    ///
    /// # Errors
    /// `invalid`; the text is not repeated, since it may be a secret put in the wrong field.
    pub fn new(name: impl Into<String>) -> Result<Self, Failure> {
        let name = name.into();
        let fits = (1..=64).contains(&name.len())
            && !name.starts_with(['.', '-'])
            && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'));
        if !fits {
            return Err(Failure::invalid(
                "credential must be the name of a credential on the node: 1–64 characters of [A-Za-z0-9._-]",
            ));
        }
        if TOKENS.iter().any(|token| name.starts_with(token)) {
            return Err(Failure::invalid("credential looks like a token; it must be the name of one on the node"));
        }
        Ok(Self(name))
    }

    /// The name itself.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Owner {
    /// Reads `"uid:gid"`.
    ///
    /// # Errors
    /// `invalid` unless both are numbers; root is never an owner.
    pub fn parse(text: &str) -> Result<Self, Failure> {
        let numbers = text.split_once(':').and_then(|(uid, gid)| Some((number(uid)?, number(gid)?)));
        match numbers {
            Some((0, _) | (_, 0)) => Err(Failure::invalid("owner must not be root")),
            Some((uid, gid)) => Ok(Self { uid, gid }),
            None => Err(Failure::invalid(format!("owner {} is not of the form \"uid:gid\"", quoted(text)))),
        }
    }
}

impl TryFrom<String> for Owner {
    type Error = Failure;

    fn try_from(text: String) -> Result<Self, Failure> {
        Self::parse(&text)
    }
}

impl From<Owner> for String {
    fn from(owner: Owner) -> Self {
        owner.to_string()
    }
}

impl fmt::Display for TargetPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Display for RefName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Display for CredentialName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.uid, self.gid)
    }
}

/// Decimal digits only: `u32::from_str` would also take a leading plus sign.
fn number(text: &str) -> Option<u32> {
    if text.is_empty() || !text.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    text.parse().ok().filter(|&n| n != u32::MAX)
}

/// Control characters and the invisible ones that reorder or hide text in a terminal.
pub(super) fn is_unprintable(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}')
}

/// Names that another system would open as a device.
fn is_device_name(path: &str) -> bool {
    let stem = path.split('.').next().unwrap_or(path).to_ascii_uppercase();
    matches!(stem.as_str(), "CON" | "PRN" | "AUX" | "NUL")
        || (stem.len() == 4
            && (stem.starts_with("COM") || stem.starts_with("LPT"))
            && stem.ends_with(|c: char| c.is_ascii_digit()))
}

/// `text` as it may stand in a sentence: escaped and short.
pub(super) fn quoted(text: &str) -> String {
    const SHOWN: usize = 80;
    let mut out: String = text.chars().take(SHOWN).flat_map(char::escape_debug).collect();
    if text.chars().nth(SHOWN).is_some() {
        out.push('…');
    }
    format!("\"{out}\"")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_one_plain_component_is_a_target_path() {
        let long = "x".repeat(5000);
        for bad in [
            "",
            ".",
            "..",
            "../x",
            "/x",
            "a/b",
            "a\\b",
            "a\0b",
            "a\nb",
            "x.",
            "x ",
            " x",
            ".haul",
            ".git",
            "-x",
            "CON",
            "nul.txt",
            "com1",
            "~root",
            "a:b",
            "a%2fb",
            "a\u{202e}b",
            &long,
        ] {
            assert!(TargetPath::new(bad).is_err(), "{bad:?}");
        }
        for good in ["7_app", "app", "my project", "a.b", "ünïcode", "console", &"x".repeat(255)] {
            assert!(TargetPath::new(good).is_ok(), "{good:?}");
        }
    }

    #[test]
    fn names_that_git_would_refuse_are_refused() {
        for bad in [
            "",
            "-x",
            "a..b",
            "a b",
            "a~1",
            "a^",
            "a:b",
            "a?",
            "a*",
            "a[",
            "a\\b",
            "a.lock",
            "a/b.lock/c",
            ".a",
            "a/.b",
            "/a",
            "a/",
            "a//b",
            "@",
            "a@{1}",
            "HEAD",
            "head",
            "a.",
            "a\nb",
            "a\x7f",
            "refs/heads/x",
            "a/-b",
        ] {
            assert!(RefName::new("branch", bad).is_err(), "{bad:?}");
        }
        for good in ["main", "feature/x", "v1.0", "a@b", "ünï", "fix-1"] {
            assert!(RefName::new("branch", good).is_ok(), "{good:?}");
        }
    }

    #[test]
    fn a_refused_credential_is_not_repeated() {
        for secret in ["ghp_s3cret/with+slash", "ghp_s3cret", "glpat-s3cret", "github_pat_s3cret"] {
            let failure = CredentialName::new(secret).unwrap_err();
            assert!(!failure.message.contains("s3cret"));
        }
    }

    #[test]
    fn an_owner_is_two_numbers_and_never_root() {
        for bad in ["", "1", "1:", ":1", "a:b", "+1:1", "-1:1", "0:0", "0:5", "5:0", "4294967295:5", "1:2:3"] {
            assert!(Owner::parse(bad).is_err(), "{bad:?}");
        }
        assert_eq!(Owner::parse("1000:1001").unwrap(), Owner { uid: 1000, gid: 1001 });
    }

    #[test]
    fn a_sentence_never_carries_raw_controls() {
        let failure = TargetPath::new("\u{1b}[31m\n").unwrap_err();
        assert!(!failure.message.chars().any(char::is_control));
    }
}
