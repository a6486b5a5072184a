"""What the gateway reads as JSON: the same as everybody, except what costs too much or could not be written again."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calotype.gateway import json_body
from calotype.gateway.json_body import DEEPEST, MOST_VALUES, strict_loads

_TEXT = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=40)
_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats(allow_nan=False, allow_infinity=False)
    | _TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_TEXT, inner, max_size=4),
    max_leaves=20,
)


@given(_VALUES, st.booleans())
def test_documents_are_read_as_json_reads_them(value: Any, ascii_only: bool) -> None:
    """Also where nearly every string is cut out first."""
    data = json.dumps(value, ensure_ascii=ascii_only).encode()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(json_body, "_LONG", 3)
        assert strict_loads(data) == json.loads(data)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "Expecting value"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": -1e999}', "too large"),
        (b'["\\ud800"]', "surrogate"),
        (b'["\xed\xa0\x80"]', "UTF-8"),
        (b"[" * 100_000, f"more than {MOST_VALUES} values"),
        (b"[" * (DEEPEST + 1) + b"]" * (DEEPEST + 1), f"deeper than {DEEPEST}"),
        (b"[" * 15_000, f"deeper than {DEEPEST}"),
        (b"[" + b'"",' * MOST_VALUES * 3 + b"1]", f"more than {MOST_VALUES} values"),
        (b'["' + b'\\"[' * 15_000, "Unterminated string"),
        (b'{"a": ' + b"9" * 5_000 + b"}", "integer"),
        (b'"' + b"a" * 100_000, "Unterminated string"),
        (b'"' + b"a" * 100_000 + b'\\"', "Unterminated string"),
    ],
)
def test_the_rest_is_refused(data: bytes, said: str) -> None:
    with pytest.raises(json.JSONDecodeError, match=said):
        strict_loads(data)


def test_depth_does_not_depend_on_the_recursion_limit() -> None:
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(30_000)
    try:
        with pytest.raises(json.JSONDecodeError, match=f"deeper than {DEEPEST}"):
            strict_loads(b"[" * 15_000)
    finally:
        sys.setrecursionlimit(limit)


def test_the_deepest_document_and_a_long_string_are_read() -> None:
    assert strict_loads(b"[" * DEEPEST + b"]" * DEEPEST)
    assert strict_loads(b'["' + b"[" * 100 + b'", "\\"' + b"{" * 100 + b'"]')
    assert strict_loads(b"[" + b"[], " * 100 + b"[]]")
    body = {"images": ["data:image/png;base64," + "QUJD" * 100_000], "prompt": 'a \\" quote', "b": 2}
    assert strict_loads(json.dumps(body).encode()) == body
