"""`NetworkCalls`: which calls of a pipeline's networks go together, and their results."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from calotype_worker.models.pipeline.adapters import active_together, mixed_layers
from calotype_worker.models.pipeline.call import Described, Describer
from calotype_worker.models.pipeline.merge import CannotCut, Cuts, cut, learn, merge, padded_paths
from calotype_worker.models.pipeline.roles import Kind, Roles
from calotype_worker.models.pipeline.stand_in import Call
from calotype_worker.models.pipeline.thread_state import ThreadState
from calotype_worker.models.pipeline.tree import rebuilt
from calotype_worker.models.pipeline.trust import Trust, difference, drew

_VERIFIED = 3  # number of calls in a pattern's first merge, which also run separately

# Which keys of calls must be equal, from least to most; and whether scalars are repeated for each row.
_LEVELS = (("key", True), ("even", True), ("alike", True), ("exact", False))


class NetworkCalls:
    """Owned by the engine's thread. Without `merging`, each call runs alone, with the bits of the plain pipeline."""

    def __init__(self, roles: Roles, *, merging: bool = True) -> None:
        self._describer = Describer(roles)
        self.trust = Trust()
        self.merging = merging

    def describe(self, call: Call) -> Described | None:
        """None: the call runs alone."""
        return self._describer.describe(call) if self.merging and not call.caller.changes else None

    def mergeable(self, lead: Described, waiting: Sequence[Described]) -> list[Described]:
        """Those of the waiting calls that go with `lead`, which is among them; in their order, `lead` first."""
        members = [lead, *(call for call in waiting if call is not lead and call.key == lead.key)]
        for attribute, expand in _LEVELS:
            members = [call for call in members if getattr(call, attribute) == getattr(lead, attribute)]
            if len(members) == 1:
                break
            verdict = self.trust.of(_pattern(members, expand=expand))
            if verdict is None:
                few = _unlike(members)
                # Where a few do not show what is unlike in all of them, all are verified.
                return few if self.trust.of(_pattern(few, expand=expand)) is None else members
            if verdict.cuts is not None:
                return members
        return [lead]

    def run(self, calls: Sequence[Described]) -> list[Any]:
        """Run calls together and return their results.

        Raises:
            Exception: the network's error, for any of them.
        """
        for attribute, expand in _LEVELS if len(calls) > 1 else ():
            if len({getattr(call, attribute) for call in calls}) > 1:
                break
            pattern = _pattern(calls, expand=expand)
            verdict = self.trust.of(pattern)
            if verdict is None:
                return self._verify(calls, pattern, expand=expand)
            if verdict.cuts is not None:
                merged = self._merged(calls, expand=expand)
                try:
                    return cut(calls, merged, verdict.cuts)
                except CannotCut as error:
                    self.trust.refuse(pattern, str(error))
                    break
        return [alone(call.call) for call in calls]

    def cuts(self, call: Described) -> Cuts | None:
        """How the result of such a call follows its rows; None: not known."""
        for _, expand in _LEVELS:
            verdict = self.trust.of(_pattern([call], expand=expand))
            if verdict is not None and verdict.cuts is not None:
                return verdict.cuts
        return None

    def _merged(self, calls: Sequence[Described], *, expand: bool) -> Any:
        args, kwargs = merge(calls, expand=expand)
        call = calls[0].call
        run = call.function()
        loras = active_together([(own.call.caller.loras, own.rows) for own in calls], call.component, call.module)
        with _autocast_of(call.caller.state), loras:
            return run(*args, **kwargs)

    def _verify(self, calls: Sequence[Described], pattern: Hashable, *, expand: bool) -> list[Any]:
        """Run the calls separately, and check whether merging gives the same results."""
        generators = [value for call in calls for _, value, role in call.roles if role.kind is Kind.GENERATOR]
        before = [generator.get_state() for generator in generators]
        merged, problem = None, ""
        scratch = ThreadState.fresh(0)
        try:
            with scratch.entered():
                merged = self._merged(calls, expand=expand)
        except Exception as error:
            if _is_of_device(error):
                raise
            problem = f"{type(error).__name__}: {error}"
        for generator, state in zip(generators, before, strict=True):
            generator.set_state(state)
        states = [draw for call in calls for draw in call.call.caller.state.draws]
        results = [alone(call.call) for call in calls]
        after = [generator.get_state() for generator in generators]
        if drew(before, after) or drew(states, [d for call in calls for d in call.call.caller.state.draws]):
            problem = "it draws random numbers"
        if problem:
            self.trust.refuse(pattern, problem)
            return results
        try:
            cuts = learn(calls, merged, results)
            for index, own in enumerate(cut(calls, merged, cuts)):
                problem = problem or difference(own, results[index])
        except CannotCut as error:
            problem = str(error)
        if problem:
            self.trust.refuse(pattern, problem)
        else:
            self.trust.accept(pattern, cuts)
        return results


def alone(call: Call) -> Any:
    """One call exactly as its pipeline made it, with its own random numbers."""
    return run_as(call, rebuilt(call.args, {}), rebuilt(call.kwargs, {}))


def run_as(call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The call's network with these arguments, in the state and with the LoRAs of the run that made the call."""
    run = call.function()
    with call.caller.calling(), call.caller.loras.active():
        return run(*args, **kwargs)


def _unlike(calls: Sequence[Described]) -> list[Described]:
    """A few of the calls, of as many lengths as there are; the first among them."""
    seen: set[Hashable] = set()
    first: list[Described] = []
    again: list[Described] = []
    for call in calls:
        (again if call.even in seen else first).append(call)
        seen.add(call.even)
    return [*first, *again][:_VERIFIED]


def _is_of_device(error: Exception) -> bool:
    """Whether the error is unrelated to the pattern: too little memory, or a lost device."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        words in str(error) for words in ("memory", "CUDA error")
    )


def _pattern(calls: Sequence[Described], *, expand: bool) -> Hashable:
    uneven = len({call.even for call in calls}) > 1
    mixed = mixed_layers([(call.call.caller.loras, call.call.component) for call in calls])
    return calls[0].pattern, expand, uneven, padded_paths(calls), mixed


@contextmanager
def _autocast_of(state: ThreadState) -> Iterator[None]:
    on_cpu, cpu_dtype, on_cuda, cuda_dtype = state.autocast
    with (
        torch.autocast("cpu", dtype=cpu_dtype) if on_cpu else nullcontext(),
        torch.autocast("cuda", dtype=cuda_dtype) if on_cuda else nullcontext(),
    ):
        yield
