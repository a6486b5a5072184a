"""The worker: a step-batching diffusion engine, the Celery process around it, and its in-process API.

`from calotype_worker import DiffusionModel, GenerationConfig` needs no queue. Names are imported on first use, so that
a worker process can check its services before it imports torch, which takes seconds.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from calotype_shared.schema.enums import SamplerType
    from calotype_worker.inprocess.components import NoiseScheduler, TextEncoder, UNetModel, VAEDecoder
    from calotype_worker.inprocess.diffusion import DiffusionModel, GeneratedImage, GenerationConfig
    from calotype_worker.inprocess.pipeline import DiffusionPipeline
    from calotype_worker.models import Adapters, Memory

__all__ = [
    "Adapters",
    "DiffusionModel",
    "DiffusionPipeline",
    "GeneratedImage",
    "GenerationConfig",
    "Memory",
    "NoiseScheduler",
    "SamplerType",
    "TextEncoder",
    "UNetModel",
    "VAEDecoder",
]

_ELSEWHERE = {
    "Adapters": "calotype_worker.models",
    "DiffusionPipeline": "calotype_worker.inprocess.pipeline",
    "Memory": "calotype_worker.models",
    "NoiseScheduler": "calotype_worker.inprocess.components",
    "SamplerType": "calotype_shared.schema.enums",
    "TextEncoder": "calotype_worker.inprocess.components",
    "UNetModel": "calotype_worker.inprocess.components",
    "VAEDecoder": "calotype_worker.inprocess.components",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_ELSEWHERE.get(name, "calotype_worker.inprocess.diffusion")), name)
