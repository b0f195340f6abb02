"""Each of the four rules, and what would go wrong without it."""

import itertools
import json
import pathlib

import pytest

from projection import Projection

TABLE = json.loads((pathlib.Path(__file__).parents[2] / "tests" / "master" / "cases.json").read_text())


def event(status, project_status="SYNCING", **fields):
    return {
        "v": 1,
        "event_id": f"{status}-{fields}",
        "at": f"2026-01-01T00:{fields.get('seq', 1):02d}:00Z" if fields.get("seq", 1) < 60 else "2026-01-01T02:00:00.5Z",
        "node": "worker-001",
        "boot": "boot-1",
        "seq": 1,
        "task_id": "t1",
        "kind": "clone",
        "project_id": 42,
        "project_seq": 0,
        "round": 0,
        "attempt": 1,
        "status": status,
        "project_status": project_status,
    } | fields


def applied(*events):
    projection = Projection()
    for each in events:
        projection.apply(each)
    return projection


ACCEPTED = event("accepted", "PENDING", seq=1, attempt=0)
STARTED = event("started", seq=2)
PROGRESS = event("progress", seq=3, progress={"phase": "receiving", "done": 1, "bytes": 2})
SUCCEEDED = event("succeeded", "ACTIVE", seq=4, project_seq=1, result={"local_path": "7_app", "head": "a" * 40})


def test_a_task_goes_from_published_to_its_end():
    projection = Projection()
    task = projection.published("worker-001", {"task_id": "t1", "kind": "clone", "project_id": 42})
    assert task.status == "published" and not task.is_done
    for each in (ACCEPTED, STARTED, PROGRESS):
        assert projection.apply(each)
    assert task.progress["phase"] == "receiving"
    assert projection.project(42).status == "SYNCING"
    assert projection.apply(SUCCEEDED)
    assert task.is_done and task.progress is None and task.result["local_path"] == "7_app"
    assert projection.project(42).as_json()["status"] == "ACTIVE"


def test_the_state_is_the_same_in_every_order_of_arrival():
    events = (ACCEPTED, STARTED, PROGRESS, SUCCEEDED)
    for order in itertools.permutations(events):
        projection = applied(*order)
        assert projection.tasks["t1"].status == "succeeded", order
        assert projection.project(42).status == "ACTIVE", order
        assert projection.project(42).place("head") == "a" * 40


def test_the_first_terminal_event_of_a_round_wins():
    projection = applied(SUCCEEDED, event("cancelled", "ACTIVE", seq=9, project_seq=1))
    assert projection.tasks["t1"].status == "succeeded"


def test_an_event_sent_twice_tells_nothing_new():
    projection = applied(STARTED, SUCCEEDED)
    assert not projection.apply(SUCCEEDED)
    assert not projection.apply(STARTED)


def test_a_higher_round_replaces_a_lower_one_and_never_the_other_way_round():
    failed = event("failed", "ERROR", seq=3, error={"class": "auth", "message": "no", "retry_at": None})
    replayed = event("succeeded", "ACTIVE", seq=2, round=1, project_seq=1, boot="boot-2", result={"head": "b" * 40})
    projection = applied(failed, event("started", round=1, seq=1, boot="boot-2"))
    assert projection.tasks["t1"].status == "started" and projection.tasks["t1"].error is None
    projection.apply(replayed)
    assert not projection.apply(failed)
    assert projection.tasks["t1"].status == "succeeded"
    assert projection.project(42).status == "ACTIVE" and projection.project(42).error is None


def test_a_terminal_event_beats_others_of_its_round_whatever_its_number():
    late = event("retrying", seq=99)
    projection = applied(late, event("failed", "ERROR", seq=1, error={"class": "crashed", "message": "x"}))
    assert projection.tasks["t1"].status == "failed"
    assert not projection.apply(event("progress", seq=100))
    assert projection.project(42).status == "ERROR"


def test_numbers_order_events_of_one_start_of_the_agent_only():
    projection = applied(event("started", seq=7), event("started", seq=1, boot="boot-2", attempt=2))
    assert projection.tasks["t1"].attempt == 2, "a restarted agent counts from one again"
    assert not projection.apply(event("retrying", seq=8)), "the old start never comes back"
    assert not projection.apply(event("accepted", seq=1, boot="boot-2"))


def test_an_older_project_sequence_does_not_touch_the_project():
    newer = event("succeeded", "DELETED", task_id="t2", kind="delete", project_seq=5, result={})
    projection = applied(newer, SUCCEEDED)
    assert projection.tasks["t1"].status == "succeeded", "the task itself is told all the same"
    assert projection.project(42).status == "DELETED" and projection.project(42).place("head") is None


def test_an_equal_project_sequence_does():
    fields = {"task_id": "t2", "kind": "pull", "project_seq": 1}
    failed = event("failed", "ACTIVE", seq=6, error={"class": "network", "message": "x"}, **fields)
    projection = applied(SUCCEEDED, event("started", seq=5, **fields), failed)
    assert projection.project(42).status == "ACTIVE"
    assert projection.project(42).error["class"] == "network"
    assert projection.project(42).place("head") == "a" * 40


def test_history_after_the_end_changes_nothing_of_the_end():
    projection = applied(SUCCEEDED)
    assert projection.apply(event("history", "ACTIVE", seq=5, project_seq=1))
    assert projection.tasks["t1"].status == "succeeded"
    assert projection.tasks["t1"].result["head"] == "a" * 40


def test_unknown_fields_are_ignored():
    projection = applied(SUCCEEDED | {"something_new": {"x": 1}})
    assert projection.tasks["t1"].is_done


@pytest.mark.parametrize("case", TABLE["cases"], ids=lambda case: case["name"])
def test_the_table_of_cases_that_haul_itself_is_held_to(case):
    """In the order given or, where the case says so, in every order."""
    events = [TABLE["defaults"] | {"event_id": json.dumps(each)} | each for each in case["events"]]
    for order in itertools.permutations(events) if case["any_order"] else [events]:
        projection = applied(*order)
        for task_id, expected in case.get("tasks", {}).items():
            task = projection.tasks[task_id]
            known = {
                "round": task.round,
                "status": task.status,
                "attempt": task.attempt,
                "done": task.is_done,
                "error": task.error and task.error["class"],
                "head": (task.result or {}).get("head"),
                "phase": task.progress and task.progress["phase"],
            }
            assert {name: known[name] for name in expected} == expected, [each["status"] for each in order]
        for key, expected in case.get("projects", {}).items():
            project_id, node = key.split("@")
            project = projection.projects[int(project_id), node]
            known = {
                "status": project.status,
                "seq": project.project_seq,
                "head": project.place("head"),
                "branch": project.place("branch"),
                "error": project.error and project.error["class"],
            }
            assert {name: known[name] for name in expected} == expected, [each["status"] for each in order]
