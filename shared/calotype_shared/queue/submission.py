"""The arguments of the script that accepts jobs, and its refusals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Self

from calotype_shared.errors import QueueFull
from calotype_shared.queue.keys import queue_name
from calotype_shared.schema.config import digest_of
from calotype_shared.schema.enums import Lane
from calotype_shared.schema.jobs import new_job_id
from calotype_shared.schema.resolve import ResolvedConfig

_UNKNOWN_SECONDS = 10.0  # retry delay while the queue's rate is unknown
_SLOWEST_SECONDS = 60.0


class NewJob(NamedTuple):
    """The fields of one job, in the order of `create.lua`."""

    id: str
    queue: str
    config: str  # canonical JSON of a resolved config
    digest: str
    cost: int
    identity: str = ""  # equal jobs in flight with the same one share their outcome; empty: never
    custom_id: str = ""  # in a batch

    @classmethod
    def of(cls, config: ResolvedConfig, *, lane: Lane, job_id: str = "", identity: str = "") -> Self:
        """A job for a config."""
        text = config.canonical_json()
        queue = queue_name(config.models, lane)
        return cls(job_id or new_job_id(), queue, text, digest_of(text), config.cost, identity)


def queue_full(answer: Sequence[str], *, coming: int, accepted: Sequence[str]) -> QueueFull:
    """The error to raise if `create.lua` has found the queue full."""
    _, whose, pending, most, rate = answer
    setting = "CALOTYPE_MAX_QUEUED_PER_TENANT" if whose == "tenant" else "CALOTYPE_MAX_QUEUED"
    queued = f"{pending} of this tenant's jobs are" if whose == "tenant" else f"{pending} jobs are"
    if coming > int(most):
        remedy = f"submit them as a batch, or raise {setting}"
        return QueueFull(f"{coming} jobs exceed the limit of {most} queued jobs; {remedy}", _SLOWEST_SECONDS)
    # At the recent rate, the time until as many jobs have finished as are submitted; or, because others wait for the
    # same places, until the backlog is shorter by a hundredth.
    awaited = max(coming, int(pending) / 100)
    seconds = awaited / float(rate) if rate and float(rate) else _UNKNOWN_SECONDS
    seconds = min(max(seconds, 1.0), _SLOWEST_SECONDS)
    remedy = f"retry in {math.ceil(seconds)} s, submit a batch, start more workers, or raise {setting}"
    before = f" after {len(accepted)} of these were accepted" if accepted else ""
    problem = f"the queue is full{before}: {queued} queued, and the limit is {most}"
    return QueueFull(f"{problem}; {remedy}", seconds, accepted=accepted)


class Idempotency(NamedTuple):
    """A key that its submitter uses for one request only, and a hash of that request."""

    key: str
    request: str
