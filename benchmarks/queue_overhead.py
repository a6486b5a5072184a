"""What the queue adds to one image on an idle system, beside a bare Celery task; and Redis commands a job.

    python benchmarks/queue_overhead.py --jobs 40 --output benchmarks/results/queue-overhead.json

A job's latency, from before `submit` to a signed URL in hand, less what its device work took (text, steps, decode), is
the queue's part: submit, message, claim, preparation, PNG, S3, commit, notice, URL. A bare Celery task that returns its
argument, on the same Redis with results in Redis, is sent and awaited in between, for comparison. Commands are counted
by MONITOR while a worker has room for all jobs, and while more are in line: those that cross the network, and those
that scripts call inside the server.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from redis import Redis
from workload import surroundings

import calotype_shared
from calotype import Client
from calotype.embedded import EmbeddedServers, LocalWorkers
from calotype.embedded.process import ChildProcess
from calotype_shared.queue.scripts import script_source
from calotype_shared.schema.enums import JobState

LUA = Path(calotype_shared.__file__).parent / "queue" / "lua"
NAMES = {file.stem for file in LUA.glob("*.lua")} - {"prelude"}
SCRIPTS = {hashlib.sha1(script_source(name).encode()).hexdigest(): f"{name}.lua" for name in NAMES}


def bare_celery(redis_url: str) -> Any:
    from celery import Celery

    app = Celery("bare", broker=redis_url, backend=redis_url)
    app.conf.update(worker_hijack_root_logger=False, broker_connection_retry_on_startup=True)

    @app.task(name="echo")  # type: ignore[untyped-decorator]
    def echo(value: int) -> int:
        return value

    return app


class Commands:
    """Counts what a Redis server is asked, by MONITOR, until the block ends."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._redis = Redis.from_url(url)
        self.network: Counter[str] = Counter()
        self.scripted: Counter[str] = Counter()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._count, daemon=True)

    def _count(self) -> None:
        with self._redis.monitor() as monitor:  # type: ignore[no-untyped-call]
            self._ready.set()
            for seen in monitor.listen():
                if self._stop.is_set():
                    return
                counter = self.scripted if seen["client_type"] == "lua" else self.network
                name, _, rest = seen["command"].partition(" ")
                counter[SCRIPTS.get(rest.partition(" ")[0], name.upper())] += 1

    def __enter__(self) -> Commands:
        self._ready = threading.Event()
        self._thread.start()
        self._ready.wait(5)
        return self

    def __exit__(self, *_: object) -> None:
        time.sleep(0.2)
        self._stop.set()
        Redis.from_url(self._url).ping()  # the monitor waits for a command
        self._thread.join(5)


def one_job(client: Client, seed: int) -> tuple[float, dict[str, float]]:
    """Seconds from submit to URL, and of its parts as the worker measured them."""
    began = time.perf_counter()
    handle = client.submit("a red circle on a blue background", num_inference_steps=4, seed=seed, model="demo")
    record = client.wait(handle.id, 120)
    [_] = client.urls(handle.id)
    return time.perf_counter() - began, dict(record.timings)


def commands(client: Client, redis_url: str, jobs: int, idle: float, *, start: int) -> dict[str, Any]:
    """Of Redis, a job, while so many are made at once; less what is done anyhow, `idle` a second."""
    before = client.counts()[JobState.SUCCEEDED]
    with Commands(redis_url) as seen:
        began = time.perf_counter()
        client.submit_many(
            [{"prompt": "a", "num_inference_steps": 4, "seed": start + n, "model": "demo"} for n in range(jobs)]
        )
        while client.counts()[JobState.SUCCEEDED] < before + jobs:  # a wait would ask for each job
            time.sleep(1)
        took = time.perf_counter() - began
    return {
        "jobs": jobs,
        "jobs_a_second": round(jobs / took, 2),
        "a_job": round((sum(seen.network.values()) - idle * took) / jobs, 2),
        "inside_scripts_a_job": round(sum(seen.scripted.values()) / jobs, 2),
        "most_frequent": {name: round(count / jobs, 2) for name, count in seen.network.most_common(12)},
    }


def measure(client: Client, celery: Any, redis_url: str, jobs: int) -> dict[str, Any]:
    for seed in range(5):
        one_job(client, 10_000 + seed)
        celery.send_task("echo", [seed]).get(timeout=30)
    ours, device, bare, added = [], [], [], []
    parts: dict[str, list[float]] = defaultdict(list)
    for number in range(jobs):  # interleaved
        seconds, timings = one_job(client, number)
        ours.append(seconds)
        device.append(sum(timings[name] for name in ("encode", "denoise", "decode")))
        for name, value in timings.items():
            parts[name].append(value)
        began = time.perf_counter()
        celery.send_task("echo", [number]).get(timeout=30, interval=0.001)
        bare.append(time.perf_counter() - began)
        added.append(seconds - device[-1] - bare[-1])
    time.sleep(1)
    with Commands(redis_url) as seen:
        time.sleep(10)
    idle = sum(seen.network.values()) / 10
    return {
        "jobs": jobs,
        "latency_ms": middle(ours),
        "device_ms": middle(device),
        "bare_celery_ms": middle(bare),
        "added_over_celery_ms": middle(added),
        "parts_ms": {name: middle(values)["median"] for name, values in parts.items()},
        "redis_commands_a_second_idle": round(idle, 2),
        "redis_commands_with_room": commands(client, redis_url, 24, idle, start=50_000),
        "redis_commands_when_full": commands(client, redis_url, 160, idle, start=60_000),
    }


def middle(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    return {
        "median": round(statistics.median(ordered) * 1e3, 1),
        "p95": round(ordered[int(0.95 * len(ordered))] * 1e3, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=40)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--serve", help=argparse.SUPPRESS)  # a bare Celery worker on this Redis
    options = parser.parse_args()
    if options.serve:
        bare_celery(options.serve).Worker(
            pool_cls="threads", concurrency=4, quiet=True, without_gossip=True, without_mingle=True, loglevel="ERROR"
        ).start()
        return
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        servers = stack.enter_context(EmbeddedServers.start(folder / "servers"))
        client = stack.enter_context(Client(settings=servers.settings()))
        celery_url = f"{servers.valkey.url.rstrip('/').removesuffix('/0')}/7"
        command = [sys.executable, __file__, "--serve", celery_url]
        stack.callback(ChildProcess("celery", command, log=folder / "celery.log").stop)
        workers = stack.enter_context(
            LocalWorkers(
                model="demo", devices=["cpu"], environment=servers.environment, log_dir=folder, say=lambda _: None
            )
        )
        workers.await_ready(client.workers, 200)
        result = {
            "command": f"benchmarks/queue_overhead.py --jobs {options.jobs}",
            **surroundings("cpu"),
            **measure(client, bare_celery(celery_url), servers.valkey.url, options.jobs),
        }
    text = json.dumps(result, indent=1)
    print(text)
    if options.output:
        options.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
