"""Fixtures of the fault tests: a forge of workers, undisturbed images to compare with, sites to break things in."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from calotype.embedded import EmbeddedServers
from calotype_shared.settings import Settings
from tests.faults.harness import FULL, KINDS, Forge, Site, Table, digest, new_names
from tests.integration.conftest import client, invariants, start_worker  # noqa: F401 - fixtures

_table = Table()


@pytest.fixture(scope="session")
def table() -> Table:
    return _table


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for line in _table.lines():
        terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def corner(servers: EmbeddedServers) -> Callable[..., Settings]:
    """Settings of a fresh corner of the shared servers."""
    return lambda **changes: servers.settings(**{**new_names(), **changes})


@pytest.fixture(scope="session")
def reference(
    corner: Callable[..., Settings],
    forge: Forge,
    tiny_model: Path,
    tmp_path_factory: pytest.TempPathFactory,
    worker_id: str,
) -> Mapping[str, str]:
    """Digests of an undisturbed run's images, by the config's digest. pytest's own workers share them."""
    folder = tmp_path_factory.mktemp("reference")
    if worker_id == "master":
        return _undisturbed(corner, forge, tiny_model, folder)
    known = tmp_path_factory.getbasetemp().parent / "reference.json"
    with FileLock(f"{known}.lock"):
        if not known.exists():
            known.write_text(json.dumps(_undisturbed(corner, forge, tiny_model, folder)))
        found: dict[str, str] = json.loads(known.read_text())
        return found


def _undisturbed(corner: Callable[..., Settings], forge: Forge, tiny_model: Path, folder: Path) -> dict[str, str]:
    site = Site(corner(), forge=forge, model=tiny_model, folder=folder, reference={})
    try:
        site.start_worker()
        records = site.wait([*site.submit(KINDS[False]), *site.submit(KINDS[True], long=True)], 1700 if FULL else 500)
        found = {record.digest: digest(site.storage.get(record.images[0].key)) for record in records}
    finally:
        site.close()
    assert len(set(found.values())) == sum(KINDS.values()), "the images must differ, or nothing could be told apart"
    return found


@pytest.fixture
def make_site(
    corner: Callable[..., Settings],
    forge: Forge,
    tiny_model: Path,
    tmp_path: Path,
    reference: Mapping[str, str],
) -> Iterator[Callable[..., Site]]:
    """Makes sites, on the shared servers or on those that `settings` name; their workers are killed at the end."""
    sites: list[Site] = []
    number = itertools.count()

    def make(settings: Settings | None = None, **keywords: Any) -> Site:
        folder = tmp_path / f"site-{next(number)}"
        folder.mkdir()
        site = Site(settings or corner(), forge=forge, model=tiny_model, folder=folder, reference=reference, **keywords)
        sites.append(site)
        return site

    yield make
    for site in sites:
        site.close()


@pytest.fixture
def site(make_site: Callable[..., Site]) -> Site:
    return make_site()
