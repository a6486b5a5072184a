"""Notices that this machine will be reclaimed: where each cloud publishes them, and `Watcher`, which polls them.

A notice can be repeated with another time, so the watcher continues; the worker keeps the earliest end.
No response of a metadata service stops the worker: an invalid one is logged, and the request is repeated.
"""

from __future__ import annotations

import json
import logging
import math
import socket
import stat
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, ClassVar, Protocol
from urllib.parse import urlsplit

log = logging.getLogger(__name__)

METADATA = "http://169.254.169.254"  # the link-local address that AWS, Google and Azure share

_POLL_SECONDS = 2.0
_SOONER_SECONDS = 1.0  # a repeated notice is passed on if it is this much earlier
_ANSWER_SECONDS = 2.0  # for a whole answer, and so also for one that trickles
_LARGEST_ANSWER = 64 * 1024  # bytes
_TOKEN_SECONDS = 21_600  # the longest that AWS allows
_AWS_SECONDS = 120.0
_GCP_SECONDS = 30.0
_AZURE_EVENTS = ("Preempt", "Terminate")


@dataclass(frozen=True, kw_only=True)
class Notice:
    """This machine will be reclaimed in `seconds_left`: 0 if now or unreadable, infinity if not stated."""

    where: str
    seconds_left: float


class Source(Protocol):
    """A place where a notice may appear. Called repeatedly by one thread; may raise any exception."""

    def __call__(self) -> Notice | None: ...


class Metadata:
    """Requests to a metadata service, without proxies and redirects, bounded in time and memory."""

    def __init__(self, endpoint: str) -> None:
        parts = urlsplit(endpoint)
        assert parts.hostname is not None
        self._host, self._port = parts.hostname, parts.port or 80

    def ask(self, path: str, headers: Mapping[str, str], *, method: str = "GET") -> tuple[int, str]:
        """Status and text. Raises OSError, HTTPException or ValueError."""
        connection = HTTPConnection(self._host, self._port, timeout=_ANSWER_SECONDS)
        ends = time.monotonic() + _ANSWER_SECONDS
        connection.connect()
        # The connection's own timeout restarts with each byte.
        cut = threading.Timer(_ANSWER_SECONDS, _cut, [connection.sock])
        cut.daemon = True
        cut.start()
        try:
            connection.request(method, path, headers={**headers, "Connection": "close"})
            answer = connection.getresponse()
            body = answer.read(_LARGEST_ANSWER + 1)
        finally:
            cut.cancel()
            connection.close()
        if time.monotonic() >= ends:  # the response may have been cut off
            raise TimeoutError(f"{path}: no complete response within {_ANSWER_SECONDS:g} s")
        if len(body) > _LARGEST_ANSWER:
            raise ValueError(f"{path}: the response has more than {_LARGEST_ANSWER} bytes")
        return answer.status, body.decode()

    def text(self, path: str, headers: Mapping[str, str], *, method: str = "GET") -> str:
        """The content. Raises the same as `ask`, and ValueError for a status other than 200."""
        status, body = self.ask(path, headers, method=method)
        if status != 200:
            raise ValueError(f"{path}: status {status}")
        return body


class AwsNotice:
    """Amazon EC2, IMDSv2: `spot/instance-action` appears before the machine is reclaimed, usually by two minutes.

    A rebalance recommendation is not a notice: the machine may remain for hours after it.
    """

    _TOKEN_HEADER = "X-aws-ec2-metadata-token"  # noqa: S105 - a name

    def __init__(self, metadata: Metadata) -> None:
        self._metadata = metadata
        self._token: str | None = None
        self._renew_at = 0.0

    def __call__(self) -> Notice | None:
        if self._token is None or time.monotonic() >= self._renew_at:
            self._token = self._fetch_token()
            self._renew_at = time.monotonic() + _TOKEN_SECONDS / 2
        path = "/latest/meta-data/spot/instance-action"
        status, body = self._metadata.ask(path, {self._TOKEN_HEADER: self._token})
        if status == 404:
            return None
        if status == 401:  # a token is valid on one machine only, and this machine may have been moved
            self._token = None
        if status != 200:
            raise ValueError(f"{path}: status {status}")
        said = json.loads(body)
        if not isinstance(said, dict) or not isinstance(said.get("action"), str):
            raise ValueError(f"{path}: {body[:100]!r} has no action")
        # Hibernation begins at once. More than two minutes would be a wrong clock.
        left = 0.0 if said["action"] == "hibernate" else _seconds_until(said.get("time"), datetime.fromisoformat)
        return Notice(where="aws", seconds_left=min(left, _AWS_SECONDS))

    def _fetch_token(self) -> str:
        headers = {f"{self._TOKEN_HEADER}-ttl-seconds": str(_TOKEN_SECONDS), "Content-Length": "0"}
        return self._metadata.text("/latest/api/token", headers, method="PUT")


class GcpNotice:
    """Google Compute Engine: `instance/preempted` turns TRUE, half a minute ahead."""

    def __init__(self, metadata: Metadata) -> None:
        self._metadata = metadata
        self._last_false = -math.inf  # so that a machine that is already being reclaimed is noticed immediately

    def __call__(self) -> Notice | None:
        asked = time.monotonic()
        path = "/computeMetadata/v1/instance/preempted"
        said = self._metadata.text(path, {"Metadata-Flavor": "Google"}).strip()
        if said == "FALSE":
            self._last_false = asked
            return None
        if said != "TRUE":
            raise ValueError(f"{path}: {said[:100]!r} is neither TRUE nor FALSE")
        return Notice(where="gcp", seconds_left=max(0.0, self._last_false + _GCP_SECONDS - time.monotonic()))


class AzureNotice:
    """Azure: scheduled events of type Preempt or Terminate that name this machine.

    All machines of a scale set see each other's events.
    """

    _HEADERS: ClassVar = {"Metadata": "true"}

    def __init__(self, metadata: Metadata) -> None:
        self._metadata = metadata
        self._name: str | None = None

    def __call__(self) -> Notice | None:
        path = "/metadata/scheduledevents?api-version=2020-07-01"
        body = self._metadata.text(path, self._HEADERS)
        said = json.loads(body)
        if not isinstance(said, dict) or not isinstance(said.get("Events"), list):
            raise ValueError(f"{path}: {body[:100]!r} has no list of events")
        events = [event for event in said["Events"] if isinstance(event, dict)]
        due = [
            _seconds_until(event.get("NotBefore"), parsedate_to_datetime)  # blank once it has started
            for event in events
            if event.get("EventType") in _AZURE_EVENTS and self._is_about_us(event)
        ]
        return Notice(where="azure", seconds_left=min(due)) if due else None

    def _is_about_us(self, event: dict[str, Any]) -> bool:
        resources = event.get("Resources")
        if not isinstance(resources, list):
            raise ValueError(f"an event's Resources is not a list: {str(resources)[:100]!r}")
        if self._name is None:
            path = "/metadata/instance/compute/name?api-version=2021-02-01&format=text"
            self._name = self._metadata.text(path, self._HEADERS).strip().lower()
        return self._name in [str(resource).lower() for resource in resources]


class FileNotice:
    """A file that a node agent writes: it is the notice, and may contain the seconds left at that time."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __call__(self) -> Notice | None:
        try:
            found = self._path.stat()
            if not stat.S_ISREG(found.st_mode):
                raise ValueError(f"{self._path} is not a regular file")
            with self._path.open("rb") as file:
                said = float(file.read(32))
        except FileNotFoundError:
            return None
        except ValueError as error:
            if not stat.S_ISREG(found.st_mode):
                raise error
            said = math.inf
        left = math.inf if math.isnan(said) else said - max(0.0, time.time() - found.st_mtime)
        return Notice(where=str(self._path), seconds_left=max(0.0, left))


class Watcher:
    """Polls a source every two seconds in its own thread, and calls `on_notice` in that thread.

    A repeated notice is passed on only if it leaves less time than the one before.
    """

    def __init__(self, source: Source, on_notice: Callable[[Notice], object]) -> None:
        self._source = source
        self._on_notice = on_notice
        self._complained: set[str] = set()
        self._told_end = math.inf
        self._told = False

    def start(self) -> None:
        threading.Thread(target=self._watch, name="calotype-preemption", daemon=True).start()

    def _watch(self) -> None:
        while True:
            self.look()
            time.sleep(_POLL_SECONDS)

    def look(self) -> None:
        """Poll once. Errors are logged, once per kind."""
        try:
            notice = self._source()
            if notice is None:
                return
            end = time.monotonic() + notice.seconds_left
            if self._told and not end < self._told_end - _SOONER_SECONDS:
                return
            self._told, self._told_end = True, end
            self._on_notice(notice)
        except Exception as error:
            kind = type(error).__name__
            if kind not in self._complained:
                self._complained.add(kind)
                log.warning("preemption notices cannot be read", extra={"reason": f"{kind}: {error}"[:300]})


def _cut(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def _seconds_until(said: Any, parse: Callable[[Any], datetime]) -> float:
    """Seconds from now, by this machine's clock; 0 if unreadable."""
    try:
        when = parse(said)
    except (TypeError, ValueError):
        return 0.0
    when = when if when.tzinfo else when.replace(tzinfo=UTC)
    return max(0.0, (when - datetime.now(UTC)).total_seconds())


def notice_source(where: str, endpoint: str | None) -> Source | None:
    """The source that `CALOTYPE_WORKER_PREEMPTION` and its endpoint select; None for off."""
    metadata = Metadata(endpoint or METADATA)
    match where:
        case "off":
            return None
        case "aws":
            return AwsNotice(metadata)
        case "gcp":
            return GcpNotice(metadata)
        case "azure":
            return AzureNotice(metadata)
    assert where.startswith("file:"), where
    return FileNotice(Path(where.removeprefix("file:")))
