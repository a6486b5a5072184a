"""`Inputs`: fetches the images a config names, checks them again, and fits them to its size."""

from __future__ import annotations

import numpy as np

from calotype_shared.schema.config import GenerationConfig
from calotype_shared.storage.images import fitted, open_upload, upload_key
from calotype_shared.storage.s3 import Storage


class Inputs:
    """Called by many threads at once."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def fetch(self, config: GenerationConfig) -> dict[str, np.ndarray]:
        """Each upload of a resolved config by its id: uint8 (H, W, 3), of the config's size.

        Raises:
            InvalidRequest: what is stored is not what was uploaded.
            StorageUnavailable: it cannot be fetched; `ObjectMissing` if it is gone.
        """
        assert config.width is not None
        assert config.height is not None
        found = {}
        for upload_id in config.uploads:
            image = open_upload(self._storage.get(upload_key(upload_id)), upload_id)
            is_mask = upload_id == config.mask_image and upload_id != config.init_image
            found[upload_id] = np.array(fitted(image, config.width, config.height, mask=is_mask))
        return found
