"""`create_app`: everything the gateway serves."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from fastapi import APIRouter, FastAPI, Response
from fastapi.responses import JSONResponse

from calotype.gateway import (
    a1111,
    a1111_lists,
    errors,
    fleet,
    jobs,
    openai_batches,
    openai_files,
    openai_images,
    uploads,
    web_ui,
)
from calotype.gateway.front import Front
from calotype.gateway.request_metrics import RequestMetricsMiddleware
from calotype.gateway.settings import GatewaySettings
from calotype.gateway.state import Services, ServicesDep, lifespan
from calotype_shared.settings import Settings

ROUTERS: tuple[APIRouter, ...] = tuple(
    module.router for module in (jobs, fleet, uploads, openai_images, openai_files, openai_batches, a1111, a1111_lists)
)

health = APIRouter(tags=["operating"])


@health.get("/healthz", operation_id="isAlive")
async def alive() -> dict[str, str]:
    """This process answers."""
    return {"status": "ok"}


@health.get("/readyz", operation_id="isReady", responses={503: {"description": "Redis or the storage is away."}})
async def ready(services: ServicesDep) -> Response:
    """Succeeds if Redis and the storage respond."""
    await services.in_redis(services.client.counts)
    await services.in_storage(services.storage.check)
    return JSONResponse({"status": "ok"})


class Gateway(FastAPI):
    """FastAPI with an exact schema."""

    def openapi(self) -> dict[str, Any]:
        return self.openapi_schema or errors.exact(super().openapi())


def create_app(settings: Settings, gateway: GatewaySettings) -> FastAPI:
    """The ASGI application. Connects when it starts to serve."""
    app = Gateway(
        title="Calotype",
        version=version("calotype"),
        description="An asynchronous job queue for diffusion models.",
        lifespan=lifespan,
        docs_url=None,  # its page loads scripts from elsewhere
        redoc_url=None,
    )
    services = app.state.services = Services(settings, gateway)
    app.state.front = Front(gateway)
    errors.install(app)
    for router in (health, web_ui.router, *ROUTERS):
        app.include_router(router)
    app.add_middleware(RequestMetricsMiddleware, observer=services.metrics, tracer=services.telemetry.tracer)
    return app
