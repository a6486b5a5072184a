"""JSON from strangers: strict, and bounded in what it costs to read."""

from __future__ import annotations

import json
import math
import re
from json import JSONDecodeError
from typing import Any

MOST_VALUES = 20_000  # of one document: reading more would hold up all other requests for longer than 10 ms
DEEPEST = 64
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def strict_loads(data: bytes | str) -> Any:
    """As `json.loads`, for UTF-8 only, and without what could not be written again as JSON.

    Raises:
        JSONDecodeError: it is not JSON, has NaN, an infinity or a lone surrogate in it, more than `MOST_VALUES` values,
            or is nested deeper than `DEEPEST`.
    """
    try:
        text = data if isinstance(data, str) else data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise JSONDecodeError("not UTF-8", "", error.start) from None
    nested = text.count("[") + text.count("{")
    if nested + text.count(",") + text.count(":") > MOST_VALUES:
        raise JSONDecodeError(f"more than {MOST_VALUES} values", "", 0)
    try:
        value = json.loads(text, parse_constant=_refused, parse_float=_finite)
    except RecursionError:
        raise JSONDecodeError(f"nested deeper than {DEEPEST}", "", 0) from None
    except JSONDecodeError:
        raise
    except ValueError as error:  # an integer of thousands of digits
        raise JSONDecodeError(str(error).partition(";")[0], "", 0) from None
    if nested > DEEPEST and _is_deep(value):
        raise JSONDecodeError(f"nested deeper than {DEEPEST}", "", 0)
    if "\\u" in text and _SURROGATE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise JSONDecodeError("a lone surrogate", "", 0) from None
    return value


def _refused(name: str) -> Any:
    raise JSONDecodeError(f"{name} is not a number of JSON", "", 0)


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise JSONDecodeError("a number is too large", "", 0)
    return value


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(DEEPEST):
        level = [
            inner
            for outer in level
            if isinstance(outer, (dict, list))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return False
    return any(isinstance(value, (dict, list)) for value in level)
