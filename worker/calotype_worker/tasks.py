"""`JobRunner`: what one Celery thread does with one job, from claim to commit.

Nothing here runs on the device: the engine does that, and this thread waits for it, then encodes and uploads.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from typing import TypeVar

from calotype_shared.errors import CalotypeError, RedisUnavailable, StorageUnavailable
from calotype_shared.jobs import ImageRef, JobError
from calotype_shared.store import Claim, JobStore
from calotype_worker.engine import Engine, Generated, GenerationRequest
from calotype_worker.heartbeat import Heartbeat, Held
from calotype_worker.inputs import Inputs
from calotype_worker.output.upload import Uploader

log = logging.getLogger(__name__)

_PATIENCE_SECONDS = 120.0  # with Redis away while a finished job wants its commit
T = TypeVar("T")


class JobRunner:
    """Called by many Celery threads at once; holds no state of its own."""

    def __init__(
        self,
        store: JobStore,
        engine: Engine,
        heartbeat: Heartbeat,
        uploader: Uploader,
        inputs: Inputs,
        *,
        worker: str,
        lease_seconds: float,
        draining: Callable[[], bool],
    ) -> None:
        self._store = store
        self._engine = engine
        self._heartbeat = heartbeat
        self._uploader = uploader
        self._inputs = inputs
        self._worker = worker
        self._lease_seconds = lease_seconds
        self._draining = draining

    def run(self, job_id: str) -> None:
        """Work on a job if it is there to be taken. Returns when its message may be acknowledged; never raises."""
        try:
            claim = self._patiently(lambda: self._claim(job_id))
        except CalotypeError as error:
            # Still queued in its record: the reaper of any worker publishes it again.
            log.warning("claim failed", extra={"job_id": job_id, "reason": str(error)})
            return
        if claim is None:
            log.debug("message dropped", extra={"job_id": job_id})
            return
        if self._draining():
            self._release(claim)
            return
        self._work(claim)

    def _claim(self, job_id: str) -> Claim | None:
        return self._store.claim(job_id, worker=self._worker, lease_seconds=self._lease_seconds)

    def _work(self, claim: Claim) -> None:
        ids = tuple(f"{claim.job_id}/{claim.attempt}/{index}" for index in range(claim.config.picture_count))
        log.info("job claimed", extra={"job_id": claim.job_id, "attempt": claim.attempt})
        uploaded: list[str] = []
        with self._heartbeat.holding(claim, ids) as held:
            try:
                images, timings = self._make(claim, ids, uploaded)
                if self._patiently(lambda: self._store.commit(claim, images=images, timings=timings)):
                    shown = {name: round(seconds, 3) for name, seconds in timings.items()}
                    log.info("job succeeded", extra={"job_id": claim.job_id, "pictures": len(images), **shown})
                    return
                held.lost = True
            except CancelledError:
                pass  # by its lost claim, or because this worker leaves
            except Exception as error:
                self._fail(claim, error)
            finally:
                for request_id in ids:
                    self._engine.cancel(request_id)
            self._give_up(held, uploaded)

    def _make(self, claim: Claim, ids: tuple[str, ...], uploaded: list[str]) -> tuple[list[ImageRef], dict[str, float]]:
        """All of a job's pictures, made, encoded and uploaded; and where the time went, summed over them."""
        record = claim.record
        timings = {"queue": max(0.0, (record.started_at or record.queued_at) - record.queued_at)}
        began = time.monotonic()
        pictures = self._inputs.fetch(claim.config)
        timings["fetch"] = time.monotonic() - began  # of uploads
        began = time.monotonic()
        futures: list[Future[Generated]] = [
            self._engine.submit(
                GenerationRequest.from_config(claim.config, index=index, request_id=request_id, pictures=pictures)
            )
            for index, request_id in enumerate(ids)
        ]
        timings["prepare"] = time.monotonic() - began  # checks, sampler tables, starting noise
        images = []
        for index, future in enumerate(futures):
            generated = future.result()
            reference, seconds = self._uploader.upload(claim, index, generated, uploaded)
            images.append(reference)
            for name, value in {**generated.timings, **seconds}.items():
                timings[name] = timings.get(name, 0.0) + value
        return images, timings

    def _fail(self, claim: Claim, error: Exception) -> None:
        """Note why the attempt failed. Another follows where that may help: the job itself was not to blame."""
        known = isinstance(error, CalotypeError)
        retry = isinstance(error, (StorageUnavailable, RedisUnavailable)) or not known or not self._engine.alive
        problem = JobError(
            code=error.code if isinstance(error, CalotypeError) else "internal_error",
            message=str(error) or type(error).__name__,
        )
        log.warning(
            "attempt failed",
            extra={"job_id": claim.job_id, "attempt": claim.attempt, "code": problem.code, "reason": problem.message},
            exc_info=None if known else error,
        )
        try:
            self._patiently(lambda: self._store.fail(claim, problem, retry=retry))
        except RedisUnavailable as lost:
            log.warning("failure not recorded", extra={"job_id": claim.job_id, "reason": str(lost)})

    def _give_up(self, held: Held, uploaded: list[str]) -> None:
        """After an attempt without a commit: hand the job back if that is ours to do, and remove what it uploaded."""
        if held.released and not held.lost:
            self._release(held.claim)
        self._uploader.discard(uploaded)

    def _release(self, claim: Claim) -> None:
        try:
            self._patiently(lambda: self._store.release(claim))
            log.info("job returned", extra={"job_id": claim.job_id, "attempt": claim.attempt})
        except RedisUnavailable as error:
            # Its lease runs out instead.
            log.warning("job not returned", extra={"job_id": claim.job_id, "reason": str(error)})

    def _patiently(self, call: Callable[[], T]) -> T:
        """`call` again, with jittered backoff, while Redis is away. Safe because every script checks its fence."""
        began, pause = time.monotonic(), 0.1
        while True:
            try:
                return call()
            except RedisUnavailable:
                if time.monotonic() - began > _PATIENCE_SECONDS or self._draining():
                    raise
            time.sleep(random.uniform(0, pause))
            pause = min(5.0, pause * 2)
