"""Forms of earlier versions, kept as files, are read by this one; and what a newer one writes can be looked at."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from calotype.api_keys import DEFAULT_SCOPES, ApiKey
from calotype.batches.record import BatchRecord, BatchState
from calotype.files import StoredFile
from calotype_shared.errors import UnreadableRecord
from calotype_shared.queue.message import TASK_NAME
from calotype_shared.queue.records import OLDEST, SCHEMA, read_record
from calotype_shared.queue.submission import NewJob
from calotype_shared.schema.config import digest_of
from calotype_shared.schema.enums import JobState
from calotype_shared.schema.jobs import Preview
from calotype_shared.schema.model_card import ModelCard
from calotype_shared.schema.resolve import ResolvedConfig
from calotype_shared.schema.worker_info import WorkerInfo
from tests.golden_records import FORMS

KEPT = sorted(FORMS.glob("v*/*.json"))


def form(name: str, number: int = SCHEMA) -> Any:
    return json.loads((FORMS / f"v{number}" / f"{name}.json").read_text())


def test_every_schema_has_its_folder_and_no_file_of_it_changes() -> None:
    """Who changes what is written finds that some file differs; then a new number and a new folder are due."""
    assert sorted(folder.name for folder in FORMS.iterdir()) == [f"v{n}" for n in range(OLDEST, SCHEMA + 1)]
    for folder in FORMS.iterdir():
        sums = [line.split("  ") for line in (folder / "SHA256SUMS").read_text().splitlines()]
        found = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.glob("*.json")}
        assert found == {name: digest for digest, name in sums}


@pytest.mark.parametrize("file", KEPT, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_it_is_read(file: Path) -> None:
    """Every form that there ever was has a meaning to this version."""
    found = json.loads(file.read_text())
    read: Any = READERS[file.stem.partition("-")[0]] if file.stem not in READERS else READERS[file.stem]
    read(found)


def read_job(fields: dict[str, str]) -> None:
    record = read_record("id", fields)
    assert not record.newer
    assert record.state.value == fields["state"]
    assert record.config.canonical_json() == fields["config"]
    assert record.config.digest() == fields["digest"] == record.digest
    assert record.created_at == int(fields["created_at"]) / 1e6
    assert [image.model_dump() for image in record.images] == json.loads(fields.get("images", "[]"))
    assert len(record.history) == len(json.loads(fields.get("history", "[]")))
    assert (record.error is None) == ("error" not in fields)
    assert record.metadata == json.loads(fields["metadata"])


def read_batch(fields: dict[str, str]) -> None:
    batch = BatchRecord.read("batch_01", fields, now=2e9)
    assert batch.state is BatchState(fields["state"])
    assert (batch.manifest, batch.window, batch.tenant) == ("batches/m", 2000, "acme")


def read_config(values: dict[str, Any]) -> None:
    config = ResolvedConfig.parse(values)
    assert json.loads(config.canonical_json()) == values, "an equal config must keep its digest for ever"


def read_plan(values: list[Any]) -> None:
    job = NewJob._make(values)
    assert (job.id, job.queue, job.custom_id) == ("batch_01-3", "demo.bulk", "cover")
    assert digest_of(job.config) == job.digest
    assert ResolvedConfig.parse(json.loads(job.config)).canonical_json() == job.config


def read_message(sent: dict[str, Any]) -> None:
    assert json.loads(sent["body"])[0] == ["demo.bulk"]
    assert sent["headers"]["task"] == TASK_NAME


def read_key(found: dict[str, Any]) -> None:
    assert ApiKey.model_validate(found).scopes == DEFAULT_SCOPES


def read_as(kind: type[BaseModel]) -> Callable[[dict[str, Any]], None]:
    """Nothing of it is lost."""

    def read(found: dict[str, Any]) -> None:
        again = kind.model_validate(found).model_dump(mode="json")
        assert {name: comparable(again[name]) for name in found} == {n: comparable(v) for n, v in found.items()}

    return read


def comparable(value: Any) -> Any:
    """Sets come in any order."""
    return sorted(value) if isinstance(value, list) else value


READERS = {
    "job": read_job,
    "batch": read_batch,
    "config": read_config,
    "plan": read_plan,
    "message": read_message,
    "worker": read_as(WorkerInfo),
    "model": read_as(ModelCard),
    "api": read_key,
    "file": read_as(StoredFile),
    "preview": read_as(Preview),
}

NEWER = {"schema": str(SCHEMA + 1), "mood": "new", "images": '[{"key": "k", "seed": 1, "width": 8, "height": 8, '
    '"content_type": "image/avif", "bytes": 1, "sha256": "0", "depth": 10}]'}  # fmt: skip


def test_a_newer_record_is_shown_as_far_as_it_is_understood() -> None:
    """Fields, samplers and formats that this version never heard of hide neither state nor images of a job."""
    fields = form("job-succeeded")
    config = {
        **json.loads(fields["config"]),
        "sampler": "euler_3000",
        "mood": "blue",
        "loras": [{"name": "x", "hue": 1}],
    }
    record = read_record("id", {**fields, **NEWER, "config": json.dumps(config)})
    assert record.newer
    assert (record.schema_number, record.state, record.images[0].key) == (SCHEMA + 1, JobState.SUCCEEDED, "k")
    assert (record.config.prompt, record.config.seed, record.config.loras) == ("a red circle", 7, ())
    assert read_record("id", {**fields, "schema": str(SCHEMA + 1)}, schema=SCHEMA + 1).newer is False


def test_a_size_that_only_a_newer_version_allows_is_shown_as_it_is_written() -> None:
    """A stored config always has a size and a seed, so these cannot be left out like other unknown values."""
    fields = form("job-succeeded")
    config = {**json.loads(fields["config"]), "width": 68, "mood": "blue"}
    record = read_record("id", {**fields, **NEWER, "config": json.dumps(config)})
    assert (record.config.width, record.config.height, record.config.seed) == (68, 64, 7)
    assert record.config.prompt == "a red circle"


def test_what_makes_no_sense_at_all_is_told() -> None:
    """Of a newer version: upgrade; of this one: it is damaged."""
    fields = form("job-queued")
    with pytest.raises(UnreadableRecord, match=r"of schema '2', cannot be read .state: .* upgrade this process"):
        read_record("id", {**fields, "schema": "2", "state": "dreaming"})
    with pytest.raises(UnreadableRecord, match="of schema '1', is damaged"):
        read_record("id", {**fields, "config": '{"prompt": "x", "mood": "blue"}'})
    with pytest.raises(UnreadableRecord, match="of schema '', is damaged"):
        read_record("id", {name: value for name, value in fields.items() if name != "schema"})
    with pytest.raises(UnreadableRecord, match="batch_01: its record, of schema '2', cannot be read"):
        BatchRecord.read("batch_01", {**form("batch-validating"), "schema": "2", "format": "haiku"}, now=1.0)


def test_what_a_newer_process_says_of_itself_is_read() -> None:
    """A worker's report, a card and a key with fields and scopes of a later version; a scope unknown allows nothing."""
    assert WorkerInfo.model_validate({**form("worker"), "mood": "new"}).schema_number == 1
    assert ModelCard.model_validate({**form("model-card"), "mood": "new", "samplers": ["euler_3000"]}).samplers
    key = ApiKey.model_validate({**form("api-key"), "mood": "new", "scopes": ["jobs:read", "jobs:dream"]})
    assert [scope.value for scope in key.scopes] == ["jobs:read"]
