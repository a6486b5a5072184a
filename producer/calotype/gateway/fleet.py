"""Calotype's own API for operators: the fleet, dead jobs, and the provenance of images."""

from __future__ import annotations

import json
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict

from calotype.api_keys import Scope
from calotype.gateway.auth import Reader, Writer
from calotype.gateway.errors import NotFound, documented
from calotype.gateway.front import GuardedRoute
from calotype.gateway.jobs import JobId, JobView, view
from calotype.gateway.privacy import public_worker
from calotype.gateway.state import ServicesDep
from calotype.overview import Overview
from calotype_shared.errors import ObjectMissing
from calotype_shared.storage.layout import sidecar_of

router = APIRouter(prefix="/v1", route_class=GuardedRoute)


@router.get("/fleet", operation_id="getFleet", tags=["operating"], response_model=Overview, responses=documented())
async def get_fleet(caller: Reader, services: ServicesDep) -> Response:
    """The queues, the workers, and each row of their step batches. Another tenant's rows have no id and no prompt."""
    overview = await services.in_redis(services.client.overview, tenant=caller.tenant)
    if not caller.may(Scope.ADMIN):
        workers = [w.model_copy(update={"name": public_worker(w.name)}) for w in overview.workers]
        overview = overview.model_copy(update={"counts": None, "workers": tuple(workers)})
    return JSONResponse(overview.model_dump(mode="json"))


class DeadList(BaseModel):
    """Newest first."""

    data: list[JobView]
    has_more: bool


class Retried(BaseModel):
    """The new job and the dead job it was created from."""

    id: str
    retry_of: str


class Dropped(BaseModel):
    id: str
    dropped: bool = True


@router.get("/dead", operation_id="listDead", tags=["jobs"], response_model=DeadList, responses=documented())
async def list_dead(caller: Reader, services: ServicesDep, limit: Annotated[int, Query(ge=1, le=100)] = 20) -> Response:
    """Jobs that failed permanently, each with the history of its attempts."""
    found = await services.in_redis(services.client.dead_jobs.list, limit=limit + 1, tenant=caller.tenant)
    data = [await view(record, services, caller) for record in found[:limit]]
    return JSONResponse({"data": data, "has_more": len(found) > limit})


@router.post(
    "/dead/{job_id}/retry",
    operation_id="retryDead",
    tags=["jobs"],
    response_model=Retried,
    responses=documented(404, 409),
)
async def retry_dead(job_id: JobId, caller: Writer, services: ServicesDep) -> Response:
    """Submit the config of a dead job again as a new job, and remove the old one from the list."""
    record = await services.job(job_id, caller.tenant)
    async with caller.taking(images=record.config.image_count):
        handle = await services.in_redis(services.client.dead_jobs.retry, job_id)
    return JSONResponse({"id": handle.id, "retry_of": job_id})


@router.delete(
    "/dead/{job_id}", operation_id="dropDead", tags=["jobs"], response_model=Dropped, responses=documented(404)
)
async def drop_dead(job_id: JobId, caller: Writer, services: ServicesDep) -> Response:
    """Take it off the list; its record stays for its time."""
    await services.job(job_id, caller.tenant)
    await services.in_redis(services.client.dead_jobs.drop, job_id)
    return JSONResponse({"id": job_id, "dropped": True})


class Provenance(BaseModel):
    """Everything that determined an image: submitting its `config` generates the same image again."""

    model_config = ConfigDict(extra="allow")

    calotype: str
    config: dict[str, Any]
    digest: str
    job_id: str
    index: int
    seed: int
    model: str
    model_version: str
    steps_taken: int
    parameters: str


@router.get(
    "/jobs/{job_id}/images/{index}/provenance",
    operation_id="getJobImageProvenance",
    tags=["jobs"],
    response_model=Provenance,
    responses=documented(404),
)
async def get_provenance(
    job_id: JobId, index: Annotated[int, Path(ge=0, le=10_000)], caller: Reader, services: ServicesDep
) -> Response:
    """The provenance of one of a job's images, as it is also written into the image's file."""
    record = await services.job(job_id, caller.tenant)
    missing = f"job {job_id} is {record.state.value} and there is no image {index} of it in the storage"
    if index >= len(record.images):
        raise NotFound(missing)
    try:
        found = await services.in_storage(services.storage.get, sidecar_of(record.images[index].key))
    except ObjectMissing:
        raise NotFound(missing) from None
    return JSONResponse(json.loads(found))
