"""`Inputs`: fetches a config's input images, checks them again, and resizes them."""

from __future__ import annotations

import numpy as np

from calotype_shared.schema.resolve import ResolvedConfig
from calotype_shared.storage.images import open_upload, upload_key
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
            data = self._storage.get(upload_key(upload_id))
            others = {config.init_image, config.mask_image, config.control_image, *(c.image for c in config.controls)}
            if upload_id in config.images and upload_id not in others:
                found[upload_id] = np.array(open_upload(data, upload_id))
                continue
            is_mask = upload_id == config.mask_image and upload_id != config.init_image
            fit = (config.width, config.height)
            found[upload_id] = np.array(open_upload(data, upload_id, fit=fit, mask=is_mask))
        return found
