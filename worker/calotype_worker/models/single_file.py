"""Single-file checkpoints, as the community shares them: all of a model's weights in one .safetensors file.

Such a file holds no configs and no tokenizer. They come from a diffusers folder beside it with the file's name
(`model.safetensors` and `model/`, of which only the small files are needed), or else from the hub. Parts that the file
lacks (some contain only Flux's transformer) come from that folder too, with their weights; T5 may be absent from
Stable Diffusion 3.
"""

from __future__ import annotations

import importlib
import json
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from calotype_shared.errors import ModelLoadError
from calotype_worker.models.header import Header, read_header, refuse_quantized
from calotype_worker.models.prediction import scheduler_of

SUFFIXES = (".safetensors", ".sft")  # in any case
_OTHERS = (".ckpt", ".pt", ".pth", ".bin", ".gguf")
_DENOISER = "model.diffusion_model."

# The kind that diffusers derives from a file's keys and shapes -> the pipeline of that kind.
_PIPELINES = {
    "inpainting": "StableDiffusionInpaintPipeline",
    "inpainting_v2": "StableDiffusionInpaintPipeline",
    "v1": "StableDiffusionPipeline",
    "v2": "StableDiffusionPipeline",
    "xl_base": "StableDiffusionXLPipeline",
    "xl_refiner": "StableDiffusionXLImg2ImgPipeline",
    "playground-v2-5": "StableDiffusionXLPipeline",
    "sd3": "StableDiffusion3Pipeline",
    "sd35_large": "StableDiffusion3Pipeline",
    "sd35_medium": "StableDiffusion3Pipeline",
    "flux-dev": "FluxPipeline",
    "flux-schnell": "FluxPipeline",
}
# Parts of these pipelines that a file may lack, and the prefixes of the keys of those that it contains.
_VAE = {"vae": ("first_stage_model.", "vae.")}
_SD_PARTS = {**_VAE, "text_encoder": ("cond_stage_model.",)}
_PARTS: dict[str, dict[str, tuple[str, ...]]] = {
    "StableDiffusionPipeline": _SD_PARTS,
    "StableDiffusionInpaintPipeline": _SD_PARTS,
    "StableDiffusionXLPipeline": {
        **_VAE,
        "text_encoder": ("conditioner.embedders.0.",),
        "text_encoder_2": ("conditioner.embedders.1.",),
    },
    "StableDiffusionXLImg2ImgPipeline": {**_VAE, "text_encoder_2": ("conditioner.embedders.0.",)},
    "StableDiffusion3Pipeline": {
        **_VAE,
        "text_encoder": ("text_encoders.clip_l.",),
        "text_encoder_2": ("text_encoders.clip_g.",),
        "text_encoder_3": ("text_encoders.t5xxl.",),
    },
    "FluxPipeline": {
        **_VAE,
        "text_encoder": ("text_encoders.clip_l.",),
        "text_encoder_2": ("text_encoders.t5xxl.",),
    },
}
# Every file of a known family has a key with one of these; diffusers takes unknown files for Stable Diffusion 1.
_MARKS = ("model.diffusion_model.", "double_blocks.", "joint_blocks.")


def is_single_file(location: str) -> bool:
    """Whether a model's source is a file instead of a folder or hub id."""
    return Path(location).suffix.lower() in (*SUFFIXES, *_OTHERS) and not Path(location).is_dir()


def load_single_file(name: str, file: Path, dtype: torch.dtype) -> Any:
    """The diffusers pipeline of a checkpoint file, on the CPU in `dtype`.

    Raises:
        ModelLoadError: it is a pickle, not a safetensors file, of an unknown family, incomplete, or has no configs.
    """
    kind, class_name, header = kind_of(name, file)
    refuse_quantized(f"model {name!r}", file, header)
    with _as_safetensors(file) as path:
        pipeline = _load(name, file, path, kinds=(kind, class_name), header=header, dtype=dtype)
    network = getattr(pipeline, "unet", None) or pipeline.transformer
    _check_all_used(name, file, header, network)
    if hasattr(pipeline, "unet"):
        pipeline.scheduler = scheduler_of(file, header, pipeline.scheduler)
    return pipeline


def kind_of(name: str, file: Path) -> tuple[str, str, Header]:
    """What diffusers takes a file for, its pipeline class, and its header, which is all that is read.

    Raises:
        ModelLoadError: it is a pickle, not a safetensors file, or of a family that is not supported.
    """
    from diffusers.loaders.single_file_utils import infer_diffusers_model_type  # noqa: PLC0415

    _check_kind(name, file)
    header = read_header(f"model {name!r}", file)
    if not any(mark in key for key in header.tensors for mark in _MARKS):
        shown = ", ".join(sorted(header.tensors)[:3])
        raise ModelLoadError(
            f"model {name!r}: {file.name!r} is not a checkpoint of a known family (its keys begin {shown}); give a "
            "whole model, not a LoRA or a part, or a diffusers folder"
        )
    kind = infer_diffusers_model_type(
        {key: torch.empty(own.shape, device="meta") for key, own in header.tensors.items()}
    )
    if kind not in _PIPELINES:
        raise ModelLoadError(
            f"model {name!r}: {file.name!r} is a {kind} checkpoint, which is not supported; supported: "
            f"{', '.join(_PIPELINES)}"
        )
    return kind, _PIPELINES[kind], header


def _load(name: str, file: Path, path: str, *, kinds: tuple[str, str], header: Header, dtype: torch.dtype) -> Any:
    """The pipeline of `file`, which diffusers opens as `path`."""
    import diffusers  # noqa: PLC0415

    kind, class_name = kinds

    beside = file.with_suffix("")
    local = (beside / "model_index.json").is_file()
    options: dict[str, Any] = {"config": str(beside), "local_files_only": True} if local else {}
    if kind in ("v1", "v2", "inpainting", "inpainting_v2"):
        options["safety_checker"] = None
    try:
        options |= _other_parts(name, file, header.tensors.keys(), class_name, dtype)
        return getattr(diffusers, class_name).from_single_file(path, torch_dtype=dtype, **options)
    except ModelLoadError:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        source = f"the configs in {beside.name!r}/" if local else "configs from the hub"
        raise ModelLoadError(
            f"model {name!r}: {file.name!r} ({kind}) could not be loaded with {source}: {reason}; put a diffusers "
            f"folder of the same kind of model beside it as {beside.name!r}/ (weights are not needed there)"
        ) from error


def _other_parts(
    name: str, file: Path, keys: Collection[str], class_name: str, dtype: torch.dtype
) -> dict[str, torch.nn.Module | None]:
    """The parts that a file lacks, from the folder beside it; None for optional ones.

    Raises:
        ModelLoadError: the folder does not have their weights either.
    """
    beside = file.with_suffix("")
    index = beside / "model_index.json"
    classes: dict[str, Any] = json.loads(index.read_text()) if index.is_file() else {}
    found: dict[str, torch.nn.Module | None] = {}
    for part, prefixes in _PARTS[class_name].items():
        library, own_class = classes.get(part) or ("", "")
        optional = part == "text_encoder_3"
        declined = optional and bool(classes) and not own_class  # the folder declares it as absent
        if any(key.startswith(prefixes) for key in keys) and not declined:
            continue
        if library in ("diffusers", "transformers") and list((beside / part).glob("*.safetensors")):
            kind = getattr(importlib.import_module(library), own_class)
            found[part] = kind.from_pretrained(beside / part, torch_dtype=dtype, use_safetensors=True)
        elif optional:
            found |= {part: None, "tokenizer_3": None}
        else:
            raise ModelLoadError(
                f"model {name!r}: {file.name!r} has no {part}; put a diffusers folder of the same kind of model "
                f"beside it as {beside.name!r}/, with safetensors weights in {beside.name}/{part}/"
            )
    return found


def _check_kind(name: str, file: Path) -> None:
    """Refuse files that are no safetensors by their names, before they are opened."""
    suffix = file.suffix.lower()
    if suffix == ".gguf":
        raise ModelLoadError(
            f"model {name!r}: {file.name!r} is a GGUF checkpoint, which is not supported; use the model's safetensors, "
            "with --quantized to save memory"
        )
    if suffix not in (*SUFFIXES, *_OTHERS):
        raise ModelLoadError(
            f"model {name!r}: {str(file)!r} is neither a folder nor a .safetensors file; give one of these"
        )
    if suffix not in SUFFIXES:
        raise ModelLoadError(
            f"model {name!r}: {file.name!r} is a pickle file, which Calotype never opens; convert it if you trust it: "
            f'safetensors.torch.save_file(torch.load("{file.name}", weights_only=True)["state_dict"], '
            f'"{file.with_suffix(SUFFIXES[0]).name}")'
        )


def _check_all_used(name: str, file: Path, header: Header, network: torch.nn.Module) -> None:
    """Every value of the file's network must be in the loaded one: diffusers drops what its configs have no place for.

    Raises:
        ModelLoadError: values were left over.
    """
    denoiser = [key for key in header.tensors if key.startswith(_DENOISER)]
    if not denoiser:  # the file holds only a network
        denoiser = [
            key for key in header.tensors if not key.startswith(("first_stage_model.", "vae.", "text_encoders."))
        ]
    marks = {key for key in denoiser if "." not in key or key.startswith("edm_")}
    stored = sum(header.tensors[key].values for key in denoiser if key not in marks)
    loaded = sum(value.numel() for value in network.state_dict().values())
    if stored > loaded:
        raise ModelLoadError(
            f"model {name!r}: {file.name!r} holds {stored} values of a network, and with its configs only {loaded} are "
            f"used; put the diffusers folder of this very model beside it as {file.with_suffix('').name!r}/"
        )


@contextmanager
def _as_safetensors(file: Path) -> Iterator[str]:
    """The file under a name that diffusers takes for safetensors; it would open any other as a pickle."""
    if file.suffix == SUFFIXES[0]:
        yield str(file)
        return
    with tempfile.TemporaryDirectory(prefix="calotype-") as folder:
        link = Path(folder) / f"{file.stem}{SUFFIXES[0]}"
        link.symlink_to(file.resolve())
        yield str(link)
