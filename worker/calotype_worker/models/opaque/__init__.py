"""Pipelines that cannot be stepped from outside: video and 3D. Each run is a static batch of equal settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from calotype_shared.schema.model_card import ModelCard
from calotype_worker.models.opaque.animatediff import AnimateDiff
from calotype_worker.models.opaque.shap_e import ShapE
from calotype_worker.models.opaque.whole_pipeline import WholePipeline

__all__ = ["OPAQUE", "AnimateDiff", "ShapE", "WholePipeline", "opaque_card"]

# `_class_name` in a folder's model_index.json -> the adapter that runs it.
OPAQUE: dict[str, type[WholePipeline]] = {"AnimateDiffPipeline": AnimateDiff, "ShapEPipeline": ShapE}


def opaque_card(name: str, pipeline: Any, notes: Mapping[str, Any], version: str) -> ModelCard:
    """The card of a pipeline of one of the `OPAQUE` classes.

    `notes` is its calotype.json, of which `native_sizes` [[width, height], …] in pixels, the default first, and
    `description` are read; `version` identifies the weights.
    """
    return OPAQUE[type(pipeline).__name__].card_of(name, pipeline, notes, version)
