"""`Dispatcher`: leads batches without a leader, and delivers webhooks. Any number of processes can share the work."""

from __future__ import annotations

import logging
import os
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from calotype.batches.run import BatchRun
from calotype.batches.store import BatchStore
from calotype.resolver import Resolver
from calotype_shared.backoff import full_jitter
from calotype_shared.errors import BatchNotFound, ServiceUnavailable
from calotype_shared.queue.connection import connect_redis
from calotype_shared.queue.job_store import JobStore
from calotype_shared.settings import Settings
from calotype_shared.storage.s3 import Storage

if TYPE_CHECKING:
    from calotype.webhooks import Deliverer

log = logging.getLogger(__name__)

_LOOK_SECONDS = 1.0
_AT_ONCE = 64  # batches a process leads; the rest wait, oldest first
_OF_A_TENANT = 8  # per tenant, so that one tenant's batches do not block another's
_REST_SECONDS = 3.0  # before a paused batch is checked again
_BACKOFF_SECONDS = 5.0


class Dispatcher:
    """A context manager that runs in separate threads. Or call `run` to run until `stop`."""

    def __init__(self, settings: Settings, *, on_webhook: Callable[[str], object] | None = None) -> None:
        """`on_webhook` is called for each delivery attempt: delivered, postponed or dropped."""
        redis = connect_redis(settings)
        self._redis = redis
        kept = {"key_prefix": settings.key_prefix, "retention_seconds": settings.retention_seconds}
        self._batches = BatchStore(redis, **kept)  # type: ignore[arg-type]
        self._jobs = JobStore(redis, **kept)  # type: ignore[arg-type]
        self._storage = Storage(settings)
        self._resolver = Resolver(settings, self._jobs, self._storage)
        self._who = f"{socket.gethostname()}-{os.getpid()}-{random.randrange(16**8):08x}"
        self._stop = threading.Event()
        self._runs: dict[str, tuple[str, threading.Thread]] = {}  # by batch: its tenant, and the thread that runs it
        self._rested: dict[str, float] = {}  # by batch: when to check it again
        self._deliverer = make_deliverer(settings, self._jobs, self._batches, self._storage, on_webhook)
        self._thread = threading.Thread(target=self.run, name="calotype-dispatcher", daemon=True)

    def run(self) -> None:
        """Lead batches until `stop`; returns when every batch has been released."""
        delivering = None
        if self._deliverer is not None:
            delivering = threading.Thread(target=self._deliverer.run, args=(self._stop,), daemon=True)
            delivering.start()
        while not self._stop.is_set():
            try:
                self._look()
            except ServiceUnavailable as error:
                log.warning("dispatcher waits for Redis or storage", extra={"reason": str(error)})
                self._stop.wait(full_jitter(_BACKOFF_SECONDS))
            self._stop.wait(_LOOK_SECONDS)
        for _, thread in self._runs.values():
            thread.join()
        if delivering is not None:
            delivering.join()
        self._redis.close()

    def stop(self) -> None:
        """Release every batch at its next turn, so that another dispatcher can continue it."""
        self._stop.set()

    def _look(self) -> None:
        now = time.monotonic()
        for batch_id, (_, thread) in list(self._runs.items()):
            if not thread.is_alive():
                del self._runs[batch_id]
                self._rested[batch_id] = now + _REST_SECONDS
        self._rested = {batch_id: until for batch_id, until in self._rested.items() if until > now}
        led = Counter(tenant for tenant, _ in self._runs.values())
        for batch_id, tenant in self._batches.open():
            if batch_id in self._runs or batch_id in self._rested or led[tenant] >= _OF_A_TENANT:
                continue
            if len(self._runs) >= _AT_ONCE:
                return
            thread = threading.Thread(target=self._lead, args=(batch_id,), name=f"calotype-{batch_id}", daemon=True)
            self._runs[batch_id] = (tenant, thread)
            led[tenant] += 1
            thread.start()

    def _lead(self, batch_id: str) -> None:
        run = BatchRun(
            batch_id,
            who=self._who,
            batches=self._batches,
            jobs=self._jobs,
            storage=self._storage,
            resolver=self._resolver,
            stop=self._stop,
        )
        try:
            run.run()
        except ServiceUnavailable as error:
            log.warning("batch waits for Redis or storage", extra={"batch_id": batch_id, "reason": str(error)})
            self._stop.wait(full_jitter(_BACKOFF_SECONDS))
        except Exception:
            log.exception("unexpected error in a batch", extra={"batch_id": batch_id})
            self._stop.wait(_BACKOFF_SECONDS)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        self._thread.join()


def make_deliverer(
    settings: Settings,
    jobs: JobStore,
    batches: BatchStore,
    storage: Storage,
    on_outcome: Callable[[str], object] | None = None,
) -> Deliverer | None:
    """Delivers webhooks for jobs and batches; None if no signing secret is set.

    Raises:
        ServiceUnavailable: its packages are missing.
    """
    if settings.webhook_secret is None:
        return None
    try:
        from calotype.webhooks import Deliverer, Hooks, describe_job  # noqa: PLC0415 - only where they are used
    except ImportError:
        raise ServiceUnavailable("webhooks need optional packages; run: pip install 'calotype[gateway]'") from None
    about_job = describe_job(jobs, storage)

    def describe(kind: str, about: str) -> dict[str, Any] | None:
        if not kind.startswith("batch."):
            return about_job(kind, about)
        try:
            batch = batches.get(about)
        except BatchNotFound:
            return None
        shown = {"id": batch.id, "state": batch.state.value, "metadata": batch.metadata, "error": batch.problem}
        return {**shown, "counts": batch.counts.model_dump(), "output": batch.output, "errors": batch.errors}

    return Deliverer(
        Hooks(jobs.redis, key_prefix=settings.key_prefix),
        describe=describe,
        secret=settings.webhook_secret.get_secret_value(),
        allow_private=settings.webhook_allow_private,
        on_outcome=on_outcome,
    )
