"""The images of a scripted worker: one color, which depends on everything that determines an image."""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import version

from PIL import Image

from calotype_shared.queue.job_store import Claim
from calotype_shared.schema.enums import OutputFormat
from calotype_shared.schema.jobs import ImageRef
from calotype_shared.schema.model_card import ModelCard
from calotype_shared.schema.resolve import ResolvedConfig
from calotype_shared.storage.image_file import write_image
from calotype_shared.storage.layout import image_key, sidecar_key
from calotype_shared.storage.s3 import Storage

FORMATS = (OutputFormat.PNG, OutputFormat.WEBP, OutputFormat.JPEG)


def image_of(config: ResolvedConfig) -> Image.Image:
    """An image of the config's size, whose color is a hash of its digest: equal configs give equal images."""
    red, green, blue = hashlib.sha256(config.digest().encode()).digest()[:3]
    return Image.new("RGB", (config.width, config.height), (red, green, blue))


def describe(claim: Claim, index: int) -> ImageRef:
    """The record of image number `index`, but for its bytes."""
    config = claim.config
    return ImageRef(
        key=image_key(claim.folder, index, config.output_format),
        seed=config.seed + index % config.num_images,
        width=config.width,
        height=config.height,
        content_type=config.output_format.content_type,
        bytes=0,
        sha256=hashlib.sha256(b"").hexdigest(),
    )


def store_image(storage: Storage, claim: Claim, index: int, card: ModelCard) -> ImageRef:
    """Write image number `index` and its provenance, as a worker does."""
    reference = describe(claim, index)
    single = claim.config.model_copy(
        update={"model": card.name, "ensemble": (), "seed": reference.seed, "num_images": 1}
    )
    provenance = {
        "calotype": version("calotype"),
        "config": json.loads(single.canonical_json()),
        "digest": single.digest(),
        "job_id": claim.job_id,
        "index": index,
        "seed": reference.seed,
        "model": card.name,
        "model_version": card.version,
    }
    data = write_image(image_of(single), single.output_format, provenance)
    storage.put(reference.key, data, reference.content_type)
    beside = json.dumps(provenance, indent=1, sort_keys=True).encode()
    storage.put(sidecar_key(claim.folder, index), beside, "application/json")
    return reference.model_copy(update={"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()})
