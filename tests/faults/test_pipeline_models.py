"""Workers of pipeline models that die or hang in the middle of runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from calotype_shared.settings import Settings
from calotype_worker.jobs.drain import EXIT_STUCK
from tests.faults.harness import SHORT_LEASE, Forge, Site, Table, Undisturbed


@pytest.fixture
def site(corner: Callable[..., Settings], forge: Forge, tiny_model: Path, tmp_path: Path) -> Iterator[Site]:
    """Workers there run the tiny model as diffusers' own pipeline, and so does the one that nothing disturbs."""
    model = Path(f"StableDiffusionPipeline:{tiny_model}")
    folders = [tmp_path / name for name in ("site", "undisturbed")]
    for folder in folders:
        folder.mkdir()
    calm = Site(corner(), forge=forge, model=model, folder=folders[1])
    made = Site(corner(), forge=forge, model=model, folder=folders[0], undisturbed=Undisturbed(calm))
    yield made
    made.close()
    calm.close()


@pytest.mark.parametrize("fault", ["killed", pytest.param("hung", marks=pytest.mark.slow)])
def test_a_worker_in_the_middle_of_runs(fault: str, site: Site, table: Table) -> None:
    """A network call that never ends makes its worker exit, as does SIGKILL; another worker makes each image once."""
    limit = ("--hang-seconds", "1") if fault == "hung" else ()
    victim = site.start_worker(*SHORT_LEASE, *limit, stop="call")
    ids = site.submit(3)
    victim.wait_for("reached call")
    if fault == "hung":
        assert victim.wait(120) == EXIT_STUCK
        assert "worker exits: its engine hangs" in victim.text()
    else:
        victim.kill()
    began = time.monotonic()
    site.start_worker(*SHORT_LEASE)
    records = site.wait(ids)
    assert max(record.attempt for record in records) == 2, "nothing was taken over"
    table.add(f"pipeline worker {fault} in mid-run", site.check(ids), recovery_seconds=time.monotonic() - began)
