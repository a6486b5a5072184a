"""OpenAI's images and models API, for their SDK and whatever speaks as it does."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator, Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Body, Path, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, UploadFile

from calotype.gateway.auth import Caller, Reader, Writer
from calotype.gateway.errors import documented, problem_of, shown_to
from calotype.gateway.front import GuardedRoute
from calotype.gateway.jobs import finished, submit
from calotype.gateway.json_body import strict_loads
from calotype.gateway.state import Services, ServicesDep
from calotype.gateway.uploads import store_image
from calotype.jobs import require_success
from calotype.openai_images import Generation, image_data, inverted_mask, read_generation
from calotype_shared.errors import CalotypeError, InvalidRequest, UnknownModel
from calotype_shared.schema.enums import Feature
from calotype_shared.schema.jobs import JobRecord

router = APIRouter(prefix="/v1", tags=["openai"], route_class=GuardedRoute)

_POLL_SECONDS = 0.1
_EXAMPLE = {"model": "demo", "prompt": "a red circle on a blue background", "size": "128x128"}
_IMAGES = {"application/json": {"schema": {"type": "object"}}, "text/event-stream": {"schema": {"type": "string"}}}
_ANSWER: dict[int | str, dict[str, Any]] = {200: {"description": "The images, or events of them.", "content": _IMAGES}}


@router.post(
    "/images/generations",
    operation_id="openaiGenerate",
    responses={**_ANSWER, **documented(404, 409, 422, 504, openai=True)},
)
async def generate(
    body: Annotated[dict[str, Any], Body(openapi_examples={"plain": {"value": _EXAMPLE}})],
    request: Request,
    caller: Writer,
    services: ServicesDep,
) -> Response:
    """Generate images and return them. Every field of a config may be given in addition to OpenAI's own."""
    return await _answer(read_generation(body), request, caller, services, kind="image_generation")


@router.post(
    "/images/edits",
    operation_id="openaiEdit",
    responses={**_ANSWER, **documented(404, 409, 422, 504, openai=True)},
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {
                "multipart/form-data": {
                    "schema": {
                        "type": "object",
                        "required": ["image", "prompt"],
                        "properties": {
                            "image": {"type": "string", "format": "binary"},
                            "mask": {"type": "string", "format": "binary"},
                            "prompt": {"type": "string"},
                        },
                    }
                }
            },
        }
    },
)
async def edit(request: Request, caller: Writer, services: ServicesDep) -> Response:
    """Edit an image: all of it, or only where the mask is transparent."""
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise InvalidRequest(
            "must be multipart/form-data",
            field="content-type",
            value=request.headers.get("content-type"),
            remedy="send a form with image and prompt",
        )
    async with request.form(max_files=20, max_fields=100) as form:
        fields = _form_fields(form)
        images = await _images(form)
    if not images.get("image"):
        raise InvalidRequest("is missing", field="image", value=None, remedy="send the image to edit as a file")
    references = await _by_reference(services, fields.get("model"), len(images["image"]))
    stored = [(await store_image(services, image))[0] for image in images["image"]]
    fields |= {"images": stored} if references else {"init_image": stored[0]}
    if images.get("mask"):
        white_where_painted = await services.in_images(inverted_mask, images["mask"][0])
        fields["mask_image"], _ = await store_image(services, white_where_painted, field="mask")
    return await _answer(read_generation(fields), request, caller, services, kind="image_edit")


async def _by_reference(services: Services, name: str | None, count: int) -> bool:
    """Whether a model takes the images of an edit as references, instead of one as the source of image-to-image.

    Raises:
        InvalidRequest: there are several, and it takes none as references.
    """
    cards = await services.in_redis(services.client.models)
    model = await services.model(name)
    features = cards[model].features if model in cards else frozenset()
    if Feature.EDIT in features and (count > 1 or Feature.IMAGE_TO_IMAGE not in features):
        return True
    if count > 1:
        able = [known for known, card in cards.items() if Feature.EDIT in card.features]
        raise InvalidRequest(
            f"is given {count} times, and model {model!r} takes one",
            field="image",
            value=count,
            remedy=f"send one image, or use a model that takes several: {', '.join(able) or 'none is served'}",
        )
    return False


def _form_fields(form: FormData) -> dict[str, Any]:
    """A form's texts as JSON would have them: numbers as numbers, lists as lists."""
    fields: dict[str, Any] = {}
    for name, value in form.multi_items():
        if isinstance(value, UploadFile):
            continue
        if name in ("prompt", "negative_prompt", "model", "size"):
            fields[name] = value
            continue
        try:
            fields[name] = strict_loads(value)
        except ValueError:
            fields[name] = value
    return fields


async def _images(form: FormData) -> dict[str, list[bytes]]:
    found: dict[str, list[bytes]] = {}
    for name, value in form.multi_items():
        if isinstance(value, UploadFile):
            found.setdefault(name.removesuffix("[]"), []).append(await value.read())
    return found


async def _answer(wanted: Generation, request: Request, caller: Caller, services: Services, *, kind: str) -> Response:
    config = wanted.config
    named = config.model if "model" in config.model_fields_set else None
    config = config.model_copy(update={"model": await services.model(named)})
    if wanted.stream and wanted.partial_images:
        every = max(1, config.num_inference_steps // (wanted.partial_images + 1))
        config = config.model_copy(update={"preview_every": config.preview_every or every})
    key = request.headers.get("idempotency-key")
    job = await submit(services, caller, config, images=config.image_count, idempotency_key=key)
    # Whoever repeats a request with its key gets the job, so it goes on when the client hangs up.
    cancel = key is None
    if wanted.stream:
        events = _stream(services, job.id, request, caller, wanted, kind, cancel=cancel)
        return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
    seconds = services.gateway.max_wait_seconds
    record = await finished(services, job.id, caller.tenant, request, seconds=seconds, cancel=cancel)
    data = await _data(services, record, wanted)
    return JSONResponse({"created": int(record.finished_at or 0), "data": data, **_shown(record)})


async def _data(services: Services, record: JobRecord, wanted: Generation) -> list[dict[str, Any]]:
    images = [image.model_dump() for image in record.images]
    if wanted.as_url:
        links = await services.links([image.key for image in record.images])
        return [image_data(image, url=link) for image, link in zip(images, links, strict=True)]
    files = [await services.in_storage(services.storage.get, image.key, sha256=image.sha256) for image in record.images]
    encoded = await run_in_threadpool(lambda: [base64.b64encode(file).decode() for file in files])
    return [image_data(image, b64=b64) for image, b64 in zip(images, encoded, strict=True)]


def _shown(record: JobRecord) -> dict[str, Any]:
    """The fields about all images, in responses and events."""
    config = record.config
    size = f"{config.width}x{config.height}"
    return {"size": size, "quality": "auto", "background": "opaque", "output_format": config.output_format.value}


async def _stream(  # noqa: PLR0917
    services: Services, job_id: str, request: Request, caller: Caller, wanted: Generation, kind: str, *, cancel: bool
) -> AsyncIterator[str]:
    """The previews as partial images, then the images. With `cancel`, a client that disconnects ends the job."""
    sent, shown, done = 0, set(), False
    try:
        while True:
            record = await services.job(job_id, caller.tenant)
            if sent < wanted.partial_images and not record.state.final:
                for preview in await services.in_redis(services.client.previews, job_id):
                    if (preview.index, preview.step) in shown or sent >= wanted.partial_images:
                        continue
                    shown.add((preview.index, preview.step))
                    part = {"partial_image_index": sent, "b64_json": preview.image, **_shown(record)}
                    yield _event(f"{kind}.partial_image", {**part, "output_format": "jpeg"})
                    sent += 1
            if record.state.final:
                done = True
                break
            await asyncio.sleep(_POLL_SECONDS)
        require_success(record)
        for item in await _data(services, record, wanted._replace(as_url=False)):
            yield _event(f"{kind}.completed", {**item, **_shown(record), "usage": _NO_USAGE})
    except CalotypeError as error:
        problem = problem_of(shown_to(request, error))
        body = {"message": problem.detail, "type": "server_error", "code": problem.code, "param": problem.field}
        yield f"event: error\ndata: {json.dumps({'type': 'error', 'error': body})}\n\n"
    finally:
        if cancel and not done:
            await asyncio.shield(services.in_redis(services.client.cancel, job_id))


# OpenAI's SDK requires it in this event; there are no tokens to count.
_NO_USAGE = {
    "input_tokens": 0,
    "output_tokens": 0,
    "total_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
}


def _event(kind: str, data: Mapping[str, Any]) -> str:
    body = {"type": kind, "created_at": int(time.time()), **data}
    return f"event: {kind}\ndata: {json.dumps(body)}\n\n"


@router.get("/models", operation_id="openaiListModels", responses=documented(openai=True))
async def list_models(caller: Reader, services: ServicesDep) -> dict[str, Any]:
    """The models that workers have announced, each with its capabilities."""
    cards = await services.in_redis(services.client.models)
    return {"object": "list", "data": [_model(name, card.model_dump(mode="json")) for name, card in cards.items()]}


@router.get("/models/{model}", operation_id="openaiGetModel", responses=documented(404, openai=True))
async def get_model(
    model: Annotated[str, Path(max_length=64)], caller: Reader, services: ServicesDep
) -> dict[str, Any]:
    """One model."""
    cards = await services.in_redis(services.client.models)
    if model not in cards:
        raise UnknownModel(
            "no worker has announced this model", field="model", value=model, remedy=f"use one of: {', '.join(cards)}"
        )
    return _model(model, cards[model].model_dump(mode="json"))


def _model(name: str, card: dict[str, Any]) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "calotype", "card": card}
