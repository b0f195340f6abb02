//! Which versions of git are used.

use std::fmt;

use crate::failure::Failure;

/// The oldest: `http.curloptResolve` came with 2.37, the switch for bundle addresses with 2.38, and 2.39 is the oldest
/// line that was given the corrections below.
const OLDEST: Version = Version([2, 39, 0]);

/// First corrected release of each line, from the release notes of 2.39.4 to 2.45.1 (May 2024): before them a
/// repository that is served by path can have programs run by the one who reads it (CVE-2024-32004, CVE-2024-32465).
///
/// What was corrected later concerns nothing that is used here: CVE-2025-48384 submodules, CVE-2025-48385 bundle
/// addresses (switched off), CVE-2025-48386 a helper for credentials on Windows, CVE-2024-50349 and CVE-2024-52006
/// prompts and helpers for credentials. Distributions that mend an old release leave its number as it is: such a git is
/// refused here, or taken, by its number all the same.
const CORRECTED: [Version; 7] = [
    Version([2, 39, 4]),
    Version([2, 40, 2]),
    Version([2, 41, 1]),
    Version([2, 42, 2]),
    Version([2, 43, 4]),
    Version([2, 44, 1]),
    Version([2, 45, 1]),
];

/// A version of git.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Version([u32; 3]);

impl Version {
    /// Reads what `git version` prints.
    ///
    /// # Errors
    /// `internal` where that is something else.
    pub(super) fn read(text: &str) -> Result<Self, Failure> {
        let unknown = || Failure::internal("the program git does not tell its version; it is not used");
        let words = text.trim().strip_prefix("git version ").ok_or_else(unknown)?;
        let mut numbers = words.split(['.', ' ', '-']).map_while(|part| part.parse().ok());
        let (Some(major), Some(minor)) = (numbers.next(), numbers.next()) else { return Err(unknown()) };
        Ok(Self([major, minor, numbers.next().unwrap_or(0)]))
    }

    /// Whether it is used.
    ///
    /// # Errors
    /// `internal` with a sentence where it is not.
    pub(super) fn check(self) -> Result<(), Failure> {
        if self < OLDEST {
            return Err(Failure::internal(format!("git {self} is too old for transfers; {OLDEST} is the oldest used")));
        }
        match CORRECTED.iter().find(|corrected| corrected.0[..2] == self.0[..2]) {
            Some(corrected) if self < *corrected => Err(Failure::internal(format!(
                "git {self} is not used: it can be made to run programs (CVE-2024-32004); install {corrected} or newer"
            ))),
            _ => Ok(()),
        }
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [major, minor, patch] = self.0;
        write!(f, "{major}.{minor}.{patch}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_is_read_as_distributions_print_it() {
        for (text, version) in [
            ("git version 2.47.3\n", [2, 47, 3]),
            ("git version 2.39.5 (Apple Git-154)", [2, 39, 5]),
            ("git version 2.52.0-rc1", [2, 52, 0]),
            ("git version 2.45.1.windows.1", [2, 45, 1]),
            ("git version 3.0", [3, 0, 0]),
        ] {
            assert_eq!(Version::read(text).unwrap(), Version(version), "{text}");
        }
        for text in ["", "git version", "git version x", "hub version 2.14"] {
            assert!(Version::read(text).is_err(), "{text}");
        }
    }

    #[test]
    fn old_and_known_bad_versions_are_refused_by_name() {
        for (version, good) in [
            ([1, 9, 1], false),
            ([2, 34, 1], false),
            ([2, 39, 3], false),
            ([2, 39, 5], true),
            ([2, 43, 0], false),
            ([2, 43, 4], true),
            ([2, 45, 0], false),
            ([2, 46, 0], true),
            ([2, 47, 3], true),
            ([3, 0, 0], true),
        ] {
            let checked = Version(version).check();
            assert_eq!(checked.is_ok(), good, "{version:?}");
            if let Err(failure) = checked {
                assert!(failure.message.contains(&Version(version).to_string()), "{failure}");
            }
        }
    }
}
