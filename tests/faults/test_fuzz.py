"""Bad inputs of every kind, among good ones: no crash, no 5xx, nothing lost. Ten thousand of them with FAULTS=full."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from redis import Redis

from calotype import Client
from calotype_shared.errors import InvalidRequest
from calotype_shared.settings import Settings
from tests.faults.fuzzing import GOOD, HUGE, configs, dump, junk, lines, messages, mutated, uploads
from tests.faults.harness import FULL, Forge, Outcome, Site, Table, WorkerProcess, until
from tests.integration.gateway import Gateway
from tests.invariants import check_store

pytestmark = pytest.mark.slow

INPUTS = {  # (always, with FAULTS=full)
    "configs": (200, 4000),
    "requests": (120, 2500),
    "lines": (300, 2500),
    "uploads": (100, 1500),
    "messages": (150, 2000),
}


def fuzz(count: int) -> Callable[[Any], Any]:
    return settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=not FULL,  # so that what is landed does not fail by chance
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


class Place:
    """A gateway with a dispatcher, and one worker that must outlive everything."""

    def __init__(self, site: Site, worker: WorkerProcess) -> None:
        self.site = site
        self.worker = worker
        self.gateway = Gateway(site.settings, max_wait_seconds=0.05, max_body_bytes=2**20)
        self.answers: Counter[str] = Counter()
        self._seed = 10_000

    def good(self, count: int = 3) -> list[str]:
        """Neighbours, each a job of its own."""
        self._seed += count
        asked = [{**GOOD, "seed": self._seed + i, "prompt": "neighbour"} for i in range(count)]
        return [job.id for job in self.site.client.submit_many(asked)]

    def check(self, ids: list[str], table: Table, kind: str, tried: int) -> None:
        """The neighbours are there, and so is the worker."""
        began = time.monotonic()
        for job in self.site.client.jobs(limit=1000):
            if job.id not in ids and not job.state.final:
                self.site.client.cancel(job.id)
        records = self.site.wait(ids)
        lost = sum(record.state.value != "succeeded" for record in records)
        assert lost == 0
        assert self.worker.alive, self.worker.text()[-3000:]
        assert "the consumer has stopped" not in self.worker.text()
        until(lambda: not self._busy())
        check_store(self.site.store, self.site.redis)
        outcome = Outcome(jobs=len(ids), lost=lost, twice=0)
        said = ", ".join(f"{count} {answer}" for answer, count in sorted(self.answers.items()))
        table.add(f"{tried} invalid {kind} ({said})", outcome, recovery_seconds=time.monotonic() - began)

    def _busy(self) -> int:
        counts = self.site.store.counts()
        return sum(count for state, count in counts.items() if not state.final)

    def stop(self) -> None:
        self.gateway.stop()


@pytest.fixture
def place(corner: Callable[..., Settings], forge: Forge, tiny_model: Path, tmp_path: Path) -> Iterator[Place]:
    site = Site(corner(), forge=forge, model=tiny_model, folder=tmp_path)
    place = Place(site, site.start_worker())
    yield place
    place.stop()
    site.close()


def test_configs(place: Place, table: Table) -> None:
    """Through the client: accepted, or refused with what, the value and the remedy."""
    client: Client = place.site.client
    ids = place.good()

    @fuzz(INPUTS["configs"][FULL])
    @given(configs())
    def run(fields: dict[Any, Any]) -> None:
        refused = None
        try:
            client.cancel(client.submit(fields).id)
        except InvalidRequest as error:
            refused = error
        place.answers["refused" if refused else "accepted"] += 1
        if refused:
            assert refused.field
            assert refused.remedy
            assert len(str(refused)) < 1500, f"a message of {len(str(refused))} characters"

    run()
    place.check([*ids, *place.good()], table, "configs", place.answers.total())
    assert place.answers["refused"] > INPUTS["configs"][FULL] / 2


ROUTES = ("/v1/jobs", "/v1/images/generations", "/sdapi/v1/txt2img", "/sdapi/v1/img2img", "/v1/batches", "/v1/files",
          "/v1/uploads", "/v1/images/edits", "/sdapi/v1/options", "/sdapi/v1/interrogate")  # fmt: skip
CONTENT = ("application/json", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "")


def test_requests(place: Place, table: Table) -> None:
    """Over HTTP: bodies of every kind to every route. Nothing answers 5xx, but for a wait that took too long."""
    http = place.gateway.http
    bodies = st.one_of(configs().map(dump), mutated(dump(GOOD)), junk.map(dump), st.binary(max_size=100), st.just(HUGE),
                       st.integers(10, 50_000).map(lambda n: b"[" * n))  # fmt: skip
    ids = place.good()

    @fuzz(INPUTS["requests"][FULL])
    @given(st.sampled_from(ROUTES), st.sampled_from(CONTENT), bodies)
    def run(route: str, kind: str, body: bytes) -> None:
        answer = http.post(route, content=body, headers={"Content-Type": kind} if kind else {})
        late = answer.status_code == 504 and "wait_timeout" in answer.text
        assert answer.status_code < 500 or late, f"{route} {kind} {body[:200]!r}: {answer.status_code} {answer.text}"
        place.answers[f"{answer.status_code // 100}xx" if not late else "late"] += 1
        if answer.status_code >= 400 and not late:
            assert len(answer.text) < 4000
            json.loads(answer.text)

    run()
    assert place.answers["4xx"] > INPUTS["requests"][FULL] / 2
    place.check([*ids, *place.good()], table, "requests", place.answers.total())


def _bad_lines(count: int, number: int) -> list[bytes]:
    found: list[bytes] = []

    @fuzz(count)
    @given(lines(number))
    def collect(line: bytes) -> None:
        found.append(line)

    collect()
    return found


def test_lines_of_manifests(place: Place, table: Table, tmp_path: Path) -> None:
    """Hundreds of bad lines in a file: each is reported by its number, and the good ones between them are all made."""
    every, tried, ids = 100, 0, place.good()
    for number in range(0, INPUTS["lines"][FULL], every):
        found = _bad_lines(every, number)
        tried += len(found)
        for position in range(5):
            good = {**GOOD, "custom_id": f"good-{position}", "seed": number * 10 + position}
            found.insert(position * len(found) // 5, dump(good))
        manifest = tmp_path / f"{number}.jsonl"
        manifest.write_bytes(b"\n".join(found) + b"\n")
        batch = place.site.client.batches.submit(manifest)
        record = batch.wait(timeout=120)
        results = Counter(result["custom_id"] for result in batch.results())
        assert [results[f"good-{position}"] for position in range(5)] == [1] * 5
        reported = [error["line"] for error in batch.errors()]
        assert len(reported) == len(set(reported))
        counts = record.counts
        assert counts.succeeded + len(reported) == counts.total
        place.answers["refused"] += len(reported)
        place.answers["accepted"] += counts.succeeded - 5
    assert place.answers["refused"] > tried / 2
    place.check([*ids, *place.good()], table, "manifest lines", tried)


def test_uploads(place: Place, table: Table) -> None:
    """Refused, or stored as a plain PNG without a word of metadata."""
    client = place.site.client
    ids = place.good()

    @fuzz(INPUTS["uploads"][FULL])
    @given(uploads)
    def run(data: bytes) -> None:
        refused = None
        try:
            client.upload(data)
        except InvalidRequest as error:
            refused = error
        place.answers["refused" if refused else "stored"] += 1
        assert refused is None or refused.remedy

    run()
    assert min(place.answers["refused"], place.answers["stored"]) > 0
    for key in place.site.storage.list("uploads/"):
        stored = place.site.storage.get(key)
        assert stored.startswith(b"\x89PNG")
        assert not any(word in stored for word in (b"eXIf", b"tEXt", b"iTXt", b"zTXt", b"iCCP"))
    place.check([*ids, *place.good()], table, "uploads", place.answers.total())


def test_celery_messages(place: Place, table: Table) -> None:
    """Among them good jobs, on every queue of the worker: one process does them all."""
    site, ids = place.site, place.good()
    pid = place.worker.pid
    with Redis.from_url(str(site.settings.redis_url)) as redis:
        names = [f"{site.settings.key_prefix}tiny.{lane}" for lane in ("interactive", "bulk")]

        @fuzz(INPUTS["messages"][FULL])
        @given(st.sampled_from(names), messages("tiny.bulk"))
        def run(name: str, data: bytes) -> None:
            redis.lpush(name, data)
            place.answers["sent"] += 1
            if place.answers["sent"] % 50 == 0:
                ids.extend(place.good(1))

        run()
        until(lambda: sum(redis.llen(name) for name in names) == 0, 120)
    place.check([*ids, *place.good()], table, "messages", place.answers["sent"])
    assert place.worker.pid == pid
