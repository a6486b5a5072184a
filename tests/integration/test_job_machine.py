"""The job state machine on a real Valkey against a plain Python model, driven by Hypothesis.

Several workers claim, renew, commit, fail and release, some of them long after they lost their claim; leases run out
at any moment; users cancel; equal jobs wait for each other. After every step the record, the indexes and the counters
must be what the model says.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from redis import Redis

from calotype_shared.queue.job_store import MAX_CRASHES, Claim, JobStore
from calotype_shared.queue.submission import NewJob
from calotype_shared.schema.enums import JobState, Lane
from calotype_shared.schema.jobs import TRANSITIONS, JobError
from calotype_shared.schema.resolve import ResolvedConfig
from tests.invariants import check_store

CONFIG = ResolvedConfig(prompt="x", width=64, height=64, seed=1)
ERROR = JobError(code="test", message="as asked")
MAX_FAILURES = 2


@dataclass
class Job:
    lane: Lane
    state: JobState = JobState.QUEUED
    attempt: int = 0
    failures: int = 0
    crashes: int = 0
    followers: list[str] = field(default_factory=list)  # equal jobs that wait for this one
    follows: bool = False
    committed: tuple[int, str] | None = None  # by which claim

    @property
    def waits(self) -> bool:
        """In line for a worker."""
        return self.state is JobState.QUEUED and not self.follows

    def move(self, state: JobState) -> None:
        assert (self.state, state) in TRANSITIONS
        self.state = state


class JobMachine(RuleBasedStateMachine):
    redis: Redis

    def __init__(self) -> None:
        super().__init__()
        self.store = JobStore(self.redis, key_prefix=f"machine-{uuid.uuid4().hex[:8]}:", gap_seconds=0.0)
        self.jobs: dict[str, Job] = {}
        self.leaders: dict[Lane, str] = {}  # the live job that equal ones wait for
        self.claims: list[Claim] = []  # every claim ever made: old ones act as zombies

    def teardown(self) -> None:
        for key in self.redis.scan_iter(match=f"{self.store.keys.prefix}*"):
            self.redis.delete(key)

    def owns(self, claim: Claim) -> bool:
        job = self.jobs[claim.job_id]
        return job.state is JobState.RUNNING and job.attempt == claim.attempt

    @rule(count=st.integers(1, 3), lane=st.sampled_from(Lane), equal=st.booleans())
    def create(self, count: int, lane: Lane, equal: bool) -> None:
        new = [NewJob.of(CONFIG, lane=lane, identity=lane.value if equal else "") for _ in range(count)]
        for job_id in self.store.create(new, lane=lane, max_failures=MAX_FAILURES):
            self.jobs[job_id] = Job(lane)
            if equal and (leader := self.leaders.setdefault(lane, job_id)) != job_id:
                self.jobs[leader].followers.append(job_id)
                self.jobs[job_id].follows = True

    def end(self, job_id: str, state: JobState) -> None:
        """It becomes final, and so do those that waited for it; or one of them takes its place."""
        job = self.jobs[job_id]
        job.move(state)
        for leader in self.jobs.values():
            if job_id in leader.followers:
                leader.followers.remove(job_id)
        waited, job.followers = job.followers, []
        if self.leaders.get(job.lane) == job_id:
            del self.leaders[job.lane]
        if state is not JobState.CANCELLED:
            for follower in waited:
                self.end(follower, state)
        elif waited:
            heir = self.jobs[waited[0]]
            heir.followers, heir.follows = waited[1:], False
            self.leaders[job.lane] = waited[0]

    @rule(lane=st.sampled_from(Lane), worker=st.sampled_from(["w1", "w2"]))
    def claim(self, lane: Lane, worker: str) -> None:
        line = [job_id for job_id, job in self.jobs.items() if job.lane is lane and job.waits]
        claim = self.store.claim(f"demo.{lane.value}", worker=worker, lease_seconds=3600)
        assert (claim.job_id if claim else None) == next(iter(line), None), "in the order of submission"
        if claim is not None:
            job = self.jobs[claim.job_id]
            job.move(JobState.RUNNING)
            job.attempt += 1
            assert claim.attempt == job.attempt, f"claimed as attempt {claim.attempt}, which is attempt {job.attempt}"
            self.claims.append(claim)

    @precondition(lambda self: self.claims)
    @rule(data=st.data())
    def renew(self, data: st.DataObject) -> None:
        claims = data.draw(st.lists(st.sampled_from(self.claims), min_size=1, max_size=3, unique_by=lambda c: c.job_id))
        lost = self.store.renew(claims, lease_seconds=3600)
        # A claim that committed is not lost, although nothing of it is renewed.
        kept = [c for c in claims if self.owns(c) or self.jobs[c.job_id].committed == (c.attempt, c.token)]
        assert lost == {claim.job_id for claim in claims if claim not in kept}

    @precondition(lambda self: self.claims)
    @rule(data=st.data(), verb=st.sampled_from(["commit", "fail", "retry", "release", "progress"]))
    def finish(self, data: st.DataObject, verb: str) -> None:
        claim = data.draw(st.sampled_from(self.claims))
        job, owned = self.jobs[claim.job_id], self.owns(claim)
        if verb == "commit":
            # The newest claim's commit may be repeated: the answer to the first may have got lost.
            again = job.committed == (claim.attempt, claim.token)
            committed = self.store.commit(claim, images=[], timings={})
            assert committed == (owned or again), f"commit of a claim that owns its job: {owned}"
            if owned:
                job.committed = (claim.attempt, claim.token)
                self.end(claim.job_id, JobState.SUCCEEDED)
        elif verb == "release":
            assert self.store.release(claim) == owned
            if owned:
                job.move(JobState.QUEUED)
        elif verb == "progress":
            self.store.progress([(claim, claim.attempt, 99)])
            if owned:
                assert self.store.get(claim.job_id).step == claim.attempt
        else:
            state = self.store.fail(claim, ERROR, retry=verb == "retry")
            if owned:
                job.failures += 1
                again = verb == "retry" and job.failures < MAX_FAILURES
                job.move(JobState.QUEUED) if again else self.end(claim.job_id, JobState.FAILED)
            assert state == (job.state if owned else None)

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        job_id = data.draw(st.sampled_from(list(self.jobs)))  # by creation: ids of a millisecond sort at random
        job = self.jobs[job_id]
        if not job.state.final:
            self.end(job_id, JobState.CANCELLED)
        assert self.store.cancel(job_id) is job.state

    @precondition(lambda self: any(job.state is JobState.RUNNING for job in self.jobs.values()))
    @rule(data=st.data())
    def lease_runs_out(self, data: st.DataObject) -> None:
        running = [job_id for job_id, job in self.jobs.items() if job.state is JobState.RUNNING]
        expired = data.draw(st.lists(st.sampled_from(running), min_size=1, unique=True))
        self.redis.zadd(self.store.keys.leases, dict.fromkeys(expired, 1))
        self.redis.delete(self.store.keys.reaper)
        reaped = self.store.reap()
        assert reaped is not None
        for job_id in expired:
            job = self.jobs[job_id]
            job.crashes += 1
            self.end(job_id, JobState.FAILED) if job.crashes >= MAX_CRASHES else job.move(JobState.QUEUED)
        assert set(reaped.failed) == {j for j in expired if self.jobs[j].state is JobState.FAILED}
        assert set(reaped.requeued) == {j for j in expired if self.jobs[j].state is JobState.QUEUED}

    @invariant()
    def records_are_what_the_model_says(self) -> None:
        for job_id, job in self.jobs.items():
            record = self.store.get(job_id)
            assert (record.state, record.attempt) == (job.state, job.attempt)
            assert (record.failures, record.crashes) == (job.failures, job.crashes)

    @invariant()
    def indexes_and_counters_agree(self) -> None:
        check_store(self.store, self.redis)

    @invariant()
    def every_queued_job_has_a_message(self) -> None:
        """At least one: more are harmless, none would be a job that nobody starts."""
        for lane in Lane:
            queued = [job for job in self.jobs.values() if job.lane is lane and job.waits]
            assert self.redis.llen(self.store.keys.messages(f"demo.{lane.value}")) >= len(queued)


@pytest.mark.parametrize("histories", [10, pytest.param(100, marks=pytest.mark.slow)])
def test_job_machine(store: JobStore, histories: int) -> None:
    """So many random histories."""
    machine: Any = type("Machine", (JobMachine,), {"redis": store._redis})
    test = machine.TestCase
    test.settings = settings(
        max_examples=histories, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
    )
    test("runTest").runTest()


@dataclass(frozen=True, kw_only=True)
class BrokenFence:
    """A script with its fence taken out, and what the machine says where that shows."""

    script: str
    fence: str
    instead: str
    reason: str


BROKEN_FENCES = [
    # Any attempt may commit a job that is not final.
    BrokenFence(
        script="commit",
        fence="if not holds(id, ARGV[2], ARGV[3]) then",
        instead="if redis.call('HEXISTS', job_key(id), 'finished_at') == 1 then",
        reason="commit of a claim that owns its job: False",
    ),
    BrokenFence(
        script="claim",
        fence="redis.call('HINCRBY', job, 'attempt', 1)",
        instead="redis.call('HSET', job, 'attempt', 1)",
        reason="claimed as attempt 1, which is attempt 2",
    ),
]


@pytest.mark.parametrize("broken", BROKEN_FENCES, ids=lambda broken: broken.script)
def test_the_machine_notices_a_broken_fence(
    store: JobStore, monkeypatch: pytest.MonkeyPatch, broken: BrokenFence
) -> None:
    """A control: with the fence taken out of one script, a history that shows it is found, and shows just that."""
    from calotype_shared.queue import scripts as scripts_module

    source = scripts_module.script_source

    assert source(broken.script).count(broken.fence) == 1, "the script has another fence now"

    def broken_source(name: str, schema: int) -> str:
        text = source(name, schema)
        return text.replace(broken.fence, broken.instead) if name == broken.script else text

    monkeypatch.setattr(scripts_module, "script_source", broken_source)
    machine: Any = type("Machine", (JobMachine,), {"redis": store._redis})
    test = machine.TestCase
    test.settings = settings(
        max_examples=2000,  # it stops at the first that shows it; 60 have missed it
        stateful_step_count=30,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        database=None,
        report_multiple_bugs=False,  # one error, not a group
        phases=[Phase.generate],  # that it is found is the point; making it small would take minutes
    )
    with pytest.raises(AssertionError, match=f"^{broken.reason}"):
        test("runTest").runTest()
