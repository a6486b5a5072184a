"""A worker whose model step is simulated: it claims and commits through the real store, and draws nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

from calotype_shared.queue.connection import connect_redis
from calotype_shared.queue.job_store import Claim, JobStore
from calotype_shared.schema.jobs import ImageRef, JobError
from calotype_shared.settings import Settings


def image_of(claim: Claim) -> ImageRef:
    config = claim.config
    return ImageRef(
        key=f"{claim.folder}/0.png",
        seed=config.seed,
        width=config.width,
        height=config.height,
        content_type="image/png",
        bytes=1,
        sha256="0" * 64,
    )


class SimulatedWorker:
    """A thread that works on a queue until the block ends. `allow` is asked before each look.

    A job whose prompt is "fail" fails.
    """

    def __init__(
        self,
        settings: Settings,
        queue: str = "demo.bulk",
        *,
        allow: Callable[[], bool] = lambda: True,
        limit: float = float("inf"),
        before_commit: Callable[[Claim], object] = lambda claim: None,
    ) -> None:
        self._redis = connect_redis(settings)
        self._store = JobStore(self._redis, key_prefix=settings.key_prefix)
        self._queue = queue
        self._allow = allow
        self._limit = limit  # jobs
        self._before_commit = before_commit
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self.done: list[str] = []

    def _work(self) -> None:
        while not self._stop.is_set():
            claim = None
            if (
                len(self.done) < self._limit
                and self._allow()
                and self._redis.rpop(self._store.keys.messages(self._queue))
            ):
                claim = self._store.claim(self._queue, worker="simulated", lease_seconds=30)
            if claim is None:
                self._stop.wait(0.005)
                continue
            if claim.config.prompt == "fail":
                self._store.fail(claim, JobError(code="bad", message="as asked"), retry=False)
            else:
                self._before_commit(claim)
                self._store.commit(claim, images=[image_of(claim)], timings={"denoise": 0.001})
            self.done.append(claim.job_id)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._redis.close()
