"""The job state machine on a real Valkey against a plain Python model, driven by Hypothesis.

Several workers claim, renew, commit, fail and release, some of them long after they lost their claim; leases run out
at any moment; users cancel. After every step the record, the indexes and the counters must be what the model says.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from redis import Redis

from calotype_shared.config import GenerationConfig
from calotype_shared.jobs import TRANSITIONS, JobError, JobState, Lane
from calotype_shared.store import Claim, JobStore
from tests.invariants import check_store

CONFIG = GenerationConfig(prompt="x", width=64, height=64, seed=1)
ERROR = JobError(code="test", message="as asked")
MAX_FAILURES = 2


@dataclass
class Job:
    state: JobState = JobState.QUEUED
    attempt: int = 0
    failures: int = 0
    seen: list[JobState] = field(default_factory=lambda: [JobState.QUEUED])

    def move(self, state: JobState) -> None:
        assert (self.state, state) in TRANSITIONS
        self.state = state


class JobMachine(RuleBasedStateMachine):
    redis: Redis

    def __init__(self) -> None:
        super().__init__()
        self.store = JobStore(self.redis, key_prefix=f"machine-{uuid.uuid4().hex[:8]}:", gap_seconds=0.0)
        self.jobs: dict[str, Job] = {}
        self.claims: list[Claim] = []  # every claim ever made: old ones act as zombies

    def teardown(self) -> None:
        for key in self.redis.scan_iter(match=f"{self.store.keys.prefix}*"):
            self.redis.delete(key)

    def owns(self, claim: Claim) -> bool:
        job = self.jobs[claim.job_id]
        return job.state is JobState.RUNNING and job.attempt == claim.attempt

    @rule(count=st.integers(1, 3), lane=st.sampled_from(Lane))
    def create(self, count: int, lane: Lane) -> None:
        for job_id in self.store.create([CONFIG] * count, lane=lane, max_failures=MAX_FAILURES):
            self.jobs[job_id] = Job()

    @precondition(lambda self: self.jobs)
    @rule(data=st.data(), worker=st.sampled_from(["w1", "w2"]))
    def claim(self, data: st.DataObject, worker: str) -> None:
        job_id = data.draw(st.sampled_from(sorted(self.jobs)))
        job = self.jobs[job_id]
        claim = self.store.claim(job_id, worker=worker, lease_seconds=3600)
        assert (claim is not None) == (job.state is JobState.QUEUED)
        if claim is not None:
            job.move(JobState.RUNNING)
            job.attempt += 1
            assert claim.attempt == job.attempt
            self.claims.append(claim)

    @precondition(lambda self: self.claims)
    @rule(data=st.data())
    def renew(self, data: st.DataObject) -> None:
        claims = data.draw(st.lists(st.sampled_from(self.claims), min_size=1, max_size=3, unique_by=lambda c: c.job_id))
        lost = self.store.renew(claims, lease_seconds=3600)
        assert lost == {claim.job_id for claim in claims if not self.owns(claim)}

    @precondition(lambda self: self.claims)
    @rule(data=st.data(), verb=st.sampled_from(["commit", "fail", "retry", "release", "progress"]))
    def finish(self, data: st.DataObject, verb: str) -> None:
        claim = data.draw(st.sampled_from(self.claims))
        job, owned = self.jobs[claim.job_id], self.owns(claim)
        if verb == "commit":
            assert self.store.commit(claim, images=[], timings={}) == owned
            if owned:
                job.move(JobState.SUCCEEDED)
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
                job.move(JobState.QUEUED if again else JobState.FAILED)
            assert state == (job.state if owned else None)

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        job_id = data.draw(st.sampled_from(sorted(self.jobs)))
        job = self.jobs[job_id]
        if not job.state.final:
            job.move(JobState.CANCELLED)
        assert self.store.cancel(job_id) is job.state

    @precondition(lambda self: any(job.state is JobState.RUNNING for job in self.jobs.values()))
    @rule(data=st.data())
    def lease_runs_out(self, data: st.DataObject) -> None:
        running = sorted(job_id for job_id, job in self.jobs.items() if job.state is JobState.RUNNING)
        expired = data.draw(st.lists(st.sampled_from(running), min_size=1, unique=True))
        self.redis.zadd(self.store.keys.leases, dict.fromkeys(expired, 1))
        self.redis.delete(self.store.keys.reaper)
        reaped = self.store.reap()
        assert reaped is not None
        for job_id in expired:
            job = self.jobs[job_id]
            job.failures += 1
            job.move(JobState.FAILED if job.failures >= MAX_FAILURES else JobState.QUEUED)
        assert set(reaped.failed) == {j for j in expired if self.jobs[j].state is JobState.FAILED}
        assert set(reaped.requeued) == {j for j in expired if self.jobs[j].state is JobState.QUEUED}

    @invariant()
    def records_are_what_the_model_says(self) -> None:
        for job_id, job in self.jobs.items():
            record = self.store.get(job_id)
            assert (record.state, record.attempt, record.failures) == (job.state, job.attempt, job.failures)

    @invariant()
    def indexes_and_counters_agree(self) -> None:
        check_store(self.store, self.redis)

    @invariant()
    def every_queued_job_has_a_message(self) -> None:
        """At least one: more are harmless, none would be a job that nobody starts."""
        messages = [
            message
            for lane in Lane
            for message in self.redis.lrange(self.store.keys.messages(f"demo.{lane.value}"), 0, -1)
        ]
        for job_id, job in self.jobs.items():
            if job.state is JobState.QUEUED:
                assert any(job_id in message for message in messages), f"{job_id} is queued without a message"


def test_job_machine(store: JobStore) -> None:
    """Forty random histories."""
    machine = type("Machine", (JobMachine,), {"redis": store._redis})
    test = machine.TestCase
    test.settings = settings(
        max_examples=40, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
    )
    test("runTest").runTest()


@pytest.mark.parametrize("script", ["commit", "claim"])
def test_the_machine_notices_a_broken_fence(store: JobStore, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """A control: with the fence taken out of one script, a history that shows it is found."""
    from calotype_shared import store as store_module

    source = store_module.script_source

    def broken(name: str) -> str:
        text = source(name)
        if name == script == "commit":
            return text.replace("if not holds(id, ARGV[2]) then return 0 end", "")
        if name == script == "claim":
            return text.replace("redis.call('HINCRBY', job, 'attempt', 1)", "redis.call('HSET', job, 'attempt', 1)")
        return text

    monkeypatch.setattr(store_module, "script_source", broken)
    machine = type("Machine", (JobMachine,), {"redis": store._redis})
    test = machine.TestCase
    test.settings = settings(
        max_examples=60,
        stateful_step_count=30,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        database=None,
        phases=[Phase.generate],  # that it is found is the point; making it small would take minutes
    )
    with pytest.raises(BaseException):  # noqa: B017, PT011 - an assertion, an error of Redis, or a group of both
        test("runTest").runTest()
