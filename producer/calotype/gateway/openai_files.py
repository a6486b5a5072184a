"""OpenAI's files API: uploaded manifests, and the results of batches."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Iterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, File, Form, Path, Query, Response, UploadFile
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel

from calotype.files import StoredFile
from calotype.gateway.auth import Batcher
from calotype.gateway.errors import NotFound, documented
from calotype.gateway.front import GuardedRoute
from calotype.gateway.state import Services, ServicesDep
from calotype_shared.errors import InvalidRequest

router = APIRouter(prefix="/v1", tags=["batches"], route_class=GuardedRoute)

# The files of a batch have no record: their ids name the batch and which of its files.
RESULT = re.compile(r"file-(batch_[0-9a-z]{26})-(output|errors)")

FileId = Annotated[str, Path(max_length=100)]
After = Annotated[str | None, Query(max_length=100, description="Cursor: the last id of the page before.")]


class FileObject(BaseModel):
    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    filename: str
    purpose: Literal["batch", "batch_output", "vision", "user_data"]
    status: Literal["processed"] = "processed"


class FileList(BaseModel):
    object: Literal["list"] = "list"
    data: list[FileObject]
    has_more: bool


class Deleted(BaseModel):
    id: str
    object: Literal["file"] = "file"
    deleted: bool = True


def _file(stored: StoredFile) -> dict[str, Any]:
    shown = {**stored.model_dump(), "created_at": int(stored.created_at)}
    return FileObject(**shown).model_dump()


@router.post("/files", operation_id="openaiCreateFile", response_model=FileObject, responses=documented(openai=True))
async def create_file(
    caller: Batcher,
    services: ServicesDep,
    file: Annotated[UploadFile, File()],
    purpose: Annotated[Literal["batch", "vision", "user_data"], Form()] = "batch",
) -> Response:
    """Store a file. For the purpose `batch`: one request per line, up to a million."""
    stored = await services.in_storage(
        services.files.add,
        file.file,
        tenant=caller.tenant,
        filename=(file.filename or "file.jsonl")[:200],
        purpose=purpose,
    )
    return JSONResponse(_file(stored))


@router.get("/files", operation_id="openaiListFiles", response_model=FileList, responses=documented(openai=True))
async def list_files(
    caller: Batcher,
    services: ServicesDep,
    purpose: Annotated[str | None, Query(max_length=50)] = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 100,
    after: After = None,
) -> Response:
    """Files that were uploaded, newest first."""
    files = [
        f for f in await services.in_redis(services.files.all, tenant=caller.tenant) if purpose in (None, f.purpose)
    ]
    ids = [file.id for file in files]
    start = ids.index(after) + 1 if after in ids else 0
    page = files[start : start + limit]
    data = [_file(file) for file in page]
    return JSONResponse({"object": "list", "data": data, "has_more": start + limit < len(files)})


@router.get(
    "/files/{file_id}", operation_id="openaiGetFile", response_model=FileObject, responses=documented(404, openai=True)
)
async def get_file(file_id: FileId, caller: Batcher, services: ServicesDep) -> Response:
    """One file."""
    return JSONResponse(_file(await find_file(services, file_id, caller.tenant)))


@router.get(
    "/files/{file_id}/content",
    operation_id="openaiGetFileContent",
    response_class=StreamingResponse,
    responses={
        200: {"content": {"application/jsonl": {}}, "description": "Its bytes."},
        **documented(404, openai=True),
    },
)
async def get_content(file_id: FileId, caller: Batcher, services: ServicesDep) -> Response:
    """A file's bytes. Those of a batch's results can be read while it runs."""
    await find_file(services, file_id, caller.tenant)
    chunks: Iterator[bytes]
    if result := RESULT.fullmatch(file_id):
        chunks = services.client.batches.result_chunks(result[1], errors=result[2] == "errors")
    else:
        chunks = services.files.read(file_id, tenant=caller.tenant)
    return StreamingResponse(_pieces(services, chunks), media_type="application/jsonl")


async def _pieces(services: Services, chunks: Iterator[bytes]) -> AsyncIterator[bytes]:
    while (chunk := await services.in_storage(next, chunks, None)) is not None:
        yield chunk


@router.delete(
    "/files/{file_id}", operation_id="openaiDeleteFile", response_model=Deleted, responses=documented(404, openai=True)
)
async def delete_file(file_id: FileId, caller: Batcher, services: ServicesDep) -> Response:
    """Remove a file. A batch that is not validated yet still needs its input file."""
    if RESULT.fullmatch(file_id):
        raise InvalidRequest(
            "belongs to a batch", field="file_id", value=file_id, remedy="it is deleted when the batch's record expires"
        )
    await find_file(services, file_id, caller.tenant)
    await services.in_storage(services.files.remove, file_id, tenant=caller.tenant)
    return JSONResponse({"id": file_id, "object": "file", "deleted": True})


async def find_file(services: Services, file_id: str, tenant: str) -> StoredFile:
    """A tenant's file. Raises NotFound, BatchNotFound."""
    if result := RESULT.fullmatch(file_id):
        batch = await services.batch(result[1], tenant)
        key = batch.errors if result[2] == "errors" else batch.output
        size = await services.in_storage(services.storage.size, key) if key else 0
        name = f"{batch.id}_{result[2]}.jsonl"
        return StoredFile(id=file_id, filename=name, purpose="batch_output", bytes=size, created_at=batch.created_at)
    stored = await services.in_redis(services.files.get, file_id, tenant=tenant)
    if stored is None:
        raise NotFound(f"file {file_id!r} does not exist; see GET /v1/files")
    return stored
