"""Work that is finished also when those who wait for it are cancelled."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from contextvars import ContextVar, copy_context
from typing import Any, TypeVar

from knapsack_scheduler.errors import SchedulerError

_LOG = logging.getLogger(__name__)

Answer = TypeVar("Answer")

_PROTECTED: ContextVar[bool] = ContextVar("protected", default=False)


def protected(work: Coroutine[Any, Any, Answer]) -> asyncio.Task[Answer]:
    """Begin work as a task that nobody may cancel; wait for it by ``asyncio.shield``."""
    context = copy_context()
    context.run(_PROTECTED.set, True)
    return asyncio.get_running_loop().create_task(work, context=context)


def tell_of_unheard(error: BaseException) -> None:
    """Log an error of work that nobody waits for any more; a refusal concerned them alone."""
    if not isinstance(error, SchedulerError | asyncio.CancelledError):
        _LOG.error("a call failed after its caller had gone", exc_info=error)


async def finished(
    work: Coroutine[Any, Any, Answer], unfinished: set[asyncio.Future[None]]
) -> Answer:
    """Return what work comes to; if the caller is cancelled, it goes on without them.

    Inside of work that is protected already it is just awaited: a task of its own would take
    some turns of the event loop.

    Args:
        work: to be done.
        unfinished: holds the task of it for as long as it takes, for whoever has to wait for
            what callers left. A loop alone does not keep its tasks from the garbage collector.
    """
    if _PROTECTED.get():
        return await work
    answer: Any = asyncio.get_running_loop().create_future()

    async def finishing() -> None:
        # Told by a future of its own, the caller hears of it two turns of the loop sooner
        # than through a shield.
        try:
            result = await work
        except BaseException as error:
            if answer is not None and not answer.done():
                answer.set_exception(error)
            else:
                tell_of_unheard(error)
        else:
            if answer is not None and not answer.done():
                answer.set_result(result)

    task = protected(finishing())
    unfinished.add(task)
    task.add_done_callback(unfinished.discard)
    try:
        return await answer  # type: ignore[no-any-return]
    finally:
        # An error holds the frames that it passed, this one too, and with them the request.
        answer = None
