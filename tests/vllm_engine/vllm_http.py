"""The server's HTTP API, for tests."""

from __future__ import annotations

from typing import Any

import aiohttp


class Http:
    """The server's HTTP API as a trainer calls it.

    Attributes:
        base: its URL.
        model: the model's name.
    """

    def __init__(self, session: aiohttp.ClientSession, base: str, model: str) -> None:
        self._session = session
        self.base = base
        self.model = model

    async def post(self, path: str, **body: Any) -> tuple[int, Any]:
        """Return status and answer of a POST."""
        async with self._session.post(self.base + path, json=body) as answer:
            return answer.status, await answer.json(content_type=None)

    async def get(self, path: str) -> tuple[int, Any]:
        """Return status and answer of a GET."""
        async with self._session.get(self.base + path) as answer:
            return answer.status, await answer.json(content_type=None)
