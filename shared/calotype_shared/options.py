"""Command-line options generated from a settings model: names and help texts come from its fields.

Values are only split and converted here. Whether they are allowed, the model says, with one message for variable and
option.
"""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from calotype_shared.errors import SettingsError

R = TypeVar("R")

_AS_THEY_ARE = (bool, int, float, Path)  # types that Typer converts; other values are passed on as text
_SUMS = (types.UnionType, typing.Union)


def new_app() -> typer.Typer:
    """An app that prints plain text and leaves errors to `parsed`."""
    return typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


def with_options(
    model: type[BaseModel], *, repeated: Collection[str] = ()
) -> Callable[[Callable[..., R]], Callable[..., R]]:
    """A decorator that adds an option for each field of the model to the command's own options.

    It is called with those that were given. Options in `repeated` may be given more than once, and are joined by
    commas, as their variable has them.
    """

    def decorate(command: Callable[..., R]) -> Callable[..., R]:
        def call(**options: Any) -> R:
            given = {name: value for name, value in options.items() if value is not None and value != []}
            return command(**{name: ",".join(v) if name in repeated else v for name, v in given.items()})

        own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.kind is not p.VAR_KEYWORD]
        made = [_parameter(name, field, name in repeated) for name, field in model.model_fields.items()]
        parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in (*made, *own)]
        call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        call.__name__, call.__doc__ = command.__name__, command.__doc__
        return call

    return decorate


def parsed(app: typer.Typer, arguments: Sequence[str] | None, *, name: str) -> Any:
    """The return value of the selected command; 0 if only help was requested.

    Raises:
        SettingsError: an option is unknown or malformed.
    """
    try:
        return app(args=arguments, prog_name=name, standalone_mode=False)
    except typer.TyperException as error:
        raise SettingsError(f"{error.format_message()} (see {name} --help)") from None


def _parameter(name: str, field: FieldInfo, repeated: bool) -> inspect.Parameter:
    kind = list[str] if repeated else _kind(field.annotation)
    required = field.default is PydanticUndefined
    said = f"{field.description} May be repeated." if repeated else f"{field.description}"
    if not (required or isinstance(field.default, bool) or field.default in (None, "")):
        said = f"{said.removesuffix('.')} [{_written(field.default)}]."
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if required else None,
        annotation=Annotated[kind if required else kind | None, typer.Option(help=said)],
    )


def _kind(annotation: Any) -> Any:
    """The type of a field's option for Typer."""
    parts = typing.get_args(annotation) if typing.get_origin(annotation) in _SUMS else (annotation,)
    [part, *_] = [each for each in parts if each is not type(None)]
    if typing.get_origin(part) is Annotated:
        part = typing.get_args(part)[0]
    if typing.get_origin(part) is typing.Literal or part in _AS_THEY_ARE:
        return part
    return str


def _written(default: object) -> str:
    """The value as it is written on the command line."""
    return ",".join(map(str, default)) if isinstance(default, tuple) else f"{default}"
