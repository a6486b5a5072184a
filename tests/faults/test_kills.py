"""Workers that die, freeze, leave, or are sent what they should not be."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable

import pytest

from calotype_shared.queue.job_store import MAX_CRASHES
from calotype_shared.queue.message import message
from calotype_shared.queue.records import SCHEMA
from calotype_shared.schema.enums import JobState
from calotype_worker.jobs.drain import EXIT_STUCK
from tests.faults.fault_points import CURSED, POINTS, POISON
from tests.faults.harness import FULL, SHORT_LEASE, Site, Table, WorkerProcess, until


def running(site: Site, ids: list[str]) -> int:
    return sum(record is not None and record.state is JobState.RUNNING for record in site.store.get_many(ids))


def final(site: Site, ids: list[str]) -> int:
    return sum(record is not None and record.state.final for record in site.store.get_many(ids))


# Everything is uploaded and nothing committed: most is left behind, and all of it has to be seen to.
@pytest.mark.parametrize("point", [p if p == "uploaded" else pytest.param(p, marks=pytest.mark.slow) for p in POINTS])
def test_a_worker_is_killed_at(point: str, site: Site, table: Table) -> None:
    """SIGKILL at that very point; another worker finishes what was begun."""
    victim = site.start_worker(*SHORT_LEASE, stop=point)
    ids = site.submit(8)
    victim.wait_for(f"reached {point}")
    victim.kill()
    began = time.monotonic()
    if point != "committed":
        assert final(site, ids) == 0
    site.start_worker(*SHORT_LEASE)
    records = site.wait(ids)
    took = time.monotonic() - began
    attempts = [record.attempt for record in records]
    assert max(attempts) >= 2, "nothing was taken over"  # a busy machine loses short leases, too
    if point == "committed":
        assert min(attempts) == 1, "the committed job was done again"
    table.add(f"worker killed: {point}", site.check(ids), recovery_seconds=took)


def test_a_worker_that_leaves_keeps_what_it_may_have_committed(site: Site, table: Table) -> None:
    """The response to a commit is lost, then the worker has to go: the images of the job stay."""
    worker = site.start_worker("--grace-seconds", "1", stop="commit-unanswered")
    ids = site.submit(2)
    site.wait(ids)
    worker.wait_for("reached commit-unanswered")
    began = time.monotonic()
    worker.send(signal.SIGTERM)
    assert worker.wait() == 0
    took = time.monotonic() - began
    table.add("the response to a commit is lost, then SIGTERM", site.check(ids), recovery_seconds=took)


def test_a_device_hangs(site: Site, table: Table) -> None:
    """The engine's thread lives but makes no progress: the worker exits by itself and another one takes over."""
    hung = site.start_worker(*SHORT_LEASE, "--hang-seconds", "2", stop="step")
    ids = site.submit(4)
    hung.wait_for("reached step")
    began = time.monotonic()
    site.start_worker(*SHORT_LEASE)
    records = site.wait(ids)
    took = time.monotonic() - began
    assert hung.wait(120) == EXIT_STUCK
    assert "fault_points.py" in hung.text(), "the log shows where the engine hangs"
    assert "worker exits: its engine hangs" in hung.text()
    assert any(record.crashes for record in records), "the job may be the reason"
    table.add("a device hangs", site.check(ids), recovery_seconds=took)


def test_a_job_that_is_returned_while_it_is_prepared_never_runs(site: Site, table: Table) -> None:
    """The engine does not have it yet when its requests are cancelled."""
    worker = site.start_worker("--grace-seconds", "0.2", stop="slow-prepare")
    ids = site.submit(1, num_inference_steps=900)
    worker.wait_for("reached slow-prepare")
    began = time.monotonic()
    worker.send(signal.SIGTERM)
    assert worker.wait(120) == 0, worker.text()
    took = time.monotonic() - began
    [record] = site.store.get_many(ids)
    assert record is not None
    assert record.state is JobState.QUEUED
    site.client.cancel(ids[0])
    table.add("a worker leaves while it prepares a job", site.check(ids, cancelled=ids), recovery_seconds=took)


@pytest.mark.slow
def test_a_hanging_device_does_not_hold_up_sigterm(site: Site, table: Table) -> None:
    """After the grace period the worker returns its jobs and ends, whatever its engine does."""
    hung = site.start_worker("--grace-seconds", "1", stop="step")
    ids = site.submit(4)
    hung.wait_for("reached step")
    began = time.monotonic()
    hung.send(signal.SIGTERM)
    assert hung.wait(120) == EXIT_STUCK
    assert "fault_points.py" in hung.text(), "the log shows where the engine hangs"
    site.start_worker()
    records = site.wait(ids)
    took = time.monotonic() - began
    assert not any(record.crashes for record in records), "they were returned"
    table.add("a device hangs, then SIGTERM", site.check(ids), recovery_seconds=took)


@pytest.mark.slow
def test_a_frozen_worker_comes_back_too_late(site: Site, table: Table) -> None:
    """SIGSTOP beyond the lease: the job is another's. After SIGCONT the zombie finishes its images, in vain."""
    zombie = site.start_worker("--concurrency", "4", *SHORT_LEASE, stop="slow-commit")
    ids = site.submit(4)
    zombie.wait_for("reached slow-commit")  # everything is uploaded
    zombie.send(signal.SIGSTOP)
    began = time.monotonic()
    other = site.start_worker(*SHORT_LEASE)
    records = site.wait(ids)
    took = time.monotonic() - began
    assert {record.attempt for record in records} == {2}
    zombie.send(signal.SIGCONT)
    until(lambda: zombie.text().count("commit answered False") >= 1)
    assert "commit answered True" not in zombie.text(), "the zombie has committed"
    # It lives on, and works for the queue again.
    other.kill()
    more = site.submit(3, first=4)
    site.wait(more)
    table.add("worker frozen beyond its lease, then continued", site.check(ids + more), recovery_seconds=took)


@pytest.mark.slow
def test_a_message_dies_with_its_worker(site: Site, table: Table) -> None:
    """Frozen while it waits for messages, a worker is handed one it never sees; killed then, the message is gone."""
    victim = site.start_worker("--concurrency", "1")
    victim.send(signal.SIGSTOP)
    ids = site.submit(3)
    victim.kill()
    began = time.monotonic()
    site.start_worker()
    site.wait(ids)
    took = time.monotonic() - began
    table.add("message delivered to a worker that was frozen, then killed", site.check(ids), recovery_seconds=took)


@pytest.mark.slow
def test_the_same_message_twice(site: Site, table: Table) -> None:
    """Two workers, and every message three times: each job is claimed once."""
    site.start_worker().kill()  # the model is known from now on
    ids = site.submit(10)
    queue = site.store.keys.messages("tiny.bulk")
    there = site.redis.lrange(queue, 0, -1)
    assert len(there) == 10
    site.redis.lpush(queue, *there, *there, message("never made", "tiny.bulk"))
    began = time.monotonic()
    for worker in [site.start_worker(ready=False) for _ in range(2)]:
        worker.wait_for("worker ready")
    records = site.wait(ids)
    assert {record.attempt for record in records} == {1}
    table.add(
        "every message delivered three times, two workers", site.check(ids), recovery_seconds=time.monotonic() - began
    )


@pytest.mark.slow
def test_a_poison_job_among_good_ones(site: Site, table: Table) -> None:
    """It takes five workers with it, is put aside with its history, and every other job is done."""
    workers = [site.start_worker(*SHORT_LEASE, stop="poison")]
    good = site.submit(10)
    [poison] = site.submit(1, prompt=f"a {POISON} apple", seed=99)
    good += site.submit(10, first=10)
    began = time.monotonic()
    while not site.finished([*good, poison]):
        assert time.monotonic() - began < 200
        if not workers[-1].alive:
            assert workers[-1].wait() == -signal.SIGKILL
            workers.append(site.start_worker(*SHORT_LEASE, stop="poison"))
        time.sleep(0.05)
    took = time.monotonic() - began
    record = site.store.get(poison)
    assert record.error is not None
    assert (record.error.code, record.crashes, len(record.history)) == ("worker_lost", MAX_CRASHES, MAX_CRASHES)
    assert len({attempt.worker for attempt in record.history}) == MAX_CRASHES
    assert [dead.id for dead in site.store.dead()] == [poison]
    assert max(r.crashes for r in site.wait(good)) < MAX_CRASHES
    table.add("poison job among valid ones", site.check([*good, poison], failed=[poison]), recovery_seconds=took)


@pytest.mark.slow
def test_the_model_raises_on_one_prompt(site: Site, table: Table) -> None:
    """Its neighbours, encoded in the same call, do not notice; it fails after its three attempts and says why."""
    worker = site.start_worker(stop="cursed")
    began = time.monotonic()
    good = site.submit(6)
    [cursed] = site.submit(1, prompt=f"a {CURSED} ring", seed=99)
    good += site.submit(6, first=6)
    site.wait([*good, cursed])
    record = site.store.get(cursed)
    assert record.error is not None
    assert "does something to me" in record.error.message
    assert record.crashes == 0
    assert worker.alive
    outcome = site.check([*good, cursed], failed=[cursed])
    table.add("model raises on one prompt", outcome, recovery_seconds=time.monotonic() - began)


@pytest.mark.slow
def test_all_workers_are_upgraded_in_turn(site: Site, table: Table) -> None:
    """SIGTERM to each under load, one of the next version first, which has jobs that the old ones must leave to it.

    Every worker exits with 0 and no attempt counts as a failure.
    """
    count = 120 if FULL else 40
    workers = [site.start_worker("--concurrency", "6", "--grace-seconds", "1") for _ in range(2)]
    ids = site.submit(count - 8, long=True)
    newer: list[str] = []
    began = time.monotonic()
    for number in range(2):
        until(lambda: running(site, ids) >= 4)
        site.start_worker("--concurrency", "6", "--grace-seconds", "1", stop="newer")
        newer += site.submit_newer(4, first=count - 8 + 4 * number, long=True)
        workers[number].send(signal.SIGTERM)
        assert workers[number].wait(120) == 0, workers[number].text()
    records = site.wait([*ids, *newer], 240)
    assert {(record.failures, record.crashes) for record in records} == {(0, 0)}
    assert {record.schema_number for record in records[count - 8 :]} == {SCHEMA + 1}
    outcome = site.check([*ids, *newer])
    table.add("rolling upgrade under load", outcome, recovery_seconds=time.monotonic() - began)


@pytest.mark.slow
def test_an_old_worker_leaves_what_is_too_new_to_a_new_one(site: Site, table: Table) -> None:
    """A job of the next version in the middle of a line: the old worker does its own around it, and says so once."""
    old = site.start_worker()
    ids = site.submit(6)
    [newer] = site.submit_newer(1, first=6)
    ids += site.submit(6, first=7)
    site.wait(ids)
    old.wait_for("jobs are too new for this worker")
    until(lambda: [worker.left_for_newer for worker in site.client.workers()] == [("tiny.bulk",)])
    left = site.store.get(newer)
    assert (left.state, left.attempt, left.newer) == (JobState.QUEUED, 0, True)
    began = time.monotonic()
    new = site.start_worker(stop="newer")
    ids += site.submit(12, first=13)
    site.wait([*ids, newer])
    took = time.monotonic() - began
    made_by = {site.store.get(job_id).worker for job_id in ids[12:]}
    assert site.store.get(newer).worker in made_by, "the new worker does old jobs too"
    assert (old.alive, new.alive) == (True, True)
    until(lambda: all(worker.left_for_newer == () for worker in site.client.workers()))
    assert old.text().count("jobs are too new for this worker") == 1
    table.add("old and new worker on one line", site.check([*ids, newer]), recovery_seconds=took)


@pytest.mark.slow
def test_workers_are_killed_at_random(site: Site, table: Table) -> None:
    """Every few seconds one of three is killed without a word, and another comes."""
    count, pause = (2000, (2.5, 5.0)) if FULL else (48, (2.0, 3.0))
    dice = random.Random(5)
    start: Callable[[], WorkerProcess] = lambda: site.start_worker("--concurrency", "8", *SHORT_LEASE, ready=False)  # noqa: E731
    workers = [start() for _ in range(2)]
    for worker in workers:
        worker.wait_for("worker ready")
    ids = site.submit(count, long=not FULL)
    kills, ends = 0, time.monotonic() + (1500 if FULL else 200)
    while final(site, ids) < count * 0.9:
        assert time.monotonic() < ends, f"{final(site, ids)} of {count} jobs are done"
        time.sleep(dice.uniform(*pause))
        if not FULL and kills == MAX_CRASHES - 1:
            continue  # on a slow machine one more might blame a job that was there each time
        victim = workers.pop(dice.randrange(len(workers)))
        victim.kill()
        kills += 1
        workers.append(start())
        # Else, on a slow machine, workers would only ever start, and their jobs be taken for what kills them.
        workers[-1].wait_for("worker ready")
    began = time.monotonic()
    records = site.wait(ids, 300)
    assert kills >= (15 if FULL else 2), "there were too few kills to show anything"
    assert max(record.attempt for record in records) > 1
    name = f"{kills} workers killed at random"
    table.add(name, site.check(ids), recovery_seconds=time.monotonic() - began)
