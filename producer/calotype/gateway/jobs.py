"""Calotype's own API: `/v1/jobs`, and the state of workers and queues."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Header, Path, Query, Request, Response
from fastapi.responses import JSONResponse, RedirectResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import ClientDisconnect

from calotype.api_keys import Scope
from calotype.gateway.auth import Admin, Caller, Reader, Writer
from calotype.gateway.errors import NotFound, documented
from calotype.gateway.front import GuardedRoute
from calotype.gateway.privacy import public_job
from calotype.gateway.state import Services, ServicesDep
from calotype.jobs import JobHandle, require_success
from calotype_shared.errors import WaitTimeout
from calotype_shared.schema.config import GenerationConfig
from calotype_shared.schema.enums import JobState, Lane
from calotype_shared.schema.jobs import JobRecord

router = APIRouter(prefix="/v1", tags=["jobs"], route_class=GuardedRoute)

_PREFER_WAIT = re.compile(r"\bwait=(\d{1,5})\b")
# Seconds between checks of an awaited job: after a change notice, and without one, to detect a closed connection.
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.02, 0.25
_UNTOLD_SECONDS, _TOLD_SECONDS = 0.1, 1.0  # maximum time between checks of a job whose events are streamed
_HEARTBEAT_SECONDS = 15.0  # comments that keep proxies from closing a silent stream

JobId = Annotated[str, Path(max_length=100, description="A job's id.")]


class JobRequest(GenerationConfig):
    """A config, and how to treat its job."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"prompt": "a red circle on a blue background"}]})

    quality: str | None = Field(None, description="Steps and guidance at once: fast, balanced or high.")
    lane: Lane = Lane.INTERACTIVE
    metadata: dict[str, Any] = Field(default={}, description="Your own words; kept with the job, never read.")
    webhook_url: str | None = Field(None, max_length=2_000, description="Told, signed, when the job is final.")


class JobView(JobRecord):
    """A job as it is now."""

    # Internally under another name, because the record has a property with this one.
    done: float = Field(serialization_alias="progress", description="Done share, 0 to 1.")
    urls: list[str] = Field(default=[], description="Links to its images, which work without keys for a while.")


class JobList(BaseModel):
    """A page, newest first. `next` is the cursor of the page after, to be sent as `after`."""

    data: list[JobView]
    has_more: bool
    next: str | None = None


class Cancelled(BaseModel):
    """The job's state now: `cancelled`, or the final state it had already reached."""

    id: str
    state: JobState


async def view(record: JobRecord, services: Services, caller: Caller) -> dict[str, Any]:
    """A job as answers show it to this caller."""
    shown = record.model_dump(mode="json")
    if not caller.may(Scope.ADMIN):
        public_job(shown)
    shown["progress"] = round(record.progress, 4)
    shown["urls"] = await services.links([image.key for image in record.images])
    return shown


@router.post(
    "/jobs",
    operation_id="createJob",
    status_code=202,
    response_model=JobView,
    responses={200: {"model": JobView, "description": "It is final already."}, **documented(404, 409)},
)
async def create_job(  # noqa: PLR0917 - FastAPI passes them by name
    job: JobRequest,
    request: Request,
    caller: Writer,
    services: ServicesDep,
    idempotency_key: Annotated[str | None, Header(description="The same key gives the same job.")] = None,
    prefer: Annotated[
        str | None, Header(description="`wait=30` answers with the finished job, if it is in time.")
    ] = None,
) -> Response:
    """Queue a job."""
    fields = job.model_dump(exclude_unset=True, exclude={"lane", "metadata", "webhook_url"})
    handle = await submit(
        services,
        caller,
        fields,
        images=job.image_count,
        lane=job.lane,
        metadata=job.metadata,
        idempotency_key=idempotency_key,
        webhook_url=job.webhook_url,
    )
    found = _PREFER_WAIT.search(prefer or "")
    seconds = int(found[1]) if found else 0
    record = await finished(services, handle.id, caller.tenant, request, seconds=seconds, check=False)
    status = 200 if record.state.final else 202
    return JSONResponse(await view(record, services, caller), status, headers={"Location": f"/v1/jobs/{record.id}"})


_USES_STORAGE = frozenset({"init_image", "mask_image", "control_image", "images", "controls"})


async def submit(
    services: Services,
    caller: Caller,
    config: GenerationConfig | dict[str, Any],
    *,
    images: int,
    lane: Lane = Lane.INTERACTIVE,
    metadata: Mapping[str, Any] | None = None,
    idempotency_key: str | None = None,
    webhook_url: str | None = None,
) -> JobHandle:
    """Queue a job, and count its images against the key's limit: once, however often the request is repeated."""
    fields = config if isinstance(config, dict) else config.model_dump(exclude_unset=True)
    pool = services.in_storage if any(fields.get(name) for name in _USES_STORAGE) else services.in_redis
    repeated = idempotency_key is not None and await services.in_redis(
        services.jobs.submitted_before, idempotency_key, tenant=caller.tenant
    )
    async with caller.taking(images=0 if repeated else images):
        return await pool(
            services.client.submit,
            config,
            lane=lane,
            metadata=metadata,
            tenant=caller.tenant,
            idempotency_key=idempotency_key,
            webhook_url=webhook_url,
        )


async def finished(
    services: Services,
    job_id: str,
    tenant: str,
    request: Request,
    *,
    seconds: float,
    check: bool = True,
    cancel: bool = False,
) -> JobRecord:
    """The job when it is final. With `check`, raises if it is not final in time or did not succeed.

    The wait ends when the client has disconnected. With `cancel`, the job ends then too.
    """
    ends = asyncio.get_running_loop().time() + min(seconds, services.gateway.max_wait_seconds)
    pause = _SHORTEST_PAUSE
    with services.client.job_changes.watch_async() as watch:
        while True:
            record = await services.job(job_id, tenant)
            if record.state.final or asyncio.get_running_loop().time() >= ends:
                break
            if await request.is_disconnected():
                if not cancel:
                    raise ClientDisconnect
                await services.in_redis(services.client.cancel, job_id)
            if not watch.channels:
                await services.in_redis(watch.set_jobs, [job_id])
            pause = _LONGEST_PAUSE if watch.live else min(_LONGEST_PAUSE, pause * 1.3)
            await watch.wait(pause, at_least=_SHORTEST_PAUSE)
    if check:
        if not record.state.final:
            raise still_running(record)
        require_success(record)
    return record


def still_running(record: JobRecord) -> WaitTimeout:
    """The error of a wait that ended before the job did."""
    return WaitTimeout(f"job {record.id} is still {record.state.value}; check it later at /v1/jobs/{record.id}")


@router.get("/jobs", operation_id="listJobs", response_model=JobList, responses=documented())
async def list_jobs(
    caller: Reader,
    services: ServicesDep,
    state: Annotated[JobState | None, Query(description="Only those in this state.")] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    after: Annotated[
        str | None, Query(pattern="^[0-9a-hjkmnp-tv-z]{26}$", description="Cursor: the `next` of the page before.")
    ] = None,
) -> Response:
    """List jobs outside batches, newest first."""
    found = await services.in_redis(
        services.client.jobs, state=state, limit=limit + 1, tenant=caller.tenant, after=after
    )
    page, more = found[:limit], len(found) > limit
    data = [await view(record, services, caller) for record in page]
    return JSONResponse({"data": data, "has_more": more, "next": page[-1].id if more else None})


@router.get("/jobs/{job_id}", operation_id="getJob", response_model=JobView, responses=documented(404))
async def get_job(job_id: JobId, caller: Reader, services: ServicesDep) -> Response:
    """A job as it is now."""
    return JSONResponse(await view(await services.job(job_id, caller.tenant), services, caller))


@router.post("/jobs/{job_id}/cancel", operation_id="cancelJob", response_model=Cancelled, responses=documented(404))
async def cancel_job(job_id: JobId, caller: Writer, services: ServicesDep) -> Response:
    """End a job at once, queued or running. A final one stays as it is."""
    await services.job(job_id, caller.tenant)
    state = await services.in_redis(services.client.cancel, job_id)
    return JSONResponse({"id": job_id, "state": state.value})


@router.get(
    "/jobs/{job_id}/images/{index}",
    operation_id="getJobImage",
    status_code=307,
    response_class=RedirectResponse,
    responses={307: {"description": "Where the image is, for a while."}, **documented(404)},
)
async def get_image(
    job_id: JobId, index: Annotated[int, Path(ge=0, le=10_000)], caller: Reader, services: ServicesDep
) -> Response:
    """One of a finished job's images."""
    record = await services.job(job_id, caller.tenant)
    if index >= len(record.images):
        raise NotFound(
            f"job {job_id} is {record.state.value} and has {len(record.images)} image(s), but no image {index}"
        )
    [link] = await services.links([record.images[index].key])
    return RedirectResponse(link)


@router.get(
    "/jobs/{job_id}/events",
    operation_id="followJob",
    response_class=StreamingResponse,
    responses={
        200: {"content": {"text/event-stream": {}}, "description": "`state`, `progress`, `preview`, `done`."},
        **documented(404),
    },
)
async def follow_job(job_id: JobId, caller: Reader, services: ServicesDep) -> Response:
    """Server-sent events until the job is final. After a disconnect, simply open the stream again."""
    await services.job(job_id, caller.tenant)
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(_events(services, job_id, caller), media_type="text/event-stream", headers=headers)


async def _events(services: Services, job_id: str, caller: Caller) -> AsyncIterator[str]:
    clock = asyncio.get_running_loop().time
    last: JobRecord | None = None
    shown: dict[int, tuple[int, int]] = {}
    said = clock()
    with services.client.job_changes.watch_async() as watch:
        while True:
            record = await services.job(job_id, caller.tenant)
            if last is None or (record.state, record.attempt) != (last.state, last.attempt):
                yield _event("state", {"id": job_id, "state": record.state.value, "attempt": record.attempt})
                said = clock()
            if last is None or record.step != last.step:
                yield _event(
                    "progress",
                    {"step": record.step, "total_steps": record.total_steps, "progress": round(record.progress, 4)},
                )
                said = clock()
            if record.config.preview_every:
                for preview in await services.in_redis(services.client.previews, job_id):
                    if shown.get(preview.index) != (preview.attempt, preview.step):
                        shown[preview.index] = (preview.attempt, preview.step)
                        yield _event("preview", preview.model_dump())
                        said = clock()
            if record.state.final:
                yield _event("done", await view(record, services, caller))
                return
            if clock() - said >= _HEARTBEAT_SECONDS:
                yield ": still here\n\n"
                said = clock()
            last = record
            if not watch.channels:
                await services.in_redis(watch.set_jobs, [job_id])
            await watch.wait(_TOLD_SECONDS if watch.live else _UNTOLD_SECONDS, at_least=_SHORTEST_PAUSE)


def _event(name: str, data: dict[str, Any]) -> str:
    return f"event: {name}\ndata: {json.dumps(data, separators=(',', ':'))}\n\n"


class Queues(BaseModel):
    """The number of jobs in each state, over all tenants, and of queued jobs in each queue."""

    counts: dict[JobState, int]
    depths: dict[str, int]


@router.get("/queues", operation_id="getQueues", tags=["operating"], response_model=Queues, responses=documented())
async def get_queues(caller: Admin, services: ServicesDep) -> Response:
    """How much is queued, running and done."""
    counts = await services.in_redis(services.client.counts)
    depths = await services.in_redis(services.client.depths)
    return JSONResponse({"counts": {state.value: count for state, count in counts.items()}, "depths": depths})


@router.get("/workers", operation_id="listWorkers", tags=["operating"], responses=documented())
async def list_workers(caller: Admin, services: ServicesDep) -> list[dict[str, Any]]:
    """The live workers. /v1/fleet shows what each works on, as far as the tenant may see it."""
    workers = await services.in_redis(services.client.workers)
    return [worker.model_dump(mode="json", exclude={"groups"}) for worker in workers]
