//! The same tests once more as another user.

use std::{
    fs,
    os::unix::{fs::PermissionsExt, process::CommandExt},
    path::Path,
    process::Command,
};

use crate::scene::{OWNED, PROGRAM, USER, privileged};

/// Runs tests of this binary in a process of a user without privileges, or of ours for an `owner` without.
pub(crate) fn again(tests: &[&str], owner: bool) {
    assert!(privileged(), "only root can be somebody else: run the tests as root, as CI does");
    let place = tempfile::tempdir().unwrap();
    fs::set_permissions(place.path(), fs::Permissions::from_mode(0o777)).unwrap();
    let mut command = as_user(place.path(), owner);
    command.args(tests).args(["--exact", "--nocapture", "--test-threads", "2"]);
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    print!("{}", said.replace("test result", "result"));
    assert!(output.status.success(), "{said}\n{}", String::from_utf8_lossy(&output.stderr));
    assert!(said.contains(&format!("{} passed", tests.len())), "{said}");
}

/// This binary, with what it needs copied where everybody can read it.
fn as_user(place: &Path, owner: bool) -> Command {
    let (test, haul) = (place.join("tests"), place.join("haul"));
    for (from, to) in [(std::env::current_exe().unwrap(), &test), (env!("CARGO_BIN_EXE_haul").into(), &haul)] {
        fs::copy(from, to).unwrap();
        fs::set_permissions(to, fs::Permissions::from_mode(0o755)).unwrap();
    }
    let mut command = Command::new(&test);
    command.current_dir(place).env("TMPDIR", place).env(PROGRAM, &haul);
    if owner {
        command.env(OWNED, "1");
    } else {
        command.uid(USER).gid(USER);
    }
    command
}
