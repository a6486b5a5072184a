"""What the accelerations that cost likeness gain, and what they cost: docs/accelerations.md's table and image.

    python benchmarks/accelerations.py [--rounds 3] [--steps 20] [--width 80] [--side 32] [--device cpu]

Two models, each way against the exact one, in interleaved rounds; ratios are medians of the rounds' ratios:

- the bundled demo model, eight prompts made together at the knee of its profile. Likeness is measured on these:
  mean absolute error in levels of 255, PSNR, and SSIM over windows of 8x8, each the mean over the images;
- a U-Net in the shape of Stable Diffusion 1.5 with random weights, two rows of a step batch, for six steps (a whole
  number of every cache's periods). `--width` is its first level's channels, 320 in the original, `--side` its latents'.

On a CPU the clock is the process's own, of all its threads: other work on the machine disturbs it little.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from workload import quiet, surroundings

from calotype_shared.schema.enums import SamplerType
from calotype_worker.engine import Engine, EngineSettings, GenerationRequest
from calotype_worker.models import Accelerations, load_model
from calotype_worker.models.base import RowMemory, Rows
from calotype_worker.models.deep_cache import DeepCache
from calotype_worker.models.lora import LoraBank
from calotype_worker.models.quantized import quantize, weight_bytes
from calotype_worker.models.token_merging import merge_tokens

WAYS = {
    "exact": Accelerations(),
    "deep_cache 2": Accelerations(deep_cache=2),
    "deep_cache 3": Accelerations(deep_cache=3),
    "deep_cache 5": Accelerations(deep_cache=5),
    "token_merging 0.25": Accelerations(token_merging=0.25),
    "token_merging 0.5": Accelerations(token_merging=0.5),
    "quantized int8": Accelerations(quantized="int8"),
    "quantized int8-dynamic": Accelerations(quantized="int8-dynamic"),
    "deep_cache 2, token_merging 0.5, int8": Accelerations(deep_cache=2, token_merging=0.5, quantized="int8"),
}
PROMPTS = (
    "a large red circle on a blue background",
    "a large green star on a white background",
    "a small yellow heart on a black background",
    "a large purple square on a green background",
    "a large white triangle on a red background",
    "a small blue circle on a yellow background",
    "a small orange star on a purple background",
    "a large pink heart on a gray background",
)
_LABEL = 250  # pixels


def clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


def interleaved(runs: dict[str, Callable[[], object]], *, rounds: int, device: torch.device) -> dict[str, float]:
    """How many times as fast as "exact" each is; the median over rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            began = clock(device)
            run()
            seconds[name].append(clock(device) - began)
    exact = seconds["exact"]
    return {
        name: round(statistics.median(e / own for e, own in zip(exact, found, strict=True)), 2)
        for name, found in seconds.items()
    }


# ---- the demo model


def demo(options: argparse.Namespace) -> tuple[dict[str, dict[str, float]], int, dict[str, np.ndarray]]:
    """Of each way its figures; the knee; and the images, (8, H, W, 3)."""
    models = {
        name: load_model("demo", device=options.device, accelerations=accelerations)
        for name, accelerations in WAYS.items()
    }
    profiled = Engine(models["exact"], EngineSettings())
    profiled.profile(seconds=4)
    knee = profiled.profiles[0].knee.rows
    engines = {name: Engine(model, EngineSettings(max_rows=knee)) for name, model in models.items()}
    images: dict[str, np.ndarray] = {}

    def make(name: str) -> None:
        futures = [
            engines[name].submit(
                GenerationRequest(
                    request_id=str(seed),
                    prompt=prompt,
                    width=128,
                    height=128,
                    num_inference_steps=options.steps,
                    guidance_scale=4.0,
                    seed=seed,
                    sampler=SamplerType.EULER,
                )
            )
            for seed, prompt in enumerate(PROMPTS)
        ]
        images[name] = np.stack([future.result().image for future in futures])

    for engine in engines.values():
        engine.start()
    try:
        runs: dict[str, Callable[[], object]] = {name: functools.partial(make, name) for name in WAYS}
        make("exact")  # warm-up: kernels, tables, allocator
        faster = interleaved(runs, rounds=options.rounds, device=models["exact"].device)
    finally:
        for engine in engines.values():
            engine.stop()
    figures = {
        name: {
            "times_as_fast": faster[name],
            "weights": round(models[name].weight_bytes / models["exact"].weight_bytes, 2),
            **likeness(images[name], images["exact"]),
        }
        for name in WAYS
    }
    return figures, knee, images


def likeness(made: np.ndarray, exact: np.ndarray) -> dict[str, float]:
    """Images are uint8 (B, H, W, 3)."""
    a, b = made.astype(float), exact.astype(float)
    error = ((a - b) ** 2).mean(axis=(1, 2, 3))
    psnr = [min(99.0, 10 * np.log10(255**2 / max(one, 1e-9))) for one in error]
    return {
        "mean_abs_error_levels": round(float(np.abs(a - b).mean()), 2),
        "worst_image_levels": round(float(np.abs(a - b).mean(axis=(1, 2, 3)).max()), 2),
        "psnr_db": round(float(np.mean(psnr)), 1),
        "ssim": round(ssim(a, b), 4),
    }


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Structural similarity (Wang et al. 2004), of uniform windows of 8x8, mean over images and channels."""
    x, y = (torch.from_numpy(images).permute(0, 3, 1, 2) for images in (a, b))

    def mean(values: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.avg_pool2d(values, 8, stride=1)

    mx, my = mean(x), mean(y)
    vx, vy, cov = mean(x * x) - mx * mx, mean(y * y) - my * my, mean(x * y) - mx * my
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    return float((((2 * mx * my + c1) * (2 * cov + c2)) / ((mx**2 + my**2 + c1) * (vx + vy + c2))).mean())


def sheet(images: dict[str, np.ndarray], figures: dict[str, dict[str, float]]) -> Image.Image:
    """A line for each way, the exact one first: the same prompts and seeds in columns."""
    count, side = len(PROMPTS), images["exact"].shape[1]
    canvas = Image.new("RGB", (_LABEL + count * (side + 4), len(images) * (side + 4)), "white")
    draw = ImageDraw.Draw(canvas)
    for line, (name, own) in enumerate(images.items()):
        top = line * (side + 4)
        found = figures[name]
        text = name if name == "exact" else f"{name}\n{found['mean_abs_error_levels']} levels, SSIM {found['ssim']}"
        draw.multiline_text((8, top + side // 2 - 16), text.replace(", token", ",\ntoken"), fill="black", font_size=15)
        for column, image in enumerate(own):
            canvas.paste(Image.fromarray(image), (_LABEL + column * (side + 4), top))
    return canvas


# ---- a network in the shape of Stable Diffusion 1.5


class Shaped:
    """A U-Net of SD 1.5's form, with one way of making it faster, and two rows' memories."""

    def __init__(self, accelerations: Accelerations, options: argparse.Namespace) -> None:
        from diffusers import UNet2DConditionModel

        torch.manual_seed(0)
        width = options.width
        unet = UNet2DConditionModel(
            sample_size=options.side,
            block_out_channels=(width, 2 * width, 4 * width, 4 * width),
            cross_attention_dim=768,
            attention_head_dim=8,
            norm_num_groups=min(32, width // 4),
        )
        self.unet: Any = unet.eval().to(options.device, memory_format=torch.channels_last)
        device = self._device = torch.device(options.device)
        if accelerations.token_merging:
            merge_tokens(self.unet, ratio=accelerations.token_merging, name="shaped")
        if accelerations.quantized != "off":
            quantize(self.unet, accelerations.quantized, device=device, offload="none", name="shaped")
        self._cache = None
        if accelerations.deep_cache > 1:
            loras = LoraBank(None, {"unet": self.unet}, {}, capacity=1)
            self._cache = DeepCache(self.unet, every=accelerations.deep_cache, loras=loras, name="shaped")
        self._latents = torch.randn((2, 4, options.side, options.side), device=device)
        self._text = torch.randn((2, 77, 768), device=device)

    @torch.inference_mode()
    def steps(self, count: int) -> None:
        memories = [RowMemory(), RowMemory()]
        for step in range(count):
            timesteps = torch.full((2,), 900.0 - 20 * step, device=self._device)
            for memory in memories:
                memory.step = step
            rows = Rows(latents=self._latents, timesteps=timesteps, conditioning={}, memories=memories)
            inputs = (self._latents.to(memory_format=torch.channels_last), timesteps)
            network = self.unet if self._cache is None else functools.partial(self._cache, rows)
            network(*inputs, encoder_hidden_states=self._text, return_dict=False)


def shaped(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    # A period of five does not divide six.
    networks = {
        name: Shaped(accelerations, options) for name, accelerations in WAYS.items() if accelerations.deep_cache != 5
    }
    for network in networks.values():
        network.steps(1)
    runs: dict[str, Callable[[], object]] = {
        name: functools.partial(network.steps, 6) for name, network in networks.items()
    }
    faster = interleaved(runs, rounds=options.rounds, device=torch.device(options.device))
    whole = weight_bytes(networks["exact"].unet)
    return {
        name: {"times_as_fast": faster[name], "weights": round(weight_bytes(network.unet) / whole, 2)}
        for name, network in networks.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20, help="of the demo model's images")
    parser.add_argument("--width", type=int, default=80, help="channels of the shaped network's first level")
    parser.add_argument("--side", type=int, default=32, help="of the shaped network's latents")
    parser.add_argument("--only", choices=["demo", "shaped"], help="leave the other's figures in --out as they are")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/accelerations.json"))
    parser.add_argument("--sheet", type=Path, default=Path("docs/images/accelerations.png"))
    options = parser.parse_args()
    quiet()
    result: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}
    if options.only != "shaped":
        figures, knee, images = demo(options)
        result["demo"] = {"steps": options.steps, "rounds": options.rounds, "knee_rows": knee, "ways": figures}
        sheet(images, figures).save(options.sheet)
    if options.only != "demo":
        form = {"rounds": options.rounds, "width": options.width, "latents": options.side, "rows": 2}
        result["sd15_shaped"] = {**form, "ways": shaped(options)}
    result |= {"command": "benchmarks/accelerations.py", **surroundings(options.device)}
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    for name in ("demo", "sd15_shaped"):
        for way, found in result.get(name, {}).get("ways", {}).items():
            print(f"{name:12} {way:40} {'  '.join(f'{key} {value}' for key, value in found.items())}")


if __name__ == "__main__":
    main()
