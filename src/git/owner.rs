//! Whose projects are: the user and group that a project is made for and worked in as.

use std::{
    ops::RangeInclusive,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    str::FromStr,
};

use serde::{Deserialize, Deserializer, de::Error};

use super::settings::GitSettings;
use crate::{failure::Failure, protocol::Owner};

/// Users and groups that tasks may name: `"1000:1000"`, or ranges as in `"1000-1999:1000-1999"`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owners {
    uids: RangeInclusive<u32>,
    gids: RangeInclusive<u32>,
}

impl Owners {
    /// Whether `owner` is one of them.
    #[must_use]
    pub fn contain(&self, owner: Owner) -> bool {
        self.uids.contains(&owner.uid) && self.gids.contains(&owner.gid)
    }

    /// Whether they are `owner` and nobody else.
    fn only(&self, owner: Owner) -> bool {
        self.uids == (owner.uid..=owner.uid) && self.gids == (owner.gid..=owner.gid)
    }
}

impl FromStr for Owners {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is not of the form \"uid:gid\" or \"uid-uid:gid-gid\"");
        let (uids, gids) = text.split_once(':').ok_or_else(wrong)?;
        let range = |text: &str| -> Option<RangeInclusive<u32>> {
            let (first, last) = text.split_once('-').unwrap_or((text, text));
            let (first, last) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
            // The highest number means "none" to the kernel.
            (first <= last && last < u32::MAX).then_some(first..=last)
        };
        let (uids, gids) = (range(uids).ok_or_else(wrong)?, range(gids).ok_or_else(wrong)?);
        if uids.contains(&0) || gids.contains(&0) {
            return Err(format!("{text:?} names root, who owns no project"));
        }
        Ok(Self { uids, gids })
    }
}

impl<'de> Deserialize<'de> for Owners {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

impl GitSettings {
    /// Whose project a clone makes that asks for `wanted`; `None` for the agent's own user.
    ///
    /// # Errors
    /// `forbidden` for an owner that is not among `git.owners`.
    pub fn owner(&self, wanted: Option<Owner>) -> Result<Option<Owner>, Failure> {
        let Some(owner) = wanted else { return Ok(self.run_as) };
        if self.run_as == Some(owner) || self.owners.iter().any(|owners| owners.contain(owner)) {
            return Ok(Some(owner));
        }
        Err(Failure::forbidden(format!("the owner {owner} is not among git.owners")))
    }

    /// Whether projects can belong to anybody but `own`, the agent's user.
    #[must_use]
    pub fn has_other_owners(&self, own: Owner) -> bool {
        self.run_as.is_some_and(|owner| owner != own) || self.owners.iter().any(|owners| !owners.only(own))
    }
}

/// The directory on the way to `projects` that others than its owner cannot pass, if there is one: then the owners of
/// projects reach none of theirs.
#[must_use]
pub fn barred(projects: &Path) -> Option<PathBuf> {
    let projects = projects.canonicalize().ok()?;
    let shut = |path: &&Path| path.metadata().is_ok_and(|stat| stat.mode() & 0o001 == 0);
    projects.ancestors().find(shut).map(Path::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::failure::ErrorClass;

    fn owner(text: &str) -> Owner {
        Owner::parse(text).unwrap()
    }

    #[test]
    fn owners_are_one_or_ranges_and_never_root() {
        let one: Owners = "1000:100".parse().unwrap();
        assert!(one.contain(owner("1000:100")) && !one.contain(owner("1000:101")));
        let many: Owners = "1000-1999:1000-1999".parse().unwrap();
        assert!(many.contain(owner("1999:1000")) && !many.contain(owner("2000:1000")));
        for bad in ["", "1000", "a:b", "5-4:1", "0:1", "1:0", "0-9:1", "1:2:3", "1-:2", "4294967295:1", "-1:1"] {
            assert!(bad.parse::<Owners>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_tasks_owner_is_among_those_allowed_or_nobody() {
        let settings = GitSettings {
            run_as: Some(owner("1000:1000")),
            owners: vec!["2000-2010:100".parse().unwrap()],
            ..GitSettings::default()
        };
        assert_eq!(settings.owner(None).unwrap(), Some(owner("1000:1000")));
        assert_eq!(settings.owner(Some(owner("1000:1000"))).unwrap(), Some(owner("1000:1000")));
        assert_eq!(settings.owner(Some(owner("2005:100"))).unwrap(), Some(owner("2005:100")));
        let failure = settings.owner(Some(owner("2011:100"))).unwrap_err();
        assert_eq!(failure.class, ErrorClass::Forbidden);
        assert!(failure.message.contains("2011:100") && failure.message.contains("git.owners"), "{failure}");
        assert_eq!(GitSettings::default().owner(None).unwrap(), None);
    }

    #[test]
    fn capabilities_are_needed_only_for_others() {
        let own = owner("1000:1000");
        let with = |run_as: Option<&str>, owners: &[&str]| GitSettings {
            run_as: run_as.map(owner),
            owners: owners.iter().map(|text| text.parse().unwrap()).collect(),
            ..GitSettings::default()
        };
        assert!(!with(None, &[]).has_other_owners(own));
        assert!(!with(Some("1000:1000"), &["1000:1000"]).has_other_owners(own));
        assert!(with(Some("1001:1000"), &[]).has_other_owners(own));
        assert!(with(None, &["1000-1001:1000"]).has_other_owners(own));
    }
}
