"""AUTOMATIC1111's web API, for `webuiapi` and other tools that use this API.

Each request becomes one job. `progress` and `interrupt` apply to all unfinished jobs that the caller submitted
through this API. Without effect: styles, `eta` and the `s_` parameters, `mask_blur`, `inpainting_fill`,
`inpaint_full_res`, `resize_mode` and saving on the server's disk. Refused, because they would change the image: hires
fix, tiling, face restoration, variation seeds, scripts.
"""

from __future__ import annotations

import base64
import json
import time
from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.concurrency import run_in_threadpool

from calotype.gateway.a1111_inputs import controls_of, loras_in, repeated_fields, stored
from calotype.gateway.auth import Caller, Reader, Writer
from calotype.gateway.errors import documented
from calotype.gateway.front import GuardedRoute
from calotype.gateway.jobs import finished, still_running, submit
from calotype.gateway.state import Services, ServicesDep
from calotype.jobs import require_success
from calotype_shared.errors import InvalidRequest
from calotype_shared.schema import a1111
from calotype_shared.schema.config import MAX_IMAGES
from calotype_shared.schema.enums import JobState, OutputFormat
from calotype_shared.schema.jobs import JobRecord

router = APIRouter(prefix="/sdapi/v1", tags=["automatic1111"], route_class=GuardedRoute)

_VIA = {"via": "sdapi"}  # in a job's metadata
_PREVIEWS = 8  # previews per job, for `progress`
_REFUSED = ("enable_hr", "restore_faces", "tiling", "refiner_checkpoint")
# Settings that would change the image, with the values that change nothing. All others have no effect.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "CLIP_stop_at_last_layers": (1, None),
    "eta_noise_seed_delta": (0, None),
    "sd_vae": ("Automatic", "None", "", None),
}
_Optional = dict[str, Any] | None


class Txt2Img(BaseModel):
    """The parameters that have an effect. All others are accepted and ignored."""

    model_config = ConfigDict(extra="allow", json_schema_extra={"examples": [{"prompt": "a red circle", "steps": 20}]})

    prompt: str = ""
    negative_prompt: str | None = ""
    steps: int = 20
    sampler_name: str | None = None
    sampler_index: str | None = None
    scheduler: str | None = "automatic"
    cfg_scale: float = 7.0
    width: int = 512
    height: int = 512
    seed: int = Field(-1, description="-1 draws one.")
    batch_size: Annotated[int, Field(ge=1, le=MAX_IMAGES)] = 1
    n_iter: Annotated[int, Field(ge=1, le=MAX_IMAGES)] = 1
    enable_hr: bool | None = False
    restore_faces: bool | None = False
    tiling: bool | None = False
    refiner_checkpoint: str | None = None
    subseed_strength: float | None = 0.0
    script_name: str | None = None
    alwayson_scripts: _Optional = None
    override_settings: _Optional = None
    send_images: bool = True


class Img2Img(Txt2Img):
    init_images: Annotated[list[str], Field(max_length=1, description="Base64, with or without data: in front.")] = []
    mask: str | None = Field(None, description="White is painted anew.")
    inpainting_mask_invert: int | bool | None = 0
    denoising_strength: float | None = 0.75


class Images(BaseModel):
    images: list[str]
    parameters: dict[str, Any]
    info: str


@router.post(
    "/txt2img", operation_id="sdTxt2Img", response_model=Images, responses=documented(404, 409, 422, 504, openai=True)
)
async def txt2img(wanted: Txt2Img, request: Request, caller: Writer, services: ServicesDep) -> Response:
    """Generate images from text."""
    return await _answer(wanted, await _fields(wanted, caller, services), request, caller, services)


@router.post(
    "/img2img", operation_id="sdImg2Img", response_model=Images, responses=documented(404, 409, 422, 504, openai=True)
)
async def img2img(wanted: Img2Img, request: Request, caller: Writer, services: ServicesDep) -> Response:
    """Generate images from an image: from all of it, or only where the mask is white."""
    if not wanted.init_images:
        raise InvalidRequest("is missing", field="init_images", value=[], remedy="give one image in base64")
    fields = await _fields(wanted, caller, services)
    fields["init_image"] = await stored(services, wanted.init_images[0], "init_images")
    fields["strength"] = wanted.denoising_strength
    if wanted.mask:
        invert = bool(wanted.inpainting_mask_invert)
        fields["mask_image"] = await stored(services, wanted.mask, "mask", invert=invert)
    return await _answer(wanted, fields, request, caller, services)


async def _fields(wanted: Txt2Img, caller: Caller, services: Services) -> dict[str, Any]:
    """The config that a request means, as fields."""
    if changed := repeated_fields(wanted.alwayson_scripts or {}):
        try:
            wanted = type(wanted).model_validate(wanted.model_dump() | changed)
        except ValidationError:
            raise InvalidRequest(
                "sets a field to what it cannot be",
                field="alwayson_scripts",
                value=changed,
                remedy="give the arguments of Sampler and Seed as the web UI does, or leave them out",
            ) from None
    for name in _REFUSED:
        if getattr(wanted, name):
            raise InvalidRequest(
                "is not available here", field=name, value=getattr(wanted, name), remedy="leave it out"
            )
    overrides = wanted.override_settings or {}
    for name, neutral in _NEUTRAL.items():
        if overrides.get(name) not in neutral:
            raise InvalidRequest(
                "is not available here", field="override_settings", value={name: overrides[name]}, remedy="leave it out"
            )
    if wanted.subseed_strength:
        raise InvalidRequest(
            "variation seeds are not available here",
            field="subseed_strength",
            value=wanted.subseed_strength,
            remedy="use 0",
        )
    if wanted.script_name:
        raise InvalidRequest(
            "is not available here", field="script_name", value=wanted.script_name, remedy="leave it out"
        )
    chosen = overrides.get("sd_model_checkpoint")
    model = await chosen_model(services, caller.tenant, chosen)
    prompt, loras = loras_in(wanted.prompt)
    return {
        "model": model,
        "prompt": prompt,
        "negative_prompt": wanted.negative_prompt or "",
        "num_inference_steps": wanted.steps,
        "sampler": a1111.sampler_named(
            wanted.sampler_name or wanted.sampler_index or "Euler", wanted.scheduler or "automatic"
        ),
        "guidance_scale": wanted.cfg_scale,
        "width": wanted.width,
        "height": wanted.height,
        "seed": None if wanted.seed < 0 else wanted.seed,
        "num_images": wanted.batch_size * wanted.n_iter,
        "loras": loras,
        "controls": await controls_of(wanted.alwayson_scripts or {}, services),
        "preview_every": max(1, wanted.steps // _PREVIEWS),
        "output_format": OutputFormat.PNG,
    }


async def _answer(
    wanted: Txt2Img, fields: dict[str, Any], request: Request, caller: Caller, services: Services
) -> Response:
    job = await submit(services, caller, fields, images=fields["num_images"], metadata=_VIA)
    seconds = services.gateway.max_wait_seconds
    record = await finished(services, job.id, caller.tenant, request, seconds=seconds, check=False, cancel=True)
    if not record.state.final:
        raise still_running(record)
    if record.state is not JobState.CANCELLED:  # an interrupted request returns the images that exist
        require_success(record)
    images = []
    if wanted.send_images:
        files = [
            await services.in_storage(services.storage.get, image.key, sha256=image.sha256) for image in record.images
        ]
        images = await run_in_threadpool(lambda: [base64.b64encode(data).decode() for data in files])
    parameters = wanted.model_dump(exclude={"init_images", "mask"})
    return JSONResponse({"images": images, "parameters": parameters, "info": json.dumps(_info(record))})


def _info(record: JobRecord) -> dict[str, Any]:
    """What tools read from a response, in the web UI's format."""
    config = record.config
    seeds = [config.seed + number for number in range(config.num_images)]
    texts = [
        f"{config.prompt}\nNegative prompt: {config.negative_prompt}\nSteps: {config.num_inference_steps}, "
        f"Sampler: {a1111.NAMES[config.sampler]}, CFG scale: {config.guidance_scale:g}, Seed: {seed}, "
        f"Size: {config.width}x{config.height}, Model: {config.model}"
        for seed in seeds
    ]
    return {
        "prompt": config.prompt,
        "all_prompts": [config.prompt] * len(seeds),
        "negative_prompt": config.negative_prompt,
        "all_negative_prompts": [config.negative_prompt] * len(seeds),
        "seed": config.seed,
        "all_seeds": seeds,
        "subseed": -1,
        "subseed_strength": 0,
        "width": config.width,
        "height": config.height,
        "sampler_name": a1111.NAMES[config.sampler],
        "cfg_scale": config.guidance_scale,
        "steps": config.num_inference_steps,
        "batch_size": config.num_images,
        "sd_model_name": config.model,
        "denoising_strength": config.strength if config.init_image else None,
        "infotexts": texts,
        "job_timestamp": time.strftime("%Y%m%d%H%M%S", time.gmtime(record.created_at)),
        "calotype_job": record.id,
    }


async def chosen_model(services: Services, tenant: str, chosen: str | None = None) -> str:
    """The requested checkpoint, else the selected one, else the first announced one."""
    known = list(await services.in_redis(services.client.models))
    if chosen is None:
        chosen = await services.in_redis(lambda: services.keys.redis.get(services.keys.keys.options(tenant)))  # type: ignore[arg-type, return-value]
    if chosen is None:
        return known[0] if known else "demo"
    name = str(chosen).split(" ", maxsplit=1)[0]
    name = name if name in known else services.gateway.aliases.get(name, name)
    if known and name not in known:
        raise InvalidRequest(
            "is not a known checkpoint",
            field="sd_model_checkpoint",
            value=chosen,
            remedy=f"use one of: {', '.join(known)}",
        )
    return name


async def _unfinished(services: Services, tenant: str) -> list[JobRecord]:
    """The caller's newest unfinished jobs of this API, the one with the most progress first."""
    newest = await services.in_redis(services.client.jobs, tenant=tenant, limit=100)
    found = [job for job in newest if not job.state.final and job.metadata == _VIA]
    return sorted(found, key=lambda job: -job.progress)


@router.get("/progress", operation_id="sdProgress", responses=documented(openai=True))
async def progress(caller: Reader, services: ServicesDep, skip_current_image: bool = False) -> dict[str, Any]:
    """How far the caller's requests are."""
    jobs = await _unfinished(services, caller.tenant)
    share, left, step, steps, image = 0.0, 0.0, 0, 0, None
    if jobs:
        first = jobs[0]
        share, step, steps = first.progress, first.step, first.total_steps
        if first.started_at is not None and share > 0:
            spent = max(0.0, time.time() - first.started_at)
            left = spent / share - spent
        if not skip_current_image:
            previews = await services.in_redis(services.client.previews, first.id)
            image = previews[0].image if previews else None
    state = {
        "skipped": False,
        "interrupted": False,
        "job": jobs[0].id if jobs else "",
        "job_count": len(jobs),
        "job_no": 0,
        "job_timestamp": time.strftime("%Y%m%d%H%M%S", time.gmtime(jobs[0].created_at)) if jobs else "0",
        "sampling_step": step,
        "sampling_steps": steps,
    }
    return {"progress": share, "eta_relative": left, "state": state, "current_image": image, "textinfo": None}


@router.post("/interrupt", operation_id="sdInterrupt", responses=documented(openai=True))
@router.post("/skip", operation_id="sdSkip", responses=documented(openai=True))
async def interrupt(caller: Writer, services: ServicesDep) -> dict[str, Any]:
    """End the caller's requests; they are answered at once, without images."""
    for job in await _unfinished(services, caller.tenant):
        await services.in_redis(services.client.cancel, job.id)
    return {}
