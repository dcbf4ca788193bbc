"""A server that speaks what we use of vLLM's HTTP API, over a small engine, with faults.

As a program it prints its port: python vllm_like.py
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

from aiohttp import web

from knapsack_genserver.engine import Completion, Engine, Group, Sampling
from knapsack_genserver.engines.fake import FakeEngine
from knapsack_genserver.errors import FailedPrecondition


class VllmLike:
    """See the module.

    Attributes:
        engine: that generates.
        gate: rollouts are sent while it is set.
        statuses: of the next requests for rollouts, which then get none.
        bodies: whole answers of the next requests for rollouts.
        cuts: connections that break after so many rollouts, for the next requests.
        healthy: what /health says.
        scale_out, rl: whether those routes are there.
        failing: routes of the weight update that fail.
        root: folder of the model, as /v1/models has it.
        started_with: checksum of the weights in root, with which it starts.
        logprobs_mode: as /server_info has it.
        requests: bodies of requests for rollouts.
        aborted: ids that it was told to abort.
        open, most_open: requests under way, now and at most.
        calls: of the weight update, in order.
        dead: it was made to generate with half of its weights.
    """

    def __init__(self, engine: Engine | None = None) -> None:
        self.engine = engine or FakeEngine()
        self.gate = asyncio.Event()
        self.gate.set()
        self.statuses: list[int] = []
        self.bodies: list[bytes] = []
        self.cuts: list[int] = []
        self.healthy = self.scale_out = self.rl = True
        self.failing: set[str] = set()
        self.root = "/models/first"
        self.started_with = "first weights"
        self.model = "model"
        self.logprobs_mode = "processed_logprobs"
        self.requests: list[dict[str, Any]] = []
        self.aborted: list[str] = []
        self.open = self.most_open = 0
        self.calls: list[str] = []
        self.dead = False
        self.label = "default"
        self.path = ""
        self._number = 0
        self._updating = False
        self._running = asyncio.Event()
        self._running.set()
        self._runner: web.AppRunner | None = None
        self.port = 0

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> None:
        """Listen, on the same port as before if there was one."""
        await self.engine.start()
        app = web.Application()
        app.router.add_get("/health", self._health)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/inference/v1/generate", self._generate)
        app.router.add_post("/inference/v1/abort_requests", self._abort)
        app.router.add_get("/weight_info", self._weight_info)
        app.router.add_get("/is_paused", self._is_paused)
        app.router.add_get("/server_info", self._server_info)
        for name in (
            "pause",
            "resume",
            "init_weight_transfer_engine",
            "start_weight_update",
            "update_weights",
            "finish_weight_update",
            "weight_checker",
        ):
            app.router.add_post(f"/{name}", getattr(self, f"_{name}"))
        self._runner = web.AppRunner(app, shutdown_timeout=0.01, handler_cancellation=True)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        """Break every connection and listen no more."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def restart(self) -> None:
        """Be another process, with the first weights."""
        await self.stop()
        self.label, self.path, self._number, self._updating = "default", "", 0, False
        self.engine = FakeEngine()
        self._running.set()
        await self.start()

    async def _health(self, _request: web.Request) -> web.Response:
        return web.Response(status=200 if self.healthy else 503)

    async def _models(self, _request: web.Request) -> web.Response:
        card = {"id": self.model, "root": self.root, "max_model_len": 64}
        return web.json_response({"object": "list", "data": [card]})

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        if not self.scale_out:
            return _error(403, "Scale-out endpoints are disabled. Restart vllm serve with ...")
        body = await request.json()
        if "token_ids" not in body:
            return _error(400, "token_ids: Field required")
        self.requests.append(body)
        if self.statuses:
            return _error(self.statuses.pop(0), "told to fail")
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        if max(body["token_ids"]) >= 64:
            # As vLLM does: what it refuses is found out when the stream has begun.
            error = {"error": {"message": "Token id 64 is out of vocabulary", "code": 400}}
            await response.write(f"data: {json.dumps(error)}\n\ndata: [DONE]\n\n".encode())
            return response
        if self.bodies:
            await response.write(self.bodies.pop(0))
            return response
        cut = self.cuts.pop(0) if self.cuts else None
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        try:
            for sent, message in enumerate([m async for m in self._rollouts(body)]):
                await self.gate.wait()
                if sent == cut:
                    assert request.transport is not None
                    request.transport.abort()
                    break
                await response.write(b"data: " + json.dumps(message).encode() + b"\n\n")
            else:
                await response.write(b"data: [DONE]\n\n")
        finally:
            self.open -= 1
        return response

    async def _rollouts(self, body: dict[str, Any]) -> Any:
        await self._running.wait()
        if self._updating:
            self.dead = True
        params = body["sampling_params"]
        assert params["n"] == 1 or params["temperature"] > 0
        sampling = Sampling(
            params["max_tokens"],
            params["temperature"],
            params["top_p"],
            params["top_k"],
            frozenset(params["stop_token_ids"]),
        )
        for at in range(params["n"]):
            group = Group(body["token_ids"], 1, sampling, params["seed"] + at)
            async for completion in self.engine.generate(group):
                yield self._message(at, completion)

    def _message(self, at: int, completion: Completion) -> dict[str, Any]:
        tokens = completion.token_ids
        return {
            "request_id": "generate-tokens-x",
            "output_mode": "tokens",
            "choices": [
                {
                    "index": at,
                    "token_ids": tokens,
                    "logprobs": {
                        "content": [
                            {"token_id": token, "logprob": p, "rank": 1, "top_logprobs": []}
                            for token, p in zip(tokens, completion.logprobs, strict=True)
                        ]
                    },
                    "finish_reason": completion.reason.value,
                    "weight_versions": [{"version": self.label, "start": 0, "end": len(tokens)}],
                }
            ],
        }

    async def _abort(self, request: web.Request) -> web.Response:
        self.aborted += (await request.json())["request_ids"]
        return web.Response()

    async def _weight_info(self, _request: web.Request) -> web.Response:
        if not self.rl:
            return _error(404, "Not Found")
        return web.json_response({"weight_version": self.label})

    async def _is_paused(self, _request: web.Request) -> web.Response:
        return web.json_response({"is_paused": not self._running.is_set()})

    async def _server_info(self, _request: web.Request) -> web.Response:
        config = {"model_config": {"logprobs_mode": self.logprobs_mode}}
        return web.json_response({"vllm_config": config})

    def _step(self, name: str) -> web.Response | None:
        self.calls.append(name)
        return _error(500, f"{name} was told to fail") if name in self.failing else None

    async def _pause(self, request: web.Request) -> web.Response:
        assert request.query["mode"] == "keep"
        self._running.clear()
        return self._step("pause") or web.json_response({"status": "paused"})

    async def _resume(self, _request: web.Request) -> web.Response:
        failure = self._step("resume")
        if failure is None:
            self._running.set()
        return failure or web.json_response({"status": "resumed"})

    async def _init_weight_transfer_engine(self, _request: web.Request) -> web.Response:
        return self._step("init") or web.json_response({})

    async def _start_weight_update(self, _request: web.Request) -> web.Response:
        failure = self._step("start")
        if failure is None:
            self._updating = True
        return failure or web.json_response({})

    async def _update_weights(self, request: web.Request) -> web.Response:
        self.path = (await request.json())["update_info"]["path"]
        failure = self._step("update")
        if failure is None and self.path != self.root:
            try:
                await self.engine.load_weights(Path(self.path), self._number + 1)
                self._number += 1
            except FailedPrecondition as error:
                return _error(500, str(error))
        return failure or web.json_response({})

    async def _finish_weight_update(self, request: web.Request) -> web.Response:
        failure = self._step("finish")
        if failure is None:
            self._updating = False
            self.label = (await request.json())["weight_version"]
        return failure or web.json_response({})

    async def _weight_checker(self, _request: web.Request) -> web.Response:
        weights = self.started_with if self.path in ("", self.root) else self.path
        return web.json_response({"checksums": {"weights": weights}})


def _error(status: int, message: str) -> web.Response:
    return web.json_response({"error": {"message": message, "code": status}}, status=status)


async def _main() -> None:
    server = VllmLike()
    await server.start()
    sys.stdout.write(f"{server.port}\n")
    sys.stdout.flush()
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_main())
