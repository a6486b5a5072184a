"""Lines of manifests and of results, as other programs write and read them."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from calotype.batches.lines import dump
from calotype.batches.plan import write_plan
from calotype_shared.errors import InvalidRequest


def test_a_line_of_results_is_one_line_to_everybody() -> None:
    line = {"custom_id": "a\u2028b\u2029c\x85d\x1ce\nf é"}
    written = dump(line)
    assert len(written.decode().splitlines()) == 1
    assert json.loads(written) == line


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_a_manifest_in_another_encoding_is_refused_whole(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = '{"prompt": "a"}\n{"prompt": "b"}\n'.encode(encoding)
    lines = [SimpleNamespace(number=number, data=line) for number, line in enumerate(data.split(b"\n"), start=1)]
    monkeypatch.setattr("calotype.batches.plan.read_lines", lambda *_, **__: iter(lines))
    batch: Any = SimpleNamespace(id="b", manifest="files/1.jsonl", format="native")
    unused: Any = None
    with pytest.raises(InvalidRequest, match="is UTF-16 or UTF-32, not UTF-8; save it as UTF-8"):
        write_plan(unused, batch, unused, keep_on=lambda: None)
