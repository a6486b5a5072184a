"""The sync and the async client are one interface: the same methods, parameters and words.

And errors can be imported from the package's root.
"""

from __future__ import annotations

import builtins
import inspect
import re
import typing
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
from mypy import api as mypy

import calotype
import calotype_shared.errors
from calotype.batches.client import Batches, BatchHandle
from calotype.fields import JobFields
from calotype_shared.errors import CalotypeError
from calotype_shared.schema.config import GenerationConfig

ROOT = Path(__file__).parents[2]
PAIRS = [
    (calotype.Client, calotype.AsyncClient),
    (calotype.JobHandle, calotype.AsyncJobHandle),
    (Batches, calotype.AsyncBatches),
    (BatchHandle, calotype.AsyncBatchHandle),
    (calotype.DeadJobs, calotype.AsyncDeadJobs),
]
BUILT_IN = {
    "InvalidRequest": ValueError,
    "SettingsError": ValueError,
    "JobNotFound": LookupError,
    "BatchNotFound": LookupError,
    "ObjectMissing": LookupError,
    "WaitTimeout": TimeoutError,
    "RedisUnavailable": ConnectionError,
}


def methods(cls: type) -> dict[str, Any]:
    return {name: member for name, member in inspect.getmembers(cls, callable) if not name.startswith("_")}


def differences(sync: type, other: type) -> Iterator[str]:
    """What is not equal about two classes, but for `await` and `Async` in names."""
    ours, theirs = methods(sync), methods(other)
    for name in ours.keys() ^ theirs.keys():
        yield f"{name}: only one of them has it"
    for name in ours.keys() & theirs.keys():
        first, second = inspect.signature(ours[name]), inspect.signature(theirs[name])
        if first.parameters != second.parameters:
            yield f"{name}: {first} and {second}"
        returned = str(second.return_annotation)
        awaited = inspect.iscoroutinefunction(theirs[name])
        iterated = returned.startswith("AsyncIterator[")
        without_a_round_trip = name in ("job", "batch")
        if not (awaited or iterated or without_a_round_trip):
            yield f"{name}: neither awaitable nor an async iterator"
        if returned.replace("Async", "") != str(first.return_annotation):
            yield f"{name}: returns {first.return_annotation} and {returned}"
        if not sentence(ours[name]) or sentence(ours[name]) != sentence(theirs[name]):
            yield f"{name}: says {sentence(ours[name])!r} and {sentence(theirs[name])!r}"


def sentence(function: Any) -> str:
    """The first of its docstring."""
    return re.split(r"(?<=\.)\s", inspect.getdoc(function) or "", maxsplit=1)[0]


@pytest.mark.parametrize(("sync", "other"), PAIRS, ids=lambda cls: cls.__name__)
def test_the_async_client_is_equal_method_by_method(sync: type, other: type) -> None:
    """Names, parameters, defaults, what is returned, and the first sentence; and the constructor's parameters."""
    assert list(differences(sync, other)) == []
    assert len(methods(sync)) >= 3
    if sync is calotype.Client:
        assert inspect.signature(sync).parameters == inspect.signature(other).parameters


def test_a_difference_is_noticed() -> None:
    """The control: each kind of it, in two classes that differ in each."""

    class Sync:
        def missing(self) -> None:
            """One."""

        def default(self, x: int = 1) -> None:
            """One."""

        def blocking(self) -> None:
            """One."""

        def words(self) -> None:
            """One."""

    class Async:
        async def default(self, x: int = 2) -> None:
            """One."""

        def blocking(self) -> None:
            """One."""

        async def words(self) -> None:
            """Two."""

    found = sorted(difference.split(":")[0] for difference in differences(Sync, Async))
    assert found == ["blocking", "default", "missing", "words"]


def errors() -> list[type[CalotypeError]]:
    module = vars(calotype_shared.errors).values()
    return [error for error in module if isinstance(error, type) and issubclass(error, CalotypeError)]


def test_every_error_is_exported_and_is_the_built_in_that_it_is() -> None:
    """`except TimeoutError` works for whoever does not know our names."""
    assert {error.__name__ for error in errors()} <= set(calotype.__all__)
    for error in errors():
        own = [base for base in error.__bases__ if base.__module__ == builtins.__name__ and base is not Exception]
        wanted = BUILT_IN.get(error.__name__)
        assert own == ([wanted] if wanted else []), error


def test_the_tree_of_errors_is_true() -> None:
    """Each error of the drawing stands below its base, and none is left out; the built-ins are named below it."""
    document = inspect.getdoc(calotype_shared.errors) or ""
    _, tree, below = document.split("\n\n", 2)
    drawn: dict[str, str | None] = {}
    above: list[tuple[int, str]] = []
    for line in tree.splitlines():
        match = re.match(r"^([ │├└─]*)(\w+)", line)
        assert match is not None
        indent, name = len(match[1]), match[2]
        above = [entry for entry in above if entry[0] < indent]
        drawn[name] = above[-1][1] if above else None
        above.append((indent, name))
    real = {error.__name__: error.__bases__[0].__name__ for error in errors()}
    assert drawn.pop("CalotypeError") is None
    assert drawn == {name: base for name, base in real.items() if name != "CalotypeError"}
    said = " ".join(below.split())
    for name, builtin in BUILT_IN.items():
        assert re.search(rf"{name}\b[^;:.]* from {builtin.__name__}\b", said), name


def test_what_the_package_exports_is_there() -> None:
    """Each name leads to something, and what type checkers see is what there is."""
    for name in calotype.__all__:
        assert getattr(calotype, name) is not None
    exported = {name for names in calotype._HOMES.values() for name in names}
    assert exported | {"__version__"} == set(calotype.__all__)
    assert re.match(r"\d+\.\d+", calotype.__version__)


def test_the_typed_fields_are_those_of_a_config() -> None:
    """Add a field of GenerationConfig to JobFields too; `quality` stands for two of them."""
    assert set(JobFields.__annotations__) == set(GenerationConfig.model_fields) | {"quality"}
    typed = typing.get_type_hints(JobFields)
    for name, field in GenerationConfig.model_fields.items():
        assert plain(field.annotation) <= plain(typed[name]) or typed[name] is Any, name


def plain(annotation: Any) -> set[type]:
    """The scalar types that it allows; an enum of strings as str."""
    parts = typing.get_args(annotation) if typing.get_origin(annotation) in SUMS else (annotation,)
    kinds = {str if isinstance(part, type) and issubclass(part, Enum) else part for part in parts}
    kinds |= {typing.get_args(part)[0] for part in parts if typing.get_origin(part) is typing.Annotated}
    return {kind for kind in kinds if kind in (str, int, float, bool, type(None))}


SUMS = (typing.Union, type(int | str))

GOOD = """
import asyncio
from pathlib import Path
from typing import assert_type
from calotype import *

def use(client: Client, ids: tuple[str, ...]) -> None:
    job = client.submit("x", num_inference_steps=3, init_image=Path("a.png"), sampler=SamplerType.DDIM, quality="fast")
    assert_type(job, JobHandle)
    assert_type(client.wait(job), JobRecord)
    assert_type(client.wait("id", 3.0), JobRecord)
    assert_type(client.wait([job, "id"]), list[JobRecord])
    assert_type(client.wait(ids), list[JobRecord])
    assert_type(client.wait(each for each in ids), list[JobRecord])
    assert_type(client.cancel(job), JobState)
    assert_type(client.cancel([job]), list[JobState])
    assert_type(client.images([job]), list[list[JobImage]])
    assert_type(job.result(3), list[JobImage])
    assert_type(client.batches.wait(client.batch("batch_1")), BatchRecord)

async def use_async(client: AsyncClient) -> None:
    job = await client.submit("x", num_inference_steps=3)
    assert_type(job, AsyncJobHandle)
    assert_type(await client.wait(job), JobRecord)
    assert_type(await client.wait([job]), list[JobRecord])
    assert_type(await client.cancel(job), JobState)
    assert_type(await client.cancel([job]), list[JobState])
    assert_type(await client.images(job), list[JobImage])
    async for record in client.follow(job):
        assert_type(record, JobRecord)
"""
BAD = """
from calotype import AsyncClient, Client

def use(client: Client) -> None:
    client.submit("x", stepz=3)
    client.submit("x", num_inference_steps="3")
    client.wait(client.batch("batch_1"))
    client.wait(3)

async def use_async(client: AsyncClient) -> None:
    await client.submit("x", stepz=3)
    await client.status("x", 4)
"""


@pytest.mark.slow
def test_mypy_takes_what_is_right_and_refuses_what_is_not(tmp_path: Path) -> None:
    """A wrong field, a wrong type, another kind's handle; each for its own reason."""
    (tmp_path / "good.py").write_text(GOOD.strip())
    (tmp_path / "bad.py").write_text(BAD.strip())
    files = [str(tmp_path / name) for name in ("good.py", "bad.py")]
    folders = ":".join(str(ROOT / room) for room in ("producer", "worker", "shared"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MYPYPATH", folders)
        options = ["--config-file=", "--strict", "--follow-imports=silent", "--ignore-missing-imports"]
        shown, trouble, _ = mypy.run([*options, "--cache-dir", str(tmp_path / "cache"), *files])
    assert not trouble
    refused = [line for line in shown.splitlines() if ": error:" in line]
    assert [line for line in refused if "good.py" in line] == []
    for line, reason in {
        4: 'Unexpected keyword argument "stepz" for "submit" of "Client"',
        5: '"num_inference_steps" to "submit" of "Client" has incompatible type "str"',
        6: 'No overload variant of "wait" of "Jobs" matches argument type "BatchHandle"',
        7: 'No overload variant of "wait" of "Jobs" matches argument type "int"',
        10: 'Unexpected keyword argument "stepz" for "submit" of "AsyncClient"',
        11: "Too many arguments",
    }.items():
        assert any(f"bad.py:{line}: error: " in entry and reason in entry for entry in refused), (line, shown)
    assert len(refused) == 6
