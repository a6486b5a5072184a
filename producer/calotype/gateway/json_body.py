"""JSON from strangers: strict, and bounded in what it costs to read.

Python's parser holds the interpreter's lock until it is done, so a thread does not keep it from delaying all other
requests. Images in base64 are therefore cut out before, and put back afterwards.
"""

from __future__ import annotations

import json
import math
import re
import secrets
from json import JSONDecodeError
from typing import Any

MOST_VALUES = 20_000  # of one document: reading more would hold up all other requests for longer than 10 ms
DEEPEST = 64
_LONG = 32 * 2**10  # bytes of a string that is cut out; no text is as long
_STRING_OR_BRACKET = re.compile(r'"(?:[^"\\]|\\.)*+"?|[\[\]{}]', re.DOTALL)
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def strict_loads(data: bytes | str) -> Any:
    """As `json.loads`, for UTF-8 only, and without what could not be written again as JSON.

    Raises:
        JSONDecodeError: it is not JSON, has NaN, an infinity or a lone surrogate in it, more than `MOST_VALUES` values,
            or is nested deeper than `DEEPEST`.
    """
    long_strings: dict[str, str] = {}
    try:
        if isinstance(data, bytes) and len(data) > _LONG:
            data = _cut(data, long_strings)
        text = data if isinstance(data, str) else data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise JSONDecodeError("not UTF-8", "", error.start) from None
    value = _parsed(text)
    return _put_back(value, long_strings) if long_strings else value


def _parsed(text: str) -> Any:
    nested = text.count("[") + text.count("{")
    if nested + text.count(",") + text.count(":") > MOST_VALUES:
        raise JSONDecodeError(f"more than {MOST_VALUES} values", "", 0)
    if nested > DEEPEST and _is_deep(text):
        raise JSONDecodeError(f"nested deeper than {DEEPEST}", "", 0)
    try:
        value = json.loads(text, parse_constant=_refused, parse_float=_finite)
    except JSONDecodeError:
        raise
    except ValueError as error:  # an integer of thousands of digits
        raise JSONDecodeError(str(error).partition(";")[0], "", 0) from None
    if "\\u" in text and _SURROGATE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise JSONDecodeError("a lone surrogate", "", 0) from None
    return value


def _cut(data: bytes, found: dict[str, str]) -> bytes:
    """The document with placeholders for its long strings, which `found` has by placeholder."""
    mark, pieces, rest, strings = secrets.token_hex(16), [], 0, 0
    start = data.find(b'"')
    while start >= 0 and (end := _closing_quote(data, start + 1)) >= 0:
        strings += 1
        if strings > 2 * MOST_VALUES:
            raise JSONDecodeError(f"more than {MOST_VALUES} values", "", 0)
        if end - start > _LONG and data.find(b"\\", start, end) < 0:
            name = f"{mark}{len(found)}"
            found[name] = data[start + 1 : end].decode()
            pieces += [data[rest : start + 1], name.encode()]
            rest = end
        start = data.find(b'"', end + 1)
    return b"".join([*pieces, data[rest:]])


def _closing_quote(data: bytes, start: int) -> int:
    """Where the string that begins there ends; -1 if it does not."""
    end = data.find(b'"', start)
    while end >= 0:
        before = end
        while before > start and data[before - 1] == ord("\\"):
            before -= 1
        if (end - before) % 2 == 0:
            return end
        end = data.find(b'"', end + 1)
    return -1


def _put_back(value: Any, found: dict[str, str]) -> Any:
    if isinstance(value, str):
        return found.get(value, value)
    if isinstance(value, list):
        return [_put_back(inner, found) for inner in value]
    if isinstance(value, dict):
        return {found.get(name, name): _put_back(inner, found) for name, inner in value.items()}
    return value


def _refused(name: str) -> Any:
    raise JSONDecodeError(f"{name} is not a number of JSON", "", 0)


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise JSONDecodeError("a number is too large", "", 0)
    return value


def _is_deep(text: str) -> bool:
    """Looked at before parsing: how deep Python's parser goes depends on a limit that any library may raise."""
    depth = 0
    for match in _STRING_OR_BRACKET.finditer(text):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(match[0], 0)
        if depth > DEEPEST:
            return True
    return False
