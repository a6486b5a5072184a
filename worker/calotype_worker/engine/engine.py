"""`Engine`: one thread that owns a device. Requests join and leave its step batches at any denoising step.

The loop: take what was submitted and cancelled, let the scheduler choose a group and who joins it, run one step,
decode finished latents a few at a time. `submit` does in the caller's thread all that needs no device.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
import torch

from calotype_shared.errors import CalotypeError, GenerationFailed, InvalidRequest
from calotype_worker.engine.admission import Admission
from calotype_worker.engine.decoder import Decoder, Finished
from calotype_worker.engine.request import Generated, GenerationRequest, GroupKey
from calotype_worker.engine.scheduler import Scheduler
from calotype_worker.engine.split import run_splitting
from calotype_worker.engine.stats import Counters, EngineStats
from calotype_worker.engine.step_batch import StepBatch
from calotype_worker.engine.ticket import Ticket, prepare
from calotype_worker.models.base import OpaqueModel, StepModel
from calotype_worker.models.pool import AnyModel, ModelPool
from calotype_worker.sampling.table import TableCache

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """How an engine uses its device.

    `max_rows` is for pictures of the model's native area and shrinks as the area grows. `row_buckets` pads every
    forward pass to one of a few sizes, for compiled graphs. `deterministic` makes a picture the same bit for bit
    whatever stood beside it, by one fixed number of rows (a power of two): costly at low load.
    """

    max_rows: int = 32
    row_buckets: tuple[int, ...] = ()
    decode_batch: int = 4  # pictures decoded together
    decode_patience: int = 4  # steps a finished latent waits for company at most
    conditioning_cache: int = 512  # prompts
    model_patience: int = 50  # steps a model that is not on the device waits for those that are
    deterministic: bool = False

    def __post_init__(self) -> None:
        for name, value, least in (
            ("max_rows", self.max_rows, 2),  # a guided request alone needs two
            ("decode_batch", self.decode_batch, 1),
            ("decode_patience", self.decode_patience, 0),
            ("conditioning_cache", self.conditioning_cache, 2),
            ("model_patience", self.model_patience, 0),
        ):
            if value < least:
                raise InvalidRequest("is too small", field=name, value=value, remedy=f"use at least {least}")


class Engine:
    """Start it, submit requests from any thread, stop it. `on_fatal` is called once if the device is lost.

    `on_preview(request_id, step, picture)` gets rough pictures, uint8 (h, w, 3), in the engine's thread: it must not
    wait.
    """

    def __init__(
        self,
        models: AnyModel | ModelPool,
        settings: EngineSettings | None = None,
        *,
        on_fatal: Callable[[BaseException], None] | None = None,
        on_preview: Callable[[str, int, np.ndarray], None] | None = None,
        tables: TableCache | None = None,
    ) -> None:
        self.models = models if isinstance(models, ModelPool) else ModelPool([models])
        self.settings = settings or EngineSettings()
        self._on_fatal = on_fatal
        self._on_preview = on_preview
        self._tables = tables or TableCache()
        self._wake = threading.Condition()  # guards the four below
        self._inbox: deque[Ticket] = deque()
        self._cancelled: set[str] = set()
        self._tickets: dict[str, Ticket] = {}  # every request not yet resolved
        self._stop_at: float | None = None
        # From here on the engine's thread alone.
        self._scheduler: Scheduler[GroupKey] = Scheduler(
            self._row_budget,
            at_hand=lambda group: group.model in self.models.resident,
            patience=self.settings.model_patience,
        )
        self._batches: dict[GroupKey, StepBatch] = {}
        self._admission = Admission(
            cache_capacity=self.settings.conditioning_cache, together=not self.settings.deterministic
        )
        self._decoder = Decoder(
            self.models,
            batch=1 if self.settings.deterministic else self.settings.decode_batch,
            patience=self.settings.decode_patience,
        )
        self._counters = Counters()
        self._thread = threading.Thread(target=self._main, name="calotype-engine", daemon=True)

    # ---- from any thread

    @property
    def alive(self) -> bool:
        """Whether the engine's thread runs, so that submitted requests will be worked on."""
        return self._thread.is_alive()

    def start(self) -> None:
        self._thread.start()

    def submit(self, request: GenerationRequest) -> Future[Generated]:
        """Queue one picture.

        The future gives a `Generated`, or raises GenerationFailed, InvalidRequest, or CancelledError after `cancel`.

        Raises:
            InvalidRequest: the model cannot do this; nothing was queued.
            GenerationFailed: the engine is stopping or its device is lost.
        """
        ticket = prepare(request, self.models, self._tables, exact=self.settings.deterministic)
        if ticket.total_steps == 0 and request.init_image is not None:
            ticket.resolve(ticket.generated(request.init_image, ticket.submitted))  # strength 0: the source itself
            return ticket.future
        with self._wake:
            if self._stop_at is not None or not self.alive:
                raise GenerationFailed(f"request {request.request_id!r}: the engine is not running; try another worker")
            if request.request_id in self._tickets:
                raise InvalidRequest(
                    "is already in the engine", field="request_id", value=request.request_id, remedy="use a unique id"
                )
            self._tickets[request.request_id] = ticket
            self._inbox.append(ticket)
            self._wake.notify()
        return ticket.future

    def cancel(self, request_id: str) -> bool:
        """Take a request out before the next step. False if the engine does not have it (any more)."""
        with self._wake:
            if request_id not in self._tickets:
                return False
            self._cancelled.add(request_id)
            self._wake.notify()
            return True

    def progress(self, request_id: str) -> tuple[int, int] | None:
        """(network evaluations done, evaluations in total), or None if the engine does not have the request."""
        ticket = self._tickets.get(request_id)
        return (ticket.steps_done, ticket.total_steps) if ticket else None

    def stats(self) -> EngineStats:
        with self._wake:
            in_flight = len(self._tickets)
        return self._counters.snapshot(in_flight=in_flight)

    def stop(self, *, drain_seconds: float = 0.0) -> None:
        """Refuse new requests, finish what is in flight for up to `drain_seconds`, cancel the rest, end the thread."""
        with self._wake:
            self._stop_at = time.monotonic() + drain_seconds
            self._wake.notify()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join()

    def _row_budget(self, group: GroupKey) -> int:
        model = self.models.get(group.model)
        if isinstance(model, OpaqueModel):
            return model.max_batch
        native_width, native_height = model.card.native_sizes[0]
        _, native_h, native_w = model.latent_shape(native_width, native_height)
        _, h, w = group.step_shape
        budget = max(2, min(self.settings.max_rows, self.settings.max_rows * native_h * native_w // (h * w)))
        if self.settings.deterministic:
            # Measured: with 6 rows on two threads a row's last bits depend on its position, with 4 or 8 they do not.
            budget = 1 << (budget.bit_length() - 1)
        return budget

    # ---- the engine's thread

    def _main(self) -> None:
        try:
            with torch.inference_mode():
                while self._take_turn():
                    pass
        except BaseException as error:
            log.exception("engine lost its device or met a bug; every request in it fails")
            self._abandon(GenerationFailed(f"the engine stopped: {error}; the job can run on another worker"))
            if self._on_fatal is not None:
                self._on_fatal(error)
        else:
            self._abandon(None)

    def _take_turn(self) -> bool:
        """One round of the loop. False when the engine should end."""
        waited = time.monotonic()
        with self._wake:
            while not (self._inbox or self._cancelled or len(self._scheduler) or len(self._decoder)):
                if self._stop_at is not None:
                    return False
                self._wake.wait()
            fresh, self._inbox = list(self._inbox), deque()
            cancelled, self._cancelled = self._cancelled, set()
            stop_at = self._stop_at
        self._counters.idle_seconds += time.monotonic() - waited
        if stop_at is not None and time.monotonic() >= stop_at:
            return False
        for ticket in fresh:
            self._scheduler.add(ticket.id, ticket.group, ticket.rows)
        self._drop(cancelled)
        plan = self._scheduler.plan()
        if plan is not None:
            admitted = [self._tickets[request_id] for request_id in plan.admitted]
            model = self.models.use(plan.group.model)
            if isinstance(model, OpaqueModel):
                self._run(model, admitted)
            else:
                self._step(model, plan.group, admitted)
        self._decode()
        return True

    def _drop(self, cancelled: set[str]) -> None:
        """Free the rows of requests that were cancelled, here or through their future."""
        with self._wake:
            cancelled |= {request_id for request_id, ticket in self._tickets.items() if ticket.future.cancelled()}
        for request_id in cancelled:
            ticket = self._tickets.get(request_id)
            if ticket is None:
                continue  # finished meanwhile
            self._decoder.discard(request_id)
            self._leave(ticket)
            ticket.future.cancel()
            self._forget(ticket)
            self._counters.cancelled += 1

    def _step(self, model: StepModel, group: GroupKey, admitted: list[Ticket]) -> None:
        """Admit, then run one denoising step of a group."""
        self._admit(model, group, admitted)
        batch = self._batches.get(group)
        if batch is None:
            return
        began = time.monotonic()
        report = batch.step()
        now = time.monotonic()
        self._counters.count_step(report, now - began)
        if self._on_preview is not None:
            for slot, picture in report.previews:
                ticket = self._tickets[slot.request.request_id]
                self._on_preview(ticket.id, ticket.steps_done, picture)
        for slot, error in report.failed:
            self._fail(self._tickets[slot.request.request_id], error)
        for slot, latents in report.finished:
            ticket = self._tickets[slot.request.request_id]
            self._scheduler.remove(ticket.id)
            if ticket.next_stage(latents):
                self._scheduler.add(ticket.id, ticket.group, ticket.rows)
                continue
            ticket.denoised = now
            self._decoder.add(Finished(request_id=ticket.id, model=group.model, latents=latents))
        if not batch.slots:
            del self._batches[group]

    def _admit(self, model: StepModel, group: GroupKey, tickets: list[Ticket]) -> None:
        if not tickets:
            return
        began = time.monotonic()
        outcomes = self._admission.admit(model, [ticket.stages[0] for ticket in tickets])
        seconds = time.monotonic() - began
        self._counters.encode_seconds += seconds
        ready = []
        for ticket, error in zip(tickets, outcomes, strict=True):
            if error is not None:
                self._fail(ticket, error)
                continue
            ticket.admitted = ticket.admitted or began
            ticket.encode_seconds += seconds
            ready.append(ticket.slot)
        if not ready:
            return
        if group not in self._batches:
            buckets = (self._row_budget(group),) if self.settings.deterministic else self.settings.row_buckets
            self._batches[group] = StepBatch(
                model, shape=group.step_shape, buckets=buckets, exact=self.settings.deterministic
            )
        self._batches[group].join(ready)

    def _run(self, model: OpaqueModel, tickets: list[Ticket]) -> None:
        """A whole run of a pipeline that cannot be stepped."""
        began = time.monotonic()

        def watch(steps_done: int) -> frozenset[str]:
            with self._wake:
                leaving = self._stop_at is not None and time.monotonic() >= self._stop_at
                cancelled = set(self._cancelled)
            for ticket in tickets:
                ticket.steps_before = steps_done
            return frozenset(t.id for t in tickets if leaving or t.id in cancelled or t.future.cancelled())

        for ticket in tickets:
            ticket.admitted = began
        results = run_splitting(tickets, lambda chosen: model.run([ticket.request for ticket in chosen], watch))
        now = time.monotonic()
        self._counters.step_seconds += now - began
        for ticket, result in zip(tickets, results, strict=True):
            if isinstance(result, Exception):
                self._fail(ticket, result)
                continue
            self._leave(ticket)
            self._forget(ticket)
            if result is None:
                ticket.future.cancel()
                self._counters.cancelled += 1
                continue
            self._counters.images += 1
            timings = {"wait": began - ticket.submitted, "denoise": now - began}
            ticket.resolve(dataclasses.replace(result, timings=timings))

    def _decode(self) -> None:
        """Decode what is due: a full small batch, what waited long enough, or all when nothing else can run."""
        began = time.monotonic()
        results = self._decoder.run(flush=not len(self._scheduler))
        if not results:
            return
        now = time.monotonic()
        self._counters.decode_seconds += now - began
        for request_id, image in results:
            ticket = self._tickets[request_id]
            if isinstance(image, Exception):
                self._fail(ticket, image)
                continue
            self._counters.images += 1
            self._forget(ticket)
            ticket.resolve(ticket.generated(image, now))

    def _fail(self, ticket: Ticket, error: Exception) -> None:
        """One request fails; the others never notice."""
        self._counters.failed += 1
        self._leave(ticket)
        self._forget(ticket)
        if not isinstance(error, CalotypeError):
            log.error("request failed", extra={"request_id": ticket.id}, exc_info=error)
            failure = GenerationFailed(f"request {ticket.id!r}: {type(error).__name__}: {error}")
            failure.__cause__ = error
            error = failure
        ticket.resolve(error)

    def _leave(self, ticket: Ticket) -> None:
        """Out of the scheduler and its step batch, wherever it stands."""
        if self._scheduler.has(ticket.id):
            self._scheduler.remove(ticket.id)
        batch = self._batches.get(ticket.group) if ticket.stages else None
        if batch is not None and any(slot is ticket.slot for slot in batch.slots):
            batch.leave([ticket.slot])
            if not batch.slots:
                del self._batches[ticket.group]

    def _forget(self, ticket: Ticket) -> None:
        with self._wake:
            self._tickets.pop(ticket.id, None)

    def _abandon(self, error: Exception | None) -> None:
        """End every request that is left: with `error`, or as cancelled."""
        with self._wake:
            self._stop_at = self._stop_at or 0.0
            tickets, self._tickets = list(self._tickets.values()), {}
            self._inbox.clear()
        for ticket in tickets:
            if error is None:
                ticket.future.cancel()
            else:
                ticket.resolve(error)
