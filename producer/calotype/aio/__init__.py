"""The client for asyncio: the same client, with short calls in threads and waiting on the event loop."""

from calotype.aio.batches import AsyncBatches, AsyncBatchHandle
from calotype.aio.client import AsyncClient
from calotype.aio.dead import AsyncDeadJobs
from calotype.aio.jobs import AsyncJobHandle

__all__ = ["AsyncBatchHandle", "AsyncBatches", "AsyncClient", "AsyncDeadJobs", "AsyncJobHandle"]
