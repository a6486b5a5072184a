"""Quality presets: the same seed fast, balanced and high.

Needs a running `calotype up`. Writes out/presets.png.
"""

from sheet import save_sheet

from calotype import Client

with Client() as client:
    jobs = {
        quality: client.submit("an orange star on a cyan background", quality=quality, seed=1)
        for quality in ("fast", "balanced", "high")
    }
    images = []
    for quality, job in jobs.items():
        made, config = job.result()[0], job.status().config
        images.append((made.image, f"{quality}: {config.num_inference_steps} steps, scale {config.guidance_scale:g}"))
    save_sheet("presets", images)
