"""The messages of the contract, built and checked by nothing but its published schemas."""

from __future__ import annotations

import json
import pathlib
import time
import uuid
from typing import Any

import aio_pika
import jsonschema

SCHEMAS = pathlib.Path(__file__).resolve().parents[2] / "schemas"
# AMQP priorities of the contract's words.
PRIORITIES = {"critical": 9, "high": 7, "normal": 4, "low": 2, "idle": 0}


def schema(name: str) -> jsonschema.Draft202012Validator:
    """A validator for one kind of message: `task`, `event`, `control` or `control-answer`."""
    return jsonschema.Draft202012Validator(json.loads((SCHEMAS / f"{name}.schema.json").read_text()))


def task(kind: str, project_id: int, **fields: Any) -> dict[str, Any]:
    """A task's body; fields that are None are left out."""
    body = {"v": 1, "task_id": str(uuid.uuid4()), "kind": kind, "project_id": project_id}
    return body | {name: value for name, value in fields.items() if value is not None}


def task_message(body: dict[str, Any]) -> aio_pika.Message:
    """The AMQP message that carries a task."""
    return aio_pika.Message(
        json.dumps(body).encode(),
        content_type="application/json",
        delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
        message_id=body["task_id"],
        type=f"task.{body['kind']}",
        timestamp=int(time.time()),
        app_id="python-master",
        priority=PRIORITIES[body.get("priority", "normal")],
    )


def cancel_message(task_id: str) -> aio_pika.Message:
    """The AMQP message that cancels a task; its routing key on `haul.control` is the node."""
    body = {"v": 1, "command": "cancel", "task_id": task_id, "control_id": str(uuid.uuid4())}
    return aio_pika.Message(
        json.dumps(body).encode(),
        content_type="application/json",
        delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
        message_id=body["control_id"],
        type="control.cancel",
        timestamp=int(time.time()),
        app_id="python-master",
    )
