"""Calotype's producer side: submit generation jobs, follow them, fetch their images.

Names load when first used, so that importing the package costs little and never loads torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from calotype.aio import AsyncClient, AsyncJobHandle
    from calotype.batches.client import BatchHandle
    from calotype.batches.dispatcher import Dispatcher
    from calotype.batches.record import BatchRecord, BatchState
    from calotype.client import Client
    from calotype.handle import JobHandle
    from calotype.job_image import JobImage
    from calotype_shared.errors import (
        BatchNotFound,
        CalotypeError,
        IdempotencyConflict,
        InvalidRequest,
        JobCancelled,
        JobFailed,
        JobNotFound,
        RedisUnavailable,
        ServiceUnavailable,
        SettingsError,
        StorageUnavailable,
        UnknownModel,
        WaitTimeout,
    )
    from calotype_shared.schema.config import GenerationConfig
    from calotype_shared.schema.enums import JobState, Lane, OutputFormat, SamplerType
    from calotype_shared.schema.jobs import ImageRef, JobRecord
    from calotype_shared.schema.model_card import ModelCard
    from calotype_shared.schema.resolve import ResolvedConfig
    from calotype_shared.settings import Settings

__all__ = [
    "AsyncClient",
    "AsyncJobHandle",
    "BatchHandle",
    "BatchNotFound",
    "BatchRecord",
    "BatchState",
    "CalotypeError",
    "Client",
    "Dispatcher",
    "GenerationConfig",
    "IdempotencyConflict",
    "ImageRef",
    "InvalidRequest",
    "JobCancelled",
    "JobFailed",
    "JobHandle",
    "JobImage",
    "JobNotFound",
    "JobRecord",
    "JobState",
    "Lane",
    "ModelCard",
    "OutputFormat",
    "RedisUnavailable",
    "ResolvedConfig",
    "SamplerType",
    "ServiceUnavailable",
    "Settings",
    "SettingsError",
    "StorageUnavailable",
    "UnknownModel",
    "WaitTimeout",
]

_HOMES = {
    "calotype.aio": ("AsyncClient", "AsyncJobHandle"),
    "calotype.batches.client": ("BatchHandle",),
    "calotype.batches.dispatcher": ("Dispatcher",),
    "calotype.batches.record": ("BatchRecord", "BatchState"),
    "calotype.client": ("Client",),
    "calotype.handle": ("JobHandle",),
    "calotype.job_image": ("JobImage",),
    "calotype_shared.schema.config": ("GenerationConfig",),
    "calotype_shared.schema.enums": ("JobState", "Lane", "OutputFormat", "SamplerType"),
    "calotype_shared.errors": (
        "BatchNotFound",
        "CalotypeError",
        "IdempotencyConflict",
        "InvalidRequest",
        "JobCancelled",
        "JobFailed",
        "JobNotFound",
        "RedisUnavailable",
        "ServiceUnavailable",
        "SettingsError",
        "StorageUnavailable",
        "UnknownModel",
        "WaitTimeout",
    ),
    "calotype_shared.schema.jobs": ("ImageRef", "JobRecord"),
    "calotype_shared.schema.model_card": ("ModelCard",),
    "calotype_shared.schema.resolve": ("ResolvedConfig",),
    "calotype_shared.settings": ("Settings",),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            value = getattr(import_module(home), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module 'calotype' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
