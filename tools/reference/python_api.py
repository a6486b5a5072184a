"""The page of the Python API: what `calotype` and `calotype_worker` export, from signatures and docstrings."""

from __future__ import annotations

import ast
import dataclasses
import enum
import inspect
import io
import logging
import re
import textwrap
import tokenize
from collections.abc import Iterator
from typing import Any, ForwardRef, is_typeddict

from pydantic import BaseModel

import calotype
import calotype.batches.record as batch_record
import calotype.testing
import calotype_worker
from calotype_shared.schema import config, jobs
from tools.reference.markdown import code, docstring, generated, table
from tools.reference.settings import constraints

_ALIASES = (
    "A `Name` is one that an operator registered, an `UploadId` what `Client.upload` returned; a `Side` is in pixels, "
    "a `Share` from 0 to 1."
)
_SECTIONS: tuple[tuple[str, str, Any, tuple[str, ...]], ...] = (
    (
        "Clients",
        "",
        calotype,
        (
            *("Client", "JobHandle", "Batches", "BatchHandle", "DeadJobs"),
            *("AsyncClient", "AsyncJobHandle", "AsyncBatches", "AsyncBatchHandle", "AsyncDeadJobs", "Dispatcher"),
        ),
    ),
    ("What goes in", _ALIASES, calotype, ("GenerationConfig", "JobFields", "SamplerType", "OutputFormat", "Lane")),
    (
        "Parts of a config",
        "Written as mappings of these fields will do.",
        config,
        ("LoraUse", "ControlUse", "RefinerUse"),
    ),
    ("Options of a batch", "", calotype, ("BatchOptions",)),
    (
        "What comes out",
        "",
        calotype,
        (
            "JobRecord",
            "ResolvedConfig",
            "JobState",
            "ImageRef",
            "JobImage",
            "Preview",
            "BatchRecord",
            "BatchState",
            "ModelCard",
            "WorkerInfo",
        ),
    ),
    ("Parts of a record", "", jobs, ("JobError", "Attempt")),
    ("Counts of a batch", "", batch_record, ("BatchCounts",)),
    (
        "In process",
        "From `calotype_worker`: the same engine without a queue.",
        calotype_worker,
        (
            *("DiffusionModel", "DiffusionPipeline", "GenerationConfig", "GeneratedImage", "Adapters", "Memory"),
            *("NoiseScheduler", "UNetModel", "TextEncoder", "VAEDecoder"),
        ),
    ),
    (
        "Tests",
        "From `calotype.testing`: [how to test your producer](../how-to/test-your-producer.md).",
        calotype.testing,
        ("Sandbox", "ScriptedWorker", "JobContext"),
    ),
)

_INTRODUCTION = """
Everything that `calotype` and `calotype_worker` export, and what the values that they give consist of. Errors have
[a page of their own](errors.md), and so has what [`Settings`](settings.md) reads.
"""


def page() -> str:
    parts = [generated("Python", "signatures and docstrings"), _INTRODUCTION]
    for title, sentence, package, names in _SECTIONS:
        parts.append(f"\n## {title}\n")
        parts += [f"{sentence}\n"] if sentence else []
        parts += [_class(getattr(package, name), package.__name__) for name in names]
    return "\n".join(parts)


def documented() -> set[tuple[str, str]]:
    """Package and name of everything on the page."""
    return {(package.__name__, name) for _, _, package, names in _SECTIONS for name in names}


def _class(cls: type, package: str) -> str:
    parts = [f"\n### `{package}.{cls.__name__}`\n"]
    if cls.__doc__ and not cls.__doc__.startswith(f"{cls.__name__}("):  # what `dataclass` would write
        parts.append(docstring(inspect.cleandoc(cls.__doc__)))
    if issubclass(cls, enum.Enum):
        notes = _notes(cls)
        parts.append(table(("value", ""), [(code(m.value), notes.get(m.name, "")) for m in cls]))
        return "\n".join(parts)
    base = _documented_base(cls)
    if base is not None:
        parts.append(f"Fields and methods: those of [`{base.__name__}`](#{_anchor(base)}) above.\n")
    fields = list(_fields(cls)) if base is None else []
    if fields:
        parts.append(table(("field", "type", "default", ""), fields))
    elif cls.__init__ is not object.__init__ and base is None:
        parts.append(_function(f"{cls.__name__}", cls.__init__, bound=True, heading=False))
    for name, member in members(cls):
        if isinstance(member, property):
            parts.append(f"\n#### `{cls.__name__}.{name}`\n\n{docstring(inspect.getdoc(member))}")
        else:
            function = member.__func__ if isinstance(member, (classmethod, staticmethod)) else member
            bound = not isinstance(member, staticmethod)
            parts.append(_function(f"{cls.__name__}.{name}", function, bound=bound, heading=True))
    return "\n".join(parts)


def _documented_base(cls: type) -> type | None:
    """The class above it that the page shows too."""
    shown = [getattr(package, name) for _, _, package, names in _SECTIONS for name in names]
    return next((owner for owner in cls.__mro__[1:] if owner in shown), None)


def _anchor(cls: type) -> str:
    """Of a heading: letters and digits, in lower case."""
    return f"calotype{cls.__name__}".lower()


def _owners(cls: type) -> list[type]:
    """The classes whose members it has, as far as they are ours and not shown by themselves."""
    base = _documented_base(cls)
    above = base.__mro__ if base else ()
    return [owner for owner in cls.__mro__ if owner.__module__.startswith("calotype") and owner not in above]


def members(cls: type) -> Iterator[tuple[str, Any]]:
    """Public methods and properties, the class's own and those of its parts, in the order of their source."""
    seen = set()
    for owner in _owners(cls):
        for name, member in vars(owner).items():
            public = (not name.startswith("_") or name == "__call__") and name not in seen
            if public and (inspect.isfunction(member) or isinstance(member, (property, classmethod, staticmethod))):
                seen.add(name)
                yield name, member


def _function(name: str, function: Any, *, bound: bool, heading: bool) -> str:
    signature = inspect.signature(function)
    parameters = list(signature.parameters.values())[1 if bound else 0 :]
    returns = "" if signature.return_annotation in (inspect.Signature.empty, "None") else signature.return_annotation
    arguments = _arguments(parameters)
    prefix = "async " if inspect.iscoroutinefunction(function) else ""
    line = f"{prefix}{name}({', '.join(arguments)})"
    if len(line) > 100:
        line = f"{prefix}{name}(\n" + "".join(f"    {argument},\n" for argument in arguments) + ")"
    shown = f"{line} -> {returns}" if returns else line
    text = f"\n#### `{name}`\n" if heading else ""
    said = inspect.cleandoc(function.__doc__ or "")  # `getdoc` would take object's
    return f"{text}\n```python\n{shown}\n```\n" + (f"\n{docstring(said)}" if said else "")


def _arguments(parameters: list[inspect.Parameter]) -> list[str]:
    shown, keyword_only = [], False
    for parameter in parameters:
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            keyword_only = True
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and not keyword_only:
            shown.append("*")
            keyword_only = True
        text = str(parameter.replace(default=inspect.Parameter.empty)).replace("'", "")
        if parameter.default is not inspect.Parameter.empty:
            text += f" = {_default(parameter.default)}"
        shown.append(text)
    return shown


def _default(value: object) -> str:
    if isinstance(value, enum.Enum):
        return f"{type(value).__name__}.{value.name}"
    owner = getattr(value, "__self__", None)  # of a method: what it is bound to; of a builtin: its module
    if isinstance(owner, logging.Logger):
        return f"log.{value.__name__}"  # type: ignore[attr-defined]
    return f"{owner.__name__}.{value.__name__}" if inspect.ismodule(owner) else repr(value)  # type: ignore[attr-defined]


def _fields(cls: type) -> Iterator[tuple[str, ...]]:
    """Name, type, default and the comment beside it, of a value's fields."""
    notes: dict[str, str] = {}
    for owner in reversed(_owners(cls)):
        notes |= _notes(owner)
    if issubclass(cls, BaseModel):
        schema = cls.model_json_schema()["properties"]
        for name, field in cls.model_fields.items():
            kind = _annotation(cls, name)
            default = "" if field.is_required() else code(_default(field.get_default(call_default_factory=True)))
            said = [constraints(schema[name], words=False), field.description or notes.get(name, "")]
            yield code(name), code(kind), default, "; ".join(filter(None, said))
    elif is_typeddict(cls):
        for name, kind in vars(cls)["__annotations__"].items():
            written = kind.__forward_arg__ if isinstance(kind, ForwardRef) else str(kind)
            yield code(name), code(written), "", notes.get(name, "")
    elif dataclasses.is_dataclass(cls):
        for part in dataclasses.fields(cls):
            default = ""
            if part.default is not dataclasses.MISSING:
                default = code(_default(part.default))
            elif part.default_factory is not dataclasses.MISSING:
                default = code(_default(part.default_factory()))
            yield code(part.name), code(part.type), default, notes.get(part.name, "")


def _annotation(cls: type, name: str) -> str:
    """As it is written in the source, without the limits."""
    for owner in cls.__mro__:
        if name in vars(owner).get("__annotations__", {}):
            written = str(vars(owner)["__annotations__"][name])
            return re.sub(r"Annotated\[(.+?), Field\([^\[\]]*\)\]", r"\1", written)
    raise LookupError(name)


def _notes(cls: type) -> dict[str, str]:
    """The comment on the line of each field or member."""
    source = textwrap.dedent(inspect.getsource(cls))
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT and not token.string.startswith("# noqa")
    }
    found = {}
    [body] = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
    for node in body.body:
        targets = [node.target] if isinstance(node, ast.AnnAssign) else getattr(node, "targets", ())
        for target in targets:
            if isinstance(target, ast.Name) and node.end_lineno in comments:
                found[target.id] = comments[node.end_lineno]
    return found
