"""Turns a method of the sync client into an awaitable one: its call runs in a thread."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

S = TypeVar("S")
S_co = TypeVar("S_co", covariant=True)
P = ParamSpec("P")
R = TypeVar("R")


class Threaded(Generic[S_co]):
    """Has a part of the sync client, and calls it in threads."""

    def __init__(self, sync: S_co) -> None:
        self._sync = sync


def in_thread(
    method: Callable[Concatenate[S, P], R],
) -> Callable[Concatenate[Threaded[S], P], Coroutine[Any, Any, R]]:
    """The method with `await`: the same parameters, docstring and errors."""

    @functools.wraps(method)
    async def call(self: Threaded[S], /, *arguments: P.args, **options: P.kwargs) -> R:
        return await asyncio.to_thread(method, self._sync, *arguments, **options)

    return call


async def iterated_in_thread(items: Iterator[R], *, at_once: int = 256) -> AsyncIterator[R]:
    """The items of an iterator that can block: each call in a thread takes up to `at_once` of them."""
    while taken := await asyncio.to_thread(lambda: [item for _, item in zip(range(at_once), items, strict=False)]):
        for item in taken:
            yield item
