"""What goes through Redis, as the real code of this version writes it: the forms that other versions must read."""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

from redis import Redis

from calotype.api_keys import DEFAULT_SCOPES, ApiKey
from calotype.batches.plan import dump_job
from calotype.batches.record import BatchState
from calotype.batches.store import BatchStore
from calotype.embedded import EmbeddedServers
from calotype.files import StoredFile
from calotype_shared.queue.connection import connect_redis
from calotype_shared.queue.job_store import Claim, JobStore
from calotype_shared.queue.message import message
from calotype_shared.queue.records import SCHEMA
from calotype_shared.queue.submission import NewJob
from calotype_shared.schema.enums import Lane
from calotype_shared.schema.jobs import ImageRef, JobError, Preview
from calotype_shared.schema.resolve import ResolvedConfig
from calotype_shared.schema.worker_info import WorkerInfo
from calotype_shared.settings import Settings
from tests.integration.test_fair_share import CARD

FORMS = Path(__file__).parent / "fixtures" / "wire"
PLAIN = ResolvedConfig(prompt="a red circle", seed=7, width=64, height=64, num_inference_steps=5)
EVERYTHING = ResolvedConfig.parse(
    {
        "prompt": "ein grüner (Stern:1.2)",
        "negative_prompt": "text",
        "width": 128,
        "height": 64,
        "num_inference_steps": 12,
        "guidance_scale": 4.5,
        "seed": 2**53 - 8,
        "sampler": "dpmpp_2m_karras",
        "model": "demo",
        "num_images": 3,
        "output_format": "webp",
        "init_image": "a" * 64,
        "strength": 0.5,
        "loras": [{"name": "neon", "weight": -0.5}],
        "controls": [{"name": "outline", "image": "b" * 64, "scale": 0.8, "start": 0.1, "end": 0.9}],
        "refiner": {"model": "second", "start": 0.7},
        "ensemble": ["third"],
        "preview_every": 2,
        "num_frames": 8,
    }
)
IMAGE = ImageRef(
    key="id/1-token/0.png", seed=7, width=64, height=64, content_type="image/png", bytes=3, sha256="0" * 64
)


def written(settings: Settings, redis: Redis) -> dict[str, Any]:
    """Each form by its name, in a fresh corner of a server."""
    store = JobStore(redis, key_prefix=settings.key_prefix)
    return {**_plain_texts(), **_jobs(store, redis), **_batches(settings, redis)}


def _plain_texts() -> dict[str, Any]:
    job = NewJob.of(PLAIN, lane=Lane.BULK, job_id="batch_01-3", identity="c" * 64)._replace(custom_id="cover")
    worker = WorkerInfo(name="demo@host-1-abcd", model="demo", device="cpu", host="h", pid=1, version="1", started_at=1)
    key = ApiKey(id="abcdefgh", name="n", tenant="t", scopes=DEFAULT_SCOPES, created_at=1.5, hash="d" * 64)
    file = StoredFile(id="file-1", filename="jobs.jsonl", purpose="batch", bytes=3, created_at=1.5)
    return {
        "message": json.loads(message("demo.bulk-1", "demo.bulk")),
        "config-plain": json.loads(PLAIN.canonical_json()),
        "config-everything": json.loads(EVERYTHING.canonical_json()),
        "plan-line": json.loads(dump_job(job)),
        "worker": json.loads(worker.model_dump_json()),
        "model-card": _sorted(json.loads(CARD.model_dump_json())),
        "api-key": _sorted(json.loads(key.model_dump_json())),
        "file": json.loads(file.model_dump_json()),
        "preview": json.loads(Preview(index=0, step=3, attempt=1, image="AAAA").model_dump_json()),
    }


def _jobs(store: JobStore, redis: Redis) -> dict[str, Any]:
    forms = {}

    def keep(name: str, job_id: str) -> None:
        forms[f"job-{name}"] = {_text(k): _text(v) for k, v in redis.hgetall(store.keys.job(job_id)).items()}

    def claim() -> Claim:
        found = store.claim("demo.bulk", worker="demo@host-1-abcd", lease_seconds=30)
        assert found
        return found

    [job_id] = store.create([PLAIN], tenant="acme", metadata={"for": "ü"}, webhook="https://example.org/hook")
    keep("queued", job_id)
    first = claim()
    store.progress([(first, 3, 10)])
    keep("running", job_id)
    assert store.release(first)
    assert store.commit(claim(), images=[IMAGE], timings={"denoise": 0.25})
    keep("succeeded", job_id)
    [job_id] = store.create([NewJob.of(PLAIN, lane=Lane.BULK, identity="c" * 64)], max_failures=1, reuse=True)
    [follower] = store.create([NewJob.of(PLAIN, lane=Lane.BULK, identity="c" * 64)])
    keep("follower", follower)
    assert store.fail(claim(), JobError(code="internal_error", message="it broke"), retry=True)
    keep("failed", job_id)
    return forms


def _batches(settings: Settings, redis: Redis) -> dict[str, Any]:
    batches = BatchStore(redis, key_prefix=settings.key_prefix, retention_seconds=60)
    forms = {}

    def keep(name: str) -> None:
        forms[name] = {_text(k): _text(v) for k, v in redis.hgetall(batches.keys.batch("batch_01")).items()}

    options = {"lane": "bulk", "format": "native", "window": "2000", "metadata": "{}", "manifest": "batches/m"}
    batches.create("batch_01", tenant="acme", fields={**options, "expires_after": "3600"})
    keep("batch-validating")
    led = batches.lead("batch_01", who="d", lease_seconds=20)
    assert led
    batches.move(led, BatchState.IN_PROGRESS, {"plan": "batches/p/", "total": "2", "invalid": "1"})
    led = batches.lead("batch_01", who="d", lease_seconds=20)
    assert led
    job = NewJob.of(PLAIN, lane=Lane.BULK, job_id="batch_01-2")._replace(custom_id="cover")
    batches.dispatch(led, [job], start="0:0", end="1:0")
    keep("batch-in-progress")
    record = redis.hgetall(batches.keys.job("batch_01-2"))
    forms["job-of-batch"] = {_text(k): _text(v) for k, v in record.items()}
    batches.move(led, BatchState.FINALIZING)
    led = batches.lead("batch_01", who="d", lease_seconds=20)
    assert led
    batches.move(led, BatchState.COMPLETED, {"output": "batches/output.jsonl"})
    keep("batch-completed")
    return forms


def _sorted(form: dict[str, Any]) -> dict[str, Any]:
    """Sets come in any order."""
    return {name: sorted(value) if isinstance(value, list) else value for name, value in form.items()}


def _text(value: object) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def main() -> None:
    """Write the folder of this version's schema, for a number that is new: `python -m tests.golden_records`."""
    folder = FORMS / f"v{SCHEMA}"
    folder.mkdir(parents=True)  # one that is there is not to be changed
    with tempfile.TemporaryDirectory() as data, EmbeddedServers.start(Path(data)) as servers:
        settings = servers.settings(key_prefix="wire:")
        with connect_redis(settings) as redis:
            for name, form in written(settings, redis).items():
                (folder / f"{name}.json").write_text(json.dumps(form, indent=1, ensure_ascii=False) + "\n")
    files = sorted(folder.glob("*.json"))
    sums = (f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in files)
    (folder / "SHA256SUMS").write_text("".join(sums))


if __name__ == "__main__":
    main()
