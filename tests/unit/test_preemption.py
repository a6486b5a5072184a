"""What each cloud's metadata service may answer, in good order and otherwise."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from calotype_worker.jobs.preemption import Metadata, Notice, Watcher, notice_source
from calotype_worker.settings import WorkerSettings
from tests.faults.metadata import MACHINE, MetadataService, metadata_service


@pytest.fixture
def service(request: pytest.FixtureRequest) -> Iterator[MetadataService]:
    with metadata_service(request.param) as service:
        yield service


def ask(service: MetadataService) -> Notice | None:
    source = notice_source(service.cloud, service.endpoint)
    assert source is not None
    assert service.notice is None or source() is not None
    return source()


def in_seconds(seconds: float) -> datetime:
    return datetime.now(UTC) + timedelta(seconds=seconds)


@pytest.mark.parametrize("service", ["aws", "gcp", "azure"], indirect=True)
def test_no_notice(service: MetadataService) -> None:
    assert ask(service) is None
    assert service.refused == []


@pytest.mark.parametrize("service", ["aws"], indirect=True)
@pytest.mark.parametrize(
    ("action", "seconds", "left"),
    [("terminate", 90, 90), ("stop", 90, 90), ("hibernate", 90, 0), ("terminate", 4000, 120), ("terminate", -50, 0)],
)
def test_aws(service: MetadataService, action: str, seconds: float, left: float) -> None:
    service.notice = {"action": action, "time": in_seconds(seconds).strftime("%Y-%m-%dT%H:%M:%SZ")}
    notice = ask(service)
    assert notice is not None
    assert notice.where == "aws"
    assert notice.seconds_left == pytest.approx(left, abs=3)


@pytest.mark.parametrize("service", ["aws"], indirect=True)
@pytest.mark.parametrize("when", [None, "", "soon", 12, "2026-11-24T10:00"])
def test_aws_at_a_time_that_cannot_be_told(service: MetadataService, when: Any) -> None:
    service.notice = {"action": "terminate", "time": when}
    notice = ask(service)
    assert notice is not None
    assert notice.seconds_left == 0


@pytest.mark.parametrize("service", ["aws"], indirect=True)
def test_an_aws_token_that_is_no_longer_good_is_fetched_again(
    service: MetadataService, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = notice_source("aws", service.endpoint)
    assert source is not None
    assert source() is None
    monkeypatch.setattr("tests.faults.metadata.TOKEN", "another")
    with pytest.raises(ValueError, match="401"):
        source()
    assert source() is None


@pytest.mark.parametrize("service", ["gcp"], indirect=True)
def test_gcp(service: MetadataService) -> None:
    source = notice_source("gcp", service.endpoint)
    assert source is not None
    assert source() is None
    service.notice = True
    notice = source()
    assert notice is not None
    assert notice.seconds_left == pytest.approx(30, abs=2)


@pytest.mark.parametrize("service", ["gcp"], indirect=True)
def test_gcp_said_so_before_we_came(service: MetadataService) -> None:
    service.notice = True
    notice = ask(service)
    assert notice is not None
    assert notice.seconds_left == 0


@pytest.mark.parametrize("service", ["azure"], indirect=True)
@pytest.mark.parametrize(
    ("kind", "resource", "seconds", "left"),
    [
        ("Preempt", MACHINE, 40, 40),
        ("Terminate", MACHINE.upper(), 300, 300),
        ("Preempt", MACHINE, None, 0),
        ("Preempt", "vmss_8", 40, None),
        ("Reboot", MACHINE, 40, None),
        ("Freeze", MACHINE, 40, None),
    ],
)
def test_azure(service: MetadataService, kind: str, resource: str, seconds: float | None, left: float | None) -> None:
    when = "" if seconds is None else format_datetime(in_seconds(seconds), usegmt=True)
    source = notice_source("azure", service.endpoint)
    assert source is not None
    service.notice = [{"EventType": kind, "Resources": [resource], "NotBefore": when}, "no event"]
    notice = source()
    assert (notice and notice.seconds_left) == (left and pytest.approx(left, abs=3))


@pytest.mark.parametrize(
    ("content", "left"),
    [("", float("inf")), ("25", 25), ("25.5\n", 25.5), ("-4", 0), ("nan", float("inf")), ("\x00\xff", float("inf"))],
)
def test_a_file(tmp_path: Path, content: str, left: float) -> None:
    source = notice_source(f"file:{tmp_path / 'notice'}", None)
    assert source is not None
    assert source() is None
    (tmp_path / "notice").write_text(content, encoding="latin-1")
    notice = source()
    assert notice is not None
    assert notice.seconds_left == pytest.approx(left, abs=2)


def test_a_folder_in_place_of_the_file_is_no_notice(tmp_path: Path) -> None:
    source = notice_source(f"file:{tmp_path}", None)
    assert source is not None
    with pytest.raises(ValueError, match="not a regular file"):
        source()


def test_nothing_is_asked_by_default() -> None:
    assert notice_source(WorkerSettings().preemption, None) is None


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        ({"preemption": "ec2"}, "should match pattern"),
        ({"preemption": "file:relative"}, "should match pattern"),
        ({"preemption_endpoint": "https://127.0.0.1"}, "scheme should be 'http'"),
        ({"preemption_endpoint": "http://127.0.0.1:99999"}, "invalid port number"),
        ({"preemption_endpoint": "127.0.0.1"}, "relative URL without a base"),
    ],
)
def test_settings_that_make_no_sense(wrong: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValidationError, match=rf"{next(iter(wrong))}\n.*{problem}"):
        WorkerSettings(**wrong)


def _trickle(peer: socket.socket) -> None:
    peer.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
    while True:  # until the other side has had enough
        peer.sendall(b" ")
        time.sleep(0.1)


HOSTILE: dict[str, Callable[[socket.socket], object]] = {
    "nothing at all": lambda peer: peer.close(),
    "no HTTP": lambda peer: peer.sendall(b"\x00\x01garbage\r\n\r\n"),
    "500": lambda peer: peer.sendall(b"HTTP/1.1 500 no\r\nContent-Length: 0\r\n\r\n"),
    "a redirect": lambda peer: peer.sendall(
        b"HTTP/1.1 302 x\r\nLocation: http://10.0.0.1/\r\nContent-Length: 0\r\n\r\n"
    ),
    "no JSON": lambda peer: peer.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n{{{{"),
    "another shape": lambda peer: peer.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n[1, 2]"),
    "no UTF-8": lambda peer: peer.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n\xff\xfe"),
    "too much": lambda peer: peer.sendall(b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 1_000_000),
    "never the end": _trickle,
    "silence": lambda peer: peer.recv(1),
}


@pytest.fixture
def hostile(request: pytest.FixtureRequest) -> Iterator[str]:
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                peer, _ = server.accept()
            except OSError:
                return
            with peer:
                try:
                    peer.recv(65536)
                    HOSTILE[request.param](peer)
                except OSError:
                    pass

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.getsockname()[1]}"
    server.close()


@pytest.mark.parametrize("hostile", HOSTILE, indirect=True)
def test_a_hostile_service_gives_no_notice_and_is_not_waited_for(
    hostile: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("calotype_worker.jobs.preemption._ANSWER_SECONDS", 0.3)
    reported: list[Notice] = []
    for cloud in ("gcp", "azure", "aws"):
        source = notice_source(cloud, hostile)
        assert source is not None
        Watcher(source, reported.append).look()
    assert reported == []
    assert "preemption notices cannot be read" in caplog.text
    assert len(caplog.text) < 4000


def test_proxies_of_the_environment_are_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    with metadata_service("gcp") as service:
        assert Metadata(service.endpoint).ask("/x", {"Metadata-Flavor": "Google"}) == (404, "Not Found")


def test_the_watcher_tells_each_notice_once_and_complains_once_a_kind(caplog: pytest.LogCaptureFixture) -> None:
    answers: list[Any] = [OSError("a"), OSError("b"), None, 60, 60, 58, 20, 30, ValueError("c"), float("inf")]
    reported: list[float] = []

    def source() -> Notice | None:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return None if answer is None else Notice(where="here", seconds_left=answer)

    watcher = Watcher(source, lambda notice: reported.append(notice.seconds_left))
    with caplog.at_level(logging.WARNING):
        while answers:
            watcher.look()
    assert reported == [60, 58, 20]
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]


def test_a_notice_without_a_time_is_told(tmp_path: Path) -> None:
    (tmp_path / "notice").touch()
    source = notice_source(f"file:{tmp_path / 'notice'}", None)
    assert source is not None
    reported: list[Notice] = []
    watcher = Watcher(source, reported.append)
    watcher.look()
    watcher.look()
    assert [notice.seconds_left for notice in reported] == [float("inf")]
    assert json.dumps(str(reported[0].where))
