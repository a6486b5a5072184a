"""What a job costs in Redis when few and when very many others wait.

    python benchmarks/queue_length.py [--lengths 10 1000 100000] [--plot docs/images/queue-length.png]

With so many jobs of twenty tenants in line: the time of one `submit`, one claim, one commit, one `status`, one look at
all depths; medians and 99th percentiles of calls on a local Valkey.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scale_out import QUEUE, sample_image
from simulated import CARD
from workload import surroundings

from calotype import Client
from calotype.embedded import EmbeddedServers
from calotype_shared.queue.job_store import JobStore

CHUNK = 10_000


def job(number: int) -> dict[str, Any]:
    return {"prompt": f"{number}", "model": "simulated", "num_inference_steps": 20, "seed": number}


def one(servers: EmbeddedServers, length: int, calls: int) -> dict[str, Any]:
    settings = servers.settings(key_prefix=f"length{length}:", max_queued=10_000_000)
    with Client(settings=settings) as client:
        store: JobStore = client._store
        store.announce_model(CARD)
        before = client._redis.info("memory")["used_memory"]
        for start in range(0, length, CHUNK):
            tenant = f"tenant-{start // CHUNK % 20}"
            client.submit_many([job(n) for n in range(start, min(length, start + CHUNK))], tenant=tenant)
        used = client._redis.info("memory")["used_memory"] - before
        seconds: dict[str, list[float]] = {"submit": [], "claim": [], "status": [], "commit": [], "depths": []}

        def timed(name: str, call: Callable[[], Any]) -> Any:
            began = time.perf_counter()
            result = call()
            seconds[name].append(time.perf_counter() - began)
            return result

        for number in range(calls):  # as many leave as come
            [handle] = timed("submit", functools.partial(client.submit_many, [job(10**9 + number)]))
            claim = timed("claim", lambda: store.claim(QUEUE, worker="one", lease_seconds=60))
            timed("status", handle.status)
            assert timed("commit", functools.partial(store.commit, claim, images=[sample_image(claim)], timings={}))
            timed("depths", client.depths)
    return {
        "waiting": length,
        "bytes_a_job": round(used / length) if length else 0,
        **{
            name: {
                "median_ms": round(statistics.median(values) * 1e3, 3),
                "p99_ms": round(sorted(values)[int(0.99 * len(values))] * 1e3, 3),
            }
            for name, values in seconds.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="*", default=[10, 1_000, 10_000, 100_000, 300_000])
    parser.add_argument("--calls", type=int, default=500)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/queue-length.json"))
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, EmbeddedServers.start(Path(folder)) as servers:
        table = []
        for length in options.lengths:
            table.append(one(servers, length, options.calls))
            print(table[-1], flush=True)
    lengths = " ".join(map(str, options.lengths))
    result = {
        "command": f"benchmarks/queue_length.py --lengths {lengths} --calls {options.calls}",
        **surroundings("cpu"),
        "table": table,
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    if options.plot:
        plot(table, options.plot)


def plot(table: list[dict[str, Any]], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.8))
    for name in ("submit", "claim", "commit", "status", "depths"):
        axes.plot([row["waiting"] for row in table], [row[name]["median_ms"] for row in table], "o-", label=name)
    axes.set(xscale="log", xlabel="jobs waiting", ylabel="ms, median", ylim=(0, None), title="A call to Redis")
    axes.legend(ncols=2)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
