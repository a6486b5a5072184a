"""A second model for ensemble.py and refiner.py: the bundled one with its sticker style fused into the weights.

Needs no worker. Writes the diffusers folder out/other, to be served by

    calotype up --model demo,other=out/other
"""

import torch
from diffusers import StableDiffusionPipeline

from calotype_worker.models import demo_folder

pipeline = StableDiffusionPipeline.from_pretrained(demo_folder(), torch_dtype=torch.float32, safety_checker=None)
pipeline.load_lora_weights(demo_folder().parent / "adapters", weight_name="sticker.safetensors")
pipeline.fuse_lora()
pipeline.unload_lora_weights()
pipeline.save_pretrained("out/other")
print("out/other")
