"""Structured logs on stderr: JSON lines, or text for people."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime

from knapsack_genserver.events import (
    CallHandled,
    Event,
    ServingBegan,
    SessionRefused,
    WaveCompleted,
    WeightsUpdated,
)

_LOG = logging.getLogger("knapsack_genserver")


class JsonLines(logging.Formatter):
    """One JSON object per record; fields given as ``extra={"fields": {...}}`` are merged."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as one line."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def configure(level: str, kind: str) -> None:
    """Send every log of the process to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    if kind == "json":
        handler.setFormatter(JsonLines())
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s"))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.getLogger("aiohttp.access").setLevel(logging.WARNING)


def log_event(event: Event) -> None:
    """Write an event to the log, with the ids that find it again."""
    fields: dict[str, object]
    match event:
        case ServingBegan():
            fields = {"weight_version": event.weight_version, "seconds": round(event.seconds, 3)}
            _LOG.info("serving", extra={"fields": fields})
        case WaveCompleted():
            fields = {
                "request_id": event.request_id[:256],
                "prompts": event.prompts,
                "rollouts": event.rollouts,
                "failed": event.failed,
                "stopped": event.stopped,
                "tokens": event.tokens,
                "seconds": round(event.seconds, 3),
                "seconds_to_95": round(event.seconds_to_95, 3),
            }
            if event.failed:
                fields["reason"] = event.error
                _LOG.warning("rollouts failed", extra={"fields": fields})
            else:
                _LOG.info("rollouts completed", extra={"fields": fields})
        case SessionRefused():
            fields = {
                "method": "GenerateSession",
                "code": event.code,
                "request_id": event.request_id[:256],
                "reason": event.message,
            }
            _LOG.warning("request in a session refused", extra={"fields": fields})
        case CallHandled():
            fields = {
                "method": event.method,
                "code": event.code,
                "request_id": event.request_id[:256],
                "seconds": round(event.seconds, 3),
            }
            if event.code == "OK":
                _LOG.debug("call", extra={"fields": fields})
            elif event.code == "CANCELLED":
                _LOG.info("call cancelled", extra={"fields": fields})
            else:
                fields["reason"] = event.message
                _LOG.warning("call refused", extra={"fields": fields})
        case WeightsUpdated():
            fields = {"weight_version": event.version, "seconds": round(event.seconds, 3)}
            if event.failed:
                _LOG.error("weight update failed", extra={"fields": fields})
            else:
                _LOG.info("weights updated", extra={"fields": fields})
