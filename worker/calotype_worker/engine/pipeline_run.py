"""`PipelineRun`: one request's run of a pipeline's own `__call__`, which sleeps at each network call."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
from greenlet import GreenletExit, getcurrent

from calotype_worker.models.pipeline.call import Described
from calotype_worker.models.pipeline.followed import Step, follow
from calotype_worker.models.pipeline.module_state import ModuleState
from calotype_worker.models.pipeline.stand_in import Call, CallingGreenlet

log = logging.getLogger(__name__)

_LAST_CALLS = 8  # maximum number of network calls that a run may make while it ends


class PipelineRun:
    """Owned by the engine's thread, in which all its code runs.

    After `begin`, `resume` or `fail`, it is either suspended with `call` set, or has ended with `result` or `error`.
    """

    def __init__(
        self,
        request_id: str,
        *,
        seed: int,
        watched: ModuleState | None = None,
        preview: Callable[[Step], np.ndarray | None] = lambda _: None,
        preview_every: int = 0,
    ) -> None:
        """`work` must be set before `begin`. `watched`: the networks as others need them, where this changes them.

        `preview` makes a rough image, uint8 (h, w, 3), after every `preview_every` steps.
        """
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
        self._preview, self._preview_every = preview, preview_every
        self._previews: list[tuple[int, np.ndarray]] = []
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
        """Report the steps of its own scheduler as progress, and make previews of some."""
        follow(scheduler, begun=self._begun, stepped=self._stepped)

    def take_previews(self) -> list[tuple[int, np.ndarray]]:
        """Those since the last time, each with its step."""
        found, self._previews = self._previews, []
        return found

    def _begun(self, steps: int) -> None:
        self.total_steps = max(self.total_steps, self.steps_done + steps)

    def _stepped(self, step: Step) -> None:
        self.steps_done += 1
        if not self._preview_every or self.steps_done % self._preview_every or self.steps_done >= self.total_steps:
            return
        try:
            image = self._preview(step)
        except Exception as error:  # a preview is no reason for the request to fail
            log.warning("preview failed", extra={"request_id": self.request_id}, exc_info=error)
            return
        if image is not None:
            self._previews.append((self.steps_done, image))

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
