"""The engine in the caller's process, without a queue: the classes of the project's founding document.

```python
from calotype_worker import DiffusionModel, GenerationConfig

model = DiffusionModel()
result = model.generate(GenerationConfig(prompt="a red circle on a blue background", seed=42))
result.save("circle.png")
```

They use the same engine as workers: images generated together share step batches, and an image generated here equals
that of a job with the same config.
"""

from __future__ import annotations

import threading
import uuid
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from pydantic import ConfigDict, ValidationError

from calotype_shared.errors import InvalidRequest
from calotype_shared.schema import config as shared
from calotype_shared.schema.model_card import ModelCard
from calotype_shared.schema.refusal import invalid_request
from calotype_shared.schema.resolve import ResolvedConfig, resolve
from calotype_shared.storage.images import fitted, normalize_image, open_upload
from calotype_worker.engine import Engine, EngineSettings, Generated, GenerationRequest
from calotype_worker.inprocess.image_input import ImageInput, image_bytes, mask_bytes
from calotype_worker.models import Accelerations, Adapters, Memory, ModelPool, StepModel, load_model
from calotype_worker.request import Mesh
from calotype_worker.threads import apart

KEPT_UPLOADS = 256


class GenerationConfig(shared.GenerationConfig):
    """`calotype_shared`'s config, but mutable; every change is validated like the initial values.

    Raises:
        InvalidRequest: from the constructor or an assignment; names field, value and remedy.
    """

    model_config = ConfigDict(frozen=False, validate_assignment=True)

    __hash__ = None  # type: ignore[assignment]  # what changes has no lasting hash

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise invalid_request(error, fields=type(self).model_fields) from error

    def __setattr__(self, name: str, value: Any) -> None:
        try:
            super().__setattr__(name, value)
        except ValidationError as error:
            raise invalid_request(error, fields=type(self).model_fields) from error


@dataclass(frozen=True, kw_only=True, eq=False)
class GeneratedImage:
    """A finished image and its config."""

    image_data: np.ndarray  # uint8 (H, W, 3)
    prompt: str
    config: GenerationConfig  # complete: generates exactly this image again
    generation_time: float  # seconds from its start to its end, during which others may have run too
    steps_taken: int  # network evaluations
    frames: np.ndarray | None = None  # of a video: uint8 (F, H, W, 3)
    mesh: Mesh | None = None
    accelerations: tuple[str, ...] = ()  # accelerations that were used; empty: an exact image

    @property
    def image(self) -> Image.Image:
        """The image for Pillow."""
        return Image.fromarray(self.image_data)

    def save(self, path: str | Path) -> Path:
        """Write the image in the format of the path's suffix; returns the path."""
        self.image.save(path)
        return Path(path)


class DiffusionModel:
    """A model and the engine that runs it. Loads at first use; safe to share between threads."""

    def __init__(
        self,
        model: str = "demo",
        *,
        source: str | None = None,
        device: str | None = None,
        dtype: str | None = None,
        adapters: Adapters | None = None,
        memory: Memory | None = None,
        accelerations: Accelerations | None = None,
        settings: EngineSettings | None = None,
    ) -> None:
        """`source` is a diffusers folder, a hub id or a .safetensors file; None for the bundled model.

        By default, `device` is a GPU if there is one, and `dtype` is chosen for the device.
        """
        self._name, self._source = model, source
        self._device = device or ("cuda:0" if torch.cuda.is_available() else "cpu")
        self._dtype = dtype
        self._adapters = adapters
        self._memory = memory or Memory()
        self._accelerations = accelerations or Accelerations()
        self._settings = settings
        self._lock = threading.Lock()
        self._engine: Engine | None = None
        self._uploads: OrderedDict[str, Image.Image] = OrderedDict()

    # ---- images

    def generate(self, config: shared.GenerationConfig) -> GeneratedImage:
        """Generate one image.

        Raises:
            InvalidRequest: the model does not support this, or the config requests several images.
            GenerationFailed: an error occurred during generation.
        """
        if config.image_count != 1:
            raise InvalidRequest(
                "asks for several images",
                field="num_images",
                value=config.image_count,
                remedy="use generate_batch, or DiffusionPipeline.text_to_image",
            )
        return self.generate_batch([config])[0]

    def generate_batch(self, prompts: Sequence[str | shared.GenerationConfig], **fields: Any) -> list[GeneratedImage]:
        """Generate the images of these prompts or configs together; returns them in order. `fields` apply to prompts.

        Raises:
            InvalidRequest, GenerationFailed: as for `generate`, for the first that fails.
        """
        configs = [GenerationConfig(prompt=p, **fields) if isinstance(p, str) else p for p in prompts]
        return self._make(configs)

    def image_to_image(
        self, prompt: str, init_image: ImageInput, strength: float = shared.DEFAULT_STRENGTH, **fields: Any
    ) -> GeneratedImage:
        """Transform an image: strength 0 returns it unchanged, strength 1 ignores it.

        The result has the image's size, rounded down to a size that the model supports. `fields` are any of
        `GenerationConfig`'s.
        """
        return self._from_image(prompt, init_image, None, strength=strength, **fields)

    def inpaint(
        self, prompt: str, image: ImageInput, mask: ImageInput, strength: float = 1.0, **fields: Any
    ) -> GeneratedImage:
        """Repaint where the mask is 1 (white); where it is 0 (black), the image is kept exactly."""
        return self._from_image(prompt, image, mask, strength=strength, **fields)

    def _from_image(self, prompt: str, image: ImageInput, mask: ImageInput | None, **fields: Any) -> GeneratedImage:
        fields["init_image"] = self.upload(image, field="init_image")
        width, height = self._uploads[fields["init_image"]].size
        if mask is not None:
            fields["mask_image"] = self._keep(mask_bytes(mask), "mask_image")
        multiple = self.card.size_multiple
        fields.setdefault("width", max(multiple, width // multiple * multiple))
        fields.setdefault("height", max(multiple, height // multiple * multiple))
        return self._make([GenerationConfig(prompt=prompt, **fields)])[0]

    def upload(self, image: ImageInput, *, field: str = "image") -> str:
        """Store an image for use in configs (`init_image`, `mask_image`, a control's `image`). Returns its id.

        The id is the same as from `Client.upload`. The last `KEPT_UPLOADS` images are kept.

        Raises:
            InvalidRequest: it is not an image, or too large.
        """
        return self._keep(image_bytes(image), field)

    def _keep(self, data: bytes, field: str) -> str:
        upload_id, stored = normalize_image(data, field=field)
        with self._lock:
            self._uploads[upload_id] = open_upload(stored, upload_id)
            self._uploads.move_to_end(upload_id)
            while len(self._uploads) > KEPT_UPLOADS:
                self._uploads.popitem(last=False)
        return upload_id

    def _make(self, configs: Sequence[shared.GenerationConfig]) -> list[GeneratedImage]:
        engine = self._running()
        futures: list[tuple[ResolvedConfig, Future[Generated]]] = []
        try:
            for config in [self._resolved(config) for config in configs]:
                images = self._fitted_uploads(config)
                for index in range(config.num_images):
                    request = GenerationRequest.from_config(
                        config, index=index, request_id=uuid.uuid4().hex, images=images
                    )
                    futures.append((config, engine.submit(request)))
            return [_generated(config, future.result()) for config, future in futures]
        finally:
            for _, future in futures:
                future.cancel()  # after a failure, cancels only those that have not started

    def _fitted_uploads(self, config: ResolvedConfig) -> dict[str, np.ndarray]:
        found = {}
        for upload in config.uploads:
            if upload not in self._uploads:
                raise InvalidRequest(
                    "does not exist",
                    field="upload",
                    value=upload,
                    remedy="pass the image to DiffusionModel.upload first",
                )
            is_mask = upload == config.mask_image and upload != config.init_image
            found[upload] = np.array(fitted(self._uploads[upload], config.width, config.height, mask=is_mask))
        return found

    def _resolved(self, config: shared.GenerationConfig) -> ResolvedConfig:
        """The complete, checked config. The model is always this one, whatever the config names."""
        card = self.card
        return resolve(config.model_copy(update={"model": card.name}), {card.name: card})

    # ---- the parts

    @property
    def card(self) -> ModelCard:
        """The model's capabilities."""
        return self._running().models.first.card

    @property
    def step_model(self) -> StepModel:
        """The loaded model. Do not call it while another thread generates images."""
        return self._running().models.steppable("")

    def to(self, device: str) -> Self:
        """Move to a device: "cpu", "cuda" or "cuda:1". Waits for images in progress."""
        self.close()
        self._device = "cuda:0" if device == "cuda" else device
        return self

    def close(self) -> None:
        """Stop the engine and free the model; the next use loads it again."""
        with self._lock:
            engine, self._engine = self._engine, None
        if engine is not None:
            engine.stop(drain_seconds=3600.0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def set_adapters(self, adapters: Adapters) -> None:
        """Register these LoRAs, textual inversions and ControlNets instead of the current ones. Reloads the model."""
        self.close()
        self._adapters = adapters

    def set_memory(self, **changes: Any) -> None:
        """Change fields of `Memory`. Reloads the model."""
        self.close()
        self._memory = replace(self._memory, **changes)

    def _running(self) -> Engine:
        with self._lock:
            if self._engine is None or not self._engine.alive:
                model = apart(
                    lambda: load_model(
                        self._name,
                        source=self._source,
                        device=self._device,
                        dtype=self._dtype,
                        adapters=self._adapters,
                        memory=self._memory,
                        accelerations=self._accelerations,
                    )
                )
                self._engine = Engine(ModelPool([model]), self._settings)
                self._engine.start()
            return self._engine


def _generated(config: ResolvedConfig, made: Generated) -> GeneratedImage:
    values = config.model_dump() | {"seed": made.seed, "num_images": 1}
    return GeneratedImage(
        image_data=made.image,
        prompt=config.prompt,
        config=GenerationConfig(**values),
        generation_time=sum(made.timings.values()),
        steps_taken=made.steps_taken,
        frames=made.frames,
        mesh=made.mesh,
        accelerations=made.accelerations,
    )
