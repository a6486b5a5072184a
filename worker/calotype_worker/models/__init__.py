"""Model families behind one interface, found by name."""

from calotype_worker.models.accelerations import Accelerations
from calotype_worker.models.base import StepModel
from calotype_worker.models.latent import Adapters, Memory
from calotype_worker.models.pipeline.model import PipelineModel
from calotype_worker.models.pool import AnyModel, ModelPool
from calotype_worker.models.registry import default_dtype, demo_folder, load_model, resolve_source

__all__ = [
    "Accelerations",
    "Adapters",
    "AnyModel",
    "Memory",
    "ModelPool",
    "PipelineModel",
    "StepModel",
    "default_dtype",
    "demo_folder",
    "load_model",
    "resolve_source",
]
