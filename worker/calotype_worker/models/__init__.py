"""Model families behind one interface, found by name."""

from calotype_worker.models.base import StepModel
from calotype_worker.models.registry import default_dtype, demo_folder, load_model, resolve_source

__all__ = ["StepModel", "default_dtype", "demo_folder", "load_model", "resolve_source"]
