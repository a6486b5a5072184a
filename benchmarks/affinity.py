"""Many workers, many sizes in one queue: what it gains when a claim prefers a size that its worker runs. Simulated.

    python benchmarks/affinity.py --output benchmarks/results/affinity-simulated.json --plot docs/images/affinity.png

A discrete-event simulation, without Redis or a device: the queue's line by fair share as in `create.lua` and `choose`
as in `claim.lua` (a test compares them), each worker with the engine's own `Scheduler` and the worker's own
`SizeAffinity`.
A step of `rows` images of `area` (1: the native size) takes `max(t0, rows * area * t1)`: below the knee a row more is
free, above it none is. Half of the jobs are of one tenant, the others of four more; sizes are Zipf-distributed.

- queued: all jobs are there at the start. `throughput` is the work done until the line is empty, in shares of what full
  step batches would do;
- poisson: jobs arrive at random, at `--load` of that. Waits count from submission to the last step.

`most` is by how many from behind a job may be passed over; in Calotype it is the look-ahead itself. `jain` is Jain's
index (1: equal shares) of the work claimed for each tenant while all have jobs in line, `share` the least of these in
shares of the mean.
"""

from __future__ import annotations

import argparse
import bisect
import heapq
import itertools
import json
import random
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from calotype_shared.queue.job_store import Claim
from calotype_shared.schema.enums import JobState, Lane
from calotype_shared.schema.jobs import JobRecord
from calotype_shared.schema.resolve import ResolvedConfig
from calotype_worker.engine.scheduler import Scheduler
from calotype_worker.jobs.size_affinity import SizeAffinity

QUEUE = "simulated.bulk"
SIZES = [(512, 512), (512, 768), (768, 512), (640, 512), (512, 640), (768, 768), (384, 384), (1024, 512)]
MORE = [(64 * (8 + k), 64 * (18 - k)) for k in range(11)]  # as SDXL's many buckets
STEPS = (10, 15, 20, 25, 30, 40, 50)
TENANTS = ("crowd",) * 4 + ("a", "b", "c", "d")
KNEE_SECONDS = 0.1  # of a step with all rows that are free


class InLine(NamedTuple):
    """What a claim sees of a job in line."""

    shape: str | None
    passed: int = 0  # times
    claimable: bool = True


def choose(line: Iterable[InLine], shapes: Collection[str], look: int) -> int | None:
    """The place in line of the job that a claim takes, as `claim.lua` does. Claimable ones before it are passed."""
    look = look if shapes else 0
    first, seen = None, 0
    for place, job in itertools.islice(enumerate(line), max(128, look)):
        if not job.claimable:
            continue
        if job.shape in shapes:
            return place
        first, seen = place if first is None else first, seen + 1
        if seen >= look or job.passed >= look:
            break
    return first


@dataclass(kw_only=True, eq=False)
class Job:
    id: str
    size: tuple[int, int]
    rows: int
    steps: int
    tenant: str
    arrives: float = 0.0
    tag: float = 0.0
    passed: int = 0
    left: int = 0  # steps
    claimed: float = 0.0
    done: float = 0.0
    record: Claim = field(init=False)

    def __post_init__(self) -> None:
        config = ResolvedConfig.model_construct(  # type: ignore[call-arg]  # as much as the affinity looks at
            model="simulated",
            width=self.size[0],
            height=self.size[1],
            num_images=1,
            ensemble=(),
            guidance_scale=5.0 if self.rows == 2 else 1.0,
        )
        record = JobRecord.model_construct(  # type: ignore[call-arg]
            id=self.id, state=JobState.RUNNING, lane=Lane.BULK, config=config
        )
        self.record = Claim(job_id=self.id, attempt=1, token="t", record=record)
        self.left = self.steps

    @property
    def shape(self) -> str:
        return "{}x{}".format(*self.size)

    @property
    def work(self) -> float:
        return self.rows * self.steps * area(self.size)


def area(size: tuple[int, int]) -> float:
    return size[0] * size[1] / (512 * 512)


@dataclass(frozen=True, kw_only=True)
class Device:
    """`max_rows` rows of the native size are the knee, as a profile finds it; `slots` jobs are in flight."""

    max_rows: int = 16
    slots: int = 24

    def budget(self, size: tuple[int, int]) -> int:
        return max(2, min(self.max_rows, int(self.max_rows / area(size))))

    def seconds(self, size: tuple[int, int], rows: int) -> float:
        return KNEE_SECONDS * max(1.0, rows * area(size) / self.max_rows)


class SimulatedWorker:
    """One device: the engine's scheduler, the worker's affinity, and a clock for steps."""

    def __init__(self, device: Device, look: int) -> None:
        self.device = device
        self.jobs: dict[str, Job] = {}
        self.affinity = SizeAffinity(
            look,
            budget=lambda _, width, height: device.budget((width, height)),
            rows=lambda _, guided: 2 if guided else 1,
        )
        self.rows: Counter[tuple[int, int]] = Counter()  # admitted
        self.scheduler: Scheduler[tuple[int, int]] = Scheduler(
            device.budget, step_cost=lambda size: device.seconds(size, self.rows[size])
        )
        self.steps_at: tuple[int, int] | None = None  # the group whose step runs

    @property
    def free(self) -> bool:
        return len(self.jobs) < self.device.slots

    def take(self, job: Job) -> None:
        self.jobs[job.id] = job
        self.affinity.claimed(job.record)
        self.scheduler.add(job.id, job.size, job.rows)

    def begin_step(self) -> tuple[float, int] | None:
        """Its seconds and rows, or None if there is nothing to do."""
        plan = self.scheduler.plan()
        self.steps_at = plan.group if plan else None
        if plan is None:
            return None
        self.rows[plan.group] += sum(self.jobs[job_id].rows for job_id in plan.admitted)
        rows = self.rows[plan.group]
        return self.device.seconds(plan.group, rows), rows

    def end_step(self) -> list[Job]:
        """The jobs that are done by it."""
        assert self.steps_at is not None
        done = []
        for job in [self.jobs[job_id] for job_id in self.scheduler.running(self.steps_at)]:
            job.left -= 1
            if not job.left:
                self.scheduler.remove(job.id)
                self.rows[job.size] -= job.rows
                self.affinity.released(job.record)
                del self.jobs[job.id]
                done.append(job)
        return done


class Line:
    """The jobs that wait, by fair share."""

    def __init__(self, look: int, most: int) -> None:
        self._look, self._most = look, most
        self._line: list[tuple[float, str, Job]] = []
        self._newest: dict[str, float] = {}  # tag by tenant
        self._virtual = 0.0
        self.waiting: Counter[str] = Counter()  # by tenant
        self.moved = 0  # claims of another than the first

    def __len__(self) -> int:
        return len(self._line)

    def join(self, job: Job) -> None:
        job.tag = max(self._virtual, self._newest.get(job.tenant, 0.0)) + job.work
        self._newest[job.tenant] = job.tag
        self.waiting[job.tenant] += 1
        bisect.insort(self._line, (job.tag, job.id, job))

    def take(self, shapes: Collection[str]) -> Job:
        scale = self._look / self._most if self._most else 0.0  # so that `most` may differ from the look-ahead
        seen = (InLine(job.shape, int(job.passed * scale)) for _, _, job in self._line)
        place = choose(seen, shapes, self._look)
        assert place is not None
        self._virtual = max(self._virtual, self._line[0][0])
        for _, _, job in self._line[:place]:
            job.passed += 1
        self.moved += bool(place)
        job = self._line.pop(place)[2]
        self.waiting[job.tenant] -= 1
        return job


@dataclass(frozen=True, kw_only=True)
class Load:
    """What is asked for. `at`: None for all at once, else the share of what full step batches could do."""

    jobs: int
    sizes: Sequence[tuple[int, int]]
    zipf: float = 1.0
    at: float | None = None

    def make(self, device: Device, workers: int, seed: int) -> tuple[list[Job], float]:
        """The jobs, and the seconds that all workers together need for them in full step batches."""
        chance = random.Random(seed)
        weights = [1 / (rank + 1) ** self.zipf for rank in range(len(self.sizes))]
        jobs = [
            Job(
                id=f"{number:06}",
                size=chance.choices(self.sizes, weights)[0],
                rows=chance.choice((2, 2, 2, 1)),
                steps=chance.choice(STEPS),
                tenant=chance.choice(TENANTS),
            )
            for number in range(self.jobs)
        ]
        full = {size: device.seconds(size, device.budget(size)) / device.budget(size) for size in self.sizes}
        least = sum(job.rows * job.steps * full[job.size] for job in jobs) / workers
        if self.at is not None:
            now = 0.0
            for job in jobs:
                now += chance.expovariate(1.0) * least / len(jobs) / self.at
                job.arrives = now
        return jobs, least


def simulate(
    workers: int, load: Load, *, look: int, most: int | None = None, device: Device | None = None, seed: int = 0
) -> dict[str, float]:
    """One run to its end."""
    chance = random.Random(seed)
    device = device or Device()
    jobs, least = load.make(device, workers, seed)
    line = Line(look, look if most is None else most)
    fleet = [SimulatedWorker(device, look) for _ in range(workers)]
    steps: list[tuple[float, int, SimulatedWorker]] = []  # by when they end
    number = itertools.count()
    coming, now, passes, rows = iter(jobs), 0.0, 0, 0
    arriving = next(coming, None)
    served: dict[str, float] = defaultdict(float)  # work claimed while every tenant had jobs in line
    emptied: tuple[float, float] | None = None  # when, and the work done by then

    def begin(worker: SimulatedWorker) -> None:
        nonlocal passes, rows
        step = worker.begin_step()
        if step is not None:
            heapq.heappush(steps, (now + step[0], next(number), worker))
            passes, rows = passes + 1, rows + step[1]

    def claim() -> None:
        free = [worker for worker in fleet if worker.free]
        while free and len(line):
            worker = chance.choice(free)  # the one that gets the message
            together = all(line.waiting[tenant] for tenant in TENANTS)
            with worker.affinity.preferred_shapes(QUEUE) as shapes:
                job = line.take(shapes)
                job.claimed = now
                worker.take(job)
            if together:
                served[job.tenant] += job.work
            if not worker.free:
                free.remove(worker)
            if worker.steps_at is None:
                begin(worker)

    while arriving or steps:
        if arriving and (not steps or arriving.arrives <= steps[0][0]):
            now = arriving.arrives
            while arriving and arriving.arrives <= now:
                line.join(arriving)
                arriving = next(coming, None)
        else:
            now, _, worker = heapq.heappop(steps)
            for job in worker.end_step():
                job.done = now
            begin(worker)
        claim()
        if emptied is None and arriving is None and not len(line):
            emptied = now, sum(job.work for job in jobs if job.done)
    assert emptied is not None
    return {
        "throughput": emptied[1] / sum(job.work for job in jobs) * least / emptied[0],
        "mean_rows": rows / passes,
        **figures(jobs, [served[tenant] for tenant in set(TENANTS)]),
        "moved": line.moved / len(jobs),
    }


def figures(jobs: Sequence[Job], shares: Sequence[float]) -> dict[str, float]:
    """Waits in seconds, fairness, and how often jobs were passed over."""
    assert all(job.done for job in jobs)
    waits = sorted(job.done - job.arrives for job in jobs)
    return {
        "wait_p50": waits[len(waits) // 2],
        "wait_p95": waits[len(waits) * 95 // 100],
        "wait_max": waits[-1],
        "claimed_max": max(job.claimed - job.arrives for job in jobs),
        "jain": sum(shares) ** 2 / (len(shares) * sum(share**2 for share in shares)) if any(shares) else 1.0,
        "share": min(shares) / statistics.mean(shares) if any(shares) else 1.0,
        "passed_mean": statistics.mean(job.passed for job in jobs),
        "passed_max": max(job.passed for job in jobs),
    }


# ---- two models on a device that holds one


def simulate_models(order: str, *, move_seconds: float, jobs: int, seed: int = 0) -> dict[str, float]:
    """One worker, two models with a queue each.

    `order` is which queue it takes from: `first` while that has any (as kombu's BRPOP does), `turns`, or `resident`,
    whose model is on the device. The engine's patience is 50 steps.
    """
    chance = random.Random(seed)
    device = Device()
    lines = {model: [Job(id=f"{model}{n:05}", size=SIZES[0], rows=2, steps=chance.choice(STEPS), tenant="a")
                     for n in range(jobs)] for model in "ab"}  # fmt: skip
    resident, now, moves, turn = "a", 0.0, 0, itertools.cycle("ab")
    rows: Counter[str] = Counter()
    scheduler: Scheduler[str] = Scheduler(
        lambda _: device.max_rows,
        step_cost=lambda group: device.seconds(SIZES[0], rows[group]),
        resident=lambda group: group == resident,
        switch_delay_steps=50,
    )
    held: dict[str, Job] = {}
    ends: dict[str, list[float]] = {"a": [], "b": []}
    while any(lines.values()) or held:
        while len(held) < device.slots and any(lines.values()):
            model = {"first": "a", "turns": next(turn), "resident": resident}[order]
            model = model if lines[model] else ("b" if model == "a" else "a")
            job = lines[model].pop(0)
            held[job.id] = job
            scheduler.add(job.id, model, job.rows)
        plan = scheduler.plan()
        assert plan is not None
        if plan.group != resident:
            resident, moves, now = plan.group, moves + 1, now + move_seconds
        rows[plan.group] += sum(held[job_id].rows for job_id in plan.admitted)
        now += device.seconds(SIZES[0], rows[plan.group])
        for job in [held[job_id] for job_id in scheduler.running(plan.group)]:
            job.left -= 1
            if not job.left:
                scheduler.remove(job.id)
                rows[plan.group] -= job.rows
                del held[job.id]
                ends[plan.group].append(now)
    return {"seconds": now, "moves": moves, "first_of_b": ends["b"][0], "last_of_a": ends["a"][-1]}


# ---- the whole benchmark


def mean(run: Callable[[int], dict[str, float]], seeds: int) -> dict[str, float]:
    found = [run(seed) for seed in range(seeds)]
    return {name: round(statistics.mean(each[name] for each in found), 3) for name in found[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 4, 16, 64])
    parser.add_argument("--look", type=int, nargs="*", default=[0, 16, 32, 64, 128])
    parser.add_argument("--load", type=float, nargs="*", default=[0.4, 0.6, 0.7])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1200, help="and as many a worker as fill it three times")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    began = time.monotonic()
    rows: list[dict[str, Any]] = []

    def add(name: str, workers: int, load: Load, look: int, **more: Any) -> None:
        facts = {"load": name, "workers": workers, "look": look, "sizes": len(load.sizes)}
        facts |= {key: value for key, value in more.items() if key == "most"}
        facts |= mean(lambda seed: simulate(workers, load, look=look, seed=seed, **more), options.seeds)
        rows.append(facts)
        print(json.dumps(facts), flush=True)

    for workers in options.workers:
        jobs = max(options.jobs, 72 * workers)
        for look in options.look:
            add("queued", workers, Load(jobs=jobs, sizes=SIZES), look)
    few = 4
    for most in (16, 256, 10**9):
        add("queued, another bound", few, Load(jobs=options.jobs, sizes=SIZES), 64, most=most)
    for sizes, name in ((SIZES[:1], "one size"), (SIZES + MORE, "nineteen sizes")):
        for look in (0, 64):
            add(f"queued, {name}", few, Load(jobs=options.jobs, sizes=sizes, zipf=0.5), look)
    for share in options.load:
        for look in (0, 64):
            add(f"poisson {share}", few, Load(jobs=2 * options.jobs, sizes=SIZES, at=share), look)
    models = [
        {
            "order": order,
            "move_seconds": seconds,
            **mean(
                lambda seed, order=order, seconds=seconds: simulate_models(  # type: ignore[misc]
                    order, move_seconds=seconds, jobs=200, seed=seed
                ),
                options.seeds,
            ),
        }
        for seconds in (0.5, 3.0)
        for order in ("first", "turns", "resident")
    ]
    for model in models:
        print(json.dumps(model), flush=True)
    result = {
        "command": f"benchmarks/affinity.py --seeds {options.seeds} --jobs {options.jobs}",
        "seconds": round(time.monotonic() - began, 1),
        "model": "step = 0.1 s * max(1, rows * area / 16); 24 jobs in flight; 3 of 4 jobs guided; 10 to 50 steps",
        "runs": rows,
        "two_models": models,
    }
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n")
    if options.plot:
        plot(rows, options.plot)


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    import matplotlib.pyplot as plt

    queued = [row for row in rows if row["load"] == "queued"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    for workers in sorted({row["workers"] for row in queued}):
        mine = [row for row in queued if row["workers"] == workers]
        looks = [row["look"] for row in mine]
        left.plot(
            range(len(looks)),
            [100 * row["throughput"] for row in mine],
            "o-",
            label=f"{workers} worker" + "s" * (workers > 1),
        )
        left.set(xticks=range(len(looks)), xticklabels=looks)
    left.set(
        xlabel="look-ahead, and bound on being passed over", ylabel="% of what full step batches do", ylim=(0, 100)
    )
    left.set_title("Eight sizes in one queue")
    left.legend(loc="lower right")
    poisson = [row for row in rows if row["load"].startswith("poisson")]
    loads = sorted({row["load"] for row in poisson})
    for offset, look in ((-0.2, 0), (0.2, 64)):
        mine = [next(row for row in poisson if (row["load"], row["look"]) == (load, look)) for load in loads]
        slots = [place + offset for place in range(len(loads))]
        label = f"look-ahead {look}" if look else "in order"
        bars = right.bar(slots, [row["wait_p95"] for row in mine], width=0.38, label=label)
        right.bar_label(bars, fmt="%.0f")
    right.set(xticks=range(len(loads)), xticklabels=[load.removeprefix("poisson ") for load in loads])
    right.set(
        xlabel="jobs arriving, as a share of what full step batches do", ylabel="seconds until done, 95th percentile"
    )
    right.margins(y=0.1)
    right.set_title("Random arrivals, four workers")
    right.legend(loc="upper left")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
