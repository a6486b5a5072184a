"""`Encoder`: encodes a generated image as a file, and its provenance as JSON."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from calotype_shared.queue.job_store import Claim
from calotype_shared.schema.enums import OutputFormat
from calotype_shared.schema.jobs import ImageRef
from calotype_shared.schema.model_card import ModelCard
from calotype_shared.storage.layout import image_key, sidecar_key
from calotype_worker.engine import Generated
from calotype_worker.output.audio import encode_audio
from calotype_worker.output.file import File
from calotype_worker.output.image import encode_image, parameters_line
from calotype_worker.output.mesh import encode_ply
from calotype_worker.output.video import FRAMES_PER_SECOND, encode_gif, encode_mp4


def encode(generated: Generated, output_format: OutputFormat, provenance: Mapping[str, Any]) -> bytes:
    """Encode the output as a file with its provenance inside.

    Raises:
        GenerationFailed: a mesh was requested but the object has no surface; or sound, but there is none.
    """
    if output_format is OutputFormat.PLY:
        return encode_ply(generated.mesh, provenance)
    if output_format in (OutputFormat.GIF, OutputFormat.MP4):
        frames = generated.image[None] if generated.frames is None else generated.frames
        fps = generated.fps or FRAMES_PER_SECOND
        if output_format is OutputFormat.GIF:
            return encode_gif(frames, fps, provenance)
        return encode_mp4(frames, fps, provenance, audio=generated.audio)
    if output_format in (OutputFormat.WAV, OutputFormat.FLAC):
        return encode_audio(generated.audio, output_format, provenance)
    return encode_image(generated.image, output_format, provenance)


class Encoder:
    """Called by many threads at once."""

    def __init__(self, *, cards: Mapping[str, ModelCard], version: str) -> None:
        self._cards = cards
        self._version = version  # of Calotype

    def encode(self, claim: Claim, index: int, generated: Generated) -> tuple[list[File], ImageRef]:
        """An image's files, to be stored in its attempt's folder, and its entry in the record.

        Raises:
            GenerationFailed: as `encode`.
        """
        config = claim.config
        provenance = self._provenance(claim, index, generated)
        data = encode(generated, config.output_format, provenance)
        key, content_type = image_key(claim.folder, index, config.output_format), config.output_format.content_type
        beside = json.dumps(provenance, indent=1, sort_keys=True).encode()
        files = [
            File(key=key, content_type=content_type, data=data),
            File(key=sidecar_key(claim.folder, index), content_type="application/json", data=beside),
        ]
        height, width = generated.image.shape[:2]
        reference = ImageRef(
            key=key,
            seed=generated.seed,
            width=width,
            height=height,
            content_type=content_type,
            bytes=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
        )
        return files, reference

    def _provenance(self, claim: Claim, index: int, generated: Generated) -> dict[str, Any]:
        config = claim.config
        card = self._cards[generated.model or config.model]
        alone = {"model": card.name, "ensemble": (), "seed": generated.seed, "num_images": 1}
        single = config.model_copy(update=alone)
        return {
            "calotype": self._version,
            "config": json.loads(single.canonical_json()),  # generates the same image again
            "digest": single.digest(),
            "job_id": claim.job_id,
            "index": index,
            "seed": generated.seed,
            "model": card.name,
            "model_version": card.version,
            "steps_taken": generated.steps_taken,
            **(
                {"accelerations": list(generated.accelerations)} if generated.accelerations else {}
            ),  # exact images have no such entry
            "parameters": parameters_line(single, seed=generated.seed, steps=config.num_inference_steps),
        }
