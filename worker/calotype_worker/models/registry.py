"""Finds and loads models by name. A request carries a name only; the operator decides what it stands for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from calotype_shared.errors import ModelLoadError
from calotype_shared.model_card import ModelCard
from calotype_worker.models.latent import Adapters, LatentModel, Memory
from calotype_worker.models.pool import AnyModel
from calotype_worker.models.sd import StableDiffusion
from calotype_worker.sampling.samplers import sampler_of

# `_class_name` in a folder's model_index.json -> the family and the adapter that runs it.
FAMILIES: dict[str, tuple[str, Callable[..., AnyModel]]] = {
    "StableDiffusionPipeline": ("sd", StableDiffusion),
    "StableDiffusionInpaintPipeline": ("sd", StableDiffusion),
    "StableDiffusionImg2ImgPipeline": ("sd", StableDiffusion),
    "LatentConsistencyModelPipeline": ("sd", StableDiffusion),
}

# Pictures above this many times the native area are refused: memory and quality both give way.
_AREA_LIMIT = 4

DTYPES: Mapping[str, torch.dtype] = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def demo_folder() -> Path:
    """The folder of the model that comes with the package."""
    return Path(str(resources.files("calotype_worker") / "assets" / "demo"))


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
        f"model {name!r}: no source is known for it; give one as --model {name}=FOLDER or --model {name}=OWNER/NAME"
    )


def default_dtype(device: torch.device) -> torch.dtype:
    """float32 on a CPU, where pictures are then those of plain diffusers; bfloat16 on a GPU that has it."""
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
    if folder.is_dir():
        _check_folder(name, folder)
    elif folder.is_absolute() or location.startswith("."):
        raise ModelLoadError(f"model {name!r}: folder {location!r} does not exist; check the path after '='")
    pipeline = _pipeline(name, location, torch_dtype)
    family, adapter = FAMILIES[type(pipeline).__name__]
    adapters = adapters or Adapters()
    card = _card(
        name,
        family,
        pipeline,
        folder=folder if folder.is_dir() else None,
        location=location,
        adapters=adapters,
        adapter=adapter,
    )
    return adapter(
        pipeline, card=card, device=torch_device, dtype=torch_dtype, adapters=adapters, memory=memory or Memory()
    )


def _device(device: str) -> torch.device:
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ModelLoadError(f"device {device!r} is not a device; use cpu or cuda:0") from error
    if found.type == "cuda" and not (torch.cuda.is_available() and (found.index or 0) < torch.cuda.device_count()):
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        raise ModelLoadError(f"device {device!r} is not there: torch sees {count} CUDA devices; use --device cpu")
    if found.type not in ("cpu", "cuda"):
        raise ModelLoadError(f"device {device!r} is not supported; use cpu or cuda:0")
    return found


def _check_folder(name: str, folder: Path) -> None:
    index = folder / "model_index.json"
    try:
        class_name = json.loads(index.read_text())["_class_name"]
    except FileNotFoundError as error:
        raise ModelLoadError(
            f"model {name!r}: {str(folder)!r} has no model_index.json; give the folder of a whole diffusers pipeline"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise ModelLoadError(f"model {name!r}: {str(index)!r} is not readable as JSON with a _class_name") from error
    _check_family(name, class_name)
    for part in ("unet", "vae", "text_encoder"):
        if not list((folder / part).glob("*.safetensors")):
            pickled = list((folder / part).glob("*.bin"))
            remedy = (
                "only a pickle, which Calotype never opens; convert it with diffusers' "
                "save_pretrained(..., safe_serialization=True)"
                if pickled
                else "none; download or save the whole pipeline again"
            )
            raise ModelLoadError(f"model {name!r}: {part}/ should hold safetensors weights but holds {remedy}")


def _check_family(name: str, class_name: str) -> None:
    if class_name not in FAMILIES:
        raise ModelLoadError(
            f"model {name!r}: pipeline class {class_name!r} is not supported; supported: {', '.join(FAMILIES)}"
        )


def _pipeline(name: str, location: str, dtype: torch.dtype) -> Any:
    """The diffusers pipeline on the CPU, without safety checker; the adapter moves its parts to the device."""
    import diffusers  # noqa: PLC0415 - takes seconds, and the checks above need none of it

    try:
        pipeline = diffusers.DiffusionPipeline.from_pretrained(
            location,
            torch_dtype=dtype,
            use_safetensors=True,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
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


def _card(
    name: str,
    family: str,
    pipeline: Any,
    *,
    folder: Path | None,
    location: str,
    adapters: Adapters,
    adapter: Callable[..., AnyModel],
) -> ModelCard:
    """The card, from the pipeline's own configs and, where a folder has one, its calotype.json."""
    own = folder / "calotype.json" if folder else None
    notes = json.loads(own.read_text()) if own and own.is_file() else {}
    factor = 2 ** (len(pipeline.vae.config.block_out_channels) - 1)
    network = getattr(pipeline, "unet", None) or pipeline.transformer
    side = int(network.config.sample_size) * factor
    native = tuple((int(w), int(h)) for w, h in notes.get("native_sizes", [(side, side)]))
    assert isinstance(adapter, type)
    assert issubclass(adapter, LatentModel)
    samplers = list(adapter.samplers)
    own_sampler = sampler_of(pipeline.scheduler, adapter.samplers)
    if own_sampler is not None:
        samplers.sort(key=lambda sampler: sampler is not own_sampler)
    return ModelCard(
        name=name,
        family=family,
        version=_version(folder, location),
        size_multiple=factor * adapter.size_factor,
        native_sizes=native,
        max_pixels=int(notes.get("max_pixels", _AREA_LIMIT * max(w * h for w, h in native))),
        max_prompt_tokens=int(pipeline.tokenizer.model_max_length),
        samplers=tuple(sampler.value for sampler in samplers),
        features=frozenset(feature.value for feature in adapter.features_of(pipeline, adapters)),
        loras=tuple(sorted(adapters.loras)),
        controls=tuple(sorted(adapters.controls)),
        embeddings=tuple(sorted(adapters.embeddings)),
        description=str(notes.get("description", "")),
    )


def _version(folder: Path | None, location: str) -> str:
    """Identifies the weights: a hash of every safetensors file in a folder, or the hub id itself."""
    if folder is None:
        return location
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.safetensors")):
        digest.update(path.relative_to(folder).as_posix().encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return f"sha256:{digest.hexdigest()[:16]}"
