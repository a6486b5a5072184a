"""`ModelPool`: several models on one device, the least recently used moved off it when memory runs short."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Sequence

import torch

from calotype_shared.errors import InvalidRequest
from calotype_worker.models.base import StepModel
from calotype_worker.models.pipeline.model import PipelineModel

log = logging.getLogger(__name__)
AnyModel = StepModel | PipelineModel


class ModelPool:
    """Models by name. `use` is for the engine's thread, the rest for any."""

    def __init__(self, models: Sequence[AnyModel], *, memory_budget: int | None = None) -> None:
        """`memory_budget` is the maximum size of weights on the device, in bytes; None: all models stay there.

        Models are passed loaded and on their device; those over the budget are moved to main memory, the last first.

        Raises:
            InvalidRequest: two models have one name, there is none, or one is larger than the budget.
        """
        if not models:
            raise InvalidRequest("is empty", field="models", value=[], remedy="give at least one model")
        self._models = {model.card.name: model for model in models}
        if len(self._models) < len(models):
            names = [model.card.name for model in models]
            raise InvalidRequest("has duplicate names", field="models", value=names, remedy="use unique names")
        self._budget = memory_budget
        self._resident: OrderedDict[str, None] = OrderedDict()  # the next to be moved away first
        self.moves = 0  # times a model was brought back
        for model in models:
            if memory_budget is not None and model.weight_bytes > memory_budget:
                raise InvalidRequest(
                    f"model {model.card.name!r} has {model.weight_bytes} bytes of weights",
                    field="memory_budget",
                    value=memory_budget,
                    remedy="raise the budget, or use float16, bfloat16 or offload",
                )
        for name in reversed(self._models):
            self._resident[name] = None
        self._make_room(0)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._models)

    @property
    def first(self) -> AnyModel:
        return next(iter(self._models.values()))

    @property
    def resident(self) -> tuple[str, ...]:
        """Models on the device, the next to be moved away first."""
        return tuple(self._resident)

    def get(self, name: str) -> AnyModel:
        """The model; the first for an empty name.

        Raises:
            InvalidRequest: it is not one of these.
        """
        if not name:
            return self.first
        if name not in self._models:
            raise InvalidRequest(
                "is not served by this worker", field="model", value=name, remedy=f"use {', '.join(self._models)}"
            )
        return self._models[name]

    def steppable(self, name: str) -> StepModel:
        """The model, which must be one that can be stepped."""
        model = self.get(name)
        if isinstance(model, PipelineModel):
            raise InvalidRequest(
                "runs as a whole and cannot be stepped", field="model", value=name, remedy="use another model"
            )
        return model

    def use(self, name: str) -> AnyModel:
        """Get the model, which stays on its device until another is used."""
        model = self._models[name]
        if name not in self._resident:
            self._make_room(model.weight_bytes)
            model.to(model.device)
            self.moves += 1
            self._resident[name] = None
            log.info("model moved to its device", extra={"model": name})
        self._resident.move_to_end(name)
        return model

    def _make_room(self, wanted: int) -> None:
        if self._budget is None:
            return
        while self._resident and wanted + sum(self._models[n].weight_bytes for n in self._resident) > self._budget:
            name, _ = self._resident.popitem(last=False)
            self._models[name].to(torch.device("cpu"))
            log.info("model moved off its device", extra={"model": name})
