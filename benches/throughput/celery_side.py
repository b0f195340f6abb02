"""Celery's side of the throughput benchmark: fills its queue, or works it off and says how long that took."""

import os
import sys
import time
from multiprocessing import Value

from celery import Celery
from celery.signals import task_postrun, task_prerun

role, url, queue, tasks, prefetch = sys.argv[1:6]
# A queue that is told of the begin and the end of every task, or nothing.
results = sys.argv[6] if len(sys.argv) > 6 else None
processes = 2
app = Celery("bench", broker=url)
app.conf.update(
    task_default_queue=queue,
    task_default_exchange=queue,
    task_default_routing_key=queue,
    task_default_queue_type="quorum",
    task_acks_late=True,
    task_ignore_result=results is None,
    task_track_started=results is not None,
    result_backend=results and "rpc://",
    result_persistent=True,
    worker_prefetch_multiplier=int(prefetch) // processes,
    worker_detect_quorum_queues=True,
    broker_connection_retry_on_startup=True,
    broker_transport_options={"confirm_publish": True},
    worker_send_task_events=False,
    worker_enable_remote_control=False,
)

# Made before the worker's processes, which share it.
first, done = Value("d", 0.0), Value("q", 0)


@app.task(name="bench.nothing")
def nothing():
    pass


@task_prerun.connect
def begins(**_):
    if first.value == 0.0:
        with first.get_lock():
            if first.value == 0.0:
                first.value = time.monotonic()


@task_postrun.connect
def ended(**_):
    with done.get_lock():
        done.value += 1
        last = done.value == int(tasks)
    if last:
        # Not by print: the worker takes that for logging.
        os.write(stdout, f"done {int((time.monotonic() - first.value) * 1e9)}\n".encode())


stdout = os.dup(1)
if role == "fill":
    app.conf.broker_transport_options = {}
    with app.producer_or_acquire() as producer:
        for _ in range(int(tasks)):
            nothing.apply_async(producer=producer, **({"reply_to": results} if results else {}))
else:
    app.worker_main(
        ["worker", "--concurrency", str(processes), "--pool", "prefork", "--loglevel", "WARNING"]
        + ["--without-gossip", "--without-mingle"]
    )
