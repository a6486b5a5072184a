"""Error responses of the gateway: one table from errors to HTTP statuses, and one format per API.

Calotype's own API returns RFC 9457 problems. The other APIs return what their clients expect.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from calotype.api_keys import Forbidden, Unauthorized
from calotype.gateway.privacy import public_error
from calotype_shared.errors import (
    BatchNotFound,
    CalotypeError,
    IdempotencyConflict,
    InvalidRequest,
    JobCancelled,
    JobFailed,
    JobNotFound,
    ServiceUnavailable,
    TooBusy,
    UnknownModel,
    WaitTimeout,
    shown,
)
from calotype_shared.schema.config import GenerationConfig
from calotype_shared.schema.refusal import explained

log = logging.getLogger(__name__)

RETRY_SECONDS = 5  # `Retry-After` if there is no better estimate


class NotFound(CalotypeError):
    """Something other than a job or a batch does not exist."""

    code = "not_found"


# An error has the status of its nearest ancestor here. Errors without one are bugs.
STATUSES: Mapping[type[CalotypeError], int] = {
    UnknownModel: 404,
    IdempotencyConflict: 409,
    InvalidRequest: 400,
    JobNotFound: 404,
    BatchNotFound: 404,
    NotFound: 404,
    Unauthorized: 401,
    Forbidden: 403,
    TooBusy: 429,
    WaitTimeout: 504,
    JobFailed: 422,
    JobCancelled: 409,
    ServiceUnavailable: 503,
}


class Problem(BaseModel):
    """An error in the form of RFC 9457. `field`, `value` and `remedy` describe an invalid request."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    code: str
    field: str | None = None
    value: str | None = None
    remedy: str | None = None


_REMEDIES = {
    "after": "leave it out, or use `next` of the previous page",
    "body": "send one JSON object, as Content-Type: application/json",
    "token": "use the token that was returned with the link",
}

Render = Callable[[Problem], dict[str, Any]]


def problem_of(error: CalotypeError) -> Problem:
    status = next((STATUSES[ancestor] for ancestor in type(error).__mro__ if ancestor in STATUSES), 500)
    details: dict[str, str] = {}
    if isinstance(error, InvalidRequest):
        details = {"field": error.field, "value": shown(error.value, 200), "remedy": error.remedy}
    return Problem(title=type(error).__name__, status=status, detail=str(error), code=error.code, **details)


def _openai(problem: Problem) -> dict[str, Any]:
    kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
    kind = kinds.get(problem.status, "invalid_request_error" if problem.status < 500 else "server_error")
    code = "model_not_found" if problem.code == UnknownModel.code else problem.code
    return {"error": {"message": problem.detail, "type": kind, "param": problem.field, "code": code}}


def _a1111(problem: Problem) -> dict[str, Any]:
    return {"error": problem.title, "detail": problem.detail, "body": "", "errors": problem.detail}


# The first matching prefix decides. Other paths return the problem itself.
RENDERERS: Mapping[str, Render] = {
    "/v1/images": _openai,
    "/v1/files": _openai,
    "/v1/batches": _openai,
    "/v1/models": _openai,
    "/sdapi": _a1111,
}


def respond(request: Request, problem: Problem, headers: Mapping[str, str] | None = None) -> Response:
    """The response for a problem, in the format of the requested API."""
    shown, media_type = problem.model_dump(exclude_none=True), "application/problem+json"
    for prefix, render in RENDERERS.items():
        if request.url.path.startswith(prefix):
            shown, media_type = render(problem), "application/json"
            break
    # In ASCII, because the value may be a name that cannot be encoded as UTF-8.
    return Response(json.dumps(shown), problem.status, headers=headers, media_type=media_type)


async def on_error(request: Request, error: Exception) -> Response:
    """For every error that Calotype raises deliberately."""
    assert isinstance(error, CalotypeError)
    return refusal(request, error)


def shown_to(request: Request, error: CalotypeError) -> CalotypeError:
    """The error as a response may show it: where keys are required, without addresses of services."""
    return public_error(error) if request.app.state.services.gateway.needs_key else error


def refusal(request: Request, error: CalotypeError) -> Response:
    problem = problem_of(shown_to(request, error))
    headers = {}
    if problem.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, TooBusy):
        headers["Retry-After"] = str(math.ceil(error.retry_after_seconds))
    elif problem.status == 503:
        headers["Retry-After"] = str(RETRY_SECONDS)
    return respond(request, problem, headers)


async def on_invalid(request: Request, error: Exception) -> Response:
    """For requests that do not match their schema."""
    assert isinstance(error, RequestValidationError)
    return respond(request, problem_of(_explained(error.errors()[0])))


def _explained(first: Mapping[str, Any]) -> InvalidRequest:
    """An InvalidRequest for one of FastAPI's validation errors."""
    context = dict(first.get("ctx", {}))
    if first["type"] == "json_invalid":
        problem = f"is not valid JSON ({context.get('error')} at character {first['loc'][-1]})"
        return InvalidRequest(problem, field="body", value="…", remedy=_REMEDIES["body"])
    where = first["loc"][1:] if first["loc"][0] in ("body", "query", "path", "header") else first["loc"]
    where = where or first["loc"]
    if first["type"] == "enum":
        context["remedy"] = f"use {context['expected']}"
    elif first["type"] != "missing" and where[-1] in _REMEDIES and "field" not in context:
        context["remedy"] = _REMEDIES[where[-1]]
    return explained({**first, "loc": where, "ctx": context}, fields=GenerationConfig.model_fields)


async def on_http(request: Request, error: Exception) -> Response:
    """For requests that the framework refuses: an unknown path, a wrong method."""
    assert isinstance(error, HTTPException)
    codes = {404: "not_found", 405: "method_not_allowed", 408: "too_slow", 413: "too_large"}
    code = codes.get(error.status_code, "invalid_request")
    problem = Problem(title=str(error.detail), status=error.status_code, detail=str(error.detail), code=code)
    return respond(request, problem, error.headers)


async def on_gone(request: Request, error: Exception) -> Response:
    """For a client that disconnected before the body was complete."""
    return Response(status_code=400)


async def on_bug(request: Request, error: Exception) -> Response:
    log.exception("unexpected error in a request", extra={"path": request.url.path}, exc_info=error)
    problem = Problem(
        title="Internal error",
        status=500,
        detail="a bug in the gateway; its log has the details",
        code="internal_error",
    )
    return respond(request, problem)


def install(app: FastAPI) -> None:
    app.add_exception_handler(CalotypeError, on_error)
    app.add_exception_handler(RequestValidationError, on_invalid)
    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(ClientDisconnect, on_gone)
    app.add_exception_handler(Exception, on_bug)


def documented(*statuses: int, openai: bool = False) -> dict[int | str, dict[str, Any]]:
    """The error responses of a route, for the schema. Authentication, limits and outages apply to every route."""
    everywhere = (400, 401, 403, 408, 413, 429, 503)
    described = {
        400: "The request is invalid. `detail` says why, and what would work.",
        401: "No valid API key.",
        403: "The key does not allow this.",
        404: "It does not exist, or it belongs to another tenant.",
        408: "The body came too slowly.",
        409: "It conflicts with the current state.",
        413: "The request is too large.",
        422: "The job failed.",
        429: "A rate or capacity limit is reached; see `Retry-After`.",
        503: "Redis or storage is unavailable; see `Retry-After`.",
        504: "The wait timed out; the job continues.",
    }
    content: dict[str, Any] = {"application/json": {"schema": {"type": "object"}}}
    if not openai:
        content = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
    found: dict[int | str, dict[str, Any]] = {}
    for status in sorted({*everywhere, *statuses}):
        found[status] = {"description": described[status], "content": content}
    return found


def exact(schema: dict[str, Any]) -> dict[str, Any]:
    """FastAPI's schema, changed in place to match the real requests and responses.

    Invalid requests get a problem instead of FastAPI's 422. API keys, which Calotype's own code reads, are added.
    """
    shapes = schema["components"]["schemas"]
    schema["components"]["securitySchemes"] = {
        "bearer": {"type": "http", "scheme": "bearer", "description": "An API key, from `calotype keys create`."},
        "header": {
            "type": "apiKey",
            "in": "header",
            "name": "X-API-Key",
            "description": "Alternative header for an API key.",
        },
    }
    schema["security"] = [{"bearer": []}, {"header": []}, {}]
    shapes["Problem"] = Problem.model_json_schema()
    theirs = "#/components/schemas/HTTPValidationError"
    for operation in (operation for path in schema["paths"].values() for operation in path.values()):
        content = operation["responses"].get("422", {}).get("content", {}).get("application/json", {})
        if content.get("schema", {}).get("$ref") == theirs:
            del operation["responses"]["422"]
    for name in ("HTTPValidationError", "ValidationError"):
        shapes.pop(name, None)
    return schema
