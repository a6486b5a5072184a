"""Image to image: the same source at five strengths; 0 gives it back, 1 ignores it.

Needs a running `calotype up`. Writes out/image_to_image.png.
"""

from PIL import Image, ImageDraw
from sheet import save_sheet

from calotype import Client

source = Image.new("RGB", (128, 128), "royalblue")
ImageDraw.Draw(source).ellipse((14, 14, 74, 74), fill="red")

with Client() as client:
    jobs = [
        client.submit(
            "a yellow circle on a blue background",
            init_image=source,
            strength=strength,
            seed=2,
            num_inference_steps=30,
            guidance_scale=5,
        )
        for strength in (0.0, 0.2, 0.4, 0.6, 1.0)
    ]
    images = [(job.result()[0].image, f"strength {job.status().config.strength:g}") for job in jobs]
    save_sheet("image_to_image", [(source, "the source"), *images])
