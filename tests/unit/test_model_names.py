"""Which model a request means."""

from __future__ import annotations

import pytest

from calotype.gateway.model_names import meant_model
from calotype.gateway.settings import GatewaySettings

ALIASES = {"dall-e-3": "sdxl", "flux": "sdxl"}


@pytest.mark.parametrize(
    ("name", "known", "default", "meant"),
    [
        ("dall-e-3", ["sdxl", "flux"], None, "sdxl"),
        ("flux", ["sdxl", "flux"], None, "flux"),  # its own name comes first
        ("other", ["sdxl"], "sdxl", "other"),
        (None, ["sdxl"], None, "sdxl"),
        (None, ["sdxl", "flux"], None, "demo"),
        (None, ["sdxl", "flux"], "flux", "flux"),
        (None, [], None, "demo"),
    ],
)
def test_which_model_is_meant(name: str | None, known: list[str], default: str | None, meant: str) -> None:
    assert meant_model(name, known, ALIASES, default) == meant


def test_aliases_are_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CALOTYPE_GATEWAY_ALIASES", "gpt-image-1.5=flux2, dall-e-3 = demo")
    assert GatewaySettings().aliases == {"gpt-image-1.5": "flux2", "dall-e-3": "demo"}
    monkeypatch.setenv("CALOTYPE_GATEWAY_ALIASES", "flux2")
    with pytest.raises(ValueError, match="write NAME=MODEL, separated by commas"):
        GatewaySettings()
