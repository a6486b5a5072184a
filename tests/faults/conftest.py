"""Fixtures of the fault tests: a forge of workers, undisturbed images to compare with, sites to break things in."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from calotype.embedded import EmbeddedServers
from calotype_shared.settings import Settings
from tests.faults.harness import Forge, Site, Table, Undisturbed, new_names
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
def undisturbed(
    corner: Callable[..., Settings], forge: Forge, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Undisturbed]:
    site = Site(corner(), forge=forge, model=tiny_model, folder=tmp_path_factory.mktemp("undisturbed"))
    yield Undisturbed(site)
    site.close()


@pytest.fixture
def make_site(
    corner: Callable[..., Settings],
    forge: Forge,
    tiny_model: Path,
    tmp_path: Path,
    undisturbed: Undisturbed,
) -> Iterator[Callable[..., Site]]:
    """Makes sites, on the shared servers or on those that `settings` name; their workers are killed at the end."""
    sites: list[Site] = []
    number = itertools.count()

    def make(settings: Settings | None = None, **keywords: Any) -> Site:
        folder = tmp_path / f"site-{next(number)}"
        folder.mkdir()
        site = Site(
            settings or corner(),
            forge=forge,
            model=tiny_model,
            folder=folder,
            undisturbed=undisturbed,
            **keywords,
        )
        sites.append(site)
        return site

    yield make
    for site in sites:
        site.close()


@pytest.fixture
def site(make_site: Callable[..., Site]) -> Site:
    return make_site()
