"""Play a trainer: allocate, roll dice instead of generating, report; then compare the books.

What a new deployment is tried with. It prints one JSON object per step and one at the end, and
exits with 1 if the scheduler's totals are not those of the rewards that were reported, each
counted once, whatever happened to the scheduler in between.

The token, if the scheduler asks for one, is read from the file that --token-file names.
"""

import argparse
import json
import random
import signal
import sys
import time
from pathlib import Path

from knapsack_trainer_client import TLS, BudgetClient
from knapsack_trainer_client.metrics import expose_metrics


def main() -> int:
    """Run the loop and return the exit code."""
    options = _parser().parse_args()
    # The first process of a container dies of no signal that it does not handle.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    # A third of the prompts are solved or hopeless, as in a real batch.
    rates = {f"prompt-{i:05d}": [0.0, 0.02, 0.15, 0.5, 0.85, 1.0][i % 6] for i in range(300)}
    dice = random.Random(options.seed)
    token = options.token_file.read_text().strip() if options.token_file else None
    tls = TLS(ca=options.tls_ca) if options.tls_ca else None
    rollouts = successes = fallbacks = 0
    with BudgetClient(options.scheduler, options.run, token=token, tls=tls) as budget:
        if options.metrics:
            expose_metrics(budget, options.metrics)
        # This run begins anew, so that its totals are those of this program.
        budget.rewind(-1)
        for step in range(options.steps):
            batch = dice.sample(sorted(rates), 64)
            allocation = budget.allocate(batch, 8 * len(batch), step)
            time.sleep(options.step_seconds)
            rewards = [
                [float(dice.random() < rates[prompt]) for _ in range(count)]
                for prompt, count in zip(batch, allocation.num_rollouts, strict=True)
            ]
            receipt = budget.report(allocation, rewards, policy_version=step)
            rollouts += sum(map(len, rewards))
            successes += int(sum(map(sum, rewards)))
            fallbacks += allocation.is_fallback
            _say(
                step=step,
                largest_group=max(allocation.num_rollouts),
                fallback=allocation.is_fallback,
                delivered=receipt.delivered,
            )
        flushed = budget.flush(60)
        known = budget.prompt_stats()
    counted = sum(prompt.total_rollouts for prompt in known)
    counted_successes = sum(prompt.total_successes for prompt in known)
    right = flushed and (counted, counted_successes) == (rollouts, successes)
    _say(
        event="done",
        reported=rollouts,
        counted=counted,
        successes=successes,
        counted_successes=counted_successes,
        fallback_steps=fallbacks,
        right=right,
    )
    return 0 if right else 1


def _say(**what: object) -> None:
    print(json.dumps(what), flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--scheduler", default="localhost:50051", help="address (default: %(default)s)")
    add("--run", default="example", help="name of the run (default: %(default)s)")
    add("--steps", type=int, default=200, help="training steps (default: %(default)s)")
    add("--step-seconds", type=float, default=0.1, help="length of one (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the dice (default: %(default)s)")
    add("--metrics", help="address of the client's metrics, HOST:PORT (default: none)")
    add("--token-file", type=Path, help="file with a bearer token (default: none)")
    add("--tls-ca", help="PEM authorities of the scheduler's certificate (default: no TLS)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
