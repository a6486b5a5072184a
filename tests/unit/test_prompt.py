"""Prompt weights in AUTOMATIC1111's notation, and what is only text."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calotype_shared.errors import InvalidRequest
from calotype_shared.schema.prompt import parse_weights, refuse_other_notation


@pytest.mark.parametrize(
    ("prompt", "fragments"),
    [
        ("", []),
        ("a cat", [("a cat", 1.0)]),
        ("a (red:1.3) cat", [("a ", 1.0), ("red", 1.3), (" cat", 1.0)]),
        ("((deep))", [("deep", 1.21)]),
        ("(a (b:2) c)", [("a ", 1.1), ("b", 2.2), (" c", 1.1)]),
        ("[less]", [("less", 1 / 1.1)]),
        ("(a:.5)", [("a", 0.5)]),
        ("(a: 1.5 )", [("a", 1.5)]),
        (r"\(not\) \[this\] \\", [("(not) [this] \\", 1.0)]),
        ("happy :) and (sad :(", [("happy :) and (sad :(", 1.0)]),
        ("a [list of (two) things", [("a [list of ", 1.0), ("two", 1.1), (" things", 1.0)]),
        ("(ratio 3:4)", [("ratio 3", 4.0)]),
        ("(time 3:45 pm)", [("time 3:45 pm", 1.1)]),
        ("a:b (c)", [("a:b ", 1.0), ("c", 1.1)]),
    ],
)
def test_weights_are_read(prompt: str, fragments: list[tuple[str, float]]) -> None:
    """Also nested, escaped, and where brackets mean nothing."""
    found = parse_weights(prompt)
    assert [text for text, _ in found] == [text for text, _ in fragments]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in fragments])


@pytest.mark.parametrize("prompt", ["(a:11)", "(a:-1)", "((a:10):10)", "(" * 25 + "a" + ")" * 25])
def test_weights_out_of_range_are_refused(prompt: str) -> None:
    """With the field, the prompt and what would do."""
    with pytest.raises(InvalidRequest, match=r"negative_prompt=.*out of range; use weights from 0 to 10"):
        parse_weights(prompt, field="negative_prompt")


@pytest.mark.parametrize(
    ("prompt", "remedy"),
    [
        ("a cat <lora:ink:0.8>", "field loras"),
        ("a <hypernet:x:1> cat", "field loras"),
        ("a [cat:dog:0.5]", "one prompt"),
        ("[a, b : c : 12] d", "one prompt"),
    ],
)
def test_notation_that_would_be_text_is_refused(prompt: str, remedy: str) -> None:
    with pytest.raises(InvalidRequest, match=rf"negative_prompt=.*{remedy}"):
        refuse_other_notation(prompt, field="negative_prompt")


@pytest.mark.parametrize(
    "prompt", ["a [cat]", "a <b> c", r"\[a:b:0.5\]", "ratio 1:2:3", "[a: b, c]", "ROMEO AND JULIET"]
)
def test_other_text_is_kept(prompt: str) -> None:
    refuse_other_notation(prompt, field="prompt")


@given(st.text(alphabet=r"ab ()[]\:1.", max_size=30))
def test_nothing_but_marks_is_ever_lost(prompt: str) -> None:
    """Whatever is written: every letter stays, in order, and no weight is missing."""
    try:
        found = parse_weights(prompt)
    except InvalidRequest as refused:
        assert "out of range" in refused.problem  # noqa: PT017 - either outcome is right
        return
    assert [c for fragment in found for c in fragment.text if c in "ab"] == [c for c in prompt if c in "ab"]
    assert all(weight >= 0 for _, weight in found)
    assert all(one.weight != other.weight for one, other in itertools.pairwise(found))
