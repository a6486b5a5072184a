"""`Engine`: one thread that owns a device. Requests join and leave its step batches at any denoising step.

The loop: read submissions and cancellations, let the scheduler choose a group and which requests join it, run one
step, decode finished latents a few at a time. `submit` does all work that needs no device in the caller's thread.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future

import numpy as np
import torch

from calotype_shared.errors import CalotypeError, GenerationFailed, InvalidRequest
from calotype_shared.schema.worker_info import StepGroup
from calotype_worker.engine.compiled import buckets_up_to
from calotype_worker.engine.decoder import Decoder, Finished
from calotype_worker.engine.failure_isolation import is_fatal
from calotype_worker.engine.memory_limit import is_out_of_memory
from calotype_worker.engine.pipeline_batches import PipelineBatches
from calotype_worker.engine.profile import Profile, sizes_up_to
from calotype_worker.engine.profiler import profile_models
from calotype_worker.engine.request_state import RequestState, prepare
from calotype_worker.engine.row_budget import RowBudgets
from calotype_worker.engine.running import running_groups
from calotype_worker.engine.scheduler import Plan, Scheduler
from calotype_worker.engine.settings import EngineSettings
from calotype_worker.engine.stats import EngineStats
from calotype_worker.engine.step_batches import StepBatches
from calotype_worker.engine.step_pacer import StepPacer, events_of, work_on
from calotype_worker.engine.trace import NoopTracer, Tracer
from calotype_worker.engine.turn_clock import TurnClock
from calotype_worker.models.base import StepModel
from calotype_worker.models.pipeline.model import PipelineModel
from calotype_worker.models.pool import AnyModel, ModelPool
from calotype_worker.request import Generated, GenerationRequest, GroupKey
from calotype_worker.sampling.table import TableCache
from calotype_worker.threads import alone_meanwhile, compute_with

log = logging.getLogger(__name__)


class Engine:
    """Start it, submit requests from any thread, stop it. `on_fatal` is called once if the device is lost.

    `on_preview(request_id, step, image)` receives rough images, uint8 (h, w, 3), in the engine's thread, and must not
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
        trace: Tracer | None = None,
    ) -> None:
        self.models = models if isinstance(models, ModelPool) else ModelPool([models])
        self.settings = settings or EngineSettings()
        self._check_models()
        self._on_fatal = on_fatal
        self._on_preview = on_preview
        self._tables = tables or TableCache()
        self._trace = trace or NoopTracer()
        self._wake = threading.Condition()  # guards the four below
        self._inbox: deque[RequestState] = deque()
        self._cancelled: set[str] = set()
        self._states: dict[str, RequestState] = {}  # all unresolved requests
        self._stop_at: float | None = None
        # From here on the engine's thread alone.
        self._counters = EngineStats()
        self._budgets = RowBudgets(
            self.models,
            max_rows=self.settings.max_rows,
            powers_of_two=self.settings.deterministic,
            on_out_of_memory=self._counters.count_out_of_memory,
        )
        self._device = self.models.first.device  # one for all of them
        self._pacer: StepPacer[GroupKey] = StepPacer(events_of(self._device))
        self._scheduler: Scheduler[GroupKey] = Scheduler(
            self._budgets.current,
            step_cost=self._pacer.cost,
            resident=lambda group: group.model in self.models.resident,
            switch_delay_steps=self.settings.model_switch_delay_steps,
        )
        self._clock = TurnClock(self.settings.hang_seconds)
        self._batches = StepBatches(self._budgets, self.settings)
        self._pipelines = PipelineBatches(self._budgets)
        self._decoder = Decoder(
            self.models,
            batch=1 if self.settings.deterministic else self.settings.decode_batch,
            max_wait_steps=self.settings.decode_max_wait_steps,
            limits=self._budgets.limit,
            steps_until_next=self._batches.steps_until_next,
        )
        self._profile_seconds: float | None = None
        self._profiled: Future[None] = Future()
        self._threads = torch.get_num_threads()  # used by the engine's operators; other threads may use fewer
        self._thread = threading.Thread(target=self._main, name="calotype-engine", daemon=True)

    # ---- from any thread

    @property
    def alive(self) -> bool:
        """Whether the engine's thread runs, so that submitted requests will be worked on."""
        return self._thread.is_alive()

    @property
    def overdue(self) -> str | None:
        """What the engine hangs in, in words; None while it makes progress. Its device is then of no more use."""
        return self._clock.overdue

    def start(self) -> None:
        """Start the engine's thread. Does nothing if it has been started."""
        if self._thread.ident is None:
            self._thread.start()

    def submit(self, request: GenerationRequest) -> Future[Generated]:
        """Queue one image.

        The future gives a `Generated`, or raises GenerationFailed, InvalidRequest, or CancelledError after `cancel`.

        Raises:
            InvalidRequest: the model does not support this; nothing was queued.
            GenerationFailed: the engine is stopping or its device is lost.
        """
        with alone_meanwhile():
            state = prepare(request, self.models, self._tables, exact=self.settings.deterministic)
        if state.total_steps == 0 and request.init_image is not None:
            state.resolve(state.generated(request.init_image, state.submitted))  # strength 0: the source itself
            return state.future
        with self._wake:
            if self._stop_at is not None or not self.alive:
                raise GenerationFailed(f"request {request.request_id!r}: the engine is not running; try another worker")
            if request.request_id in self._states:
                raise InvalidRequest(
                    "is already in the engine", field="request_id", value=request.request_id, remedy="use a unique id"
                )
            self._states[request.request_id] = state
            self._inbox.append(state)
            self._wake.notify()
        return state.future

    def cancel(self, request_id: str) -> bool:
        """Take a request out before the next step. False if the engine does not have it (any more)."""
        with self._wake:
            if request_id not in self._states:
                return False
            self._cancelled.add(request_id)
            self._wake.notify()
            return True

    def progress(self, request_id: str) -> tuple[int, int] | None:
        """(network evaluations done, evaluations in total), or None if the engine does not have the request."""
        state = self._states.get(request_id)
        return (state.steps_done, state.total_steps) if state else None

    def stats(self) -> EngineStats:
        with self._wake:
            in_flight = len(self._states)
        return self._counters.snapshot(in_flight=in_flight)

    def running(self) -> tuple[StepGroup, ...]:
        """The largest step batches at this moment, row by row. Does not block the step loop."""
        with self._wake:
            states = list(self._states.values())
        return running_groups(states, self._batches.snapshot(), self._budgets.current)

    def row_budget(self, model: str, width: int, height: int) -> int:
        """The maximum number of rows of one image size that may run together.

        Raises:
            InvalidRequest: the model is not served here, or does not support the size.
        """
        found = self.models.get(model)
        found.card.check_size(width, height)
        if isinstance(found, PipelineModel):
            return self._budgets.current(
                GroupKey(model=found.card.name, latent_shape=("pipeline", width, height, None))
            )
        shape = found.latent_shape(width, height)
        return self._budgets.current(GroupKey(model=found.card.name, latent_shape=shape))

    def rows_of_image(self, model: str, guided: bool) -> int:
        """The number of rows of one image."""
        found = self.models.get(model)
        return 1 if isinstance(found, PipelineModel) or not guided or found.embedded_guidance else 2

    def profile(self, *, seconds: float) -> list[Profile]:
        """Start the engine, measuring steps of the models' native sizes first; row budgets are then at the knee.

        Takes about `seconds`, plus the time to compile graphs. Does nothing in deterministic
        mode, where the number of rows must not depend on a measurement. If measuring fails, its error is raised and the
        engine runs with the budgets of its settings, unless the device is lost.

        Raises:
            GenerationFailed: the engine has already been started.
        """
        if self.settings.deterministic:
            return []
        if self._thread.ident is not None:
            raise GenerationFailed("the engine has been started already; profile it instead of starting it")
        self._profile_seconds = seconds
        self.start()
        self._profiled.result()
        return self.profiles

    @property
    def profiles(self) -> list[Profile]:
        """The measurements: each model's native sizes."""
        return self._budgets.profiles

    def stop(self, *, drain_seconds: float = 0.0) -> None:
        """Refuse new requests, finish running ones for up to `drain_seconds`, cancel the rest, and end the thread."""
        with self._wake:
            self._stop_at = time.monotonic() + drain_seconds
            self._wake.notify()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join()

    def merge_patterns(self) -> Mapping[tuple[str, ...], int]:
        """How often merging was tried with a new pattern of network calls: by outcome, model and network. Any thread.

        Outcomes are "verified" and "refused".
        """
        return {
            (outcome, name, network): count
            for name in self.models.names
            if isinstance(model := self.models.get(name), PipelineModel)
            for (network, outcome), count in model.calls.trust.counts.items()
        }

    def _check_models(self) -> None:
        """Raises InvalidRequest: a model does not go with the settings."""
        for model in map(self.models.get, self.models.names):
            if isinstance(model, PipelineModel):
                if self.settings.compile != "off":
                    raise InvalidRequest(
                        f"model {model.card.name!r} runs by its own pipeline, which is not compiled",
                        field="compile",
                        value=self.settings.compile,
                        remedy="turn off compile, or serve this model by another worker",
                    )
                if self.settings.deterministic:
                    model.run_alone()
            else:
                model.accelerations.check(
                    deterministic=self.settings.deterministic, compiled=self.settings.compile != "off"
                )

    # ---- the engine's thread

    def _main(self) -> None:
        compute_with(self._threads)
        try:
            work_on(self._device)
            with torch.inference_mode():
                if self._profile_seconds is not None:
                    self._measure(self._profile_seconds)
                while self._take_turn():
                    pass
        except BaseException as error:
            log.exception("engine stopped by a lost device or an unexpected error; all its requests fail")
            self._abandon(GenerationFailed(f"the engine stopped: {error}; the job can run on another worker"))
            if self._on_fatal is not None:
                self._on_fatal(error)
        else:
            self._abandon(None)

    def _measure(self, seconds: float) -> None:
        """Runs in the engine's thread, because CUDA graphs belong to the thread that recorded them."""
        try:
            profile_models(
                self.models,
                self._budgets,
                seconds=seconds,
                sizes=buckets_up_to if self.settings.compile == "reduce-overhead" else sizes_up_to,
                tables=self._tables,
                admission=self._batches.admission,
                make_batch=self._batches.make,
            )
        except Exception as error:
            self._profiled.set_exception(error)
            if is_fatal(error):
                raise
        else:
            self._profiled.set_result(None)

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
        now = time.monotonic()
        self._counters.idle_seconds += now - waited
        self._trace.span("engine", "idle", waited, now)
        if stop_at is not None and time.monotonic() >= stop_at:
            return False
        for state in fresh:
            self._scheduler.add(state.id, state.group, state.rows, interactive=state.request.interactive)
        self._drop(cancelled)
        plan = self._scheduler.plan()
        if plan is not None:
            admitted = [self._states[request_id] for request_id in plan.admitted]
            with self._clock.turn(f"loading {plan.group.model}", cost=0.0):
                model = self.models.use(plan.group.model)
            # Encoding of inputs is not measured, and a pipeline's calls are too different to tell from the last ones.
            unknown = bool(admitted) or isinstance(model, PipelineModel)
            cost = 0.0 if unknown else self._pacer.cost(plan.group)
            with self._clock.turn(f"a step of {plan.group.model}", cost=cost):
                if isinstance(model, PipelineModel):
                    self._step_pipeline(model, plan, admitted)
                else:
                    self._step(model, plan, admitted)
        with self._clock.turn("decoding", cost=0.0):
            self._decode()
        return True

    def _drop(self, cancelled: set[str]) -> None:
        """Free the rows of requests that were cancelled, here or through their future."""
        with self._wake:
            cancelled |= {request_id for request_id, state in self._states.items() if state.future.cancelled()}
        for request_id in cancelled:
            state = self._states.get(request_id)
            if state is None:
                continue  # has finished in the meantime
            self._decoder.discard(request_id)
            self._leave(state)
            state.future.cancel()
            self._forget(state)
            self._counters.cancelled += 1

    def _step(self, model: StepModel, plan: Plan[GroupKey], admitted: list[RequestState]) -> None:
        """Admit, then run one denoising step of a group."""
        group = plan.group
        self._admit(model, group, admitted)
        if not self._batches.has(group):
            return
        began = time.monotonic()
        report = self._pacer.step(group, lambda: self._batches.step(group))
        now = time.monotonic()
        self._counters.count_step(report, now - began)
        self._trace.span(
            "engine",
            f"step {group.model} {group.step_shape[2]}x{group.step_shape[1]}",
            began,
            now,
            model=group.model,
            rows=report.rows,
            padding=report.padding_rows,
            budget=self._budgets.current(group),
            joined=len(admitted),
            finished=len(report.finished),
            waiting=self._scheduler.waiting(),
            reason=plan.reason,
            compiled=report.compiled,
        )
        if self._on_preview is not None:
            for row, image in report.previews:
                state = self._states[row.request.request_id]
                try:
                    self._on_preview(state.id, state.steps_done, image)
                except Exception:  # of the receiver: the image itself is not at fault
                    log.exception("preview dropped", extra={"request_id": state.id})
        for row, error in report.failed:
            self._fail(self._states[row.request.request_id], error)
        for row, latents in report.finished:
            state = self._states[row.request.request_id]
            self._scheduler.remove(state.id)
            if state.next_stage(latents):
                self._scheduler.add(state.id, state.group, state.rows, interactive=state.request.interactive)
                continue
            state.denoised = now
            self._decoder.add(Finished(request_id=state.id, model=group.model, latents=latents))

    def _admit(self, model: StepModel, group: GroupKey, states: list[RequestState]) -> None:
        if not states:
            return
        began = time.monotonic()
        failed = self._batches.admit(model, group, states)
        ended = time.monotonic()
        seconds = ended - began
        self._counters.encode_seconds += seconds
        self._trace.span("engine", "encode", began, ended, requests=len(states))
        for state, error in failed:
            self._fail(state, error)
        unable = {state.id for state, _ in failed}
        for state in states:
            if state.id not in unable:
                state.admitted = state.admitted or began
                self._trace.wait("waiting for a place", state.id, state.submitted, began)
                state.encode_seconds += seconds

    def _step_pipeline(self, model: PipelineModel, plan: Plan[GroupKey], admitted: list[RequestState]) -> None:
        """Admit, then run one merged network call of a group."""
        group = plan.group
        began = time.monotonic()
        for state in admitted:
            state.admitted = began
        self._pipelines.admit(model, group, admitted)
        report = self._pacer.step(group, lambda: self._pipelines.step(group))
        if report is None:
            return
        now = time.monotonic()
        if report.calls:
            self._counters.count_step(report, now - began)
        self._trace.span(
            "engine",
            f"call {group.model} {report.component}",
            began,
            now,
            model=group.model,
            rows=report.rows,
            calls=report.calls,
            joined=report.joined,
            finished=len(report.ended),
            waiting=self._scheduler.waiting(),
            reason=plan.reason,
        )
        if self._on_preview is not None:
            for state, step, image in report.previews:
                self._on_preview(state.id, step, image)
        for state, outcome in report.ended:
            if isinstance(outcome, Exception):
                self._fail(state, outcome)
                continue
            self._leave(state)
            self._forget(state)
            self._counters.images += 1
            state.denoised = now
            state.resolve(state.made(outcome, now))

    def _decode(self) -> None:
        """Decode what is due: a full batch, latents that nothing will join in time, or all if nothing else can run."""
        began = time.monotonic()
        results = self._decoder.run(flush=not len(self._scheduler))
        if not results:
            return
        now = time.monotonic()
        self._counters.decode_seconds += now - began
        self._trace.span("engine", "decode", began, now, images=len(results))
        for request_id, image in results:
            state = self._states[request_id]
            if isinstance(image, Exception):
                self._fail(state, image)
                continue
            self._counters.images += 1
            self._forget(state)
            state.resolve(state.generated(image, now))

    def _fail(self, state: RequestState, error: Exception) -> None:
        """Fail one request without affecting the others."""
        self._counters.failed += 1
        self._leave(state)
        self._forget(state)
        if not isinstance(error, CalotypeError):
            log.error("request failed", extra={"request_id": state.id}, exc_info=error)
            failure = GenerationFailed(f"request {state.id!r}: {_said(error, state.request)}")
            failure.__cause__ = error
            error = failure
        state.resolve(error)

    def _leave(self, state: RequestState) -> None:
        """Remove it from the scheduler and from its step batch, whatever its state."""
        if self._scheduler.has(state.id):
            self._scheduler.remove(state.id)
        if state.stages:
            self._batches.leave(state)
        else:
            self._pipelines.leave(state)

    def _forget(self, state: RequestState) -> None:
        with self._wake:
            self._states.pop(state.id, None)

    def _abandon(self, error: Exception | None) -> None:
        """End every remaining request with `error`, or as cancelled."""
        self._pipelines.close()
        with self._wake:
            self._stop_at = self._stop_at or 0.0
            states, self._states = list(self._states.values()), {}
            self._inbox.clear()
        if self._profile_seconds is not None and not self._profiled.done():
            self._profiled.set_exception(error or GenerationFailed("the engine has stopped"))
        for state in states:
            if error is None:
                state.future.cancel()
            else:
                state.resolve(error)


def _said(error: Exception, request: GenerationRequest) -> str:
    """Convert an unexpected error to a Calotype error, with advice if the cause is known."""
    if not is_out_of_memory(error):
        return f"{type(error).__name__}: {error}"
    return (
        f"the device has too little memory for one image of {request.width}x{request.height} ({error}); ask for a "
        "smaller width and height, or start the worker with --attention-slicing, --vae-tiling, --offload model, or on "
        "a larger device"
    )
