"""The diagrams, as SVG: a job's states from their table, and a step batch as the engine's own scheduler fills it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from calotype_shared.schema.enums import JobState
from calotype_shared.schema.jobs import TRANSITIONS
from calotype_worker.engine.scheduler import Scheduler

_INK, _PALE, _PAPER = "#1f2933", "#9aa5b1", "#ffffff"
_COLORS = ("#3b6fb6", "#c8553d", "#4f9d69", "#8a5fb0", "#c79a2b", "#2f9aa0", "#b6487f", "#6b7a3a", "#5a6f86", "#a0643c")


def _svg(width: int, height: int, title: str, body: Sequence[str]) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="system-ui, sans-serif" font-size="14" fill="{_INK}" role="img">\n'
        f"<title>{escape(title)}</title>\n"
        '<defs><marker id="end" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" '
        f'orient="auto-start-reverse"><path d="M0 0 10 5 0 10z" fill="{_INK}"/></marker></defs>\n'
    )
    paper = f'<rect width="{width}" height="{height}" rx="8" fill="{_PAPER}"/>'
    return head + "\n".join([paper, *body]) + "\n</svg>\n"


def _text(x: float, y: float, text: str, **style: str) -> str:
    more = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in style.items())
    return f'<text x="{x:g}" y="{y:g}"{more}>{escape(text)}</text>'


# ---- the states of a job

_PLACES = {
    JobState.QUEUED: (110.0, 230.0),
    JobState.RUNNING: (370.0, 80.0),
    JobState.SUCCEEDED: (690.0, 50.0),
    JobState.FAILED: (690.0, 190.0),
    JobState.CANCELLED: (690.0, 330.0),
}
_HALF_WIDTH, _HALF_HEIGHT = 58.0, 22.0


def job_states() -> str:
    """An arrow for each transition, numbered, with what takes it below."""
    body = []
    for number, (old, new) in enumerate(TRANSITIONS, 1):
        body += _arrow(_PLACES[old], _PLACES[new], number, bend=14.0 if (new, old) in TRANSITIONS else 0.0)
    for state in JobState:
        x, y = _PLACES[state]
        width = 2.5 if state.final else 1.2
        body.append(
            f'<rect x="{x - _HALF_WIDTH:g}" y="{y - _HALF_HEIGHT:g}" width="{2 * _HALF_WIDTH:g}" '
            f'height="{2 * _HALF_HEIGHT:g}" rx="8" fill="#f5f7fa" stroke="{_INK}" stroke-width="{width:g}"/>'
        )
        body.append(_text(x, y + 5, state.value, text_anchor="middle"))
    for number, by in enumerate(TRANSITIONS.values(), 1):
        body += _numbered(40.0, 380.0 + 26 * number, number)
        body.append(_text(60, 385 + 26 * number, by))
    return _svg(800, 410 + 26 * len(TRANSITIONS), "The states of a job", body)


def _arrow(start: tuple[float, float], end: tuple[float, float], number: int, *, bend: float) -> list[str]:
    (x1, y1), (x2, y2) = start, end
    length = math.hypot(x2 - x1, y2 - y1)
    # To the left of the way, so that two arrows between the same states lie apart.
    across = ((y2 - y1) / length * bend, (x1 - x2) / length * bend)
    x1, y1, x2, y2 = x1 + across[0], y1 + across[1], x2 + across[0], y2 + across[1]
    x1, y1 = _at_edge((x1, y1), (x2, y2), start)
    x2, y2 = _at_edge((x2, y2), (x1, y1), end)
    line = f'<path d="M{x1:.1f} {y1:.1f} L{x2:.1f} {y2:.1f}" stroke="{_INK}" fill="none" marker-end="url(#end)"/>'
    share = 0.3  # nearer to where it starts: there fewer arrows cross
    return [line, *_numbered(x1 + (x2 - x1) * share, y1 + (y2 - y1) * share, number)]


def _at_edge(
    point: tuple[float, float], towards: tuple[float, float], center: tuple[float, float]
) -> tuple[float, float]:
    """Where the line from a point inside a state's box leaves the box."""
    (x, y), (dx, dy) = point, (towards[0] - point[0], towards[1] - point[1])
    walls = []
    for at, step, middle, half in ((x, dx, center[0], _HALF_WIDTH), (y, dy, center[1], _HALF_HEIGHT)):
        if step:
            walls.append((middle + math.copysign(half, step) - at) / step)
    share = max(0.0, min(walls))
    return x + dx * share, y + dy * share


def _numbered(x: float, y: float, number: int) -> list[str]:
    circle = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="10" fill="{_PAPER}" stroke="{_INK}"/>'
    return [circle, _text(round(x, 1), round(y + 4.5, 1), str(number), text_anchor="middle", font_size="12")]


# ---- a step batch


@dataclass(frozen=True, kw_only=True)
class _Request:
    name: str
    arrives: int
    steps: int
    rows: int  # two if guided


_BUDGET = 8  # rows
_REQUESTS = tuple(
    _Request(name="abcdefghij"[index], arrives=arrives, steps=steps, rows=rows)
    for index, (arrives, steps, rows) in enumerate(
        (
            (0, 20, 2),
            (0, 8, 1),
            (0, 30, 2),
            (2, 12, 2),
            (3, 25, 1),
            (6, 6, 1),
            (9, 18, 2),
            (12, 10, 1),
            (15, 24, 2),
            (18, 9, 1),
        )
    )
)


@dataclass(frozen=True, kw_only=True)
class _Bar:
    request: _Request
    start: int
    lanes: tuple[int, ...]
    held: int  # steps that its rows are taken, of which `request.steps` are work


def step_batch() -> str:
    """The same ten requests twice: joining at any step, and in static batches."""
    ours, static = _joining(), _static()
    end = max(bar.start + bar.held for bar in (*ours, *static))
    scale = 760 / end
    body: list[str] = []
    for top, title, bars in ((40, "Calotype: join and leave at any step", ours), (270, "Static batches", static)):
        last = max(bar.start + bar.held for bar in bars)
        body.append(_text(20, top - 12, f"{title} — all done after {last} steps", font_weight="600"))
        body.append(f'<rect x="20" y="{top}" width="760" height="{_BUDGET * 22}" fill="#f5f7fa"/>')
        body += [part for bar in bars for part in _drawn(bar, top, scale)]
    body.append(
        _text(
            20, 480, "A line is a row of the forward pass, from left to right the steps. A guided request has two rows."
        )
    )
    body.append(_text(20, 500, "Pale: rows that a finished request still takes, because its batch goes on."))
    return _svg(800, 516, "The same requests in a step batch and in static batches", body)


def _joining() -> list[_Bar]:
    """As the engine's scheduler admits them, with this many rows."""
    scheduler: Scheduler[str] = Scheduler(lambda _: _BUDGET)
    by_name = {request.name: request for request in _REQUESTS}
    bars: list[_Bar] = []
    ends: dict[str, int] = {}
    free = set(range(_BUDGET))
    step = 0
    while len(ends) < len(_REQUESTS) or len(scheduler):
        for request in _REQUESTS:
            if request.arrives == step:
                scheduler.add(request.name, "demo", request.rows)
        plan = scheduler.plan()
        for name in plan.admitted if plan else ():
            request = by_name[name]
            lanes = tuple(sorted(free)[: request.rows])
            free -= set(lanes)
            bars.append(_Bar(request=request, start=step, lanes=lanes, held=request.steps))
            ends[name] = step + request.steps
        step += 1
        for bar in bars:
            if ends[bar.request.name] == step:
                scheduler.remove(bar.request.name)
                free |= set(bar.lanes)
    return bars


def _static() -> list[_Bar]:
    """Whoever has come when the batch before ends, as many as fit; then nobody joins, and the longest decides."""
    bars, waiting, now = [], list(_REQUESTS), 0
    while waiting:
        now = max(now, waiting[0].arrives)
        batch: list[_Request] = []
        while waiting and waiting[0].arrives <= now and sum(r.rows for r in batch) + waiting[0].rows <= _BUDGET:
            batch.append(waiting.pop(0))
        longest = max(request.steps for request in batch)
        lane = 0
        for request in batch:
            lanes = tuple(range(lane, lane + request.rows))
            bars.append(_Bar(request=request, start=now, lanes=lanes, held=longest))
            lane += request.rows
        now += longest
    return bars


def _drawn(bar: _Bar, top: int, scale: float) -> list[str]:
    color = _COLORS[_REQUESTS.index(bar.request)]
    x, y = 20 + bar.start * scale, top + bar.lanes[0] * 22
    parts = []
    for lane in bar.lanes:
        for share, opacity in ((bar.held, 0.25), (bar.request.steps, 1.0)):
            parts.append(
                f'<rect x="{x + 1:.1f}" y="{top + lane * 22 + 2}" width="{share * scale - 2:.1f}" height="18" rx="3" '
                f'fill="{color}" opacity="{opacity:g}"/>'
            )
    parts.append(_text(round(x + 7, 1), y + 15, f"{bar.request.name} {bar.request.steps}", fill="#fff", font_size="12"))
    return parts
