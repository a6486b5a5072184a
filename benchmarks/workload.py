"""What the speed benchmarks share: the requests, and plain diffusers as everybody else runs it.

Steps from 10 to 50, six samplers, guidance of three scales and off: what users of one model send at the same time.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import platform
import time
import warnings
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from calotype_worker.threads import wait_briefly

wait_briefly()  # for every way alike, and for the processes that are started from here

import diffusers  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

from calotype_shared.schema.enums import SamplerType  # noqa: E402
from calotype_worker.models import load_model, resolve_source  # noqa: E402
from calotype_worker.sampling import make_scheduler  # noqa: E402

STEPS = (10, 15, 20, 25, 30, 40, 50)
SAMPLERS = ("ddim", "euler", "euler_a", "dpmpp_2m_karras", "unipc", "ddpm")
GUIDANCE = (5.0, 7.5, 3.0, 1.0)
PROMPTS = ("a red circle on a blue background", "a large green star on a white background", "a yellow heart on black")

KINDS = math.lcm(len(SAMPLERS), len(STEPS))  # requests after which a workload brings nothing new to a sampler


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """One image, as plain data: it goes to other processes."""

    prompt: str
    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float
    sampler: str
    seed: int


BATCH = 8  # requests of a static batch
WARM_UP = Wanted(
    prompt="a warm-up",
    width=128,
    height=128,
    num_inference_steps=2,
    guidance_scale=5.0,
    sampler="ddim",
    seed=0,
)


def workload(count: int, width: int, height: int, *, start: int = 0) -> list[Wanted]:
    return [
        Wanted(
            prompt=PROMPTS[i % len(PROMPTS)],
            width=width,
            height=height,
            num_inference_steps=STEPS[i * 5 % len(STEPS)],
            guidance_scale=GUIDANCE[i * 3 % len(GUIDANCE)],
            seed=i,
            sampler=SAMPLERS[i % len(SAMPLERS)],
        )
        for i in range(start, start + count)
    ]


class Plain:
    """A diffusers pipeline. A call has one sampler, one guidance scale and one number of steps."""

    def __init__(self, model: str, *, device: str = "cpu") -> None:
        """`model` is NAME or NAME=SOURCE."""
        quiet()
        name, _, source = model.partition("=")
        loaded: Any = load_model(name, source=source or None, device=device)  # for its scheduler's config and its size
        self.base = loaded.scheduler_config
        self.size: tuple[int, int] = loaded.card.native_sizes[0]
        self._pipeline = diffusers.DiffusionPipeline.from_pretrained(
            resolve_source(name, source or None), torch_dtype=loaded.dtype, safety_checker=None
        ).to(device)
        self._pipeline.set_progress_bar_config(disable=True)

    def one(self, wanted: Wanted) -> Any:
        return self._call([wanted], wanted.sampler, wanted.num_inference_steps, wanted.guidance_scale)[0]

    def many(self, wanted: Sequence[Wanted], *, size: int) -> list[Any]:
        """Batches of at most `size` that share a sampler and whether they are guided, each padded to its longest.

        The images of shorter ones, and of all but one guidance scale, are then not those that were asked for: an
        upper bound of what static batches can do.
        """
        alike: dict[tuple[str, bool], list[int]] = defaultdict(list)
        for index, each in enumerate(wanted):
            alike[each.sampler, each.guidance_scale > 1].append(index)
        found: list[Any] = [None] * len(wanted)
        for (sampler, guided), indices in alike.items():
            for start in range(0, len(indices), size):
                batch = indices[start : start + size]
                longest = max(wanted[index].num_inference_steps for index in batch)
                images = self._call([wanted[i] for i in batch], sampler, longest, 5.0 if guided else 1.0)
                for index, image in zip(batch, images, strict=True):
                    found[index] = image
        return found

    def _call(self, batch: Sequence[Wanted], sampler: str, steps: int, guidance: float) -> list[Any]:
        self._pipeline.scheduler = make_scheduler(SamplerType(sampler), self.base, steps)
        images: list[Any] = self._pipeline(
            [each.prompt for each in batch],
            width=batch[0].width,
            height=batch[0].height,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=[torch.Generator().manual_seed(each.seed) for each in batch],
        ).images
        return images


class PlainElsewhere:
    """`Plain` in a process of its own, as its users have it: no other thread computes there."""

    def __init__(self, model: str, *, device: str = "cpu") -> None:
        spawn = multiprocessing.get_context("spawn")
        self._process = ProcessPoolExecutor(1, mp_context=spawn, initializer=_load, initargs=(model, device))

    def one_by_one(self, wanted: Sequence[Wanted]) -> None:
        self._process.submit(_one_by_one, wanted).result()

    def many(self, wanted: Sequence[Wanted], *, size: int) -> None:
        self._process.submit(_many, wanted, size).result()

    def stop(self) -> None:
        self._process.shutdown()


_plain: Plain | None = None  # of such a process


def _load(model: str, device: str) -> None:
    global _plain  # noqa: PLW0603
    _plain = Plain(model, device=device)


def _one_by_one(wanted: Sequence[Wanted]) -> None:
    assert _plain is not None
    for each in wanted:
        _plain.one(each)


def _many(wanted: Sequence[Wanted], size: int) -> None:
    assert _plain is not None
    _plain.many(wanted, size=size)


def quiet() -> None:
    warnings.filterwarnings("ignore")
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def surroundings(device: str) -> dict[str, Any]:
    """Hardware and versions, for results."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        processor = platform.processor() or platform.machine()
    hardware = {"device": device, "processor": processor, "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if device.startswith("cuda"):
        hardware["gpu"] = torch.cuda.get_device_name(device)
    packages = ("torch", "diffusers", "transformers", "celery", "redis", "litserve", "celery-batches")
    versions = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = version(package)
        except ImportError:
            continue
    return {"date": time.strftime("%Y-%m-%d"), "hardware": hardware, "versions": versions}
