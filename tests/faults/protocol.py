"""A model of how a job is claimed, made, committed and taken back; small enough to look at every state of it.

Two workers, one or two jobs, one queue. What is atomic here is one Lua script there, or one request to the storage.
A worker may crash (another starts in its place) or freeze and go on later at any point; messages may get lost or come
twice; leases may run out late or early; anyone may cancel; and Redis may lose its last write. Each is bounded by a
budget, so that the world is finite. Assumed: the delay before orphans are swept outlasts the worker that made them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from typing import NamedTuple

FINAL = ("succeeded", "failed", "cancelled")
Folder = tuple[int, ...]  # job, attempt and token


class Job(NamedTuple):
    state: str = "queued"
    attempt: int = 0
    token: int = 0
    crashes: int = 0
    lease: str = ""  # "", "live" or "over"
    winner: Folder | None = None


class Redis(NamedTuple):
    jobs: tuple[Job, ...]
    messages: int
    lacking: int = 0  # what the reaper noted when it last looked
    orphans: frozenset[Folder] = frozenset()


class Worker(NamedTuple):
    phase: str = "idle"  # idle, popped, claimed, uploaded
    job: int = 0
    attempt: int = 0
    token: int = 0
    frozen: bool = False


class Budget(NamedTuple):
    """How often each fault may still happen."""

    crash: int = 0
    freeze: int = 0
    lose: int = 0
    double: int = 0
    late: int = 0  # leases that run out though their holder is well
    release: int = 0
    cancel: int = 0
    undo: int = 0


class World(NamedTuple):
    redis: Redis
    before: Redis | None  # as it was before the last write; None where nothing can be undone
    storage: frozenset[Folder]
    doomed: frozenset[Folder]  # the sweeper has looked at these and will delete them
    workers: tuple[Worker, ...]
    budget: Budget
    tokens: int = 0  # drawn so far


class Broken(AssertionError):
    """A property does not hold; the message says which."""


class Protocol:
    """`guards` may leave out one of those of `GUARDS`, to see what it is good for."""

    GUARDS = ("attempt", "token", "folders", "messages", "leases", "discard")

    def __init__(
        self, *, jobs: int = 1, workers: int = 2, budget: Budget, max_crashes: int = 3, without: str = ""
    ) -> None:
        assert without in ("", *self.GUARDS)
        self.without = without
        self.max_crashes = max_crashes
        redis = Redis(tuple(Job() for _ in range(jobs)), messages=jobs)
        self.start = World(redis, None, frozenset(), frozenset(), tuple(Worker() for _ in range(workers)), budget)

    # ---- parts of the scripts

    def folder(self, job: int, attempt: int, token: int) -> Folder:
        if self.without == "folders":
            return (job,)
        return (job, attempt) if self.without == "token" else (job, attempt, token)

    def holds(self, job: Job, worker: Worker) -> bool:
        if job.state != "running":
            return False
        if self.without == "attempt":
            return True
        return job.attempt == worker.attempt and (self.without == "token" or job.token == worker.token)

    def _end(self, redis: Redis, number: int, job: Job, **changes: object) -> Redis:
        """A running attempt ends without a commit: what it put into storage is an orphan."""
        orphans = redis.orphans | {self.folder(number, job.attempt, job.token)}
        ended = job._replace(lease="", **changes)  # type: ignore[arg-type]
        redis = _with_job(redis, number, ended)._replace(orphans=orphans)
        return redis._replace(messages=redis.messages + 1) if ended.state == "queued" else redis

    # ---- every step that can be taken

    def steps(self, world: World) -> Iterator[tuple[str, World]]:
        """Names and outcomes. Those with a `!` are faults, or what somebody wants; all others happen by themselves."""
        for number, worker in enumerate(world.workers):
            yield from self._worker_steps(world, number, worker)
        yield from self._reaper_steps(world)
        yield from self._sweeper_steps(world)
        yield from self._outer_steps(world)

    def _worker_steps(self, world: World, number: int, worker: Worker) -> Iterator[tuple[str, World]]:
        if worker.frozen:
            yield f"thaw {number}", _with_worker(world, number, worker._replace(frozen=False))
            return
        redis, me = world.redis, str(number)
        job = redis.jobs[worker.job]
        mine = self.folder(worker.job, worker.attempt, worker.token)
        if worker.phase == "idle" and redis.messages:
            popped = self._write(world, redis._replace(messages=redis.messages - 1))
            yield f"pop {me}", _with_worker(popped, number, Worker("popped"))
        elif worker.phase == "popped":
            queued = [i for i, each in enumerate(redis.jobs) if each.state == "queued"]
            if not queued:
                yield f"claim {me}", _with_worker(world, number, Worker())
            else:
                found, token = queued[0], world.tokens + 1
                taken = redis.jobs[found]
                running = taken._replace(state="running", attempt=taken.attempt + 1, token=token, lease="live")
                after = self._write(world, _with_job(redis, found, running))._replace(tokens=token)
                yield f"claim {me}", _with_worker(after, number, Worker("claimed", found, running.attempt, token))
        elif worker.phase == "claimed":
            if any(each.winner == mine for each in redis.jobs):
                raise Broken("a worker writes over the images of a job that has succeeded")
            stored = world._replace(storage=world.storage | {mine})
            yield f"upload {me}", _with_worker(stored, number, worker._replace(phase="uploaded"))
        elif worker.phase == "uploaded":
            if self.holds(job, worker):
                done = job._replace(state="succeeded", lease="", winner=mine)
                after = self._write(world, _with_job(redis, worker.job, done))
            elif job.winner == mine:  # it is this very commit
                after = world
            else:
                gone = {mine} if self.without != "discard" else {f for f in world.storage if f[0] == worker.job}
                after = world._replace(storage=world.storage - gone)
            yield f"commit {me}", _with_worker(after, number, Worker())
        yield from self._other_steps(world, number, worker)

    def _other_steps(self, world: World, number: int, worker: Worker) -> Iterator[tuple[str, World]]:
        """What a worker may do, or what may become of it, at any point."""
        redis, me = world.redis, str(number)
        job = redis.jobs[worker.job]
        if worker.phase in ("claimed", "uploaded"):
            if self.holds(job, worker) and job.lease == "over":
                yield f"renew {me}", self._write(world, _with_job(redis, worker.job, job._replace(lease="live")))
            if world.budget.release and self.holds(job, worker):
                after = self._write(world, self._end(redis, worker.job, job, state="queued"))
                yield f"release {me}!", _spend(_with_worker(after, number, Worker()), "release")
        if world.budget.crash:
            yield f"crash {me}!", _spend(_with_worker(world, number, Worker()), "crash")
        if world.budget.freeze and worker.phase != "idle":
            yield f"freeze {me}!", _spend(_with_worker(world, number, worker._replace(frozen=True)), "freeze")

    def _reaper_steps(self, world: World) -> Iterator[tuple[str, World]]:
        redis = world.redis
        for number, job in enumerate(redis.jobs):
            if job.lease == "live":
                over = self._write(world, _with_job(redis, number, job._replace(lease="over")))
                if not any(w.phase != "idle" and not w.frozen and self.holds(job, w) for w in world.workers):
                    yield f"expire {number}", over  # nobody renews it
                elif world.budget.late:
                    yield f"expire {number}!", _spend(over, "late")
        after = redis
        if self.without != "leases":
            for number, job in enumerate(redis.jobs):
                if job.lease == "over":
                    crashes = job.crashes + 1
                    state = "failed" if crashes >= self.max_crashes else "queued"
                    after = self._end(after, number, job, state=state, crashes=crashes)
        lacking = sum(job.state == "queued" for job in after.jobs) - after.messages
        lost = max(0, min(lacking, after.lacking)) if self.without != "messages" else 0
        after = after._replace(messages=after.messages + lost, lacking=lacking - lost)
        if after != redis:
            yield "reap", self._write(world, after)

    def _sweeper_steps(self, world: World) -> Iterator[tuple[str, World]]:
        """Two steps: anything may happen between its look at a record and its deletion."""
        redis = world.redis
        for folder in redis.orphans:
            if any(w.phase != "idle" and self.folder(w.job, w.attempt, w.token) == folder for w in world.workers):
                continue  # see the assumption above
            if folder in world.doomed:
                if any(job.winner == folder for job in redis.jobs):
                    raise Broken("the sweeper deletes the images of a job that has succeeded")
                swept = self._write(world, redis._replace(orphans=redis.orphans - {folder}))
                yield "sweep", swept._replace(storage=world.storage - {folder}, doomed=world.doomed - {folder})
            elif all(job.winner != folder for job in redis.jobs):
                yield "look", world._replace(doomed=world.doomed | {folder})

    def _outer_steps(self, world: World) -> Iterator[tuple[str, World]]:
        redis, budget = world.redis, world.budget
        for number, job in enumerate(redis.jobs):
            if not budget.cancel or job.state in FINAL:
                continue
            if job.state == "running":
                after = self._end(redis, number, job, state="cancelled")
            else:
                after = _with_job(redis, number, job._replace(state="cancelled"))
                after = after._replace(messages=max(0, after.messages - 1))
            yield f"cancel {number}!", _spend(self._write(world, after), "cancel")
        if budget.lose and redis.messages:
            yield "lose!", _spend(self._write(world, redis._replace(messages=redis.messages - 1)), "lose")
        if budget.double and redis.messages:
            yield "double!", _spend(self._write(world, redis._replace(messages=redis.messages + 1)), "double")
        if budget.undo and world.before is not None:
            yield "undo!", _spend(world._replace(redis=world.before, before=None), "undo")

    def _write(self, world: World, redis: Redis) -> World:
        return world._replace(redis=redis, before=world.redis if world.budget.undo else None)

    # ---- what must hold

    def check(self, world: World) -> None:
        """In every state. Raises Broken."""
        for number, job in enumerate(world.redis.jobs):
            if bool(job.lease) != (job.state == "running"):
                raise Broken(f"job {number} is {job.state} and its lease is {job.lease!r}")
            if (job.winner is not None) != (job.state == "succeeded"):
                raise Broken(f"job {number} is {job.state} with images {job.winner}")
            if job.winner is not None and job.winner not in world.storage:
                raise Broken(f"job {number} has succeeded and its images are gone")

    def check_step(self, name: str, old: World, new: World) -> None:
        """Along every step but Redis' own forgetting."""
        if name == "undo!":
            return
        for before, after in zip(old.redis.jobs, new.redis.jobs, strict=True):
            if before.state in FINAL and after != before:
                raise Broken(f"a final job changed: {before} became {after}")
            if after.attempt < before.attempt:
                raise Broken("an attempt number went back")

    def at_rest(self, world: World) -> bool:
        """All is over and nothing is left behind."""
        if any(job.state not in FINAL for job in world.redis.jobs) or world.redis.messages or world.redis.orphans:
            return False
        if any(worker != Worker() for worker in world.workers):
            return False
        winners = {job.winner for job in world.redis.jobs if job.winner}
        # What was uploaded under a claim that Redis forgot has nobody who knows of it.
        return world.storage == winners or self.start.budget.undo > world.budget.undo


class Explored(NamedTuple):
    states: int
    transitions: int
    problem: str  # empty: all properties hold
    trace: list[str]  # the shortest way there

    def __str__(self) -> str:
        return f"{self.problem}:\n  " + "\n  ".join(self.trace)


def explore(protocol: Protocol, *, most: int = 1_000_000) -> Explored:
    """Every state that can be reached, breadth first; and whether all can come to rest without a further fault."""
    reached: dict[World, tuple[World | None, str]] = {protocol.start: (None, "")}
    towards: dict[World, list[World]] = {}  # by steps that happen by themselves, backwards
    line, transitions = deque([protocol.start]), 0

    def trace(world: World, *last: str) -> list[str]:
        names = list(last)
        at: World | None = world
        while at is not None:
            at, name = reached[at]
            names.append(name)
        return [name for name in reversed(names) if name]

    while line:
        world = line.popleft()
        name = ""
        try:
            protocol.check(world)
            for name, after in protocol.steps(world):
                transitions += 1
                protocol.check_step(name, world, after)
                if not name.endswith("!"):
                    towards.setdefault(after, []).append(world)
                if after not in reached:
                    assert len(reached) < most, "more states than expected"
                    reached[after] = (world, name)
                    line.append(after)
        except Broken as broken:
            return Explored(len(reached), transitions, str(broken), trace(world))
    lively = {world for world in reached if protocol.at_rest(world)}
    back = deque(lively)
    while back:
        for world in towards.get(back.popleft(), ()):
            if world not in lively:
                lively.add(world)
                back.append(world)
    stuck = next((world for world in reached if world not in lively), None)
    if stuck is not None:
        return Explored(len(reached), transitions, "from here it never comes to rest", trace(stuck))
    return Explored(len(reached), transitions, "", [])


def _with_job(redis: Redis, number: int, job: Job) -> Redis:
    return redis._replace(jobs=(*redis.jobs[:number], job, *redis.jobs[number + 1 :]))


def _with_worker(world: World, number: int, worker: Worker) -> World:
    return world._replace(workers=(*world.workers[:number], worker, *world.workers[number + 1 :]))


def _spend(world: World, fault: str) -> World:
    left: Mapping[str, int] = {fault: getattr(world.budget, fault) - 1}
    return world._replace(budget=world.budget._replace(**left))
