"""`DiffusionPipeline`: the common tasks of a `DiffusionModel` in one call each."""

from __future__ import annotations

from typing import Any, Self

from calotype_shared.schema.presets import quality_preset
from calotype_worker.inprocess.diffusion import DiffusionModel, GeneratedImage, GenerationConfig


class DiffusionPipeline:
    """`model` is a DiffusionModel, or the name of one."""

    def __init__(self, model: DiffusionModel | str = "demo", **options: Any) -> None:
        """`options` are those of `DiffusionModel`, if a name is given."""
        self.model = DiffusionModel(model, **options) if isinstance(model, str) else model

    def text_to_image(self, prompt: str, num_images: int = 1, **fields: Any) -> list[GeneratedImage]:
        """Generate `num_images` images of a prompt together; image i has the seed plus i.

        `fields` are any of `GenerationConfig`'s. Raises InvalidRequest, GenerationFailed.
        """
        return self.model.generate_batch([GenerationConfig(prompt=prompt, num_images=num_images, **fields)])

    def get_optimal_config(self, quality: str = "balanced") -> GenerationConfig:
        """A config with the steps and guidance of "fast", "balanced" or "high". Set its prompt before use."""
        return GenerationConfig(prompt="", **quality_preset(quality))

    def to(self, device: str) -> Self:
        """Move the model to a device: "cpu", "cuda" or "cuda:1"."""
        self.model.to(device)
        return self

    def enable_attention_slicing(self) -> None:
        """Attention in parts: slower, with less memory."""
        self.model.set_memory(attention_slicing=True)

    def enable_vae_slicing(self) -> None:
        """Images of a batch are decoded one by one."""
        self.model.set_memory(vae_slicing=True)

    def enable_vae_tiling(self) -> None:
        """Large images are decoded in overlapping tiles, which can show."""
        self.model.set_memory(vae_tiling=True)

    def enable_model_cpu_offload(self) -> None:
        """Only the part at work is on the GPU."""
        self.model.set_memory(offload="model")

    def enable_sequential_cpu_offload(self) -> None:
        """Only the layer at work is on the GPU: the least memory, and by far the slowest."""
        self.model.set_memory(offload="sequential")
