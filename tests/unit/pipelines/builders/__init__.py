"""Tiny pipelines of many classes: real networks with random weights."""

from tests.unit.pipelines.builders.flux1 import flux
from tests.unit.pipelines.builders.sd import stable_diffusion
from tests.unit.pipelines.builders.sound_and_mesh import shap_e

__all__ = ["flux", "shap_e", "stable_diffusion"]
