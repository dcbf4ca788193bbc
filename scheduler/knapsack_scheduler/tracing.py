"""Events become OpenTelemetry spans: one per call, with its solve and its store below it.

Nothing here runs, and nothing of OpenTelemetry is imported, unless tracing is on.
"""

from __future__ import annotations

import os
import time
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from knapsack_scheduler.errors import ConfigError
from knapsack_scheduler.events import BudgetDivided, CallBegun, CallHandled, Committed, Event

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

_SERVICE = "knapsack_proto.v1.BudgetScheduler"
_FAILURES = ("INTERNAL", "UNAVAILABLE", "UNKNOWN")


class Tracing:
    """Listens to events and makes spans of them.

    A caller's ``traceparent`` metadata makes the call's span part of the caller's trace.

    Args:
        provider: makes and exports the spans.
    """

    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry import propagate, trace

        self._provider = provider
        self._tracer = provider.get_tracer("knapsack_scheduler")
        self._extract = propagate.extract
        self._trace = trace
        self._call: ContextVar[Span | None] = ContextVar("span", default=None)

    @classmethod
    def exporting(cls) -> Tracing:
        """Return tracing to where the standard environment variables (OTEL_...) say.

        Raises:
            ConfigError: OpenTelemetry is not installed.
        """
        try:
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import SERVICE_NAME, Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"tracing: {error.name} is not installed; pip install 'knapsack-rl[otel]'"
            ) from None
        # What is given here would win over the variable.
        name = os.environ.get("OTEL_SERVICE_NAME", "knapsack-scheduler")
        resource = Resource.create({SERVICE_NAME: name})
        provider = TracerProvider(resource=resource)
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        return cls(provider)

    def close(self) -> None:
        """Export what is left."""
        self._provider.shutdown()

    def __call__(self, event: Event) -> None:
        """Take in an event."""
        match event:
            case CallBegun():
                self._begin(event)
            case BudgetDivided():
                self._child("solve", event.seconds, event.end_time, prompts=event.prompts)
            case Committed():
                self._child(
                    "store", event.seconds, time.time_ns(), failed=event.failed, busy=event.busy
                )
            case CallHandled():
                self._end(event)

    def _begin(self, event: CallBegun) -> None:
        carrier = {k: v for k, v in event.metadata.items() if isinstance(v, str)}
        self._call.set(
            self._tracer.start_span(
                f"{_SERVICE}/{event.method}",
                context=self._extract(carrier),
                kind=self._trace.SpanKind.SERVER,
                attributes={
                    "rpc.system": "grpc",
                    "rpc.service": _SERVICE,
                    "rpc.method": event.method,
                    "knapsack.request_id": event.request_id,
                },
            )
        )

    def _child(self, name: str, seconds: float, end_time: int, **attributes: Any) -> None:
        parent = self._call.get()
        if parent is None:
            return
        span = self._tracer.start_span(
            name,
            context=self._trace.set_span_in_context(parent),
            start_time=end_time - int(seconds * 1e9),
            attributes={f"knapsack.{key}": value for key, value in attributes.items()},
        )
        span.end(end_time)

    def _end(self, event: CallHandled) -> None:
        span = self._call.get()
        if span is None:
            return
        span.set_attribute("rpc.grpc.status_code", _number(event.code))
        if event.run_id:
            span.set_attribute("knapsack.run_id", event.run_id)
        if event.code in _FAILURES:
            span.set_status(self._trace.Status(self._trace.StatusCode.ERROR, event.message))
        span.end()
        self._call.set(None)


def _number(code: str) -> int:
    import grpc

    return int(grpc.StatusCode[code].value[0])
