"""What a master may believe of the events it receives: pure, without a broker, a clock or a database.

Events can come twice, late, and out of order: an agent sends one again whenever it cannot be sure that it arrived. Four
rules turn that into a state that is right:

(a) the first terminal event of a task's round wins, and a higher round (a replay) replaces a lower one;
(b) a terminal event beats any other event of its round, whatever their numbers;
(c) `seq` orders the events of one task and one `boot` (start of the agent) only;
(d) `project_status` counts only if its `project_seq` is not older than what is known of the project.

A real master keeps `Task` and `Project` as rows and calls `Projection.apply` inside a transaction.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

TERMINAL = frozenset({"succeeded", "failed", "rejected", "cancelled", "superseded"})


@dataclass
class Task:
    """What is known of one task."""

    task_id: str
    node: str
    kind: str
    project_id: int
    round: int = 0
    status: str = "published"
    attempt: int = 0
    result: dict[str, Any] | None = None
    progress: dict[str, Any] | None = None
    error: dict[str, Any] | None = None
    # Starts of the agent that reported in this round, oldest first, with the highest `seq` of each.
    boots: dict[str, int] = field(default_factory=dict)

    @property
    def is_done(self) -> bool:
        return self.status in TERMINAL

    def as_json(self) -> dict[str, Any]:
        fields = asdict(self)
        del fields["boots"]
        fields["is_done"] = self.is_done
        return fields


@dataclass
class Project:
    """What is known of one project."""

    project_id: int
    node: str
    status: str
    project_seq: int
    head: str | None = None
    branch: str | None = None
    local_path: str | None = None
    error: dict[str, Any] | None = None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


class Projection:
    """Tasks and projects, as the events tell."""

    def __init__(self) -> None:
        self.tasks: dict[str, Task] = {}
        self.projects: dict[int, Project] = {}

    def published(self, node: str, message: dict[str, Any]) -> Task:
        """Notes a task that was just published. Its first event may have been here before: then that stays."""
        return self.tasks.setdefault(
            message["task_id"], Task(message["task_id"], node, message["kind"], message["project_id"])
        )

    def apply(self, event: dict[str, Any]) -> bool:
        """Takes in one event; says whether it told anything new."""
        task = self.tasks.setdefault(
            event["task_id"], Task(event["task_id"], event["node"], event["kind"], event["project_id"])
        )
        if not self._apply_to_task(task, event):
            return False
        self._apply_to_project(event)
        return True

    @staticmethod
    def _apply_to_task(task: Task, event: dict[str, Any]) -> bool:
        if event["round"] < task.round:
            return False  # (a)
        if event["round"] > task.round:
            # (a): a replay starts the task anew.
            task.round, task.status, task.boots = event["round"], "published", {}
            task.result = task.progress = task.error = None
        if event["status"] == "history":
            # Comes after the end and changes nothing of it.
            return task.status == "succeeded"
        terminal = event["status"] in TERMINAL
        if task.is_done:
            return False  # (a) for a second end, (b) for anything else
        if not terminal and not _is_newer(task.boots, event["boot"], event["seq"]):
            return False  # (c)
        task.boots[event["boot"]] = max(event["seq"], task.boots.get(event["boot"], -1))
        task.status = event["status"]
        task.node = event["node"]
        task.attempt = event["attempt"]
        task.error = event.get("error")
        task.progress = None if terminal else event.get("progress", task.progress)
        task.result = event.get("result")
        return True

    def _apply_to_project(self, event: dict[str, Any]) -> None:
        known = self.projects.get(event["project_id"])
        if known is not None and event["project_seq"] < known.project_seq:
            return  # (d)
        if known is None:
            known = self.projects[event["project_id"]] = Project(
                event["project_id"], event["node"], event["project_status"], event["project_seq"]
            )
        known.node = event["node"]
        known.status = event["project_status"]
        known.project_seq = event["project_seq"]
        if event["status"] in TERMINAL:
            known.error = event.get("error")
        result = event.get("result") or {}
        if event["status"] == "succeeded":
            known.head = result.get("head", known.head)
            known.branch = result.get("branch", known.branch)
            known.local_path = result.get("local_path", known.local_path)
        if known.status == "DELETED":
            known.head = known.branch = known.local_path = None


def _is_newer(boots: dict[str, int], boot: str, seq: int) -> bool:
    """Whether an event is later than the known ones. A start of the agent that another one followed never comes back."""
    if boot not in boots:
        return True
    return boot == next(reversed(boots)) and seq > boots[boot]
