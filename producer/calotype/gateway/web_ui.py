"""The web page: a few static files from the package, and the security policy for browsers.

The page calls only this gateway's API and shows images from the storage; the policy allows nothing else.
"""

from __future__ import annotations

import hashlib
import logging
from functools import cache
from importlib import resources
from typing import Annotated, NamedTuple
from urllib.parse import urlsplit

from fastapi import APIRouter, Header, Path, Response
from starlette.concurrency import run_in_threadpool

from calotype.gateway.errors import NotFound
from calotype.gateway.state import ServicesDep
from calotype_shared.storage.s3 import Storage

log = logging.getLogger(__name__)

router = APIRouter(include_in_schema=False)

_INDEX = "index.html"
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_HEADERS = {
    "Cache-Control": "no-cache",  # revalidated each time; the response is a few bytes if it has not changed
    "Cross-Origin-Opener-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


class WebFile(NamedTuple):
    data: bytes
    media_type: str
    etag: str


@cache
def web_files() -> dict[str, WebFile]:
    """Every file of the page, by its name."""
    found = {}
    for file in (resources.files("calotype") / "web").iterdir():
        suffix = file.name[file.name.rfind(".") :]
        if suffix in _TYPES:
            data = file.read_bytes()
            etag = f'"{hashlib.sha256(data).hexdigest()[:20]}"'
            found[file.name] = WebFile(data, f"{_TYPES[suffix]}; charset=utf-8", etag)
    return found


def policy(images: str) -> str:
    """The Content-Security-Policy. `images` is the origin of links to images; it may be empty."""
    return "; ".join(
        (
            "default-src 'none'",
            "script-src 'self'",
            "style-src 'self'",
            "connect-src 'self'",
            f"img-src 'self' blob: data: {images}".rstrip(),  # data: previews
            f"media-src 'self' {images}".rstrip(),
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
        )
    )


def origin_of_images(storage: Storage) -> str:
    """The origin of links to images; empty if this process does not know the storage's keys."""
    from botocore.exceptions import BotoCoreError  # noqa: PLC0415 - slow, and the storage loads it itself when used

    try:
        parts = urlsplit(storage.presigned_url("any"))
    except BotoCoreError as error:
        log.warning("the web UI cannot show images", extra={"reason": str(error)})
        return ""
    return f"{parts.scheme}://{parts.netloc}"


@router.get("/")
async def index(services: ServicesDep, if_none_match: Annotated[str | None, Header()] = None) -> Response:
    """The page itself; its files are below `/web/`."""
    security = policy(await run_in_threadpool(origin_of_images, services.storage))
    response = _answer(web_files()[_INDEX], if_none_match)
    response.headers["Content-Security-Policy"] = security
    return response


@router.get("/web/{name}")
async def file(
    name: Annotated[str, Path(max_length=100)], if_none_match: Annotated[str | None, Header()] = None
) -> Response:
    if name not in web_files() or name == _INDEX:
        raise NotFound(f"the web UI has no file {name!r}")
    return _answer(web_files()[name], if_none_match)


def _answer(found: WebFile, known: str | None) -> Response:
    headers = {**_HEADERS, "ETag": found.etag}
    if known == found.etag:
        return Response(status_code=304, headers=headers)
    return Response(found.data, media_type=found.media_type, headers=headers)
