"""A stream of prompts -> one prompt at a time with its number of rollouts.

For trainers that draw a prompt whenever there is room for one, and have no batch to
divide: the next prompts are planned together, a window of them, and handed out singly.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Generic, TypedDict, TypeVar

from knapsack_trainer_client.arguments import check_int
from knapsack_trainer_client.errors import refused
from knapsack_trainer_client.nouns import Allocation, ReportReceipt
from knapsack_trainer_client.sync import BudgetClient

PromptT = TypeVar("PromptT")


class StreamState(TypedDict):
    """What a checkpoint keeps of a stream.

    Attributes:
        window: number of the first window that was not wholly handed out.
        prompts_drawn: prompts of the windows before it; the source goes on after them.
    """

    window: int
    prompts_drawn: int


@dataclass(frozen=True, slots=True)
class PlannedPrompt(Generic[PromptT]):
    """A prompt and how many rollouts to generate for it.

    Attributes:
        prompt: as drawn.
        prompt_id: its name.
        num_rollouts: at least 1.
        allocation: of its window.
        position: in the window.
    """

    prompt: PromptT
    prompt_id: str
    num_rollouts: int
    allocation: Allocation = field(repr=False)
    position: int = field(repr=False)


class PromptStream(Generic[PromptT]):
    """Plans the next window of prompts and hands them out one at a time.

        stream = PromptStream(client, tasks, prompt_id=id_of, window=256, rollouts_per_prompt=8)
        for planned in stream:
            rewards = rollouts_of(planned.prompt, planned.num_rollouts)
            stream.report(planned, rewards, policy_version=version)

    A window is planned when its first prompt is asked for, on what was reported by then;
    reports may come in any order and late. A window's number is its step. May be used from
    several threads. In asyncio: ``await asyncio.to_thread(stream.take)``, as a plan may
    wait for the scheduler.

    Larger windows leave more to choose from and know less of the newest rewards; a few
    times the prompts in flight is a good size.

    Args:
        client: decides.
        prompts: the source, an iterable that may be endless.
        prompt_id: names a prompt, the same in every epoch.
        window: prompts that are planned together.
        rollouts_per_prompt: the mean over a window.
        state: of the checkpoint that the trainer resumes from: the run is rewound to it,
            and ``prompts`` must go on after ``prompts_drawn`` prompts. None begins at the
            first window and leaves the run as it is.
        options: of ``BudgetClient.allocate``, such as ``max_rollouts``.
    """

    def __init__(
        self,
        client: BudgetClient,
        prompts: Iterable[PromptT],
        *,
        prompt_id: Callable[[PromptT], str],
        window: int,
        rollouts_per_prompt: int,
        state: StreamState | None = None,
        **options: Any,
    ) -> None:
        self._client = client
        self._source = iter(prompts)
        self._prompt_id = prompt_id
        self._window = check_int("window", window, 1)
        self._mean = check_int("rollouts_per_prompt", rollouts_per_prompt, 1)
        self._options = options
        self._planned: deque[PlannedPrompt[PromptT]] = deque()
        # A window whose planning failed is planned again.
        self._drawn: list[PromptT] = []
        self._lock = threading.Lock()
        self._next: StreamState = {"window": 0, "prompts_drawn": 0}
        # Of the window being handed out; behind _next, which is of the one after it.
        self._current: StreamState = {"window": 0, "prompts_drawn": 0}
        if state is not None:
            if set(state) != set(self._next):
                raise refused("state", state, "must be what PromptStream.state() returned")
            self._next = {
                "window": check_int("state['window']", state["window"]),
                "prompts_drawn": check_int("state['prompts_drawn']", state["prompts_drawn"]),
            }
            client.rewind(self._next["window"] - 1)

    def __iter__(self) -> Iterator[PlannedPrompt[PromptT]]:
        return self

    def __next__(self) -> PlannedPrompt[PromptT]:
        planned = self.take()
        if planned is None:
            raise StopIteration
        return planned

    def take(self) -> PlannedPrompt[PromptT] | None:
        """Return the next prompt, or None when the source has ended.

        Prompts that got no rollouts are passed over. Where it raises, no prompt is lost: the
        next call plans the same window.
        """
        with self._lock:
            while not self._planned:
                if not self._plan():
                    return None
            return self._planned.popleft()

    def report(
        self,
        planned: PlannedPrompt[PromptT],
        rewards: Iterable[Any],
        policy_version: int = 0,
        completion_tokens: Iterable[Any] | None = None,
        *,
        report_id: str | None = None,
    ) -> ReportReceipt:
        """Report rewards of a prompt's rollouts, all or some; see ``BudgetClient.report``."""
        count = len(planned.allocation.prompt_ids)

        def placed(values: Iterable[Any]) -> list[list[Any]]:
            groups: list[list[Any]] = [[] for _ in range(count)]
            groups[planned.position] = list(values)
            return groups

        return self._client.report(
            planned.allocation,
            placed(rewards),
            policy_version,
            None if completion_tokens is None else placed(completion_tokens),
            report_id=report_id,
        )

    def state(self) -> StreamState:
        """Return what a checkpoint keeps, a dictionary of integers.

        A trainer that resumes does the window again that was under way: its rollouts in
        flight are lost with the process anyway.
        """
        with self._lock:
            return (self._current if self._planned else self._next).copy()

    def _plan(self) -> bool:
        if not self._drawn:
            self._drawn = list(islice(self._source, self._window))
        prompts = self._drawn
        if not prompts:
            return False
        ids = [self._prompt_id(prompt) for prompt in prompts]
        allocation = self._client.allocate(
            ids, self._mean * len(ids), self._next["window"], **self._options
        )
        self._planned.extend(
            PlannedPrompt(prompt, name, size, allocation, position)
            for position, (prompt, name, size) in enumerate(
                zip(prompts, ids, allocation.num_rollouts, strict=True)
            )
            if size
        )
        self._drawn = []
        self._current = self._next
        self._next = {
            "window": self._current["window"] + 1,
            "prompts_drawn": self._current["prompts_drawn"] + len(prompts),
        }
        return True
