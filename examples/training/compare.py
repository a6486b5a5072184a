"""Make images without and with what was trained, from the same seeds; save a sheet and print a measurement.

    python examples/training/compare.py lora sticker.safetensors neon.safetensors --sheet sheet.png
    python examples/training/compare.py word lime.safetensors --sheet sheet.png
    python examples/training/compare.py controlnet FOLDER --sheet sheet.png

Everything goes through plain diffusers on the demo model. Captions are of combinations that the model was never
trained on; the LoRAs neither, the ControlNet's images were of any.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from draw import LIME, SCALE, free_item, mask_of, outline_of
from PIL import Image

from calotype_train.demo.checker import look
from calotype_train.demo.scenes import held_out_captions
from calotype_train.sheet import comparison
from calotype_worker.models import demo_folder

STEPS, GUIDANCE, SIDE = 20, 5.0, 128
PROMPTS = Path(__file__).with_name("prompts.txt")


def load(cls: Any = None, **parts: Any) -> Any:
    from diffusers import StableDiffusionPipeline  # noqa: PLC0415

    pipeline = (cls or StableDiffusionPipeline).from_pretrained(
        str(demo_folder()), torch_dtype=torch.float32, safety_checker=None, **parts
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def paint(pipeline: Any, prompts: Sequence[str], **options: Any) -> list[Image.Image]:
    """One 128x128 image a prompt; image i from seed i. `options` may hold a list of one `image` each."""
    made: list[Image.Image] = []
    images = options.pop("image", None)
    for begin in range(0, len(prompts), 16):
        part = list(prompts[begin : begin + 16])
        given = {} if images is None else {"image": images[begin : begin + 16]}
        made += pipeline(
            part,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            generator=[torch.Generator().manual_seed(begin + i) for i in range(len(part))],
            **given,
            **options,
        ).images
    return made


def lora(files: Sequence[Path], count: int) -> tuple[Image.Image, dict[str, object]]:
    """Shape, color and background as the checker reads them, and how much of an image is near white or near black.

    The last two are what a sticker's rim and a neon's night change.
    """
    prompts = PROMPTS.read_text().splitlines()
    wanted = [w for w in held_out_captions(4 * count) if not {"white", "black"} & {w[2], w[3]}][:count]
    pipeline = load()
    rows = {"the model": paint(pipeline, prompts)}
    measured: dict[str, object] = {"the model": _read(pipeline, wanted)}
    for file in files:
        pipeline.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=file.stem)
        pipeline.set_adapters([file.stem], [1.0])
        rows[file.stem] = paint(pipeline, prompts)
        measured[file.stem] = _read(pipeline, wanted)
    pipeline.set_adapters([files[0].stem], [0.5])
    rows[f"{files[0].stem} at half"] = paint(pipeline, prompts)
    return comparison(rows, prompts), measured


def _read(pipeline: Any, wanted: Sequence[tuple[str, str, str, str]]) -> dict[str, float]:
    images = [np.asarray(image) for image in paint(pipeline, [w[0] for w in wanted])]
    seen = [look(image) for image in images]
    truth = [w[1:] for w in wanted]
    return {
        "shape": _share(s.shape == t[0] for s, t in zip(seen, truth, strict=True)),
        "color": _share(s.color == t[1] for s, t in zip(seen, truth, strict=True)),
        "background": _share(s.background == t[2] for s, t in zip(seen, truth, strict=True)),
        "near white": round(float(np.mean([(p.min(-1) > 215).mean() for p in images])), 3),
        "near black": round(float(np.mean([(p.max(-1) < 90).mean() for p in images])), 3),
    }


def word(files: Sequence[Path], count: int) -> tuple[Image.Image, dict[str, object]]:
    """The shape's median color against the one taught: distance in RGB levels, for the new word and its neighbours."""
    shapes = ["circle", "heart", "star", "square", "diamond", "ring", "cross", "triangle"]
    grounds = ["blue", "red", "pink", "purple", "black", "white"]
    pairs = [(shape, ground) for shape in shapes for ground in grounds]
    random.Random(0).shuffle(pairs)
    pipeline = load()
    pipeline.load_textual_inversion(str(files[0]))
    measured: dict[str, object] = {"taught": LIME}
    rows = {}
    for name in ("green", "yellow", "<lime>"):
        prompts = [f"a {name} {shape} on a {ground} background" for shape, ground in pairs[:count]]
        images = paint(pipeline, prompts)
        rows[name] = images[:8]
        middles = np.array([median_color(np.asarray(image)) for image in images])
        seen = [look(np.asarray(image)).shape for image in images]
        measured[name] = {
            "median": np.median(middles, axis=0).round().astype(int).tolist(),
            "distance": round(float(np.linalg.norm(middles - LIME, axis=1).mean()), 1),
            "shape": _share(s == shape for s, (shape, _) in zip(seen, pairs, strict=False)),
        }
    return comparison(rows, [f"a … {shape} on a {ground} background" for shape, ground in pairs[:8]]), measured


def controlnet(files: Sequence[Path], count: int) -> tuple[Image.Image, dict[str, object]]:
    """Intersection over union of what stands out in the image with what the outline encloses."""
    from diffusers import ControlNetModel, StableDiffusionControlNetPipeline  # noqa: PLC0415

    net = ControlNetModel.from_pretrained(str(files[0]), torch_dtype=torch.float32, use_safetensors=True)
    rng = random.Random(123_456)
    wanted = held_out_captions(count)
    masks = []
    for _, shape, color, _ in wanted:
        item, turn = free_item(rng, SIDE, SIDE, shape=shape, color=color)
        masks.append(mask_of(item, SIDE, SIDE, turn))
    outlines = [outline_of(mask) for mask in masks]
    inside = [mask[SCALE // 2 :: SCALE, SCALE // 2 :: SCALE] for mask in masks]
    prompts = [w[0] for w in wanted]
    without = paint(load(), prompts)
    controlled = paint(load(StableDiffusionControlNetPipeline, controlnet=net), prompts, image=outlines)
    rows = {"control": outlines[:8], "without": without[:8], "with": controlled[:8]}
    measured: dict[str, object] = {}
    for name, images in (("without", without), ("with", controlled)):
        seen = [look(np.asarray(image)) for image in images]
        overlaps = [overlap(np.asarray(p), m) for p, m in zip(images, inside, strict=True)]
        measured[name] = {
            "overlap": round(float(np.mean(overlaps)), 3),
            "color": _share(s.color == w[2] for s, w in zip(seen, wanted, strict=True)),
            "background": _share(s.background == w[3] for s, w in zip(seen, wanted, strict=True)),
        }
    return comparison(rows, prompts[:8]), measured


KINDS: dict[str, Callable[[Sequence[Path], int], tuple[Image.Image, dict[str, object]]]] = {
    "lora": lora,
    "word": word,
    "controlnet": controlnet,
}


def _foreground(image: np.ndarray) -> np.ndarray:
    """bool (H, W): what differs from the color of the image's border."""
    pixels = image.astype(np.float32)
    border = np.concatenate([pixels[:3].reshape(-1, 3), pixels[-3:].reshape(-1, 3), pixels[:, :3].reshape(-1, 3)])
    return np.asarray(np.linalg.norm(pixels - np.median(border, axis=0), axis=-1) > 60)


def overlap(image: np.ndarray, mask: np.ndarray) -> float:
    seen = _foreground(image)
    return float((seen & mask).sum() / max(1, (seen | mask).sum()))


def median_color(image: np.ndarray) -> np.ndarray:
    mask = _foreground(image)
    return np.asarray(np.median(image[mask], axis=0)) if mask.any() else np.zeros(3)


def _share(hits: Any) -> float:
    found = list(hits)
    return round(sum(found) / len(found), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--sheet", type=Path, required=True)
    parser.add_argument("--count", type=int, default=48)
    options = parser.parse_args()
    sheet, measured = KINDS[options.kind](options.files, options.count)
    sheet.save(options.sheet, optimize=True)
    print(json.dumps(measured, indent=1))


if __name__ == "__main__":
    main()
