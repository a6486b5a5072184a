"""`Hooks`: the deliveries that wait in Redis. Leases those that are due and settles them; each step is one script."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

from calotype_shared.queue.scripts import Scripted, said_clearly


@dataclass(frozen=True, kw_only=True)
class Hook:
    """One attempt at a delivery. Only the owner of the newest attempt may settle it."""

    id: str  # of the job or batch that it reports
    type: str  # such as job.succeeded
    url: str
    host: str  # of the url, with its port
    tenant: str
    at: float  # when it happened, in seconds since the epoch
    attempt: int  # 1 for the first

    @property
    def message_id(self) -> str:
        """The same for every attempt, so that receivers can detect repetitions. A job or batch is final once."""
        return f"msg_{self.id}"


class Hooks(Scripted):
    """Every method raises RedisUnavailable if Redis cannot be reached. Deliveries whose lease expires are due again."""

    @said_clearly
    def take(
        self, *, lease_seconds: float, most: int, under_way: Collection[Hook], per_host: int, per_tenant: int
    ) -> list[Hook]:
        """Lease up to `most` due deliveries, which nobody else gets during the lease.

        `under_way` are the caller's own, which count towards the limits per host and per tenant.
        """
        arguments = [
            *(int(lease_seconds * 1000), most, per_host, per_tenant),
            json.dumps(Counter(hook.host for hook in under_way)),
            json.dumps(Counter(hook.tenant for hook in under_way)),
        ]
        return [_read(*found) for found in self._run("hook_take", arguments)]

    @said_clearly
    def done(self, hook: Hook) -> bool:
        """Mark it as settled. False (here and below) if the lease was lost and another owner has it."""
        return bool(self._run("hook_settle", [hook.id, hook.attempt, ""]))

    @said_clearly
    def postpone(self, hook: Hook, *, seconds: float) -> bool:
        """Make it due again after a pause."""
        return bool(self._run("hook_settle", [hook.id, hook.attempt, int(seconds * 1000)]))


def _read(hook_id: str, host: str, flat: list[str]) -> Hook:
    fields = dict(zip(flat[::2], flat[1::2], strict=True))
    return Hook(
        id=hook_id,
        type=fields["type"],
        url=fields["url"],
        host=host,
        tenant=fields["tenant"],
        at=int(fields["at"]) / 1e6,
        attempt=int(fields["attempts"]),
    )
