"""How much of the wall time under standing load is the network at its best, and what deterministic mode costs.

    python benchmarks/efficiency.py [--model NAME=SOURCE] [--device cpu] [--seconds 12] [--rounds 4]

Requests of mixed steps, samplers and guidance stand in line all the time. In each round, one after the other: the
network and the decoder alone at the knee's size, then an engine for `--seconds`, then one in deterministic mode.

- `efficiency`: forward passes' own time ÷ wall. Own time is what the rows and images of that interval take alone,
  at the knee's time a row and the decoder's time an image; rows of padding and everything else are loss.
- `shares`: where the engine's wall time went, by its own counters; `steps` holds network, guidance, sampler and noise.
- `tflop_a_second`: of the rows that were needed and the decoded images, two operations for a multiply-add; with
  `--peak` (the device's dense peak in TFLOP/s) also the share of it.
- `deterministic_ratio`: rows a second of deterministic mode over the other's.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import statistics
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from pathlib import Path
from typing import Any

import torch
from throughput import alone, conditioning, to_request
from torch.utils.flop_counter import FlopCounterMode
from workload import quiet, surroundings, workload

from calotype_worker.engine import Engine, EngineSettings
from calotype_worker.engine.stats import EngineStats
from calotype_worker.models import StepModel, load_model
from calotype_worker.models.base import Rows
from calotype_worker.threads import apart

SUMMED = (
    "rows",
    "padding_rows",
    "forward_passes",
    "images",
    *(f"{part}_seconds" for part in ("step", "encode", "decode", "idle")),
)


def image_seconds(model: StepModel, batch: int) -> float:
    """Of one decoded image, in batches of that size by themselves; the median of five."""
    latents = torch.randn(batch, *model.latent_shape(*model.card.native_sizes[0]), device=model.device)
    taken = []
    with torch.inference_mode():
        for _ in range(6):
            began = time.perf_counter()
            model.decode(latents)
            taken.append((time.perf_counter() - began) / batch)
    return statistics.median(taken[1:])


def tflop(model: StepModel) -> tuple[float, float]:
    """Of a row and of a decoded image, counted while they run."""
    shape = model.latent_shape(*model.card.native_sizes[0])
    with torch.inference_mode():
        rows = Rows(
            latents=torch.randn(1, *shape, device=model.device),
            timesteps=torch.full((1,), 500.0, device=model.device),
            conditioning={name: value[None] for name, value in conditioning(model).items()},
        )
        with FlopCounterMode(display=False) as of_row:
            model.predict(rows)
        with FlopCounterMode(display=False) as of_image:
            model.decode(torch.randn(1, *shape, device=model.device))
    return of_row.get_total_flops() / 1e12, of_image.get_total_flops() / 1e12


class Line:
    """Keeps an engine's line full: each request that ends is followed by another."""

    def __init__(self, engine: Engine, model: StepModel, *, standing: int) -> None:
        self._engine = engine
        self._size = model.card.native_sizes[0]
        self._standing = standing
        self._numbers = itertools.count()
        self._waiting: set[Future[Any]] = set()

    def run(self, seconds: float) -> tuple[float, EngineStats]:
        """Wall seconds and the counters' growth, with the line full at both ends."""
        self._fill_for(2.0)  # the batch is full and mixed
        before, began = self._engine.stats(), time.perf_counter()
        self._fill_for(seconds)
        after, wall = self._engine.stats(), time.perf_counter() - began
        for future in self._waiting:
            future.cancel()
        self._waiting.clear()
        while self._engine.stats().in_flight:
            time.sleep(0.01)
        return wall, EngineStats(**{name: getattr(after, name) - getattr(before, name) for name in SUMMED})

    def _fill_for(self, seconds: float) -> None:
        ends = time.perf_counter() + seconds
        while (left := ends - time.perf_counter()) > 0:
            while len(self._waiting) < self._standing:
                number = next(self._numbers)
                [wanted] = workload(1, *self._size, start=number)
                self._waiting.add(self._engine.submit(to_request(wanted, f"r{number}")))
            self._waiting = set(wait(self._waiting, timeout=left, return_when=FIRST_COMPLETED).not_done)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="NAME or NAME=SOURCE")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--max-rows", type=int, default=32)
    parser.add_argument("--compile", choices=["off", "default", "reduce-overhead"], default="off")
    parser.add_argument("--seconds", type=float, default=12.0)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--peak", type=float, help="TFLOP/s of the device")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/efficiency.json"))
    options = parser.parse_args()
    quiet()
    name, _, source = options.model.partition("=")
    model: Any = apart(lambda: load_model(name, source=source or None, device=options.device))
    settings = EngineSettings(max_rows=options.max_rows, compile=options.compile)
    engines = {
        "normal": Engine(model, settings),
        "deterministic": Engine(model, dataclasses.replace(settings, deterministic=True, compile="off")),
    }
    knee = engines["normal"].profile(seconds=8)[0].knee.rows
    lines = {}
    for way, engine in engines.items():
        engine.start()
        lines[way] = Line(engine, model, standing=2 * options.max_rows)
        lines[way].run(1.0)
    rounds = [one(lines, model, knee, settings.decode_batch, options.seconds) for _ in range(options.rounds)]
    for engine in engines.values():
        engine.stop()
    result = {
        "command": f"benchmarks/efficiency.py --model {options.model} --device {options.device} "
        f"--max-rows {options.max_rows} --compile {options.compile} "
        f"--seconds {options.seconds:g} --rounds {options.rounds}",
        **surroundings(options.device),
        "knee_rows": knee,
        **middle(rounds, lambda row: row),
    }
    of_row, of_image = apart(lambda: tflop(model))
    achieved = result["rows_a_second"] * of_row + result["images_a_second"] * of_image
    result["tflop_a_row"], result["tflop_per_image_decoded"] = round(of_row, 4), round(of_image, 4)
    result["tflop_a_second"] = round(achieved, 3)
    if options.peak:
        result["share_of_peak"] = round(achieved / options.peak, 3)
    print(json.dumps(result, indent=1))
    options.out.write_text(json.dumps(result, indent=1) + "\n")


def one(lines: dict[str, Line], model: StepModel, knee: int, decode_batch: int, seconds: float) -> dict[str, Any]:
    found: dict[str, tuple[float, EngineStats]] = {}
    row = alone(model, knee)
    image = apart(lambda: image_seconds(model, decode_batch))
    found["normal"] = lines["normal"].run(seconds)
    row = (row + alone(model, knee)) / 2  # before and after
    found["deterministic"] = lines["deterministic"].run(seconds)
    wall, stats = found["normal"]
    rates = {way: stats_.images / wall_ for way, (wall_, stats_) in found.items()}
    rows = {way: stats_.rows / wall_ for way, (wall_, stats_) in found.items()}
    return {
        "efficiency": (stats.rows * row + stats.images * image) / wall,
        "mean_rows": stats.mean_rows,
        "images_a_second": rates["normal"],
        "rows_a_second": rows["normal"],
        # Rows, not images: in a few seconds the number of those that happen to finish is a matter of luck.
        "deterministic_ratio": rows["deterministic"] / rows["normal"],
        "milliseconds_a_row_alone": row * 1e3,
        "milliseconds_per_image_decoded_alone": image * 1e3,
        "shares": {
            part: getattr(stats, f"{counter}_seconds") / wall
            for part, counter in (("steps", "step"), ("text", "encode"), ("decode", "decode"), ("idle", "idle"))
        },
    }


def middle(rounds: list[dict[str, Any]], get: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    """Medians of the rounds, of each figure."""
    first = get(rounds[0])
    return {
        key: middle(rounds, lambda row, key=key: get(row)[key])  # type: ignore[misc]
        if isinstance(value, dict)
        else round(statistics.median(get(row)[key] for row in rounds), 3)
        for key, value in first.items()
    }


if __name__ == "__main__":
    main()
