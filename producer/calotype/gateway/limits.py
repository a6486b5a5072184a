"""Limits of a gateway process: `Budget`, shares of something scarce by tenant; `Pool`, threads for one kind of work."""

from __future__ import annotations

import asyncio
import functools
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, ParamSpec, TypeVar

import anyio
import anyio.to_thread

from calotype_shared.errors import ServiceUnavailable, TooBusy

P = ParamSpec("P")
R = TypeVar("R")

RETRY_SECONDS = 5.0


class Budget:
    """At most `most` units at one time, of which one tenant has at most `most_of_one`. For one event loop.

    Whoever alone asks for more than either gets it, so that nothing allowed elsewhere is impossible here.
    """

    def __init__(self, most: int, most_of_one: int, *, wait_seconds: float, refusal: str) -> None:
        """After `wait_seconds` without a free share, TooBusy is raised with the message `refusal`."""
        self._most = most
        self._most_of_one = most_of_one
        self._wait_seconds = wait_seconds
        self._refusal = refusal
        self._held: Counter[str] = Counter()
        self._freed = asyncio.Condition()

    @asynccontextmanager
    async def taken(self, tenant: str, amount: int = 1) -> AsyncIterator[None]:
        """Holds a share for the duration of a block. Raises TooBusy."""
        async with self._freed:
            if not self._fits(tenant, amount):
                await self._wait(tenant, amount)
            self._held[tenant] += amount
        try:
            yield
        finally:
            self._held[tenant] -= amount
            if not self._held[tenant]:
                del self._held[tenant]
            async with self._freed:
                self._freed.notify_all()

    async def _wait(self, tenant: str, amount: int) -> None:
        try:
            async with asyncio.timeout(self._wait_seconds):
                await self._freed.wait_for(lambda: self._fits(tenant, amount))
        except TimeoutError:
            raise TooBusy(self._refusal, RETRY_SECONDS) from None

    def _fits(self, tenant: str, amount: int) -> bool:
        own, total = self._held[tenant], sum(self._held.values())
        return (own == 0 or own + amount <= self._most_of_one) and (total == 0 or total + amount <= self._most)


class Pool:
    """Threads for calls that block on one thing, so that it delays only what needs it when it is slow."""

    def __init__(self, name: str, threads: int, *, wait_seconds: float) -> None:
        """`name` is for messages. A call that gets no thread for `wait_seconds` is refused."""
        self._name = name
        self._wait_seconds = wait_seconds
        self._admitted = anyio.CapacityLimiter(threads)
        self._threads = anyio.CapacityLimiter(threads)

    async def __call__(self, function: Callable[P, R], /, *arguments: P.args, **options: P.kwargs) -> R:
        """The function's result. Raises ServiceUnavailable if no thread becomes free, and whatever it raises."""
        call: Any = object()
        try:
            with anyio.fail_after(self._wait_seconds):
                await self._admitted.acquire_on_behalf_of(call)
        except TimeoutError:
            raise ServiceUnavailable(
                f"the {self._name} is slow: no call was finished for {self._wait_seconds:g} s; retry later"
            ) from None
        try:
            return await anyio.to_thread.run_sync(
                functools.partial(function, *arguments, **options), limiter=self._threads
            )
        finally:
            self._admitted.release_on_behalf_of(call)
