"""The protocol of claims, leases and fences: every state of the model, and the model against the real scripts."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from redis import Redis

from calotype_shared.queue.job_store import MAX_CRASHES, Claim, JobStore
from calotype_shared.schema.enums import JobState, Lane
from calotype_shared.schema.jobs import ImageRef
from calotype_shared.schema.resolve import ResolvedConfig
from tests.faults.harness import FULL
from tests.faults.protocol import Budget, Protocol, Worker, World, explore
from tests.invariants import check_store

WORLDS = {
    "crash, freeze, late lease, cancel": Protocol(budget=Budget(crash=1, freeze=1, late=1, cancel=1)),
    "crash, freeze, lost write": Protocol(budget=Budget(crash=1, freeze=1, undo=1)),
    "messages lost and duplicated, drain": Protocol(budget=Budget(lose=1, double=1, late=1, release=1)),
    "poison": Protocol(budget=Budget(crash=3, late=1), max_crashes=2),
    "two jobs": Protocol(jobs=2, budget=Budget(crash=1, freeze=1)),
}
LARGE = {
    "two jobs, lost messages, late leases": Protocol(jobs=2, budget=Budget(crash=1, late=1, lose=1)),
    "three workers": Protocol(workers=3, budget=Budget(crash=1, freeze=1, late=1)),
}
WITHOUT = {
    # The least that shows what each guard is good for.
    "attempt": (Budget(late=1), "from here it never comes to rest"),
    "token": (Budget(undo=1), "writes over the images"),
    "folders": (Budget(late=1), "writes over the images"),
    "messages": (Budget(lose=1), "never comes to rest"),
    "leases": (Budget(crash=1), "never comes to rest"),
    "discard": (Budget(late=1), "its images are gone"),
}


@pytest.mark.parametrize(
    "name", [name if name == "poison" else pytest.param(name, marks=pytest.mark.slow) for name in WORLDS | LARGE]
)
def test_every_state_is_safe_and_can_come_to_rest(name: str) -> None:
    found = explore((WORLDS | LARGE)[name])
    assert not found.problem, found
    assert found.states > 1000, "it explored next to nothing"
    print(f"{name}: {found.states} states, {found.transitions} transitions")


def test_every_guard_has_its_example() -> None:
    assert set(WITHOUT) == set(Protocol.GUARDS)


@pytest.mark.parametrize("guard", WITHOUT)
def test_each_guard_is_needed(guard: str) -> None:
    """Without it there is a way to a state that must not be; with it, by the same faults, there is none."""
    budget, problem = WITHOUT[guard]
    found = explore(Protocol(budget=budget, without=guard))
    assert problem in found.problem, found.problem or "nothing goes wrong without it"
    print(f"without {guard}, {found}")
    assert not explore(Protocol(budget=budget)).problem


# ---- the model against the scripts


_RARER = {"cancel": 0.1, "crash": 0.3}  # they end what the other steps are about


class Replay:
    """Walks at random through the model, and does each step with the real scripts too."""

    def __init__(self, store: JobStore, redis: Redis, protocol: Protocol) -> None:
        self.store, self.redis, self.protocol = store, redis, protocol
        config = ResolvedConfig(prompt="x", width=64, height=64, seed=1)
        self.ids = store.create([config] * len(protocol.start.redis.jobs), lane=Lane.BULK)
        self.claims: dict[int, Claim] = {}  # by token
        self.seen: Counter[str] = Counter()

    def walk(self, dice: random.Random, longest: int) -> None:
        world = self.protocol.start
        self.compare(world, "start")
        for _ in range(longest):
            # The sweeper deletes in storage, which has no part in this.
            steps = [(name, after) for name, after in self.protocol.steps(world) if name not in ("look", "sweep")]
            if not steps:
                return
            weights = [_RARER.get(name[:-3], 1.0) if name.endswith("!") else 3.0 for name, _ in steps]
            [(name, after)] = dice.choices(steps, weights)
            self.do(name, world, after)
            self.compare(after, name)
            self.seen[name.rstrip("!").split()[0]] += 1
            world = after

    def do(self, name: str, world: World, after: World) -> None:
        verb, _, argument = name.rstrip("!").partition(" ")
        queue = self.store.keys.messages("demo.bulk")
        worker = world.workers[int(argument)] if verb not in ("expire", "cancel") and argument else Worker()
        claim = self.claims.get(worker.token)
        if verb in ("pop", "lose"):
            assert self.redis.rpop(queue)
        elif verb == "double":
            self.redis.lpush(queue, self.redis.lrange(queue, 0, 0)[0])
        elif verb == "claim":
            found = self.store.claim("demo.bulk", worker=f"w{argument}", lease_seconds=3600)
            assert (found is not None) == (after.tokens > world.tokens)
            if found is not None:
                mine = after.workers[int(argument)]
                assert (found.job_id, found.attempt) == (self.ids[mine.job], mine.attempt)
                self.claims[mine.token] = found
        elif verb == "commit":
            assert claim is not None
            stored = {"key": f"{claim.folder}/0.png", "content_type": "image/png", "sha256": "0" * 64}
            image = ImageRef(**stored, seed=1, width=64, height=64, bytes=1)
            job = after.redis.jobs[worker.job]
            folder = self.protocol.folder(worker.job, worker.attempt, worker.token)
            assert self.store.commit(claim, images=[image], timings={}) == (job.winner == folder)
        elif verb == "renew":
            assert claim is not None
            assert self.store.renew([claim], lease_seconds=3600) == set()
        elif verb == "release":
            assert claim is not None
            assert self.store.release(claim)
        elif verb == "expire":
            self.redis.zadd(self.store.keys.leases, {self.ids[int(argument)]: 1})
        elif verb == "cancel":
            assert self.store.cancel(self.ids[int(argument)]) is JobState.CANCELLED
        elif verb == "reap":
            self.redis.delete(self.store.keys.reaper)
            assert self.store.reap() is not None

    def compare(self, world: World, name: str) -> None:
        for job_id, job in zip(self.ids, world.redis.jobs, strict=True):
            record = self.store.get(job_id)
            assert (record.state.value, record.attempt, record.crashes) == (job.state, job.attempt, job.crashes), name
            score = self.redis.zscore(self.store.keys.leases, job_id)
            assert ("" if score is None else "over" if score == 1 else "live") == job.lease, name
            winner = next((c.folder for t, c in self.claims.items() if job.winner and t == job.winner[-1]), None)
            assert [image.key for image in record.images] == ([f"{winner}/0.png"] if winner else []), name
        assert self.redis.llen(self.store.keys.messages("demo.bulk")) == world.redis.messages, name
        folders = {
            f"{self.ids[job]}/{attempt}-{self.claims[token].token}" for job, attempt, token in world.redis.orphans
        }
        assert set(self.store.orphans(older_than_seconds=-1)) == folders, name


@pytest.mark.parametrize("jobs", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_the_scripts_do_what_the_model_does(settings: object, store: JobStore, redis: Redis, jobs: int) -> None:
    """Some hundred walks at random, with every kind of step."""
    dice = random.Random(11)
    budget = Budget(crash=3, freeze=1, lose=2, double=2, late=3, release=2, cancel=1)
    protocol = Protocol(jobs=jobs, budget=budget, max_crashes=MAX_CRASHES)
    seen: Counter[str] = Counter()
    for walk in range(1500 if FULL else 120):
        own = JobStore(store.redis, key_prefix=f"{store.keys.prefix}{walk}:", gap_seconds=0.0)
        replay = Replay(own, store.redis, protocol)
        replay.walk(dice, 40)
        check_store(own, store.redis)
        seen += replay.seen
    steps = "pop claim upload commit renew release crash freeze thaw expire reap cancel lose double"
    assert set(seen) == set(steps.split())
    assert min(seen.values()) >= 5, seen
