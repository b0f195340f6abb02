//! What the projects directory promises, step by step.

use std::{fs, os::unix::fs::symlink, path::Path};

use super::*;
use crate::{
    failure::ErrorClass,
    protocol::{Place, TaskId},
};

fn stamp(task: &str, arrived: i64) -> Stamp {
    Stamp { task: TaskId::new(task).unwrap(), round: 0, place: Place { generation: None, arrived } }
}

fn target(name: &str) -> TargetPath {
    TargetPath::new(name).unwrap()
}

fn binding(project: ProjectId, name: &str) -> Binding {
    Binding {
        project,
        target: name.to_owned(),
        url: "https://git.example/a".to_owned(),
        credential: None,
        follows: Follows::Branch("main".to_owned()),
        owner: None,
        single_branch: false,
        placed: 0,
        history: None,
        directory: Identity::default(),
        last_fetch: None,
        applied: Applied::default(),
    }
}

fn place(projects: &Projects, project: ProjectId, name: &str, task: &str) -> Result<Binding, Failure> {
    let staging = projects.stage(&TaskId::new(task).unwrap(), None)?;
    staging.flush()?;
    projects.place(&staging, binding(project, name), &stamp(task, 1))
}

fn class<T: std::fmt::Debug>(result: Result<T, Failure>) -> ErrorClass {
    result.unwrap_err().class
}

fn left(at: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(at.join(OURS)).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.retain(|name| !FIXED.contains(&name.as_str()));
    names.extend(fs::read_dir(at.join(OURS).join("trash")).unwrap().map(|e| format!("{:?}", e.unwrap().file_name())));
    names
}

#[test]
fn a_placed_project_is_known_after_a_restart() {
    let at = tempfile::tempdir().unwrap();
    let projects = Projects::open(at.path()).unwrap();
    let placed = place(&projects, 1, "a", "t1").unwrap();
    assert_eq!(placed.applied.seq, 1);
    drop(projects);
    let projects = Projects::open(at.path()).unwrap();
    assert_eq!(projects.of(1).0.as_ref(), Some(&placed));
    assert!(projects.directory(&placed).unwrap().is_some());
    assert!(matches!(projects.site(1, &placed.url, &target("a")).unwrap(), Site::There(..)));
}

#[test]
fn a_target_in_use_is_a_conflict() {
    let at = tempfile::tempdir().unwrap();
    let projects = Projects::open(at.path()).unwrap();
    let placed = place(&projects, 1, "a", "t1").unwrap();
    fs::create_dir(at.path().join("foreign")).unwrap();
    fs::write(at.path().join("file"), "x").unwrap();
    symlink("/nowhere", at.path().join("link")).unwrap();
    assert_eq!(class(projects.site(2, "u", &target("a"))), ErrorClass::Conflict);
    assert_eq!(class(projects.site(1, "another", &target("a"))), ErrorClass::Conflict);
    assert_eq!(class(projects.site(1, &placed.url, &target("b"))), ErrorClass::Conflict);
    for name in ["foreign", "file", "link"] {
        assert_eq!(class(projects.site(2, "u", &target(name))), ErrorClass::Conflict, "{name}");
        assert_eq!(class(place(&projects, 2, name, "t2")), ErrorClass::Conflict, "{name}");
    }
    assert!(projects.of(2).0.is_none());
    assert_eq!(class(place(&projects, 2, "a", "t2")), ErrorClass::Conflict);
    assert_eq!(projects.owner(&target("a")), Some(1));
}

#[test]
fn a_directory_swapped_for_a_link_or_another_is_not_the_project() {
    let at = tempfile::tempdir().unwrap();
    let projects = Projects::open(at.path()).unwrap();
    let placed = place(&projects, 1, "a", "t1").unwrap();
    fs::rename(at.path().join("a"), at.path().join("moved")).unwrap();
    symlink("moved", at.path().join("a")).unwrap();
    assert!(projects.directory(&placed).unwrap().is_none());
    assert_eq!(class(projects.site(1, &placed.url, &target("a"))), ErrorClass::Conflict);
    // Deleting the project leaves what is not its own.
    assert_eq!(projects.bury(1, &stamp("t2", 2)).unwrap(), None);
    assert!(at.path().join("moved").exists() && at.path().join("a").is_symlink());
}

#[test]
fn a_projects_directory_swapped_for_a_link_is_refused() {
    let at = tempfile::tempdir().unwrap();
    let path = at.path().join("projects");
    let projects = Projects::open(&path).unwrap();
    fs::rename(&path, at.path().join("away")).unwrap();
    symlink("away", &path).unwrap();
    assert_eq!(class(projects.site(1, "u", &target("a"))), ErrorClass::Forbidden);
    assert_eq!(class(projects.stage(&TaskId::random(), None)), ErrorClass::Forbidden);
    assert!(Projects::open(&path).is_err());
}

#[test]
fn the_count_goes_on_over_delete_and_clone() {
    let at = tempfile::tempdir().unwrap();
    let projects = Projects::open(at.path()).unwrap();
    place(&projects, 1, "a", "t1").unwrap();
    let buried = projects.bury(1, &stamp("t2", 2)).unwrap().unwrap();
    assert!(!at.path().join("a").exists());
    projects.remove(&buried, &mut || true).unwrap();
    // The same task again, as after a crash, is not counted twice.
    assert_eq!(projects.bury(1, &stamp("t2", 2)).unwrap(), None);
    drop(projects);
    let projects = Projects::open(at.path()).unwrap();
    let (none, tombstone) = projects.of(1);
    assert_eq!((none, tombstone.unwrap().applied.seq), (None, 2));
    let again = place(&projects, 1, "b", "t3").unwrap();
    assert_eq!((again.applied.seq, again.applied.mark.unwrap().arrived), (3, 2));
    assert_eq!(projects.of(1).1, None);
}

#[test]
fn what_a_crash_left_is_swept_at_the_next_start() {
    let at = tempfile::tempdir().unwrap();
    let projects = Projects::open(at.path()).unwrap();
    place(&projects, 1, "a", "t1").unwrap();
    let staging = projects.stage(&TaskId::new("dead").unwrap(), None).unwrap();
    fs::write(at.path().join(OURS).join(&staging.name).join("f"), "x").unwrap();
    place(&projects, 2, "b", "t2").unwrap();
    projects.bury(2, &stamp("t3", 3)).unwrap().unwrap();
    fs::write(at.path().join(OURS).join("owners/.0123"), "half").unwrap();
    fs::write(at.path().join(OURS).join("pulls/nobody"), "{}").unwrap();
    assert_eq!(left(at.path()).len(), 2);
    let projects = Projects::open(at.path()).unwrap();
    assert_eq!(left(at.path()), Vec::<String>::new());
    assert!(!at.path().join(OURS).join("owners/.0123").exists());
    assert!(!at.path().join(OURS).join("pulls/nobody").exists());
    assert!(at.path().join("a").exists() && projects.of(1).0.is_some());
}

#[test]
fn a_binding_without_its_directory_lets_the_clone_run_anew() {
    let at = tempfile::tempdir().unwrap();
    let projects = Projects::open(at.path()).unwrap();
    let placed = place(&projects, 1, "a", "t1").unwrap();
    fs::remove_dir_all(at.path().join("a")).unwrap();
    assert!(projects.directory(&placed).unwrap().is_none());
    assert!(matches!(projects.site(1, &placed.url, &target("a")).unwrap(), Site::Free));
    // Also under another name: the old binding goes.
    place(&projects, 1, "b", "t2").unwrap();
    assert_eq!((projects.owner(&target("a")), projects.owner(&target("b"))), (None, Some(1)));
    drop(projects);
    assert_eq!(Projects::open(at.path()).unwrap().of(1).0.unwrap().target, "b");
}

#[test]
fn of_a_binding_and_a_tombstone_the_later_counts() {
    let at = tempfile::tempdir().unwrap();
    let projects = Projects::open(at.path()).unwrap();
    place(&projects, 1, "a", "t1").unwrap();
    let owner = at.path().join(OURS).join("owners/a");
    let kept = fs::read(&owner).unwrap();
    projects.bury(1, &stamp("t2", 2)).unwrap().unwrap();
    fs::write(&owner, kept).unwrap();
    let projects = Projects::open(at.path()).unwrap();
    assert!(projects.of(1).0.is_none() && projects.of(1).1.is_some() && !owner.exists());
}

#[test]
fn a_directory_that_got_the_number_of_a_removed_one_is_not_the_project() {
    let at = tempfile::tempdir().unwrap();
    let projects = Projects::open(at.path()).unwrap();
    let mut placed = place(&projects, 1, "a", "t1").unwrap();
    // File systems give numbers out again at will; the moment it was made tells them apart.
    assert!(placed.directory.born.is_some());
    placed.directory.born = Some(1);
    assert!(!projects.stands(&placed).unwrap());
}

#[test]
fn forgetting_clears_the_mark_and_keeps_the_count() {
    let at = tempfile::tempdir().unwrap();
    let projects = Projects::open(at.path()).unwrap();
    place(&projects, 1, "a", "t1").unwrap();
    projects.forget(1).unwrap();
    projects.forget(99).unwrap();
    let projects = Projects::open(at.path()).unwrap();
    let applied = projects.of(1).0.unwrap().applied;
    assert_eq!((applied.seq, applied.mark), (1, None));
}
