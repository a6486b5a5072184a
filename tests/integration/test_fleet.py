"""What the gateway tells those who watch: queues, workers and their rows, dead jobs; to each tenant its own."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator

import httpx2
import pytest

from calotype.api_keys import Scope
from calotype.embedded import EmbeddedServers
from calotype.gateway.web_ui import web_files
from calotype_shared.queue.job_store import JobStore
from calotype_shared.schema.enums import Lane
from calotype_shared.schema.jobs import JobError
from calotype_shared.schema.worker_info import StepGroup, StepRow, WorkerInfo
from calotype_shared.storage.layout import sidecar_of
from tests.integration.gateway import Gateway, own_settings
from tests.integration.test_fair_share import CARD
from tests.simulated import image_of


@pytest.fixture(scope="module")
def gateway(servers: EmbeddedServers) -> Iterator[Gateway]:
    gateway = Gateway(own_settings(servers), auth="keys", dispatch=False)
    gateway.client._store.announce_model(CARD)
    yield gateway
    gateway.stop()


@pytest.fixture
def store(gateway: Gateway) -> JobStore:
    return gateway.client._store


def key(gateway: Gateway, tenant: str, *scopes: Scope) -> dict[str, str]:
    """The headers of a key."""
    options = {"scopes": frozenset(scopes)} if scopes else {}
    token, _ = gateway.app.state.services.keys.create(name="test", tenant=tenant, **options)
    return {"Authorization": f"Bearer {token}"}


def fail(gateway: Gateway, store: JobStore, tenant: str) -> str:
    job = gateway.client.submit("x", lane=Lane.BULK, num_inference_steps=5, tenant=tenant)
    claim = store.claim("demo.bulk", worker="w", lease_seconds=30)
    assert claim is not None
    assert claim.job_id == job.id
    store.fail(claim, JobError(code="bad", message="it cannot be done"), retry=False)
    return job.id


def test_a_tenant_sees_its_own_rows_and_that_there_are_others(gateway: Gateway, store: JobStore) -> None:
    """Another's have no id and no prompt; counts over all tenants are for who may administer."""
    own, other = (gateway.client.submit(f"of {name}", tenant=name, lane=Lane.BULK) for name in ("acme", "rival"))
    rows = tuple(
        StepRow(job=job, image=n, step=3, total_steps=50, guided=True)
        for n, job in enumerate((own.id, other.id, "0" * 26))
    )
    group = StepGroup(model="demo", width=128, height=128, budget=32, running=3, waiting=1, decoding=0, rows=rows)
    worker = {"name": "w", "model": "demo", "device": "cpu", "host": "secret-host", "pid": 1, "version": "0"}
    store.announce_worker(WorkerInfo(**worker, started_at=1.0, groups=(group,)), ttl_seconds=30)
    found = gateway.http.get("/v1/fleet", headers=key(gateway, "acme"))
    fleet = found.json()
    [shown] = fleet["workers"][0]["groups"]
    nobody = {"job": None, "image": None, "prompt": None, "step": 3, "total_steps": 50, "guided": True}
    assert shown["rows"] == [{**nobody, "job": own.id, "image": 0, "prompt": "of acme"}, nobody, nobody]
    assert (shown["budget"], shown["waiting"]) == (32, 1)
    for hidden in (other.id, "of rival", "secret-host"):
        assert hidden not in found.text
    assert fleet["counts"] is None
    admin = gateway.http.get("/v1/fleet", headers=key(gateway, "acme", Scope.JOBS_READ, Scope.ADMIN)).json()
    assert admin["counts"]["queued"] == 2
    [line] = fleet["queues"]
    assert (line["name"], line["lane"], line["models"], line["waiting"]) == ("demo.bulk", "bulk", ["demo"], 2)
    assert 0 <= line["oldest_wait_seconds"] <= time.time() - fleet["at"] + 30
    for job in (own, other):
        job.cancel()
    emptied = gateway.http.get("/v1/fleet", headers=key(gateway, "acme")).json()
    assert emptied["queues"][0]["oldest_wait_seconds"] is None
    assert gateway.http.get("/v1/fleet", headers=key(gateway, "acme", Scope.BATCHES)).status_code == 403


def test_the_oldest_wait_is_that_of_the_oldest(gateway: Gateway, store: JobStore) -> None:
    """Not of the job that is first in the queue, which fair share may have put before it."""
    first = gateway.client.submit("first", tenant="busy", num_inference_steps=900, lane=Lane.BULK)
    store.redis.hincrby(store.keys.job(first.id), "queued_at", -50_000_000)
    second = gateway.client.submit("second", tenant="quick", num_inference_steps=1, lane=Lane.BULK)
    line = store.redis.zrange(store.keys.waiting("demo.bulk"), 0, -1)
    assert line == [second.id, first.id]
    assert 50 <= store.oldest_waits()["demo.bulk"] < 80
    for job in (first, second):
        job.cancel()


def test_dead_jobs_are_tried_again_by_their_tenant_alone(gateway: Gateway, store: JobStore) -> None:
    """Listed, retried as a new job, dropped; another tenant learns nothing, and who may only read changes nothing."""
    mine, theirs = key(gateway, "acme"), key(gateway, "rival")
    first, second = (fail(gateway, store, "acme") for _ in range(2))
    page = gateway.http.get("/v1/dead?limit=1", headers=mine).json()
    assert ([job["id"] for job in page["data"]], page["has_more"]) == ([second], True)
    assert page["data"][0]["history"][0]["error"]["code"] == "bad"
    assert gateway.http.get("/v1/dead", headers=theirs).json() == {"data": [], "has_more": False}
    for method, path in (("POST", f"/v1/dead/{first}/retry"), ("DELETE", f"/v1/dead/{first}")):
        assert gateway.http.request(method, path, headers=theirs).status_code == 404
        assert gateway.http.request(method, path, headers=key(gateway, "acme", Scope.JOBS_READ)).status_code == 403
    retried = gateway.http.post(f"/v1/dead/{first}/retry", headers=mine).json()
    assert retried["retry_of"] == first
    assert gateway.client.status(retried["id"]).tenant == "acme"
    assert gateway.http.post(f"/v1/dead/{first}/retry", headers=mine).status_code == 404
    assert gateway.http.delete(f"/v1/dead/{second}", headers=mine).json() == {"id": second, "dropped": True}
    assert gateway.client.dead_jobs.list() == []
    gateway.client.cancel(retried["id"])


def test_where_an_image_comes_from(gateway: Gateway, store: JobStore) -> None:
    """What lies beside it in the storage; nothing for another tenant, and a clear word where it is gone."""
    job = gateway.client.submit("x", lane=Lane.BULK, num_inference_steps=5, tenant="acme")
    claim = store.claim("demo.bulk", worker="w", lease_seconds=30)
    assert claim is not None
    image = image_of(claim)
    store.commit(claim, images=[image], timings={})
    path, mine = f"/v1/jobs/{job.id}/images/0/provenance", key(gateway, "acme")
    assert "no image 0" in gateway.http.get(path, headers=mine).json()["detail"]
    reported = {"seed": 5, "config": {"prompt": "x"}}
    gateway.app.state.services.storage.put(sidecar_of(image.key), json.dumps(reported).encode(), "application/json")
    assert gateway.http.get(path, headers=mine).json() == reported
    assert gateway.http.get(path, headers=key(gateway, "rival")).status_code == 404
    assert gateway.http.get(path.replace("/0/", "/1/"), headers=mine).status_code == 404


def test_the_page_needs_nothing_from_elsewhere(gateway: Gateway) -> None:
    """Served without a key, as what it is; its files name no other address, and its policy allows none."""
    page = gateway.http.get("/")
    assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    policy = dict(part.split(" ", 1) for part in page.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert (policy["script-src"], policy["style-src"], policy["connect-src"]) == ("'self'", "'self'", "'self'")
    origin = str(gateway.settings.s3_endpoint_url)
    assert policy["img-src"].split() == ["'self'", "blob:", "data:", origin]
    assert "unsafe" not in page.headers["content-security-policy"]
    names = re.findall(r'(?:src|href)="(web/[^"]+)"', page.text)
    assert {"web/app.js", "web/style.css"} <= set(names)
    for name in names:
        assert gateway.http.get(f"/{name}").status_code == 200, name
    assert len(web_files()) > 8
    imported: set[str] = set()
    for name, file in web_files().items():
        addresses = set(re.findall(r"https?://[^\s\"'`]+", file.data.decode()))
        assert addresses <= {"http://www.w3.org/2000/svg"}, name
        imported |= set(re.findall(r'from "\./([^"]+)"', file.data.decode()))
    assert imported
    assert imported <= set(web_files())
    assert gateway.http.get("/web/../pyproject.toml").status_code == 404
    assert gateway.http.get("/web/none.js").status_code == 404


def test_a_file_that_is_known_is_not_sent_again(gateway: Gateway) -> None:
    """And never as anything but what it is."""
    first = gateway.http.get("/web/app.js")
    assert first.headers["content-type"] == "text/javascript; charset=utf-8"
    assert first.headers["x-content-type-options"] == "nosniff"
    again = gateway.http.get("/web/app.js", headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


def test_the_page_is_there_when_the_storage_has_no_keys(gateway: Gateway, servers: EmbeddedServers) -> None:
    """Only images are missing then."""
    settings = own_settings(servers).model_copy(update={"s3_access_key_id": None, "s3_secret_access_key": None})
    bare = Gateway(settings, dispatch=False)
    try:
        found = httpx2.get(bare.url)
        assert found.status_code == 200
        assert "img-src 'self' blob: data:;" in found.headers["content-security-policy"]
    finally:
        bare.stop()
