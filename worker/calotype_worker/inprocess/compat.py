"""diffusers' pipeline names on Calotype's engine: a script changes only its import line and gains step batching.

```python
from calotype_worker.inprocess.compat import StableDiffusionPipeline

pipe = StableDiffusionPipeline.from_pretrained("owner/model").to("cuda")
images = pipe(["a cat", "a dog"]).images  # two requests in one step batch
```

Covers loading, calling with text, source images and ControlNets, LoRAs and the memory switches.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image

from calotype_shared.schema.config import ControlUse, LoraUse
from calotype_worker.inprocess.diffusion import DiffusionModel, GenerationConfig
from calotype_worker.inprocess.image_input import ImageInput
from calotype_worker.inprocess.pipeline import DiffusionPipeline
from calotype_worker.models import Adapters

_DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


@dataclass(frozen=True)
class PipelineOutput:
    """The return value of diffusers' pipelines."""

    images: list[Image.Image]


@dataclass(frozen=True)
class ControlNetModel:
    """A ControlNet's folder or hub id, loaded together with its pipeline."""

    source: str

    @classmethod
    def from_pretrained(cls, source: str) -> Self:
        return cls(source)


class StableDiffusionPipeline(DiffusionPipeline):
    """A pipeline of any supported family; the other names below are aliases of this class."""

    def __init__(self, source: str, *, dtype: str | None = None, adapters: Adapters | None = None) -> None:
        self._source, self._dtype, self._adapters = source, dtype, adapters or Adapters()
        name = re.sub(r"[^a-z0-9._-]+", "-", Path(source).name.lower()).lstrip("._-")[:64] or "model"
        super().__init__(name, source=source, dtype=dtype, adapters=self._adapters)

    @classmethod
    def from_pretrained(
        cls,
        source: str,
        *,
        torch_dtype: torch.dtype | None = None,
        use_safetensors: bool = True,
        controlnet: ControlNetModel | list[ControlNetModel] | None = None,
    ) -> Self:
        """A diffusers folder, a hub id or a .safetensors file. Loaded at the first call, on the selected device.

        Weights are always safetensors, whatever `use_safetensors` says.
        """
        nets = controlnet if isinstance(controlnet, list) else [controlnet] if controlnet else []
        controls = {f"control-{index}": net.source for index, net in enumerate(nets)}
        return cls(source, dtype=_DTYPES.get(torch_dtype or torch.float64), adapters=Adapters(controls=controls))

    def load_lora_weights(self, file: str | Path, *, adapter_name: str = "default") -> None:
        """Use a LoRA file from now on, at weight 1, in addition to those loaded before."""
        self._adapters = replace(self._adapters, loras={**self._adapters.loras, adapter_name: Path(file)})
        self.model.set_adapters(self._adapters)

    def __call__(
        self,
        prompt: str | list[str],
        *,
        negative_prompt: str = "",
        image: ImageInput | list[ImageInput] | None = None,
        num_images_per_prompt: int = 1,
        **fields: Any,
    ) -> PipelineOutput:
        """Generate images of one or several prompts together. `image` is each ControlNet's source.

        `fields` are any of `GenerationConfig`'s: seed, num_inference_steps, guidance_scale, width, height …
        """
        images = image if isinstance(image, list) else [image] if image is not None else []
        uploads = [self.model.upload(source) for source in images]
        controls = tuple(
            ControlUse(name=name, image=upload) for name, upload in zip(self._adapters.controls, uploads, strict=True)
        )
        configs = [
            GenerationConfig(
                prompt=text,
                negative_prompt=negative_prompt,
                num_images=num_images_per_prompt,
                loras=tuple(LoraUse(name=name) for name in self._adapters.loras),
                controls=controls,
                **fields,
            )
            for text in ([prompt] if isinstance(prompt, str) else prompt)
        ]
        return PipelineOutput([made.image for made in self.model.generate_batch(configs)])


StableDiffusionXLPipeline = StableDiffusionControlNetPipeline = StableDiffusionPipeline
__all__ = [
    "ControlNetModel",
    "DiffusionModel",
    "PipelineOutput",
    "StableDiffusionControlNetPipeline",
    "StableDiffusionPipeline",
    "StableDiffusionXLPipeline",
]
