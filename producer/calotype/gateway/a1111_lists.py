"""AUTOMATIC1111's web API: the lists and options that its clients request besides images."""

from __future__ import annotations

import io
from typing import Annotated, Any

import PIL.Image
from fastapi import APIRouter, Body
from pydantic import BaseModel, Field

from calotype.gateway.a1111 import chosen_model
from calotype.gateway.a1111_inputs import decoded
from calotype.gateway.auth import Reader, Writer
from calotype.gateway.errors import documented
from calotype.gateway.front import GuardedRoute
from calotype.gateway.state import ServicesDep
from calotype_shared.errors import InvalidRequest
from calotype_shared.schema import a1111
from calotype_shared.storage.image_file import read_texts
from calotype_shared.storage.images import FORMATS

router = APIRouter(prefix="/sdapi/v1", tags=["automatic1111"], route_class=GuardedRoute)


@router.get("/options", operation_id="sdGetOptions", responses=documented(openai=True))
async def get_options(caller: Reader, services: ServicesDep) -> dict[str, Any]:
    """The checkpoint that requests use."""
    name = await chosen_model(services, caller.tenant)
    return {
        "sd_model_checkpoint": name,
        "sd_checkpoint_hash": "",
        "samples_format": "png",
        "CLIP_stop_at_last_layers": 1,
    }


@router.post("/options", operation_id="sdSetOptions", responses=documented(openai=True))
async def set_options(options: Annotated[dict[str, Any], Body()], caller: Writer, services: ServicesDep) -> None:
    """Select the checkpoint, `sd_model_checkpoint`. Other options have no effect."""
    chosen = options.get("sd_model_checkpoint")
    if chosen is not None:
        name = await chosen_model(services, caller.tenant, str(chosen))
        await services.in_redis(services.keys.redis.set, services.keys.keys.options(caller.tenant), name)


@router.get("/sd-models", operation_id="sdModels", responses=documented(openai=True))
async def sd_models(caller: Reader, services: ServicesDep) -> list[dict[str, Any]]:
    """The models that workers have announced."""
    cards = await services.in_redis(services.client.models)
    return [
        {
            "title": name,
            "model_name": name,
            "hash": card.version[:10],
            "sha256": card.version,
            "filename": name,
            "config": None,
        }
        for name, card in cards.items()
    ]


@router.get("/samplers", operation_id="sdSamplers", responses=documented(openai=True))
async def samplers(caller: Reader) -> list[dict[str, Any]]:
    """By the web UI's names."""
    return [{"name": name, "aliases": a1111.aliases(sampler), "options": {}} for sampler, name in a1111.NAMES.items()]


@router.get("/schedulers", operation_id="sdSchedulers", responses=documented(openai=True))
async def schedulers(caller: Reader) -> list[dict[str, Any]]:
    """Noise schedules."""
    return [
        {"name": name, "label": name.title(), "aliases": None, "default_rho": -1, "need_inner_model": False}
        for name in a1111.SCHEDULERS
    ]


@router.get("/loras", operation_id="sdLoras", responses=documented(openai=True))
async def loras(caller: Reader, services: ServicesDep) -> list[dict[str, Any]]:
    """LoRAs of all models, to be written into prompts as `<lora:name:weight>`."""
    names = {name for card in (await services.in_redis(services.client.models)).values() for name in card.loras}
    return [{"name": name, "alias": name, "path": name, "metadata": {}} for name in sorted(names)]


@router.get("/embeddings", operation_id="sdEmbeddings", responses=documented(openai=True))
async def embeddings(caller: Reader, services: ServicesDep) -> dict[str, Any]:
    """The embeddings (learned tokens) of all models."""
    words = {word for card in (await services.in_redis(services.client.models)).values() for word in card.embeddings}
    return {"loaded": {word: {"step": None, "shape": 0, "vectors": 1} for word in sorted(words)}, "skipped": {}}


@router.get("/upscalers", operation_id="sdUpscalers", responses=documented(openai=True))
async def upscalers(caller: Reader) -> list[dict[str, Any]]:
    """Only `None`, which the web UI lists too."""
    return [{"name": "None", "model_name": None, "model_path": None, "model_url": None, "scale": 1.0}]


@router.get("/scripts", operation_id="sdScripts", responses=documented(openai=True))
async def scripts(caller: Reader) -> dict[str, list[str]]:
    """The only extension is ControlNet."""
    return {"txt2img": ["controlnet"], "img2img": ["controlnet"]}


@router.get("/prompt-styles", operation_id="sdPromptStyles", responses=documented(openai=True))
@router.get("/hypernetworks", operation_id="sdHypernetworks", responses=documented(openai=True))
@router.get("/face-restorers", operation_id="sdFaceRestorers", responses=documented(openai=True))
@router.get("/realesrgan-models", operation_id="sdRealesrgan", responses=documented(openai=True))
@router.get("/latent-upscale-modes", operation_id="sdLatentUpscale", responses=documented(openai=True))
@router.get("/sd-vae", operation_id="sdVae", responses=documented(openai=True))
async def none_here(caller: Reader) -> list[dict[str, Any]]:
    """Always empty."""
    return []


@router.get("/cmd-flags", operation_id="sdCmdFlags", responses=documented(openai=True))
async def cmd_flags(caller: Reader) -> dict[str, Any]:
    """Always empty."""
    return {}


@router.post("/refresh-checkpoints", operation_id="sdRefreshCheckpoints", responses=documented(openai=True))
async def refresh(caller: Writer) -> None:
    """Does nothing: workers announce their models themselves."""


class PngInfo(BaseModel):
    image: Annotated[str, Field(description="Base64, with or without data: in front.")]


@router.post("/png-info", operation_id="sdPngInfo", responses=documented(openai=True))
async def png_info(wanted: PngInfo, caller: Reader, services: ServicesDep) -> dict[str, Any]:
    """The generation parameters stored in an image."""
    texts = await services.in_images(_texts, wanted.image)
    return {"info": texts.get("parameters", ""), "items": texts, "parameters": {}}


def _texts(encoded: str) -> dict[str, str]:
    data = decoded(encoded, "image")
    try:
        with PIL.Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return read_texts(image)
    except Exception as error:  # Pillow's plugins raise almost anything for a broken file
        raise InvalidRequest(
            "is not a readable image", field="image", value=f"{len(data)} bytes", remedy="send a PNG, JPEG or WebP file"
        ) from error
