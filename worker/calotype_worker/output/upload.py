"""`Uploader`: encodes a generated picture and puts it, with a JSON beside it, under its attempt's own key."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Mapping
from typing import Any

from calotype_shared.config import OutputFormat
from calotype_shared.errors import StorageUnavailable
from calotype_shared.jobs import ImageRef
from calotype_shared.model_card import ModelCard
from calotype_shared.storage import Storage, image_key, sidecar_key
from calotype_shared.store import Claim
from calotype_worker.engine import Generated
from calotype_worker.output.image import encode_image, parameters_line
from calotype_worker.output.mesh import encode_ply
from calotype_worker.output.video import FRAMES_PER_SECOND, encode_gif, encode_mp4

log = logging.getLogger(__name__)


def encode(generated: Generated, output_format: OutputFormat, provenance: Mapping[str, Any]) -> bytes:
    """The file of what was generated, with its provenance inside.

    Raises:
        GenerationFailed: a mesh was asked for, and the object has no surface.
    """
    if output_format is OutputFormat.PLY:
        return encode_ply(generated.mesh, provenance)
    if output_format in (OutputFormat.GIF, OutputFormat.MP4):
        frames = generated.image[None] if generated.frames is None else generated.frames
        write = encode_gif if output_format is OutputFormat.GIF else encode_mp4
        return write(frames, FRAMES_PER_SECOND, provenance)
    return encode_image(generated.image, output_format, provenance)


class Uploader:
    """Called by many threads at once."""

    def __init__(self, storage: Storage, *, cards: Mapping[str, ModelCard], version: str) -> None:
        self._storage = storage
        self._cards = cards
        self._version = version  # of Calotype

    def upload(
        self, claim: Claim, index: int, generated: Generated, uploaded: list[str]
    ) -> tuple[ImageRef, dict[str, float]]:
        """Store one picture. Its keys are added to `uploaded` before they are written; returns seconds by phase.

        Raises:
            StorageUnavailable: after its retries.
        """
        config = claim.config
        began = time.monotonic()
        provenance = self._provenance(claim, index, generated)
        data = encode(generated, config.output_format, provenance)
        encoded = time.monotonic()
        key = image_key(claim.job_id, claim.attempt, index, config.output_format)
        beside = sidecar_key(claim.job_id, claim.attempt, index)
        uploaded += [key, beside]
        self._storage.put(key, data, config.output_format.content_type)
        self._storage.put(beside, json.dumps(provenance, indent=1, sort_keys=True).encode(), "application/json")
        height, width = generated.image.shape[:2]
        reference = ImageRef(
            key=key,
            seed=generated.seed,
            width=width,
            height=height,
            content_type=config.output_format.content_type,
            bytes=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
        )
        return reference, {"encode_image": encoded - began, "upload": time.monotonic() - encoded}

    def discard(self, uploaded: list[str]) -> None:
        """Remove what an attempt without a commit has written. Best effort: nothing refers to it."""
        for key in uploaded:
            try:
                self._storage.delete(key)
            except StorageUnavailable as error:
                log.warning("orphan left", extra={"key": key, "reason": str(error)})

    def _provenance(self, claim: Claim, index: int, generated: Generated) -> dict[str, Any]:
        config = claim.config
        card = self._cards[generated.model or config.model]
        alone = {"model": card.name, "ensemble": (), "seed": generated.seed, "num_images": 1}
        single = config.model_copy(update=alone)
        return {
            "calotype": self._version,
            "config": json.loads(single.canonical_json()),  # makes this very picture again
            "digest": single.digest(),
            "job_id": claim.job_id,
            "index": index,
            "seed": generated.seed,
            "model": card.name,
            "model_version": card.version,
            "steps_taken": generated.steps_taken,
            "parameters": parameters_line(single, seed=generated.seed, steps=config.num_inference_steps),
        }
