r"""Prompt weights, in the notation of AUTOMATIC1111's web UI.

| written | weight of `word` |
|---|---|
| `(word)`, `((word))` | 1.1, 1.1² |
| `(word:1.3)` | 1.3 |
| `[word]` | 1 / 1.1 |
| `\(word\)`, `\[word\]`, `\\` | 1, with the bracket (backslash) itself in the text |

Nested weights multiply. An unmatched bracket is a normal character, so that smileys
and lists survive.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from calotype_shared.errors import InvalidRequest

MAX_WEIGHT = 10.0
_STEP = 1.1  # of one pair of brackets without a number

_TOKEN = re.compile(r"\\[\\()\[\]]|:\s*([+-]?\d*\.?\d+)\s*\)|[()\[\]]|[^\\()\[\]:]+|.", re.DOTALL)

_EXTRA_NETWORK = re.compile(r"<(lora|lyco|hypernet):[^<>]+>", re.IGNORECASE)
_EDITING = re.compile(r"(?<!\\)\[[^\[\]]*:[^\[\]:]*:\s*\d*\.?\d+\s*\]")
_NUMBERED = re.compile(r"(?<!\\)\([^()]*:\s*\d*\.?\d+\s*\)")


class Fragment(NamedTuple):
    """A part of a prompt with its weight; 1 is the normal weight."""

    text: str
    weight: float


def parse_weights(prompt: str, *, field: str = "prompt") -> list[Fragment]:
    """The fragments of a prompt, in order. Adjacent fragments of equal weight are joined. Empty for an empty prompt.

    Raises:
        InvalidRequest: a weight below 0 or above `MAX_WEIGHT`, as written or multiplied by those around it.
    """
    pieces: list[Fragment] = []
    open_brackets: list[tuple[str, int]] = []  # the bracket, and where its pieces begin: the bracket's own text
    for match in _TOKEN.finditer(prompt):
        token, number = match[0], match[1]
        if token[0] == "\\" and len(token) == 2:
            pieces.append(Fragment(token[1], 1.0))
        elif token in "([":
            open_brackets.append((token, len(pieces)))
            pieces.append(Fragment(token, 1.0))
        elif (token == ")" or number is not None) and _closes(open_brackets, "("):
            weight = float(number) if number is not None else _STEP
            _scale(pieces, open_brackets, weight, prompt=prompt, field=field)
        elif token == "]" and _closes(open_brackets, "["):
            _scale(pieces, open_brackets, 1 / _STEP, prompt=prompt, field=field)
        else:
            pieces.append(Fragment(token, 1.0))
    return _joined(pieces)


def refuse_other_notation(prompt: str, *, field: str) -> None:
    """Refuse AUTOMATIC1111's notation for LoRAs and prompt editing, which would silently be text.

    Raises:
        InvalidRequest: the prompt has `<lora:name:0.8>` or `[from:to:0.5]` in it.
    """
    for pattern, problem, remedy in (
        (_EXTRA_NETWORK, "has no effect in a prompt", "remove it, and name the LoRA in the field loras"),
        (_EDITING, "changes the prompt between steps, which is not supported", r"write one prompt; \[ is a bracket"),
    ):
        found = pattern.search(prompt)
        if found:
            raise InvalidRequest(f"{found[0]!r} {problem}", field=field, value=prompt, remedy=remedy)


def refuse_weights(prompt: str, *, field: str) -> None:
    """Refuse weights for models that do not support them, where `(word:1.3)` would silently be text.

    Raises:
        InvalidRequest: the prompt has a weight with a number. Brackets alone are taken for text.
    """
    found = _NUMBERED.search(prompt)
    if found:
        raise InvalidRequest(
            f"{found[0]!r} is a prompt weight, and this model does not support weights",
            field=field,
            value=prompt,
            remedy="remove the brackets and the number, or use another model",
        )


def _closes(open_brackets: list[tuple[str, int]], bracket: str) -> bool:
    """Whether this bracket is open; brackets opened inside it stay as text."""
    if bracket not in (opened for opened, _ in open_brackets):
        return False
    while open_brackets[-1][0] != bracket:
        open_brackets.pop()
    return True


def _scale(
    pieces: list[Fragment], open_brackets: list[tuple[str, int]], weight: float, *, prompt: str, field: str
) -> None:
    _, start = open_brackets.pop()
    scaled = [Fragment(text, own * weight) for text, own in pieces[start + 1 :]]
    for found in (weight, *(piece.weight for piece in scaled)):
        if not 0.0 <= found <= MAX_WEIGHT:
            raise InvalidRequest(
                f"weight {found:g} is out of range",
                field=field,
                value=prompt,
                remedy=f"use weights from 0 to {MAX_WEIGHT:g}, as in (word:1.3); nested weights multiply",
            )
    pieces[start:] = scaled


def _joined(pieces: list[Fragment]) -> list[Fragment]:
    joined: list[Fragment] = []
    for piece in pieces:
        if joined and joined[-1].weight == piece.weight:
            joined[-1] = Fragment(joined[-1].text + piece.text, piece.weight)
        elif piece.text:
            joined.append(piece)
    return joined
