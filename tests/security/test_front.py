"""The gateway's front: bodies are read for those who may send them, within bounds; nothing malformed is a bug."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from contextlib import closing

import pytest
from PIL import Image
from redis import Redis

from calotype.api_keys import Scope
from calotype.gateway import front, server
from calotype_shared.settings import Settings
from tests.faults.proxy import Proxy
from tests.integration.gateway import Gateway
from tests.security.conftest import Connection, until

Key = Callable[..., dict[str, str]]
JSON = {"content-type": "application/json"}
CONFIG = {"prompt": "a cat", "model": "demo", "num_inference_steps": 3}


# ---- who asks is known before the body


@pytest.mark.parametrize("path", ["/v1/jobs", "/v1/files", "/v1/uploads", "/sdapi/v1/txt2img", "/v1/images/edits"])
def test_strangers_are_refused_by_the_head_of_their_request(guarded: Gateway, path: str) -> None:
    """E2 and E4: the answer comes although no byte of the body does."""
    with Connection(guarded) as stranger:
        stranger.head("POST", path, {"content-length": "60000000", "content-type": "multipart/form-data; boundary=x"})
        assert stranger.answer().startswith(b"HTTP/1.1 401 ")


def test_a_key_without_the_scope_is_refused_by_the_head(guarded: Gateway, key: Key) -> None:
    with Connection(guarded) as reader:
        reader.head("POST", "/v1/files", {"content-length": "60000000", **key("a", scopes=[Scope.JOBS_READ])})
        assert reader.answer().startswith(b"HTTP/1.1 403 ")


def test_json_is_bounded_in_bytes_and_in_values(guarded: Gateway, key: Key) -> None:
    """E2: what has no images in it is small; what is small is not expensive either."""
    headers = {**JSON, **key("a")}
    large = json.dumps({**CONFIG, "metadata": {"a": "x" * 2_000_000}})
    assert guarded.http.post("/v1/jobs", content=large, headers=headers).status_code == 413
    many = json.dumps({**CONFIG, "metadata": {"a": [{}] * 200_000}})
    answer = guarded.http.post("/v1/jobs", content=many, headers=headers)
    assert (answer.status_code, "more than 20000 values" in answer.text) == (400, True)


# ---- waiting


def test_only_requests_that_have_arrived_count_as_waiting(guarded: Gateway, key: Key) -> None:
    """E3: heads without bodies hold no place, and a tenant holds at most its share."""
    ours, theirs = key("a"), key("b")
    body = json.dumps(CONFIG).encode()
    opened = [Connection(guarded) for _ in range(40)]
    try:
        for number, connection in enumerate(opened):
            connection.head("POST", "/v1/images/generations", {"content-length": "100", **(ours if number % 2 else {})})
        waiting = [Connection(guarded) for _ in range(2)]
        opened += waiting
        for connection in waiting:
            connection.head("POST", "/v1/images/generations", {"content-length": str(len(body)), **JSON, **ours})
            connection.send(body)
        until(lambda: len(guarded.client.jobs(tenant="a")) == 2)
        answer = guarded.http.post("/v1/images/generations", json=CONFIG, headers=ours)
        assert (answer.status_code, "of one tenant" in answer.text) == (429, True)
        assert len(guarded.client.jobs(tenant="a")) == 2, "what was refused was queued"
        for connection in waiting:  # E14: who hangs up frees the place
            connection.socket.close()
        until(lambda: all(job.state.final for job in guarded.client.jobs(tenant="a")))
        third = guarded.http.post("/v1/jobs", json=CONFIG, headers={**theirs, "prefer": "wait=1"})
        assert third.status_code == 202
    finally:
        for connection in opened:
            connection.socket.close()


def test_prefer_wait_ends_with_its_client(guarded: Gateway, key: Key) -> None:
    """E14: the job goes on, but its place is free."""
    ours = key("hangs-up")
    body = json.dumps(CONFIG).encode()
    waiting = guarded.app.state.front._waiting._held
    for count in range(4):  # more than a tenant's places
        with Connection(guarded) as client:
            client.head("POST", "/v1/jobs", {"content-length": str(len(body)), "prefer": "wait=50", **JSON, **ours})
            client.send(body)
            until(lambda count=count: len(guarded.client.jobs(tenant="hangs-up")) > count)  # type: ignore[misc]
        until(lambda: "hangs-up" not in waiting)
    assert {job.state.value for job in guarded.client.jobs(tenant="hangs-up")} == {"queued"}


# ---- time


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "HEAD_SECONDS", 0.3)
    monkeypatch.setattr(server, "DRAIN_SECONDS", 0.3)
    monkeypatch.setattr(front, "_BODY_SECONDS", 0.3)


@pytest.mark.usefixtures("hasty")
def test_slow_heads_and_bodies_end(guarded: Gateway, key: Key) -> None:
    """E3: a connection costs something only for seconds. Also one that was answered, and sends on."""
    with Connection(guarded) as silent, Connection(guarded) as slow, Connection(guarded) as late:
        slow.send(b"GET /healthz HTTP/1.1\r\nx: ")
        late.head("POST", "/v1/jobs", {"content-length": "100", **JSON, **key("a")})
        late.send(b"{")
        assert silent.answer() == b""
        assert slow.answer().startswith(b"HTTP/1.1 400 ")
        assert late.answer().startswith(b"HTTP/1.1 408 ")
    with Connection(guarded) as refused:
        refused.head("POST", "/v1/files", {"content-length": "60000000"})
        assert refused.answer().startswith(b"HTTP/1.1 401 ")
        assert refused.answer() == b"", "the connection stays open for the rest of a refused body"
    with Connection(guarded) as refused:
        refused.head("POST", "/v1/files", {"content-length": "10"})
        assert refused.answer().startswith(b"HTTP/1.1 401 ")
        refused.send(b"0123456789")
        assert refused.answer() == b"", "the connection stays open after the rest of a refused body"


@pytest.mark.parametrize(
    "sent", [b"x: " + b"a" * 100_000, b"x: a\r\n" * 101, b"a" * 100_000], ids=["one", "many", "name"]
)
def test_heads_are_bounded(guarded: Gateway, sent: bytes) -> None:
    """E3: 100 headers of 1 MiB were accepted."""
    with Connection(guarded) as client:
        client.send(b"GET /healthz HTTP/1.1\r\n" + sent + b"\r\n\r\n")
        answer = client.answer()
        assert answer == b"" or answer.startswith(b"HTTP/1.1 400 ")
    assert guarded.http.get("/healthz").status_code == 200


# ---- malformed requests


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/sdapi/v1/txt2img", '{"prompt": "a", "s_tmax": Infinity}'),
        ("/sdapi/v1/txt2img", '{"prompt": "a", "s_tmax": 1e999}'),
        ("/sdapi/v1/txt2img", '{"prompt": "a", "styles": ["\\ud800"]}'),
        ("/sdapi/v1/txt2img", '{"prompt": "a", "alwayson_scripts": {"controlnet": 5}}'),
        ("/sdapi/v1/txt2img", '{"prompt": "a", "alwayson_scripts": {"controlnet": {"args": 5}}}'),
        ("/sdapi/v1/txt2img", '{"prompt": "a", "alwayson_scripts": {"controlnet": {"args": {"a": 1}}}}'),
        ("/sdapi/v1/txt2img", '{"prompt": "a", "styles": ' + "[" * 80 + "]" * 80 + "}"),
        ("/sdapi/v1/txt2img", '{"prompt": "a", "styles": ' + "[" * 15_000),
        ("/v1/jobs", '{"prompt": "a", "seed": ' + "9" * 5_000 + "}"),
        ("/v1/jobs", b'{"prompt": "\xff"}'),
        ("/v1/jobs", '{"prompt": "a"}'.encode("utf-16")),
        ("/v1/images/generations", '{"prompt": ["a"], "n": {}, "size": 5, "quality": []}'),
    ],
)
def test_malformed_json_is_refused_before_anything_is_queued(
    guarded: Gateway, key: Key, path: str, body: str | bytes
) -> None:
    """E11 and E12."""
    before = len(guarded.client.jobs(tenant="malformed"))
    answer = guarded.http.post(path, content=body, headers={**JSON, **key("malformed")})
    assert 400 <= answer.status_code < 500, answer.text
    assert len(guarded.client.jobs(tenant="malformed")) == before


def test_malformed_forms_and_credentials_are_refused(guarded: Gateway, key: Key) -> None:
    """E12."""
    with Connection(guarded) as client:
        client.head("GET", "/v1/jobs", {"authorization": "Basic \xff"})
        assert client.answer().startswith(b"HTTP/1.1 401 ")
    deep = {"prompt": "a", "n": "[" * 100_000}
    answer = guarded.http.post("/v1/images/edits", data=deep, files={"image": png()}, headers=key("forms"))
    assert answer.status_code == 400


# ---- one slow service does not slow the others


def test_a_storage_that_hangs_delays_only_what_needs_it(corner: Settings) -> None:
    """E6: more uploads than storage has threads, and a list beside them that a default pool would hold up."""
    with closing(Proxy.before(str(corner.s3_endpoint_url))) as proxy:
        settings = corner.model_copy(update={"s3_endpoint_url": proxy.url(str(corner.s3_endpoint_url))})
        gateway = Gateway(settings, auth="off", dispatch=False, max_uploads_per_tenant=64)
        image = png()
        uploads = [Connection(gateway) for _ in range(45)]
        try:
            proxy.set("swallow")
            for upload in uploads:
                upload.head("POST", "/v1/uploads", {"content-type": "image/png", "content-length": str(len(image))})
                upload.send(image)
            in_storage = gateway.app.state.services.in_storage
            until(lambda: in_storage._admitted.statistics().borrowed_tokens == 32)
            for _ in range(3):
                assert gateway.http.get("/v1/jobs", timeout=5).status_code == 200
        finally:
            proxy.set("cut")
            for upload in uploads:
                upload.socket.close()
            gateway.stop()


# ---- what strangers learn


def test_strangers_learn_no_addresses_and_no_names(corner: Settings, key: Key, guarded: Gateway) -> None:
    """E19: not from probes, not from errors, and not from whoever worked on a job."""
    lost = Gateway(corner.model_copy(update={"redis_url": "redis://127.0.0.1:1"}), auth="keys", dispatch=False)
    try:
        probe = lost.http.get("/readyz")
        assert (probe.status_code, "127.0.0.1" in probe.text) == (503, False), probe.text
        assert "the queue cannot be used" in probe.json()["detail"]
    finally:
        lost.stop()
    job = guarded.http.post("/v1/jobs", json=CONFIG, headers=key("names")).json()["id"]
    with Redis.from_url(corner.redis_url) as redis:
        history = [
            {"attempt": 1, "worker": "host-4711", "started_at": 1.0, "ended_at": 2.0, "how": "lost", "error": None}
        ]
        mapping = {"worker": "host-4711", "history": json.dumps(history)}
        redis.hset(f"{corner.key_prefix}job:{job}", mapping=mapping)
    reader = key("names", scopes=[Scope.JOBS_READ])
    seen = guarded.http.get(f"/v1/jobs/{job}", headers=reader).json()
    assert seen["worker"] == seen["history"][0]["worker"]
    assert re.fullmatch(r"worker-[0-9a-f]{8}", seen["worker"])
    assert guarded.http.get(f"/v1/jobs/{job}", headers=key("names")).json()["worker"] == "host-4711"


# ---- quotas


def test_a_repeated_request_is_charged_once(guarded: Gateway, key: Key) -> None:
    """E13: also when nothing is left of the quota."""
    ours = {**key("quota", images_per_day=2), "idempotency-key": "same"}
    jobs = [guarded.http.post("/v1/jobs", json=CONFIG, headers=ours) for _ in range(5)]
    assert {answer.status_code for answer in jobs} == {202}
    assert len({answer.json()["id"] for answer in jobs}) == 1
    assert guarded.http.post("/v1/jobs", json=CONFIG, headers={**ours, "idempotency-key": "other"}).status_code == 202
    assert guarded.http.post("/v1/jobs", json=CONFIG, headers={**ours, "idempotency-key": "third"}).status_code == 429
    assert guarded.http.post("/v1/jobs", json=CONFIG, headers=ours).status_code == 202


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, "PNG")
    return buffer.getvalue()
