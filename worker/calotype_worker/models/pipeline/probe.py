"""Runs a pipeline alone and records its network calls, to learn the roles of their arguments."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from greenlet import getcurrent

from calotype_worker.models.pipeline.call import Signature
from calotype_worker.models.pipeline.copies import StandIns
from calotype_worker.models.pipeline.module_state import ModuleState
from calotype_worker.models.pipeline.network_calls import NetworkCalls, alone
from calotype_worker.models.pipeline.roles import Arguments, Place, Roles
from calotype_worker.models.pipeline.stand_in import Call, CallingGreenlet


@dataclass(frozen=True, kw_only=True)
class Recording:
    """A run's network calls in order, and whether it changed its networks."""

    calls: Sequence[Call]
    result: Any
    changes: str  # what it changed in its networks, such as attention processors; empty: nothing

    def phases(self) -> Mapping[Place, int]:
        """-1 for what is called only before the steps, 1 for what is called only after them, 0 for what they call."""
        places = [call.place for call in self.calls]
        first = {place: places.index(place) for place in places}
        last = {place: index for index, place in enumerate(places)}
        # The denoiser: what is called most, and last among those; an autoencoder is called for pieces of a long video.
        networks = [place for place in first if place[1] == "__call__"] or list(first)
        if not networks:
            return {}
        denoiser = max(networks, key=lambda place: (places.count(place), last[place]))
        return {
            place: -1 if last[place] < first[denoiser] else 1 if first[place] > last[denoiser] else 0 for place in first
        }


def record(stand_ins: StandIns, start: Callable[[Any], Any], *, seed: int = 0) -> Recording:
    """Run `start` with a copy of the pipeline.

    Raises:
        Exception: the pipeline's error.
    """
    pipeline = stand_ins.copy()
    calls: list[Call] = []
    changes = ""
    watched = ModuleState.of(stand_ins.modules)
    running = CallingGreenlet(lambda: start(pipeline), parent=getcurrent(), seed=seed, watched=watched)
    result = running.resume()
    while not running.dead:
        calls.append(result)
        changes = changes or next((f"{change.name} ({change.key})" for change in running.changes), "")
        result = running.resume(alone(result))
    return Recording(calls=calls, result=result, changes=changes)


def learn_roles(single: Recording, double: Recording) -> Roles:
    """Learn the roles of networks' arguments, from a run for one request and one for two."""
    roles = Roles()
    ones, twos = _by_place(single), _by_place(double)
    for place, calls in ones.items():
        roles.learn(place, calls, twos.get(place, []))
    return roles


def _by_place(recording: Recording) -> dict[Place, list[Arguments]]:
    found: dict[Place, list[Arguments]] = defaultdict(list)
    for call in recording.calls:
        signature = Signature.of(call)
        arguments = None if signature is None else signature.named(call)
        if arguments is not None:
            found[call.place].append(arguments)
    return found


def rehearse(stand_ins: StandIns, calls: NetworkCalls, starts: Sequence[Callable[[Any], Any]]) -> None:
    """Run several requests together, so that the patterns of their calls are verified before others wait for them.

    Raises:
        Exception: the error of a pipeline or network.
    """
    running = []
    for seed, start in enumerate(starts):
        work = functools.partial(start, stand_ins.copy())
        running.append(CallingGreenlet(work, parent=getcurrent(), seed=seed))
    waiting = [found for one in running if isinstance(found := one.resume(), Call)]
    while waiting:
        described = {id(call): calls.describe(call) for call in waiting}
        lead = described[id(waiting[0])]
        if lead is None:
            chosen, results = [waiting[0]], [alone(waiting[0])]
        else:
            members = calls.mergeable(lead, [other for other in described.values() if other is not None])
            chosen, results = [member.call for member in members], calls.run(members)
        for call, result in zip(chosen, results, strict=True):
            waiting.remove(call)
            following = call.caller.resume(result)
            if isinstance(following, Call):
                waiting.append(following)
