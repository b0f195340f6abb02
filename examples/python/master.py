"""A small master: REST in front, RabbitMQ behind.

    AMQP_URL=amqp://guest:guest@127.0.0.1:5672/%2f uvicorn master:app

Tasks are published with publisher confirms and `mandatory`: a request is answered 202 only once the broker has the task in
the node's queue, and 503 with the reason where it has not. Events are read from the durable queue `haul.master.event`,
which `haul topology apply` (or the first agent) makes; what they mean is decided in projection.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
from typing import Any, Literal

import aio_pika
import aio_pika.exceptions
import aiormq.exceptions
from fastapi import FastAPI, HTTPException, Request
from pydantic import BaseModel, ConfigDict, Field

import messages
from projection import Projection

log = logging.getLogger("master")

AMQP_URL = os.environ.get("AMQP_URL", "amqp://guest:guest@127.0.0.1:5672/%2f")
PREFIX = os.environ.get("HAUL_PREFIX", "haul")
# Longer than a broker's fail-over, shorter than a person's patience.
PUBLISH_TIMEOUT_SECONDS = 10
# How often to look again for a queue of events that is not there yet.
SUBSCRIBE_AGAIN_SECONDS = 2
# Events taken in but not settled: enough to keep the connection busy.
PREFETCH = 100


class TaskRequest(BaseModel):
    """What every kind of task takes."""

    model_config = ConfigDict(extra="forbid")
    node: str | None = Field(None, pattern="^[A-Za-z0-9_-]{1,63}$")
    task_id: str | None = Field(None, pattern="^[A-Za-z0-9._:-]{1,128}$")
    generation: int | None = Field(None, ge=0)
    priority: Literal["critical", "high", "normal", "low", "idle"] | None = None
    credential: str | None = None
    timeout_secs: int | None = Field(None, ge=1)
    not_after: str | None = None


class CloneRequest(TaskRequest):
    git_url: str
    target_path: str
    branch: str | None = None
    tag: str | None = None
    commit: str | None = None
    depth: int | None = Field(None, ge=1)


class PullRequest(TaskRequest):
    on_conflict: Literal["keep", "reset"] | None = None


class Master:
    """The connection to the broker, and what is known."""

    def __init__(self) -> None:
        self.projection = Projection()
        self.subscribed = asyncio.Event()

    async def run(self, stop: asyncio.Event) -> None:
        """Holds the connection and takes in events until `stop`."""
        self.connection = await aio_pika.connect_robust(AMQP_URL, timeout=PUBLISH_TIMEOUT_SECONDS)
        async with self.connection:
            # On a channel of its own: a returned task must not disturb the events.
            self.publishing = await self.connection.channel(publisher_confirms=True, on_return_raises=True)
            subscriber = asyncio.create_task(self.subscribe())
            try:
                await stop.wait()
            finally:
                subscriber.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await subscriber

    async def subscribe(self) -> None:
        """Reads the queue of events for ever, beginning anew whenever it is not there or goes away."""
        name = f"{PREFIX}.master.event"
        while True:
            channel = await self.connection.channel()
            try:
                await channel.set_qos(prefetch_count=PREFETCH)
                # Passively: the queue's arguments are the fleet's business, ours is to read it.
                queue = await channel.declare_queue(name, durable=True, passive=True)
                async with queue.iterator() as events:
                    self.subscribed.set()
                    async for message in events:
                        # Acked only after it was taken in: a crash in between brings it again, which the rules allow for.
                        async with message.process(requeue=False):
                            self.take(message)
            except aio_pika.exceptions.ChannelNotFoundEntity:
                log.warning("there is no queue %s yet: run `haul topology apply`, or start an agent", name)
            except (aio_pika.exceptions.AMQPError, ConnectionError) as lost:
                log.warning("reading events was interrupted: %s", lost)
            finally:
                self.subscribed.clear()
                with contextlib.suppress(Exception):
                    await channel.close()
            await asyncio.sleep(SUBSCRIBE_AGAIN_SECONDS)

    def take(self, message: aio_pika.abc.AbstractIncomingMessage) -> None:
        try:
            body = json.loads(message.body)
            if "status" in body:
                self.projection.apply(body)
            else:
                log.info("%s answers: %s", body.get("node"), body.get("answer"))
        except (ValueError, KeyError, TypeError):
            log.exception("an event could not be read: %r", message.body[:500])

    async def publish(self, exchange: str, node: str, message: aio_pika.Message) -> None:
        """Returns once the broker has the message in the node's queue; else raises what to answer."""
        try:
            target = await self.publishing.get_exchange(f"{PREFIX}.{exchange}", ensure=False)
            await target.publish(message, routing_key=node, mandatory=True, timeout=PUBLISH_TIMEOUT_SECONDS)
        except aio_pika.exceptions.PublishError as returned:
            raise HTTPException(503, f"no queue for node '{node}': it is not enrolled, or its agent never ran") from returned
        except aio_pika.exceptions.DeliveryError as refused:
            raise HTTPException(503, f"the broker refused the task for '{node}': its queue is full or unavailable") from refused
        except asyncio.TimeoutError as late:
            # It may be there or not. Publishing the same task_id again is safe: the agent tells duplicates.
            raise HTTPException(504, "the broker did not confirm in time; ask again with the same task_id") from late
        except (aio_pika.exceptions.AMQPError, aiormq.exceptions.AMQPError, ConnectionError, RuntimeError) as lost:
            raise HTTPException(503, f"the broker cannot be reached: {lost}") from lost

    async def submit(self, kind: str, project_id: int, request: TaskRequest) -> dict[str, Any]:
        fields = request.model_dump(exclude={"node", "task_id"}, exclude_none=True)
        known = self.projection.project(project_id)
        node = request.node or (known.node if known else None)
        if node is None:
            raise HTTPException(422, "which node? the project is not known yet")
        body = messages.task(kind, project_id, **fields)
        if request.task_id:
            body["task_id"] = request.task_id
        await self.publish("task", node, messages.task_message(body))
        return self.projection.published(node, body).as_json()


@contextlib.asynccontextmanager
async def lifespan(app: FastAPI):
    app.state.master = Master()
    stop = asyncio.Event()
    running = asyncio.create_task(app.state.master.run(stop))
    # A broker that is not there ends the start with its reason instead of leaving a master that can do nothing.
    while not hasattr(app.state.master, "publishing"):
        if running.done():
            running.result()
        await asyncio.sleep(0.05)
    yield
    stop.set()
    await running


app = FastAPI(title="Haul master example", lifespan=lifespan)


def master(request: Request) -> Master:
    return request.app.state.master


@app.post("/projects/{project_id}/clone", status_code=202)
async def clone(project_id: int, body: CloneRequest, request: Request):
    return await master(request).submit("clone", project_id, body)


@app.post("/projects/{project_id}/pull", status_code=202)
async def pull(project_id: int, request: Request, body: PullRequest = PullRequest()):
    return await master(request).submit("pull", project_id, body)


@app.post("/projects/{project_id}/delete", status_code=202)
async def delete(project_id: int, request: Request, body: TaskRequest = TaskRequest()):
    return await master(request).submit("delete", project_id, body)


@app.post("/projects/{project_id}/status", status_code=202)
async def status(project_id: int, request: Request, body: TaskRequest = TaskRequest()):
    return await master(request).submit("status", project_id, body)


@app.post("/tasks/{task_id}/cancel", status_code=202)
async def cancel(task_id: str, request: Request):
    known = master(request).projection.tasks.get(task_id)
    if known is None:
        raise HTTPException(404, "no such task")
    await master(request).publish("control", known.node, messages.cancel_message(task_id))
    return known.as_json()


@app.get("/projects/{project_id}")
async def project(project_id: int, request: Request):
    known = master(request).projection.project(project_id)
    if known is None:
        raise HTTPException(404, "no such project")
    return known.as_json()


@app.get("/tasks/{task_id}")
async def task(task_id: str, request: Request):
    known = master(request).projection.tasks.get(task_id)
    if known is None:
        raise HTTPException(404, "no such task")
    return known.as_json()


@app.get("/healthz")
async def healthz(request: Request):
    if not master(request).subscribed.is_set() or master(request).connection.is_closed:
        raise HTTPException(503, "not subscribed to events")
    return {"ok": True}
