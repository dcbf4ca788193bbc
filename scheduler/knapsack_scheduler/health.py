"""Whether the server serves, by the names that health checks ask for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from grpc_health.v1.health_pb2 import HealthCheckResponse

from knapsack_scheduler.errors import NotFound


class Health:
    """Remembers the status of each service and tells those who watch it.

    Nothing here waits for a watcher: the servicer of grpcio-health-checking writes to its
    watchers under the lock that a change needs, and one that takes nothing keeps the server
    from ever becoming ready, and from draining.
    """

    def __init__(self) -> None:
        self._status: dict[str, HealthCheckResponse.ServingStatus] = {}
        self._changed = asyncio.Event()
        self._is_over = False

    def set(self, service: str, *, serving: bool) -> None:
        """Note whether a service is there."""
        self._status[service] = (
            HealthCheckResponse.SERVING if serving else HealthCheckResponse.NOT_SERVING
        )
        self._tell()

    def end(self) -> None:
        """Let watches end when they have yielded the last status: draining waits for them."""
        self._is_over = True
        self._tell()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def check(self, service: str) -> HealthCheckResponse:
        """Return the status of a service; NotFound for a name that nothing was noted of."""
        status = self._status.get(service)
        if status is None:
            raise NotFound(f"there is no service {service[:100]!r} here")
        return HealthCheckResponse(status=status)

    async def watch(self, service: str) -> AsyncIterator[HealthCheckResponse]:
        """Yield the status of a service, and again whenever it has changed since, until the end."""
        last = None
        while True:
            changed = self._changed
            status = self._status.get(service, HealthCheckResponse.SERVICE_UNKNOWN)
            if status != last:
                last = status
                yield HealthCheckResponse(status=status)
            elif self._is_over:
                return
            else:
                await changed.wait()
