"""The trace of an engine: that a viewer can read it, and that it tells the truth."""

from __future__ import annotations

import json
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from calotype_worker.engine import Engine
from calotype_worker.observability.trace_file import TraceFile
from tests.unit.test_engine import request


def test_every_step_is_in_the_trace_with_its_rows(make_engine: Any, tmp_path: Path) -> None:
    """As many rows as the counters say, in spans that do not overlap, with hardly a gap between them."""
    trace = TraceFile(tmp_path / "trace.json", process="a worker")
    engine: Engine = make_engine(trace=trace)
    futures = [engine.submit(request(f"r{number}", steps=4 + number)) for number in range(6)]
    for future in futures:
        future.result(120)
    engine.stop()
    stats = engine.stats()
    trace.close()

    events = json.loads((tmp_path / "trace.json").read_text())
    names = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    own = sorted((e for e in events if e["ph"] == "X" and names[e["tid"]] == "engine"), key=lambda e: e["ts"])
    steps = [event["args"] for event in own if event["name"].startswith("step ")]
    assert len(steps) == stats.forward_passes
    assert sum(step["rows"] for step in steps) == stats.rows
    assert sum(step["finished"] for step in steps) == 6
    assert all(step["reason"] == "turn" and step["budget"] >= step["rows"] for step in steps)
    assert sum(event["args"]["images"] for event in own if event["name"] == "decode") == 6
    assert all(a["ts"] + a["dur"] <= b["ts"] + 1 for a, b in pairwise(own)), "spans of the engine's track overlap"
    covered = sum(event["dur"] for event in own)
    assert covered >= 0.8 * (own[-1]["ts"] + own[-1]["dur"] - own[0]["ts"])
    waits = [event for event in events if event["name"] == "waiting for a place"]
    assert sorted(event["ph"] for event in waits) == ["b"] * 6 + ["e"] * 6


def test_a_trace_can_be_read_while_it_is_written(tmp_path: Path) -> None:
    """Or after its worker was killed: only the bracket is missing, and viewers do without."""
    trace = TraceFile(tmp_path / "trace.json", process="a worker")
    for number in range(100):
        trace.span("engine", "step", number, number + 0.5, rows=number)
    ends = time.monotonic() + 10
    text = ""
    while text.count('"ph": "X"') < 100 and time.monotonic() < ends:
        time.sleep(0.02)
        text = (tmp_path / "trace.json").read_text()
    events = json.loads(text.rstrip().rstrip(",") + "]")
    assert [event["args"]["rows"] for event in events if event["ph"] == "X"] == list(range(100))
    assert {event["dur"] for event in events if event["ph"] == "X"} == {0.5e6}
    trace.close()


def test_a_full_disk_ends_the_trace_and_nothing_else(tmp_path: Path) -> None:
    """The code that records a span does not see it."""
    trace = TraceFile(Path("/dev/full"), process="a worker")
    for number in range(20_000):
        trace.span("engine", "step", number, number + 1)
    closing = threading.Thread(target=trace.close)
    closing.start()
    closing.join(120)
    assert not closing.is_alive()


def test_a_trace_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    """At once, when a worker starts."""
    with pytest.raises(OSError, match="nowhere"):
        TraceFile(tmp_path / "nowhere" / "trace.json", process="a worker")
