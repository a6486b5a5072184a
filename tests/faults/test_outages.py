"""Redis or the storage is away, slow, refusing, or not what it was; or the disk is full."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from calotype.embedded.seaweed import SeaweedServer
from calotype.embedded.valkey import ValkeyServer
from calotype_shared.errors import RedisUnavailable
from calotype_shared.schema.enums import JobState
from calotype_shared.settings import Settings
from tests.faults.harness import FULL, SHORT_LEASE, Site, Table, until
from tests.faults.proxy import Mode, Proxy

AWAY_SECONDS = 60.0 if FULL else 4.0


def final(site: Site, ids: list[str]) -> int:
    return sum(record is not None and record.state.final for record in site.store.get_many(ids))


@pytest.fixture
def valkey_folder(tmp_path: Path) -> Path:
    return tmp_path / "valkey"


@pytest.fixture
def own_valkey(valkey_folder: Path) -> Iterator[list[ValkeyServer]]:
    """A Valkey that may be killed; the newest in the list is the one that runs."""
    servers = [ValkeyServer.start(valkey_folder)]
    yield servers
    servers[-1].stop()


def kill(server: ValkeyServer | SeaweedServer) -> None:
    os.kill(server.process.pid, signal.SIGKILL)
    server.process.wait(120)


def test_redis_is_killed_and_restarted(
    own_valkey: list[ValkeyServer],
    valkey_folder: Path,
    corner: Callable[..., Settings],
    make_site: Callable[..., Site],
    table: Table,
) -> None:
    """SIGKILL, away for a while, back with its append-only file: work resumes within ten seconds."""
    [server] = own_valkey
    site = make_site(corner(redis_url=server.url))
    workers = [site.start_worker("--concurrency", "6", *SHORT_LEASE) for _ in range(2)]
    ids = site.submit(40, long=True) if FULL else site.submit(16, num_inference_steps=24)
    until(lambda: final(site, ids) >= 3)
    site.redis.config_set("appendfsync", "always")  # from here on nothing acknowledged may be lost
    kill(server)
    with pytest.raises(RedisUnavailable, match=rf"127\.0\.0\.1:{server.port} cannot be used"):
        site.submit(1)
    time.sleep(AWAY_SECONDS)
    own_valkey.append(ValkeyServer.start(valkey_folder, port=server.port))
    began = time.monotonic()
    done = final(site, ids)
    until(lambda: final(site, ids) > done)
    took = time.monotonic() - began
    site.wait(ids)
    assert all(worker.alive for worker in workers)
    table.add("Redis killed and restarted", site.check(ids), recovery_seconds=took)


@pytest.mark.slow
def test_redis_runs_out_of_memory(
    own_valkey: list[ValkeyServer], corner: Callable[..., Settings], make_site: Callable[..., Site], table: Table
) -> None:
    """Nothing new is accepted and what runs is finished; with memory again, work goes on as if nothing had been."""
    [server] = own_valkey
    site = make_site(corner(redis_url=server.url))
    workers = [site.start_worker("--concurrency", "6") for _ in range(2)]
    ids = site.submit(40, long=True)
    until(lambda: final(site, ids) >= 2)
    running = [record.id for record in site.store.get_many(ids) if record and record.state is JobState.RUNNING]
    site.redis.config_set("maxmemory", 1)
    with pytest.raises(RedisUnavailable, match="maxmemory"):
        site.submit(1)
    until(lambda: final(site, running) == len(running))
    time.sleep(AWAY_SECONDS)
    site.redis.config_set("maxmemory", 0)
    began = time.monotonic()
    more = site.submit(4)
    records = site.wait(ids + more)
    assert all(worker.alive for worker in workers)
    assert {(record.failures, record.crashes) for record in records} == {(0, 0)}
    table.add("Redis out of memory", site.check(ids + more), recovery_seconds=time.monotonic() - began)


@pytest.mark.slow
def test_all_connections_to_redis_are_killed(site: Site, table: Table) -> None:
    """Each worker reconnects, keeps its claims, and does nothing twice. No lease is short enough for a busy machine."""
    workers = [site.start_worker("--concurrency", "6", "--lease-seconds", "60") for _ in range(2)]
    ids = site.submit(30, long=True)
    until(lambda: final(site, ids) >= 2)
    began = time.monotonic()
    with Redis.from_url(site.settings.redis_url) as other:
        for kind in ("normal", "pubsub"):
            other.execute_command("CLIENT", "KILL", "TYPE", kind, "SKIPME", "yes")
    done = final(site, ids)
    until(lambda: final(site, ids) > done)
    took = time.monotonic() - began
    records = site.wait(ids)
    assert {record.attempt for record in records} == {1}, "a claim was lost with its connection"
    assert all(worker.alive for worker in workers)
    table.add("all connections to Redis killed", site.check(ids), recovery_seconds=took)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["cut", "swallow"])
def test_the_network_to_redis_fails(
    mode: Mode, corner: Callable[..., Settings], make_site: Callable[..., Site], table: Table
) -> None:
    """One of two workers is cut off, longer than its leases: the other takes over; healed, the first works again."""
    settings = corner()
    with Proxy.before(str(settings.redis_url)) as proxy:
        behind = settings.model_copy(update={"redis_url": proxy.url(str(settings.redis_url))})
        site = make_site(settings, worker_settings=behind)
        lonely = site.start_worker("--concurrency", "4", *SHORT_LEASE, stop="slow-commit")
        ids = site.submit(12, long=True)
        lonely.wait_for("reached slow-commit")
        proxy.set(mode)
        site.worker_settings = settings
        other = site.start_worker(*SHORT_LEASE)
        records = site.wait(ids)
        assert max(record.attempt for record in records) == 2, "nothing was taken over"
        other.kill()
        more = site.submit(4)
        proxy.set("pass")
        began = time.monotonic()
        site.wait(more)
        took = time.monotonic() - began
        assert lonely.alive
        name = {"cut": "network to Redis cut, then restored", "swallow": "Redis does not answer, then recovers"}[mode]
        table.add(name, site.check(ids + more), recovery_seconds=took)


@pytest.mark.slow
def test_a_black_hole_does_not_hang_who_submits(
    corner: Callable[..., Settings], make_site: Callable[..., Site]
) -> None:
    """Publishing ends, with a clear error."""
    settings = corner()
    with Proxy.before(str(settings.redis_url)) as proxy:
        site = make_site(settings.model_copy(update={"redis_url": proxy.url(str(settings.redis_url))}))
        site.start_worker()
        proxy.set("swallow")
        with pytest.raises(RedisUnavailable, match="cannot be used"):
            site.client.submit("cat", model="tiny")


@pytest.mark.parametrize(
    "mode", ["busy", *(pytest.param(m, marks=pytest.mark.slow) for m in ("forbidden", "cut", "swallow", "slow"))]
)
def test_the_storage_fails(
    mode: Mode, corner: Callable[..., Settings], make_site: Callable[..., Site], table: Table
) -> None:
    """Images wait on disk while the device goes on with other jobs; healed, every one is stored and committed."""
    settings = corner()
    assert settings.s3_endpoint_url
    with Proxy.before(settings.s3_endpoint_url) as proxy:
        behind = settings.model_copy(update={"s3_endpoint_url": proxy.url(settings.s3_endpoint_url)})
        site = make_site(settings, worker_settings=behind)
        worker = site.start_worker("--concurrency", "4")
        proxy.set(mode)
        ids = site.submit(12)
        if mode in ("busy", "forbidden", "cut"):
            # Twelve jobs are worked on by four threads: eight went on while the first four's images wait.
            until(lambda: worker.text().count("images spooled") >= 12)
            assert final(site, ids) == 0
        elif mode == "swallow":
            time.sleep(AWAY_SECONDS)
            assert final(site, ids) == 0
        if mode != "slow":  # then it never heals, and all is done all the same
            proxy.set("pass")
        began = time.monotonic()
        records = site.wait(ids)
        took = time.monotonic() - began
        assert {(record.failures, record.crashes) for record in records} == {(0, 0)}
        assert not list((site.folder / "spool").glob("*/[0-9a-f]*")), "spooled files were left behind"
        names = {"busy": "answers 503", "forbidden": "refuses the keys", "cut": "cut off", "swallow": "does not answer"}
        table.add(f"S3 {names.get(mode, mode)}", site.check(ids), recovery_seconds=took)


@pytest.mark.slow
def test_the_storage_is_killed_and_restarted(
    corner: Callable[..., Settings], make_site: Callable[..., Site], tmp_path: Path, table: Table
) -> None:
    """A SeaweedFS of its own, killed without a word in mid-work; the same data come back at another port."""
    settings = corner()
    folder = tmp_path / "weed"
    first = SeaweedServer.start(folder, bucket=settings.s3_bucket)
    servers = [first]
    try:
        with Proxy.before(first.endpoint_url) as proxy:
            keys = {
                "s3_access_key_id": first.credentials.access_key_id,
                "s3_secret_access_key": first.credentials.secret_access_key,
            }
            own = corner(s3_endpoint_url=proxy.url(first.endpoint_url), s3_bucket=settings.s3_bucket, **keys)
            site = make_site(own)
            site.start_worker("--concurrency", "4")
            ids = site.submit(30, long=True)
            until(lambda: final(site, ids) >= 3)
            kill(first)
            proxy.set("cut")
            until(lambda: "storage unavailable" in site.workers[0].text())
            servers.append(SeaweedServer.start(folder, bucket=settings.s3_bucket))
            proxy.lead_to(servers[-1].endpoint_url)
            proxy.set("pass")
            began = time.monotonic()
            site.wait(ids)
            table.add("S3 killed and restarted", site.check(ids), recovery_seconds=time.monotonic() - began)
    finally:
        for server in servers:
            server.stop()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["disk-full", "no-room"])
def test_there_is_no_room_to_spool(
    how: str, corner: Callable[..., Settings], make_site: Callable[..., Site], table: Table
) -> None:
    """Then images wait in memory and their threads with them: nothing more is claimed than there are slots."""
    settings = corner()
    assert settings.s3_endpoint_url
    with Proxy.before(settings.s3_endpoint_url) as proxy:
        behind = settings.model_copy(update={"s3_endpoint_url": proxy.url(settings.s3_endpoint_url)})
        site = make_site(settings, worker_settings=behind)
        room: dict[str, Any] = {} if how == "disk-full" else {"CALOTYPE_WORKER_SPOOL_MIB": "0"}
        worker = site.start_worker("--concurrency", "4", stop=["disk-full"] if how == "disk-full" else [], **room)
        proxy.set("cut")
        ids = site.submit(12)
        until(lambda: worker.text().count("images cannot be spooled") >= 4)
        running = [r for r in site.store.get_many(ids) if r is not None and r.state is JobState.RUNNING]
        assert len(running) == 4
        assert not list((site.folder / "spool").glob("*/[0-9a-f]*")), "half a file was left behind"
        proxy.set("pass")
        began = time.monotonic()
        records = site.wait(ids)
        assert {record.attempt for record in records} == {1}
        name = "disk full while spooling" if how == "disk-full" else "spool full"
        table.add(name, site.check(ids), recovery_seconds=time.monotonic() - began)


@pytest.mark.slow
@pytest.mark.parametrize("clock", ["clock-ahead", "clock-behind"])
def test_clocks_disagree(clock: str, site: Site, table: Table) -> None:
    """A worker's clock is wrong by ten minutes; another one's is right. Time is Redis's alone."""
    for worker in [site.start_worker("--concurrency", "4", stop=stop, ready=False) for stop in (clock, ())]:
        worker.wait_for("worker ready")
    began = time.monotonic()
    ids = site.submit(24, long=True)
    records = site.wait(ids)
    assert {record.attempt for record in records} == {1}
    assert len({record.worker for record in records}) == 2
    for record in records:
        assert record.finished_at is not None
        assert 0 <= record.finished_at - record.created_at < 120
    name = f"clock {'ten minutes ahead' if clock == 'clock-ahead' else 'ten minutes behind'}"
    table.add(name, site.check(ids), recovery_seconds=time.monotonic() - began)


@pytest.mark.slow
def test_cancelling_races_the_commit(site: Site) -> None:
    """The first one wins, whole: a cancelled job has no image, and one with an image was not cancelled."""
    site.start_worker("--concurrency", "8")
    ids = site.submit(400 if FULL else 40)
    threads = [threading.Thread(target=site.client.cancel, args=(job_id,)) for job_id in ids[::2]]
    until(lambda: final(site, ids) >= 2)
    for thread in threads:
        thread.start()
        time.sleep(0.01)
    for thread in threads:
        thread.join()
    records = site.wait(ids)
    cancelled = [record for record in records if record.state is JobState.CANCELLED]
    assert cancelled
    assert all(not record.images for record in cancelled)
    until(lambda: not site.client.workers()[0].running_jobs)
    site.check(ids, cancelled=[record.id for record in cancelled])
