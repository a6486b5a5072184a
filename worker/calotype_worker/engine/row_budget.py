"""`RowBudgets`: how many rows of a group run together. By the settings, the knee that was measured, and memory."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence

from calotype_worker.engine.memory_limit import MemoryLimit
from calotype_worker.engine.profile import Profile
from calotype_worker.models.pipeline.model import PipelineModel
from calotype_worker.models.pool import ModelPool
from calotype_worker.request import GroupKey

log = logging.getLogger(__name__)

_REMEMBERED_LIMITS = 128


class RowBudgets:
    """`on_out_of_memory` is called each time a limit is lowered. Changed only by the engine's thread, read by any.

    `max_rows` is for images of a model's native area and shrinks as the area grows. With `powers_of_two`, a row's
    bits do not depend on its position. Measured on two threads: with 6 rows they do, with 4 or 8 they do not.
    """

    def __init__(
        self, models: ModelPool, *, max_rows: int, powers_of_two: bool, on_out_of_memory: Callable[[], None]
    ) -> None:
        self._models = models
        self._max_rows = max_rows
        self._powers_of_two = powers_of_two
        self._on_out_of_memory = on_out_of_memory
        self._profiles: dict[str, dict[tuple[int, int], Profile]] = {}  # by model and (h, w) of the latents
        self._limits: OrderedDict[Hashable, MemoryLimit] = OrderedDict()  # the last used at the end

    @property
    def profiles(self) -> list[Profile]:
        return [profile for known in self._profiles.values() for profile in known.values()]

    def set_profiles(self, model: str, profiles: Sequence[tuple[tuple[int, int], Profile]]) -> None:
        """From now on at the knees of a model's profiles, each with the (h, w) of its latents."""
        self._profiles[model] = dict(profiles)

    def current(self, group: GroupKey) -> int:
        """At least two, because a guided request has two rows (executed one after the other if necessary)."""
        most = self.max(group)
        limit = self._limits.get(group)
        return most if limit is None else max(min(2, most), min(most, limit.current))

    def max(self, group: GroupKey) -> int:
        """The budget while memory is sufficient."""
        model = self._models.get(group.model)
        if isinstance(model, PipelineModel):
            width, height = model.card.native_sizes[0]
            return max(2, min(self._max_rows, self._max_rows * width * height // model.area(group.latent_shape)))
        native_width, native_height = model.card.native_sizes[0]
        _, native_h, native_w = model.latent_shape(native_width, native_height)
        _, h, w = group.step_shape
        budget = max(2, min(self._max_rows, self._max_rows * native_h * native_w // (h * w)))
        known = self._profiles.get(group.model)
        if known:
            # At the knee; of a size that was not measured it is guessed from the next in area.
            near = min(known, key=lambda size: abs(size[0] * size[1] - h * w))
            budget = max(2, min(budget, known[near].knee.rows * near[0] * near[1] // (h * w)))
        if self._powers_of_two:
            budget = 1 << (budget.bit_length() - 1)
        return budget

    def limit(self, work: Hashable, most: int) -> MemoryLimit:
        """What was learned about one kind of work: the steps of a group, or the decoding of a shape."""

        def on_lower(tried: int, current: int) -> None:
            self._on_out_of_memory()
            log.warning("out of memory", extra={"work": str(work), "tried": tried, "from_now_on": current})

        if work not in self._limits:
            self._limits[work] = MemoryLimit(most, doubling=self._powers_of_two, on_lower=on_lower)
        self._limits.move_to_end(work)
        while len(self._limits) > _REMEMBERED_LIMITS:
            self._limits.popitem(last=False)
        return self._limits[work]
