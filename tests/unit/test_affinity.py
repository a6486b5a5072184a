"""What a worker says that it runs: `SizeAffinity` counts rows from the claim on, and names shapes with room."""

from __future__ import annotations

from pathlib import Path

import pytest

from calotype_shared.errors import InvalidRequest
from calotype_shared.queue.job_store import Claim
from calotype_shared.schema.enums import JobState, Lane
from calotype_shared.schema.jobs import JobRecord
from calotype_shared.schema.resolve import ResolvedConfig
from calotype_worker.engine import Engine, EngineSettings
from calotype_worker.jobs.size_affinity import SizeAffinity
from calotype_worker.models import load_model

BULK, INTERACTIVE = "demo.bulk", "demo.interactive"


def claimed(number: int, width: int = 64, height: int = 64, *, guidance: float = 5.0, **fields: object) -> Claim:
    config = ResolvedConfig.model_validate(
        {"prompt": "x", "width": width, "height": height, "seed": 1, "guidance_scale": guidance, **fields}
    )
    record = JobRecord(
        id=str(number), state=JobState.RUNNING, lane=Lane.BULK, config=config, digest="", created_at=0, queued_at=0
    )
    return Claim(job_id=record.id, attempt=1, token="t", record=record)


@pytest.fixture
def affinity() -> SizeAffinity:
    """Four rows run together of 64x64, two of anything larger."""
    return SizeAffinity(
        8,
        budget=lambda model, width, height: 4 if width * height <= 4096 else 2,
        rows=lambda model, guided: 2 if guided else 1,
        in_order=frozenset({INTERACTIVE}),
    )


def test_a_shape_is_wanted_while_it_runs_and_has_room(affinity: SizeAffinity) -> None:
    """From its first claim until it is full; again when a job has left; not when all have."""
    assert affinity.wanted(BULK) == []
    affinity.claimed(claimed(1))
    assert affinity.wanted(BULK) == ["64x64"]
    affinity.claimed(claimed(2, guidance=1.0))
    assert affinity.wanted(BULK) == ["64x64"], "three rows of four"
    affinity.claimed(claimed(3, guidance=1.0))
    assert affinity.wanted(BULK) == []
    for number in (1, 1, 2):
        affinity.released(claimed(number))
    assert affinity.wanted(BULK) == ["64x64"]
    affinity.released(claimed(3))
    assert affinity.wanted(BULK) == []


def test_models_have_groups_of_their_own(affinity: SizeAffinity) -> None:
    """A queue is asked only for what its own models run; an ensemble runs with each of them."""
    affinity.claimed(claimed(1, model="a"))
    affinity.claimed(claimed(2, 128, model="b", ensemble=("a",), guidance=1.0))
    assert affinity.wanted("a.bulk") == ["128x64", "64x64"]
    assert affinity.wanted("b.bulk") == ["128x64"]
    assert affinity.wanted("a+b.bulk") == ["128x64", "64x64"]
    assert affinity.wanted("c.bulk") == []


def test_urgent_queues_keep_their_order(affinity: SizeAffinity) -> None:
    """Nothing is preferred there, nor where affinity is off; but what was claimed there runs."""
    affinity.claimed(claimed(1))
    with affinity.preferred_shapes(INTERACTIVE) as shapes:
        assert shapes == []
    with affinity.preferred_shapes(BULK) as shapes:
        assert shapes == ["64x64"]
    off = SizeAffinity(0, budget=lambda *_: 4, rows=lambda *_: 1)
    off.claimed(claimed(1))
    with off.preferred_shapes(BULK) as shapes:
        assert shapes == []


def test_one_claim_at_a_time_but_none_waits_for_ever(affinity: SizeAffinity) -> None:
    """Each knows of the one before; where that one hangs, it goes ahead all the same."""
    with affinity.preferred_shapes(BULK):
        with affinity.preferred_shapes(BULK) as shapes:
            assert shapes == []
        affinity.claimed(claimed(1))
    with affinity.preferred_shapes(BULK) as shapes:
        assert shapes == ["64x64"]


def test_the_engine_says_what_has_room(tiny_model: Path) -> None:
    """Fewer rows of larger images, two for a guided one; what it cannot do is no shape of it."""
    engine = Engine(load_model("tiny", source=str(tiny_model)), EngineSettings(max_rows=8))
    affinity = SizeAffinity(8, budget=engine.row_budget, rows=engine.rows_of_image)
    assert [engine.row_budget("tiny", 64, height) for height in (64, 128)] == [8, 4]
    assert [engine.rows_of_image("tiny", guided) for guided in (True, False)] == [2, 1]
    with pytest.raises(InvalidRequest, match="width"):
        engine.row_budget("tiny", 60, 64)
    affinity.claimed(claimed(1, model="tiny", num_images=3))
    assert affinity.wanted("tiny.bulk") == ["64x64"]
    affinity.claimed(claimed(2, model="tiny"))
    assert affinity.wanted("tiny.bulk") == []
    affinity.claimed(claimed(3, model="another"))
    affinity.claimed(claimed(4, 8192, 8192, model="tiny"))
    assert affinity.wanted("another.bulk", "tiny.bulk") == []
