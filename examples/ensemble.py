"""Ensemble: one job, the same prompt and seed by two models.

Needs a worker with both: `python examples/second_model.py`, then `calotype up --model demo,other=out/other`.
Writes out/ensemble.png.
"""

from sheet import save_sheet

from calotype import Client

with Client() as client:
    job = client.submit(
        "a red circle on a pink background",
        ensemble=["other"],
        num_images=2,
        seed=5,
        num_inference_steps=20,
        guidance_scale=5,
    )
    captions = [f"{model}, seed {seed}" for model in ("demo", "other") for seed in (5, 6)]
    save_sheet("ensemble", [(made.image, text) for made, text in zip(job.result(), captions, strict=True)])
