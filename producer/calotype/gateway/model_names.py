"""Which model a request means: by its name, by an operator's alias, or the only one there is."""

from __future__ import annotations

from collections.abc import Collection, Mapping

_USUAL = "demo"  # a config's own default


def meant_model(name: str | None, known: Collection[str], aliases: Mapping[str, str], default: str | None) -> str:
    """The model for the `name` of a request; None: it names none.

    A model's own name comes before an alias of the same name. Without a name it is the operator's default, else the
    only known model.
    """
    if name is not None:
        return name if name in known else aliases.get(name, name)
    if default is not None:
        return default
    return next(iter(known)) if len(known) == 1 else _USUAL
