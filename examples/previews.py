"""Real-time: what a running job is heading to, and a few-step run beside a long one.

Needs a running `calotype up`. Writes out/previews.png.
"""

import io

from PIL import Image
from sheet import save_sheet

from calotype import Client

with Client() as client:
    job = client.submit(
        "a red ring on a yellow background", seed=5, num_inference_steps=60, guidance_scale=5, preview_every=10
    )
    images: list[tuple[Image.Image, str]] = [
        (Image.open(io.BytesIO(preview.data)), f"after step {preview.step}")
        for preview in job.follow_previews(timeout=60)
    ]
    images.append((job.result()[0].image, "the image, 60 steps"))
    quick = client.submit("a red ring on a yellow background", seed=5, num_inference_steps=8, guidance_scale=5)
    images.append((quick.result()[0].image, "8 steps"))
    save_sheet("previews", images)
