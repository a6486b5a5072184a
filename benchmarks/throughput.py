"""Images a second of the engine beside what it replaces, on one model, one device and one list of requests.

    python benchmarks/throughput.py [--model NAME=SOURCE] [--device cpu] [--requests 48] [--rounds 3]

Three ways to make the same pictures (steps 10 to 50, mixed samplers, guidance on and off):

- sequential: one plain diffusers pipeline call a request;
- static: batches of `--static-batch` requests that share a sampler and guidance, as diffusers can do it, every batch
  padded to its longest request (the pictures of shorter ones are then not those asked for: an upper bound);
- engine: everything submitted at once, batched at every step.

Rounds are interleaved, so that a busy moment of the machine hits all three; ratios are medians of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from calotype_shared.config import SamplerType
from calotype_worker.engine import Engine, EngineSettings, GenerationRequest
from calotype_worker.models import load_model, resolve_source
from calotype_worker.sampling import make_scheduler

STEPS = (10, 15, 20, 25, 30, 40, 50)
SAMPLERS = (
    SamplerType.DDIM,
    SamplerType.EULER,
    SamplerType.EULER_A,
    SamplerType.DPMPP_2M_KARRAS,
    SamplerType.UNIPC,
    SamplerType.DDPM,
)
GUIDANCE = (5.0, 7.5, 3.0, 1.0)
PROMPTS = ("a red circle on a blue background", "a large green star on a white background", "a yellow heart on black")


def requests(count: int, width: int, height: int) -> list[GenerationRequest]:
    return [
        GenerationRequest(
            request_id=f"r{i}",
            prompt=PROMPTS[i % len(PROMPTS)],
            width=width,
            height=height,
            num_inference_steps=STEPS[i * 5 % len(STEPS)],
            guidance_scale=GUIDANCE[i * 3 % len(GUIDANCE)],
            seed=i,
            sampler=SAMPLERS[i % len(SAMPLERS)],
        )
        for i in range(count)
    ]


def run_sequential(pipeline: Any, base: Any, wanted: Sequence[GenerationRequest]) -> float:
    began = time.perf_counter()
    for request in wanted:
        pipeline.scheduler = make_scheduler(request.sampler, base, request.num_inference_steps)
        pipeline(
            request.prompt,
            width=request.width,
            height=request.height,
            num_inference_steps=request.num_inference_steps,
            guidance_scale=request.guidance_scale,
            generator=torch.Generator().manual_seed(request.seed),
        )
    return time.perf_counter() - began


def run_static(pipeline: Any, base: Any, wanted: Sequence[GenerationRequest], size: int) -> float:
    """A pipeline call has one sampler, one guidance scale and one number of steps."""
    alike: dict[tuple[SamplerType, bool], list[GenerationRequest]] = defaultdict(list)
    for request in wanted:
        alike[request.sampler, request.guided].append(request)
    began = time.perf_counter()
    for (sampler, guided), group in alike.items():
        for start in range(0, len(group), size):
            batch = group[start : start + size]
            longest = max(request.num_inference_steps for request in batch)
            pipeline.scheduler = make_scheduler(sampler, base, longest)
            pipeline(
                [request.prompt for request in batch],
                width=batch[0].width,
                height=batch[0].height,
                num_inference_steps=longest,
                guidance_scale=5.0 if guided else 1.0,
                generator=[torch.Generator().manual_seed(request.seed) for request in batch],
            )
    return time.perf_counter() - began


def run_engine(engine: Engine, wanted: Sequence[GenerationRequest]) -> float:
    began = time.perf_counter()
    for future in [engine.submit(request) for request in wanted]:
        future.result()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="NAME or NAME=SOURCE")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--requests", type=int, default=36)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-rows", type=int, default=32)
    parser.add_argument("--static-batch", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/throughput.json"))
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()

    name, _, source = options.model.partition("=")
    model = load_model(name, source=source or None, device=options.device)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(
        resolve_source(name, source or None), torch_dtype=model.dtype, safety_checker=None
    ).to(options.device)
    pipeline.set_progress_bar_config(disable=True)
    engine = Engine(model, EngineSettings(max_rows=options.max_rows))
    engine.start()
    wanted = requests(options.requests, *model.card.native_sizes[0])
    ways: dict[str, Callable[[Sequence[GenerationRequest]], float]] = {
        "sequential": lambda some: run_sequential(pipeline, model.scheduler_config, some),
        "static": lambda some: run_static(pipeline, model.scheduler_config, some, options.static_batch),
        "engine": lambda some: run_engine(engine, some),
    }
    for run in ways.values():  # warm-up: kernels, tables, allocator
        run(wanted[:6])
    before = engine.stats()
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(options.rounds):
        for way, run in ways.items():
            seconds[way].append(run(wanted))
    after = engine.stats()
    engine.stop()

    ratios = {
        way: statistics.median(s / e for s, e in zip(seconds[way], seconds["engine"], strict=True)) for way in ways
    }
    mean_rows = (after.rows - before.rows) / (after.forward_passes - before.forward_passes)
    print(f"{'way':12} {'images/s':>9} {'engine is':>10}")
    for way in ways:
        rate = len(wanted) / statistics.median(seconds[way])
        print(f"{way:12} {rate:9.2f} {ratios[way]:9.2f}x")
    print(f"{len(wanted)} requests, median of {options.rounds} rounds, {mean_rows:.1f} rows a step on average")
    result = {
        "model": name,
        "requests": len(wanted),
        "rounds": options.rounds,
        "max_rows": options.max_rows,
        "static_batch": options.static_batch,
        "seconds": seconds,
        "throughput_ratio": {way: round(ratio, 3) for way, ratio in ratios.items() if way != "engine"},
        "mean_rows": round(mean_rows, 2),
        "hardware": {
            "device": options.device,
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
        },
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
