"""ControlNet: an image that follows a drawn outline, at two scales and for a part of the steps.

Needs a running `calotype up`, whose bundled model comes with the ControlNet outline. Writes out/controlnet.png.
"""

from PIL import Image, ImageDraw
from sheet import save_sheet

from calotype import Client

outline = Image.new("RGB", (128, 128))
ImageDraw.Draw(outline).polygon([(70, 12), (116, 100), (24, 100)], outline="white", width=2)

CHOICES = {
    "without": [],
    "scale 1": [{"name": "outline", "image": outline}],
    "scale 0.5": [{"name": "outline", "image": outline, "scale": 0.5}],
    "only the first 80% of the steps": [{"name": "outline", "image": outline, "end": 0.8}],
}

with Client() as client:
    jobs = [
        client.submit(
            "a yellow triangle on a purple background",
            controls=controls,
            seed=3,
            num_inference_steps=25,
            guidance_scale=5,
        )
        for controls in CHOICES.values()
    ]
    images = [(job.result()[0].image, name) for job, name in zip(jobs, CHOICES, strict=True)]
    save_sheet("controlnet", [(outline, "the outline"), *images])
