"""Calotype's own HTTP API against a running gateway, worker, Valkey and S3."""

from __future__ import annotations

import io
import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from PIL import Image

from calotype.api_keys import Scope
from calotype.cli.exit_codes import ExitCode
from calotype.embedded import EmbeddedServers
from calotype.gateway.settings import GatewaySettings
from calotype_shared.errors import SettingsError
from tests.faults.harness import Forge
from tests.integration.conftest import until
from tests.integration.gateway import Gateway, serving
from tests.models import sample_image

FAST = {"prompt": "a cat", "model": "tiny", "num_inference_steps": 3, "guidance_scale": 1}
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def gateway(
    servers: EmbeddedServers, forge: Forge, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Gateway]:
    with serving(servers, forge, tmp_path_factory.mktemp("gateway"), f"tiny={tiny_model}") as gateway:
        yield gateway


@pytest.fixture(scope="module")
def guarded(servers: EmbeddedServers, gateway: Gateway) -> Iterator[Gateway]:
    """The same queue behind a gateway that wants keys."""
    guarded = Gateway(gateway.settings, auth="keys", max_body_bytes=2048)
    yield guarded
    guarded.stop()


def png(image: np.ndarray | Image.Image) -> bytes:
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, "PNG")
    return buffer.getvalue()


def events(response: httpx2.Response) -> list[tuple[str, Any]]:
    found = []
    for block in response.text.strip().split("\n\n"):
        if not block.startswith(":"):
            name, data = block.split("\n")
            found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


def test_a_job_from_request_to_image(gateway: Gateway) -> None:
    """Submitted, followed, fetched; links work without keys."""
    made = gateway.http.post("/v1/jobs", json={**FAST, "metadata": {"order": 7}})
    assert made.status_code == 202
    job = made.json()
    assert made.headers["location"] == f"/v1/jobs/{job['id']}"
    assert job["state"] in ("queued", "running")  # a worker may be quicker than the answer
    assert (job["config"]["seed"] >= 0, job["metadata"]) == (True, {"order": 7})
    until(lambda: gateway.http.get(f"/v1/jobs/{job['id']}").json()["state"] == "succeeded")
    done = gateway.http.get(f"/v1/jobs/{job['id']}").json()
    assert done["progress"] == 1.0
    [url] = done["urls"]
    assert Image.open(io.BytesIO(httpx2.get(url).content)).size == (64, 64)
    redirect = gateway.http.get(f"/v1/jobs/{job['id']}/images/0")
    assert redirect.status_code == 307
    assert httpx2.get(redirect.headers["location"]).content == httpx2.get(url).content
    assert gateway.http.get(f"/v1/jobs/{job['id']}/images/1").status_code == 404


def test_waiting_and_once_only(gateway: Gateway) -> None:
    """`Prefer: wait` answers with the finished job; an idempotency key makes it happen once."""
    headers = {"prefer": "wait=30", "idempotency-key": "order-1"}
    first = gateway.http.post("/v1/jobs", json=FAST, headers=headers)
    assert (first.status_code, first.json()["state"]) == (200, "succeeded")
    again = gateway.http.post("/v1/jobs", json=FAST, headers=headers)
    assert again.json()["id"] == first.json()["id"]
    other = gateway.http.post("/v1/jobs", json={**FAST, "prompt": "a dog"}, headers=headers)
    assert other.status_code == 409
    assert other.headers["content-type"] == "application/problem+json"
    assert other.json()["code"] == "idempotency_conflict"


def test_events_tell_of_states_steps_and_previews(gateway: Gateway) -> None:
    """In order, and the last one is the finished job."""
    body = {**FAST, "num_inference_steps": 200, "preview_every": 40, "sampler": "ddim"}
    job = gateway.http.post("/v1/jobs", json=body).json()
    reported = events(gateway.http.get(f"/v1/jobs/{job['id']}/events"))
    names = [name for name, _ in reported]
    assert names[-1] == "done"
    assert {"state", "progress", "preview", "done"} <= set(names)
    assert [data["state"] for name, data in reported if name == "state"][-1] == "succeeded"
    steps = [data["step"] for name, data in reported if name == "progress"]
    assert steps == sorted(steps)
    assert reported[-1][1]["urls"]
    assert gateway.http.get("/v1/jobs/nothing/events").status_code == 404


def test_cancelling(gateway: Gateway) -> None:
    """A running job ends at once; a final one stays as it is."""
    job = gateway.http.post("/v1/jobs", json={**FAST, "num_inference_steps": 900, "sampler": "ddim"}).json()
    answer = gateway.http.post(f"/v1/jobs/{job['id']}/cancel")
    assert answer.json() == {"id": job["id"], "state": "cancelled"}
    assert gateway.http.post(f"/v1/jobs/{job['id']}/cancel").json()["state"] == "cancelled"
    assert gateway.http.post("/v1/jobs/nothing/cancel").status_code == 404


def test_pages_of_jobs(gateway: Gateway) -> None:
    """Newest first, each once."""
    ids = [gateway.http.post("/v1/jobs", json=FAST).json()["id"] for _ in range(3)]
    page = gateway.http.get("/v1/jobs", params={"limit": 2}).json()
    assert [job["id"] for job in page["data"]] == ids[:0:-1]
    assert page["has_more"]
    following = gateway.http.get("/v1/jobs", params={"limit": 2, "after": page["next"]}).json()
    assert following["data"][0]["id"] == ids[0]
    long = {**FAST, "num_inference_steps": 900, "sampler": "ddim"}
    cancelled = gateway.http.post("/v1/jobs", json=long).json()["id"]
    gateway.http.post(f"/v1/jobs/{cancelled}/cancel")
    found = gateway.http.get("/v1/jobs", params={"state": "cancelled"}).json()["data"]
    assert found[0]["id"] == cancelled
    assert {job["state"] for job in found} == {"cancelled"}


@pytest.mark.parametrize("way", ["through", "form", "presigned"])
def test_images_go_in_both_ways(gateway: Gateway, way: str) -> None:
    """Through the gateway, or straight into storage; the same image is the same upload."""
    data = png(sample_image(4))
    if way == "through":
        answer = gateway.http.post("/v1/uploads", content=data, headers={"content-type": "image/png"})
        clear = Image.new("RGBA", (64, 64), (255, 255, 255, 0))
        mask = gateway.http.post("/v1/uploads?kind=mask", content=png(clear), headers={"content-type": "image/png"})
        assert mask.json()["id"] == gateway.client.upload(clear, field="mask_image") != gateway.client.upload(clear)
    elif way == "form":
        answer = gateway.http.post("/v1/uploads", files={"image": data})
        wrong = gateway.http.post("/v1/uploads", files={"photo": data})
        assert (wrong.status_code, wrong.json()["field"]) == (400, "image")
    else:
        link = gateway.http.post("/v1/uploads/presigned").json()
        early = gateway.http.post("/v1/uploads/complete", json={"token": link["token"]})
        assert early.status_code == 404
        assert httpx2.put(link["url"], content=data).status_code == 200
        answer = gateway.http.post("/v1/uploads/complete", json={"token": link["token"]})
    assert answer.status_code == 201
    upload = answer.json()["id"]
    assert answer.json() == {"id": gateway.client.upload(data), "width": 64, "height": 64}
    body = {**FAST, "init_image": upload, "strength": 0}
    [url] = gateway.http.post("/v1/jobs", json=body, headers={"prefer": "wait=30"}).json()["urls"]
    shown = np.asarray(Image.open(io.BytesIO(httpx2.get(url).content)))
    assert np.array_equal(shown, sample_image(4)), "strength 0 gives the source back"
    broken = gateway.http.post("/v1/uploads", content=b"GIF89a", headers={"content-type": "image/png"})
    assert (broken.status_code, "is not a readable image" in broken.text) == (400, True)


def test_bad_requests_say_what_and_what_to_do(gateway: Gateway) -> None:
    """As problems, with the field, the value and the remedy."""
    for body, status, field, remedy in (
        ({**FAST, "width": 60}, 400, "width", "56 or 64"),
        ({**FAST, "sampler": "magic"}, 400, "sampler", "euler"),
        ({**FAST, "color": "red"}, 400, "color", "remove it"),
        ({**FAST, "model": "unheard-of"}, 404, "model", "tiny"),
        ({**FAST, "webhook_url": "https://example.com"}, 400, "webhook_url", "CALOTYPE_WEBHOOK_SECRET"),
        ({"model": "tiny"}, 400, "prompt", "give it"),
        ({**FAST, "lane": "fast"}, 400, "lane", "'interactive' or 'bulk'"),
        ({**FAST, "\ud800": 1}, 400, "body", "one JSON object"),
    ):
        answer = gateway.http.post("/v1/jobs", content=json.dumps(body), headers=JSON)
        problem = answer.json()
        assert (answer.status_code, problem["field"]) == (status, field), problem
        assert remedy in problem["remedy"]
        assert problem["status"] == status
    for content, headers in ((b"{", JSON), (b"[]", JSON), (b"{}", {})):
        broken = gateway.http.post("/v1/jobs", content=content, headers=headers)
        assert (broken.status_code, broken.json()["field"]) == (400, "body")
        assert "one JSON object" in broken.json()["remedy"]
    for query, remedy in ({"after": "x"}, "`next`"), ({"state": "lost"}, "'queued'"), ({"limit": 101}, "at most 100"):
        assert remedy in gateway.http.get("/v1/jobs", params=query).json()["remedy"]
    assert gateway.http.get("/v1/nothing").json()["code"] == "not_found"
    assert gateway.http.delete("/v1/jobs").status_code == 405


def test_metadata_that_no_answer_could_show_is_refused(gateway: Gateway) -> None:
    """Once stored, one such job would break every list that it is in."""
    deep: dict[str, Any] = {}
    for _ in range(300):
        deep = {"in": deep}
    refused = [({"a": float("nan")}, "body"), ({"a": float("inf")}, "body"), ({"a": "\ud800"}, "body"), (deep, "body")]
    for metadata, field in (*refused, ({"a": "x" * 20_000}, "metadata")):
        answer = gateway.http.post("/v1/jobs", content=json.dumps({**FAST, "metadata": metadata}), headers=JSON)
        assert (answer.status_code, answer.json()["field"]) == (400, field), answer.text


def test_health(gateway: Gateway) -> None:
    """The process, and what it needs."""
    assert gateway.http.get("/healthz").json() == {"status": "ok"}
    assert gateway.http.get("/readyz").json() == {"status": "ok"}
    assert gateway.http.get("/v1/queues").json()["counts"]["succeeded"] >= 0
    assert [worker["model"] for worker in gateway.http.get("/v1/workers").json()] == ["tiny"]


def test_keys_separate_tenants_and_scopes(guarded: Gateway) -> None:
    """Nobody gets in without one; another tenant's job is not there; a key does only what it may."""
    keys = guarded.app.state.services.keys
    ours, _ = keys.create(name="ours", tenant="acme", scopes=list(Scope))
    theirs, _ = keys.create(name="theirs", tenant="other")
    reader, _ = keys.create(name="reader", tenant="acme", scopes=[Scope.JOBS_READ])
    for headers in ({}, {"authorization": "Bearer ct_wrong"}, {"authorization": "Basic Og=="}):
        answer = guarded.http.get("/v1/jobs", headers=headers)
        assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")

    def ask(token: str, method: str, path: str, **options: Any) -> httpx2.Response:
        return guarded.http.request(method, path, headers={"authorization": f"Bearer {token}"}, **options)

    job = ask(ours, "POST", "/v1/jobs", json=FAST).json()
    assert job["tenant"] == "acme"
    assert guarded.http.get(f"/v1/jobs/{job['id']}", headers={"x-api-key": reader}).status_code == 200
    for method, path in (("GET", ""), ("GET", "/events"), ("POST", "/cancel"), ("GET", "/images/0")):
        assert ask(theirs, method, f"/v1/jobs/{job['id']}{path}").status_code == 404
    assert ask(theirs, "GET", "/v1/jobs").json()["data"] == []
    assert ask(reader, "POST", "/v1/jobs", json=FAST).status_code == 403
    assert ask(theirs, "GET", "/v1/queues").status_code == 403
    assert ask(ours, "GET", "/v1/queues").status_code == 200


def test_limits_of_keys_and_bodies(guarded: Gateway) -> None:
    """Too many requests, too many images, too long a body: refused with what to do."""
    keys = guarded.app.state.services.keys
    few, _ = keys.create(name="few", requests_per_minute=3)
    answers = [guarded.http.get("/v1/jobs", headers={"x-api-key": few}) for _ in range(5)]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 429, 429]
    assert 0 < int(answers[-1].headers["retry-after"]) <= 60
    small, _ = keys.create(name="small", images_per_day=2)
    asked = [
        guarded.http.post("/v1/jobs", json={**FAST, "num_images": n}, headers={"x-api-key": small}) for n in (2, 1)
    ]
    assert [answer.status_code for answer in asked] == [202, 429]
    other, _ = keys.create(name="other", images_per_day=1)
    for asked_for, status in (({**FAST, "width": 60}, 400), ({**FAST, "sampler": "none"}, 400), (FAST, 202)):
        answer = guarded.http.post("/v1/jobs", json=asked_for, headers={"x-api-key": other})
        assert answer.status_code == status, "what is refused takes nothing"
    batch = {"input_file_id": "file-x"}
    assert guarded.http.post("/v1/batches", json=batch, headers={"x-api-key": other}).status_code == 403

    def chunks() -> Iterator[bytes]:
        for _ in range(100):
            yield b"x" * 1000

    large, _ = keys.create(name="large")
    for body in (b"x" * 4000, chunks()):
        answer = guarded.http.post("/v1/jobs", content=body, headers={"x-api-key": large})
        assert (answer.status_code, answer.json()["code"]) == (413, "too_large")


def test_without_keys_only_this_machine_gets_in(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a page of a strange site nor a name that was bent to this address."""
    for host in ("evil.example", "[", "127.0.0.1.evil.example", "localhost@evil.example"):
        assert gateway.http.get("/v1/jobs", headers={"host": host}).status_code == 403
    for origin in ("https://evil.example", "null", "http://["):
        assert gateway.http.post("/v1/jobs", json=FAST, headers={"origin": origin}).status_code == 403
    assert gateway.http.get("/v1/jobs", headers={"origin": gateway.url}).status_code == 200
    with pytest.raises(SettingsError, match="auth can be off only where host is a loopback address"):
        GatewaySettings.load(host="0.0.0.0", auth="off")
    assert GatewaySettings.load(host="0.0.0.0").needs_key
    monkeypatch.setenv("CALOTYPE_GATEWAY_ALLOWED_HOSTS", "Draw.internal, draw")
    assert GatewaySettings.load().allowed_hosts == {"draw.internal", "draw"}


def test_the_command_serves_until_it_is_told_to_stop(environment: dict[str, str]) -> None:
    """It says where it is; a second one on its port says why not; SIGTERM ends it well."""
    command = [sys.executable, "-m", "calotype", "gateway", "--port"]
    with subprocess.Popen([*command, "0"], env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        found = re.search(
            r"gateway listens on (http://127\.0\.0\.1:(\d+)); requests need no API key", process.stderr.readline()
        )
        assert found is not None
        assert httpx2.get(f"{found[1]}/readyz").status_code == 200
        taken = subprocess.run([*command, found[2]], env=environment, capture_output=True, text=True, check=False)
        assert (taken.returncode, "Address already in use" in taken.stderr) == (ExitCode.UNAVAILABLE, True)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=120) == 0
        assert process.stderr.read().endswith("stopped\n")
