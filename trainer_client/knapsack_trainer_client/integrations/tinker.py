"""tinker-cookbook with a number of rollouts for each prompt: a data set around yours.

    dataset = BudgetedDataset(dataset, "localhost:50051", "exp1", num_epochs=3, max_rollouts=64)

tinker-cookbook centres every group by itself, so nothing else changes. A batch has as many
environments as before; what changes is how many of them each group gets. For
tinker-cookbook 0.6.
"""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from knapsack_trainer_client.errors import ExtraMissing, refused
from knapsack_trainer_client.nouns import Allocation
from knapsack_trainer_client.sync import BudgetClient

try:
    from tinker_cookbook.rl.dataset_utils import EpochCycledRLDataset, epoch_batch_index
    from tinker_cookbook.rl.types import EnvGroupBuilder, RLDataset
except ImportError as error:
    raise ExtraMissing(
        f"the tinker integration needs tinker-cookbook: pip install tinker-cookbook ({error})"
    ) from error

_clients: dict[tuple[str, str], BudgetClient] = {}
"""Of this process, by address and run: builders run in worker processes as well."""
_making = threading.Lock()
"""Groups finish in threads, and a run has one client of a process."""


class BudgetedDataset(RLDataset):
    """A data set whose groups have the sizes that the scheduler says.

    Give it to the training as the data set, outermost, with ``num_epochs`` here and not in
    the training's ``Config``: the batch index is the run's step, and must not begin anew.

    The first batch rewinds the run to the batch before it, so a training that resumes goes
    on with the statistics of its checkpoint, and one that begins at batch 0 begins its run
    anew. Groups of two places in the data set are two groups, also of one prompt.

    Args:
        dataset: yours; its builders are dataclasses with a number of environments.
        scheduler: address.
        run_id: name of the run.
        num_epochs, shuffle_seed: as of tinker-cookbook's ``EpochCycledRLDataset``.
        prompt_id: names the prompt of a builder, the same in every epoch. None: its place
            in the data set, which then must give the same batches in every run.
        size_field: the builders' field with the number of environments.
        min_rollouts: of a group, from 2, or 0 to skip prompts.
        max_rollouts: of a group; None for the run's.
        client_options: of ``BudgetClient``, such as ``token``, ``tls`` and ``config``. Given
            to the workers with every group.

    Raises:
        InvalidRequest: an argument is wrong; when a batch is asked for, also a builder
            without ``size_field``, or a batch index that goes back.
    """

    def __init__(
        self,
        dataset: RLDataset,
        scheduler: str,
        run_id: str,
        *,
        num_epochs: int = 1,
        shuffle_seed: int | None = None,
        prompt_id: Callable[[EnvGroupBuilder], str] | None = None,
        size_field: str = "num_envs",
        min_rollouts: int = 2,
        max_rollouts: int | None = None,
        **client_options: Any,
    ) -> None:
        if min_rollouts == 1:
            raise refused("min_rollouts", 1, "must be 0, to skip prompts, or at least 2")
        self._inner = dataset
        self._epochs = EpochCycledRLDataset(dataset, num_epochs, shuffle_seed)
        self._desk = _Desk(scheduler, run_id, tuple(sorted(client_options.items())))
        self._prompt_id = prompt_id
        self._size_field = size_field
        self._bounds: dict[str, Any] = {"min_rollouts": min_rollouts, "max_rollouts": max_rollouts}
        self._newest: int | None = None

    def get_batch(self, index: int) -> Sequence[EnvGroupBuilder]:
        """Return the builders of a batch, without those that got no rollouts.

        Waits for the scheduler at most the client's ``timeout``.
        """
        if self._newest is not None and index < self._newest:
            raise refused(
                "index",
                index,
                f"must not be below {self._newest}, the newest batch; give num_epochs to "
                "BudgetedDataset and leave it 1 in the training's Config",
            )
        builders = self._epochs.get_batch(index)
        sizes = [self._size(builder) for builder in builders]
        client = self._desk.client()
        if self._newest is None:
            client.rewind(index - 1)
        self._newest = index
        allocation = client.allocate(
            self._names(index, builders), sum(sizes), index, **self._bounds
        )
        return [
            BudgetedGroup(
                dataclasses.replace(builder, **{self._size_field: size}),
                self._desk,
                allocation,
                position,
            )
            for position, (builder, size) in enumerate(
                zip(builders, allocation.num_rollouts, strict=True)
            )
            if size
        ]

    def __len__(self) -> int:
        return len(self._epochs)

    def _names(self, index: int, builders: Sequence[EnvGroupBuilder]) -> list[str]:
        if self._prompt_id is not None:
            return [self._prompt_id(builder) for builder in builders]
        batch = epoch_batch_index(index, len(self._inner), self._epochs.shuffle_seed)
        return [f"{batch}/{position}" for position in range(len(builders))]

    def _size(self, builder: EnvGroupBuilder) -> int:
        fields = [f.name for f in dataclasses.fields(builder)] if _is_dataclass(builder) else []
        if self._size_field not in fields:
            raise refused(
                "size_field",
                self._size_field,
                f"must be a field of {type(builder).__name__}, a dataclass, that says how many "
                f"environments it makes; it has {fields}",
            )
        return int(getattr(builder, self._size_field))


@dataclass(frozen=True, slots=True)
class _Desk:
    """Where a run is asked and told, in whatever process: picklable, no connection."""

    scheduler: str
    run_id: str
    options: tuple[tuple[str, Any], ...]

    def client(self) -> BudgetClient:
        """Return this process's client of the run."""
        key = (self.scheduler, self.run_id)
        with _making:
            if key not in _clients:
                _clients[key] = BudgetClient(self.scheduler, self.run_id, **dict(self.options))
            return _clients[key]


@dataclass(frozen=True)
class BudgetedGroup(EnvGroupBuilder):
    """A builder of yours with its number of environments, whose rewards are reported.

    Attributes:
        inner: the builder.
        desk: where to report.
        allocation: of the batch.
        position: in the batch.
    """

    inner: EnvGroupBuilder
    desk: _Desk
    allocation: Allocation
    position: int

    async def make_envs(self) -> Any:
        """Return the environments of the inner builder."""
        return await self.inner.make_envs()

    async def compute_group_rewards(self, trajectory_group: Any, env_group: Any) -> Any:
        """Return the inner builder's rewards, after reporting each rollout's total.

        So groups are reported that tinker-cookbook drops later, for their rewards are all
        equal.
        """
        scored = await self.inner.compute_group_rewards(trajectory_group, env_group)
        rewards: list[list[float]] = [[] for _ in self.allocation.prompt_ids]
        lengths: list[list[int]] = [[] for _ in self.allocation.prompt_ids]
        for trajectory, (final, _) in zip(trajectory_group, scored, strict=True):
            steps = trajectory.transitions
            rewards[self.position].append(sum(step.reward for step in steps) + final)
            lengths[self.position].append(sum(len(step.ac.tokens) for step in steps))
        await asyncio.to_thread(self._report, rewards, lengths)
        return scored

    async def cleanup(self) -> None:
        """Clean up after the inner builder."""
        await self.inner.cleanup()

    def logging_tags(self) -> list[str]:
        """Return the inner builder's tags."""
        return list(self.inner.logging_tags())

    def _report(self, rewards: list[list[float]], lengths: list[list[int]]) -> None:
        self.desk.client().report(
            self.allocation,
            rewards,
            policy_version=self.allocation.step,
            completion_tokens=lengths,
        )


def _is_dataclass(value: object) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)
