"""Refiner: a second model takes over the unfinished latents, after a fifth, half and nine tenths of the steps.

Needs a worker with both: `python examples/second_model.py`, then `calotype up --model demo,other=out/other`.
Writes out/refiner.png.
"""

from sheet import save_sheet

from calotype import Client

with Client() as client:
    images = []
    for refiner in (None, *({"model": "other", "start": start} for start in (0.9, 0.5, 0.2))):
        job = client.submit(
            "a yellow heart on a blue background", refiner=refiner, seed=2, num_inference_steps=30, guidance_scale=5
        )
        caption = f"taken over at {refiner['start']}" if refiner else "by one model"
        images.append((job.result()[0].image, caption))
    save_sheet("refiner", images)
