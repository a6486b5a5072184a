"""A diffusers pipeline in the engine, against plain diffusers and against the engine's own code of the same family.

    python benchmarks/pipelines.py [--requests 8] [--rounds 3]

- plain: one call of the diffusers pipeline per request;
- pipeline: the engine runs each request's own `__call__` and merges the network calls (`--run-as pipeline`);
- family: the engine's own code of the family, where it has one.

Requests of 5 to 12 steps with different seeds and prompts are asked at once. Networks have random weights: `small` ones
so little that only the host's work is left, `large` ones a few tens of millions of parameters. Times are those of the
processor, in one thread; rounds are interleaved, ratios are medians of the rounds' ratios to `family`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from workload import surroundings

from calotype_shared.schema.enums import SamplerType
from calotype_worker.engine import Engine, EngineSettings, GenerationRequest
from calotype_worker.models import load_model
from calotype_worker.models.pipeline.model import PipelineModel
from calotype_worker.models.pool import AnyModel
from tests import family_models
from tests.models import tiny_pipeline

SIDE = 64  # pixels
STEPS = (5, 8, 12, 6)
PROMPTS = ("a red circle", "a blue square", "stars", "a green heart")


def flux(layers: int, heads: int) -> Any:
    """Flux with `layers` blocks of each kind and `heads` heads of 64 channels."""
    from diffusers import FluxTransformer2DModel

    pipeline = family_models.tiny_flux()
    small = pipeline.transformer.config
    torch.manual_seed(0)
    pipeline.transformer = FluxTransformer2DModel(
        **{
            **{name: value for name, value in small.items() if not name.startswith("_")},
            "num_layers": layers,
            "num_single_layers": layers,
            "num_attention_heads": heads,
            "attention_head_dim": 64,
            "axes_dims_rope": (16, 24, 24),
        }
    )
    return pipeline


def sd3(layers: int, heads: int) -> Any:
    """Stable Diffusion 3 with `layers` blocks and `heads` heads of 64 channels."""
    from diffusers import SD3Transformer2DModel

    pipeline = family_models.tiny_sd3()
    small = pipeline.transformer.config
    torch.manual_seed(0)
    pipeline.transformer = SD3Transformer2DModel(
        **{
            **{name: value for name, value in small.items() if not name.startswith("_")},
            "num_layers": layers,
            "num_attention_heads": heads,
            "attention_head_dim": 64,
            "caption_projection_dim": 64 * heads,
        }
    )
    return pipeline


BUILDERS: Mapping[str, Callable[[], Any]] = {
    "sd, small": tiny_pipeline,
    "sd3, small": family_models.tiny_sd3,
    "flux, small": family_models.tiny_flux,
    "sd3, large": lambda: sd3(6, 8),
    "flux, large": lambda: flux(4, 8),
}


def requests_for(model: AnyModel, count: int) -> list[GenerationRequest]:
    width, height = model.card.native_sizes[0]
    return [
        GenerationRequest(
            request_id=f"r{index}",
            prompt=PROMPTS[index % len(PROMPTS)],
            width=width,
            height=height,
            num_inference_steps=STEPS[index % len(STEPS)],
            guidance_scale=1.0 if model.card.family.lower().startswith("flux") else 5.0,
            seed=index,
            sampler=SamplerType(model.card.samplers[0]),
        )
        for index in range(count)
    ]


def plainly(model: PipelineModel, requests: Sequence[GenerationRequest]) -> None:
    for request in requests:
        model.plain(request)


def by_engine(engine: Engine, requests: Sequence[GenerationRequest]) -> None:
    for future in [engine.submit(request) for request in requests]:
        future.result()


def measure(folder: Path, count: int, rounds: int) -> dict[str, Any]:
    """Processor seconds of each way in each round, and what follows from them."""
    pipeline, family = (load_model("m", source=str(folder), as_pipeline=as_one) for as_one in (True, False))
    plain = load_model("m", source=str(folder), as_pipeline=True)
    assert isinstance(pipeline, PipelineModel)
    assert isinstance(plain, PipelineModel)
    network = max(pipeline.modules.values(), key=lambda part: sum(p.numel() for p in part.parameters()))
    engines = {"pipeline": Engine(pipeline, EngineSettings()), "family": Engine(family, EngineSettings())}
    wanted = requests_for(family, count)
    ways: dict[str, Callable[[], None]] = {"plain": lambda: plainly(plain, wanted)}
    for name, engine in engines.items():
        engine.start()
        ways[name] = lambda engine=engine: by_engine(engine, wanted)  # type: ignore[misc]
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for each in ways.values():
        each()  # tables, caches, and patterns of calls that are verified when they first occur
    for _ in range(rounds):
        for name, each in ways.items():
            began = time.process_time()
            each()
            seconds[name].append(time.process_time() - began)
    for engine in engines.values():
        engine.stop()
    steps = sum(request.num_inference_steps for request in wanted)
    return {
        "parameters": sum(p.numel() for p in network.parameters()),
        "seconds": {name: [round(value, 3) for value in values] for name, values in seconds.items()},
        "ratio_to_family": {
            name: round(statistics.median(t / f for t, f in zip(values, seconds["family"], strict=True)), 3)
            for name, values in seconds.items()
        },
        "milliseconds_per_request_and_step": {
            name: round(1e3 * statistics.median(values) / steps, 2) for name, values in seconds.items()
        },
    }


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "pipelines.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    command = " ".join(["python benchmarks/pipelines.py", *arguments])
    found: dict[str, Any] = {}
    for name, build in BUILDERS.items():
        with tempfile.TemporaryDirectory() as folder:
            build().save_pretrained(folder)
            (Path(folder) / "calotype.json").write_text(json.dumps({"native_sizes": [[SIDE, SIDE]]}))
            found[name] = measure(Path(folder), options.requests, options.rounds)
        print(name, json.dumps(found[name]), flush=True)
        # After each family: the large ones take long, and a run that is stopped keeps what it has.
        results = {"command": command, **surroundings("cpu"), "families": found}
        options.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
