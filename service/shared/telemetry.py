"""Parts of metrics and traces that the API and workers share.

Traces go to OTEL_EXPORTER_OTLP_ENDPOINT. Without one, spans are no-ops, and OpenTelemetry's SDK is not imported.
"""

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from service.registry.tables import Job, ModelRegistration, SampleJob, TuningJob, TuningTask

KINDS: dict[type[Job], str] = {
    SampleJob: "sampling",
    TuningJob: "tuning",
    TuningTask: "tuning_step",
    ModelRegistration: "model",
}
TRACER = trace.get_tracer("timetuner")

_PROPAGATOR = TraceContextTextMapPropagator()


def start_tracing(service_name: str, endpoint: str) -> None:
    """Export this process's spans from now on, if there is an `endpoint`; the exporter reads its variables itself."""
    if not endpoint:
        return
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import SERVICE_NAME, OTELResourceDetector, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    named = OTELResourceDetector().detect()  # OTEL_SERVICE_NAME overrides `service_name`.
    provider = TracerProvider(resource=Resource.create({SERVICE_NAME: service_name}).merge(named))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)


def is_tracing() -> bool:
    """Whether spans go anywhere."""
    return not isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider)


def context_of(traceparent: str | None) -> Context:
    """The context for spans in the trace that a `traceparent` header names. Without one, they begin a trace."""
    return _PROPAGATOR.extract({"traceparent": traceparent} if traceparent else {})


def traceparent() -> str | None:
    """The header by which another process continues the current span."""
    headers: dict[str, str] = {}
    _PROPAGATOR.inject(headers)
    return headers.get("traceparent")
