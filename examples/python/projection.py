"""What a master may believe of the events it receives: pure, without a broker, a clock or a database.

Events can come twice, late, and out of order: an agent sends one again whenever it cannot be sure that it arrived. Four
rules turn that into a state that is right:

(a) the first terminal event of a task's round wins, and a higher round (a replay) replaces a lower one;
(b) a terminal event beats any other event of its round, whatever their numbers;
(c) `seq` orders the events of one task and one `boot` (start of the agent) only;
(d) `project_status` counts only if its `project_seq` is not older than what is known of the project on that node.

What is known depends only on which events have come, never on their order: `tests/master/cases.json` at the top is a table
of what must come out, and Haul's own library for masters is held to the same.

A real master keeps `Task` and `Project` as rows and calls `Projection.apply` inside a transaction.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

TERMINAL = frozenset({"succeeded", "failed", "rejected", "cancelled", "superseded"})
CHANGES_PROJECT = frozenset({"clone", "pull", "delete"})


@dataclass
class Task:
    """What is known of one task."""

    task_id: str
    node: str
    kind: str
    project_id: int
    round: int = 0
    # The latest event of each start of the agent in this round; empty once it has ended.
    boots: dict[str, dict[str, Any]] = field(default_factory=dict)
    # The first terminal event of this round.
    end: dict[str, Any] | None = None
    # What became of the history of a clone whose tree was shown first. It may come before the end.
    history: dict[str, Any] | None = None

    @property
    def latest(self) -> dict[str, Any] | None:
        """The event that says where the task stands.

        Between starts of the agent, which `seq` does not order, the higher attempt counts, then the later moment: that
        only ever decides what is shown until the end comes.
        """
        newest = max(self.boots.values(), key=lambda each: (each["attempt"], _at(each), each["boot"]), default=None)
        return self.end or newest

    @property
    def is_done(self) -> bool:
        return self.end is not None

    @property
    def status(self) -> str:
        return self._latest("status", "published")

    @property
    def attempt(self) -> int:
        return self._latest("attempt", 0)

    @property
    def error(self) -> dict[str, Any] | None:
        return self._latest("error")

    @property
    def progress(self) -> dict[str, Any] | None:
        return self._latest("progress")

    @property
    def result(self) -> dict[str, Any] | None:
        return self.end.get("result") if self.end else None

    def _latest(self, name: str, default: Any = None) -> Any:
        return (self.latest or {}).get(name, default)

    def apply(self, event: dict[str, Any]) -> bool:
        """Takes in one event; says whether it told anything new."""
        if event["round"] < self.round:
            return False  # (a)
        if event["round"] > self.round:
            # (a): a replay starts the task anew.
            self.round, self.boots, self.end, self.history = event["round"], {}, None, None
        if event["status"] == "history":
            news, self.history = self.history is None, self.history or event
            return news
        if self.end is not None:
            return False  # (a) for a second end, (b) for anything else
        if event["status"] in TERMINAL:
            self.end, self.boots = event, {}
        else:
            known = self.boots.get(event["boot"])
            if known is not None and known["seq"] >= event["seq"]:
                return False  # (c)
            self.boots[event["boot"]] = event
        self.node = self.latest["node"]
        return self.latest is event

    def as_json(self) -> dict[str, Any]:
        names = ("task_id", "node", "kind", "project_id", "round", "status", "attempt", "result", "progress", "error", "is_done")
        return {name: getattr(self, name) for name in names}


@dataclass
class Project:
    """What is known of one project on one node. Each of the three events is the newest of its sort, by `_age`."""

    project_id: int
    node: str
    # What the project is while nothing is done to it: the last end of a task, or what became of a history.
    standing: dict[str, Any] | None = None
    # How its last task ended.
    ending: dict[str, Any] | None = None
    # Where it is and what is checked out.
    placed: dict[str, Any] | None = None
    # The latest events of tasks that have not ended.
    open: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def project_seq(self) -> int:
        return self.standing["project_seq"] if self.standing else 0

    @property
    def status(self) -> str | None:
        """Work that is under way, else what the last task left behind."""
        under_way = {each["project_status"] for each in self.open.values() if each["project_seq"] >= self.project_seq}  # (d)
        for status in ("SYNCING", "PENDING"):
            if status in under_way:
                return status
        return self.standing["project_status"] if self.standing else None

    @property
    def error(self) -> dict[str, Any] | None:
        return self.ending.get("error") if self.ending else None

    def place(self, name: str) -> str | None:
        gone = self.placed is None or self.placed["kind"] == "delete"
        return None if gone else (self.placed.get("result") or {}).get(name)

    def apply(self, event: dict[str, Any], task: Task) -> None:
        """Takes in one event, after its task has."""
        if task.is_done or task.latest is None:
            self.open.pop(task.task_id, None)
        else:
            self.open[task.task_id] = task.latest
        if event["status"] in TERMINAL or event["status"] == "history":
            self.standing = _newer(self.standing, event)
        if event["status"] in TERMINAL:
            self.ending = _newer(self.ending, event)
        if event["status"] == "succeeded":
            self.placed = _newer(self.placed, event)

    def as_json(self) -> dict[str, Any]:
        names = ("project_id", "node", "status", "project_seq", "error")
        return {name: getattr(self, name) for name in names} | {
            name: self.place(name) for name in ("head", "branch", "local_path")
        }


class Projection:
    """Tasks and projects, as the events tell."""

    def __init__(self) -> None:
        self.tasks: dict[str, Task] = {}
        # `project_seq` counts on each node for itself: a project on two nodes is two projects here.
        self.projects: dict[tuple[int, str], Project] = {}

    def published(self, node: str, message: dict[str, Any]) -> Task:
        """Notes a task that was just published. Its first event may have been here before: then that stays."""
        return self.tasks.setdefault(
            message["task_id"], Task(message["task_id"], node, message["kind"], message["project_id"])
        )

    def apply(self, event: dict[str, Any]) -> bool:
        """Takes in one event; says whether it told anything new of its task."""
        task = self.tasks.setdefault(
            event["task_id"], Task(event["task_id"], event["node"], event["kind"], event["project_id"])
        )
        news = task.apply(event)
        ended_otherwise = event["status"] in TERMINAL and task.end is not None and task.round == event["round"]
        if not (ended_otherwise and task.end["event_id"] != event["event_id"]):
            key = (event["project_id"], event["node"])
            self.projects.setdefault(key, Project(*key)).apply(event, task)
        return news

    def project(self, project_id: int) -> Project | None:
        """A project on the node that was heard of first, for a fleet that has each project on one node."""
        return next((project for (known, _), project in self.projects.items() if known == project_id), None)


def _newer(known: dict[str, Any] | None, event: dict[str, Any]) -> dict[str, Any]:
    """The newer of two events of one project (d)."""
    if known is None:
        return event
    ours, theirs = _applied(event), _applied(known)
    later = _at(event) > _at(known)
    if ours is not None and theirs is not None and ours != theirs and (ours > theirs) == later:
        # Where a node lost its storage it counts from the beginning; a later task of a higher generation is newer all the same.
        return event if later else known
    return max(known, event, key=lambda each: (each["project_seq"], _at(each), each["event_id"]))


def _at(event: dict[str, Any]) -> datetime:
    return datetime.fromisoformat(event["at"])


def _applied(event: dict[str, Any]) -> int | None:
    """The generation of a task that was applied."""
    applied = event["status"] == "succeeded" and event["kind"] in CHANGES_PROJECT
    return event.get("generation") if applied else None
