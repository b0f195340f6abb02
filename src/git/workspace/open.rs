//! Opening a repository that its user can write to.

use std::{os::fd::AsFd, os::fd::AsRawFd, path::Path, sync::Once};

use git2::{ConfigLevel, ErrorCode, Repository, RepositoryOpenFlags};
use rustix::process::geteuid;

use super::{
    guard::{self, altered, among, is_directory},
    settings,
};
use crate::{
    failure::{ErrorClass, Failure},
    git::{child::Reporter, projects::Dir, room},
};

/// Opens the project in `directory`, which was checked by the guard first.
///
/// # Errors
/// `conflict` where it is not what the agent made, `forbidden` where it belongs to somebody else.
pub(super) fn open(directory: &Dir, reporter: &Reporter) -> Result<Repository, Failure> {
    guard::check(directory, reporter)?;
    forget_search_paths();
    let path = format!("/proc/self/fd/{}", directory.as_fd().as_raw_fd());
    let nowhere: [&std::ffi::OsStr; 0] = [];
    let repo = Repository::open_ext(&path, RepositoryOpenFlags::NO_SEARCH, nowhere)
        .map_err(|error| unopened(directory, &error))?;
    // A name on the way, or a setting, may lead to another directory than the one that was checked; it is not opened to
    // find out.
    let same = |path: Option<&Path>, dir: &Dir| {
        let now = path.and_then(Path::to_str).and_then(|path| dir.identify(path).ok().flatten());
        now.is_some() && now == dir.identity().ok()
    };
    if !same(repo.workdir(), directory) || !same(Some(repo.path()), &directory.child(".git").map_err(among)?) {
        return Err(altered("its settings lead to another directory"));
    }
    let config = repo.config().and_then(|mut config| config.snapshot());
    let config = config.map_err(|error| fault("its settings cannot be read", &error))?;
    for setting in ["core.sparsecheckout", "index.sparse", "core.splitindex", "extensions.partialclone"] {
        let set = config.get_string(setting).is_ok_and(|value| !matches!(value.as_str(), "false" | "no" | "off" | "0"));
        if set {
            return Err(Failure::conflict(format!("the project uses {setting}, which the agent does not work with")));
        }
    }
    settings::narrow(&repo, &config)?;
    Ok(repo)
}

/// What it means that `directory` was not opened.
fn unopened(directory: &Dir, error: &git2::Error) -> Failure {
    let what = "the project cannot be opened";
    // The library follows a link that was put in the place of `.git` after the check, and finds whose its target is.
    if error.code() == ErrorCode::Owner && someone_elses(directory) {
        return Failure::forbidden(format!(
            "{what}: it belongs to another user than the one who works in it; set git.run_as to its owner and clone it anew"
        ));
    }
    fault(what, error)
}

/// Whether the project or its `.git` itself belongs to another user than the one who works in it.
fn someone_elses(directory: &Dir) -> bool {
    let works = geteuid().as_raw();
    let foreign = |stat: rustix::fs::Stat| is_directory(&stat) && stat.st_uid != works;
    [".", ".git"].into_iter().any(|name| directory.look(name).is_ok_and(|found| found.is_some_and(foreign)))
}

/// What an error of the library on a user's repository means.
pub(super) fn fault(what: &str, error: &git2::Error) -> Failure {
    let message = error.message();
    match error.code() {
        _ if room::refused(message) => Failure::new(ErrorClass::Disk, format!("{what}: {message}")),
        // The library calls a file locked that it may not read.
        ErrorCode::Locked if !message.contains("Permission denied") => {
            Failure::conflict(format!("{what}: another program holds a lock ({message})"))
        }
        _ => altered(format!("{what}: {message}")),
    }
}

/// Lets the library read no settings but the project's own.
pub(in crate::git) fn forget_search_paths() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        for level in [ConfigLevel::System, ConfigLevel::Global, ConfigLevel::XDG, ConfigLevel::ProgramData] {
            #[expect(unsafe_code, reason = "a process-wide setting of the library, made before its first use")]
            // SAFETY: only children call this, on the only thread of theirs that uses it, before any other use of the library.
            let set = unsafe { git2::opts::set_search_path(level, "") };
            if let Err(error) = set {
                tracing::warn!(%error, "a search path of the git library cannot be emptied");
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{chown, symlink};

    use git2::{Error, ErrorClass as Class};

    use super::*;

    #[test]
    fn whose_a_project_is_is_not_asked_of_what_stands_in_its_place() {
        let place = tempfile::tempdir().unwrap();
        let project = Dir::open(place.path()).unwrap();
        let git = place.path().join(".git");
        let end =
            || unopened(&project, &Error::new(ErrorCode::Owner, Class::Config, "not owned by current user")).class;
        // Put back already, or still a link to what somebody else has.
        std::fs::create_dir(&git).unwrap();
        assert_eq!(end(), ErrorClass::Conflict);
        std::fs::rename(&git, place.path().join("aside")).unwrap();
        symlink("/proc/1", &git).unwrap();
        assert_eq!(end(), ErrorClass::Conflict);
        std::fs::remove_file(&git).unwrap();
        assert_eq!(end(), ErrorClass::Conflict);

        std::fs::create_dir(&git).unwrap();
        chown(&git, Some(20_001), None).expect("only root can give away: run the tests as root, as CI does");
        assert_eq!(end(), ErrorClass::Forbidden);
        chown(&git, Some(geteuid().as_raw()), None).unwrap();
        chown(place.path(), Some(20_001), None).unwrap();
        assert_eq!(end(), ErrorClass::Forbidden);
    }
}
