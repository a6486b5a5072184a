"""The systems to beat, each as its documentation says to write it, with the same plain diffusers behind.

    python benchmarks/baselines.py litserve PORT MODEL DEVICE
    python benchmarks/baselines.py celery REDIS_URL MODEL DEVICE

Both collect whole requests for a moment and run them as static batches. Neither encodes or stores its images, which
Calotype does: their answers are the seeds.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import time
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from workload import BATCH, WARM_UP, Plain, Wanted

from calotype.embedded.process import ChildProcess

COLLECT_SECONDS = 0.1


# ---- LitServe: https://lightning.ai/docs/litserve/features/batching


def serve_litserve(port: int, model: str, device: str) -> None:
    import litserve
    from litserve_api import Api

    api = Api(model, max_batch_size=BATCH, batch_timeout=COLLECT_SECONDS)
    accelerator = "cuda" if device.startswith("cuda") else "cpu"
    server = litserve.LitServer(api, accelerator=accelerator, devices=1, timeout=False)
    server.run(host="127.0.0.1", port=port, generate_client_file=False, log_level="error")


def ask_litserve(port: int, wanted: Sequence[Wanted]) -> None:
    """All at once, a connection each; returns when all are answered."""

    def ask(each: Wanted) -> int:
        body = json.dumps(dataclasses.asdict(each)).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"http://127.0.0.1:{port}/predict", data=body, headers=headers)
        with urllib.request.urlopen(request, timeout=900) as response:
            return int(json.load(response)["seed"])

    with ThreadPoolExecutor(len(wanted)) as pool:
        assert list(pool.map(ask, wanted)) == [each.seed for each in wanted]


# ---- celery-batches: https://celery-batches.readthedocs.io


def celery_app(redis_url: str) -> Any:
    from celery import Celery

    app = Celery("rival", broker=redis_url, backend=redis_url)
    app.conf.update(
        worker_prefetch_multiplier=2 * BATCH, worker_hijack_root_logger=False, broker_connection_retry_on_startup=True
    )
    return app


def serve_celery(redis_url: str, model: str, device: str) -> None:
    from celery_batches import Batches

    app = celery_app(redis_url)
    plain = Plain(model, device=device)
    plain.one(WARM_UP)

    @app.task(base=Batches, name="generate", flush_every=BATCH, flush_interval=COLLECT_SECONDS)  # type: ignore[untyped-decorator]
    def generate(requests: list[Any]) -> None:
        batch = [Wanted(**request.args[0]) for request in requests]
        plain.many(batch, size=BATCH)
        for request, each in zip(requests, batch, strict=True):
            app.backend.mark_as_done(request.id, each.seed, request=request)

    app.Worker(pool_cls="solo", quiet=True, without_gossip=True, without_mingle=True, loglevel="ERROR").start()


def ask_celery(redis_url: str, wanted: Sequence[Wanted]) -> None:
    app = celery_app(redis_url)
    sent = [app.send_task("generate", [dataclasses.asdict(each)]) for each in wanted]
    assert [result.get(timeout=900, interval=0.02) for result in sent] == [each.seed for each in wanted]


def kill(process: ChildProcess) -> None:
    """With all that it started: LitServe's own children outlive it otherwise."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def await_litserve(port: int, process: ChildProcess, seconds: float = 180) -> None:
    ends = time.monotonic() + seconds
    while time.monotonic() < ends and process.alive:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as response:
                if response.status == 200:
                    return
        except OSError:
            time.sleep(0.3)
    raise TimeoutError(f"LitServe did not start: {process.log_tail()}")


if __name__ == "__main__":
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.setpgrp()
    kind, where, model_, device_ = sys.argv[1:]
    if kind == "litserve":
        serve_litserve(int(where), model_, device_)
    else:
        serve_celery(where, model_, device_)
