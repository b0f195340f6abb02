"""The master against a real broker and a real agent; `cargo test --test python` sets those up and runs this.

HAUL_LIVE_NODE, HAUL_LIVE_UPSTREAM, HAUL_LIVE_PROJECTS and AMQP_URL tell where they are.
"""

import os
import pathlib
import time

import pytest
from fastapi.testclient import TestClient

import master

NODE = os.environ["HAUL_LIVE_NODE"]
UPSTREAM = os.environ["HAUL_LIVE_UPSTREAM"]
PROJECTS = pathlib.Path(os.environ["HAUL_LIVE_PROJECTS"])
DEADLINE_SECONDS = 90


@pytest.fixture(scope="module")
def client():
    with TestClient(master.app) as client:
        eventually(lambda: client.get("/healthz").status_code == 200)
        yield client


def eventually(condition):
    """Asks again until it holds; the state arrives through the broker, so there is nothing else to wait on."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not (value := condition()):
        assert time.monotonic() < deadline, "it did not come to hold"
        time.sleep(0.05)
    return value


def finished(client, response):
    assert response.status_code == 202, response.text
    address = f"/tasks/{response.json()['task_id']}"
    eventually(lambda: client.get(address).json()["is_done"])
    return client.get(address).json()


def test_a_project_is_cloned_looked_at_pulled_and_deleted(client):
    body = {"node": NODE, "git_url": UPSTREAM, "target_path": "python_master"}
    task = finished(client, client.post("/projects/77/clone", json=body))
    assert task["status"] == "succeeded", task
    assert (PROJECTS / "python_master" / ".git").is_dir()
    project = client.get("/projects/77").json()
    assert project["status"] == "ACTIVE" and project["head"] == task["result"]["head"]

    task = finished(client, client.post("/projects/77/status"))
    assert task["result"]["dirty"] is False
    task = finished(client, client.post("/projects/77/pull"))
    assert task["status"] == "succeeded" and task["result"]["updated"] is False
    task = finished(client, client.post("/projects/77/delete"))
    assert task["status"] == "succeeded"
    assert client.get("/projects/77").json()["status"] == "DELETED"
    assert not (PROJECTS / "python_master").exists()


def test_a_task_that_cannot_work_is_told_with_its_class(client):
    body = {"node": NODE, "git_url": UPSTREAM, "target_path": "python_wrong", "branch": "no-such-branch"}
    task = finished(client, client.post("/projects/78/clone", json=body))
    assert task["status"] == "failed" and task["error"]["class"] in ("not_found", "invalid"), task
    assert client.get("/projects/78").json()["status"] == "ERROR"


def test_a_node_that_is_not_enrolled_is_an_error_at_once(client):
    body = {"node": "nobody", "git_url": UPSTREAM, "target_path": "x"}
    response = client.post("/projects/79/clone", json=body)
    assert response.status_code == 503 and "nobody" in response.json()["detail"]
    assert client.get("/projects/79").status_code == 404


def test_the_same_task_published_twice_runs_once(client):
    body = {"node": NODE, "git_url": UPSTREAM, "target_path": "python_twice", "task_id": f"twice-{time.time_ns()}"}
    first = finished(client, client.post("/projects/80/clone", json=body))
    second = finished(client, client.post("/projects/80/clone", json=body))
    assert first["status"] == second["status"] == "succeeded"
    assert first["result"] == second["result"]


def test_an_unknown_task_or_project_is_not_found(client):
    assert client.get("/tasks/none").status_code == 404
    assert client.get("/projects/404").status_code == 404
    assert client.post("/projects/404/pull").status_code == 422
