"""The machine is to be taken away: every cloud's notice, each with a real worker."""

from __future__ import annotations

import signal
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest

from calotype_shared.schema.enums import JobState
from tests.faults.harness import Site, Table, until
from tests.faults.metadata import MACHINE, metadata_service


def _soon(cloud: str, seconds: float) -> Any:
    """The notice in the words of that cloud."""
    when = datetime.now(UTC) + timedelta(seconds=seconds)
    match cloud:
        case "aws":
            return {"action": "terminate", "time": when.strftime("%Y-%m-%dT%H:%M:%SZ")}
        case "azure":
            date = format_datetime(when, usegmt=True)
            others = {"EventType": "Preempt", "Resources": ["vmss_1"], "NotBefore": ""}
            return [others, {"EventType": "Preempt", "Resources": [MACHINE], "NotBefore": date}]
    return True


def _states(site: Site, ids: list[str]) -> list[JobState]:
    return [record.state for record in site.store.get_many(ids) if record]


@pytest.mark.parametrize(
    "cloud", ["aws", pytest.param("gcp", marks=pytest.mark.slow), pytest.param("azure", marks=pytest.mark.slow)]
)
def test_a_cloud_gives_notice(site: Site, table: Table, cloud: str) -> None:
    """Nothing more is taken, what takes long is back in line before the machine goes, and the exit status is 0."""
    with metadata_service(cloud) as service:
        worker = site.start_worker(
            "--concurrency", "2", "--grace-seconds", "0.2", CALOTYPE_WORKER_PREEMPTION=cloud,
            CALOTYPE_WORKER_PREEMPTION_ENDPOINT=service.endpoint,
        )  # fmt: skip
        long = site.submit(4, num_inference_steps=900)
        ids = [*long, *site.submit(4, first=4)]
        until(lambda: JobState.RUNNING in _states(site, ids))
        service.notice = _soon(cloud, 20)
        began = time.monotonic()
        assert worker.wait(120) == 0, worker.text()
    assert service.refused == []
    assert _states(site, ids) == [JobState.QUEUED] * 8, "it has handed back what it had, and taken nothing more"
    for job_id in long:
        site.client.cancel(job_id)
    site.start_worker()
    records = site.wait(ids)
    assert {(record.failures, record.crashes) for record in records} == {(0, 0)}
    outcome = site.check(ids, cancelled=long)
    table.add(f"preemption: {cloud}", outcome, recovery_seconds=time.monotonic() - began)


@pytest.mark.slow
def test_what_fits_before_the_end_is_finished_and_a_signal_after_the_notice_is_a_first_one(
    site: Site, tmp_path: Path, table: Table
) -> None:
    notice = tmp_path / "notice"
    worker = site.start_worker(
        "--concurrency", "12", "--grace-seconds", "120", CALOTYPE_WORKER_PREEMPTION=f"file:{notice}"
    )
    ids = site.submit(12, long=True)
    until(lambda: _states(site, ids) == [JobState.RUNNING] * 12)
    notice.write_text("120\n")
    began = time.monotonic()
    worker.wait_for("worker drains", 10)
    assert JobState.RUNNING in _states(site, ids)
    later = site.submit(3, first=24)
    worker.send(signal.SIGTERM)
    assert worker.wait(120) == 0, worker.text()
    assert _states(site, ids) == [JobState.SUCCEEDED] * 12
    assert _states(site, later) == [JobState.QUEUED] * 3
    site.start_worker()
    site.wait(later)
    seconds = time.monotonic() - began
    table.add("preemption: file", site.check([*ids, *later]), recovery_seconds=seconds)
