"""The web application."""

import asyncio
import gc
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI
from fastapi.routing import APIRoute
from fastapi.telemetry import TelemetryConfig
from fastapi_offline import FastAPIOffline
from starlette.middleware.cors import CORSMiddleware
from starlette.staticfiles import StaticFiles

from service import health
from service.access import endpoints as audit
from service.access.authentication import AuthenticationMiddleware
from service.access.forwarded import ForwardedMiddleware
from service.access.state import access_state
from service.http import openapi
from service.http.body_limit import BodyLimitMiddleware
from service.http.docs_pages import add_docs_pages
from service.http.errors import (
    ForbiddenError,
    Problem,
    TooManyRequestsError,
    UnauthenticatedError,
    error_responses,
    install_error_handlers,
    problem_content,
)
from service.http.request_ids import HEADER as REQUEST_ID_HEADER
from service.http.request_ids import RequestIdMiddleware
from service.http.security_headers import SecurityHeadersMiddleware
from service.metrics import Metrics, MetricsMiddleware, QueueCollector
from service.models import endpoints as models
from service.models.schemas import BuiltinModelRequest, HubModelRequest, PathModelRequest
from service.openai import endpoints as openai
from service.openai.errors import OpenAIErrorMiddleware
from service.samples import endpoints as samples
from service.samples.admission import AdmissionMiddleware
from service.samples.state import samples_state
from service.schedules import endpoints as schedules
from service.shared import telemetry
from service.shared.sampler_facts import load_installed_samplers
from service.shared.settings import Settings
from service.state import open_state
from service.tuning_groups import endpoints as tuning_groups
from service.tuning_jobs import endpoints as tuning_jobs
from service.tuning_jobs.following import TuningEvents
from service.usage import endpoints as usage
from service.web import endpoints as web
from service.web import forms as web_forms
from service.web.error_pages import ErrorPageMiddleware

# FastAPI makes a span for each request to the API, in the client's trace if it has one. Without a tracer it makes none.
SAMPLING_PATHS = ("/v1/samples", "/openai/v1/images/generations")

DOCS_FILES = "/docs/static"

TRACED: TelemetryConfig = {
    "metrics": False,
    "logs": False,
    "operation_spans": False,
    "exclude": lambda scope: not scope["path"].startswith("/v1/"),
}


def create_app(settings: Settings | None = None) -> FastAPI:
    """The application on a database that has been migrated."""
    settings = settings or Settings()
    metrics = Metrics()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        telemetry.start_tracing("timetuner-api", settings.otel_exporter_otlp_endpoint)
        with open_state(settings) as state:
            app.state.timetuner, app.state.access = state, access_state(state)
            app.state.samples = samples = samples_state(state)
            app.state.tuning_events = TuningEvents(state.registry)
            metrics.registry.register(QueueCollector(state.registry, samples.admission, settings.max_stored_bytes))
            listening = asyncio.create_task(samples.events.run())
            threading.Thread(target=load_installed_samplers, daemon=True).start()  # No request should wait for it.
            gc.freeze()  # Objects loaded by now stay. Collections that went through them would delay all requests.
            yield
            listening.cancel()

    # FastAPIOffline serves the files of the documentation pages itself, so browsers load nothing from elsewhere.
    app = FastAPIOffline(
        docs_url=None,
        redoc_url=None,
        **openapi.ABOUT,
        version=version("timetuner"),
        lifespan=lifespan,
        telemetry=TRACED,
        responses={"default": {**problem_content(), "description": "Any other error."}},
        static_url=DOCS_FILES,
    )
    app.state.metrics = metrics
    areas = (models, tuning_jobs, tuning_groups, schedules, samples, usage, audit, health)
    every = [route for area in (*areas, openai, web, web_forms) for route in area.router.routes]
    routes = [route for route in every if isinstance(route, APIRoute)]
    _add_middleware(app, settings, metrics, [route.path for route in routes])
    install_error_handlers(app, routes)
    key_errors = error_responses(UnauthenticatedError, ForbiddenError, TooManyRequestsError)
    for area in areas:
        app.include_router(area.router, responses={} if area is health else key_errors)

    app.include_router(openai.router, responses=openai.ERRORS)
    app.include_router(web.router)
    app.include_router(web_forms.router)
    add_docs_pages(app, DOCS_FILES)
    app.mount("/static", StaticFiles(directory=web.STATIC), name="static")
    _complete_openapi(app)
    return app


def _add_middleware(app: FastAPI, settings: Settings, metrics: Metrics, paths: list[str]) -> None:
    """Add the middleware, the innermost first."""
    app.add_middleware(AdmissionMiddleware, admission=lambda: app.state.samples.admission, paths=SAMPLING_PATHS)
    app.add_middleware(AuthenticationMiddleware, state=lambda: app.state.timetuner, access=lambda: app.state.access)
    app.add_middleware(
        BodyLimitMiddleware,
        max_body_bytes=settings.max_body_bytes,
        max_json_bytes=settings.max_json_bytes,
        body_seconds=settings.body_seconds,
    )
    app.add_middleware(MetricsMiddleware, metrics=metrics, paths=paths)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=[
                "Content-Location",
                "ETag",
                "Location",
                "Retry-After",
                "TimeTuner-Not-Carried",
                REQUEST_ID_HEADER,
            ],
        )
    app.add_middleware(RequestIdMiddleware)
    app.add_middleware(ErrorPageMiddleware)
    app.add_middleware(OpenAIErrorMiddleware)
    app.add_middleware(SecurityHeadersMiddleware)
    app.add_middleware(ForwardedMiddleware, trusted_hosts=settings.forwarded_allow_ips)


def _complete_openapi(app: FastAPI) -> None:
    original = app.openapi

    def complete() -> dict[str, object]:
        if app.openapi_schema is None:
            openapi.complete(original(), Problem, BuiltinModelRequest, PathModelRequest, HubModelRequest)
        return original()

    app.openapi = complete  # type: ignore[method-assign]
