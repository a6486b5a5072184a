"""From 1 to 64 workers on one Redis, with simulated devices: does twice as many make twice as much?

    python benchmarks/scale_out.py --output benchmarks/results/scale-out.json [--plot docs/images/scale-out.png]

Each simulated worker does with Redis what a real one does for a job: BRPOP of its message, claim, heartbeats, commit,
acknowledge; only its device is a clock: `--slots` jobs at a time, each for `--seconds`. So all workers fit on this
machine, and what is measured is what they share: Redis and the scripts in it. Half of the jobs are of one tenant and
the others of nine more. Linear is the rate that the clocks allow. Workers run in a few processes, for Python's lock
would be the limit otherwise; on a machine of few cores their own work still is.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from simulated import CARD
from workload import surroundings

from calotype import Client
from calotype.embedded import EmbeddedServers
from calotype_shared.queue.connection import connect_redis
from calotype_shared.queue.job_store import Claim, JobStore
from calotype_shared.schema.enums import JobState
from calotype_shared.schema.jobs import ImageRef
from calotype_shared.settings import Settings

QUEUE = "simulated.bulk"
LEASE_SECONDS = 20.0


def sample_image(claim: Claim) -> ImageRef:
    return ImageRef(
        key=f"{claim.folder}/0.png",
        seed=claim.config.seed,
        width=512,
        height=512,
        content_type="image/png",
        bytes=1,
        sha256="0" * 64,
    )


def worker(settings: Settings, name: str, slots: int, seconds: float, until: float) -> None:
    """One device: takes jobs while slots are free, commits them when their time is over."""
    redis = connect_redis(settings)
    store = JobStore(redis, key_prefix=settings.key_prefix)
    busy: list[tuple[float, Claim]] = []
    taken = 0
    beat = time.monotonic()
    while time.monotonic() < until:
        now = time.monotonic()
        while busy and busy[0][0] <= now:
            _, claim = busy.pop(0)
            assert store.commit(claim, images=[sample_image(claim)], timings={"denoise": seconds})
            redis.hdel(f"{settings.key_prefix}unacked", claim.job_id)  # as the transport acknowledges
        if busy and now - beat > LEASE_SECONDS / 3:
            beat = now
            store.renew([claim for _, claim in busy], lease_seconds=LEASE_SECONDS)
        if len(busy) < slots and redis.rpop(store.keys.messages(QUEUE)):
            claim_ = store.claim(QUEUE, worker=name, lease_seconds=LEASE_SECONDS)
            if claim_ is not None:
                taken += 1
                # The first ones are shorter, so that slots become free one by one: in waves, the rate of an interval
                # would depend on how many of them it holds.
                busy.append((now + seconds * min(1.0, taken / slots), claim_))
                continue
        wait = busy[0][0] - time.monotonic() if busy else 0.05
        time.sleep(min(0.05, max(0.0, wait)))
    for _, claim in busy:
        store.release(claim)


def process(settings: Settings, names: list[str], slots: int, seconds: float, until: float) -> None:
    threads = [threading.Thread(target=worker, args=(settings, name, slots, seconds, until)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def one(servers: EmbeddedServers, workers: int, options: argparse.Namespace) -> dict[str, Any]:
    settings = servers.settings(key_prefix=f"scale{workers}:{time.monotonic_ns()}:")
    linear = workers * options.slots / options.seconds
    with Client(settings=settings) as client:
        client._store.announce_model(CARD)
        jobs = int(linear * (options.duration + options.seconds + 2) * 1.2)  # some are left at the end
        for tenant in range(10):
            part = jobs // 2 if tenant == 0 else jobs // 18
            with Client(settings=settings.model_copy(update={"tenant": f"tenant-{tenant}"})) as own:
                own.submit_many(
                    [
                        {"prompt": f"{n}", "model": "simulated", "num_inference_steps": 20, "seed": n}
                        for n in range(part)
                    ]
                )
        redis = client._redis
        until = time.monotonic() + options.duration + options.seconds + 1.0
        names = [f"worker-{number}" for number in range(workers)]
        count = min(options.processes, workers)
        children = [
            multiprocessing.Process(
                target=process, args=(settings, names[k::count], options.slots, options.seconds, until)
            )
            for k in range(count)
        ]
        for child in children:
            child.start()
        time.sleep(options.seconds + 0.7)  # the first ones are done
        before, began = client.counts(), time.monotonic()
        cpu = redis.info("cpu")["used_cpu_user"] + redis.info("cpu")["used_cpu_sys"]
        time.sleep(max(1.0, until - 0.3 - time.monotonic()))
        after, seconds = client.counts(), time.monotonic() - began
        used = redis.info("cpu")["used_cpu_user"] + redis.info("cpu")["used_cpu_sys"] - cpu
        for child in children:
            child.join()
    rate = (after[JobState.SUCCEEDED] - before[JobState.SUCCEEDED]) / seconds
    return {"workers": workers, "rate": rate, "linear": linear, "share": rate / linear, "redis_cpu": used / seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=8.0, help="of a job on a device")
    parser.add_argument("--duration", type=float, default=16.0)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    rows: dict[int, list[dict[str, Any]]] = {count: [] for count in options.workers}
    with tempfile.TemporaryDirectory() as folder, EmbeddedServers.start(Path(folder)) as servers:
        for _ in range(options.rounds):
            for count in options.workers:
                rows[count].append(one(servers, count, options))
                print(rows[count][-1], flush=True)
    table = [
        {name: round(statistics.median(row[name] for row in found), 3) for name in found[0]} for found in rows.values()
    ]
    result = {
        "command": f"benchmarks/scale_out.py --slots {options.slots} --seconds {options.seconds}",
        **surroundings("cpu"),
        "table": table,
    }
    print(json.dumps(result, indent=1))
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n")
    if options.plot:
        plot(table, options.plot)


def plot(table: list[dict[str, float]], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4))
    workers = [row["workers"] for row in table]
    axes.plot(workers, [row["linear"] for row in table], "--", color="grey", label="linear")
    axes.plot(workers, [row["rate"] for row in table], "o-", label="measured")
    axes.set(xscale="log", yscale="log", xlabel="workers", ylabel="jobs a second", xticks=workers, title="One Redis")
    axes.set_xticklabels([str(count) for count in workers])
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
