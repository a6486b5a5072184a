"""Ensemble: one job, the same prompt and seed by two models.

Needs a worker with both: `calotype up --model demo,other=FOLDER`. Writes out/ensemble.png.
"""

from sheet import save_sheet

from calotype import Client

with Client() as client:
    job = client.submit(
        "a green square on a white background",
        ensemble=["other"],
        num_images=2,
        seed=11,
        num_inference_steps=20,
        guidance_scale=5,
    )
    captions = [f"{model}, seed {seed}" for model in ("demo", "other") for seed in (11, 12)]
    save_sheet("ensemble", [(made.image, text) for made, text in zip(job.get(), captions, strict=True)])
