"""vLLM's own HTTP API, OpenAI's routes and the RL routes, on the engine of this process."""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
from typing import Any

import uvicorn
from vllm import envs
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.launcher import NoSignalServer

from knapsack_genserver.errors import ConfigError


class HttpApi:
    """vLLM's app on an engine, served until stopped.

    Args:
        engine: what every route works on.
        arguments: of vLLM's command line.
        sock: bound.
    """

    def __init__(self, engine: Any, arguments: argparse.Namespace, sock: socket.socket) -> None:
        self._engine = engine
        self._arguments = arguments
        self._sock = sock
        self._server: Any = None
        self._task: asyncio.Task[None] | None = None

    async def start(self, rl_routes: bool) -> None:
        """Serve.

        Args:
            rl_routes: whether routes that change weights and call workers are there; they
                ask nobody who they are.
        """
        # Read when the routes are made.
        os.environ["VLLM_SERVER_DEV_MODE"] = "1" if rl_routes else "0"
        arguments = self._arguments
        tasks = await self._engine.get_supported_tasks()
        app = build_app(arguments, tasks, self._engine.model_config)
        await init_app_state(self._engine, app.state, arguments, tasks)
        config = uvicorn.Config(
            app,
            log_config=None,
            log_level=arguments.uvicorn_log_level,
            access_log=not arguments.disable_uvicorn_access_log,
            timeout_graceful_shutdown=1,
            timeout_keep_alive=envs.VLLM_HTTP_TIMEOUT_KEEP_ALIVE,
            ssl_keyfile=arguments.ssl_keyfile,
            ssl_certfile=arguments.ssl_certfile,
            ssl_ca_certs=arguments.ssl_ca_certs,
            ssl_cert_reqs=arguments.ssl_cert_reqs,
        )
        config.h11_max_incomplete_event_size = arguments.h11_max_incomplete_event_size
        config.load()
        self._server = app.state.server = NoSignalServer(config)
        self._task = asyncio.ensure_future(self._server.serve(sockets=[self._sock]))
        while not self._server.started:
            if self._task.done():
                self._task.result()
                raise ConfigError("http_listen: vLLM's HTTP server did not start")
            await asyncio.sleep(0.01)

    async def stop(self) -> None:
        """End calls under way and close the socket."""
        if self._task is not None:
            self._server.should_exit = True
            await asyncio.gather(self._task, return_exceptions=True)
        self._sock.close()
