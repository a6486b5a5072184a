"""`JobRunner`: processes one job in a Celery thread, from claim to commit.

Nothing here uses the device: this thread waits for the engine, then encodes and uploads.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TypeVar

from opentelemetry import trace as otel
from opentelemetry.context import Context

from calotype_shared.backoff import delays
from calotype_shared.errors import CalotypeError, ObjectMissing, RedisUnavailable, ServiceUnavailable
from calotype_shared.observability import metric_names as names
from calotype_shared.observability.logs import about
from calotype_shared.observability.tracing import context_of, mark_failed, span_block, trace_id_of
from calotype_shared.queue.job_store import QUARANTINE_CRASHES, Claim, JobStore
from calotype_shared.queue.records import OLDEST
from calotype_shared.schema.enums import Lane
from calotype_shared.schema.jobs import JobError
from calotype_shared.storage.s3 import Storage
from calotype_worker.engine import Engine, Generated, GenerationRequest
from calotype_worker.engine.trace import NoopTracer, Tracer, spanning
from calotype_worker.jobs.delivery import PendingResult, UploadQueue
from calotype_worker.jobs.heartbeat import Heartbeat, RunningJob
from calotype_worker.jobs.inputs import Inputs
from calotype_worker.jobs.reserved_slots import ReservedSlots
from calotype_worker.jobs.size_affinity import SizeAffinity
from calotype_worker.jobs.spool import Spool
from calotype_worker.observability.counters import Counters
from calotype_worker.output.encoder import Encoder
from calotype_worker.threads import compute_alone

log = logging.getLogger(__name__)

T = TypeVar("T")


class JobRunner:
    """Called by many Celery threads at once."""

    def __init__(
        self,
        store: JobStore,
        engine: Engine,
        heartbeat: Heartbeat,
        *,
        encoder: Encoder,
        inputs: Inputs,
        storage: Storage,
        spool: Spool,
        slots: ReservedSlots,
        affinity: SizeAffinity,
        interactive_queues: Sequence[str],
        worker: str,
        lease_seconds: float,
        draining: Callable[[], bool],
        trace: Tracer | None = None,
        counters: Counters | None = None,
        tracer: otel.Tracer | None = None,
    ) -> None:
        self._store = store
        self._engine = engine
        self._heartbeat = heartbeat
        self._encoder = encoder
        self._inputs = inputs
        self._uploads = UploadQueue(storage, spool, finish=self.finish)
        self._slots = slots
        self._affinity = affinity
        self._interactive_queues = tuple(interactive_queues)
        self._worker = worker
        self._lease_seconds = lease_seconds
        self._draining = draining
        self._trace = trace or NoopTracer()
        self._counters = counters or Counters()
        self._tracer = tracer or otel.NoOpTracer()
        self._quarantine = threading.Lock()  # held while this worker runs a suspect job, which may kill it

    def start(self) -> None:
        self._uploads.start()

    @property
    def storage_unavailable(self) -> bool:
        """Whether images wait for the storage."""
        return self._uploads.away

    def stop(self) -> None:
        """Call it when no job is running any more."""
        self._uploads.stop()

    def run(self, queue: str) -> None:
        """Process a queue's next job, if there is one. Returns when the message may be acknowledged; never raises."""
        compute_alone()
        if queue in self._interactive_queues:
            self._next(queue)
            return
        with self._slots.bulk(queue, self._claim_interactive, stopped=self._draining, spare=self._spare) as place:
            if place is True:
                self._next(queue)
            elif place:
                self._begin(place)
        if place is not True:
            self._give_back(queue)

    def _claim_interactive(self) -> Claim | None:
        """Claim an interactive job while there is no place for others. Errors are reported elsewhere."""
        try:
            return self._claim(*self._interactive_queues)
        except CalotypeError:
            return None

    def _spare(self, queue: str) -> bool:
        """Whether the queue also has messages for other workers."""
        try:
            return self._store.spare_messages(queue) > 0
        except CalotypeError:
            return False

    def _give_back(self, queue: str) -> None:
        try:
            self._store.push_message(queue)
        except RedisUnavailable as error:
            log.warning("message not returned", extra={"queue": queue, "reason": str(error)})  # the reaper will see

    def _next(self, queue: str) -> None:
        """Claim a job and process it. Repeats after a job that not every worker accepts: more may be queued."""
        while True:
            if self._draining():
                self._give_back(queue)
                return
            try:
                claim = self._retrying(lambda: self._claim(queue))
            except CalotypeError as error:
                # The job is still queued: the reaper of any worker sends another message for it.
                log.warning("claim failed", extra={"queue": queue, "reason": str(error)})
                return
            if claim is None:
                log.debug("message dropped", extra={"queue": queue})
                return
            self._begin(claim)
            if not _is_quarantined(claim) and claim.record.schema_number == OLDEST:
                return

    def _begin(self, claim: Claim) -> None:
        try:
            if self._draining():
                self._release(claim)
            else:
                self._work(claim)
        finally:
            self._affinity.released(claim)
            if _is_quarantined(claim):
                self._quarantine.release()

    def _claim(self, *queues: str) -> Claim | None:
        """The next job. Those on which workers have died are taken one at a time: one of them kills workers."""
        may_take_suspect = self._quarantine.acquire(blocking=False)
        claim = None
        try:
            with self._affinity.preferred_shapes(*queues) as shapes:
                claim = self._store.claim(
                    *queues,
                    worker=self._worker,
                    lease_seconds=self._lease_seconds,
                    leave_quarantined=not may_take_suspect,
                    look=self._affinity.lookahead,
                    shapes=shapes,
                )
                if claim is not None:
                    self._affinity.claimed(claim)
        finally:
            if may_take_suspect and not (claim and _is_quarantined(claim)):
                self._quarantine.release()
        return claim

    def _work(self, claim: Claim) -> None:
        ids = tuple(f"{claim.folder}/{index}" for index in range(claim.config.image_count))
        record, config = claim.record, claim.config
        span = self._tracer.start_span(
            "job",
            context_of(record.traceparent) if record.traceparent else None,
            kind=otel.SpanKind.CONSUMER,
            attributes={
                "calotype.job_id": claim.job_id,
                "calotype.attempt": claim.attempt,
                "calotype.model": "+".join(config.models),
                "calotype.lane": record.lane.value,
                "calotype.images": config.image_count,
                "calotype.rows": config.image_count * (2 if config.guidance_scale > 1.0 else 1),
                "calotype.steps": config.num_inference_steps,
                "calotype.queue_seconds": _queued(claim),
            },
        )
        pending = PendingResult(job=self._heartbeat.hold(claim, ids), span=span)
        with _about(pending):
            log.info("job claimed", extra={"job_id": claim.job_id, "attempt": claim.attempt})
        self._attempt(pending, self._make)

    def finish(self, pending: PendingResult) -> None:
        """Store the unstored files and commit. Never raises. The delivery's threads call it too."""
        self._attempt(pending, self._send)

    def _attempt(self, pending: PendingResult, work: Callable[[PendingResult], bool]) -> None:
        """`work` returns whether the job is done; if not, the delivery continues with the pending result."""
        job, done, left = pending.job, False, False
        try:
            with _about(pending):
                done = work(pending)
            left = not done
        except CancelledError:
            pass  # because its claim was lost or this worker stops
        except Exception as error:
            with _about(pending):
                self._fail(job, error)
            mark_failed(pending.span, error.code if isinstance(error, CalotypeError) else type(error).__name__)
        finally:
            for request_id in job.request_ids:
                self._engine.cancel(request_id)
            if done or job.lost:
                self._counters.count(names.ATTEMPTS, "succeeded" if done else "lost")
            if not left:
                if not done and job.released and not job.lost:
                    self._release(job.claim)
                # A commit whose response was lost may have succeeded: then the objects are the job's images. If it did
                # not, the sweep of orphans deletes them.
                keep = done or pending.commit_unknown
                self._uploads.forget(pending) if keep else self._uploads.discard(pending)
                self._heartbeat.drop(job)
                outcome = "succeeded" if done else "lost" if job.lost else "ended"
                pending.span.set_attribute("calotype.outcome", outcome)
                pending.span.end()

    def _make(self, pending: PendingResult) -> bool:
        """Generate, encode and store all images of a job; returns them and the times, summed over the images."""
        claim = pending.job.claim
        record, timings = claim.record, pending.timings
        timings["queue"] = _queued(claim)
        with self._phase(pending, "fetch", "fetch inputs"):
            images = self._retrying(lambda: self._inputs.fetch(claim.config), pending.job)
        futures: list[Future[Generated]] = []
        submitted = []
        with self._phase(pending, "prepare"):  # checks, sampler tables, starting noise
            for index, request_id in enumerate(pending.job.request_ids):
                request = GenerationRequest.from_config(
                    claim.config,
                    index=index,
                    request_id=request_id,
                    images=images,
                    interactive=record.lane is Lane.INTERACTIVE,
                )
                futures.append(self._engine.submit(request))
                if pending.job.given_up:  # while this was prepared, so the engine did not have it to cancel
                    raise CancelledError
                submitted.append(time.time())
        for index, future in enumerate(futures):
            generated = future.result()
            self._trace_engine(pending, generated, began=submitted[index])
            with self._phase(pending, "encode", timing="encode_image"):
                files, reference = self._encoder.encode(claim, index, generated)
            pending.files += files
            pending.images.append(reference)
            pending.steps += generated.steps_taken
            for name, value in generated.timings.items():
                timings[name] = timings.get(name, 0.0) + value
            with self._phase(pending, "upload"):
                self._uploads.try_store(pending, files)
        self._affinity.released(claim)
        if not pending.stored and self._uploads.leave(pending):
            return False
        return self._send(pending)

    @contextmanager
    def _phase(self, pending: PendingResult, name: str, said: str = "", *, timing: str = "") -> Iterator[None]:
        """Measures a part of an attempt for the record, the trace and telemetry."""
        with (
            _timed(pending.timings, timing or name),
            spanning(self._trace, _track(name), pending.job.claim.job_id),
            self._part(pending, said or name),
        ):
            yield

    def _part(self, pending: PendingResult, name: str, **attributes: bool) -> AbstractContextManager[otel.Span]:
        """A span within the attempt's span, which may continue in another thread."""
        return span_block(self._tracer, name, within=_within(pending), attributes=dict(attributes))

    def _trace_engine(self, pending: PendingResult, generated: Generated, *, began: float) -> None:
        """Spans of the engine's phases for one image, from `began`, the time of submission."""
        for phase, seconds in generated.timings.items():
            span = self._tracer.start_span(
                "encode prompt" if phase == "encode" else phase,
                _within(pending),
                attributes={"calotype.steps": generated.steps_taken} if phase == "denoise" else None,
                start_time=int(began * 1e9),
            )
            began += seconds
            span.end(int(began * 1e9))

    def _send(self, pending: PendingResult) -> bool:
        """Finish an attempt whose files are all stored, by committing its record. Raises CancelledError."""
        job, claim = pending.job, pending.job.claim
        late = nullcontext() if pending.stored else self._part(pending, "upload", **{"calotype.late": True})
        with _timed(pending.timings, "upload"), late:
            self._uploads.deliver(pending)

        def commit() -> bool:
            try:
                return self._store.commit(claim, images=pending.images, timings=pending.timings, steps=pending.steps)
            except ServiceUnavailable:
                pending.commit_unknown = True
                raise

        with spanning(self._trace, _track("commit"), claim.job_id), self._part(pending, "commit"):
            committed = self._retrying(commit, job)
        if not committed:
            job.lost = True
            self._counters.count(names.FENCED_COMMITS)
            raise CancelledError
        shown = {name: round(seconds, 3) for name, seconds in pending.timings.items()}
        log.info("job succeeded", extra={"job_id": claim.job_id, "images": len(pending.images), **shown})
        return True

    def _fail(self, job: RunningJob, error: Exception) -> None:
        """Record why the attempt failed. The job is retried if that may help, because it was not the cause."""
        claim = job.claim
        known = isinstance(error, CalotypeError)
        retry = not known or not self._engine.alive
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
            state = self._retrying(lambda: self._store.fail(claim, problem, retry=retry), job)
            if not job.lost:
                outcome = "lost" if state is None else "failed" if state.final else "retried"
                self._counters.count(names.ATTEMPTS, outcome)
        except CancelledError:
            log.warning("failure not recorded", extra={"job_id": claim.job_id})

    def _release(self, claim: Claim) -> None:
        try:
            self._retrying(lambda: self._store.release(claim))
            self._counters.count(names.ATTEMPTS, "returned")
            log.info("job returned", extra={"job_id": claim.job_id, "attempt": claim.attempt})
        except RedisUnavailable as error:
            # Its lease runs out instead.
            log.warning("job not returned", extra={"job_id": claim.job_id, "reason": str(error)})

    def _retrying(self, call: Callable[[], T], job: RunningJob | None = None) -> T:
        """Retry `call` with jittered backoff while Redis or the storage is unavailable. Each script checks the fence.

        Raises:
            CancelledError: the claim `held` is lost, or the job is being returned to its queue.
            ServiceUnavailable: without `held`, as soon as this worker drains; `ObjectMissing` immediately.
        """
        for pause in delays(0.1, 5.0):
            try:
                return call()
            except ObjectMissing:
                raise
            except ServiceUnavailable:
                if job is None and self._draining():
                    raise
            if job is None:
                time.sleep(pause)
            elif job.wait_given_up(pause):
                raise CancelledError
        raise AssertionError("unreachable")


def _track(phase: str) -> str:
    """A track of this thread's own: spans of one track must not overlap."""
    return f"{phase} {threading.current_thread().name}"


def _queued(claim: Claim) -> float:
    """Seconds that the job was queued; both times are the server's."""
    record = claim.record
    return max(0.0, (record.started_at or record.queued_at) - record.queued_at)


def _about(pending: PendingResult) -> AbstractContextManager[None]:
    """Adds the job and the trace to log lines within the block."""
    claim = pending.job.claim
    return about(job_id=claim.job_id, trace_id=trace_id_of(pending.span))


def _within(pending: PendingResult) -> Context:
    """A context with only the attempt's span, whatever this thread's current context is."""
    return otel.set_span_in_context(pending.span, Context())


def _is_quarantined(claim: Claim) -> bool:
    return claim.record.crashes >= QUARANTINE_CRASHES


@contextmanager
def _timed(timings: dict[str, float], phase: str) -> Iterator[None]:
    """Adds the seconds that the block takes."""
    began = time.monotonic()
    try:
        yield
    finally:
        timings[phase] = timings.get(phase, 0.0) + time.monotonic() - began
