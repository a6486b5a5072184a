"""LoRAs: none, one, another, two at once and a weight of its own, all in one batch.

Needs a running `calotype up`, whose bundled model comes with the LoRAs neon and sticker. Writes out/lora.png.
"""

from sheet import save_sheet

from calotype import Client

CHOICES = {
    "without": [],
    "sticker": [{"name": "sticker"}],
    "sticker at 0.6": [{"name": "sticker", "weight": 0.6}],
    "neon": [{"name": "neon"}],
    "neon at 1.3": [{"name": "neon", "weight": 1.3}],
    "both, sticker at 0.5": [{"name": "neon"}, {"name": "sticker", "weight": 0.5}],
}

with Client() as client:
    jobs = client.submit_many(
        [
            {
                "prompt": "a large red circle on a blue background",
                "loras": loras,
                "seed": 1,
                "num_inference_steps": 25,
                "guidance_scale": 5,
            }
            for loras in CHOICES.values()
        ]
    )
    save_sheet("lora", [(job.result()[0].image, name) for job, name in zip(jobs, CHOICES, strict=True)])
