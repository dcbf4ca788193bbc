"""Spans of calls, in memory; and request ids, which find a call again without any spans."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind

from knapsack_proto.v1 import scheduler_pb2 as pb
from knapsack_proto.v1 import scheduler_pb2_grpc as rpc
from knapsack_scheduler.limits import Limits
from knapsack_scheduler.rpc import SchedulerServicer
from knapsack_scheduler.service import SchedulerService
from knapsack_scheduler.tracing import Tracing
from knapsack_trainer_client import BudgetClient
from knapsack_trainer_client.errors import InvalidRequest


async def test_a_call_is_a_span_with_its_solve_and_store(
    service: SchedulerService, calls: Any
) -> None:
    """In the caller's trace, over real gRPC; refused calls have their status."""
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    service.events.listen(Tracing(provider))
    server = grpc.aio.server()
    SchedulerServicer(service, Limits()).add_to(server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    trace_id, parent_id = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub: Any = rpc.BudgetSchedulerStub(channel)  # type: ignore[no-untyped-call]
            metadata = (("traceparent", f"00-{trace_id}-{parent_id}-01"),)
            await stub.Allocate(calls.allocate(), metadata=metadata)
            with pytest.raises(grpc.aio.AioRpcError):
                await stub.GetRun(pb.GetRunRequest(run_id="nobody"))
        await service.settled()
    finally:
        await server.stop(None)
    spans = {span.name.rsplit("/")[-1]: span for span in exporter.get_finished_spans()}
    call, solve = spans["Allocate"], spans["solve"]
    assert call.kind is SpanKind.SERVER
    assert f"{call.context.trace_id:032x}" == trace_id
    assert f"{call.parent.span_id:016x}" == parent_id
    assert call.attributes["rpc.grpc.status_code"] == 0
    assert call.attributes["knapsack.run_id"] == "run"
    stores = [s for s in exporter.get_finished_spans() if s.name == "store"]
    store = next(s for s in stores if s.context.trace_id == call.context.trace_id)
    for child in (solve, store):
        assert child.parent.span_id == call.context.span_id
        assert call.start_time <= child.start_time <= child.end_time <= call.end_time
    assert spans["GetRun"].attributes["rpc.grpc.status_code"] == 5


class Collector(TraceServiceServicer):
    """Takes spans in, as an OpenTelemetry collector does."""

    def __init__(self) -> None:
        self.requests: list[Any] = []

    def Export(self, request: Any, context: Any) -> Any:
        """Keep them."""
        self.requests.append(request)
        return ExportTraceServiceResponse()


def test_spans_reach_a_collector_before_the_end(
    start_scheduler: Callable[..., Any], calls: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    """Where the environment says, under its name for the service, and without the tokens."""
    collector = Collector()
    server = grpc.server(ThreadPoolExecutor(1))
    add_TraceServiceServicer_to_server(collector, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "budgets-of-team-a")
    tokens = tmp_path / "tokens"
    tokens.write_text("token-of-all *\n")
    scheduler = start_scheduler("--auto-create-runs", "--tracing", f"--token-file={tokens}")
    mine = (("authorization", "Bearer token-of-all"), ("x-request-id", "job-7/step-3"))
    scheduler.stub.Allocate(calls.allocate(), metadata=mine)
    with pytest.raises(grpc.RpcError):
        scheduler.stub.Allocate(calls.allocate(), metadata=(("authorization", "Bearer token-of"),))
    assert scheduler.end() == 0
    server.stop(None)
    resources = [r for request in collector.requests for r in request.resource_spans]
    names = {a.value.string_value for r in resources for a in r.resource.attributes}
    assert "budgets-of-team-a" in names
    spans = [s for r in resources for scope in r.scope_spans for s in scope.spans]
    attributes = [{a.key: a.value for a in span.attributes} for span in spans]
    ids = {a["knapsack.request_id"].string_value for a in attributes if "rpc.method" in a}
    assert len(ids) == 2
    assert "job-7/step-3" in ids
    assert {span.name for span in spans} >= {"solve", "store"}
    assert not any(b"token-of" in request.SerializeToString() for request in collector.requests)


def test_nothing_of_opentelemetry_is_loaded_while_tracing_is_off() -> None:
    """It costs nothing, and the extra need not be installed."""
    code = (
        "import sys, knapsack_scheduler.server as s; "
        "assert not [m for m in sys.modules if m.startswith('opentelemetry')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_request_id_finds_a_call_in_log_and_message(
    start_scheduler: Callable[..., Any], calls: Any
) -> None:
    """The caller's own id, or one made for the call, is in its lines and in its trailer."""
    scheduler = start_scheduler("--auto-create-runs", "--log-level=debug")
    mine = (("x-request-id", "job-7/step-3"),)
    scheduler.stub.Allocate(calls.allocate(), metadata=mine)
    with pytest.raises(grpc.RpcError) as refused:
        scheduler.stub.Allocate(calls.allocate([]), metadata=mine)
    assert refused.value.details().endswith("(x-request-id job-7/step-3)")
    with pytest.raises(grpc.RpcError) as other:
        scheduler.stub.Allocate(calls.allocate([]), metadata=(("x-request-id", "no spaces"),))
    trailer = dict(other.value.trailing_metadata())["x-request-id"]
    client = BudgetClient(scheduler.addresses["listen"], "theirs", outbox=False)
    with client, pytest.raises(InvalidRequest) as of_client:
        client.allocate(["a"], 1, 0)
    assert scheduler.end() == 0
    lines = [json.loads(line) for line in scheduler.log().splitlines()]
    of_mine = [line for line in lines if line.get("request_id") == "job-7/step-3"]
    words = [line["message"].replace("call was slow", "call") for line in of_mine]
    assert sorted(words) == ["budget divided", "call", "call refused"]
    [made] = [line for line in lines if line.get("request_id") == trailer]
    assert made["message"] == "call refused"
    # Our own client sends the id of its call.
    [theirs] = [line for line in lines if line.get("run_id") == "theirs"]
    assert theirs["call_id"] == theirs["request_id"]
    assert f"(x-request-id {theirs['request_id']})" in str(of_client.value)
