"""Images that go in: sent through the gateway, or put straight into storage by a presigned link."""

from __future__ import annotations

import secrets
import struct
import time
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile

from calotype.gateway.auth import Writer
from calotype.gateway.errors import NotFound, documented
from calotype.gateway.front import GuardedRoute
from calotype.gateway.state import Services, ServicesDep
from calotype_shared.errors import InvalidRequest
from calotype_shared.storage.images import MAX_BYTES, normalize_image, upload_key

router = APIRouter(prefix="/v1/uploads", tags=["uploads"], route_class=GuardedRoute)

_LINK_SECONDS = 900
Kind = Annotated[
    Literal["image", "mask"],
    Query(description="What it is used as: transparent parts become white, those of a mask black (not repainted)."),
]


class Upload(BaseModel):
    """A stored image and its size in pixels. Use its id in `init_image`, `mask_image` or a control."""

    id: str
    width: int
    height: int


class Link(BaseModel):
    """Where to upload an image: `PUT` its bytes to `url`, then complete the upload with the token."""

    url: str
    method: str = "PUT"
    token: str
    expires_at: int
    max_bytes: int = MAX_BYTES


class Token(BaseModel):
    token: Annotated[str, Field(pattern="^[A-Za-z0-9_-]{43}$")]


_IMAGE = {"schema": {"type": "string", "format": "binary"}}


@router.post(
    "",
    operation_id="uploadImage",
    status_code=201,
    response_model=Upload,
    responses=documented(),
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {
                **{f"image/{kind}": _IMAGE for kind in ("png", "jpeg", "webp")},
                "multipart/form-data": {
                    "schema": {"type": "object", "required": ["image"], "properties": {"image": _IMAGE["schema"]}}
                },
            },
        }
    },
)
async def upload(request: Request, caller: Writer, services: ServicesDep, kind: Kind = "image") -> Response:
    """Store an image: a PNG, JPEG or WebP file as the body, or as `image` of a form."""
    form = request.headers.get("content-type", "").startswith("multipart/form-data")
    data = await _from_form(request) if form else await request.body()
    return JSONResponse(await _stored(services, data, kind), 201)


async def _from_form(request: Request) -> bytes:
    async with request.form(max_files=1, max_fields=0) as form:
        image = form.get("image")
        if not isinstance(image, UploadFile):
            raise InvalidRequest("is missing", field="image", value=None, remedy="send the image as the file `image`")
        return await image.read()


@router.post("/presigned", operation_id="createUploadLink", response_model=Link, responses=documented())
async def presign(caller: Writer, services: ServicesDep) -> Response:
    """A link to put an image straight into storage, without passing through the gateway."""
    token = secrets.token_urlsafe(32)
    url = await run_in_threadpool(
        services.storage.presigned_put, _incoming(caller.tenant, token), expires_seconds=_LINK_SECONDS
    )
    return JSONResponse(
        {
            "url": url,
            "method": "PUT",
            "token": token,
            "expires_at": int(time.time()) + _LINK_SECONDS,
            "max_bytes": MAX_BYTES,
        }
    )


@router.post(
    "/complete", operation_id="completeUpload", status_code=201, response_model=Upload, responses=documented(404)
)
async def complete(done: Token, caller: Writer, services: ServicesDep, kind: Kind = "image") -> Response:
    """Check the image that was put there, and store it."""
    key = _incoming(caller.tenant, done.token)
    if not await services.in_storage(services.storage.exists, key):
        raise NotFound("no image has been uploaded; PUT it to the link first, or request a new link")
    # One byte more than allowed is enough to know that it is too large, without fetching all of it.
    data = await services.in_storage(services.storage.get_range, key, 0, MAX_BYTES + 1)
    try:
        return JSONResponse(await _stored(services, data, kind), 201)
    finally:
        await services.in_storage(services.storage.delete, key)


def _incoming(tenant: str, token: str) -> str:
    return f"incoming/{tenant}/{token}"


async def store_image(services: Services, data: bytes, *, field: str = "image") -> tuple[str, bytes]:
    """Store an image for use in a job. Returns its id and the stored PNG file. Raises InvalidRequest."""
    upload_id, stored = await services.in_images(normalize_image, data, field=field)
    await services.in_storage(services.storage.put, upload_key(upload_id), stored, "image/png")
    return upload_id, stored


async def _stored(services: Services, data: bytes, kind: str) -> dict[str, Any]:
    upload_id, stored = await store_image(services, data, field=kind)
    width, height = struct.unpack(">II", stored[16:24])  # at this offset in every PNG
    return {"id": upload_id, "width": width, "height": height}
