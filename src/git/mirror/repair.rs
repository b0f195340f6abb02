//! Damaged mirrors: put aside and fetched anew. They are copies, so nothing is lost but time.

use std::{
    fs, io,
    os::unix::fs::DirBuilderExt,
    path::Path,
    time::{Duration, SystemTime},
};

use super::{Mirrors, flight::Turn, key};
use crate::{
    failure::Failure,
    git::Run,
    protocol::{CredentialName, GitUrl},
};

/// Beside the objects of a mirror that was fetched anew; says when by its time.
const MARK: &str = "replaced";
/// How long a mirror that was fetched anew is not replaced again: what is still wrong with it then came from the
/// upstream, and would come again with every task.
const LATELY: Duration = Duration::from_hours(1);

/// What to do about a mirror that was found damaged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// Put it aside and fetch anew.
    Replace,
    /// Another task has done so since this one began: try again with what is there now.
    TryAgain,
    /// It was fetched anew a short while ago and is damaged all the same: the upstream is.
    GiveUp,
}

impl Mirrors {
    /// Puts the mirror of `url` aside after whoever read it found it damaged, and tells whether it is worth while to
    /// begin again. `begun` is when the task began.
    ///
    /// # Errors
    /// When it cannot be put aside.
    pub(crate) async fn mend(
        &self,
        url: &GitUrl,
        credential: Option<&CredentialName>,
        why: &Failure,
        begun: SystemTime,
        run: &Run<'_>,
    ) -> Result<bool, Failure> {
        let key = key(url.as_str(), credential.map(CredentialName::as_str));
        self.replace(&key, &why.message, Some(begun), None, run).await
    }

    /// Puts a mirror aside, with the right to write, and tells whether another transfer is worth while.
    ///
    /// Who reads it just now goes on in what was put aside, which stays until nobody uses the mirror. With `begun`, the
    /// beginning of the task, the damage may be the upstream's, and is not answered again and again.
    pub(super) async fn replace(
        &self,
        key: &str,
        why: &str,
        begun: Option<SystemTime>,
        turn: Option<Turn>,
        run: &Run<'_>,
    ) -> Result<bool, Failure> {
        let _turn = match turn {
            Some(turn) => turn,
            None => self.flights.of(key).turn(run).await?.0,
        };
        let mirror = self.path(key);
        let replaced = tokio::task::spawn_blocking(move || {
            let replaced = fs::metadata(mirror.join(MARK)).and_then(|mark| mark.modified()).ok();
            let step = begun.map_or(Step::Replace, |begun| decide(replaced, begun));
            if step == Step::Replace {
                put_aside(&mirror)?;
            }
            Ok::<_, io::Error>(step)
        });
        let step = replaced.await.map_err(|error| Failure::internal(error.to_string()))??;
        if step == Step::Replace {
            tracing::warn!(mirror.path = %self.path(key).display(), why, "a damaged mirror is put aside and fetched anew");
        }
        Ok(step != Step::GiveUp)
    }
}

/// `replaced` is when the mirror was fetched anew last, if it ever was.
fn decide(replaced: Option<SystemTime>, begun: SystemTime) -> Step {
    match replaced {
        Some(at) if at >= begun => Step::TryAgain,
        Some(at) if begun.duration_since(at).is_ok_and(|age| age < LATELY) => Step::GiveUp,
        None | Some(_) => Step::Replace,
    }
}

/// Takes `mirror` out of use by one rename and leaves an empty one with the mark in its place.
fn put_aside(mirror: &Path) -> io::Result<()> {
    let mut aside = mirror.as_os_str().to_owned();
    aside.push(format!(".old-{:032x}", rand::random::<u128>()));
    match fs::rename(mirror, aside) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    fs::DirBuilder::new().mode(0o700).create(mirror)?;
    fs::write(mirror.join(MARK), "")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mirror_that_was_damaged_a_moment_ago_too_is_the_upstreams_fault() {
        let begun = SystemTime::UNIX_EPOCH + Duration::from_hours(1000);
        for (replaced, step) in [
            (None, Step::Replace),
            (Some(begun - Duration::from_hours(2)), Step::Replace),
            (Some(begun - Duration::from_mins(1)), Step::GiveUp),
            (Some(begun), Step::TryAgain),
            (Some(begun + Duration::from_secs(1)), Step::TryAgain),
        ] {
            assert_eq!(decide(replaced, begun), step, "{replaced:?}");
        }
    }
}
