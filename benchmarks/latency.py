"""How long an image takes when requests arrive at random: first in first out, dynamic static batches, and the engine.

    python benchmarks/latency.py [--model demo] [--requests 80] [--rounds 2] [--loads 0.8 1.6]

Arrivals are Poisson at shares of what sequential diffusers can do on this machine. All three serve the same arrivals of
the same requests, each in a process of its own:

- sequential: makes them one by one, in the order they came;
- dynamic: takes whatever waits, at most eight, and runs it as static batches of what is alike, each padded to its
  longest: what LitServe and celery-batches do, without their transport;
- engine: they join the running step batch.

The processes take turns of a second: the others are stopped meanwhile (SIGSTOP), and their clocks with them. So a
machine that is fast now and slow a minute later is so for all three. The load that came of it, arrivals a second times
the seconds that sequential diffusers took for one, is in the results.

Latency counts from a request's arrival, so a server that falls behind cannot hide it. Lines take a while to grow as
long as they get: with few requests the figures are of an empty system filling up.
"""

from __future__ import annotations

import argparse
import json
import math
import queue
import random
import select
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import asdict
from itertools import cycle
from pathlib import Path
from typing import Any

from throughput import to_request
from workload import BATCH, GUIDANCE, STEPS, Plain, Wanted, quiet, surroundings, workload

from calotype_worker.engine import Engine, EngineSettings
from calotype_worker.models import load_model
from calotype_worker.threads import apart

WAYS = ("sequential", "dynamic", "engine")
TURN_SECONDS = 1.0
_STOPPED = 0.3  # seconds without a tick: this process was stopped
_TICK = 0.005

Submit = Callable[[Wanted], Future[Any]]


# ---- one way, in its process


class RunningClock:
    """Seconds that this process has run: what it was stopped for does not count."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last = time.monotonic()
        self._stopped = 0.0
        threading.Thread(target=self._tick, daemon=True).start()

    def __call__(self) -> float:
        with self._lock:
            now = time.monotonic()
            if now - self._last > _STOPPED:
                self._stopped += now - self._last
            self._last = now
            return now - self._stopped

    def _tick(self) -> None:
        while True:
            self()
            time.sleep(_TICK)


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


class Way:
    """A server of one kind, loaded and warm."""

    def __init__(self, kind: str, model: str, device: str) -> None:
        quiet()
        self._clock = RunningClock()
        self._served = 0.0  # seconds at work, of one that makes one after the other
        if kind == "engine":
            self._submit = self._engine(model, device)
        else:
            plain = apart(lambda: Plain(model, device=device))
            self._submit = (
                server(lambda some: self._timed(plain, some), 1)
                if kind == "sequential"
                else server(lambda some: plain.many(some, size=BATCH), BATCH)
            )

    def _engine(self, model: str, device: str) -> Submit:
        name, _, source = model.partition("=")
        engine = Engine(apart(lambda: load_model(name, source=source or None, device=device)), EngineSettings())
        engine.profile(seconds=8)
        numbers = iter(range(10**9))
        return lambda wanted: engine.submit(to_request(wanted, f"r{next(numbers)}"))

    def _timed(self, plain: Plain, some: Sequence[Wanted]) -> None:
        began = self._clock()
        for each in some:
            plain.one(each)
        self._served += self._clock() - began

    def play(self, arrivals: Sequence[float], wanted: Sequence[Wanted]) -> dict[str, Any]:
        """Latencies in seconds, in the order of arrival, and the seconds that one took by itself."""
        latencies = [0.0] * len(wanted)
        began, self._served = self._clock(), 0.0

        def note(index: int) -> Callable[[Future[Any]], None]:
            def done(_: Future[Any]) -> None:
                latencies[index] = self._clock() - began - arrivals[index]

            return done

        futures = []
        for index, (due, each) in enumerate(zip(arrivals, wanted, strict=True)):
            while (left := began + due - self._clock()) > 0:
                time.sleep(min(left, _TICK))
            futures.append(self._submit(each))
            futures[-1].add_done_callback(note(index))
        for future in futures:
            future.result()
        time.sleep(0.05)
        return {"latencies": latencies, "seconds_each": self._served / len(wanted)}


def serve_way(kind: str, model: str, device: str) -> None:
    """A line of requests in, a line of what came of them out, until there are no more."""
    way = Way(kind, model, device)
    for line in sys.stdin:
        asked = json.loads(line)
        found = way.play(asked["arrivals"], [Wanted(**each) for each in asked["wanted"]])
        print(json.dumps(found), flush=True)


# ---- all of them, in turns


class Process:
    """A way, stopped but in its turns."""

    def __init__(self, kind: str, options: argparse.Namespace) -> None:
        command = [sys.executable, __file__, "--way", kind, "--model", options.model, "--device", options.device]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, arrivals: Sequence[float], wanted: Sequence[Wanted]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(
            json.dumps({"arrivals": arrivals, "wanted": [asdict(each) for each in wanted]}) + "\n"
        )
        self._process.stdin.flush()

    def turn(self, seconds: float) -> dict[str, Any] | None:
        """Let it run for so long, or until it has an answer, which is returned."""
        assert self._process.stdout is not None
        self._process.send_signal(signal.SIGCONT)
        answered, _, _ = select.select([self._process.stdout], [], [], seconds)
        if answered:
            line = self._process.stdout.readline()
            if not line:
                raise RuntimeError(f"a way ended with status {self._process.wait()}")
            self._process.send_signal(signal.SIGSTOP)
            return dict(json.loads(line))
        self._process.send_signal(signal.SIGSTOP)
        return None

    def answer(self) -> dict[str, Any]:
        while (found := self.turn(60.0)) is None:
            pass
        return found

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def in_turns(ways: dict[str, Process]) -> dict[str, dict[str, Any]]:
    """The answers of all that were asked."""
    found: dict[str, dict[str, Any]] = {}
    for name in cycle(ways):
        if name not in found and (answer := ways[name].turn(TURN_SECONDS)) is not None:
            found[name] = answer
        if len(found) == len(ways):
            return found
    raise AssertionError("unreachable")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="NAME or NAME=SOURCE")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--requests", type=int, default=80)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--loads", type=float, nargs="*", default=[0.8, 1.6])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/latency.json"))
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        serve_way(options.way, options.model, options.device)
        return
    quiet()
    name, _, source = options.model.partition("=")
    size = load_model(name, source=source or None, device="cpu").card.native_sizes[0]
    ways: dict[str, Process] = {}
    try:
        for kind in WAYS:  # one after the other: the engine measures its steps alone
            ways[kind] = Process(kind, options)
            ways[kind].ask([0.0] * 6, workload(6, *size, start=900))
            ways[kind].answer()
        seconds_each = trial(ways, size)
        table = []
        for load in options.loads:
            table.append(measure(load, ways, size, options, seconds_each))
            seconds_each = table[-1]["seconds_each_sequentially"]
    finally:
        for way in ways.values():
            way.close()
    result = {
        "command": f"benchmarks/latency.py --requests {options.requests} --rounds {options.rounds}",
        **surroundings(options.device),
        "seconds": table,
    }
    print(json.dumps(result, indent=1))
    options.out.write_text(json.dumps(result, indent=1) + "\n")


def trial(ways: dict[str, Process], size: tuple[int, int]) -> float:
    """Seconds of a request by sequential diffusers in these turns, over every number of steps and guidance scale."""
    sample = workload(math.lcm(len(STEPS), len(GUIDANCE)), *size, start=700)
    for way in ways.values():
        way.ask([0.0] * len(sample), sample)
    return float(in_turns(ways)["sequential"]["seconds_each"])


def measure(
    load: float, ways: dict[str, Process], size: tuple[int, int], options: argparse.Namespace, seconds_each: float
) -> dict[str, Any]:
    """One load, if sequential diffusers go on to take so long for one: medians of the rounds."""
    figures: dict[str, dict[str, list[float]]] = {way: {"mean": [], "p95": []} for way in ways}
    came_of_it = []
    for number in range(options.rounds):
        chance, due, arrivals = random.Random(number), 0.0, []
        for _ in range(options.requests):
            due += chance.expovariate(load / seconds_each)
            arrivals.append(due)
        wanted = workload(options.requests, *size, start=number * options.requests)
        for way in ways.values():
            way.ask(arrivals, wanted)
        found = in_turns(ways)
        seconds_each = found["sequential"]["seconds_each"]
        came_of_it.append(len(arrivals) / arrivals[-1] * seconds_each)
        for name, answer in found.items():
            latencies = sorted(answer["latencies"])
            figures[name]["mean"].append(statistics.mean(latencies))
            figures[name]["p95"].append(latencies[int(0.95 * len(latencies))])
            print(
                load, name, f"mean {figures[name]['mean'][-1]:.2f} s, p95 {figures[name]['p95'][-1]:.2f} s", flush=True
            )
        print(f"load {came_of_it[-1]:.2f}", flush=True)
    best = [min(figures[way]["p95"][n] for way in ways if way != "engine") for n in range(options.rounds)]
    ratio = statistics.median(ours / other for ours, other in zip(figures["engine"]["p95"], best, strict=True))
    return {
        "load": load,
        "load_that_came_of_it": round(statistics.median(came_of_it), 2),
        "seconds_each_sequentially": round(seconds_each, 3),
        **{
            way: {name: round(statistics.median(values), 3) for name, values in own.items()}
            for way, own in figures.items()
        },
        "p95_of_engine_over_best_other": round(ratio, 3),
    }


if __name__ == "__main__":
    main()
