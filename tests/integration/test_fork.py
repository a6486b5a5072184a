"""A client that was made and used before `fork()` works in every child, and never with its parent's connections."""

from __future__ import annotations

import hashlib
import os
import random
import signal

import pytest

from calotype import Client
from calotype.embedded import EmbeddedServers
from calotype.testing import Sandbox
from calotype_shared.errors import StorageUnavailable
from calotype_shared.settings import Settings
from calotype_shared.storage.s3 import Storage

_CHILDREN = 4


def _in_children(work: object) -> list[int]:
    """Runs it in several forked processes at once; returns their exit statuses."""
    children = []
    for number in range(_CHILDREN):
        child = os.fork()
        if child == 0:
            signal.alarm(120)  # a child that waits for ever ends nevertheless
            status = 1
            try:
                status = work(number)  # type: ignore[operator]
            finally:
                os._exit(status)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def test_children_get_the_objects_that_they_ask_for(settings: Settings, storage: Storage) -> None:
    bodies = {f"object-{number}": os.urandom(200 + 1_000 * number) for number in range(12)}
    for key, data in bodies.items():
        storage.put(key, data, "application/octet-stream")

    def fetch(number: int) -> int:
        keys = list(bodies) * 8
        random.Random(number).shuffle(keys)
        return int(any(storage.get(key) != bodies[key] for key in keys))

    assert _in_children(fetch) == [0] * _CHILDREN


def test_children_submit_wait_and_fetch(servers: EmbeddedServers) -> None:
    with Sandbox(servers=servers) as sandbox:
        client: Client = sandbox.client
        [first] = client.submit("in the parent", seed=1).result(60)
        # A wait is under way when the children are made: its lock, its thread and its subscription are the parent's.
        client.job_changes._lock.acquire()
        try:

            def work(number: int) -> int:
                [image] = client.submit("in a child", seed=2 + number).result(60)
                [again] = client.images([first.job_id])[0]
                return int(again.data != first.data or image.data == first.data)

            assert _in_children(work) == [0] * _CHILDREN
        finally:
            client.job_changes._lock.release()


def test_a_download_is_compared_with_the_recorded_hash(storage: Storage) -> None:
    storage.put("image", b"another image", "image/png")
    known = hashlib.sha256(b"the image").hexdigest()
    with pytest.raises(StorageUnavailable, match="is not what was stored"):
        storage.get("image", sha256=known)
