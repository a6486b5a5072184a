"""A tiny model, loaded once for all engine tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from calotype_worker.engine import Engine
    from calotype_worker.models import StepModel


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.models import write_tiny_sd

    return write_tiny_sd(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny_step_model(tiny_folder: Path) -> StepModel:
    from calotype_worker.models import load_model

    model: Any = load_model("tiny", source=str(tiny_folder))
    return model


@pytest.fixture
def make_engine(tiny_step_model: StepModel) -> Iterator[Any]:
    """Starts engines on the tiny model, or on another, and stops them all."""
    from calotype_worker.engine import Engine, EngineSettings

    engines: list[Engine] = []

    def make(
        model: StepModel = tiny_step_model,
        *,
        on_fatal: Any = None,
        trace: Any = None,
        start: bool = True,
        **options: Any,
    ) -> Engine:
        engine = Engine(model, EngineSettings(**options), on_fatal=on_fatal, trace=trace)
        engines.append(engine)
        if start:
            engine.start()
        return engine

    yield make
    for engine in engines:
        engine.stop()
