"""The routes, NIM's and vLLM's: chat completions, models, health, metadata, metrics, and the page."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException

import vlm_nemo
from vlm_nemo.data.layout.spec import view_tokens
from vlm_nemo.serve import errors, web
from vlm_nemo.serve.chat import Service, answer_chat
from vlm_nemo.serve.config import ServeConfig
from vlm_nemo.serve.errors import APIError
from vlm_nemo.serve.loop import EngineLoop, deliver

API_VERSION = "v1"
PROMETHEUS = "text/plain; version=1.0.0; charset=utf-8"
SHOWN = ("backend", "precision", "context_length")
"""What /v1/metadata tells of the model: paths of this machine are nobody's business."""


def make_app(loop: EngineLoop, cfg: ServeConfig) -> FastAPI:
    """The application around an engine loop, which starts and ends with it."""
    service = Service(loop, cfg)

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        running = asyncio.get_running_loop()

        def post(deliveries: Any) -> None:
            if not running.is_closed():
                running.call_soon_threadsafe(deliver, deliveries)

        loop.start(post)
        yield
        loop.drain(0)
        await asyncio.to_thread(loop.join, cfg.drain_s)
        service.threads.shutdown(wait=False, cancel_futures=True)

    # No pages of its own: they would load scripts from elsewhere
    app = FastAPI(lifespan=life, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_exception_handler(APIError, _api_error)
    app.add_exception_handler(HTTPException, _http_error)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await answer_chat(service, request)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model_card(service)]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        if name != service.name:
            raise errors.not_found(f"The model `{name[:100]}` does not exist.", "model")
        return _model_card(service)

    @app.get("/v1/health/live")
    async def live() -> dict[str, str]:
        return {"object": "health.response", "message": "Service is live."}

    @app.get("/v1/health/ready")
    async def ready() -> JSONResponse:
        reason = loop.why_not
        content = {"object": "health.response", "message": reason or "Service is ready."}
        return JSONResponse(content, 200 if reason is None else 503)

    @app.get("/v1/metadata")
    async def metadata() -> dict[str, Any]:
        if loop.model is None:
            raise errors.unavailable("The model is loading.")
        spec = loop.model.spec
        return {
            "version": vlm_nemo.__version__,
            "modelInfo": [{"modelUrl": service.name, "shortName": service.name}],
            "model": {key: loop.model.info[key] for key in SHOWN if key in loop.model.info},
            "image": {
                "size": spec.size,
                "layout": spec.layout.kind,
                "aspect": spec.layout.aspect,
                # Of a view; one of an image's own shape has as many as that gives
                "tokens": None if spec.layout.kind == "native" else view_tokens(spec, spec.grid),
            },
            "limits": {
                "images": cfg.max_images,
                "image_bytes": cfg.max_image_bytes,
                "pixels": cfg.max_pixels,
                "body_bytes": cfg.max_body_bytes,
            },
        }

    @app.get("/v1/version")
    async def version() -> dict[str, str]:
        return {"release": vlm_nemo.__version__, "api": API_VERSION}

    @app.get("/v1/metrics")
    async def nim_metrics() -> PlainTextResponse:
        return PlainTextResponse(service.metrics.text(nim=True), media_type=PROMETHEUS)

    @app.get("/metrics")
    async def vllm_metrics() -> PlainTextResponse:
        return PlainTextResponse(service.metrics.text(nim=False), media_type=PROMETHEUS)

    @app.get("/")
    async def index() -> HTMLResponse:
        return HTMLResponse(web.page(), headers=web.headers())

    return app


def _model_card(service: Service) -> dict[str, Any]:
    """An entry of /v1/models."""
    name, model = service.name, service.loop.model
    context = None if model is None else model.engine.backend.capacity
    return {
        "id": name,
        "object": "model",
        "created": service.started,
        "owned_by": "vlm_nemo",
        "root": name,
        "parent": None,
        "max_model_len": context,
    }


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, APIError)
    return JSONResponse(error.body(), error.status, headers=error.headers)


async def _http_error(request: Request, error: Exception) -> Response:
    """A path or method that does not exist, in the form of all other errors."""
    assert isinstance(error, HTTPException)
    kind = "NotFoundError" if error.status_code == 404 else "BadRequestError"
    return await _api_error(request, APIError(error.status_code, kind, error.detail, headers=error.headers))
