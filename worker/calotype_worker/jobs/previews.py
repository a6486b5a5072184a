"""`Previews`: stores rough images from the engine for producers, without ever blocking the engine."""

from __future__ import annotations

import base64
import io
import logging
import queue
import threading

import numpy as np
from PIL import Image

from calotype_shared.errors import ServiceUnavailable
from calotype_shared.queue.job_store import JobStore
from calotype_shared.schema.jobs import Preview

log = logging.getLogger(__name__)

_WAITING_AT_MOST = 64
_SHORTER_SIDE = 128  # pixels of the JPEG, at least
_QUALITY = 80


class Previews:
    """`offer` is for the engine's thread; another thread encodes and writes."""

    def __init__(self, store: JobStore) -> None:
        self._store = store
        self._waiting: queue.Queue[tuple[str, int, np.ndarray]] = queue.Queue(_WAITING_AT_MOST)
        threading.Thread(target=self._write, name="calotype-previews", daemon=True).start()

    def offer(self, request_id: str, step: int, pixels: np.ndarray) -> None:
        """`pixels`: uint8 (h, w, 3). Dropped if too many are waiting, because more will follow."""
        try:
            self._waiting.put_nowait((request_id, step, pixels))
        except queue.Full:
            log.debug("preview dropped", extra={"request_id": request_id})

    def _write(self) -> None:
        while True:
            request_id, step, pixels = self._waiting.get()
            job_id, attempt, index = request_id.split("/")
            try:
                image = base64.b64encode(_jpeg(pixels)).decode()
                preview = Preview(index=int(index), step=step, attempt=int(attempt.partition("-")[0]), image=image)
                self._store.put_preview(job_id, preview)
            except ServiceUnavailable:
                continue  # the heartbeat reports it
            except Exception:
                log.exception("unexpected error in a preview")


def _jpeg(pixels: np.ndarray) -> bytes:
    height, width = pixels.shape[:2]
    factor = max(1, -(-_SHORTER_SIDE // min(height, width)))
    large = Image.fromarray(pixels).resize((width * factor, height * factor), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    large.save(buffer, "JPEG", quality=_QUALITY)
    return buffer.getvalue()
