"""Storage against a real S3 server: what it stores, and what it says when it cannot."""

from __future__ import annotations

import http.client
import threading
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest

from calotype_shared.errors import StorageUnavailable
from calotype_shared.schema.enums import OutputFormat
from calotype_shared.settings import Settings
from calotype_shared.storage.layout import image_key, sidecar_key
from calotype_shared.storage.s3 import Storage


def changed(settings: Settings, **changes: object) -> Storage:
    return Storage(Settings.load(**{**settings.model_dump(), **changes}))


def test_objects_come_back_as_they_went(storage: Storage) -> None:
    """Bytes, type and key; listing is by prefix; deleting twice is fine."""
    key, beside = image_key("job/2-ab", 0, OutputFormat.WEBP), sidecar_key("job/2-ab", 0)
    assert (key, beside) == ("job/2-ab/0.webp", "job/2-ab/0.json")
    data = bytes(range(256)) * 1000
    storage.put(key, data, "image/webp")
    storage.put(beside, b"{}", "application/json")
    storage.put("other/1/0.png", b"x", "image/png")
    assert storage.get(key) == data
    assert storage.content_type(key) == "image/webp"
    assert list(storage.list("job/")) == sorted([key, beside])
    for _ in range(2):
        storage.delete(key)
    assert list(storage.list("job/")) == [beside]
    with pytest.raises(StorageUnavailable, match="the object does not exist"):
        storage.get(key)


def test_presigned_links_work_without_keys_and_run_out(storage: Storage) -> None:
    """What a user passes on to a browser."""
    storage.put("a.png", b"pixels", "image/png")
    with urllib.request.urlopen(storage.presigned_url("a.png", expires_seconds=60)) as answer:
        assert answer.read() == b"pixels"
        assert answer.headers["Content-Type"] == "image/png"
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(storage.presigned_url("a.png").replace("Signature=", "Signature=0"))


def test_links_can_point_at_another_address(settings: Settings) -> None:
    """Behind a proxy, users reach storage under another name than workers do."""
    storage = changed(settings, s3_public_endpoint_url="https://images.example.org")
    assert storage.presigned_url("a.png").startswith("https://images.example.org/")


def test_a_missing_bucket_is_named_and_can_be_made(settings: Settings) -> None:
    """Twice at once is fine: many workers start together."""
    storage = changed(settings, s3_bucket=f"{settings.s3_bucket}-new")
    with pytest.raises(StorageUnavailable, match=r"bucket 'test-\w+-new' does not exist; .*CALOTYPE_S3_BUCKET"):
        storage.check()
    for _ in range(2):
        storage.check(create=True)
    storage.check()


def requests_of(storage: Storage) -> list[str]:
    """The methods of the HTTP requests that it sends from now on."""
    sent: list[str] = []
    storage._client().meta.events.register("before-send", lambda request, **_: sent.append(request.method))
    return sent


def test_refused_keys_are_said_without_repeating_them(settings: Settings) -> None:
    """After one request, since trying again would not help."""
    storage = changed(settings, s3_secret_access_key="hunter2")
    sent = requests_of(storage)
    for call in (storage.check, lambda: storage.put("a", b"", "text/plain")):
        with pytest.raises(StorageUnavailable, match="keys were refused") as caught:
            call()
        assert "hunter2" not in str(caught.value)
    assert len(sent) == 2


def test_an_unreachable_server_is_tried_again_and_then_said(settings: Settings) -> None:
    """A few times, naming the address and the setting."""
    storage = changed(settings, s3_endpoint_url="http://127.0.0.1:1")
    sent = requests_of(storage)
    with pytest.raises(StorageUnavailable, match=r"http://127\.0\.0\.1:1: .*CALOTYPE_S3_ENDPOINT_URL"):
        storage.put("a", b"", "text/plain")
    assert 1 < len(sent) < 10


def test_passing_trouble_is_outlived(settings: Settings, storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two answers of "slow down" and one broken connection, and the object is there all the same."""
    from botocore.exceptions import ClientError, EndpointConnectionError

    client = storage._client()
    slow = ClientError({"Error": {"Code": "SlowDown"}, "ResponseMetadata": {"HTTPStatusCode": 503}}, "PutObject")
    troubles = [slow, slow, EndpointConnectionError(endpoint_url="x")]
    put = client.put_object

    def troubled(**arguments: object) -> object:
        if troubles:
            raise troubles.pop()
        return put(**arguments)

    monkeypatch.setattr(client, "put_object", troubled)
    storage.put("a", b"late", "text/plain")
    assert storage.get("a") == b"late"
    assert not troubles


class _WithoutBatches(BaseHTTPRequestHandler):
    """The real storage, as a server that refuses DeleteObjects without Content-MD5, or always."""

    target: str
    refused: str  # the code for what it refuses
    always: bool

    def _forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        if self.command == "POST" and "delete" in self.path and (self.always or not self.headers.get("content-md5")):
            answer = f"<Error><Code>{self.refused}</Code><Message>no</Message></Error>".encode()
            self._answer(400, [], answer)
            return
        connection = http.client.HTTPConnection(urlsplit(self.target).netloc)
        connection.request(self.command, self.path, body, dict(self.headers.items()))
        answered = connection.getresponse()
        self._answer(answered.status, answered.getheaders(), answered.read())
        connection.close()

    def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
        self.send_response(status)
        for name, value in headers:
            if name.lower() not in ("transfer-encoding", "content-length", "connection", "date", "server"):
                self.send_header(name, value)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_PUT = do_POST = do_DELETE = _forward

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.mark.parametrize("always", [False, True], ids=["content-md5", "one-by-one"])
def test_many_objects_are_deleted_where_servers_want_it_otherwise(settings: Settings, *, always: bool) -> None:
    """Google's, Ceph's and older MinIO: gc, sweeps and batches never tidied up."""
    code = "NotImplemented" if always else "MissingContentMD5"
    handler = type(
        "Handler", (_WithoutBatches,), {"target": settings.s3_endpoint_url, "refused": code, "always": always}
    )
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        storage = changed(settings, s3_endpoint_url=f"http://127.0.0.1:{server.server_port}")
        for name in ("a", "b", "c"):
            storage.put(name, b"x", "text/plain")
        storage.delete_many(["a", "b", "gone"])
        assert list(storage.list()) == ["c"]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
