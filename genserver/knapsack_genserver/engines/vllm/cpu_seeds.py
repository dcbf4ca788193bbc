"""Seeded requests whose prompt takes vLLM more than one step, on the CPU.

vLLM draws a number for every request of a step, also for those that are still at their
prompt, and takes the draw back by setting the request's random generator to an earlier
offset. Generators of the CPU have no offset, and the engine dies of it. It happens to
any seeded request with a long prompt, and after a weight update to rollouts under way,
whose prompts and tokens are computed anew.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def mend(runner: Any) -> None:
    """Let a class of model runners take draws back by counting them.

    A generator that has made k tokens is one that was seeded and has drawn k numbers, since
    vLLM's sampler for the CPU draws one number per token.

    Args:
        runner: vLLM's class; mended once.
    """
    original = runner._bookkeeping_sync
    if getattr(original, "knapsack_mended", False):
        return

    def bookkeeping(self: Any, *args: Any, **kwargs: Any) -> Any:
        batch = self.input_batch
        put_back = {}
        for at in np.flatnonzero(self.discard_request_mask.np[: batch.num_reqs]).tolist():
            generator = batch.generators.pop(at, None)
            if generator is not None:
                request = self.requests[batch.req_ids[at]]
                _rewind(generator, request.sampling_params.seed, len(request.output_token_ids))
                put_back[at] = generator
        try:
            return original(self, *args, **kwargs)
        finally:
            batch.generators.update(put_back)

    bookkeeping.knapsack_mended = True  # type: ignore[attr-defined]
    runner._bookkeeping_sync = bookkeeping


def _rewind(generator: torch.Generator, seed: int, draws: int) -> None:
    generator.manual_seed(seed)
    if draws:
        torch.randint(0, 2**31, (draws,), generator=generator, dtype=torch.long)
