"""`ScriptedWorker`: a worker without a model. It follows a real worker's protocol; a script decides what happens.

Claims, leases, progress, uploads and commits use `JobStore` and `Storage`, so a client sees the same as with a real
worker.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Self

from redis.exceptions import RedisError

from calotype.testing.images import FORMATS, describe, store_image
from calotype.testing.job_context import ClaimLost, JobContext, WorkerCrash
from calotype_shared.errors import CalotypeError, InvalidRequest, RedisUnavailable, ServiceUnavailable
from calotype_shared.queue.connection import connect_redis
from calotype_shared.queue.job_store import Claim, JobStore
from calotype_shared.queue.keys import queue_name, together
from calotype_shared.schema.enums import Lane
from calotype_shared.schema.jobs import ImageRef, JobError
from calotype_shared.schema.model_card import ModelCard
from calotype_shared.schema.worker_info import WorkerInfo
from calotype_shared.settings import Settings
from calotype_shared.storage.s3 import Storage

log = logging.getLogger(__name__)

Script = Callable[[JobContext], object]

_LISTEN_SECONDS = 0.05  # how long it waits for a message before it checks whether to stop
_REPORT_SECONDS, _REPORT_TTL_SECONDS = 1.0, 60.0
_REAP_SECONDS = 0.5


class ScriptedWorker:
    """A context manager that processes one job at a time in its own thread.

    `script` is called once per attempt, between the claim and the images, and may be replaced at any time; without one
    every job succeeds. If it raises a `CalotypeError`, the job fails permanently with the error's code. Any other
    exception counts as a failure of the worker, and the job is retried until its `max_failures`. `WorkerCrash` ends the
    attempt silently.

    `cards` are the models that it serves. With `store_images=False`, records name images that are not stored, which
    is faster. `limit` is the maximum number of attempts.

    Raises:
        InvalidRequest: a card promises files that a scripted worker cannot write.
    """

    def __init__(
        self,
        settings: Settings,
        cards: Sequence[ModelCard],
        *,
        script: Script | None = None,
        lanes: Sequence[Lane] = (Lane.INTERACTIVE, Lane.BULK),
        store_images: bool = True,
        limit: float = float("inf"),
        lease_seconds: float = 10.0,
        name: str = "scripted-worker",
    ) -> None:
        unknown = {made for card in cards for made in card.output_formats} - {made.value for made in FORMATS}
        if unknown and store_images:
            raise InvalidRequest(
                "a scripted worker writes no such files",
                field="output_formats",
                value=sorted(unknown),
                remedy=f"leave them out of the card ({', '.join(FORMATS)} will do), or use store_images=False",
            )
        self.script = script
        self.name = name
        self.done: list[str] = []  # ids of jobs, one per attempt, in the order in which they ended
        self._cards = {card.name: card for card in cards}
        self._redis = connect_redis(settings)
        self._store = JobStore(
            self._redis, key_prefix=settings.key_prefix, retention_seconds=settings.retention_seconds
        )
        self._storage = Storage(settings) if store_images else None
        self._queues = [queue_name(models, lane) for lane in lanes for models in self._served()]
        self._limit = limit
        self._lease_seconds = lease_seconds
        self._started_at = time.time()
        self._reported = self._reaped = 0.0  # when, by the monotonic clock
        self._claiming = threading.Lock()
        self._paused, self._stopped = threading.Event(), threading.Event()
        self._bug: Exception | None = None
        self._thread = threading.Thread(target=self._run, name=f"calotype-{name}", daemon=True)

    def pause(self) -> None:
        """Claim no more jobs until `resume`. The current job is finished."""
        self._paused.set()
        with self._claiming:  # a claim that has already begun still counts as the current job
            pass

    def resume(self) -> None:
        """Claim again, after `pause`."""
        self._paused.clear()

    def start(self) -> None:
        """Announce the models and begin. Raises RedisUnavailable."""
        self._report()
        self._thread.start()

    def stop(self) -> None:
        """Return the current job at the next call of its script. Raises what ended its thread before."""
        self._stopped.set()
        self._thread.join()
        with contextlib.suppress(RedisUnavailable):
            self._store.retire_worker(self.name)
        self._redis.close()
        if self._bug is not None:
            raise self._bug

    def _served(self) -> list[tuple[str, ...]]:
        """The sets of models whose jobs it takes: each alone, and those that an ensemble or a refiner may join."""
        return [some for size in range(len(self._cards)) for some in itertools.combinations(self._cards, size + 1)]

    def _run(self) -> None:
        while not self._stopped.is_set():
            try:
                self._turn()
            except (RedisError, ServiceUnavailable) as error:  # RedisError comes from waiting for a message
                log.warning("scripted worker waits", extra={"reason": str(error)})
                self._stopped.wait(_LISTEN_SECONDS)
            except Exception as error:
                log.exception("the scripted worker met a bug")
                self._bug = error
                return

    def _turn(self) -> None:
        now = time.monotonic()
        if now - self._reported >= _REPORT_SECONDS:
            self._report()
            self._reported = now
        if now - self._reaped >= _REAP_SECONDS:
            self._store.reap(who=self.name)
            self._reaped = now
        with self._claiming:
            resting = self._paused.is_set() or len(self.done) >= self._limit
            claim = None if resting else self._claim()
        if claim is not None:
            self._work(claim)
            self.done.append(claim.job_id)
        elif resting:
            self._stopped.wait(_LISTEN_SECONDS)

    def _claim(self) -> Claim | None:
        """The next job, after a message announced one."""
        lists = {self._store.keys.messages(queue): queue for queue in self._queues}
        message: tuple[str, str] | None = self._redis.brpop(list(lists), timeout=_LISTEN_SECONDS)  # type: ignore[assignment]
        if message is None:
            return None
        return self._store.claim(lists[message[0]], worker=self.name, lease_seconds=self._lease_seconds)

    def _work(self, claim: Claim) -> None:
        context = JobContext(self._store, claim, lease_seconds=self._lease_seconds, stopped=self._stopped)
        began = time.monotonic()
        try:
            if self.script is not None:
                self.script(context)
            context.progress(context.total_steps)
            images = [self._image(claim, index) for index in range(claim.config.image_count)]
            self._store.commit(claim, images=images, timings={"denoise": time.monotonic() - began})
        except (ClaimLost, WorkerCrash) as left:
            log.info("job left", extra={"job_id": claim.job_id, "attempt": claim.attempt, "reason": repr(left)})
            if isinstance(left, ClaimLost):
                self._store.release(claim)  # refused if the claim is lost; otherwise returned, because the worker stops
        except Exception as error:
            known = isinstance(error, CalotypeError)
            code = error.code if isinstance(error, CalotypeError) else "internal_error"
            problem = JobError(code=code, message=str(error) or type(error).__name__)
            self._store.fail(claim, problem, retry=not known)

    def _image(self, claim: Claim, index: int) -> ImageRef:
        if self._storage is None:
            return describe(claim, index)
        config = claim.config
        model = (config.model, *config.ensemble)[index // config.num_images]
        return store_image(self._storage, claim, index, self._cards[model])

    def _report(self) -> None:
        info = WorkerInfo(
            name=self.name,
            model=together(self._cards),
            device="none",
            host=socket.gethostname(),
            pid=os.getpid(),
            version=version("calotype"),
            schema_number=self._store.schema,
            started_at=self._started_at,
        )
        self._store.announce_worker(info, ttl_seconds=_REPORT_TTL_SECONDS, cards=self._cards.values())

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
