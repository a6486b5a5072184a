"""The engine: one thread that owns a device and batches requests at every denoising step."""

from calotype_worker.engine.engine import Engine
from calotype_worker.engine.settings import EngineSettings
from calotype_worker.engine.stats import EngineStats
from calotype_worker.request import Generated, GenerationRequest

__all__ = ["Engine", "EngineSettings", "EngineStats", "Generated", "GenerationRequest"]
