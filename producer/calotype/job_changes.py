"""`JobChangeListener`: receives changes of jobs as they happen, for all the waits of one client.

Redis publishes every change on a channel of the job (`keys.py`). A notice only says that it is time to check the
record. Waits also check periodically, so a missed notice costs at most a second.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, Self

from redis import Redis
from redis.client import PubSub
from redis.exceptions import RedisError

from calotype_shared.backoff import full_jitter
from calotype_shared.forking import reset_in_children
from calotype_shared.queue.keys import Keys

log = logging.getLogger(__name__)

_LISTEN_SECONDS = 1.0
_LINGER_SECONDS = 10.0  # how long the thread stays after the last wait: another wait usually follows
_BACKOFF_SECONDS = 2.0


class JobChangeListener:
    """One connection and one thread, from the first wait until a while after the last. Thread-safe.

    Only that thread uses the subscription. To add channels, others wake it up through a channel of its own.
    """

    def __init__(self, redis: Redis, keys: Keys) -> None:
        self._redis = redis
        self._keys = keys
        self.after_fork()
        reset_in_children(self)

    def after_fork(self) -> None:
        """The thread, its subscription and the waits that it serves stay in the parent."""
        self._wakeup_channel = self._keys.changed(f"wakeup-{uuid.uuid4().hex}")
        self._lock = threading.Lock()
        self._watches: dict[str, list[_Watch]] = {}  # by channel
        self._live: set[str] = set()  # channels that the server has confirmed
        self._thread: threading.Thread | None = None
        self._closed = threading.Event()

    def watch(self) -> Watch:
        """For a thread that waits. A context manager."""
        return Watch(self)

    def watch_async(self) -> AsyncWatch:
        """For the running event loop. A context manager."""
        return AsyncWatch(self)

    def close(self) -> None:
        self._closed.set()
        with self._lock:
            thread = self._thread
        if thread is not None:
            self._wake()
            thread.join(_LISTEN_SECONDS)

    def _set(self, watch: _Watch, job_ids: Iterable[str]) -> None:
        """From now on, watch these jobs and no others."""
        channels = {self._keys.changed(job_id) for job_id in job_ids}
        with self._lock:
            for channel in watch.channels - channels:
                watches = self._watches.get(channel, [])
                if watch in watches:  # not one of the parent process
                    watches.remove(watch)
                if not watches:
                    self._watches.pop(channel, None)
            for channel in channels - watch.channels:
                self._watches.setdefault(channel, []).append(watch)
            watch.channels = channels
            if channels <= self._live or self._closed.is_set():
                return
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="calotype-job-changes", daemon=True)
                self._thread.start()
                return
        self._wake()

    def _is_live(self, channels: set[str]) -> bool:
        with self._lock:
            return bool(channels) and channels <= self._live

    def _wake(self) -> None:
        with contextlib.suppress(RedisError):  # the waits then poll as often as without notices
            self._redis.publish(self._wakeup_channel, "")

    def _run(self) -> None:
        while not self._closed.is_set():
            try:
                with self._redis.pubsub() as subscription:  # type: ignore[no-untyped-call]
                    if self._listen(subscription):
                        return
            except RedisError:
                pass  # the waits report it
            except Exception:
                log.exception("unexpected error while listening for job changes")
            with self._lock:
                self._live.clear()
            self._closed.wait(full_jitter(_BACKOFF_SECONDS))

    def _listen(self, subscription: PubSub) -> bool:
        """Returns True when nobody has waited for a while: the thread then ends."""
        subscription.subscribe(self._wakeup_channel)
        known: set[str] = set()
        waited = time.monotonic()  # when somebody last waited
        while not self._closed.is_set():
            with self._lock:
                wanted = set(self._watches)
                waited = time.monotonic() if wanted else waited
                if time.monotonic() - waited > _LINGER_SECONDS:
                    self._live.clear()
                    self._thread = None
                    return True
                self._live &= wanted
            if new := wanted - known:
                subscription.subscribe(*new)
            if gone := known - wanted:
                subscription.unsubscribe(*gone)  # type: ignore[no-untyped-call]
            known = wanted
            message = subscription.get_message(timeout=_LISTEN_SECONDS)
            if message:
                self._dispatch(message)
        return False

    def _dispatch(self, message: dict[str, Any]) -> None:
        channel = message["channel"]
        with self._lock:
            # Confirmed, also after a reconnect: changes before that were not received.
            if message["type"] == "subscribe" and channel in self._watches:
                self._live.add(channel)
            watches = list(self._watches.get(channel, ()))
        if message["type"] != "unsubscribe":
            for watch in watches:
                watch.changed()


class _Watch(ABC):
    """The changes that one wait receives. A context manager; nothing remains after it exits."""

    def __init__(self, listener: JobChangeListener) -> None:
        self._listener = listener
        self.channels: set[str] = set()  # written by `JobChangeListener` alone

    def set_jobs(self, job_ids: Iterable[str]) -> None:
        """Receive changes of these jobs from now on. May take as long as Redis takes to respond."""
        self._listener._set(self, job_ids)

    @property
    def live(self) -> bool:
        """Whether changes of its jobs are received now; not before subscribing, nor while Redis is unavailable."""
        return self._listener._is_live(self.channels)

    @abstractmethod
    def changed(self) -> None:
        """Called by the thread that listens."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.set_jobs(())


class Watch(_Watch):
    """For a thread."""

    def __init__(self, listener: JobChangeListener) -> None:
        super().__init__(listener)
        self._event = threading.Event()

    def changed(self) -> None:
        self._event.set()

    def wait(self, seconds: float, *, at_least: float) -> None:
        """Until one of its jobs has changed since the last call, or for `seconds`; but not less than `at_least`."""
        time.sleep(min(at_least, seconds))
        self._event.wait(max(0.0, seconds - at_least))
        self._event.clear()


class AsyncWatch(_Watch):
    """For asyncio tasks; create it on the task's event loop."""

    def __init__(self, listener: JobChangeListener) -> None:
        super().__init__(listener)
        self._loop = asyncio.get_running_loop()
        self._event = asyncio.Event()

    def changed(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits on it any more
            self._loop.call_soon_threadsafe(self._event.set)

    async def wait(self, seconds: float, *, at_least: float) -> None:
        """As `Watch.wait`."""
        await asyncio.sleep(min(at_least, seconds))
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._event.wait(), max(0.0, seconds - at_least))
        self._event.clear()
