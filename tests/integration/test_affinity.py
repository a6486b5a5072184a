"""Claims that prefer a shape: on a real Valkey against a plain model, and with a real worker process.

What is promised: of jobs behind it in line, no more than the look-ahead are ever claimed before a job; so one with
`a` jobs before it, and `b` that come before it later, is claimed by the claim number `a + b + look-ahead + 1`.
"""

from __future__ import annotations

import importlib.util
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from redis import Redis

from calotype import JobState, Lane
from calotype_shared.queue.job_store import MAX_CRASHES, QUARANTINE_CRASHES, Claim, JobStore
from calotype_shared.queue.submission import NewJob
from calotype_shared.schema.resolve import ResolvedConfig
from tests.faults.harness import WorkerProcess
from tests.integration.conftest import until
from tests.invariants import check_store

QUEUE = "demo.bulk"
SIDES = {"64x64": (64, 64), "64x128": (64, 128), "128x64": (128, 64)}


def load_simulation() -> ModuleType:
    """`benchmarks/affinity.py`, which is no package."""
    spec = importlib.util.spec_from_file_location(
        "affinity_simulation", Path(__file__).parents[2] / "benchmarks" / "affinity.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


simulation = load_simulation()


def config(shape: str, **fields: object) -> ResolvedConfig:
    width, height = SIDES[shape]
    return ResolvedConfig.model_validate(
        {"prompt": "x", "width": width, "height": height, "seed": 1, "num_inference_steps": 1, **fields}
    )


def new_store(redis: Redis) -> JobStore:
    return JobStore(redis, key_prefix=f"affinity-{uuid.uuid4().hex[:8]}:", gap_seconds=0.0)


def forget(redis: Redis, store: JobStore) -> None:
    for key in redis.scan_iter(match=f"{store.keys.prefix}*", count=1000):
        redis.delete(key)


def claim(store: JobStore, *shapes: str, look: int = 0, queue: str = QUEUE, **options: bool) -> Claim | None:
    return store.claim(queue, worker="w", lease_seconds=3600, look=look, shapes=shapes, **options)


LOOK = 3


class AffinityMachine(RuleBasedStateMachine):
    """Tenants submit, workers that run this and that claim, cancel and hand back; some look further than others.

    Who overtook whom is counted here, from the line alone; the scripts' own counts are not asked.
    """

    redis: Redis

    def __init__(self) -> None:
        super().__init__()
        self.store = new_store(self.redis)
        self.claims: list[Claim] = []
        self.overtaken: dict[str, int] = {}  # by how many from behind, ever
        self.due: dict[str, int] = {}  # claims that may come before a job's own, since it was last put in line
        self.virtual = 0.0

    def teardown(self) -> None:
        for _ in range(len(self.line())):  # nobody is left behind
            self.claim(["64x64"], LOOK)
        assert not self.line()
        check_store(self.store, self.redis)
        forget(self.redis, self.store)

    def line(self) -> list[str]:
        return [str(job_id) for job_id in self.redis.zrange(self.store.keys.waiting(QUEUE), 0, -1)]

    def entered(self, job_ids: list[str]) -> None:
        """Somebody came into line: later claims of them, where they stand before others, are their right."""
        line = self.line()
        for job_id in job_ids:
            place = line.index(job_id)
            for behind in line[place + 1 :]:
                if behind not in job_ids:
                    self.due[behind] += 1
        for job_id in job_ids:
            self.due[job_id] = line.index(job_id) + LOOK - self.overtaken.setdefault(job_id, 0)

    @rule(
        shapes=st.lists(st.sampled_from(sorted(SIDES)), min_size=1, max_size=4),
        tenant=st.sampled_from("abc"),
        images=st.integers(1, 3),
        old=st.booleans(),
    )
    def submit(self, shapes: list[str], tenant: str, images: int, old: bool) -> None:
        new = [NewJob.of(config(shape, num_images=images), lane=Lane.BULK) for shape in shapes]
        ids = self.store.create(new, tenant=tenant)
        if old:  # by a version that knew no shapes
            self.redis.hdel(self.store.keys.job(ids[0]), "shape")
        self.entered(ids)

    @rule(shapes=st.lists(st.sampled_from([*sorted(SIDES), "8x8"]), max_size=3), look=st.integers(0, LOOK))
    def claim(self, shapes: list[str], look: int) -> None:
        line = self.line()
        found = claim(self.store, *shapes, look=look)
        assert (found is None) == (not line), "any worker takes any waiting job"
        if found is None:
            return
        self.claims.append(found)
        place = line.index(found.job_id)
        assert place < LOOK
        if place:
            assert look, "in order"
            assert f"{found.config.width}x{found.config.height}" in shapes, "only for what it runs"
        for before in line[:place]:
            self.overtaken[before] += 1
        for other in line:
            self.due[other] -= other != found.job_id
        assert max(self.overtaken.values()) <= LOOK, "passed over too often"
        assert min((self.due[other] for other in line), default=0) >= 0, "it waits for longer than promised"
        # New tenants start where the line began at the claim, as if its first had been taken.
        tag = float(self.redis.hget(self.store.keys.job(line[0]), "tag") or "nan")
        virtual = float(self.redis.hget(self.store.keys.queue_state(QUEUE), "virtual") or "nan")
        assert virtual == max(self.virtual, tag)
        self.virtual = virtual

    @precondition(lambda self: self.claims)
    @rule(which=st.integers(0, 99))
    def hand_back(self, which: int) -> None:
        given_back = self.claims.pop(which % len(self.claims))
        assert self.store.release(given_back)
        self.entered([given_back.job_id])

    @precondition(lambda self: self.line())
    @rule(which=st.integers(0, 99))
    def cancel(self, which: int) -> None:
        line = self.line()
        self.store.cancel(line[which % len(line)])

    @invariant()
    def there_is_a_message_for_each(self) -> None:
        assert self.redis.llen(self.store.keys.messages(QUEUE)) >= len(self.line())


@pytest.mark.timeout(300)
def test_nobody_is_passed_over_more_often_than_promised(redis: Redis) -> None:
    """In any order of events, whatever the workers run; and everybody is claimed in the end."""
    machine = type("Machine", (AffinityMachine,), {"redis": redis}).TestCase  # type: ignore[attr-defined]
    machine.settings = settings(
        max_examples=40,
        stateful_step_count=25,
        deadline=None,
        phases=[Phase.explicit, Phase.generate],  # ids of a millisecond sort at random: nothing to shrink by
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )
    machine("runTest").runTest()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    line=st.lists(
        st.tuples(st.sampled_from([None, *sorted(SIDES)]), st.integers(0, 6), st.sampled_from(["", "", "", "suspect"])),
        max_size=40,
    ),
    shapes=st.sets(st.sampled_from(sorted(SIDES)), max_size=2),
    look=st.integers(0, 6),
)
def test_the_simulation_chooses_as_the_script_does(
    redis: Redis, line: list[tuple[str | None, int, str]], shapes: set[str], look: int
) -> None:
    """On random lines, with jobs of old records and those that only some workers may take; and it counts the same."""
    store = new_store(redis)
    ids = store.create([config(shape or "64x64", seed=n) for n, (shape, _, _) in enumerate(line)]) if line else []
    pipeline = redis.pipeline()
    for job_id, (shape, passed, suspect) in zip(ids, line, strict=True):
        if shape is None:
            pipeline.hdel(store.keys.job(job_id), "shape")
        pipeline.hset(store.keys.job(job_id), "passed", str(passed))
        if suspect:
            pipeline.hset(store.keys.job(job_id), "crashes", str(QUARANTINE_CRASHES))
    pipeline.execute()
    seen = [simulation.InLine(shape, passed, not suspect) for shape, passed, suspect in line]
    place = simulation.choose(seen, shapes, look)
    found = claim(store, *shapes, look=look, leave_quarantined=True)
    assert (found.job_id if found else None) == (None if place is None else ids[place])
    for number, job_id in enumerate(ids):
        counted = int(redis.hget(store.keys.job(job_id), "passed") or 0) - line[number][1]
        assert counted == (place is not None and number < place and seen[number].claimable)
    forget(redis, store)


def test_the_first_goes_when_it_was_passed_over_as_often_as_the_bound(store: JobStore, redis: Redis) -> None:
    """Exactly so often, though there is no end of jobs that the worker would rather have."""
    rare, *rest = store.create([config("64x64"), *[config("128x64", seed=n) for n in range(20)]])
    order = [claim(store, "128x64", look=5) for _ in range(8)]
    assert [found.job_id for found in order if found] == [*rest[:5], rare, *rest[5:7]]
    assert redis.hget(store.keys.job(rare), "passed") == "5"
    check_store(store, redis)


def test_a_worker_that_runs_nothing_of_a_line_takes_its_first(store: JobStore) -> None:
    """A worker that may look at none takes them in order."""
    first, second, third = store.create([config("64x64"), config("128x64"), config("64x64", seed=2)])
    assert [claim(store, look=64).job_id, claim(store, "8x8", look=64).job_id] == [first, second]  # type: ignore[union-attr]
    fourth = store.create([config("128x64", seed=3)])
    assert claim(store, "128x64", look=0).job_id == third  # type: ignore[union-attr]
    assert claim(store, "128x64", look=0).job_id == fourth[0]  # type: ignore[union-attr]


def test_a_prompt_cannot_pass_for_a_shape(store: JobStore, redis: Redis) -> None:
    """The shape in the record is that of the config, whatever its texts say."""
    liar = 'x","width":8,"height":8,\\"width":8 "width":8'
    (job_id,) = store.create([config("64x128", prompt=liar, negative_prompt='"height":8')])
    assert redis.hget(store.keys.job(job_id), "shape") == "64x128"
    assert store.get(job_id).config.prompt == liar


def test_a_suspect_is_not_moved_up_for_a_worker_that_must_leave_it(store: JobStore, redis: Redis) -> None:
    """What a worker may not take neither stops it nor counts as passed over."""
    suspect, other, wanted = store.create([config("128x64"), config("64x64"), config("128x64", seed=2)])
    redis.hset(store.keys.job(suspect), "crashes", str(MAX_CRASHES - 1))
    found = claim(store, "128x64", look=1, leave_quarantined=True)
    assert found is not None
    assert found.job_id == other, "one is looked at, of those that it may take"
    assert claim(store, "128x64", look=2, leave_quarantined=True).job_id == wanted  # type: ignore[union-attr]
    assert redis.hget(store.keys.job(suspect), "passed") is None
    assert claim(store).job_id == suspect  # type: ignore[union-attr]


@pytest.mark.parametrize(("look", "first"), [(64, "aaaa"), (0, "abab")])
def test_a_worker_goes_on_with_the_size_it_runs(
    start_worker: Callable[..., WorkerProcess], store: JobStore, invariants: None, look: int, first: str
) -> None:
    """A real worker with four bulk jobs in flight: of one size while there is room, else in turns where that is set.

    Interactive jobs come in their order, whatever runs.
    """
    del invariants
    sizes = {"a": (64, 64), "b": (64, 32), "c": (32, 32), "d": (32, 64)}
    made: dict[str, Any] = {}
    for lane, names in ((Lane.BULK, "ab" * 4), (Lane.INTERACTIVE, "cd" * 2)):
        jobs = [
            config("64x64", model="tiny", seed=n, num_inference_steps=30, guidance_scale=1.0).model_copy(
                update={"width": sizes[name][0], "height": sizes[name][1]}
            )
            for n, name in enumerate(names)
        ]
        made |= dict(zip(store.create(jobs, lane=lane), names, strict=True))
    start_worker(
        CALOTYPE_WORKER_AFFINITY=str(look), CALOTYPE_WORKER_CONCURRENCY="4", CALOTYPE_WORKER_PROFILE_SECONDS="0"
    )
    until(lambda: store.counts()[JobState.SUCCEEDED] == len(made))
    records = [store.get(job_id) for job_id in made]
    order = "".join(made[record.id] for record in sorted(records, key=lambda record: record.started_at or 0.0))
    assert "".join(name for name in order if name in "cd") == "cdcd"
    assert "".join(name for name in order if name in "ab")[:4] == first
