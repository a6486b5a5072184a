"""A worker's heartbeat, on a real Valkey, beat by beat."""

from __future__ import annotations

from calotype_shared.observability import metric_names as names
from calotype_shared.queue.job_store import JobStore, News
from calotype_shared.schema.enums import Lane
from calotype_shared.schema.resolve import ResolvedConfig
from calotype_worker.jobs.heartbeat import Heartbeat
from calotype_worker.observability.counters import Counters

CONFIG = ResolvedConfig(prompt="a red circle", width=64, height=64, seed=1)


def test_a_lost_claim_is_counted_once(store: JobStore) -> None:
    """The listener or a renewal notices it first; the engine may be notified twice."""
    counters = Counters()
    stopped: list[str] = []
    heartbeat = Heartbeat(
        store,
        lease_seconds=20,
        progress=lambda _: None,
        stop_request=stopped.append,
        report=lambda: None,
        counters=counters,
    )
    (job_id,) = store.create([CONFIG], lane=Lane.BULK)
    claim = store.claim("demo.bulk", worker="w", lease_seconds=20)
    assert claim is not None
    job = heartbeat.hold(claim, ["image"])
    heartbeat._renew()
    was_lost = job.lost
    store.cancel(job_id)
    heartbeat._heard(News("cancelled", job_id))
    heartbeat._renew()
    assert (was_lost, job.lost) == (False, True)
    assert stopped == ["image", "image"]
    assert counters.counted(names.LOST_CLAIMS) == {(): 1}
    assert counters.counted(names.LEASE_RENEWALS) == {(): 1}
