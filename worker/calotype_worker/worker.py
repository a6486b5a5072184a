"""`Worker`: one process on one device. Assembles the parts, runs Celery, and shuts down in order."""

from __future__ import annotations

import faulthandler
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

from calotype_shared.errors import ServiceUnavailable, SettingsError
from calotype_shared.observability import metric_names as names
from calotype_shared.observability.telemetry import make_telemetry
from calotype_shared.queue.connection import connect_redis
from calotype_shared.queue.job_store import JobStore
from calotype_shared.queue.keys import together
from calotype_shared.schema.enums import Lane
from calotype_shared.schema.worker_info import WorkerInfo
from calotype_shared.settings import Settings
from calotype_shared.storage.s3 import Storage
from calotype_worker.engine import Engine, EngineSettings
from calotype_worker.engine.profile import Profile
from calotype_worker.engine.trace import NoopTracer, Tracer
from calotype_worker.jobs.celery_app import make_app, queue_names
from calotype_worker.jobs.drain import Drain
from calotype_worker.jobs.heartbeat import Heartbeat
from calotype_worker.jobs.inputs import Inputs
from calotype_worker.jobs.preemption import Watcher, notice_source
from calotype_worker.jobs.previews import Previews
from calotype_worker.jobs.reaper import Reaper
from calotype_worker.jobs.reserved_slots import RESERVED, ReservedSlots
from calotype_worker.jobs.runner import JobRunner
from calotype_worker.jobs.size_affinity import SizeAffinity
from calotype_worker.jobs.spool import Spool
from calotype_worker.jobs.watchdog import Watchdog
from calotype_worker.loading import load_models
from calotype_worker.models import ModelPool
from calotype_worker.observability.admin import WorkerAdmin
from calotype_worker.observability.counters import Counters
from calotype_worker.observability.trace_file import TraceFile
from calotype_worker.output.encoder import Encoder
from calotype_worker.settings import WorkerSettings
from calotype_worker.threads import apart

log = logging.getLogger(__name__)

EXIT_FATAL = 70  # the device is lost, or an essential thread has ended; a supervisor should start a new process
_REPORT_TTL_SECONDS = 15.0


def _make_spool(options: WorkerSettings) -> Spool:
    """Raises SettingsError."""
    try:
        return Spool(Path(options.spool_dir) if options.spool_dir else None, max_bytes=options.spool_mib * 2**20)
    except OSError as error:
        raise SettingsError(
            f"CALOTYPE_WORKER_SPOOL_DIR={options.spool_dir!r}: {error}; give a folder that this user can write to"
        ) from error


def _make_trace(options: WorkerSettings, *, process: str) -> Tracer:
    """Raises SettingsError."""
    if options.trace is None:
        return NoopTracer()
    try:
        return TraceFile(Path(options.trace), process=process)
    except OSError as error:
        raise SettingsError(
            f"CALOTYPE_WORKER_TRACE={options.trace!r}: {error}; give a file that this user can write"
        ) from error


def _facts(profile: Profile) -> dict[str, Any]:
    points = ", ".join(f"{point.rows}: {point.seconds * 1e3:.1f}" for point in profile.points)
    return {"size": f"{profile.width}x{profile.height}", "rows": profile.knee.rows, "milliseconds_by_rows": points}


class Worker:
    """Construct it to load the model; `run` works until a signal ends it."""

    def __init__(self, settings: Settings, options: WorkerSettings) -> None:
        """Raises ModelLoadError before anything is announced."""
        self._options = options
        self._admin, self._counters = WorkerAdmin(options), Counters()
        self._telemetry = make_telemetry(settings, service="calotype-worker")
        self._store = JobStore(
            connect_redis(settings), key_prefix=settings.key_prefix, retention_seconds=settings.retention_seconds
        )
        storage = Storage(settings, attempts=2)  # callers retry
        spool = _make_spool(options)
        pool = ModelPool(apart(lambda: load_models(options)), memory_budget=options.memory_budget)
        self._cards = {name: pool.get(name).card for name in pool.names}
        self._version = version("calotype")
        self._started_at = time.time()
        self.name = f"{together(self._cards)}@{socket.gethostname()}-{os.getpid()}-{random.randrange(16**4):04x}"
        engine_settings = EngineSettings(
            max_rows=options.max_rows,
            decode_batch=options.decode_batch,
            deterministic=options.deterministic,
            compile=options.compile,
            hang_seconds=options.hang_seconds,
        )
        if options.compile_cache:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = options.compile_cache
        previews = Previews(self._store)
        self._trace = _make_trace(options, process=self.name)
        tracer = self._admin.tracer(self._trace, self._cards)
        self._engine = Engine(pool, engine_settings, on_fatal=_leave_for_dead, on_preview=previews.offer, trace=tracer)
        if options.profile_seconds or options.compile != "off":
            for profile in self._engine.profile(seconds=options.profile_seconds):
                log.info("profiled", extra={"model": profile.model, **_facts(profile)})
        self._consuming = threading.Event()
        interactive_queues = queue_names(list(self._cards), Lane.INTERACTIVE)
        slots = ReservedSlots(options.jobs_in_flight)
        self._heartbeat = Heartbeat(
            self._store,
            lease_seconds=options.lease_seconds,
            progress=self._engine.progress,
            stop_request=self._engine.cancel,
            report=self._report,
            interactive_queues=interactive_queues,
            on_interactive=slots.interactive_arrived,
            counters=self._counters,
        )
        self._watchdog = Watchdog(lambda: self._engine.overdue, _leave_hung)
        self._drain = Drain(self._store, self._heartbeat, worker=self.name, grace_seconds=options.grace_seconds)
        self._runner = JobRunner(
            self._store,
            self._engine,
            self._heartbeat,
            encoder=Encoder(cards=self._cards, version=self._version),
            inputs=Inputs(storage),
            storage=storage,
            spool=spool,
            slots=slots,
            affinity=SizeAffinity(
                options.affinity,
                budget=self._engine.row_budget,
                rows=self._engine.rows_of_image,
                in_order=frozenset(interactive_queues),
            ),
            interactive_queues=interactive_queues,
            worker=self.name,
            lease_seconds=options.lease_seconds,
            draining=lambda: self._drain.begun,
            trace=tracer,
            counters=self._counters,
            tracer=self._telemetry.tracer,
        )
        self._admin.watch(
            info={
                "worker": self.name,
                "model": together(self._cards),
                "device": options.device,
                "version": self._version,
            },
            device=options.device,
            engine=self._engine,
            silent_seconds=lambda: self._heartbeat.silent_seconds,
            counters=self._counters,
            gauges={
                names.RUNNING_JOBS: lambda: len(self._heartbeat.running()),
                names.SPOOL_BYTES: lambda: spool.used,
                names.SPOOL_LIMIT_BYTES: lambda: spool.max_bytes,
                names.STORAGE_UNAVAILABLE: lambda: self._runner.storage_unavailable,
                names.WORKER_DRAINING: lambda: self._drain.begun,
            },
            not_ready=self._not_ready,
        )
        self._app = make_app(settings, models=list(self._cards), run_next=self._runner.run)
        self._queues = [name for lane in Lane for name in queue_names(list(self._cards), lane)]
        self._reaper = Reaper(
            self._store,
            storage,
            worker=self.name,
            queues=self._queues,
            lease_seconds=options.lease_seconds,
            every_seconds=options.reap_seconds,
            counters=self._counters,
        )

    def run(self) -> int:
        """Consume until SIGTERM or SIGINT; returns the exit status."""
        self._engine.start()
        self._report()
        self._heartbeat.start()
        self._watchdog.start()
        self._runner.start()
        self._admin.start()
        self._reaper.start()
        signals.worker_ready.connect(self._ready, weak=False)
        signals.setup_logging.connect(_keep_our_logging, weak=False)
        consumer = self._app.Worker(
            hostname=self.name,
            pool_cls="threads",
            concurrency=self._options.jobs_in_flight + RESERVED,
            without_gossip=True,
            without_mingle=True,
            without_heartbeat=True,
            quiet=True,
        )
        consumer.start()  # returns when a warm shutdown is done
        self._drain.wait_for_jobs()  # with images that wait for the storage: until the drain hands them back
        self._runner.stop()
        self._heartbeat.stop()
        self._engine.stop()
        self._watchdog.stop()
        if isinstance(self._trace, TraceFile):
            self._trace.close()
        self._admin.close()
        self._telemetry.close()
        try:
            self._store.retire_worker(self.name)
        except ServiceUnavailable as error:
            log.warning("worker not retired", extra={"reason": str(error)})
        if not self._drain.begun:  # nobody requested it: Celery has logged an internal error
            log.critical("worker exits: its consumer has stopped", extra={"worker": self.name})
            return EXIT_FATAL
        log.info("worker stopped", extra={"worker": self.name})
        return 0

    def _ready(self, **_: Any) -> None:
        # Celery has installed its own handlers by now, in this thread; ours drain within a bound instead.
        signal.signal(signal.SIGTERM, self._drain.on_signal)
        signal.signal(signal.SIGINT, self._drain.on_signal)
        endpoint = self._options.preemption_endpoint
        source = notice_source(self._options.preemption, str(endpoint) if endpoint else None)
        if source is not None:
            Watcher(source, self._drain.on_notice).start()
        self._consuming.set()
        log.info(
            "worker ready",
            extra={
                "worker": self.name,
                "model": together(self._cards),
                "model_version": ",".join(card.version for card in self._cards.values()),
                "device": self._options.device,
                "max_rows": self._options.max_rows,
                "jobs_in_flight": self._options.jobs_in_flight,
                **({} if self._admin.port is None else {"metrics_port": self._admin.port}),
            },
        )

    def _not_ready(self) -> str | None:
        if self._drain.begun:
            return "draining"
        return None if self._consuming.is_set() else "starting"

    def _report(self) -> None:
        stats = self._engine.stats()
        info = WorkerInfo(
            name=self.name,
            model=together(self._cards),
            device=self._options.device,
            host=socket.gethostname(),
            pid=os.getpid(),
            version=self._version,
            schema_number=self._store.schema,
            left_for_newer=self._reaper.left_for_newer,
            started_at=self._started_at,
            running_jobs=len(self._heartbeat.running()),
            draining=self._drain.begun,
            forward_passes=stats.forward_passes,
            rows=stats.rows,
            images=stats.images,
            failed=stats.failed,
            out_of_memory=stats.out_of_memory,
            step_seconds=stats.step_seconds,
            encode_seconds=stats.encode_seconds,
            decode_seconds=stats.decode_seconds,
            idle_seconds=stats.idle_seconds,
            groups=self._engine.running(),
        )
        self._store.announce_worker(info, ttl_seconds=_REPORT_TTL_SECONDS, cards=self._cards.values())


def _keep_our_logging(**_: Any) -> None:
    """A receiver of Celery's `setup_logging` keeps Celery from configuring the root logger."""


def _leave_for_dead(error: BaseException) -> None:
    """The device is lost: end the process without telling Redis, so that leases expire and others take over."""
    _exit_fatally("worker exits: its device is lost", str(error))


def _leave_hung(what: str) -> None:
    """The device hangs: as for a lost device. Its claims count as crashes, for one of its jobs may be the reason."""
    faulthandler.dump_traceback()  # where each thread waits
    _exit_fatally("worker exits: its engine hangs", what)


def _exit_fatally(message: str, reason: str) -> None:
    log.critical(message, extra={"reason": reason})
    logging.shutdown()
    os._exit(EXIT_FATAL)
