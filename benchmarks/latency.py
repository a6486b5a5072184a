"""How long a picture takes when requests arrive at random: first in first out, dynamic static batches, and the engine.

    python benchmarks/latency.py [--model demo] [--requests 64] [--rounds 2] [--loads 0.8 1.6]

Arrivals are Poisson at shares of what sequential diffusers can do on this machine, measured before each round. All
three serve the same arrivals of the same requests, one after the other, plain diffusers in a process of its own:

- sequential: a thread that makes them one by one, in the order they came;
- dynamic: a thread that takes whatever waits, at most eight, and runs it as static batches of what is alike, each
  padded to its longest: what LitServe and celery-batches do, without their transport;
- engine: they join the running step batch.

Latency counts from a request's arrival, so a server that falls behind cannot hide it. Lines take a while to grow as
long as they get: with few requests the figures are of an empty system filling up.
"""

from __future__ import annotations

import argparse
import json
import math
import queue
import random
import statistics
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from rivals import BATCH
from throughput import to_request
from workload import GUIDANCE, STEPS, PlainElsewhere, Wanted, quiet, surroundings, workload

from calotype_worker.engine import Engine, EngineSettings
from calotype_worker.models import load_model
from calotype_worker.threads import apart

Submit = Callable[[Wanted], Future[Any]]


def server(serve: Callable[[list[Wanted]], Any], most: int) -> Submit:
    """A thread that takes what waits, at most `most` at a time."""
    waiting: queue.Queue[tuple[Wanted, Future[Any]]] = queue.Queue()

    def run() -> None:
        while True:
            taken = [waiting.get()]
            while len(taken) < most and not waiting.empty():
                taken.append(waiting.get())
            serve([wanted for wanted, _ in taken])
            for _, future in taken:
                future.set_result(None)

    threading.Thread(target=run, daemon=True).start()

    def submit(wanted: Wanted) -> Future[Any]:
        future: Future[Any] = Future()
        waiting.put((wanted, future))
        return future

    return submit


def play(submit: Submit, arrivals: list[float], wanted: list[Wanted]) -> list[float]:
    """Latencies in seconds, in the order of arrival."""
    latencies = [0.0] * len(wanted)
    began = time.perf_counter()

    def note(index: int) -> Callable[[Future[Any]], None]:
        def done(_: Future[Any]) -> None:
            latencies[index] = time.perf_counter() - began - arrivals[index]

        return done

    futures = []
    for index, (due, each) in enumerate(zip(arrivals, wanted, strict=True)):
        time.sleep(max(0.0, began + due - time.perf_counter()))
        futures.append(submit(each))
        futures[-1].add_done_callback(note(index))
    for future in futures:
        future.result()
    time.sleep(0.05)
    return latencies


def sequential_rate(plain: PlainElsewhere, size: tuple[int, int]) -> float:
    """Pictures a second, one after the other, over every number of steps with every guidance scale."""
    sample = workload(math.lcm(len(STEPS), len(GUIDANCE)), *size, start=700)
    began = time.perf_counter()
    plain.one_by_one(sample)
    return len(sample) / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="NAME or NAME=SOURCE")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--loads", type=float, nargs="*", default=[0.8, 1.6])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/latency.json"))
    options = parser.parse_args()
    quiet()
    name, _, source = options.model.partition("=")
    model = apart(lambda: load_model(name, source=source or None, device=options.device))
    plain = PlainElsewhere(options.model, device=options.device)
    engine = Engine(model, EngineSettings())
    engine.profile(seconds=8)
    engine.start()
    count = iter(range(10**9))
    ways: dict[str, Submit] = {
        "sequential": server(plain.one_by_one, 1),
        "dynamic": server(lambda some: plain.many(some, size=BATCH), BATCH),
        "engine": lambda wanted: engine.submit(to_request(wanted, f"r{next(count)}")),
    }
    size = model.card.native_sizes[0]
    for submit in ways.values():
        for future in [submit(each) for each in workload(6, *size, start=900)]:
            future.result()
    table, capacities = [], []
    for load in options.loads:
        figures: dict[str, dict[str, list[float]]] = {way: {"mean": [], "p95": []} for way in ways}
        for number in range(options.rounds):
            capacity = sequential_rate(plain, size)
            capacities.append(round(capacity, 3))
            source_ = random.Random(number)
            due, arrivals = 0.0, []
            for _ in range(options.requests):
                due += source_.expovariate(load * capacity)
                arrivals.append(due)
            wanted = workload(options.requests, *size, start=number * options.requests)
            for way, submit in ways.items():
                found = sorted(play(submit, arrivals, wanted))
                figures[way]["mean"].append(statistics.mean(found))
                figures[way]["p95"].append(found[int(0.95 * len(found))])
                print(
                    load, way, f"mean {figures[way]['mean'][-1]:.2f} s, p95 {figures[way]['p95'][-1]:.2f} s", flush=True
                )
        best = [min(figures[way]["p95"][n] for way in ways if way != "engine") for n in range(options.rounds)]
        ratio = statistics.median(ours / other for ours, other in zip(figures["engine"]["p95"], best, strict=True))
        table.append(
            {
                "load": load,
                **{
                    way: {name: round(statistics.median(values), 3) for name, values in found.items()}
                    for way, found in figures.items()
                },
                "p95_of_engine_over_best_other": round(ratio, 3),
            }
        )
    engine.stop()
    plain.stop()
    result = {
        "command": f"benchmarks/latency.py --requests {options.requests} --rounds {options.rounds}",
        **surroundings(options.device),
        "sequential_pictures_a_second": capacities,
        "seconds": table,
    }
    print(json.dumps(result, indent=1))
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
