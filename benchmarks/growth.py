"""Does a worker's memory grow? Ten thousand real jobs of the bundled model through one worker, watched.

    python benchmarks/growth.py [--jobs 10000] [--plot docs/images/growth.png]

Every job has its own prompt and seed; steps, sampler, guidance, size and file format vary, so that caches turn over.
`growth_mib` is the slope of the worker's resident memory over the second half of the jobs, times ten thousand.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from workload import SAMPLERS, surroundings

from calotype import Client
from calotype.embedded import EmbeddedServers, LocalWorkers

CHUNK = 200  # jobs between looks
SIZES = ((128, 128), (160, 96), (96, 160))
FORMATS = ("png", "webp", "jpeg")


def job(number: int) -> dict[str, Any]:
    width, height = SIZES[number % len(SIZES)]
    return {
        "model": "demo",
        "prompt": f"a red circle on a blue background, number {number}",
        "num_inference_steps": 1 + number % 3,
        "guidance_scale": 1.0 if number % 4 else 3.0,
        "sampler": SAMPLERS[number % len(SAMPLERS)],
        "seed": number,
        "width": width,
        "height": height,
        "output_format": FORMATS[number % 7 % len(FORMATS)],
    }


def resident_mib(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise ProcessLookupError(pid)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=10_000)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/growth.json"))
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    table = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        servers = stack.enter_context(EmbeddedServers.start(folder / "servers"))
        client = stack.enter_context(Client(settings=servers.settings(retention_seconds=60)))
        workers = stack.enter_context(
            LocalWorkers(
                model="demo", devices=["cpu"], environment=servers.environment, log_dir=folder, say=lambda _: None
            )
        )
        workers.await_ready(client.workers, 200)
        [(_, pid)] = workers.processes
        began = time.monotonic()
        for start in range(0, options.jobs, CHUNK):
            handles = client.submit_many([job(number) for number in range(start, start + CHUNK)])
            client.wait([handle.id for handle in handles], 600)
            table.append((start + CHUNK, resident_mib(pid), client._redis.info("memory")["used_memory"] / 2**20))
            print(f"{table[-1][0]} jobs, worker {table[-1][1]:.0f} MiB, Redis {table[-1][2]:.1f} MiB", flush=True)
        seconds = time.monotonic() - began
    half = [row for row in table if row[0] > options.jobs // 2]
    slope = float(np.polyfit([row[0] for row in half], [row[1] for row in half], 1)[0])
    result = {
        "command": f"benchmarks/growth.py --jobs {options.jobs}",
        **surroundings("cpu"),
        "jobs_a_second": round(options.jobs / seconds, 2),
        "growth_mib_in_10000_jobs": round(slope * 10_000, 1),
        "columns": ["jobs", "worker_mib", "redis_mib"],
        "table": [[jobs, round(worker, 1), round(redis, 2)] for jobs, worker, redis in table],
    }
    options.out.write_text(json.dumps(result) + "\n")
    print({name: value for name, value in result.items() if name != "table"})
    if options.plot:
        plot(table, options.plot)


def plot(table: list[tuple[int, float, float]], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.5))
    jobs, worker, redis = zip(*table, strict=True)
    axes.plot(jobs, worker, label="worker, resident")
    axes.plot(jobs, redis, label="Redis")
    axes.set(xlabel="jobs made by one worker", ylabel="MiB", ylim=(0, None), title="Memory over ten thousand jobs")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
