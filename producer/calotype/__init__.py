"""Calotype's producer side: submit generation jobs, follow them, fetch their images.

Names load when first used, so that importing the package costs little and never loads torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from calotype.aio import AsyncBatches, AsyncBatchHandle, AsyncClient, AsyncDeadJobs, AsyncJobHandle
    from calotype.batches.client import Batches, BatchHandle
    from calotype.batches.dispatcher import Dispatcher
    from calotype.batches.options import BatchOptions
    from calotype.batches.record import BatchRecord, BatchState
    from calotype.client import Client
    from calotype.dead import DeadJobs
    from calotype.fields import JobFields
    from calotype.job_image import JobImage
    from calotype.jobs import JobHandle
    from calotype_shared.errors import (
        BatchNotFound,
        CalotypeError,
        GenerationFailed,
        IdempotencyConflict,
        InvalidRequest,
        JobCancelled,
        JobFailed,
        JobNotFound,
        ModelLoadError,
        ObjectMissing,
        QueueFull,
        RedisUnavailable,
        ServiceUnavailable,
        SettingsError,
        StorageUnavailable,
        TooBusy,
        UnknownModel,
        UnreadableRecord,
        WaitTimeout,
    )
    from calotype_shared.schema.config import GenerationConfig
    from calotype_shared.schema.enums import JobState, Lane, OutputFormat, SamplerType
    from calotype_shared.schema.jobs import ImageRef, JobRecord, Preview
    from calotype_shared.schema.model_card import ModelCard
    from calotype_shared.schema.resolve import ResolvedConfig
    from calotype_shared.schema.worker_info import WorkerInfo
    from calotype_shared.settings import Settings

    __version__: str

__all__ = [
    "AsyncBatchHandle",
    "AsyncBatches",
    "AsyncClient",
    "AsyncDeadJobs",
    "AsyncJobHandle",
    "BatchHandle",
    "BatchNotFound",
    "BatchOptions",
    "BatchRecord",
    "BatchState",
    "Batches",
    "CalotypeError",
    "Client",
    "DeadJobs",
    "Dispatcher",
    "GenerationConfig",
    "GenerationFailed",
    "IdempotencyConflict",
    "ImageRef",
    "InvalidRequest",
    "JobCancelled",
    "JobFailed",
    "JobFields",
    "JobHandle",
    "JobImage",
    "JobNotFound",
    "JobRecord",
    "JobState",
    "Lane",
    "ModelCard",
    "ModelLoadError",
    "ObjectMissing",
    "OutputFormat",
    "Preview",
    "QueueFull",
    "RedisUnavailable",
    "ResolvedConfig",
    "SamplerType",
    "ServiceUnavailable",
    "Settings",
    "SettingsError",
    "StorageUnavailable",
    "TooBusy",
    "UnknownModel",
    "UnreadableRecord",
    "WaitTimeout",
    "WorkerInfo",
    "__version__",
]

_HOMES = {
    "calotype.aio": ("AsyncBatchHandle", "AsyncBatches", "AsyncClient", "AsyncDeadJobs", "AsyncJobHandle"),
    "calotype.batches.client": ("BatchHandle", "Batches"),
    "calotype.batches.dispatcher": ("Dispatcher",),
    "calotype.batches.options": ("BatchOptions",),
    "calotype.batches.record": ("BatchRecord", "BatchState"),
    "calotype.client": ("Client",),
    "calotype.dead": ("DeadJobs",),
    "calotype.fields": ("JobFields",),
    "calotype.job_image": ("JobImage",),
    "calotype.jobs": ("JobHandle",),
    "calotype_shared.errors": (
        "BatchNotFound",
        "CalotypeError",
        "GenerationFailed",
        "IdempotencyConflict",
        "InvalidRequest",
        "JobCancelled",
        "JobFailed",
        "JobNotFound",
        "ModelLoadError",
        "ObjectMissing",
        "QueueFull",
        "RedisUnavailable",
        "ServiceUnavailable",
        "SettingsError",
        "StorageUnavailable",
        "TooBusy",
        "UnknownModel",
        "UnreadableRecord",
        "WaitTimeout",
    ),
    "calotype_shared.schema.config": ("GenerationConfig",),
    "calotype_shared.schema.enums": ("JobState", "Lane", "OutputFormat", "SamplerType"),
    "calotype_shared.schema.jobs": ("ImageRef", "JobRecord", "Preview"),
    "calotype_shared.schema.model_card": ("ModelCard",),
    "calotype_shared.schema.resolve": ("ResolvedConfig",),
    "calotype_shared.schema.worker_info": ("WorkerInfo",),
    "calotype_shared.settings": ("Settings",),
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        globals()[name] = value = import_module("importlib.metadata").version("calotype")
        return value
    for home, names in _HOMES.items():
        if name in names:
            value = getattr(import_module(home), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module 'calotype' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
