"""Changes of jobs are heard of, not looked for: with looks a minute apart, waits end at once."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from redis import Redis

from calotype import AsyncClient, Client, job_changes, waiting
from calotype.gateway import jobs as gateway_jobs
from calotype_shared.queue.job_store import Claim, JobStore
from calotype_shared.schema.enums import JobState
from calotype_shared.schema.jobs import JobError, JobRecord
from calotype_shared.settings import Settings
from tests.integration.conftest import until
from tests.integration.gateway import Gateway
from tests.integration.test_client import CARD, claim, in_background

SOON = 30  # seconds: half of what a look would take


@pytest.fixture
def client(settings: Settings, store: JobStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    """One whose waits look once a minute while they hear of changes."""
    monkeypatch.setattr(waiting, "_LONGEST_PAUSE", 60.0)
    store.announce_model(CARD)
    with Client(settings=settings) as client:
        yield client


class Following:
    """A thread that follows jobs, and what it has seen."""

    def __init__(self, client: Client, *job_ids: str) -> None:
        self.seen: list[JobRecord] = []
        self._client, self._ids = client, list(job_ids)
        self._thread = in_background(self._follow)
        until(lambda: all(is_subscribed(client, job_id) for job_id in job_ids))

    def _follow(self) -> None:
        for record in self._client.follow(self._ids, timeout=100):
            self.seen.append(record)

    def end(self) -> list[JobRecord]:
        self._thread.join(SOON)
        assert not self._thread.is_alive(), f"it still looks: {self.seen}"
        final = {record.id for record in self.seen if record.state.final}
        assert final == set(self._ids), f"it has not seen how they end: {self.seen}"
        return self.seen


def is_subscribed(client: Client, job_id: str) -> bool:
    return client.job_changes._is_live({client._store.keys.changed(job_id)})


def commit(store: JobStore, claimed: Claim) -> None:
    assert store.commit(claimed, images=[], timings={})


def listeners() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "calotype-job-changes"]


def test_each_change_is_heard_of(client: Client, store: JobStore) -> None:
    """Claim, step and end, each before anybody would have looked."""
    job = client.submit("a red circle")
    following = Following(client, job.id)
    claimed = claim(store, job.id)
    until(lambda: following.seen[-1].state is JobState.RUNNING, SOON)
    store.progress([(claimed, 3, 10)])
    until(lambda: following.seen[-1].step == 3, SOON)
    commit(store, claimed)
    assert following.end()[-1].state is JobState.SUCCEEDED


@pytest.mark.parametrize("end", ["cancel", "fail", "release"])
def test_every_way_out_of_a_state_is_heard_of(client: Client, store: JobStore, end: str) -> None:
    job = client.submit("a red circle")
    claimed = claim(store, job.id)
    following = Following(client, job.id)
    if end == "cancel":
        store.cancel(job.id)
        assert following.end()[-1].state is JobState.CANCELLED
        return
    if end == "fail":
        store.fail(claimed, JobError(code="internal_error", message="try again"), retry=True)
    else:
        store.release(claimed)
    until(lambda: following.seen[-1].state is JobState.QUEUED, SOON)
    commit(store, claim(store, job.id))
    following.end()


def test_jobs_that_share_an_outcome_are_both_heard_of(client: Client, store: JobStore) -> None:
    """An equal job that waits for the first ends with it."""
    first, second = (client.submit("a red circle", seed=3) for _ in range(2))
    following = Following(client, second.id)
    commit(store, claim(store, first.id))
    assert following.end()[-1].state is JobState.SUCCEEDED


def test_many_waits_share_one_connection_and_hear_of_their_own_jobs(client: Client, store: JobStore) -> None:
    jobs = client.submit_many([f"image {number}" for number in range(6)])
    threads = len(listeners())
    followings = [Following(client, job.id) for job in jobs]
    assert len(listeners()) == threads + 1
    claims = [claim(store, job.id) for job in jobs]
    commit(store, claims[2])
    followings[2].end()
    assert all(following.seen[-1].state is not JobState.SUCCEEDED for following in followings[3:])
    for number in (0, 1, 3, 4, 5):
        commit(store, claims[number])
        assert followings[number].end()[-1].state is JobState.SUCCEEDED


def test_a_wait_for_many_hears_of_the_last_ones(client: Client, store: JobStore) -> None:
    """While they are too many it looks, as seldom as its bound says; then it gets the change."""
    jobs = client.submit_many([f"image {number}" for number in range(70)])
    wait = client.waiter.begin([job.id for job in jobs])
    client.waiter.look(wait)
    assert wait.subscribed_ids == []
    claims = [claim(store, job.id) for job in jobs]
    for claimed in claims[:10]:
        commit(store, claimed)
    following = Following(client, *(job.id for job in jobs[10:]))
    client.waiter.look(wait)
    assert wait.subscribed_ids == [job.id for job in jobs[10:]]
    for claimed in claims[10:]:
        commit(store, claimed)
    assert len([record for record in following.end() if record.state is JobState.SUCCEEDED]) == 60


def test_what_changed_before_it_was_heard_is_seen(client: Client, store: JobStore) -> None:
    """Between the first look and the server's word that it is subscribed nothing gets lost."""
    for number in range(20):
        job = client.submit(f"image {number}")
        claimed = claim(store, job.id)
        ended: list[JobRecord] = []
        thread = in_background(lambda job=job, ended=ended: ended.append(client.wait(job.id, 120)))  # type: ignore[misc]
        commit(store, claimed)
        thread.join(SOON)
        assert [record.state for record in ended] == [JobState.SUCCEEDED]


def test_a_broken_connection_costs_nothing(client: Client, store: JobStore, redis: Redis) -> None:
    """It subscribes anew, and looks: what ended meanwhile is seen, and what ends later is announced."""
    jobs = client.submit_many(["one", "two"])
    followings = [Following(client, job.id) for job in jobs]
    claims = [claim(store, job.id) for job in jobs]
    redis.client_kill_filter(_type="pubsub", skipme=True)
    commit(store, claims[0])
    followings[0].end()
    commit(store, claims[1])
    followings[1].end()


def test_the_listener_ends_with_its_client_and_after_the_last_wait(
    client: Client, store: JobStore, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing stays of waits that are over; the next begins anew."""
    monkeypatch.setattr(job_changes, "_LISTEN_SECONDS", 0.05)
    monkeypatch.setattr(job_changes, "_LINGER_SECONDS", 0.1)
    before = len(listeners())
    for number in range(2):
        job = client.submit(f"image {number}")
        following = Following(client, job.id)
        assert len(listeners()) == before + 1
        commit(store, claim(store, job.id))
        following.end()
        until(lambda: len(listeners()) == before, SOON)
        assert client.job_changes._watches == {}
    with Client(settings=settings) as other:
        job = other.submit("a blue square")
        following = Following(other, job.id)
        commit(store, claim(store, job.id))
        following.end()
    until(lambda: len(listeners()) == before, SOON)


def test_a_task_hears_too(client: Client, settings: Settings, store: JobStore) -> None:
    """Many tasks wait on one event loop, and none holds a thread."""

    async def follow_all() -> None:
        async with AsyncClient(settings=settings) as other:
            jobs = await other.submit_many([f"image {number}" for number in range(40)])
            waits = [asyncio.create_task(job.wait(timeout=120)) for job in jobs]
            ids = [job.id for job in jobs]
            hearing: Callable[[], bool] = lambda: all(is_subscribed(other._sync, job_id) for job_id in ids)  # noqa: E731
            await asyncio.to_thread(until, hearing)
            for job_id in ids:
                await asyncio.to_thread(lambda job_id=job_id: commit(store, claim(store, job_id)))  # type: ignore[misc]
            records = await asyncio.wait_for(asyncio.gather(*waits), SOON)
            assert {record.state for record in records} == {JobState.SUCCEEDED}

    asyncio.run(follow_all())


def test_requests_that_wait_hear_too(
    settings: Settings, store: JobStore, monkeypatch: pytest.MonkeyPatch, client: Client
) -> None:
    """A gateway's answer that was asked to wait, and its events."""
    monkeypatch.setattr(gateway_jobs, "_LONGEST_PAUSE", 60.0)
    monkeypatch.setattr(gateway_jobs, "_TOLD_SECONDS", 60.0)
    gateway = Gateway(settings)
    answers: dict[str, str] = {}

    def ask(name: str, method: str, path: str, **more: Any) -> None:
        answers[name] = gateway.http.request(method, path, timeout=120, **more).text

    def newest_is_heard() -> bool:
        newest = client.jobs(limit=1)
        return bool(newest) and is_subscribed(gateway.app.state.services.client, newest[0].id)

    try:
        body, prefer = {"prompt": "a red circle", "seed": 1}, {"prefer": "wait=60"}
        waits = in_background(lambda: ask("wait", "POST", "/v1/jobs", json=body, headers=prefer))
        until(newest_is_heard)
        [job] = client.jobs(limit=1)
        follows = in_background(lambda: ask("events", "GET", f"/v1/jobs/{job.id}/events"))
        until(lambda: len(gateway.app.state.services.client.job_changes._watches[store.keys.changed(job.id)]) == 2)
        commit(store, claim(store, job.id))
        for thread in (waits, follows):
            thread.join(SOON)
            assert not thread.is_alive()
        assert '"succeeded"' in answers["wait"]
        assert "event: done" in answers["events"]
    finally:
        gateway.stop()
