"""The table of features names only what is there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_example_test_and_image_named_exists() -> None:
    """And every example is named."""
    text = (ROOT / "docs" / "features.md").read_text()
    examples = set(re.findall(r"`(examples/[\w/]+\.py)`", text))
    tests = set(re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", text))
    images = set(re.findall(r"\]\((images/[\w./-]+)\)", text))
    assert len(examples) > 14
    assert len(tests) > 15
    assert len(images) > 11
    for name in examples:
        assert (ROOT / name).is_file(), name
    for name in images:
        assert (ROOT / "docs" / name).is_file(), name
    for file, function in tests:
        assert (ROOT / file).is_file(), file
        assert not function or f"def {function}(" in (ROOT / file).read_text(), f"{file}::{function}"
    unnamed = {f"examples/{path.name}" for path in (ROOT / "examples").glob("*.py")} - examples - {"examples/sheet.py"}
    assert not unnamed, f"examples that nobody finds: {unnamed}"
