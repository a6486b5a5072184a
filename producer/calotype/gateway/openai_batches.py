"""OpenAI's batch API. A batch for the endpoint `/v1/jobs` has lines in Calotype's own format instead of OpenAI's."""

from __future__ import annotations

import itertools
import re
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, Path, Query, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from calotype.batches.lines import OPENAI_URL
from calotype.batches.options import BatchOptions
from calotype.batches.record import BatchFormat, BatchRecord, BatchState
from calotype.gateway.auth import Batcher
from calotype.gateway.errors import documented
from calotype.gateway.front import GuardedRoute
from calotype.gateway.openai_files import RESULT, After, find_file
from calotype.gateway.state import ServicesDep
from calotype_shared.errors import InvalidRequest
from calotype_shared.schema.enums import Lane

router = APIRouter(prefix="/v1", tags=["batches"], route_class=GuardedRoute)

_FORMATS = {OPENAI_URL: BatchFormat.OPENAI, "/v1/jobs": BatchFormat.NATIVE}
_WINDOW = re.compile(r"(\d{1,3})([hd])")

BatchId = Annotated[str, Path(max_length=100)]
Limit = Annotated[int, Query(ge=1, le=100)]


class BatchRequest(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [{"input_file_id": "file-abc", "endpoint": OPENAI_URL, "completion_window": "24h"}]
        },
    )

    input_file_id: Annotated[str, Field(max_length=100)]
    endpoint: Literal["/v1/images/generations", "/v1/jobs"] = "/v1/images/generations"
    completion_window: Annotated[
        str, Field(pattern=r"^\d{1,3}[hd]$", description="Hours or days, then it expires.")
    ] = "24h"
    metadata: Annotated[dict[str, Annotated[str, Field(max_length=512)]] | None, Field(max_length=16)] = None
    output_expires_after: dict[str, Any] | None = None  # accepted; the bucket's lifecycle rules decide
    webhook_url: Annotated[str | None, Field(max_length=2_000)] = None
    lane: Literal["bulk", "interactive"] = "bulk"


class RequestCounts(BaseModel):
    total: int
    completed: int
    failed: int


class BatchObject(BaseModel):
    """OpenAI's schema; `calotype` holds the fields that OpenAI's does not have."""

    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    status: BatchState
    input_file_id: str
    completion_window: str
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int | None
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: RequestCounts
    metadata: dict[str, Any] | None
    errors: dict[str, Any] | None
    calotype: dict[str, Any]


class BatchList(BaseModel):
    object: Literal["list"] = "list"
    data: list[BatchObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


def _shown(batch: BatchRecord) -> dict[str, Any]:
    counts = batch.counts
    failed = counts.done - counts.succeeded
    times = {name: getattr(batch, name) for name in BatchObject.model_fields if name.endswith("_at")}
    problem = {"code": "invalid_manifest", "message": batch.problem, "line": None, "param": None}
    hours = round(((batch.expires_at or batch.created_at) - batch.created_at) / 3600)
    left = batch.seconds_left
    return {
        "id": batch.id,
        "object": "batch",
        "endpoint": next(endpoint for endpoint, form in _FORMATS.items() if form is batch.format),
        "status": batch.state.value,
        "input_file_id": batch.input_file or "",
        "completion_window": f"{hours}h",
        "output_file_id": f"file-{batch.id}-output" if counts.succeeded else None,
        "error_file_id": f"file-{batch.id}-errors" if failed else None,
        **{name: None if at is None else int(at) for name, at in times.items()},
        "request_counts": {"total": counts.total, "completed": counts.succeeded, "failed": failed},
        "metadata": batch.metadata or None,
        "errors": {"object": "list", "data": [problem]} if batch.problem else None,
        "calotype": {
            "counts": counts.model_dump(),
            "progress": round(batch.progress, 4),
            "jobs_a_second": round(batch.rate, 2),
            "seconds_left": None if left is None else round(left, 1),
            "paused": batch.paused,
            "retry_of": batch.retry_of,
        },
    }


@router.post(
    "/batches",
    operation_id="openaiCreateBatch",
    response_model=BatchObject,
    responses=documented(404, 409, openai=True),
)
async def create_batch(
    wanted: BatchRequest,
    caller: Batcher,
    services: ServicesDep,
    idempotency_key: Annotated[str | None, Header(description="The same key gives the same batch.")] = None,
) -> Response:
    """Submit an uploaded file as a batch."""
    caller.require_no_quota()
    file = await find_file(services, wanted.input_file_id, caller.tenant)
    if RESULT.fullmatch(file.id):
        raise InvalidRequest(
            "is not an input file", field="input_file_id", value=file.id, remedy="upload one: POST /v1/files"
        )
    window = _WINDOW.fullmatch(wanted.completion_window)
    assert window is not None
    hours = int(window[1]) * (24 if window[2] == "d" else 1)
    options: BatchOptions = {
        "format": _FORMATS[wanted.endpoint],
        "lane": Lane(wanted.lane),
        "tenant": caller.tenant,
        "metadata": wanted.metadata,
        "webhook_url": wanted.webhook_url,
        "expires_in": hours * 3600,
    }
    handle = await services.in_redis(
        services.client.batches.submit_stored,
        services.files.key(caller.tenant, file.id),
        input_file=file.id,
        idempotency_key=idempotency_key,
        **options,
    )
    return JSONResponse(_shown(await services.batch(handle.id, caller.tenant)))


@router.get("/batches", operation_id="openaiListBatches", response_model=BatchList, responses=documented(openai=True))
async def list_batches(caller: Batcher, services: ServicesDep, limit: Limit = 20, after: After = None) -> Response:
    """Batches, newest first."""
    found = await services.in_redis(services.client.batches.list, tenant=caller.tenant, limit=limit + 1, after=after)
    page = [_shown(batch) for batch in found[:limit]]
    ends = {"first_id": page[0]["id"] if page else None, "last_id": page[-1]["id"] if page else None}
    return JSONResponse({"object": "list", "data": page, **ends, "has_more": len(found) > limit})


@router.get(
    "/batches/{batch_id}",
    operation_id="openaiGetBatch",
    response_model=BatchObject,
    responses=documented(404, openai=True),
)
async def get_batch(batch_id: BatchId, caller: Batcher, services: ServicesDep) -> Response:
    """A batch as it is now."""
    return JSONResponse(_shown(await services.batch(batch_id, caller.tenant)))


@router.post(
    "/batches/{batch_id}/cancel",
    operation_id="openaiCancelBatch",
    response_model=BatchObject,
    responses=documented(404, openai=True),
)
async def cancel_batch(batch_id: BatchId, caller: Batcher, services: ServicesDep) -> Response:
    """Cancel a batch: no more of its jobs start, and its running jobs stop within one step."""
    await services.batch(batch_id, caller.tenant)
    return JSONResponse(_shown(await services.in_redis(services.client.batches.cancel, batch_id)))


class BatchImage(BaseModel):
    """A finished image. `url` works without keys, for a while."""

    custom_id: str
    seed: int
    url: str


class BatchImages(BaseModel):
    data: list[BatchImage]


@router.get(
    "/batches/{batch_id}/images",
    operation_id="listBatchImages",
    response_model=BatchImages,
    responses=documented(404, openai=True),
)
async def list_images(batch_id: BatchId, caller: Batcher, services: ServicesDep, limit: Limit = 20) -> Response:
    """Not in OpenAI's API: the first images in a batch's output, also while it runs."""
    await services.batch(batch_id, caller.tenant)
    lines = await services.in_storage(lambda: list(itertools.islice(services.client.batches.results(batch_id), limit)))
    found = [(line["custom_id"], image) for line in lines for image in _images_of(line)][:limit]
    links = iter(await services.links([image["key"] for _, image in found if "key" in image]))
    data = [
        {"custom_id": custom_id, "seed": image["seed"], "url": image.get("url") or next(links)}
        for custom_id, image in found
    ]
    return JSONResponse({"data": data})


def _images_of(line: dict[str, Any]) -> list[dict[str, Any]]:
    """The images of one result line: of Calotype's own format, with keys, or of OpenAI's, with links."""
    images: list[dict[str, Any]] = line["response"]["body"]["data"] if "response" in line else line["images"]
    return images


@router.post(
    "/batches/{batch_id}/{verb}",
    operation_id="steerBatch",
    response_model=BatchObject,
    responses=documented(404, openai=True),
)
async def steer_batch(
    batch_id: BatchId, verb: Literal["pause", "resume", "retry"], caller: Batcher, services: ServicesDep
) -> Response:
    """Not in OpenAI's API: pause a batch, resume it, or submit its failed lines as a new batch and return that."""
    caller.require_no_quota()
    await services.batch(batch_id, caller.tenant)
    if verb == "retry":
        batch_id = (await services.in_storage(services.client.batches.retry, batch_id)).id
    else:
        steer = services.client.batches.pause if verb == "pause" else services.client.batches.resume
        await services.in_redis(steer, batch_id)
    return JSONResponse(_shown(await services.batch(batch_id, caller.tenant)))
