"""`Worker`: one process on one device. Puts the parts together, runs Celery, and leaves in good order."""

from __future__ import annotations

import logging
import os
import random
import signal
import socket
import threading
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from celery import signals
from celery.worker import state as celery_state

from calotype_shared.errors import ServiceUnavailable
from calotype_shared.keys import together
from calotype_shared.settings import Settings, connect_redis
from calotype_shared.storage import Storage
from calotype_shared.store import JobStore
from calotype_shared.worker_info import WorkerInfo
from calotype_worker.app import make_app
from calotype_worker.engine import Engine, EngineSettings
from calotype_worker.heartbeat import Heartbeat
from calotype_worker.inputs import Inputs
from calotype_worker.models import Adapters, AnyModel, Memory, ModelPool, load_model
from calotype_worker.output.upload import Uploader
from calotype_worker.previews import Previews
from calotype_worker.settings import WorkerSettings
from calotype_worker.tasks import JobRunner

log = logging.getLogger(__name__)

EXIT_FATAL = 70  # the device is lost; a supervisor should start a new process
EXIT_NOW = 75  # told twice to leave
_REAP_SECONDS = 5.0
_REPORT_TTL_SECONDS = 15.0
_LEAVE_NOW_SECONDS = 0.6


def load_models(options: WorkerSettings) -> list[AnyModel]:
    """Every model of a worker, with what was registered for it. Raises ModelLoadError."""
    memory = Memory(
        attention_slicing=options.attention_slicing,
        vae_slicing=options.vae_slicing,
        vae_tiling=options.vae_tiling,
        offload=options.offload,
    )
    models = []
    for name, source in options.sources.items():
        adapters = Adapters(
            loras={lora: Path(file) for lora, file in options.registered("lora", name).items()},
            embeddings={token: Path(file) for token, file in options.registered("embedding", name).items()},
            controls=options.registered("control", name),
            lora_capacity=options.lora_capacity,
        )
        models.append(
            load_model(
                name, source=source, device=options.device, dtype=options.dtype, adapters=adapters, memory=memory
            )
        )
    return models


def _bytes(gib: float | None) -> int | None:
    return None if gib is None else int(gib * 2**30)


class Worker:
    """Construct it to load the model; `run` works until a signal ends it."""

    def __init__(self, settings: Settings, options: WorkerSettings) -> None:
        """Raises ModelLoadError before anything is announced."""
        self._options = options
        self._store = JobStore(
            connect_redis(settings), key_prefix=settings.key_prefix, retention_seconds=settings.retention_seconds
        )
        storage = Storage(settings)
        pool = ModelPool(load_models(options), memory_budget=_bytes(options.memory_budget_gib))
        self._cards = {name: pool.get(name).card for name in pool.names}
        self._version = version("calotype")
        self._started_at = time.time()
        self.name = f"{together(self._cards)}@{socket.gethostname()}-{os.getpid()}-{random.randrange(16**4):04x}"
        engine_settings = EngineSettings(
            max_rows=options.max_rows, decode_batch=options.decode_batch, deterministic=options.deterministic
        )
        previews = Previews(self._store)
        self._engine = Engine(pool, engine_settings, on_fatal=_leave_for_dead, on_preview=previews.offer)
        self._heartbeat = Heartbeat(
            self._store,
            lease_seconds=options.lease_seconds,
            progress=self._engine.progress,
            stop_request=self._engine.cancel,
            report=self._report,
        )
        self._draining = threading.Event()
        runner = JobRunner(
            self._store,
            self._engine,
            self._heartbeat,
            Uploader(storage, cards=self._cards, version=self._version),
            Inputs(storage),
            worker=self.name,
            lease_seconds=options.lease_seconds,
            draining=self._draining.is_set,
        )
        self._app = make_app(settings, models=list(self._cards), run_job=runner.run)

    def run(self) -> int:
        """Consume until SIGTERM or SIGINT; returns the exit status."""
        self._engine.start()
        for card in self._cards.values():
            self._store.announce_model(card)
        self._store.announce_together(self._cards)
        self._report()
        self._heartbeat.start()
        threading.Thread(target=self._reap, name="calotype-reaper", daemon=True).start()
        signals.worker_ready.connect(self._ready, weak=False)
        signals.setup_logging.connect(_keep_our_logging, weak=False)
        consumer = self._app.Worker(
            hostname=self.name,
            pool_cls="threads",
            concurrency=self._options.jobs_in_flight,
            without_gossip=True,
            without_mingle=True,
            without_heartbeat=True,
            quiet=True,
        )
        consumer.start()  # returns when a warm shutdown is done
        self._heartbeat.stop()
        self._engine.stop()
        try:
            self._store.retire_worker(self.name)
        except ServiceUnavailable as error:
            log.warning("worker not retired", extra={"reason": str(error)})
        log.info("worker stopped", extra={"worker": self.name})
        return 0

    def _ready(self, **_: Any) -> None:
        # Celery has installed its own handlers by now, in this thread; ours drain within a bound instead.
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGINT, self._on_signal)
        log.info(
            "worker ready",
            extra={
                "worker": self.name,
                "model": together(self._cards),
                "model_version": ",".join(card.version for card in self._cards.values()),
                "device": self._options.device,
                "max_rows": self._options.max_rows,
                "jobs_in_flight": self._options.jobs_in_flight,
            },
        )

    def _on_signal(self, number: int, _: object) -> None:
        # No logging here: the interrupted code may hold the logger's lock.
        if self._draining.is_set():
            threading.Thread(target=self._leave_now, daemon=True).start()
            return
        self._draining.set()
        celery_state.should_stop = 0  # Celery's warm shutdown: stop consuming, wait for what runs, exit status 0
        threading.Thread(target=self._drain, args=(signal.Signals(number).name,), daemon=True).start()

    def _drain(self, signal_name: str) -> None:
        """Let jobs finish for the grace period, then hand the rest back to the queue."""
        holding = len(self._heartbeat.held())
        log.info("worker drains", extra={"signal": signal_name, "jobs": holding, "grace": self._options.grace_seconds})
        ends = time.monotonic() + self._options.grace_seconds
        while self._heartbeat.held() and time.monotonic() < ends:
            time.sleep(0.05)
        self._heartbeat.release_all()

    def _leave_now(self) -> None:
        """The second signal: hand back what can be handed back at once, and go."""
        releasing = threading.Thread(target=self._release_directly, daemon=True)
        releasing.start()
        releasing.join(_LEAVE_NOW_SECONDS)
        os._exit(EXIT_NOW)

    def _release_directly(self) -> None:
        for held in self._heartbeat.held():
            self._store.release(held.claim)
        self._store.retire_worker(self.name)

    def _reap(self) -> None:
        while True:
            time.sleep(_REAP_SECONDS * random.uniform(0.5, 1.5))
            try:
                reaped = self._store.reap(who=self.name)
            except ServiceUnavailable:
                continue  # the heartbeat tells of it
            except Exception:
                log.exception("the reaper met a bug")
                continue
            if reaped and (reaped.requeued or reaped.failed or reaped.republished):
                log.info(
                    "jobs reaped",
                    extra={
                        "requeued": ",".join(reaped.requeued),
                        "failed": ",".join(reaped.failed),
                        "republished": ",".join(reaped.republished),
                    },
                )

    def _report(self) -> None:
        stats = self._engine.stats()
        info = WorkerInfo(
            name=self.name,
            model=together(self._cards),
            device=self._options.device,
            host=socket.gethostname(),
            pid=os.getpid(),
            version=self._version,
            started_at=self._started_at,
            running_jobs=len(self._heartbeat.held()),
            draining=self._draining.is_set(),
            forward_passes=stats.forward_passes,
            rows=stats.rows,
            images=stats.images,
            failed=stats.failed,
            step_seconds=stats.step_seconds,
            encode_seconds=stats.encode_seconds,
            decode_seconds=stats.decode_seconds,
            idle_seconds=stats.idle_seconds,
        )
        self._store.announce_worker(info, ttl_seconds=_REPORT_TTL_SECONDS)


def _keep_our_logging(**_: Any) -> None:
    """A receiver of Celery's `setup_logging` makes it leave the root logger alone."""


def _leave_for_dead(error: BaseException) -> None:
    """The device is lost: end the process without a word to Redis, so that leases expire and others take over."""
    log.critical("worker leaves: its device is lost", extra={"reason": str(error)})
    logging.shutdown()
    os._exit(EXIT_FATAL)
