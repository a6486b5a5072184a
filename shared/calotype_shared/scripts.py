"""Loads the Lua scripts. Each runs as one atomic step on the Redis server; `lua/` holds one file a script."""

from __future__ import annotations

from functools import cache
from importlib import resources

from calotype_shared.jobs import TRANSITIONS


@cache
def script_source(name: str) -> str:
    """The whole text of a script: the prelude, with the one table of legal transitions, then the script itself."""
    folder = resources.files("calotype_shared") / "lua"
    edges = ", ".join(f"['{old.value}>{new.value}'] = true" for old, new in TRANSITIONS)
    prelude = (folder / "prelude.lua").read_text().replace("@EDGES@", edges)
    return prelude + (folder / f"{name}.lua").read_text()
