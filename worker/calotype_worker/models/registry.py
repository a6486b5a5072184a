"""Finds and loads models by name. A request carries a name only; the operator decides what it stands for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from calotype_shared.errors import ModelLoadError
from calotype_shared.schema.model_card import ModelCard
from calotype_worker.models.accelerations import EXACT, Accelerations
from calotype_worker.models.flux import Flux
from calotype_worker.models.latent import Adapters, LatentModel, Memory, Setup
from calotype_worker.models.opaque import OPAQUE, opaque_card
from calotype_worker.models.pool import AnyModel
from calotype_worker.models.sd import StableDiffusion
from calotype_worker.models.sd3 import StableDiffusion3
from calotype_worker.models.sdxl import StableDiffusionXL
from calotype_worker.models.single_file import is_single_file, load_single_file
from calotype_worker.sampling.samplers import sampler_of

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

# Images above this many times the native area are refused: memory and quality both give way.
_AREA_LIMIT = 4

DTYPES: Mapping[str, torch.dtype] = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def demo_folder() -> Path:
    """The folder of the model that comes with the package."""
    return Path(str(resources.files("calotype_worker") / "assets" / "demo"))


def bundled_adapters() -> Adapters:
    """What comes with the bundled model: two style LoRAs, a learned word, an outline ControlNet (docs/training.md)."""
    folder = demo_folder().parent / "adapters"
    return Adapters(
        loras={name: folder / f"{name}.safetensors" for name in ("neon", "sticker")},
        embeddings={"<lime>": folder / "lime.safetensors"},
        controls={"outline": str(folder / "outline")},
    )


def with_bundled(adapters: Adapters) -> Adapters:
    """The bundled ones, and these over them."""
    own = bundled_adapters()
    return replace(
        adapters,
        loras={**own.loras, **adapters.loras},
        embeddings={**own.embeddings, **adapters.embeddings},
        controls={**own.controls, **adapters.controls},
    )


def resolve_source(name: str, source: str | None) -> str:
    """What a model name stands for: a diffusers folder or a hub id.

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
    """float32 on a CPU, where images are then those of plain diffusers; bfloat16 on a GPU that has it."""
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
) -> AnyModel:
    """Load a model onto a device, with the LoRAs, textual inversions and ControlNets that were registered for it.

    Raises:
        ModelLoadError: the device is not there, the source is missing or broken, its weights are pickled, or its
            family is not supported. Each says which and what to do.
    """
    torch_device = _device(device)
    torch_dtype = DTYPES[dtype] if dtype else default_dtype(torch_device)
    location = resolve_source(name, source)
    folder = Path(location)
    if is_single_file(location):
        pipeline = load_single_file(name, folder, torch_dtype)
    elif folder.is_dir():
        _check_folder(name, folder)
        pipeline = _pipeline(name, location, torch_dtype)
    elif folder.is_absolute() or location.startswith("."):
        raise ModelLoadError(f"model {name!r}: folder {location!r} does not exist; check the path after '='")
    else:
        pipeline = _pipeline(name, location, torch_dtype)
    adapters, memory = adapters or Adapters(), memory or Memory()
    notes, version = _notes(folder), _version(folder, location)
    class_name = type(pipeline).__name__
    if class_name in OPAQUE:
        if adapters != Adapters() or memory != Memory() or accelerations != EXACT:
            raise ModelLoadError(
                f"model {name!r}: {class_name} cannot be stepped and supports no adapters, memory settings or "
                "accelerations; leave out --lora, --embedding, --control, --offload, --deep-cache and the like, or "
                "register them for another model"
            )
        card = opaque_card(name, pipeline, notes, version)
        return OPAQUE[class_name](pipeline, card=card, device=torch_device, dtype=torch_dtype)  # type: ignore[call-arg]
    family, adapter = FAMILIES[class_name]
    if source is None:
        adapters = with_bundled(adapters)
    card = latent_card(name, family, adapter, pipeline, notes=notes, version=version, adapters=adapters)
    build: Any = adapter  # each family finds its network and encoders in the pipeline
    model: AnyModel = build(
        pipeline,
        Setup(
            card=card,
            device=torch_device,
            dtype=torch_dtype,
            adapters=adapters,
            memory=memory,
            accelerations=accelerations,
        ),
    )
    return model


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


def _check_folder(name: str, folder: Path) -> None:
    index = folder / "model_index.json"
    try:
        class_name = json.loads(index.read_text())["_class_name"]
    except FileNotFoundError as error:
        raise ModelLoadError(
            f"model {name!r}: {str(folder)!r} has no model_index.json; give the folder of a complete diffusers pipeline"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise ModelLoadError(f"model {name!r}: {str(index)!r} is not readable as JSON with a _class_name") from error
    _check_family(name, class_name)
    for part in sorted(path.parent for path in folder.glob("*/config.json")):  # every part with weights has one
        if not list(part.glob("*.safetensors")):
            remedy = (
                "only a pickle, which Calotype never opens; convert it with diffusers' "
                "save_pretrained(..., safe_serialization=True)"
                if list(part.glob("*.bin"))
                else "none; download or save the whole pipeline again"
            )
            raise ModelLoadError(f"model {name!r}: {part.name}/ should hold safetensors weights but holds {remedy}")


def _check_family(name: str, class_name: str) -> None:
    if class_name not in FAMILIES and class_name not in OPAQUE:
        supported = ", ".join([*FAMILIES, *OPAQUE])
        raise ModelLoadError(f"model {name!r}: pipeline class {class_name!r} is not supported; supported: {supported}")


def _pipeline(name: str, location: str, dtype: torch.dtype) -> Any:
    """The diffusers pipeline on the CPU, without safety checker; the adapter moves its parts to the device."""
    import diffusers  # noqa: PLC0415 - takes seconds, and the checks above need none of it

    # Those that a family does not know are ignored.
    left_out = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    left_out |= _absent_parts(Path(location))
    try:
        pipeline = diffusers.DiffusionPipeline.from_pretrained(
            location,
            torch_dtype=dtype,
            use_safetensors=True,
            **left_out,
        )
    except Exception as error:
        # from_pretrained raises almost anything for a broken folder: OSError, KeyError, safetensors' own errors.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelLoadError(
            f"model {name!r}: {location!r} could not be loaded: {reason}; "
            "check that the folder or hub id is a complete diffusers pipeline with safetensors weights"
        ) from error
    _check_family(name, type(pipeline).__name__)
    return pipeline


def _absent_parts(folder: Path) -> dict[str, None]:
    """Parts that a folder says it does without, such as Stable Diffusion 3's T5: diffusers wants that said again."""
    index = folder / "model_index.json"
    if not index.is_file():
        return {}
    return {part: None for part, kind in json.loads(index.read_text()).items() if kind == [None, None]}


def _notes(folder: Path) -> dict[str, Any]:
    """What an operator says of a model in its folder's calotype.json: native_sizes, max_pixels, description."""
    own = folder.with_suffix("") / "calotype.json" if folder.is_file() else folder / "calotype.json"
    notes: dict[str, Any] = json.loads(own.read_text()) if own.is_file() else {}
    return notes


def latent_card(
    name: str,
    family: str,
    adapter: type[LatentModel],
    pipeline: Any,
    *,
    notes: Mapping[str, Any],
    version: str,
    adapters: Adapters,
) -> ModelCard:
    """The card of a model that can be stepped, from its pipeline's own configs and the operator's notes."""
    factor = 2 ** (len(pipeline.vae.config.block_out_channels) - 1)
    network = getattr(pipeline, "unet", None) or pipeline.transformer
    # Flux' network does not say its size; its pipeline does.
    side = int(getattr(network.config, "sample_size", None) or pipeline.default_sample_size) * factor
    native = tuple((int(w), int(h)) for w, h in notes.get("native_sizes", [(side, side)]))
    tokenizer = pipeline.tokenizer or pipeline.tokenizer_2  # a refiner has only the second
    samplers = adapter.samplers_for(pipeline)
    own_sampler = sampler_of(pipeline.scheduler, samplers)
    return ModelCard(
        name=name,
        family=family,
        version=version,
        size_multiple=factor * adapter.size_factor,
        native_sizes=native,
        max_pixels=int(notes.get("max_pixels", _AREA_LIMIT * max(w * h for w, h in native))),
        max_prompt_tokens=int(tokenizer.model_max_length),
        samplers=tuple(s.value for s in sorted(samplers, key=lambda sampler: sampler is not own_sampler)),
        features=frozenset(feature.value for feature in adapter.features_of(pipeline, adapters)),
        loras=tuple(sorted(adapters.loras)),
        controls=tuple(sorted(adapters.controls)),
        embeddings=tuple(sorted(adapters.embeddings)),
        description=str(notes.get("description", "")),
    )


def _version(source: Path, location: str) -> str:
    """Identifies the weights: a hash of a checkpoint file or of every one in a folder, or the hub id itself."""
    if not source.exists():
        return location
    digest = hashlib.sha256()
    for path in [source] if source.is_file() else sorted(source.rglob("*.safetensors")):
        digest.update(path.relative_to(source).as_posix().encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return f"sha256:{digest.hexdigest()[:16]}"
