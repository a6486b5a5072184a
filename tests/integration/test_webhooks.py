"""Webhooks from a real Valkey to real HTTP servers: signed, retried, delivered once, and never to our own network."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import ssl
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from email.utils import formatdate
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx2
import pytest
from redis import Redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from standardwebhooks import Webhook, WebhookVerificationError

from calotype.webhooks import Deliverer, Hooks, describe_job, tenant_secret
from calotype.webhooks.deliverer import ATTEMPTS, backoff
from calotype_shared.errors import SettingsError
from calotype_shared.queue.job_store import JobStore
from calotype_shared.queue.keys import Keys
from calotype_shared.schema.jobs import ImageRef, JobError
from calotype_shared.schema.resolve import ResolvedConfig
from calotype_shared.settings import Settings
from calotype_shared.storage.s3 import Storage
from tests.integration.conftest import until

MASTER = "a master secret of the operator"
CONFIG = ResolvedConfig(prompt="a red circle", width=64, height=64, seed=1)


@dataclass(frozen=True)
class Message:
    path: str
    headers: dict[str, str]
    body: bytes

    def verified(self, tenant: str = "alice") -> Any:
        """Its content, if the public library finds the tenant's signature on it."""
        return Webhook(tenant_secret(MASTER, tenant)).verify(self.body, self.headers)


class Receiver:
    """A real HTTP server. `behave` answers each message; without it each gets an empty 204."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self.messages: list[Message] = []
        self.behave: Callable[[BaseHTTPRequestHandler], None] = partial(answer, status=204)
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                receiver.messages.append(Message(self.path, dict(self.headers), body))
                receiver.behave(self)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients that hang up are expected
        if tls is not None:
            self.server.socket = tls.wrap_socket(self.server.socket, server_side=True)
        self.port = self.server.server_port
        self.url = f"http://127.0.0.1:{self.port}/hooks?token=hush"
        self.released = threading.Event()
        self._thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    def hang(self) -> None:
        """Let messages wait from now on until `released`."""

        def behave(handler: BaseHTTPRequestHandler) -> None:
            self.released.wait(120)
            answer(handler, status=204)

        self.behave = behave

    def stop(self) -> None:
        self.released.set()
        self.server.shutdown()
        self.server.server_close()
        self._thread.join()


def answer(handler: BaseHTTPRequestHandler, *, status: int, **headers: str) -> None:
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()


@pytest.fixture
def receivers() -> Iterator[Callable[..., Receiver]]:
    """Starts receivers; all are stopped at the end."""
    started: list[Receiver] = []

    def start(tls: ssl.SSLContext | None = None) -> Receiver:
        started.append(Receiver(tls))
        return started[-1]

    yield start
    for receiver in started:
        receiver.stop()


@pytest.fixture
def receiver(receivers: Callable[..., Receiver]) -> Receiver:
    return receivers()


@dataclass
class Corner:
    """This test's corner of Redis: leaves deliveries there as the script that finishes a job does."""

    redis: Redis
    keys: Keys
    left: list[str] = field(default_factory=list)

    def leave(self, url: str, *, hook_id: str = "", tenant: str = "alice", attempts: int = 0) -> str:
        hook_id = hook_id or f"job-{len(self.left)}"
        at = "1767225600123456"  # 2026-01-01, in microseconds
        values: dict[Any, Any] = {
            "url": url,
            "type": "job.succeeded",
            "tenant": tenant,
            "at": at,
            "attempts": str(attempts),
        }
        self.redis.hset(self.keys.hook(hook_id), mapping=values)
        self.redis.pexpire(self.keys.hook(hook_id), 259_200_000)
        self.redis.zadd(self.keys.hooks, {hook_id: time.time() * 1000 - 1000 + len(self.left)})
        self.left.append(hook_id)
        return hook_id

    def due_in(self, hook_id: str) -> float:
        """Seconds until it is due."""
        due = self.redis.zscore(self.keys.hooks, hook_id)
        assert due is not None
        seconds, micros = self.redis.time()
        return float(due) / 1000 - seconds - micros / 1e6

    def make_due(self) -> None:
        """As if every pause and lease had just run out, without waiting."""
        for hook_id in self.redis.zrange(self.keys.hooks, 0, -1):
            self.redis.zadd(self.keys.hooks, {str(hook_id): 1})

    @property
    def empty(self) -> bool:
        return not self.redis.exists(self.keys.hooks) and not self.redis.keys(self.keys.hook("*"))


@pytest.fixture
def corner(redis: Redis, settings: Settings) -> Corner:
    return Corner(redis, Keys(settings.key_prefix))


@pytest.fixture
def deliverer(redis: Redis, settings: Settings) -> Callable[..., Deliverer]:
    """Makes deliverers that tell a job's id and, unless configured otherwise, may use this machine's own addresses."""

    def make(**options: Any) -> Deliverer:
        options = {"allow_private": True, "secret": MASTER, "describe": lambda _, hook_id: {"id": hook_id}, **options}
        return Deliverer(Hooks(redis, key_prefix=settings.key_prefix), **options)

    return make


@pytest.fixture
def running() -> Iterator[Callable[[Deliverer], threading.Event]]:
    """Runs deliverers in threads until the end of the test."""
    stop = threading.Event()
    threads: list[threading.Thread] = []

    def run(deliverer: Deliverer) -> threading.Event:
        threads.append(threading.Thread(target=deliverer.run, args=(stop,)))
        threads[-1].start()
        return stop

    yield run
    stop.set()
    for thread in threads:
        thread.join()


# ---- what is delivered


def test_a_finished_job_is_told(
    corner: Corner, deliverer: Callable[..., Deliverer], receiver: Receiver, store: JobStore, storage: Storage
) -> None:
    """The receiver learns all about a job, trusts the signature, and fetches the image by the link."""
    [job_id] = store.create([CONFIG], metadata={"order": "é1"}, tenant="alice")
    claim = store.claim("demo.bulk", worker="w", lease_seconds=20)
    assert claim is not None
    storage.put("a/1/0.png", b"image", "image/png")
    digest = hashlib.sha256(b"image").hexdigest()
    size = {"width": 64, "height": 64, "content_type": "image/png", "bytes": 7}
    store.commit(claim, images=[ImageRef(key="a/1/0.png", seed=5, sha256=digest, **size)], timings={})
    corner.leave(receiver.url, hook_id=job_id)

    assert deliverer(describe=describe_job(store, storage)).deliver_due() == 1
    [message] = receiver.messages
    reported = message.verified()
    link = reported["data"]["images"][0].pop("url")
    assert reported == {
        "type": "job.succeeded",
        "timestamp": "2026-01-01T00:00:00.123Z",
        "data": {
            "id": job_id,
            "state": "succeeded",
            "metadata": {"order": "é1"},
            "error": None,
            "images": [{"key": "a/1/0.png", "seed": 5, "sha256": digest}],
        },
    }
    assert httpx2.get(link).content == b"image"
    assert message.path == "/hooks?token=hush"
    assert message.headers["content-type"] == "application/json"
    assert corner.empty
    with pytest.raises(WebhookVerificationError, match="No matching signature"):
        message.verified("bob")


def test_a_failed_job_is_told_with_its_error(
    corner: Corner, deliverer: Callable[..., Deliverer], receiver: Receiver, store: JobStore, storage: Storage
) -> None:
    """No images, but the reason."""
    [job_id] = store.create([CONFIG], tenant="alice")
    claim = store.claim("demo.bulk", worker="w", lease_seconds=20)
    assert claim is not None
    store.fail(claim, JobError(code="broken", message="it broke"), retry=False)
    corner.leave(receiver.url, hook_id=job_id)
    deliverer(describe=describe_job(store, storage)).deliver_due()
    data = receiver.messages[0].verified()["data"]
    assert (data["state"], data["error"], data["images"]) == ("failed", {"code": "broken", "message": "it broke"}, [])


def test_what_is_no_more_is_not_told(
    corner: Corner, deliverer: Callable[..., Deliverer], receiver: Receiver, store: JobStore, storage: Storage
) -> None:
    """A job whose record has expired, and a delivery that has itself, are forgotten."""
    corner.leave(receiver.url)
    corner.redis.delete(corner.keys.hook(corner.leave(receiver.url)))
    assert deliverer(describe=describe_job(store, storage)).deliver_due() == 1
    assert corner.empty
    assert not receiver.messages


def test_a_weak_master_secret_is_refused(deliverer: Callable[..., Deliverer]) -> None:
    """At the start, and without repeating it."""
    with pytest.raises(SettingsError, match="4 characters") as refused:
        deliverer(secret="hush")
    assert "hush" not in str(refused.value)


# ---- when it fails


def test_a_failed_delivery_is_tried_again(
    corner: Corner, deliverer: Callable[..., Deliverer], receiver: Receiver
) -> None:
    """After a pause, under the same id, with a time and a signature of its own."""
    now = time.time()
    clock = iter([now, now + 7])
    one = deliverer(clock=lambda: next(clock))
    receiver.behave = partial(answer, status=500)
    hook_id = corner.leave(receiver.url)
    assert one.deliver_due() == 1
    assert 2 < corner.due_in(hook_id) < 8
    assert one.deliver_due() == 0, "it waits for its time"

    receiver.behave = partial(answer, status=202)
    corner.make_due()
    assert one.deliver_due() == 1
    first, second = receiver.messages
    assert first.verified() == second.verified() == json.loads(first.body)
    assert first.headers["webhook-id"] == second.headers["webhook-id"] == f"msg_{hook_id}"
    assert int(second.headers["webhook-timestamp"]) - int(first.headers["webhook-timestamp"]) == 7
    assert corner.empty


@pytest.mark.parametrize(
    ("retry_after", "least", "most"),
    [
        ("1800", 1_790, 1_800),
        ("in half an hour", 1_700, 1_800),
        ("9" * 400, 3_590, 3_600),
        (formatdate(0, usegmt=True), 2, 8),
        ("soon", 2, 8),
    ],
)
def test_a_receiver_may_ask_for_a_pause(
    corner: Corner, deliverer: Callable[..., Deliverer], receiver: Receiver, retry_after: str, least: int, most: int
) -> None:
    """In seconds or as a date, up to an hour; what makes no sense is not heard."""
    if retry_after == "in half an hour":
        retry_after = formatdate(time.time() + 1_800, usegmt=True)
    receiver.behave = partial(answer, status=503, Retry_After=retry_after)
    hook_id = corner.leave(receiver.url)
    deliverer().deliver_due()
    assert least < corner.due_in(hook_id) < most


def test_pauses_grow_to_hours() -> None:
    """From seconds to hours, never the same for all that failed together."""
    assert 2.5 <= backoff(1) <= 7.5
    assert 2 * 3_600 <= backoff(ATTEMPTS - 1) <= 9 * 3_600
    assert len({backoff(3) for _ in range(20)}) > 1


@pytest.mark.parametrize(("status", "attempts"), [(500, ATTEMPTS - 1), (410, 0)])
def test_it_gives_up_with_one_warning(
    corner: Corner,
    deliverer: Callable[..., Deliverer],
    receiver: Receiver,
    caplog: pytest.LogCaptureFixture,
    status: int,
    attempts: int,
) -> None:
    """After the last attempt, or at once if the receiver wants no more. The log keeps the address' secrets."""
    caplog.set_level(logging.DEBUG)
    receiver.behave = partial(answer, status=status)
    corner.leave(receiver.url, attempts=attempts)
    deliverer().deliver_due()
    assert corner.empty
    [warning] = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert warning.getMessage() == "webhook dropped"
    assert (vars(warning)["url"], str(status) in vars(warning)["reason"]) == (
        f"http://127.0.0.1:{receiver.port}/hooks",
        True,
    )
    assert not any("hush" in str(vars(record)) or MASTER in str(vars(record)) for record in caplog.records)


def test_an_answer_without_end_is_cut_off(
    corner: Corner, deliverer: Callable[..., Deliverer], receiver: Receiver
) -> None:
    """A receiver that drips its answer's head gains no time by each byte, and a body is not waited for."""

    def drip(handler: BaseHTTPRequestHandler) -> None:
        for _ in range(100):
            handler.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            receiver.released.wait(0.05)
        answer(handler, status=204)

    receiver.behave = drip
    hook_id = corner.leave(receiver.url)
    deliverer(timeout=0.3).deliver_due()
    assert corner.due_in(hook_id) > 2, "it counts as failed"

    def endless(handler: BaseHTTPRequestHandler) -> None:
        answer(handler, status=200)
        while not receiver.released.is_set():
            handler.wfile.write(b"x" * 65_536)

    receiver.behave = endless
    corner.make_due()
    deliverer().deliver_due()
    assert corner.empty, "a good answer is one, however long"


def test_trouble_with_the_record_only_delays(
    corner: Corner, deliverer: Callable[..., Deliverer], receiver: Receiver
) -> None:
    """Storage or a record that cannot be read now: as any other failure."""

    def describe(_type: str, _hook_id: str) -> None:
        raise RuntimeError("no")

    hook_id = corner.leave(receiver.url)
    deliverer(describe=describe).deliver_due()
    assert receiver.messages == []
    assert corner.due_in(hook_id) > 2


# ---- where it may go


def test_redirects_are_not_followed(
    corner: Corner, deliverer: Callable[..., Deliverer], receiver: Receiver, receivers: Callable[..., Receiver]
) -> None:
    """Wherever they point: they are a failed attempt."""
    other = receivers()
    receiver.behave = partial(answer, status=307, Location=other.url)
    hook_id = corner.leave(receiver.url)
    deliverer().deliver_due()
    assert (len(receiver.messages), other.messages) == (1, [])
    assert corner.due_in(hook_id) > 2


def test_private_addresses_are_never_asked(
    corner: Corner, deliverer: Callable[..., Deliverer], receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    """A name that leads inside is not connected to; an address that is plainly private is dropped at once."""
    caplog.set_level(logging.INFO)
    one = deliverer(allow_private=False, resolve=lambda _host, _port: ["127.0.0.1"])
    named = corner.leave(f"https://hooks.example:{receiver.port}/")
    corner.leave(f"https://127.1:{receiver.port}/")
    corner.leave(receiver.url)
    assert one.deliver_due() == 3
    assert receiver.messages == []
    assert corner.redis.zrange(corner.keys.hooks, 0, -1) == [named]
    postponed = next(record for record in caplog.records if record.getMessage() == "webhook postponed")
    assert "hooks.example is not a public address" in vars(postponed)["reason"]


def test_proxies_of_the_environment_are_not_used(
    corner: Corner, deliverer: Callable[..., Deliverer], receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A proxy would resolve names by itself, unchecked."""
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    corner.leave(receiver.url)
    deliverer().deliver_due()
    assert len(receiver.messages) == 1


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes its certificate with openssl")
def test_the_host_must_prove_its_name(
    corner: Corner,
    deliverer: Callable[..., Deliverer],
    receivers: Callable[..., Receiver],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Though the connection goes to an address, the certificate must be the name's: another host gets nothing."""
    caplog.set_level(logging.INFO)
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    made = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=hooks.example"
    names = ["-addext", "subjectAltName=DNS:hooks.example", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(["openssl", *made.split(), *names], check=True, capture_output=True)
    ours = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ours.load_cert_chain(certificate, key)
    receiver = receivers(ours)
    one = deliverer(resolve=lambda _host, _port: ["127.0.0.1"], tls=ssl.create_default_context(cafile=str(certificate)))
    corner.leave(f"https://hooks.example:{receiver.port}/")
    other = corner.leave(f"https://other.example:{receiver.port}/")
    assert one.deliver_due() == 2
    assert [message.headers["host"] for message in receiver.messages] == [f"hooks.example:{receiver.port}"]
    assert corner.redis.zrange(corner.keys.hooks, 0, -1) == [other]
    [postponed] = [record for record in caplog.records if record.getMessage() == "webhook postponed"]
    assert "certificate is not valid for 'other.example'" in vars(postponed)["reason"]


# ---- many at once


def test_two_deliverers_tell_each_once(
    corner: Corner,
    deliverer: Callable[..., Deliverer],
    receiver: Receiver,
    running: Callable[[Deliverer], threading.Event],
) -> None:
    """However many look, a delivery is one's for as long as it lasts."""
    ids = [corner.leave(receiver.url) for _ in range(40)]
    roomy = partial(deliverer, concurrency=30, per_host=30, per_tenant=30)
    receiver.hang()
    for _ in range(2):
        running(roomy())
    until(lambda: len(receiver.messages) == 40)
    assert roomy().deliver_due() == 0
    receiver.released.set()
    until(lambda: corner.empty)
    assert Counter(message.verified()["data"]["id"] for message in receiver.messages) == Counter(ids)


def test_a_slow_receiver_holds_up_nobody_else(
    corner: Corner,
    deliverer: Callable[..., Deliverer],
    receivers: Callable[..., Receiver],
    running: Callable[[Deliverer], threading.Event],
) -> None:
    """Hundreds for one that hangs, and as many of one tenant to other hosts: what is due behind them goes through."""
    slow, quick = receivers(), receivers()
    slow.hang()
    for number in range(600):
        host = "127.0.0.1" if number < 300 else f"{number}.example"
        corner.leave(slow.url.replace("127.0.0.1", host), tenant="slow")
    for _ in range(3):
        corner.leave(quick.url)
    running(deliverer(resolve=lambda _host, _port: ["127.0.0.1"], per_host=2, per_tenant=4, concurrency=6))
    until(lambda: len(quick.messages) == 3 and len(slow.messages) == 4)
    assert sum(message.headers["host"].startswith("127.") for message in slow.messages) == 2
    corner.redis.delete(corner.keys.hooks)  # so that the end need not wait for the rest
    slow.released.set()


def test_a_killed_deliverer_is_followed_by_another(
    corner: Corner, deliverer: Callable[..., Deliverer], receiver: Receiver, environment: dict[str, str]
) -> None:
    """A process that dies with a delivery in hand: after the lease the next one tells it, under the same id."""
    program = (
        "from calotype.webhooks import Deliverer, Hooks\n"
        "from calotype_shared.queue.connection import connect_redis\n"
        "from calotype_shared.settings import Settings\n"
        "settings = Settings.load()\n"
        "hooks = Hooks(connect_redis(settings), key_prefix=settings.key_prefix)\n"
        f"Deliverer(hooks, describe=lambda *_: {{}}, secret={MASTER!r}, allow_private=True, timeout=60).deliver_due()"
    )
    receiver.hang()
    hook_id = corner.leave(receiver.url)
    child = subprocess.Popen([sys.executable, "-c", program], env=environment)
    try:
        until(lambda: receiver.messages)
    finally:
        child.kill()
        child.wait()
    assert corner.due_in(hook_id) > 30, "nobody else gets it during its lease"
    assert deliverer().deliver_due() == 0

    receiver.behave = partial(answer, status=204)
    corner.make_due()
    assert deliverer().deliver_due() == 1
    assert len({message.headers["webhook-id"] for message in receiver.messages}) == 1
    assert len(receiver.messages) == 2
    assert corner.empty


def test_a_lost_lease_settles_nothing(redis: Redis, settings: Settings, corner: Corner) -> None:
    """Who comes back after its lease can neither end nor postpone what another has taken."""
    corner.leave("https://hooks.example/")
    hooks = Hooks(redis, key_prefix=settings.key_prefix)
    take = partial(hooks.take, lease_seconds=60, most=1, under_way=(), per_host=1, per_tenant=1)
    [old] = take()
    corner.make_due()
    [new] = take()
    assert (old.attempt, new.attempt) == (1, 2)
    assert not hooks.done(old)
    assert not hooks.postpone(old, seconds=0)
    assert hooks.done(new)
    assert not hooks.done(new)
    assert corner.empty


def test_an_outage_of_redis_ends_no_deliverer(caplog: pytest.LogCaptureFixture) -> None:
    """It says so, and stops when asked to, not before."""
    stop = threading.Event()
    away = Hooks(Redis(port=1, retry=Retry(NoBackoff(), 0)))
    one = Deliverer(away, describe=lambda *_: None, secret=MASTER)
    thread = threading.Thread(target=one.run, args=(stop,))
    thread.start()
    until(lambda: "webhooks cannot be read" in caplog.messages)
    assert thread.is_alive()
    stop.set()
    thread.join(120)
    assert not thread.is_alive()
