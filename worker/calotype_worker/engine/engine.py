"""`Engine`: one thread that owns a device. Requests join and leave its step batches at any denoising step.

The loop: take what was submitted and cancelled, let the scheduler choose a group and who joins it, run one step,
decode finished latents a few at a time. `submit` does in the caller's thread all that needs no device.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

import torch

from calotype_shared.errors import CalotypeError, GenerationFailed, InvalidRequest
from calotype_worker.engine.conditioning import ConditioningCache
from calotype_worker.engine.decoder import Decoder, Finished
from calotype_worker.engine.request import Generated, GenerationRequest, GroupKey
from calotype_worker.engine.scheduler import Scheduler
from calotype_worker.engine.stats import Counters, EngineStats
from calotype_worker.engine.step_batch import StepBatch
from calotype_worker.engine.ticket import Ticket, prepare
from calotype_worker.models.base import StepModel
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
    deterministic: bool = False

    def __post_init__(self) -> None:
        for name, value, least in (
            ("max_rows", self.max_rows, 2),  # a guided request alone needs two
            ("decode_batch", self.decode_batch, 1),
            ("decode_patience", self.decode_patience, 0),
            ("conditioning_cache", self.conditioning_cache, 2),
        ):
            if value < least:
                raise InvalidRequest("is too small", field=name, value=value, remedy=f"use at least {least}")


class Engine:
    """Start it, submit requests from any thread, stop it. `on_fatal` is called once if the device is lost."""

    def __init__(
        self,
        model: StepModel,
        settings: EngineSettings | None = None,
        *,
        on_fatal: Callable[[BaseException], None] | None = None,
        tables: TableCache | None = None,
    ) -> None:
        self.model = model
        self.settings = settings or EngineSettings()
        self._on_fatal = on_fatal
        self._tables = tables or TableCache()
        self._wake = threading.Condition()  # guards the four below
        self._inbox: deque[Ticket] = deque()
        self._cancelled: set[str] = set()
        self._tickets: dict[str, Ticket] = {}  # every request not yet resolved
        self._stop_at: float | None = None
        # From here on the engine's thread alone.
        self._scheduler: Scheduler[GroupKey] = Scheduler(self._row_budget)
        self._batches: dict[GroupKey, StepBatch] = {}
        self._conditioning = ConditioningCache(
            model, capacity=self.settings.conditioning_cache, together=not self.settings.deterministic
        )
        self._decoder = Decoder(
            model,
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
        ticket = prepare(request, self.model, self._tables)
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
        return (ticket.slot.step, ticket.slot.total_steps) if ticket else None

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
        native_width, native_height = self.model.card.native_sizes[0]
        _, native_h, native_w = self.model.latent_shape(native_width, native_height)
        _, h, w = group.latent_shape
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
            self._scheduler.add(ticket.id, ticket.group, ticket.slot.request.rows)
        self._drop(cancelled)
        plan = self._scheduler.plan()
        if plan is not None:
            self._step(plan.group, [self._tickets[request_id] for request_id in plan.admitted])
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

    def _step(self, group: GroupKey, admitted: list[Ticket]) -> None:
        """Admit, then run one denoising step of a group."""
        self._admit(group, admitted)
        batch = self._batches.get(group)
        if batch is None:
            return
        began = time.monotonic()
        report = batch.step()
        now = time.monotonic()
        self._counters.count_step(report, now - began)
        for slot, error in report.failed:
            self._fail(self._tickets[slot.request.request_id], error)
        for slot, latents in report.finished:
            ticket = self._tickets[slot.request.request_id]
            ticket.denoised = now
            self._scheduler.remove(ticket.id)
            self._decoder.add(Finished(request_id=ticket.id, latents=latents))
        if not batch.slots:
            del self._batches[group]

    def _admit(self, group: GroupKey, tickets: list[Ticket]) -> None:
        if not tickets:
            return
        began = time.monotonic()
        prompts = {text for t in tickets for text in _texts(t.slot.request)}
        encoded = self._conditioning.encode(prompts)
        seconds = time.monotonic() - began
        self._counters.encode_seconds += seconds
        ready = []
        for ticket in tickets:
            request = ticket.slot.request
            error = next((e for text in _texts(request) if isinstance(e := encoded[text], Exception)), None)
            if error is not None:
                self._fail(ticket, error)
                continue
            ticket.slot.conditioning = encoded[request.prompt]  # type: ignore[assignment]
            ticket.slot.negative = encoded[request.negative_prompt] if request.guided else None  # type: ignore[assignment]
            ticket.admitted, ticket.encode_seconds = began, seconds
            ready.append(ticket.slot)
        if not ready:
            return
        if group not in self._batches:
            buckets = (self._row_budget(group),) if self.settings.deterministic else self.settings.row_buckets
            self._batches[group] = StepBatch(self.model, shape=group.latent_shape, buckets=buckets)
        self._batches[group].join(ready)

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
        batch = self._batches.get(ticket.group)
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


def _texts(request: GenerationRequest) -> tuple[str, ...]:
    return (request.prompt, request.negative_prompt) if request.guided else (request.prompt,)
