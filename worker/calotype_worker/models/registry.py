"""Finds and loads models by name. Requests contain only a name; the operator decides what it refers to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from calotype_shared.errors import ModelLoadError
from calotype_shared.schema.model_card import ModelCard
from calotype_worker.models.accelerations import EXACT, Accelerations
from calotype_worker.models.autoencoder import check_autoencoder, factor_of
from calotype_worker.models.defaults import defaults_of
from calotype_worker.models.flux import Flux
from calotype_worker.models.latent import Adapters, LatentModel, Memory, Setup
from calotype_worker.models.notes import Notes, read_notes
from calotype_worker.models.parts import load_parts
from calotype_worker.models.pipeline.controls import PART, attach, load_controls, names_of
from calotype_worker.models.pipeline.loading import class_of, is_modular, load_pipeline, names_part
from calotype_worker.models.pipeline.model import PipelineModel
from calotype_worker.models.pool import AnyModel
from calotype_worker.models.sd import StableDiffusion
from calotype_worker.models.sd3 import StableDiffusion3
from calotype_worker.models.sdxl import StableDiffusionXL
from calotype_worker.models.single_file import load_single_file
from calotype_worker.models.source import UNREAD, Located, locate
from calotype_worker.models.text_check import check_text

# `_class_name` in a folder's model_index.json -> the family and the adapter that runs it.
FAMILIES: dict[str, tuple[str, type[LatentModel]]] = {
    "StableDiffusionPipeline": ("sd", StableDiffusion),
    "StableDiffusionInpaintPipeline": ("sd", StableDiffusion),
    "StableDiffusionImg2ImgPipeline": ("sd", StableDiffusion),
    "LatentConsistencyModelPipeline": ("sd", StableDiffusion),
    "StableDiffusionXLPipeline": ("sdxl", StableDiffusionXL),
    "StableDiffusionXLImg2ImgPipeline": ("sdxl", StableDiffusionXL),  # the refiner
    "StableDiffusionXLInpaintPipeline": ("sdxl", StableDiffusionXL),
    "StableDiffusion3Pipeline": ("sd3", StableDiffusion3),
    "FluxPipeline": ("flux", Flux),
}

# Images larger than this multiple of the native area are refused: memory and quality do not allow them.
_AREA_LIMIT = 4

DTYPES: Mapping[str, torch.dtype] = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def demo_folder() -> Path:
    """The folder of the bundled model."""
    return Path(str(resources.files("calotype_worker") / "assets" / "demo"))


def bundled_adapters() -> Adapters:
    """The bundled model's additions: two style LoRAs, a textual inversion, an outline ControlNet (docs/training.md)."""
    folder = demo_folder().parent / "adapters"
    return Adapters(
        loras={name: folder / f"{name}.safetensors" for name in ("neon", "sticker")},
        embeddings={"<lime>": folder / "lime.safetensors"},
        controls={"outline": str(folder / "outline")},
    )


def with_bundled(adapters: Adapters) -> Adapters:
    """The bundled ones, overridden by these."""
    own = bundled_adapters()
    return replace(
        adapters,
        loras={**own.loras, **adapters.loras},
        embeddings={**own.embeddings, **adapters.embeddings},
        controls={**own.controls, **adapters.controls},
    )


def resolve_source(name: str, source: str | None) -> str:
    """What a model name refers to: a diffusers folder or a hub id.

    Raises:
        ModelLoadError: no source was given and the name is not the bundled model's.
    """
    if source:
        return source
    if name == "demo":
        return str(demo_folder())
    raise ModelLoadError(
        f"model {name!r}: it has no source; give one as --model {name}=FOLDER or --model {name}=OWNER/NAME"
    )


def default_dtype(device: torch.device) -> torch.dtype:
    """float32 on a CPU, so that images equal those of plain diffusers; bfloat16 on a GPU that supports it."""
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def load_model(
    name: str,
    *,
    source: str | None = None,
    device: str = "cpu",
    dtype: str | None = None,
    adapters: Adapters | None = None,
    memory: Memory | None = None,
    accelerations: Accelerations = EXACT,
    as_pipeline: bool = False,
    merging: bool = True,
    variant: str | None = None,
) -> AnyModel:
    """Load a model onto a device, with the LoRAs, textual inversions and ControlNets that were registered for it.

    A source is a folder, a hub id or a checkpoint file; `CLASS:SOURCE` runs it as that pipeline class of diffusers.
    `as_pipeline` runs it as a diffusers pipeline even if Calotype has its own implementation of the family. Without
    `merging`, network calls of a pipeline always run alone, with the bits of plain diffusers. Of a part with weights in
    several variants, `variant` is loaded, such as fp16.

    Raises:
        ModelLoadError: the device does not exist, the source is missing or broken, its weights are pickled, or its
            family is not supported. The message names the cause and the remedy.
    """
    torch_device = _device(device)
    torch_dtype = DTYPES[dtype] if dtype else default_dtype(torch_device)
    by_steps = () if as_pipeline else tuple(FAMILIES)
    located = locate(name, resolve_source(name, source), by_steps=by_steps, variant=variant)
    notes = read_notes(name, located.path)
    named = located.named_class
    adapters, memory = adapters or Adapters(), memory or Memory()
    if located.single_file:
        pipeline = load_single_file(name, located.path, torch_dtype)
    else:
        pipeline = _pipeline(name, located, torch_dtype, as_pipeline=as_pipeline, controls=adapters.controls)
    version = located.version()
    class_name = type(pipeline).__name__
    if named is not None or as_pipeline or class_name not in FAMILIES:
        if adapters.controls and not names_of(pipeline):
            raise ModelLoadError(
                f"model {name!r}: --control is not possible with this source; give a folder and a pipeline class "
                f"that has a ControlNet, as --model {name}=CLASS:FOLDER"
            )
        if accelerations != EXACT:
            raise ModelLoadError(
                f"model {name!r}: {class_name} runs by its own pipeline, without accelerations; leave out --deep-cache "
                "and the like"
            )
        check_text(name, pipeline, required=False)
        model = PipelineModel(
            pipeline,
            name=name,
            version=version,
            device=torch_device,
            dtype=torch_dtype,
            notes=notes.model_dump(exclude_none=True),
            merging=merging,
            memory=memory,
            adapters=adapters,
        )
        model.card = notes.applied(model.card, name=name)
        return model
    check_text(name, pipeline)
    family, adapter = FAMILIES[class_name]
    if source is None:
        adapters = with_bundled(adapters)
    card = latent_card(name, family, adapter, pipeline, notes=notes, version=version, adapters=adapters)
    build: Any = adapter  # each family finds its network and encoders in the pipeline
    setup = Setup(
        card=card,
        device=torch_device,
        dtype=torch_dtype,
        adapters=adapters,
        memory=memory,
        accelerations=accelerations,
    )
    made: AnyModel = build(pipeline, setup)
    return made


def _device(device: str) -> torch.device:
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ModelLoadError(f"device {device!r} is not a device; use cpu or cuda:0") from error
    if found.type == "cuda" and not (torch.cuda.is_available() and (found.index or 0) < torch.cuda.device_count()):
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        raise ModelLoadError(f"device {device!r} does not exist: torch sees {count} CUDA devices; use --device cpu")
    if found.type not in ("cpu", "cuda"):
        raise ModelLoadError(f"device {device!r} is not supported; use cpu or cuda:0")
    return found


def _pipeline(
    name: str, located: Located, dtype: torch.dtype, *, as_pipeline: bool, controls: Mapping[str, str]
) -> Any:
    """The diffusers pipeline on the CPU; the adapter moves its parts to the device."""
    named, layout, location = located.named_class, located.layout, str(located.path)
    class_name = named or class_of(name, located.path)
    if layout is not None and class_name in FAMILIES and named is None and not as_pipeline:
        parts = load_parts(name, layout, dtype)
        return load_pipeline(name, location, class_name=class_name, dtype=dtype, left_out=UNREAD, further=parts)
    nets = load_controls(name, class_name, controls, dtype=dtype, has_own=names_part(located.path, PART))
    further = {} if layout is None or is_modular(class_name) else load_parts(name, layout, dtype)
    further |= {PART: next(iter(nets.values()))} if nets else {}
    pipeline = load_pipeline(name, location, class_name=named, dtype=dtype, further=further)
    attach(pipeline, nets)
    return pipeline


def latent_card(
    name: str,
    family: str,
    adapter: type[LatentModel],
    pipeline: Any,
    *,
    notes: Notes,
    version: str,
    adapters: Adapters,
) -> ModelCard:
    """The card of a model that can be stepped, from its pipeline's own configs and the operator's notes."""
    check_autoencoder(pipeline.vae, name=name)
    factor = factor_of(pipeline.vae)
    network = getattr(pipeline, "unet", None) or pipeline.transformer
    # Flux' network does not state its native size; its pipeline does.
    side = int(getattr(network.config, "sample_size", None) or pipeline.default_sample_size) * factor
    native = notes.native_sizes or ((side, side),)
    tokenizer = pipeline.tokenizer or pipeline.tokenizer_2  # a refiner has only the second
    samplers = adapter.samplers_for(pipeline)
    if not samplers:
        raise ModelLoadError(
            f"model {name!r}: its scheduler {type(pipeline.scheduler).__name__} has noise levels that no sampler of "
            f"{family} models follows; replace scheduler/ by the one that the model was trained with, or run the model "
            "by its own pipeline with --run-as pipeline"
        )
    card = ModelCard(
        name=name,
        family=family,
        version=version,
        size_multiple=factor * adapter.size_factor,
        native_sizes=native,
        max_pixels=notes.max_pixels or _AREA_LIMIT * max(w * h for w, h in native),
        max_prompt_tokens=int(tokenizer.model_max_length),
        samplers=tuple(sampler.value for sampler in samplers),
        features=frozenset(feature.value for feature in adapter.features_of(pipeline, adapters)),
        loras=tuple(sorted(adapters.loras)),
        controls=tuple(sorted(adapters.controls)),
        embeddings=tuple(sorted(adapters.embeddings)),
        description=notes.description,
        **defaults_of(pipeline, samplers),
    )
    return notes.applied(card, name=name)
