"""`PipelineRun`: one request's run of a pipeline's own `__call__`, which sleeps at each network call."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from greenlet import GreenletExit, getcurrent

from calotype_worker.models.pipeline.call import Described
from calotype_worker.models.pipeline.module_state import ModuleState
from calotype_worker.models.pipeline.stand_in import Call, CallingGreenlet

_LAST_CALLS = 8  # maximum number of network calls that a run may make while it ends


class PipelineRun:
    """Owned by the engine's thread, in which all its code runs.

    After `begin`, `resume` or `fail`, it is either suspended with `call` set, or has ended with `result` or `error`.
    """

    def __init__(self, request_id: str, *, seed: int, watched: ModuleState | None = None) -> None:
        """`work` must be set before `begin`. `watched`: the networks as others need them, where this changes them."""
        self.request_id = request_id
        self.work: Callable[[], Any]
        self.call: Call | None = None
        self.described: Described | None = None  # description of the call, set when it is merged
        self.waited = 0  # other calls executed while this one waits
        self.result: Any = None
        self.error: Exception | None = None
        self.calls = 0  # number of calls so far
        self.changed = False  # whether it has changed the networks at any of them
        self.steps_done = 0
        self.total_steps = 0
        self._greenlet = CallingGreenlet(self._work, parent=getcurrent(), seed=seed, watched=watched)

    def _work(self) -> Any:
        return self.work()

    @property
    def ended(self) -> bool:
        return self._greenlet.dead

    def begin(self) -> None:
        """Run up to the first network call."""
        self._switch(self._greenlet.resume)

    def resume(self, value: Any) -> None:
        """Go on with the result of its call."""
        self._switch(self._greenlet.resume, value)

    def fail(self, error: Exception) -> None:
        """Raise an error in the run instead of returning its call's result."""
        self._switch(self._greenlet.fail, error)

    def cancel(self) -> None:
        """End it where it is suspended."""
        for _ in range(_LAST_CALLS):
            if self.ended:
                break
            self._switch(self._greenlet.fail, GreenletExit())
        self.result = None

    def follow(self, scheduler: Any) -> None:
        """Report the steps of its own scheduler as progress. Copies that the pipeline makes of it are not followed."""
        run, kind = self, type(scheduler)

        @functools.wraps(kind.step)
        def step(self: Any, *args: Any, **kwargs: Any) -> Any:
            run.steps_done += self is scheduler
            return kind.step(self, *args, **kwargs)

        @functools.wraps(kind.set_timesteps)
        def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> Any:
            result = kind.set_timesteps(self, *args, **kwargs)
            if self is scheduler:
                run.total_steps = max(run.total_steps, run.steps_done + len(self.timesteps))
            return result

        # Not attributes of the instance: pipelines copy their scheduler, and a copy's would act on the original.
        methods = {"step": step, "set_timesteps": set_timesteps}
        names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
        scheduler.__class__ = type(kind.__name__, (kind,), {**names, **methods})

    def _switch(self, switch: Callable[..., Any], *values: Any) -> None:
        self.call = self.described = None
        self.waited = 0
        try:
            value = switch(*values)
        except Exception as error:
            self.error = error
            return
        self.changed = self.changed or bool(self._greenlet.changes)
        if self.ended:
            self.result = value
        else:
            self.call = value
            self.calls += 1
