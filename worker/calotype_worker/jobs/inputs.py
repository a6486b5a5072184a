"""`Inputs`: fetches a config's input images, checks them again, and resizes them."""

from __future__ import annotations

import numpy as np

from calotype_shared.schema.resolve import ResolvedConfig
from calotype_shared.storage.images import fitted, open_upload, upload_key
from calotype_shared.storage.s3 import Storage


class Inputs:
    """Called by many threads at once."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def fetch(self, config: ResolvedConfig) -> dict[str, np.ndarray]:
        """A config's uploads by id: uint8 (H, W, 3), in the config's size; references keep their own.

        Raises:
            InvalidRequest: the stored image is not the uploaded one.
            StorageUnavailable: it cannot be fetched; `ObjectMissing` if it no longer exists.
        """
        found = {}
        for upload_id in config.uploads:
            image = open_upload(self._storage.get(upload_key(upload_id)), upload_id)
            others = {config.init_image, config.mask_image, config.control_image, *(c.image for c in config.controls)}
            if upload_id in config.images and upload_id not in others:
                found[upload_id] = np.array(image)
                continue
            is_mask = upload_id == config.mask_image and upload_id != config.init_image
            found[upload_id] = np.array(fitted(image, config.width, config.height, mask=is_mask))
        return found
