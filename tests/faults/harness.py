"""`Site`: one deployment to break things in: servers, worker processes, a client, and what must hold afterwards."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from calotype import Client, GenerationConfig
from calotype_shared.queue.connection import connect_redis
from calotype_shared.queue.job_store import JobStore
from calotype_shared.queue.records import SCHEMA
from calotype_shared.schema.enums import JobState
from calotype_shared.schema.jobs import JobRecord
from calotype_shared.settings import Settings
from calotype_shared.storage.s3 import Storage
from calotype_worker.jobs.sweep import sweep
from tests.invariants import check_store

FULL = os.environ.get("FAULTS") == "full"
ROOT = Path(__file__).parents[2]
SHORT_LEASE = ("--lease-seconds", "3")  # where jobs of a lost worker are to be taken over soon
SAMPLERS = ("ddim", "euler_a", "unipc", "dpmpp_2m_karras", "ddpm", "heun")
# Different images that faulty runs are compared with. Equal jobs are made once, so no test may have more jobs.
KINDS = {False: 2000 if FULL else 48, True: 120 if FULL else 48}  # by whether they take long


def config(number: int, *, long: bool = False, **changes: Any) -> GenerationConfig:
    """One whose undisturbed image is known, short or long."""
    assert 0 <= number < KINDS[long]
    fields = {
        "prompt": f"cat {number}",
        "model": "tiny",
        "seed": number,
        "num_inference_steps": (60 if long else 16 if FULL else 4) + number % 5,
        "sampler": SAMPLERS[number % len(SAMPLERS)],
        "guidance_scale": (1.0, 7.5)[number % 2],
    }
    return GenerationConfig.parse({**fields, **changes})


def until(condition: Callable[[], Any], seconds: float = 120, *, why: Callable[[], str] = lambda: "") -> None:
    """Wait for a condition, bounded. While a server is away, asking it is no answer."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"it did not happen within {seconds:g} s {why()}"
        time.sleep(0.02)


class Forge:
    """Forks workers and `calotype` commands from a process that has imported both: `worker_fork_server.py`."""

    def __init__(self) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("CALOTYPE_")}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.worker_fork_server"],
            cwd=ROOT,
            env={**environment, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._answer() == "ready"

    def start(
        self, arguments: Sequence[str], *, environment: Mapping[str, str], log: Path, stops: Sequence[str] = ()
    ) -> WorkerProcess:
        files = [os.devnull, str(log), str(log)]
        asked = {"program": "worker", "arguments": list(arguments), "environment": dict(environment), "files": files}
        return WorkerProcess(self, self._ask({**asked, "stops": list(stops)}), log)

    def command(
        self, *arguments: str, environment: Mapping[str, str], typed: str = "", seconds: float = 120
    ) -> subprocess.CompletedProcess[str]:
        """Run a `calotype` command to its end, with `typed` on its standard input."""
        with tempfile.TemporaryDirectory() as folder:
            files = [Path(folder, name) for name in ("stdin", "stdout", "stderr")]
            files[0].write_text(typed)
            asked = {"program": "calotype", "arguments": list(arguments), "environment": dict(environment)}
            pid = self._ask({**asked, "files": list(map(str, files)), "stops": []})
            try:
                until(lambda: self.status(pid) is not None, seconds, why=lambda: f"calotype {arguments}")
            except AssertionError:
                os.kill(pid, signal.SIGKILL)
                raise
            status = self.status(pid)
            assert status is not None
            said, complained = (file.read_text() for file in files[1:])
            return subprocess.CompletedProcess(["calotype", *arguments], status, said, complained)

    def status(self, pid: int) -> int | None:
        status: int | None = self._ask({"status": pid})
        return status

    def close(self) -> None:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.close()
        self._process.wait(120)
        self._process.stdout.close()

    def _ask(self, asked: Mapping[str, Any]) -> Any:
        assert self._process.stdin
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout
        return json.loads(self._process.stdout.readline())


class WorkerProcess:
    def __init__(self, forge: Forge, pid: int, log: Path) -> None:
        self._forge = forge
        self.pid = pid
        self.log = log

    @property
    def alive(self) -> bool:
        return self._forge.status(self.pid) is None

    def text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """The process stands still in the block."""
        self.send(signal.SIGSTOP)
        try:
            yield
        finally:
            self.send(signal.SIGCONT)

    def kill(self) -> None:
        if self.alive:
            self.send(signal.SIGKILL)
            self.wait(120)

    def wait(self, seconds: float = 60) -> int:
        """The exit status, or minus the signal that ended it."""
        until(lambda: not self.alive, seconds, why=lambda: f"\n{self.text()[-3000:]}")
        status = self._forge.status(self.pid)
        assert status is not None
        return status

    def wait_for(self, words: str, seconds: float = 60) -> None:
        """Until its log says so."""
        until(lambda: words in self.text() or not self.alive, seconds, why=lambda: f"\n{self.text()[-3000:]}")
        assert words in self.text(), self.text()[-3000:]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a check has counted."""

    jobs: int
    lost: int
    twice: int


class Site:
    """Owns its workers. `settings` are the test's and its client's; `worker_settings` may lead through a proxy."""

    def __init__(
        self,
        settings: Settings,
        *,
        forge: Forge,
        model: Path,
        folder: Path,
        undisturbed: Undisturbed | None = None,
        worker_settings: Settings | None = None,
    ) -> None:
        self.settings = settings
        self.worker_settings = worker_settings or settings
        self.redis = connect_redis(settings)
        self.store = JobStore(self.redis, key_prefix=settings.key_prefix)
        self.storage = Storage(settings)
        self.storage.check(create=True)
        self.client = Client(settings=settings)
        self.folder = folder
        self.workers: list[WorkerProcess] = []
        self._forge = forge
        self._model = model
        self._undisturbed = undisturbed

    def environment(self, settings: Settings | None = None) -> dict[str, str]:
        """What a child process needs to work here."""
        found = settings or self.worker_settings
        system = {name: value for name, value in os.environ.items() if not name.startswith("CALOTYPE_")}
        return {
            **system,
            "OMP_NUM_THREADS": "1",
            **found.environment(),
        }

    def start_worker(
        self, *arguments: str, stop: str | Sequence[str] = (), ready: bool = True, **variables: str
    ) -> WorkerProcess:
        """A worker process in deterministic mode; `stop` names what `stops.py` does to it."""
        log = self.folder / f"worker-{len(self.workers)}.log"
        spool = self.folder / "spool"
        environment = {
            **self.environment(),
            "CALOTYPE_WORKER_REAP_SECONDS": "0.5",
            "CALOTYPE_WORKER_SPOOL_DIR": str(spool),
            **variables,
        }
        options = ["--model", f"tiny={self._model}", "--max-rows", "8", "--deterministic", *arguments]
        stops = [stop] if isinstance(stop, str) else list(stop)
        worker = self._forge.start(options, environment=environment, log=log, stops=stops)
        self.workers.append(worker)
        if ready:
            worker.wait_for("worker ready")
        return worker

    def submit(self, count: int, *, first: int = 0, **changes: Any) -> list[str]:
        return [job.id for job in self.client.submit_many([config(first + i, **changes) for i in range(count)])]

    def submit_newer(self, count: int, *, first: int = 0, **changes: Any) -> list[str]:
        """By a client of the next version, which only workers of that version understand (`stops.py`: newer)."""

        class NewerStore(JobStore):
            schema = SCHEMA + 1

        with Client(settings=self.settings) as client:
            client._store = NewerStore(client._redis, key_prefix=self.settings.key_prefix)
            return [job.id for job in client.submit_many([config(first + i, **changes) for i in range(count)])]

    def finished(self, ids: Sequence[str]) -> bool:
        return all(record is not None and record.state.final for record in self.store.get_many(ids))

    def wait(self, ids: Sequence[str], seconds: float = 120) -> list[JobRecord]:
        until(lambda: self.finished(ids), seconds, why=lambda: self._why(ids))
        return [self.store.get(job_id) for job_id in ids]

    def _why(self, ids: Sequence[str]) -> str:
        states = Counter(record.state.value for record in self.store.get_many(ids) if record)
        logs = "\n".join(f"--- {worker.log.name}\n{worker.text()[-1500:]}" for worker in self.workers[-3:])
        return f"{dict(states)}\n{logs}"

    def check(self, ids: Iterable[str], *, failed: Iterable[str] = (), cancelled: Iterable[str] = ()) -> Outcome:
        """What must hold once all is over. Raises AssertionError.

        Every job is final, and became so once; those in `failed` and `cancelled` without images, all others with the
        very images of an undisturbed run. Each image is in the bucket once, and nothing else is, once orphans are
        swept. Every Redis key agrees with the records.
        """
        ids = list(ids)
        others = dict.fromkeys(failed, JobState.FAILED) | dict.fromkeys(cancelled, JobState.CANCELLED)
        records = {record.id: record for record in self.store.get_many(ids) if record is not None}
        wrong = {
            r.id: f"{r.state.value} after {r.crashes} crashes: {r.error}"
            for r in records.values()
            if r.state is not others.get(r.id, JobState.SUCCEEDED)
        }
        lost = dict.fromkeys(set(ids) - set(records), "no record") | wrong
        assert not lost, f"lost, or not as expected: {lost}"
        counts = self.store.counts()
        ends = sum(counts[state] for state in (JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED))
        assert ends == len(ids), f"{len(ids)} jobs came to {ends} ends"
        check_store(self.store, self.redis)
        self.check_bucket(image.key for record in records.values() for image in record.images)
        images = [image for record in records.values() for image in record.images]
        for image in images:
            assert hashlib.sha256(self.storage.get(image.key)).hexdigest() == image.sha256
        self.check_images([image.key for image in images])
        stored = Counter(tuple(key.split("/")[0::2]) for key in self.storage.list() if key.endswith(".png"))
        twice = sum(count - 1 for count in stored.values())
        assert twice == 0, f"images of {[job for job, count in stored.items() if count > 1]} are there twice"
        return Outcome(jobs=len(ids), lost=len(lost), twice=ends - len(ids) + twice)

    def check_bucket(self, keys: Iterable[str]) -> None:
        """Once orphans are swept these images and their sidecars are all there is, but for manifests and uploads."""
        sweep(self.store, self.storage, older_than_seconds=-1)
        assert self.store.orphans(older_than_seconds=-1) == []
        wanted = {name for key in keys for name in (key, re.sub(r"\.png$", ".json", key))}
        there = {key for key in self.storage.list() if not key.startswith(("batches/", "uploads/"))}
        assert there == wanted, f"missing: {sorted(wanted - there)[:5]}, leaked: {sorted(there - wanted)[:5]}"

    def check_images(self, keys: Sequence[str]) -> None:
        """Each is, bit for bit, what an undisturbed run makes of its config."""
        if self._undisturbed is None:
            return
        sidecars = [json.loads(self.storage.get(re.sub(r"\.png$", ".json", key))) for key in keys]
        wanted = self._undisturbed.digests(
            {said["digest"]: GenerationConfig.parse(said["config"]) for said in sidecars}
        )
        for key, said in zip(keys, sidecars, strict=True):
            assert digest(self.storage.get(key)) == wanted[said["digest"]], f"{key}: not as undisturbed"

    def close(self) -> None:
        for worker in self.workers:
            worker.kill()
        self.client.close()
        self.redis.close()


class Undisturbed:
    """What images look like where nothing goes wrong.

    Each is made when it is first asked for, by one worker at a site of its own.
    """

    def __init__(self, site: Site) -> None:
        self._site = site
        self._known: dict[str, str] = {}

    def digests(self, configs: Mapping[str, GenerationConfig]) -> Mapping[str, str]:
        """Digests of pixels, by the config's digest."""
        missing = {name: config for name, config in configs.items() if name not in self._known}
        if missing:
            if not self._site.workers:
                self._site.start_worker()
            jobs = self._site.client.submit_many(list(missing.values()))
            for record in self._site.wait([job.id for job in jobs], 1700):
                self._known[record.digest] = digest(self._site.storage.get(record.images[0].key))
            assert missing.keys() <= self._known.keys(), "made from other configs"
            assert len(set(self._known.values())) == len(self._known), "images that are alike tell nothing apart"
        return self._known


def digest(data: bytes) -> str:
    """Of an image's pixels."""
    pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    return hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest()


class Table:
    """What `make faults` prints: one line a fault."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, int, int, int, float]] = []

    def add(self, fault: str, outcome: Outcome, *, recovery_seconds: float) -> None:
        """`recovery_seconds`: from the fault's end until work went on, or all was done, as the test says."""
        self.rows.append((fault, outcome.jobs, outcome.lost, outcome.twice, recovery_seconds))

    def lines(self) -> list[str]:
        if not self.rows:
            return []
        width = max(len(row[0]) for row in self.rows)
        return [
            "",
            f"{'fault':{width}}  {'jobs':>5}  {'lost':>4}  {'visible twice':>13}  {'recovery s':>10}",
            *(
                f"{fault:{width}}  {jobs:>5}  {lost:>4}  {twice:>13}  {seconds:>10.1f}"
                for fault, jobs, lost, twice, seconds in self.rows
            ),
        ]


def new_names() -> dict[str, str]:
    """A key prefix and a bucket that nobody else uses."""
    name = uuid.uuid4().hex[:12]
    return {"key_prefix": f"faults-{name}:", "s3_bucket": f"faults-{name}"}
