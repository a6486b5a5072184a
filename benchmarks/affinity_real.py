"""Workers with and without affinity on one queue of eight sizes: real servers, real workers, networks that are clocks.

    OMP_NUM_THREADS=1 python benchmarks/affinity_real.py --output benchmarks/results/affinity-real.json

Each worker is the whole process: Celery, claims, engine, PNG, S3. Only its network and its decoder are replaced: a
step of `rows` rows of `area` (1: the native size) sleeps `max(t0, rows * area * t1)`, as `affinity.py` has it. So
several fit on a few cores. Two fleets run side by side, each on a queue of its own, and are given the same jobs in
turns, one round after another; a worker without one sleeps. `throughput` is as there: the work done until the line is
empty, in shares of what full step batches would do.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from affinity import SIZES, Device, Job, Load, figures
from workload import surroundings

import calotype_worker.loading
import calotype_worker.worker
from calotype import Client
from calotype.embedded import EmbeddedServers
from calotype_shared.observability.logs import set_up_logging
from calotype_shared.schema.enums import JobState, Lane
from calotype_shared.schema.jobs import JobRecord
from calotype_shared.settings import Settings
from calotype_worker.models import AnyModel
from calotype_worker.settings import WorkerSettings

SCALE = 8  # the sizes of `affinity.py`, by so much smaller: the bundled model's
FORK = multiprocessing.get_context("fork")  # torch is imported once
Count: TypeAlias = "Synchronized[int]"


def make_clock(model: Any, device: Device, passes: Count, rows: Count) -> AnyModel:
    """The model with a clock for its network."""

    def predict(asked: Any) -> torch.Tensor:
        count, _, h, w = asked.latents.shape
        pixels = SCALE * w * (512 // SCALE // model.latent_shape(64, 64)[2])
        lines = SCALE * h * (512 // SCALE // model.latent_shape(64, 64)[1])
        time.sleep(device.seconds((pixels, lines), count))
        passes.value, rows.value = passes.value + 1, rows.value + count  # one thread writes
        return torch.zeros_like(asked.latents, dtype=torch.float32)

    def decode(latents: torch.Tensor) -> np.ndarray:
        _, h, w = model.latent_shape(64, 64)
        count, _, high, wide = latents.shape
        return np.zeros((count, high * 64 // h, wide * 64 // w, 3), dtype=np.uint8)

    model.predict, model.decode = predict, decode
    made: AnyModel = model
    return made


def work(settings: Settings, look: int, device: Device, counts: tuple[Count, Count], log: Path) -> None:
    """A worker process, from its start to its drain."""
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    set_up_logging(log_format="text", level="info")
    torch.set_num_threads(1)
    real = calotype_worker.loading.load_models
    # The worker has the name already.
    vars(calotype_worker.worker)["load_models"] = lambda options: [
        make_clock(model, device, *counts) for model in real(options)
    ]
    options = WorkerSettings.load(
        model="demo",
        affinity=look,
        max_rows=device.max_rows,
        concurrency=device.slots,
        profile_seconds=0.0,
        grace_seconds=1.0,
    )
    calotype_worker.worker.Worker(settings, options).run()


class Fleet:
    """Workers of one setting, on a queue of their own."""

    def __init__(self, servers: EmbeddedServers, look: int, workers: int, device: Device, folder: Path) -> None:
        self.look = look
        self.settings = servers.settings(key_prefix=f"affinity-{look}:", coalesce=False)
        self._counts: list[tuple[Count, Count]] = [(FORK.Value("q"), FORK.Value("q")) for _ in range(workers)]
        self._processes = [
            FORK.Process(
                target=work, args=(self.settings, look, device, counts, folder / f"worker-{look}-{number}.log")
            )
            for number, counts in enumerate(self._counts)
        ]

    @contextmanager
    def running(self) -> Iterator[Client]:
        for process in self._processes:
            process.start()
        try:
            with Client(settings=self.settings) as client:
                while len(client._store.workers()) < len(self._processes):
                    assert all(process.is_alive() for process in self._processes), "a worker did not start"
                    time.sleep(0.1)
                yield client
        finally:
            for process in self._processes:
                process.terminate()
            for process in self._processes:
                process.join(30)

    @property
    def counted(self) -> tuple[int, int]:
        """Forward passes and rows so far."""
        return sum(passes.value for passes, _ in self._counts), sum(rows.value for _, rows in self._counts)


def one_round(client: Client, fleet: Fleet, jobs: Sequence[Job], least: float) -> dict[str, float]:
    passes, rows = fleet.counted
    ids: dict[str, Job] = {}
    for tenant in sorted({job.tenant for job in jobs}):
        own = [job for job in jobs if job.tenant == tenant]
        asked = [
            {
                "prompt": "a red circle",
                "width": job.size[0] // SCALE,
                "height": job.size[1] // SCALE,
                "num_inference_steps": job.steps,
                "guidance_scale": 5.0 if job.rows == 2 else 1.0,
                "sampler": "euler",
                "seed": number,
            }
            for number, job in enumerate(own)
        ]
        handles = client.submit_many(asked, lane=Lane.BULK, tenant=tenant)
        ids |= {handle.id: job for handle, job in zip(handles, own, strict=True)}
    records: list[JobRecord] = []
    while not records or any(not record.state.final for record in records):
        time.sleep(0.5)
        records = [record for record in client._store.get_many(list(ids)) if record is not None]
    assert all(record.state is JobState.SUCCEEDED for record in records), records
    for record in records:
        job = ids[record.id]
        job.arrives, job.claimed, job.done = record.queued_at, record.started_at or 0.0, record.finished_at or 0.0
        job.passed = int(client._redis.hget(client._store.keys.job(record.id), "passed") or 0)
    began, emptied = min(job.claimed for job in jobs), max(job.claimed for job in jobs)
    done = sum(job.work for job in jobs if job.done <= emptied)
    passes, rows = fleet.counted[0] - passes, fleet.counted[1] - rows
    found = figures(jobs, [])
    return {
        "throughput": done / sum(job.work for job in jobs) * least / (emptied - began),
        "mean_rows": rows / passes,
        **{name: found[name] for name in ("wait_p50", "wait_p95", "wait_max", "passed_mean", "passed_max")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--look", type=int, default=64)
    parser.add_argument("--jobs", type=int, default=160)
    parser.add_argument("--steps", type=float, default=0.3, help="of those that `affinity.py` has")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    device = Device()
    looks = (0, options.look)
    found: dict[int, list[dict[str, float]]] = {look: [] for look in looks}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        servers = stack.enter_context(EmbeddedServers.start(folder / "servers"))
        fleets = [Fleet(servers, look, options.workers, device, folder) for look in looks]
        clients = [stack.enter_context(fleet.running()) for fleet in fleets]
        for number in range(options.rounds):
            for fleet, client in zip(fleets, clients, strict=True):
                jobs, _ = Load(jobs=options.jobs, sizes=SIZES).make(device, options.workers, number)
                for job in jobs:
                    job.steps = max(2, round(job.steps * options.steps))
                full = {size: device.seconds(size, device.budget(size)) / device.budget(size) for size in SIZES}
                least = sum(job.rows * job.steps * full[job.size] for job in jobs) / options.workers
                found[fleet.look].append(one_round(client, fleet, jobs, least))
                print(fleet.look, json.dumps(found[fleet.look][-1]), flush=True)
    middle = {
        look: {name: round(statistics.median(each[name] for each in rounds), 3) for name in rounds[0]}
        for look, rounds in found.items()
    }
    off, on = (middle[look] for look in looks)
    result = {
        "command": "benchmarks/affinity_real.py "
        f"--workers {options.workers} --jobs {options.jobs} --steps {options.steps} --rounds {options.rounds}",
        **surroundings("cpu"),
        "load_average": [round(value, 1) for value in os.getloadavg()],
        "in order": off,
        f"look-ahead {options.look}": on,
        "on / off": {name: round(on[name] / off[name], 2) for name in off if off[name]},
        "throughput_by_round": {str(look): [round(each["throughput"], 3) for each in found[look]] for look in looks},
    }
    print(json.dumps(result, indent=1))
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
