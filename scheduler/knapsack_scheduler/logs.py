"""Structured logs on stderr: JSON lines, or text for people. Secrets are never in them."""

from __future__ import annotations

import json
import logging
import sys
from contextvars import ContextVar
from datetime import UTC, datetime

from aiohttp.http_exceptions import HttpProcessingError

from knapsack_scheduler.events import (
    BudgetDivided,
    CallHandled,
    Event,
    LoopLagged,
    OutcomesCounted,
    RunRemoved,
    RunRewound,
)
from knapsack_scheduler.jumps import NOTICED
from knapsack_scheduler.logwriter import LogWriter

REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="")
"""Names the call that is being answered, in every line that is logged on its behalf."""

SLOW_SECONDS = 1.0
"""A call or a wait that took as long is worth a line: trainers give up after two."""

_LOG = logging.getLogger("knapsack_scheduler")
_FAULT_OF_CALLER = {
    *("INVALID_ARGUMENT", "NOT_FOUND", "ALREADY_EXISTS", "FAILED_PRECONDITION"),
    *("UNAUTHENTICATED", "PERMISSION_DENIED", "RESOURCE_EXHAUSTED"),
}


class JsonLines(logging.Formatter):
    """One JSON object per record; fields given as ``extra={"fields": {...}}`` are merged."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as one line."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class Text(logging.Formatter):
    """One readable line per record."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as a line with its fields behind it."""
        fields = _fields(record)
        return super().format(record) + "".join(
            f" {key}={_shown(value)}" for key, value in fields.items()
        )


def _shown(value: object) -> str:
    """Return a field as one word: a caller's ids must not pass for lines or fields of ours."""
    text = str(value)
    is_word = text.isprintable() and not any(c in " =\"'\\" for c in text)
    return text if is_word else repr(text)


def _fields(record: logging.LogRecord) -> dict[str, object]:
    call = {"request_id": REQUEST_ID.get()} if REQUEST_ID.get() else {}
    return {**getattr(record, "fields", {}), **call}


class _Hidden(logging.Formatter):
    """Another formatter's lines without a secret, whoever put it there."""

    def __init__(self, formatter: logging.Formatter, secret: tuple[str, str]) -> None:
        super().__init__()
        self._formatter = formatter
        self._secret = secret

    def format(self, record: logging.LogRecord) -> str:
        return self._formatter.format(record).replace(*self._secret)


def configure(level: str, kind: str, secret: tuple[str, str]) -> None:
    """Send every log of the process to stderr.

    Args:
        level: debug, info, warning or error.
        kind: json or text.
        secret: what no line may hold, and what to write in its place.
    """
    # None where the process began with stderr closed: its number may be of any file by now.
    handler = LogWriter(sys.stderr.fileno()) if sys.stderr else logging.NullHandler()
    handler.setFormatter(_Hidden(JsonLines() if kind == "json" else Text(), secret))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for noisy in ("alembic", "grpc", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.getLogger("aiohttp.access").setLevel(logging.WARNING)
    logging.getLogger("aiohttp.server").addFilter(_without_request)


def _without_request(record: logging.LogRecord) -> bool:
    """Keep what a malformed HTTP request held out of its line: it may be a token."""
    if record.exc_info and isinstance(record.exc_info[1], HttpProcessingError):
        record.exc_info, record.args = None, ()
        record.levelno, record.levelname = logging.WARNING, "WARNING"
        record.msg = "a malformed HTTP request was refused"
    return True


def log_event(event: Event) -> None:
    """Write an event to the log, with the ids that find it again."""
    match event:
        case CallHandled(code="OK"):
            # The time of an import is that of its caller, who sends it bit by bit.
            slow = event.seconds >= SLOW_SECONDS and event.method != "ImportOutcomes"
            level, message = (logging.WARNING, "call was slow") if slow else (logging.DEBUG, "call")
            _write(level, message, method=event.method, **_ids(event))
        case CallHandled():
            level = logging.WARNING if event.code in _FAULT_OF_CALLER else logging.ERROR
            _write(
                logging.INFO if event.code in ("CANCELLED", "NOT_FOUND") else level,
                "call refused",
                method=event.method,
                code=event.code,
                reason=event.message,
                **_ids(event),
            )
        case LoopLagged() if event.seconds >= SLOW_SECONDS:
            _write(
                logging.WARNING,
                "event loop was blocked, or had no processor, and every call with it",
                seconds=round(event.seconds, 2),
            )
        case BudgetDivided():
            _write(
                logging.INFO,
                "budget divided",
                run_id=event.run_id,
                step=event.step,
                wave=event.wave,
                prompts=event.prompts,
                rollouts=event.allocated,
                largest_group=event.reasons.largest_group,
                effective_group_rate=round(event.reasons.effective_group_rate, 4),
            )
            _warn_of_jump(event.run_id, "step", event.step, event.step_jump)
        case OutcomesCounted():
            _write(
                logging.INFO,
                "outcomes imported" if event.imported else "outcomes reported",
                run_id=event.run_id,
                step=event.step,
                rollouts=event.counted.accepted,
                ignored=event.counted.ignored,
                groups=event.counted.groups,
                effective_groups=event.counted.effective_groups,
            )
            _warn_of_jump(event.run_id, "step", event.step, event.step_jump)
            _warn_of_jump(event.run_id, "policy_version", event.policy_version, event.version_jump)
        case RunRewound():
            _write(logging.WARNING, "run rewound", run_id=event.run_id, step=event.step)
        case RunRemoved():
            _write(logging.WARNING, "run deleted", run_id=event.run_id)


def _warn_of_jump(run_id: str, field: str, value: int, jump: int) -> None:
    if jump > NOTICED:
        _write(
            logging.WARNING,
            "far beyond all before; if it is a mistake, rewind to the step before it",
            run_id=run_id,
            field=field,
            value=value,
            newest_before=value - jump,
        )


def _ids(event: CallHandled) -> dict[str, object]:
    return {
        "run_id": event.run_id,
        "call_id": event.call_id,
        "milliseconds": round(event.seconds * 1e3, 2),
    }


def _write(level: int, message: str, **fields: object) -> None:
    if _LOG.isEnabledFor(level):
        _LOG.log(level, message, extra={"fields": fields})
