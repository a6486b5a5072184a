"""The same engine without a queue: the classes of the founding document.

Needs nothing but `pip install 'calotype[worker]'`. Writes out/in_process.png.
"""

import numpy as np
from sheet import save_sheet

from calotype_worker import DiffusionModel, DiffusionPipeline, GenerationConfig

model = DiffusionModel()
config = GenerationConfig(prompt="a red circle on a blue background", num_inference_steps=20, guidance_scale=5, seed=42)
first = model.generate(config)
batch = model.generate_batch(
    ["a green star on a white background", "a white cross on a black background"], num_inference_steps=20, seed=1
)
changed = model.image_to_image(
    "a green circle on a blue background", first.image_data, strength=0.7, num_inference_steps=30, seed=1
)
mask = np.zeros(first.image_data.shape[:2])
mask[:, 64:] = 1
painted = model.inpaint("a yellow square on a blue background", first.image_data, mask, num_inference_steps=30, seed=1)
fast = DiffusionPipeline(model).get_optimal_config("fast")
fast.prompt = "a purple diamond on an orange background"
fast.seed = 3
made = [first, *batch, changed, painted, model.generate(fast)]
names = ["generate", "generate_batch", "generate_batch", "image_to_image", "inpaint", "the fast preset"]
save_sheet("in_process", [(one.image, f"{name}: {one.prompt}") for one, name in zip(made, names, strict=True)])
