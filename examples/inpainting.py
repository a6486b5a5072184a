"""Inpainting: paint the masked part anew and keep the rest, pixel by pixel.

Needs a running `calotype up`. Writes out/inpainting.png.
"""

from PIL import Image, ImageDraw
from sheet import save_sheet

from calotype import Client

source = Image.new("RGB", (128, 128), "royalblue")
ImageDraw.Draw(source).rectangle((8, 8, 36, 36), fill="white")
mask = Image.new("L", (128, 128))  # black is kept
ImageDraw.Draw(mask).rectangle((40, 40, 127, 127), fill=255)  # white is painted anew

with Client() as client:
    jobs = [
        client.submit(
            f"a {color} circle on a blue background",
            init_image=source,
            mask_image=mask,
            seed=seed,
            num_inference_steps=30,
            guidance_scale=5,
        )
        for seed, color in enumerate(("red", "yellow"))
    ]
    images = [(job.result()[0].image, job.status().config.prompt) for job in jobs]
    save_sheet("inpainting", [(source, "the source"), (mask, "the mask"), *images])
