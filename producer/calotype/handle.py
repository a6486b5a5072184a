"""`Handle`: an id together with its client; and the helpers that accept ids or handles."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, Generic, TypeVar

from calotype_shared.errors import InvalidRequest

C = TypeVar("C")


class Handle(Generic[C]):
    """Holds no state and costs no round trip: every answer is fresh. Handles are equal that are of one kind and id."""

    __slots__ = ("_client", "id")
    kind: ClassVar[str]

    def __init__(self, client: C, id: str) -> None:
        self._client = client
        self.id = one_id(id, type(self))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.id!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Handle) and (self.kind, self.id) == (other.kind, other.id)

    def __hash__(self) -> int:
        return hash((self.kind, self.id))


class AnyJobHandle(Handle[C]):
    """A job's handle, of a `Client` or of an `AsyncClient`."""

    __slots__ = ()
    kind = "job"


class AnyBatchHandle(Handle[C]):
    """A batch's handle, of a `Client` or of an `AsyncClient`."""

    __slots__ = ()
    kind = "batch"


JobRef = str | AnyJobHandle[Any]
BatchRef = str | AnyBatchHandle[Any]


def one_id(given: object, kind: type[Handle[Any]]) -> str:
    """The given id, or the id of the given handle.

    Raises:
        InvalidRequest: it is neither, or a handle of another kind.
    """
    if isinstance(given, str):
        return given
    if isinstance(given, Handle) and given.kind == kind.kind:
        return given.id
    raise _neither(given, kind, f"give the id of a {kind.kind} or its handle")


def ids_of(given: object, kind: type[Handle[Any]]) -> tuple[list[str], bool]:
    """The ids of what was given, and whether it was a single id or handle instead of an iterable.

    Raises:
        InvalidRequest: it is neither, or something in it is not.
    """
    if isinstance(given, (str, Handle)):
        return [one_id(given, kind)], True
    if isinstance(given, Iterable) and not isinstance(given, (bytes, bytearray)):
        return [one_id(part, kind) for part in given], False
    raise _neither(given, kind, f"give the id of a {kind.kind}, its handle, or an iterable of ids and handles")


def _neither(given: object, kind: type[Handle[Any]], remedy: str) -> InvalidRequest:
    article = "an" if type(given).__name__[0] in "AEIOUaeiou" else "a"
    return InvalidRequest(
        f"{article} {type(given).__name__} does not name a {kind.kind}",
        field=f"{kind.kind}s",
        value=given,
        remedy=remedy,
    )
