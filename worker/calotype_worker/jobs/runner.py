"""`JobRunner`: what one Celery thread does with one job, from claim to commit.

Nothing here runs on the device: the engine does that, and this thread waits for it, then encodes and uploads.
"""

from __future__ import annotations

import functools
import logging
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TypeVar

from calotype_shared.errors import CalotypeError, ObjectMissing, RedisUnavailable, ServiceUnavailable
from calotype_shared.observability import metric_names as names
from calotype_shared.observability.logs import about
from calotype_shared.observability.tracing import SILENT, Span, Telemetry, trace_id_of
from calotype_shared.queue.job_store import SUSPECT, Claim, JobStore
from calotype_shared.queue.records import OLDEST
from calotype_shared.schema.jobs import JobError, Lane
from calotype_shared.storage.s3 import Storage
from calotype_worker.engine import Engine, Generated, GenerationRequest
from calotype_worker.engine.trace import Tracer, Untraced, spanning
from calotype_worker.jobs.delivery import Outbox, Parcel
from calotype_worker.jobs.heartbeat import Heartbeat, Held
from calotype_worker.jobs.inputs import Inputs
from calotype_worker.jobs.reserved_slots import Places
from calotype_worker.jobs.size_affinity import Affinity
from calotype_worker.jobs.spool import Spool
from calotype_worker.observability.counters import Tally
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
        places: Places,
        affinity: Affinity,
        urgent_queues: Sequence[str],
        worker: str,
        lease_seconds: float,
        draining: Callable[[], bool],
        trace: Tracer | None = None,
        tally: Tally | None = None,
        telemetry: Telemetry = SILENT,
    ) -> None:
        self._store = store
        self._engine = engine
        self._heartbeat = heartbeat
        self._encoder = encoder
        self._inputs = inputs
        self._outbox = Outbox(storage, spool, finish=self.finish)
        self._places = places
        self._affinity = affinity
        self._urgent_queues = tuple(urgent_queues)
        self._worker = worker
        self._lease_seconds = lease_seconds
        self._draining = draining
        self._trace = trace or Untraced()
        self._tally = tally or Tally()
        self._telemetry = telemetry
        self._suspect = threading.Lock()  # held while this worker works on a job that may kill it

    def start(self) -> None:
        self._outbox.start()

    @property
    def storage_away(self) -> bool:
        """Whether pictures wait for the storage."""
        return self._outbox.away

    def stop(self) -> None:
        """Call it when no job is held any more."""
        self._outbox.stop()

    def run(self, queue: str) -> None:
        """Work on a queue's next job, if there is one. Returns when the message may be acknowledged; never raises."""
        compute_alone()
        if queue in self._urgent_queues:
            self._next(queue)
            return
        with self._places.patient(queue, self._find_urgent, stopped=self._draining, spare=self._spare) as place:
            if place is True:
                self._next(queue)
            elif place:
                self._begin(place)
        if place is not True:
            self._give_back(queue)

    def _find_urgent(self) -> Claim | None:
        """An urgent job to do while there is no place for others; errors are told where they matter."""
        try:
            return self._claim(*self._urgent_queues)
        except CalotypeError:
            return None

    def _spare(self, queue: str) -> bool:
        """Whether other workers, too, can have a message of that queue."""
        try:
            return self._store.spare_messages(queue) > 0
        except CalotypeError:
            return False

    def _give_back(self, queue: str) -> None:
        try:
            self._store.invite(queue)
        except RedisUnavailable as error:
            log.warning("message not given back", extra={"queue": queue, "reason": str(error)})  # the reaper will see

    def _next(self, queue: str) -> None:
        """Claim and work; again after a job that not every worker takes, for others of its kind may be left in line."""
        while True:
            if self._draining():
                self._give_back(queue)
                return
            try:
                claim = self._patiently(lambda: self._claim(queue))
            except CalotypeError as error:
                # The job still waits in line: the reaper of any worker sends another message for it.
                log.warning("claim failed", extra={"queue": queue, "reason": str(error)})
                return
            if claim is None:
                log.debug("message dropped", extra={"queue": queue})
                return
            self._begin(claim)
            if not _is_suspect(claim) and claim.record.schema_number == OLDEST:
                return

    def _begin(self, claim: Claim) -> None:
        try:
            if self._draining():
                self._release(claim)
            else:
                self._work(claim)
        finally:
            self._affinity.left(claim)
            if _is_suspect(claim):
                self._suspect.release()

    def _claim(self, *queues: str) -> Claim | None:
        """The next job. Those on which workers have died are taken one at a time: one of them kills workers."""
        may_take_suspect = self._suspect.acquire(blocking=False)
        claim = None
        try:
            with self._affinity.choosing(*queues) as shapes:
                claim = self._store.claim(
                    *queues,
                    worker=self._worker,
                    lease_seconds=self._lease_seconds,
                    leave_suspects=not may_take_suspect,
                    look=self._affinity.look,
                    shapes=shapes,
                )
                if claim is not None:
                    self._affinity.took(claim)
        finally:
            if may_take_suspect and not (claim and _is_suspect(claim)):
                self._suspect.release()
        return claim

    def _work(self, claim: Claim) -> None:
        ids = tuple(f"{claim.folder}/{index}" for index in range(claim.config.picture_count))
        record, config = claim.record, claim.config
        span = self._telemetry.begin(
            "job",
            kind="consumer",
            parent=record.traceparent,
            job_id=claim.job_id,
            attempt=claim.attempt,
            model="+".join(config.models),
            lane=record.lane.value,
            pictures=config.picture_count,
            rows=config.picture_count * (2 if config.guidance_scale > 1.0 else 1),
            steps=config.num_inference_steps,
            queue_seconds=_queued(claim),
        )
        parcel = Parcel(held=self._heartbeat.hold(claim, ids), span=span)
        with _about(parcel):
            log.info("job claimed", extra={"job_id": claim.job_id, "attempt": claim.attempt})
        self._attempt(parcel, self._make)

    def finish(self, parcel: Parcel) -> None:
        """Store what is not stored yet, and commit. Never raises; the outbox's threads call it too."""
        self._attempt(parcel, self._send)

    def _attempt(self, parcel: Parcel, work: Callable[[Parcel], bool]) -> None:
        """`work` returns whether the job is done; if not, the outbox has the parcel and goes on with it."""
        held, done, left = parcel.held, False, False
        try:
            with _about(parcel):
                done = work(parcel)
            left = not done
        except CancelledError:
            pass  # by its lost claim, or because this worker leaves
        except Exception as error:
            with _about(parcel):
                self._fail(held, error)
            parcel.span.fail(error.code if isinstance(error, CalotypeError) else type(error).__name__)
        finally:
            for request_id in held.request_ids:
                self._engine.cancel(request_id)
            if done or held.lost:
                self._tally.count(names.ATTEMPTS, "succeeded" if done else "lost")
            if not left:
                if not done and held.released and not held.lost:
                    self._release(held.claim)
                self._outbox.forget(parcel) if done else self._outbox.discard(parcel)
                self._heartbeat.drop(held)
                parcel.span.set(outcome="succeeded" if done else "lost" if held.lost else "ended")
                parcel.span.end()

    def _make(self, parcel: Parcel) -> bool:
        """All of a job's pictures, made, encoded and stored; and where the time went, summed over them."""
        claim = parcel.held.claim
        record, timings = claim.record, parcel.timings
        timings["queue"] = _queued(claim)
        with self._phase(parcel, "fetch", "fetch inputs"):
            pictures = self._patiently(lambda: self._inputs.fetch(claim.config), parcel.held)
        futures: list[Future[Generated]] = []
        submitted = []
        with self._phase(parcel, "prepare"):  # checks, sampler tables, starting noise
            for index, request_id in enumerate(parcel.held.request_ids):
                request = GenerationRequest.from_config(
                    claim.config,
                    index=index,
                    request_id=request_id,
                    pictures=pictures,
                    urgent=record.lane is Lane.INTERACTIVE,
                )
                futures.append(self._engine.submit(request))
                submitted.append(time.time())
        for index, future in enumerate(futures):
            generated = future.result()
            _note_engine(parcel.span, generated, began=submitted[index])
            with self._phase(parcel, "encode", timing="encode_image"):
                files, reference = self._encoder.encode(claim, index, generated)
            parcel.files += files
            parcel.images.append(reference)
            for name, value in generated.timings.items():
                timings[name] = timings.get(name, 0.0) + value
            with self._phase(parcel, "upload"):
                self._outbox.try_store(parcel, files)
        self._affinity.left(claim)
        if not parcel.stored and self._outbox.leave(parcel):
            return False
        return self._send(parcel)

    @contextmanager
    def _phase(self, parcel: Parcel, name: str, said: str = "", *, timing: str = "") -> Iterator[None]:
        """A part of an attempt, told to all who want to know how long it takes: record, trace and telemetry."""
        with (
            _timed(parcel.timings, timing or name),
            spanning(self._trace, _track(name), parcel.held.claim.job_id),
            parcel.span.child(said or name),
        ):
            yield

    def _send(self, parcel: Parcel) -> bool:
        """The end of an attempt: everything is in storage, and the record says so. Raises CancelledError."""
        held, claim = parcel.held, parcel.held.claim
        late = nullcontext() if parcel.stored else parcel.span.child("upload", late=True)
        with _timed(parcel.timings, "upload"), late:
            self._outbox.deliver(parcel)
        commit = functools.partial(self._store.commit, claim, images=parcel.images, timings=parcel.timings)
        with spanning(self._trace, _track("commit"), claim.job_id), parcel.span.child("commit"):
            committed = self._patiently(commit, held)
        if not committed:
            held.lost = True
            self._tally.count(names.FENCED_COMMITS)
            raise CancelledError
        shown = {name: round(seconds, 3) for name, seconds in parcel.timings.items()}
        log.info("job succeeded", extra={"job_id": claim.job_id, "pictures": len(parcel.images), **shown})
        return True

    def _fail(self, held: Held, error: Exception) -> None:
        """Note why the attempt failed. Another follows where that may help: the job itself was not to blame."""
        claim = held.claim
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
            state = self._patiently(lambda: self._store.fail(claim, problem, retry=retry), held)
            if not held.lost:
                outcome = "lost" if state is None else "failed" if state.final else "retried"
                self._tally.count(names.ATTEMPTS, outcome)
        except CancelledError:
            log.warning("failure not recorded", extra={"job_id": claim.job_id})

    def _release(self, claim: Claim) -> None:
        try:
            self._patiently(lambda: self._store.release(claim))
            self._tally.count(names.ATTEMPTS, "returned")
            log.info("job returned", extra={"job_id": claim.job_id, "attempt": claim.attempt})
        except RedisUnavailable as error:
            # Its lease runs out instead.
            log.warning("job not returned", extra={"job_id": claim.job_id, "reason": str(error)})

    def _patiently(self, call: Callable[[], T], held: Held | None = None) -> T:
        """`call` again, with jittered backoff, while Redis or the storage is away. Every script checks its fence.

        Raises:
            CancelledError: the claim `held` is lost, or to be handed back.
            ServiceUnavailable: without `held`, once this worker drains; `ObjectMissing` at once.
        """
        pause = 0.1
        while True:
            try:
                return call()
            except ObjectMissing:
                raise
            except ServiceUnavailable:
                if held is None and self._draining():
                    raise
            ends = time.monotonic() + random.uniform(0, pause)
            while time.monotonic() < ends:
                if held is not None and held.given_up:
                    raise CancelledError
                time.sleep(min(0.2, pause))
            pause = min(5.0, pause * 2)


def _track(phase: str) -> str:
    """A track of this thread's own: spans of one track must not overlap."""
    return f"{phase} {threading.current_thread().name}"


def _queued(claim: Claim) -> float:
    """Seconds that the job has waited in line; both times are the server's."""
    record = claim.record
    return max(0.0, (record.started_at or record.queued_at) - record.queued_at)


def _about(parcel: Parcel) -> AbstractContextManager[None]:
    """Log lines within the block say which job and which trace they are of."""
    claim = parcel.held.claim
    return about(job_id=claim.job_id, trace_id=trace_id_of(parcel.span.traceparent or claim.record.traceparent))


def _note_engine(span: Span, generated: Generated, *, began: float) -> None:
    """What the engine did with one picture, phase after phase from when it was handed over."""
    for phase, seconds in generated.timings.items():
        name = "encode prompt" if phase == "encode" else phase
        span.note(name, began, began + seconds, **({"steps": generated.steps_taken} if phase == "denoise" else {}))
        began += seconds


def _is_suspect(claim: Claim) -> bool:
    return claim.record.crashes >= SUSPECT


@contextmanager
def _timed(timings: dict[str, float], phase: str) -> Iterator[None]:
    """Adds the seconds that the block takes."""
    began = time.monotonic()
    try:
        yield
    finally:
        timings[phase] = timings.get(phase, 0.0) + time.monotonic() - began
