"""Job states, the transition table, ids, keys, settings: what both sides agree on."""

from __future__ import annotations

import inspect
import re
from importlib import resources
from pathlib import Path

import pytest

from calotype_shared.errors import SettingsError
from calotype_shared.queue.keys import Keys, queue_name
from calotype_shared.queue.scripts import script_source
from calotype_shared.schema.enums import JobState, Lane
from calotype_shared.schema.jobs import TRANSITIONS, new_job_id
from calotype_shared.settings import Settings

ROOT = Path(__file__).resolve().parents[2]


def test_final_states_are_those_without_a_way_out() -> None:
    """And every other state can be reached and left."""
    assert {state for state in JobState if state.final} == {
        JobState.SUCCEEDED,
        JobState.FAILED,
        JobState.CANCELLED,
    }
    reachable = {JobState.QUEUED} | {new for _, new in TRANSITIONS}
    assert reachable == set(JobState)


# The scripts that may write a state, and what they write: of jobs, then of batches.
_STATE_WRITERS = {
    "prelude.lua": ["to"],
    "create.lua": ["'queued'"],
    "batch_create.lua": ["'validating'"],
    "batch_move.lua": ["to"],
    "batch_cancel.lua": ["state"],
}


def test_the_scripts_know_exactly_the_legal_edges() -> None:
    """The table in Lua is made from the one in Python, and no script writes a state around it."""
    edges = set(re.findall(r"\['(\w+)>(\w+)'\] = true", script_source("claim")))
    assert edges == {(old.value, new.value) for old, new in TRANSITIONS}
    scripts = (resources.files("calotype_shared.queue") / "lua").iterdir()
    writes = {file.name: re.findall(r"(?:HSET'|fields = ).*?'state', ('?\w+'?)", file.read_text()) for file in scripts}
    assert {name: found for name, found in writes.items() if found} == _STATE_WRITERS, "a script writes by itself"


def test_ids_sort_by_time_and_never_repeat() -> None:
    """26 characters of Crockford's base 32, so they are safe in URLs, keys and file names."""
    ids = [new_job_id() for _ in range(2000)]
    assert len(set(ids)) == 2000
    assert all(re.fullmatch(r"[0-9a-hjkmnp-tv-z]{26}", job_id) for job_id in ids)
    assert [job_id[:8] for job_id in ids] == sorted(job_id[:8] for job_id in ids)


def test_every_key_is_documented_and_under_the_prefix() -> None:
    """A key that the table at the head of keys.py does not list is a key nobody will find."""
    keys = Keys("p:")
    made = [getattr(keys, name) for name, value in vars(Keys).items() if isinstance(value, property)]
    for name, value in vars(Keys).items():
        if inspect.isfunction(value) and not name.startswith("_"):
            made.append(value(keys, *["Q"] * (len(inspect.signature(value).parameters) - 1)))
    assert len(made) > 30
    document = __import__("calotype_shared.queue.keys", fromlist=["x"]).__doc__ or ""
    for key in made:
        assert key.startswith("p:")
        name = key.removeprefix("p:").split(":")[0]
        assert name == "Q" or f"`{name}" in document, f"{name} is not documented"
    assert queue_name(["demo"], Lane.BULK) == "demo.bulk"
    assert queue_name(["b", "a"], Lane.BULK) == queue_name(["a", "b"], Lane.BULK) == "a+b.bulk"


def test_unknown_and_malformed_variables_stop_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """A typo must not silently leave a default in force; secrets are not repeated."""
    monkeypatch.setenv("CALOTYPE_WORKER_MODEL", "belongs to the worker, which checks it")
    Settings.load()
    for name, value, said in (
        ("CALOTYPE_REDIS_ULR", "x", "CALOTYPE_REDIS_ULR is not a setting; known settings: CALOTYPE_REDIS_URL"),
        ("CALOTYPE_RETENTION_SECONDS", "soon", "CALOTYPE_RETENTION_SECONDS='soon'"),
        ("CALOTYPE_S3_BUCKET", "Not A Bucket", "CALOTYPE_S3_BUCKET"),
        ("CALOTYPE_REDIS_URL", "http://u:hunter2@h", r"CALOTYPE_REDIS_URL=\(hidden\)"),
    ):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            with pytest.raises(SettingsError, match=said) as caught:
                Settings.load()
            assert "hunter2" not in str(caught.value)


def test_overrides_win_and_survive_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a process hands to its children is exactly what it has."""
    monkeypatch.setenv("CALOTYPE_S3_BUCKET", "from-environment")
    settings = Settings.load(key_prefix="mine:", s3_secret_access_key="hunter2")
    assert (settings.s3_bucket, settings.key_prefix) == ("from-environment", "mine:")
    assert "hunter2" not in repr(settings)
    for name, value in settings.environment().items():
        monkeypatch.setenv(name, value)
    assert Settings.load() == settings


def test_the_documents_say_what_the_code_says() -> None:
    """The state table of ARCHITECTURE.md and the settings of the reference, against the code itself."""
    from calotype.gateway.settings import GatewaySettings
    from calotype_worker.settings import WorkerSettings

    text = (ROOT / "ARCHITECTURE.md").read_text()
    for (old, new), by in TRANSITIONS.items():
        assert f"| {old.value} | {new.value} | {by} |" in text
    states = "|".join(state.value for state in JobState)
    assert len(re.findall(rf"^\| ({states}) \| ({states}) \|", text, re.M)) == len(TRANSITIONS)
    reference = (ROOT / "docs" / "reference" / "settings.md").read_text()
    for settings in (Settings, WorkerSettings, GatewaySettings):
        prefix = str(settings.model_config["env_prefix"])
        for field in settings.model_fields:
            assert f"| `{prefix}{field.upper()}` |" in reference, field
    assert "(docs/reference/settings.md)" in (ROOT / "README.md").read_text(), "where they are found"
