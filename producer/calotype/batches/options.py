"""The options of a batch, and their form in its record."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, TypedDict

from calotype.batches.record import BatchFormat
from calotype.resolver import Resolver, storable
from calotype_shared.errors import InvalidRequest
from calotype_shared.schema.enums import Lane

WINDOW = 2_000  # jobs of a batch in Redis at a time


class BatchOptions(TypedDict, total=False):
    """The options of a batch."""

    lane: Lane  # bulk
    tenant: str | None
    metadata: Mapping[str, Any] | None
    webhook_url: str | None
    expires_in: float | None  # seconds after which unfinished lines expire
    window: int  # jobs of it in Redis at a time
    format: BatchFormat  # native


def option_fields(options: BatchOptions, resolver: Resolver) -> dict[str, str]:
    """The options as the batch's record holds them. Raises InvalidRequest."""
    window, expires_in = options.get("window", WINDOW), options.get("expires_in")
    for field, value, low, high in (("window", window, 1, 100_000), ("expires_in", expires_in, 1, 365 * 86_400)):
        if value is not None and not low <= value <= high:
            raise InvalidRequest("is out of range", field=field, value=value, remedy=f"use {low} to {high}")
    fields = {
        "lane": options.get("lane", Lane.BULK).value,
        "tenant": resolver.tenant(options.get("tenant")),
        "format": options.get("format", BatchFormat.NATIVE).value,
        "window": str(window),
        "metadata": json.dumps(storable(options.get("metadata"))),
        "webhook": resolver.webhook(options.get("webhook_url")),
        "expires_after": None if expires_in is None else str(math.ceil(expires_in)),
    }
    return {name: value for name, value in fields.items() if value is not None}
