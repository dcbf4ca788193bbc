"""The command line: knapsack-genserver serve."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

# gRPC's core writes lines of its own to stderr, among our log and our error messages.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

try:
    from knapsack_genserver import fleet_flags, logs
    from knapsack_genserver.admission import AdmissionLimits
    from knapsack_genserver.engine import Engine
    from knapsack_genserver.errors import ConfigError, GeneratorError
    from knapsack_genserver.feeder import Feeding
    from knapsack_genserver.server import ServerOptions, serve
    from knapsack_genserver.wire import Limits
except ModuleNotFoundError as error:
    sys.exit(
        f"knapsack-genserver: {error.name} is not installed; pip install 'knapsack-rl[genserver]'"
    )


def main(arguments: list[str] | None = None) -> None:
    """Run the command; exits with 0, or 2 if it could not start."""
    options = _parser().parse_args(arguments)
    logs.configure(options.log_level, options.log_format)
    server = ServerOptions(
        listen=options.listen,
        admin_listen=options.admin_listen,
        health_listen=options.health_listen,
        insecure=options.insecure,
        weights_root=options.weights_root,
        limits=Limits(options.max_prompts, options.max_group_rollouts),
        admission=AdmissionLimits(
            options.max_waiting_rollouts,
            options.max_call_rollouts,
            options.max_prompt_tokens,
            options.max_calls,
        ),
        feeding=Feeding(
            options.chunk_rollouts, options.max_unread_rollouts, options.max_unread_tokens
        ),
        seed=options.seed,
        drain_seconds=options.drain_seconds,
    )
    try:
        asyncio.run(serve(_engine(options), server))
    except (ConfigError, GeneratorError) as error:
        print(f"knapsack-genserver: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _engine(options: argparse.Namespace) -> Engine:
    if options.engine == "fake":
        from knapsack_genserver.engines.fake import FakeEngine

        return FakeEngine(weight_version=options.weight_version)
    if options.engine in fleet_flags.ENGINES:
        return fleet_flags.engine(options)
    if options.model is None:
        raise ConfigError("model: is needed; --model DIR names a folder with a causal model")
    # Nothing is fetched: the model is on this disk or the server does not start.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        from knapsack_genserver.engines.transformers import TransformersEngine, TransformersOptions
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"engine = 'transformers': {error.name} is not installed; "
            "pip install 'knapsack-rl[genserver]'"
        ) from None
    return TransformersEngine(
        TransformersOptions(
            options.model,
            options.dtype,
            options.device,
            options.threads,
            options.max_batch_rollouts,
            options.max_batch_tokens,
            options.weight_version,
        )
    )


def _count(least: int) -> type:
    class Count(int):
        """A whole number with a least value."""

        def __new__(cls, text: str) -> Count:
            """Read it from the command line."""
            value = super().__new__(cls, text)
            if value < least:
                raise ValueError
            return value

    Count.__name__ = f"whole number of at least {least}"
    return Count


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="knapsack-genserver",
        description="Generates unequal numbers of rollouts per prompt and streams them back.",
    )
    parser.add_argument("--version", action="version", version=version("knapsack-rl"))
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser(
        "serve",
        help="serve the API until SIGTERM",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    default = ServerOptions()
    add = command.add_argument
    add(
        "--engine",
        choices=("transformers", *fleet_flags.ENGINES, "fake"),
        default="transformers",
        help="what generates; fake has no model and is for tests",
    )
    add("--model", type=Path, metavar="DIR", help="folder with a causal language model")
    add("--listen", default=default.listen, metavar="ADDRESS", help="address of the API")
    add(
        "--admin-listen",
        default=default.admin_listen,
        metavar="ADDRESS",
        help="address of /metrics, /healthz and /readyz",
    )
    add(
        "--health-listen",
        default=default.health_listen,
        metavar="ADDRESS",
        help="address of plaintext gRPC health checks, for probes",
    )
    add("--insecure", action="store_true", help="allow an API that others can reach")
    add("--weights-root", type=Path, metavar="DIR", help="folder that weights must lie in")
    add("--weight-version", type=_count(0), default=0, help="version of the model folder's weights")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of weights")
    add("--device", default="cpu", help="device of the model, such as cuda:0")
    add("--threads", type=_count(0), default=0, help="threads on the CPU; 0 is torch's choice")
    add("--max-batch-rollouts", type=_count(1), default=1024, help="rollouts decoded at once")
    add("--max-batch-tokens", type=_count(1), default=65_536, help="tokens in a batch's cache")
    add(
        "--max-waiting-rollouts",
        type=_count(1),
        default=default.admission.waiting_rollouts,
        help="rollouts admitted and not finished, of all calls; more are refused",
    )
    _add_limits(add, default)
    add("--seed", type=_count(0), help="of requests that name no seed; none draws one")
    add(
        "--drain-seconds",
        type=float,
        default=default.drain_seconds,
        help="how long calls under way may take to end after SIGTERM",
    )
    add(
        "--log-level", choices=("debug", "info", "warning", "error"), default="info", help="of logs"
    )
    add("--log-format", choices=("json", "text"), default="json", help="of logs")
    fleet_flags.add_flags(command, _count(1))
    return parser


def _add_limits(add: Callable[..., object], default: ServerOptions) -> None:
    """Add the flags of what a call may ask for and how the engine is fed."""
    admission, limits, feeding = default.admission, default.limits, default.feeding
    for flag, value, text in (
        ("--max-call-rollouts", admission.call_rollouts, "the same, of one call"),
        ("--max-group-rollouts", limits.group, "rollouts of one prompt in a call"),
        ("--max-prompts", limits.prompts, "prompts of one call"),
        ("--max-prompt-tokens", admission.prompt_tokens, "prompt tokens held, of all calls"),
        ("--max-calls", admission.calls, "calls that generate at once"),
        (
            "--chunk-rollouts",
            feeding.chunk_rollouts,
            "rollouts of a prompt that the engine is given at once; larger groups are cut",
        ),
        (
            "--max-unread-rollouts",
            feeding.unread_rollouts,
            "finished rollouts that a caller may leave unread before its work is held",
        ),
        ("--max-unread-tokens", feeding.unread_tokens, "the same, in tokens"),
    ):
        add(flag, type=_count(1), default=value, metavar="N", help=text)


if __name__ == "__main__":
    main()
