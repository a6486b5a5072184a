"""Tiny models of every family, requests for all that each can do, and a step batch of them to be stepped by hand."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from calotype_shared.schema.enums import SamplerType
from calotype_worker.engine import GenerationRequest
from calotype_worker.engine.admission import Admission
from calotype_worker.engine.memory_limit import MemoryLimit
from calotype_worker.engine.request_state import prepare
from calotype_worker.engine.step_batch import StepBatch
from calotype_worker.models import Accelerations, Adapters, ModelPool, StepModel, load_model
from calotype_worker.request import ControlInput
from calotype_worker.sampling.table import TableCache
from tests import family_models as tiny
from tests.models import sample_image, write_tiny_controlnet, write_tiny_lora, write_tiny_sd

MASK = np.zeros((64, 64), dtype=bool)
MASK[16:48, 24:56] = True


@dataclass(frozen=True)
class Shelf:
    """Folders of tiny models, each loaded once for each kind of acceleration."""

    folder: Path

    @functools.cached_property
    def adapters(self) -> Adapters:
        return Adapters(
            loras={"own": write_tiny_lora(self.folder / "own.safetensors", seed=11)},
            controls={"lines": str(write_tiny_controlnet(self.folder / "lines", seed=21))},
        )

    @functools.cache  # noqa: B019 - one shelf a run
    def source(self, name: str) -> Path:
        folder = self.folder / name
        if name == "sd":
            return write_tiny_sd(folder)
        makers = {"sdxl": tiny.tiny_sdxl, "sd3": lambda: tiny.tiny_sd3(layers=3), "flux": tiny.tiny_flux}
        tiny.write(makers[name](), folder)
        (folder / "calotype.json").write_text('{"native_sizes": [[64, 64]]}')
        return folder

    @functools.cache  # noqa: B019
    def model(self, name: str, **accelerations: Any) -> StepModel:
        adapters = self.adapters if name == "sd" else None
        model: Any = load_model(
            name, source=str(self.source(name)), adapters=adapters, accelerations=Accelerations(**accelerations)
        )
        return model


def wanted(name: str) -> list[GenerationRequest]:
    """Guided and not, previews, from an image, and what the family can beside: inpainting, a LoRA, a ControlNet."""
    common: dict[str, Any] = {"prompt": "a thing", "width": 64, "height": 64, "sampler": SamplerType.EULER}
    plain = [
        GenerationRequest(
            request_id=f"plain-{index}",
            num_inference_steps=(5, 7)[index % 2],
            guidance_scale=(1.0, 4.0)[index // 2 % 2],
            seed=index,
            preview_every=3 * (index == 1),
            **common,
        )
        for index in range(4)
    ]
    special: list[dict[str, Any]] = [{"init_image": sample_image(4), "strength": 0.7}]
    special.append({"init_image": sample_image(4), "mask": MASK})
    if name == "sd":
        special.append({"loras": (("own", 0.8),), "prompt": "more letters than one window holds"})
        special.append({"controls": (ControlInput(name="lines", image=sample_image(8), scale=0.9, end=0.6),)})
    return plain + [replace(plain[index], request_id=f"special-{index}", **own) for index, own in enumerate(special)]


def batch_of(model: StepModel, requests: list[GenerationRequest]) -> StepBatch:
    """A step batch as the engine makes it, to be stepped by hand."""
    states = [prepare(request, ModelPool([model]), TableCache()) for request in requests]
    assert not any(Admission(cache_capacity=16, together=True).admit(model, [t.stages[0] for t in states]))
    batch = StepBatch(model, shape=states[0].group.step_shape, limit=MemoryLimit(64, on_lower=lambda *_: None))
    batch.join([state.row for state in states])
    return batch
