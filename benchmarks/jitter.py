"""How much encoding and storing images beside the step loop disturbs its steps.

    python benchmarks/jitter.py [--step 0.02] [--steps 300]

The engine's thread shares Python's lock with the threads that encode and upload. Here a step is a device's: it sleeps
for `--step` seconds in `--launches` parts, and wants the lock between them, as kernel launches do; then the real table
product and the loop's own work. Beside it, nothing or so many threads as fast as they can: PNG, WebP or JPEG of 512x512
images, their hashes, or uploads to a real S3 server. What a step takes longer than alone is the disturbance.
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from throughput import to_request
from workload import quiet, surroundings, workload

from calotype.embedded import EmbeddedServers
from calotype_shared.schema.enums import OutputFormat
from calotype_shared.storage.s3 import Storage
from calotype_worker.engine import Engine, EngineSettings
from calotype_worker.engine.trace import NoopTracer
from calotype_worker.models import load_model
from calotype_worker.models.base import Rows
from calotype_worker.output.image import encode_image

SIDE = 512


class Sleeping:
    """The bundled model on a device that computes nothing and takes its time."""

    def __init__(self, model: Any, *, seconds: float, launches: int) -> None:
        self._model = model
        self._pause = seconds / launches
        self._launches = launches

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def predict(self, rows: Rows) -> torch.Tensor:
        for _ in range(self._launches):
            time.sleep(self._pause)
        return torch.zeros_like(rows.latents)

    def decode(self, latents: torch.Tensor) -> np.ndarray:
        return np.zeros((len(latents), 8, 8, 3), np.uint8)


class Steps(NoopTracer):
    """Notes how long each step took."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def span(self, track: str, name: str, began: float, ended: float, **facts: Any) -> None:
        if name.startswith("step"):
            self.seconds.append(ended - began)


def photograph() -> np.ndarray:
    """Pixels that compress as those of an image do: smooth, with some grain."""
    random = np.random.default_rng(0)
    smooth = Image.fromarray(random.integers(0, 255, (24, 24, 3), dtype=np.uint8)).resize(
        (SIDE, SIDE), Image.Resampling.BICUBIC
    )
    return np.clip(np.asarray(smooth).astype(int) + random.integers(-4, 5, (SIDE, SIDE, 3)), 0, 255).astype(np.uint8)


def beside(work: Callable[[], object] | None, threads: int, engine: Engine, steps: Steps, count: int) -> dict[str, Any]:
    """Step times of `count` steps, with `threads` threads at `work`."""
    stop = threading.Event()
    done = [0] * threads

    def run(number: int) -> None:
        while work is not None and not stop.is_set():
            work()
            done[number] += 1

    workers = [threading.Thread(target=run, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    steps.seconds.clear()
    began = time.perf_counter()
    [wanted] = workload(1, 128, 128, start=0)
    futures = [
        engine.submit(
            to_request(wanted.__class__(**{**vars_of(wanted), "num_inference_steps": count, "seed": n}), f"{began}-{n}")
        )
        for n in range(8)
    ]
    for future in futures:
        future.result()
    took = time.perf_counter() - began
    stop.set()
    for worker in workers:
        worker.join()
    ordered = sorted(steps.seconds)
    return {
        "median_ms": statistics.median(ordered) * 1e3,
        "p95_ms": ordered[int(0.95 * len(ordered))] * 1e3,
        "done_a_second": sum(done) / took,
    }


def vars_of(wanted: Any) -> dict[str, Any]:
    return {name: getattr(wanted, name) for name in wanted.__dataclass_fields__} | {"sampler": "euler"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--step", type=float, default=0.02, help="seconds")
    parser.add_argument("--launches", type=int, default=20)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--switch", type=float, default=0.005, help="seconds until a thread lets others run")
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 4])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/jitter.json"))
    options = parser.parse_args()
    quiet()
    torch.set_num_threads(1)  # the device is elsewhere
    sys.setswitchinterval(options.switch)
    model = Sleeping(load_model("demo", source=None, device="cpu"), seconds=options.step, launches=options.launches)
    steps = Steps()
    engine = Engine(model, EngineSettings(), trace=steps)
    engine.start()
    pixels = photograph()
    provenance = {"prompt": "a photograph", "parameters": "Steps: 20"}
    with tempfile.TemporaryDirectory() as folder, EmbeddedServers.start(Path(folder)) as servers:
        storage = Storage(servers.settings())
        storage.check(create=True)
        file = encode_image(pixels, OutputFormat.PNG, provenance)
        works: dict[str, Callable[[], object]] = {
            format_.value: lambda format_=format_: encode_image(pixels, format_, provenance)  # type: ignore[misc]
            for format_ in (OutputFormat.PNG, OutputFormat.WEBP, OutputFormat.JPEG)
        }
        works["sha256"] = lambda: hashlib.sha256(file).hexdigest()
        works["upload"] = lambda: storage.put("jitter/image.png", file, "image/png")
        beside(None, 0, engine, steps, 10)
        found: dict[tuple[str, int], list[dict[str, Any]]] = {}
        for _ in range(options.rounds):
            found.setdefault(("nothing", 0), []).append(beside(None, 0, engine, steps, options.steps))
            for name, work in works.items():
                for threads in options.threads:
                    row = beside(work, threads, engine, steps, options.steps)
                    found.setdefault((name, threads), []).append(row)
    engine.stop()
    alone = statistics.median(row["median_ms"] for row in found["nothing", 0])
    table = []
    for (name, threads), rows in found.items():
        middle = {key: round(statistics.median(row[key] for row in rows), 2) for key in rows[0]}
        table.append({"beside": name, "threads": threads, **middle, "slowdown": round(middle["median_ms"] / alone, 3)})
        print(table[-1], flush=True)
    result = {
        "command": f"benchmarks/jitter.py --step {options.step:g} --launches {options.launches} "
        f"--steps {options.steps} --switch {options.switch:g}",
        **surroundings("cpu"),
        "image": f"{SIDE}x{SIDE}, {len(file)} bytes as PNG",
        "table": table,
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
