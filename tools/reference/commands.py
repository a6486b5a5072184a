"""The page of commands: the `calotype` command with all options, including those of worker and training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import typer

from calotype.cli.app import build_app
from calotype.cli.exit_codes import MEANINGS
from calotype_train.__main__ import build_app as training_app
from calotype_worker.__main__ import build_app as worker_app
from calotype_worker.model_check import build_app as check_app
from tools.reference.markdown import code, generated, table

# Typer's words for kinds of values -> ours.
_KINDS = {
    "str": "TEXT",
    "list[str]": "TEXT",
    "int": "N",
    "int range": "N",
    "float": "X",
    "float range": "X",
    "file": "FILE",
    "dir": "FOLDER",
    "path": "PATH",
}

# Commands that hand their options on to a process of their own.
_OTHERS = {"calotype worker": worker_app, "calotype train": training_app, "calotype model check": check_app}

_INTRODUCTION = """
Settings come from environment variables ([settings](settings.md)). An option overrides its variable. Commands for use
in scripts have `--json`: the result, or the error, is then one line of JSON. `calotype --version` prints the version.

"""


def page() -> str:
    parts = [generated("Commands", "the commands themselves"), _INTRODUCTION, "## Exit status\n"]
    parts.append(table(("status", "meaning"), [(str(code_.value), meaning) for code_, meaning in MEANINGS.items()]))
    for name, command in _leaves(_command(build_app())):
        other = _OTHERS.get(name)
        if other is None:
            parts.append(_section_of(name, command))
        else:
            parts += [_section_of(*leaf) for leaf in _leaves(_command(other()), name)]
    return "\n".join(parts)


def _command(app: typer.Typer) -> Any:
    return typer.main.get_command(app)


def _leaves(command: Any, name: str = "calotype") -> Iterator[tuple[str, Any]]:
    """Every command that does something, by its full name."""
    if not hasattr(command, "commands"):
        yield name, command
        return
    for below, part in command.commands.items():
        yield from _leaves(part, f"{name} {below}")


def _section_of(name: str, command: Any) -> str:
    arguments = [parameter for parameter in command.params if parameter.param_type_name == "argument"]
    context = command.context_class(command)
    rows = [
        (code(_option(parameter, context)), _help(parameter))
        for parameter in command.params
        if parameter.param_type_name == "option" and not parameter.hidden
    ]
    usage = [name, *(["[OPTIONS]"] if rows else []), *(_operand(argument) for argument in arguments)]
    return _section(name, " ".join(usage), command.help, rows)


def _operand(argument: Any) -> str:
    shown = str(argument.metavar or argument.name).upper() + ("..." if argument.nargs == -1 else "")
    return shown if argument.required else f"[{shown}]"


def _option(parameter: Any, context: Any) -> str:
    names = ", ".join([*parameter.opts, *parameter.secondary_opts])
    return names if parameter.is_flag else f"{names} {_value(parameter, context)}"


def _value(parameter: Any, context: Any) -> str:
    """What follows an option: its kind, or the words it may be."""
    kind = str(parameter.metavar or parameter.display_type(context)).strip("<>")
    return _KINDS.get(kind, kind)


def _help(parameter: Any) -> str:
    said = parameter.help or ""
    if parameter.multiple and "repeated" not in said:
        said += " May be repeated."
    if parameter.required:
        return f"{said} Required."
    if parameter.is_flag or parameter.default in (None, ()):
        return said
    default = getattr(parameter.default, "value", parameter.default)
    return f"{said} Default: `{default}`."


def _section(name: str, usage: str, purpose: str | None, rows: list[tuple[str, str]]) -> str:
    said = " ".join((purpose or "").split())
    text = f"\n## {name}\n\n{said[:1].upper()}{said[1:]}{'' if said.endswith('.') else '.'}\n\n```\n{usage}\n```\n"
    return text + ("\n" + table(("option", "what it does"), rows) if rows else "")
