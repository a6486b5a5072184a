"""The page of commands: the `calotype` command with all its options, and the worker's and the training's own."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import typer

from calotype.cli.app import build_app
from calotype.cli.exit_codes import MEANINGS
from calotype_train.__main__ import build_parser as training_parser
from calotype_worker.__main__ import build_parser as worker_parser
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

_INTRODUCTION = """
Settings come from variables ([settings](settings.md)); an option wins over its variable. Commands that scripts want
have `--json`: the result, or the error, is then one line of JSON.
"""


def page() -> str:
    root: Any = typer.main.get_command(build_app())
    parts = [generated("Commands", "the commands themselves"), _INTRODUCTION, "## Exit status\n"]
    parts.append(table(("status", "meaning"), [(str(code_.value), meaning) for code_, meaning in MEANINGS.items()]))
    for name, command in _leaves(root):
        if name == "calotype worker":
            parts.append(_of_argparse(name, command.help, worker_parser()))
        elif name == "calotype train":
            parts.append(_of_argparse(name, command.help, training_parser()))
        else:
            parts.append(_of_typer(name, command))
    return "\n".join(parts)


def _leaves(group: Any, above: str = "calotype") -> Iterator[tuple[str, Any]]:
    """Every command that does something, by its full name."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _leaves(command, f"{above} {name}")
        else:
            yield f"{above} {name}", command


def _of_typer(name: str, command: Any) -> str:
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


def _of_argparse(name: str, purpose: str, parser: argparse.ArgumentParser) -> str:
    groups = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not groups:
        return _section(name, f"{name} [OPTIONS]", purpose, _rows(parser))
    parts = []
    for action in groups:
        said = {choice.dest: choice.help for choice in action._choices_actions}
        for choice, below in action.choices.items():
            parts.append(_section(f"{name} {choice}", f"{name} {choice} [OPTIONS]", said[choice], _rows(below)))
    return "\n".join(parts)


def _rows(parser: argparse.ArgumentParser) -> list[tuple[str, str]]:
    rows = []
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction):
            continue
        metavar = "|".join(map(str, action.choices)) if action.choices else action.metavar or action.dest.upper()
        takes = f" {metavar}" if action.nargs != 0 else ""
        said = (action.help or "") % {"default": action.default}
        rows.append((code(", ".join(action.option_strings) + takes), said + (" Required." if action.required else "")))
    return rows


def _section(name: str, usage: str, purpose: str | None, rows: list[tuple[str, str]]) -> str:
    said = " ".join((purpose or "").split())
    text = f"\n## {name}\n\n{said[:1].upper()}{said[1:]}{'' if said.endswith('.') else '.'}\n\n```\n{usage}\n```\n"
    return text + ("\n" + table(("option", "what it does"), rows) if rows else "")
