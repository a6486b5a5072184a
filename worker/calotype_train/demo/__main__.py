"""Train, export and score the demo model.

    python -m calotype_train.demo train --work FOLDER --out FOLDER [--vae-minutes 10 --unet-minutes 60]
    python -m calotype_train.demo score FOLDER [--sheet FILE.png]

Training is bounded by wall-clock minutes, writes checkpoints and sample sheets into --work as it runs, and resumes
from them when started again.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from calotype_train.demo.denoiser import (
    DenoiserTraining,
    Latents,
    build_text_encoder,
    build_unet,
    encode_scenes,
)
from calotype_train.demo.export import export
from calotype_train.demo.scenes import held_out_captions
from calotype_train.demo.score import load_pipeline, sample, score, sheet
from calotype_train.demo.tokenizer import build_tokenizer
from calotype_train.demo.vae import build_vae, measure, train_vae


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m calotype_train.demo", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train from nothing, or go on from --work")
    train.add_argument("--work", type=Path, required=True, help="checkpoints, log and sample sheets")
    train.add_argument("--out", type=Path, required=True, help="the model folder to write")
    train.add_argument("--vae-minutes", type=float, default=10.0)
    train.add_argument("--unet-minutes", type=float, default=60.0)
    train.add_argument("--rows", type=int, default=32, help="rows of a U-Net training batch")
    train.add_argument("--data-share", type=float, default=1.0, help="share of the training scenes to draw")
    train.add_argument("--device", default="cpu")
    train.add_argument("--threads", type=int, default=torch.get_num_threads())
    train.add_argument("--seed", type=int, default=0)
    judge = commands.add_parser("score", help="score a model folder on held-out captions")
    judge.add_argument("folder", type=Path)
    judge.add_argument("--count", type=int, default=200)
    judge.add_argument("--steps", type=int, default=20)
    judge.add_argument("--guidance", type=float, default=5.0)
    judge.add_argument("--sheet", type=Path)
    options = parser.parse_args()
    if options.command == "train":
        run_training(options)
    else:
        shares, judged = score(options.folder, count=options.count, steps=options.steps, guidance=options.guidance)
        print(json.dumps(shares))
        if options.sheet:
            sheet(judged[:64]).save(options.sheet)


def run_training(options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    options.work.mkdir(parents=True, exist_ok=True)
    device = torch.device(options.device)
    log = _logger(options.work / "log.jsonl")
    vae, quality = _autoencoder(options, device, log)
    tokenizer = build_tokenizer(seed=options.seed)
    scale = 1 / quality["latent_std"]
    vae.register_to_config(scaling_factor=scale)
    data = encode_scenes(
        vae, tokenizer, scale=scale, share=options.data_share, device=device, seed=options.seed, cache=options.work
    )
    training = DenoiserTraining(
        build_unet(),
        build_text_encoder(len(tokenizer), start=tokenizer.bos_token_id, end=tokenizer.eos_token_id),
        tokenizer,
        device=device,
        seed=options.seed,
    )
    checkpoint = options.work / "denoiser.pt"
    if checkpoint.exists():
        training.resume(checkpoint)

    def write(folder: Path) -> None:
        unet, text_encoder = training.averaged()
        notes = {"training": {"steps": training.step, "rows": options.rows, "minutes": round(training.seconds / 60, 1)}}
        export(
            folder,
            vae=build_copy(vae),
            unet=unet,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            notes=notes | {"vae": {k: round(v, 3) for k, v in quality.items()}},
        )

    _train_denoiser(training, data, options, log=log, checkpoint=checkpoint, write=write)
    write(options.out)
    log({"written": 1.0, "steps": float(training.step)})


def _autoencoder(
    options: argparse.Namespace, device: torch.device, log: Callable[[dict[str, float]], None]
) -> tuple[Any, dict[str, float]]:
    """The trained autoencoder: from an earlier part of this run, or trained now."""
    from diffusers import AutoencoderKL  # noqa: PLC0415

    folder = options.work / "vae"
    if folder.exists():
        vae = AutoencoderKL.from_pretrained(str(folder)).to(device)
    else:
        vae = build_vae()
        began = time.monotonic()
        minutes = max(options.vae_minutes, 1e-6)
        train_vae(
            vae,
            share_done=lambda: (time.monotonic() - began) / 60 / minutes,
            device=device,
            seed=options.seed + 1,
            log=log,
        )
        vae.save_pretrained(folder)
    quality = measure(vae, device=device)
    log(quality)
    return vae.eval(), quality


def _train_denoiser(
    training: DenoiserTraining,
    data: Latents,
    options: argparse.Namespace,
    *,
    log: Callable[[dict[str, float]], None],
    checkpoint: Path,
    write: Callable[[Path], None],
) -> None:
    """Steps until the minutes are used up; a checkpoint every minute, a sample sheet every eight."""
    budget = options.unet_minutes * 60
    losses: list[float] = []
    saved = shown = training.seconds
    while training.seconds < budget:
        began = time.monotonic()
        losses.append(training.train_step(data, rows=options.rows, share=training.seconds / budget))
        training.seconds += time.monotonic() - began
        if training.step % 100 == 0:
            log({"step": training.step, "loss": sum(losses) / len(losses), "minutes": training.seconds / 60})
            losses.clear()
        if training.seconds - saved > 60:
            training.save(checkpoint)
            saved = training.seconds
        if training.seconds - shown > 8 * 60:
            write(options.work / "preview")
            show(options.work / "preview", options.work / f"sheet-{training.step:06d}.png")
            shown = training.seconds
    training.save(checkpoint)


def show(folder: Path, path: Path, count: int = 32) -> None:
    """A sheet of images of held-out captions, for visual inspection."""
    captions = [wanted[0] for wanted in held_out_captions(count)]
    images = sample(load_pipeline(folder), captions, steps=20, guidance=5.0, seed=7)
    sheet([(caption, image, True) for caption, image in zip(captions, images, strict=True)]).save(path)


def build_copy(vae: Any) -> Any:
    """A copy of the autoencoder on the CPU, so that export can change its precision."""
    return copy.deepcopy(vae).cpu()


def _logger(path: Path) -> Callable[[dict[str, float]], None]:
    began = time.monotonic()

    def log(values: dict[str, float]) -> None:
        line = json.dumps(
            {"seconds": round(time.monotonic() - began, 1)}
            | {k: round(v, 5) if isinstance(v, float) else v for k, v in values.items()}
        )
        print(line, flush=True)
        with path.open("a") as file:
            file.write(line + "\n")

    return log


if __name__ == "__main__":
    main()
