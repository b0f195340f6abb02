"""Drives clone, status, pull, cancel and delete against a running agent, knowing only the published schemas.

    python drive.py --amqp-url URL --node NODE --projects DIR --upstream URL --upstream-path BARE_REPOSITORY

`--projects` is the agent's projects directory and `--upstream-path` the bare repository behind `--upstream`: with both the
trees can be compared with those of `git clone`, and a new commit can be made for the pull. Every message that is sent and
every event that comes is checked against `schemas/`. Prints one line a step; exits 1 at the first thing that is wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import filecmp
import json
import os
import pathlib
import random
import subprocess
import sys
import tempfile

import aio_pika

import messages
from projection import TERMINAL, Projection

# One step: far longer than any of them takes on a small machine.
STEP_SECONDS = 90


class Wrong(Exception):
    """Something the agent did is not what the contract says."""


def check(condition: object, what: str) -> None:
    if not condition:
        raise Wrong(what)


def git(*arguments: str, cwd: pathlib.Path | None = None) -> str:
    environment = os.environ | {
        "GIT_AUTHOR_NAME": "Drive",
        "GIT_AUTHOR_EMAIL": "drive@example.invalid",
        "GIT_COMMITTER_NAME": "Drive",
        "GIT_COMMITTER_EMAIL": "drive@example.invalid",
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_CONFIG_GLOBAL": "/dev/null",
        "GIT_TERMINAL_PROMPT": "0",
    }
    done = subprocess.run(["git", *arguments], cwd=cwd, env=environment, capture_output=True, text=True)
    check(done.returncode == 0, f"git {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout.strip()


def tree(directory: pathlib.Path) -> dict[str, tuple[str, object]]:
    """Every path below a working tree but `.git`, with its type and what matters of it."""
    found: dict[str, tuple[str, object]] = {}
    for parent, directories, files in os.walk(directory):
        if pathlib.Path(parent) == directory:
            directories.remove(".git")
        for name in directories + files:
            path = pathlib.Path(parent, name)
            relative = str(path.relative_to(directory))
            if path.is_symlink():
                found[relative] = ("link", os.readlink(path))
            elif path.is_dir():
                found[relative] = ("directory", None)
            else:
                found[relative] = ("file", bool(path.stat().st_mode & 0o100))
    return found


def check_same_tree(project: pathlib.Path, reference: pathlib.Path) -> None:
    ours, theirs = tree(project), tree(reference)
    check(ours == theirs, f"the tree differs from git's own: {sorted(set(ours.items()) ^ set(theirs.items()))[:5]}")
    files = [name for name, (kind, _) in ours.items() if kind == "file"]
    _, different, unreadable = filecmp.cmpfiles(project, reference, files, shallow=False)
    check(not different and not unreadable, f"files differ from git's own: {(different + unreadable)[:5]}")
    check(git("rev-parse", "HEAD", cwd=project) == git("rev-parse", "HEAD", cwd=reference), "the heads differ")
    check(git("status", "--porcelain", cwd=project) == "", "git sees changes in a fresh tree")


class Agent:
    """The agent, as seen through the broker."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.projection = Projection()
        self.events: list[dict] = []
        self.answers: list[dict] = []
        self.arrived = asyncio.Condition()
        self.broken: Wrong | None = None
        self.task_schema = messages.schema("task")
        self.event_schema = messages.schema("event")
        self.control_schema = messages.schema("control")

    async def connect(self) -> None:
        self.connection = await aio_pika.connect(self.arguments.amqp_url, timeout=10)
        channel = await self.connection.channel()
        queue = await channel.declare_queue(exclusive=True)
        await queue.bind(f"{self.arguments.prefix}.event", routing_key=f"{self.arguments.node}.#")
        await queue.consume(self.take, no_ack=True)
        self.channel = await self.connection.channel(publisher_confirms=True, on_return_raises=True)

    async def take(self, message: aio_pika.abc.AbstractIncomingMessage) -> None:
        async with self.arrived:
            try:
                body = json.loads(message.body)
                if "status" in body:
                    self.take_event(message, body)
                else:
                    self.answers.append(body)
            except (Wrong, ValueError, KeyError) as wrong:
                self.broken = self.broken or Wrong(f"{wrong}: {message.body!r}")
            self.arrived.notify_all()

    def take_event(self, message: aio_pika.abc.AbstractIncomingMessage, event: dict) -> None:
        for error in self.event_schema.iter_errors(event):
            raise Wrong(f"an event does not match its schema: {error.message}")
        check(message.content_type == "application/json", "an event is application/json")
        check(message.message_id == event["event_id"], "an event's message_id is its event_id")
        check(message.type == f"event.{event['status']}", "an event's type is event.<status>")
        expected = f"{event['node']}.{event['kind']}.{event['status']}"
        check(message.routing_key == expected, f"an event's routing key is {expected}, not {message.routing_key}")
        self.events.append(event)
        self.projection.apply(event)
        if self.arguments.verbose:
            print(f"    {event['kind']} {event['status']} {event.get('progress') or event.get('error') or ''}", flush=True)

    async def until(self, what: str, found):
        """Waits until `found` returns something, and returns that."""
        async with self.arrived:
            try:
                async with asyncio.timeout(STEP_SECONDS):
                    while not (value := found()):
                        if self.broken:
                            raise self.broken
                        await self.arrived.wait()
            except TimeoutError as late:
                seen = [(event["kind"], event["status"]) for event in self.events[-8:]]
                raise Wrong(f"no {what} within {STEP_SECONDS} s; the last events were {seen}") from late
            if self.broken:
                raise self.broken
            return value

    async def publish(self, kind: str, project_id: int, **fields) -> str:
        body = messages.task(kind, project_id, **fields)
        self.task_schema.validate(body)
        exchange = await self.channel.get_exchange(f"{self.arguments.prefix}.task", ensure=False)
        await exchange.publish(
            messages.task_message(body), routing_key=self.arguments.node, mandatory=True, timeout=STEP_SECONDS
        )
        return body["task_id"]

    async def cancel(self, task_id: str) -> None:
        message = messages.cancel_message(task_id)
        self.control_schema.validate(json.loads(message.body))
        exchange = await self.channel.get_exchange(f"{self.arguments.prefix}.control", ensure=False)
        await exchange.publish(message, routing_key=self.arguments.node, mandatory=True, timeout=STEP_SECONDS)

    async def end(self, task_id: str) -> dict:
        """The task's terminal event."""
        return await self.until(
            f"end of task {task_id}",
            lambda: next((each for each in self.events if each["task_id"] == task_id and each["status"] in TERMINAL), None),
        )

    async def succeed(self, kind: str, project_id: int, **fields) -> dict:
        event = await self.end(await self.publish(kind, project_id, **fields))
        check(event["status"] == "succeeded", f"{kind} ended as {event['status']}: {event.get('error')}")
        return event


async def silent_upstream() -> tuple[asyncio.Server, str]:
    """An upstream that takes connections and never says a word."""
    held = []
    server = await asyncio.start_server(lambda reader, writer: held.append((reader, writer)), "127.0.0.1", 0)
    return server, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/silent.git"


async def drive(arguments: argparse.Namespace) -> None:
    agent = Agent(arguments)
    await agent.connect()
    project_id = random.randrange(1, 2**31)
    path = f"drive_{project_id}"
    directory = arguments.projects / path

    with tempfile.TemporaryDirectory() as scratch:
        reference = pathlib.Path(scratch, "reference")

        event = await agent.succeed("clone", project_id, git_url=arguments.upstream, target_path=path)
        git("clone", "-q", arguments.upstream, str(reference))
        check(event["project_status"] == "ACTIVE", "a cloned project is ACTIVE")
        check(event["result"]["local_path"] == path, "the result names the directory")
        check(event["result"]["head"] == git("rev-parse", "HEAD", cwd=reference), "the result names the head")
        check_same_tree(directory, reference)
        check(git("config", "remote.origin.url", cwd=directory) == arguments.upstream, "origin is the plain URL")
        print(f"clone    {event['result']['head'][:12]} in {directory}")

        event = await agent.succeed("status", project_id)
        result = event["result"]
        check(result["dirty"] is False and result["ahead"] == 0 and result["behind"] == 0, f"a fresh clone is clean: {result}")
        print(f"status   clean, on {result['branch']}")

        event = await agent.succeed("pull", project_id)
        check(event["result"].get("updated") is False, "a pull with nothing new says so")
        print("pull     nothing new")

        writer = pathlib.Path(scratch, "writer")
        git("clone", "-q", str(arguments.upstream_path), str(writer))
        (writer / "drive.txt").write_text(f"a new commit for project {project_id}\n")
        git("add", "drive.txt", cwd=writer)
        git("commit", "-q", "-m", "Drive the pull", cwd=writer)
        git("push", "-q", "origin", "HEAD", cwd=writer)
        (directory / "mine.txt").write_text("an untracked file of the user\n")
        event = await agent.succeed("pull", project_id)
        git("pull", "-q", "--ff-only", cwd=reference)
        check(event["result"].get("updated") is True, "a pull of a new commit says so")
        check(event["result"]["head"] == git("rev-parse", "HEAD", cwd=writer), "the pull arrived at the new commit")
        check((directory / "mine.txt").read_text().startswith("an untracked"), "the user's file is still there")
        dirty = await agent.succeed("status", project_id)
        check(dirty["result"]["dirty"] is True, "an untracked file makes the project dirty")
        (directory / "mine.txt").unlink()
        check_same_tree(directory, reference)
        print(f"pull     {event['result']['head'][:12]}, the user's file kept")

        early = messages.task("clone", project_id + 1)["task_id"]
        await agent.cancel(early)
        await agent.until("answer to the cancel", lambda: any(each.get("task_id") == early for each in agent.answers))
        await agent.publish("clone", project_id + 1, task_id=early, git_url=arguments.upstream, target_path=f"{path}_early")
        event = await agent.end(early)
        check(event["status"] == "cancelled", f"a task cancelled before it came ended as {event['status']}")
        check(not (arguments.projects / f"{path}_early").exists(), "a cancelled clone leaves nothing")
        print("cancel   before the task came")

        server, silent = await silent_upstream()
        running = await agent.publish("clone", project_id + 2, git_url=silent, target_path=f"{path}_silent")
        await agent.until(
            "start of the task to cancel",
            lambda: any(each["task_id"] == running and each["status"] == "started" for each in agent.events),
        )
        await agent.cancel(running)
        event = await agent.end(running)
        check(event["status"] == "cancelled", f"a running task that was cancelled ended as {event['status']}")
        check(not (arguments.projects / f"{path}_silent").exists(), "a cancelled clone leaves nothing")
        server.close()
        print("cancel   while it ran")

        event = await agent.succeed("delete", project_id)
        check(event["project_status"] == "DELETED", "a deleted project is DELETED")
        check(not directory.exists(), "the directory of a deleted project is gone")
        print("delete   gone")

    check(agent.projection.project(project_id).status == "DELETED", "the projection agrees")
    ends: dict[tuple[str, int], set[str]] = {}
    for event in agent.events:
        if event["status"] in TERMINAL:
            ends.setdefault((event["task_id"], event["round"]), set()).add(event["event_id"])
    check(all(len(ids) == 1 for ids in ends.values()), "every task has exactly one terminal event a round")
    print(f"{len(agent.events)} events, all of them as the schema says")
    await agent.connection.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--amqp-url", required=True)
    parser.add_argument("--node", required=True)
    parser.add_argument("--projects", required=True, type=pathlib.Path)
    parser.add_argument("--upstream", required=True)
    parser.add_argument("--upstream-path", required=True, type=pathlib.Path)
    parser.add_argument("--prefix", default="haul")
    parser.add_argument("--verbose", action="store_true", help="show every event")
    try:
        asyncio.run(drive(parser.parse_args()))
    except Wrong as wrong:
        sys.exit(f"wrong: {wrong}")


if __name__ == "__main__":
    main()
