"""The Lua scripts, each an atomic step on the Redis server, and the base of the classes that run them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from functools import cache
from importlib import resources
from typing import Any, Concatenate, ParamSpec, TypeVar

from redis import Redis
from redis.commands.core import Script
from redis.exceptions import RedisError

from calotype_shared.errors import RedisUnavailable
from calotype_shared.queue.connection import address_of, is_outage, unavailable
from calotype_shared.queue.keys import Keys
from calotype_shared.queue.message import message_template
from calotype_shared.queue.records import SCHEMA
from calotype_shared.schema.jobs import TRANSITIONS

P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S", bound="Scripted")


# Valkey refuses these if its memory is full. All other scripts finish or move work, and so free memory.
_ADDING = frozenset({"create", "batch_create"})
_ALLOWED = "#!lua flags=allow-oom\n"


@cache
def script_source(name: str, schema: int = SCHEMA) -> str:
    """The whole text of a script: the prelude, with the one table of legal transitions, then the script itself.

    The server identifies a script by the hash of its text, so scripts of several versions can be used side by side.
    """
    folder = resources.files("calotype_shared.queue") / "lua"
    edges = ", ".join(f"['{old.value}>{new.value}'] = true" for old, new in TRANSITIONS)
    prelude = (folder / "prelude.lua").read_text()
    prelude = (
        prelude.replace("@EDGES@", edges).replace("@MESSAGE@", message_template()).replace("@SCHEMA@", str(schema))
    )
    return ("" if name in _ADDING else _ALLOWED) + prelude + (folder / f"{name}.lua").read_text()


def said_clearly(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """Turns Redis connection errors into RedisUnavailable, with address and remedy."""

    @functools.wraps(method)
    def wrapped(self: S, *args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return method(self, *args, **kwargs)
        except RedisError as error:
            if not is_outage(error):
                raise
            raise self.unavailable(error) from error

    return wrapped  # type: ignore[return-value]  # mypy names the first argument, nothing else differs


class Scripted:
    """A Redis connection, its key names, and scripts by name. Thread-safe, like its Redis client."""

    schema = SCHEMA  # of the records it writes, and the newest of those it works on

    def __init__(self, redis: Redis, *, key_prefix: str = "calotype:") -> None:
        self._redis = redis
        self.keys = Keys(key_prefix)
        self._scripts: dict[str, Script] = {}

    @property
    def redis(self) -> Redis:
        return self._redis

    def _run(self, name: str, arguments: Sequence[object]) -> Any:
        if name not in self._scripts:
            self._scripts[name] = self._redis.register_script(script_source(name, self.schema))
        return self._scripts[name](keys=[self.keys.prefix], args=list(arguments))  # type: ignore[arg-type]

    def unavailable(self, error: RedisError) -> RedisUnavailable:
        """The error to raise for a connection error."""
        return unavailable(error, address_of(self._redis))
