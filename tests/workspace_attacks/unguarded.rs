//! What libgit2 does where nobody guards it: opened by its path, with its defaults, as a program that works in a project
//! would. Each call is made in a process of its own, which may hang or crash.

use std::{fmt, fs, path::Path, process::Command, time::Duration};

use git2::{
    AttrCheckFlags, ErrorCode, IndexAddOption, ObjectType, Oid, Repository, ResetType, Signature, StatusOptions,
    build::CheckoutBuilder,
};

use crate::{
    programs::users,
    scene::{bounded, snapshot},
    table::Where,
};

/// Names the call in the process that makes it.
const CALL: &str = "HAUL_TEST_UNGUARDED";
/// The test of this binary that makes it.
const TEST: &str = "unguarded_calls_of_libgit2_do_no_harm_in_a_project_that_nobody_altered";
/// What the process ends with where a call did as a file outside says.
const OBEYED: u8 = 7;
/// How long a call may take before it hangs.
const PATIENCE: Duration = Duration::from_secs(4);
/// An object that nobody has, but for those who plant it.
const NOBODYS: &str = "1111111111111111111111111111111111111111";
/// What is written as an object whose name begins with `aa`.
pub(crate) const FAN: &str = "fan 409\n";

/// What is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Call {
    Status,
    Ignored,
    Attributes,
    Submodules,
    Add,
    Commit,
    Branch,
    Tracking,
    Reset,
    Checkout,
    Merge,
    Fetch,
    Read,
    Write,
    Set,
    Log,
}

impl Call {
    pub(crate) const ALL: [Self; 16] = [
        Self::Status,
        Self::Ignored,
        Self::Attributes,
        Self::Submodules,
        Self::Add,
        Self::Commit,
        Self::Branch,
        Self::Tracking,
        Self::Reset,
        Self::Checkout,
        Self::Merge,
        Self::Fetch,
        Self::Read,
        Self::Write,
        Self::Set,
        Self::Log,
    ];
}

/// What came of it, the worst first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Harm {
    /// What is outside changed.
    Changes,
    /// An untracked or ignored file of the user's changed.
    Loses,
    Crashes,
    Hangs,
    /// It did as a file outside says.
    Obeys,
    Fails,
    Nothing,
}

impl fmt::Display for Harm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Changes => "changes what is outside",
            Self::Loses => "loses a file of the user",
            Self::Crashes => "crashes",
            Self::Hangs => "hangs",
            Self::Obeys => "obeys what is outside",
            Self::Fails => "fails",
            Self::Nothing => "does no harm",
        })
    }
}

/// Makes a call in the altered project and sees what came of it.
pub(crate) fn meet(call: Call, w: &Where, upstream: &Path) -> Harm {
    // Where git, too, looks for settings of its user: owners of directories are not to matter here.
    let home = w.project.with_extension("home");
    fs::create_dir_all(&home).unwrap();
    fs::write(home.join(".gitconfig"), "[safe]\n\tdirectory = *\n").unwrap();
    let (outside, of_user) = (snapshot(&w.outside), users(&w.project).split_off(1));
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args([TEST, "--exact", "--nocapture"])
        .env_clear()
        .env("HOME", &home)
        .env(CALL, format!("{call:?}"))
        .env("PROJECT", &w.project)
        .env("UPSTREAM", upstream)
        .env("SECOND", &w.second);
    let ended = bounded(command, PATIENCE);
    let code = ended.as_ref().map(|output| output.status.code());
    if snapshot(&w.outside) != outside {
        return Harm::Changes;
    }
    if users(&w.project).split_off(1) != of_user {
        return Harm::Loses;
    }
    match code {
        None => Harm::Hangs,
        Some(None) => Harm::Crashes,
        Some(Some(0)) => Harm::Nothing,
        Some(Some(code)) if code == i32::from(OBEYED) => Harm::Obeys,
        Some(Some(_)) => Harm::Fails,
    }
}

/// Makes the call that the surroundings name, if they name one, and ends the process.
pub(crate) fn perform() {
    let Some(name) = std::env::var_os(CALL) else { return };
    let call = Call::ALL.into_iter().find(|call| name.to_str() == Some(&format!("{call:?}"))).expect("a call");
    let text = |name: &str| std::env::var(name).unwrap();
    let ended = made(call, Path::new(&text("PROJECT")), &text("UPSTREAM"), &text("SECOND"));
    std::process::exit(match ended {
        Ok(false) => 0,
        Ok(true) => i32::from(OBEYED),
        Err(_) => 1,
    });
}

/// The call itself; whether it did as a file outside says.
fn made(call: Call, project: &Path, upstream: &str, second: &str) -> Result<bool, git2::Error> {
    let repo = Repository::open(project)?;
    let second = Oid::from_str(second)?;
    let signature = Signature::now("A", "a@example.org")?;
    match call {
        Call::Status => {
            let mut options = StatusOptions::new();
            let statuses = repo.statuses(Some(options.include_untracked(true).recurse_untracked_dirs(true)))?;
            drop(statuses);
        }
        Call::Ignored => return repo.is_path_ignored("planted"),
        Call::Attributes => {
            for path in ["a.txt", "dir/c.txt"] {
                if repo.get_attr(Path::new(path), "planted", AttrCheckFlags::default())?.is_some() {
                    return Ok(true);
                }
            }
        }
        Call::Submodules => drop(repo.submodules()?),
        Call::Add => {
            let mut index = repo.index()?;
            index.add_all(["*"], IndexAddOption::DEFAULT, None)?;
            index.write()?;
        }
        Call::Commit => {
            let head = repo.head()?.peel_to_commit()?;
            repo.commit(Some("HEAD"), &signature, &signature, "x", &head.tree()?, &[&head])?;
        }
        Call::Branch => drop(repo.reference("refs/heads/main", second, true, "x")?),
        Call::Tracking => drop(repo.reference("refs/remotes/origin/main", second, true, "x")?),
        Call::Reset => repo.reset(repo.find_commit(second)?.as_object(), ResetType::Hard, None)?,
        Call::Checkout => {
            let tree = repo.find_object(second, Some(ObjectType::Commit))?;
            repo.checkout_tree(&tree, Some(CheckoutBuilder::new().safe()))?;
        }
        Call::Merge => repo.merge(&[&repo.find_annotated_commit(second)?], None, None)?,
        Call::Fetch => {
            let mut remote = repo.remote_anonymous(upstream)?;
            remote.fetch(&["+refs/heads/main:refs/x"], None, None)?;
        }
        Call::Read => {
            let read = repo.odb()?.read(Oid::from_str(NOBODYS)?).map(drop);
            read.or_else(|error| if error.code() == ErrorCode::NotFound { Ok(()) } else { Err(error) })?;
        }
        Call::Write => drop(repo.blob(FAN.as_bytes())?),
        Call::Set => repo.config()?.set_str("x.y", "z")?,
        Call::Log => {
            let mut walk = repo.revwalk()?;
            walk.push_head()?;
            walk.try_for_each(|oid| oid.map(drop))?;
        }
    }
    Ok(false)
}
